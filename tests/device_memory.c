/* SPDX-License-Identifier: MIT */
#include "device_memory.h"

#include <dlfcn.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

/* The little that is needed of the driver. */
static struct driver {
    int (*cuInit)(unsigned);
    int (*cuDevicePrimaryCtxRetain)(void **, int);
    int (*cuCtxPushCurrent_v2)(void *);
    int (*cuCtxSynchronize)(void);
    int (*cuMemAlloc_v2)(uint64_t *, size_t);
    int (*cuMemFree_v2)(uint64_t);
    int (*cuMemcpyHtoD_v2)(uint64_t, const void *, size_t);
    int (*cuMemcpyDtoH_v2)(void *, uint64_t, size_t);
    int (*cuGetErrorString)(int, const char **);
} driver;

static const char *open_driver(void)
{
    static const struct {
        const char *name;
        size_t offset;
    } symbols[] = {
        {"cuInit", offsetof(struct driver, cuInit)},
        {"cuDevicePrimaryCtxRetain", offsetof(struct driver, cuDevicePrimaryCtxRetain)},
        {"cuCtxPushCurrent_v2", offsetof(struct driver, cuCtxPushCurrent_v2)},
        {"cuCtxSynchronize", offsetof(struct driver, cuCtxSynchronize)},
        {"cuMemAlloc_v2", offsetof(struct driver, cuMemAlloc_v2)},
        {"cuMemFree_v2", offsetof(struct driver, cuMemFree_v2)},
        {"cuMemcpyHtoD_v2", offsetof(struct driver, cuMemcpyHtoD_v2)},
        {"cuMemcpyDtoH_v2", offsetof(struct driver, cuMemcpyDtoH_v2)},
        {"cuGetErrorString", offsetof(struct driver, cuGetErrorString)},
    };
    static void *context;
    if (context)
        return NULL;
    void *library = dlopen("libcuda.so.1", RTLD_NOW);
    for (size_t i = 0; i < sizeof symbols / sizeof *symbols; i++) {
        void *address = library ? dlsym(library, symbols[i].name) : NULL;
        if (!address)
            return "no libcuda.so.1, or not all of it";
        memcpy((char *)&driver + symbols[i].offset, &address, sizeof address);
    }
    if (driver.cuInit(0) || driver.cuDevicePrimaryCtxRetain(&context, 0) ||
        driver.cuCtxPushCurrent_v2(context))
        return "the driver gives no context";
    return NULL;
}

static const char *check(int error, const char *what)
{
    static char sentence[300];
    const char *text = "unknown error";
    if (!error)
        return NULL;
    driver.cuGetErrorString(error, &text);
    snprintf(sentence, sizeof sentence, "%s: %s", what, text);
    return sentence;
}

/* All bytes of a tensor's mapping but the forbidden pages. */
static char *inside(const tensor *t) { return t->map + sysconf(_SC_PAGESIZE); }

static size_t inside_bytes(const tensor *t)
{
    return t->map_bytes - 2 * (size_t)sysconf(_SC_PAGESIZE);
}

static const char *send(const tensor *t, uint64_t *address)
{
    const char *wrong = check(driver.cuMemAlloc_v2(address, inside_bytes(t)), "cuMemAlloc");
    return wrong ? wrong
                 : check(driver.cuMemcpyHtoD_v2(*address, inside(t), inside_bytes(t)),
                         "cuMemcpyHtoD");
}

static const char *launch(const natten_plan *plan, natten_run *run)
{
    uint64_t workspace = 0;
    size_t bytes = natten_plan_workspace(plan);
    const char *wrong = bytes ? check(driver.cuMemAlloc_v2(&workspace, bytes), "cuMemAlloc") : NULL;
    run->workspace = (void *)workspace;
    if (!wrong && natten_plan_run(plan, run) != NATTEN_OK)
        wrong = natten_last_error();
    if (!wrong)
        wrong = check(driver.cuCtxSynchronize(), "the kernel");
    if (workspace)
        driver.cuMemFree_v2(workspace);
    return wrong;
}

const char *device_run(const natten_plan *plan, tensor tensors[NATTEN_ROLES], natten_run run)
{
    uint64_t address[NATTEN_ROLES] = {0};
    const char *wrong = open_driver();
    for (int role = 0; !wrong && role < NATTEN_ROLES; role++) {
        const tensor *t = &tensors[role];
        if (!t->map)
            continue;
        wrong = send(t, &address[role]);
        run.data[role] = (void *)(address[role] + (uint64_t)((char *)tensor_data(t) - inside(t)));
    }
    if (!wrong)
        wrong = launch(plan, &run);
    for (int role = 0; role < NATTEN_ROLES; role++) {
        if (!address[role])
            continue;
        if (!wrong)
            wrong = check(driver.cuMemcpyDtoH_v2(inside(&tensors[role]), address[role],
                                                 inside_bytes(&tensors[role])),
                          "cuMemcpyDtoH");
        driver.cuMemFree_v2(address[role]);
    }
    return wrong;
}
