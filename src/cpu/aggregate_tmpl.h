/* SPDX-License-Identifier: MIT
 * The inner loop aggregate (micro_tmpl.h says what it computes), over runs of keys.
 * Parameters: those of micro_tmpl.h, runs_tmpl.h. */

/* Weights of a tile times values. */
typedef struct aggregation {
    const na_span *spans;
    int count;
    int lane, lanes;     /* [lane, lanes) are queries */
    int begin, end;      /* begin: else the sums of the call are added to `sum`,
                            which keeps roundoff of long windows small;
                            end: sums are multiplied by factor, and go to `out` if there is one */
    int stream;          /* out may be written past the caches: its vectors are whole and aligned */
    int64_t width;       /* between weights of one lane */
    int64_t weight_lane; /* between lanes */
    real *const *weight; /* of each row: of the first span's first key */
    const real *value;   /* natural tokens of slot 0, aligned, at the first channel */
    int64_t value_step;  /* between tokens */
    int group;           /* channels of a call */
    int64_t value_group; /* between those of one and of the next */
    real *sum;           /* of row 0, lane 0, at its first channel, aligned */
    int64_t sum_row, sum_lane, sum_group;
    const real *factor;      /* [row][VL] */
    out_real *const *out;    /* of each row: lane 0; NULL: into sum */
    const int64_t *out_lane; /* of each lane: bytes from lane 0 */
} aggregation;

/* One call of an aggregate function: some rows and channels of it. (Not a copy of the whole: that
 * would wait until all of it has been written.) */
typedef struct aggregate_part {
    const span_run *runs;
    int run_count;
    int lane, begin, end;
    int row, channel; /* the first ones */
    int part;         /* channels of the last vector, 0: all; in `out` nothing lies behind them */
    real *const *weight; /* as those of the aggregation, at the first row and channel */
    const real *value;
    real *sum;
} aggregate_part;

/* Channels are counted in halves of vectors: of an odd number, the last one is summed in halves. */
#if defined(HALF_WORDS) && !defined(PAIRS)
#define TAILS 1
typedef half tail;
WORD tail tail_zero(void) { return half_zero(); }
WORD tail tail_of(vec a) { return half_low(a); }
WORD vec tail_vec(tail a) { return half_vec(a); }
WORD tail tail_load(const real *p) { return half_pin(half_load(p)); }
WORD tail tail_dot(tail a, tail b, tail c) { return half_dot(a, b, c); }
#else
#define TAILS 0
typedef vec tail;
WORD tail tail_zero(void) { return vec_zero(); }
WORD tail tail_of(vec a) { return a; }
WORD vec tail_vec(tail a) { return a; }
WORD tail tail_load(const real *p) { return vec_pin(vec_load(p)); }
WORD tail tail_dot(tail a, tail b, tail c) { return vec_dot(a, b, c); }
#endif

/* How often a loop over so many vectors is gone through: where it were once, and is unrolled, clang
 * keeps sums in memory. */
static ALWAYS_INLINE int twice_at_least(const int vectors) { return vectors == 1 ? 2 : vectors; }

/* Of one lane or of two. */
typedef struct channel_sums {
    vec whole[2][ROWS_MAX][CHANNELS_MAX];
    tail last[2][ROWS_MAX];
} channel_sums;

/* What there is of a key: itself, or a pair; the first of a pair; the first ones of two pairs. */
enum { WHOLE, FIRST, CROSSED };

/* The channels of a vector as they are multiplied. */
static ALWAYS_INLINE vec channels_at(const int what, const real *value, const real *other)
{
    const vec v = vec_load(value);
    return what == FIRST ? vec_first(v) : what == CROSSED ? vec_firsts(vec_load(other), v) : v;
}

