/* SPDX-License-Identifier: MIT */
#include "cpu/tiles.h"

#include <stdlib.h>

/* The next digit of a task's number. */
static int digit(int64_t *number, int64_t base)
{
    int value = (int)(*number % base);
    *number /= base;
    return value;
}

na_work na_work_at(const na_geometry *g, int64_t task)
{
    const int64_t extent = g->axis[0].query_extent;
    na_work work = {.head = digit(&task, g->head_tiles) * g->heads};
    work.heads = na_min(g->heads, g->group - work.head);
    int z = g->across || g->planes ? 0 : digit(&task, extent);
    work.block = &g->block[digit(&task, g->blocks)];
    for (int i = 0; i < work.block->rows; i++)
        for (int head = 0; head < work.heads; head++) {
            work.row_block[work.rows] = (uint8_t)i;
            work.row_head[work.rows++] = (uint8_t)head;
        }
    if (g->across)
        work.y = digit(&task, g->axis[1].query_extent);
    if (g->across || g->planes)
        z = digit(&task, extent);
    work.z = g->order_z[z];
    if (!g->across)
        work.part = digit(&task, g->parts);
    work.kv_head = task % g->head_sets * g->beside;
    work.batch = task / g->head_sets;
    work.head += (int)work.kv_head * g->group;
    return work;
}

void na_work_parts(const na_geometry *g, const na_work *work, int *first, int *last)
{
    *first = *last = work->part;
    if (g->across) {
        int base = g->tile[work->block->index[0]].base, cut = g->part[0].cut;
        *first = base / cut;
        *last = (int)((base + (int64_t)(work->block->keys - 1) * g->axis[2].dilation) / cut);
    }
}

int na_work_part_after(const na_geometry *g, const na_work *work, int part)
{
    const int64_t cut = g->part[0].cut, dilation = g->axis[2].dilation;
    if (!g->across || dilation <= cut)
        return part + 1;
    const int64_t base = g->tile[work->block->index[0]].base;
    const int64_t steps = ((part + 1) * cut - base + dilation - 1) / dilation;
    return (int)((base + steps * dilation) / cut);
}

/* The key rows of one key of axis 0, `step` apart in the list, as if that key's slots were the
 * first ones of the ring; returns their number. */
static int plane_rows(const na_geometry *g, const na_work *work, int step, na_key_row *rows)
{
    const natten_axis *ay = &g->axis[1];
    const int dilation = (int)ay->dilation, queries = g->across ? 1 : work->block->rows;
    const na_window own = na_local_window(ay, g->across ? work->y : 0);
    const na_window *y = g->across ? &own : work->block->y;
    int count = 0, end = 0, lo = 0, hi = 0;
    for (int r = 0; r < queries; r++)
        end = na_max(end, y[r].first + y[r].count * dilation);
    int slot = g->planes ? y[0].first : (int)((y[0].first + ay->key_origin) / dilation % g->ring_y);
    for (int ky = y[0].first; ky < end; ky += dilation) {
        while (hi < queries && y[hi].first <= ky)
            hi++;
        while (lo < hi && y[lo].first + y[lo].count * dilation <= ky)
            lo++;
        if (lo < hi)
            rows[step * count++] =
                (na_key_row){0, ky, lo * work->heads, g->across ? work->rows : hi * work->heads,
                             (int64_t)slot * g->ring_part};
        /* Divisions would cost more than all else here. */
        slot += g->planes ? dilation : 1;
        if (slot == g->ring_y)
            slot = 0;
    }
    return count;
}

int na_key_rows(const na_geometry *g, const na_work *work, int together, na_key_row *rows)
{
    const natten_axis *az = &g->axis[0];
    const na_window z = na_local_window(az, work->z);
    const int step = together ? z.count : 1, count = plane_rows(g, work, step, rows);
    const int plane = together ? 1 : count; /* from a key of axis 0 to the next */
    /* From the last one, so that the first plane is there until it is copied. */
    for (int i = z.count - 1; i >= 0; i--) {
        const int kz = z.first + i * (int)az->dilation;
        const int64_t slot = (kz + az->key_origin) / az->dilation % g->ring_z;
        for (int r = 0; r < count; r++) {
            na_key_row row = rows[r * step];
            row.z = kz;
            row.slot += slot * g->ring_y * g->ring_part;
            rows[r * step + i * plane] = row;
        }
    }
    return count * z.count;
}

