/* SPDX-License-Identifier: MIT
 * A libcuda.so.1 for tests: its GPUs are this computer. What the library hands to it are kernels
 * that nvrtc.c had a C compiler make; they run as fibres (fibre.c), in host memory, before the
 * launch returns. The seed of the schedules comes from HOST_SEED, the driver's version from
 * HOST_DRIVER (13000), the number of devices from HOST_DEVICES (1), their compute capability from
 * HOST_CAPABILITY (90), the number of multiprocessors from HOST_PROCESSORS (132). The function that
 * HOST_FAIL names has no memory.
 *
 * host_capture(1) begins a graph: what comes on the stream whose address is 1 is kept instead of
 * run, and what may not be done meanwhile fails, as in CUDA's global mode of capture; with 0 the
 * graph is complete, and host_replay() runs it. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <elf.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "fibre.h"
#include "host.h"

#define EXPORT __attribute__((visibility("default")))

enum {
    INVALID = 1,
    NO_MEMORY = 2,
    NO_CONTEXT = 201,
    NOT_FOUND = 500,
    LAUNCH_FAILED = 719,
    IN_CAPTURE = 900,
    DEVICES = 8,
    RELAXED = 2
};

typedef struct kernel {
    struct kernel *next;
    int (*text)(const void *);
    int shared_limit[DEVICES];
} kernel;

/* What a graph does one after the other: launches, and memory that is set. */
typedef struct step {
    const kernel *kernel; /* NULL: memory */
    fibre_launch launch;
    void *parameters;
    unsigned *memory, value;
    size_t count;
} step;

static kernel *kernels;
static char fault[600];
/* A device's primary context is the address of its own number. */
static int numbers[DEVICES] = {0, 1, 2, 3, 4, 5, 6, 7};
static _Thread_local int *contexts[16], context_depth, capture_mode;
static unsigned long launches;
static step graph[256];
static int capturing, steps;

static step *add_step(void)
{
    if (steps == 256)
        abort();
    return &graph[steps++];
}

static int is_captured(const void *stream) { return capturing && stream == (void *)1; }

/* The functions of driver.def, as the driver declares them. */
#define DRIVER(name, symbol, parameters) EXPORT int symbol_##name parameters __asm__(symbol);
#include "cuda/driver.def"

int symbol_cuInit(unsigned flags) { return flags ? INVALID : 0; }

static int setting(const char *name, int usual)
{
    const char *text = getenv(name);
    return text ? atoi(text) : usual;
}

/* The error of a call that works as long as it is not the one to fail. */
static int unless_failing(const char *function, int error)
{
    const char *failing = getenv("HOST_FAIL");
    return failing && !strcmp(failing, function) ? NO_MEMORY : error;
}

static int is_no_device(int device) { return device < 0 || device >= setting("HOST_DEVICES", 1); }

int symbol_cuDriverGetVersion(int *version)
{
    *version = setting("HOST_DRIVER", 13000);
    return 0;
}

int symbol_cuGetErrorString(int error, const char **text)
{
    *text = error == LAUNCH_FAILED ? fault
            : error == NO_CONTEXT  ? "no context"
            : error == NO_MEMORY   ? "out of memory"
            : error == IN_CAPTURE  ? "not while a stream is captured"
                                   : "refused";
    return 0;
}

int symbol_cuDeviceGetCount(int *count)
{
    *count = setting("HOST_DEVICES", 1);
    return 0;
}

int symbol_cuDeviceGet(int *device, int ordinal)
{
    *device = ordinal;
    return is_no_device(ordinal) ? INVALID : 0;
}

int symbol_cuDeviceGetName(char *name, int size, int device)
{
    snprintf(name, (size_t)size, "host words %d", device);
    return 0;
}