/* Adds a key to the sums of rows [lo, hi), of one lane or of two neighbours. */
static ALWAYS_INLINE void add_key(const int lo, const int hi, const int halves, const int lanes,
                                  const int what, channel_sums *sum, const real *const weight[],
                                  int64_t k, const real *const value[], int64_t at, int64_t other)
{
    /* Either the rows' weights are held in registers or the channels. */
    const int hold = lanes == 1 && what == WHOLE, vectors = halves / 2;
    vec p[ROWS_MAX], v[2][CHANNELS_MAX];
    tail last[2];
    UNROLL
    for (int r = lo; r < hi && hold; r++)
        p[r] = vec_pin(vec_set1(weight[r][k]));
    if (hold && halves % 2) {
        const tail t = tail_load(value[0] + at + vectors * VL);
        UNROLL
        for (int r = lo; r < hi; r++)
            sum->last[0][r] = tail_dot(tail_of(p[r]), t, sum->last[0][r]);
    }
    if (!hold && halves % 2) {
        UNROLL
        for (int j = 0; j < lanes; j++)
            last[j] = tail_load(value[j] + at + vectors * VL);
    }
    UNROLL
    for (int i = 0; i < twice_at_least(vectors); i++)
        if (i < vectors) {
            UNROLL
            for (int j = 0; j < lanes; j++)
                v[j][i] =
                    vec_pin(channels_at(what, value[j] + at + i * VL, value[j] + other + i * VL));
            UNROLL
            for (int r = lo; r < hi && hold; r++)
                sum->whole[0][r][i] = vec_dot(p[r], v[0][i], sum->whole[0][r][i]);
        }
    UNROLL
    for (int r = lo; r < hi && !hold; r++) {
        UNROLL
        for (int j = 0; j < lanes; j++) {
            const vec q = vec_pin(vec_set1(weight[r][k + j]));
            UNROLL
            for (int i = 0; i < twice_at_least(vectors); i++)
                if (i < vectors)
                    sum->whole[j][r][i] = vec_dot(q, v[j][i], sum->whole[j][r][i]);
            if (halves % 2)
                sum->last[j][r] = tail_dot(tail_of(q), last[j], sum->last[j][r]);
        }
    }
}

/* Adds the `seen` first keys of each span of a run to the sums of rows [lo, hi); the value of the
 * key after them may be anything. */
static ALWAYS_INLINE void add_run(const int lo, const int hi, const int halves, const int lanes,
                                  const int grouped, channel_sums *sum, const real *weight[],
                                  const real *const value[], const span_run *run, int64_t width,
                                  int seen)
{
    const int64_t step = run->step, length = seen / PER_REAL * width;
    const int64_t spans = run->spans;
    int64_t before = 0, k = 0;
    if (!grouped)
        for (int64_t at = run->token; k < length; k += width, at += step)
            add_key(lo, hi, halves, lanes, WHOLE, sum, weight, k, value, at, 0);
    for (int64_t s = 0, until = length; grouped && s < spans; s++, until = k + length) {
        int64_t at = run->tokens[s];
        for (; k < until; k += width, at += step)
            add_key(lo, hi, halves, lanes, WHOLE, sum, weight, k, value, at, 0);
        if (PER_REAL > 1 && seen % PER_REAL) {
            if (s % 2)
                add_key(lo, hi, halves, lanes, CROSSED, sum, weight, k, value, at, before);
            else if (s + 1 == spans)
                add_key(lo, hi, halves, lanes, FIRST, sum, weight, k, value, at, 0);
            k += s % 2 ? width : 0;
            before = at;
        }
    }
    UNROLL
    for (int r = lo; r < hi; r++)
        weight[r] += run->stored;
}

/* Where the sums of a call go. Usually they are whole vectors that go past the caches at the end,
 * and to `sum` before it; nothing is then asked for each vector. */
typedef enum sums_way {
    SUMS_WHOLE,  /* of the only call, to out */
    SUMS_FIRST,  /* to sum */
    SUMS_MIDDLE, /* added to sum */
    SUMS_LAST,   /* with those in sum to out */
    SUMS_ANY     /* whatever the call says */
} sums_way;

static ALWAYS_INLINE sums_way sums_way_of(const aggregation *a, const aggregate_part *p)
{
    const int streams = a->out && a->stream;
    return !p->end    ? p->begin ? SUMS_FIRST : SUMS_MIDDLE
           : !streams ? SUMS_ANY
           : p->begin ? SUMS_WHOLE
                      : SUMS_LAST;
}

static inline out_real *lane_out(const aggregation *a, const aggregate_part *p, int r, int l)
{
    return (out_real *)(void *)((char *)(a->out[p->row + r] + p->channel) + a->out_lane[l]);
}

