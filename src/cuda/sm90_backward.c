/* SPDX-License-Identifier: MIT
 * Plans and runs the kernels of device/sm90_backward.cu: first delta of every query, then d_query,
 * d_key with d_value, and the gradients of additional tokens; as many of them as are wanted. */
#include <stdlib.h>
#include <string.h>

#include "core/problem.h"
#include "cuda/device.h"
#include "cuda/driver.h"
#include "cuda/reference.h"
#include "cuda/sm90.h"

enum {
    MOST_PASSES = 5,
    MOST_DELTA_BLOCKS = 16, /* of a multiprocessor */
    MOST_VISITS = 255       /* what a note has room for */
};

/* A launch of the text, for each batch of a 3-D map (a tensor map has five axes). */
typedef struct pass {
    na_sm90_config config;
    int of_extra; /* residents are the additional tokens */
    na_launch launch;
    na_sm90_backward arguments; /* but for addresses and tensor maps */
} pass;

typedef struct state {
    pass passes[MOST_PASSES];
    int count, batches;
    na_launch delta;
    na_sm90_delta delta_arguments; /* but for addresses */
    na_launch bias;
    na_sm90_bias_end bias_arguments; /* but for addresses */
    size_t pair_bytes, bias_bytes;   /* of the workspace; counters follow */
} state;

/* ----------------------------------------------------------------------------------------------
 * planning */

static natten_status check(natten_plan *plan)
{
    static const natten_role walked[] = {NATTEN_QUERY,          NATTEN_KEY,
                                         NATTEN_VALUE,          NATTEN_D_OUT,
                                         NATTEN_ADDITIONAL_KEY, NATTEN_ADDITIONAL_VALUE};
    static const natten_role rows[] = {
        NATTEN_OUT,     NATTEN_D_QUERY,          NATTEN_D_KEY,
        NATTEN_D_VALUE, NATTEN_D_ADDITIONAL_KEY, NATTEN_D_ADDITIONAL_VALUE};
    const natten_problem *p = &plan->problem;
    natten_status status = na_sm90_check_sizes(plan);
    for (int i = 0; status == NATTEN_OK && i < 6; i++)
        if (na_has(p, walked[i]))
            status = na_sm90_check_layout(plan, walked[i], 1);
    for (int i = 0; status == NATTEN_OK && i < 6; i++)
        if (na_has(p, rows[i]))
            status = na_sm90_check_layout(plan, rows[i], 0);
    if (status == NATTEN_OK && na_sm90_bias_is_far(p))
        return na_refuse(plan, "entries of the relative position bias are too far apart");
    if (status == NATTEN_OK && na_has(p, NATTEN_RPB) && p->heads / p->kv_heads > MOST_VISITS)
        return na_refuse(plan, "a relative position bias, and more than %d heads share keys",
                         MOST_VISITS);
    if (status == NATTEN_OK && na_sm90_bias_entries(p, NA_SM90_D_QUERY) < 0)
        return na_refuse(plan, "a gradient of too many entries of a relative position bias");
    if (status == NATTEN_OK && na_sm90_parts(p) > 1)
        return na_refuse(plan, "dilations so large that the map would have to be cut in parts");
    double queries = (double)p->batch * (double)p->heads;
    for (int a = 0; a < 3; a++)
        queries *= (double)p->axis[a].query_extent;
    if (status == NATTEN_OK && queries > 2e9)
        return na_refuse(plan, "%.0f queries, and it counts up to 2e9", queries);
    return status;
}

static void special_of(const natten_problem *p, const pass *pass, na_special *special)
{
    const na_sm90_config *c = &pass->config;
    na_special_init(special, "sm90_backward.cu", "sm_90a");
    na_sm90_special_tiles(p, c, special);
    na_special_set(special, "NA_SIDE", c->what == NA_SM90_D_KEY);
    na_special_set(special, "NA_GIVES", c->gives);
    na_special_set(special, "NA_STAGES", c->stages[0]);
    na_special_set(special, "NA_EXTRA", c->what == NA_SM90_D_QUERY && p->additional_tokens > 0);
    na_special_set(special, "NA_MASKS", !pass->of_extra);
    na_special_set(special, "NA_SCALED", na_sm90_is_scaled(p));
    na_special_set(special, "NA_BIAS", na_has(p, NATTEN_RPB) && !pass->of_extra);
    na_special_set(special, "NA_BIAS_ENTRIES", na_sm90_bias_entries(p, c->what));
}