/* As an H100 answers. */
int symbol_cuDeviceGetAttribute(int *value, int attribute, int device)
{
    const struct {
        int attribute, value;
    } known[] = {{16, setting("HOST_PROCESSORS", 132)},
                 {38, 52428800},
                 {75, setting("HOST_CAPABILITY", 90) / 10},
                 {76, setting("HOST_CAPABILITY", 90) % 10},
                 {97, 232448}};
    for (int i = 0; i < 5; i++)
        if (known[i].attribute == attribute) {
            *value = known[i].value;
            return is_no_device(device) ? INVALID : 0;
        }
    return INVALID;
}

int symbol_cuDevicePrimaryCtxRetain(void **context, int device)
{
    if (is_no_device(device))
        return INVALID;
    *context = &numbers[device];
    return unless_failing("cuDevicePrimaryCtxRetain", 0);
}

int symbol_cuCtxGetCurrent(void **context)
{
    *context = context_depth ? contexts[context_depth - 1] : NULL;
    return 0;
}

int symbol_cuCtxGetDevice(int *device)
{
    if (!context_depth)
        return NO_CONTEXT;
    *device = *contexts[context_depth - 1];
    return 0;
}

int symbol_cuCtxPushCurrent(void *context)
{
    int error = unless_failing("cuCtxPushCurrent", 0);
    if ((int *)context < numbers || (int *)context >= numbers + DEVICES || context_depth == 16)
        return INVALID;
    if (!error)
        contexts[context_depth++] = context;
    return error;
}

int symbol_cuCtxPopCurrent(void **context)
{
    if (!context_depth)
        return NO_CONTEXT;
    *context = contexts[--context_depth];
    return 0;
}

int symbol_cuThreadExchangeStreamCaptureMode(int *mode)
{
    int before = capture_mode;
    if (unless_failing("cuThreadExchangeStreamCaptureMode", 0))
        return NO_MEMORY;
    capture_mode = *mode;
    *mode = before;
    return 0;
}

/* The image is a shared object; its section headers are its end. */
int symbol_cuLibraryLoadData(void **library, const void *image, int *jit_options, void **jit_values,
                             unsigned jit_count, int *options, void **values, unsigned count)
{
    const Elf64_Ehdr *head = image;
    char path[64];
    (void)jit_options, (void)jit_values, (void)options, (void)values;
    if (unless_failing("cuLibraryLoadData", 0))
        return NO_MEMORY;
    if (capture_mode != RELAXED) /* another stream of the thread may be captured */
        return IN_CAPTURE;
    if (memcmp(image, ELFMAG, SELFMAG) || jit_count || count)
        return INVALID;
    size_t size = head->e_shoff + (size_t)head->e_shnum * head->e_shentsize;
    int file = memfd_create("kernel", MFD_CLOEXEC);
    if (file < 0 || write(file, image, size) != (ssize_t)size)
        return INVALID;
    snprintf(path, sizeof path, "/proc/self/fd/%d", file);
    *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!*library)
        fprintf(stderr, "%s\n", dlerror());
    /* The file stays open: the loader tells libraries apart by their names. */
    return *library ? 0 : INVALID;
}

int symbol_cuLibraryGetKernel(void **function, void *library, const char *name)
{
    void *text = dlsym(library, name);
    kernel *k = calloc(1, sizeof *k);
    if (!text || !k)
        return NOT_FOUND;
    memcpy(&k->text, &text, sizeof text);
    for (int i = 0; i < DEVICES; i++)
        k->shared_limit[i] = 48 << 10;
    k->next = kernels;
    *function = kernels = k;
    return unless_failing("cuLibraryGetKernel", 0);
}

int symbol_cuKernelGetFunction(void **function, void *name)
{
    *function = name;
    return unless_failing("cuKernelGetFunction", context_depth ? 0 : NO_CONTEXT);
}

int symbol_cuKernelSetAttribute(int attribute, int value, void *function, int device)
{
    if (attribute != 8 || value > 232448 || is_no_device(device))
        return INVALID;
    ((kernel *)function)->shared_limit[device] = value;
    return unless_failing("cuKernelSetAttribute", 0);
}

static uint64_t seed(void)
{
    const char *text = getenv("HOST_SEED");
    return (text ? strtoull(text, NULL, 10) : 1) * 1000003 + ++launches;
}

