/* SPDX-License-Identifier: MIT
 * The queries of a tile's row in tensors: its lanes are neighbours, but where heads lie side by
 * side one head's may end and the next one's begin. And the keys of a row of slots.
 * Parameters: the texts kernels.c includes before this one. */

/* The lanes of a row of a tile in a tensor of queries. */
typedef struct query_lanes {
    const na_geometry *g;
    const tensor *tensor;
    char *at;          /* the first lane */
    int number, count; /* the lane tile, and its queries */
    int whole;         /* 1: all of one head, as nearly always */
} query_lanes;

/* The first lane of row r. */
static char *query_row(const na_geometry *g, const na_work *work, int tile, int r,
                       const tensor *tensor)
{
    const na_tile *t = &g->tile[na_work_tile(g, work, tile, r)];
    return tensor_at(tensor, work->batch, na_work_head(work, r) + t->head * g->group, work->z,
                     na_work_query(g, work, r), t->x);
}

static inline query_lanes query_lanes_of(const na_geometry *g, const na_work *work, int tile, int r,
                                         int count, const tensor *tensor)
{
    const int number = na_work_tile(g, work, tile, r);
    return (query_lanes){
        g,      tensor, query_row(g, work, tile, r, tensor),
        number, count,  g->beside == 1 || g->tile[number].x + count <= g->axis[2].query_extent};
}

/* The first lane of a piece. */
static inline char *piece_at(const query_lanes *q, na_piece piece)
{
    if (piece.lane == 0)
        return q->at;
    const na_tile first = q->g->tile[q->number];
    return q->at + (piece.head - first.head) * q->tensor->head * q->g->group +
           (piece.x - first.x) * q->tensor->axis[2];
}

/* How far each lane is from the first one, in bytes. */
static void lane_offsets(const query_lanes *q, int64_t offset[VL])
{
    const int64_t step = q->tensor->axis[2];
    for (int l = 0; l < VL; l++)
        offset[l] = l * step;
    if (q->whole)
        return;
    NA_EACH_PIECE(p, q->g, q->number, q->count)
    for (int l = p.lane; l < p.end; l++)
        offset[l] = piece_at(q, p) - q->at + (l - p.lane) * step;
}

/* Has the lanes fetched. */
static void queries_ahead(ahead *a, const query_lanes *q, int64_t bytes)
{
    NA_EACH_PIECE(p, q->g, q->number, q->count)
    ahead_add(a, piece_at(q, p), q->tensor->axis[2], bytes, p.end - p.lane);
}

/* As pack_transposed, to [channel][VL]. */
static void pack_queries(const query_lanes *q, int dtype, int channels, real factor, real *to)
{
    const int64_t step = q->tensor->axis[2];
    if (q->whole) {
        pack_transposed(dtype, q->at, step, q->tensor->further, q->count, channels, factor, to, VL);
        return;
    }
    const int extent = (int)q->g->axis[2].query_extent;
    tokens row = {q->at, step, q->tensor->head * q->g->group - (extent - 1) * step,
                  extent - q->g->tile[q->number].x, extent};
    pack_seam(dtype, &row, q->count, channels, factor, to, VL);
}

/* As pack_natural. */
static void pack_queries_naturally(const query_lanes *q, int channels, real factor, real *to,
                                   int64_t step)
{
    NA_EACH_PIECE(p, q->g, q->number, q->count)
    pack_natural(q->tensor->dtype, piece_at(q, p), q->tensor->axis[2], q->tensor->further,
                 p.end - p.lane, channels, factor, to + p.lane * step, step);
}

/* Results, packed naturally, to their tensor. */
static void unpack_queries(const query_lanes *q, const real *from, int64_t step, int channels)
{
    NA_EACH_PIECE(p, q->g, q->number, q->count)
    unpack_natural(q->tensor->dtype, from + p.lane * step, step, p.end - p.lane, channels,
                   piece_at(q, p), q->tensor->axis[2]);
}

/* One real of each lane, to and from a tensor of reals. */
static void put_reals(const query_lanes *q, const real *from)
{
    NA_EACH_PIECE(p, q->g, q->number, q->count)
    {
        char *to = piece_at(q, p);
        for (int l = p.lane; l < p.end; l++, to += q->tensor->axis[2])
            memcpy(to, &from[l], sizeof(real));
    }
}

static void get_reals(const query_lanes *q, real *to)
{
    NA_EACH_PIECE(p, q->g, q->number, q->count)
    {
        const char *from = piece_at(q, p);
        for (int l = p.lane; l < p.end; l++, from += q->tensor->axis[2])
            memcpy(&to[l], from, sizeof(real));
    }
}

