/* SPDX-License-Identifier: MIT */
#include "cuda/launch.h"

#include <limits.h>

#include "cuda/driver.h"

enum { MAX_DYNAMIC_SHARED_SIZE_BYTES = 8 }; /* CUfunction_attribute */

natten_status na_launch_allow(const na_device *device, void *function, int shared_bytes)
{
    const char *why;
    const na_driver *cuda = na_driver_find(&why);
    int handle;
    if (na_device_is_rehearsed())
        return NATTEN_OK;
    natten_status status =
        na_driver_check(cuda->cuDeviceGet(&handle, device->index), "cuDeviceGet");
    if (status == NATTEN_OK)
        status = na_driver_check(cuda->cuKernelSetAttribute(MAX_DYNAMIC_SHARED_SIZE_BYTES,
                                                            shared_bytes, function, handle),
                                 "cuKernelSetAttribute");
    return status;
}

natten_status na_launch_run(const na_launch *launch, void *stream, const void *parameters)
{
    const char *why;
    const na_driver *cuda = na_driver_find(&why);
    void *arguments[] = {(void *)parameters};
    if (!cuda)
        return na_fail(NATTEN_ERROR_DEVICE, "CUDA cannot be used: %s.", why);
    if (launch->blocks == 0)
        return NATTEN_OK;
    if (launch->blocks > INT_MAX)
        return na_fail(NATTEN_ERROR_UNSUPPORTED, "A launch of %lld blocks is too large.",
                       (long long)launch->blocks);
    return na_driver_check(cuda->cuLaunchKernel(launch->function, (unsigned)launch->blocks, 1, 1,
                                                (unsigned)launch->threads, 1, 1,
                                                (unsigned)launch->shared_bytes, stream, arguments,
                                                NULL),
                           "cuLaunchKernel");
}
