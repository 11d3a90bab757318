/* SPDX-License-Identifier: MIT */
#include "peak.h"

#include <pthread.h>
#include <string.h>
#include <time.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

/* Enough independent chains to hide the latency, few enough for 16 registers. */
enum { CHAINS = 12, ROUNDS = 20000, MOST_THREADS = 256 };

static clockid_t used_clock = CLOCK_MONOTONIC;

void seconds_of_processor(void) { used_clock = CLOCK_PROCESS_CPUTIME_ID; }

double seconds_now(void)
{
    struct timespec now;
    clock_gettime(used_clock, &now);
    return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
}

peak_width peak_of_kernel(const char *name)
{
    if (strstr(name, "avx512bf16"))
        return PEAK_PAIRS;
    /* AMX is compared with what it is taken instead of. */
    if (strstr(name, "amx"))
        return PEAK_AVX512;
    return strstr(name, "avx512") ? PEAK_AVX512 : strstr(name, "avx2") ? PEAK_AVX2 : PEAK_GENERIC;
}

/* What the compiler makes of plain vectors without an instruction set to count on: the same that
 * the generic kernels are made of. */
static float spin_generic(float start)
{
    typedef float vector __attribute__((vector_size(16)));
    vector sums[CHAINS], factor = {0.5f, 0.5f, 0.5f, 0.5f}, total = {0};
    for (int c = 0; c < CHAINS; c++)
        sums[c] = total + start + (float)c;
    for (int i = 0; i < ROUNDS; i++)
        for (int c = 0; c < CHAINS; c++)
            sums[c] = sums[c] * factor + factor;
    for (int c = 0; c < CHAINS; c++)
        total += sums[c];
    return total[0] + total[1] + total[2] + total[3];
}

#if defined(__x86_64__)
__attribute__((target("avx2,fma"))) static float spin_avx2(float start)
{
    __m256 sums[CHAINS], factor = _mm256_set1_ps(0.5f);
    for (int c = 0; c < CHAINS; c++)
        sums[c] = _mm256_set1_ps(start + (float)c);
    for (int i = 0; i < ROUNDS; i++)
        for (int c = 0; c < CHAINS; c++)
            sums[c] = _mm256_fmadd_ps(sums[c], factor, factor);
    for (int c = 1; c < CHAINS; c++)
        sums[0] = _mm256_add_ps(sums[0], sums[c]);
    return _mm256_cvtss_f32(sums[0]);
}

__attribute__((target("avx512f"))) static float spin_avx512(float start)
{
    __m512 sums[CHAINS], factor = _mm512_set1_ps(0.5f);
    for (int c = 0; c < CHAINS; c++)
        sums[c] = _mm512_set1_ps(start + (float)c);
    for (int i = 0; i < ROUNDS; i++)
        for (int c = 0; c < CHAINS; c++)
            sums[c] = _mm512_fmadd_ps(sums[c], factor, factor);
    for (int c = 1; c < CHAINS; c++)
        sums[0] = _mm512_add_ps(sums[0], sums[c]);
    return _mm512_cvtss_f32(sums[0]);
}

__attribute__((target("avx512f,avx512bf16"))) static float spin_pairs(float start)
{
    __m512 sums[CHAINS];
    const __m512bh factor = (__m512bh)_mm512_set1_epi32(0x3e803e80); /* pairs of 0.25 */
    for (int c = 0; c < CHAINS; c++)
        sums[c] = _mm512_set1_ps(start + (float)c);
    for (int i = 0; i < ROUNDS; i++)
        for (int c = 0; c < CHAINS; c++)
            sums[c] = _mm512_dpbf16_ps(sums[c], factor, factor);
    for (int c = 1; c < CHAINS; c++)
        sums[0] = _mm512_add_ps(sums[0], sums[c]);
    return _mm512_cvtss_f32(sums[0]);
}
#endif

static float (*spin_of(peak_width *width))(float)
{
#if defined(__x86_64__)
    if (*width == PEAK_PAIRS && __builtin_cpu_supports("avx512bf16"))
        return spin_pairs;
    if (*width >= PEAK_AVX512 && __builtin_cpu_supports("avx512f")) {
        *width = PEAK_AVX512;
        return spin_avx512;
    }
    if (*width >= PEAK_AVX2 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        *width = PEAK_AVX2;
        return spin_avx2;
    }
#endif
    *width = PEAK_GENERIC;
    return spin_generic;
}

typedef struct spinner {
    float (*spin)(float);
    pthread_barrier_t *begin;
    volatile float kept;
} spinner;

static void *spin_thread(void *argument)
{
    spinner *s = argument;
    pthread_barrier_wait(s->begin);
    s->kept = s->spin(1);
    return NULL;
}

double peak_measure(peak_width width, int threads)
{
    pthread_t others[MOST_THREADS];
    pthread_barrier_t begin;
    int started = 0;
    if (threads > MOST_THREADS)
        threads = MOST_THREADS;
    spinner s = {spin_of(&width), &begin, 0};
    pthread_barrier_init(&begin, NULL, (unsigned)threads);
    while (started < threads - 1 && !pthread_create(&others[started], NULL, spin_thread, &s))
        started++;
    if (started < threads - 1)
        return 0; /* they wait for ever: no such machine is worth a figure */
    pthread_barrier_wait(&begin);
    double from = seconds_now();
    s.kept = s.spin(2);
    while (started)
        pthread_join(others[--started], NULL);
    double took = seconds_now() - from;
    pthread_barrier_destroy(&begin);
    const double lanes[] = {
        [PEAK_GENERIC] = 4, [PEAK_AVX2] = 8, [PEAK_AVX512] = 16, [PEAK_PAIRS] = 32};
    return 2.0 * CHAINS * ROUNDS * lanes[width] * threads / took * 1e-9;
}
