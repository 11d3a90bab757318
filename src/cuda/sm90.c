/* SPDX-License-Identifier: MIT
 * Plans and runs the kernel of device/sm90_forward.cu. */
#include "cuda/sm90.h"

#include <math.h>
#include <stdlib.h>

#include "cuda/device.h"
#include "cuda/driver.h"
#include "cuda/reference.h"

typedef struct state {
    na_sm90_config config;
    na_launch launch;
    int launches;              /* one for each batch of a 3-D map: a tensor map has five axes */
    na_sm90_forward arguments; /* but for addresses and tensor maps */
} state;

/* ----------------------------------------------------------------------------------------------
 * planning */

static natten_status check(natten_plan *plan)
{
    static const natten_role walked[] = {NATTEN_QUERY, NATTEN_KEY, NATTEN_VALUE,
                                         NATTEN_ADDITIONAL_KEY, NATTEN_ADDITIONAL_VALUE};
    natten_status status = na_sm90_check_sizes(plan);
    for (int i = 0; status == NATTEN_OK && i < (plan->problem.additional_tokens ? 5 : 3); i++)
        status = na_sm90_check_layout(plan, walked[i], 1);
    return status == NATTEN_OK ? na_sm90_check_layout(plan, NATTEN_OUT, 0) : status;
}

void na_sm90_special(const natten_problem *p, const na_sm90_config *c, na_special *special)
{
    na_special_init(special, "sm90_forward.cu", "sm_90a");
    na_sm90_special_tiles(p, c, special);
    na_special_set(special, "NA_HALF_VISITORS", c->halves ? na_sm90_visitors(c) / 2 : 0);
    na_special_set(special, "NA_KEY_STAGES", c->stages[0]);
    na_special_set(special, "NA_VALUE_STAGES", c->stages[1]);
    na_special_set(special, "NA_EXTRA", p->additional_tokens > 0);
}

int na_sm90_arguments(const natten_problem *p, const na_sm90_config *c, na_sm90_forward *arguments)
{
    arguments->scale_log2 = (float)(p->scale * 1.4426950408889634);
    /* Weights may reach 2^8 before references follow: far from where half precision ends. */
    arguments->slack = fminf(8 / arguments->scale_log2, 1e20f);
    arguments->out_layout = p->layout[NATTEN_OUT];
    arguments->lse_layout = p->layout[NATTEN_LSE];
    return na_sm90_walk_of(p, c, na_sm90_is_flat(p), &arguments->walk);
}

static natten_status run_sm90(const natten_plan *plan, const natten_run *run);

static natten_status load(natten_plan *plan, const na_device *device, state *s)
{
    na_special special;
    na_sm90_special(&plan->problem, &s->config, &special);
    s->launch.shared_bytes = s->config.shared_bytes;
    return na_sm90_load(plan, device, &special, "na_sm90_forward_kernel", &s->launch);
}

natten_status na_cuda_sm90_plan(natten_plan *plan)
{
    const natten_problem *p = &plan->problem;
    const na_device *device;
    natten_status status = na_sm90_device_of(plan, &device);
    if (status == NATTEN_OK)
        status = check(plan);
    if (status != NATTEN_OK)
        return status;
    state *s = calloc(1, sizeof *s);
    if (!s)
        return na_fail(NATTEN_ERROR_MEMORY, "No memory to make a plan.");
    if (!na_sm90_config_choose(p, device, NA_SM90_FORWARD, p->choice, &s->config))
        status = na_refuse(plan, "no tiles fit, or not so many choices of them");
    /* Once wrong on an H100, in a form that is no more, for a reason not found: not until it is. */
    else if (p->additional_tokens && !s->config.positions)
        status = na_refuse(plan, "no additional tokens where tiles of keys are lines");
    else if (!na_sm90_arguments(p, &s->config, &s->arguments))
        status = na_refuse(plan, "too many tiles of queries");
    else
        status = load(plan, device, s);
    if (status != NATTEN_OK) {
        free(s);
        return status;
    }
    int items = s->arguments.walk.items, blocks = device->multiprocessors;
    s->launch.blocks = items < blocks ? items : blocks;
    s->launch.threads = NA_SM90_WARPGROUP * (s->config.groups + 1);
    s->launches = s->arguments.walk.flat ? 1 : (int)p->batch;
    plan->workspace = items > blocks ? (size_t)s->launches * sizeof(int) : 0;
    plan->state = s;
    plan->run = run_sm90;
    plan->choices = NA_SM90_CHOICES;
    na_sm90_config_describe(&s->config, plan->choice, sizeof plan->choice);
    na_reference_prepare_backward(plan, device);
    return NATTEN_OK;
}