static inline int64_t tag_of(const na_geometry *g, const na_work *work, const na_key_row *row,
                             int part)
{
    int64_t tag = work->batch * g->head_sets * g->beside + work->kv_head;
    tag = (tag * g->axis[0].key_extent + row->z) * g->axis[1].key_extent + row->y;
    return tag * g->parts + part;
}

/* Where a part of a key row is. Upright there is one: a division for each would cost more than all
 * else here. */
static inline int64_t slot_of(const na_geometry *g, const na_key_row *row, int part)
{
    return row->slot + (g->ring_part > 1 ? part % g->ring_part : 0);
}

void na_ring_fill(const na_geometry *g, const na_work *work, const na_key_row *rows, int row_count,
                  int64_t *tags, na_pack pack, void *context)
{
    int first, last;
    na_work_parts(g, work, &first, &last);
    for (int i = 0; i < row_count; i++)
        for (int p = first; p <= last; p = na_work_part_after(g, work, p)) {
            int64_t slot = slot_of(g, &rows[i], p), tag = tag_of(g, work, &rows[i], p);
            if (tags[slot] == tag)
                continue;
            tags[slot] = tag;
            pack(context, slot, rows[i].z, rows[i].y, &g->part[p]);
        }
}

void na_ring_missing(const na_geometry *g, const na_work *work, const na_key_row *rows,
                     int row_count, const int64_t *tags, na_pack pack, void *context)
{
    int first, last;
    na_work_parts(g, work, &first, &last);
    for (int i = 0; i < row_count; i++)
        for (int p = first; p <= last; p = na_work_part_after(g, work, p)) {
            int64_t slot = slot_of(g, &rows[i], p);
            if (tags[slot] != tag_of(g, work, &rows[i], p))
                pack(context, slot, rows[i].z, rows[i].y, &g->part[p]);
        }
}

/* A run of keys of the innermost axis, before it is cut: keys [from, to) counted from the first
 * row's window start, seen by block rows [lo, hi). */
typedef struct run {
    int from, to, lo, hi;
} run;

static int make_runs(const na_geometry *g, const na_work *work, int tile, run *runs)
{
    const na_block *block = work->block;
    if (!g->across) {
        runs[0] = (run){0, na_tile_lanes(g, tile)->keys, 0, block->rows};
        return 1;
    }
    int count = 0, from = 0;
    while (from < block->keys) {
        int lo = 0, hi = 0, to = block->keys;
        for (int r = 0; r < block->rows; r++) {
            int begin = block->offset[r], end = begin + na_tile_lanes(g, block->index[r])->keys;
            lo += end <= from;
            hi += begin <= from;
            if (begin > from)
                to = na_min(to, begin);
            if (end > from)
                to = na_min(to, end);
        }
        if (lo < hi)
            runs[count++] = (run){from, to, lo, hi};
        from = to;
    }
    return count;
}

/* Cuts a run of one key row at the ends of parts and to the length of spans. */
static int cut_run(const na_geometry *g, const na_work *work, run r, na_span span, na_span *spans)
{
    int count = 0, step = (int)g->axis[2].dilation, base = span.x, even = r.to - r.from;
    int64_t slot = span.slot;
    if (even > NA_RUN)
        even = na_ceil_div(even, na_ceil_div(even, NA_RUN));
    while (r.from < r.to) {
        int64_t key = base + (int64_t)r.from * step;
        int number = g->across ? (int)(key / g->part[0].cut) : work->part;
        const na_part *part = &g->part[number];
        int x = (int)(key - part->first), len = na_min(even, r.to - r.from);
        if (g->across)
            len = na_min(len, na_ceil_div(part->cut - x, step));
        span.slot = g->across ? slot + number % g->ring_part : slot;
        span.token = span.slot * g->apart + x;
        span.x = x;
        span.key = (int)key;
        span.len = len;
        span.first = r.from;
        spans[count++] = span;
        r.from += len;
    }
    return count;
}

