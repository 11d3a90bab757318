/* SPDX-License-Identifier: MIT
 * Sums over queries: the gradient of keys (or values) from weights and the gradient of what they
 * made, and those of the additional tokens and of the bias.
 * A worker owns a box of keys and visits all queries that see some of them, in the order of the
 * tasks: no key is added to by two workers, and how boxes are cut does not change a bit. The few
 * sums that all queries add to are cut into shares of the tasks, whose number depends on the
 * problem only, and which are added up in order.
 * Parameters: those of micro_tmpl.h, pack_tmpl.h and weights_tmpl.h. */

/* Hands out pieces of a block of memory; measures only where there is none yet. */
typedef struct pieces {
    char *memory;
    size_t used;
} pieces;

static void *piece(pieces *p, int64_t count, size_t size)
{
    char *at = p->memory ? p->memory + p->used : NULL;
    p->used += ((size_t)count * size + 63) / 64 * 64;
    return at;
}

/* How the keys of one batch and key head are cut. Key rows (axes 0 and 1) stand in the order of the
 * dilation groups of axis 1, so that a box holds neighbours. */
typedef struct boxes {
    int64_t groups, places; /* of axis 1: at most places rows in each group */
    int64_t rows;           /* key rows, those that do not exist counted too */
    int64_t row_boxes, x_boxes;
    int64_t most_rows, most_keys; /* of a box: key rows, and keys of each with margins */
    int64_t margin;               /* keys beyond both ends of a row that spans may reach */
} boxes;

/* Units of work that even many processors find enough. */
enum { UNITS = 32 };

static boxes make_boxes(const na_geometry *g, const natten_problem *p)
{
    const natten_axis *ay = &g->axis[1], *ax = &g->axis[2];
    boxes b = {0};
    b.groups = ay->dilation < ay->key_extent ? ay->dilation : ay->key_extent;
    b.places = (ay->key_extent + b.groups - 1) / b.groups;
    b.rows = g->axis[0].key_extent * b.groups * b.places;
    const int64_t wanted = (UNITS + p->batch * p->kv_heads - 1) / (p->batch * p->kv_heads);
    /* A box less than a window high would have most of its queries visited for other boxes too. */
    const int64_t windows = b.rows / (2 * ay->window), fit = windows > 1 ? windows : 1;
    b.row_boxes = wanted < fit ? wanted : fit;
    b.most_rows = (b.rows + b.row_boxes - 1) / b.row_boxes;
    b.x_boxes = 1;
    if (g->across) {
        /* Spans end with their parts; but most of a tile's should be in one box. */
        const int64_t run = NA_RUN * ax->dilation, cut = g->part[0].cut;
        b.margin = (run < cut ? run : cut) + g->spread;
        const int64_t apart = wanted / b.row_boxes;
        const int64_t room = ax->key_extent / (4 * (run + g->spread));
        b.x_boxes = apart < room ? apart : room;
        b.x_boxes = b.x_boxes > 1 ? b.x_boxes : 1;
    }
    b.most_keys = (ax->key_extent + b.x_boxes - 1) / b.x_boxes + 2 * b.margin;
    /* Rows a power of two apart would share few sets of the cache. */
    b.most_keys += 3;
    return b;
}

/* What a scatter works on. */
typedef struct scattered {
    const natten_problem *problem;
    const na_geometry *geometry;
    boxes boxes;
    tensor query; /* query or d_out */
    tensor attn;  /* d_attn or attn */
    tensor key;   /* out: d_key or d_value, data NULL: not wanted */
    tensor more;  /* out: their additional tokens */
    tensor bias;  /* out: d_rpb */
    int depth;
    int64_t slots;
    int stream; /* key may be written past the caches */
    real factor;
    int64_t pairs;                           /* of batch and key head */
    int64_t pair_tasks;                      /* tasks of the geometry for each */
    int64_t shares;                          /* of each pair's tasks */
    int64_t more_sums, bias_head, bias_sums; /* sums of a share: bias_sums of a group's heads */
    double *sums;                            /* [pair][share][more_sums + bias_sums] */
    int64_t workers;
    na_queues *queues;
    char *memory;
    size_t bytes;
} scattered;

/* Shares of a pair's tasks, so many that all processors have some, unless memory forbids. */
static int64_t make_shares(const scattered *s)
{
    const int64_t bound = (int64_t)1 << 23, sums = s->pairs * (s->more_sums + s->bias_sums) + 1;
    int64_t shares = (UNITS + s->pairs - 1) / s->pairs;
    shares = shares < bound / sums ? shares : bound / sums;
    shares = shares < s->pair_tasks ? shares : s->pair_tasks;
    return shares > 1 ? shares : 1;
}

