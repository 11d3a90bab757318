/* SPDX-License-Identifier: MIT
 * A failure is a status for the caller and a sentence for the person, kept per thread. */
#ifndef NATTEN_CORE_STATUS_H
#define NATTEN_CORE_STATUS_H

#include "natten.h"

#if defined(__GNUC__)
#define NA_PRINTF(text, first) __attribute__((format(printf, text, first)))
#else
#define NA_PRINTF(text, first)
#endif

/* Keeps the sentence and returns the status: return na_fail(NATTEN_ERROR_MEMORY, "..."). */
NA_PRINTF(2, 3) natten_status na_fail(natten_status status, const char *format, ...);

#endif