static void special_of_bias(const natten_problem *p, na_special *special)
{
    na_special_init(special, "sm90_bias.cu", "sm_90a");
    na_special_set(special, "NA_DTYPE", p->dtype);
}

static void special_of_delta(const natten_problem *p, na_special *special)
{
    int lanes = 1;
    while (lanes * 8 < p->value_dim)
        lanes *= 2;
    na_special_init(special, "sm90_delta.cu", "sm_90a");
    na_special_set(special, "NA_DTYPE", p->dtype);
    na_special_set(special, "NA_VALUE_DIM", p->value_dim);
    na_special_set(special, "NA_LANES", lanes);
}

/* Adds the pass that gives what is wanted; or two, where both gradients at once do not fit. */
static int add_pass(const natten_problem *p, const na_device *device, na_sm90_what what, int gives,
                    int of_extra, state *s)
{
    pass *pass = &s->passes[s->count];
    na_sm90_config *c = &pass->config;
    c->gives = gives;
    if (!na_sm90_config_choose(p, device, what, 0, c))
        return gives == 3 && add_pass(p, device, what, 1, of_extra, s) &&
               add_pass(p, device, what, 2, of_extra, s);
    pass->of_extra = of_extra;
    if (of_extra) {
        /* Tokens in a line; tables are not needed, and what is free of them stays so. */
        c->sub[0] = c->sub[1] = c->raster = 1;
        c->sub[2] = NA_SM90_ROWS;
        c->stack = 2;
        c->positions = 0;
    }
    s->count++;
    return 1;
}

/* The passes' tiles; 0: none fit. */
static int find_passes(const natten_problem *p, const na_device *device, state *s)
{
    int key = na_has(p, NATTEN_D_KEY), value = na_has(p, NATTEN_D_VALUE);
    int extra_key = na_has(p, NATTEN_D_ADDITIONAL_KEY);
    int extra_value = na_has(p, NATTEN_D_ADDITIONAL_VALUE);
    int query = na_has(p, NATTEN_D_QUERY) || na_has(p, NATTEN_D_RPB);
    if (query && !add_pass(p, device, NA_SM90_D_QUERY, 1, 0, s))
        return 0;
    if (key + value && !add_pass(p, device, NA_SM90_D_KEY, key + 2 * value, 0, s))
        return 0;
    return !(extra_key + extra_value) ||
           add_pass(p, device, NA_SM90_D_KEY, extra_key + 2 * extra_value, 1, s);
}

/* Additional tokens as the residents of a map: all along axis 2, and every query visits. */
static natten_problem extra_problem(const natten_problem *problem)
{
    natten_problem p = *problem;
    for (int a = 0; a < 3; a++) {
        int64_t tokens = a == 2 ? p.additional_tokens : 1;
        p.axis[a] = (natten_axis){.query_extent = p.axis[a].query_extent,
                                  .key_extent = tokens,
                                  .global_extent = tokens,
                                  .window = tokens,
                                  .stride = 1,
                                  .dilation = 1};
    }
    return p;
}

static natten_layout in_line(natten_layout layout)
{
    layout.axis[2] = layout.axis[0];
    return layout;
}

/* Sizes; 0: too many work items. */
static int fill_arguments(const natten_problem *p, pass *pass)
{
    int of_keys = pass->config.what == NA_SM90_D_KEY;
    na_sm90_backward *arguments = &pass->arguments;
    const natten_problem seen = pass->of_extra ? extra_problem(p) : *p;
    int fits = na_sm90_walk_of(&seen, &pass->config, na_sm90_is_flat(p), &arguments->walk);
    arguments->scale = (float)p->scale;
    arguments->scale_log2 = (float)(p->scale * 1.4426950408889634);
    for (int a = 0; a < 3; a++)
        arguments->extent[a] = (int)p->axis[a].query_extent;
    arguments->layout[0] = p->layout[of_keys ? NATTEN_D_KEY : NATTEN_D_QUERY];
    arguments->layout[1] = p->layout[NATTEN_D_VALUE];
    na_sm90_bias_of(p, &arguments->bias);
    for (int a = 0; a < 3; a++)
        arguments->bias_sums.extent[a] = (int)(2 * p->axis[a].window - 1);
    if (pass->of_extra) {
        arguments->layout[0] = in_line(p->layout[NATTEN_D_ADDITIONAL_KEY]);
        arguments->layout[1] = in_line(p->layout[NATTEN_D_ADDITIONAL_VALUE]);
    }
    return fits;
}

