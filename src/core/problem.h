/* SPDX-License-Identifier: MIT */
#ifndef NATTEN_CORE_PROBLEM_H
#define NATTEN_CORE_PROBLEM_H

#include "core/status.h"
#include "natten.h"

/* Checks what a caller wrote; writes the same problem with defaults resolved and padded to three
 * axes. */
natten_status na_problem_check(const natten_problem *problem, natten_problem *padded);

/* Checks a run's addresses against the problem. */
natten_status na_run_check(const natten_problem *padded, const natten_run *run);

/* "query", "d_rpb"... */
const char *na_role_name(natten_role role);

#endif
