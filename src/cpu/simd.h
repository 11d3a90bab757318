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
 *   not_below(a, low, x)                a < low ? 0 : x
 *   transpose(r)                        of VL vectors, in place
 *   split2(a, &e)                       m in [0.75, 1.5) with a = m * 2^e, for normal a > 0
 * for double
 *   eighths(t, shifted)                 lane l: t[i] for the last three bits i of shifted, to whose
 *                                       bits shifted's are added 49 bits up
 * and for float
 *   scale2(p, shifted, a, low)          a < low ? 0 : p times 2 to the integer in the last bits of
 *                                       shifted
 *   load_f16 load_bf16 store_f16 store_bf16    VL halves at any address, rounded to nearest even
 * NOT_FUSED: fma needs a register for the product.
 * WHOLE_LINES: a vector is a cache line, so that a load from any other address than a line's counts
 * twice, and there are
 *   index_add(i, n)                     lane l: i[l] + n
 *   slide(a, b, n)                      lane l: the (n + l)-th of a's lanes followed by b's; n < 8
 *                                       is known when it is compiled
 *   merge(a, b, n)                      lane l: l < n ? a[l] : b[l]
 * HALF_WORDS: there are words for halves, with names that begin with half, and
 *   half_low(a) half_vec(a)             a vector's lower half; a half and anything
 * Where products of pairs of bfloat16 are an instruction, a header for float defines PAIRS.
 * Operands of products then hold two numbers in the place of a real, and there are
 *
 *   dot(a, b, c)                        c plus both products of each lane; denormals count as 0
 *   pair(a, b)                          a (first) and b, rounded to nearest
 *   pair_bf16(p, q)                     VL bfloat16 at any address (first) and VL others
 *   stream_bf16                         as store_bf16, past the caches, aligned to VL bfloat16
 *   first(a)                            the pair's first number and 0
 *   firsts(a, b)                        the first numbers of both pairs
 * and, beside the half words,
 *   half_wide(a)                        a half and zeros
 *   half_join(a, b)                     the lower halves of two vectors
 *   half_pair(a)                        as pair, of a vector's halves */
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

/* PER_REAL: numbers in the place of a real, in operands of products. out_real: what aggregate can
 * write besides reals. */
#ifdef PAIRS
enum { PER_REAL = 2 };
typedef uint16_t out_real;
WORD void vec_store_out(out_real *p, vec a) { vec_store_bf16(p, a); }
WORD void vec_stream_out(out_real *p, vec a) { vec_stream_bf16(p, a); }
#else
enum { PER_REAL = 1 };
typedef real out_real;
WORD void vec_store_out(out_real *p, vec a) { vec_storeu(p, a); }
WORD void vec_stream_out(out_real *p, vec a) { vec_stream(p, a); }
WORD vec vec_dot(vec a, vec b, vec c) { return vec_fma(a, b, c); }
WORD vec vec_pair(vec a, vec b) { return (void)b, a; }
WORD vec vec_pair_bf16(const uint16_t *p, const uint16_t *q)
{
    return (void)p, (void)q, vec_zero();
}
WORD vec vec_first(vec a) { return a; }
WORD vec vec_firsts(vec a, vec b) { return (void)b, a; }
#endif
/* Reals that the weights of so many spans take: pairs within a span, then the keys left over. */
static inline int64_t stored_weights(int spans, int keys)
{
    const int odd = keys % PER_REAL * spans;
    return (int64_t)spans * (keys / PER_REAL) + (odd + PER_REAL - 1) / PER_REAL;
}
#ifndef WHOLE_LINES
WORD vec_index vec_index_add(vec_index i, int n) { return (void)n, i; }
WORD vec vec_slide(vec a, vec b, int n) { return (void)b, (void)n, a; }
WORD vec vec_merge(vec a, vec b, int n) { return (void)b, (void)n, a; }
#endif
#if defined(HALF_WORDS) && !defined(PAIRS)
WORD half half_dot(half a, half b, half c) { return half_fma(a, b, c); }
#endif

#endif
