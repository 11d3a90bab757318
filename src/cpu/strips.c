/* SPDX-License-Identifier: MIT */
#include "cpu/strips.h"

#include <stdlib.h>
#include <string.h>

#include "cpu/tiles.h"

/* Tables of at most some 16 MiB each; keys of a box that are still counted in int. */
static const double most_words = 1 << 23, most_kinds = 1 << 22, most_keys = 1 << 24;

/* Bytes of packed keys that a section may have beside those of one box: few are then packed twice,
 * and most stay in the second-level cache. */
static const int64_t section_bytes = 1 << 20;

/* Tasks that keep the processors of a large machine busy. */
enum { ENOUGH = 32 };

static int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/* Keys of a row of a strip, filled up to whole halves of blocks where that is cheap: all boxes then
 * begin at the same place of a block, so that fewer have masks of their own. */
static int64_t row_length(int64_t width)
{
    const int64_t whole = ceil_div(width, NA_HALF) * NA_HALF;
    return whole * 100 < width * 115 ? whole : width;
}

/* What cutting an axis comes to, away from its borders. */
typedef struct estimate {
    int64_t stretches;  /* their number */
    int64_t keys, half; /* that a stretch sees, and half a stretch */
    int64_t all;        /* that some query sees */
} estimate;

static estimate estimate_axis(const natten_axis *axis, int cut)
{
    const int64_t residues = na_min((int)axis->dilation, (int)axis->query_extent);
    const int64_t queries = ceil_div(axis->query_extent, residues);
    const int64_t tokens = ceil_div(axis->key_extent, axis->dilation), more = axis->window - 1;
    const int64_t some = queries < cut ? queries : cut;
    estimate e = {residues * ceil_div(queries, cut), some + more, (some + 1) / 2 + more,
                  queries + more};
    e.keys = e.keys < tokens ? e.keys : tokens;
    e.half = e.half < tokens ? e.half : tokens;
    e.all = residues * (e.all < tokens ? e.all : tokens);
    return e;
}

/* What a cut costs, in units of a key of a box. About half of it is products of the keys that half
 * a box sees, the other half the softmax over those from a query's first key to its last one; some
 * more are there to fill blocks. Packing a key costs as much as 25 queries of it, and a run of them
 * as three keys. */
static double cost_of(const na_strips *s, const natten_problem *p, const int32_t cut[3])
{
    const int a = s->across[0], b = s->across[1];
    const estimate e = estimate_axis(&p->axis[s->axis], cut[s->axis]);
    const estimate e0 = estimate_axis(&p->axis[a], cut[a]);
    const estimate e1 = estimate_axis(&p->axis[b], cut[b]);
    const double strips = (double)(e0.stretches * e1.stretches);
    const double length = (double)row_length(e0.keys * e1.keys);
    const double line = (double)((p->axis[a].window - 1) * e1.keys + p->axis[b].window);
    const double seen = (double)(p->axis[s->axis].window - 1) * length + line;
    const double keys = (double)(cut[s->axis] > 1 ? e.half : e.keys) * length;
    return strips * ((double)e.stretches * (0.5 * keys + 0.5 * seen + 24) +
                     0.8 * (1 + 3 / (double)e1.keys) * (double)e.all * length);
}

/* Strips run along the outermost axis that has more than one query. */
static void choose_axis(na_strips *s, const natten_problem *p)
{
    while (s->axis < 2 && p->axis[s->axis].query_extent == 1)
        s->axis++;
    s->across[0] = s->axis == 0;
    s->across[1] = s->axis == 2 ? 1 : 2;
}

/* Puts a cut into the list, which is in order. */
static void insert_cut(na_box_cut *cuts, int *count, na_box_cut cut)
{
    int i = na_min(*count, NA_BOX_CUTS - 1);
    if (*count == NA_BOX_CUTS && cut.cost >= cuts[i].cost)
        return;
    for (; i > 0 && cuts[i - 1].cost > cut.cost; i--)
        cuts[i] = cuts[i - 1];
    cuts[i] = cut;
    *count = na_min(*count + 1, NA_BOX_CUTS);
}

int na_box_cuts(const natten_problem *p, na_box_cut cuts[NA_BOX_CUTS])
{
    na_strips s = {0};
    int count = 0;
    choose_axis(&s, p);
    /* Up to the first that takes all queries of an axis. */
    for (int z = 1; z <= NA_BOX && (z == 1 || z / 2 < p->axis[0].query_extent); z *= 2)
        for (int y = 1; z * y <= NA_BOX && (y == 1 || y / 2 < p->axis[1].query_extent); y *= 2) {
            na_box_cut cut = {.queries = {z, y, NA_BOX / (z * y)}};
            cut.cost = cost_of(&s, p, cut.queries);
            insert_cut(cuts, &count, cut);
        }
    /* Nothing far from the best is worth trying. */
    while (cuts[count - 1].cost > 1.5 * cuts[0].cost)
        count--;
    return count;
}

