/* SPDX-License-Identifier: MIT */
#include "cpu/pairs.h"

#include <math.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <time.h>

#include "core/half.h"
#include "core/problem.h"

/* A map whose windows and rows are neither whole vectors nor even. */
enum { EXTENT = 15, WINDOW = 7, CHANNELS = 32, ELEMENTS = EXTENT * EXTENT * CHANNELS, TRIES = 15 };

/* Seconds of one run; negative if it failed. */
static double time_run(const natten_plan *plan, const natten_run *run)
{
    struct timespec from, to;
    clock_gettime(CLOCK_MONOTONIC, &from);
    if (plan->run(plan, run) != NATTEN_OK)
        return -1;
    clock_gettime(CLOCK_MONOTONIC, &to);
    return (double)(to.tv_sec - from.tv_sec) + 1e-9 * (double)(to.tv_nsec - from.tv_nsec);
}

static int in_order(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* How many times faster the second is: the median over neighbouring runs. The answer decides about
 * bits, and so is to be the same in every process: of what disturbs a busy or a waking processor
 * most falls on both of two neighbours, and the rest on few pairs. (Of processes that began on a
 * Zen 4 with four others on each core, the fastest runs of each kernel put one in 15 on the other
 * side of the threshold, this one in 1000.) Negative if the problem cannot be planned or run. */
static double time_both(const na_cpu_kernels *const kernels[2], const natten_problem *problem,
                        const natten_run run[2])
{
    natten_plan plan[2] = {{.merged = *problem}, {.merged = *problem}};
    double gains[TRIES], took[2];
    int planned = 0, runs = 0;
    while (planned < 2 && kernels[planned]->plan[NATTEN_FORWARD](&plan[planned]) == NATTEN_OK)
        planned++;
    while (planned == 2 && runs < 2 * TRIES) {
        took[runs & 1] = time_run(&plan[runs & 1], &run[runs & 1]);
        if (took[runs & 1] <= 0)
            break;
        if (runs++ & 1)
            gains[runs / 2 - 1] = took[0] / took[1];
    }
    while (planned-- > 0)
        plan[planned].destroy(plan[planned].state);
    if (runs < 2 * TRIES)
        return -1;
    qsort(gains, TRIES, sizeof *gains, in_order);
    return gains[TRIES / 2];
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
    natten_run run[2] = {{.threads = 1}, {.threads = 1}};
    const na_cpu_kernels *const kernels[2] = {floats, pairs};
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
    for (int i = 0; i < 6; i++)
        run[i / 3].data[NATTEN_QUERY + i % 3] = inputs + i % 3 * ELEMENTS;
    for (int i = 0; i < 2; i++)
        run[i].data[NATTEN_OUT] = outputs + i * ELEMENTS;
    double gain = -1;
    if (na_problem_check(&problem, &checked) == NATTEN_OK)
        gain = time_both(kernels, &checked, run);
    if (gain > 0 && !agree(outputs, outputs + ELEMENTS, ELEMENTS))
        gain = 0;
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
