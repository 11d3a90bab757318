/* SPDX-License-Identifier: MIT
 * Words of AMX for bfloat16, beside those of AVX-512 for float. A thread has eight tiles of 16 rows
 * of 64 bytes, named by constants; a `pairs` is 16 pairs of bfloat16, and a `keep` a bit for each
 * lane of a vector.
 *
 *   tile_begin tile_end         before a thread's first word and after its last
 *   tile_zero(t)
 *   tile_load tile_store        (t, p, step): `step` bytes between rows
 *   tile_product(c, a, b)       c[m][n] += a[m][2k] * b[k][2n] + a[m][2k + 1] * b[k][2n + 1], where
 *                               a and b hold bfloat16, c floats; denormals count as 0
 *   pairs_load pairs_store      the first n <= 32 numbers at any address; others load as 0
 *   pairs_stream                all 32, aligned, past the caches
 *   pairs_weave(a, b, &h)       the lower (h: upper) four numbers of each 128 bits of a, each with
 *                               b's: two tokens become pairs of them
 *   pairs_unweave(low, h)       what such halves hold of one token as floats, rounded, in order
 *   pairs_of(a, b)              a's lanes and then b's, rounded to nearest
 *   pairs_sum(p, c)             c plus both numbers of each lane
 *   vec_scale2_kept             (keep, ...) as vec_scale2, 0 in other lanes
 *   vec_max_kept(keep, a, b)    the larger one, a in other lanes
 *   vec_above(a, b)             1: a is larger in some lane
 *   vec_top(a)                  the largest lane
 *
 * PLAIN_TILES: the same in plain C and AVX-512, for tests on processors without AMX. */
#include "cpu/isa/avx512_f32.h"

typedef __m512i pairs;
typedef uint16_t keep;

WORD pairs pairs_load(const uint16_t *p, int n)
{
    return _mm512_maskz_loadu_epi16(0xffffffffu >> (32 - n), p);
}
WORD void pairs_store(uint16_t *p, int n, pairs a)
{
    _mm512_mask_storeu_epi16(p, 0xffffffffu >> (32 - n), a);
}
WORD void pairs_stream(uint16_t *p, pairs a) { _mm512_stream_si512((__m512i *)(void *)p, a); }
WORD pairs pairs_weave(pairs a, pairs b, pairs *high)
{
    *high = _mm512_unpackhi_epi16(a, b);
    return _mm512_unpacklo_epi16(a, b);
}
WORD vec vec_scale2_kept(keep k, vec p, vec shifted, vec a, vec low)
{
    const __mmask16 some = _mm512_mask_cmp_ps_mask(k, a, low, _CMP_NLT_UQ);
    const __m512i exponent = _mm512_slli_epi32(_mm512_castps_si512(shifted), 23);
    return _mm512_castsi512_ps(_mm512_maskz_add_epi32(some, _mm512_castps_si512(p), exponent));
}
WORD vec vec_max_kept(keep k, vec a, vec b) { return _mm512_mask_max_ps(a, k, a, b); }
WORD int vec_above(vec a, vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ) != 0; }
WORD real vec_top(vec a) { return _mm512_reduce_max_ps(a); }

#if defined(PLAIN_TILES)

static _Thread_local uint16_t tile_rows[8][16][32];

WORD void tile_zero(int t) { memset(tile_rows[t], 0, sizeof tile_rows[t]); }
WORD void tile_load(int t, const void *p, int64_t step)
{
    for (int m = 0; m < 16; m++)
        memcpy(tile_rows[t][m], (const char *)p + m * step, 64);
}
WORD void tile_store(int t, void *p, int64_t step)
{
    for (int m = 0; m < 16; m++)
        memcpy((char *)p + m * step, tile_rows[t][m], 64);
}
WORD vec tile_numbers(vec twos, int high)
{
    const __m512i bits = _mm512_castps_si512(twos);
    return _mm512_castsi512_ps(high ? _mm512_and_si512(bits, _mm512_set1_epi32((int)0xffff0000))
                                    : _mm512_slli_epi32(bits, 16));
}
static void tile_product(int c, int a, int b)
{
    for (int m = 0; m < 16; m++) {
        vec sum = _mm512_loadu_ps(tile_rows[c][m]);
        for (int k = 0; k < 16; k++) {
            uint32_t two;
            memcpy(&two, &tile_rows[a][m][2 * k], sizeof two);
            const vec x = _mm512_castsi512_ps(_mm512_set1_epi32((int)two));
            const vec y = _mm512_loadu_ps(tile_rows[b][k]);
            for (int high = 0; high < 2; high++)
                sum = vec_fma(tile_numbers(x, high), tile_numbers(y, high), sum);
        }
        _mm512_storeu_ps(tile_rows[c][m], sum);
    }
}
/* Not zeros: as after a task of somebody else. */
WORD void tile_begin(void) { memset(tile_rows, 0x7f, sizeof tile_rows); }
WORD void tile_end(void) {}
WORD pairs pairs_of(vec a, vec b)
{
    return _mm512_inserti64x4(_mm512_castsi256_si512(rounded_bf16(a)), rounded_bf16(b), 1);
}
WORD vec pairs_sum(pairs p, vec c)
{
    const vec twos = _mm512_castsi512_ps(p);
    return vec_add(tile_numbers(twos, 1), vec_add(tile_numbers(twos, 0), c));
}

#else

/* Not the compiler's own words: those of some versions do not say that a load reads memory. */
#define tile_zero(t) __asm__ volatile("tilezero %%tmm" #t ::)
#define tile_load(t, p, step)                                                                      \
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #t ::"r"((const void *)(p)),                     \
                     "r"((int64_t)(step))                                                          \
                     : "memory")
#define tile_store(t, p, step)                                                                     \
    __asm__ volatile("tilestored %%tmm" #t ", (%0,%1,1)" ::"r"((void *)(p)), "r"((int64_t)(step))  \
                     : "memory")
#define tile_product(c, a, b) __asm__ volatile("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #c ::)

WORD void tile_begin(void)
{
    struct {
        uint8_t palette, start, none[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } shape __attribute__((aligned(64))) = {.palette = 1};
    for (int t = 0; t < 8; t++) {
        shape.bytes[t] = 64;
        shape.rows[t] = 16;
    }
    __asm__ volatile("ldtilecfg %0" ::"m"(shape) : "memory");
}
WORD void tile_end(void) { __asm__ volatile("tilerelease" ::: "memory"); }
WORD pairs pairs_of(vec a, vec b) { return (__m512i)_mm512_cvtne2ps_pbh(b, a); }
WORD vec pairs_sum(pairs p, vec c)
{
    return _mm512_dpbf16_ps(c, (__m512bh)p, (__m512bh)_mm512_set1_epi16(0x3f80));
}

#endif

WORD pairs pairs_unweave(vec low, vec high)
{
    const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
    return _mm512_permutexvar_epi64(order, pairs_of(low, high));
}
