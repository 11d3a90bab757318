/* SPDX-License-Identifier: MIT
 * How maps are cut for the kernel for AMX, key by key, and what that kernel refuses, on a processor
 * said to have AMX. What it computes is check_amx's business. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/problem.h"
#include "cpu/cpuid.h"
#include "cpu/strips.h"
#include "cpu/tiles.h"
#include "problem_string.h"
#include "unit.h"

int __wrap_na_cpu_has_amx(void);
int __wrap_na_cpu_allows_amx(void);
double __wrap_na_strips_useful(const na_strips *strips);

static int has = 1, allowed = 1;
static double useful = 0.5;

int __wrap_na_cpu_has_amx(void) { return has; }
int __wrap_na_cpu_allows_amx(void) { return allowed; }
double __wrap_na_strips_useful(const na_strips *strips) { return (void)strips, useful; }

/* Checked and padded to three axes; 0: it cannot be. */
static int make_problem(const char *text, natten_problem *padded)
{
    test_problem test;
    natten_problem problem;
    return !problem_parse(text, &test) && problem_of_op(&test, NATTEN_FORWARD, &problem) &&
           na_problem_check(&problem, padded) == NATTEN_OK;
}

/* The place, on an axis, of a key of the box. */
static int key_place(const na_strips *s, const na_box *box, int axis, int key)
{
    const int row = key / box->length, place = key % box->length;
    if (axis == s->axis)
        return box->section->key + row * s->axes[axis].dilation;
    const int number = axis == s->across[0] ? place / box->across : place % box->across;
    return box->axis[axis]->key + number * s->axes[axis].dilation;
}

static int in_window(const natten_axis *axis, na_window window, int key)
{
    const int offset = key - window.first;
    return offset >= 0 && offset % axis->dilation == 0 && offset / axis->dilation < window.count;
}

/* Whether the bits of query q of a box are its keys, each once, and no others. */
static int query_is_right(const natten_problem *p, const na_strips *s, const na_box *box, int q,
                          const int query[3])
{
    const na_mask *m = box->mask;
    const uint16_t *words = s->words + m->words + (int64_t)q * m->blocks * 2;
    int64_t missing = 1;
    na_window window[3];
    for (int a = 0; a < 3; a++) {
        window[a] = na_local_window(&p->axis[a], query[a]);
        missing *= window[a].count;
    }
    for (int n = 0; n < m->blocks * NA_BLOCK; n++) {
        if (!(words[n / NA_HALF] >> n % NA_HALF & 1))
            continue;
        const int key = box->start + n, block = n / NA_BLOCK, half = q / NA_HALF;
        if (key % box->length >= box->width || key / box->length >= box->section->rows ||
            block < m->lo[q] || block >= m->hi[q] || block < m->half_lo[half] ||
            block >= m->half_hi[half])
            return 0;
        for (int a = 0; a < 3; a++)
            if (!in_window(&p->axis[a], window[a], key_place(s, box, a, key)))
                return 0;
        missing--;
    }
    return missing == 0;
}

/* Checks all queries of a box, and counts them in `seen`. */
static int box_is_right(const natten_problem *p, const na_strips *s, const na_box *box,
                        unsigned char *seen)
{
    int right = box->start + NA_BLOCK * box->mask->blocks <= s->keys;
    for (int q = 0; q < NA_BOX; q++) {
        const int i[3] = {q / (s->axes[1].cut * s->axes[2].cut),
                          q / s->axes[2].cut % s->axes[1].cut, q % s->axes[2].cut};
        int query[3], there = 1;
        for (int a = 0; a < 3; a++) {
            there &= i[a] < box->axis[a]->queries;
            query[a] = box->axis[a]->query + i[a] * s->axes[a].dilation;
        }
        if (!there) {
            right &= box->mask->lo[q] == box->mask->hi[q];
            continue;
        }
        right &= query_is_right(p, s, box, q, query);
        seen[(query[0] * p->axis[1].query_extent + query[1]) * p->axis[2].query_extent +
             query[2]]++;
    }
    return right;
}

static int strips_are_right(const natten_problem *p, const na_box_cut *cut, const char *text)
{
    na_strips s;
    na_box box;
    const int64_t heads = 3, queries = p->axis[0].query_extent * p->axis[1].query_extent *
                                       p->axis[2].query_extent;
    unsigned char *seen = calloc((size_t)queries, 1);
    int right = seen && na_strips_make(&s, p, cut, heads, 128) == NA_STRIPS_MADE;
    if (!right)
        return 0;
    for (int64_t task = s.strips; task < 2 * s.strips; task++)
        for (int n = 0; na_box_at(&s, task, n, &box); n++)
            right &= box.head == 1 && box_is_right(p, &s, &box, seen);
    for (int64_t i = 0; i < queries; i++)
        right &= seen[i] == 1;
    if (!right)
        printf("wrong strips: %s\n", text);
    na_strips_free(&s);
    free(seen);
    return right;
}

