/* SPDX-License-Identifier: MIT
 * The three inner loops of every kernel, on packed operands:
 *   correlate   score[r][key][lane]  = query[r][lane] . key
 *   aggregate   out[r][lane]         = sum over keys of weight[r][key][lane] * value[key]
 *   scatter     sum[key] += sum over rows and lanes of weight[r][key][lane] * grad[r][lane]
 *
 * Scores and weights of a tile row are [key][lane], keys in the order of the spans that the row
 * sees, WIDTH reals from one key to the next: VL, or HALF for half tiles. All rows of a tile keep
 * their own pointer, since they see different spans. Parameters: the vector words of simd.h. */

/* Most rows of one call, of one whose keys are neighbours (SHIFT, BROADCAST), and keys whose scores
 * it keeps in registers for each number of rows. Products are done after four turns or five: eight
 * sums or fewer, two a turn, wait for one another, but permutations cost more than waiting. */
#if REGISTERS >= 32
enum { ROWS_MAX = 6, KEYS_MAX = 8, CORRELATE_ROWS = 6, SHIFT_ROWS = 6 };
enum { AGGREGATE_ROWS = 6, SCATTER_ROWS = 6 };
static const int correlate_keys[CORRELATE_ROWS + 1] = {0, 8, 8, 8, 6, 5, 4};
/* clang-format off */
#define CORRELATE_SHAPES(X) \
    X(1, 1) X(1, 2) X(1, 3) X(1, 4) X(1, 5) X(1, 6) X(1, 7) X(1, 8) \
    X(2, 1) X(2, 2) X(2, 3) X(2, 4) X(2, 5) X(2, 6) X(2, 7) X(2, 8) \
    X(3, 1) X(3, 2) X(3, 3) X(3, 4) X(3, 5) X(3, 6) X(3, 7) X(3, 8) \
    X(4, 1) X(4, 2) X(4, 3) X(4, 4) X(4, 5) X(4, 6) \
    X(5, 1) X(5, 2) X(5, 3) X(5, 4) X(5, 5) \
    X(6, 1) X(6, 2) X(6, 3) X(6, 4)
/* clang-format on */
#define FULL_SHAPES(X)
#define ROW_COUNTS(X) X(1) X(2) X(3) X(4) X(5) X(6)
#else
enum { CORRELATE_ROWS = 4, AGGREGATE_ROWS = 3, SCATTER_ROWS = 3, KEYS_MAX = 8 };
/* clang-format off */
#define FEW_SHAPES(X) \
    X(1, 1) X(1, 2) X(1, 3) X(1, 4) X(1, 5) X(1, 6) X(1, 7) X(1, 8) \
    X(2, 1) X(2, 2) X(2, 3) X(2, 4) X(2, 5) \
    X(3, 1) X(3, 2) X(3, 3) \
    X(4, 1) X(4, 2)
/* clang-format on */
#define ROW_COUNTS(X) X(1) X(2) X(3)
#ifdef NOT_FUSED
enum { ROWS_MAX = 4, SHIFT_ROWS = 4 };
static const int correlate_keys[CORRELATE_ROWS + 1] = {0, 8, 5, 3, 2};
#define CORRELATE_SHAPES(X) FEW_SHAPES(X)
#define FULL_SHAPES(X)
#else
enum { ROWS_MAX = 6, SHIFT_ROWS = 3 };
static const int correlate_keys[CORRELATE_ROWS + 1] = {0, 8, 6, 4, 2};
#define CORRELATE_SHAPES(X) FEW_SHAPES(X)
/* No register is left for a permutation's places. */
#define FULL_SHAPES(X) X(2, 6) X(3, 4)
#endif
#endif

_Static_assert(ROWS_MAX <= 2 * SHIFT_ROWS, "two calls take all rows of a tile");

/* Rows of a tile with a small window: as many as one call takes of most lane tiles. Those at the
 * borders of the innermost axis permute keys. */
static int few_rows(const natten_problem *p)
{
    const natten_axis *x = &p->axis[2];
    const int64_t tiles = (x->query_extent + VL - 1) / VL;
    const int64_t borders = 2 * ((x->window / 2 * x->dilation + VL - 1) / VL);
    return na_min(2 * borders > tiles ? CORRELATE_ROWS : SHIFT_ROWS, 4);
}