static natten_status load_pass(natten_plan *plan, const na_device *device, pass *pass)
{
    na_special special;
    int items = pass->arguments.walk.items, blocks = device->multiprocessors;
    special_of(&plan->problem, pass, &special);
    pass->launch.blocks = items < blocks ? items : blocks;
    pass->launch.threads = NA_SM90_WARPGROUP * (pass->config.groups + 1);
    pass->launch.shared_bytes = pass->config.shared_bytes;
    return na_sm90_load(plan, device, &special, "na_sm90_backward_kernel", &pass->launch);
}

static natten_status load_delta(natten_plan *plan, const na_device *device, state *s)
{
    const natten_problem *p = &plan->problem;
    na_sm90_delta *arguments = &s->delta_arguments;
    na_special special;
    special_of_delta(p, &special);
    int64_t rows = p->batch * p->heads;
    for (int a = 0; a < 3; a++) {
        arguments->extent[a] = (int)p->axis[a].query_extent;
        rows *= p->axis[a].query_extent;
    }
    arguments->heads = (int)p->heads;
    arguments->step = (int)p->axis[2].dilation;
    arguments->rows = (int)rows;
    arguments->out_layout = p->layout[NATTEN_OUT];
    arguments->d_out_layout = p->layout[NATTEN_D_OUT];
    arguments->lse_layout = p->layout[NATTEN_LSE];
    arguments->d_lse_layout = p->layout[NATTEN_D_LSE];
    int64_t blocks = (rows + 3) / 4, most = (int64_t)device->multiprocessors * MOST_DELTA_BLOCKS;
    s->delta.blocks = blocks < most ? blocks : most;
    s->delta.threads = NA_SM90_WARPGROUP;
    s->pair_bytes = (size_t)rows * NA_SM90_PAIR * sizeof(float);
    return na_sm90_load(plan, device, &special, "na_sm90_delta_kernel", &s->delta);
}

/* What adds up the gradient of the bias, after the pass that gives d_query, which is the first. */
static natten_status load_bias(natten_plan *plan, const na_device *device, state *s)
{
    const natten_problem *p = &plan->problem;
    const pass *pass = &s->passes[0];
    const na_sm90_walk *walk = &pass->arguments.walk;
    na_sm90_bias_end *arguments = &s->bias_arguments;
    na_special special;
    special_of_bias(p, &special);
    arguments->entries = 1;
    arguments->head = p->layout[NATTEN_D_RPB].head;
    for (int a = 0; a < 3; a++) {
        arguments->step[a] = p->layout[NATTEN_D_RPB].axis[a];
        arguments->extent[a] = pass->arguments.bias_sums.extent[a];
        arguments->entries *= arguments->extent[a];
    }
    int64_t rows = p->heads * (walk->flat ? p->batch : 1);
    arguments->heads = (int)p->heads;
    arguments->batches = (int)p->batch;
    arguments->parts_of_head = (int)(walk->items / rows) * pass->config.groups;
    s->bias_bytes = (size_t)(p->batch * p->heads) * (size_t)arguments->parts_of_head *
                    (size_t)arguments->entries * sizeof(float);
    int64_t blocks = (p->heads * arguments->entries + NA_SM90_BIAS_BLOCK - 1) / NA_SM90_BIAS_BLOCK;
    int64_t most = (int64_t)device->multiprocessors * MOST_DELTA_BLOCKS;
    s->bias.blocks = blocks < most ? blocks : most;
    s->bias.threads = NA_SM90_WARPGROUP;
    s->bias.shared_bytes = NA_SM90_WARPGROUP * (int)sizeof(float);
    return na_sm90_load(plan, device, &special, "na_sm90_bias_kernel", &s->bias);
}

static natten_status run_backward(const natten_plan *plan, const natten_run *run);

