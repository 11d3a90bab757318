/* SPDX-License-Identifier: MIT
 * Fused backward of one tile. Weights p are computed again from the scores and the lse; with
 * delta = out . d_out - d_lse the gradient of a score is p (d_out . value - delta). Both stay in
 * the caches for a block of spans, and are then used up: for the queries' gradient,
 * summed in registers, and for those of keys and values, added to the sums beside the packed keys.
 * Parameters: the texts kernels.c includes before this one. */

typedef struct backward_state {
    na_geometry *g;
    na_bands *bands;
    bias_kinds kinds;
    int rows;                            /* most rows of a tile */
    int depth, channels;                 /* of keys, of values */
    int terms;                           /* of a score: channels, and one for a key bias */
    int64_t line;                        /* reals between channels of a transposed slot */
    int64_t key_step, value_step;        /* reals of a natural token */
    int key_group;                       /* channels that aggregate takes at a time */
    int64_t entries;                     /* of a head's bias; 0: none */
    int64_t kind_reals;                  /* of a kind's sums of one head */
    int d_query, d_key, d_value, d_bias; /* wanted; d_key and d_value: of any key, any value */
    int d_key_bias;                      /* it is one more channel of d_key */
    int d_slope;                         /* some gradient needs that of the scores */
    int64_t block;                       /* reals of weights at a time, and of their gradients */
    int64_t block_room;                  /* with what they may overrun */
    size_t worker_bytes;
} backward_state;

/* What all workers share. A sink is where a gradient of keys or values is summed up. */
typedef struct backward_sink {
    tensor out, more_out;   /* data NULL: not wanted */
    int wanted;             /* out, or a bias that comes with it */
    real *copy;             /* [unit][key][step] where out cannot be added to; NULL: it can */
    real *own, *more;       /* [unit][own cell][key][step], [unit][band][additional][step] */
    int64_t step, channels; /* reals of a packed token, and those that count */
} backward_sink;

typedef struct backward_run {
    const backward_state *state;
    const natten_problem *problem;
    na_queues *queues;
    int32_t *first_band; /* of each item: the first_band of the worker that did it */
    tensor query, key, value, out, lse, more_key, more_value, d_out, d_lse, d_query, d_bias;
    tensor key_bias, d_key_bias;
    backward_sink sink[2]; /* of keys, of values */
    const real *bias;      /* times log2(e), NULL: none */
    double *d_bias_sums;   /* [unit][band][head of the group][entry] */
    char *scratch;
    dropping dropping;
    int direct, stream; /* d_query is written by aggregate, past the caches */
} backward_run;

/* What a slot holds while its sums have not been taken away. */
typedef struct backward_held {
    int32_t dirty, z, y;
    const na_part *part;
} backward_held;

/* One worker's memory. */
typedef struct backward_worker {
    const backward_run *run;
    na_work work, next;
    int fetches;                     /* -1: not known yet */
    ahead keys_ahead, queries_ahead; /* of the next task, of the next tile */
    int64_t unit;
    /* first_band: of those of the unit that this worker has done one after another up to `band` */
    int32_t band, first_band;
    real *key, *value, *natural;        /* slots: keys and values transposed, keys */
    real *sum[2];                       /* slots: gradients of keys and values */
    real *query, *grad;                 /* of a tile, transposed: times scale and log2(e); d_out */
    real *query_natural, *grad_natural; /* [row][lane]: times scale; d_out */
    real *weight, *slope;               /* of a block: p and gradients of scores */
    real *partial;                      /* [lane][row]: gradient of queries */
    real *room;
    real *bias_sum; /* [head of the group][kind][entry][lane] */
    int64_t *tags;  /* of slots; the last one of the additional tokens */
    backward_held *held;
    unsigned char *seen; /* cells of the unit that hold something */
    na_key_row *key_rows;
    na_span *spans;
    int key_row_count;
    dropping_row dropping[ROWS_MAX]; /* of the tile */
} backward_worker;