/* One call of a correlate function; all pointers are those of the call's first row. */
typedef struct correlation {
    const real *query;      /* [row][depth][VL], aligned */
    int64_t query_step;     /* between rows */
    const real *key;        /* [depth][...]: the run's first key for a lane of start 0 */
    int64_t key_step;       /* between keys of the run */
    const real *const *far; /* each key of the run, where they are not in step; else NULL */
    int64_t key_depth;      /* between channels */
    int depth;              /* channels, or pairs of them */
    real scale;             /* pairs: of the scores, since queries are taken as they are */
    int add;                /* 1: add to what stands in score */
    int first;              /* number of the run's first key, compared with limit */
    const int32_t *start;   /* of lanes */
    int spread;             /* the largest of them */
    int split, apart;       /* SPLIT: lanes of the first piece, and how far off the rest is */
    const int32_t *limit; /* scores of keys at or beyond a lane's limit become `forbidden`; NULL */
    real forbidden;
    int64_t limit_step; /* between rows */
    real *const *score; /* of each row: where the run's first score goes, aligned */
    real *top;          /* [row][VL]: largest score so far is kept up to date; NULL */
} correlation;

typedef void (*correlate_function)(const correlation *, int from);

static ALWAYS_INLINE const real *key_at(const correlation *a, int number)
{
    return a->far ? a->far[number] : a->key + number * a->key_step;
}

#define V vec
#define W(word) vec_##word
#define T(name) name
#define WIDTH VL
#define PERMUTE2(i, a, b) vec_permute2(i, a, b)
#define MERGE(a, b, n) vec_merge(a, b, n)
#define INDEX_ADD(i, n) vec_index_add(i, n)
#define SLIDE(a, b, n) vec_slide(a, b, n)
#ifdef WHOLE_LINES
#define SPLITS(rows, keys) ONE(rows, keys, NA_SPLIT)
/* Where few rows share a key, loads take longer than products: there it pays to permute instead. */
#define ALIGNS(rows, keys) ((rows) < 3 || ((rows) == 3 && (keys) < 5))
#define SLIDE_SHAPES(X)                                                                            \
    X(1, 4) X(1, 5) X(1, 6) X(1, 7) X(1, 8) X(2, 4) X(2, 5) X(2, 6) X(2, 7) X(2, 8)
#else
#define SPLITS(rows, keys)
#define ALIGNS(rows, keys) 0
#define SLIDE_SHAPES(X)
#endif
#ifdef NOT_FUSED
#define PERMUTES2(rows, keys)
#else
#define PERMUTES2(rows, keys) ONE(rows, keys, NA_PERMUTE2)
#endif
#include "cpu/correlate_tmpl.h"
#undef V
#undef W
#undef T
#undef WIDTH
#undef PERMUTE2
#undef MERGE
#undef SPLITS
#undef PERMUTES2
#undef INDEX_ADD
#undef SLIDE
#undef ALIGNS
#undef SLIDE_SHAPES

#ifdef HALF_WORDS
#define V half
#define W(word) half_##word
#define T(name) half_##name
#define WIDTH HALF
#define PERMUTE2(i, a, b) (a)
#define MERGE(a, b, n) (a)
#define SPLITS(rows, keys)
#define PERMUTES2(rows, keys)
#define INDEX_ADD(i, n) (i)
#define SLIDE(a, b, n) ((void)(b), (a))
#define ALIGNS(rows, keys) 0
#define SLIDE_SHAPES(X)
#include "cpu/correlate_tmpl.h"
#undef V
#undef W
#undef T
#undef WIDTH
#undef PERMUTE2
#undef MERGE
#undef SPLITS
#undef PERMUTES2
#undef INDEX_ADD
#undef SLIDE
#undef ALIGNS
#undef SLIDE_SHAPES
#endif

/* Neighbouring spans of equal length that the same rows see in the same way are taken together: a
 * call of an inner loop then does more before it ends. */
enum { GROUP_KEYS = 64 };

/* How many of the spans, from the first one on, make a group. */
static int group_spans(const na_span *spans, int count)
{
    const na_span *s = spans;
    const int most = s->limit ? 1 : GROUP_KEYS / s->len < count ? GROUP_KEYS / s->len : count;
    int some = 1;
    while (some < most && spans[some].lo == s->lo && spans[some].hi == s->hi &&
           spans[some].len == s->len && spans[some].start == s->start && !spans[some].limit)
        some++;
    return some;
}