static natten_status prepare(natten_plan *plan, const na_device *device, state *s)
{
    if (!find_passes(&plan->problem, device, s))
        return na_refuse(plan, "no tiles fit");
    natten_status status = NATTEN_OK;
    for (int i = 0; i < s->count; i++)
        if (!fill_arguments(&plan->problem, &s->passes[i]))
            return na_refuse(plan, "too many tiles");
    for (int i = 0; status == NATTEN_OK && i < s->count; i++)
        status = load_pass(plan, device, &s->passes[i]);
    if (status == NATTEN_OK && na_has(&plan->problem, NATTEN_D_RPB))
        status = load_bias(plan, device, s);
    return status == NATTEN_OK ? load_delta(plan, device, s) : status;
}

natten_status na_cuda_sm90_backward_plan(natten_plan *plan)
{
    const na_device *device;
    natten_status status = na_sm90_device_of(plan, &device);
    if (status == NATTEN_OK)
        status = check(plan);
    if (status == NATTEN_OK && !na_sm90_is_asked_for(plan))
        return na_refuse(plan, "not yet proved on a GPU: ask for it by name");
    if (status != NATTEN_OK)
        return status;
    state *s = calloc(1, sizeof *s);
    if (!s)
        return na_fail(NATTEN_ERROR_MEMORY, "No memory to make a plan.");
    status = prepare(plan, device, s);
    if (status != NATTEN_OK) {
        free(s);
        return status;
    }
    s->batches = na_sm90_is_flat(&plan->problem) ? 1 : (int)plan->problem.batch;
    plan->workspace =
        s->pair_bytes + s->bias_bytes + (size_t)s->count * (size_t)s->batches * sizeof(int);
    plan->state = s;
    plan->run = run_backward;
    return NATTEN_OK;
}

int na_sm90_backward_specials(const natten_problem *p, const na_device *device,
                              na_special specials[NA_SM90_BACKWARD_TEXTS])
{
    state s = {.count = 0};
    if (!find_passes(p, device, &s))
        return 0;
    for (int i = 0; i < s.count; i++)
        special_of(p, &s.passes[i], &specials[i]);
    special_of_delta(p, &specials[s.count]);
    if (na_has(p, NATTEN_D_RPB))
        special_of_bias(p, &specials[++s.count]);
    return s.count + 1;
}

/* ----------------------------------------------------------------------------------------------
 * running */

static natten_status map_residents(const natten_plan *plan, const pass *pass, char **data,
                                   const na_sm90_boxes *boxes, na_sm90_backward *arguments)
{
    static const natten_role roles[][2] = {{NATTEN_QUERY, NATTEN_D_OUT},
                                           {NATTEN_KEY, NATTEN_VALUE},
                                           {NATTEN_ADDITIONAL_KEY, NATTEN_ADDITIONAL_VALUE}};
    const natten_problem *p = &plan->problem;
    int side = pass->config.what == NA_SM90_D_KEY;
    natten_status status = NATTEN_OK;
    for (int i = 0; status == NATTEN_OK && i < 2; i++) {
        natten_role role = roles[side + pass->of_extra][i], visitor = roles[!side][i];
        na_sm90_boxes resident = *boxes, visitors = *boxes;
        resident.role = role;
        resident.heads = pass->config.pack;
        memcpy(resident.box, pass->config.sub, sizeof resident.box);
        visitors.role = visitor;
        memcpy(visitors.box, pass->config.tile, sizeof visitors.box);
        status = pass->of_extra ? na_sm90_map_extra(p, role, data[role], NA_SM90_ROWS, boxes->flat,
                                                    &arguments->resident[i])
                                : na_sm90_map(p, &resident, data[role], &arguments->resident[i]);
        if (status == NATTEN_OK)
            status = na_sm90_map(p, &visitors, data[visitor], &arguments->visitor[i]);
        if (status == NATTEN_OK && !side && p->additional_tokens)
            status = na_sm90_map_extra(p, roles[2][i], data[roles[2][i]],
                                       na_sm90_visitors(&pass->config), 1, &arguments->extra[i]);
    }
    return status;
}

static float *bias_parts(const state *s, const natten_run *run)
{
    return (float *)((char *)run->workspace + s->pair_bytes);
}

static natten_status run_bias(const natten_plan *plan, const natten_run *run)
{
    const state *s = plan->state;
    na_sm90_bias_end arguments = s->bias_arguments;
    arguments.parts = bias_parts(s, run);
    arguments.d_bias = run->data[NATTEN_D_RPB];
    return na_launch_run(&s->bias, run->stream, &arguments);
}

