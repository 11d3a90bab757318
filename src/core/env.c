/* SPDX-License-Identifier: MIT */
#include "core/env.h"

#include <stdlib.h>
#include <string.h>

int na_disabled(const char *word)
{
    const char *list = getenv("NATTEN_DISABLE");
    size_t length = strlen(word);
    while (list && *list) {
        size_t span = strcspn(list, ",");
        if (span == length && !strncmp(list, word, length))
            return 1;
        list += span + (list[span] == ',');
    }
    return 0;
}
