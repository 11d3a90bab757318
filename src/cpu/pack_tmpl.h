/* SPDX-License-Identifier: MIT
 * Tensors in memory to packed operands and back, converted on the way: float16 and bfloat16 are
 * stored, float is computed with.
 * Parameters: the vector words of simd.h; REAL_F64: real is double. */

/* What a real kernel reads and writes. */
#ifdef REAL_F64
#define STORED(X) X(NATTEN_F64)
#else
#define STORED(X) X(NATTEN_F32) X(NATTEN_F16) X(NATTEN_BF16)
#endif

/* A tensor of the problem, strides in bytes. */
typedef struct tensor {
    char *data;
    int64_t batch, axis[3], head;
    int64_t further; /* bytes: so far ahead packing has tokens fetched; 0: it has not */
    int dtype;
} tensor;

static tensor tensor_of(const natten_problem *problem, const natten_run *run, natten_role role)
{
    const natten_layout *layout = &problem->layout[role];
    const natten_dtype dtype = na_role_dtype(problem, role);
    const int64_t size = (int64_t)na_dtype_size(dtype);
    tensor t = {na_has(problem, role) ? run->data[role] : NULL,
                layout->batch * size,
                {layout->axis[0] * size, layout->axis[1] * size, layout->axis[2] * size},
                layout->head * size,
                0,
                (int)dtype};
    return t;
}

/* The first channel of a token. */
static inline char *tensor_at(const tensor *t, int64_t batch, int64_t head, int64_t z, int64_t y,
                              int64_t x)
{
    return t->data + batch * t->batch + head * t->head + z * t->axis[0] + y * t->axis[1] +
           x * t->axis[2];
}

/* True if every token of a tensor is whole, aligned vectors: it can then be written past the
 * caches, which saves reading what is overwritten (5-14 % at 56x56, window 7x7, 32 channels). */
static int tensor_streams(const tensor *t, int channels)
{
    uint64_t all = (uint64_t)(uintptr_t)t->data | (uint64_t)t->batch | (uint64_t)t->head;
    for (int a = 0; a < 3; a++)
        all |= (uint64_t)t->axis[a];
    return channels % VL == 0 && all % sizeof(vec) == 0;
}

/* Channels a packed natural token takes. */
static inline int64_t padded(int64_t channels) { return (channels + VL - 1) / VL * VL; }

static ALWAYS_INLINE int stored_size(const int dtype)
{
    return dtype == NATTEN_F64 ? 8 : dtype == NATTEN_F32 ? 4 : 2;
}

static ALWAYS_INLINE vec load_stored(const int dtype, const void *p)
{
#ifndef REAL_F64
    if (dtype == NATTEN_F16)
        return vec_load_f16(p);
    if (dtype == NATTEN_BF16)
        return vec_load_bf16(p);
#endif
    (void)dtype;
    return vec_loadu(p);
}

static ALWAYS_INLINE void store_stored(const int dtype, void *p, vec a)
{
#ifndef REAL_F64
    if (dtype == NATTEN_F16) {
        vec_store_f16(p, a);
        return;
    }
    if (dtype == NATTEN_BF16) {
        vec_store_bf16(p, a);
        return;
    }
#endif
    (void)dtype;
    vec_storeu(p, a);
}

/* The first n < VL elements; nothing beyond them is touched. */
static ALWAYS_INLINE vec load_stored_part(const int dtype, const void *p, int n)
{
    if (stored_size(dtype) == sizeof(real))
        return vec_load_part(p, n);
    uint16_t all[VL] = {0};
    for (int i = 0; i < n; i++)
        all[i] = ((const uint16_t *)p)[i];
    return load_stored(dtype, all);
}

static ALWAYS_INLINE void store_stored_part(const int dtype, void *p, int n, vec a)
{
    if (stored_size(dtype) == sizeof(real)) {
        vec_store_part(p, n, a);
        return;
    }
    uint16_t all[VL];
    store_stored(dtype, all, a);
    for (int i = 0; i < n; i++)
        ((uint16_t *)p)[i] = all[i];
}

