/* SPDX-License-Identifier: MIT
 * Division of task numbers as device code does it, against the compiler's. */
#include "device/divide.h"

#include "problem_string.h"
#include "unit.h"

static void expect(int64_t number, int by)
{
    int rest = -1;
    const int64_t quotient = na_divide(number, by, &rest);
    if (quotient != number / by || rest != number % by)
        unit_fail("%lld / %d: %lld, rest %d", (long long)number, by, (long long)quotient, rest);
}

int main(void)
{
    const int64_t edges[] = {0, 1, INT32_MAX, UINT32_MAX, (int64_t)UINT32_MAX + 1, INT64_MAX};
    const int divisors[] = {1, 2, 3, 7, 1 << 16, INT32_MAX - 1, INT32_MAX};
    uint64_t random = 1;
    unit_test("edges");
    for (size_t i = 0; i < sizeof edges / sizeof *edges; i++)
        for (size_t j = 0; j < sizeof divisors / sizeof *divisors; j++)
            expect(edges[i], divisors[j]);
    unit_test("random numbers");
    for (int i = 0; i < 100000; i++) {
        const int64_t number = (int64_t)(random_next(&random) >> (1 + random_next(&random) % 63));
        expect(number, 1 + (int)(random_next(&random) % INT32_MAX >> random_next(&random) % 31));
    }
    return unit_end("test_divide");
}
