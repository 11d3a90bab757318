/* SPDX-License-Identifier: MIT
 * Windows, tiles and what a warpgroup works on are boxes, so the work is a product of one sum for
 * each axis, exact at the borders too: every choice of tiles can be judged in no time. */
#include "cuda/config.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/kernel.h"
#include "device/sm90_backward.h"
#include "device/sm90_forward.h"

enum {
    MOST_TILE = 32, /* rows of visitors along one axis: bits of a mask word */
    MOST_VISITORS = 128,
    MOST_SUB = 7, /* powers of two up to 64 */
    MOST_GROUPS = 3,
    MOST_STAGES = 6,
    MOST_BOX = 256,
    MOST_POSITIONS = 64
};

/* One axis cut into tiles: sums over its tiles of residents. A cell is a tile of visitors, or half.
 */
typedef struct line {
    double cells; /* that some warpgroup computes */
    double inner; /* of these, where all visitors meet all residents of the warpgroup */
    double loads; /* tiles of visitors */
    double items;
    int positions; /* the most tiles of visitors for one tile of residents */
    int known;
} line;

typedef struct planner {
    const natten_problem *problem;
    const na_device *device;
    na_sm90_what what;
    double useful;                          /* pairs of a query and a key, of one head */
    na_sm90_config passed[NA_SM90_CHOICES]; /* choices before the one that is looked for */
    int passed_count;
    line lines[3][MOST_SUB][MOST_GROUPS + 1][MOST_TILE + 1][2];
} planner;

static int divide_up(int a, int b) { return (a + b - 1) / b; }

/* One dilation group of an axis: residents at places first..end - 1, queries at others. */
typedef struct group {
    na_axis axis;
    int of_keys, first, end, query_first, query_end;
} group;

static group group_of(const planner *s, const natten_axis *axis, int residue)
{
    group g = {.axis = na_axis_of(axis), .of_keys = na_sm90_is_of_keys(s->what)};
    int dilation = g.axis.dilation, round = dilation - 1 - residue;
    int64_t origin = g.of_keys ? axis->key_origin : axis->query_origin;
    int64_t extent = g.of_keys ? axis->key_extent : axis->query_extent;
    g.first = (int)(origin + round) / dilation;
    g.end = (int)(origin + extent + round) / dilation;
    g.query_first = (int)(axis->query_origin + round) / dilation;
    g.query_end = (int)(axis->query_origin + axis->query_extent + round) / dilation;
    g.axis.extent = (g.axis.extent + round) / dilation;
    g.axis.dilation = 1;
    return g;
}

static na_window visitors_of(const group *g, int place)
{
    return g->of_keys ? na_visitors_of(g->axis, place, g->query_first, g->query_end)
                      : na_window_of(g->axis, place);
}

static double useful_pairs(const natten_axis *axis)
{
    double sum = 0;
    for (int i = 0; i < axis->query_extent; i++)
        sum += na_window_of(na_axis_of(axis), (int)axis->query_origin + i).count;
    return sum;
}

/* Adds one tile of residents, from `from` on, each of `groups` warpgroups with `sub` of them. */
static void add_item(line *l, const group *group, int from, int sub, int groups, int tile, int cell)
{
    int start = visitors_of(group, from).first, last = start, positions;
    for (int g = 0; g < groups && from + g * sub < group->end; g++) {
        na_window low = visitors_of(group, from + g * sub);
        na_window high = visitors_of(group, na_min(from + (g + 1) * sub, group->end) - 1);
        int low_end = low.first + low.count - start, high_end = high.first + high.count - start;
        int inner = low_end / cell - divide_up(high.first - start, cell);
        if (high_end > low.first - start)
            l->cells += (high_end - 1) / cell - (low.first - start) / cell + 1;
        l->inner += na_max(inner, 0);
        last = na_max(last, start + high_end);
    }
    positions = na_max(divide_up(last - start, tile), 1);
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
        group group = group_of(s, &s->problem->axis[a], residue);
        for (int from = group.first; from < group.end; from += sub * groups)
            add_item(l, &group, from, sub, groups, tile, tile >> halves);
    }
    return l;
}

