/* SPDX-License-Identifier: MIT
 * Operands of products where PAIRS are multiplied: pairs of neighbouring channels of queries and
 * keys, as they lie in memory; pairs of neighbouring keys of weights and values. A pair of keys may
 * begin anywhere, so each value stands in two of them. Without PAIRS an operand is a real.
 * Parameters: the vector words of simd.h; the texts kernels.c includes before this one. */

/* What queries and keys are packed as: a pair is moved like a float. */
static inline int packed_as(int dtype) { return PER_REAL > 1 ? NATTEN_F32 : dtype; }

/* VL channels of a token in bfloat16, of which the first n count and others are 0; room for them.
 */
static ALWAYS_INLINE const uint16_t *channels_of(const char *p, int n, uint16_t room[VL])
{
    if (n >= VL)
        return (const uint16_t *)(const void *)p;
    memset(room, 0, VL * sizeof *room);
    memcpy(room, p, (size_t)n * sizeof *room);
    return room;
}

/* Pairs of VL channels of two tokens, of which the first n count; no second one: zeros. */
static ALWAYS_INLINE vec pair_of(const char *first, const char *second, int n)
{
    static const uint16_t nothing[VL];
    uint16_t room[2][VL];
    return vec_pair_bf16(channels_of(first, n, room[0]),
                         second ? channels_of(second, n, room[1]) : nothing);
}

/* Pairs of the channels of a token and of the one `step` later; there is nothing behind the last.
 */
static void pack_pairs(const char *source, int64_t token, int tokens, int step, int channels,
                       real *to, int64_t to_step)
{
    const int64_t size = stored_size(NATTEN_BF16);
    const int whole = channels / VL * VL, part = channels - whole;
    const last_lanes lanes = last_lanes_of(part);
    for (int t = 0; t < tokens; t++, source += token, to += to_step) {
        const char *next = t + step < tokens ? source + step * token : NULL;
        for (int c = 0; c < whole; c += VL)
            vec_store(to + c, pair_of(source + c * size, next ? next + c * size : NULL, VL));
        if (part && whole) {
            const int64_t early = (channels - VL) * size;
            vec_store(to + whole,
                      vec_last(&lanes, pair_of(source + early, next ? next + early : NULL, VL)));
        } else if (part) {
            vec_store(to, pair_of(source, next, part));
        }
    }
}

/* Values of natural tokens; `step`: from a key to the next one of a run. */
static void pack_values(int dtype, const char *source, int64_t token, int64_t further, int tokens,
                        int step, int channels, real *to, int64_t to_step)
{
    if (PER_REAL > 1)
        pack_pairs(source, token, tokens, step, channels, to, to_step);
    else
        pack_natural(dtype, source, token, further, tokens, channels, 1, to, to_step);
}

/* Weights on their way to memory, in pairs. */
typedef struct weighing {
    const real *score;
    real *weight;
    vec total, rounded; /* sums of the weights, and of what rounding makes of them */
} weighing;

static ALWAYS_INLINE void store_pair(weighing *w, vec first, vec second)
{
    const vec both = vec_pair(first, second);
    vec_store(w->weight, both);
    w->weight += VL;
    w->total = vec_add(w->total, vec_add(first, second));
    w->rounded = vec_dot(both, vec_pair(vec_set1(1), vec_set1(1)), w->rounded);
}

#if defined(PAIRS) && defined(HALF_WORDS)
/* In half tiles two keys take a vector. The total is that of both halves. */
static ALWAYS_INLINE void store_half_pair(weighing *w, vec weights)
{
    const half both = half_pair(weights);
    half_store(w->weight, both);
    w->weight += HALF;
    w->total = vec_add(w->total, weights);
    w->rounded = half_wide(half_dot(both, half_pair(vec_set1(1)), half_low(w->rounded)));
}

static void weigh_half_pairs(weighing *to, const na_span *spans, int count, reference m)
{
    weighing w = *to;
    vec left = vec_zero();
    int waiting = 0;
    for (const na_span *s = spans; s < spans + count; s++) {
        for (int k = s->len; k > 1; k -= 2, w.score += 2 * HALF)
            store_half_pair(&w, power(vec_loadu(w.score), m));
        if (s->len % 2 == 0)
            continue;
        const vec last = power(vec_load_part(w.score, HALF), m);
        w.score += HALF;
        if (waiting)
            store_half_pair(&w, half_join(left, last));
        left = last;
        waiting = !waiting;
    }
    if (waiting)
        store_half_pair(&w, half_join(left, vec_zero()));
    *to = w;
}
#endif

/* Scores of a group of spans to pairs of weights, in place: those of each span, and, in the order
 * of span_run, of the keys that odd ones leave. */
static void weigh_pairs(weighing *to, const na_span *spans, int count, reference m)
{
    weighing w = *to;
    vec left = vec_zero();
    int waiting = 0;
    for (const na_span *s = spans; s < spans + count; s++) {
        for (int k = s->len; k > 1; k -= 2, w.score += 2 * VL) {
            const vec first = power(vec_load(w.score), m);
            store_pair(&w, first, power(vec_load(w.score + VL), m));
        }
        if (s->len % 2 == 0)
            continue;
        const vec last = power(vec_load(w.score), m);
        w.score += VL;
        if (waiting)
            store_pair(&w, left, last);
        left = last;
        waiting = !waiting;
    }
    if (waiting)
        store_pair(&w, left, vec_zero());
    *to = w;
}
