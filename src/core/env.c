/* SPDX-License-Identifier: MIT */
#include "core/env.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static pthread_once_t once = PTHREAD_ONCE_INIT;
static char disabled[1024];

/* Copied once: another thread may change the environment later. */
static void read_environment(void)
{
    const char *list = getenv("NATTEN_DISABLE");
    snprintf(disabled, sizeof disabled, "%s", list ? list : "");
}

int na_disabled(const char *word)
{
    pthread_once(&once, read_environment);
    size_t length = strlen(word);
    for (const char *list = disabled; *list;) {
        size_t span = strcspn(list, ",");
        if (span == length && !strncmp(list, word, length))
            return 1;
        list += span + (list[span] == ',');
    }
    return 0;
}

const char *na_environment(const char *name)
{
    const char *value = getenv(name);
    return value && *value ? value : NULL;
}
