/* SPDX-License-Identifier: MIT */
#include "core/problem.h"
#include "cpu/cpuid.h"
#include "cpu/lanes.h"

#include <stdlib.h>
#include <string.h>

/* Gives back what turned out to be too much. */
static void trim_blocks(na_geometry *g)
{
    na_block *trimmed = realloc(g->block, (size_t)g->blocks * sizeof *trimmed);
    g->block = trimmed ? trimmed : g->block;
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
        int count = na_ceil_div(extent - residue, (int)axis->dilation),
            pieces = na_ceil_div(count, rows);
        for (int i = 0; i < pieces; i++) {
            na_block *block = &g->block[g->blocks++];
            int from = (int)((int64_t)count * i / pieces);
            block->rows = (int)((int64_t)count * (i + 1) / pieces) - from;
            for (int r = 0; r < block->rows; r++) {
                block->index[r] = residue + (from + r) * (int)axis->dilation;
                block->y[r] = na_local_window(axis, block->index[r]);
            }
            na_window head = block->y[0], tail = block->y[block->rows - 1];
            int keys = (tail.first - head.first) / (int)axis->dilation + tail.count;
            g->ring_y = na_max(g->ring_y, keys);
        }
    }
    trim_blocks(g);
    return 1;
}

/* True if the tile can be a further row of a block that begins with `head`. Where all lanes see
 * the same keys it may have fewer lanes. */
static int joins(const na_geometry *g, const na_tile *first, const na_tile *next)
{
    const na_lanes *head = &g->lane[first->kind], *tile = &g->lane[next->kind];
    int dilation = (int)g->axis[2].dilation, apart = next->base - first->base;
    if (tile->count < head->count)
        return head->mode == NA_BROADCAST && apart == 0 &&
               !memcmp(tile->start, head->start, (size_t)tile->count * sizeof *tile->start);
    return tile->mode == head->mode && tile->count == head->count && apart >= 0 &&
           apart % dilation == 0 && apart / dilation < head->keys &&
           !memcmp(tile->start, head->start, sizeof head->start);
}

/* Rows of a block that begins with lane tile i: all that can be, or, where the rest of the axis
 * sees the same keys, so many that its blocks are of nearly equal size. */
static int across_rows(const na_geometry *g, int i, int rows)
{
    const int most = 3 * rows; /* far from the end it makes no difference */
    const int count = na_min(g->lane_tiles - i, most);
    if (count == most || g->axis[2].dilation > 1)
        return rows;
    for (int j = i; j < g->lane_tiles; j++)
        if (g->tile[j].base != g->tile[i].base || !joins(g, &g->tile[i], &g->tile[j]))
            return rows;
    return na_ceil_div(count, na_ceil_div(count, rows));
}

/* A tile of the last few queries becomes one of a whole vector, as the rows before it. */
static void widen(na_lanes *tile, const na_lanes *head)
{
    tile->mode = head->mode;
    tile->half = head->half;
    memcpy(tile->start, head->start, sizeof tile->start);
}

/* Lane tiles of one map row that see the same keys shifted by whole steps. */
static int make_across_blocks(na_geometry *g, int rows)
{
    const int dilation = (int)g->axis[2].dilation, apart = na_tiles_apart(g);
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
        const int some = across_rows(g, i, rows);
        for (int64_t j = i; j < g->lane_tiles && block->rows < some; j += apart) {
            if (used[j] || !joins(g, &g->tile[i], &g->tile[j]))
                break;
            int offset = (g->tile[j].base - g->tile[i].base) / dilation;
            used[j] = 1;
            if (na_tile_lanes(g, (int)j)->count < na_tile_lanes(g, i)->count)
                widen(&g->lane[g->tile[j].kind], na_tile_lanes(g, i));
            block->index[block->rows] = (int)j;
            block->offset[block->rows++] = offset;
            block->keys = na_max(block->keys, offset + na_tile_lanes(g, (int)j)->keys);
        }
    }
    free(used);
    trim_blocks(g);
    g->ring_y = (int)g->axis[1].window;
    return 1;
}