/* One element. */
static real load_scalar(int dtype, const void *p)
{
    real all[VL] __attribute__((aligned(64)));
    vec a = vec_zero();
#define ONE(type)                                                                                  \
    if (dtype == type)                                                                             \
        a = load_stored_part(type, p, 1);
    STORED(ONE)
#undef ONE
    vec_store(all, a);
    return all[0];
}

/* A square of at most VL tokens and exactly VL channels, or at most (part), from byte `first` of
 * each token on. Tokens are a `token` apart from `source` on, or (not NULL) each at its place. */
static ALWAYS_INLINE void pack_square(const int dtype, const char *const *places,
                                      const char *source, int64_t token, int64_t further,
                                      int64_t first, int tokens, int channels, real factor,
                                      real *to, int64_t channel)
{
    vec r[VL];
    source = places ? NULL : source + first;
#define TOKEN(i) (places ? places[i] + first : source + (i) * token)
    if (tokens == VL && channels == VL) {
        UNROLL
        for (int i = 0; i < VL; i++)
            r[i] = load_stored(dtype, TOKEN(i));
        for (int i = 0; i < VL && further; i++)
            __builtin_prefetch(TOKEN(i) + further, 0, 3);
    } else {
        UNROLL
        for (int i = 0; i < VL; i++)
            r[i] = i >= tokens      ? vec_zero()
                   : channels == VL ? load_stored(dtype, TOKEN(i))
                                    : load_stored_part(dtype, TOKEN(i), channels);
    }
#undef TOKEN
    if (factor != 1) {
        UNROLL
        for (int i = 0; i < VL; i++)
            r[i] = vec_mul(r[i], vec_set1(factor));
    }
    vec_transpose(r);
    UNROLL
    for (int i = 0; i < VL; i++)
        if (i < channels)
            vec_store(to + i * channel, r[i]);
}

/* Squares of all channels of at most VL tokens. */
static ALWAYS_INLINE void pack_squares(int dtype, const char *const *places, const char *source,
                                       int64_t token, int64_t further, int tokens, int channels,
                                       real factor, real *to, int64_t channel)
{
    const int few = channels < VL ? channels : VL;
    for (int i = 0; i < channels; i += VL) {
        /* The last square begins early rather than have parts of vectors. */
        const int c = i + few < channels ? i : channels - few;
#define ONE(type)                                                                                  \
    if (dtype == type)                                                                             \
        pack_square(type, places, source, token, further, c *stored_size(type), tokens, few,       \
                    factor, to + c * channel, channel);
        STORED(ONE)
#undef ONE
    }
}

/* Transposed: to[c * channel + t] = factor * (channel c of token t), t < tokens rounded up to VL,
 * zero beyond the tokens. `to` and `channel` are multiples of VL; `token` is in bytes, `further`
 * that of the tensor. */
static void pack_transposed(int dtype, const char *source, int64_t token, int64_t further,
                            int tokens, int channels, real factor, real *to, int64_t channel)
{
    for (int t = 0; t < tokens; t += VL, source += VL * token, to += VL)
        pack_squares(dtype, NULL, source, token, further, tokens - t < VL ? tokens - t : VL,
                     channels, factor, to, channel);
}

/* Tokens in memory, `step` bytes apart; behind the last of `left` those of the next head follow,
 * `jump` bytes from there, which are `extent`. */
typedef struct tokens {
    const char *at;
    int64_t step, jump;
    int left, extent;
} tokens;

static const char *next_token(tokens *t)
{
    const char *at = t->at;
    const int last = --t->left == 0;
    t->at += last ? t->jump : t->step;
    t->left = last ? t->extent : t->left;
    return at;
}

