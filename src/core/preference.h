/* SPDX-License-Identifier: MIT
 * What explanations say about natten_preference. */
#ifndef NATTEN_CORE_PREFERENCE_H
#define NATTEN_CORE_PREFERENCE_H

#include "core/kernel.h"

/* Writes a sentence about the next preference, from *index on, that has a bearing on the plan or
 * that somebody might believe to have one; returns its name and moves *index past it. NULL: there
 * are no more. */
const char *na_preference_describe(const natten_plan *plan, int *index, char *text, size_t size);

#endif
