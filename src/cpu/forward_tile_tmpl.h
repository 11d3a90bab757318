/* SPDX-License-Identifier: MIT
 * Fused forward: out = softmax(scale * query . key + rpb) value, tile by tile. Scores of a tile
 * stay in the caches; softmax runs down the lanes (the largest score of a lane is a plain maximum),
 * and weights become probabilities in blocks for the first-level cache. Windows too large for
 * that are taken in chapters of spans, with sums rescaled in between. Parameters: the texts
 * kernels.c includes before this one. */

/* Bytes of one tile's scores in a chapter. */
enum { CHAPTER_BYTES = 448 << 10 };

typedef struct forward_state {
    na_geometry *g;
    int rows;            /* most rows of a tile */
    int depth, channels; /* reals of keys, channels of values */
    int terms;           /* of a score: channels, and one for a key bias */
    int64_t key_depth;   /* reals between channels of a transposed slot */
    int64_t slot_step;   /* reals of a transposed slot */
    int64_t value_step;  /* reals of a natural token, of one group of channels */
    int64_t groups;      /* of channels, for aggregate */
    int64_t value_group; /* reals between these: the ring of one after that of another */
    int64_t score_row;   /* reals of a row's scores */
    int chapter;         /* most keys of a row in a chapter */
    int whole;           /* there is one chapter only */
    int64_t bias_head;   /* reals of a head's bias */
    int64_t block;       /* reals of the weights between power and aggregate */
    size_t worker_bytes;
} forward_state;

/* What all workers share. */
typedef struct forward_run {
    const forward_state *state;
    const natten_problem *problem;
    na_queues *queues;
    tensor query, key, value, out, lse, more_key, more_value, key_bias;
    const real *bias; /* times log2(e), NULL: none */
    char *scratch;
    int direct, stream;
    dropping dropping;
} forward_run;

/* One worker's memory. */
typedef struct forward_worker {
    const forward_run *run;
    na_work work, next;    /* next: the task that will come after this one; no block: not known */
    int64_t next_task;     /* its number */
    int fetches;           /* -1: not known yet */
    ahead tokens, queries; /* of the next task; of the next tile */
    real *key, *value, *query, *score, *sum, *room;
    int64_t *tags;                    /* of slots; the last one of the additional tokens */
    na_key_row *key_rows, *next_rows; /* of this task, of the next */
    na_span *spans;
    int key_row_count, next_row_count;
    dropping_row dropping[ROWS_MAX]; /* of the tile */
} forward_worker;

/* One tile on its way. */
typedef struct forward_tile {
    forward_worker *w;
    const na_lanes *lanes; /* of row 0: half is that of all rows */
    na_row_lanes row_lanes;
    int tile, rows, width, span_count;
    real *at[ROWS_MAX];      /* where each row stands in its scores */
    int64_t reals[ROWS_MAX]; /* that the chapter's scores take */
    real top[ROWS_MAX * VL] __attribute__((aligned(64)));
    real low[ROWS_MAX * VL] __attribute__((aligned(64)));   /* integer-valued reference */
    real total[ROWS_MAX * VL] __attribute__((aligned(64))); /* of the weights */
    /* Pairs: of the rounded weights. Divided by it, an error of a weight moves the result only by
     * how far its value is from the result. */
    real rounded[ROWS_MAX * VL] __attribute__((aligned(64)));
    real factor[ROWS_MAX * VL] __attribute__((aligned(64)));
    int32_t limits[NA_ROWS][NA_LANES];
} forward_tile;

static int forward_lanes(const forward_tile *t, int r)
{
    return na_lanes_of_row(t->row_lanes, t->rows, r);
}

static inline query_lanes forward_queries(const forward_tile *t, const tensor *tensor, int r)
{
    return query_lanes_of(t->w->run->state->g, &t->w->work, t->tile, r, forward_lanes(t, r),
                          tensor);
}

/* Has the queries of the tile after this one fetched: of this task, or of the next. */
static void forward_next_queries(forward_worker *w, int tile, int spans)
{
    const na_geometry *g = w->run->state->g;
    const int same = tile + 1 < na_work_tiles(g, &w->work).end;
    const na_work *work = same ? &w->work : &w->next;
    ahead_clear(&w->queries);
    if (!w->fetches || !work->block)
        return;
    const tensor *q = &w->run->query;
    const int next = same ? tile + 1 : na_work_tiles(g, work).first;
    for (int r = 0; r < work->rows; r++) {
        const query_lanes lanes =
            query_lanes_of(g, work, next, r, na_work_lanes(g, work, next, r)->count, q);
        queries_ahead(&w->queries, &lanes,
                      (int64_t)w->run->state->depth * stored_size(packed_as(q->dtype)));
    }
    ahead_share(&w->queries, spans);
}

