/* SPDX-License-Identifier: MIT */
#include "core/kernel.h"
#include "core/problem.h"

static int multiply(int64_t *product, int64_t factor)
{
    return !__builtin_mul_overflow(*product, factor, product);
}

natten_status natten_pairs(const natten_problem *problem, int64_t *pairs)
{
    natten_problem p;
    if (!pairs)
        return na_fail(NATTEN_ERROR_ARGUMENT,
                       "natten_pairs needs somewhere to put the number, got NULL.");
    natten_status status = na_problem_check(problem, &p);
    if (status != NATTEN_OK)
        return status;
    int64_t in_windows = 1, additional = p.additional_tokens, sum = 0;
    int fits = 1;
    for (int i = 0; i < 3; i++) {
        const na_axis axis = na_axis_of(&p.axis[i]);
        int64_t here = 0;
        for (int64_t query = 0; query < p.axis[i].query_extent; query++)
            here += na_window_of(axis, (int)(p.axis[i].query_origin + query)).count;
        fits = fits && multiply(&in_windows, here) && multiply(&additional, p.axis[i].query_extent);
    }
    fits = fits && !__builtin_add_overflow(in_windows, additional, &sum);
    if (!fits || !multiply(&sum, p.batch) || !multiply(&sum, p.heads))
        return na_fail(NATTEN_ERROR_ARGUMENT, "There are more than 2^63 pairs.");
    *pairs = sum;
    return NATTEN_OK;
}