/* One tile on its way. */
typedef struct backward_tile {
    backward_worker *w;
    const na_lanes *lanes; /* of row 0: half is that of all rows */
    na_row_lanes row_lanes;
    int tile, rows, width;
    int keys[ROWS_MAX];     /* of the block, seen by each row */
    real *weight[ROWS_MAX]; /* where each row stands in the block */
    real *slope[ROWS_MAX];
    real lse[ROWS_MAX * VL] __attribute__((aligned(64))); /* times log2(e) */
    real delta[ROWS_MAX * VL] __attribute__((aligned(64)));
    real scale[ROWS_MAX * VL] __attribute__((aligned(64)));
    int32_t limits[NA_ROWS][NA_LANES];
} backward_tile;

static int backward_lanes(const backward_tile *t, int r)
{
    return na_lanes_of_row(t->row_lanes, t->rows, r);
}

static inline query_lanes backward_queries(const backward_tile *t, const tensor *tensor, int r)
{
    return query_lanes_of(t->w->run->state->g, &t->w->work, t->tile, r, backward_lanes(t, r),
                          tensor);
}

/* Has what the next tile's queries bring along fetched: of this task, or of the next. */
static void backward_look_on(backward_worker *w, int tile, int end, int spans)
{
    const backward_run *run = w->run;
    const na_geometry *g = run->state->g;
    const na_work *work = tile + 1 < end ? &w->work : &w->next;
    const tensor *tensors[] = {&run->query, &run->d_out, &run->out};
    ahead_clear(&w->queries_ahead);
    if (!w->fetches || !work->block)
        return;
    const int next = tile + 1 < end ? tile + 1 : na_work_tiles(g, work).first;
    for (int r = 0; r < work->rows; r++)
        for (int i = 0; i < 2 + run->state->d_slope; i++) {
            const query_lanes lanes = query_lanes_of(
                g, work, next, r, na_work_lanes(g, work, next, r)->count, tensors[i]);
            queries_ahead(&w->queries_ahead, &lanes,
                          (int64_t)(i ? run->state->channels : run->state->depth) *
                              stored_size(tensors[i]->dtype));
        }
    ahead_share(&w->queries_ahead, spans);
}

/* Products of packed tokens and those of a tensor. */
static ALWAYS_INLINE void multiply_tokens(const int dtype, const real *a, int64_t step,
                                          const char *b, int64_t token, int tokens, int channels,
                                          real *to)
{
    const int whole = channels / VL * VL;
    for (int t = 0; t < tokens; t++, a += step, b += token) {
        vec sum = vec_zero();
        for (int c = 0; c < whole; c += VL)
            sum = vec_fma(vec_load(a + c), load_stored(dtype, b + c * stored_size(dtype)), sum);
        if (whole < channels)
            sum = vec_fma(vec_load(a + whole),
                          load_stored_part(dtype, b + whole * stored_size(dtype), channels - whole),
                          sum);
        to[t] = vec_sum(sum);
    }
}

/* The same by the type of the tensor. */
static void multiply_all(int dtype, const real *a, int64_t step, const char *b, int64_t token,
                         int tokens, int channels, real *to)
{
#define ONE(type)                                                                                  \
    if (dtype == type)                                                                             \
        multiply_tokens(type, a, step, b, token, tokens, channels, to);
    STORED(ONE)
#undef ONE
}

/* delta of a row whose d_out is packed. */
static void backward_delta(backward_tile *t, int r)
{
    const backward_run *run = t->w->run;
    const backward_state *s = run->state;
    const query_lanes out = backward_queries(t, &run->out, r);
    const real *grad = t->w->grad_natural + r * VL * s->value_step;
    real *delta = t->delta + r * VL;
    NA_EACH_PIECE(p, s->g, out.number, out.count)
    multiply_all(run->out.dtype, grad + p.lane * s->value_step, s->value_step, piece_at(&out, p),
                 run->out.axis[2], p.end - p.lane, s->channels, delta + p.lane);
    if (!run->d_lse.data)
        return;
    const query_lanes from = backward_queries(t, &run->d_lse, r);
    real d_lse[VL];
    get_reals(&from, d_lse);
    for (int l = 0; l < from.count; l++)
        delta[l] -= d_lse[l];
}