typedef struct scatter_worker {
    const scattered *s;
    na_key_row *rows;
    na_span *spans;
    real *sum;   /* box: [row][key][channel]; share: [token][channel] */
    real *bias;  /* share: [head of the group][2K-1]... */
    real *query; /* [row][lane][channel] */
    real *room;  /* of load_weights */
} scatter_worker;

static scatter_worker scatter_worker_of(const scattered *s, pieces *p)
{
    const na_geometry *g = s->geometry;
    const int64_t step = padded(s->depth);
    scatter_worker w = {.s = s};
    w.rows = piece(p, g->key_rows, sizeof *w.rows);
    w.spans = piece(p, g->spans, sizeof *w.spans);
    const int64_t box = s->key.data ? s->boxes.most_rows * s->boxes.most_keys * step : 0;
    w.sum = piece(p, box > s->more_sums ? box : s->more_sums, sizeof(real));
    w.bias = piece(p, s->bias_sums, sizeof(real));
    w.query = piece(p, NA_ROWS * VL * step, sizeof(real));
    w.room = piece(p, NA_ROWS * VL * copied_slots(s->slots), sizeof(real));
    return w;
}

/* The place of a key row among the rows of all boxes. */
static inline int64_t row_of(const boxes *b, const na_geometry *g, int z, int y)
{
    const int64_t group = b->groups == 1 ? 0 : y % g->axis[1].dilation;
    const int64_t place = b->groups == 1 ? y : y / g->axis[1].dilation;
    return (z * b->groups + group) * b->places + place;
}

/* The gradients of a tile's queries, factor included, for scatter_tile. */
static void load_queries(const scatter_worker *w, const tile *t)
{
    const scattered *s = w->s;
    const int64_t step = padded(s->depth);
    for (int r = 0; r < t->work->rows; r++)
        pack_natural(s->query.dtype, query_at(&s->query, t, r), s->query.axis[2], s->query.further,
                     tile_lanes(t, r), s->depth, s->factor, w->query + r * VL * step, step);
}

/* Adds a tile's spans to the sums, which their tokens count in. */
static void add_tile(const scatter_worker *w, const tile *t, const weights *weights)
{
    const int64_t step = padded(w->s->depth);
    real *at[NA_ROWS];
    for (int r = 0; r < t->work->rows; r++)
        at[r] = weights->row[r];
    for (int begin = 0, end; begin < t->count; begin = end) {
        end = next_block(t, weights, w->s->depth, begin, at);
        const scattering a = {.spans = t->spans + begin,
                              .count = end - begin,
                              .lanes = t->lanes.most,
                              .width = 1,
                              .weight_lane = weights->lane,
                              .weight = at,
                              .sum = w->sum,
                              .sum_step = step,
                              .grad = w->query,
                              .grad_row = VL * step,
                              .grad_lane = step};
        scatter_tile(&a, t->work->rows, t->lanes, w->s->depth);
    }
}

/* A box of keys: key rows [row, row_end), keys [x, x_end) of each. */
typedef struct box {
    int64_t pair, row, row_end, x, x_end;
} box;

static box box_at(const scattered *s, int64_t unit)
{
    const boxes *b = &s->boxes;
    const int64_t extent = s->geometry->axis[2].key_extent;
    const int64_t i = unit % b->x_boxes, j = unit / b->x_boxes % b->row_boxes;
    box x = {.pair = unit / b->x_boxes / b->row_boxes,
             .row = b->rows * j / b->row_boxes,
             .row_end = b->rows * (j + 1) / b->row_boxes,
             .x = extent * i / b->x_boxes,
             .x_end = extent * (i + 1) / b->x_boxes};
    return x;
}

/* Leaves a tile the spans that reach into the box, and says where their keys are in it. */
static void clip_spans(const scatter_worker *w, tile *t, const box *box)
{
    const scattered *s = w->s;
    const boxes *b = &s->boxes;
    int count = 0;
    for (int i = 0; i < t->count; i++) {
        const na_span *span = &t->spans[i];
        const int64_t last = span->key + (span->len - 1) * (int64_t)span->step;
        if (span->z < 0 || span->key >= box->x_end || last + s->geometry->spread < box->x)
            continue;
        const int64_t row = row_of(b, s->geometry, span->z, span->y) - box->row;
        t->spans[count] = *span;
        t->spans[count++].token = row * b->most_keys + b->margin + span->key - box->x;
    }
    t->count = count;
}

