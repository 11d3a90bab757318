/* SPDX-License-Identifier: MIT
 * A box of queries times the keys that some of them see, in chunks of blocks of 32 keys: scores,
 * softmax with bits for which of them count, and weights, rounded to bfloat16 in place of the
 * scores, times values. Tiles 0 to 3 hold sums: two of each half of the box.
 * Parameters: the texts amx.c includes before this one. */

/* Blocks of a chunk: of their scores and weights most stay in the first-level cache. Bytes of a
 * query's scores, an odd number of cache lines. */
enum { CHUNK = 16, SCORE_ROW = (2 * CHUNK + 1) * 64 };

/* Weights may be so many powers of two above 1 before sums are brought down. */
static const float slack = 8;

/* The softmax of a box's queries so far: weights are 2^(score - low). */
typedef struct softmax {
    float low[NA_BOX];    /* integer-valued */
    float limit[NA_BOX];  /* scores (before the scale) beyond it need another */
    float factor[NA_BOX]; /* what sums before have to be multiplied with, where moved */
    uint32_t moved;
    float rounded[NA_BOX][VL] __attribute__((aligned(64))); /* sums of the rounded weights */
    float total[NA_BOX][VL] __attribute__((aligned(64)));   /* of the weights, for a lse */
} softmax;

static void softmax_begin(softmax *m)
{
    for (int q = 0; q < NA_BOX; q++) {
        m->low[q] = lowest;
        m->limit[q] = -INFINITY;
        vec_store(m->rounded[q], vec_zero());
        vec_store(m->total[q], vec_zero());
    }
}

/* Steps between rows of 16 queries and sums; the latter an odd number of cache lines. */
static int64_t query_row_bytes(const amx_state *s) { return 2 * s->padded; }
static int64_t sum_row(const amx_state *s) { return s->padded_out + 16; }

static ALWAYS_INLINE void score_block(const amx_worker *w, const char *key, char *score,
                                      const int first, const int second)
{
    const amx_state *s = w->run->state;
    const int64_t row = query_row_bytes(s), half = (int64_t)s->padded * 2 * NA_HALF;
    const char *query = (const char *)w->query;
    if (first) {
        tile_zero(0);
        tile_zero(1);
    }
    if (second) {
        tile_zero(2);
        tile_zero(3);
    }
    for (const char *end = query + row; query < end; query += 64, key += 64 * NA_HALF) {
        tile_load(6, key, 64);
        if (first) {
            tile_load(4, query, row);
            tile_product(0, 4, 6);
        }
        if (second) {
            tile_load(5, query + NA_HALF * row, row);
            tile_product(2, 5, 6);
        }
        tile_load(7, key + half, 64);
        if (first)
            tile_product(1, 4, 7);
        if (second)
            tile_product(3, 5, 7);
    }
    if (first) {
        tile_store(0, score, SCORE_ROW);
        tile_store(1, score + 64, SCORE_ROW);
    }
    if (second) {
        tile_store(2, score + NA_HALF * SCORE_ROW, SCORE_ROW);
        tile_store(3, score + NA_HALF * SCORE_ROW + 64, SCORE_ROW);
    }
}

/* Whether half h of the box sees block i. */
static inline int sees(const na_mask *mask, int h, int i)
{
    return mask->half_lo[h] <= i && i < mask->half_hi[h];
}

/* Scores of blocks [from, to). */
static void score_chunk(const amx_worker *w, int from, int to)
{
    const na_mask *mask = w->box.mask;
    const int64_t block = (int64_t)w->run->state->padded * 2 * NA_BLOCK;
    const char *key = w->key + (int64_t)w->box.start / NA_HALF * (block / 2) + from * block;
    char *score = w->score;
    for (int i = from; i < to; i++, key += block, score += 2 * 64) {
        const int first = sees(mask, 0, i), second = sees(mask, 1, i);
        if (first && second)
            score_block(w, key, score, 1, 1);
        else if (first)
            score_block(w, key, score, 1, 0);
        else if (second)
            score_block(w, key, score, 0, 1);
    }
}

static inline const float *scores_of(const amx_worker *w, int q)
{
    return (const float *)(const void *)(w->score + q * SCORE_ROW);
}

static inline const keep *mask_row(const amx_worker *w, int q)
{
    const na_mask *mask = w->box.mask;
    return w->run->state->strips.words + mask->words + (int64_t)q * 2 * mask->blocks;
}

/* 2^a of an integer-valued a <= 0. */
static inline float small_power(float a)
{
    const uint32_t bits = a >= -126 ? (uint32_t)(127 + (int)a) << 23 : 0;
    float power;
    memcpy(&power, &bits, sizeof power);
    return power;
}