/* Packs what the tile's queries bring along. */
static void backward_begin(backward_tile *t)
{
    const backward_worker *w = t->w;
    const backward_run *run = w->run;
    const backward_state *s = run->state;
    const real scale = (real)run->problem->scale, scale2 = (real)(run->problem->scale * LOG2_E);
    for (int r = 0; r < t->rows; r++) {
        const int count = backward_lanes(t, r);
        const query_lanes query = backward_queries(t, &run->query, r);
        const query_lanes grad = backward_queries(t, &run->d_out, r);
        const query_lanes from = backward_queries(t, &run->lse, r);
        pack_queries(&query, run->query.dtype, s->depth, scale2,
                     w->query + (int64_t)r * s->terms * VL);
        if (run->key_bias.data)
            vec_store(w->query + (int64_t)(r * s->terms + s->depth) * VL, vec_set1((real)LOG2_E));
        real *natural = w->query_natural + r * VL * s->key_step;
        if (s->d_key)
            pack_queries_naturally(&query, s->depth, scale, natural, s->key_step);
        for (int l = 0; s->d_key_bias && l < count; l++, natural += s->key_step) {
            if (s->depth % VL == 0)
                vec_store(natural + s->depth, vec_zero());
            natural[s->depth] = 1;
        }
        pack_queries_naturally(&grad, s->channels, 1, w->grad_natural + r * VL * s->value_step,
                               s->value_step);
        real *lse = t->lse + r * VL;
        /* Weights of lanes that are no queries come out as 0. */
        vec_store(lse, vec_set1((real)INFINITY));
        vec_store(t->delta + r * VL, vec_zero());
        vec_store(t->scale + r * VL, vec_set1(scale));
        get_reals(&from, lse);
        for (int l = 0; l < count; l++)
            /* Without keys weights come out as 0, too. */
            lse[l] = lse[l] == (real)-INFINITY ? (real)INFINITY : lse[l] * (real)LOG2_E;
        if (s->d_slope) {
            pack_queries(&grad, run->d_out.dtype, s->channels, 1,
                         w->grad + (int64_t)r * s->channels * VL);
            backward_delta(t, r);
        }
        for (int l = 0; t->lanes->half && l < HALF; l++) {
            lse[HALF + l] = lse[l];
            t->delta[r * VL + HALF + l] = t->delta[r * VL + l];
        }
    }
}

/* Spans of the next block; gives its rows their places. */
static int backward_block(backward_tile *t, const na_span *spans, int count)
{
    int some = 0;
    int64_t reals = 0, at = 0;
    memset(t->keys, 0, sizeof t->keys);
    for (; some < count; some++) {
        const na_span *span = &spans[some];
        reals += (int64_t)(span->hi - span->lo) * span->len * t->width;
        if (some > 0 && reals > t->w->run->state->block)
            break;
        for (int r = span->lo; r < span->hi; r++)
            t->keys[r] += span->len;
    }
    for (int r = 0; r < t->rows; r++) {
        t->weight[r] = t->w->weight + at;
        t->slope[r] = t->w->slope + at;
        /* bias_set may run over the end. */
        at += padded(t->keys[r] * t->width) + VL;
    }
    return some;
}

static void backward_advance(const na_span *span, int width, real **at)
{
    for (int r = span->lo; r < span->hi; r++)
        at[r] += span->len * width;
}

/* Scores into weight, products of d_out and values into slope. */
static void backward_score(backward_tile *t, const na_span *spans, int count)
{
    backward_worker *w = t->w;
    const backward_state *s = w->run->state;
    const scoring keys = {.query = w->query,
                          .key = w->key,
                          .slot_step = s->line * s->terms,
                          .key_depth = s->line,
                          .depth = s->terms,
                          .half = t->lanes->half,
                          .lanes = t->row_lanes,
                          .rows = t->rows,
                          .forbidden = (real)-INFINITY,
                          .room = w->room,
                          .ahead = {&w->keys_ahead, &w->queries_ahead}};
    scoring values = keys;
    values.ahead[0] = NULL;
    /* Their weight is 0, but what lies where they would be packed may be NaN. */
    values.forbidden = 0;
    values.query = w->grad;
    values.key = w->value;
    values.slot_step = s->line * s->channels;
    values.depth = s->channels;
    real *weight[ROWS_MAX], *slope[ROWS_MAX];
    memcpy(weight, t->weight, sizeof weight);
    memcpy(slope, t->slope, sizeof slope);
    for (int from = 0, some; from < count; from += some) {
        const na_span *group = spans + from;
        const int biased = w->run->bias && group->z >= 0;
        some = group_spans(group, count - from);
        if (biased)
            bias_set(s->g, &w->work, t->tile, w->run->bias, s->entries, group, some, t->width,
                     weight);
        correlate_group(&keys, group, some, weight, biased);
        if (s->d_slope)
            correlate_group(&values, group, some, slope, 0);
        for (int i = 0; i < some; i++) {
            backward_advance(group, t->width, weight);
            backward_advance(group, t->width, slope);
        }
    }
}

