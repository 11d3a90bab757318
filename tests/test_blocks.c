/* SPDX-License-Identifier: MIT
 * A map cut into uneven blocks along every axis gives the result of the whole: each block of
 * queries, with just the keys it needs, through views of the whole's tensors. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "trial.h"
#include "unit.h"

enum { CUTS = 3 };

typedef struct cutting {
    const trial *whole;
    tensor *tensors;
    double *sums[NATTEN_ROLES]; /* of the outputs many blocks add to */
    const char *kernel;
} cutting;

/* Gradients of what all queries share. */
static int is_shared(natten_role role)
{
    return role == NATTEN_D_KEY || role == NATTEN_D_VALUE || role == NATTEN_D_RPB ||
           role == NATTEN_D_ADDITIONAL_KEY || role == NATTEN_D_ADDITIONAL_VALUE ||
           role == NATTEN_D_KEY_BIAS;
}

static int is_of_keys(natten_role role)
{
    return role == NATTEN_KEY || role == NATTEN_VALUE || role == NATTEN_KEY_BIAS ||
           role == NATTEN_D_KEY || role == NATTEN_D_VALUE || role == NATTEN_D_KEY_BIAS;
}

static int has_axes(natten_role role)
{
    return role != NATTEN_RPB && role != NATTEN_D_RPB && role != NATTEN_ADDITIONAL_KEY &&
           role != NATTEN_ADDITIONAL_VALUE && role != NATTEN_D_ADDITIONAL_KEY &&
           role != NATTEN_D_ADDITIONAL_VALUE;
}

/* Queries [begin, end) of the axis and the keys of their windows. */
static natten_axis block_axis(natten_axis axis, int64_t begin, int64_t end)
{
    int64_t low = axis.global_extent, high = 0;
    natten_axis block = axis;
    block.query_origin = begin;
    block.query_extent = end - begin;
    for (int64_t q = 0; q < block.query_extent; q++) {
        int64_t first, count;
        natten_axis_window(&block, q, &first, &count);
        int64_t past = first + (count - 1) * axis.dilation + 1;
        low = first < low ? first : low;
        high = past > high ? past : high;
    }
    block.key_origin = low;
    block.key_extent = high - low;
    return block;
}

/* Adds a block's part of a shared gradient to the sums of the whole. */
static void add_part(cutting *c, const natten_problem *block, const tensor *part)
{
    double *values = malloc((size_t)tensor_count(part) * sizeof *values), *value = values;
    tensor_read(part, values);
    test_shape in = part->shape, all = role_shape(&c->whole->problem, part->role);
    int64_t origin[3] = {0, 0, 0};
    for (int a = 0; is_of_keys(part->role) && a < block->rank; a++)
        origin[a] = block->axis[a].key_origin;
    for (int64_t row = 0; row < part->rows; row++) {
        int64_t head = row % in.head, rest = row / in.head, at[3];
        for (int a = 2; a >= 0; a--) {
            at[a] = rest % in.axis[a] + origin[a];
            rest /= in.axis[a];
        }
        int64_t to = ((rest * all.axis[0] + at[0]) * all.axis[1] + at[1]) * all.axis[2] + at[2];
        double *sum = c->sums[part->role] + (to * all.head + head) * all.channel;
        for (int64_t i = 0; i < in.channel; i++)
            sum[i] += *value++;
    }
    free(values);
}

