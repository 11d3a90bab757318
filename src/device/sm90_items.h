/* SPDX-License-Identifier: MIT
 * What all parts of the Hopper kernels share: work items, notes about tiles, which visitors a
 * resident has.
 *
 * Parameters: NA_SIDE, 0 where residents are queries, 1 where they are keys; NA_SUB_0..2, NA_PACK,
 * NA_GROUPS, NA_STACK, NA_TILE_0..2, NA_POSITIONS, NA_BIAS (sm90_forward.cu has them);
 * NA_BIAS_ENTRIES (sm90_backward.cu); NA_EVERY_LANE_ARRIVES (words/hopper.h); NA_ADDS, 1 where what
 * residents that are not there give would be added to something (sm90_adds.h). */
#ifndef NA_ADDS
#define NA_ADDS 0
#endif
/* A word of the mask tables, as many bits as needed where room is short. */
#if !NA_ADDS
typedef uint32_t cell;
#elif NA_TILE_0 * NA_TILE_1 <= 8
typedef uint8_t cell;
#else
typedef uint16_t cell;
#endif

enum {
    SUB_TOKENS = NA_SM90_ROWS / NA_PACK,
    TABLE_ROWS = NA_SUB_0 + NA_SUB_1 + NA_SUB_2,
    TABLE_WORDS = TABLE_ROWS * NA_POSITIONS,
    BIAS_WORDS = NA_BIAS ? NA_SM90_BIAS_WORDS(NA_POSITIONS, NA_BIAS_ENTRIES, NA_VISITORS) : 0,
    /* Only axes along which residents or visitors differ have to be looked at. */
    MASKS_0 = NA_SUB_0 > 1 || NA_TILE_0 > 1,
    MASKS_1 = NA_SUB_1 > 1 || NA_TILE_1 > 1,
    HALVES_AXIS = NA_TILE_0 > 1   ? 0
                  : NA_TILE_1 > 1 ? 1
                                  : 2,
    /* The order of the walk over tiles, outermost axis first, is one that the L2 cache likes. */
    OUTER = NA_TILE_0 > 1 ? 2 : 0,
    MIDDLE = NA_TILE_0 > 1 ? 0 : 1,
    INNER = NA_TILE_0 > 1 ? 1 : 2,
    ARRIVALS = (NA_EVERY_LANE_ARRIVES ? 128 : 4) * NA_GROUPS, /* of all that compute */
    SCOUTS = 32,
    ORDER_TAKERS = 128 * NA_GROUPS + 32 + 1 /* threads */
};

/* What a note says about a tile; the first five are shifted left by a warpgroup's number. */
enum {
    SKIP = 1,
    MASK = 1 << 3,
    UPPER_ONLY = 1 << 16, /* the first half is not needed */
    LOWER_ONLY = 1 << 20,
    LAST = 1 << 8,  /* of its item */
    EXTRA = 1 << 9, /* additional tokens */
    VISIT = 23      /* from this bit on, with a bias: which head of queries visits */
};

/* A note: three words that say where the tile lies, and its kind; where d_query is added up, also
 * whereto. */
enum { NOTE_WORDS = NA_SM90_NOTE_BYTES / 4, NOTE_KIND = 3, NOTE_TARGET = NOTE_WORDS };

typedef struct ring {
    int stage;
    uint32_t phase;
} ring;

NA_WORD void next(ring *ring, int stages)
{
    if (++ring->stage == stages) {
        ring->stage = 0;
        ring->phase ^= 1;
    }
}

/* ----------------------------------------------------------------------------------------------
 * items */

typedef struct work_item {
    int first[3], end[3], residue[3]; /* residents of the tile; the group's end; the group */
    int head, batch;                  /* batch -1: there is no more work */
#if !NA_ADDS
    int number; /* only where a bias' gradient is given */
#endif
} work_item;

/* Residents of a block's tile along an axis. */
NA_WORD int sub(int axis) { return axis == 0 ? NA_SUB_0 : axis == 1 ? NA_SUB_1 : NA_SUB_2; }
NA_WORD int tile(int axis) { return axis == 0 ? NA_TILE_0 : axis == 1 ? NA_TILE_1 : NA_TILE_2; }
NA_WORD int offset(int axis, int group) { return axis == NA_STACK ? group * sub(axis) : 0; }

