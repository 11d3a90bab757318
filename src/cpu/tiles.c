/* SPDX-License-Identifier: MIT */
#include "cpu/tiles.h"

#include <stdlib.h>
#include <string.h>

/* Keys of a part when tiles run across: long enough that the keys packed twice (a window's reach
 * of lanes) are few, short enough that a ring of parts slides. */
enum { CUT = 512 };

/* Longest range of queries that an upright map is worked on at once, so that the ring of key rows
 * stays in the second-level cache. */
enum { UPRIGHT = 512 };

static int ceil_div(int a, int b) { return (a + b - 1) / b; }

/* The window of a local query, its first key local. */
static na_window window_of(const natten_axis *axis, int query)
{
    na_window window = na_window_of(na_axis_of(axis), (int)axis->query_origin + query);
    window.first -= (int)axis->key_origin;
    return window;
}

/* How the starts of the tile's lanes lie. */
static int mode_of(const na_lanes *tile, int lanes, int full)
{
    int shift = 1, broadcast = 1, largest = 0;
    for (int l = 0; l < tile->count; l++) {
        shift &= tile->start[l] == l;
        broadcast &= tile->start[l] == 0;
        largest = na_max(largest, tile->start[l]);
    }
    return shift                ? NA_SHIFT
           : broadcast          ? NA_BROADCAST
           : largest < lanes    ? NA_PERMUTE
           : largest < 2 * full ? NA_PERMUTE2
                                : NA_GATHER;
}

static void make_lanes(na_geometry *g, na_lanes *tile, int query)
{
    const natten_axis *axis = &g->axis[2];
    int dilation = (int)axis->dilation;
    tile->query = query;
    tile->count = na_min(g->lanes, (int)axis->query_extent - query);
    tile->half = tile->count <= g->half;
    tile->base = INT32_MAX;
    tile->uniform = 1;
    for (int l = 0; l < tile->count; l++) {
        na_window window = window_of(axis, query + l);
        int place = (int)(axis->query_origin - axis->key_origin) + query + l;
        tile->start[l] = window.first;
        tile->limit[l] = window.count;
        tile->bias[l] = (window.first - place) / dilation + (int)axis->window - 1;
        tile->base = na_min(tile->base, window.first);
        tile->keys = na_max(tile->keys, window.count);
        tile->uniform &= tile->bias[l] == tile->bias[0];
    }
    for (int l = 0; l < tile->count; l++) {
        tile->start[l] -= tile->base;
        tile->masked |= tile->limit[l] != tile->keys;
        g->spread = na_max(g->spread, tile->start[l]);
    }
    tile->mode = mode_of(tile, tile->half ? g->half : g->lanes, g->lanes);
    for (int l = tile->count; l < NA_LANES; l++) {
        tile->start[l] = tile->mode == NA_SHIFT ? l : 0;
        tile->limit[l] = tile->keys;
        tile->bias[l] = tile->bias[0];
    }
}

static int make_lane_tiles(na_geometry *g)
{
    int extent = (int)g->axis[2].query_extent;
    g->lane_tiles = ceil_div(extent, g->lanes);
    g->lane = calloc((size_t)g->lane_tiles, sizeof *g->lane);
    if (!g->lane)
        return 0;
    for (int i = 0; i < g->lane_tiles; i++)
        make_lanes(g, &g->lane[i], i * g->lanes);
    return 1;
}

/* Map rows of axis 1 a dilation apart, in blocks of nearly equal size. */
static int make_upright_blocks(na_geometry *g, int rows)
{
    const natten_axis *axis = &g->axis[1];
    int extent = (int)axis->query_extent, dilation = (int)na_min((int)axis->dilation, extent);
    g->block = calloc((size_t)extent, sizeof *g->block);
    if (!g->block)
        return 0;
    for (int residue = 0; residue < dilation; residue++) {
        int count = ceil_div(extent - residue, (int)axis->dilation), pieces = ceil_div(count, rows);
        for (int i = 0; i < pieces; i++) {
            na_block *block = &g->block[g->blocks++];
            int from = (int)((int64_t)count * i / pieces);
            block->rows = (int)((int64_t)count * (i + 1) / pieces) - from;
            for (int r = 0; r < block->rows; r++)
                block->index[r] = residue + (from + r) * (int)axis->dilation;
            na_window head = window_of(axis, block->index[0]);
            na_window tail = window_of(axis, block->index[block->rows - 1]);
            int keys = (tail.first - head.first) / (int)axis->dilation + tail.count;
            g->ring_y = na_max(g->ring_y, keys);
        }
    }
    return 1;
}