static natten_status run_pass(const natten_plan *plan, const natten_run *run, const pass *pass,
                              int batch, int *counter)
{
    const natten_problem *p = &plan->problem;
    const state *s = plan->state;
    na_sm90_backward arguments = pass->arguments;
    na_sm90_boxes boxes = {.flat = arguments.walk.flat, .heads = 1};
    char *data[NATTEN_ROLES];
    float *pairs =
        (float *)run->workspace + (int64_t)(s->pair_bytes / sizeof(float)) / p->batch * batch;
    na_sm90_addresses(p, run, batch, data);
    for (int a = 0; a < 3; a++) {
        boxes.box[a] = pass->config.tile[a];
        boxes.step[a] = pass->of_extra ? 1 : (int)p->axis[a].dilation;
    }
    arguments.pair = pairs;
    arguments.walk.counter = counter;
    arguments.bias.entries = run->data[NATTEN_RPB];
    arguments.bias_sums.parts =
        bias_parts(s, run) + (int64_t)(s->bias_bytes / sizeof(float)) / s->batches * batch;
    arguments.out[0] = data[pass->of_extra                       ? NATTEN_D_ADDITIONAL_KEY
                            : pass->config.what == NA_SM90_D_KEY ? NATTEN_D_KEY
                                                                 : NATTEN_D_QUERY];
    arguments.out[1] = data[pass->of_extra ? NATTEN_D_ADDITIONAL_VALUE : NATTEN_D_VALUE];
    natten_status status = map_residents(plan, pass, data, &boxes, &arguments);
    if (status == NATTEN_OK && pass->config.what == NA_SM90_D_KEY)
        status = na_sm90_map_pairs(p, &boxes, pairs, &arguments.pairs);
    return status == NATTEN_OK ? na_launch_run(&pass->launch, run->stream, &arguments) : status;
}

static natten_status run_delta(const natten_plan *plan, const natten_run *run)
{
    const state *s = plan->state;
    na_sm90_delta arguments = s->delta_arguments;
    arguments.out = run->data[NATTEN_OUT];
    arguments.d_out = run->data[NATTEN_D_OUT];
    arguments.lse = run->data[NATTEN_LSE];
    arguments.d_lse = na_has(&plan->problem, NATTEN_D_LSE) ? run->data[NATTEN_D_LSE] : NULL;
    arguments.pairs = run->workspace;
    return na_launch_run(&s->delta, run->stream, &arguments);
}

static natten_status run_all(const natten_plan *plan, const natten_run *run)
{
    const char *why;
    const na_driver *cuda = na_driver_find(&why);
    const state *s = plan->state;
    /* Items in which there is nothing leave their parts of the bias' gradient as they are. */
    float *parts = bias_parts(s, run);
    int *counter = (int *)((char *)parts + s->bias_bytes);
    size_t words = (plan->workspace - s->pair_bytes) / sizeof(int);
    natten_status status =
        na_driver_check(cuda->cuMemsetD32Async((uint64_t)(uintptr_t)parts, 0, words, run->stream),
                        "cuMemsetD32Async");
    if (status == NATTEN_OK)
        status = run_delta(plan, run);
    for (int i = 0; i < s->count; i++)
        for (int batch = 0; status == NATTEN_OK && batch < s->batches; batch++)
            status = run_pass(plan, run, &s->passes[i], batch, counter++);
    return status == NATTEN_OK && s->bias.function ? run_bias(plan, run) : status;
}

static natten_status run_backward(const natten_plan *plan, const natten_run *run)
{
    na_context context;
    if (!na_sm90_is_aligned(&plan->problem, run))
        return na_sm90_run_unaligned(plan, run);
    if (!run->workspace || (uintptr_t)run->workspace % 16)
        return na_fail(NATTEN_ERROR_ARGUMENT,
                       "The run needs %zu bytes of workspace at a multiple of 16, got %p.",
                       plan->workspace, run->workspace);
    natten_status status = na_context_enter((int)plan->problem.device_index, &context);
    if (status != NATTEN_OK)
        return status;
    status = run_all(plan, run);
    na_context_leave(context);
    return status;
}
