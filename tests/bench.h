/* SPDX-License-Identifier: MIT
 * Timing: every kernel that takes a problem, interleaved with the processor's peak. */
#ifndef BENCH_H
#define BENCH_H

#include "trial.h"

/* Prints a line for each kernel whose name begins with `only` (NULL: all). */
void bench_problem(const test_problem *test, natten_op op, const char *only, uint64_t seed,
                   int threads, int csv);

#endif