/* Weights and gradients of scores, in place. */
static void backward_weigh(const backward_tile *t)
{
    const reference zero = reference_of(vec_zero());
    for (int r = 0; r < t->rows; r++) {
        const int reals = t->keys[r] * t->width;
        const vec lse = vec_load(t->lse + r * VL), delta = vec_load(t->delta + r * VL);
        real *p = t->weight[r], *d = t->slope[r];
        if (!t->w->run->state->d_slope || t->w->run->dropping.threshold)
            for (int i = 0; i < reals; i += VL)
                vec_store(p + i, power(vec_sub(vec_load(p + i), lse), zero));
        else
            for (int i = 0; i < reals; i += VL) {
                const vec weight = power(vec_sub(vec_load(p + i), lse), zero);
                vec_store(p + i, weight);
                vec_store(d + i, vec_mul(weight, vec_sub(vec_load(d + i), delta)));
            }
    }
}

/* Weights that dropout changes, of a block of spans, and gradients of scores. */
static void backward_drop(const backward_tile *t, const na_span *spans, int count)
{
    const backward_run *run = t->w->run;
    const backward_state *s = run->state;
    real *weight[ROWS_MAX], *slope[ROWS_MAX];
    memcpy(weight, t->weight, sizeof weight);
    memcpy(slope, t->slope, sizeof slope);
    for (const na_span *span = spans; span < spans + count; span++) {
        for (int r = span->lo; r < span->hi; r++) {
            dropping_row *row = &t->w->dropping[r];
            drop_gradients(&run->dropping, row, dropping_slot(row, s->g, span), span->len, t->width,
                           vec_load(t->delta + r * VL), weight[r], s->d_slope ? slope[r] : NULL);
        }
        backward_advance(span, t->width, weight);
        backward_advance(span, t->width, slope);
    }
}

/* Adds the gradients of the block's scores to the sums of the bias. */
static void backward_bias(const backward_tile *t, const na_span *spans, int count)
{
    const backward_worker *w = t->w;
    const backward_state *s = w->run->state;
    const na_geometry *g = s->g;
    const int head = (int)w->work.kv_head * g->group;
    real *slope[ROWS_MAX];
    memcpy(slope, t->slope, sizeof slope);
    for (const na_span *span = spans; span < spans + count; span++) {
        const int64_t first = bias_first(g, &w->work, span);
        for (int r = span->lo; r < span->hi && span->z >= 0; r++) {
            const na_lanes *lanes = na_work_lanes(g, &w->work, t->tile, r);
            const int64_t kind = (na_work_head(&w->work, r) - head) * (int64_t)s->kinds.count +
                                 s->kinds.of[lanes - g->lane];
            const int64_t entry = first - bias_before(g, &w->work, r) + lanes->bias[0];
            bias_add(slope[r], span->len * t->width,
                     w->bias_sum + kind * s->kind_reals + entry * t->width);
        }
        backward_advance(span, t->width, slope);
    }
}

/* A row of the gradient that aggregate did not write. */
static void backward_store_query(const backward_tile *t, int r)
{
    const backward_state *s = t->w->run->state;
    const query_lanes to = backward_queries(t, &t->w->run->d_query, r);
    unpack_queries(&to, t->w->partial + r * s->key_step, t->rows * s->key_step, s->depth);
}

