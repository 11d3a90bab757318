/* SPDX-License-Identifier: MIT
 * The public functions: walk the list of kernels, keep the reasons, make plans and run them. */
#include "natten.h"

#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/env.h"
#include "core/kernel.h"
#include "core/merge.h"
#include "core/preference.h"
#include "core/problem.h"
#include "cpu/threads.h"
#include "cuda/cache.h"
#include "cuda/device.h"
#include "table.h"
#include "tune.h"

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
    plan->refusal[0] = 0;
    if (only && strncmp(kernel->name, only, strlen(only)))
        na_refuse(plan, "not among the kernels asked for (%s)", only);
    else if (na_disabled(kernel->name))
        na_refuse(plan, "switched off by NATTEN_DISABLE");
    else
        status = kernel->plan(plan);
    if (status != NATTEN_OK && status != NA_REFUSED)
        return status;
    if (status == NATTEN_OK && (plan->problem.choice < 0 || plan->problem.choice > plan->choices))
        return na_fail(NATTEN_ERROR_ARGUMENT,
                       "choice must be 0 to %lld for this problem and %s, got %lld.",
                       (long long)plan->choices, kernel->name, (long long)plan->problem.choice);
    char choice[sizeof plan->choice + 64] = "", taken[sizeof plan->refusal + sizeof choice + 16];
    if (*plan->choice)
        snprintf(choice, sizeof choice, " (choice %lld of %lld: %s)",
                 (long long)plan->problem.choice, (long long)plan->choices, plan->choice);
    snprintf(taken, sizeof taken, "taken%s%s%s", choice, plan->refusal[0] ? ": " : "",
             plan->refusal);
    if (explain(plan, kernel->name, status == NATTEN_OK ? taken : plan->refusal))
        return status;
    return na_fail(NATTEN_ERROR_MEMORY, "No memory to make a plan.");
}

/* What there is to say besides why kernels refused. */
static natten_status explain_rest(natten_plan *plan)
{
    char sentence[256];
    const char *name;
    if (plan->axes_merged) {
        na_merge_describe(&plan->problem, &plan->merged, sentence, sizeof sentence);
        if (!explain(plan, "axes", sentence))
            return na_fail(NATTEN_ERROR_MEMORY, "No memory to make a plan.");
    }
    for (int i = 0; (name = na_preference_describe(plan, &i, sentence, sizeof sentence));)
        if (!explain(plan, name, sentence))
            return na_fail(NATTEN_ERROR_MEMORY, "No memory to make a plan.");
    return NATTEN_OK;
}

static natten_status choose(natten_plan *plan, const char *only)
{
    for (size_t i = 0; i < kernel_count; i++) {
        if (kernels[i].op != plan->problem.op || kernels[i].device != plan->problem.device)
            continue;
        plan->kernel = &kernels[i];
        plan->honours = 0;
        plan->choices = plan->most_workers = 0;
        plan->choice[0] = 0;
        natten_status status = ask(plan, &kernels[i], only);
        if (status != NA_REFUSED)
            return status == NATTEN_OK ? explain_rest(plan) : status;
    }
    if (explain_rest(plan) != NATTEN_OK)
        return NATTEN_ERROR_MEMORY;
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
    plan->asked = only;
    plan->merged = plan->problem;
    if (status == NATTEN_OK && plan->problem.device == NATTEN_CPU)
        plan->axes_merged = na_problem_merge(&plan->merged);
    if (status == NATTEN_OK)
        status = choose(plan, only);
    plan->asked = NULL;
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
    return (size_t)snprintf(text, size, "%s", plan ? plan->explanation : "");
}

const char *natten_plan_kernel(const natten_plan *plan) { return plan ? plan->kernel->name : ""; }

size_t natten_plan_workspace(const natten_plan *plan) { return plan ? plan->workspace : 0; }

int64_t natten_plan_choices(const natten_plan *plan) { return plan ? plan->choices : 0; }

const char *natten_plan_choice(const natten_plan *plan) { return plan ? plan->choice : ""; }