/* Parts of equal numbers of lane tiles, each with all the keys these see. */
static int make_upright_parts(na_geometry *g)
{
    g->parts = na_ceil_div(g->lane_tiles * g->lanes, g->cut.part);
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
            const na_lanes *tile = na_tile_lanes(g, i);
            const int base = g->tile[i].base;
            part->first = na_min(part->first, base);
            for (int l = 0; l < tile->count; l++) {
                int last = (tile->limit[l] - 1) * (int)g->axis[2].dilation;
                end = na_max(end, base + tile->start[l] + last + 1);
            }
        }
        if (g->beside > 1) {
            part->first = 0;
            end = (int)na_row_keys(g);
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
    int cut = na_max(g->cut.part, na_ceil_div(2 * reach, g->lanes) * g->lanes);
    g->parts = na_ceil_div(extent, cut);
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

/* Tile rows that a loaded key serves on average, of so many rows, each `apart` keys after the one
 * before. Windows stand still at borders: together they see no more keys than there are. */
static double sharing(double rows, const natten_axis *axis, double apart)
{
    const double keys = na_ceil_div((int)axis->key_extent, (int)axis->dilation);
    const double reach = (double)axis->window + (rows - 1) * apart;
    const double shared = rows * (double)axis->window / (reach < keys ? reach : keys);
    return shared > 1 ? shared : 1;
}

/* What upright_cost and across_cost count in: keys of a query's window, each loaded for it alone.
 * As was measured, packing a key costs as much as nine of them. A tile across costs more for each
 * of its queries: it is a task of its own, and its rows share short runs only; so with every key
 * row after the first, but in the forward, which takes the runs of all key rows together. */
static const double pack_cost = 9;
static const struct {
    double tile, row;
} across_costs[NATTEN_OPS] = {
    [NATTEN_FORWARD] = {3, 0}, [NATTEN_BACKWARD] = {1, 4.4},     [NATTEN_QK] = {10, 4.4},
    [NATTEN_AV] = {10, 4.4},   [NATTEN_QK_BACKWARD] = {10, 4.4}, [NATTEN_AV_BACKWARD] = {10, 4.4}};

static double window_cost(const na_geometry *g, double shared)
{
    return (double)(g->axis[0].window * g->axis[1].window * g->axis[2].window) / shared;
}

/* An upright part packs all that lies between its first key and its last: with a large dilation,
 * keys of many other parts. Key rows are packed once, or again for every block of rows where tasks
 * run along axis 0. */
static double upright_cost(const na_geometry *g, int rows)
{
    const natten_axis *y = &g->axis[1], *x = &g->axis[2];
    const int most = na_min(rows, na_ceil_div((int)y->query_extent, (int)y->dilation));
    const double shared = sharing(most, y, 1), extent = (double)x->key_extent;
    const double parts = na_ceil_div((int)x->query_extent, g->cut.part);
    const double reach = (double)((x->window - 1) * x->dilation);
    const double width = (double)x->query_extent / parts + reach;
    const double again = g->axis[0].query_extent > 1 ? (double)y->window / shared : 1;
    const double packed = again * parts * (width < extent ? width : extent) / extent;
    return window_cost(g, shared) + pack_cost * packed;
}

/* Across, a key row is packed once for each of the rows of queries that see it, unless the ring
 * holds whole rows: then once for each query of axis 0 that does. */
static double across_cost(const na_geometry *g, natten_op op, int rows)
{
    const natten_axis *z = &g->axis[0], *y = &g->axis[1], *x = &g->axis[2];
    const int tiles = na_ceil_div((int)x->query_extent, g->lanes), apart = na_tiles_apart(g);
    const int most = na_min(rows, na_ceil_div(tiles, apart));
    const double keys = (double)apart * g->lanes / (double)x->dilation;
    const double shared = sharing(most, x, keys);
    const double reach = ((double)x->window + (most - 1) * keys) * (double)x->dilation;
    const int whole = y->dilation == 1 && reach > (double)(x->key_extent - g->cut.part);
    const double packed = (double)(z->window * (whole ? 1 : y->window));
    const double more = (double)(z->window * y->window - 1) * across_costs[op].row;
    return window_cost(g, shared) + pack_cost * packed + across_costs[op].tile + more;
}

static int choose_across(const na_geometry *g, natten_op op, int rows)
{
    if (g->cut.across >= 0)
        return g->cut.across;
    return across_cost(g, op, rows) < upright_cost(g, rows);
}

/* Whether a ring of whole planes pays, by the bytes of a worker. Where it does not, every key row
 * is packed for each block that sees it instead of once. The backward has keys and values
 * transposed, keys as they are, and the sums of both gradients, which are written as often as read.
 */
static int planes_pay(const natten_problem *p, int64_t tokens)
{
    const int backward = p->op == NATTEN_BACKWARD;
    const int64_t d = p->head_dim, e = p->value_dim, real = p->dtype == NATTEN_F64 ? 8 : 4;
    const int64_t token = (backward ? 3 * d + 2 * e : d + e) * real;
    return tokens * token <= (int64_t)(backward ? 4 : 8) << 20;
}

/* The ring of key rows, and the order of queries along axis 0. */
static int make_ring(na_geometry *g, const natten_problem *problem)
{
    const natten_axis *z = &g->axis[0], *y = &g->axis[1];
    g->ring_z = (int)z->window;
    g->key_rows = g->ring_z * g->ring_y;
    g->planes = g->cut.planes && !g->across && z->window > 1 &&
                planes_pay(problem, z->window * y->key_extent * g->width);
    if (g->planes)
        g->ring_y = (int)y->key_extent;
    g->order_z = calloc((size_t)z->query_extent, sizeof *g->order_z);
    if (!g->order_z)
        return 0;
    int count = 0;
    for (int64_t residue = 0; residue < z->dilation; residue++)
        for (int64_t i = residue; i < z->query_extent; i += z->dilation)
            g->order_z[count++] = (int)i;
    return 1;
}

/* What is known once blocks, parts and ring stand. */
static void make_bounds(na_geometry *g, const natten_problem *problem, int rows)
{
    int keys = 0, cuts = 2 * rows + g->ring_part;
    for (int i = 0; i < g->lane_kinds; i++)
        keys = na_max(keys, g->lane[i].keys);
    for (int i = 0; i < g->blocks; i++)
        keys = na_max(keys, g->block[i].keys);
    g->additional = problem->additional_tokens;
    g->additional_slot = (int64_t)g->ring_z * g->ring_y * g->ring_part;
    int64_t more = (g->additional + g->width - 1) / g->width;
    g->slots = g->additional_slot + more;
    g->spans = g->key_rows * (na_ceil_div(keys, NA_RUN) + cuts) + (int)(g->additional / NA_RUN) +
               (int)more + 1;
    int64_t maps = g->axis[0].query_extent * (g->across ? g->axis[1].query_extent : g->parts);
    g->tasks = problem->batch * g->head_sets * maps * g->blocks * g->head_tiles;
}

int64_t na_bias_entries(const natten_problem *p)
{
    int64_t entries = na_has(p, NATTEN_RPB) || na_has(p, NATTEN_D_RPB);
    for (int a = 0; a < 3; a++)
        entries *= 2 * p->axis[a].window - 1;
    return entries;
}

/* Whether what is read may well lie in the last-level cache, as long as there is room for others.
 * There it comes in time without being asked for, as AMD's processors were seen to have it (of
 * others that cache is not known). */
static int lies_near(const natten_problem *p)
{
    double bytes = 0;
    for (int role = 0; role < NATTEN_ROLES; role++) {
        if (!na_has(p, (natten_role)role) || na_role_is_output((natten_op)p->op, (natten_role)role))
            continue;
        const na_shape shape = na_role_shape(p, (natten_role)role);
        double elements = (double)shape.batch * (double)shape.heads * (double)shape.channels;
        for (int i = 0; i < 3; i++)
            elements *= (double)shape.extent[i];
        bytes += elements * (double)na_dtype_size(na_role_dtype(p, (natten_role)role));
    }
    return bytes < 0.4 * (double)na_cpu_last_cache();
}

na_geometry *na_geometry_make(const natten_problem *problem, int lanes, int half, na_cut cut)
{
    int rows = cut.rows;
    na_geometry *g = calloc(1, sizeof *g);
    if (!g)
        return NULL;
    g->lanes = lanes;
    g->half = half;
    g->cut = cut;
    memcpy(g->axis, problem->axis, sizeof g->axis);
    g->group = (int)(problem->heads / problem->kv_heads);
    g->head_tiles = na_ceil_div(g->group, rows);
    g->heads = na_ceil_div(g->group, g->head_tiles);
    rows /= g->heads;
    g->across = choose_across(g, (natten_op)problem->op, rows);
    if (!cut.beside)
        cut.beside = na_choose_beside(g, problem);
    g->cut.beside = g->beside = na_cut_beside(g->axis, lanes, cut, g->across);
    g->head_sets = problem->kv_heads / g->beside;
    g->bias_entries = g->beside > 1 ? (int)na_bias_entries(problem) * g->group : 0;
    if (cut.ahead < 0)
        g->cut.ahead = !lies_near(problem);
    int made = na_make_lane_tiles(g);
    if (g->across)
        made = made && make_across_blocks(g, rows) && make_across_parts(g);
    else
        made = made && make_upright_blocks(g, rows) && make_upright_parts(g);
    g->width = na_ceil_div(g->width + g->lanes, g->lanes) * g->lanes;
    g->apart = g->width | 1;
    if (!made || !make_ring(g, problem)) {
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
    free(g->tile);
    free(g->lane);
    free(g->block);
    free(g->part);
    free(g->order_z);
    free(g);
}
