/* SPDX-License-Identifier: MIT
 * The three inner loops of every kernel, on packed operands:
 *   correlate   score[r][key][lane]  = query[r][lane] . key
 *   aggregate   out[r][lane]         = sum over keys of weight[r][key][lane] * value[key]
 *   scatter     sum[key] += sum over rows and lanes of weight[r][key][lane] * grad[r][lane]
 *
 * Scores and weights of a tile row are [key][lane], keys in the order of the spans that the row
 * sees, WIDTH reals from one key to the next: VL, or HALF for half tiles. All rows of a tile keep
 * their own pointer, since they see different spans. Parameters: the vector words of simd.h. */

/* Keys whose scores one call keeps in registers, for each number of rows. */
#if REGISTERS >= 32
enum { ROWS_MAX = 6, KEYS_MAX = 8, AGGREGATE_ROWS = 6, SCATTER_ROWS = 6 };
static const int correlate_keys[ROWS_MAX + 1] = {0, 8, 8, 8, 6, 5, 4};
/* clang-format off */
#define CORRELATE_SHAPES(X) \
    X(1, 1) X(1, 2) X(1, 3) X(1, 4) X(1, 5) X(1, 6) X(1, 7) X(1, 8) \
    X(2, 1) X(2, 2) X(2, 3) X(2, 4) X(2, 5) X(2, 6) X(2, 7) X(2, 8) \
    X(3, 1) X(3, 2) X(3, 3) X(3, 4) X(3, 5) X(3, 6) X(3, 7) X(3, 8) \
    X(4, 1) X(4, 2) X(4, 3) X(4, 4) X(4, 5) X(4, 6) \
    X(5, 1) X(5, 2) X(5, 3) X(5, 4) X(5, 5) \
    X(6, 1) X(6, 2) X(6, 3) X(6, 4)
/* clang-format on */
#define ROW_COUNTS(X) X(1) X(2) X(3) X(4) X(5) X(6)
#else
enum { ROWS_MAX = 4, KEYS_MAX = 8, AGGREGATE_ROWS = 3, SCATTER_ROWS = 3 };
static const int correlate_keys[ROWS_MAX + 1] = {0, 8, 5, 3, 2};
/* clang-format off */
#define CORRELATE_SHAPES(X) \
    X(1, 1) X(1, 2) X(1, 3) X(1, 4) X(1, 5) X(1, 6) X(1, 7) X(1, 8) \
    X(2, 1) X(2, 2) X(2, 3) X(2, 4) X(2, 5) \
    X(3, 1) X(3, 2) X(3, 3) \
    X(4, 1) X(4, 2)
/* clang-format on */
#define ROW_COUNTS(X) X(1) X(2) X(3)
#endif

/* Vectors of channels that aggregate and scatter keep in registers for each row. */
enum { CHANNELS_MAX = 4 };

/* One call of a correlate function; all pointers are those of the call's first row. */
typedef struct correlation {
    const real *query;    /* [row][depth][VL], aligned */
    int64_t query_step;   /* between rows */
    const real *key;      /* [depth][...]: the run's first key for a lane of start 0 */
    int64_t key_depth;    /* between channels */
    int64_t key_step;     /* between keys of the run */
    int depth;            /* channels, or pairs of them */
    real scale;           /* pairs: of the scores, since queries are taken as they are */
    int add;              /* 1: add to what stands in score */
    int first;            /* number of the run's first key, compared with limit */
    const int32_t *start; /* of lanes */
    const int32_t *limit; /* scores of keys at or beyond a lane's limit become `forbidden`; NULL */
    real forbidden;
    int64_t limit_step; /* between rows */
    real *const *score; /* of each row: where the run's first score goes, aligned */
    real *top;          /* [row][VL]: largest score so far is kept up to date; NULL */
} correlation;

typedef void (*correlate_function)(const correlation *, int from);

#define V vec
#define W(word) vec_##word
#define T(name) name
#define WIDTH VL
#include "cpu/correlate_tmpl.h"
#undef V
#undef W
#undef T
#undef WIDTH

#ifdef HALF_WORDS
#define V half
#define W(word) half_##word
#define T(name) half_##name
#define WIDTH HALF
#include "cpu/correlate_tmpl.h"
#undef V
#undef W
#undef T
#undef WIDTH
#endif

