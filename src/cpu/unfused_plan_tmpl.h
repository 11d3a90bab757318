/* SPDX-License-Identifier: MIT
 * Unfused ops: what a run of each scores, gathers and scatters, their memory, and plans.
 * Parameters: the texts kernels.c includes before this one. */

/* What a plan keeps. */
typedef struct unfused_state {
    na_geometry *score, *gather; /* NULL: no use for it; gather: of scatter too */
} unfused_state;

static void unfused_destroy(void *state)
{
    unfused_state *s = state;
    na_geometry_free(s->score);
    na_geometry_free(s->gather);
    free(s);
}

static int64_t slots_of(const natten_problem *p)
{
    return na_window_size(p) + p->additional_tokens;
}

/* The part of an op that scores or gathers; 0: there is none. */
static int unfused_of(const natten_plan *plan, const natten_run *run, unfused *u)
{
    static const natten_role query[NATTEN_OPS] = {[NATTEN_QK] = NATTEN_QUERY,
                                                  [NATTEN_QK_BACKWARD] = NATTEN_D_QUERY,
                                                  [NATTEN_AV] = NATTEN_OUT,
                                                  [NATTEN_AV_BACKWARD] = NATTEN_D_OUT};
    static const natten_role attn[NATTEN_OPS] = {[NATTEN_QK] = NATTEN_ATTN,
                                                 [NATTEN_QK_BACKWARD] = NATTEN_D_ATTN,
                                                 [NATTEN_AV] = NATTEN_ATTN,
                                                 [NATTEN_AV_BACKWARD] = NATTEN_D_ATTN};
    const natten_problem *p = &plan->merged;
    const unfused_state *state = plan->state;
    const int keys = p->op == NATTEN_QK || p->op == NATTEN_QK_BACKWARD;
    const int scores = p->op == NATTEN_QK || p->op == NATTEN_AV_BACKWARD;
    *u = (unfused){.problem = p, .geometry = scores ? state->score : state->gather};
    if (!na_has(p, query[p->op]) || !na_has(p, attn[p->op]))
        return 0;
    u->query = packed_of(p, run, query[p->op], u->geometry);
    u->attn = tensor_of(p, run, attn[p->op]);
    u->key = packed_of(p, run, keys ? NATTEN_KEY : NATTEN_VALUE, u->geometry);
    u->more = tensor_of(p, run, keys ? NATTEN_ADDITIONAL_KEY : NATTEN_ADDITIONAL_VALUE);
    u->depth = (int)(keys ? p->head_dim : p->value_dim);
    u->terms = u->depth;
    if (p->op == NATTEN_QK) {
        u->key_bias = tensor_of(p, run, NATTEN_KEY_BIAS);
        u->terms += u->key_bias.data != NULL;
    }
    u->slots = slots_of(p);
    u->factor = keys ? (real)p->scale : 1;
    u->forbidden = p->op == NATTEN_QK ? (real)-INFINITY : 0;
    u->slot_step = u->geometry->apart * padded(u->depth);
    if (scores) {
        /* An odd number of cache lines: channels a power of two apart would share few sets. */
        const int64_t line = 64 / (int64_t)sizeof(real);
        u->key_depth = (u->geometry->width + line - 1) / line * line;
        u->key_depth += u->key_depth / line % 2 ? 0 : line;
        u->slot_step = u->key_depth * u->terms;
    }
    u->stream = !scores && tensor_streams(&u->query, u->depth);
    pieces worker = {NULL, 0};
    (void)(scores ? score_worker(u, &worker) : gather_worker(u, &worker));
    u->bytes = worker.used;
    u->workers = na_workers(run, u->geometry->tasks);
    return 1;
}

/* The part of an op that scatters; 0: there is none. */
static int scattered_of(const natten_plan *plan, const natten_run *run, scattered *s)
{
    const natten_problem *p = &plan->merged;
    const unfused_state *state = plan->state;
    const int keys = p->op == NATTEN_QK_BACKWARD;
    const natten_role key = keys ? NATTEN_D_KEY : NATTEN_D_VALUE;
    const natten_role more = keys ? NATTEN_D_ADDITIONAL_KEY : NATTEN_D_ADDITIONAL_VALUE;
    *s = (scattered){.problem = p, .geometry = state->gather};
    if (!keys && p->op != NATTEN_AV_BACKWARD)
        return 0;
    s->boxes = make_boxes(s->geometry, p);
    s->query = packed_of(p, run, keys ? NATTEN_QUERY : NATTEN_D_OUT, s->geometry);
    s->attn = tensor_of(p, run, keys ? NATTEN_D_ATTN : NATTEN_ATTN);
    s->key = tensor_of(p, run, key);
    s->more = tensor_of(p, run, more);
    s->bias = tensor_of(p, run, NATTEN_D_RPB);
    s->depth = (int)(keys ? p->head_dim : p->value_dim);
    s->slots = slots_of(p);
    s->factor = keys ? (real)p->scale : 1;
    s->stream = s->key.data && stored_size(s->key.dtype) == sizeof(real) &&
                tensor_streams(&s->key, s->depth);
    s->pairs = p->batch * p->kv_heads;
    s->pair_tasks = s->geometry->tasks / s->pairs;
    s->more_sums = s->more.data ? p->additional_tokens * padded(s->depth) : 0;
    s->bias_head = na_bias_entries(p);
    s->bias_sums = s->bias_head * s->geometry->group;
    s->shares = make_shares(s);
    pieces worker = {NULL, 0};
    scatter_worker_of(s, &worker);
    s->bytes = worker.used;
    const int64_t units = box_units(s) + share_units(s);
    s->workers = na_workers(run, units);
    return units > 0;
}