/* Lanes of start 0 and on. */
static int first_piece(const int32_t *start)
{
    int lanes = 1;
    while (lanes < VL && start[lanes] == lanes)
        lanes++;
    return lanes;
}

/* Lanes whose keys follow one another: a dilation longer than a vector leaves two or three such
 * pieces of it. Returns how many there are. */
static int pieces_of(const int32_t *start, int begin[VL])
{
    int pieces = 0;
    for (int l = 0; l < VL; l++)
        if (l == 0 || start[l] != start[l - 1] + 1)
            begin[pieces++] = l;
    return pieces;
}

/* Copies keys to room[d][key][lane], so many pieces of each: every one is stored with what lies
 * behind it, which the next one or the next key then replaces. */
static ALWAYS_INLINE void copy_pieces(const int pieces, const int begin[VL], const correlation *a,
                                      int from, int keys, real *room)
{
    for (int d = 0; d < a->depth; d++)
        for (int c = 0; c < keys; c++, room += VL) {
            const real *key = key_at(a, from + c) + d * a->key_depth;
            UNROLL
            for (int i = 0; i < pieces; i++)
                vec_storeu(room + begin[i], vec_loadu(key + a->start[begin[i]]));
        }
}

/* Where the lanes' keys lie far apart they are brought together first, into room[d][key][lane]. */
static void bring_together(const correlation *a, int from, int keys, int mode, real *room)
{
    int begin[VL];
    const int pieces = pieces_of(a->start, begin);
    if (pieces == 2)
        copy_pieces(2, begin, a, from, keys, room);
    else if (pieces == 3)
        copy_pieces(3, begin, a, from, keys, room);
    else {
        const vec_index start = vec_index_load(a->start);
        for (int d = 0; d < a->depth; d++)
            for (int c = 0; c < keys; c++, room += VL) {
                const real *key = key_at(a, from + c) + d * a->key_depth;
                if (mode == NA_PERMUTE2)
                    vec_store(room, vec_permute2(start, vec_loadu(key), vec_loadu(key + VL)));
                else
                    vec_store(room, vec_gather(key, start));
            }
    }
}

/* Packed operands of a tile, for correlate_group. */
typedef struct scoring {
    const real *query; /* [row][depth][VL] */
    const real *key;   /* transposed keys of slot 0 */
    int64_t slot_step; /* between slots */
    int64_t key_depth; /* between channels in a slot */
    int depth;
    real scale; /* pairs */
    int half;   /* 1: HALF lanes, scores HALF apart */
    int rows;   /* of the tile */
    na_row_lanes lanes;
    real forbidden;  /* score of keys that a lane does not see */
    real *top;       /* [row][VL] or NULL */
    real *room;      /* depth * KEYS_MAX * VL reals, and a vector */
    ahead *ahead[2]; /* what is fetched on the way, for each span; NULL: nothing */
} scoring;

/* a / b for 0 <= a < 128, 0 < b <= 32, and about that for larger a: a division takes as long as ten
 * products or more. */
static inline int small_quotient(int64_t a, int b)
{
    static const int32_t inverse[] = {0,    65536, 32768, 21846, 16384, 13108, 10923, 9363, 8192,
                                      7282, 6554,  5958,  5462,  5042,  4682,  4370,  4096, 3856,
                                      3641, 3450,  3277,  3121,  2979,  2850,  2731,  2622, 2521,
                                      2428, 2341,  2260,  2185,  2115,  2048};
    return (int)(a * inverse[b] >> 16);
}

/* The keys of a group, for lanes of start 0; returns their number. */
static int list_keys(const scoring *t, const na_span *spans, int count, const real **key)
{
    int keys = 0;
    for (const na_span *s = spans; s < spans + count; s++) {
        const real *at = t->key + s->slot * t->slot_step + s->x;
        for (int k = 0; k < s->len; k++, at += s->step)
            key[keys++] = at;
    }
    return keys;
}

/* The functions of a mode, by rows and keys. */
typedef const correlate_function (*correlate_shapes)[KEYS_MAX + 1];

static inline correlate_shapes shapes_of(const scoring *t, int mode)
{
#ifdef HALF_WORDS
    if (t->half)
        return half_correlate_table[mode];
#endif
    (void)t;
    return correlate_table[mode];
}

