/* SPDX-License-Identifier: MIT
 * Runs the plans of sm90_backward.c. */
#include <string.h>

#include "core/problem.h"
#include "cuda/driver.h"
#include "cuda/sm90_backward.h"

/* ----------------------------------------------------------------------------------------------
 * sizes */

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

int na_sm90_pass_arguments(const natten_problem *p, int flat, const na_sm90_pass *pass,
                           na_sm90_backward *arguments)
{
    int of_keys = na_sm90_is_of_keys(pass->config.what);
    const natten_problem seen = pass->of_extra ? extra_problem(p) : *p;
    int fits = na_sm90_walk_of(&seen, &pass->config, flat, &arguments->walk);
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

natten_problem na_sm90_pass_problem(const natten_problem *turn, const na_sm90_pass *pass)
{
    return pass->of_extra ? *turn : na_sm90_largest_part(turn);
}

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

natten_problem na_sm90_turn(const natten_problem *problem, const na_sm90_back *back, int64_t batch,
                            int64_t kv_head)
{
    natten_problem p = *problem;
    p.batch = least(back->batches, problem->batch - batch);
    p.kv_heads = least(back->kv_heads, problem->kv_heads - kv_head);
    p.heads = problem->heads / problem->kv_heads * p.kv_heads;
    return p;
}

int64_t na_sm90_query_tokens(const natten_problem *p)
{
    return p->axis[0].query_extent * p->axis[1].query_extent * p->axis[2].query_extent;
}

int64_t na_sm90_sum_count(const natten_problem *p)
{
    int64_t sums = p->heads * p->head_dim;
    for (int a = 0; a < 3; a++)
        sums *= na_sm90_sum_extent((int)p->axis[a].query_extent, (int)p->axis[a].dilation);
    return sums;
}

int64_t na_sm90_share_count(const natten_problem *turn, const na_sm90_back *back)
{
    const na_sm90_bias_end *end = &back->bias_arguments;
    return turn->heads * end->parts_of_head * end->entries;
}

/* ----------------------------------------------------------------------------------------------
 * turns */

/* A turn, or a part of it: its problem, and addresses that begin with it. */
typedef struct turn {
    const na_sm90_back *back;
    natten_problem problem;
    natten_run run;
    float *pairs, *sums, *shares;
    int *counters, launches; /* of a pass over a part */
} turn;

static int is_of_queries(int role)
{
    return role == NATTEN_QUERY || role == NATTEN_OUT || role == NATTEN_LSE || role == NATTEN_RPB ||
           role == NATTEN_D_QUERY || role == NATTEN_D_OUT || role == NATTEN_D_LSE ||
           role == NATTEN_D_RPB;
}

static void shift(natten_run *run, const natten_problem *p, int role, int64_t elements)
{
    if (run->data[role])
        run->data[role] = (char *)run->data[role] +
                          elements * (int64_t)na_dtype_size(na_role_dtype(p, (natten_role)role));
}

static turn turn_of(const natten_plan *plan, const natten_run *run, int64_t batch, int64_t kv_head)
{
    const natten_problem *p = &plan->problem;
    turn t = {.back = plan->state, .run = *run};
    t.problem = na_sm90_turn(p, t.back, batch, kv_head);
    for (int role = 0; role < NATTEN_ROLES; role++) {
        const natten_layout *layout = &p->layout[role];
        int64_t head = is_of_queries(role) ? kv_head * (p->heads / p->kv_heads) : kv_head;
        shift(&t.run, p, role, batch * layout->batch + head * layout->head);
    }
    t.pairs = run->workspace;
    t.sums = t.pairs + t.back->pair_bytes / sizeof(float);
    t.shares = t.sums + t.back->sum_bytes / sizeof(float);
    t.counters = (int *)(t.shares + t.back->bias_bytes / sizeof(float));
    t.launches = t.back->flat ? 1 : (int)t.problem.batch;
    return t;
}

static turn part_of(const turn *whole, int number)
{
    turn t = *whole;
    int64_t first[NATTEN_ROLES];
    na_sm90_part(&whole->problem, number, &t.problem, first);
    for (int role = 0; role < NATTEN_ROLES; role++)
        shift(&t.run, &t.problem, role, first[role]);
    t.shares += number * t.problem.batch * na_sm90_share_count(&t.problem, t.back);
    t.counters += number * t.back->count * t.launches;
    return t;
}

/* For tensor maps, which have no axes of nothing: parts may be without queries, or keys. */
static natten_problem something_of(const natten_problem *problem)
{
    natten_problem p = *problem;
    for (int a = 0; a < 3; a++) {
        p.axis[a].query_extent += !p.axis[a].query_extent;
        p.axis[a].key_extent += !p.axis[a].key_extent;
    }
    return p;
}

static natten_status map_residents(const natten_problem *p, const na_sm90_pass *pass, char **data,
                                   const na_sm90_boxes *boxes, na_sm90_backward *arguments)
{
    static const natten_role roles[][2] = {{NATTEN_QUERY, NATTEN_D_OUT},
                                           {NATTEN_KEY, NATTEN_VALUE},
                                           {NATTEN_ADDITIONAL_KEY, NATTEN_ADDITIONAL_VALUE}};
    int side = na_sm90_is_of_keys(pass->config.what);
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

/* All parts have as many items as the largest, some of them empty: shares of a bias' gradient lie
 * alike. The last turns have fewer heads, or batches. */
static void even_out(const turn *t, const na_sm90_walk *largest, na_sm90_walk *walk)
{
    const int batches = walk->flat ? (int)t->problem.batch : 1;
    const int first_batches = walk->flat ? (int)t->back->batches : 1;
    walk->items = largest->items / (largest->heads * first_batches) * (walk->heads * batches);
    for (int a = 0; a < 3; a++)
        walk->axis[a].tiles = largest->axis[a].tiles;
}

static natten_status run_pass(const turn *t, const na_sm90_pass *pass, int batch, int *counter)
{
    const natten_problem *p = &t->problem, mapped = something_of(p);
    int of_keys = na_sm90_is_of_keys(pass->config.what);
    int64_t rows = p->heads * na_sm90_query_tokens(p);
    na_sm90_backward arguments = {.scale = 0};
    na_sm90_boxes boxes = {.heads = 1};
    char *data[NATTEN_ROLES];
    na_sm90_pass_arguments(p, t->back->flat, pass, &arguments);
    even_out(t, &pass->largest, &arguments.walk);
    na_sm90_addresses(p, &t->run, batch, data);
    boxes.flat = arguments.walk.flat;
    for (int a = 0; a < 3; a++) {
        boxes.box[a] = pass->config.tile[a];
        boxes.step[a] = pass->of_extra ? 1 : (int)p->axis[a].dilation;
    }
    arguments.pair = t->pairs + batch * rows * NA_SM90_PAIR;
    arguments.walk.counter = counter;
    arguments.bias.entries = t->run.data[NATTEN_RPB];
    arguments.bias_sums.parts = t->shares + batch * na_sm90_share_count(p, t->back);
    arguments.out[0] = data[pass->of_extra ? NATTEN_D_ADDITIONAL_KEY
                            : of_keys      ? NATTEN_D_KEY
                                           : NATTEN_D_QUERY];
    arguments.out[1] = data[pass->of_extra ? NATTEN_D_ADDITIONAL_VALUE : NATTEN_D_VALUE];
    natten_status status = map_residents(&mapped, pass, data, &boxes, &arguments);
    if (status == NATTEN_OK && of_keys)
        status = na_sm90_map_pairs(&mapped, &boxes, (void *)arguments.pair, &arguments.pairs);
    if (status == NATTEN_OK && pass->config.what == NA_SM90_D_ALL)
        status = na_sm90_map_sums(&mapped, &boxes, t->sums + batch * na_sm90_sum_count(p),
                                  &arguments.d_query);
    na_launch launch = pass->launch; /* of the last turns, smaller */
    launch.blocks = least(launch.blocks, arguments.walk.items);
    return status == NATTEN_OK ? na_launch_run(&launch, t->run.stream, &arguments) : status;
}

static natten_status run_delta(const turn *t)
{
    const natten_problem *p = &t->problem;
    na_sm90_delta arguments = {.out = t->run.data[NATTEN_OUT],
                               .d_out = t->run.data[NATTEN_D_OUT],
                               .lse = t->run.data[NATTEN_LSE],
                               .pairs = t->pairs,
                               .out_layout = p->layout[NATTEN_OUT],
                               .d_out_layout = p->layout[NATTEN_D_OUT],
                               .lse_layout = p->layout[NATTEN_LSE],
                               .d_lse_layout = p->layout[NATTEN_D_LSE],
                               .heads = (int)p->heads,
                               .step = (int)p->axis[2].dilation,
                               .rows = (int)(p->batch * p->heads * na_sm90_query_tokens(p))};
    if (na_has(p, NATTEN_D_LSE))
        arguments.d_lse = t->run.data[NATTEN_D_LSE];
    for (int a = 0; a < 3; a++)
        arguments.extent[a] = (int)p->axis[a].query_extent;
    return na_launch_run(&t->back->delta, t->run.stream, &arguments);
}

static natten_status run_convert(const turn *t)
{
    const natten_problem *p = &t->problem;
    na_sm90_convert arguments = {.sums = t->sums,
                                 .d_query = t->run.data[NATTEN_D_QUERY],
                                 .layout = p->layout[NATTEN_D_QUERY],
                                 .heads = (int)p->heads,
                                 .rows = (int)(p->batch * p->heads * na_sm90_query_tokens(p)),
                                 .scale = (float)p->scale};
    for (int a = 0; a < 3; a++) {
        arguments.extent[a] = (int)p->axis[a].query_extent;
        arguments.dilation[a] = (int)p->axis[a].dilation;
    }
    return na_launch_run(&t->back->convert, t->run.stream, &arguments);
}

static natten_status run_bias(const turn *t)
{
    na_sm90_bias_end arguments = t->back->bias_arguments;
    arguments.parts = t->shares;
    arguments.heads = (int)t->problem.heads;
    arguments.batches = (int)t->problem.batch * t->back->parts;
    arguments.d_bias = t->run.data[NATTEN_D_RPB];
    return na_launch_run(&t->back->bias, t->run.stream, &arguments);
}

static natten_status clear(const turn *t, size_t bytes)
{
    const char *why;
    const na_driver *cuda = na_driver_find(&why);
    return na_driver_check(
        cuda->cuMemsetD32Async((uint64_t)(uintptr_t)t->sums, 0, bytes / sizeof(int), t->run.stream),
        "cuMemsetD32Async");
}

/* The passes over a part of the turn, or those of additional tokens over all of it, or both. */
static natten_status run_part(const turn *t, int extra, int others)
{
    natten_status status = run_delta(t);
    for (int i = 0; i < t->back->count; i++) {
        const na_sm90_pass *pass = &t->back->passes[i];
        int batches = (pass->of_extra ? extra : others) ? t->launches : 0;
        for (int batch = 0; status == NATTEN_OK && batch < batches; batch++)
            status = run_pass(t, pass, batch, t->counters + i * t->launches + batch);
    }
    return status == NATTEN_OK && t->back->adds ? run_convert(t) : status;
}

static natten_status run_turn(const turn *t)
{
    const na_sm90_back *back = t->back;
    /* Items in which there is nothing leave their shares of the bias' gradient as they are. */
    natten_status status =
        clear(t, back->sum_bytes + back->bias_bytes +
                     (size_t)(back->parts * back->count * t->launches) * sizeof(int));
    /* Additional tokens' gradients, if any, come from the last pass. */
    if (status == NATTEN_OK && back->parts > 1 && back->passes[back->count - 1].of_extra)
        status = run_part(t, 1, 0);
    for (int i = 0; status == NATTEN_OK && i < back->parts; i++) {
        const turn part = part_of(t, i);
        if (i > 0 && back->adds)
            status = clear(t, back->sum_bytes);
        if (status == NATTEN_OK)
            status = run_part(&part, back->parts == 1, 1);
    }
    return status == NATTEN_OK && back->bias.function ? run_bias(t) : status;
}

natten_status na_sm90_run_backward(const natten_plan *plan, const natten_run *run)
{
    const na_sm90_back *back = plan->state;
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
    for (int64_t batch = 0; batch < plan->problem.batch; batch += back->batches)
        for (int64_t head = 0; status == NATTEN_OK && head < plan->problem.kv_heads;
             head += back->kv_heads) {
            const turn t = turn_of(plan, run, batch, head);
            status = run_turn(&t);
        }
    na_context_leave(context);
    return status;
}
