/* SPDX-License-Identifier: MIT
 * Windows, tiles and what a warpgroup works on are boxes, so the work is a product of one sum for
 * each axis, exact at the borders too: every choice of tiles can be judged in no time. */
#include "cuda/config.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "core/kernel.h"
#include "device/sm90_forward.h"

enum {
    MOST_TILE = 32, /* rows of keys along one axis: bits of a mask word */
    MOST_KEYS = 128,
    MOST_SUB = 7, /* powers of two up to 64 */
    MOST_GROUPS = 3,
    MOST_STAGES = 6,
    MOST_BOX = 256,
    MOST_POSITIONS = 64
};

/* One axis cut into tiles: sums over its tiles of queries. A cell is a tile of keys, or half. */
typedef struct line {
    double cells; /* that some warpgroup computes */
    double inner; /* of these, seen as a whole by all queries of the warpgroup */
    double loads; /* tiles of keys */
    double items;
    int positions; /* the most tiles of keys for one tile of queries */
    int known;
} line;

typedef struct planner {
    const natten_problem *problem;
    const na_device *device;
    double useful; /* pairs of a query and a key, of one head */
    line lines[3][MOST_SUB][MOST_GROUPS + 1][MOST_TILE + 1][2];
} planner;

static int divide_up(int a, int b) { return (a + b - 1) / b; }

/* The queries of one dilation group: places first..end - 1. */
static na_axis group_of(const natten_axis *axis, int residue, int *first, int *end)
{
    na_axis group = na_axis_of(axis);
    int dilation = group.dilation, before = (int)axis->query_origin - residue + dilation - 1;
    *first = before / dilation;
    *end = (before + (int)axis->query_extent) / dilation;
    group.extent = divide_up(group.extent - residue, dilation);
    group.dilation = 1;
    return group;
}

static double useful_pairs(const natten_axis *axis)
{
    double sum = 0;
    for (int i = 0; i < axis->query_extent; i++)
        sum += na_window_of(na_axis_of(axis), (int)axis->query_origin + i).count;
    return sum;
}

/* Adds one tile of queries, from `from` on, each of `groups` warpgroups with `sub` of them. */
static void add_item(line *l, na_axis axis, int from, int end, int sub, int groups, int tile,
                     int cell)
{
    int start = na_window_of(axis, from).first, last = start, positions;
    for (int g = 0; g < groups && from + g * sub < end; g++) {
        int high_query = na_min(from + (g + 1) * sub, end) - 1;
        na_window low = na_window_of(axis, from + g * sub), high = na_window_of(axis, high_query);
        int low_end = low.first + low.count - start, high_end = high.first + high.count - start;
        int inner = low_end / cell - divide_up(high.first - start, cell);
        l->cells += (high_end - 1) / cell - (low.first - start) / cell + 1;
        l->inner += na_max(inner, 0);
        last = na_max(last, start + high_end);
    }
    positions = divide_up(last - start, tile);
    l->loads += positions;
    l->items += 1;
    l->positions = na_max(l->positions, positions);
}

static int log_of(int power)
{
    int log = 0;
    while (1 << log < power)
        log++;
    return log;
}

static const line *line_of(planner *s, int a, int sub, int groups, int tile, int halves)
{
    line *l = &s->lines[a][log_of(sub)][groups][a == 2 ? tile / 4 : tile][halves];
    if (l->known)
        return l;
    l->known = 1;
    for (int residue = 0; residue < s->problem->axis[a].dilation; residue++) {
        int first, end;
        na_axis group = group_of(&s->problem->axis[a], residue, &first, &end);
        for (int from = first; from < end; from += sub * groups)
            add_item(l, group, from, end, sub, groups, tile, tile >> halves);
    }
    return l;
}

/* ----------------------------------------------------------------------------------------------
 * judging */

/* Measured on an H100: TFLOP/s with 128 channels, by the keys of a tile; fewer keys wait longer
 * for the same things. With fewer channels the softmax, whose cost does not depend on them, takes
 * its share: 480 with 64, 300 with 32. */
