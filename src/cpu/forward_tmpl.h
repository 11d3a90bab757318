/* SPDX-License-Identifier: MIT
 * Fused forward: out = softmax(scale * query . key + rpb) value, tile by tile. Scores of a tile
 * stay in the caches; softmax runs down the lanes (the largest score of a lane is a plain maximum),
 * and weights become probabilities in blocks that fit the first-level cache. Windows too large for
 * that are taken in chapters of spans, with sums rescaled in between. Parameters: the texts
 * kernels.c includes before this one. */

/* Bytes of one tile's scores in a chapter, and of a block of weights between power and aggregate.
 */
enum { CHAPTER_BYTES = 448 << 10, BLOCK_BYTES = 16 << 10 };

typedef struct forward_state {
    na_geometry *g;
    int rows;            /* most rows of a tile */
    int depth, channels; /* of keys, of values */
    int64_t key_depth;   /* reals between channels of a transposed slot */
    int64_t slot_step;   /* reals of a transposed slot */
    int64_t value_step;  /* reals of a natural token */
    int64_t score_row;   /* reals of a row's scores */
    int chapter;         /* most keys of a row in a chapter */
    int64_t bias_head;   /* reals of a head's bias */
    size_t worker_bytes;
} forward_state;

/* What all workers share. */
typedef struct forward_run {
    const forward_state *state;
    const natten_problem *problem;
    int64_t workers;
    tensor query, key, value, out, lse, more_key, more_value;
    const real *bias; /* times log2(e), NULL: none */
    char *scratch;
    int direct, stream;
} forward_run;

/* Tokens that the next task will pack, fetched bit by bit during this one, and the next tile's
 * queries: much of a small window's time would otherwise go into waiting for them. */
enum { AHEAD_ROWS = 64 };
typedef struct forward_ahead {
    const char *key[AHEAD_ROWS], *value[AHEAD_ROWS]; /* the next token of each row */
    int left[AHEAD_ROWS];                            /* tokens of each row */
    int rows, row;                                   /* row: the first one not fetched */
    int64_t tokens;                                  /* of all rows */
    int quota;                                       /* tokens to be fetched with each span */
    const char *query[ROWS_MAX];                     /* rows of the next tile */
    int query_rows, query_count, query_next, query_quota;
} forward_ahead;

/* One worker's memory. */
typedef struct forward_worker {
    const forward_run *run;
    na_work work, next; /* next: what `ahead` is for */
    forward_ahead ahead;
    real *key, *value, *query, *score, *sum, *room;
    int64_t *tags;        /* of slots; the last one of the additional tokens */
    na_key_row *key_rows; /* of this task, then of the next */
    na_span *spans;
    int key_row_count;
} forward_worker;

/* One tile on its way. */
typedef struct forward_tile {
    forward_worker *w;
    const na_lanes *lanes; /* of row 0: count and half are those of all rows */
    int tile, rows, width, span_count;
    real *at[ROWS_MAX]; /* where each row stands in its scores */
    real top[ROWS_MAX * VL] __attribute__((aligned(64)));
    real low[ROWS_MAX * VL] __attribute__((aligned(64)));   /* integer-valued reference */
    real total[ROWS_MAX * VL] __attribute__((aligned(64))); /* of the weights */
    real factor[ROWS_MAX * VL] __attribute__((aligned(64)));
    int32_t limits[NA_ROWS][NA_LANES];
} forward_tile;

static size_t aligned_bytes(size_t bytes) { return (bytes + 127) / 64 * 64; }

/* Lays a worker's memory out from `base`; returns the bytes it takes. */
static size_t forward_layout(const forward_state *s, forward_worker *w, char *base)
{
    const na_geometry *g = s->g;
    const size_t reals[] = {(size_t)(g->slots * s->slot_step + 2 * VL),
                            (size_t)(g->slots * g->width * s->value_step),
                            (size_t)s->rows * s->depth * VL,
                            (size_t)s->rows * s->score_row,
                            (size_t)s->rows * VL * s->value_step,
                            (size_t)s->depth * KEYS_MAX * VL};
    real **const part[] = {&w->key, &w->value, &w->query, &w->score, &w->sum, &w->room};
    size_t at = 0;
    for (int i = 0; i < 6; i++) {
        *part[i] = (real *)((uintptr_t)base + at);
        at += aligned_bytes(reals[i] * sizeof(real));
    }
    w->tags = (int64_t *)((uintptr_t)base + at);
    at += aligned_bytes((size_t)(g->additional_slot + 1) * sizeof *w->tags);
    w->key_rows = (na_key_row *)((uintptr_t)base + at);
    at += aligned_bytes(2 * (size_t)g->key_rows * sizeof *w->key_rows);
    w->spans = (na_span *)((uintptr_t)base + at);
    at += aligned_bytes((size_t)g->spans * sizeof *w->spans);
    return at;
}

