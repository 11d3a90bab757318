/* SPDX-License-Identifier: MIT
 * The forward in bfloat16 for processors with AMX: dense products of small boxes of queries with
 * all keys that some of them see. NA_ISA_HEADER names the words, NA_KERNELS the table. */
#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "cpu/choices.h"
#include "cpu/cpuid.h"
#include "cpu/kernels.h"
#include "cpu/queue.h"
#include "cpu/scratch.h"
#include "cpu/simd.h"
#include "cpu/strips.h"
#include "cpu/threads.h"

#include "cpu/ahead_tmpl.h"
#include "cpu/pack_tmpl.h"
#include "cpu/math_tmpl.h"
#include "cpu/amx_pack_tmpl.h"
#include "cpu/amx_box_tmpl.h"

/* Below this share of products that count, the kernels that compute no others are faster. */
static const double least_useful = 0.3;

/* Most bytes of a worker. */
static const size_t most_bytes = (size_t)64 << 20;

/* Parts begin at different places of the cache's sets. */
static size_t part_bytes(int64_t bytes) { return (size_t)(bytes + 64 + 4095) / 4096 * 4096 + 192; }

/* Lays a worker's memory out from `base`; returns the bytes it takes. */
static size_t worker_layout(const amx_state *s, amx_worker *w, char *base)
{
    const int64_t bytes[] = {s->strips.keys * s->padded * 2, s->strips.keys * s->padded_out * 2,
                             (int64_t)NA_BOX * SCORE_ROW, NA_BOX * sum_row(s) * 4,
                             NA_BOX * query_row_bytes(s)};
    uintptr_t part[5], at = (uintptr_t)base;
    for (int i = 0; i < 5; i++) {
        part[i] = at;
        at += part_bytes(bytes[i]);
    }
    w->key = (char *)part[0];
    w->value = (char *)part[1];
    w->score = (char *)part[2];
    w->sum = (float *)part[3];
    w->query = (uint16_t *)part[4];
    return at - (uintptr_t)base;
}

/* Does a box; `next`: which one follows in w->next. */
enum { NONE, SAME_SECTION, OTHER_SECTION };

static void work_on_box(amx_worker *w, int next)
{
    const amx_state *s = w->run->state;
    const int chunks = (w->box.mask->blocks + CHUNK - 1) / CHUNK;
    pack_box(w);
    find_queries(w);
    ahead_clear(&w->ahead);
    if (next != NONE)
        look_ahead(w, next == SAME_SECTION, (int64_t)s->group * chunks * NA_BOX);
    for (int head = 0; head < s->group; head++)
        attend(w, head);
}

/* A natten_task. */
static void work(void *context, int64_t worker)
{
    const amx_run *run = context;
    const na_strips *s = &run->state->strips;
    amx_worker w = {.run = run};
    worker_layout(run->state, &w, run->scratch + (size_t)worker * run->state->worker_bytes);
    tile_begin();
    for (na_turn turn = na_turn_of(run->queues, worker); na_turn_next(&turn);) {
        const int64_t ahead = na_turn_ahead(&turn);
        na_box_at(s, turn.task, 0, &w.box);
        begin_section(&w);
        for (int n = 1, next = SAME_SECTION; next == SAME_SECTION; n++, w.box = w.next) {
            if (!na_box_at(s, turn.task, n, &w.next))
                next = ahead >= 0 && na_box_at(s, ahead, 0, &w.next) ? OTHER_SECTION : NONE;
            work_on_box(&w, next);
        }
    }
    tile_end();
    vec_fence();
}

/* True if every token's result is whole cache lines: it can then be written past the caches. */
static int streams(const amx_state *s, const tensor *t)
{
    uint64_t all = (uint64_t)(uintptr_t)t->data | (uint64_t)t->batch | (uint64_t)t->head;
    for (int a = 0; a < 3; a++)
        all |= (uint64_t)t->axis[a];
    return s->channels % STEP == 0 && all % 64 == 0;
}

