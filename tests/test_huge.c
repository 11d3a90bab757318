/* SPDX-License-Identifier: MIT
 * Tensors that reach far beyond 2^31 elements, of which only a few are there: every offset must be
 * computed in 64 bits. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "trial.h"
#include "unit.h"

static const int64_t stretch = (1 << 22) + 1;

static natten_layout stretched(natten_layout layout)
{
    layout.batch *= stretch;
    layout.head *= stretch;
    for (int a = 0; a < 3; a++)
        layout.axis[a] *= -stretch;
    return layout;
}

static void compare(const trial *t, const tensor *got)
{
    double *values = malloc((size_t)tensor_count(got) * sizeof *values);
    tensor_read(got, values);
    trial_error error = trial_compare(t, got->role, values);
    if (!(error.share <= 1))
        unit_fail("%s: error %g, allowed %g", role_name(got->role), error.worst, error.allowed);
    free(values);
}

static void test_kernel(const trial *packed, const char *name)
{
    trial t = *packed; /* the same values, in other places */
    t.kernel = name;
    tensor tensors[NATTEN_ROLES];
    natten_run run = {.threads = 2};
    natten_plan *plan;
    for (int role = 0; role < NATTEN_ROLES; role++)
        t.problem.layout[role] = stretched(t.problem.layout[role]);
    if (natten_plan_create(&t.problem, name, &plan) != NATTEN_OK)
        return; /* not its op */
    if (!trial_tensors(&t, PLACE_SPARSE, tensors, &run)) {
        unit_skip("no address space");
    } else {
        CHECK(natten_plan_run(plan, &run) == NATTEN_OK);
        for (int role = 0; role < NATTEN_ROLES; role++)
            if (t.outputs >> role & 1)
                compare(&t, &tensors[role]);
    }
    trial_tensors_free(tensors);
    natten_plan_destroy(plan);
}

static void test_op(const test_problem *test, natten_op op)
{
    natten_problem problem;
    trial t;
    const char *name;
    CHECK(problem_of_op(test, op, &problem));
    CHECK(trial_make(&t, &problem, 11) == NULL);
    for (size_t i = 0; (name = natten_kernel_name(i)); i++)
        if (strncmp(name, "cpu-", 4) == 0)
            test_kernel(&t, name);
    trial_free(&t);
}

int main(void)
{
    static const char *const problems[] = {"b2h2d16_5x6_w3x3_lse_rpb_add2", "b2h2d8_20_w3_d2",
                                           "b1h2d16_3x4x5_w3x3x3_bf16"};
    for (size_t i = 0; i < sizeof problems / sizeof *problems; i++) {
        test_problem test;
        unit_test(problems[i]);
        CHECK(problem_parse(problems[i], &test) == NULL);
        for (int op = 0; op < NATTEN_OPS; op++)
            test_op(&test, (natten_op)op);
    }
    return unit_end("test_huge");
}
