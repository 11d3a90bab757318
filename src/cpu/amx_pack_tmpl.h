/* SPDX-License-Identifier: MIT
 * Keys, values and queries of a box, as tiles want them. Keys, transposed in pairs of channels: for
 * each 16 keys and 32 channels a tile of 16 pairs of channels by 16 keys. Values, in pairs of keys:
 * for each pair and 32 channels the two halves that pairs_weave gives.
 * Parameters: the texts amx.c includes before this one. */

enum { STEP = 32, MOST_CHANNELS = 128 };

typedef struct amx_state {
    na_strips strips;
    int group;              /* query heads of a key head */
    int64_t heads;          /* key heads of all batch entries */
    int depth, channels;    /* of keys and of values */
    int padded, padded_out; /* the same, up to whole tiles */
    size_t worker_bytes;
} amx_state;

/* What all workers share. */
typedef struct amx_run {
    const amx_state *state;
    int64_t kv_heads;
    na_queues *queues;
    tensor query, key, value, out, lse;
    float scale;   /* times log2(e), not negative: */
    uint32_t sign; /* its sign, as both signs of a pair of channels of a query */
    int stream;
    char *scratch;
} amx_run;

/* Where the keys of a section lie in a tensor: the first one, and steps between rows of the strip,
 * and along the other axes. */
typedef struct key_steps {
    const char *first;
    int64_t row, line, at;
} key_steps;

/* Where in its section a key is: row of the strip, and place in the row, of which `line` and `at`
 * are coordinates on the other axes; bytes from the section's first key. */
typedef struct key_walk {
    int row, place, line, at;
    int64_t key, value;
} key_walk;

typedef struct amx_worker {
    const amx_run *run;
    na_box box, next;
    int64_t batch, kv_head;
    key_steps key_steps, value_steps;
    int packed;    /* keys of the section so far, in halves of blocks */
    key_walk walk; /* to the next one */
    ahead ahead;   /* keys and queries of the next box */
    char *key, *value, *score;
    float *sum;
    uint16_t *query;
    uint32_t queries; /* of the box: which there are, and where, in bytes from a head's first */
    int64_t query_at[NA_BOX], out_at[NA_BOX], lse_at[NA_BOX];
} amx_worker;

static key_steps key_steps_of(const amx_run *run, const tensor *t, const na_box *box)
{
    const na_strips *s = &run->state->strips;
    const int axis = s->axis, a = s->across[0], b = s->across[1];
    int32_t first[3];
    first[axis] = box->section->key;
    first[a] = box->axis[a]->key;
    first[b] = box->axis[b]->key;
    return (key_steps){tensor_at(t, box->head / run->kv_heads, box->head % run->kv_heads, first[0],
                                 first[1], first[2]),
                       t->axis[axis] * s->axes[axis].dilation, t->axis[a] * s->axes[a].dilation,
                       t->axis[b] * s->axes[b].dilation};
}

static ALWAYS_INLINE int64_t key_at(const key_steps *s, const key_walk *walk)
{
    return walk->row * s->row + walk->line * s->line + walk->at * s->at;
}

/* The next 16 keys; zeros where a row is filled up, and past the section. */
static void next_keys(amx_worker *w, const char *key[NA_HALF], const char *value[NA_HALF])
{
    static const uint16_t nothing[MOST_CHANNELS];
    const int rows = w->box.section->rows, width = w->box.width, length = w->box.length;
    const key_steps k = w->key_steps, v = w->value_steps;
    key_walk walk = w->walk;
    for (int i = 0; i < NA_HALF; i++) {
        const int real = walk.row < rows && walk.place < width;
        key[i] = real ? k.first + walk.key : (const char *)nothing;
        value[i] = real ? v.first + walk.value : (const char *)nothing;
        walk.key += k.at;
        walk.value += v.at;
        walk.place++;
        if (++walk.at < w->box.across && walk.place < length)
            continue;
        walk.at = 0;
        walk.line++;
        if (walk.place == length)
            walk = (key_walk){.row = walk.row + 1};
        walk.key = key_at(&k, &walk);
        walk.value = key_at(&v, &walk);
    }
    w->walk = walk;
}

static ALWAYS_INLINE pairs load_channels(const char *token, int from, int channels)
{
    const int left = channels - from;
    return pairs_load((const uint16_t *)(const void *)token + from, left < STEP ? left : STEP);
}

static void pack_keys(const char *const key[NA_HALF], int depth, char *to)
{
    for (int c = 0; c < depth; c += STEP, to += 64 * NA_HALF) {
        vec t[VL];
        UNROLL
        for (int i = 0; i < VL; i++)
            t[i] = (vec)load_channels(key[i], c, depth);
        vec_transpose(t);
        UNROLL
        for (int i = 0; i < VL; i++)
            vec_store((real *)(void *)(to + 64 * i), t[i]);
    }
}

static void pack_pairs_of_keys(const char *const value[NA_HALF], int channels, char *to)
{
    for (int i = 0; i < NA_HALF; i += 2)
        for (int c = 0; c < channels; c += STEP, to += 128) {
            pairs high, low = pairs_weave(load_channels(value[i], c, channels),
                                          load_channels(value[i + 1], c, channels), &high);
            vec_store((real *)(void *)to, (vec)low);
            vec_store((real *)(void *)(to + 64), (vec)high);
        }
}