static void test_cuts(const char *text)
{
    natten_problem p;
    na_box_cut cuts[NA_BOX_CUTS];
    CHECK(make_problem(text, &p));
    for (int i = 0, count = p.batch ? na_box_cuts(&p, cuts) : 0; i < count; i++) {
        CHECK(i == 0 || cuts[i].cost >= cuts[i - 1].cost);
        CHECK(strips_are_right(&p, &cuts[i], text));
    }
}

static void test_strips(void)
{
    static const char *const texts[] = {"b1h1d8_1_w1",
                                        "b1h1d8_300_w65",
                                        "b1h1d8_300_w65_c1",
                                        "b1h1d8_300_w64_s5",
                                        "b1h1d8_5000_w3",
                                        "b1h1d8_130_w9_d7_c1",
                                        "b1h1d8_20x21_w7x7",
                                        "b1h1d8_40x9_w5x4_s2x3",
                                        "b1h1d8_1x50_w1x7",
                                        "b1h1d8_50x1_w7x1",
                                        "b1h1d8_30x31_w5x6_d3x2",
                                        "b1h1d8_9x10x11_w3x4x5_c101",
                                        "b1h1d8_8x8x8_w8x8x8",
                                        "b1h1d8_12x7x9_w3x2x3_d4x3x3",
                                        "b1h1d8_60_w20_q13+9_k50+0",
                                        "b1h1d8_30x40_w7x9_q8x6+5x30_k20x16+0x24"};
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++)
        test_cuts(texts[i]);
    uint64_t random = 5;
    for (int i = 0; i < 100; i++) {
        char text[256];
        problem_random(&random, text, sizeof text);
        natten_problem p;
        if (make_problem(text, &p))
            test_cuts(text);
    }
}

static int is_too_large(const char *text)
{
    natten_problem p;
    na_strips s;
    na_box_cut cuts[NA_BOX_CUTS];
    return make_problem(text, &p) && na_box_cuts(&p, cuts) > 0 &&
           na_strips_make(&s, &p, cuts, 1, 128) == NA_STRIPS_TOO_LARGE;
}

static void test_too_large(void)
{
    CHECK(is_too_large("b1h1d8_100000_w100000_c1"));
    CHECK(is_too_large("b1h1d8_4000x5000_w4000x5000"));
}

/* What planning says of the kernel begins so. */
static int says(const char *problem_text, const char *words)
{
    test_problem test;
    natten_problem p;
    natten_plan *plan;
    char text[4000] = "", line[200];
    if (problem_parse(problem_text, &test) || !problem_of_op(&test, NATTEN_FORWARD, &p) ||
        natten_plan_create(&p, NULL, &plan) != NATTEN_OK)
        return 0;
    natten_plan_explain(plan, text, sizeof text);
    snprintf(line, sizeof line, "cpu-amx-forward: %s", words);
    const int taken = !strcmp(natten_plan_kernel(plan), "cpu-amx-forward");
    natten_plan_destroy(plan);
    return strstr(text, line) && taken == !strncmp(words, "taken", 5);
}

static void test_refusals(void)
{
    CHECK(
        says("b1h1d32_20_w5_bf16", "taken (choice 0 of 4: boxes of 1x1x32): 50 % of the products"));
    CHECK(says("b1h1d32_20_w5_f16", "only for bfloat16"));
    CHECK(says("b1h1d32_20_w5_drop0.5_bf16", "neither dropout nor a bias of any kind"));
    CHECK(says("b1h1d32_20_w5_kb_bf16", "neither dropout nor a bias of any kind"));
    CHECK(says("b1h1d32_20_w5_rpb_bf16", "neither dropout nor a bias of any kind"));
    CHECK(says("b1h1d32_20_w5_add3_bf16", "no additional tokens"));
    CHECK(says("b1h1d129_20_w5_bf16", "more than 128 channels"));
    CHECK(says("b1h1d32_20_w5_dv160_bf16", "more than 128 channels"));
    CHECK(says("b1h1d32_100000_w100000_c1_bf16", "tables too large"));
    CHECK(says("b1h1d128_520x520_w512x512_bf16", "a thread would need"));
    /* Half of the channels are there to fill tiles. */
    CHECK(says("b1h1d16_20_w5_bf16", "only 25 % of the products of dense blocks would count"));
    useful = 0.2;
    CHECK(says("b1h1d32_20_w5_bf16", "only 20 % of the products of dense blocks would count"));
    useful = 0.5;
    has = 0;
    CHECK(says("b1h1d32_20_w5_bf16", "this processor has no AMX for bfloat16"));
    has = 1;
    allowed = 0;
    CHECK(says("b1h1d32_20_w5_bf16", "this system does not let the process use AMX"));
}

int main(void)
{
    unit_test("strips");
    test_strips();
    unit_test("tables too large");
    test_too_large();
    unit_test("refusals");
    if (na_cpu_has_avx512())
        test_refusals();
    else
        unit_skip("this processor has no AVX-512");
    return unit_end("test_amx");
}
