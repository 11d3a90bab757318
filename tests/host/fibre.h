/* SPDX-License-Identifier: MIT */
#ifndef FIBRE_H
#define FIBRE_H

#include <stddef.h>
#include <stdint.h>

typedef struct fibre_launch {
    int (*kernel)(const void *parameters);
    const void *parameters;
    int64_t blocks;
    int threads;
    size_t shared_bytes;
    uint64_t seed;
} fibre_launch;

/* Runs all blocks, one after the other. NULL, or the sentence of what stopped it. */
const char *fibre_run(const fibre_launch *launch);

#endif