static int run_launch(const fibre_launch *launch)
{
    const char *complaint = fibre_run(launch);
    if (!complaint)
        return 0;
    snprintf(fault, sizeof fault, "%s", complaint);
    return LAUNCH_FAILED;
}

int symbol_cuLaunchKernel(void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx,
                          unsigned by, unsigned bz, unsigned shared, void *stream,
                          void **parameters, void **extra)
{
    const kernel *k = function;
    if (!context_depth)
        return NO_CONTEXT;
    if (unless_failing("cuLaunchKernel", 0))
        return NO_MEMORY;
    if (extra || !gx || gy != 1 || gz != 1 || !bx || by != 1 || bz != 1 || gx > 0x7fffffff ||
        (int)bx > (k->text(NULL) & 2047) || bx % 32 ||
        (int)shared > k->shared_limit[*contexts[context_depth - 1]] || capture_mode)
        return INVALID;
    const fibre_launch launch = {k->text, parameters[0], gx, (int)bx, shared, seed()};
    if (!is_captured(stream))
        return run_launch(&launch);
    step *s = add_step();
    const size_t bytes = (size_t)k->text(NULL) >> 11; /* of its parameters */
    *s = (step){.kernel = k, .launch = launch, .parameters = aligned_alloc(64, 4096)};
    if (!s->parameters || bytes > 4096)
        return INVALID;
    memcpy(s->parameters, parameters[0], bytes);
    s->launch.parameters = s->parameters;
    return 0;
}

/* What the real one refuses, as far as its documentation says. */
static int is_bad_map(const na_host_map *map, const uint64_t *extents, const uint32_t *box,
                      const uint32_t *element_strides, int interleave)
{
    static const int spans[] = {0, 32, 64, 128};
    int bad = interleave != 0 || map->swizzle > 3 || (uintptr_t)map->base % 16;
    for (int i = 0; i < map->rank; i++) {
        bad |= extents[i] == 0 || extents[i] > (uint64_t)1 << 32 || box[i] == 0 || box[i] > 256;
        bad |= element_strides[i] == 0 || element_strides[i] > 8;
        if (i > 0)
            bad |= map->byte_strides[i - 1] % 16 != 0 || map->byte_strides[i - 1] >> 40;
    }
    uint32_t inner = box[0] * map->element_bytes;
    return bad || inner % 16 || (map->swizzle && inner > (uint32_t)spans[map->swizzle]);
}

int symbol_cuTensorMapEncodeTiled(void *result, int dtype, uint32_t rank, void *base,
                                  const uint64_t *extents, const uint64_t *byte_strides,
                                  const uint32_t *box, const uint32_t *element_strides,
                                  int interleave, int swizzle, int l2, int fill)
{
    static const uint8_t bytes[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4};
    na_host_map map = {.base = base, .swizzle = (uint8_t)swizzle, .rank = (uint8_t)rank};
    if ((uintptr_t)result % 64 || dtype < 0 || dtype > 10 || rank < 1 || rank > 5 || l2 < 0 ||
        l2 > 3 || fill)
        return INVALID;
    map.element_bytes = bytes[dtype];
    for (uint32_t i = 0; i < rank; i++) {
        map.extents[i] = (uint32_t)extents[i];
        map.box[i] = (uint16_t)box[i];
        map.element_strides[i] = (uint8_t)element_strides[i];
        if (i > 0)
            map.byte_strides[i - 1] = byte_strides[i - 1];
    }
    if (is_bad_map(&map, extents, box, element_strides, interleave))
        return INVALID;
    if (unless_failing("cuTensorMapEncodeTiled", 0))
        return NO_MEMORY;
    memset(result, 0, 128);
    memcpy(result, &map, sizeof map);
    return 0;
}

