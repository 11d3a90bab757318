/* SPDX-License-Identifier: MIT
 * Plans kept for natten_compute, found by the bytes of the problem as the caller wrote it. An entry
 * stays alive while it is lent, even if the table drops it meanwhile. */
#ifndef NATTEN_TABLE_H
#define NATTEN_TABLE_H

#include <stdatomic.h>

#include "core/status.h"
#include "natten.h"

typedef struct na_entry {
    natten_problem problem;
    natten_plan *plan;
    _Atomic(natten_plan *) tuned; /* of the choice that tuning made; NULL: not looked for yet */
    int holders;                  /* the table, and each borrower */
} na_entry;

natten_status na_table_take(const natten_problem *problem, na_entry **entry);
void na_table_give(na_entry *entry);

/* Plans kept so far are not found again. */
void na_table_forget(void);

#endif
