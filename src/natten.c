/* SPDX-License-Identifier: MIT
 * The public functions: walk the list of kernels, keep the reasons, make plans and run them. */
#include "natten.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/env.h"
#include "core/kernel.h"
#include "core/problem.h"
#include "cuda/cache.h"
#include "cuda/device.h"
#include "table.h"

#define KERNEL(name, op, device, plan) natten_status plan(natten_plan *);
#include "kernels.def"
#undef KERNEL

static const na_kernel kernels[] = {
#define KERNEL(name, op, device, plan) {name, op, device, plan},
#include "kernels.def"
#undef KERNEL
};
static const size_t kernel_count = sizeof kernels / sizeof *kernels;

const char *natten_version(void) { return NATTEN_VERSION; }

const char *natten_kernel_name(size_t index)
{
    return index < kernel_count ? kernels[index].name : NULL;
}

/* Appends "name: sentence\n" to the explanation; false when there is no memory. */
static int explain(natten_plan *plan, const char *name, const char *sentence)
{
    size_t before = plan->explanation ? strlen(plan->explanation) : 0;
    size_t more = strlen(name) + strlen(sentence) + 4;
    char *text = realloc(plan->explanation, before + more);
    if (!text)
        return 0;
    plan->explanation = text;
    snprintf(text + before, more, "%s: %s\n", name, sentence);
    return 1;
}

/* Asks one kernel; what it says goes into the explanation. */
static natten_status ask(natten_plan *plan, const na_kernel *kernel, const char *only)
{
    natten_status status = NA_REFUSED;
    if (only && strncmp(kernel->name, only, strlen(only)))
        na_refuse(plan, "not among the kernels asked for (%s)", only);
    else if (na_disabled(kernel->name))
        na_refuse(plan, "switched off by NATTEN_DISABLE");
    else
        status = kernel->plan(plan);
    if (status != NATTEN_OK && status != NA_REFUSED)
        return status;
    if (explain(plan, kernel->name, status == NATTEN_OK ? "taken" : plan->refusal))
        return status;
    return na_fail(NATTEN_ERROR_MEMORY, "No memory to make a plan.");
}

static natten_status choose(natten_plan *plan, const char *only)
{
    for (size_t i = 0; i < kernel_count; i++) {
        if (kernels[i].op != plan->problem.op || kernels[i].device != plan->problem.device)
            continue;
        plan->kernel = &kernels[i];
        natten_status status = ask(plan, &kernels[i], only);
        if (status != NA_REFUSED)
            return status;
    }
    return na_fail(NATTEN_ERROR_UNSUPPORTED, "No kernel takes this problem.\n%s",
                   plan->explanation ? plan->explanation : "");
}

natten_status natten_plan_create(const natten_problem *problem, const char *only,
                                 natten_plan **result)
{
    if (!result)
        return na_fail(NATTEN_ERROR_ARGUMENT,
                       "natten_plan_create needs somewhere to put the plan, got NULL.");
    *result = NULL;
    natten_plan *plan = calloc(1, sizeof *plan);
    if (!plan)
        return na_fail(NATTEN_ERROR_MEMORY, "No memory to make a plan.");
    natten_status status = na_problem_check(problem, &plan->problem);
    if (status == NATTEN_OK)
        status = choose(plan, only);
    if (status != NATTEN_OK) {
        natten_plan_destroy(plan);
        return status;
    }
    *result = plan;
    return NATTEN_OK;
}

void natten_plan_destroy(natten_plan *plan)
{
    if (!plan)
        return;
    if (plan->destroy)
        plan->destroy(plan->state);
    else
        free(plan->state);
    free(plan->explanation);
    free(plan);
}

size_t natten_plan_explain(const natten_plan *plan, char *text, size_t size)
{
    return (size_t)snprintf(text, size, "%s", plan->explanation);
}

const char *natten_plan_kernel(const natten_plan *plan) { return plan->kernel->name; }

size_t natten_plan_workspace(const natten_plan *plan) { return plan->workspace; }

natten_status natten_plan_run(const natten_plan *plan, const natten_run *run)
{
    if (!plan || !run)
        return na_fail(NATTEN_ERROR_ARGUMENT, "natten_plan_run needs a plan and a run, got NULL.");
    natten_status status = na_run_check(&plan->problem, run);
    return status == NATTEN_OK ? plan->run(plan, run) : status;
}

natten_status natten_compute(const natten_problem *problem, const natten_run *run)
{
    na_entry *entry;
    natten_status status = na_table_take(problem, &entry);
    if (status != NATTEN_OK)
        return status;
    status = natten_plan_run(entry->plan, run);
    na_table_give(entry);
    return status;
}

natten_status natten_workspace(const natten_problem *problem, size_t *bytes)
{
    na_entry *entry;
    if (!bytes)
        return na_fail(NATTEN_ERROR_ARGUMENT,
                       "natten_workspace needs somewhere to put the size, got NULL.");
    natten_status status = na_table_take(problem, &entry);
    if (status != NATTEN_OK)
        return status;
    *bytes = entry->plan->workspace;
    na_table_give(entry);
    return NATTEN_OK;
}

natten_status natten_explain(const natten_problem *problem, char *text, size_t size)
{
    na_entry *entry;
    natten_status status = na_table_take(problem, &entry);
    if (status != NATTEN_OK)
        return status;
    natten_plan_explain(entry->plan, text, size);
    na_table_give(entry);
    return NATTEN_OK;
}

int64_t natten_cuda_capability(int64_t device_index) { return na_device_capability(device_index); }

natten_status natten_compile(const natten_problem *problem, const char *arch)
{
    natten_plan *plan;
    if (!problem || !arch || problem->device != NATTEN_CUDA)
        return na_fail(NATTEN_ERROR_ARGUMENT,
                       "natten_compile needs a CUDA problem and an architecture.");
    if (!na_device_rehearse(arch))
        return na_fail(NATTEN_ERROR_ARGUMENT, "There are no kernels for architecture %s.", arch);
    natten_status status = natten_plan_create(problem, NULL, &plan);
    natten_plan_destroy(plan);
    na_device_rehearse(NULL);
    return status;
}

size_t natten_cache_folder(size_t index, char *path, size_t size)
{
    char folder[4096];
    if (index >= 4096 || !na_cache_folder((int)index, folder, sizeof folder))
        return 0;
    return (size_t)snprintf(path, size, "%s", folder);
}

size_t natten_cache_describe(const char *path, char *text, size_t size)
{
    char *key;
    na_cubin cubin;
    if (!path || !na_cache_read(path, &key, &cubin))
        return 0;
    size_t length = (size_t)snprintf(text, size, "%s", key);
    free(key);
    free(cubin.bytes);
    return length;
}