/* Fills in the windows of a stretch, and what follows from them. */
static void make_windows(na_stretch *t, na_windows *w, const natten_axis *axis)
{
    const int step = (int)axis->dilation;
    *w = (na_windows){.queries = t->queries};
    t->key = na_local_window(axis, t->query).first;
    for (int i = 0; i < t->queries; i++) {
        const na_window window = na_local_window(axis, t->query + i * step);
        w->first[i] = (window.first - t->key) / step;
        w->count[i] = window.count;
        w->keys = na_max(w->keys, w->first[i] + window.count);
    }
    t->keys = w->keys;
}

/* The number of the kind at the end of the list, or of an earlier one that is like it. */
static int settle_kind(na_stretches *s)
{
    const na_windows *last = &s->kind[s->kinds];
    for (int i = s->kinds - 1; i >= 0 && i >= s->kinds - 64; i--) {
        const na_windows *w = &s->kind[i];
        if (w->queries == last->queries && !memcmp(w->first, last->first, sizeof w->first) &&
            !memcmp(w->count, last->count, sizeof w->count))
            return i;
    }
    return s->kinds++;
}

static int make_stretches(na_stretches *s, const natten_axis *axis)
{
    const int extent = (int)axis->query_extent;
    const int residues = na_min((int)axis->dilation, extent);
    int room = 0;
    s->dilation = (int)axis->dilation;
    s->at =
        calloc((size_t)(residues * ceil_div(ceil_div(extent, residues), s->cut)), sizeof *s->at);
    for (int residue = 0; s->at && residue < residues; residue++) {
        const int queries = (int)ceil_div(extent - residue, s->dilation);
        for (int place = 0; place < queries; place += s->cut) {
            if (s->kinds == room) {
                room = 2 * room + 8;
                na_windows *more = realloc(s->kind, (size_t)room * sizeof *more);
                if (!more)
                    return 0;
                s->kind = more;
            }
            na_stretch *t = &s->at[s->count++];
            t->query = residue + place * s->dilation;
            t->queries = na_min(s->cut, queries - place);
            make_windows(t, &s->kind[s->kinds], axis);
            t->kind = settle_kind(s);
            s->kind[t->kind].uses++;
        }
    }
    return s->at != NULL;
}

static int most_of_kinds(const na_stretches *s)
{
    int most = 0;
    for (int i = 0; i < s->kinds; i++)
        most = na_max(most, s->kind[i].keys);
    return most;
}

/* Cuts the strips' axis into sections. */
static int make_sections(na_strips *s, int64_t heads, int64_t key_bytes, int64_t length)
{
    const na_stretches *axis = &s->axes[s->axis];
    const int64_t others = heads * s->axes[s->across[0]].count * s->axes[s->across[1]].count;
    const int most = most_of_kinds(axis);
    /* At least as many rows are new to a section as it shares with its neighbour. */
    const int64_t least = ceil_div(most, axis->cut), wanted = axis->count * others / ENOUGH;
    const int64_t stretches = wanted > least ? wanted : least;
    const int64_t more = section_bytes / (length * key_bytes);
    const int64_t rows = most + (more > most ? more : most);
    s->section = calloc((size_t)axis->count, sizeof *s->section);
    for (int i = 0; s->section && i < axis->count; i++) {
        const na_stretch *t = &axis->at[i];
        na_section *last = s->sections ? &s->section[s->sections - 1] : NULL;
        const int next = i && t->query - axis->at[i - 1].query == axis->cut * axis->dilation;
        const int end = last ? (t->key - last->key) / axis->dilation + t->keys : 0;
        /* Tokens of another residue begin anew. */
        if (last && next && end <= rows && i - last->begin < stretches)
            *last = (na_section){last->begin, i + 1, last->key, end};
        else
            s->section[s->sections++] = (na_section){i, i + 1, t->key, t->keys};
    }
    return s->section != NULL;
}

/* The place of a box's mask in the table. */
static int64_t kind_of(const na_strips *s, int kind, int kind0, int kind1, int shift)
{
    const int64_t kinds0 = s->axes[s->across[0]].kinds, kinds1 = s->axes[s->across[1]].kinds;
    return ((kind * kinds0 + kind0) * kinds1 + kind1) * NA_HALF + shift;
}

/* Blocks that a box takes, from its first key's place in half a block on. */
static int blocks_of(int shift, int rows, int width, int length)
{
    return (int)ceil_div(shift + (int64_t)(rows - 1) * length + width, NA_BLOCK);
}