/* True if the tile can be a further row of a block that begins with `head`. */
static int joins(const na_geometry *g, const na_lanes *head, const na_lanes *tile)
{
    int dilation = (int)g->axis[2].dilation, apart = tile->base - head->base;
    return tile->mode == head->mode && tile->count == head->count && apart >= 0 &&
           apart % dilation == 0 && apart / dilation < head->keys &&
           !memcmp(tile->start, head->start, sizeof head->start);
}

/* Lane tiles of one map row that see the same keys shifted by whole steps. */
static int make_across_blocks(na_geometry *g, int rows)
{
    int dilation = (int)g->axis[2].dilation;
    g->block = calloc((size_t)g->lane_tiles, sizeof *g->block);
    char *used = calloc((size_t)g->lane_tiles, 1);
    if (!g->block || !used) {
        free(used);
        return 0;
    }
    for (int i = 0; i < g->lane_tiles; i++) {
        if (used[i])
            continue;
        na_block *block = &g->block[g->blocks++];
        for (int64_t j = i; j < g->lane_tiles && block->rows < rows; j += dilation) {
            if (used[j] || !joins(g, &g->lane[i], &g->lane[j]))
                break;
            int offset = (g->lane[j].base - g->lane[i].base) / dilation;
            used[j] = 1;
            block->index[block->rows] = (int)j;
            block->offset[block->rows++] = offset;
            block->keys = na_max(block->keys, offset + g->lane[j].keys);
        }
    }
    free(used);
    g->ring_y = (int)g->axis[1].window;
    return 1;
}

/* Parts of equal numbers of lane tiles, each with all the keys these see. */
static int make_upright_parts(na_geometry *g)
{
    g->parts = ceil_div(g->lane_tiles * g->lanes, UPRIGHT);
    g->part = calloc((size_t)g->parts, sizeof *g->part);
    if (!g->part)
        return 0;
    for (int p = 0; p < g->parts; p++) {
        na_part *part = &g->part[p];
        part->tile = (int)((int64_t)g->lane_tiles * p / g->parts);
        part->end = (int)((int64_t)g->lane_tiles * (p + 1) / g->parts);
        part->first = INT32_MAX;
        int end = 0;
        for (int i = part->tile; i < part->end; i++) {
            const na_lanes *tile = &g->lane[i];
            part->first = na_min(part->first, tile->base);
            for (int l = 0; l < tile->count; l++) {
                int last = (tile->limit[l] - 1) * (int)g->axis[2].dilation;
                end = na_max(end, tile->base + tile->start[l] + last + 1);
            }
        }
        part->width = part->cut = end - part->first;
        g->width = na_max(g->width, part->width);
    }
    g->ring_part = 1;
    return 1;
}

static int make_across_parts(na_geometry *g)
{
    int extent = (int)g->axis[2].key_extent, reach = na_max(g->spread, g->lanes);
    int cut = na_max(CUT, ceil_div(2 * reach, g->lanes) * g->lanes);
    g->parts = ceil_div(extent, cut);
    g->part = calloc((size_t)g->parts, sizeof *g->part);
    if (!g->part)
        return 0;
    for (int p = 0; p < g->parts; p++) {
        na_part *part = &g->part[p];
        part->first = p * cut;
        part->cut = cut;
        part->width = na_min(cut + reach, extent - part->first);
        g->width = na_max(g->width, part->width);
    }
    for (int i = 0; i < g->blocks; i++) {
        na_work work = {.block = &g->block[i]};
        int first, last;
        na_work_parts(g, &work, &first, &last);
        g->ring_part = na_max(g->ring_part, last - first + 1);
    }
    return 1;
}

/* Keys that a loaded key serves on average, in tiles of so many rows, each `apart` keys after the
 * one before. */
static double sharing(double rows, double window, double apart)
{
    double shared = rows * window / (window + (rows - 1) * apart);
    return shared > 1 ? shared : 1;
}

static int choose_across(const na_geometry *g, int rows)
{
    const natten_axis *y = &g->axis[1], *x = &g->axis[2];
    int upright = na_min(rows, ceil_div((int)y->query_extent, (int)y->dilation));
    int tiles = ceil_div((int)x->query_extent, g->lanes);
    int across = na_min(rows, ceil_div(tiles, (int)x->dilation));
    return sharing(across, (double)x->window, g->lanes) > sharing(upright, (double)y->window, 1);
}

