/* SPDX-License-Identifier: MIT
 * The unfused ops:
 *   score     attn = factor * query . key + bias     QK; AV_BACKWARD's d_attn = d_out . value
 *   gather    out = factor * sum of attn * value     AV; QK_BACKWARD's d_query from d_attn, key
 *   scatter   the gradients of key or value, of the additional tokens and of the bias
 * Parameters: those of micro_tmpl.h, pack_tmpl.h, weights_tmpl.h and scatter_tmpl.h. */

/* What an op scores or gathers, and where a worker keeps its part. */
typedef struct unfused {
    const natten_problem *problem;
    const na_geometry *geometry;
    tensor query;     /* score: query or d_out; gather: out or d_query */
    tensor key, more; /* keys or values, and those of the additional tokens */
    tensor attn;
    tensor key_bias;
    int depth;     /* channels */
    int terms;     /* of a score: channels, and one for a key bias */
    int64_t slots; /* of a query */
    real factor;
    real forbidden;    /* score: what slots without a key hold */
    const real *bias;  /* score: [head][2K-1]... or NULL */
    int64_t bias_head; /* reals of one head's bias */
    int64_t workers;
    na_queues *queues;
    int stream;        /* gather: outputs may be written past the caches */
    int64_t key_depth; /* score: between channels of packed keys */
    int64_t slot_step; /* reals of a slot of packed keys */
    char *memory;      /* of all workers */
    size_t bytes;      /* of each */
} unfused;

typedef struct worker {
    const unfused *u;
    int64_t pair;        /* batch and key head whose additional tokens are packed, or -1 */
    const na_work *work; /* pack_keys: whose keys are packed; look_ahead: the next one's */
    int fetches;         /* -1: not known yet */
    ahead keys, rest;    /* what the next task packs; what the next tile reads, this one writes */
    int64_t *tags;
    na_key_row *rows; /* of this task, then of the next */
    na_span *spans;
    real *key;   /* packed: score [slot][channel][key], gather [slot][key][channel] */
    real *query; /* score: [row][channel][lane]; gather: sums [row][lane][channel] */
    real *score; /* score: [row][slot][lane]; gather: room of load_weights */
    real *room;  /* score: of correlate_group */
} worker;

static worker score_worker(const unfused *u, pieces *p)
{
    const na_geometry *g = u->geometry;
    worker w = {.u = u, .pair = -1, .fetches = -1};
    w.tags = piece(p, g->additional_slot, sizeof *w.tags);
    w.rows = piece(p, 2 * (int64_t)g->key_rows, sizeof *w.rows);
    w.spans = piece(p, g->spans, sizeof *w.spans);
    w.key = piece(p, g->slots * u->slot_step + 4 * VL, sizeof(real));
    w.query = piece(p, (int64_t)NA_ROWS * u->terms * VL, sizeof(real));
    w.score = piece(p, NA_ROWS * padded(u->slots) * VL, sizeof(real));
    w.room = piece(p, ((int64_t)u->terms * KEYS_MAX + 1) * VL, sizeof(real));
    return w;
}

static worker gather_worker(const unfused *u, pieces *p)
{
    const na_geometry *g = u->geometry;
    worker w = {.u = u, .pair = -1, .fetches = -1};
    w.tags = piece(p, g->additional_slot, sizeof *w.tags);
    w.rows = piece(p, 2 * (int64_t)g->key_rows, sizeof *w.rows);
    w.spans = piece(p, g->spans, sizeof *w.spans);
    w.key = piece(p, g->slots * u->slot_step, sizeof(real));
    w.query = piece(p, NA_ROWS * VL * padded(u->depth), sizeof(real));
    w.score = piece(p, NA_ROWS * VL * copied_slots(u->slots), sizeof(real));
    return w;
}

static void pack_score_slot(void *context, int64_t slot, int32_t z, int32_t y, const na_part *part)
{
    const worker *w = context;
    const unfused *u = w->u;
    real *const to = w->key + slot * u->slot_step;
    pack_keys_transposed(u->geometry, &u->key, u->key.dtype, w->work->batch, w->work->kv_head, z, y,
                         part, u->depth, to, u->key_depth);
    pack_key_biases(u->geometry, &u->key_bias, w->work->batch, w->work->kv_head, z, y, part,
                    to + u->depth * u->key_depth);
}

static void pack_gather_slot(void *context, int64_t slot, int32_t z, int32_t y, const na_part *part)
{
    const worker *w = context;
    const unfused *u = w->u;
    pack_keys_naturally(u->geometry, &u->key, w->work->batch, w->work->kv_head, z, y, part,
                        u->depth, w->key + slot * u->slot_step, padded(u->depth));
}