/* ----------------------------------------------------------------------------------------------
 * judging */

/* Measured on an H100: TFLOP/s with 128 channels, by 16 visitors of a tile; fewer visitors wait
 * longer for the same things, and warpgroups for each other the less the more there are. Halves of
 * tiles of d_query cost a little, small ones more. With fewer channels the softmax, whose cost does
 * not depend on them, takes its share: of the forward 480 with 64, 300 with 32. */
static double raw_rate(const na_sm90_config *c, int channels)
{
    static const double by_visitors[][9] = {
        [NA_SM90_FORWARD] = {0, 250, 400, 500, 560, 590, 635, 640, 662},
        [NA_SM90_D_QUERY] = {0, 250, 420, 540, 640, 665, 680, 685, 680},
        [NA_SM90_D_KEY] = {0, 220, 400, 510, 610, 640, 650, 650, 650},
        [NA_SM90_D_ALL] = {0, 0, 0, 0, 560}};
    static const double by_groups[][4] = {
        [NA_SM90_FORWARD] = {0, 0.5, 0.85, 1}, [NA_SM90_D_QUERY] = {0, 0.5, 1, 1.07}};
    double rate = by_visitors[c->what][na_sm90_visitors(c) / 16];
    if (!na_sm90_is_of_keys(c->what))
        rate *= by_groups[c->what][c->groups];
    if (c->what == NA_SM90_D_QUERY && c->halves)
        rate *= na_sm90_visitors(c) < 96 ? 0.9 : 0.97;
    double others = c->what == NA_SM90_D_ALL ? 96 : 64;
    return rate * channels / (others + channels) * (1 + others / 128);
}

/* Channels of all products of a pair of a query and a key. */
static int channels_of(const natten_problem *p, const na_sm90_config *c)
{
    int dim = (int)p->head_dim, value_dim = (int)p->value_dim;
    if (c->what == NA_SM90_FORWARD)
        return dim + value_dim;
    if (c->what == NA_SM90_D_QUERY)
        return 2 * dim + value_dim;
    if (c->what == NA_SM90_D_ALL)
        return 3 * dim + 2 * value_dim;
    return dim + (c->gives & 1 ? dim + value_dim : 0) + (c->gives & 2 ? value_dim : 0);
}

enum {
    REGISTERS_3 = 160,
    REGISTERS_2 = 240,
    REGISTERS_ELSE = 29,
    REGISTERS_BACK = 32,
    REGISTERS_BIAS = 16
};

static int fits_registers(const natten_problem *p, const na_sm90_config *c)
{
    int dim = (int)p->head_dim, value_dim = (int)p->value_dim, visitors = na_sm90_visitors(c);
    int bias = na_has(p, NATTEN_RPB) ? REGISTERS_BIAS : 0;
    if (c->what == NA_SM90_FORWARD)
        return value_dim / 2 + visitors / 2 + REGISTERS_ELSE + bias <=
               (c->groups == 3 ? REGISTERS_3 : REGISTERS_2);
    if (c->what == NA_SM90_D_QUERY)
        return dim / 2 + visitors + REGISTERS_BACK + 8 + bias <=
               (c->groups == 3 ? REGISTERS_3 + 8 : REGISTERS_2);
    /* When d_query is multiplied all else is done with; its tile of queries has as many rows as a
     * product. */
    if (c->what == NA_SM90_D_ALL &&
        (visitors != NA_SM90_ROWS || dim + value_dim / 2 + REGISTERS_BACK > REGISTERS_2))
        return 0;
    return (c->gives & 1 ? dim / 2 : 0) + (c->gives & 2 ? value_dim / 2 : 0) + visitors / 4 * 5 +
               REGISTERS_BACK + bias <=
           REGISTERS_2;
}