/* What is known once blocks and parts stand. */
static void make_bounds(na_geometry *g, const natten_problem *problem, int rows)
{
    int keys = 0, cuts = 2 * rows + g->ring_part;
    for (int i = 0; i < g->lane_tiles; i++)
        keys = na_max(keys, g->lane[i].keys);
    for (int i = 0; i < g->blocks; i++)
        keys = na_max(keys, g->block[i].keys);
    g->width = ceil_div(g->width + g->lanes, g->lanes) * g->lanes;
    g->ring_z = (int)g->axis[0].window;
    g->key_rows = g->ring_z * g->ring_y;
    g->additional = problem->additional_tokens;
    g->additional_slot = (int64_t)g->key_rows * g->ring_part;
    int64_t more = (g->additional + g->width - 1) / g->width;
    g->slots = g->additional_slot + more;
    g->spans = g->key_rows * (ceil_div(keys, NA_RUN) + cuts) + (int)(g->additional / NA_RUN) +
               (int)more + 1;
    int64_t maps = g->axis[0].query_extent * (g->across ? g->axis[1].query_extent : g->parts);
    g->tasks = problem->batch * g->kv_heads * maps * g->blocks * g->head_tiles;
}

na_geometry *na_geometry_make(const natten_problem *problem, int lanes, int half, int rows)
{
    na_geometry *g = calloc(1, sizeof *g);
    if (!g)
        return NULL;
    g->lanes = lanes;
    g->half = half;
    memcpy(g->axis, problem->axis, sizeof g->axis);
    g->kv_heads = problem->kv_heads;
    g->group = (int)(problem->heads / problem->kv_heads);
    g->head_tiles = ceil_div(g->group, rows);
    g->heads = ceil_div(g->group, g->head_tiles);
    rows /= g->heads;
    g->across = choose_across(g, rows);
    int made = make_lane_tiles(g);
    if (g->across)
        made = made && make_across_blocks(g, rows) && make_across_parts(g);
    else
        made = made && make_upright_blocks(g, rows) && make_upright_parts(g);
    if (!made) {
        na_geometry_free(g);
        return NULL;
    }
    make_bounds(g, problem, rows);
    return g;
}

void na_geometry_free(void *geometry)
{
    na_geometry *g = geometry;
    if (!g)
        return;
    free(g->lane);
    free(g->block);
    free(g->part);
    free(g);
}

na_work na_work_at(const na_geometry *g, int64_t task)
{
    na_work work = {0};
    int head_tile = (int)(task % g->head_tiles);
    task /= g->head_tiles;
    work.head = head_tile * g->heads;
    work.heads = na_min(g->heads, g->group - work.head);
    work.block = &g->block[task % g->blocks];
    work.rows = work.block->rows * work.heads;
    task /= g->blocks;
    if (g->across) {
        work.y = (int)(task % g->axis[1].query_extent);
        task /= g->axis[1].query_extent;
    }
    work.z = (int)(task % g->axis[0].query_extent);
    task /= g->axis[0].query_extent;
    if (!g->across) {
        work.part = (int)(task % g->parts);
        task /= g->parts;
    }
    work.kv_head = task % g->kv_heads;
    work.batch = task / g->kv_heads;
    work.head += (int)work.kv_head * g->group;
    return work;
}

void na_work_parts(const na_geometry *g, const na_work *work, int *first, int *last)
{
    *first = *last = work->part;
    if (g->across) {
        int base = g->lane[work->block->index[0]].base, cut = g->part[0].cut;
        *first = base / cut;
        *last = (int)((base + (int64_t)(work->block->keys - 1) * g->axis[2].dilation) / cut);
    }
}

