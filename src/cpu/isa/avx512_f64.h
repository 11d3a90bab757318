/* SPDX-License-Identifier: MIT
 * Vector words of AVX-512 (F, DQ, VL) for double: 8 lanes. simd.h says what each word means. */
#include <immintrin.h>

#define REAL_F64
typedef double real;
typedef __m512d vec;
typedef __m512i vec_index;

#define REGISTERS 32
#define WHOLE_LINES
enum { VL = 8, HALF = 0 };

WORD vec vec_zero(void) { return _mm512_setzero_pd(); }
WORD vec vec_set1(real a) { return _mm512_set1_pd(a); }
WORD vec vec_load(const real *p) { return _mm512_load_pd(p); }
WORD vec vec_loadu(const real *p) { return _mm512_loadu_pd(p); }
WORD vec vec_load_part(const real *p, int n)
{
    return _mm512_maskz_loadu_pd((__mmask8)((1u << n) - 1), p);
}
WORD void vec_store(real *p, vec a) { _mm512_store_pd(p, a); }
WORD void vec_storeu(real *p, vec a) { _mm512_storeu_pd(p, a); }
WORD void vec_stream(real *p, vec a) { _mm512_stream_pd(p, a); }
WORD void vec_fence(void) { _mm_sfence(); }
WORD void vec_store_part(real *p, int n, vec a)
{
    _mm512_mask_storeu_pd(p, (__mmask8)((1u << n) - 1), a);
}
WORD vec vec_add(vec a, vec b) { return _mm512_add_pd(a, b); }
WORD vec vec_sub(vec a, vec b) { return _mm512_sub_pd(a, b); }
WORD vec vec_mul(vec a, vec b) { return _mm512_mul_pd(a, b); }
WORD vec vec_div(vec a, vec b) { return _mm512_div_pd(a, b); }
WORD vec vec_fma(vec a, vec b, vec c) { return _mm512_fmadd_pd(a, b, c); }
WORD vec vec_max(vec a, vec b) { return _mm512_max_pd(a, b); }
WORD vec vec_ceil(vec a) { return _mm512_roundscale_pd(a, _MM_FROUND_TO_POS_INF); }
WORD real vec_sum(vec a) { return _mm512_reduce_add_pd(a); }
WORD vec vec_pin(vec a)
{
    __asm__("" : "+v"(a));
    return a;
}

WORD vec_index vec_index_load(const int32_t *p)
{
    return _mm512_cvtepi32_epi64(_mm256_loadu_si256((const __m256i *)p));
}
WORD vec_index vec_index_set1(uint32_t a) { return _mm512_set1_epi64(a); }
WORD vec_index vec_index_add(vec_index i, int n)
{
    return _mm512_add_epi64(i, _mm512_set1_epi64(n));
}
WORD vec_index vec_index_xor(vec_index a, vec_index b) { return _mm512_xor_si512(a, b); }
WORD vec_index vec_index_multiply(vec_index a, uint32_t m, vec_index *high)
{
    __m512i product = _mm512_mul_epu32(a, _mm512_set1_epi64(m));
    *high = _mm512_srli_epi64(product, 32);
    return product;
}
WORD vec_index vec_index_low16(vec_index a)
{
    return _mm512_and_si512(a, _mm512_set1_epi64(0xffff));
}
WORD vec_index vec_index_high16(vec_index a) { return vec_index_low16(_mm512_srli_epi64(a, 16)); }
WORD vec vec_permute(vec_index i, vec a) { return _mm512_permutexvar_pd(i, a); }
WORD vec vec_permute2(vec_index i, vec a, vec b) { return _mm512_permutex2var_pd(a, i, b); }
WORD vec vec_merge(vec a, vec b, int n)
{
    return _mm512_mask_mov_pd(b, (__mmask8)((1u << n) - 1), a);
}
WORD vec vec_slide(vec a, vec b, int n)
{
    const __m512i low = _mm512_castpd_si512(a), high = _mm512_castpd_si512(b);
    switch (n) {
#define ONE(n)                                                                                     \
    case n:                                                                                        \
        return _mm512_castsi512_pd(_mm512_alignr_epi64(high, low, n));
        ONE(1) ONE(2) ONE(3) ONE(4) ONE(5) ONE(6) ONE(7)
#undef ONE
    }
    return a;
}
WORD vec vec_gather(const real *p, vec_index i) { return _mm512_i64gather_pd(i, p, 8); }
WORD vec vec_keep(vec a, int key, vec_index limit, real other)
{
    __mmask8 keep = _mm512_cmpgt_epi64_mask(limit, _mm512_set1_epi64(key));
    return _mm512_mask_blend_pd(keep, _mm512_set1_pd(other), a);
}

WORD vec vec_not_below(vec a, vec low, vec x)
{
    return _mm512_maskz_mov_pd(_mm512_cmp_pd_mask(a, low, _CMP_NLT_UQ), x);
}
WORD vec vec_eighths(const real *t, vec shifted)
{
    __m512i bits = _mm512_castpd_si512(shifted);
    __m512i near = _mm512_castpd_si512(vec_permute(bits, vec_loadu(t)));
    return _mm512_castsi512_pd(_mm512_add_epi64(near, _mm512_slli_epi64(bits, 49)));
}
WORD vec vec_split2(vec a, vec *exponent)
{
    __m512i bits = _mm512_castpd_si512(a);
    __m512i above = _mm512_sub_epi64(bits, _mm512_set1_epi64(0x3fe8000000000000));
    *exponent = _mm512_cvtepi64_pd(_mm512_srai_epi64(above, 52));
    above = _mm512_slli_epi64(_mm512_srli_epi64(above, 52), 52);
    return _mm512_castsi512_pd(_mm512_sub_epi64(bits, above));
}

WORD void vec_transpose(vec r[VL])
{
    vec t[VL];
    UNROLL
    for (int i = 0; i < 4; i++) {
        t[2 * i] = _mm512_unpacklo_pd(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_pd(r[2 * i], r[2 * i + 1]);
    }
    /* 128-bit part L of t[2i + j] now holds column 2L + j of rows 2i, 2i + 1. */
    UNROLL
    for (int j = 0; j < 2; j++) {
        vec a = _mm512_shuffle_f64x2(t[j], t[2 + j], 0x88);
        vec b = _mm512_shuffle_f64x2(t[j], t[2 + j], 0xdd);
        vec c = _mm512_shuffle_f64x2(t[4 + j], t[6 + j], 0x88);
        vec d = _mm512_shuffle_f64x2(t[4 + j], t[6 + j], 0xdd);
        r[j] = _mm512_shuffle_f64x2(a, c, 0x88);
        r[4 + j] = _mm512_shuffle_f64x2(a, c, 0xdd);
        r[2 + j] = _mm512_shuffle_f64x2(b, d, 0x88);
        r[6 + j] = _mm512_shuffle_f64x2(b, d, 0xdd);
    }
}