double na_sm90_head_entries(const natten_problem *p)
{
    double entries = 1;
    for (int a = 0; a < 3; a++)
        entries *= (double)(2 * p->axis[a].window - 1);
    return entries;
}

int na_sm90_bias_entries(const natten_problem *p, na_sm90_what what)
{
    const double most = 4096, entries = na_sm90_head_entries(p);
    int room = 256;
    if (what != NA_SM90_D_QUERY || !na_has(p, NATTEN_D_RPB))
        return 0;
    while (room < most && room < entries)
        room *= 4;
    return entries <= most ? room : -1;
}

static int bytes_of(const natten_problem *p, const na_sm90_config *c)
{
    int dim = (int)p->head_dim, value_dim = (int)p->value_dim;
    int rows = c->sub[0] + c->sub[1] + c->sub[2], words = rows * c->positions;
    int order = na_sm90_order_bytes(c->groups, rows, c->positions);
    if (na_has(p, NATTEN_RPB))
        words +=
            NA_SM90_BIAS_WORDS(c->positions, na_sm90_bias_entries(p, c->what), na_sm90_visitors(c));
    if (c->what == NA_SM90_FORWARD)
        return na_sm90_shared_of(c->groups, dim, value_dim, na_sm90_visitors(c), c->stages[0],
                                 c->stages[1], c->orders, order, words)
            .bytes;
    return na_sm90_back_shared_of(na_sm90_is_of_keys(c->what), c->what == NA_SM90_D_ALL, c->groups,
                                  dim, value_dim, na_sm90_visitors(c), c->stages[0], c->orders,
                                  order, words * na_sm90_cell_bytes(c))
        .bytes;
}

