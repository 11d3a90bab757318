/* SPDX-License-Identifier: MIT */
#ifndef NATTEN_CUDA_LAUNCH_H
#define NATTEN_CUDA_LAUNCH_H

#include "core/status.h"
#include "cuda/device.h"

typedef struct na_launch {
    void *function;   /* from na_jit_function */
    int64_t blocks;   /* along x; at most 2^31 - 1. There is no y and no z: kernels divide */
    int threads;      /* of a block */
    int shared_bytes; /* dynamic; asked for with na_launch_allow where above 48 KiB */
} na_launch;

/* Once per function, while planning: lets its blocks have that much dynamic shared memory. */
natten_status na_launch_allow(const na_device *device, void *function, int shared_bytes);

/* Launches on the stream; the kernel's only parameter is one struct, taken by value from
 * `parameters`. Nothing is allocated and nothing waited for. 0 blocks: nothing to do. Call it with
 * a context entered. */
natten_status na_launch_run(const na_launch *launch, void *stream, const void *parameters);

#endif
