/* SPDX-License-Identifier: MIT
 * Neighbouring axes along which every query sees every key are one axis to a kernel: a window of
 * 7 x 7 on a map of 7 x 7 is one of 49 tokens on a row of 49, which fills more lanes. */
#ifndef NATTEN_CORE_MERGE_H
#define NATTEN_CORE_MERGE_H

#include <stddef.h>

#include "natten.h"

/* Makes such axes of a checked problem one, in place, where tensors' layouts allow it; returns how
 * many axes there are fewer. Slots keep their numbers. What goes by the places of queries, dropout
 * and a position bias, is left as it is. */
int na_problem_merge(natten_problem *padded);

/* Says in a sentence what was merged. */
void na_merge_describe(const natten_problem *padded, const natten_problem *merged, char *text,
                       size_t size);

#endif
