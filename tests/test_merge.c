/* SPDX-License-Identifier: MIT
 * Axes that become one: which, and that nothing else about the problem changes. (That results are
 * those of the axes one by one, `check` sees: the reference never merges.) */
#include "core/merge.h"

#include <stdio.h>
#include <string.h>

#include "core/problem.h"
#include "problem_string.h"
#include "unit.h"

/* A problem padded to three axes, and merged; the number of axes it has fewer, -1: not read. */
static int merge(const char *text, natten_op op, natten_problem *padded, natten_problem *merged)
{
    test_problem test;
    natten_problem problem;
    if (problem_parse(text, &test) || !problem_of_op(&test, op, &problem) ||
        na_problem_check(&problem, padded) != NATTEN_OK)
        return -1;
    *merged = *padded;
    return na_problem_merge(merged);
}

/* What becomes of axes: "queries of keys", outermost first. */
static void expect(const char *text, const char *axes)
{
    for (int op = 0; op < NATTEN_OPS; op++) {
        natten_problem padded, p;
        char got[128] = "";
        const int fewer = merge(text, (natten_op)op, &padded, &p);
        for (int i = 0; i < 3 && fewer >= 0; i++)
            snprintf(got + strlen(got), sizeof got - strlen(got), "%s%lld of %lld", i ? ", " : "",
                     (long long)p.axis[i].query_extent, (long long)p.axis[i].key_extent);
        if (strcmp(got, axes))
            unit_fail("%s %s: %s, expected %s", op_name((natten_op)op), text, got, axes);
        if (fewer == 0)
            CHECK(!memcmp(&p, &padded, sizeof p));
    }
}

static void test_axes(void)
{
    expect("b2h2d8_7x7_w7x7", "1 of 1, 1 of 1, 49 of 49");
    expect("b2h2d8_7x7_w7x7_s3x7_add3_lse_kb_hk1", "1 of 1, 1 of 1, 49 of 49");
    expect("b2h2d8_3x4x5_w3x4x5_hf", "1 of 1, 1 of 1, 60 of 60");
    expect("b2h2d8_6x4x5_w3x4x5", "1 of 1, 6 of 6, 20 of 20");
    expect("b2h2d8_3x4x9_w3x4x5", "1 of 1, 12 of 12, 9 of 9");
    expect("b2h2d8_9x1_w9x1", "1 of 1, 1 of 1, 9 of 9");
    /* Queries past the end of the keys, and fewer of them. */
    expect("b2h2d8_7x5_w7x5_q3x4+6x2_k7x5+0x0", "1 of 1, 1 of 1, 12 of 35");
    expect("b2h2d8_7x5_w7x5_qkv", "1 of 1, 1 of 1, 35 of 35");
}

static void test_others(void)
{
    expect("b2h2d8_7x7_w7x6", "1 of 1, 7 of 7, 7 of 7");
    expect("b2h2d8_7x8_w7x4_d1x2", "1 of 1, 7 of 7, 8 of 8");
    expect("b2h2d8_7x7_w7x7_c01", "1 of 1, 7 of 7, 7 of 7");
    expect("b2h2d8_7x7_w7x7_c10", "1 of 1, 7 of 7, 7 of 7");
    expect("b2h2d8_5x7x5_w5x6x5", "5 of 5, 7 of 7, 5 of 5");
    expect("b2h2d8_1x1x9_w1x1x9", "1 of 1, 1 of 1, 9 of 9");
    expect("b2h2d8_49_w49", "1 of 1, 1 of 1, 49 of 49");
    expect("b2h2d8_7x7_w7x7_odd", "1 of 1, 7 of 7, 7 of 7");
}

/* Biases and dropout go by places of the map. */
static void test_places(void)
{
    natten_problem padded, merged;
    CHECK(merge("b2h2d8_7x7_w7x7_rpb", NATTEN_FORWARD, &padded, &merged) == 0);
    CHECK(merge("b2h2d8_7x7_w7x7_rpb", NATTEN_QK_BACKWARD, &padded, &merged) == 0);
    CHECK(merge("b2h2d8_7x7_w7x7_drop0.5", NATTEN_BACKWARD, &padded, &merged) == 0);
    CHECK(merge("b2h2d8_7x7_w7x7", NATTEN_BACKWARD, &padded, &merged) == 1);
}

