/* SPDX-License-Identifier: MIT
 * Attention weights of a tile between memory, where a query's slots are consecutive, and the inner
 * loops, where lanes are.
 * Parameters: those of pack_tmpl.h. */

/* A tile of an unfused op and the spans of keys that its rows see. */
typedef struct tile {
    const na_geometry *geometry;
    const na_work *work;
    int number;                  /* of the lane tile; across: not looked at */
    na_row_lanes lanes;          /* of its rows */
    int width;                   /* between scores of a lane */
    int cut;                     /* 1: causal axes 0 or 1 forbid some row's slots */
    int masked;                  /* 1: causal axis 2 forbids some lane's slots */
    na_window z, y[NA_ROWS];     /* windows of the rows */
    int64_t before[NA_ROWS];     /* slots of row 0's window before the row's, and its offset */
    int bias_z, bias_y[NA_ROWS]; /* place of the rows' windows in axes 0, 1 of a bias */
    int count;                   /* of spans */
    na_span *spans;
    int32_t limits[NA_ROWS][NA_LANES];
} tile;

static int tile_lanes(const tile *t, int row)
{
    return na_lanes_of_row(t->lanes, t->work->rows, row);
}

/* What all tiles of a task share. */
static tile tile_of_task(const na_geometry *g, const na_work *work)
{
    const natten_axis *az = &g->axis[0], *ay = &g->axis[1];
    tile t = {.geometry = g, .work = work};
    t.z = na_window_of(na_axis_of(az), (int)az->query_origin + work->z);
    t.bias_z = (t.z.first - (int)az->query_origin - work->z) / (int)az->dilation;
    t.bias_z += (int)az->window - 1;
    t.cut = t.z.count != az->window;
    t.z.first -= (int)az->key_origin;
    for (int r = 0; r < work->rows; r++) {
        int y = (int)ay->query_origin + na_work_query(g, work, r);
        t.y[r] = na_window_of(na_axis_of(ay), y);
        t.bias_y[r] = (t.y[r].first - y) / (int)ay->dilation + (int)ay->window - 1;
        t.cut |= t.y[r].count != ay->window;
        t.y[r].first -= (int)ay->key_origin;
        t.before[r] = (t.y[r].first - t.y[0].first) / ay->dilation * g->axis[2].window +
                      na_work_offset(work, r);
    }
    return t;
}

/* Moves on to a lane tile, with all spans of these key rows. */
static void tile_at(tile *t, int number, const na_key_row *rows, int row_count)
{
    const na_geometry *g = t->geometry;
    t->number = number;
    t->masked = 0;
    for (int r = 0; r < t->work->rows; r++) {
        const na_lanes *lanes = na_work_lanes(g, t->work, number, r);
        t->width = lanes->half ? g->half : g->lanes;
        t->masked |= lanes->masked || lanes->keys != g->axis[2].window;
    }
    t->lanes = na_lanes_of_rows(g, t->work, number);
    t->count = na_spans(g, t->work, number, 0, rows, row_count, t->spans, t->limits);
}

/* Where a span lies in the windows of the tile's rows. */
typedef struct place {
    int z, y;     /* key row of row 0's window */
    int64_t slot; /* of row 0, its offset not counted; additional tokens: of all rows */
} place;

static place place_of(const tile *t, const na_span *span)
{
    const natten_axis *axis = t->geometry->axis;
    place p = {0};
    if (span->z < 0) {
        p.slot = axis[0].window * axis[1].window * axis[2].window + span->y;
        return p;
    }
    p.z = (span->z - t->z.first) / (int)axis[0].dilation;
    p.y = (span->y - t->y[0].first) / (int)axis[1].dilation;
    p.slot = (p.z * axis[1].window + p.y) * axis[2].window + span->first;
    return p;
}

/* The slot of a span's first key for tile row r. */
static inline int64_t slot_of(const tile *t, const na_span *span, place p, int row)
{
    return span->z < 0 ? p.slot : p.slot - t->before[row];
}

/* Where the first lane of tile row r is in a tensor of queries. */
static char *query_at(const tensor *x, const tile *t, int row)
{
    return query_row(t->geometry, t->work, t->number, row, x);
}

/* More than the first-level caches hold is not worth fetching ahead. */
enum { LOOK_BYTES = 128 << 10 };

/* Notes a tile's rows of a tensor. */
static void look_at_tile(ahead *a, const tensor *x, const na_geometry *g, const na_work *work,
                         int number, int64_t elements)
{
    const int lanes = na_work_lanes(g, work, number, 0)->count;
    const int64_t bytes = elements * stored_size(x->dtype);
    for (int r = 0; r < work->rows && work->rows * lanes * bytes <= LOOK_BYTES; r++)
        ahead_add(a, query_row(g, work, number, r, x), x->axis[2], bytes,
                  na_work_lanes(g, work, number, r)->count);
}

/* Scores [slot][width lanes] of VL slots to memory, at most `slots` of them. */
static ALWAYS_INLINE void store_square(const int dtype, const real *score, int width, int64_t slots,
                                       int lanes, char *to, int64_t lane)
{
    vec r[VL];
    if (width == VL)
        UNROLL
    for (int i = 0; i < VL; i++)
        r[i] = vec_load(score + i * VL);
    else UNROLL for (int i = 0; i < VL; i++) r[i] = vec_load_part(score + i * width, width);
    vec_transpose(r);
    if (slots >= VL && lanes == VL)
        UNROLL
    for (int i = 0; i < VL; i++)
        store_stored(dtype, to + i * lane, r[i]);
    else UNROLL for (int i = 0; i < VL; i++) if (i < lanes && slots < VL)
        store_stored_part(dtype, to + i * lane, (int)slots, r[i]);
    else if (i < lanes) store_stored(dtype, to + i * lane, r[i]);
}