static void forward_begin(forward_tile *t)
{
    const forward_worker *w = t->w;
    const forward_run *run = w->run;
    const forward_state *s = run->state;
    const int64_t step = (int64_t)s->terms * VL;
    const real scale = PER_REAL > 1 ? 1 : (real)(run->problem->scale * LOG2_E);
    for (int r = 0; r < t->rows; r++) {
        const query_lanes query = forward_queries(t, &run->query, r);
        pack_queries(&query, packed_as(run->query.dtype), s->depth, scale, w->query + r * step);
        if (run->key_bias.data)
            vec_store(w->query + r * step + s->depth * VL, vec_set1((real)LOG2_E));
        vec_store(t->top + r * VL, vec_set1((real)-INFINITY));
        vec_store(t->low + r * VL, vec_set1((real)-INFINITY));
        vec_store(t->total + r * VL, vec_zero());
        vec_store(t->rounded + r * VL, vec_zero());
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
                             .depth = s->terms,
                             .scale = (real)(w->run->problem->scale * LOG2_E),
                             .half = t->lanes->half,
                             .lanes = t->row_lanes,
                             .rows = t->rows,
                             .forbidden = (real)-INFINITY,
                             .top = t->top,
                             .room = w->room,
                             .ahead = {&t->w->tokens, &t->w->queries}};
    for (int r = 0; r < t->rows; r++)
        t->at[r] = w->score + r * s->score_row;
    for (int from = 0, some; from < count; from += some) {
        const na_span *group = spans + from;
        const int biased = w->run->bias && group->z >= 0;
        some = group_spans(group, count - from);
        if (biased)
            bias_set(s->g, &w->work, t->tile, w->run->bias, s->bias_head, group, some, t->width,
                     t->at);
        correlate_group(&scoring, group, some, t->at, biased);
        for (int r = group->lo; r < group->hi; r++)
            t->at[r] += some * group->len * t->width;
    }
    for (int r = 0; r < t->rows; r++) {
        t->reals[r] = t->at[r] - (w->score + r * s->score_row);
        t->at[r] = w->score + r * s->score_row;
    }
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
        /* Finite, though all keys so far may be masked. */
        top = vec_max(vec_ceil(top), vec_set1(lowest));
        vec_store(t->low + r * VL, top);
        if (first)
            continue;
        real shrink[VL] __attribute__((aligned(64)));
        const vec factor = power(before, reference_of(top));
        vec_store(shrink, factor);
        vec_store(t->total + r * VL, vec_mul(vec_load(t->total + r * VL), factor));
        vec_store(t->rounded + r * VL, vec_mul(vec_load(t->rounded + r * VL), factor));
        for (int64_t g = 0; g < t->w->run->state->groups; g++)
            for (int l = 0, lanes = forward_lanes(t, r); l < lanes; l++) {
                real *sum = t->w->sum + ((g * VL + l) * t->rows + r) * step;
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
    vec a = vec_zero(), b = vec_zero();
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
    if (HALF > 0 && p < end) {
        vec_store_part(p, HALF, power(vec_load_part(p, HALF), m));
        b = vec_add(b, vec_load_part(p, HALF));
    }
    vec_store(t->total + r * VL, vec_add(vec_load(t->total + r * VL), vec_add(a, b)));
}

/* The same for pairs of keys: the weights of spans that row r sees. */
static void forward_weigh_pairs(forward_tile *t, int r, const na_span *spans, int count)
{
    const reference m = reference_of(vec_load(t->low + r * VL));
    weighing w = {t->at[r], t->at[r], vec_load(t->total + r * VL), vec_load(t->rounded + r * VL)};
    for (int from = 0, some; from < count; from += some) {
        some = group_spans(spans + from, count - from);
        if (r < spans[from].lo || spans[from].hi <= r)
            continue;
#if defined(PAIRS) && defined(HALF_WORDS)
        if (t->lanes->half) {
            weigh_half_pairs(&w, spans + from, some, m);
            continue;
        }
#endif
        weigh_pairs(&w, spans + from, some, m);
    }
    vec_store(t->total + r * VL, w.total);
    vec_store(t->rounded + r * VL, w.rounded);
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
        const vec whole = PER_REAL > 1 ? vec_load(t->rounded + r * VL) : total;
        /* Of a query without keys all weights are 0: so is the factor. */
        vec_store(t->factor + r * VL,
                  vec_not_below(whole, vec_set1((real)FLT_MIN),
                                vec_div(vec_set1(run->dropping.factor), whole)));
        if (!run->lse.data)
            continue;
        real lse[VL] __attribute__((aligned(64)));
        vec_store(t->total + r * VL, total);
        vec_store(lse, vec_fma(vec_load(t->low + r * VL), vec_set1((real)LN_2), logarithm(total)));
        for (int l = 0; l < VL; l++)
            if (t->total[r * VL + l] == 0)
                lse[l] = (real)-INFINITY;
        const query_lanes to = forward_queries(t, &run->lse, r);
        put_reals(&to, lse);
    }
}

