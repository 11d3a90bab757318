/* SPDX-License-Identifier: MIT */
#ifndef NATTEN_CORE_PROBLEM_H
#define NATTEN_CORE_PROBLEM_H

#include "core/status.h"
#include "natten.h"

/* An axis of one token. */
static const natten_axis na_point = {1, 1, 1, 0, 0, 1, 1, 1, 0};

/* Checks what a caller wrote; writes the same problem with defaults resolved and padded to three
 * axes. */
natten_status na_problem_check(const natten_problem *problem, natten_problem *padded);

/* Checks a run's addresses against the checked problem. */
natten_status na_run_check(const natten_problem *padded, const natten_run *run);

/* What a role's tensor looks like. Extents it does not have are 1: a bias has batch 1, an lse
 * channels 1. */
typedef struct na_shape {
    int64_t batch, extent[3], heads, channels;
} na_shape;
na_shape na_role_shape(const natten_problem *problem, natten_role role);

/* "query", "d_rpb"... */
const char *na_role_name(natten_role role);

/* Whether an op writes the role (else it reads it). */
int na_role_is_output(natten_op op, natten_role role);

#endif
