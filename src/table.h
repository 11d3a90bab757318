/* SPDX-License-Identifier: MIT
 * Plans kept for natten_compute, found by the bytes of the problem as the caller wrote it. A plan
 * stays alive while it is lent, even if the table drops it meanwhile. */
#ifndef NATTEN_TABLE_H
#define NATTEN_TABLE_H

#include "natten.h"

natten_status na_table_take(const natten_problem *problem, natten_plan **plan);
void na_table_give(natten_plan *plan);

#endif