/* As many stages as there is room for, keys before values: they are wanted first. */
static int fit_shared(const natten_problem *p, const na_device *device, na_sm90_config *c)
{
    int rings = c->what == NA_SM90_FORWARD ? 2 : 1;
    c->stages[0] = c->stages[1] = 2;
    if (bytes_of(p, c) > device->shared_memory)
        return 0;
    for (int more = 1; more;) {
        more = 0;
        for (int *stages = c->stages; stages < c->stages + rings; stages++) {
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

int na_sm90_split(const natten_problem *p, int axis)
{
    const natten_axis *x = p->axis;
    int is_line =
        x[0].query_extent * x[1].query_extent <= 1 && x[0].key_extent * x[1].key_extent <= 1;
    int64_t most = is_line ? MOST_BOX / NA_SM90_ROWS : 8, dilation = x[axis].dilation;
    int split = 1;
    while (dilation % split || dilation / split > most)
        split++;
    return split;
}

static int fits_boxes(const natten_problem *p, const na_sm90_config *c)
{
    for (int a = 0; a < 3; a++)
        if (na_max(c->sub[a], c->tile[a]) * (p->axis[a].dilation / na_sm90_split(p, a)) > MOST_BOX)
            return 0;
    return 1;
}

static int halves_axis(const na_sm90_config *c)
{
    return c->tile[0] > 1 ? 0 : c->tile[1] > 1 ? 1 : 2;
}

enum {
    SECOND = 1000000, /* microseconds */
    SHORT_ITEM = 8    /* tiles of visitors */
};

/* What limits: products, the way from the L2 cache, and the start and end of each item. */
static void judge(planner *s, na_sm90_config *c)
{
    const natten_problem *p = s->problem;
    const double l2_bytes_per_second = 4.5e12, item_seconds = 1.2 / SECOND;
    double cells = 1, inner = 1, loads = 1, items = 1;
    int positions = 0, split = c->halves ? halves_axis(c) : -1, visitors = na_sm90_visitors(c);
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
    double pairs = cells * NA_SM90_ROWS * (visitors >> c->halves);
    int channels = (int)(p->head_dim + p->value_dim);
    double blocks = na_sm90_is_of_keys(c->what) ? (double)(p->batch * p->kv_heads) : heads;
    c->positions = c->tile[2] > 8             ? 0
                   : c->what == NA_SM90_D_ALL ? positions
                                              : 1 << log_of(na_max(positions, 4));
    /* Looking further ahead takes items out of their order in time, and with it out of the L2
     * cache; but where an item is over soon the next one has to be there. */
    c->orders = c->what != NA_SM90_D_ALL && loads <= SHORT_ITEM * items ? 2 : 1;
    c->waste = pairs / (s->useful * c->pack);
    c->masked = 1 - inner / cells;
    /* Measured on an H100, and on an H200 for d_query, which waits for its masks more. */
    double masks = c->what == NA_SM90_D_QUERY ? 0.2 : 0.06;
    double products = pairs * heads * 2 * channels_of(p, c) * (1 + masks * c->masked) /
                      (raw_rate(c, channels / 2) * 1e12);
    double bytes = channels * 2 + (c->what == NA_SM90_D_ALL ? (double)p->head_dim * 4 : 0);
    double traffic = loads * visitors * bytes * heads / l2_bytes_per_second;
    double rounds = items * blocks / s->device->multiprocessors;
    /* Warpgroups side by side along the axis that tiles walk along first wait less for each other:
     * measured 376 against 420 TFLOP/s in 3-D, less where they wait for each other anyway. */
    if (c->stack != (c->tile[0] > 1 ? 1 : 2))
        products *= c->what == NA_SM90_D_ALL ? 1.02 : 1.04;
    c->seconds = (products > traffic ? products : traffic) * ceil(rounds) / rounds +
                 ceil(rounds) * item_seconds;
}

/* ----------------------------------------------------------------------------------------------
 * searching */

/* Whether an earlier choice has these tiles. */
static int is_passed(const planner *s, const na_sm90_config *c)
{
    for (int i = 0; i < s->passed_count; i++) {
        const na_sm90_config *p = &s->passed[i];
        if (p->pack == c->pack && p->groups == c->groups &&
            !memcmp(p->sub, c->sub, sizeof p->sub) && !memcmp(p->tile, c->tile, sizeof p->tile))
            return 1;
    }
    return 0;
}

static void consider(planner *s, na_sm90_config *c, na_sm90_config *best)
{
    const natten_axis *x = &s->problem->axis[c->stack];
    int along =
        (na_sm90_is_of_keys(c->what) ? x->key_extent : x->query_extent) > (int64_t)c->sub[c->stack];
    if ((!along && c->groups > 1 && c->stack != 2) || !fits_registers(s->problem, c) ||
        !fits_boxes(s->problem, c))
        return;
    judge(s, c);
    if (c->positions > MOST_POSITIONS || (best->groups && c->seconds >= best->seconds) ||
        is_passed(s, c) || !fit_shared(s->problem, s->device, c))
        return;
    *best = *c;
}

/* Everything that is left when residents and visitors are boxed. */
static void consider_groups(planner *s, na_sm90_config *c, na_sm90_config *best)
{
    int visitors = na_sm90_visitors(c), linear = c->tile[2] > 8;
    int of_keys = na_sm90_is_of_keys(c->what);
    int halved = !of_keys && !na_sm90_bias_entries(s->problem, c->what);
    for (c->groups = 2; c->groups <= (of_keys ? 2 : MOST_GROUPS); c->groups++)
        for (c->stack = linear ? 2 : 0; c->stack < 3; c->stack++) {
            c->halves = 0;
            consider(s, c, best);
            /* A half must still be a multiple of 16 visitors. */
            c->halves = halved && !linear && visitors % 32 == 0 &&
                        c->tile[halves_axis(c)] % 2 == 0 && halves_axis(c) < 2;
            if (c->halves)
                consider(s, c, best);
        }
}

static void consider_tiles(planner *s, na_sm90_config *c, na_sm90_config *best)
{
    /* Tiles that are boxes: rows of 4 or 8 visitors, at most 32 of them. */
    int thick = s->problem->axis[0].window > 1 ? MOST_TILE / 2 : 1;
    for (c->tile[2] = 4; c->tile[2] <= 8; c->tile[2] *= 2)
        for (c->tile[0] = 1; c->tile[0] <= thick; c->tile[0]++)
            for (c->tile[1] = 1; c->tile[0] * c->tile[1] <= MOST_TILE; c->tile[1]++) {
                int visitors = na_sm90_visitors(c);
                if (visitors % 16 == 0 && visitors >= 32 && visitors <= MOST_VISITORS)
                    consider_groups(s, c, best);
            }
    /* Tiles that are lines. */
    c->tile[0] = c->tile[1] = 1;
    if (c->sub[0] * c->sub[1] == 1)
        for (c->tile[2] = 32; c->tile[2] <= MOST_VISITORS; c->tile[2] += 16)
            consider_groups(s, c, best);
}

static int prepare(planner *s, const natten_problem *problem, const na_device *device,
                   na_sm90_what what)
{
    s->problem = problem;
    s->device = device;
    s->what = what;
    s->useful = 1;
    for (int a = 0; a < 3; a++)
        s->useful *= useful_pairs(&problem->axis[a]);
    return s->useful > 0 && problem->batch > 0;
}

/* The fastest that no earlier choice has; best.groups = 0: there is none. */
static na_sm90_config search(planner *s, int gives)
{
    na_sm90_config c = {.what = s->what, .gives = gives}, best = {0};
    const natten_axis *x = s->problem->axis;
    int of_keys = na_sm90_is_of_keys(s->what);
    int deep = (of_keys ? x->key_extent : x->query_extent) > 1;
    /* Heads packed together would have an entry each of a pair's. */
    int alone = of_keys || na_sm90_bias_entries(s->problem, s->what);
    int share = alone ? 1 : (int)(s->problem->heads / s->problem->kv_heads);
    /* 3 took 1 to 2.5 % less time than 2, of d_query 1.5 % more. */
    c.raster = !deep ? 1 : s->what == NA_SM90_D_QUERY ? 2 : 3;
    for (c.pack = 1; c.pack <= 16 && share % c.pack == 0; c.pack *= 2)
        for (c.sub[0] = 1; c.sub[0] * c.pack <= (deep ? NA_SM90_ROWS : 1) * c.pack; c.sub[0] *= 2)
            for (c.sub[1] = 1; c.sub[0] * c.sub[1] * c.pack <= NA_SM90_ROWS; c.sub[1] *= 2) {
                c.sub[2] = NA_SM90_ROWS / c.pack / c.sub[0] / c.sub[1];
                consider_tiles(s, &c, &best);
            }
    return best;
}

int na_sm90_config_choose(const natten_problem *problem, const na_device *device, na_sm90_what what,
                          int64_t choice, na_sm90_config *config)
{
    planner *s = calloc(1, sizeof *s);
    const int gives = config->gives;
    *config = (na_sm90_config){0};
    if (s && choice <= NA_SM90_CHOICES && prepare(s, problem, device, what))
        for (*config = search(s, gives); config->groups && choice > s->passed_count;) {
            s->passed[s->passed_count++] = *config;
            *config = search(s, gives);
        }
    free(s);
    return config->groups != 0;
}

void na_sm90_config_describe(const na_sm90_config *c, char *text, size_t size)
{
    snprintf(text, size, "%d warpgroups of %dx%dx%d by %d heads, tiles of %dx%dx%d", c->groups,
             c->sub[0], c->sub[1], c->sub[2], c->pack, c->tile[0], c->tile[1], c->tile[2]);
}

int na_sm90_config_complete(const natten_problem *problem, const na_device *device,
                            na_sm90_config *config)
{
    planner *s = calloc(1, sizeof *s);
    na_sm90_config best = {0};
    if (s && prepare(s, problem, device, config->what))
        consider(s, config, &best);
    free(s);
    if (best.groups)
        *config = best;
    return best.groups != 0;
}