/* A tensor that is packed. Long tokens that come from memory are fetched while those before them
 * are packed: 3 to 10 % with 128 channels. (From the last-level cache they come in time, and asking
 * costs 2 to 4 %.) */
static tensor packed_of(const natten_problem *problem, const natten_run *run, natten_role role,
                        const na_geometry *g)
{
    tensor t = tensor_of(problem, run, role);
    const int64_t channels = na_role_shape(problem, role).channels;
    if (g->cut.ahead && ahead_level_of(channels * stored_size(t.dtype)) == AHEAD_NOWHERE)
        t.further = VL * t.axis[2];
    return t;
}

/* As pack_transposed, the keys of a part of a key row, all heads after each other. */
static void pack_keys_transposed(const na_geometry *g, const tensor *tensor, int dtype,
                                 int64_t batch, int64_t kv_head, int32_t z, int32_t y,
                                 const na_part *part, int channels, real *to, int64_t channel)
{
    const na_keys first = na_keys_of(g, part, 0);
    const char *at = tensor_at(tensor, batch, kv_head, z, y, first.x);
    if (g->beside == 1) {
        pack_transposed(dtype, at, tensor->axis[2], tensor->further, first.count, channels, 1, to,
                        channel);
        return;
    }
    const tokens row = {at, tensor->axis[2], tensor->head - (first.count - 1) * tensor->axis[2],
                        first.count, first.count};
    pack_heads(dtype, row, part->width, channels, 1, to, channel);
}

/* As pack_natural, likewise. */
static void pack_keys_naturally(const na_geometry *g, const tensor *tensor, int64_t batch,
                                int64_t kv_head, int32_t z, int32_t y, const na_part *part,
                                int channels, real *to, int64_t step)
{
    for (int h = 0; h < g->beside; h++) {
        const na_keys keys = na_keys_of(g, part, h);
        pack_natural(tensor->dtype, tensor_at(tensor, batch, kv_head + h, z, y, keys.x),
                     tensor->axis[2], tensor->further, keys.count, channels, 1,
                     to + keys.place * step, step);
    }
}

/* The biases of the keys, likewise. In order: each head's end in zeros, where the next one's begin.
 */
static void pack_key_biases(const na_geometry *g, const tensor *bias, int64_t batch,
                            int64_t kv_head, int32_t z, int32_t y, const na_part *part,
                            real *channel)
{
    for (int h = 0; h < g->beside && bias->data; h++) {
        const na_keys keys = na_keys_of(g, part, h);
        key_bias_pack(bias, tensor_at(bias, batch, kv_head + h, z, y, keys.x), keys.count,
                      channel + keys.place);
    }
}

/* Whether to fetch ahead, by how long the first keys that a worker needs take to come: from the
 * last-level cache of a Zen 5 2 to 3 ticks for a line, from memory 8 to 20. Guessing wrong costs up
 * to 8 % the one way, half of the time the other. Without a clock they come from memory. */
static int needs_ahead(const na_geometry *g, const na_work *work, const na_key_row *rows,
                       int row_count, const tensor *tensor, int64_t bytes)
{
    enum { LINES = 128, TICKS = 5 };
    if (g->cut.ahead)
        return 1;
    int first, last, lines = 0;
    na_work_parts(g, work, &first, &last);
    const na_keys keys = na_keys_of(g, &g->part[first], 0);
    const uint64_t begin = na_cpu_ticks();
    for (int i = 0; i < row_count && lines < LINES; i++) {
        const char *at =
            tensor_at(tensor, work->batch, work->kv_head, rows[i].z, rows[i].y, keys.x);
        for (int n = 0; n < keys.count && lines < LINES; n++, at += tensor->axis[2])
            for (int64_t b = 0; b < bytes; b += 64, lines++)
                (void)*(const volatile char *)(at + b);
    }
    return !begin || na_cpu_ticks() - begin > (uint64_t)(TICKS * lines);
}

/* Has the keys, or the values, of a part of a key row fetched. */
static void keys_ahead(ahead *a, const na_geometry *g, const tensor *tensor, int64_t batch,
                       int64_t kv_head, int32_t z, int32_t y, const na_part *part, int64_t bytes)
{
    for (int h = 0; h < g->beside; h++) {
        const na_keys keys = na_keys_of(g, part, h);
        ahead_add(a, tensor_at(tensor, batch, kv_head + h, z, y, keys.x), tensor->axis[2], bytes,
                  keys.count);
    }
}