/* Calls for keys [from, from + all) of a group and a's first rows. `slid`: spans whose keys are
 * neighbours. `owed`: what is fetched on the way. */
static ALWAYS_INLINE void correlate_calls(const scoring *t, correlate_shapes shapes, int slid,
                                          const correlation *a, int rows, int from, int all,
                                          const int64_t owed[2])
{
    const correlate_function *table = shapes[rows];
    /* Calls of nearly equal length: some, then others of a key less. */
    const int most = correlate_keys[rows] - !table[correlate_keys[rows]];
    const int calls = small_quotient(all + most - 1, most);
    const int less = small_quotient(all, calls), longer = all - less * calls;
    /* The keys of each call are then of one span. */
    if ((slid == 1 || slid == calls) && correlate_table[NA_SLIDE][rows][less])
        table = correlate_table[NA_SLIDE][rows];
    for (int i = 0, keys; i < calls; i++, from += keys) {
        keys = less + (i < longer);
        if (owed[0] || owed[1]) {
            ahead_fetch(t->ahead[0], small_quotient(owed[0] + i, calls));
            ahead_fetch(t->ahead[1], small_quotient(owed[1] + i, calls));
        }
        table[keys](a, from);
    }
}

/* The same for rows after the first. */
static void correlate_rest(const scoring *t, correlate_shapes shapes, int slid,
                           const correlation *a, int first, int rows, int from, int all)
{
    const int64_t nothing[2] = {0};
    correlation rest = *a;
    rest.query += first * a->query_step;
    rest.score += first;
    rest.limit += a->limit ? first * a->limit_step : 0;
    rest.top += a->top ? first * VL : 0;
    correlate_calls(t, shapes, slid, &rest, rows - first, from, all, nothing);
}

/* The same for all rows, of which a call may take fewer. */
static ALWAYS_INLINE void correlate_rows(const scoring *t, correlate_shapes shapes, int slid,
                                         const correlation *a, int rows, int most, int from,
                                         int all, const int64_t owed[2])
{
    const int first = rows > most ? (rows + 1) / 2 : rows;
    correlate_calls(t, shapes, slid, a, first, from, all, owed);
    if (first < rows)
        correlate_rest(t, shapes, slid, a, first, rows, from, all);
}

/* The same for lanes whose keys lie far apart, brought together a few at a time. */
static void correlate_far(const scoring *t, const correlation *a, int mode, int rows, int all,
                          const int64_t owed[2])
{
    const int64_t nothing[2] = {0};
    for (int from = 0, keys; from < all; from += keys) {
        keys = all - from < KEYS_MAX ? all - from : KEYS_MAX;
        correlation b = *a;
        bring_together(a, from, keys, mode, t->room);
        b.far = NULL;
        b.key_depth = (int64_t)keys * VL;
        b.key_step = VL;
        b.key = t->room - from * b.key_step;
        correlate_rows(t, shapes_of(t, NA_SHIFT), 0, &b, rows, SHIFT_ROWS, from, keys,
                       from == 0 ? owed : nothing);
    }
}

/* The last rows of a tile may have a few queries only. Where these see the same keys, neighbours of
 * one another, keys are better taken as lanes: 49 queries are three vectors and one. */
enum { FEW_LANES = 4, FEW_VECTORS = (NA_RUN + VL - 1) / VL };

/* How many of a group's rows are such rows. */
static inline int few_of(const scoring *t, const na_span *span, int add)
{
    const int suits = span->mode == NA_BROADCAST && span->step == 1 && !span->limit && !add &&
                      !t->half && t->lanes.least <= FEW_LANES;
    const int short_rows = t->lanes.shorter - (t->rows - span->hi);
    return suits ? na_max(na_min(short_rows, span->hi - span->lo), 0) : 0;
}

/* The scores of lane l of the tile's row r and a span's keys, lane 0's in all lanes after it, too:
 * these are overwritten, or are no queries. Returns the largest one, or `top`. */
