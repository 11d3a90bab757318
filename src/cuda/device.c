/* SPDX-License-Identifier: MIT */
#include "cuda/device.h"

#include <pthread.h>
#include <stdio.h>
#include <string.h>

#include "core/lock.h"
#include "cuda/cache.h"
#include "cuda/driver.h"

enum { MOST_DEVICES = 64, OLDEST = 75 /* compute capability, times ten */ };

/* CUdevice_attribute */
enum {
    MULTIPROCESSOR_COUNT = 16,
    L2_CACHE_SIZE = 38,
    COMPUTE_CAPABILITY_MAJOR = 75,
    COMPUTE_CAPABILITY_MINOR = 76,
    MAX_SHARED_MEMORY_PER_BLOCK_OPTIN = 97
};

static pthread_once_t once = PTHREAD_ONCE_INIT;
static na_device devices[MOST_DEVICES];
static int device_count;
static void *primary[MOST_DEVICES];

static void find_devices(void)
{
    const char *why;
    const na_driver *cuda = na_driver_find(&why);
    if (!cuda || cuda->cuDeviceGetCount(&device_count))
        device_count = 0;
    if (device_count > MOST_DEVICES)
        device_count = MOST_DEVICES;
    for (int i = 0; i < device_count; i++) {
        na_device *device = &devices[i];
        const struct {
            int attribute, *value;
        } asked[] = {{COMPUTE_CAPABILITY_MAJOR, &device->major},
                     {COMPUTE_CAPABILITY_MINOR, &device->minor},
                     {MULTIPROCESSOR_COUNT, &device->multiprocessors},
                     {MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, &device->shared_memory},
                     {L2_CACHE_SIZE, &device->l2_bytes}};
        int handle;
        device->index = i;
        if (cuda->cuDeviceGet(&handle, i))
            continue;
        cuda->cuDeviceGetName(device->name, sizeof device->name, handle);
        for (int j = 0; j < 5; j++)
            cuda->cuDeviceGetAttribute(asked[j].value, asked[j].attribute, handle);
    }
}

/* What kernels are made for where no GPU is asked: the smallest shared memory and usual sizes of
 * each architecture. */
static const na_device known[] = {
    {0, 7, 5, 40, 65536, 4 << 20, "sm_75"},       {0, 8, 0, 108, 166912, 40 << 20, "sm_80"},
    {0, 8, 6, 84, 101376, 6 << 20, "sm_86"},      {0, 8, 9, 128, 101376, 72 << 20, "sm_89"},
    {0, 9, 0, 132, 232448, 50 << 20, "sm_90"},    {0, 10, 0, 148, 232448, 126 << 20, "sm_100"},
    {0, 10, 3, 148, 232448, 126 << 20, "sm_103"}, {0, 12, 0, 170, 101376, 96 << 20, "sm_120"},
    {0, 12, 1, 48, 101376, 24 << 20, "sm_121"}};

static _Thread_local const na_device *rehearsed;

int na_device_rehearse(const char *arch)
{
    rehearsed = NULL;
    for (size_t i = 0; arch && i < sizeof known / sizeof *known; i++)
        if (!strcmp(arch, known[i].name))
            rehearsed = &known[i];
    return !arch || rehearsed;
}

int na_device_is_rehearsed(void) { return rehearsed != NULL; }

/* One of this machine's, NULL and the reason if it cannot be used. */
static const na_device *find(int64_t index, char *why, size_t size)
{
    const char *reason;
    if (!na_driver_find(&reason)) {
        snprintf(why, size, "%s", reason);
        return NULL;
    }
    pthread_once(&once, find_devices);
    if (index < 0 || index >= device_count) {
        snprintf(why, size, "there is no CUDA device %d, there are %d", (int)index, device_count);
        return NULL;
    }
    const na_device *device = &devices[index];
    if (device->major * 10 + device->minor >= OLDEST)
        return device;
    snprintf(why, size, "%s has compute capability %d.%d, and %d.%d is needed", device->name,
             device->major, device->minor, OLDEST / 10, OLDEST % 10);
    return NULL;
}

int na_device_capability(int64_t index)
{
    char why[256];
    const char *reason;
    const na_device *device = find(index, why, sizeof why);
    int has_kernels = na_nvrtc_find(&reason) || na_cache_holds_any();
    return device && has_kernels ? device->major * 10 + device->minor : 0;
}

natten_status na_device_of(natten_plan *plan, const na_device **device)
{
    char why[256];
    *device = rehearsed ? rehearsed : find(plan->problem.device_index, why, sizeof why);
    return *device ? NATTEN_OK : na_refuse(plan, "%s", why);
}

natten_status na_context_enter(int device_index, na_context *context)
{
    const char *why;
    const na_driver *cuda = na_driver_find(&why);
    context->pushed = 0;
    if (rehearsed)
        return NATTEN_OK;
    if (!cuda)
        return na_fail(NATTEN_ERROR_DEVICE, "CUDA cannot be used: %s.", why);
    void *current = NULL;
    int handle, current_handle;
    natten_status status = na_driver_check(cuda->cuDeviceGet(&handle, device_index), "cuDeviceGet");
    if (status != NATTEN_OK)
        return status;
    if (!cuda->cuCtxGetCurrent(&current) && current && !cuda->cuCtxGetDevice(&current_handle) &&
        current_handle == handle)
        return NATTEN_OK;
    /* Retained once and kept until the process ends. */
    na_lock_take(NA_LOCK_JIT);
    if (!primary[device_index])
        status = na_driver_check(cuda->cuDevicePrimaryCtxRetain(&primary[device_index], handle),
                                 "cuDevicePrimaryCtxRetain");
    na_lock_give(NA_LOCK_JIT);
    if (status == NATTEN_OK)
        status = na_driver_check(cuda->cuCtxPushCurrent(primary[device_index]), "cuCtxPushCurrent");
    context->pushed = status == NATTEN_OK;
    return status;
}

void na_context_leave(na_context context)
{
    const char *why;
    const na_driver *cuda = na_driver_find(&why);
    void *popped;
    if (cuda && context.pushed)
        cuda->cuCtxPopCurrent(&popped);
}