static void run_block(cutting *c, const natten_problem *block)
{
    tensor parts[NATTEN_ROLES] = {0};
    natten_problem problem = *block, packed = *block;
    natten_run run = {.threads = 2, .seed = TRIAL_SEED, .offset = TRIAL_OFFSET};
    natten_problem_pack(&packed, NATTEN_HEADS_LAST);
    for (int role = 0; role < NATTEN_ROLES; role++) {
        if (!(problem.roles >> role & 1))
            continue;
        if (is_shared((natten_role)role)) {
            problem.layout[role] = packed.layout[role];
            CHECK(tensor_make(&parts[role], &problem, (natten_role)role, PLACE_START));
            run.data[role] = tensor_data(&parts[role]);
            continue;
        }
        int64_t offset = 0;
        for (int a = 0; has_axes((natten_role)role) && a < problem.rank; a++)
            offset += problem.layout[role].axis[a] * (is_of_keys((natten_role)role)
                                                          ? problem.axis[a].key_origin
                                                          : problem.axis[a].query_origin);
        const tensor *t = &c->tensors[role];
        run.data[role] = (char *)tensor_data(t) + offset * (int64_t)tensor_element(t);
    }
    natten_plan *plan = NULL;
    CHECK(natten_plan_create(&problem, c->kernel, &plan) == NATTEN_OK);
    CHECK(plan && natten_plan_run(plan, &run) == NATTEN_OK);
    for (int role = 0; role < NATTEN_ROLES; role++)
        if (parts[role].map)
            add_part(c, block, &parts[role]);
    natten_plan_destroy(plan);
    trial_tensors_free(parts);
}

static void each_block(cutting *c, natten_problem block, int axis)
{
    if (axis >= block.rank || axis > 2) {
        run_block(c, &block);
        return;
    }
    natten_axis whole = block.axis[axis];
    int64_t extent = whole.query_extent, cuts[] = {0, extent / 3, extent / 3 + 1, extent};
    for (int i = 0; i < CUTS; i++)
        if (cuts[i] < cuts[i + 1]) {
            block.axis[axis] = block_axis(whole, cuts[i], cuts[i + 1]);
            each_block(c, block, axis + 1);
        }
}

static void test_op(const test_problem *test, natten_op op, const char *kernel)
{
    natten_problem problem;
    trial t;
    tensor tensors[NATTEN_ROLES];
    natten_run unused;
    if (!problem_of_op(test, op, &problem))
        return;
    CHECK(trial_make(&t, &problem, 7) == NULL);
    CHECK(trial_tensors(&t, PLACE_START, tensors, &unused));
    cutting c = {.whole = &t, .tensors = tensors, .kernel = kernel};
    for (int role = 0; role < NATTEN_ROLES; role++)
        if (t.outputs >> role & 1)
            c.sums[role] = calloc((size_t)tensor_count(&tensors[role]) + 1, sizeof(double));
    each_block(&c, problem, 0);
    for (int role = 0; role < NATTEN_ROLES; role++) {
        if (!c.sums[role])
            continue;
        if (!is_shared((natten_role)role))
            tensor_read(&tensors[role], c.sums[role]);
        trial_error error = trial_compare(&t, (natten_role)role, c.sums[role]);
        if (!(error.share <= 1))
            unit_fail("%s_%s: %s: error %g, allowed %g", op_name(op), test->text,
                      role_name((natten_role)role), error.worst, error.allowed);
        free(c.sums[role]);
    }
    trial_tensors_free(tensors);
    trial_free(&t);
}

int main(void)
{
    static const char *const problems[] = {
        "b1h2d16_31_w7_lse_rpb",
        "b2h2d16_40_w5_d3_s2_lse_add3",
        "b1h2d16_40_w8_c1_s8_lse",
        "b1h2d20_19x23_w5x5_lse_rpb_add2",
        "b1h4d16_17x22_w3x6_d2x3_c01_hk2_dv24_lse",
        "b1h2d8_9x10x11_w3x4x5_s1x2x1_lse_odd",
        "b1h2d16_20x21_w7x7_f64_lse",
        "b2h4d16_19x20_w5x5_d2x1_hk2_add3_lse_kb_drop0.3",
        "b2h2d8_30_w7_s2_c1_add2_lse_rpb_kb_drop0.6",
    };
    for (size_t i = 0; i < sizeof problems / sizeof *problems; i++) {
        test_problem test;
        unit_test(problems[i]);
        CHECK(problem_parse(problems[i], &test) == NULL);
        for (int op = 0; op < NATTEN_OPS; op++) {
            test_op(&test, (natten_op)op, NULL);
            test_op(&test, (natten_op)op, "cpu-reference");
        }
    }
    return unit_end("test_blocks");
}