/* Where the lanes' keys lie far apart they are brought together first, into room[d][key][lane]. */
static void bring_together(const correlation *a, int from, int keys, int mode, real *room)
{
    vec_index start = vec_index_load(a->start);
    for (int d = 0; d < a->depth; d++)
        for (int c = 0; c < keys; c++, room += VL) {
            const real *key = a->key + d * a->key_depth + (from + c) * a->key_step;
            if (mode == NA_PERMUTE2)
                vec_store(room, vec_permute2(start, vec_loadu(key), vec_loadu(key + VL)));
            else
                vec_store(room, vec_gather(key, start));
        }
}

/* Packed operands of a tile, for correlate_span. */
typedef struct scoring {
    const real *query; /* [row][depth][VL] */
    const real *key;   /* transposed keys of slot 0 */
    int64_t slot_step; /* between slots */
    int64_t key_depth; /* between channels in a slot */
    int depth;
    real scale;     /* pairs */
    int half;       /* 1: HALF lanes, scores HALF apart */
    real forbidden; /* score of keys that a lane does not see */
    real *top;      /* [row][VL] or NULL */
    real *room;     /* depth * KEYS_MAX * VL reals */
} scoring;

/* a / b for 0 <= a < 64, 0 < b < 64: a division of integers takes as long as ten products. */
static inline int small_quotient(int a, int b) { return (int)(((float)a + 0.5f) / (float)b); }

/* Scores of a span, for the rows that see it, into score[row] (of tile row 0 on). `add`: on top of
 * what stands there. */
static void correlate_span(const scoring *t, const na_span *span, real *const *score, int add)
{
    const int rows = span->hi - span->lo;
    const int64_t query_step = (int64_t)t->depth * VL;
    correlation a = {.query = t->query + span->lo * query_step,
                     .query_step = query_step,
                     .key = t->key + span->slot * t->slot_step + span->x,
                     .key_depth = t->key_depth,
                     .key_step = span->step,
                     .depth = t->depth,
                     .scale = t->scale,
                     .add = add,
                     .first = span->first,
                     .start = span->start,
                     .limit = span->limit ? span->limit + span->lo * span->limit_step : NULL,
                     .limit_step = span->limit_step,
                     .forbidden = t->forbidden,
                     .score = score + span->lo,
                     .top = t->top ? t->top + span->lo * VL : NULL};
    const int far = span->mode > NA_BROADCAST;
    const correlate_function *table = correlate_table[far ? NA_SHIFT : span->mode][rows];
#ifdef HALF_WORDS
    if (t->half)
        table = half_correlate_table[far ? NA_SHIFT : span->mode][rows];
#endif
    /* Calls of nearly equal length: some, then others of a key less. */
    const int calls = small_quotient(span->len + correlate_keys[rows] - 1, correlate_keys[rows]);
    const int less = small_quotient(span->len, calls), longer = span->len - less * calls;
    for (int i = 0, from = 0, keys; i < calls; i++, from += keys) {
        keys = less + (i < longer);
        if (far) {
            correlation b = a;
            bring_together(&a, from, keys, span->mode, t->room);
            b.key_depth = (int64_t)keys * VL;
            b.key_step = VL;
            b.key = t->room - from * b.key_step;
            table[keys](&b, from);
        } else {
            table[keys](&a, from);
        }
    }
}

/* A span as aggregate and scatter functions want it. */
typedef struct span_run {
    int64_t token;  /* where the first key's value or sum is, for a lane of start 0 */
    int64_t step;   /* from key to key, or pair to pair */
    int64_t stored; /* reals that the weights take */
    const int32_t *start, *limit;
    int keys, first;
    int rows; /* of the call that see it: 8 * first + end, 0: none */
} span_run;

/* One call of an aggregate function: `rows` tile rows from `row` on, `vectors` vectors of channels.
 */
typedef struct aggregation {
    const na_span *spans;
    int count;
    int lanes;           /* that are queries */
    int begin, end;      /* begin: else the sums of the call are added to `sum`,
                            which keeps roundoff of long windows small;
                            end: sums are multiplied by factor, and go to `out` if there is one */
    int stream;          /* out may be written past the caches: it is aligned to vectors */
    int64_t width;       /* between weights of one lane */
    int64_t weight_lane; /* between lanes */
    real *const *weight; /* of each row of the call: of the first span's first key */
    const real *value;   /* natural tokens of slot 0, aligned, at the call's first channel */
    int64_t value_step;  /* between tokens */
    real *sum;           /* of the call's first row, lane 0, at its first channel, aligned */
    int64_t sum_row, sum_lane;
    const real *factor; /* [row of the call][VL] */
    real *const *out;   /* of each row of the call: lane 0; NULL: into sum */
    int64_t out_lane;
    const span_run *runs; /* made by aggregate_spans, for the rows of one call */
    int run_count;
} aggregation;

