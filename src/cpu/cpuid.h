/* SPDX-License-Identifier: MIT
 * What this processor, and the system on it, can do. */
#ifndef NATTEN_CPU_CPUID_H
#define NATTEN_CPU_CPUID_H

#include <stddef.h>
#include <stdint.h>

/* AVX2, FMA and F16C. */
int na_cpu_has_avx2(void);

/* AVX-512 F, DQ, BW and VL, and what na_cpu_has_avx2 says. */
int na_cpu_has_avx512(void);

/* AVX-512 BF16, and what na_cpu_has_avx512 says. */
int na_cpu_has_avx512bf16(void);

/* AMX for bfloat16, and what na_cpu_has_avx512bf16 says. */
int na_cpu_has_amx(void);

/* Asks the system for permission to use it: its registers are large, and saved for those processes
 * only that have it. What came of it is remembered. */
int na_cpu_allows_amx(void);

/* Fetches long pieces that lie in even steps before they are asked for, as a Zen 5 was seen to do.
 */
int na_cpu_foresees(void);

/* Takes two turns for a vector of 512 bits, as a Zen 4 does. */
int na_cpu_splits_vectors(void);

/* Bytes of its last-level cache, as far as one core uses it; 0: not known, as of any but AMD's. */
int64_t na_cpu_last_cache(void);

/* Time in ticks of 0.2 to 0.5 ns, all that was loaded before being there; 0: there is no such
 * clock. */
uint64_t na_cpu_ticks(void);

/* Its name, cut to size bytes. */
void na_cpu_name(char *text, size_t size);

#endif