/* Drops weights of a block of spans. */
static void forward_drop(const forward_tile *t, const na_span *spans, int count)
{
    const forward_run *run = t->w->run;
    real *at[ROWS_MAX];
    memcpy(at, t->at, sizeof at);
    for (const na_span *span = spans; span < spans + count; span++)
        for (int r = span->lo; r < span->hi; r++) {
            dropping_row *row = &t->w->dropping[r];
            drop_weights(&run->dropping, row, dropping_slot(row, run->state->g, span), span->len,
                         t->width, at[r]);
            at[r] += span->len * t->width;
        }
}

/* The end of a block of spans of a chapter, and what each row's weights take there. */
static int forward_block(const forward_tile *t, const na_span *spans, int from, int count,
                         int64_t reals[ROWS_MAX])
{
    const int64_t most = t->w->run->state->block;
    int64_t all = 0;
    for (int r = 0; r < t->rows; r++)
        all += reals[r] = t->reals[r];
    if (all <= most)
        return count;
    memset(reals, 0, ROWS_MAX * sizeof *reals);
    all = 0;
    for (int to = from; to < count; to++) {
        const na_span *span = &spans[to];
        const int64_t row = (int64_t)span->len * t->width;
        all += (span->hi - span->lo) * row;
        if (to > from && all > most)
            return to;
        for (int r = span->lo; r < span->hi; r++)
            reals[r] += row;
    }
    return count;
}

/* Weights of a chapter times values, in blocks of spans. */
static void forward_aggregate(forward_tile *t, const na_span *spans, int count, int first, int last)
{
    const forward_run *run = t->w->run;
    const forward_state *s = run->state;
    out_real *out[ROWS_MAX];
    int64_t out_lane[VL];
    const query_lanes first_row = forward_queries(t, &run->out, 0);
    lane_offsets(&first_row, out_lane);
    for (int r = 0; r < t->rows && run->direct; r++)
        out[r] = (out_real *)(void *)query_row(s->g, &t->w->work, t->tile, r, &run->out);
    for (int from = 0; from < count;) {
        int64_t reals[ROWS_MAX];
        const int to = forward_block(t, spans, from, count, reals);
        for (int r = 0; r < t->rows; r++)
            if (PER_REAL > 1)
                forward_weigh_pairs(t, r, spans + from, to - from);
            else
                forward_weigh(t, r, reals[r]);
        if (run->dropping.threshold)
            forward_drop(t, spans + from, to - from);
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
                               .group = (int)s->value_step,
                               .value_group = s->value_group,
                               .sum = t->w->sum,
                               .sum_row = s->value_step,
                               .sum_lane = t->rows * s->value_step,
                               .sum_group = VL * t->rows * s->value_step,
                               .factor = t->factor,
                               .out = run->direct ? out : NULL,
                               .out_lane = out_lane};
        aggregate_tile(&a, t->rows, t->row_lanes, s->channels);
        for (int r = 0; r < t->rows; r++)
            t->at[r] += reals[r];
        from = to;
    }
}

/* Spans of the next chapter: as many as have room for their scores. */
static int forward_chapter(const forward_tile *t, const na_span *spans, int count)
{
    const forward_state *s = t->w->run->state;
    int keys[ROWS_MAX] = {0}, some = 0;
    if (s->whole)
        return count;
    for (; some < count; some++)
        for (int r = spans[some].lo; r < spans[some].hi; r++) {
            keys[r] += spans[some].len;
            if (keys[r] > s->chapter)
                return some;
        }
    return some;
}

/* Results that aggregate did not write. */
static void forward_store(const forward_tile *t, int r)
{
    const forward_state *s = t->w->run->state;
    query_lanes out = forward_queries(t, &t->w->run->out, r);
    const int64_t lane = t->rows * s->value_step;
    const real *sum = t->w->sum + r * s->value_step;
    for (int c = 0; c < s->channels; c += (int)s->value_step, sum += VL * lane) {
        unpack_queries(&out, sum, lane, na_min(s->channels - c, (int)s->value_step));
        out.at += s->value_step * stored_size(out.tensor->dtype);
    }
}

static void forward_tile_run(forward_worker *w, int tile)
{
    const forward_run *run = w->run;
    const forward_state *s = run->state;
    const na_geometry *g = s->g;
    forward_tile t;
    t.w = w;
    t.tile = tile;
    t.rows = w->work.rows;
    t.lanes = na_work_lanes(g, &w->work, tile, 0);
    t.row_lanes = na_lanes_of_rows(g, &w->work, tile);
    t.width = t.lanes->half ? HALF : VL;
    t.span_count = na_spans(g, &w->work, tile, !w->run->dropping.threshold, w->key_rows,
                            w->key_row_count, w->spans, t.limits);
    forward_begin(&t);
    if (run->dropping.threshold)
        dropping_begin(&run->dropping, g, &w->work, tile, w->dropping);
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
        forward_store(&t, r);
}
