/* SPDX-License-Identifier: MIT
 * Machines in a cloud are throttled for seconds at a time. So all kernels of a problem take turns,
 * the peak is measured before and after each, and a sample beside a low peak is thrown away. */
#include "bench.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "peak.h"

enum { CONTESTANTS = 40, MOST_ROUNDS = 100 };

static const double seconds_per_problem = 4, sample_seconds = 2e-3, least_share = 0.93;

typedef struct contestant {
    natten_plan *plan;
    peak_width width;
    double seconds[MOST_ROUNDS], peak[MOST_ROUNDS]; /* peak: the lower of before and after */
    int samples;
    double low, median, high; /* quartiles of seconds beside a peak that was high enough */
} contestant;

/* Multiplications and additions that cannot be done without, of the useful slots only. */
static double useful_flops(const natten_problem *p)
{
    double pairs = 1, queries = 1;
    for (int a = 0; a < p->rank; a++) {
        double slots = 0;
        for (int64_t q = 0; q < p->axis[a].query_extent; q++) {
            int64_t first, count;
            natten_axis_window(&p->axis[a], q, &first, &count);
            slots += (double)count;
        }
        pairs *= slots;
        queries *= (double)p->axis[a].query_extent;
    }
    pairs = (pairs + queries * (double)p->additional_tokens) * (double)(p->batch * p->heads);
    double d = (double)p->head_dim, e = (double)p->value_dim;
    const double per_pair[NATTEN_OPS] = {
        [NATTEN_FORWARD] = d + e, [NATTEN_BACKWARD] = 3 * d + 2 * e,
        [NATTEN_QK] = d,          [NATTEN_QK_BACKWARD] = 2 * d,
        [NATTEN_AV] = e,          [NATTEN_AV_BACKWARD] = 2 * e};
    return 2 * pairs * per_pair[p->op];
}

/* Seconds of one call, from as many calls as make a sample. */
static double time_plan(const natten_plan *plan, const natten_run *run)
{
    int calls = 0;
    double from = seconds_now(), took;
    do {
        if (natten_plan_run(plan, run) != NATTEN_OK)
            return 0;
        calls++;
        took = seconds_now() - from;
    } while (took < sample_seconds);
    return took / calls;
}

static void compete(contestant *all, int count, const natten_run *run)
{
    double until = seconds_now() + seconds_per_problem;
    for (int c = 0; c < count; c++)
        time_plan(all[c].plan, run); /* warms caches, pages and threads */
    for (int round = 0; round < MOST_ROUNDS && seconds_now() < until; round++)
        for (int c = 0; c < count; c++) {
            contestant *now = &all[c];
            double before = peak_measure(now->width, (int)run->threads);
            now->seconds[round] = time_plan(now->plan, run);
            double after = peak_measure(now->width, (int)run->threads);
            now->peak[round] = before < after ? before : after;
            now->samples = round + 1;
        }
}

static int ascending(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void report(contestant *c, const test_problem *test, const natten_problem *p,
                   const bench_options *o)
{
    double peak = 0, kept[MOST_ROUNDS];
    int count = 0;
    for (int i = 0; i < c->samples; i++)
        peak = c->peak[i] > peak ? c->peak[i] : peak;
    for (int i = 0; i < c->samples; i++)
        if (c->peak[i] >= least_share * peak)
            kept[count++] = c->seconds[i];
    qsort(kept, (size_t)count, sizeof *kept, ascending);
    c->low = count ? kept[count / 4] : 0;
    c->median = count ? kept[count / 2] : 0;
    c->high = count ? kept[count * 3 / 4] : 0;
    double rate = c->median > 0 ? useful_flops(p) / c->median * 1e-9 : 0;
    if (p->dtype == NATTEN_F64)
        peak /= 2; /* half the lanes */
    printf(o->csv ? "%s_%s,%s,%d,%.4f,%.4f,%.4f,%.2f,%.1f,%.1f,%d,%d\n"
                  : "%s_%-40s %-26s %2d threads %9.4f ms [%.4f .. %.4f] %8.2f GFLOP/s, peak %7.1f: "
                    "%5.1f %%  (%d of %d samples)\n",
           op_name((natten_op)p->op), test->text,
           o->choices ? natten_plan_choice(c->plan) : natten_plan_kernel(c->plan), o->threads,
           c->median * 1e3, c->low * 1e3, c->high * 1e3, rate, peak,
           peak > 0 ? 100 * rate / peak : 0, count, c->samples);
}

static int gather(const natten_problem *problem, const char *only, int most, contestant *all)
{
    const char *name;
    int count = 0;
    for (size_t i = 0; count < most && (name = natten_kernel_name(i)); i++) {
        natten_plan *plan;
        if (only && strncmp(name, only, strlen(only)))
            continue;
        if (natten_plan_create(problem, name, &plan) != NATTEN_OK)
            continue;
        if (strcmp(natten_plan_kernel(plan), name)) {
            natten_plan_destroy(plan);
            continue;
        }
        all[count].plan = plan;
        all[count].samples = 0;
        all[count++].width = peak_of_kernel(name);
    }
    return count;
}

/* All choices of a kernel. */
static int gather_choices(natten_problem problem, const char *only, contestant *all)
{
    int count = 0;
    for (problem.choice = 0; count < CONTESTANTS; problem.choice++) {
        if (natten_plan_create(&problem, only, &all[count].plan) != NATTEN_OK)
            break;
        all[count].samples = 0;
        all[count].width = peak_of_kernel(natten_plan_kernel(all[count].plan));
        count++;
    }
    return count;
}

/* How choice 0 and the one that tuning takes stand beside the best. */
static void report_choices(const contestant *all, int count, const natten_problem *problem,
                           const natten_run *run)
{
    const natten_tuning tuning = {.warmups = 5, .rounds = 5};
    natten_tuned tuned;
    int best = 0;
    for (int c = 1; c < count; c++)
        if (all[c].median < all[best].median)
            best = c;
    if (natten_tune(problem, run, &tuning, &tuned) != NATTEN_OK || tuned.choice >= count) {
        printf("  tuning failed: %s\n", natten_last_error());
        return;
    }
    printf("  choice 0 takes %.3f of the best's time (choice %d: %s), tuned choice %d %.3f\n",
           all[0].median / all[best].median, best, natten_plan_choice(all[best].plan),
           (int)tuned.choice, all[tuned.choice].median / all[best].median);
}

void bench_problem(const test_problem *test, natten_op op, const bench_options *o)
{
    static contestant all[CONTESTANTS];
    natten_problem problem;
    trial t;
    tensor tensors[NATTEN_ROLES];
    natten_run run = {.threads = o->threads};
    if (!problem_of_op(test, op, &problem))
        return;
    const char *complaint = trial_make_inputs(&t, &problem, o->seed);
    int made = !complaint && trial_tensors(&t, o->huge ? PLACE_HUGE : PLACE_START, tensors, &run);
    if (!made)
        printf("%s_%s: %s\n", op_name(op), test->text, complaint ? complaint : "no memory");
    int count = 0;
    if (made)
        count = o->choices ? gather_choices(problem, o->only, all)
                           : gather(&problem, o->only, o->taken ? 1 : CONTESTANTS, all);
    compete(all, count, &run);
    for (int c = 0; c < count; c++)
        report(&all[c], test, &problem, o);
    if (count && o->choices)
        report_choices(all, count, &problem, &run);
    for (int c = 0; c < count; c++)
        natten_plan_destroy(all[c].plan);
    if (made)
        trial_tensors_free(tensors);
    trial_free(&t);
}