/* Every token lies where it did. */
static void test_layouts(const char *text)
{
    natten_problem padded, merged;
    CHECK(merge(text, NATTEN_BACKWARD, &padded, &merged) > 0);
    for (int role = 0; role < NATTEN_ROLES; role++) {
        const natten_layout *a = &padded.layout[role], *b = &merged.layout[role];
        const na_shape from = na_role_shape(&padded, (natten_role)role);
        const na_shape to = na_role_shape(&merged, (natten_role)role);
        int64_t token = 0;
        CHECK(a->batch == b->batch && a->head == b->head);
        if (!(padded.roles >> role & 1))
            continue;
        for (int64_t z = 0; z < from.extent[0]; z++)
            for (int64_t y = 0; y < from.extent[1]; y++)
                for (int64_t x = 0; x < from.extent[2]; x++, token++) {
                    const int64_t i = token % to.extent[2], j = token / to.extent[2];
                    CHECK(j / to.extent[1] < to.extent[0]);
                    CHECK(z * a->axis[0] + y * a->axis[1] + x * a->axis[2] ==
                          j / to.extent[1] * b->axis[0] + j % to.extent[1] * b->axis[1] +
                              i * b->axis[2]);
                }
    }
}

/* Whole windows of a map too large for one axis. */
static void test_limit(void)
{
    natten_problem p, padded, before;
    natten_problem_init(&p, NATTEN_FORWARD, NATTEN_F32, 2);
    p.axis[0].query_extent = p.axis[1].query_extent = 1 << 14;
    p.axis[0].window = p.axis[1].window = 1 << 14;
    p.head_dim = 1;
    natten_problem_pack(&p, NATTEN_HEADS_LAST);
    CHECK(na_problem_check(&p, &padded) == NATTEN_OK);
    CHECK(na_problem_merge(&padded) == 1);
    p.axis[0].query_extent = p.axis[0].window = (1 << 14) + 1;
    natten_problem_pack(&p, NATTEN_HEADS_LAST);
    CHECK(na_problem_check(&p, &padded) == NATTEN_OK);
    before = padded;
    CHECK(na_problem_merge(&padded) == 0);
    CHECK(!memcmp(&before, &padded, sizeof padded));
}

/* An explanation says so; the plan's own problem stays. */
static void test_explanation(void)
{
    test_problem test;
    natten_problem problem;
    natten_plan *plan;
    char text[4096];
    CHECK(!problem_parse("b1h1d8_4x5x6_w3x5x6", &test));
    CHECK(problem_of_op(&test, NATTEN_FORWARD, &problem));
    CHECK(natten_plan_create(&problem, NULL, &plan) == NATTEN_OK);
    natten_plan_explain(plan, text, sizeof text);
    CHECK(strstr(text, "\naxes: windows are whole axes, so that 4 x 5 x 6 keys are 4 x 30 for all "
                       "kernels but the reference\n"));
    natten_plan_destroy(plan);
    problem.axis[2].causal = 1;
    CHECK(natten_plan_create(&problem, NULL, &plan) == NATTEN_OK);
    natten_plan_explain(plan, text, sizeof text);
    CHECK(!strstr(text, "axes:"));
    natten_plan_destroy(plan);
}

int main(void)
{
    unit_test("axes that are one");
    test_axes();
    unit_test("axes that are not");
    test_others();
    unit_test("places that matter");
    test_places();
    unit_test("layouts");
    test_layouts("b2h4d8_3x4x5_w3x4x5_lse_kb_add3_hk2");
    test_layouts("b2h4d8_3x4x5_w2x4x5_lse_kb_hf");
    test_layouts("b2h4d8_4x1x5_w4x1x3_lse_neg");
    test_layouts("b2h4d8_3x4x5_w3x4x5_q2x3x4+0x1x7_k3x4x5+0x0x0_lse_qkv");
    unit_test("the limit");
    test_limit();
    unit_test("explanation");
    test_explanation();
    return unit_end("test_merge");
}
