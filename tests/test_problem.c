/* SPDX-License-Identifier: MIT
 * Bad input: each mistake gives one clear sentence with the axis and the numbers, and touches
 * nothing. */
#include <limits.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "unit.h"

static natten_problem good_problem(natten_op op)
{
    natten_problem p;
    natten_problem_init(&p, op, NATTEN_F32, 2);
    p.axis[0].query_extent = 8;
    p.axis[1].query_extent = 9;
    p.axis[0].window = p.axis[1].window = 3;
    p.heads = 4;
    p.head_dim = 8;
    natten_problem_pack(&p, NATTEN_HEADS_LAST);
    return p;
}

/* Mistakes: a field (by offset) set to a value, and what the sentence must hold. */
typedef struct mistake {
    size_t field;
    int64_t value;
    const char *words;
} mistake;

#define FIELD(name) offsetof(natten_problem, name)

static const mistake mistakes[] = {
    {FIELD(size), 8, "natten_problem_init"},
    {FIELD(op), 6, "op must be 0 to 5 (natten_op), got 6."},
    {FIELD(op), -1, "got -1."},
    {FIELD(dtype), 4, "dtype must be 0 to 3 (natten_dtype), got 4."},
    {FIELD(dtype), -1, "dtype must be"},
    {FIELD(device), 2, "device must be 0 (CPU) or 1 (CUDA), got 2."},
    {FIELD(rank), 0, "rank must be 1, 2 or 3, got 0."},
    {FIELD(rank), 4, "rank must be 1, 2 or 3, got 4."},
    {FIELD(rank), -2, "got -2."},
    {FIELD(batch), -1, "batch must not be negative, got -1."},
    {FIELD(batch), INT64_MAX, "batch must be at most"},
    {FIELD(heads), 0, "heads must be at least 1, got 0."},
    {FIELD(heads), -4, "heads must be at least 1, got -4."},
    {FIELD(kv_heads), 3, "heads must be a multiple of kv_heads, got 4 and 3."},
    {FIELD(kv_heads), 8, "heads must be a multiple of kv_heads, got 4 and 8."},
    {FIELD(kv_heads), -2, "kv_heads must be at least 1, got -2."},
    {FIELD(head_dim), 0, "head_dim must be at least 1, got 0."},
    {FIELD(head_dim), INT64_MIN, "head_dim must be at least 1"},
    {FIELD(value_dim), -1, "value_dim must be at least 1, got -1."},
    {FIELD(dropout), INT64_C(0x3ff8000000000000), "dropout must be between 0 and 1, got 1.5."},
    {FIELD(dropout), INT64_C(-0x4010000000000000), "dropout must be between 0 and 1, got -1."},
    {FIELD(dropout), INT64_C(0x7ff8000000000000), "dropout must be between 0 and 1, got nan."},
    {FIELD(additional_tokens), -1, "additional_tokens must not be negative, got -1."},
    {FIELD(additional_tokens), 5, "5 additional_tokens, but additional_key is not among"},
    {FIELD(axis[0].query_extent), -8, "query extent must be between 0 and"},
    {FIELD(axis[1].query_extent), (int64_t)1 << 40, "got 1099511627776 for axis 1."},
    {FIELD(axis[1].key_extent), -1, "key extent must be between 0 and"},
    {FIELD(axis[0].query_origin), -1, "query origin must be between 0 and"},
    {FIELD(axis[0].key_origin), 1, "past its global extent 8."},
    {FIELD(axis[1].query_origin), 1, "past its global extent 9."},
    {FIELD(axis[0].global_extent), 5, "past its global extent 5."},
    {FIELD(axis[0].window), 0, "kernel_size must be at least 1, got 0 for axis 0."},
    {FIELD(axis[1].window), -3, "kernel_size must be at least 1, got -3 for axis 1."},
    {FIELD(axis[1].window), 10,
     "kernel_size times dilation must be at most the extent, got kernel_size 10, dilation 1 and "
     "extent 9 for axis 1."},
    {FIELD(axis[0].window), INT64_MAX, "kernel_size times dilation must be at most the extent"},
    {FIELD(axis[0].dilation), 0, "dilation must be at least 1, got 0 for axis 0."},
    {FIELD(axis[0].dilation), 3, "kernel_size 3, dilation 3 and extent 8 for axis 0."},
    {FIELD(axis[1].dilation), INT64_MAX, "kernel_size times dilation must be at most the extent"},
    {FIELD(axis[1].stride), 0, "stride must be at least 1, got 0 for axis 1."},
    {FIELD(axis[1].stride), 4,
     "stride must be at most kernel_size, got stride 4 and kernel_size 3 for axis 1."},
    {FIELD(axis[0].causal), 2, "causal must be 0 or 1, got 2 for axis 0."},
    {FIELD(axis[0].causal), -1, "causal must be 0 or 1, got -1 for axis 0."},
    {FIELD(roles), 0, "needs query, which is not among the problem's roles."},
    {FIELD(roles), -1, "among the problem's roles"},
    {FIELD(layout[NATTEN_OUT].head), 0, "The layout of out has a stride of 0"},
    {FIELD(layout[NATTEN_OUT].axis[1]), 0, "The layout of out has a stride of 0"},
};