static double raw_rate(const na_forward_config *c, int channels)
{
    static const double by_keys[] = {0, 250, 400, 500, 560, 590, 635, 640, 650};
    static const double by_groups[] = {0, 0.5, 0.85, 1};
    double rate = by_keys[na_forward_keys(c) / 16];
    return rate * by_groups[c->groups] * channels / (64 + channels) * 1.5;
}

enum { REGISTERS_3 = 160, REGISTERS_2 = 240, REGISTERS_ELSE = 29 };

static int fits_registers(const natten_problem *p, const na_forward_config *c)
{
    int wanted = (int)p->value_dim / 2 + na_forward_keys(c) / 2 + REGISTERS_ELSE;
    return wanted <= (c->groups == 3 ? REGISTERS_3 : REGISTERS_2);
}

static int bytes_of(const natten_problem *p, const na_forward_config *c)
{
    int rows = c->sub[0] + c->sub[1] + c->sub[2];
    return na_sm90_shared_of(c->groups, (int)p->head_dim, (int)p->value_dim, na_forward_keys(c),
                             c->key_stages, c->value_stages, rows * c->positions)
        .bytes;
}

/* As many stages as there is room for, keys before values: they are wanted first. */
static int fit_shared(const natten_problem *p, const na_device *device, na_forward_config *c)
{
    c->key_stages = c->value_stages = 2;
    if (bytes_of(p, c) > device->shared_memory)
        return 0;
    for (int more = 1; more;) {
        more = 0;
        for (int *stages = &c->key_stages; stages <= &c->value_stages; stages++) {
            ++*stages;
            if (*stages <= MOST_STAGES && bytes_of(p, c) <= device->shared_memory)
                more = 1;
            else
                --*stages;
        }
    }
    c->shared_bytes = bytes_of(p, c);
    return 1;
}

static int fits_boxes(const natten_problem *p, const na_forward_config *c)
{
    for (int a = 0; a < 3; a++)
        if (na_max(c->sub[a], c->tile[a]) * p->axis[a].dilation > MOST_BOX)
            return 0;
    return 1;
}

static int halves_axis(const na_forward_config *c)
{
    return c->tile[0] > 1 ? 0 : c->tile[1] > 1 ? 1 : 2;
}

enum { SECOND = 1000000 }; /* microseconds */

/* What limits: products, the way from the L2 cache, and the start and end of each item. */
static void judge(planner *s, na_forward_config *c)
{
    const natten_problem *p = s->problem;
    const double l2_bytes_per_second = 4.5e12, item_seconds = 1.2 / SECOND;
    double cells = 1, inner = 1, loads = 1, items = 1;
    int positions = 0, split = c->halves ? halves_axis(c) : -1, keys = na_forward_keys(c);
    for (int a = 0; a < 3; a++) {
        const line *l =
            line_of(s, a, c->sub[a], a == c->stack ? c->groups : 1, c->tile[a], a == split);
        cells *= l->cells;
        inner *= l->inner;
        loads *= l->loads;
        items *= l->items;
        positions = na_max(positions, l->positions);
    }
    double heads = (double)(p->batch * p->heads) / c->pack;
    double pairs = cells * NA_SM90_ROWS * (keys >> c->halves);
    int channels = (int)(p->head_dim + p->value_dim);
    c->positions = c->tile[2] <= 8 ? 1 << log_of(na_max(positions, 4)) : 0;
    c->waste = pairs / (s->useful * c->pack);
    c->masked = 1 - inner / cells;
    double products =
        pairs * heads * 2 * channels * (1 + 0.06 * c->masked) / (raw_rate(c, channels / 2) * 1e12);
    double traffic = loads * keys * channels * 2 * heads / l2_bytes_per_second;
    double rounds = items * heads / s->device->multiprocessors;
    /* Warpgroups side by side along the axis that tiles walk along first wait less for each other:
     * measured 376 against 420 TFLOP/s in 3-D. */
    if (c->stack != (c->tile[0] > 1 ? 1 : 2))
        products *= 1.04;
    c->seconds = (products > traffic ? products : traffic) * ceil(rounds) / rounds +
                 ceil(rounds) * item_seconds;
}

