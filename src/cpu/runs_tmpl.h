/* SPDX-License-Identifier: MIT
 * Runs of keys for the two inner loops whose lanes are channels, aggregate and scatter, and the
 * second of these (micro_tmpl.h says what they compute).
 * Parameters: those of micro_tmpl.h. */

/* Vectors of channels that aggregate and scatter keep in registers for each row. */
enum { CHANNELS_MAX = 4 };

/* A span, or a group of spans, as aggregate and scatter functions want it. */
typedef struct span_run {
    int64_t token;         /* where the first key's value or sum is, for a lane of start 0 */
    const int64_t *tokens; /* the same of each span of a group */
    const int32_t *start, *limit;
    int64_t step;   /* from key to key, or pair to pair */
    int64_t stored; /* reals that the weights take */
    int spans, keys;
    int first;
    int rows; /* of the call that see it: 8 * first + end */
} span_run;

/* The ranges of rows that may see a span. */
#define RANGES_3(X) X(0, 1) X(0, 2) X(1, 2) X(0, 3) X(1, 3) X(2, 3)
#define RANGES_5(X) X(0, 4) X(1, 4) X(2, 4) X(3, 4) X(0, 5) X(1, 5) X(2, 5) X(3, 5) X(4, 5)
#define RANGES_6(X) X(0, 6) X(1, 6) X(2, 6) X(3, 6) X(4, 6) X(5, 6)
#if REGISTERS >= 32
#define ROW_RANGES(X) RANGES_3(X) RANGES_5(X) RANGES_6(X)
#else
#define ROW_RANGES(X) RANGES_3(X)
#endif

/* Keys of each span of a run that lane l sees. */
static ALWAYS_INLINE int run_seen(const span_run *run, int l)
{
    if (__builtin_expect(run->limit == NULL, 1))
        return run->keys;
    const int seen = run->limit[l] - run->first;
    return seen < 0 ? 0 : seen < run->keys ? seen : run->keys;
}

enum { RUNS_MAX = 128 };

/* The runs of some spans. */
typedef struct run_list {
    int count, limited; /* limited: some lane does not see all keys */
    span_run run[RUNS_MAX];
    int64_t token[RUNS_MAX];
} run_list;

/* The runs of some of the spans, from the first one on, that rows [row, row + count) see; width:
 * between weights, step: between tokens; grouped: one for each group. Returns of how many. */
static int make_runs(run_list *list, const na_span *spans, int span_count, int row, int count,
                     int64_t width, int64_t step, int grouped)
{
    int from = 0, some;
    list->count = list->limited = 0;
    for (; from < span_count; from += some) {
        const na_span *s = &spans[from];
        const int lo = s->lo < row ? 0 : s->lo - row;
        const int hi = s->hi - row < count ? s->hi - row : count;
        some = grouped ? group_spans(s, span_count - from) : 1;
        if (from + some > RUNS_MAX)
            break;
        if (lo >= hi)
            continue;
        for (int i = 0; i < some && grouped; i++)
            list->token[from + i] = s[i].token * step;
        /* Windows end later from row to row: the last row's end is everyone's. */
        list->run[list->count++] =
            (span_run){.token = s->token * step,
                       .tokens = list->token + from,
                       .start = s->start,
                       .limit = s->limit ? s->limit + (s->hi - 1) * s->limit_step : NULL,
                       .step = s->step * step * PER_REAL,
                       .stored = stored_weights(some, s->len) * width,
                       .spans = some,
                       .keys = s->len,
                       .first = s->first,
                       .rows = 8 * lo + hi};
        list->limited |= s->limit != NULL;
    }
    return from;
}

/* Moves the rows' weights on past runs. */
static void pass_weights(const run_list *list, real *weight[])
{
    for (const span_run *run = list->run; run < list->run + list->count; run++)
        for (int r = run->rows / 8; r < run->rows % 8; r++)
            weight[r] += run->stored;
}

/* Weights of a tile times gradients of its queries, to sums of keys. */
typedef struct scattering {
    const na_span *spans;
    int count;
    int lane, lanes;     /* [lane, lanes) are queries */
    int64_t width;       /* between weights of one lane */
    int64_t weight_lane; /* between lanes */
    real *const *weight; /* of each row: of the first span's first key */
    real *sum;           /* natural tokens of slot 0, aligned, at the first channel */
    int64_t sum_step;    /* between tokens */
    const real *grad;    /* of row 0, lane 0, at its first channel, aligned */
    int64_t grad_row, grad_lane;
} scattering;

/* One call of a scatter function: some rows and channels of it. (As aggregate_part.) */
typedef struct scatter_part {
    const span_run *runs;
    int run_count;
    int lane;
    real *const *weight; /* as those of the scattering, at the first row and channel */
    real *sum;
    const real *grad;
} scatter_part;

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