/* Scores of one slot to memory: less work than a square where few slots are left. */
static ALWAYS_INLINE void store_slot(const int dtype, const real *score, int lanes, char *to,
                                     int64_t lane)
{
    char all[VL * sizeof(real)];
    store_stored(dtype, all, vec_loadu(score));
    for (int l = 0; l < lanes; l++)
        memcpy(to + l * lane, all + l * stored_size(dtype), (size_t)stored_size(dtype));
}

enum { FEW_SLOTS = VL / 4 };

static ALWAYS_INLINE void store_row(const int dtype, const real *score, int width, int64_t slots,
                                    int lanes, char *to, int64_t lane)
{
    const int size = stored_size(dtype);
    for (; slots > FEW_SLOTS; slots -= VL, score += VL * width, to += VL * size)
        store_square(dtype, score, width, slots, lanes, to, lane);
    for (; slots > 0; slots--, score += width, to += size)
        store_slot(dtype, score, lanes, to, lane);
}

/* Scores of a tile row to memory. Score holds slots up to a multiple of VL. */
static void store_scores(int dtype, const real *score, int width, int64_t slots, int lanes,
                         char *to, int64_t lane)
{
#define ONE(type)                                                                                  \
    if (dtype == type)                                                                             \
        store_row(type, score, width, slots, lanes, to, lane);
    STORED(ONE)
#undef ONE
}

/* Weights of a tile for aggregate and scatter: row r's slot s, lane l, at row[r][l * lane + s]. */
typedef struct weights {
    real *row[NA_ROWS];
    int64_t lane;
} weights;

/* Slots that a copied lane takes. */
static inline int64_t copied_slots(int64_t slots) { return padded(slots) + VL; }

/* Forbidden slots may hold anything, and are multiplied with what their keys hold. */
static void clear_forbidden(const tile *t, int row, real *to, int64_t lane)
{
    const na_geometry *g = t->geometry;
    const na_lanes *lanes = na_work_lanes(g, t->work, t->number, row);
    for (int l = 0, end = tile_lanes(t, row); l < end; l++)
        for (int z = 0; z < t->z.count; z++)
            for (int y = 0; y < t->y[row].count; y++)
                for (int64_t x = lanes->limit[l]; x < g->axis[2].window; x++)
                    to[l * lane + (z * g->axis[1].window + y) * g->axis[2].window + x] = 0;
}

static ALWAYS_INLINE void copy_slots(const int dtype, const char *from, int64_t slots, real *to)
{
    int64_t s = 0;
    for (; s + VL <= slots; s += VL)
        vec_storeu(to + s, load_stored(dtype, from + s * stored_size(dtype)));
    if (s < slots)
        vec_storeu(to + s,
                   load_stored_part(dtype, from + s * stored_size(dtype), (int)(slots - s)));
}

/* The weights of a tile where they lie, or, if they have to be converted or some must not be used,
 * copied to room: rows * lanes * copied_slots reals. */
static weights load_weights(const tile *t, const tensor *attn, int64_t slots, real *room)
{
    const int lanes = t->geometry->lanes;
    const int64_t lane = attn->axis[2];
    weights w = {.lane = copied_slots(slots)};
    if (stored_size(attn->dtype) == sizeof(real) && !t->masked) {
        w.lane = lane / (int64_t)sizeof(real);
        for (int r = 0; r < t->work->rows; r++)
            w.row[r] = (real *)query_at(attn, t, r);
        return w;
    }
    for (int r = 0; r < t->work->rows; r++, room += lanes * w.lane) {
        const char *from = query_at(attn, t, r);
        for (int l = 0, end = tile_lanes(t, r); l < end; l++) {
#define ONE(type)                                                                                  \
    if (attn->dtype == type)                                                                       \
        copy_slots(type, from + l * lane, slots, room + l * w.lane);
            STORED(ONE)
#undef ONE
        }
        if (t->masked)
            clear_forbidden(t, r, room, w.lane);
        w.row[r] = room;
    }
    return w;
}

/* Values (or sums) of one block of spans: they stay in the second-level cache. Each block goes
 * through the weights of all lanes, which lie far apart: the more of a lane at once, the better. */
enum { VALUE_BYTES = 256 << 10 };

/* The end of a block of spans from `begin` on: the slots of each row follow one another. Sets where
 * each row's weights begin. */
static int next_block(const tile *t, const weights *weights, int depth, int begin,
                      real *at[NA_ROWS])
{
    int64_t next[NA_ROWS], bytes = 0;
    const int64_t token = padded(depth) * (int64_t)sizeof(real);
    for (int r = 0; r < t->work->rows; r++)
        next[r] = -1;
    for (int i = begin; i < t->count; i++) {
        const na_span *span = &t->spans[i];
        const place p = place_of(t, span);
        bytes += span->len * token;
        if (bytes > VALUE_BYTES && i > begin)
            return i;
        for (int r = span->lo; r < span->hi; r++)
            if (next[r] >= 0 && next[r] != slot_of(t, span, p, r))
                return i;
        for (int r = span->lo; r < span->hi; r++) {
            const int64_t slot = slot_of(t, span, p, r);
            if (next[r] < 0)
                at[r] = weights->row[r] + slot;
            next[r] = slot + span->len;
        }
    }
    return t->count;
}