static real correlate_lane(const scoring *t, const na_span *span, int r, int l, real *score,
                           real top)
{
    const real *query = t->query + (int64_t)r * t->depth * VL + l;
    const real *key = t->key + span->slot * t->slot_step + span->x;
    const int vectors = (span->len + VL - 1) / VL;
    vec sum[FEW_VECTORS];
    real one[FEW_VECTORS * VL] __attribute__((aligned(64)));
    UNROLL
    for (int i = 0; i < FEW_VECTORS; i++)
        sum[i] = vec_zero();
    /* In the order of correlate, for the same bits. */
    for (int d = 0; d < t->depth; d++, query += VL, key += t->key_depth) {
        UNROLL
        for (int i = 0; i < FEW_VECTORS; i++)
            if (i < vectors)
                sum[i] = vec_dot(vec_set1(*query), vec_loadu(key + i * VL), sum[i]);
    }
    UNROLL
    for (int i = 0; i < FEW_VECTORS; i++)
        vec_store(one + i * VL, PER_REAL > 1 ? vec_mul(vec_set1(t->scale), sum[i]) : sum[i]);
    if (l == 0)
        for (int k = 0; k < span->len; k++)
            vec_store(score + k * VL, vec_set1(one[k]));
    else
        for (int k = 0; k < span->len; k++)
            score[k * VL + l] = one[k];
    for (int k = 0; k < span->len; k++)
        top = top < one[k] ? one[k] : top;
    return top;
}

/* The scores of the last `few` of a group's rows. */
static void correlate_few(const scoring *t, const na_span *spans, int count, int few,
                          real *const *score)
{
    for (int r = spans->hi - few; r < spans->hi; r++) {
        real *at = score[r], top[FEW_LANES];
        for (int l = 0; l < t->lanes.least; l++)
            top[l] = t->top ? t->top[r * VL + l] : 0;
        for (const na_span *span = spans; span < spans + count; at += span->len * VL, span++)
            for (int l = 0; l < t->lanes.least; l++)
                top[l] = correlate_lane(t, span, r, l, at, top[l]);
        if (!t->top)
            continue;
        /* Lanes that are no queries hold the scores of the first. */
        vec_store(t->top + r * VL, vec_set1(top[0]));
        memcpy(t->top + r * VL, top, (size_t)t->lanes.least * sizeof *top);
    }
}

/* Scores of a group of spans, for the rows that see it, into score[row] (of tile row 0 on). `add`:
 * on top of what stands there. */
static void correlate_group(const scoring *t, const na_span *spans, int count, real *const *score,
                            int add)
{
    const na_span *span = spans;
    const int few = few_of(t, span, add);
    const int rows = span->hi - span->lo - few, mode = span->mode;
    const int64_t query_step = (int64_t)t->depth * VL;
    const real *key[GROUP_KEYS];
    const int all = count > 1 ? list_keys(t, spans, count, key) : span->len;
    const correlation a = {.query = t->query + span->lo * query_step,
                           .query_step = query_step,
                           .key = t->key + span->slot * t->slot_step + span->x,
                           .key_step = span->step,
                           .far = count > 1 ? key : NULL,
                           .key_depth = t->key_depth,
                           .depth = t->depth,
                           .scale = t->scale,
                           .add = add,
                           .first = span->first,
                           .start = span->start,
                           .spread = span->spread,
                           .split = mode == NA_SPLIT ? first_piece(span->start) : 0,
                           .apart = span->start[VL - 1] - (VL - 1),
                           .limit = span->limit ? span->limit + span->lo * span->limit_step : NULL,
                           .limit_step = span->limit_step,
                           .forbidden = t->forbidden,
                           .score = score + span->lo,
                           .top = t->top ? t->top + span->lo * VL : NULL};
    const int64_t owed[2] = {t->ahead[0] ? (int64_t)t->ahead[0]->quota * count : 0,
                             t->ahead[0] ? (int64_t)t->ahead[1]->quota * count : 0};
    const int most = mode == NA_SHIFT || mode == NA_BROADCAST ? SHIFT_ROWS : CORRELATE_ROWS;
    const int slid = mode == NA_SHIFT && span->step == 1 && !t->half ? count : 0;
    const int far = t->half ? mode > NA_BROADCAST : !correlate_table[mode][1][1];
    if (few)
        correlate_few(t, spans, count, few, score);
    if (far)
        correlate_far(t, &a, mode, rows, all, owed);
    else if (rows)
        correlate_rows(t, shapes_of(t, mode), slid, &a, rows, most, 0, all, owed);
}