static natten_status run_plan(const natten_plan *plan, const natten_run *addresses)
{
    const amx_state *s = plan->state;
    const natten_problem *p = &plan->merged;
    amx_run run = {.state = s, .kv_heads = p->kv_heads};
    run.query = tensor_of(p, addresses, NATTEN_QUERY);
    run.key = tensor_of(p, addresses, NATTEN_KEY);
    run.value = tensor_of(p, addresses, NATTEN_VALUE);
    run.out = tensor_of(p, addresses, NATTEN_OUT);
    run.lse = tensor_of(p, addresses, NATTEN_LSE);
    run.scale = (float)(fabs(p->scale) * LOG2_E);
    run.sign = p->scale < 0 ? 0x80008000 : 0;
    run.stream = streams(s, &run.out);
    const int64_t tasks = s->strips.strips * s->heads;
    const int64_t workers = na_workers(addresses, tasks);
    const size_t queues = na_queues_bytes(workers);
    char *scratch = na_scratch_take(queues + (size_t)workers * s->worker_bytes);
    if (!scratch)
        return na_fail(NATTEN_ERROR_MEMORY, "No memory for the scratch of a forward run.");
    run.queues = (na_queues *)(void *)scratch;
    run.scratch = scratch + queues;
    na_parallel_tasks(addresses, run.queues, workers, tasks, work, &run);
    na_scratch_give(scratch);
    return NATTEN_OK;
}

static void destroy(void *state)
{
    amx_state *s = state;
    na_strips_free(&s->strips);
    free(s);
}

static int padded_to_tiles(int channels) { return (channels + STEP - 1) / STEP * STEP; }

static void set_channels(amx_state *s, const natten_problem *p)
{
    s->group = (int)(p->heads / p->kv_heads);
    s->heads = p->batch * p->kv_heads;
    s->depth = (int)p->head_dim;
    s->channels = (int)p->value_dim;
    s->padded = padded_to_tiles(s->depth);
    s->padded_out = padded_to_tiles(s->channels);
}

/* Makes the tables, if memory suffices. */
static natten_status make_tables(natten_plan *plan, amx_state *s, const na_box_cut *cut)
{
    amx_worker w;
    const int made =
        na_strips_make(&s->strips, &plan->merged, cut, s->heads, 2 * (s->padded + s->padded_out));
    if (made == NA_STRIPS_NO_MEMORY)
        return na_fail(NATTEN_ERROR_MEMORY, "No memory to make a plan.");
    if (made == NA_STRIPS_TOO_LARGE)
        return na_refuse(plan, "tables too large");
    s->worker_bytes = worker_layout(s, &w, NULL);
    if (s->worker_bytes <= most_bytes)
        return NATTEN_OK;
    return na_refuse(plan, "a thread would need %zu MiB for packed keys", s->worker_bytes >> 20);
}

/* Whether dense blocks are worth it. That is a question to the first cut, so that the choice of
 * another one is never another kernel's. */
static natten_status judge(natten_plan *plan, const amx_state *s)
{
    const double channels = (s->depth + s->channels) / (double)(s->padded + s->padded_out);
    const double useful = na_strips_useful(&s->strips) * channels;
    if (useful < least_useful)
        return na_refuse(plan, "only %.0f %% of the products of dense blocks would count",
                         100 * useful);
    na_refuse(plan, "%.0f %% of the products of dense blocks count", 100 * useful);
    return NATTEN_OK;
}

static natten_status make_state(natten_plan *plan, amx_state *s)
{
    na_box_cut cuts[NA_BOX_CUTS];
    const int count = na_box_cuts(&plan->merged, cuts);
    set_channels(s, &plan->merged);
    natten_status status = make_tables(plan, s, &cuts[0]);
    if (status == NATTEN_OK)
        status = judge(plan, s);
    if (status != NATTEN_OK)
        return status;
    const int cut = na_choose_cut(plan, count);
    if (cut) {
        na_strips_free(&s->strips);
        status = make_tables(plan, s, &cuts[cut]);
    }
    const int32_t *queries = cuts[cut].queries;
    na_describe_choice(plan, "boxes of %dx%dx%d", queries[0], queries[1], queries[2]);
    return status;
}

static natten_status plan_forward(natten_plan *plan)
{
    const natten_problem *p = &plan->merged;
    if (p->head_dim > MOST_CHANNELS || p->value_dim > MOST_CHANNELS)
        return na_refuse(plan, "more than %d channels", MOST_CHANNELS);
    amx_state *s = calloc(1, sizeof *s);
    if (!s)
        return na_fail(NATTEN_ERROR_MEMORY, "No memory to make a plan.");
    const natten_status status = make_state(plan, s);
    if (status != NATTEN_OK) {
        destroy(s);
        return status;
    }
    plan->state = s;
    plan->destroy = destroy;
    plan->run = run_plan;
    return NATTEN_OK;
}

const na_cpu_kernels NA_KERNELS = {{[NATTEN_FORWARD] = plan_forward}};