static void test_mistakes(void)
{
    for (size_t i = 0; i < sizeof mistakes / sizeof *mistakes; i++) {
        natten_problem p = good_problem(NATTEN_FORWARD);
        natten_plan *plan = (natten_plan *)&p;
        memcpy((char *)&p + mistakes[i].field, &mistakes[i].value, sizeof mistakes[i].value);
        CHECK(natten_plan_create(&p, NULL, &plan) == NATTEN_ERROR_ARGUMENT);
        CHECK(plan == NULL);
        unit_error_has(mistakes[i].words);
        natten_run run = {0}; /* would crash if it were looked at */
        CHECK(natten_compute(&p, &run) == NATTEN_ERROR_ARGUMENT);
        unit_error_has(mistakes[i].words);
    }
}

static void expect_refusal(const natten_problem *p, const char *words)
{
    natten_plan *plan;
    CHECK(natten_plan_create(p, NULL, &plan) == NATTEN_ERROR_ARGUMENT);
    unit_error_has(words);
}

static void test_bias(void)
{
    natten_problem p = good_problem(NATTEN_FORWARD);
    p.roles |= natten_bit(NATTEN_RPB);
    p.axis[1].window = 4;
    expect_refusal(&p, "needs an odd kernel_size, got 4 for axis 1.");
    p = good_problem(NATTEN_QK_BACKWARD);
    p.roles |= natten_bit(NATTEN_D_RPB);
    p.axis[0].window = 2;
    expect_refusal(&p, "needs an odd kernel_size, got 2 for axis 0.");
    p = good_problem(NATTEN_BACKWARD);
    p.roles |= natten_bit(NATTEN_D_RPB);
    expect_refusal(&p, "d_rpb is among the problem's roles, but rpb is not.");
}

static void test_additional(void)
{
    natten_problem p = good_problem(NATTEN_FORWARD);
    p.roles |= natten_bit(NATTEN_ADDITIONAL_KEY) | natten_bit(NATTEN_ADDITIONAL_VALUE);
    expect_refusal(&p, "but additional_tokens is 0.");
    p.additional_tokens = 3;
    p.roles &= ~natten_bit(NATTEN_ADDITIONAL_VALUE);
    expect_refusal(&p, "additional_value is not among the problem's roles.");
    p.roles |= natten_bit(NATTEN_ADDITIONAL_VALUE);
    p.roles &= ~natten_bit(NATTEN_ADDITIONAL_KEY);
    expect_refusal(&p, "additional_key is not among the problem's roles.");
}