static ALWAYS_INLINE void scatter(const int rows, const int vectors, const scattering *a,
                                  const scatter_part *p)
{
    const int64_t width = a->width, sum_step = a->sum_step;
    const span_run *const runs = p->runs, *const end = runs + p->run_count;
    for (int l = p->lane; l < a->lanes; l++) {
        vec grad[ROWS_MAX][CHANNELS_MAX];
        const real *weight[ROWS_MAX];
        UNROLL
        for (int r = 0; r < rows; r++) {
            weight[r] = p->weight[r] + l * a->weight_lane;
            UNROLL
            for (int i = 0; i < vectors; i++)
                grad[r][i] = vec_load(p->grad + l * a->grad_lane + r * a->grad_row + i * VL);
        }
        for (const span_run *run = runs; run < end; run++) {
            real *sum = p->sum + run->token + run->start[l] * sum_step;
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

typedef void (*scatter_function)(const scattering *a, const scatter_part *p);

/* A function for each number of rows and of vectors. */
#define ONE(rows, vectors)                                                                         \
    static void scatter_##rows##_##vectors(const scattering *a, const scatter_part *p)             \
    {                                                                                              \
        scatter(rows, vectors, a, p);                                                              \
    }
#define ROWS(rows) ONE(rows, 1) ONE(rows, 2) ONE(rows, 3) ONE(rows, 4)
ROW_COUNTS(ROWS)
#undef ROWS
#undef ONE

static const scatter_function scatter_table[][CHANNELS_MAX + 1] = {{0},
#define ROWS(r) {0, scatter_##r##_1, scatter_##r##_2, scatter_##r##_3, scatter_##r##_4},
                                                                   ROW_COUNTS(ROWS)
#undef ROWS
};

/* Two lanes at a time, where there are few channels: most keys that one sees the other sees, too,
 * and their sums are loaded and stored once for both. */
#if REGISTERS >= 32
enum { TWO_VECTORS = 2, TWO_KEYS = 4 };

typedef vec two_grads[2][ROWS_MAX][TWO_VECTORS];

/* Adds rows [lo, hi) of lanes [first, end) of the two to the sums of keys [k, until), keys counted
 * as the first lane does; the second one's weights are `apart` from those of the first. */
static ALWAYS_INLINE void scatter_keys(const int lo, const int hi, const int vectors,
                                       const int first, const int end, two_grads grad,
                                       const real *const weight[], int64_t apart, real *sum,
                                       int64_t step, int64_t width, int64_t k, int64_t until)
{
    for (sum += k * step; k < until; k++, sum += step) {
        vec x[TWO_VECTORS];
        UNROLL
        for (int i = 0; i < vectors; i++)
            x[i] = vec_load(sum + i * VL);
        UNROLL
        for (int j = first; j < end; j++) {
            UNROLL
            for (int r = lo; r < hi; r++) {
                const vec p = vec_pin(vec_set1(weight[r][k * width + j * apart]));
                UNROLL
                for (int i = 0; i < vectors; i++)
                    x[i] = vec_fma(p, grad[j][r][i], x[i]);
            }
        }
        UNROLL
        for (int i = 0; i < vectors; i++)
            vec_store(sum + i * VL, x[i]);
    }
}

/* The spans of a run; the second lane's keys begin `later` keys after the first one's. */
static ALWAYS_INLINE void scatter_two_run(const int lo, const int hi, const int vectors,
                                          two_grads grad, const real *weight[], real *sum,
                                          const span_run *run, int64_t width, int64_t later)
{
    const int64_t step = run->step, keys = run->keys, apart = 1 - later * width;
    const int64_t both = later < keys ? later : keys, alone = later < keys ? keys : later;
    for (int s = 0; s < run->spans; s++) {
        real *const to = sum + run->tokens[s];
        scatter_keys(lo, hi, vectors, 0, 1, grad, weight, apart, to, step, width, 0, both);
        scatter_keys(lo, hi, vectors, 0, 2, grad, weight, apart, to, step, width, both, keys);
        scatter_keys(lo, hi, vectors, 1, 2, grad, weight, apart, to, step, width, alone,
                     keys + later);
        UNROLL
        for (int r = lo; r < hi; r++)
            weight[r] += keys * width;
    }
}

static ALWAYS_INLINE void scatter_two(const int rows, const int vectors, const scattering *a,
                                      const scatter_part *p)
{
    const int64_t width = a->width, sum_step = a->sum_step;
    const span_run *const runs = p->runs, *const end = runs + p->run_count;
    for (int l = p->lane; l + 2 <= a->lanes; l += 2) {
        two_grads grad;
        const real *weight[ROWS_MAX];
        UNROLL
        for (int r = 0; r < rows; r++) {
            weight[r] = p->weight[r] + l;
            UNROLL
            for (int i = 0; i < vectors; i++) {
                const real *at = p->grad + l * a->grad_lane + r * a->grad_row + i * VL;
                grad[0][r][i] = vec_load(at);
                grad[1][r][i] = vec_load(at + a->grad_lane);
            }
        }
        for (const span_run *run = runs; run < end; run++) {
            real *sum = p->sum + run->start[l] * sum_step;
            const int later = run->start[l + 1] - run->start[l];
            switch (run->rows) {
#define ONE(lo, hi)                                                                                \
    case lo * 8 + hi:                                                                              \
        if (hi <= rows)                                                                            \
            scatter_two_run(lo, hi, vectors, grad, weight, sum, run, width, later);                \
        break;
                ROW_RANGES(ONE)
#undef ONE
            }
        }
    }
}

#define ONE(rows, vectors)                                                                         \
    static void scatter_two_##rows##_##vectors(const scattering *a, const scatter_part *p)         \
    {                                                                                              \
        scatter_two(rows, vectors, a, p);                                                          \
    }
#define ROWS(rows) ONE(rows, 1) ONE(rows, 2)
ROW_COUNTS(ROWS)
#undef ROWS
#undef ONE

static const scatter_function scatter_two_table[][TWO_VECTORS + 1] = {{0},
#define ROWS(r) {0, scatter_two_##r##_1, scatter_two_##r##_2},
                                                                      ROW_COUNTS(ROWS)
#undef ROWS
};
#else
enum { TWO_VECTORS = 0, TWO_KEYS = 0 };
#endif

/* Whether two lanes at a time pay: of longer runs the ends cost less than what keys that only one
 * lane sees do. */
static int scatter_in_twos(const scattering *a, const na_span *spans, int count, int vectors)
{
    int all = vectors <= TWO_VECTORS && a->weight_lane == 1;
    for (const na_span *s = spans; s < spans + count && all; s++)
        all = s->step == 1 && s->len <= TWO_KEYS && !s->limit;
    return all;
}

/* Some spans and `count` rows, two lanes at a time; p->lane becomes the first one that is left. */
static inline void scatter_twos(const scattering *a, scatter_part *p, run_list *list,
                                const na_span *spans, int span_count, int row, int count,
                                int vectors)
{
#if REGISTERS >= 32
    make_runs(list, spans, span_count, row, count, a->width, a->sum_step, 1);
    p->run_count = list->count;
    scatter_two_table[count][vectors](a, p);
    p->lane += (a->lanes - p->lane) / 2 * 2;
#else
    (void)a, (void)p, (void)list, (void)spans, (void)span_count, (void)row, (void)count;
    (void)vectors;
#endif
}

/* All rows and channels of a tile. */
static void scatter_spans(const scattering *a, int rows, int depth)
{
    const int vectors = (depth + VL - 1) / VL;
    run_list list;
    real *weight[ROWS_MAX];
    for (int r = 0; r < rows; r++)
        weight[r] = a->weight[r];
    for (int from = 0, some; from < a->count; from += some) {
        const na_span *spans = a->spans + from;
        some = na_min(a->count - from, RUNS_MAX);
        const int rest = a->count - from - some;
        for (int row = 0; row < rows; row += SCATTER_ROWS) {
            const int count = na_min(rows - row, SCATTER_ROWS);
            scatter_part p = {.runs = list.run,
                              .lane = a->lane,
                              .weight = weight + row,
                              .sum = a->sum,
                              .grad = a->grad + row * a->grad_row};
            if (scatter_in_twos(a, spans, some, vectors))
                scatter_twos(a, &p, &list, spans, some, row, count, vectors);
            if (p.lane == a->lanes && !rest)
                continue;
            make_runs(&list, spans, some, row, count, a->width, a->sum_step, 0);
            p.run_count = list.count;
            for (int i = 0; i < vectors && p.lane < a->lanes; i += CHANNELS_MAX) {
                scatter_table[count][na_min(vectors - i, CHANNELS_MAX)](a, &p);
                p.sum += CHANNELS_MAX * VL;
                p.grad += CHANNELS_MAX * VL;
            }
            if (rest)
                pass_weights(&list, weight + row);
        }
    }
}

/* The same of a tile whose last rows may have fewer lanes. */
static void scatter_tile(const scattering *all, int rows, na_row_lanes lanes, int depth)
{
    if (!lanes.shorter) {
        scatter_spans(all, rows, depth);
        return;
    }
    scattering some = *all;
    some.lanes = lanes.least;
    scatter_spans(&some, rows, depth);
    some.lane = lanes.least;
    some.lanes = all->lanes;
    scatter_spans(&some, rows - lanes.shorter, depth);
}