/* A na_pack: keys transposed, values natural. */
static void forward_pack(void *context, int64_t slot, int32_t z, int32_t y, const na_part *part)
{
    const forward_worker *w = context;
    const forward_run *run = w->run;
    const forward_state *s = run->state;
    const int64_t b = w->work.batch, h = w->work.kv_head;
    pack_transposed(run->key.dtype, tensor_at(&run->key, b, h, z, y, part->first), run->key.axis[2],
                    part->width, s->depth, 1, w->key + slot * s->slot_step, s->key_depth);
    pack_natural(run->value.dtype, tensor_at(&run->value, b, h, z, y, part->first),
                 run->value.axis[2], part->width, s->channels, 1,
                 w->value + slot * s->g->width * s->value_step, s->value_step);
}

/* A na_pack that packs nothing: remembers what will be packed. */
static void forward_look(void *context, int64_t slot, int32_t z, int32_t y, const na_part *part)
{
    forward_worker *w = context;
    forward_ahead *ahead = &w->ahead;
    const tensor *k = &w->run->key, *v = &w->run->value;
    (void)slot;
    if (ahead->rows == AHEAD_ROWS)
        return;
    ahead->key[ahead->rows] = tensor_at(k, w->next.batch, w->next.kv_head, z, y, part->first);
    ahead->value[ahead->rows] = tensor_at(v, w->next.batch, w->next.kv_head, z, y, part->first);
    ahead->left[ahead->rows++] = part->width;
    ahead->tokens += part->width;
}

static inline void fetch(const char *p, int64_t bytes)
{
    for (int64_t i = 0; i < bytes; i += 64)
        __builtin_prefetch(p + i, 0, 2);
}

/* Fetches a span's share of the next task's tokens. */
static void forward_fetch(forward_worker *w)
{
    forward_ahead *ahead = &w->ahead;
    const tensor *k = &w->run->key, *v = &w->run->value;
    const int64_t key_bytes = (int64_t)w->run->state->depth * stored_size(k->dtype);
    const int64_t value_bytes = (int64_t)w->run->state->channels * stored_size(v->dtype);
    for (int n = 0; n < ahead->quota && ahead->row < ahead->rows; n++) {
        const int row = ahead->row;
        fetch(ahead->key[row], key_bytes);
        fetch(ahead->value[row], value_bytes);
        ahead->key[row] += k->axis[2];
        ahead->value[row] += v->axis[2];
        ahead->row += --ahead->left[row] == 0;
    }
    const tensor *q = &w->run->query;
    const int lanes = ahead->query_count;
    for (int n = 0; n < ahead->query_quota && ahead->query_next < ahead->query_rows * lanes; n++) {
        const int row = ahead->query_next / lanes, lane = ahead->query_next % lanes;
        fetch(ahead->query[row] + lane * q->axis[2],
              (int64_t)w->run->state->depth * stored_size(q->dtype));
        ahead->query_next++;
    }
}

/* Additional tokens are packed when the batch or the head changes. */
static void forward_pack_more(forward_worker *w)
{
    const forward_run *run = w->run;
    const forward_state *s = run->state;
    const na_geometry *g = s->g;
    const int64_t tag = w->work.batch * g->kv_heads + w->work.kv_head;
    if (w->tags[g->additional_slot] == tag)
        return;
    w->tags[g->additional_slot] = tag;
    for (int64_t n = 0, slot = g->additional_slot; n < g->additional; n += g->width, slot++) {
        const int64_t left = g->additional - n;
        const int tokens = left < g->width ? (int)left : g->width;
        const tensor *k = &run->more_key, *v = &run->more_value;
        pack_transposed(
            k->dtype, tensor_at(k, w->work.batch, w->work.kv_head, 0, 0, 0) + n * k->axis[0],
            k->axis[0], tokens, s->depth, 1, w->key + slot * s->slot_step, s->key_depth);
        pack_natural(v->dtype,
                     tensor_at(v, w->work.batch, w->work.kv_head, 0, 0, 0) + n * v->axis[0],
                     v->axis[0], tokens, s->channels, 1, w->value + slot * g->width * s->value_step,
                     s->value_step);
    }
}