/* ----------------------------------------------------------------------------------------------
 * searching */

static void consider(planner *s, na_forward_config *c, na_forward_config *best)
{
    int along = (int)s->problem->axis[c->stack].query_extent > c->sub[c->stack];
    if ((!along && c->groups > 1 && c->stack != 2) || !fits_registers(s->problem, c) ||
        !fits_boxes(s->problem, c))
        return;
    judge(s, c);
    if (c->positions > MOST_POSITIONS || (best->groups && c->seconds >= best->seconds) ||
        !fit_shared(s->problem, s->device, c))
        return;
    *best = *c;
}

/* Everything that is left when queries and keys are boxed. */
static void consider_groups(planner *s, na_forward_config *c, na_forward_config *best)
{
    int keys = na_forward_keys(c), linear = c->tile[2] > 8;
    for (c->groups = 2; c->groups <= MOST_GROUPS; c->groups++)
        for (c->stack = linear ? 2 : 0; c->stack < 3; c->stack++) {
            c->halves = 0;
            consider(s, c, best);
            /* A half must still be a multiple of 16 keys. */
            c->halves =
                !linear && keys % 32 == 0 && c->tile[halves_axis(c)] % 2 == 0 && halves_axis(c) < 2;
            if (c->halves)
                consider(s, c, best);
        }
}

static void consider_tiles(planner *s, na_forward_config *c, na_forward_config *best)
{
    /* Tiles that are boxes: rows of 4 or 8 keys, at most 32 of them. */
    int thick = s->problem->axis[0].window > 1 ? MOST_TILE / 2 : 1;
    for (c->tile[2] = 4; c->tile[2] <= 8; c->tile[2] *= 2)
        for (c->tile[0] = 1; c->tile[0] <= thick; c->tile[0]++)
            for (c->tile[1] = 1; c->tile[0] * c->tile[1] <= MOST_TILE; c->tile[1]++) {
                int keys = na_forward_keys(c);
                if (keys % 16 == 0 && keys >= 32 && keys <= MOST_KEYS)
                    consider_groups(s, c, best);
            }
    /* Tiles that are lines. */
    c->tile[0] = c->tile[1] = 1;
    if (c->sub[0] * c->sub[1] == 1)
        for (c->tile[2] = 32; c->tile[2] <= MOST_KEYS; c->tile[2] += 16)
            consider_groups(s, c, best);
}

static int prepare(planner *s, const natten_problem *problem, const na_device *device)
{
    s->problem = problem;
    s->device = device;
    s->useful = 1;
    for (int a = 0; a < 3; a++)
        s->useful *= useful_pairs(&problem->axis[a]);
    return s->useful > 0 && problem->batch > 0;
}

int na_forward_config_choose(const natten_problem *problem, const na_device *device,
                             na_forward_config *config)
{
    planner *s = calloc(1, sizeof *s);
    na_forward_config c = {0}, best = {0};
    int share = (int)(problem->heads / problem->kv_heads), deep = problem->axis[0].query_extent > 1;
    if (!s || !prepare(s, problem, device)) {
        free(s);
        return 0;
    }
    c.raster = deep ? 2 : 1;
    for (c.pack = 1; c.pack <= 16 && share % c.pack == 0; c.pack *= 2)
        for (c.sub[0] = 1; c.sub[0] * c.pack <= (deep ? NA_SM90_ROWS : 1) * c.pack; c.sub[0] *= 2)
            for (c.sub[1] = 1; c.sub[0] * c.sub[1] * c.pack <= NA_SM90_ROWS; c.sub[1] *= 2) {
                c.sub[2] = NA_SM90_ROWS / c.pack / c.sub[0] / c.sub[1];
                consider_tiles(s, &c, &best);
            }
    free(s);
    *config = best;
    return best.groups != 0;
}

int na_forward_config_complete(const natten_problem *problem, const na_device *device,
                               na_forward_config *config)
{
    planner *s = calloc(1, sizeof *s);
    na_forward_config best = {0};
    if (s && prepare(s, problem, device))
        consider(s, config, &best);
    free(s);
    if (best.groups)
        *config = best;
    return best.groups != 0;
}