/* Adds a key, or a pair of them, or (single) the first of a pair, to the sums of rows [lo, hi). */
static ALWAYS_INLINE void add_key(const int lo, const int hi, const int vectors, const int single,
                                  vec sum[][CHANNELS_MAX], const real *const weight[], int64_t k,
                                  const real *value)
{
    vec p[ROWS_MAX];
    UNROLL
    for (int r = lo; r < hi; r++)
        p[r] = vec_pin(vec_set1(weight[r][k]));
    UNROLL
    for (int i = 0; i < vectors; i++) {
        vec v = vec_load(value + i * VL);
        v = vec_pin(single ? vec_first(v) : v);
        UNROLL
        for (int r = lo; r < hi; r++)
            sum[r][i] = vec_dot(p[r], v, sum[r][i]);
    }
}

/* Adds the `seen` first keys of a run to the sums of rows [lo, hi); the value of the key after them
 * may be anything. */
static ALWAYS_INLINE void add_run(const int lo, const int hi, const int vectors,
                                  vec sum[][CHANNELS_MAX], const real *weight[], const real *value,
                                  const span_run *run, int64_t width, int seen)
{
    const int64_t step = run->step, length = seen / PER_REAL * width;
    for (int64_t k = 0; k < length; k += width, value += step)
        add_key(lo, hi, vectors, 0, sum, weight, k, value);
    if (seen % PER_REAL)
        add_key(lo, hi, vectors, 1, sum, weight, length, value);
    UNROLL
    for (int r = lo; r < hi; r++)
        weight[r] += run->stored;
}

/* The ranges of rows that may see a span. */
#define RANGES_3(X) X(0, 1) X(0, 2) X(1, 2) X(0, 3) X(1, 3) X(2, 3)
#define RANGES_5(X) X(0, 4) X(1, 4) X(2, 4) X(3, 4) X(0, 5) X(1, 5) X(2, 5) X(3, 5) X(4, 5)
#define RANGES_6(X) X(0, 6) X(1, 6) X(2, 6) X(3, 6) X(4, 6) X(5, 6)
#if REGISTERS >= 32
#define ROW_RANGES(X) RANGES_3(X) RANGES_5(X) RANGES_6(X)
#else
#define ROW_RANGES(X) RANGES_3(X)
#endif

/* Keys of a run that lane l sees. */
static ALWAYS_INLINE int run_seen(const span_run *run, int l)
{
    if (__builtin_expect(run->limit == NULL, 1))
        return run->keys;
    const int seen = run->limit[l] - run->first;
    return seen < 0 ? 0 : seen < run->keys ? seen : run->keys;
}

static ALWAYS_INLINE void aggregate(const int rows, const int vectors, const aggregation *a)
{
    const int64_t width = a->width, value_step = a->value_step;
    const span_run *const runs = a->runs, *const end = runs + a->run_count;
    const real *const values = a->value;
    for (int l = 0; l < a->lanes; l++) {
        vec sum[ROWS_MAX][CHANNELS_MAX];
        const real *weight[ROWS_MAX];
        real *partial = a->sum + l * a->sum_lane;
        UNROLL
        for (int r = 0; r < rows; r++) {
            weight[r] = a->weight[r] + l * a->weight_lane;
            UNROLL
            for (int i = 0; i < vectors; i++)
                sum[r][i] = vec_zero();
        }
        for (const span_run *run = runs; run < end; run++) {
            const real *value = values + run->token + run->start[l] * value_step;
            const int seen = run_seen(run, l);
            switch (run->rows) {
#define ONE(lo, hi)                                                                                \
    case lo * 8 + hi:                                                                              \
        if (hi <= rows)                                                                            \
            add_run(lo, hi, vectors, sum, weight, value, run, width, seen);                        \
        break;
                ROW_RANGES(ONE)
#undef ONE
            }
        }
        UNROLL
        for (int r = 0; r < rows; r++) {
            vec factor = vec_set1(a->end ? a->factor[r * VL + l] : 1);
            real *out = a->end && a->out ? a->out[r] + l * a->out_lane : partial + r * a->sum_row;
            UNROLL
            for (int i = 0; i < vectors; i++) {
                vec x = sum[r][i];
                if (!a->begin)
                    x = vec_add(x, vec_load(partial + r * a->sum_row + i * VL));
                x = a->end ? vec_mul(x, factor) : x;
                if (a->end && a->stream)
                    vec_stream(out + i * VL, x);
                else
                    vec_storeu(out + i * VL, x);
            }
        }
    }
}

