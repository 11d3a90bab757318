/* SPDX-License-Identifier: MIT
 * The two inner loops whose lanes are channels (micro_tmpl.h says what they compute): aggregate and
 * scatter, over runs of keys.
 * Parameters: those of micro_tmpl.h. */

/* Vectors of channels that aggregate and scatter keep in registers for each row. */
enum { CHANNELS_MAX = 4 };

/* A group of spans as aggregate and scatter functions want it. */
typedef struct span_run {
    const int64_t
        *token; /* of each span: where the first key's value or sum is, for a lane of start
                   0 */
    const int32_t *start, *limit;
    int64_t step;   /* from key to key, or pair to pair */
    int64_t stored; /* reals that the weights take */
    int spans, keys;
    int first;
    int rows; /* of the call that see it: 8 * first + end, 0: none */
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

/* One call of an aggregate function: `rows` tile rows from `row` on, `vectors` vectors of channels.
 */
typedef struct aggregation {
    const na_span *spans;
    int count;
    int lane, lanes;     /* [lane, lanes) are queries */
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
    const real *factor;   /* [row of the call][VL] */
    out_real *const *out; /* of each row of the call: lane 0; NULL: into sum */
    int64_t out_lane;
    const span_run *runs; /* made by aggregate_spans, for the rows of one call */
    int run_count;
} aggregation;

/* What there is of a key: itself, or a pair; the first of a pair; the first ones of two pairs. */
enum { WHOLE, FIRST, CROSSED };

/* Adds a key to the sums of rows [lo, hi), of one lane or of two neighbours. */
static ALWAYS_INLINE void add_key(const int lo, const int hi, const int vectors, const int lanes,
                                  const int what, vec sum[][ROWS_MAX][CHANNELS_MAX],
                                  const real *const weight[], int64_t k, const real *const value[],
                                  int64_t at, int64_t other)
{
    vec p[2][ROWS_MAX], v[2][CHANNELS_MAX];
    /* Either the rows' weights are held in registers or the channels. */
    const int hold = lanes == 1 && what == WHOLE;
    UNROLL
    for (int r = lo; r < hi && hold; r++)
        p[0][r] = vec_pin(vec_set1(weight[r][k]));
    UNROLL
    for (int i = 0; i < vectors; i++) {
        UNROLL
        for (int j = 0; j < lanes; j++) {
            v[j][i] = vec_load(value[j] + at + i * VL);
            if (what == FIRST)
                v[j][i] = vec_first(v[j][i]);
            if (what == CROSSED)
                v[j][i] = vec_firsts(vec_load(value[j] + other + i * VL), v[j][i]);
            v[j][i] = vec_pin(v[j][i]);
        }
        UNROLL
        for (int r = lo; r < hi && hold; r++)
            sum[0][r][i] = vec_dot(p[0][r], v[0][i], sum[0][r][i]);
    }
    UNROLL
    for (int r = lo; r < hi && !hold; r++) {
        UNROLL
        for (int j = 0; j < lanes; j++)
            p[j][r] = vec_pin(vec_set1(weight[r][k + j]));
        UNROLL
        for (int i = 0; i < vectors; i++) {
            UNROLL
            for (int j = 0; j < lanes; j++)
                sum[j][r][i] = vec_dot(p[j][r], v[j][i], sum[j][r][i]);
        }
    }
}

/* Adds the `seen` first keys of each span of a run to the sums of rows [lo, hi); the value of the
 * key after them may be anything. */
static ALWAYS_INLINE void add_run(const int lo, const int hi, const int vectors, const int lanes,
                                  vec sum[][ROWS_MAX][CHANNELS_MAX], const real *weight[],
                                  const real *const value[], const span_run *run, int64_t width,
                                  int seen)
{
    const int64_t step = run->step, length = seen / PER_REAL * width, spans = run->spans;
    int64_t before = 0, k = 0;
    for (int64_t s = 0, until = length; s < spans; s++, until = k + length) {
        int64_t at = run->token[s];
        for (; k < until; k += width, at += step)
            add_key(lo, hi, vectors, lanes, WHOLE, sum, weight, k, value, at, 0);
        if (PER_REAL > 1 && seen % PER_REAL) {
            if (s % 2)
                add_key(lo, hi, vectors, lanes, CROSSED, sum, weight, k, value, at, before);
            else if (s + 1 == spans)
                add_key(lo, hi, vectors, lanes, FIRST, sum, weight, k, value, at, 0);
            k += s % 2 ? width : 0;
            before = at;
        }
    }
    UNROLL
    for (int r = lo; r < hi; r++)
        weight[r] += run->stored;
}

/* Sums of row r of the call and of lane l to where they belong. */
static ALWAYS_INLINE void store_sums(const int vectors, const aggregation *a, const int r, int l,
                                     const vec sum[CHANNELS_MAX])
{
    const vec factor = vec_set1(a->end ? a->factor[r * VL + l] : 1);
    real *partial = a->sum + l * a->sum_lane + r * a->sum_row;
    out_real *out = a->end && a->out ? a->out[r] + l * a->out_lane : NULL;
    UNROLL
    for (int i = 0; i < vectors; i++) {
        vec x = sum[i];
        if (!a->begin)
            x = vec_add(x, vec_load(partial + i * VL));
        x = a->end ? vec_mul(x, factor) : x;
        if (!out)
            vec_storeu(partial + i * VL, x);
        else if (a->stream)
            vec_stream_out(out + i * VL, x);
        else
            vec_store_out(out + i * VL, x);
    }
}

/* `lanes`: at a time; of two all see all keys, and their weights are neighbours. */
static ALWAYS_INLINE void aggregate_lanes(const int rows, const int vectors, const int lanes,
                                          const aggregation *a)
{
    const int64_t width = a->width, value_step = a->value_step;
    const span_run *const runs = a->runs, *const end = runs + a->run_count;
    const real *const values = a->value;
    for (int l = a->lane; l + lanes <= a->lanes; l += lanes) {
        vec sum[2][ROWS_MAX][CHANNELS_MAX];
        const real *weight[ROWS_MAX];
        UNROLL
        for (int r = 0; r < rows; r++) {
            weight[r] = a->weight[r] + l * (lanes == 1 ? a->weight_lane : 1);
            UNROLL
            for (int i = 0; i < vectors; i++)
                sum[0][r][i] = sum[1][r][i] = vec_zero();
        }
        for (const span_run *run = runs; run < end; run++) {
            const real *const value[] = {values + run->start[l] * value_step,
                                         values + run->start[l + lanes - 1] * value_step};
            const int seen = lanes == 1 ? run_seen(run, l) : run->keys;
            switch (run->rows) {
#define ONE(lo, hi)                                                                                \
    case lo * 8 + hi:                                                                              \
        if (hi <= rows)                                                                            \
            add_run(lo, hi, vectors, lanes, sum, weight, value, run, width, seen);                 \
        break;
                ROW_RANGES(ONE)
#undef ONE
            }
        }
        UNROLL
        for (int j = 0; j < lanes; j++) {
            UNROLL
            for (int r = 0; r < rows; r++)
                store_sums(vectors, a, r, l + j, sum[j][r]);
        }
    }
}

static ALWAYS_INLINE void aggregate(const int rows, const int vectors, const aggregation *a)
{
    aggregate_lanes(rows, vectors, 1, a);
}

/* Two lanes at a time: where there are few channels, the ends of runs cost half as much. */
static ALWAYS_INLINE void aggregate_two(const int rows, const int vectors, const aggregation *a)
{
    aggregate_lanes(rows, vectors, 2, a);
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
                                      vec grad[][CHANNELS_MAX], const real *weight[], real *sums,
                                      const span_run *run, int64_t width, int seen)
{
    const int64_t step = run->step, length = seen * width, spans = run->spans;
    int64_t k = 0;
    for (int64_t s = 0; s < spans; s++) {
        const int64_t until = k + length;
        real *sum = sums + run->token[s];
        for (; k < until; k += width, sum += step) {
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
            real *sum = a->sum + run->start[l] * sum_step;
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
#if REGISTERS >= 32
#define ROWS(rows)                                                                                 \
    ONE(aggregate_two, aggregation, rows, 1)                                                       \
    ONE(aggregate_two, aggregation, rows, 2)
ROW_COUNTS(ROWS)
#undef ROWS
#endif
#undef ONE

static void (*const aggregate_table[][CHANNELS_MAX + 1])(const aggregation *) = {{0},
#define ROWS(r) {0, aggregate_##r##_1, aggregate_##r##_2, aggregate_##r##_3, aggregate_##r##_4},
                                                                                 ROW_COUNTS(ROWS)
#undef ROWS
};

#if REGISTERS >= 32
enum { TWO_LANES_MAX = 2 };
static void (*const aggregate_two_table[][TWO_LANES_MAX + 1])(const aggregation *) = {
    {0},
#define ROWS(r) {0, aggregate_two_##r##_1, aggregate_two_##r##_2},
    ROW_COUNTS(ROWS)
#undef ROWS
};
#endif

static void (*const scatter_table[][CHANNELS_MAX + 1])(const scattering *) = {{0},
#define ROWS(r) {0, scatter_##r##_1, scatter_##r##_2, scatter_##r##_3, scatter_##r##_4},
                                                                              ROW_COUNTS(ROWS)
#undef ROWS
};

enum { RUNS_MAX = 128 };

/* The runs of some spans. */
typedef struct run_list {
    int count, limited; /* limited: some lane does not see all keys */
    span_run run[RUNS_MAX];
    int64_t token[RUNS_MAX];
} run_list;

/* The runs of some of the spans, from the first one on, that rows [row, row + count) see; width:
 * between weights, step: between tokens. Returns of how many. */
static int make_runs(run_list *list, const na_span *spans, int span_count, int row, int count,
                     int64_t width, int64_t step)
{
    int from = 0, some;
    list->count = list->limited = 0;
    for (; from < span_count; from += some) {
        const na_span *s = &spans[from];
        const int lo = s->lo < row ? 0 : s->lo - row;
        const int hi = s->hi - row < count ? s->hi - row : count;
        some = group_spans(s, span_count - from);
        if (from + some > RUNS_MAX)
            break;
        for (int i = 0; i < some; i++)
            list->token[from + i] = s[i].token * step;
        /* Windows end later from row to row: the last row's end is everyone's. */
        list->run[list->count++] =
            (span_run){.token = list->token + from,
                       .start = s->start,
                       .limit = s->limit ? s->limit + (s->hi - 1) * s->limit_step : NULL,
                       .step = s->step * step * PER_REAL,
                       .stored = stored_weights(some, s->len) * width,
                       .spans = some,
                       .keys = s->len,
                       .first = s->first,
                       .rows = lo < hi ? 8 * lo + hi : 0};
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

/* All lanes: two at a time where that pays. */
static void aggregate_call(aggregation a, int count, int vectors, int limited)
{
#if REGISTERS >= 32
    if (vectors <= TWO_LANES_MAX && a.weight_lane == 1 && !limited) {
        aggregate_two_table[count][vectors](&a);
        a.lane = a.lanes / 2 * 2;
    }
#else
    (void)limited;
#endif
    if (a.lane < a.lanes)
        aggregate_table[count][vectors](&a);
}

/* A call for rows [row, row + count) and each few vectors of channels. */
static void aggregate_rows(aggregation a, int row, int count, int vectors, int limited)
{
    for (int i = 0; i < vectors; i += CHANNELS_MAX) {
        const int some = vectors - i < CHANNELS_MAX ? vectors - i : CHANNELS_MAX;
        out_real *out[ROWS_MAX];
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
        aggregate_call(b, count, some, limited);
    }
}

/* All rows and channels of a tile. `a` is filled in for row 0 and channel 0, for all rows; depth is
 * the number of channels, whose vectors may reach beyond it in value, sum and (if full) out. */
static void aggregate_spans(const aggregation *all, int rows, int depth)
{
    run_list list;
    real *weight[ROWS_MAX];
    for (int r = 0; r < rows; r++)
        weight[r] = all->weight[r];
    for (int from = 0, some = 0; from == 0 || from < all->count; from += some) {
        aggregation a = *all;
        a.begin = all->begin && from == 0;
        a.weight = weight;
        for (int row = 0; row < rows; row += AGGREGATE_ROWS) {
            const int count = rows - row < AGGREGATE_ROWS ? rows - row : AGGREGATE_ROWS;
            some = make_runs(&list, all->spans + from, all->count - from, row, count, a.width,
                             a.value_step);
            a.runs = list.run;
            a.run_count = list.count;
            a.end = all->end && some == all->count - from;
            aggregate_rows(a, row, count, (depth + VL - 1) / VL, list.limited);
            pass_weights(&list, weight + row);
        }
        if (!all->count)
            break;
    }
}

/* All rows and channels of a tile. `a` is filled in for row 0 and channel 0, for all rows. */
static void scatter_spans(const scattering *all, int rows, int depth)
{
    const int vectors = (depth + VL - 1) / VL;
    run_list list;
    real *weight[ROWS_MAX];
    for (int r = 0; r < rows; r++)
        weight[r] = all->weight[r];
    for (int from = 0, done = 0; from < all->count; from += done)
        for (int row = 0; row < rows; row += SCATTER_ROWS) {
            const int count = rows - row < SCATTER_ROWS ? rows - row : SCATTER_ROWS;
            done = make_runs(&list, all->spans + from, all->count - from, row, count, all->width,
                             all->sum_step);
            for (int i = 0; i < vectors; i += CHANNELS_MAX) {
                const int some = vectors - i < CHANNELS_MAX ? vectors - i : CHANNELS_MAX;
                scattering a = *all;
                a.runs = list.run;
                a.run_count = list.count;
                a.weight = weight + row;
                a.sum += i * VL;
                a.grad += row * a.grad_row + i * VL;
                scatter_table[count][some](&a);
            }
            pass_weights(&list, weight + row);
        }
}