static void test_roles(void)
{
    natten_problem p = good_problem(NATTEN_FORWARD);
    p.roles |= natten_bit(NATTEN_D_OUT);
    expect_refusal(&p, "no use for d_out");
    p = good_problem(NATTEN_AV);
    p.roles |= natten_bit(NATTEN_RPB);
    expect_refusal(&p, "no use for rpb");
    p = good_problem(NATTEN_FORWARD);
    p.roles |= (uint64_t)1 << 50;
    expect_refusal(&p, "unknown bits");
    p = good_problem(NATTEN_FORWARD);
    p.scale = NAN;
    expect_refusal(&p, "scale must be finite");
    p.scale = INFINITY;
    expect_refusal(&p, "scale must be finite");
    p.scale = 1e39;
    expect_refusal(&p, "scale must be at most 2^127 in size where sums are float32, got 1e+39.");
    p.dtype = NATTEN_F16;
    p.scale = -0x1.8p127;
    expect_refusal(&p, "scale must be at most 2^127 in size where sums are float32, got -2.5");
    p.dtype = NATTEN_F64;
    p.scale = 1.7e308;
    expect_refusal(&p, "scale must be at most 2^1023 in size where sums are float64, got 1.7e+308");
    p = good_problem(NATTEN_QK);
    p.dropout = 0.5;
    expect_refusal(&p, "dropout is for the fused operations only, got 0.5.");
    p = good_problem(NATTEN_BACKWARD);
    p.roles |= natten_bit(NATTEN_D_KEY_BIAS);
    expect_refusal(&p, "d_key_bias is among the problem's roles, but key_bias is not.");
    p = good_problem(NATTEN_AV);
    p.roles |= natten_bit(NATTEN_KEY_BIAS);
    expect_refusal(&p, "no use for key_bias");
}

static void test_blocks(void)
{
    natten_problem p = good_problem(NATTEN_FORWARD);
    p.axis[1] = (natten_axis){.query_extent = 3,
                              .key_extent = 3,
                              .global_extent = 9,
                              .query_origin = 3,
                              .key_origin = 3,
                              .window = 3,
                              .stride = 1,
                              .dilation = 1};
    expect_refusal(&p, "reach from key 2 to key 6 of axis 1, but the block of keys holds only 3 to "
                       "5.");
    p.axis[1].key_origin = 2;
    p.axis[1].key_extent = 4;
    expect_refusal(&p, "the block of keys holds only 2 to 5.");
    p.axis[1].key_extent = 8;
    expect_refusal(&p, "The keys of axis 1 end at 10 (origin 2 + extent 8), past its global extent "
                       "9.");
}

/* Sizes whose products do not fit into anything. */
static void test_too_large(void)
{
    natten_problem p = good_problem(NATTEN_FORWARD);
    p.batch = p.heads = p.head_dim = (int64_t)1 << 29;
    expect_refusal(&p, "elements.");
    p = good_problem(NATTEN_QK);
    p.rank = 3;
    for (int a = 0; a < 3; a++)
        p.axis[a] =
            (natten_axis){.query_extent = 1 << 20, .window = 1 << 20, .stride = 1, .dilation = 1};
    expect_refusal(&p, "elements.");
    p.op = NATTEN_FORWARD;
    p.roles = good_problem(NATTEN_FORWARD).roles;
    p.heads = p.head_dim = 1;
    natten_plan *plan;
    CHECK(natten_plan_create(&p, NULL, &plan) == NATTEN_ERROR_ARGUMENT);
    p = good_problem(NATTEN_FORWARD);
    p.layout[NATTEN_QUERY].axis[0] = INT64_MAX / 4;
    expect_refusal(&p, "query");
    p = good_problem(NATTEN_FORWARD);
    p.layout[NATTEN_OUT].axis[0] = INT64_MIN;
    expect_refusal(&p, "out");
}