int na_key_rows(const na_geometry *g, const na_work *work, na_key_row *rows)
{
    const natten_axis *az = &g->axis[0], *ay = &g->axis[1];
    na_window z = window_of(az, work->z), y[NA_ROWS];
    int count = 0, queries = g->across ? 1 : work->block->rows, end = 0;
    for (int r = 0; r < queries; r++) {
        y[r] = window_of(ay, g->across ? work->y : work->block->index[r]);
        end = na_max(end, y[r].first + y[r].count * (int)ay->dilation);
    }
    for (int i = 0; i < z.count; i++) {
        int kz = z.first + i * (int)az->dilation, lo = 0, hi = 0;
        int slot_z = (int)((kz + az->key_origin) / az->dilation % g->ring_z);
        for (int ky = y[0].first; ky < end; ky += (int)ay->dilation) {
            int slot_y = (int)((ky + ay->key_origin) / ay->dilation % g->ring_y);
            while (hi < queries && y[hi].first <= ky)
                hi++;
            while (lo < hi && y[lo].first + y[lo].count * (int)ay->dilation <= ky)
                lo++;
            if (lo == hi)
                continue;
            na_key_row row = {kz, ky, lo * work->heads, hi * work->heads,
                              ((int64_t)slot_z * g->ring_y + slot_y) * g->ring_part};
            if (g->across)
                row.hi = work->rows;
            rows[count++] = row;
        }
    }
    return count;
}

static int64_t tag_of(const na_geometry *g, const na_work *work, const na_key_row *row, int part)
{
    int64_t tag = work->batch * g->kv_heads + work->kv_head;
    tag = (tag * g->axis[0].key_extent + row->z) * g->axis[1].key_extent + row->y;
    return tag * g->parts + part;
}

void na_ring_fill(const na_geometry *g, const na_work *work, const na_key_row *rows, int row_count,
                  int64_t *tags, na_pack pack, void *context)
{
    int first, last;
    na_work_parts(g, work, &first, &last);
    for (int i = 0; i < row_count; i++)
        for (int p = first; p <= last; p++) {
            int64_t slot = rows[i].slot + p % g->ring_part, tag = tag_of(g, work, &rows[i], p);
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
        for (int p = first; p <= last; p++) {
            int64_t slot = rows[i].slot + p % g->ring_part;
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
        runs[0] = (run){0, g->lane[tile].keys, 0, block->rows};
        return 1;
    }
    int count = 0, from = 0;
    while (from < block->keys) {
        int lo = 0, hi = 0, to = block->keys;
        for (int r = 0; r < block->rows; r++) {
            int begin = block->offset[r], end = begin + g->lane[block->index[r]].keys;
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
        even = ceil_div(even, ceil_div(even, NA_RUN));
    while (r.from < r.to) {
        int64_t key = base + (int64_t)r.from * step;
        int number = g->across ? (int)(key / g->part[0].cut) : work->part;
        const na_part *part = &g->part[number];
        int x = (int)(key - part->first), len = na_min(even, r.to - r.from);
        if (g->across)
            len = na_min(len, ceil_div(part->cut - x, step));
        span.slot = g->across ? slot + number % g->ring_part : slot;
        span.token = span.slot * g->width + x;
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
        spans[count++] = (na_span){.slot = g->additional_slot + token / g->width,
                                   .token = g->additional_slot * g->width + token,
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
            limits[r][l] = row->limit[l] + work->block->offset[r / work->heads];
    }
    return limits[0];
}

int na_spans(const na_geometry *g, const na_work *work, int tile, const na_key_row *rows,
             int row_count, na_span *spans, int32_t limits[NA_ROWS][NA_LANES])
{
    const na_lanes *lanes = na_work_lanes(g, work, tile, 0);
    run runs[2 * NA_ROWS];
    const int run_count = make_runs(g, work, tile, runs);
    na_span span = {.slot = rows[0].slot,
                    .x = lanes->base,
                    .step = (int)g->axis[2].dilation,
                    .mode = lanes->mode,
                    .limit_step = g->across ? NA_LANES : 0,
                    .start = lanes->start,
                    .limit = make_limits(g, work, tile, limits)};
    int first = 0;
    for (int j = 0; j < run_count; j++) {
        span.lo = runs[j].lo * work->heads;
        span.hi = runs[j].hi * work->heads;
        first += cut_run(g, work, runs[j], span, spans + first);
    }
    /* Other key rows differ in where they lie and, upright, in who sees them. */
    for (int i = row_count - 1; i >= 0; i--) {
        const int64_t apart = rows[i].slot - rows[0].slot;
        for (int j = 0; j < first; j++) {
            na_span *s = &spans[i * first + j];
            *s = spans[j];
            s->slot += apart;
            s->token += apart * g->width;
            s->z = rows[i].z;
            s->y = rows[i].y;
            if (!g->across) {
                s->lo = rows[i].lo;
                s->hi = rows[i].hi;
            }
        }
    }
    const int count = first * row_count;
    return count + additional_spans(g, work, spans + count);
}
