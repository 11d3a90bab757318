/* SPDX-License-Identifier: MIT
 * Sentences for whoever has asked for them by natten_log_set. */
#ifndef NATTEN_CORE_LOG_H
#define NATTEN_CORE_LOG_H

#include "core/status.h"

enum { NA_LOG_PROGRESS = 0, NA_LOG_RESULT = 1, NA_LOG_WARNING = 2 };

NA_PRINTF(2, 3) void na_log(int64_t level, const char *format, ...);

#endif