/* A run: what it scores or gathers, then what it scatters. */
typedef struct unfused_parts {
    unfused u;
    scattered s;
    int moves, scatters; /* 1: there is such a part */
    int64_t bias_reals;
    real *bias, *room;
} unfused_parts;

/* Lays the run's memory out; returns the bytes it takes. */
static size_t unfused_layout(unfused_parts *x, char *memory)
{
    pieces all = {memory, 0};
    const size_t moving = x->moves ? (size_t)x->u.workers * x->u.bytes : 0;
    const size_t scattering = x->scatters ? (size_t)x->s.workers * x->s.bytes : 0;
    x->bias = piece(&all, x->bias_reals, sizeof(real));
    x->s.sums =
        piece(&all, share_units(&x->s) * (x->s.more_sums + x->s.bias_sums), sizeof *x->s.sums);
    x->room = piece(&all, padded(x->s.depth) + VL, sizeof(real));
    x->u.queues = piece(&all, 1, na_queues_bytes(x->u.workers));
    x->s.queues = piece(&all, 1, na_queues_bytes(x->s.workers));
    x->u.memory = x->s.memory = piece(&all, 1, moving > scattering ? moving : scattering);
    return all.used;
}

static natten_status unfused_run(const natten_plan *plan, const natten_run *run)
{
    const natten_problem *p = &plan->merged;
    const tensor rpb = tensor_of(p, run, NATTEN_RPB);
    unfused_parts x = {.bias_reals = rpb.data ? p->heads * na_bias_entries(p) + VL : 0};
    x.moves = unfused_of(plan, run, &x.u);
    x.scatters = scattered_of(plan, run, &x.s);
    char *memory = na_scratch_take(unfused_layout(&x, NULL));
    if (!memory)
        return na_fail(NATTEN_ERROR_MEMORY, "No memory for a run of %s.", plan->kernel->name);
    unfused_layout(&x, memory);
    if (rpb.data) {
        bias_pack(p, &rpb, 1, x.bias);
        x.u.bias = x.bias;
        x.u.bias_head = na_bias_entries(p);
    }
    if (x.moves)
        na_parallel_tasks(run, x.u.queues, x.u.workers, x.u.geometry->tasks,
                          x.u.key_depth ? score_task : gather_task, &x.u);
    if (x.scatters)
        na_parallel_tasks(run, x.s.queues, x.s.workers, box_units(&x.s) + share_units(&x.s),
                          scatter_task, &x.s);
    if (x.s.more_sums)
        store_more(&x.s, x.room);
    if (x.s.bias_sums)
        store_bias(&x.s, x.room);
    na_scratch_give(memory);
    return NATTEN_OK;
}

/* Rows of a score tile: more share a loaded key, but all their scores should stay in the
 * second-level cache; small windows want them in the first. */
static int score_rows(const natten_problem *p)
{
    const int64_t slots = slots_of(p), row = slots * VL * (int64_t)sizeof(real);
    if (slots <= 64)
        return few_rows(p);
    return ROWS_MAX * row > 448 << 10 ? na_min(SHIFT_ROWS, 4) : SHIFT_ROWS;
}

static natten_status unfused_plan(natten_plan *plan)
{
    const natten_problem *p = &plan->merged;
    const int scores = p->op == NATTEN_QK || p->op == NATTEN_AV_BACKWARD;
    unfused_state *state = calloc(1, sizeof *state);
    if (state && scores)
        state->score = na_choose(plan, VL, HALF, na_usual_cut(score_rows(p)), ROWS_MAX);
    if (state && state->score && p->op == NATTEN_AV_BACKWARD) {
        na_cut cut = state->score->cut;
        cut.rows = cut.rows == score_rows(p) ? AGGREGATE_ROWS : na_min(cut.rows, AGGREGATE_ROWS);
        state->gather = na_geometry_make(p, VL, HALF, cut);
    } else if (state && !scores) {
        state->gather = na_choose(plan, VL, HALF, na_usual_cut(AGGREGATE_ROWS), AGGREGATE_ROWS);
    }
    if (!state || (scores && !state->score) || (p->op != NATTEN_QK && !state->gather)) {
        if (state)
            unfused_destroy(state);
        return na_fail(NATTEN_ERROR_MEMORY, "No memory to plan %s.", plan->kernel->name);
    }
    plan->state = state;
    plan->destroy = unfused_destroy;
    plan->run = unfused_run;
    return NATTEN_OK;
}