/* Adds the block's share of the gradient of the tile's queries. */
static void backward_query(const backward_tile *t, const na_span *spans, int count, int begin,
                           int end)
{
    const backward_worker *w = t->w;
    const backward_run *run = w->run;
    const backward_state *s = run->state;
    real *out[ROWS_MAX];
    int64_t out_lane[VL];
    const query_lanes first_row = backward_queries(t, &run->d_query, 0);
    lane_offsets(&first_row, out_lane);
    for (int r = 0; r < t->rows && run->direct; r++)
        out[r] = (real *)(void *)query_row(s->g, &w->work, t->tile, r, &run->d_query);
    const aggregation a = {.spans = spans,
                           .count = count,
                           .lanes = t->lanes->count,
                           .begin = begin,
                           .end = end,
                           .stream = run->stream,
                           .width = t->width,
                           .weight_lane = 1,
                           .weight = t->slope,
                           .value = w->natural,
                           .value_step = s->key_step,
                           .group = s->key_group,
                           .value_group = s->key_group,
                           .sum = w->partial,
                           .sum_row = s->key_step,
                           .sum_lane = t->rows * s->key_step,
                           .sum_group = s->key_group,
                           .factor = t->scale,
                           .out = run->direct ? out : NULL,
                           .out_lane = out_lane};
    aggregate_tile(&a, t->rows, t->row_lanes, s->depth);
    for (int r = 0; r < t->rows && end && !run->direct; r++)
        backward_store_query(t, r);
}

/* Adds the block's share of the gradients of keys (0) or values (1) to the sums. */
static void backward_scatter(const backward_tile *t, const na_span *spans, int count, int which)
{
    const backward_worker *w = t->w;
    const backward_sink *sink = &w->run->sink[which];
    real *at[ROWS_MAX];
    memcpy(at, which ? t->weight : t->slope, sizeof at);
    scattering a = {.spans = spans,
                    .lanes = t->lanes->count,
                    .width = t->width,
                    .weight_lane = 1,
                    .weight = at,
                    .sum = w->sum[which],
                    .sum_step = sink->step,
                    .grad = which ? w->grad_natural : w->query_natural,
                    .grad_row = VL * sink->step,
                    .grad_lane = sink->step};
    while (a.count < count && spans[a.count].z >= 0)
        a.count++;
    if (a.count && sink->wanted)
        scatter_tile(&a, t->rows, t->row_lanes, (int)sink->channels);
    for (int i = 0; i < a.count; i++)
        backward_advance(&spans[i], t->width, at);
    /* The rest are additional tokens. */
    a.spans += a.count;
    a.count = count - a.count;
    if (a.count && sink->more_out.data)
        scatter_tile(&a, t->rows, t->row_lanes, (int)sink->channels);
}

/* end: of the task's tiles. */
static void backward_tile_run(backward_worker *w, int tile, int end)
{
    const backward_state *s = w->run->state;
    backward_tile t;
    t.w = w;
    t.tile = tile;
    t.rows = w->work.rows;
    t.lanes = na_work_lanes(s->g, &w->work, tile, 0);
    t.row_lanes = na_lanes_of_rows(s->g, &w->work, tile);
    t.width = t.lanes->half ? HALF : VL;
    const int count = na_spans(s->g, &w->work, tile, !w->run->dropping.threshold, w->key_rows,
                               w->key_row_count, w->spans, t.limits);
    backward_begin(&t);
    if (w->run->dropping.threshold)
        dropping_begin(&w->run->dropping, s->g, &w->work, tile, w->dropping);
    backward_look_on(w, tile, end, count);
    for (int from = 0; from < count;) {
        const na_span *spans = w->spans + from;
        const int some = backward_block(&t, spans, count - from);
        backward_score(&t, spans, some);
        backward_weigh(&t);
        if (w->run->dropping.threshold)
            backward_drop(&t, spans, some);
        if (s->d_bias)
            backward_bias(&t, spans, some);
        if (s->d_query)
            backward_query(&t, spans, some, from == 0, from + some == count);
        if (s->d_value)
            backward_scatter(&t, spans, some, 1);
        if (s->d_key)
            backward_scatter(&t, spans, some, 0);
        from += some;
    }
}