/* The first lane of row r of a tile in a tensor of queries. */
static char *query_row(const na_geometry *g, const na_work *work, int tile, int r,
                       const tensor *tensor)
{
    return tensor_at(tensor, work->batch, work->head + r % work->heads, work->z,
                     na_work_query(g, work, r), na_work_lanes(g, work, tile, r)->query);
}

static char *forward_row(const forward_tile *t, const tensor *tensor, int r)
{
    return query_row(t->w->run->state->g, &t->w->work, t->tile, r, tensor);
}

/* Has the queries of the tile after this one fetched: of this task, or of the next. */
static void forward_next_queries(forward_worker *w, int tile, int spans)
{
    const na_geometry *g = w->run->state->g;
    const int same = !g->across && tile + 1 < g->part[w->work.part].end;
    const na_work *work = same ? &w->work : &w->next;
    forward_ahead *ahead = &w->ahead;
    ahead->query_rows = ahead->query_next = 0;
    if (!work->block)
        return;
    const int next = same ? tile + 1 : g->part[work->part].tile;
    ahead->query_count = na_work_lanes(g, work, next, 0)->count;
    ahead->query_rows = work->rows;
    ahead->query_quota = (work->rows * ahead->query_count + spans - 1) / spans;
    for (int r = 0; r < work->rows; r++)
        ahead->query[r] = query_row(g, work, next, r, &w->run->query);
}

static void forward_begin(forward_tile *t)
{
    const forward_worker *w = t->w;
    const forward_run *run = w->run;
    const forward_state *s = run->state;
    const int64_t step = (int64_t)s->depth * VL;
    for (int r = 0; r < t->rows; r++) {
        pack_transposed(run->query.dtype, forward_row(t, &run->query, r), run->query.axis[2],
                        t->lanes->count, s->depth, (real)(run->problem->scale * LOG2_E),
                        w->query + r * step, VL);
        vec_store(t->top + r * VL, vec_set1((real)-INFINITY));
        vec_store(t->low + r * VL, vec_set1((real)-INFINITY));
        vec_store(t->total + r * VL, vec_zero());
    }
}

/* Sets the scores of a span to the bias. */
static void forward_bias(const forward_tile *t, const na_span *span)
{
    const forward_run *run = t->w->run;
    const na_geometry *g = run->state->g;
    const na_work *work = &t->w->work;
    for (int r = span->lo; r < span->hi; r++) {
        const real *bias = run->bias + (work->head + r % work->heads) * run->state->bias_head;
        bias_set(na_work_lanes(g, work, t->tile, r), bias + bias_entry(g, work, span, r), span->len,
                 t->width, t->at[r]);
    }
}

/* Scores of a chapter's spans. */
static void forward_score(forward_tile *t, const na_span *spans, int count)
{
    const forward_worker *w = t->w;
    const forward_state *s = w->run->state;
    const scoring scoring = {.query = w->query,
                             .key = w->key,
                             .slot_step = s->slot_step,
                             .key_depth = s->key_depth,
                             .depth = s->depth,
                             .half = t->lanes->half,
                             .top = t->top,
                             .room = w->room};
    for (int r = 0; r < t->rows; r++)
        t->at[r] = w->score + r * s->score_row;
    for (const na_span *span = spans; span < spans + count; span++) {
        const int biased = w->run->bias && span->z >= 0;
        forward_fetch(t->w);
        if (biased)
            forward_bias(t, span);
        correlate_span(&scoring, span, t->at, biased);
        for (int r = span->lo; r < span->hi; r++)
            t->at[r] += span->len * t->width;
    }
    for (int r = 0; r < t->rows; r++)
        t->at[r] = w->score + r * s->score_row;
}

