/* SPDX-License-Identifier: MIT
 * Tuning: which plan natten_compute runs. */
#ifndef NATTEN_TUNE_H
#define NATTEN_TUNE_H

#include <stdatomic.h>

#include "table.h"

extern atomic_int na_tunes[NATTEN_OPS]; /* whether natten_autotune is on */

/* The plan of the remembered choice, after tuning if that is what is asked for; run = NULL: without
 * tuning. Else the entry's plan. */
const natten_plan *na_tuned_plan_of(na_entry *entry, const natten_run *run);

static inline const natten_plan *na_tuned_plan(na_entry *entry, const natten_run *run)
{
    if (!atomic_load_explicit(&na_tunes[entry->problem.op], memory_order_relaxed))
        return entry->plan;
    return na_tuned_plan_of(entry, run);
}

#endif
