/* SPDX-License-Identifier: MIT
 * Vector words of AVX-512 (F, DQ, BW, VL) for float: 16 lanes, and half words of 8 for short tiles.
 * simd.h says what each word means. */
#include <immintrin.h>

typedef float real;
typedef __m512 vec;
typedef __m512i vec_index;
typedef __m256 half;
typedef __m256i half_index;

#define REGISTERS 32
#define WHOLE_LINES
#define HALF_WORDS
enum { VL = 16, HALF = 8 };

WORD vec vec_zero(void) { return _mm512_setzero_ps(); }
WORD vec vec_set1(real a) { return _mm512_set1_ps(a); }
WORD vec vec_load(const real *p) { return _mm512_load_ps(p); }
WORD vec vec_loadu(const real *p) { return _mm512_loadu_ps(p); }
WORD vec vec_load_part(const real *p, int n)
{
    return _mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p);
}
WORD void vec_store(real *p, vec a) { _mm512_store_ps(p, a); }
WORD void vec_storeu(real *p, vec a) { _mm512_storeu_ps(p, a); }
WORD void vec_stream(real *p, vec a) { _mm512_stream_ps(p, a); }
WORD void vec_fence(void) { _mm_sfence(); }
WORD void vec_store_part(real *p, int n, vec a)
{
    _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), a);
}
WORD vec vec_add(vec a, vec b) { return _mm512_add_ps(a, b); }
WORD vec vec_sub(vec a, vec b) { return _mm512_sub_ps(a, b); }
WORD vec vec_mul(vec a, vec b) { return _mm512_mul_ps(a, b); }
WORD vec vec_div(vec a, vec b) { return _mm512_div_ps(a, b); }
WORD vec vec_fma(vec a, vec b, vec c) { return _mm512_fmadd_ps(a, b, c); }
WORD vec vec_max(vec a, vec b) { return _mm512_max_ps(a, b); }
WORD vec vec_ceil(vec a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_POS_INF); }
WORD real vec_sum(vec a) { return _mm512_reduce_add_ps(a); }
WORD vec vec_pin(vec a)
{
    __asm__("" : "+v"(a));
    return a;
}

WORD vec_index vec_index_load(const int32_t *p) { return _mm512_loadu_si512(p); }
WORD vec_index vec_index_set1(uint32_t a) { return _mm512_set1_epi32((int)a); }
WORD vec_index vec_index_add(vec_index i, int n)
{
    return _mm512_add_epi32(i, _mm512_set1_epi32(n));
}
WORD vec_index vec_index_xor(vec_index a, vec_index b) { return _mm512_xor_si512(a, b); }
WORD vec_index vec_index_multiply(vec_index a, uint32_t m, vec_index *high)
{
    __m512i factor = _mm512_set1_epi32((int)m), even = _mm512_mul_epu32(a, factor);
    __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64(a, 32), factor);
    *high = _mm512_mask_shuffle_epi32(odd, 0x5555, even, (_MM_PERM_ENUM)0xf5);
    return _mm512_mask_shuffle_epi32(even, 0xaaaa, odd, (_MM_PERM_ENUM)0xa0);
}
WORD vec_index vec_index_low16(vec_index a)
{
    return _mm512_and_si512(a, _mm512_set1_epi32(0xffff));
}
WORD vec_index vec_index_high16(vec_index a) { return _mm512_srli_epi32(a, 16); }
WORD vec vec_permute(vec_index i, vec a) { return _mm512_permutexvar_ps(i, a); }
WORD vec vec_permute2(vec_index i, vec a, vec b) { return _mm512_permutex2var_ps(a, i, b); }
WORD vec vec_merge(vec a, vec b, int n)
{
    return _mm512_mask_mov_ps(b, (__mmask16)((1u << n) - 1), a);
}
WORD vec vec_slide(vec a, vec b, int n)
{
    const __m512i low = _mm512_castps_si512(a), high = _mm512_castps_si512(b);
    switch (n) {
#define ONE(n)                                                                                     \
    case n:                                                                                        \
        return _mm512_castsi512_ps(_mm512_alignr_epi32(high, low, n));
        ONE(1) ONE(2) ONE(3) ONE(4) ONE(5) ONE(6) ONE(7)
#undef ONE
    }
    return a;
}
WORD vec vec_gather(const real *p, vec_index i) { return _mm512_i32gather_ps(i, p, 4); }
WORD vec vec_keep(vec a, int key, vec_index limit, real other)
{
    __mmask16 keep = _mm512_cmpgt_epi32_mask(limit, _mm512_set1_epi32(key));
    return _mm512_mask_blend_ps(keep, _mm512_set1_ps(other), a);
}