/* The new reference of each row; sums of earlier chapters are brought down to it. */
static void forward_rescale(forward_tile *t, int first)
{
    const int64_t step = t->w->run->state->value_step;
    for (int r = 0; r < t->rows; r++) {
        vec top = vec_load(t->top + r * VL), before = vec_load(t->low + r * VL);
#ifdef HALF_WORDS
        if (t->lanes->half)
            top = half_twice(top);
#endif
        top = vec_ceil(top);
        vec_store(t->low + r * VL, top);
        if (first)
            continue;
        real shrink[VL] __attribute__((aligned(64)));
        const vec factor = power(before, reference_of(top));
        vec_store(shrink, factor);
        vec_store(t->total + r * VL, vec_mul(vec_load(t->total + r * VL), factor));
        for (int l = 0; l < t->lanes->count; l++) {
            real *sum = t->w->sum + (l * t->rows + r) * step;
            for (int c = 0; c < step; c += VL)
                vec_store(sum + c, vec_mul(vec_load(sum + c), vec_set1(shrink[l])));
        }
    }
}

/* Scores to weights, in place: `reals` scores of row r. In half tiles a row may stand in the middle
 * of a vector. */
static void forward_weigh(forward_tile *t, int r, int64_t reals)
{
    const reference m = reference_of(vec_load(t->low + r * VL));
    vec a = vec_load(t->total + r * VL), b = vec_zero();
    real *p = t->at[r], *const end = p + reals;
    for (; p + 2 * VL <= end; p += 2 * VL) {
        const vec x = power(vec_loadu(p), m), y = power(vec_loadu(p + VL), m);
        vec_storeu(p, x);
        vec_storeu(p + VL, y);
        a = vec_add(a, x);
        b = vec_add(b, y);
    }
    if (p + VL <= end) {
        const vec x = power(vec_loadu(p), m);
        vec_storeu(p, x);
        a = vec_add(a, x);
        p += VL;
    }
    if (HALF && p < end) {
        vec_store_part(p, HALF, power(vec_load_part(p, HALF), m));
        b = vec_add(b, vec_load_part(p, HALF));
    }
    vec_store(t->total + r * VL, vec_add(a, b));
}

/* All weights are added up: the factor that makes them probabilities, and the lse. */
static void forward_finish(forward_tile *t)
{
    const forward_run *run = t->w->run;
    for (int r = 0; r < t->rows; r++) {
        vec total = vec_load(t->total + r * VL);
#ifdef HALF_WORDS
        if (t->lanes->half)
            total = half_fold(total);
#endif
        vec_store(t->factor + r * VL, vec_div(vec_set1(1), total));
        if (!run->lse.data)
            continue;
        real lse[VL] __attribute__((aligned(64)));
        vec_store(lse, vec_fma(vec_load(t->low + r * VL), vec_set1((real)LN_2), logarithm(total)));
        char *to = forward_row(t, &run->lse, r);
        for (int l = 0; l < t->lanes->count; l++, to += run->lse.axis[2])
            memcpy(to, &lse[l], sizeof(real));
    }
}

/* Weights of a chapter times values, in blocks of spans. */
static void forward_aggregate(forward_tile *t, const na_span *spans, int count, int first, int last)
{
    const forward_run *run = t->w->run;
    const forward_state *s = run->state;
    real *out[ROWS_MAX];
    for (int r = 0; r < t->rows && run->direct; r++)
        out[r] = (real *)forward_row(t, &run->out, r);
    for (int from = 0; from < count;) {
        int to = from, keys[ROWS_MAX] = {0};
        int64_t bytes = 0;
        for (; to < count; to++) {
            const na_span *span = &spans[to];
            bytes += (int64_t)(span->hi - span->lo) * span->len * t->width * (int)sizeof(real);
            if (to > from && bytes > BLOCK_BYTES)
                break;
            for (int r = span->lo; r < span->hi; r++)
                keys[r] += span->len;
        }
        for (int r = 0; r < t->rows; r++)
            forward_weigh(t, r, (int64_t)keys[r] * t->width);
        const int end = last && to == count;
        if (end)
            forward_finish(t);
        const aggregation a = {.spans = spans + from,
                               .count = to - from,
                               .lanes = t->lanes->count,
                               .begin = first && from == 0,
                               .end = end,
                               .stream = run->stream,
                               .width = t->width,
                               .weight_lane = 1,
                               .weight = t->at,
                               .value = t->w->value,
                               .value_step = s->value_step,
                               .sum = t->w->sum,
                               .sum_row = s->value_step,
                               .sum_lane = t->rows * s->value_step,
                               .factor = t->factor,
                               .out = run->direct ? out : NULL,
                               .out_lane = run->out.axis[2] / (int)sizeof(real)};
        aggregate_spans(&a, t->rows, s->channels);
        for (int r = 0; r < t->rows; r++)
            t->at[r] += keys[r] * t->width;
        from = to;
    }
}