/* As pack_transposed, a square of tokens of more than one head. */
static void pack_seam(int dtype, tokens *source, int count, int channels, real factor, real *to,
                      int64_t channel)
{
    const char *places[VL];
    for (int t = 0; t < count; t++)
        places[t] = next_token(source);
    pack_squares(dtype, places, NULL, 0, 0, count, channels, factor, to, channel);
}

/* The same of tokens of several heads after each other. */
static void pack_heads(int dtype, tokens source, int count, int channels, real factor, real *to,
                       int64_t channel)
{
    for (int some; count > 0; count -= some, to += some) {
        some = count <= source.left ? count : source.left / VL * VL;
        if (some) {
            pack_transposed(dtype, source.at, source.step, 0, some, channels, factor, to, channel);
            source.at += (some - 1) * source.step;
            source.left -= some - 1;
            next_token(&source);
        } else {
            some = count < VL ? count : VL;
            pack_seam(dtype, &source, some, channels, factor, to, channel);
        }
    }
}

/* Of a vector of which the last n lanes are wanted: moves them to the front, zeros behind them. */
typedef struct last_lanes {
    int32_t from[VL];
} last_lanes;

static last_lanes last_lanes_of(int n)
{
    last_lanes lanes;
    for (int l = 0; l < VL; l++)
        lanes.from[l] = l < n ? VL - n + l : VL;
    return lanes;
}

static ALWAYS_INLINE vec vec_last(const last_lanes *lanes, vec a)
{
    return vec_permute2(vec_index_load(lanes->from), a, vec_zero());
}

static ALWAYS_INLINE void pack_tokens(const int dtype, const char *source, int64_t token,
                                      int64_t further, int tokens, int channels, real factor,
                                      real *to, int64_t step)
{
    const vec f = vec_set1(factor);
    const int whole = channels / VL * VL, size = stored_size(dtype);
    const int early = whole && whole < channels && size < (int)sizeof(real);
    const last_lanes lanes = last_lanes_of(channels - whole);
    for (int t = 0; t < tokens; t++, source += token, to += step) {
        for (int i = 0; i < channels * size && further; i += 64)
            __builtin_prefetch(source + further + i, 0, 3);
        for (int c = 0; c < whole; c += VL)
            vec_store(to + c, vec_mul(f, load_stored(dtype, source + c * size)));
        if (early)
            vec_store(
                to + whole,
                vec_last(&lanes, vec_mul(f, load_stored(dtype, source + (channels - VL) * size))));
        else if (whole < channels)
            vec_store(to + whole,
                      vec_mul(f, load_stored_part(dtype, source + whole * size, channels - whole)));
    }
}

/* Natural: to[t * step + c] = factor * (channel c of token t), zero up to the next multiple of VL
 * channels. `to` and `step` are multiples of VL. */
static void pack_natural(int dtype, const char *source, int64_t token, int64_t further, int tokens,
                         int channels, real factor, real *to, int64_t step)
{
#define ONE(type)                                                                                  \
    if (dtype == type)                                                                             \
        pack_tokens(type, source, token, further, tokens, channels, factor, to, step);
    STORED(ONE)
#undef ONE
}

static ALWAYS_INLINE void unpack_tokens(const int dtype, const real *source, int64_t step,
                                        int tokens, int channels, char *to, int64_t token)
{
    const int whole = channels / VL * VL;
    for (int t = 0; t < tokens; t++, source += step, to += token) {
        for (int c = 0; c < whole; c += VL)
            store_stored(dtype, to + c * stored_size(dtype), vec_load(source + c));
        if (whole < channels)
            store_stored_part(dtype, to + whole * stored_size(dtype), channels - whole,
                              vec_load(source + whole));
    }
}

/* Packed natural tokens to a tensor; nothing but their channels is written. */
static void unpack_natural(int dtype, const real *source, int64_t step, int tokens, int channels,
                           char *to, int64_t token)
{
#define ONE(type)                                                                                  \
    if (dtype == type)                                                                             \
        unpack_tokens(type, source, step, tokens, channels, to, token);
    STORED(ONE)
#undef ONE
}