/* One call of a scatter function: some rows of a tile, `vectors` vectors of channels. */
typedef struct scattering {
    const na_span *spans;
    int count;
    int lanes;           /* that are queries */
    int64_t width;       /* between weights of one lane */
    int64_t weight_lane; /* between lanes */
    real *const *weight; /* of each row of the call: of the first span's first key */
    real *sum;           /* natural tokens of slot 0, aligned, at the call's first channel */
    int64_t sum_step;    /* between tokens */
    const real *grad;    /* of the call's first row, lane 0, at its first channel, aligned */
    int64_t grad_row, grad_lane;
    const span_run *runs; /* made by scatter_spans, for the rows of one call */
    int run_count;
} scattering;

/* Adds rows [lo, hi) to the sums of a run of keys. */
static ALWAYS_INLINE void scatter_run(const int lo, const int hi, const int vectors,
                                      vec grad[][CHANNELS_MAX], const real *weight[], real *sum,
                                      const span_run *run, int64_t width, int seen)
{
    const int64_t step = run->step, length = seen * width;
    for (int64_t k = 0; k < length; k += width, sum += step) {
        vec x[CHANNELS_MAX];
        UNROLL
        for (int i = 0; i < vectors; i++)
            x[i] = vec_load(sum + i * VL);
        UNROLL
        for (int r = lo; r < hi; r++) {
            vec p = vec_pin(vec_set1(weight[r][k]));
            UNROLL
            for (int i = 0; i < vectors; i++)
                x[i] = vec_fma(p, grad[r][i], x[i]);
        }
        UNROLL
        for (int i = 0; i < vectors; i++)
            vec_store(sum + i * VL, x[i]);
    }
    UNROLL
    for (int r = lo; r < hi; r++)
        weight[r] += run->stored;
}

static ALWAYS_INLINE void scatter(const int rows, const int vectors, const scattering *a)
{
    const int64_t width = a->width, sum_step = a->sum_step;
    const span_run *const runs = a->runs, *const end = runs + a->run_count;
    for (int l = 0; l < a->lanes; l++) {
        vec grad[ROWS_MAX][CHANNELS_MAX];
        const real *weight[ROWS_MAX];
        UNROLL
        for (int r = 0; r < rows; r++) {
            weight[r] = a->weight[r] + l * a->weight_lane;
            UNROLL
            for (int i = 0; i < vectors; i++)
                grad[r][i] = vec_load(a->grad + l * a->grad_lane + r * a->grad_row + i * VL);
        }
        for (const span_run *run = runs; run < end; run++) {
            real *sum = a->sum + run->token + run->start[l] * sum_step;
            const int seen = run_seen(run, l);
            switch (run->rows) {
#define ONE(lo, hi)                                                                                \
    case lo * 8 + hi:                                                                              \
        if (hi <= rows)                                                                            \
            scatter_run(lo, hi, vectors, grad, weight, sum, run, width, seen);                     \
        break;
                ROW_RANGES(ONE)
#undef ONE
            }
        }
    }
}

/* A function for each number of rows and of vectors. */
#define ONE(name, type, rows, vectors)                                                             \
    static void name##_##rows##_##vectors(const type *a) { name(rows, vectors, a); }
#define ROWS(rows)                                                                                 \
    ONE(aggregate, aggregation, rows, 1)                                                           \
    ONE(aggregate, aggregation, rows, 2)                                                           \
    ONE(aggregate, aggregation, rows, 3)                                                           \
    ONE(aggregate, aggregation, rows, 4)                                                           \
    ONE(scatter, scattering, rows, 1)                                                              \
    ONE(scatter, scattering, rows, 2)                                                              \
    ONE(scatter, scattering, rows, 3)                                                              \
    ONE(scatter, scattering, rows, 4)
ROW_COUNTS(ROWS)
#undef ROWS
#undef ONE

static void (*const aggregate_table[][CHANNELS_MAX + 1])(const aggregation *) = {{0},
#define ROWS(r) {0, aggregate_##r##_1, aggregate_##r##_2, aggregate_##r##_3, aggregate_##r##_4},
                                                                                 ROW_COUNTS(ROWS)
#undef ROWS
};

static void (*const scatter_table[][CHANNELS_MAX + 1])(const scattering *) = {{0},
#define ROWS(r) {0, scatter_##r##_1, scatter_##r##_2, scatter_##r##_3, scatter_##r##_4},
                                                                              ROW_COUNTS(ROWS)
#undef ROWS
};

enum { RUNS_MAX = 128 };

