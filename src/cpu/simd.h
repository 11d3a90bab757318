/* SPDX-License-Identifier: MIT
 * The vector words of one instruction set and one real type, chosen by NA_ISA_HEADER. A header of
 * isa/ defines real, vec (VL lanes of it), vec_index (VL integers), REGISTERS (vector registers of
 * the machine), HALF (lanes of the half words, 0: there are none) and:
 *
 *   zero set1 load loadu store storeu   u: any address; else aligned to the vector
 *   stream                              aligned store past the caches
 *   fence                               makes streams visible to others
 *   load_part store_part                the first n <= VL elements; other lanes load as 0
 *   add sub mul div fma max ceil        fma(a, b, c) = a * b + c; max gives b if a is NaN
 *   sum                                 of all lanes
 *   pin                                 the same value, in a register (gcc would fold a load into
 *                                       each of its uses: that halves the speed of correlate)
 *   index_load                          VL int32 to a vec_index
 *   index_set1 index_xor                of the lowest 32 bits of each integer; others are ignored
 *   index_multiply(a, m, &high)         likewise: the products' lower 32 bits; their upper 32 bits
 *   index_low16 index_high16            bits 0 to 15, 16 to 31
 *   permute(i, a)                       lane l: a[i[l]]
 *   permute2(i, a, b)                   lane l: the i[l]-th of a's lanes followed by b's
 *   gather(p, i)                        lane l: p[i[l]]
 *   keep(a, key, limit, other)          lane l: key < limit[l] ? a[l] : other
 *   scale2(p, shifted, a, low)          a < low ? 0 : p times 2 to the integer in the last bits of
 *                                       shifted
 *   transpose(r)                        of VL vectors, in place
 * and for float
 *   load_f16 load_bf16 store_f16 store_bf16    VL halves at any address, rounded to nearest even
 *   split2(a, &e)                       m in [0.75, 1.5) with a = m * 2^e, for normal a > 0 */
#ifndef NATTEN_CPU_SIMD_H
#define NATTEN_CPU_SIMD_H

#include <stddef.h>
#include <stdint.h>

#define ALWAYS_INLINE inline __attribute__((always_inline))
#define WORD static ALWAYS_INLINE

/* Each compiler ignores the other's spelling, and then keeps accumulators in memory. */
#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

#include NA_ISA_HEADER

#endif
