/* SPDX-License-Identifier: MIT
 * The queries of a tile's row in tensors: its lanes are neighbours, but where heads lie side by
 * side one head's may end and the next one's begin. Parameters: the texts kernels.c includes before
 * this one. */

/* The first lane of a piece of row r of a tile in a tensor of queries. */
static inline char *piece_at(const na_geometry *g, const na_work *work, na_piece piece, int r,
                             const tensor *tensor)
{
    return tensor_at(tensor, work->batch, na_work_head(work, r) + piece.head * g->group, work->z,
                     na_work_query(g, work, r), piece.x);
}

/* The first lane of the row. */
static char *query_row(const na_geometry *g, const na_work *work, int tile, int r,
                       const tensor *tensor)
{
    const na_tile *t = &g->tile[na_work_tile(g, work, tile, r)];
    return tensor_at(tensor, work->batch, na_work_head(work, r) + t->head * g->group, work->z,
                     na_work_query(g, work, r), t->x);
}

/* Whether so many lanes of a lane tile are one head's: that they are is the usual case, and then
 * nothing is asked for each row. */
static inline int one_head(const na_geometry *g, int number, int lanes)
{
    return g->beside == 1 || g->tile[number].x + lanes <= g->axis[2].query_extent;
}

/* How far each of a tile's lanes is from the first one, in units of so many bytes. */
static void lane_offsets(const na_geometry *g, int tile, int lanes, const tensor *tensor, int unit,
                         int64_t offset[VL])
{
    const int64_t step = tensor->axis[2] / unit, head = tensor->head / unit * g->group;
    for (int l = 0; l < VL; l++)
        offset[l] = l * step;
    if (one_head(g, tile, lanes))
        return;
    const na_tile first = g->tile[tile];
    NA_EACH_PIECE(p, g, tile, lanes)
    for (int l = p.lane; l < p.end; l++)
        offset[l] = (p.head - first.head) * head + (p.x + l - p.lane - first.x) * step;
}

/* Has the row's lanes fetched. */
static void queries_ahead(ahead *a, const na_geometry *g, const na_work *work, int tile, int r,
                          const tensor *tensor, int64_t bytes)
{
    const int number = na_work_tile(g, work, tile, r), lanes = na_tile_lanes(g, number)->count;
    if (one_head(g, number, lanes)) {
        ahead_add(a, query_row(g, work, tile, r, tensor), tensor->axis[2], bytes, lanes);
        return;
    }
    NA_EACH_PIECE(p, g, number, lanes)
    ahead_add(a, piece_at(g, work, p, r, tensor), tensor->axis[2], bytes, p.end - p.lane);
}

/* As pack_transposed, to [channel][VL]. */
static void pack_queries(const na_geometry *g, const na_work *work, int tile, int r, int lanes,
                         const tensor *tensor, int dtype, int channels, real factor, real *to)
{
    const int extent = (int)g->axis[2].query_extent, number = na_work_tile(g, work, tile, r);
    const char *at = query_row(g, work, tile, r, tensor);
    if (one_head(g, number, lanes)) {
        pack_transposed(dtype, at, tensor->axis[2], lanes, channels, factor, to, VL);
        return;
    }
    tokens row = {at, tensor->axis[2], tensor->head * g->group - (extent - 1) * tensor->axis[2],
                  extent - g->tile[number].x, extent};
    pack_seam(dtype, &row, lanes, channels, factor, to, VL);
}

/* As pack_natural. */
static void pack_queries_naturally(const na_geometry *g, const na_work *work, int tile, int r,
                                   int lanes, const tensor *tensor, int channels, real factor,
                                   real *to, int64_t step)
{
    const int number = na_work_tile(g, work, tile, r);
    if (one_head(g, number, lanes)) {
        pack_natural(tensor->dtype, query_row(g, work, tile, r, tensor), tensor->axis[2], lanes,
                     channels, factor, to, step);
        return;
    }
    NA_EACH_PIECE(p, g, number, lanes)
    pack_natural(tensor->dtype, piece_at(g, work, p, r, tensor), tensor->axis[2], p.end - p.lane,
                 channels, factor, to + p.lane * step, step);
}

/* The row's results, packed naturally, to their tensor. */
static void unpack_queries(const na_geometry *g, const na_work *work, int tile, int r, int lanes,
                           const tensor *tensor, const real *from, int64_t step, int channels)
{
    const int number = na_work_tile(g, work, tile, r);
    NA_EACH_PIECE(p, g, number, lanes)
    unpack_natural(tensor->dtype, from + p.lane * step, step, p.end - p.lane, channels,
                   piece_at(g, work, p, r, tensor), tensor->axis[2]);
}

/* One real of each of the row's lanes, to and from a tensor of reals. */
static void put_reals(const na_geometry *g, const na_work *work, int tile, int r, int lanes,
                      const tensor *tensor, const real *from)
{
    char *to = query_row(g, work, tile, r, tensor);
    int64_t offset[VL];
    lane_offsets(g, na_work_tile(g, work, tile, r), lanes, tensor, 1, offset);
    for (int l = 0; l < lanes; l++)
        memcpy(to + offset[l], &from[l], sizeof(real));
}

static void get_reals(const na_geometry *g, const na_work *work, int tile, int r, int lanes,
                      const tensor *tensor, real *to)
{
    const char *from = query_row(g, work, tile, r, tensor);
    int64_t offset[VL];
    lane_offsets(g, na_work_tile(g, work, tile, r), lanes, tensor, 1, offset);
    for (int l = 0; l < lanes; l++)
        memcpy(&to[l], from + offset[l], sizeof(real));
}

/* As pack_transposed, the keys of a part of a key row, all heads after each other. */
static void pack_keys_transposed(const na_geometry *g, const tensor *tensor, int dtype,
                                 int64_t batch, int64_t kv_head, int32_t z, int32_t y,
                                 const na_part *part, int channels, real *to, int64_t channel)
{
    const na_keys first = na_keys_of(g, part, 0);
    const char *at = tensor_at(tensor, batch, kv_head, z, y, first.x);
    if (g->beside == 1) {
        pack_transposed(dtype, at, tensor->axis[2], first.count, channels, 1, to, channel);
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
                     tensor->axis[2], keys.count, channels, 1, to + keys.place * step, step);
    }
}