/* Has all keys of a task packed; returns the number of its key rows. */
static int pack_keys(worker *w, const na_work *work, int transposed)
{
    const unfused *u = w->u;
    const na_geometry *g = u->geometry;
    const int64_t pair = work->batch * g->head_sets + work->kv_head;
    const int row_count = na_key_rows(g, work, 0, w->rows);
    w->work = work;
    if (w->fetches < 0)
        w->fetches =
            needs_ahead(g, work, w->rows, row_count, &u->key, u->depth * stored_size(u->key.dtype));
    na_ring_fill(g, work, w->rows, row_count, w->tags,
                 transposed ? pack_score_slot : pack_gather_slot, w);
    if (w->pair == pair)
        return row_count;
    w->pair = pair;
    real *to = w->key + g->additional_slot * u->slot_step;
    for (int64_t token = 0; token < g->additional; token += g->width, to += u->slot_step) {
        const int some = (int)(g->additional - token < g->width ? g->additional - token : g->width);
        const char *from = tensor_at(&u->more, work->batch, work->kv_head, token, 0, 0);
        if (transposed)
            pack_transposed(u->more.dtype, from, u->more.axis[0], 0, some, u->depth, 1, to,
                            u->key_depth);
        else
            pack_natural(u->more.dtype, from, u->more.axis[0], 0, some, u->depth, 1, to,
                         padded(u->depth));
        if (u->key_bias.data)
            key_bias_pack(NULL, NULL, some, to + u->depth * u->key_depth);
    }
    return row_count;
}

/* A na_pack that only notes what will be packed. */
static void note_slot(void *context, int64_t slot, int32_t z, int32_t y, const na_part *part)
{
    worker *w = context;
    const tensor *key = &w->u->key;
    (void)slot;
    keys_ahead(&w->keys, w->u->geometry, key, w->work->batch, w->work->kv_head, z, y, part,
               w->u->depth * stored_size(key->dtype));
}

/* Notes the keys that the next task packs, to be fetched in so many steps. */
static void look_ahead(worker *w, const na_work *next, int64_t steps)
{
    const na_geometry *g = w->u->geometry;
    na_key_row *rows = w->rows + g->key_rows;
    w->work = next;
    na_ring_missing(g, next, rows, na_key_rows(g, next, 0, rows), w->tags, note_slot, w);
    ahead_share(&w->keys, steps);
}

/* Adds the bias to a span's scores of one tile row. */
static void add_bias(const unfused *u, const tile *t, const na_span *span, int row, real *score)
{
    const na_lanes *lanes = na_work_lanes(u->geometry, t->work, t->number, row);
    const real *bias = u->bias + na_work_head(t->work, row) * u->bias_head;
    bias += bias_first(u->geometry, t->work, span) - bias_before(u->geometry, t->work, row);
    const vec_index step = vec_index_load(lanes->bias_step);
    for (int k = 0; k < span->len; k++, bias++, score += t->width) {
        vec b = bias_of_lanes(lanes, bias, step);
        if (t->width == VL)
            vec_store(score, vec_add(vec_load(score), b));
        else
            vec_store_part(score, t->width, vec_add(vec_load_part(score, t->width), b));
    }
}

/* Gives slots beyond a lane's last key their value. */
static void forbid(const unfused *u, const tile *t, const na_span *span, int row, real *score)
{
    const vec_index limit = vec_index_load(span->limit + row * span->limit_step);
    for (int k = span->first; k < span->first + span->len; k++, score += t->width) {
        if (t->width == VL)
            vec_store(score, vec_keep(vec_load(score), k, limit, u->forbidden));
        else
            vec_store_part(score, t->width,
                           vec_keep(vec_load_part(score, t->width), k, limit, u->forbidden));
    }
}

static void score_tile(worker *w, tile *t)
{
    const unfused *u = w->u;
    const int rows = t->work->rows;
    const int64_t row_step = padded(u->slots) * VL, query_step = (int64_t)u->terms * VL;
    for (int r = 0; r < rows; r++) {
        pack_transposed(u->query.dtype, query_at(&u->query, t, r), u->query.axis[2],
                        u->query.further, tile_lanes(t, r), u->depth, u->factor,
                        w->query + r * query_step, VL);
        if (u->key_bias.data)
            vec_store(w->query + r * query_step + u->depth * VL, vec_set1(1));
    }
    if (t->cut || t->masked)
        for (int64_t i = 0; i < rows * row_step; i += VL)
            vec_store(w->score + i, vec_set1(u->forbidden));
    const scoring s = {.query = w->query,
                       .key = w->key,
                       .slot_step = u->slot_step,
                       .key_depth = u->key_depth,
                       .depth = u->terms,
                       .half = t->width != VL,
                       .lanes = t->lanes,
                       .rows = rows,
                       .room = w->room,
                       .ahead = {&w->keys, &w->rest}};
    for (int i = 0, some; i < t->count; i += some) {
        const na_span *spans = &t->spans[i];
        na_span first = *spans;
        real *score[NA_ROWS];
        const place p = place_of(t, spans);
        const int group = first.limit ? 1 : group_spans(spans, t->count - i);
        /* As far as the slots of key rows follow one another. */
        for (some = 1; some < group; some++)
            if (place_of(t, &spans[some]).slot != p.slot + some * first.len)
                break;
        first.limit = NULL;
        for (int r = first.lo; r < first.hi; r++)
            score[r] = w->score + r * row_step + slot_of(t, spans, p, r) * t->width;
        correlate_group(&s, some > 1 ? spans : &first, some, score, 0);
        for (const na_span *span = spans; span < spans + some; span++)
            for (int r = span->lo; r < span->hi; r++) {
                if (u->bias && span->z >= 0)
                    add_bias(u, t, span, r, score[r]);
                if (span->limit)
                    forbid(u, t, span, r, score[r]);
                score[r] += span->len * t->width;
            }
    }
    for (int r = 0; r < rows; r++)
        store_scores(u->attn.dtype, w->score + r * row_step, t->width, u->slots, tile_lanes(t, r),
                     query_at(&u->attn, t, r), u->attn.axis[2]);
}