/* Sums of row r of the call and of lane l. */
static ALWAYS_INLINE void finish_row(const int halves, const sums_way way, const aggregation *a,
                                     const aggregate_part *p, const int r, int l,
                                     const vec whole[CHANNELS_MAX], tail last)
{
    const int any = way == SUMS_ANY;
    const int more = any ? !p->begin : way == SUMS_MIDDLE || way == SUMS_LAST;
    const int end = any ? p->end : way == SUMS_WHOLE || way == SUMS_LAST;
    const vec factor = vec_set1(end ? a->factor[(p->row + r) * VL + l] : 1);
    real *partial = p->sum + l * a->sum_lane + r * a->sum_row;
    out_real *out = end && (!any || a->out) ? lane_out(a, p, r, l) : NULL;
    UNROLL
    for (int i = 0; i < twice_at_least((halves + 1) / 2); i++)
        if (i < (halves + 1) / 2) {
            vec x = 2 * i + 1 == halves ? tail_vec(last) : whole[i];
            if (more)
                x = vec_add(x, vec_load(partial + i * VL));
            x = end ? vec_mul(x, factor) : x;
            if (end && (!any || (out && a->stream)))
                vec_stream_out(out + i * VL, x);
            else if (!end || !out)
                vec_storeu(partial + i * VL, x);
#ifndef PAIRS
            else if (i == (halves - 1) / 2 && p->part)
                vec_store_part(out + i * VL, p->part, x);
#endif
            else
                vec_store_out(out + i * VL, x);
        }
}

/* Those of lanes [l, l + lanes). */
static ALWAYS_INLINE void store_sums(const int rows, const int halves, const int lanes,
                                     const sums_way way, const aggregation *a,
                                     const aggregate_part *p, int l, const channel_sums *sum)
{
    UNROLL
    for (int j = 0; j < lanes; j++) {
        UNROLL
        for (int r = 0; r < rows; r++)
            finish_row(halves, way, a, p, r, l + j, sum->whole[j][r], sum->last[j][r]);
    }
}

/* `lanes`: at a time; of two all see all keys, and their weights are neighbours. */
static ALWAYS_INLINE void aggregate_lanes(const int rows, const int halves, const int lanes,
                                          const int grouped, const aggregation *a,
                                          const aggregate_part *p)
{
    const int64_t width = a->width, value_step = a->value_step;
    const span_run *const runs = p->runs, *const end = runs + p->run_count;
    const real *const values = p->value;
    /* Beside 24 sums of pairs, the constants of rounding find no registers. */
    const sums_way way =
        PER_REAL > 1 && rows * halves >= 48 && p->end ? SUMS_ANY : sums_way_of(a, p);
    for (int l = p->lane; l + lanes <= a->lanes; l += lanes) {
        channel_sums sum;
        const int32_t *start = NULL;
        const real *weight[ROWS_MAX], *first = values, *second = values;
        UNROLL
        for (int r = 0; r < rows; r++) {
            weight[r] = p->weight[r] + l * (lanes == 1 ? a->weight_lane : 1);
            UNROLL
            for (int i = 0; i < twice_at_least(halves / 2); i++)
                if (i < halves / 2)
                    sum.whole[0][r][i] = sum.whole[1][r][i] = vec_zero();
            sum.last[0][r] = sum.last[1][r] = tail_zero();
        }
        for (const span_run *run = runs; run < end; run++) {
            if (run->start != start) { /* nearly always the same: nothing then waits for it */
                start = run->start;
                first = values + start[l] * value_step;
                second = values + start[l + lanes - 1] * value_step;
            }
            const real *const value[] = {first, second};
            const int seen = lanes == 1 ? run_seen(run, l) : run->keys;
            switch (run->rows) {
#define ONE(lo, hi)                                                                                \
    case lo * 8 + hi:                                                                              \
        if (hi <= rows)                                                                            \
            add_run(lo, hi, halves, lanes, grouped, &sum, weight, value, run, width, seen);        \
        break;
                ROW_RANGES(ONE)
#undef ONE
            }
        }
        switch (way) {
#define ONE(name)                                                                                  \
    case name:                                                                                     \
        store_sums(rows, halves, lanes, name, a, p, l, &sum);                                      \
        break;
            ONE(SUMS_WHOLE) ONE(SUMS_FIRST) ONE(SUMS_MIDDLE) ONE(SUMS_LAST) ONE(SUMS_ANY)
#undef ONE
        }
    }
}

static ALWAYS_INLINE void aggregate(const int rows, const int halves, const aggregation *a,
                                    const aggregate_part *p)
{
    aggregate_lanes(rows, halves, 1, PER_REAL > 1, a, p);
}