/* Numbers the masks of all boxes of two kinds on the other axes; adds up their words. */
static void number_masks(na_strips *s, int kind0, int kind1, double *words)
{
    const na_stretches *axis = &s->axes[s->axis];
    const na_windows *w0 = &s->axes[s->across[0]].kind[kind0];
    const na_windows *w1 = &s->axes[s->across[1]].kind[kind1];
    const int width = w0->keys * w1->keys, length = (int)row_length(width);
    for (int i = 0; i < s->sections; i++)
        for (int t = s->section[i].begin; t < s->section[i].end; t++) {
            const na_stretch *stretch = &axis->at[t];
            const int row = (stretch->key - s->section[i].key) / axis->dilation;
            const int64_t first = (int64_t)row * length;
            const int shift = (int)(first % NA_HALF);
            const int blocks = blocks_of(shift, stretch->keys, width, length);
            const int64_t end = first - shift + (int64_t)NA_BLOCK * blocks;
            int32_t *mask = &s->mask_of[kind_of(s, stretch->kind, kind0, kind1, shift)];
            s->keys = end > s->keys ? end : s->keys;
            s->computed += (double)w0->uses * w1->uses * NA_BOX * NA_BLOCK * blocks;
            if (*mask < 0) {
                *mask = s->masks++;
                *words += 2.0 * NA_BOX * blocks;
            }
        }
}

static void set_bits(uint16_t *words, int from, int count)
{
    for (int some; count > 0; from += some, count -= some) {
        some = na_min(count, NA_HALF - from % NA_HALF);
        words[from / NA_HALF] |= (uint16_t)(((1u << some) - 1) << from % NA_HALF);
    }
}

/* Notes what one query of a box sees; its number on each axis is i[a]. */
static void fill_query(const na_strips *s, na_mask *m, int q, const na_windows *const w[3],
                       const int i[3], int shift)
{
    const int t = s->axis, a = s->across[0], b = s->across[1];
    const int width = w[a]->keys * w[b]->keys, length = (int)row_length(width);
    uint16_t *words = s->words + m->words + (int64_t)q * m->blocks * 2;
    for (int row = 0; row < w[t]->count[i[t]]; row++)
        for (int line = 0; line < w[a]->count[i[a]]; line++) {
            const int key = shift + (w[t]->first[i[t]] + row) * length +
                            (w[a]->first[i[a]] + line) * w[b]->keys + w[b]->first[i[b]];
            const int count = w[b]->count[i[b]];
            set_bits(words, key, count);
            if (row == 0 && line == 0)
                m->lo[q] = key / NA_BLOCK;
            m->hi[q] = na_max(m->hi[q], (key + count - 1) / NA_BLOCK + 1);
        }
}

static void fill_mask(const na_strips *s, na_mask *m, const na_windows *const w[3], int shift)
{
    for (int q = 0; q < NA_BOX; q++) {
        const int half = q / NA_HALF;
        const int i[3] = {q / (s->axes[1].cut * s->axes[2].cut),
                          q / s->axes[2].cut % s->axes[1].cut, q % s->axes[2].cut};
        if (i[0] >= w[0]->queries || i[1] >= w[1]->queries || i[2] >= w[2]->queries)
            continue;
        fill_query(s, m, q, w, i, shift);
        m->half_lo[half] = na_min(m->half_lo[half], m->lo[q]);
        m->half_hi[half] = na_max(m->half_hi[half], m->hi[q]);
    }
}

/* Fills in the masks that have numbers, in the order of the table. */
static void fill_masks(na_strips *s)
{
    const na_stretches *axis[3] = {&s->axes[s->axis], &s->axes[s->across[0]],
                                   &s->axes[s->across[1]]};
    const na_windows *w[3];
    int64_t words = 0, place = 0;
    for (int kind = 0; kind < axis[0]->kinds; kind++)
        for (int kind0 = 0; kind0 < axis[1]->kinds; kind0++)
            for (int kind1 = 0; kind1 < axis[2]->kinds; kind1++)
                for (int shift = 0; shift < NA_HALF; shift++, place++) {
                    if (s->mask_of[place] < 0)
                        continue;
                    na_mask *m = &s->mask[s->mask_of[place]];
                    w[s->axis] = &axis[0]->kind[kind];
                    w[s->across[0]] = &axis[1]->kind[kind0];
                    w[s->across[1]] = &axis[2]->kind[kind1];
                    const int width = axis[1]->kind[kind0].keys * axis[2]->kind[kind1].keys;
                    m->blocks =
                        blocks_of(shift, axis[0]->kind[kind].keys, width, row_length(width));
                    m->half_lo[0] = m->half_lo[1] = m->blocks;
                    m->words = words;
                    words += 2 * NA_BOX * m->blocks;
                    fill_mask(s, m, w, shift);
                }
}

