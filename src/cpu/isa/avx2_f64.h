/* SPDX-License-Identifier: MIT
 * Vector words of AVX2 and FMA for double: 4 lanes. simd.h says what each word means. */
#include <immintrin.h>

#define REAL_F64
typedef double real;
typedef __m256d vec;
typedef __m256i vec_index;

#define REGISTERS 16
enum { VL = 4, HALF = 0 };

/* The first n lanes; 0 <= n <= 4. */
WORD __m256i avx2_lanes(int n)
{
    return _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3));
}

WORD vec vec_zero(void) { return _mm256_setzero_pd(); }
WORD vec vec_set1(real a) { return _mm256_set1_pd(a); }
WORD vec vec_load(const real *p) { return _mm256_load_pd(p); }
WORD vec vec_loadu(const real *p) { return _mm256_loadu_pd(p); }
WORD vec vec_load_part(const real *p, int n) { return _mm256_maskload_pd(p, avx2_lanes(n)); }
WORD void vec_store(real *p, vec a) { _mm256_store_pd(p, a); }
WORD void vec_storeu(real *p, vec a) { _mm256_storeu_pd(p, a); }
WORD void vec_stream(real *p, vec a) { _mm256_stream_pd(p, a); }
WORD void vec_fence(void) { _mm_sfence(); }
WORD void vec_store_part(real *p, int n, vec a) { _mm256_maskstore_pd(p, avx2_lanes(n), a); }
WORD vec vec_add(vec a, vec b) { return _mm256_add_pd(a, b); }
WORD vec vec_sub(vec a, vec b) { return _mm256_sub_pd(a, b); }
WORD vec vec_mul(vec a, vec b) { return _mm256_mul_pd(a, b); }
WORD vec vec_div(vec a, vec b) { return _mm256_div_pd(a, b); }
WORD vec vec_fma(vec a, vec b, vec c) { return _mm256_fmadd_pd(a, b, c); }
WORD vec vec_max(vec a, vec b) { return _mm256_max_pd(a, b); }
WORD vec vec_ceil(vec a) { return _mm256_ceil_pd(a); }
WORD real vec_sum(vec a)
{
    __m128d s = _mm_add_pd(_mm256_castpd256_pd128(a), _mm256_extractf128_pd(a, 1));
    return _mm_cvtsd_f64(_mm_add_sd(s, _mm_unpackhi_pd(s, s)));
}
WORD vec vec_pin(vec a)
{
    __asm__("" : "+x"(a));
    return a;
}

WORD vec_index vec_index_load(const int32_t *p)
{
    return _mm256_cvtepi32_epi64(_mm_loadu_si128((const __m128i *)p));
}
WORD vec_index vec_index_set1(uint32_t a) { return _mm256_set1_epi64x(a); }
WORD vec_index vec_index_xor(vec_index a, vec_index b) { return _mm256_xor_si256(a, b); }
WORD vec_index vec_index_multiply(vec_index a, uint32_t m, vec_index *high)
{
    __m256i product = _mm256_mul_epu32(a, _mm256_set1_epi64x(m));
    *high = _mm256_srli_epi64(product, 32);
    return product;
}
WORD vec_index vec_index_low16(vec_index a)
{
    return _mm256_and_si256(a, _mm256_set1_epi64x(0xffff));
}
WORD vec_index vec_index_high16(vec_index a) { return vec_index_low16(_mm256_srli_epi64(a, 16)); }
/* AVX2 permutes only 32-bit lanes across: lane i is the pair 2i, 2i + 1. */
WORD vec vec_permute(vec_index i, vec a)
{
    __m256i even = _mm256_slli_epi64(i, 1);
    __m256i odd = _mm256_slli_epi64(_mm256_add_epi64(even, _mm256_set1_epi64x(1)), 32);
    __m256i pairs = _mm256_or_si256(even, odd);
    return _mm256_castps_pd(_mm256_permutevar8x32_ps(_mm256_castpd_ps(a), pairs));
}
WORD vec vec_permute2(vec_index i, vec a, vec b)
{
    __m256i second = _mm256_cmpgt_epi64(i, _mm256_set1_epi64x(3));
    return _mm256_blendv_pd(vec_permute(i, a), vec_permute(i, b), _mm256_castsi256_pd(second));
}
WORD vec vec_gather(const real *p, vec_index i) { return _mm256_i64gather_pd(p, i, 8); }
WORD vec vec_keep(vec a, int key, vec_index limit, real other)
{
    __m256i keep = _mm256_cmpgt_epi64(limit, _mm256_set1_epi64x(key));
    return _mm256_blendv_pd(_mm256_set1_pd(other), a, _mm256_castsi256_pd(keep));
}

WORD vec vec_not_below(vec a, vec low, vec x)
{
    return _mm256_and_pd(_mm256_cmp_pd(a, low, _CMP_NLT_UQ), x);
}
/* The lower and the upper words of eight numbers fill a vector each. */
WORD vec vec_eighths(const real *t, vec shifted)
{
    const __m256i order = _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7);
    __m256i a = _mm256_permutevar8x32_epi32(_mm256_castpd_si256(vec_loadu(t)), order);
    __m256i b = _mm256_permutevar8x32_epi32(_mm256_castpd_si256(vec_loadu(t + 4)), order);
    __m256i lower = _mm256_permute2x128_si256(a, b, 0x20);
    __m256i upper = _mm256_permute2x128_si256(a, b, 0x31);
    __m256i bits = _mm256_castpd_si256(shifted), high = _mm256_slli_epi64(bits, 32);
    __m256i near = _mm256_blend_epi32(_mm256_permutevar8x32_epi32(lower, bits),
                                      _mm256_permutevar8x32_epi32(upper, high), 0xaa);
    return _mm256_castsi256_pd(_mm256_add_epi64(near, _mm256_slli_epi64(bits, 49)));
}
/* AVX2 has no conversion of 64-bit integers: they become last bits of 2^52. */
WORD vec vec_split2(vec a, vec *exponent)
{
    __m256i bits = _mm256_castpd_si256(a), one = _mm256_set1_epi64x(0x3ff0000000000000);
    __m256i biased =
        _mm256_srli_epi64(_mm256_add_epi64(bits, _mm256_set1_epi64x(0x0008000000000000)), 52);
    __m256i number = _mm256_or_si256(biased, _mm256_set1_epi64x(0x4330000000000000));
    *exponent = _mm256_sub_pd(_mm256_castsi256_pd(number), _mm256_set1_pd(0x1p52 + 1023));
    bits = _mm256_sub_epi64(bits, _mm256_slli_epi64(biased, 52));
    return _mm256_castsi256_pd(_mm256_add_epi64(bits, one));
}

WORD void vec_transpose(vec r[VL])
{
    vec a = _mm256_unpacklo_pd(r[0], r[1]), b = _mm256_unpackhi_pd(r[0], r[1]);
    vec c = _mm256_unpacklo_pd(r[2], r[3]), d = _mm256_unpackhi_pd(r[2], r[3]);
    r[0] = _mm256_permute2f128_pd(a, c, 0x20);
    r[1] = _mm256_permute2f128_pd(b, d, 0x20);
    r[2] = _mm256_permute2f128_pd(a, c, 0x31);
    r[3] = _mm256_permute2f128_pd(b, d, 0x31);
}
