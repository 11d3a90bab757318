/* SPDX-License-Identifier: MIT
 * Scratch memory for a run, taken before any output is written, so that running out of memory is an
 * error and not half a result. Blocks are kept for the next run, up to a bound. */
#ifndef NATTEN_CPU_SCRATCH_H
#define NATTEN_CPU_SCRATCH_H

#include <stddef.h>

/* A block of at least `bytes`, aligned to 64, contents undefined; NULL when there is no memory. */
void *na_scratch_take(size_t bytes);
void na_scratch_give(void *block);

#endif
