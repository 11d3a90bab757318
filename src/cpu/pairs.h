/* SPDX-License-Identifier: MIT
 * Whether kernels that multiply pairs of bfloat16 are worth taking on this processor. */
#ifndef NATTEN_CPU_PAIRS_H
#define NATTEN_CPU_PAIRS_H

#include "cpu/kernels.h"

/* Computes one small problem with both kernels: how many times faster the second is; 0 if they
 * disagree; negative if there is no memory to find out. Takes some 0.7 ms. */
double na_pairs_try(const na_cpu_kernels *floats, const na_cpu_kernels *pairs);

/* The same for AVX-512 and AVX-512 BF16, found out at the first call. */
double na_pairs_gain(void);

#endif