static void test_run(void)
{
    static float data[4096];
    natten_problem p = good_problem(NATTEN_FORWARD);
    natten_plan *plan;
    CHECK(natten_plan_create(&p, NULL, &plan) == NATTEN_OK);
    natten_run run = {.data = {[NATTEN_QUERY] = data,
                               [NATTEN_KEY] = data,
                               [NATTEN_VALUE] = data,
                               [NATTEN_OUT] = data}};
    natten_run broken = run;
    broken.data[NATTEN_VALUE] = NULL;
    CHECK(natten_plan_run(plan, &broken) == NATTEN_ERROR_ARGUMENT);
    unit_error_has("The address of value is NULL.");
    broken = run;
    broken.data[NATTEN_OUT] = (char *)data + 2;
    CHECK(natten_plan_run(plan, &broken) == NATTEN_ERROR_ARGUMENT);
    unit_error_has("The address of out");
    unit_error_has("is not a multiple of its element size 4.");
    broken = run;
    broken.threads = -1;
    CHECK(natten_plan_run(plan, &broken) == NATTEN_ERROR_ARGUMENT);
    unit_error_has("threads must not be negative, got -1.");
    CHECK(natten_plan_run(NULL, &run) == NATTEN_ERROR_ARGUMENT);
    unit_error_has("NULL");
    CHECK(natten_plan_run(plan, NULL) == NATTEN_ERROR_ARGUMENT);
    CHECK(data[0] == 0);
    natten_plan_destroy(plan);
    natten_plan_destroy(NULL);
}

static void test_null(void)
{
    natten_problem p = good_problem(NATTEN_FORWARD);
    natten_plan *plan;
    natten_run run = {0};
    int64_t first, count;
    char text[64];
    size_t bytes;
    CHECK(natten_plan_create(NULL, NULL, &plan) == NATTEN_ERROR_ARGUMENT);
    unit_error_has("The problem is NULL.");
    CHECK(plan == NULL && natten_plan_workspace(plan) == 0 && natten_plan_choices(plan) == 0);
    CHECK(!*natten_plan_kernel(plan) && !*natten_plan_choice(plan));
    CHECK(natten_plan_explain(plan, text, sizeof text) == 0 && !*text);
    natten_problem_init(NULL, NATTEN_FORWARD, NATTEN_F32, 2);
    natten_problem_pack(NULL, NATTEN_HEADS_LAST);
    CHECK(natten_plan_create(&p, NULL, NULL) == NATTEN_ERROR_ARGUMENT);
    unit_error_has("got NULL.");
    CHECK(natten_compute(NULL, &run) == NATTEN_ERROR_ARGUMENT);
    unit_error_has("The problem is NULL.");
    CHECK(natten_compute(&p, NULL) == NATTEN_ERROR_ARGUMENT);
    CHECK(natten_explain(NULL, text, sizeof text) == NATTEN_ERROR_ARGUMENT);
    CHECK(natten_workspace(NULL, &bytes) == NATTEN_ERROR_ARGUMENT);
    CHECK(natten_workspace(&p, NULL) == NATTEN_ERROR_ARGUMENT);
    unit_error_has("got NULL.");
    CHECK(natten_axis_window(NULL, 0, &first, &count) == NATTEN_ERROR_ARGUMENT);
    CHECK(natten_axis_window(&p.axis[0], 0, NULL, &count) == NATTEN_ERROR_ARGUMENT);
    CHECK(natten_axis_window(&p.axis[0], 8, &first, &count) == NATTEN_ERROR_ARGUMENT);
    unit_error_has("The axis has queries 0 to 7, got 8.");
    CHECK(natten_axis_window(&p.axis[0], -1, &first, &count) == NATTEN_ERROR_ARGUMENT);
    CHECK(natten_threads_set(0) == NATTEN_ERROR_ARGUMENT);
    unit_error_has("got 0.");
    CHECK(natten_threads_set(-3) == NATTEN_ERROR_ARGUMENT);
}

/* Nothing to compute is no mistake, and needs no addresses. */
static void test_empty(void)
{
    natten_run run = {0};
    for (int op = 0; op < NATTEN_OPS; op++) {
        natten_problem p = good_problem((natten_op)op);
        p.batch = 0;
        natten_problem_pack(&p, NATTEN_HEADS_LAST);
        CHECK(natten_compute(&p, &run) == NATTEN_OK);
    }
}

