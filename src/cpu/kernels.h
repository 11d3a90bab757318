/* SPDX-License-Identifier: MIT
 * What kernels.c gives for each instruction set and real type: a function for each op that plans a
 * checked problem (sets run, state and destroy, or refuses); NULL where there is no kernel. */
#ifndef NATTEN_CPU_KERNELS_H
#define NATTEN_CPU_KERNELS_H

#include "core/kernel.h"

typedef struct na_cpu_kernels {
    natten_status (*plan[NATTEN_OPS])(natten_plan *plan);
} na_cpu_kernels;

extern const na_cpu_kernels na_cpu_generic_f32, na_cpu_generic_f64;
#if defined(__x86_64__)
extern const na_cpu_kernels na_cpu_avx2_f32, na_cpu_avx2_f64;
extern const na_cpu_kernels na_cpu_avx512_f32, na_cpu_avx512_f64;
#if defined(NATTEN_HAS_AVX512BF16)
extern const na_cpu_kernels na_cpu_avx512bf16_f32; /* forward only, of bfloat16 */
#endif
#if defined(NATTEN_HAS_AMX)
extern const na_cpu_kernels na_cpu_amx_bf16; /* likewise */
#endif
#elif defined(__aarch64__)
extern const na_cpu_kernels na_cpu_neon_f32, na_cpu_neon_f64;
#endif

#endif
