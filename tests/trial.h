/* SPDX-License-Identifier: MIT
 * A trial: one op of one problem with fresh random data and what must come out of it, computed by
 * the reference kernel in float64 from the same rounded inputs. */
#ifndef TRIAL_H
#define TRIAL_H

#include "tensor.h"

typedef struct trial {
    natten_problem problem;
    uint64_t outputs;             /* the set of roles the op writes */
    double *values[NATTEN_ROLES]; /* of each role of the problem, in tensor_write's order */
    int rounds_weights; /* the kernel rounds softmax weights to half precision: tensor cores do */
} trial;

/* NULL, or what went wrong. The data depend on the seed and the problem only. trial_make_inputs
 * leaves out what must come out, and computes what it needs with the fastest kernels. */
const char *trial_make(trial *t, const natten_problem *problem, uint64_t seed);
const char *trial_make_inputs(trial *t, const natten_problem *problem, uint64_t seed);
void trial_free(trial *t);

/* Tensors for a run of the trial: inputs written, outputs poisoned. 0: no memory. */
int trial_tensors(const trial *t, placement where, tensor tensors[NATTEN_ROLES], natten_run *run);
void trial_tensors_free(tensor tensors[NATTEN_ROLES]);

typedef struct trial_error {
    double worst, allowed; /* greatest error and the bound on it */
    natten_role role;
    int64_t at; /* the element, in the order of the role's shape */
    double got, expected;
} trial_error;

/* The error of one output, as measured against the largest expected element (LSE: absolute). */
trial_error trial_compare(const trial *t, natten_role role, const double *got);

#endif
