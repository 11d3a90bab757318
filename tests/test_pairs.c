/* SPDX-License-Identifier: MIT
 * When the forward for AVX-512 BF16 is taken, on a processor said to have it; what it computes is
 * check_pairs' business. */
#include <stdio.h>
#include <string.h>

#include "cpu/cpuid.h"
#include "cpu/pairs.h"
#include "unit.h"

int __wrap_na_cpu_has_avx512bf16(void);
double __wrap_na_pairs_gain(void);

static double gain;

int __wrap_na_cpu_has_avx512bf16(void) { return 1; }
double __wrap_na_pairs_gain(void) { return gain; }

static void make_problem(natten_problem *p, natten_dtype dtype, int64_t channels)
{
    natten_problem_init(p, NATTEN_FORWARD, dtype, 1);
    p->axis[0].query_extent = 20;
    p->axis[0].window = 5;
    p->head_dim = channels;
    natten_problem_pack(p, NATTEN_HEADS_LAST);
}

/* What planning says of the kernel begins so. */
static int says(const natten_problem *p, const char *words)
{
    natten_plan *plan;
    char text[4000] = "", line[200];
    if (natten_plan_create(p, NULL, &plan) != NATTEN_OK)
        return 0;
    natten_plan_explain(plan, text, sizeof text);
    snprintf(line, sizeof line, "cpu-avx512bf16-forward: %s", words);
    const int pairs = !strcmp(natten_plan_kernel(plan), "cpu-avx512bf16-forward");
    natten_plan_destroy(plan);
    return strstr(text, line) && pairs == !strncmp(words, "taken", 5);
}

static void test_planning(void)
{
    natten_problem p;
    make_problem(&p, NATTEN_BF16, 32);
    gain = 1.5;
    CHECK(says(&p, "taken"));
    gain = 1.04;
    CHECK(says(&p, "tried here, it was 1.04 times as fast as the kernel for float"));
    gain = 0;
    CHECK(says(&p, "wrong results when tried here"));
    gain = -1;
    CHECK(says(&p, "no memory to try it"));
    gain = 2;
    p.dropout = 0.5;
    CHECK(says(&p, "neither dropout nor a key bias"));
    make_problem(&p, NATTEN_BF16, 31);
    CHECK(says(&p, "an odd number of channels"));
    make_problem(&p, NATTEN_F16, 32);
    CHECK(says(&p, "only for bfloat16"));
}

static const na_cpu_kernels *right;
static natten_status (*run_right)(const natten_plan *, const natten_run *);

/* One element of the output twice or half as large. */
static natten_status run_wrong(const natten_plan *plan, const natten_run *run)
{
    natten_status status = run_right(plan, run);
    *(uint16_t *)run->data[NATTEN_OUT] ^= 0x80;
    return status;
}

static natten_status plan_wrong(natten_plan *plan)
{
    natten_status status = right->plan[NATTEN_FORWARD](plan);
    run_right = plan->run;
    plan->run = run_wrong;
    return status;
}

static natten_status plan_nothing(natten_plan *plan) { return na_refuse(plan, "no memory"); }

static void test_trying(void)
{
    const na_cpu_kernels wrong = {{[NATTEN_FORWARD] = plan_wrong}};
    const na_cpu_kernels none = {{[NATTEN_FORWARD] = plan_nothing}};
    right = &na_cpu_avx512_f32;
    CHECK(na_pairs_try(right, right) > 0);
    CHECK(na_pairs_try(right, &na_cpu_avx2_f32) > 0);
    CHECK(na_pairs_try(right, &wrong) == 0);
    CHECK(na_pairs_try(right, &none) < 0);
    CHECK(na_pairs_try(&none, right) < 0);
}

int main(void)
{
    unit_test("planning");
    if (na_cpu_has_avx512())
        test_planning();
    else
        unit_skip("this processor has no AVX-512");
    unit_test("trying both kernels");
    if (na_cpu_has_avx512())
        test_trying();
    else
        unit_skip("this processor has no AVX-512");
    return unit_end("test_pairs");
}