WORD vec vec_not_below(vec a, vec low, vec x)
{
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a, low, _CMP_NLT_UQ), x);
}
WORD vec vec_scale2(vec p, vec shifted, vec a, vec low)
{
    __mmask16 keep = _mm512_cmp_ps_mask(a, low, _CMP_NLT_UQ);
    __m512i exponent = _mm512_slli_epi32(_mm512_castps_si512(shifted), 23);
    return _mm512_castsi512_ps(_mm512_maskz_add_epi32(keep, _mm512_castps_si512(p), exponent));
}
WORD vec vec_split2(vec a, vec *exponent)
{
    __m512i bits = _mm512_castps_si512(a);
    __m512i above = _mm512_sub_epi32(bits, _mm512_set1_epi32(0x3f400000));
    *exponent = _mm512_cvtepi32_ps(_mm512_srai_epi32(above, 23));
    above = _mm512_and_si512(above, _mm512_set1_epi32((int)0xff800000));
    return _mm512_castsi512_ps(_mm512_sub_epi32(bits, above));
}

WORD vec vec_load_f16(const uint16_t *p)
{
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
}
WORD void vec_store_f16(uint16_t *p, vec a)
{
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
}
WORD vec vec_load_bf16(const uint16_t *p)
{
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
WORD __m256i rounded_bf16(vec a)
{
    __m512i bits = _mm512_castps_si512(a);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i up = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    __mmask16 nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
    up = _mm512_mask_or_epi32(up, nan, bits, _mm512_set1_epi32(0x400000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(up, 16));
}
WORD void vec_store_bf16(uint16_t *p, vec a) { _mm256_storeu_si256((__m256i *)p, rounded_bf16(a)); }

WORD void vec_transpose(vec r[VL])
{
    vec t[VL];
    UNROLL
    for (int i = 0; i < 8; i++) {
        t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
    }
    UNROLL
    for (int i = 0; i < 4; i++) {
        __m512d a = _mm512_castps_pd(t[4 * i]), b = _mm512_castps_pd(t[4 * i + 1]);
        __m512d c = _mm512_castps_pd(t[4 * i + 2]), d = _mm512_castps_pd(t[4 * i + 3]);
        r[4 * i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
        r[4 * i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
        r[4 * i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
        r[4 * i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
    }
    /* 128-bit part L of r[4i + j] now holds column 4L + j of rows 4i .. 4i + 3. */
    UNROLL
    for (int j = 0; j < 4; j++) {
        vec a = _mm512_shuffle_f32x4(r[j], r[4 + j], 0x88);
        vec b = _mm512_shuffle_f32x4(r[j], r[4 + j], 0xdd);
        vec c = _mm512_shuffle_f32x4(r[8 + j], r[12 + j], 0x88);
        vec d = _mm512_shuffle_f32x4(r[8 + j], r[12 + j], 0xdd);
        t[j] = _mm512_shuffle_f32x4(a, c, 0x88);
        t[8 + j] = _mm512_shuffle_f32x4(a, c, 0xdd);
        t[4 + j] = _mm512_shuffle_f32x4(b, d, 0x88);
        t[12 + j] = _mm512_shuffle_f32x4(b, d, 0xdd);
    }
    UNROLL
    for (int i = 0; i < VL; i++)
        r[i] = t[i];
}

WORD half half_zero(void) { return _mm256_setzero_ps(); }
WORD half half_set1(real a) { return _mm256_set1_ps(a); }
WORD half half_load(const real *p) { return _mm256_load_ps(p); }
WORD half half_loadu(const real *p) { return _mm256_loadu_ps(p); }
WORD void half_store(real *p, half a) { _mm256_store_ps(p, a); }
WORD half half_add(half a, half b) { return _mm256_add_ps(a, b); }
WORD half half_fma(half a, half b, half c) { return _mm256_fmadd_ps(a, b, c); }
WORD half half_max(half a, half b) { return _mm256_max_ps(a, b); }
WORD half half_pin(half a)
{
    __asm__("" : "+v"(a));
    return a;
}
WORD half_index half_index_load(const int32_t *p) { return _mm256_loadu_si256((const __m256i *)p); }
WORD half half_permute(half_index i, half a) { return _mm256_permutevar8x32_ps(a, i); }
WORD half half_keep(half a, int key, half_index limit, real other)
{
    __mmask8 keep = _mm256_cmpgt_epi32_mask(limit, _mm256_set1_epi32(key));
    return _mm256_mask_blend_ps(keep, _mm256_set1_ps(other), a);
}
WORD half half_low(vec a) { return _mm512_castps512_ps256(a); }
WORD vec half_vec(half a) { return _mm512_castps256_ps512(a); }
/* Both halves of a vector from one half, and the sum of a vector's halves in both of them. */
WORD vec half_twice(vec a) { return _mm512_shuffle_f32x4(a, a, 0x44); }
WORD vec half_fold(vec a) { return _mm512_add_ps(a, _mm512_shuffle_f32x4(a, a, 0x4e)); }
