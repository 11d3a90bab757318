/* SPDX-License-Identifier: MIT
 * The GPUs, and the context that a call works in. */
#ifndef NATTEN_CUDA_DEVICE_H
#define NATTEN_CUDA_DEVICE_H

#include <stdint.h>

#include "core/kernel.h"
#include "core/status.h"

/* What planning may depend on. */
typedef struct na_device {
    int index;
    int major, minor; /* compute capability */
    int multiprocessors;
    int shared_memory; /* bytes a block may have, when it asks for them */
    int l2_bytes;
    char name[64];
} na_device;

/* The device of the plan's problem; NA_REFUSED, with the reason noted, if there is no driver, no
 * such device, or it is older than sm_75. */
natten_status na_device_of(natten_plan *plan, const na_device **device);

/* Its compute capability times ten; 0 if it cannot be used, or there are no kernels for it and no
 * NVRTC to compile them. */
int na_device_capability(int64_t index);

/* Until it is called with NULL, this thread plans for a GPU of the architecture ("sm_90") that need
 * not be here: na_device_of describes one, contexts are not entered, and what na_jit_function would
 * compile and load it only compiles and keeps on disk. 0: no such architecture. */
int na_device_rehearse(const char *arch);
int na_device_is_rehearsed(void);

/* Makes a context of the device current: the one that is current already, else the device's primary
 * one. What enter returned goes into leave. */
typedef struct na_context {
    int pushed;
} na_context;
natten_status na_context_enter(int device_index, na_context *context);
void na_context_leave(na_context context);

#endif