static const int32_t no_start[NA_LANES];

static int additional_spans(const na_geometry *g, const na_work *work, na_span *spans)
{
    int count = 0;
    for (int64_t token = 0; token < g->additional;) {
        int x = (int)(token % g->width), left = (int)na_min(NA_RUN, g->width - x);
        int len = g->additional - token < left ? (int)(g->additional - token) : left;
        const int64_t slot = g->additional_slot + token / g->width;
        spans[count++] = (na_span){.slot = slot,
                                   .token = slot * g->apart + x,
                                   .x = x,
                                   .step = 1,
                                   .len = len,
                                   .hi = work->rows,
                                   .mode = NA_BROADCAST,
                                   .z = -1,
                                   .y = (int)token,
                                   .start = no_start};
        token += len;
    }
    return count;
}

/* Limits of the tile's rows (upright: of all of them), counted from the first row's start; NULL: no
 * lane has fewer keys than another. */
static const int32_t *make_limits(const na_geometry *g, const na_work *work, int tile,
                                  int32_t limits[NA_ROWS][NA_LANES])
{
    int masked = 0, count = g->across ? work->rows : 1;
    for (int r = 0; r < count; r++)
        masked |= na_work_lanes(g, work, tile, r)->masked;
    if (!masked)
        return NULL;
    for (int r = 0; r < count; r++) {
        const na_lanes *row = na_work_lanes(g, work, tile, r);
        for (int l = 0; l < NA_LANES; l++)
            limits[r][l] = row->limit[l] + na_work_offset(work, r);
    }
    return limits[0];
}

/* A span of the first key row as one of another, which differs in where it lies and, upright, in
 * who sees it. */
static na_span span_of_row(const na_geometry *g, const na_span *first, const na_key_row *rows,
                           int row)
{
    const int64_t apart = rows[row].slot - rows[0].slot;
    na_span span = *first;
    span.slot += apart;
    span.token += apart * g->apart;
    span.z = rows[row].z;
    span.y = rows[row].y;
    if (!g->across) {
        span.lo = rows[row].lo;
        span.hi = rows[row].hi;
    }
    return span;
}

int na_spans(const na_geometry *g, const na_work *work, int tile, int together,
             const na_key_row *rows, int row_count, na_span *spans,
             int32_t limits[NA_ROWS][NA_LANES])
{
    const na_lanes *lanes = na_work_lanes(g, work, tile, 0);
    run runs[2 * NA_ROWS];
    const int run_count = make_runs(g, work, tile, runs);
    na_span span = {.slot = row_count > 0 ? rows[0].slot : 0,
                    .x = g->tile[na_work_tile(g, work, tile, 0)].base,
                    .step = (int)g->axis[2].dilation,
                    .mode = lanes->mode,
                    .spread = lanes->spread,
                    .limit_step = g->across ? NA_LANES : 0,
                    .start = lanes->start,
                    .limit = make_limits(g, work, tile, limits)};
    int first = 0;
    for (int j = 0; j < run_count; j++) {
        span.lo = runs[j].lo * work->heads;
        span.hi = runs[j].hi * work->heads;
        first += cut_run(g, work, runs[j], span, spans + first);
    }
    /* From the last one, so that no span of the first row is lost before it is copied. */
    if (together && g->across)
        for (int j = first - 1; j >= 0; j--)
            for (int i = row_count - 1; i >= 0; i--)
                spans[j * row_count + i] = span_of_row(g, &spans[j], rows, i);
    else
        for (int i = row_count - 1; i >= 0; i--)
            for (int j = 0; j < first; j++)
                spans[i * first + j] = span_of_row(g, &spans[j], rows, i);
    const int count = first * row_count;
    return count + additional_spans(g, work, spans + count);
}