/* Two lanes at a time: where there are few channels, the ends of runs cost half as much. */
static ALWAYS_INLINE void aggregate_two(const int rows, const int halves, const aggregation *a,
                                        const aggregate_part *p)
{
    /* With halves of six rows gcc keeps one of the sums on the stack. */
    aggregate_lanes(rows, rows == 6 && halves == 3 ? 4 : halves, 2, 1, a, p);
}

/* What two lanes leave, or cannot do. */
static ALWAYS_INLINE void aggregate_one(const int rows, const int halves, const aggregation *a,
                                        const aggregate_part *p)
{
    aggregate_lanes(rows, halves, 1, 1, a, p);
}

typedef void (*aggregate_function)(const aggregation *a, const aggregate_part *p);

/* A function for each number of rows and of halves. */
#define ONE(name, rows, halves)                                                                    \
    static void name##_##rows##_##halves(const aggregation *a, const aggregate_part *p)            \
    {                                                                                              \
        name(rows, halves, a, p);                                                                  \
    }
#define ROWS(rows)                                                                                 \
    ONE(aggregate, rows, 2)                                                                        \
    ONE(aggregate, rows, 4)                                                                        \
    ONE(aggregate, rows, 6)                                                                        \
    ONE(aggregate, rows, 8)
ROW_COUNTS(ROWS)
#undef ROWS
#if TAILS
#define ROWS(rows) ONE(aggregate, rows, 1) ONE(aggregate, rows, 3) ONE(aggregate, rows, 5)
ROW_COUNTS(ROWS)
#undef ROWS
#endif
#if REGISTERS >= 32
#define ROWS(rows)                                                                                 \
    ONE(aggregate_one, rows, 2)                                                                    \
    ONE(aggregate_one, rows, 4)                                                                    \
    ONE(aggregate_two, rows, 2)                                                                    \
    ONE(aggregate_two, rows, 4)
ROW_COUNTS(ROWS)
#undef ROWS
#if TAILS
#define ROWS(rows)                                                                                 \
    ONE(aggregate_one, rows, 1)                                                                    \
    ONE(aggregate_one, rows, 3)                                                                    \
    ONE(aggregate_two, rows, 1)                                                                    \
    ONE(aggregate_two, rows, 3)
ROW_COUNTS(ROWS)
#undef ROWS
#endif
#endif
#undef ONE

