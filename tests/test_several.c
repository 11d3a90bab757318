/* SPDX-License-Identifier: MIT
 * natten_compute_all: several problems give, each, the bits that natten_compute gives it alone. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "problem_string.h"
#include "trial.h"
#include "unit.h"

enum { COUNT = 9, MOST_BYTES = 1 << 20 };

/* Some small, two that are large beside the sum of all, and one batch of nothing. */
static const char *const texts[COUNT] = {
    "b1h2d16_5x4_w3x3_lse", "b1h2d16_40x40_w7x7_lse", "b3h1d8_9_w9_c1_lse",
    "b1h2d16_5x4_w3x3_lse", "b1h1d32_300_w64_lse",    "b2h1d8_4x5x6_w3x2x2_lse",
    "b2h4d8_9_w3_hk2_lse",  "b1h2d24_12_w5_d2_lse",   "b1h3d8_8x8_w3x5_s1x4_lse",
};

static trial trials[COUNT];
static natten_problem problems[COUNT];
static natten_run runs[COUNT];
static tensor tensors[COUNT][NATTEN_ROLES];

static void make(natten_op op, placement where, int64_t threads)
{
    for (int i = 0; i < COUNT; i++) {
        test_problem test;
        CHECK(problem_parse(texts[i], &test) == NULL && problem_of_op(&test, op, &problems[i]));
        CHECK(trial_make_inputs(&trials[i], &problems[i], (uint64_t)i) == NULL);
        runs[i] = (natten_run){.threads = threads};
        CHECK(trial_tensors(&trials[i], where, tensors[i], &runs[i]));
        problems[i] = trials[i].problem;
    }
}

static void drop(void)
{
    for (int i = 0; i < COUNT; i++) {
        trial_tensors_free(tensors[i]);
        trial_free(&trials[i]);
    }
}

/* The outputs of trial i, one after another. */
static size_t outputs(int i, char *bytes)
{
    size_t size = 0;
    for (int role = 0; role < NATTEN_ROLES; role++) {
        const tensor *t = &tensors[i][role];
        if (!(trials[i].outputs >> role & 1))
            continue;
        CHECK(size + (size_t)tensor_count(t) * tensor_element(t) <= MOST_BYTES);
        tensor_bytes(t, bytes + size);
        size += (size_t)tensor_count(t) * tensor_element(t);
    }
    return size;
}

static void test_bits(natten_op op, int64_t threads)
{
    static char alone[COUNT][MOST_BYTES], together[MOST_BYTES];
    size_t size[COUNT];
    make(op, PLACE_START, 1);
    for (int i = 0; i < COUNT; i++) {
        CHECK(natten_compute(&problems[i], &runs[i]) == NATTEN_OK);
        size[i] = outputs(i, alone[i]);
    }
    drop();
    make(op, PLACE_ODD, threads);
    CHECK(natten_compute_all(problems, runs, COUNT, NULL) == NATTEN_OK);
    for (int i = 0; i < COUNT; i++)
        CHECK(outputs(i, together) == size[i] && !memcmp(together, alone[i], size[i]));
    drop();
}

/* A wrong problem, or run, is found before anything is written. */
static void test_wrong(void)
{
    static char before[COUNT][MOST_BYTES], after[MOST_BYTES];
    size_t failed = 99;
    make(NATTEN_FORWARD, PLACE_START, 2);
    for (int i = 0; i < COUNT; i++)
        outputs(i, before[i]);
    problems[5].axis[2].window = 7;
    CHECK(natten_compute_all(problems, runs, COUNT, &failed) == NATTEN_ERROR_ARGUMENT);
    CHECK(failed == 5 && unit_error_has("extent 6 for axis 2"));
    problems[5].axis[2].window = 2;
    void *key = runs[7].data[NATTEN_KEY];
    runs[7].data[NATTEN_KEY] = NULL;
    CHECK(natten_compute_all(problems, runs, COUNT, &failed) == NATTEN_ERROR_ARGUMENT);
    CHECK(failed == 7 && unit_error_has("key"));
    runs[7].data[NATTEN_KEY] = key;
    for (int i = 0; i < COUNT; i++) {
        size_t size = outputs(i, after);
        CHECK(!memcmp(before[i], after, size));
    }
    CHECK(natten_compute_all(NULL, runs, 1, NULL) == NATTEN_ERROR_ARGUMENT);
    CHECK(natten_compute_all(problems, NULL, 1, NULL) == NATTEN_ERROR_ARGUMENT);
    CHECK(natten_compute_all(NULL, NULL, 0, NULL) == NATTEN_OK);
    CHECK(natten_compute_all(problems, runs, COUNT, &failed) == NATTEN_OK);
    drop();
}

int main(void)
{
    for (int64_t threads = 1; threads < 6; threads += 2) {
        char name[64];
        snprintf(name, sizeof name, "the same bits with %d threads", (int)threads);
        unit_test(name);
        test_bits(NATTEN_FORWARD, threads);
        test_bits(NATTEN_BACKWARD, threads);
        test_bits(NATTEN_QK, threads);
    }
    unit_test("what is wrong is found first");
    test_wrong();
    return unit_end("test_several");
}
