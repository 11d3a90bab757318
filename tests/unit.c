/* SPDX-License-Identifier: MIT */
#include "unit.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

static const char *current;
static int passed, failed, skipped, broken, left_out;

static void end_test(void)
{
    if (!current)
        return;
    failed += broken > 0;
    skipped += !broken && left_out;
    passed += !broken && !left_out;
    current = NULL;
    broken = left_out = 0;
}

void unit_test(const char *name)
{
    end_test();
    current = name;
}

void unit_fail(const char *format, ...)
{
    if (++broken > 20) /* the first ones tell */
        return;
    va_list arguments;
    va_start(arguments, format);
    printf("FAIL %s: ", current);
    vprintf(format, arguments);
    putchar('\n');
    va_end(arguments);
}

void unit_check(int holds, const char *file, int line, const char *what)
{
    if (!holds)
        unit_fail("%s:%d: %s; the last error is: %s", file, line, what, natten_last_error());
}

void unit_skip(const char *why)
{
    printf("SKIP %s: %s\n", current, why);
    left_out = 1;
}

int unit_error_has(const char *words)
{
    if (strstr(natten_last_error(), words))
        return 1;
    unit_fail("the error should hold \"%s\": %s", words, natten_last_error());
    return 0;
}

int unit_end(const char *program)
{
    end_test();
    printf("%s: %d passed, %d failed, %d skipped\n", program, passed, failed, skipped);
    return failed > 0;
}
