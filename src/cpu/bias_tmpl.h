/* SPDX-License-Identifier: MIT
 * The biases and the gradient of the position bias. Parameters: the texts kernels.c includes before
 * this one. */

/* A key bias is one more channel of the packed keys, which the queries multiply by one. Sets that
 * channel of a slot's keys to their bias; additional tokens (no tensor) have 0. */
static void key_bias_pack(const tensor *bias, const char *from, int tokens, real *channel)
{
    memset(channel, 0, (size_t)padded(tokens) * sizeof *channel);
    for (int t = 0; bias && t < tokens; t++)
        memcpy(channel + t, from + t * bias->axis[2], sizeof *channel);
}

/* Where entry i of a head's bias is in its tensor. */
static char *bias_at(const natten_problem *p, const tensor *rpb, int64_t head, int64_t i)
{
    const int64_t y = 2 * p->axis[1].window - 1, x = 2 * p->axis[2].window - 1;
    return tensor_at(rpb, 0, head, i / x / y, i / x % y, i % x);
}

/* The bias of all heads, times a factor. */
static void bias_pack(const natten_problem *p, const tensor *rpb, real factor, real *to)
{
    const int64_t entries = na_bias_entries(p);
    for (int64_t h = 0; h < p->heads; h++)
        for (int64_t i = 0; i < entries; i++)
            *to++ = factor * load_scalar(rpb->dtype, bias_at(p, rpb, h, i));
}

/* The entry, in a head's bias, of a span's first key and a tile's first row, in a lane whose own
 * bias is 0. */
static int64_t bias_first(const na_geometry *g, const na_work *work, const na_span *span)
{
    const int32_t key[] = {span->z, span->y}, query[] = {work->z, na_work_query(g, work, 0)};
    int64_t entry = 0;
    for (int a = 0; a < 2; a++) {
        const natten_axis *axis = &g->axis[a];
        const int64_t apart = key[a] + axis->key_origin - query[a] - axis->query_origin;
        entry = entry * (2 * axis->window - 1) + apart / axis->dilation + axis->window - 1;
    }
    return entry * (2 * g->axis[2].window - 1) + span->first;
}

/* How far before it that of another row is. */
static inline int64_t bias_before(const na_geometry *g, const na_work *work, int row)
{
    return g->across ? na_work_offset(work, row)
                     : work->row_block[row] * (2 * g->axis[2].window - 1);
}

/* The entries of all lanes, of which `bias` is a lane's whose own bias is 0; `step` holds the
 * lanes' bias_step. There is room for a vector behind the last entry. */
static ALWAYS_INLINE vec bias_of_lanes(const na_lanes *lanes, const real *bias, vec_index step)
{
    bias += lanes->bias_low;
    return lanes->uniform            ? vec_set1(*bias)
           : lanes->bias_reach >= VL ? vec_gather(bias, step)
           : lanes->bias_apart
               ? vec_permute2(step, vec_loadu(bias), vec_loadu(bias + lanes->bias_apart))
               : vec_permute(step, vec_loadu(bias));
}

/* Sets scores [key][width lanes] to the bias from the first key's entry on; returns their end. */
static real *bias_set_keys(const na_lanes *lanes, const real *bias, int keys, int width,
                           real *score)
{
    const vec_index step = vec_index_load(lanes->bias_step);
    if (lanes->uniform) /* usual far from borders, and then nothing is asked for each key */
        for (int k = 0; k < keys; k++)
            vec_storeu(score + k * width, vec_set1(bias[lanes->bias_low + k]));
    else
        for (int k = 0; k < keys; k++)
            vec_storeu(score + k * width, bias_of_lanes(lanes, bias + k, step));
    return score + keys * width;
}

/* Sets the scores of a group of spans, of each row that sees it [key][width lanes] at score[row],
 * to the bias, of which a head has so many entries. In half tiles each store runs into the next
 * key's place, which is written after it. */
static void bias_set(const na_geometry *g, const na_work *work, int tile, const real *bias,
                     int64_t entries, const na_span *spans, int count, int width,
                     real *const *score)
{
    int64_t first[GROUP_KEYS];
    for (int i = 0; i < count; i++)
        first[i] = bias_first(g, work, &spans[i]);
    for (int r = spans->lo; r < spans->hi; r++) {
        const na_lanes *lanes = na_work_lanes(g, work, tile, r);
        const real *row = bias + na_work_head(work, r) * entries - bias_before(g, work, r);
        real *at = score[r];
        for (int i = 0; i < count; i++)
            at = bias_set_keys(lanes, row + first[i], spans[i].len, width, at);
    }
}

/* The gradient is summed lane by lane, [entry of lane 0][lane], for all lane tiles together whose
 * lanes lie alike: few kinds, and no lane adds to another's sums. */
typedef struct bias_kinds {
    int count;
    int32_t *of;    /* of each lane tile */
    int32_t *first; /* the first lane tile of each kind */
} bias_kinds;

static int bias_alike(const na_lanes *a, const na_lanes *b)
{
    if (a->count != b->count)
        return 0;
    for (int l = 1; l < a->count; l++)
        if (a->bias[l] - a->bias[0] != b->bias[l] - b->bias[0])
            return 0;
    return 1;
}

static int bias_find_kinds(bias_kinds *kinds, const na_geometry *g)
{
    kinds->of = calloc(2 * (size_t)g->lane_kinds, sizeof *kinds->of);
    if (!kinds->of)
        return 0;
    kinds->first = kinds->of + g->lane_kinds;
    for (int i = 0; i < g->lane_kinds; i++) {
        int kind = 0;
        while (kind < kinds->count && !bias_alike(&g->lane[kinds->first[kind]], &g->lane[i]))
            kind++;
        if (kind == kinds->count)
            kinds->first[kinds->count++] = i;
        kinds->of[i] = kind;
    }
    return 1;
}

/* Adds gradients of a span's scores, [key][lane], to a kind's sums from the first key's entry of
 * lane 0 on. `reals` is a multiple of VL, but in half tiles. */
static void bias_add(const real *gradient, int reals, real *sum)
{
    int i = 0;
    for (; i + VL <= reals; i += VL)
        vec_storeu(sum + i, vec_add(vec_loadu(sum + i), vec_loadu(gradient + i)));
    if (HALF > 0 && i < reals)
        vec_store_part(sum + i, HALF,
                       vec_add(vec_load_part(sum + i, HALF), vec_load_part(gradient + i, HALF)));
}

/* Adds a kind's sums to a head's gradient. Entries of other lanes than 0 may lie outside: nothing
 * was added there. */
static void bias_fold(const na_lanes *lanes, const real *sum, int64_t entries, double *gradient)
{
    const int width = lanes->half ? HALF : VL;
    for (int64_t i = 0; i < entries; i++)
        for (int l = 0; l < lanes->count; l++) {
            const int64_t entry = i + lanes->bias[l] - lanes->bias[0];
            if (entry >= 0 && entry < entries)
                gradient[entry] += (double)sum[i * width + l];
        }
}
