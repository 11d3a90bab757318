/* SPDX-License-Identifier: MIT
 * A trial: one op of one problem with fresh random data and what must come out of it, computed by
 * the reference kernel in float64 from the same rounded inputs. */
#ifndef TRIAL_H
#define TRIAL_H

#include "tensor.h"

/* What dropout is run with. */
#define TRIAL_SEED UINT64_C(0x9e3779b97f4a7c15)
#define TRIAL_OFFSET UINT64_C(0xbf58476d1ce4e5b9)

typedef struct trial {
    natten_problem problem;
    uint64_t outputs;                /* the set of roles the op writes */
    double *values[NATTEN_ROLES];    /* of each role of the problem, in tensor_write's order */
    double *magnitude[NATTEN_ROLES]; /* of each output: the sum of its terms' magnitudes */
    double logits;                   /* the largest magnitude of a logit; 0: the op has none */
    double largest;                  /* of what weights and gradients of logits multiply */
    int typical;        /* rounded weights are also held against what they usually cost */
    const char *kernel; /* whose results trial_compare sees; NULL: one that rounds no weights */
} trial;

/* NULL, or what went wrong. The data depend on the seed and the problem only. trial_make_inputs
 * leaves out what must come out, and computes what it needs with the fastest kernels. */
const char *trial_make(trial *t, const natten_problem *problem, uint64_t seed);
const char *trial_make_inputs(trial *t, const natten_problem *problem, uint64_t seed);
void trial_free(trial *t);

/* The steps of trial_make: runs a kernel in float64 over values, `outputs` from the problem's other
 * roles; fills in the magnitudes. */
const char *trial_run_exactly(double *const values[NATTEN_ROLES], const natten_problem *problem,
                              uint64_t outputs, const char *only);
const char *trial_make_magnitudes(trial *t);

/* Tensors for a run of the trial: inputs written, outputs poisoned. 0: no memory. */
int trial_tensors(const trial *t, placement where, tensor tensors[NATTEN_ROLES], natten_run *run);
void trial_tensors_free(tensor tensors[NATTEN_ROLES]);

typedef struct trial_error {
    double share;          /* at most 1: of what is allowed beside an element's last rounding */
    double worst, allowed; /* the error nearest to its bound, and that */
    natten_role role;
    int64_t at; /* the element, in the order of the role's shape */
    double got, expected;
} trial_error;

/* The error of one output, as measured against the magnitude of its terms (LSE: absolute). */
trial_error trial_compare(const trial *t, natten_role role, const double *got);

#endif