/* Finds which queries need another reference for the scores of blocks [from, to). */
static void find_references(const amx_worker *w, softmax *m, int from, int to)
{
    const na_mask *mask = w->box.mask;
    const float scale = w->run->scale;
    m->moved = 0;
    for (int q = 0; q < NA_BOX; q++) {
        const float *score = scores_of(w, q) - NA_BLOCK * from;
        const keep *kept = mask_row(w, q);
        vec a = vec_set1(-INFINITY), b = a;
        for (int i = na_max(mask->lo[q], from); i < na_min(mask->hi[q], to); i++) {
            a = vec_max_kept(kept[2 * i], a, vec_load(score + NA_BLOCK * i));
            b = vec_max_kept(kept[2 * i + 1], b, vec_load(score + NA_BLOCK * i + VL));
        }
        a = vec_max(a, b);
        if (!vec_above(a, vec_set1(m->limit[q])))
            continue;
        float top = ceilf(vec_top(a) * scale);
        top = top < lowest ? lowest : top;
        m->factor[q] = small_power(m->low[q] - top);
        m->low[q] = top;
        m->limit[q] = (top + slack) / scale;
        m->moved |= 1u << q;
    }
}

/* What weights of a query's scores need to know. */
typedef struct weigher {
    vec scale, shift;
    vec low; /* scores (before the scale) whose weights are 0 */
} weigher;

static ALWAYS_INLINE weigher weigher_of(float scale, float reference)
{
    const float low = (reference + smallest_power) / scale;
    /* Not minus infinity, so that a score which is has a weight of 0. */
    return (weigher){vec_set1(scale), vec_set1(magic - reference),
                     vec_set1(low < lowest ? lowest : low)};
}

/* As power(), with the scale in the same multiply-adds: 2 to 13 % of all. */
static ALWAYS_INLINE vec weight_of(const weigher *w, keep kept, vec score)
{
    const vec shifted = vec_fma(score, w->scale, w->shift);
    const vec f = vec_fma(score, w->scale, vec_sub(w->shift, shifted));
    return vec_scale2_kept(kept, power_of_fraction(f), shifted, score, w->low);
}

/* Scores of a query to weights, in place: blocks [lo, hi) of those it sees, counted in the chunk.
 */
static ALWAYS_INLINE void weigh_query(const amx_worker *w, softmax *m, int q, const keep *kept,
                                      int lo, int hi, const int exact)
{
    const weigher weigher = weigher_of(w->run->scale, m->low[q]);
    const float *score = scores_of(w, q);
    real *to = (real *)(void *)(w->score + q * SCORE_ROW);
    vec rounded = vec_load(m->rounded[q]), total = exact ? vec_load(m->total[q]) : vec_zero();
    for (int i = lo; i < hi; i++) {
        uint32_t both;
        memcpy(&both, kept + 2 * i, sizeof both);
        if (!both) {
            vec_store(to + VL * i, vec_zero());
            continue;
        }
        const float *at = score + NA_BLOCK * i;
        const vec a = weight_of(&weigher, kept[2 * i], vec_load(at));
        const vec b = weight_of(&weigher, kept[2 * i + 1], vec_load(at + VL));
        const pairs weights = pairs_of(a, b);
        rounded = pairs_sum(weights, rounded);
        if (exact)
            total = vec_add(total, vec_add(a, b));
        vec_store(to + VL * i, (vec)weights);
    }
    vec_store(m->rounded[q], rounded);
    if (exact)
        vec_store(m->total[q], total);
}

static void weigh_chunk(amx_worker *w, softmax *m, int from, int to)
{
    const na_mask *mask = w->box.mask;
    for (int q = 0; q < NA_BOX; q++) {
        const int half = q / NA_HALF;
        const int begin = na_max(mask->half_lo[half], from) - from;
        const int end = na_min(mask->half_hi[half], to) - from;
        const int lo = na_max(mask->lo[q] - from, begin), hi = na_min(mask->hi[q] - from, end);
        const keep *kept = mask_row(w, q) + 2 * from;
        real *const row = (real *)(void *)(w->score + q * SCORE_ROW);
        ahead_fetch(&w->ahead, w->ahead.quota);
        for (int i = begin; i < na_min(lo, end); i++)
            vec_store(row + VL * i, vec_zero());
        if (w->run->lse.data)
            weigh_query(w, m, q, kept, lo, hi, 1);
        else
            weigh_query(w, m, q, kept, lo, hi, 0);
        for (int i = na_max(hi, na_min(lo, end)); i < end; i++)
            vec_store(row + VL * i, vec_zero());
    }
}

/* Brings the sums of chunks before down to the new references. */
static void rescale_sums(const amx_worker *w, softmax *m)
{
    const amx_state *s = w->run->state;
    for (int q = 0; q < NA_BOX; q++) {
        if (!(m->moved >> q & 1))
            continue;
        const vec factor = vec_set1(m->factor[q]);
        real *sum = w->sum + q * sum_row(s);
        for (int c = 0; c < s->padded_out; c += VL)
            vec_store(sum + c, vec_mul(vec_load(sum + c), factor));
        vec_store(m->rounded[q], vec_mul(vec_load(m->rounded[q]), factor));
        vec_store(m->total[q], vec_mul(vec_load(m->total[q]), factor));
    }
}

