/* SPDX-License-Identifier: MIT
 * Timing: every kernel that takes a problem, interleaved with the processor's peak. */
#ifndef BENCH_H
#define BENCH_H

#include "trial.h"

typedef struct bench_options {
    const char *only; /* kernels whose names begin so; NULL: all */
    uint64_t seed;
    int threads, csv;
    int taken;   /* 1: of these the first that takes the problem */
    int choices; /* 1: the choices of the first such kernel instead, and what tuning makes of them
                  */
    int huge;    /* 1: tensors on huge pages */
} bench_options;

/* Prints a line for each kernel, or choice. */
void bench_problem(const test_problem *test, natten_op op, const bench_options *options);

#endif
