/* SPDX-License-Identifier: MIT */
#include "cpu/pairs.h"

#include <math.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <time.h>

#include "core/half.h"
#include "core/problem.h"

/* A map whose windows and rows are neither whole vectors nor even. */
enum { EXTENT = 15, WINDOW = 7, CHANNELS = 32, ELEMENTS = EXTENT * EXTENT * CHANNELS, TRIES = 4 };

/* Seconds of the fastest of a few runs; negative if the problem cannot be planned or run. */
static double time_forward(const na_cpu_kernels *kernels, const natten_problem *problem,
                           const natten_run *run)
{
    natten_plan plan = {.problem = *problem};
    double best = -1;
    if (kernels->plan[NATTEN_FORWARD](&plan) != NATTEN_OK)
        return best;
    for (int i = 0; i < TRIES; i++) {
        struct timespec from, to;
        clock_gettime(CLOCK_MONOTONIC, &from);
        if (plan.run(&plan, run) != NATTEN_OK)
            break;
        clock_gettime(CLOCK_MONOTONIC, &to);
        double took =
            (double)(to.tv_sec - from.tv_sec) + 1e-9 * (double)(to.tv_nsec - from.tv_nsec);
        if (best < 0 || took < best)
            best = took;
    }
    plan.destroy(plan.state);
    return best;
}

/* Values between -2 and 2. */
static void fill(uint16_t *to, int count)
{
    uint32_t random = 1;
    for (int i = 0; i < count; i++) {
        random = random * 1664525 + 1013904223;
        to[i] = (uint16_t)(0x3f00 | (random >> 16 & 0x80ff));
    }
}

/* Both results are rounded, and so are the weights of the second. */
static int agree(const uint16_t *a, const uint16_t *b, int count)
{
    for (int i = 0; i < count; i++)
        if (!(fabsf(na_bf16_load(a[i]) - na_bf16_load(b[i])) <= 0x1p-6f))
            return 0;
    return 1;
}

double na_pairs_try(const na_cpu_kernels *floats, const na_cpu_kernels *pairs)
{
    uint16_t *inputs = malloc(5 * ELEMENTS * sizeof *inputs), *outputs = inputs + 3 * ELEMENTS;
    natten_problem problem, checked;
    natten_run run = {.threads = 1};
    if (!inputs)
        return -1;
    fill(inputs, 3 * ELEMENTS);
    natten_problem_init(&problem, NATTEN_FORWARD, NATTEN_BF16, 2);
    problem.head_dim = CHANNELS;
    problem.scale = 0.18;
    for (int a = 0; a < 2; a++) {
        problem.axis[a].query_extent = EXTENT;
        problem.axis[a].window = WINDOW;
    }
    natten_problem_pack(&problem, NATTEN_HEADS_LAST);
    double slow = -1, fast = -1;
    if (na_problem_check(&problem, &checked) == NATTEN_OK) {
        for (int i = 0; i < 3; i++)
            run.data[NATTEN_QUERY + i] = inputs + i * ELEMENTS;
        run.data[NATTEN_OUT] = outputs;
        slow = time_forward(floats, &checked, &run);
        run.data[NATTEN_OUT] = outputs + ELEMENTS;
        fast = time_forward(pairs, &checked, &run);
    }
    double gain = slow < 0 || fast <= 0                          ? -1
                  : agree(outputs, outputs + ELEMENTS, ELEMENTS) ? slow / fast
                                                                 : 0;
    free(inputs);
    return gain;
}

#if defined(NATTEN_HAS_AVX512BF16)
double na_pairs_gain(void)
{
    /* Threads that find out at the same time keep what the first found. */
    static _Atomic double known = -1;
    double gain = atomic_load(&known);
    if (gain >= 0)
        return gain;
    const double found = na_pairs_try(&na_cpu_avx512_f32, &na_cpu_avx512bf16_f32);
    if (found < 0)
        return found;
    return atomic_compare_exchange_strong(&known, &gain, found) ? found : gain;
}
#endif
