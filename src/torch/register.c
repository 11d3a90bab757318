/* SPDX-License-Identifier: MIT
 * Registers the natten:: ops with torch's dispatcher. */
#define _GNU_SOURCE
#include "torch/register.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>

#include "torch/shim.h"

/* The shim's behaviour as of torch 2.10. */
static const uint64_t shim_version = (uint64_t)2 << 56 | (uint64_t)10 << 48;

static void call_na(uint64_t *stack, uint64_t arguments, uint64_t results)
{
    (void)arguments, (void)results;
    na_torch_call(NATTEN_FORWARD, stack);
}

static void call_na_backward(uint64_t *stack, uint64_t arguments, uint64_t results)
{
    (void)arguments, (void)results;
    na_torch_call(NATTEN_BACKWARD, stack);
}

static void call_qk(uint64_t *stack, uint64_t arguments, uint64_t results)
{
    (void)arguments, (void)results;
    na_torch_call(NATTEN_QK, stack);
}

static void call_qk_backward(uint64_t *stack, uint64_t arguments, uint64_t results)
{
    (void)arguments, (void)results;
    na_torch_call(NATTEN_QK_BACKWARD, stack);
}

static void call_av(uint64_t *stack, uint64_t arguments, uint64_t results)
{
    (void)arguments, (void)results;
    na_torch_call(NATTEN_AV, stack);
}

static void call_av_backward(uint64_t *stack, uint64_t arguments, uint64_t results)
{
    (void)arguments, (void)results;
    na_torch_call(NATTEN_AV_BACKWARD, stack);
}

/* The second name of an op is the one with a registered derivative, for compilers. */
static const struct {
    const char *name;
    na_boxed kernel;
} registered[] = {
    {"na", call_na},        {"na_backward", call_na_backward},
    {"qk", call_qk},        {"qk_backward", call_qk_backward},
    {"av", call_av},        {"av_backward", call_av_backward},
    {"na_traced", call_na}, {"qk_traced", call_qk},
    {"av_traced", call_av},
};

static natten_status find_symbols(void *library, char *reason, size_t size)
{
    static const struct {
        const char *symbol;
        void **field;
        int optional;
    } wanted[] = {
#define SHIM(field, symbol, result, arguments) {#symbol, (void **)&na_torch.field, 0},
#define OPTIONAL_SHIM(field, symbol, result, arguments) {#symbol, (void **)&na_torch.field, 1},
#include "torch/shim.def"
#undef SHIM
#undef OPTIONAL_SHIM
    };
    for (size_t i = 0; i < sizeof wanted / sizeof *wanted; i++) {
        *wanted[i].field = dlsym(library, wanted[i].symbol);
        if (!*wanted[i].field && !wanted[i].optional) {
            snprintf(reason, size, "torch has no %s", wanted[i].symbol);
            return NATTEN_ERROR_UNSUPPORTED;
        }
    }
    if (!na_torch.delete_optional && !na_torch.operator_delete) {
        snprintf(reason, size, "torch has no way to free an optional argument");
        return NATTEN_ERROR_UNSUPPORTED;
    }
    return NATTEN_OK;
}

static natten_status register_for(const char *key, char *reason, size_t size)
{
    void *library; /* never freed: that would take the kernels away again */
    if (na_torch.library_init("natten", key, __FILE__, __LINE__, &library)) {
        snprintf(reason, size, "torch refused the kernels for %s", key);
        return NATTEN_ERROR_UNSUPPORTED;
    }
    for (size_t i = 0; i < sizeof registered / sizeof *registered; i++)
        if (na_torch.library_impl(library, registered[i].name, registered[i].kernel,
                                  shim_version)) {
            snprintf(reason, size, "torch refused a kernel for %s", registered[i].name);
            return NATTEN_ERROR_UNSUPPORTED;
        }
    return NATTEN_OK;
}

natten_status natten_torch_register(const char *torch_library, char *reason, size_t size)
{
    static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
    static int done;
    natten_status status = NATTEN_OK;
    if (size)
        reason[0] = 0;
    pthread_mutex_lock(&lock);
    if (!done) {
        void *library = dlopen(torch_library, RTLD_NOW | RTLD_NOLOAD);
        if (!library) {
            snprintf(reason, size, "%s is not loaded", torch_library);
            status = NATTEN_ERROR_UNSUPPORTED;
        } else {
            status = find_symbols(library, reason, size);
        }
        if (status == NATTEN_OK)
            status = register_for("CPU", reason, size);
        if (status == NATTEN_OK)
            status = register_for("CUDA", reason, size);
        if (status == NATTEN_OK) {
            pthread_atfork(NULL, NULL, na_torch_note_fork);
            done = 1;
        }
    }
    pthread_mutex_unlock(&lock);
    return status;
}