/* As unpack_natural, past the caches. */
static void stream_tokens(const real *source, int64_t step, int64_t tokens, int64_t channels,
                          char *to, int64_t token)
{
    for (int64_t t = 0; t < tokens; t++, source += step, to += token)
        for (int64_t c = 0; c < channels; c += VL)
            vec_stream((real *)to + c, vec_load(source + c));
}

static void store_box(const scatter_worker *w, const box *box)
{
    const scattered *s = w->s;
    const na_geometry *g = s->geometry;
    const boxes *b = &s->boxes;
    const int64_t step = padded(s->depth);
    for (int64_t row = box->row; row < box->row_end; row++) {
        const int64_t place = row % b->places, group = row / b->places % b->groups;
        const int64_t y = place * b->groups + group, z = row / b->places / b->groups;
        if (y >= g->axis[1].key_extent)
            continue;
        const real *from = w->sum + ((row - box->row) * b->most_keys + b->margin) * step;
        char *to =
            tensor_at(&s->key, box->pair / g->head_sets, box->pair % g->head_sets, z, y, box->x);
        if (s->stream)
            stream_tokens(from, step, box->x_end - box->x, s->depth, to, s->key.axis[2]);
        else
            unpack_natural(s->key.dtype, from, step, (int)(box->x_end - box->x), s->depth, to,
                           s->key.axis[2]);
    }
}

/* Whether tiles of a task may see keys of the box. */
static int reaches(const na_geometry *g, const na_work *work, const box *box)
{
    if (!g->across)
        return 1;
    const int64_t base = g->tile[work->block->index[0]].base, dilation = g->axis[2].dilation;
    const int64_t before = box->x - g->spread - base;
    const int64_t key = before > 0 ? (before + dilation - 1) / dilation : 0;
    return key < work->block->keys && base + key * dilation < box->x_end;
}

static void run_box(scatter_worker *w, int64_t unit)
{
    const scattered *s = w->s;
    const na_geometry *g = s->geometry;
    const box box = box_at(s, unit);
    memset(w->sum, 0,
           (size_t)(s->boxes.most_rows * s->boxes.most_keys * padded(s->depth)) * sizeof(real));
    for (int64_t i = 0; i < s->pair_tasks; i++) {
        const na_work work = na_work_at(g, box.pair * s->pair_tasks + i);
        if (!reaches(g, &work, &box))
            continue;
        const int all = na_key_rows(g, &work, 0, w->rows);
        int row_count = 0;
        for (int j = 0; j < all; j++) {
            const int64_t row = row_of(&s->boxes, g, w->rows[j].z, w->rows[j].y);
            if (row >= box.row && row < box.row_end)
                w->rows[row_count++] = w->rows[j];
        }
        if (!row_count)
            continue;
        tile t = tile_of_task(g, &work);
        t.spans = w->spans;
        const na_tiles tiles = na_work_tiles(g, &work);
        for (int j = tiles.first; j < tiles.end; j++) {
            tile_at(&t, j, w->rows, row_count);
            clip_spans(w, &t, &box);
            if (!t.count)
                continue;
            const weights weights = load_weights(&t, &s->attn, s->slots, w->room);
            load_queries(w, &t);
            add_tile(w, &t, &weights);
        }
    }
    store_box(w, &box);
}

/* Adds weights of all lanes that have one bias, or of one lane, to a run of bias sums. */
static void add_runs(const real *from, int64_t lane, int lanes, int keys, real *to)
{
    for (int k = 0; k < keys; k += VL) {
        const int some = na_min(keys - k, VL);
        vec sum = vec_load_part(to + k, some);
        for (int l = 0; l < lanes; l++)
            sum = vec_add(sum, vec_load_part(from + l * lane + k, some));
        vec_store_part(to + k, some, sum);
    }
}

/* Adds a tile's weights to the sums of their biases. */
static void add_weights(const scatter_worker *w, const tile *t, const weights *weights)
{
    const scattered *s = w->s;
    const na_geometry *g = s->geometry;
    const natten_axis *axis = g->axis;
    for (int r = 0; r < t->work->rows; r++) {
        const na_lanes *lanes = na_work_lanes(g, t->work, t->number, r);
        const int head = na_work_head(t->work, r) % g->group;
        for (int z = 0; z < t->z.count; z++)
            for (int y = 0; y < t->y[r].count; y++) {
                const real *from = weights->row[r] + (z * axis[1].window + y) * axis[2].window;
                const int64_t row = (t->bias_z + z) * (2 * axis[1].window - 1) + t->bias_y[r] + y;
                real *to = w->bias + head * s->bias_head + row * (2 * axis[2].window - 1);
                if (lanes->uniform)
                    add_runs(from, weights->lane, tile_lanes(t, r), lanes->keys,
                             to + lanes->bias[0]);
                else
                    for (int l = 0, end = tile_lanes(t, r); l < end; l++)
                        add_runs(from + l * weights->lane, 0, 1, lanes->limit[l],
                                 to + lanes->bias[l]);
            }
    }
}