static void test_only(void)
{
    natten_problem p = good_problem(NATTEN_FORWARD);
    natten_plan *plan;
    CHECK(natten_plan_create(&p, "cpu-nonesuch", &plan) == NATTEN_ERROR_UNSUPPORTED);
    unit_error_has("No kernel takes this problem.");
    unit_error_has("cpu-reference-forward: not among the kernels asked for (cpu-nonesuch)");
    CHECK(natten_plan_create(&p, "cpu-reference", &plan) == NATTEN_OK);
    char text[2000], little[8];
    size_t length = natten_plan_explain(plan, text, sizeof text);
    CHECK(length == strlen(text) && strstr(text, "cpu-reference-forward: taken"));
    CHECK(natten_plan_explain(plan, little, sizeof little) == length);
    CHECK(strlen(little) == sizeof little - 1 && !strncmp(little, text, sizeof little - 1));
    CHECK(natten_plan_explain(plan, NULL, 0) == length);
    CHECK(!strcmp(natten_plan_kernel(plan), "cpu-reference-forward"));
    CHECK(natten_plan_workspace(plan) == 0);
    natten_plan_destroy(plan);
}

static void test_pairs(void)
{
    natten_problem p;
    int64_t pairs = 0;
    natten_problem_init(&p, NATTEN_QK, NATTEN_F32, 2);
    p.head_dim = 1;
    p.batch = 2;
    p.heads = 3;
    p.axis[0].query_extent = 6;
    p.axis[0].window = 3;
    p.axis[0].causal = 1;
    p.axis[1].query_extent = 5;
    p.axis[1].window = 2;
    p.additional_tokens = 4;
    p.roles |= natten_bit(NATTEN_ADDITIONAL_KEY);
    natten_problem_pack(&p, NATTEN_HEADS_LAST);
    CHECK(natten_pairs(&p, &pairs) == NATTEN_OK);
    CHECK(pairs == 2 * 3 * ((1 + 2 + 4 * 3) * 5 * 2 + 6 * 5 * 4));
    CHECK(natten_pairs(&p, NULL) == NATTEN_ERROR_ARGUMENT);
    p.axis[1].window = 6;
    CHECK(natten_pairs(&p, &pairs) == NATTEN_ERROR_ARGUMENT);
}

static void test_preferences(void)
{
    natten_problem p = good_problem(NATTEN_BACKWARD);
    natten_plan *plan;
    char text[2000];
    CHECK(p.preferences == NATTEN_PREFER_USUAL);
    CHECK(natten_plan_create(&p, NULL, &plan) == NATTEN_OK);
    natten_plan_explain(plan, text, sizeof text);
    CHECK(!strstr(text, "effect"));
    natten_plan_destroy(plan);
    p.preferences = NATTEN_PREFER_KV_PARALLEL | NATTEN_PREFER_LITTLE_MEMORY;
    CHECK(natten_plan_create(&p, NULL, &plan) == NATTEN_OK);
    natten_plan_explain(plan, text, sizeof text);
    CHECK(strstr(text, "\nKV parallelism: allowed, without effect on a CPU\n"));
    CHECK(strstr(text, "\nlittle memory: allowed, without effect on a CPU\n"));
    CHECK(!strstr(text, "GEMM"));
    natten_plan_destroy(plan);
    p.preferences |= NATTEN_PREFER_MUCH_MEMORY;
    CHECK(natten_plan_create(&p, NULL, &plan) == NATTEN_ERROR_ARGUMENT);
    CHECK(unit_error_has("at most one about memory, got 0x38"));
    p.preferences = 64;
    CHECK(natten_plan_create(&p, NULL, &plan) == NATTEN_ERROR_ARGUMENT);
}

int main(void)
{
    unit_test("a table of mistakes");
    test_mistakes();
    unit_test("relative position bias");
    test_bias();
    unit_test("additional tokens");
    test_additional();
    unit_test("roles and scale");
    test_roles();
    unit_test("blocks");
    test_blocks();
    unit_test("too large");
    test_too_large();
    unit_test("addresses");
    test_run();
    unit_test("NULL and ranges");
    test_null();
    unit_test("empty problems");
    test_empty();
    unit_test("choice and explanation");
    test_only();
    test_pairs();
    test_preferences();
    CHECK(!strcmp(natten_version(), NATTEN_VERSION));
    return unit_end("test_problem");
}