/* Spans of the next chapter: as many as have room for their scores. */
static int forward_chapter(const forward_tile *t, const na_span *spans, int count)
{
    int keys[ROWS_MAX] = {0}, some = 0;
    for (; some < count; some++)
        for (int r = spans[some].lo; r < spans[some].hi; r++) {
            keys[r] += spans[some].len;
            if (keys[r] > t->w->run->state->chapter)
                return some;
        }
    return some;
}

static void forward_tile_run(forward_worker *w, int tile)
{
    const forward_run *run = w->run;
    const forward_state *s = run->state;
    const na_geometry *g = s->g;
    forward_tile t = {.w = w, .tile = tile, .rows = w->work.rows};
    t.lanes = na_work_lanes(g, &w->work, tile, 0);
    t.width = t.lanes->half ? HALF : VL;
    t.span_count = na_spans(g, &w->work, tile, w->key_rows, w->key_row_count, w->spans, t.limits);
    forward_begin(&t);
    forward_next_queries(w, tile, t.span_count);
    for (int from = 0; from < t.span_count;) {
        const na_span *spans = w->spans + from;
        const int count = forward_chapter(&t, spans, t.span_count - from);
        forward_score(&t, spans, count);
        forward_rescale(&t, from == 0);
        forward_aggregate(&t, spans, count, from == 0, from + count == t.span_count);
        from += count;
    }
    for (int r = 0; r < t.rows && !run->direct; r++)
        unpack_natural(run->out.dtype, w->sum + r * s->value_step, t.rows * s->value_step,
                       t.lanes->count, s->channels, forward_row(&t, &run->out, r),
                       run->out.axis[2]);
}

/* Looks at the task after this one. */
static void forward_look_ahead(forward_worker *w, int64_t task)
{
    const na_geometry *g = w->run->state->g;
    const na_part *part = &g->part[w->work.part];
    const int tiles = g->across ? 1 : part->end - part->tile;
    w->next = na_work_at(g, task);
    w->ahead.rows = w->ahead.row = 0;
    w->ahead.tokens = 0;
    na_key_row *rows = w->key_rows + g->key_rows;
    const int count = na_key_rows(g, &w->next, rows);
    na_ring_missing(g, &w->next, rows, count, w->tags, forward_look, w);
    const int64_t steps = (int64_t)tiles * w->key_row_count;
    w->ahead.quota = (int)((w->ahead.tokens + steps - 1) / steps);
}

/* A natten_task. */
static void forward_work(void *context, int64_t worker)
{
    const forward_run *run = context;
    const na_geometry *g = run->state->g;
    forward_worker w = {.run = run};
    forward_layout(run->state, &w, run->scratch + (size_t)worker * run->state->worker_bytes);
    for (int64_t i = 0; i <= g->additional_slot; i++)
        w.tags[i] = -1;
    const int64_t end = g->tasks * (worker + 1) / run->workers;
    for (int64_t task = g->tasks * worker / run->workers; task < end; task++) {
        w.work = na_work_at(g, task);
        w.key_row_count = na_key_rows(g, &w.work, w.key_rows);
        na_ring_fill(g, &w.work, w.key_rows, w.key_row_count, w.tags, forward_pack, &w);
        forward_pack_more(&w);
        w.next.block = NULL;
        if (task + 1 < end)
            forward_look_ahead(&w, task + 1);
        if (g->across)
            forward_tile_run(&w, 0);
        else
            for (int i = g->part[w.work.part].tile; i < g->part[w.work.part].end; i++)
                forward_tile_run(&w, i);
    }
    vec_fence();
}