static ALWAYS_INLINE void aggregate_block(const char *value, int64_t step, const char *weight,
                                          const int first, const int second)
{
    tile_load(6, value, step);
    if (first) {
        tile_load(4, weight, SCORE_ROW);
        tile_product(0, 4, 6);
    }
    if (second) {
        tile_load(5, weight + NA_HALF * SCORE_ROW, SCORE_ROW);
        tile_product(2, 5, 6);
    }
    tile_load(7, value + 64, step);
    if (first)
        tile_product(1, 4, 7);
    if (second)
        tile_product(3, 5, 7);
}

static void aggregate_blocks(const amx_worker *w, const char *value, int from, int to)
{
    const na_mask *mask = w->box.mask;
    const int64_t step = 4 * (int64_t)w->run->state->padded_out;
    const char *weight = w->score;
    for (int i = from; i < to; i++, value += NA_HALF * step, weight += 64) {
        const int first = sees(mask, 0, i), second = sees(mask, 1, i);
        if (first && second)
            aggregate_block(value, step, weight, 1, 1);
        else if (first)
            aggregate_block(value, step, weight, 1, 0);
        else if (second)
            aggregate_block(value, step, weight, 0, 1);
    }
}

/* Weights of blocks [from, to) times values, 32 channels at a time. */
static void aggregate_chunk(const amx_worker *w, int from, int to)
{
    const amx_state *s = w->run->state;
    const int64_t row = sum_row(s) * (int64_t)sizeof(float), half = NA_HALF * row;
    const int64_t first = w->box.start + (int64_t)NA_BLOCK * from;
    for (int c = 0; c < s->padded_out; c += STEP) {
        char *sum = (char *)(w->sum + c);
        if (from == 0) {
            tile_zero(0);
            tile_zero(1);
            tile_zero(2);
            tile_zero(3);
        } else {
            tile_load(0, sum, row);
            tile_load(1, sum + 64, row);
            tile_load(2, sum + half, row);
            tile_load(3, sum + half + 64, row);
        }
        aggregate_blocks(w, w->value + first * 2 * s->padded_out + 4 * c, from, to);
        tile_store(0, sum, row);
        tile_store(1, sum + 64, row);
        tile_store(2, sum + half, row);
        tile_store(3, sum + half + 64, row);
    }
}

/* The log-sum-exp of 16 queries. */
static void write_lse(const amx_worker *w, const softmax *m, int head, int half)
{
    real total[VL] __attribute__((aligned(64))), lse[VL] __attribute__((aligned(64)));
    const int first = half * NA_HALF;
    char *to = head_of(w, &w->run->lse, head);
    for (int q = 0; q < VL; q++)
        total[q] = vec_sum(vec_load(m->total[first + q]));
    vec_store(lse,
              vec_fma(vec_loadu(m->low + first), vec_set1((real)LN_2), logarithm(vec_load(total))));
    for (int q = 0; q < VL; q++) {
        if (!(w->queries >> (first + q) & 1))
            continue;
        if (total[q] == 0)
            lse[q] = -INFINITY;
        memcpy(to + w->lse_at[first + q], &lse[q], sizeof lse[q]);
    }
}

static void write_results(const amx_worker *w, const softmax *m, int head)
{
    const amx_run *run = w->run;
    const amx_state *s = run->state;
    char *to = head_of(w, &run->out, head);
    for (int q = 0; q < NA_BOX; q++) {
        if (!(w->queries >> q & 1))
            continue;
        const float whole = vec_sum(vec_load(m->rounded[q]));
        const vec factor = vec_set1(whole == 0 ? 0 : 1 / whole);
        const real *sum = w->sum + q * sum_row(s);
        uint16_t *out = (uint16_t *)(void *)(to + w->out_at[q]);
        for (int c = 0; c < s->channels; c += STEP) {
            const pairs result = pairs_unweave(vec_mul(vec_load(sum + c), factor),
                                               vec_mul(vec_load(sum + c + VL), factor));
            if (run->stream)
                pairs_stream(out + c, result);
            else
                pairs_store(out + c, na_min(s->channels - c, STEP), result);
        }
    }
    for (int half = 0; half < 2 && run->lse.data; half++)
        write_lse(w, m, head, half);
}

/* All of a box, for one of the query heads that share its keys. */
static void attend(amx_worker *w, int head)
{
    const int blocks = w->box.mask->blocks;
    softmax m;
    pack_queries(w, head);
    softmax_begin(&m);
    for (int from = 0; from < blocks; from += CHUNK) {
        const int to = na_min(from + CHUNK, blocks);
        score_chunk(w, from, to);
        find_references(w, &m, from, to);
        if (from)
            rescale_sums(w, &m);
        weigh_chunk(w, &m, from, to);
        aggregate_chunk(w, from, to);
    }
    write_results(w, &m, head);
}