/* ----------------------------------------------------------------------------------------------
 * running */

static natten_status map_tokens(const natten_plan *plan, natten_role role, void *data,
                                const int box[3], int heads, na_tensor_map *map)
{
    const natten_axis *x = plan->problem.axis;
    const na_sm90_boxes boxes = {
        .role = role,
        .flat = ((const state *)plan->state)->arguments.walk.flat,
        .box = {box[0], box[1], box[2]},
        .step = {(int)x[0].dilation, (int)x[1].dilation, (int)x[2].dilation},
        .heads = heads};
    return na_sm90_map(&plan->problem, &boxes, data, map);
}

/* Launches for the batches from `batch` on that one launch covers. */
static natten_status run_batch(const natten_plan *plan, const natten_run *run, int batch)
{
    const state *s = plan->state;
    const natten_problem *p = &plan->problem;
    const na_sm90_config *c = &s->config;
    const int keys = na_sm90_visitors(c);
    na_sm90_forward arguments = s->arguments;
    char *data[NATTEN_ROLES];
    natten_status status;
    na_sm90_addresses(p, run, batch, data);
    arguments.out = data[NATTEN_OUT];
    arguments.lse = na_has(p, NATTEN_LSE) ? (float *)data[NATTEN_LSE] : NULL;
    arguments.walk.counter = plan->workspace ? (int *)run->workspace + batch : NULL;
    status = map_tokens(plan, NATTEN_QUERY, data[NATTEN_QUERY], c->sub, c->pack, &arguments.query);
    if (status == NATTEN_OK)
        status = map_tokens(plan, NATTEN_KEY, data[NATTEN_KEY], c->tile, 1, &arguments.key);
    if (status == NATTEN_OK)
        status = map_tokens(plan, NATTEN_VALUE, data[NATTEN_VALUE], c->tile, 1, &arguments.value);
    if (status == NATTEN_OK && p->additional_tokens)
        status = na_sm90_map_extra(p, NATTEN_ADDITIONAL_KEY, data[NATTEN_ADDITIONAL_KEY], keys, 1,
                                   &arguments.extra_key);
    if (status == NATTEN_OK && p->additional_tokens)
        status = na_sm90_map_extra(p, NATTEN_ADDITIONAL_VALUE, data[NATTEN_ADDITIONAL_VALUE], keys,
                                   1, &arguments.extra_value);
    return status == NATTEN_OK ? na_launch_run(&s->launch, run->stream, &arguments) : status;
}

static natten_status run_sm90(const natten_plan *plan, const natten_run *run)
{
    const state *s = plan->state;
    const char *why;
    const na_driver *cuda = na_driver_find(&why);
    na_context context;
    if (!na_sm90_is_aligned(&plan->problem, run))
        return na_sm90_run_unaligned(plan, run);
    if (plan->workspace && !run->workspace)
        return na_fail(NATTEN_ERROR_ARGUMENT, "The run needs %zu bytes of workspace, got none.",
                       plan->workspace);
    natten_status status = na_context_enter((int)plan->problem.device_index, &context);
    if (status != NATTEN_OK)
        return status;
    if (plan->workspace)
        status = na_driver_check(cuda->cuMemsetD32Async((uint64_t)(uintptr_t)run->workspace, 0,
                                                        plan->workspace / sizeof(int), run->stream),
                                 "cuMemsetD32Async");
    for (int batch = 0; status == NATTEN_OK && batch < s->launches; batch++)
        status = run_batch(plan, run, batch);
    na_context_leave(context);
    return status;
}
