/* SPDX-License-Identifier: MIT */
#include "cpu/choices.h"

#include <stdarg.h>
#include <stdio.h>

enum { MOST_CUTS = 24 };

/* Below so many multiplications, waking threads may cost more than they bring. */
static const double few_products = 1 << 24;

static const int thread_counts[] = {1, 2, 4, 8};
enum { THREAD_COUNTS = sizeof thread_counts / sizeof *thread_counts };

/* What a cut comes to: two that come to the same are one choice. */
typedef struct shape {
    int heads, pieces, part, across, planes, beside, ahead;
} shape;

typedef struct list {
    na_cut cut[MOST_CUTS];
    shape shape[MOST_CUTS];
    int count;
} list;

/* Lane tiles that blocks across are made of: rows that share no key are not put together. */
static int tiles_along(const na_geometry *g)
{
    const natten_axis *x = &g->axis[2];
    const int64_t apart = na_tiles_apart(g);
    const int join = x->window > apart * g->lanes / x->dilation;
    return join ? na_ceil_div(na_ceil_div((int)x->query_extent, g->lanes), (int)apart) : 1;
}

/* Blocks of nearly equal size: fewer rows matter only if they make more blocks. */
static shape shape_of(const na_geometry *g, na_cut cut)
{
    const natten_axis *y = &g->axis[1], *x = &g->axis[2];
    const int head_tiles = na_ceil_div(g->group, cut.rows),
              heads = na_ceil_div(g->group, head_tiles);
    const int beside = na_cut_beside(g->axis, g->lanes, cut, cut.across);
    const int tiles = na_ceil_div(beside * (int)x->query_extent, g->lanes);
    const int along =
        cut.across ? tiles_along(g) : na_ceil_div((int)y->query_extent, (int)y->dilation);
    const int pieces = na_ceil_div(along, cut.rows / heads);
    shape s = {heads, pieces, 1, cut.across, cut.planes, beside, cut.ahead};
    const int extent = cut.across ? (int)x->key_extent : tiles * g->lanes;
    s.part = cut.across && extent > cut.part ? cut.part : na_ceil_div(extent, cut.part);
    return s;
}

static void add(list *l, const na_geometry *g, na_cut cut)
{
    const shape s = shape_of(g, cut);
    for (int i = 0; i < l->count; i++) {
        const shape *o = &l->shape[i];
        if (o->heads == s.heads && o->pieces == s.pieces && o->part == s.part &&
            o->across == s.across && o->planes == s.planes && o->beside == s.beside &&
            o->ahead == s.ahead)
            return;
    }
    if (l->count < MOST_CUTS) {
        l->shape[l->count] = s;
        l->cut[l->count++] = cut;
    }
}

/* Starts from the geometry that was thought best. */
static void make_list(list *l, const na_geometry *g, int most)
{
    const na_cut first = {g->cut.rows, g->cut.part, g->across, g->planes, g->beside, g->cut.ahead};
    const int may_turn = g->axis[2].query_extent > g->lanes;
    add(l, g, first);
    for (int turned = 0; turned <= may_turn; turned++) {
        na_cut cut = first;
        cut.across ^= turned;
        cut.planes &= !turned;
        for (cut.rows = most; cut.rows > 0; cut.rows--)
            add(l, g, cut);
    }
    for (int part = NA_PART / 4; part <= NA_PART * 2; part *= 2) {
        na_cut cut = first;
        cut.part = part;
        add(l, g, cut);
    }
    na_cut other = first;
    other.planes = 0;
    add(l, g, other);
    other = first;
    other.beside = 1;
    add(l, g, other);
    other = first;
    other.ahead = !first.ahead;
    add(l, g, other);
}

double na_products(const natten_problem *p)
{
    double products = (double)(na_window_size(p) + p->additional_tokens) *
                      (double)(p->head_dim + p->value_dim) * (double)(p->batch * p->heads);
    for (int i = 0; i < 3; i++)
        products *= (double)p->axis[i].query_extent;
    return products;
}

void na_describe_choice(natten_plan *plan, const char *format, ...)
{
    va_list values;
    va_start(values, format);
    const int length = vsnprintf(plan->choice, sizeof plan->choice, format, values);
    va_end(values);
    if (plan->most_workers)
        snprintf(plan->choice + length, sizeof plan->choice - (size_t)length,
                 ", at most %d thread%s", (int)plan->most_workers,
                 plan->most_workers > 1 ? "s" : "");
}

int na_choose_cut(natten_plan *plan, int cuts)
{
    const int64_t choice = plan->merged.choice;
    const int few = na_products(&plan->merged) < few_products ? THREAD_COUNTS : 0;
    plan->choices = cuts - 1 + few;
    if (choice >= cuts && choice <= plan->choices)
        plan->most_workers = thread_counts[choice - cuts];
    return choice > 0 && choice < cuts ? (int)choice : 0;
}

na_geometry *na_choose(natten_plan *plan, int lanes, int half, na_cut usual, int most)
{
    na_geometry *g = na_geometry_make(&plan->merged, lanes, half, usual);
    list l = {.count = 0};
    if (!g)
        return NULL;
    make_list(&l, g, most);
    const int cut = na_choose_cut(plan, l.count);
    if (cut) {
        na_geometry_free(g);
        g = na_geometry_make(&plan->merged, lanes, half, l.cut[cut]);
    }
    if (!g)
        return NULL;
    const char *way = g->across ? "across" : g->planes ? "upright over planes" : "upright";
    const char *fetched = g->cut.ahead ? ", fetched ahead" : "";
    if (g->beside > 1)
        na_describe_choice(plan, "%d rows %s, %d heads side by side%s", g->cut.rows, way, g->beside,
                           fetched);
    else
        na_describe_choice(plan, "%d rows %s, parts of %d%s", g->cut.rows, way, g->cut.part,
                           fetched);
    return g;
}
