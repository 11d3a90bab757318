/* SPDX-License-Identifier: MIT
 * Plans and runs the kernel of device/sm90_forward.cu. */
#include "cuda/sm90.h"

#include <math.h>
#include <stdlib.h>

#include "cuda/device.h"
#include "cuda/driver.h"

typedef struct state {
    na_sm90_config config;
    na_launch launch;
    int batches; /* launches: one for each batch of a 3-D map, as a tensor map has five axes */
    int parts;   /* times so many, by dilation */
    na_sm90_forward arguments; /* but for addresses, tensor maps, and the walks of parts */
} state;

/* ----------------------------------------------------------------------------------------------
 * planning */

static natten_status check(natten_plan *plan)
{
    static const natten_role walked[] = {NATTEN_QUERY, NATTEN_KEY, NATTEN_VALUE,
                                         NATTEN_ADDITIONAL_KEY, NATTEN_ADDITIONAL_VALUE};
    natten_status status = na_sm90_check_sizes(plan);
    if (status == NATTEN_OK && na_sm90_bias_is_far(&plan->problem))
        return na_refuse(plan, "entries of the relative position bias are too far apart");
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
    na_special_set(special, "NA_SCALED", na_sm90_is_scaled(p));
    na_special_set(special, "NA_BIAS", na_has(p, NATTEN_RPB));
}

int na_sm90_arguments(const natten_problem *p, const na_sm90_config *c, na_sm90_forward *arguments)
{
    arguments->scale_log2 = (float)(p->scale * 1.4426950408889634);
    /* Weights may reach 2^8 before references follow: far from where half precision ends. */
    arguments->slack = na_sm90_is_scaled(p) ? 8 : fminf(8 / arguments->scale_log2, 1e20f);
    na_sm90_bias_of(p, &arguments->bias);
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
    else if (!na_sm90_arguments(p, &s->config, &s->arguments))
        status = na_refuse(plan, "too many tiles of queries");
    else
        status = load(plan, device, s);
    if (status != NATTEN_OK) {
        free(s);
        return status;
    }
    int items = s->arguments.walk.items, blocks = device->multiprocessors;
    s->launch.blocks = blocks;
    s->launch.threads = NA_SM90_WARPGROUP * (s->config.groups + 1);
    s->batches = s->arguments.walk.flat ? 1 : (int)p->batch;
    s->parts = na_sm90_parts(p);
    plan->workspace = items > blocks ? (size_t)s->batches * (size_t)s->parts * sizeof(int) : 0;
    plan->state = s;
    plan->run = run_sm90;
    plan->choices = NA_SM90_CHOICES;
    na_sm90_config_describe(&s->config, plan->choice, sizeof plan->choice);
    na_sm90_prepare_backward(plan, device);
    return NATTEN_OK;
}

/* ----------------------------------------------------------------------------------------------
 * running */

/* A part of the plan's problem, and its own work items. */
typedef struct piece {
    natten_problem problem;
    int64_t first[NATTEN_ROLES];
    na_sm90_forward arguments;
    na_launch launch;
} piece;

/* 0: there is nothing in it. */
static int find_piece(const natten_plan *plan, int number, piece *piece)
{
    const state *s = plan->state;
    na_sm90_walk *walk = &piece->arguments.walk;
    piece->arguments = s->arguments;
    piece->launch = s->launch;
    if (!na_sm90_part(&plan->problem, number, &piece->problem, piece->first))
        return 0;
    piece->arguments.out_layout = piece->problem.layout[NATTEN_OUT];
    piece->arguments.lse_layout = piece->problem.layout[NATTEN_LSE];
    na_sm90_walk_of(&piece->problem, &s->config, walk->flat, walk);
    if (walk->items < piece->launch.blocks)
        piece->launch.blocks = walk->items;
    return 1;
}