/* Has what a tile writes fetched, and the queries of the next one. */
static void look_around(worker *w, const tile *t, const na_work *work, int next)
{
    const unfused *u = w->u;
    ahead_clear(&w->rest);
    if (!w->fetches)
        return;
    look_at_tile(&w->rest, &u->attn, u->geometry, t->work, t->number, u->slots);
    look_at_tile(&w->rest, &u->query, u->geometry, work, next, u->depth);
    ahead_share(&w->rest, t->count);
}

static void gather_tile(worker *w, tile *t)
{
    const unfused *u = w->u;
    const int rows = t->work->rows;
    const int64_t step = padded(u->depth);
    const int group = channel_group(u->depth);
    const weights weights = load_weights(t, &u->attn, u->slots, w->score);
    const int direct = stored_size(u->query.dtype) == sizeof(real);
    ahead_fetch(&w->keys, w->keys.quota);
    real factor[NA_ROWS * VL] __attribute__((aligned(64))), *out[NA_ROWS];
    real *at[NA_ROWS];
    int64_t out_lane[VL];
    const query_lanes to =
        query_lanes_of(t->geometry, t->work, t->number, 0, t->lanes.most, &u->query);
    lane_offsets(&to, out_lane);
    for (int r = 0; r < rows; r++) {
        vec_store(factor + r * VL, vec_set1(u->factor));
        out[r] = (real *)query_at(&u->query, t, r);
        at[r] = weights.row[r];
    }
    for (int begin = 0, end; begin < t->count; begin = end) {
        end = next_block(t, &weights, u->depth, begin, at);
        const aggregation a = {.spans = t->spans + begin,
                               .count = end - begin,
                               .lanes = t->lanes.most,
                               .begin = begin == 0,
                               .end = end == t->count,
                               .stream = direct && u->stream,
                               .width = 1,
                               .weight_lane = weights.lane,
                               .weight = at,
                               .value = w->key,
                               .value_step = step,
                               .group = group,
                               .value_group = group,
                               .sum = w->query,
                               .sum_row = VL * step,
                               .sum_lane = step,
                               .sum_group = group,
                               .factor = factor,
                               .out = direct ? out : NULL,
                               .out_lane = out_lane};
        aggregate_tile(&a, rows, t->lanes, u->depth);
    }
    for (int r = 0; r < rows && !direct; r++)
        unpack_natural(u->query.dtype, w->query + r * VL * step, step, tile_lanes(t, r), u->depth,
                       query_at(&u->query, t, r), u->query.axis[2]);
}

static void run_tasks(const unfused *u, int64_t number, int transposed)
{
    const na_geometry *g = u->geometry;
    pieces memory = {u->memory + (size_t)number * u->bytes, 0};
    worker w = transposed ? score_worker(u, &memory) : gather_worker(u, &memory);
    for (int64_t i = 0; i < g->additional_slot; i++)
        w.tags[i] = -1;
    for (na_turn turn = na_turn_of(u->queues, number); na_turn_next(&turn);) {
        const int64_t ahead = na_turn_ahead(&turn);
        const na_work work = na_work_at(g, turn.task);
        const na_work next = na_work_at(g, ahead >= 0 ? ahead : turn.task);
        const int row_count = pack_keys(&w, &work, transposed);
        tile t = tile_of_task(g, &work);
        const na_tiles tiles = na_work_tiles(g, &work), next_tiles = na_work_tiles(g, &next);
        ahead_clear(&w.keys);
        if (w.fetches)
            look_ahead(&w, &next,
                       (tiles.end - tiles.first) * (transposed ? row_count : INT64_C(1)));
        t.spans = w.spans;
        for (int i = tiles.first; i < tiles.end; i++) {
            tile_at(&t, i, w.rows, row_count);
            if (!transposed) {
                gather_tile(&w, &t);
                continue;
            }
            const int last = i + 1 == tiles.end;
            look_around(&w, &t, last ? &next : &work, last ? next_tiles.first : i + 1);
            score_tile(&w, &t);
        }
    }
    vec_fence();
}

static void score_task(void *context, int64_t worker) { run_tasks(context, worker, 1); }
static void gather_task(void *context, int64_t worker) { run_tasks(context, worker, 0); }