/* The spans that rows [row, row + count) see; width: between weights, step: between tokens. */
static void make_runs(const na_span *spans, int span_count, int row, int count, int64_t width,
                      int64_t step, span_run *runs)
{
    for (int i = 0; i < span_count; i++) {
        const na_span *s = &spans[i];
        const int lo = s->lo < row ? 0 : s->lo - row;
        const int hi = s->hi - row < count ? s->hi - row : count;
        /* Windows end later from row to row: the last row's end is everyone's. */
        runs[i] = (span_run){.token = s->token * step,
                             .step = s->step * step * PER_REAL,
                             .stored = stored_weights(s->len) * width,
                             .keys = s->len,
                             .start = s->start,
                             .limit = s->limit ? s->limit + (s->hi - 1) * s->limit_step : NULL,
                             .first = s->first,
                             .rows = lo < hi ? 8 * lo + hi : 0};
    }
}

/* Moves each row's weights on past the spans it sees. */
static void pass_weights(const na_span *spans, int count, int64_t width, real *weight[])
{
    for (int i = 0; i < count; i++)
        for (int r = spans[i].lo; r < spans[i].hi; r++)
            weight[r] += stored_weights(spans[i].len) * width;
}

/* A call for rows [row, row + count) and each few vectors of channels. */
static void aggregate_rows(aggregation a, int row, int count, int vectors)
{
    for (int i = 0; i < vectors; i += CHANNELS_MAX) {
        const int some = vectors - i < CHANNELS_MAX ? vectors - i : CHANNELS_MAX;
        real *out[ROWS_MAX];
        aggregation b = a;
        b.weight = a.weight + row;
        b.value = a.value + i * VL;
        b.sum = a.sum + row * a.sum_row + i * VL;
        b.factor = a.factor + row * VL;
        if (a.out) {
            for (int r = 0; r < count; r++)
                out[r] = a.out[row + r] + i * VL;
            b.out = out;
        }
        aggregate_table[count][some](&b);
    }
}

/* All rows and channels of a tile. `a` is filled in for row 0 and channel 0, for all rows; depth is
 * the number of channels, whose vectors may reach beyond it in value, sum and (if full) out. */
static void aggregate_spans(const aggregation *all, int rows, int depth)
{
    real *weight[ROWS_MAX];
    for (int r = 0; r < rows; r++)
        weight[r] = all->weight[r];
    for (int from = 0; from == 0 || from < all->count; from += RUNS_MAX) {
        const na_span *spans = all->spans + from;
        const int left = all->count - from;
        span_run runs[RUNS_MAX];
        aggregation a = *all;
        a.runs = runs;
        a.run_count = left < RUNS_MAX ? left : RUNS_MAX;
        a.begin = all->begin && from == 0;
        a.end = all->end && a.run_count == left;
        a.weight = weight;
        for (int row = 0; row < rows; row += AGGREGATE_ROWS) {
            const int count = rows - row < AGGREGATE_ROWS ? rows - row : AGGREGATE_ROWS;
            make_runs(spans, a.run_count, row, count, a.width, a.value_step, runs);
            aggregate_rows(a, row, count, (depth + VL - 1) / VL);
        }
        pass_weights(spans, a.run_count, a.width, weight);
    }
}

/* All rows and channels of a tile. `a` is filled in for row 0 and channel 0, for all rows. */
static void scatter_spans(const scattering *all, int rows, int depth)
{
    const int vectors = (depth + VL - 1) / VL;
    real *weight[ROWS_MAX];
    for (int r = 0; r < rows; r++)
        weight[r] = all->weight[r];
    for (int from = 0; from < all->count; from += RUNS_MAX) {
        const na_span *spans = all->spans + from;
        span_run runs[RUNS_MAX];
        const int run_count = all->count - from < RUNS_MAX ? all->count - from : RUNS_MAX;
        for (int row = 0; row < rows; row += SCATTER_ROWS) {
            const int count = rows - row < SCATTER_ROWS ? rows - row : SCATTER_ROWS;
            make_runs(spans, run_count, row, count, all->width, all->sum_step, runs);
            for (int i = 0; i < vectors; i += CHANNELS_MAX) {
                const int some = vectors - i < CHANNELS_MAX ? vectors - i : CHANNELS_MAX;
                scattering a = *all;
                a.runs = runs;
                a.run_count = run_count;
                a.weight = weight + row;
                a.sum += i * VL;
                a.grad += row * a.grad_row + i * VL;
                scatter_table[count][some](&a);
            }
        }
        pass_weights(spans, run_count, all->width, weight);
    }
}