#if TAILS
#define ODD(name) name
#else
#define ODD(name) NULL
#endif
static const aggregate_function aggregate_table[][2 * CHANNELS_MAX + 1] = {{0},
#define ROWS(r)                                                                                    \
    {0,                                                                                            \
     ODD(aggregate_##r##_1),                                                                       \
     aggregate_##r##_2,                                                                            \
     ODD(aggregate_##r##_3),                                                                       \
     aggregate_##r##_4,                                                                            \
     ODD(aggregate_##r##_5),                                                                       \
     aggregate_##r##_6,                                                                            \
     NULL,                                                                                         \
     aggregate_##r##_8},
                                                                           ROW_COUNTS(ROWS)
#undef ROWS
};

#if REGISTERS >= 32
enum { FEW_HALVES = 4 };
#define ROWS(r)                                                                                    \
    {0, ODD(aggregate_one_##r##_1), aggregate_one_##r##_2, ODD(aggregate_one_##r##_3),             \
     aggregate_one_##r##_4},
static const aggregate_function aggregate_one_table[][FEW_HALVES + 1] = {{0}, ROW_COUNTS(ROWS)};
#undef ROWS
#define ROWS(r)                                                                                    \
    {0, ODD(aggregate_two_##r##_1), aggregate_two_##r##_2, ODD(aggregate_two_##r##_3),             \
     aggregate_two_##r##_4},
static const aggregate_function aggregate_two_table[][FEW_HALVES + 1] = {{0}, ROW_COUNTS(ROWS)};
#undef ROWS
#else
enum { FEW_HALVES = 0 };
#endif
#undef ODD

/* Halves of vectors of some channels, at most CHANNELS_MAX vectors. */
static int halves_of(int channels)
{
    const int vectors = (channels + VL - 1) / VL;
    return 2 * vectors - (TAILS && vectors < CHANNELS_MAX && (channels - 1) % VL < HALF);
}

/* Channels of one call, whole vectors: those of a token in groups of nearly equal size. */
static int channel_group(int channels)
{
    const int groups = (channels + CHANNELS_MAX * VL - 1) / (CHANNELS_MAX * VL);
    return (int)padded((channels + groups - 1) / groups);
}

/* Bytes of weights, of all rows, and of the values that they multiply: about the first cache's
 * size. With more, processors that multiply a whole vector in one turn wait for the next cache;
 * with less, sums are loaded and stored more often. LANES_BYTES: with the values that all lanes
 * together multiply, which of short runs are several times as many. */
enum { BLOCK_BYTES = 32 << 10, LANES_BYTES = 44 << 10 };

/* Reals of the weights of such a block, of runs of so many keys, and of values of `value` reals. */
static int64_t block_reals(int rows, int64_t value, int64_t run)
{
    const int64_t weights = (int64_t)rows * VL;
    const int64_t seen = run < NA_RUN ? run : NA_RUN;
    const int64_t one = BLOCK_BYTES / (weights / PER_REAL + value);
    const int64_t all = LANES_BYTES / (weights / PER_REAL + value * (seen + VL - 1) / seen);
    const int64_t keys = (one < all ? one : all) / (int64_t)sizeof(real);
    return (keys > 1 ? keys : 1) * weights;
}

/* Whether two lanes are taken at a time, and spans in groups. */
static int aggregate_grouped(const aggregation *a)
{
    return a->group <= FEW_HALVES / 2 * VL && a->weight_lane == 1;
}

/* All lanes of a part. */
static inline void aggregate_call(const aggregation *a, aggregate_part *p, int count, int halves,
                                  int grouped, int limited)
{
    p->lane = a->lane;
#if REGISTERS >= 32
    if (grouped) {
        if (!limited) {
            aggregate_two_table[count][halves](a, p);
            p->lane += (a->lanes - p->lane) / 2 * 2;
        }
        if (p->lane < a->lanes)
            aggregate_one_table[count][halves](a, p);
        return;
    }
#endif
    (void)grouped;
    (void)limited;
    aggregate_table[count][halves](a, p);
}

/* A call for rows [p->row, + count) and each group of channels. */
static void aggregate_rows(const aggregation *a, aggregate_part *p, int count, int depth,
                           int grouped, int limited)
{
    p->value = a->value;
    p->sum = a->sum + p->row * a->sum_row;
    for (p->channel = 0; p->channel < depth; p->channel += a->group) {
        const int some = na_min(depth - p->channel, a->group);
        p->part = some % VL;
        aggregate_call(a, p, count, halves_of(some), grouped, limited);
        p->value += a->value_group;
        p->sum += a->sum_group;
    }
}

/* All rows and channels of a tile; depth is the number of channels, whose vectors may reach beyond
 * it in value and sum. */
static void aggregate_spans(const aggregation *a, int rows, int depth)
{
    const int grouped = aggregate_grouped(a);
    run_list list;
    real *weight[ROWS_MAX];
    for (int r = 0; r < rows; r++)
        weight[r] = a->weight[r];
    for (int from = 0, some = 0; from == 0 || from < a->count; from += some) {
        aggregate_part p = {.runs = list.run, .begin = a->begin && from == 0};
        for (int count; p.row < rows; p.row += count) {
            /* Four rows as two and two: one alone uses each value once. */
            const int calls = (rows - p.row + AGGREGATE_ROWS - 1) / AGGREGATE_ROWS;
            count = (rows - p.row + calls - 1) / calls;
            some = make_runs(&list, a->spans + from, a->count - from, p.row, count, a->width,
                             a->value_step, PER_REAL > 1 || grouped);
            const int rest = a->count - from - some;
            p.run_count = list.count;
            p.weight = weight + p.row;
            p.end = a->end && !rest;
            aggregate_rows(a, &p, count, depth, grouped, list.limited);
            if (rest)
                pass_weights(&list, weight + p.row);
        }
        if (!a->count)
            break;
    }
}

/* The same of a tile whose last rows may have fewer lanes. */
static void aggregate_tile(const aggregation *all, int rows, na_row_lanes lanes, int depth)
{
    if (!lanes.shorter) {
        aggregate_spans(all, rows, depth);
        return;
    }
    aggregation some = *all;
    some.lanes = lanes.least;
    aggregate_spans(&some, rows, depth);
    some.lane = lanes.least;
    some.lanes = all->lanes;
    aggregate_spans(&some, rows - lanes.shorter, depth);
}