natten_status natten_plan_run(const natten_plan *plan, const natten_run *run)
{
    if (!plan || !run)
        return na_fail(NATTEN_ERROR_ARGUMENT, "natten_plan_run needs a plan and a run, got NULL.");
    natten_status status = na_run_check(&plan->problem, run);
    if (status != NATTEN_OK)
        return status;
    if (!plan->most_workers || na_workers(run, plan->most_workers + 1) <= plan->most_workers)
        return plan->run(plan, run);
    natten_run fewer = *run;
    fewer.threads = plan->most_workers;
    return plan->run(plan, &fewer);
}

natten_status natten_compute(const natten_problem *problem, const natten_run *run)
{
    na_entry *entry;
    natten_status status = na_table_take(problem, &entry);
    if (status != NATTEN_OK)
        return status;
    status = natten_plan_run(na_tuned_plan(entry, run), run);
    na_table_give(entry);
    return status;
}

/* Several problems; those that are large beside the sum of all run one after another on all
 * threads, the others side by side on one each. */
typedef struct several {
    const natten_run *runs;
    na_entry **entries;
    size_t count;
    double large; /* pairs of a query and a key that make a problem a large one */
    atomic_size_t next;
    atomic_int status; /* of the first that failed, and its number and text */
    size_t failed;
    char text[1024];
} several;

static double pairs(const natten_problem *padded)
{
    double count = (double)padded->batch * (double)padded->heads;
    for (int i = 0; i < 3; i++)
        count *= (double)padded->axis[i].query_extent * (double)padded->axis[i].window;
    return count;
}

static int is_large(const several *s, size_t i)
{
    const natten_problem *padded = &s->entries[i]->plan->problem;
    return padded->device != NATTEN_CPU || pairs(padded) > s->large;
}

static void note(several *s, size_t i, natten_status status)
{
    int none = NATTEN_OK;
    if (status == NATTEN_OK || !atomic_compare_exchange_strong(&s->status, &none, (int)status))
        return;
    s->failed = i;
    snprintf(s->text, sizeof s->text, "%s", natten_last_error());
}

static void run_small(void *context, int64_t worker)
{
    several *s = context;
    (void)worker;
    for (size_t i; (i = atomic_fetch_add(&s->next, 1)) < s->count;) {
        if (is_large(s, i) || atomic_load(&s->status) != NATTEN_OK)
            continue;
        natten_run run = s->runs[i];
        run.threads = 1;
        note(s, i, s->entries[i]->plan->run(s->entries[i]->plan, &run));
    }
}

static natten_status run_all(several *s)
{
    double sum = 0;
    for (size_t i = 0; i < s->count; i++)
        sum += pairs(&s->entries[i]->plan->problem);
    int64_t small = 0, workers = na_workers(&s->runs[0], INT64_MAX);
    s->large = workers > 1 ? sum / (4 * (double)workers) : sum;
    for (size_t i = 0; i < s->count && s->status == NATTEN_OK; i++)
        if (is_large(s, i))
            note(s, i, s->entries[i]->plan->run(s->entries[i]->plan, &s->runs[i]));
        else
            small++;
    if (small)
        na_parallel(&s->runs[0], na_workers(&s->runs[0], small), run_small, s);
    return s->status == NATTEN_OK ? NATTEN_OK : na_fail((natten_status)s->status, "%s", s->text);
}

natten_status natten_compute_all(const natten_problem *problems, const natten_run *runs,
                                 size_t count, size_t *failed)
{
    several s = {.runs = runs, .count = count};
    natten_status status = NATTEN_OK;
    if (count == 0)
        return NATTEN_OK;
    if (!problems || !runs)
        return na_fail(NATTEN_ERROR_ARGUMENT,
                       "natten_compute_all needs problems and runs, got NULL.");
    s.entries = calloc(count, sizeof *s.entries);
    if (!s.entries)
        return na_fail(NATTEN_ERROR_MEMORY, "No memory for %zu plans.", count);
    for (size_t i = 0; status == NATTEN_OK && i < count; i++) {
        s.failed = i;
        status = na_table_take(&problems[i], &s.entries[i]);
        if (status == NATTEN_OK)
            status = na_run_check(&s.entries[i]->plan->problem, &runs[i]);
    }
    if (status == NATTEN_OK)
        status = run_all(&s);
    if (status != NATTEN_OK && failed)
        *failed = s.failed;
    for (size_t i = 0; i < count; i++)
        na_table_give(s.entries[i]);
    free(s.entries);
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
    natten_plan_explain(na_tuned_plan(entry, NULL), text, size);
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