int symbol_cuMemsetD32Async(uint64_t address, unsigned value, size_t count, void *stream)
{
    int error = unless_failing("cuMemsetD32Async", context_depth ? 0 : NO_CONTEXT);
    if (!error && is_captured(stream)) {
        *add_step() = (step){.memory = (unsigned *)address, .value = value, .count = count};
        return 0;
    }
    for (size_t i = 0; !error && i < count; i++)
        ((unsigned *)address)[i] = value;
    return error;
}

EXPORT void host_capture(int begin);
EXPORT int host_replay(void);

void host_capture(int begin)
{
    capturing = begin;
    while (begin && steps > 0)
        free(graph[--steps].parameters);
}

/* Returns how many steps there are; -1: one of them failed. */
int host_replay(void)
{
    for (int i = 0; i < steps; i++) {
        step *s = &graph[i];
        for (size_t j = 0; j < s->count; j++)
            s->memory[j] = s->value;
        if (s->kernel && run_launch(&s->launch))
            return -1;
    }
    return steps;
}

/* Launches are done when they return, so an event is a moment. */

int symbol_cuEventCreate(void **event, unsigned flags)
{
    *event = calloc(1, sizeof(struct timespec));
    return flags || !*event || !context_depth ? INVALID : 0;
}

int symbol_cuEventDestroy(void *event)
{
    free(event);
    return 0;
}

int symbol_cuEventRecord(void *event, void *stream)
{
    (void)stream;
    return clock_gettime(CLOCK_MONOTONIC, event) ? INVALID : 0;
}

int symbol_cuEventSynchronize(void *event) { return capturing ? IN_CAPTURE : event ? 0 : INVALID; }

int symbol_cuEventElapsedTime(float *milliseconds, void *start, void *end)
{
    const struct timespec *from = start, *to = end;
    *milliseconds = (float)((double)(to->tv_sec - from->tv_sec) * 1e3 +
                            (double)(to->tv_nsec - from->tv_nsec) * 1e-6);
    return 0;
}

/* The stream whose address is 1 is captured. */
int symbol_cuStreamIsCapturing(void *stream, int *status)
{
    *status = stream == (void *)1;
    return context_depth ? 0 : NO_CONTEXT;
}

/* What the check program uses (device_memory.c). Memory ends at a forbidden page. */

EXPORT int symbol_cuMemAlloc(uint64_t *address, size_t bytes) __asm__("cuMemAlloc_v2");
EXPORT int symbol_cuMemFree(uint64_t address) __asm__("cuMemFree_v2");
EXPORT int symbol_cuMemcpyHtoD(uint64_t to, const void *from,
                               size_t bytes) __asm__("cuMemcpyHtoD_v2");
EXPORT int symbol_cuMemcpyDtoH(void *to, uint64_t from, size_t bytes) __asm__("cuMemcpyDtoH_v2");
EXPORT int cuCtxSynchronize(void);

int symbol_cuMemAlloc(uint64_t *address, size_t bytes)
{
    if (capturing)
        return IN_CAPTURE;
    size_t page = 4096, inside = (bytes + page - 1) / page * page;
    char *map = mmap(NULL, inside + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (map == MAP_FAILED || mprotect(map + page, inside, PROT_READ | PROT_WRITE))
        return INVALID;
    /* The size of the mapping, for cuMemFree. */
    mprotect(map, page, PROT_READ | PROT_WRITE);
    *(size_t *)map = inside + 2 * page;
    mprotect(map, page, PROT_NONE);
    *address = (uint64_t)(map + page);
    return 0;
}

int symbol_cuMemFree(uint64_t address)
{
    char *map = (char *)address - 4096;
    mprotect(map, 4096, PROT_READ);
    return munmap(map, *(size_t *)map);
}

int symbol_cuMemcpyHtoD(uint64_t to, const void *from, size_t bytes)
{
    memcpy((void *)to, from, bytes);
    return 0;
}

int symbol_cuMemcpyDtoH(void *to, uint64_t from, size_t bytes)
{
    memcpy(to, (const void *)from, bytes);
    return 0;
}

int cuCtxSynchronize(void) { return capturing ? IN_CAPTURE : 0; }
