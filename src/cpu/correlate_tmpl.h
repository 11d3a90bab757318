/* SPDX-License-Identifier: MIT
 * Scores of one run of keys: score[r][key][lane] = sum over channels of query[r][lane] * key.
 * Lanes are consecutive queries; the keys they see at one place of their windows are neighbours
 * too, so one load of transposed keys serves all lanes, and all rows.
 * Parameters: V the vector type, W(word) its words, WIDTH its lanes, T(name) names the results;
 * SPLITS(rows, keys) and PERMUTES2(rows, keys), if any, as the other modes below, and PERMUTE2(i,
 * a, b) and MERGE(a, b, n) for them;
 * ALIGNS(rows, keys) if NA_PERMUTE is to load whole lines, and INDEX_ADD(i, n) for it;
 * SLIDE_SHAPES(X) for which there is NA_SLIDE, and SLIDE(a, b, n) for it. */

static ALWAYS_INLINE void T(correlate)(const int rows, const int keys, const int mode,
                                       const correlation *a, int from)
{
    V sum[ROWS_MAX][KEYS_MAX];
    real *score[ROWS_MAX], *const tops = a->top;
    const real *query = a->query, *key[KEYS_MAX];
    const int64_t key_depth = a->key_depth, query_step = a->query_step;
    W(index) start[KEYS_MAX];
    UNROLL
    for (int c = 0; c < keys; c++) {
        key[c] = key_at(a, from + c);
        start[c] = W(index_load)(a->start);
        /* A load that crosses lines counts twice: all the same keys may lie in the first. */
        if (mode == NA_PERMUTE && ALIGNS(rows, keys)) {
            const int behind = (int)((uintptr_t)key[c] / sizeof(real) % WIDTH);
            const int back = a->spread + behind < WIDTH ? behind : 0;
            key[c] -= back;
            start[c] = INDEX_ADD(start[c], back);
        }
    }
    UNROLL
    for (int r = 0; r < rows; r++) {
        score[r] = a->score[r] + from * WIDTH;
        UNROLL
        for (int c = 0; c < keys; c++)
            sum[r][c] = W(zero)();
    }
    for (int64_t d = a->depth, at = 0; d > 0; d--, query += VL, at += key_depth) {
        V q[ROWS_MAX];
        UNROLL
        for (int r = 0; r < rows; r++)
            q[r] = W(pin)(W(load)(query + r * query_step));
        V low = W(zero)(), high = low;
        if (mode == NA_SLIDE) {
            low = W(pin)(W(loadu)(key[0] + at));
            high = W(pin)(W(loadu)(key[0] + at + VL));
        }
        UNROLL
        for (int c = 0; c < keys; c++) {
            V k;
            if (mode == NA_BROADCAST)
                k = W(set1)(key[c][at]);
            else if (mode == NA_SLIDE)
                k = SLIDE(low, high, c);
            else
                k = W(loadu)(key[c] + at);
            if (mode == NA_PERMUTE)
                k = W(permute)(start[c], k);
            if (mode == NA_SPLIT)
                k = MERGE(k, W(loadu)(key[c] + at + a->apart), a->split);
            if (mode == NA_PERMUTE2)
                k = PERMUTE2(start[c], k, W(loadu)(key[c] + at + VL));
            k = W(pin)(k);
            UNROLL
            for (int r = 0; r < rows; r++)
                sum[r][c] = W(dot)(q[r], k, sum[r][c]);
        }
    }
    /* What is there comes last: after a large bias, each product would be rounded as coarsely. */
    if (PER_REAL > 1 || __builtin_expect(a->add, 0)) {
        UNROLL
        for (int r = 0; r < rows; r++) {
            UNROLL
            for (int c = 0; c < keys; c++) {
                V before = a->add ? W(load)(score[r] + c * WIDTH) : W(zero)();
                sum[r][c] = PER_REAL > 1 ? W(fma)(W(set1)(a->scale), sum[r][c], before)
                                         : W(add)(sum[r][c], before);
            }
        }
    }
    if (__builtin_expect(a->limit != NULL, 0)) {
        UNROLL
        for (int r = 0; r < rows; r++) {
            W(index) limit = W(index_load)(a->limit + r * a->limit_step);
            UNROLL
            for (int c = 0; c < keys; c++)
                sum[r][c] = W(keep)(sum[r][c], a->first + from + c, limit, a->forbidden);
        }
    }
    UNROLL
    for (int r = 0; r < rows; r++) {
        UNROLL
        for (int c = 0; c < keys; c++)
            W(store)(score[r] + c * WIDTH, sum[r][c]);
    }
    if (tops) {
        UNROLL
        for (int r = 0; r < rows; r++) {
            V top = W(load)(tops + r * VL);
            UNROLL
            for (int c = 0; c < keys; c++)
                top = W(max)(sum[r][c], top);
            W(store)(tops + r * VL, top);
        }
    }
}

/* One function for each number of rows and keys whose sums fit the registers, and each mode. */
#define ONE(rows, keys, mode)                                                                      \
    static void T(correlate_##rows##_##keys##_##mode)(const correlation *a, int from)              \
    {                                                                                              \
        T(correlate)(rows, keys, mode, a, from);                                                   \
    }
#define MODES(rows, keys)                                                                          \
    ONE(rows, keys, NA_SHIFT)                                                                      \
    ONE(rows, keys, NA_PERMUTE)                                                                    \
    ONE(rows, keys, NA_BROADCAST) SPLITS(rows, keys) PERMUTES2(rows, keys)
#define FEW_MODES(rows, keys) ONE(rows, keys, NA_SHIFT) ONE(rows, keys, NA_BROADCAST)
#define SLIDES(rows, keys) ONE(rows, keys, NA_SLIDE)
CORRELATE_SHAPES(MODES)
FULL_SHAPES(FEW_MODES)
SLIDE_SHAPES(SLIDES)
#undef ONE

#define ONE(rows, keys, mode) [mode][rows][keys] = T(correlate_##rows##_##keys##_##mode),
static const correlate_function T(correlate_table)[NA_MODES][CORRELATE_ROWS + 1][KEYS_MAX + 1] = {
    CORRELATE_SHAPES(MODES) FULL_SHAPES(FEW_MODES) SLIDE_SHAPES(SLIDES)};
#undef SLIDES
#undef FEW_MODES
#undef MODES
#undef ONE
