/* SPDX-License-Identifier: MIT */
#include "cpu/lanes.h"

#include <stdlib.h>
#include <string.h>

#include "cpu/choices.h"

/* How the starts of the tile's lanes lie. */
static int mode_of(const na_lanes *tile, int lanes, int full)
{
    int shift = 1, broadcast = tile->start[0] == 0, largest = tile->start[0];
    int pieces = tile->start[0] == 0 ? 1 : 3;
    for (int l = 1; l < tile->count; l++) {
        shift &= tile->start[l] == l;
        broadcast &= tile->start[l] == 0;
        largest = na_max(largest, tile->start[l]);
        pieces += tile->start[l] != tile->start[l - 1] + 1;
    }
    return shift                ? NA_SHIFT
           : broadcast          ? NA_BROADCAST
           : largest < lanes    ? NA_PERMUTE
           : pieces == 2        ? NA_SPLIT
           : largest < 2 * full ? NA_PERMUTE2
                                : NA_GATHER;
}

/* How the lanes' entries of a position bias lie, of which so many are a head's. Those of two heads
 * are picked from a vector of each. */
static void set_bias(na_lanes *tile, int lanes, int entries)
{
    const int last = tile->bias[tile->count - 1], heads = entries ? last / entries : 0;
    const int first = entries ? tile->bias[0] / entries : 0;
    tile->bias_apart = heads == first + 1 ? entries : 0;
    tile->bias_low = INT32_MAX;
    for (int l = 0; l < NA_LANES; l++) {
        const int second = tile->bias_apart && tile->bias[l] / entries > first;
        tile->bias_step[l] = tile->bias[l] - second * entries;
        tile->bias_low = na_min(tile->bias_low, tile->bias_step[l]);
    }
    for (int l = 0; l < NA_LANES; l++) {
        tile->bias_step[l] -= tile->bias_low;
        tile->bias_reach = na_max(tile->bias_reach, tile->bias_step[l]);
    }
    for (int l = 0; l < NA_LANES; l++)
        if (tile->bias_apart && tile->bias[l] / entries > first)
            tile->bias_step[l] += tile->bias_reach < lanes ? lanes : entries;
}

/* Fills in the lanes of the tile that begins with a query of the row of heads; returns its base. */
static int make_lanes(na_geometry *g, na_lanes *tile, int query)
{
    const natten_axis *axis = &g->axis[2];
    const int extent = (int)axis->query_extent, keys = (int)axis->key_extent;
    int dilation = (int)axis->dilation, base = INT32_MAX;
    *tile = (na_lanes){.count = na_min(g->lanes, g->beside * extent - query), .uniform = 1};
    tile->half = tile->count <= g->half;
    for (int l = 0; l < tile->count; l++) {
        const int head = (query + l) / extent, x = query + l - head * extent;
        na_window window = na_local_window(axis, x);
        int place = (int)(axis->query_origin - axis->key_origin) + x;
        tile->start[l] = head * keys + window.first;
        tile->limit[l] = window.count;
        tile->bias[l] =
            head * g->bias_entries + (window.first - place) / dilation + (int)axis->window - 1;
        base = na_min(base, tile->start[l]);
        tile->keys = na_max(tile->keys, window.count);
        tile->uniform &= tile->bias[l] == tile->bias[0];
    }
    for (int l = 0; l < tile->count; l++) {
        tile->start[l] -= base;
        tile->masked |= tile->limit[l] != tile->keys;
        tile->spread = na_max(tile->spread, tile->start[l]);
    }
    g->spread = na_max(g->spread, tile->spread);
    tile->mode = mode_of(tile, tile->half ? g->half : g->lanes, g->lanes);
    for (int l = tile->count; l < NA_LANES; l++) {
        /* Where keys lie far apart they are copied in pieces that follow one another. */
        tile->start[l] = tile->mode == NA_SHIFT      ? l
                         : tile->mode > NA_BROADCAST ? tile->start[l - 1] + 1
                                                     : 0;
        tile->limit[l] = tile->keys;
        tile->bias[l] = tile->bias[0];
    }
    set_bias(tile, g->lanes, g->bias_entries);
    return base;
}

/* The number of the kind that is like the one at the end of the list, which is dropped if an
 * earlier one is. Looks at the last few only: like tiles follow each other. */
static int settle_kind(na_geometry *g)
{
    const na_lanes *last = &g->lane[g->lane_kinds];
    for (int i = g->lane_kinds - 1; i >= 0 && i >= g->lane_kinds - 64; i--)
        if (!memcmp(&g->lane[i], last, sizeof *last))
            return i;
    return g->lane_kinds++;
}

/* Whether the windows of queries [begin, end) are all in step: a period on, a query sees the same
 * keys a period on. A window never moves further than its query, and it never shrinks; so it is
 * enough to look at both ends. */
