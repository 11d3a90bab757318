/* SPDX-License-Identifier: MIT */
#include "core/status.h"

#include <stdarg.h>
#include <stdio.h>

#include "core/kernel.h"

/* Long enough for the reasons of every kernel of one op. */
static _Thread_local char last_error[4096];

natten_status na_fail(natten_status status, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(last_error, sizeof last_error, format, arguments);
    va_end(arguments);
    return status;
}

natten_status na_refuse(natten_plan *plan, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(plan->refusal, sizeof plan->refusal, format, arguments);
    va_end(arguments);
    return NA_REFUSED;
}

const char *natten_last_error(void) { return last_error; }