static void run_share(scatter_worker *w, int64_t unit)
{
    const scattered *s = w->s;
    const na_geometry *g = s->geometry;
    const int64_t pair = unit / s->shares, share = unit % s->shares;
    const int64_t end = s->pair_tasks * (share + 1) / s->shares;
    double *sums = s->sums + unit * (s->more_sums + s->bias_sums);
    memset(sums, 0, (size_t)(s->more_sums + s->bias_sums) * sizeof *sums);
    for (int64_t i = s->pair_tasks * share / s->shares; i < end; i++) {
        const na_work work = na_work_at(g, pair * s->pair_tasks + i);
        memset(w->sum, 0, (size_t)s->more_sums * sizeof(real));
        memset(w->bias, 0, (size_t)s->bias_sums * sizeof(real));
        tile t = tile_of_task(g, &work);
        t.spans = w->spans;
        const na_tiles tiles = na_work_tiles(g, &work);
        for (int j = tiles.first; j < tiles.end; j++) {
            /* No key rows: the additional tokens only. */
            tile_at(&t, j, w->rows, 0);
            const weights weights = load_weights(&t, &s->attn, s->slots, w->room);
            if (s->bias_sums)
                add_weights(w, &t, &weights);
            if (!s->more_sums)
                continue;
            for (int k = 0; k < t.count; k++)
                t.spans[k].token = t.spans[k].y;
            load_queries(w, &t);
            add_tile(w, &t, &weights);
        }
        for (int64_t j = 0; j < s->more_sums; j++)
            sums[j] += w->sum[j];
        for (int64_t j = 0; j < s->bias_sums; j++)
            sums[s->more_sums + j] += w->bias[j];
    }
}

static int64_t box_units(const scattered *s)
{
    return s->key.data ? s->pairs * s->boxes.row_boxes * s->boxes.x_boxes : 0;
}

static int64_t share_units(const scattered *s)
{
    return s->more_sums + s->bias_sums ? s->pairs * s->shares : 0;
}

/* A natten_task. Boxes and shares take turns, since they are not of one size. */
static void scatter_task(void *context, int64_t number)
{
    const scattered *s = context;
    pieces memory = {s->memory + (size_t)number * s->bytes, 0};
    scatter_worker w = scatter_worker_of(s, &memory);
    const int64_t shares = share_units(s), units = box_units(s) + shares;
    for (na_turn turn = na_turn_of(s->queues, number); na_turn_next(&turn);) {
        const int64_t unit = turn.task, before = unit * shares / units;
        if ((unit + 1) * shares / units > before)
            run_share(&w, before);
        else
            run_box(&w, unit - before);
    }
    vec_fence();
}

/* The sum of one element over shares and, for a bias, over the batch. */
static real share_sum(const scattered *s, int64_t pair, int64_t batches, int64_t element)
{
    const int64_t sums = s->more_sums + s->bias_sums;
    double sum = 0;
    for (int64_t b = 0; b < batches; b++)
        for (int64_t i = 0; i < s->shares; i++)
            sum += s->sums[((b * s->geometry->head_sets + pair) * s->shares + i) * sums + element];
    return (real)sum;
}

static void store_more(const scattered *s, real *room)
{
    const int64_t step = padded(s->depth), heads = s->geometry->head_sets;
    for (int64_t pair = 0; pair < s->pairs; pair++)
        for (int64_t token = 0; token < s->geometry->additional; token++) {
            for (int64_t c = 0; c < step; c++)
                room[c] = share_sum(s, pair, 1, token * step + c);
            unpack_natural(s->more.dtype, room, step, 1, s->depth,
                           tensor_at(&s->more, pair / heads, pair % heads, token, 0, 0), 0);
        }
}

static void store_bias(const scattered *s, real *room)
{
    const natten_problem *p = s->problem;
    const na_geometry *g = s->geometry;
    for (int64_t h = 0; h < p->heads; h++)
        for (int64_t i = 0; i < s->bias_head; i++) {
            room[0] = share_sum(s, h / g->group, p->batch,
                                s->more_sums + h % g->group * s->bias_head + i);
            unpack_natural(s->bias.dtype, room, 0, 1, 1, bias_at(p, &s->bias, h, i), 0);
        }
}
