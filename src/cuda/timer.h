/* SPDX-License-Identifier: MIT
 * How long a GPU works on what was launched between start and stop. */
#ifndef NATTEN_CUDA_TIMER_H
#define NATTEN_CUDA_TIMER_H

#include "cuda/device.h"

typedef struct na_timer {
    void *start, *stop, *stream;
    na_context context;
} na_timer;

/* Whether the stream may be waited for: not while it is captured into a graph. */
int na_timer_may_wait(int device_index, void *stream);

/* Between the two the device's context is current. stop waits; call it if and only if start
 * succeeded. */
natten_status na_timer_start(na_timer *timer, int device_index, void *stream);
natten_status na_timer_stop(na_timer *timer, double *seconds);

#endif