static void begin_section(amx_worker *w)
{
    const amx_run *run = w->run;
    w->batch = w->box.head / run->kv_heads;
    w->kv_head = w->box.head % run->kv_heads;
    w->key_steps = key_steps_of(run, &run->key, &w->box);
    w->value_steps = key_steps_of(run, &run->value, &w->box);
    w->packed = 0;
    w->walk = (key_walk){0};
}

/* Packs what the box sees and boxes before it in the section did not. */
static void pack_box(amx_worker *w)
{
    const amx_state *s = w->run->state;
    const int end = w->box.start / NA_HALF + 2 * w->box.mask->blocks;
    const char *key[NA_HALF], *value[NA_HALF];
    for (; w->packed < end; w->packed++) {
        const int64_t first = (int64_t)w->packed * NA_HALF * 2;
        next_keys(w, key, value);
        pack_keys(key, s->depth, w->key + first * s->padded);
        pack_pairs_of_keys(value, s->channels, w->value + first * s->padded_out);
    }
}

/* Where in a tensor the queries of the box would be if there were all of them. */
static void place_queries(const amx_worker *w, const tensor *t, int64_t at[NA_BOX])
{
    const na_stretches *axes = w->run->state->strips.axes;
    const na_stretch *const *first = w->box.axis;
    const int64_t step = t->axis[2] * axes[2].dilation;
    for (int z = 0; z < axes[0].cut; z++)
        for (int y = 0; y < axes[1].cut; y++) {
            int64_t place = (first[0]->query + z * axes[0].dilation) * t->axis[0] +
                            (first[1]->query + y * axes[1].dilation) * t->axis[1] +
                            first[2]->query * t->axis[2];
            for (int x = 0; x < axes[2].cut; x++, place += step)
                *at++ = place;
        }
}

static void find_queries(amx_worker *w)
{
    const amx_run *run = w->run;
    const na_stretches *axes = run->state->strips.axes;
    const uint32_t line = 0xffffffffu >> (32 - w->box.axis[2]->queries);
    w->queries = 0;
    for (int z = 0; z < w->box.axis[0]->queries; z++)
        for (int y = 0; y < w->box.axis[1]->queries; y++)
            w->queries |= line << ((z * axes[1].cut + y) * axes[2].cut);
    place_queries(w, &run->query, w->query_at);
    place_queries(w, &run->out, w->out_at);
    if (run->lse.data)
        place_queries(w, &run->lse, w->lse_at);
}

/* The first token of one of the query heads that share the box's keys. */
static char *head_of(const amx_worker *w, const tensor *t, int head)
{
    return tensor_at(t, w->batch, w->kv_head * w->run->state->group + head, 0, 0, 0);
}

/* Rows of channels; rows without a query are zeros. */
static void pack_queries(amx_worker *w, int head)
{
    const amx_state *s = w->run->state;
    const __m512i sign = _mm512_set1_epi32((int)w->run->sign);
    const char *first = head_of(w, &w->run->query, head);
    for (int q = 0; q < NA_BOX; q++)
        for (int c = 0; c < s->depth; c += STEP) {
            pairs a = (pairs)vec_zero();
            if (w->queries >> q & 1)
                a = load_channels(first + w->query_at[q], c, s->depth);
            vec_store((real *)(void *)(w->query + q * s->padded + c),
                      (vec)_mm512_xor_si512(a, sign));
        }
}

/* Fetched ahead, in so many times: the keys that the next box will be the first to see, if it is of
 * the same section, else all of its; and the queries of the first head. */
static void look_ahead(amx_worker *w, int same, int64_t times)
{
    const amx_run *run = w->run;
    const amx_state *s = run->state;
    const na_box *box = &w->next;
    const int from = same ? w->packed * NA_HALF : 0;
    const int end = box->start + NA_BLOCK * box->mask->blocks;
    const int rows = na_min((end + box->length - 1) / box->length, box->section->rows);
    const tensor *const tensors[] = {&run->key, &run->value};
    const int64_t bytes[] = {2 * s->depth, 2 * s->channels};
    for (int i = 0; i < 2; i++) {
        const key_steps k = key_steps_of(run, tensors[i], box);
        key_walk walk = {.row = (from + box->length - 1) / box->length};
        if (box->width == 1) {
            ahead_add(&w->ahead, k.first + key_at(&k, &walk), k.row, bytes[i],
                      na_max(rows - walk.row, 0));
            continue;
        }
        for (; walk.row < rows; walk.row++)
            for (walk.line = 0; walk.line < box->width / box->across; walk.line++)
                ahead_add(&w->ahead, k.first + key_at(&k, &walk), k.at, bytes[i], box->across);
    }
    const na_stretch *const *t = box->axis;
    const na_stretches *axes = s->strips.axes;
    for (int z = 0; z < t[0]->queries; z++)
        for (int y = 0; y < t[1]->queries; y++)
            ahead_add(&w->ahead,
                      tensor_at(&run->query, box->head / run->kv_heads,
                                box->head % run->kv_heads * s->group,
                                t[0]->query + z * axes[0].dilation,
                                t[1]->query + y * axes[1].dilation, t[2]->query),
                      run->query.axis[2] * axes[2].dilation, bytes[0], t[2]->queries);
    ahead_share(&w->ahead, times);
}