static int make_masks(na_strips *s)
{
    const na_stretches *axis0 = &s->axes[s->across[0]], *axis1 = &s->axes[s->across[1]];
    const double kinds = (double)s->axes[s->axis].kinds * axis0->kinds * axis1->kinds * NA_HALF;
    double words = 0;
    if (kinds > most_kinds)
        return NA_STRIPS_TOO_LARGE;
    s->mask_of = malloc((size_t)kinds * sizeof *s->mask_of);
    if (!s->mask_of)
        return NA_STRIPS_NO_MEMORY;
    memset(s->mask_of, -1, (size_t)kinds * sizeof *s->mask_of);
    for (int kind0 = 0; kind0 < axis0->kinds; kind0++)
        for (int kind1 = 0; kind1 < axis1->kinds; kind1++)
            number_masks(s, kind0, kind1, &words);
    if (words > most_words)
        return NA_STRIPS_TOO_LARGE;
    s->mask = calloc((size_t)s->masks, sizeof *s->mask);
    s->words = calloc((size_t)words, sizeof *s->words);
    if (!s->mask || !s->words)
        return NA_STRIPS_NO_MEMORY;
    fill_masks(s);
    return NA_STRIPS_MADE;
}

static double pairs_of_axis(const na_stretches *s)
{
    double pairs = 0;
    for (int i = 0; i < s->kinds; i++)
        for (int q = 0; q < s->kind[i].queries; q++)
            pairs += (double)s->kind[i].uses * s->kind[i].count[q];
    return pairs;
}

static int make(na_strips *s, const natten_problem *p, const na_box_cut *cut, int64_t heads,
                int64_t key_bytes)
{
    choose_axis(s, p);
    for (int a = 0; a < 3; a++)
        s->axes[a].cut = cut->queries[a];
    for (int a = 0; a < 3; a++)
        if (!make_stretches(&s->axes[a], &p->axis[a]))
            return NA_STRIPS_NO_MEMORY;
    const double across = (double)most_of_kinds(&s->axes[s->across[0]]) *
                          (double)most_of_kinds(&s->axes[s->across[1]]);
    if (2 * across * most_of_kinds(&s->axes[s->axis]) > most_keys)
        return NA_STRIPS_TOO_LARGE;
    if (!make_sections(s, heads, key_bytes, row_length((int64_t)across)))
        return NA_STRIPS_NO_MEMORY;
    s->strips = (int64_t)s->axes[s->across[0]].count * s->axes[s->across[1]].count * s->sections;
    s->useful =
        pairs_of_axis(&s->axes[0]) * pairs_of_axis(&s->axes[1]) * pairs_of_axis(&s->axes[2]);
    return make_masks(s);
}

int na_strips_make(na_strips *s, const natten_problem *p, const na_box_cut *cut, int64_t heads,
                   int64_t key_bytes)
{
    *s = (na_strips){0};
    const int result = make(s, p, cut, heads, key_bytes);
    if (result != NA_STRIPS_MADE)
        na_strips_free(s);
    return result;
}

void na_strips_free(na_strips *s)
{
    for (int a = 0; a < 3; a++) {
        free(s->axes[a].at);
        free(s->axes[a].kind);
    }
    free(s->section);
    free(s->mask_of);
    free(s->mask);
    free(s->words);
    *s = (na_strips){0};
}

double na_strips_useful(const na_strips *s) { return s->useful / s->computed; }

int na_box_at(const na_strips *s, int64_t task, int n, na_box *box)
{
    const na_stretches *axis = &s->axes[s->axis], *axis0 = &s->axes[s->across[0]];
    const na_stretches *axis1 = &s->axes[s->across[1]];
    const int64_t strip = task % s->strips / s->sections;
    const na_stretch *t0 = &axis0->at[strip / axis1->count];
    const na_stretch *t1 = &axis1->at[strip % axis1->count];
    box->section = &s->section[task % s->sections];
    if (box->section->begin + n >= box->section->end)
        return 0;
    const na_stretch *t = &axis->at[box->section->begin + n];
    box->head = task / s->strips;
    box->axis[s->axis] = t;
    box->axis[s->across[0]] = t0;
    box->axis[s->across[1]] = t1;
    box->across = t1->keys;
    box->width = t0->keys * t1->keys;
    box->length = (int)row_length(box->width);
    const int first = (t->key - box->section->key) / axis->dilation * box->length;
    const int shift = first % NA_HALF;
    box->start = first - shift;
    box->mask = &s->mask[s->mask_of[kind_of(s, t->kind, t0->kind, t1->kind, shift)]];
    return 1;
}
