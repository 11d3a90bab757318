/* SPDX-License-Identifier: MIT */
#include "cuda/timer.h"

#include "cuda/driver.h"

int na_timer_may_wait(int device_index, void *stream)
{
    const char *why;
    const na_driver *cuda = na_driver_find(&why);
    na_context context;
    int capturing = 1;
    if (!cuda || na_context_enter(device_index, &context) != NATTEN_OK)
        return 0;
    int failed = cuda->cuStreamIsCapturing(stream, &capturing);
    na_context_leave(context);
    return !failed && !capturing;
}

static void end(na_timer *timer)
{
    const char *why;
    const na_driver *cuda = na_driver_find(&why);
    if (timer->start)
        cuda->cuEventDestroy(timer->start);
    if (timer->stop)
        cuda->cuEventDestroy(timer->stop);
    na_context_leave(timer->context);
}

natten_status na_timer_start(na_timer *timer, int device_index, void *stream)
{
    const char *why;
    const na_driver *cuda = na_driver_find(&why);
    *timer = (na_timer){.stream = stream};
    natten_status status = na_context_enter(device_index, &timer->context);
    if (status != NATTEN_OK)
        return status;
    status = na_driver_check(cuda->cuEventCreate(&timer->start, 0), "cuEventCreate");
    if (status == NATTEN_OK)
        status = na_driver_check(cuda->cuEventCreate(&timer->stop, 0), "cuEventCreate");
    if (status == NATTEN_OK)
        status = na_driver_check(cuda->cuEventRecord(timer->start, stream), "cuEventRecord");
    if (status != NATTEN_OK)
        end(timer);
    return status;
}

natten_status na_timer_stop(na_timer *timer, double *seconds)
{
    const char *why;
    const na_driver *cuda = na_driver_find(&why);
    float milliseconds = 0;
    natten_status status =
        na_driver_check(cuda->cuEventRecord(timer->stop, timer->stream), "cuEventRecord");
    if (status == NATTEN_OK)
        status = na_driver_check(cuda->cuEventSynchronize(timer->stop), "cuEventSynchronize");
    if (status == NATTEN_OK)
        status = na_driver_check(cuda->cuEventElapsedTime(&milliseconds, timer->start, timer->stop),
                                 "cuEventElapsedTime");
    *seconds = milliseconds * 1e-3;
    end(timer);
    return status;
}