/* Item number w, found by a whole warp: three lanes see to an axis each. 0: there is nothing in it.
 * Axis 0 runs fastest, then `raster` tiles of axis 1, axis 2, the rest of axis 1: neighbors share
 * visitors in the L2 cache. */
NA_WORD int find_item(const na_sm90_walk *p, int w, int lane, work_item *t)
{
    const int number = w, a = na_min(lane, 2);
    const na_sm90_axis *axis = &p->axis[a];
    int count[3], x[3];
    for (int i = 0; i < 3; i++)
        count[i] = p->axis[i].tiles * p->axis[i].rule.dilation;
    int blocks = (count[1] + p->raster - 1) / p->raster;
    x[0] = w % count[0];
    w /= count[0];
    x[1] = w % p->raster;
    w /= p->raster;
    x[2] = w % count[2];
    w /= count[2];
    x[1] += w % blocks * p->raster;
    w /= blocks;
    int at = a == 0 ? x[0] : a == 1 ? x[1] : x[2], dilation = axis->rule.dilation;
    int residue = at / axis->tiles, before = axis->origin - residue + dilation - 1;
    int first =
        na_over(before, dilation) + at % axis->tiles * sub(a) * (a == NA_STACK ? NA_GROUPS : 1);
    int end = na_over(before + axis->extent, dilation);
    int there = !na_any(residue >= dilation || first >= end);
    if (lane < 3) {
        t->first[lane] = first;
        t->end[lane] = end;
        t->residue[lane] = residue;
    }
    if (lane == 0) {
        t->head = w % p->heads;
        t->batch = w / p->heads;
#if !NA_ADDS
        t->number = NA_BIAS_ENTRIES ? number : 0;
#endif
    }
    return there;
}

/* The visitors of a resident, as places of its dilation group. */
NA_WORD na_window visitors_at(const na_sm90_axis *axis, int residue, int place)
{
    na_axis group = axis->rule;
    int dilation = group.dilation, round = dilation - 1 - residue;
    group.extent = na_over(group.extent + round, dilation);
    group.dilation = 1;
    if (NA_SIDE == 0)
        return na_window_of(group, place);
    return na_visitors_of(group, place, na_over(axis->visitor_origin + round, dilation),
                          na_over(axis->visitor_origin + axis->visitor_extent + round, dilation));
}

/* The union of the visitors of some residents, and which visit all of them. */
typedef struct span {
    int first, end, inner_first, inner_end;
} span;

/* The bits of a note for `width` visitors from `from` on, along one axis. */
NA_WORD int classify(const span *s, int first, int width, int halves)
{
    int from = first, to = first + width, middle = first + width / 2, kind = 0;
    if (halves && (middle <= s->first || first >= s->end)) {
        kind |= UPPER_ONLY;
        from = middle;
    }
    if (halves && (to <= s->first || middle >= s->end)) {
        kind |= LOWER_ONLY;
        to = middle;
    }
    if (first + width <= s->first || first >= s->end)
        kind |= SKIP;
    return kind | (from >= s->inner_first && to <= s->inner_end ? 0 : MASK);
}

/* ----------------------------------------------------------------------------------------------
 * boxes */

/* Tokens from `at` on, as the map counts; 64 channels in every `step` bytes, which the gate knows
 * of. */
NA_WORD void load_pieces(uint32_t to, uint32_t full, int bytes, int step, const na_tensor_map *map,
                         int head, const int *at, int batch, int flat)
{
#pragma unroll
    for (int piece = 0; piece * step < bytes; piece++)
        na_box_load(to + piece * step, map, full, piece * NA_SM90_COLUMNS, head, at[2], at[1],
                    flat ? batch : at[0]);
}

/* Where a warpgroup's residents lie. */
NA_WORD void find_residents(const na_sm90_walk *p, const work_item *t, int group, int *at)
{
#pragma unroll
    for (int a = 0; a < 3; a++)
        at[a] = (t->first[a] + offset(a, group)) * p->axis[a].rule.dilation + t->residue[a] -
                p->axis[a].origin;
}
