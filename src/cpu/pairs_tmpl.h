/* SPDX-License-Identifier: MIT
 * Operands of products where PAIRS are multiplied: pairs of neighbouring channels of queries and
 * keys, as they lie in memory; pairs of neighbouring keys of weights and values. A pair of keys may
 * begin anywhere, so each value stands in two of them. Without PAIRS an operand is a real.
 * Parameters: the vector words of simd.h; the texts kernels.c includes before this one. */

/* What queries and keys are packed as: a pair is moved like a float. */
static inline int packed_as(int dtype) { return PER_REAL > 1 ? NATTEN_F32 : dtype; }

/* The first n <= VL channels of a token in bfloat16. */
static ALWAYS_INLINE vec load_channels(const char *p, int n)
{
    return n < VL ? load_stored_part(NATTEN_BF16, p, n) : load_stored(NATTEN_BF16, p);
}

/* Pairs of the channels of a token and of the one `step` later; there is nothing behind the last.
 */
static void pack_pairs(const char *source, int64_t token, int tokens, int step, int channels,
                       real *to, int64_t to_step)
{
    for (int t = 0; t < tokens; t++, source += token, to += to_step)
        for (int c = 0; c < channels; c += VL) {
            const int few = channels - c < VL ? channels - c : VL;
            const char *first = source + c * stored_size(NATTEN_BF16);
            const char *second = first + step * token;
            vec_store(to + c,
                      vec_pair(load_channels(first, few),
                               t + step < tokens ? load_channels(second, few) : vec_zero()));
        }
}

/* Values of natural tokens; `step`: from a key to the next one of a run. */
static void pack_values(int dtype, const char *source, int64_t token, int tokens, int step,
                        int channels, real *to, int64_t to_step)
{
    if (PER_REAL > 1)
        pack_pairs(source, token, tokens, step, channels, to, to_step);
    else
        pack_natural(dtype, source, token, tokens, channels, 1, to, to_step);
}

/* Scores of a span to pairs of weights; returns where the next span's weights go. Adds the weights
 * to total, and as they are after rounding to `rounded`. */
static real *weigh_pairs(const real *score, int keys, reference m, real *weight, vec *total,
                         vec *rounded)
{
    const vec ones = vec_pair(vec_set1(1), vec_set1(1));
    vec sum = *total, rounded_sum = *rounded;
    for (; keys > 1; keys -= 2, score += 2 * VL, weight += VL) {
        const vec first = power(vec_load(score), m), second = power(vec_load(score + VL), m);
        const vec both = vec_pair(first, second);
        vec_store(weight, both);
        sum = vec_add(sum, vec_add(first, second));
        rounded_sum = vec_dot(both, ones, rounded_sum);
    }
    if (keys) {
        const vec first = power(vec_load(score), m), both = vec_pair(first, vec_zero());
        vec_store(weight, both);
        sum = vec_add(sum, first);
        rounded_sum = vec_dot(both, ones, rounded_sum);
        weight += VL;
    }
    *total = sum;
    *rounded = rounded_sum;
    return weight;
}
