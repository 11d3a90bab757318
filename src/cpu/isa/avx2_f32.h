/* SPDX-License-Identifier: MIT
 * Vector words of AVX2, FMA and F16C for float: 8 lanes. simd.h says what each word means. */
#include <immintrin.h>

typedef float real;
typedef __m256 vec;
typedef __m256i vec_index;

#define REGISTERS 16
enum { VL = 8, HALF = 0 };

/* The first n lanes; 0 <= n <= 8. */
WORD __m256i avx2_lanes(int n)
{
    __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), lane);
}

WORD vec vec_zero(void) { return _mm256_setzero_ps(); }
WORD vec vec_set1(real a) { return _mm256_set1_ps(a); }
WORD vec vec_load(const real *p) { return _mm256_load_ps(p); }
WORD vec vec_loadu(const real *p) { return _mm256_loadu_ps(p); }
WORD vec vec_load_part(const real *p, int n) { return _mm256_maskload_ps(p, avx2_lanes(n)); }
WORD void vec_store(real *p, vec a) { _mm256_store_ps(p, a); }
WORD void vec_storeu(real *p, vec a) { _mm256_storeu_ps(p, a); }
WORD void vec_stream(real *p, vec a) { _mm256_stream_ps(p, a); }
WORD void vec_fence(void) { _mm_sfence(); }
WORD void vec_store_part(real *p, int n, vec a) { _mm256_maskstore_ps(p, avx2_lanes(n), a); }
WORD vec vec_add(vec a, vec b) { return _mm256_add_ps(a, b); }
WORD vec vec_sub(vec a, vec b) { return _mm256_sub_ps(a, b); }
WORD vec vec_mul(vec a, vec b) { return _mm256_mul_ps(a, b); }
WORD vec vec_div(vec a, vec b) { return _mm256_div_ps(a, b); }
WORD vec vec_fma(vec a, vec b, vec c) { return _mm256_fmadd_ps(a, b, c); }
WORD vec vec_max(vec a, vec b) { return _mm256_max_ps(a, b); }
WORD vec vec_ceil(vec a) { return _mm256_ceil_ps(a); }
WORD real vec_sum(vec a)
{
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}
WORD vec vec_pin(vec a)
{
    __asm__("" : "+x"(a));
    return a;
}

WORD vec_index vec_index_load(const int32_t *p) { return _mm256_loadu_si256((const __m256i *)p); }
WORD vec_index vec_index_set1(uint32_t a) { return _mm256_set1_epi32((int)a); }
WORD vec_index vec_index_xor(vec_index a, vec_index b) { return _mm256_xor_si256(a, b); }
WORD vec_index vec_index_multiply(vec_index a, uint32_t m, vec_index *high)
{
    __m256i factor = _mm256_set1_epi32((int)m), even = _mm256_mul_epu32(a, factor);
    __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64(a, 32), factor);
    *high = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
    return _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
}
WORD vec_index vec_index_low16(vec_index a)
{
    return _mm256_and_si256(a, _mm256_set1_epi32(0xffff));
}
WORD vec_index vec_index_high16(vec_index a) { return _mm256_srli_epi32(a, 16); }
WORD vec vec_permute(vec_index i, vec a) { return _mm256_permutevar8x32_ps(a, i); }
WORD vec vec_permute2(vec_index i, vec a, vec b)
{
    __m256i second = _mm256_cmpgt_epi32(i, _mm256_set1_epi32(7));
    return _mm256_blendv_ps(vec_permute(i, a), vec_permute(i, b), _mm256_castsi256_ps(second));
}
WORD vec vec_gather(const real *p, vec_index i) { return _mm256_i32gather_ps(p, i, 4); }
WORD vec vec_keep(vec a, int key, vec_index limit, real other)
{
    __m256i keep = _mm256_cmpgt_epi32(limit, _mm256_set1_epi32(key));
    return _mm256_blendv_ps(_mm256_set1_ps(other), a, _mm256_castsi256_ps(keep));
}

WORD vec vec_not_below(vec a, vec low, vec x)
{
    return _mm256_and_ps(_mm256_cmp_ps(a, low, _CMP_NLT_UQ), x);
}
WORD vec vec_scale2(vec p, vec shifted, vec a, vec low)
{
    __m256 keep = _mm256_cmp_ps(a, low, _CMP_NLT_UQ);
    __m256i exponent = _mm256_slli_epi32(_mm256_castps_si256(shifted), 23);
    __m256i sum = _mm256_add_epi32(_mm256_castps_si256(p), exponent);
    return _mm256_and_ps(keep, _mm256_castsi256_ps(sum));
}
WORD vec vec_split2(vec a, vec *exponent)
{
    __m256i bits = _mm256_castps_si256(a);
    __m256i above = _mm256_sub_epi32(bits, _mm256_set1_epi32(0x3f400000));
    *exponent = _mm256_cvtepi32_ps(_mm256_srai_epi32(above, 23));
    above = _mm256_and_si256(above, _mm256_set1_epi32((int)0xff800000));
    return _mm256_castsi256_ps(_mm256_sub_epi32(bits, above));
}

WORD vec vec_load_f16(const uint16_t *p)
{
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
}
WORD void vec_store_f16(uint16_t *p, vec a)
{
    _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
}
WORD vec vec_load_bf16(const uint16_t *p)
{
    __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
WORD void vec_store_bf16(uint16_t *p, vec a)
{
    __m256i bits = _mm256_castps_si256(a);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i up = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    __m256 nan = _mm256_cmp_ps(a, a, _CMP_UNORD_Q);
    __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    up = _mm256_castps_si256(
        _mm256_blendv_ps(_mm256_castsi256_ps(up), _mm256_castsi256_ps(quiet), nan));
    up = _mm256_srli_epi32(up, 16);
    _mm_storeu_si128((__m128i *)p,
                     _mm_packus_epi32(_mm256_castsi256_si128(up), _mm256_extracti128_si256(up, 1)));
}

WORD void vec_transpose(vec r[VL])
{
    vec t[VL];
    UNROLL
    for (int i = 0; i < 4; i++) {
        t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
    }
    UNROLL
    for (int i = 0; i < 2; i++) {
        r[4 * i] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
        r[4 * i + 1] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
        r[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
        r[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
    }
    UNROLL
    for (int j = 0; j < 4; j++) {
        t[j] = _mm256_permute2f128_ps(r[j], r[4 + j], 0x20);
        t[4 + j] = _mm256_permute2f128_ps(r[j], r[4 + j], 0x31);
    }
    UNROLL
    for (int i = 0; i < VL; i++)
        r[i] = t[i];
}