/* True if every token of a tensor is aligned to vectors: it can then be written past the caches,
 * which saves reading what is overwritten (5-14 % at 56x56, window 7x7, 32 channels). */
static int forward_streams(const tensor *t)
{
    uint64_t all = (uint64_t)(uintptr_t)t->data | (uint64_t)t->batch | (uint64_t)t->head;
    for (int a = 0; a < 3; a++)
        all |= (uint64_t)t->axis[a];
    return all % sizeof(vec) == 0;
}

static natten_status forward_run_plan(const natten_plan *plan, const natten_run *addresses)
{
    const forward_state *s = plan->state;
    const natten_problem *p = &plan->problem;
    forward_run run = {.state = s, .problem = p};
    run.query = tensor_of(p, addresses, NATTEN_QUERY);
    run.key = tensor_of(p, addresses, NATTEN_KEY);
    run.value = tensor_of(p, addresses, NATTEN_VALUE);
    run.out = tensor_of(p, addresses, NATTEN_OUT);
    run.lse = tensor_of(p, addresses, NATTEN_LSE);
    run.more_key = tensor_of(p, addresses, NATTEN_ADDITIONAL_KEY);
    run.more_value = tensor_of(p, addresses, NATTEN_ADDITIONAL_VALUE);
    run.direct = stored_size((int)p->dtype) == sizeof(real) && s->channels % VL == 0;
    run.stream = run.direct && forward_streams(&run.out);
    run.workers = na_workers(addresses, s->g->tasks);
    const size_t bias = aligned_bytes((size_t)(s->bias_head * p->heads + VL) * sizeof(real));
    char *scratch = na_scratch_take(bias + (size_t)run.workers * s->worker_bytes);
    if (!scratch)
        return na_fail(NATTEN_ERROR_MEMORY, "No memory for the scratch of a forward run.");
    run.scratch = scratch + bias;
    if (s->bias_head) {
        const tensor rpb = tensor_of(p, addresses, NATTEN_RPB);
        bias_pack(p, &rpb, (real)LOG2_E, (real *)scratch);
        run.bias = (real *)scratch;
    }
    na_parallel(addresses, run.workers, forward_work, &run);
    na_scratch_give(scratch);
    return NATTEN_OK;
}

static void forward_destroy(void *state)
{
    forward_state *s = state;
    na_geometry_free(s->g);
    free(s);
}

/* Rows of a tile: small windows share keys well enough with four, and their scores then stay in the
 * first-level cache. */
static int forward_rows(const natten_problem *p)
{
    return na_window_size(p) <= 64 && ROWS_MAX > 4 ? 4 : ROWS_MAX;
}

static natten_status forward_plan(natten_plan *plan)
{
    const natten_problem *p = &plan->problem;
    forward_state *s = calloc(1, sizeof *s);
    if (!s)
        return na_fail(NATTEN_ERROR_MEMORY, "No memory to make a plan.");
    s->rows = forward_rows(p);
    s->g = na_geometry_make(p, VL, HALF, s->rows);
    if (!s->g) {
        free(s);
        return na_fail(NATTEN_ERROR_MEMORY, "No memory to make a plan.");
    }
    const int64_t line = 64 / (int64_t)sizeof(real),
                  keys = na_window_size(p) + p->additional_tokens;
    const int64_t room = CHAPTER_BYTES / (s->rows * VL * (int64_t)sizeof(real));
    s->depth = (int)p->head_dim;
    s->channels = (int)p->value_dim;
    /* An odd number of cache lines, so that channels do not fall into the same cache sets. */
    s->key_depth = ((s->g->width + line - 1) / line | 1) * line;
    s->slot_step = s->key_depth * s->depth;
    s->value_step = padded(s->channels);
    s->chapter = (int)(keys < room ? keys : room);
    s->score_row = (int64_t)s->chapter * VL + 2 * VL;
    if (na_has(p, NATTEN_RPB)) {
        s->bias_head = 1;
        for (int a = 0; a < 3; a++)
            s->bias_head *= 2 * p->axis[a].window - 1;
    }
    forward_worker w;
    s->worker_bytes = forward_layout(s, &w, NULL);
    plan->state = s;
    plan->destroy = forward_destroy;
    plan->run = forward_run_plan;
    return NATTEN_OK;
}
