/* SPDX-License-Identifier: MIT
 * Vector words of AVX-512 BF16: those for float, and products of pairs of bfloat16. simd.h says
 * what each word means. */
#define PAIRS
#include "cpu/isa/avx512_f32.h"

WORD vec vec_dot(vec a, vec b, vec c) { return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b); }
WORD vec vec_pair(vec a, vec b)
{
    const __m512i half = _mm512_set1_epi32(0x8000), high = _mm512_set1_epi32((int)0xffff0000);
    __m512i low = _mm512_srli_epi32(_mm512_add_epi32(_mm512_castps_si512(a), half), 16);
    __m512i up = _mm512_add_epi32(_mm512_castps_si512(b), half);
    /* low | (up & high) */
    return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(low, up, high, 0xf8));
}
WORD void vec_stream_bf16(uint16_t *p, vec a)
{
    _mm256_stream_si256((__m256i *)p, rounded_bf16(a));
}
WORD vec vec_pair_bf16(const uint16_t *p, const uint16_t *q)
{
    __m512i first = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
    __m512i second = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)q));
    return _mm512_castsi512_ps(_mm512_or_si512(first, _mm512_slli_epi32(second, 16)));
}
WORD vec vec_first(vec a)
{
    return _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(a), _mm512_set1_epi32(0xffff)));
}
WORD vec vec_firsts(vec a, vec b)
{
    const __m512i second = _mm512_slli_epi32(_mm512_castps_si512(b), 16);
    return _mm512_castsi512_ps(_mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_castps_si512(a), second));
}

WORD half half_dot(half a, half b, half c) { return _mm256_dpbf16_ps(c, (__m256bh)a, (__m256bh)b); }
WORD vec half_wide(half a) { return _mm512_zextps256_ps512(a); }
WORD vec half_join(vec a, vec b) { return _mm512_insertf32x8(a, _mm512_castps512_ps256(b), 1); }
WORD half half_pair(vec a)
{
    const __m512i half = _mm512_set1_epi32(0x8000);
    __m512i up = _mm512_add_epi32(_mm512_castps_si512(a), half);
    __m256i low = _mm256_srli_epi32(_mm512_castsi512_si256(up), 16);
    const __m256i high = _mm256_set1_epi32((int)0xffff0000);
    /* low | (up & high) */
    return _mm256_castsi256_ps(
        _mm256_ternarylogic_epi32(low, _mm512_extracti32x8_epi32(up, 1), high, 0xf8));
}
