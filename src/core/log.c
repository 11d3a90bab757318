/* SPDX-License-Identifier: MIT */
#include "core/log.h"

#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>

static _Atomic(natten_log) logger;

void natten_log_set(natten_log log) { atomic_store(&logger, log); }

void na_log(int64_t level, const char *format, ...)
{
    natten_log log = atomic_load(&logger);
    char text[1024];
    va_list arguments;
    if (!log)
        return;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    log(level, text);
}