static int in_step(const natten_axis *axis, int period, int begin, int end)
{
    for (int i = 0; i < period; i++) {
        const na_window head = na_local_window(axis, begin + i);
        const na_window tail = na_local_window(axis, end - period + i);
        if (tail.first - head.first != end - period - begin || tail.count != head.count)
            return 0;
    }
    return 1;
}

/* How many whole tiles from the one of query `begin` of a head on are alike but for their place.
 * Far from the borders of a long axis all are, and making each costs more than all else of a plan.
 */
static int count_alike(const na_geometry *g, int begin)
{
    const natten_axis *axis = &g->axis[2];
    const int64_t period = axis->dilation * axis->stride;
    const int left = ((int)axis->query_extent - begin) / g->lanes;
    int count = 1, step = 1;
    if (period > g->lanes || g->lanes % period)
        return count;
    while (step <= left - count &&
           in_step(axis, (int)period, begin, begin + (count + step) * g->lanes)) {
        count += step;
        step *= 2;
    }
    for (step /= 2; step > 0; step /= 2)
        if (step <= left - count &&
            in_step(axis, (int)period, begin, begin + (count + step) * g->lanes))
            count += step;
    return count;
}

int na_make_lane_tiles(na_geometry *g)
{
    const int extent = (int)g->axis[2].query_extent;
    int room = 0;
    g->lane_tiles = na_ceil_div(g->beside * extent, g->lanes);
    g->tile = calloc((size_t)g->lane_tiles, sizeof *g->tile);
    for (int i = 0; g->tile && i < g->lane_tiles;) {
        if (g->lane_kinds == room) {
            room = 2 * room + 8;
            na_lanes *more = realloc(g->lane, (size_t)room * sizeof *more);
            if (!more)
                return 0;
            g->lane = more;
        }
        const int head = i * g->lanes / extent, x = i * g->lanes - head * extent;
        const int base = make_lanes(g, &g->lane[g->lane_kinds], i * g->lanes);
        const int kind = settle_kind(g), end = i + count_alike(g, x);
        for (int apart = 0; i < end; i++, apart += g->lanes)
            g->tile[i] = (na_tile){base + apart, kind, head, x + apart};
    }
    return g->tile != NULL;
}

/* What scores of a lane tile cost, beside one whose keys follow one another. Of 16 lanes a second
 * load is one of two more lines; with fewer, pieces are copied. */
static double tile_cost(const na_lanes *tile, int lanes)
{
    static const double few[NA_MODES] = {1, 1.1, 1, 2, 1.4, 2};
    static const double many[NA_MODES] = {1, 1.1, 1, 1.3, 1.8, 2};
    return lanes < 16 ? few[tile->mode] : many[tile->mode];
}

/* The same of a head's row. */
static double row_cost(const na_geometry *geometry, int beside)
{
    na_geometry g = *geometry;
    double cost = 0;
    g.beside = beside;
    for (int query = 0; query < beside * (int)g.axis[2].query_extent; query += g.lanes) {
        na_lanes tile;
        make_lanes(&g, &tile, query);
        cost += tile_cost(&tile, g.lanes);
    }
    return cost / beside;
}

/* Whether tasks are small, or many, if rows of so many heads are one. */
static int tasks_suffice(const na_geometry *g, const natten_problem *p, int beside)
{
    enum { MANY = 64, SMALL = 1 << 21 };
    const int64_t queries = g->axis[1].query_extent * g->heads;
    const int64_t blocks = (queries + g->cut.rows - 1) / g->cut.rows;
    const int64_t tasks = p->batch * (p->kv_heads / beside) * g->axis[0].query_extent * blocks;
    return tasks >= MANY || na_products(p) <= (double)tasks * SMALL;
}

int32_t na_choose_beside(const na_geometry *g, const natten_problem *p)
{
    enum { MOST_BESIDE = 16, MOST_ENTRIES = 1 << 20 };
    int32_t best = 1;
    /* What goes by a query's place or by a head of its own keeps heads apart. */
    if (g->across || p->additional_tokens || p->dropout > 0 || na_has(p, NATTEN_D_RPB) ||
        p->axis[0].window > 1 || na_bias_entries(p) * p->heads > MOST_ENTRIES ||
        g->axis[2].query_extent > g->cut.part)
        return 1;
    /* The backward, whose ring holds five numbers for the forward's two, loses more by a longer
     * row, and scores are less of its time. */
    const double worthwhile = p->op == NATTEN_BACKWARD ? 0.7 : 0.95;
    double least = row_cost(g, 1);
    for (int n = 2; n <= MOST_BESIDE; n++) {
        const na_cut cut = {g->cut.rows, g->cut.part, 0, 0, n, 0};
        if (p->kv_heads % n || na_cut_beside(g->axis, g->lanes, cut, 0) != n ||
            !tasks_suffice(g, p, n))
            continue;
        const double cost = row_cost(g, n);
        if (cost < worthwhile * least) {
            best = n;
            least = cost;
        }
    }
    return best;
}