static natten_status map_tokens(const piece *piece, natten_role role, char **data, const int box[3],
                                int heads, na_tensor_map *map)
{
    const natten_axis *x = piece->problem.axis;
    const na_sm90_boxes boxes = {
        .role = role,
        .flat = piece->arguments.walk.flat,
        .box = {box[0], box[1], box[2]},
        .step = {(int)x[0].dilation, (int)x[1].dilation, (int)x[2].dilation},
        .heads = heads};
    return na_sm90_map(&piece->problem, &boxes, data[role], map);
}

/* Launches for the batches from `batch` on that one launch covers. */
static natten_status run_piece(const natten_plan *plan, const natten_run *run, piece *piece,
                               int batch, int *counter)
{
    const natten_problem *p = &piece->problem;
    const na_sm90_config *c = &((const state *)plan->state)->config;
    const int keys = na_sm90_visitors(c);
    na_sm90_forward *arguments = &piece->arguments;
    char *data[NATTEN_ROLES];
    natten_status status;
    na_sm90_addresses(p, run, batch, data);
    for (int role = 0; role < NATTEN_ROLES; role++)
        if (data[role])
            data[role] += piece->first[role] * (int64_t)na_dtype_size(na_role_dtype(p, role));
    arguments->out = data[NATTEN_OUT];
    arguments->lse = na_has(p, NATTEN_LSE) ? (float *)data[NATTEN_LSE] : NULL;
    arguments->bias.entries = run->data[NATTEN_RPB]; /* it has no batch */
    arguments->walk.counter = counter;
    status = map_tokens(piece, NATTEN_QUERY, data, c->sub, c->pack, &arguments->query);
    if (status == NATTEN_OK)
        status = map_tokens(piece, NATTEN_KEY, data, c->tile, 1, &arguments->key);
    if (status == NATTEN_OK)
        status = map_tokens(piece, NATTEN_VALUE, data, c->tile, 1, &arguments->value);
    if (status == NATTEN_OK && p->additional_tokens)
        status = na_sm90_map_extra(p, NATTEN_ADDITIONAL_KEY, data[NATTEN_ADDITIONAL_KEY], keys, 1,
                                   &arguments->extra_key);
    if (status == NATTEN_OK && p->additional_tokens)
        status = na_sm90_map_extra(p, NATTEN_ADDITIONAL_VALUE, data[NATTEN_ADDITIONAL_VALUE], keys,
                                   1, &arguments->extra_value);
    return status == NATTEN_OK ? na_launch_run(&piece->launch, run->stream, arguments) : status;
}

static natten_status run_all(const natten_plan *plan, const natten_run *run)
{
    const state *s = plan->state;
    const char *why;
    const na_driver *cuda = na_driver_find(&why);
    int *counter = plan->workspace ? run->workspace : NULL;
    natten_status status = NATTEN_OK;
    piece piece;
    if (counter)
        status = na_driver_check(cuda->cuMemsetD32Async((uint64_t)(uintptr_t)counter, 0,
                                                        plan->workspace / sizeof(int), run->stream),
                                 "cuMemsetD32Async");
    for (int i = 0; status == NATTEN_OK && i < s->parts; i++)
        for (int batch = 0; status == NATTEN_OK && batch < s->batches; batch++) {
            if (find_piece(plan, i, &piece))
                status = run_piece(plan, run, &piece, batch, counter);
            counter += counter != NULL;
        }
    return status;
}

static natten_status run_sm90(const natten_plan *plan, const natten_run *run)
{
    na_context context;
    if (!na_sm90_is_aligned(&plan->problem, run))
        return na_sm90_run_unaligned(plan, run);
    if (plan->workspace && !run->workspace)
        return na_fail(NATTEN_ERROR_ARGUMENT, "The run needs %zu bytes of workspace, got none.",
                       plan->workspace);
    natten_status status = na_context_enter((int)plan->problem.device_index, &context);
    if (status != NATTEN_OK)
        return status;
    status = run_all(plan, run);
    na_context_leave(context);
    return status;
}
