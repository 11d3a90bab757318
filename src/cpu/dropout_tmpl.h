/* SPDX-License-Identifier: MIT
 * Dropout of a tile's weights (core/dropout.h), all lanes of a row at a time: lanes are consecutive
 * queries, so that of what the generator is given only the place on axis 2 differs between them;
 * a key's slot is the same in all. One call serves eight slots; each row keeps its latest.
 * Parameters: the texts kernels.c includes before this one. */

/* What a run drops. */
typedef struct dropping {
    int threshold; /* 0: nothing */
    real factor;   /* of weights that are kept */
    uint64_t seed, offset;
} dropping;

static dropping dropping_of(const natten_problem *p, const natten_run *run)
{
    const int threshold = na_dropout_threshold(p->dropout);
    dropping d = {threshold, (real)na_dropout_factor(threshold), run->seed, run->offset};
    return d;
}

/* A row of a tile. */
typedef struct dropping_row {
    vec_index number[NA_DROPOUT_SLOTS]; /* of each lane, for the slots of the group */
    int64_t group;                      /* of slots; -1: none yet */
    na_words words;
    int32_t place[NA_LANES]; /* of the lanes' queries on axis 2 */
    int32_t z, y;            /* first keys of the row's window */
    int32_t offset;          /* of its first key in its tile's run of keys */
} dropping_row;

static void dropping_begin(const dropping *d, const na_geometry *g, const na_work *work, int tile,
                           dropping_row *rows)
{
    const natten_axis *axis = g->axis;
    for (int r = 0; r < work->rows; r++) {
        const int y = na_work_query(g, work, r);
        const int64_t x = axis[2].query_origin + na_work_tile(g, work, tile, r) * g->lanes;
        dropping_row *row = &rows[r];
        row->group = -1;
        for (int l = 0; l < NA_LANES; l++)
            row->place[l] = (int32_t)x + l;
        row->z = na_local_window(&axis[0], work->z).first;
        row->y = na_local_window(&axis[1], y).first;
        row->offset = na_work_offset(work, r);
        row->words =
            na_dropout_row(d->seed, d->offset, (int)work->batch, na_work_head(work, r),
                           (int)axis[0].query_origin + work->z, (int)axis[1].query_origin + y);
    }
}

/* The slot of a span's first key. */
static int64_t dropping_slot(const dropping_row *row, const na_geometry *g, const na_span *span)
{
    const natten_axis *axis = g->axis;
    if (span->z < 0)
        return axis[0].window * axis[1].window * axis[2].window + span->y;
    const int64_t z = (span->z - row->z) / axis[0].dilation;
    const int64_t y = (span->y - row->y) / axis[1].dilation;
    return (z * axis[1].window + y) * axis[2].window + span->first - row->offset;
}

/* Fills in the numbers of a group of slots. */
static void dropping_draw(dropping_row *row, int64_t group)
{
    uint32_t key0 = row->words.word[0], key1 = row->words.word[1];
    vec_index a = vec_index_set1((uint32_t)group), b = vec_index_load(row->place);
    vec_index c = vec_index_set1(row->words.word[2]), d = vec_index_set1(row->words.word[3]);
    UNROLL
    for (int i = 0; i < NA_PHILOX_ROUNDS; i++) {
        vec_index high_a, high_c;
        const vec_index low_a = vec_index_multiply(a, NA_PHILOX_FACTOR_0, &high_a);
        const vec_index low_c = vec_index_multiply(c, NA_PHILOX_FACTOR_1, &high_c);
        a = vec_index_xor(vec_index_xor(high_c, b), vec_index_set1(key0));
        c = vec_index_xor(vec_index_xor(high_a, d), vec_index_set1(key1));
        b = low_c;
        d = low_a;
        key0 += NA_PHILOX_WEYL_0;
        key1 += NA_PHILOX_WEYL_1;
    }
    const vec_index words[] = {a, b, c, d};
    UNROLL
    for (int i = 0; i < 4; i++) {
        row->number[2 * i] = vec_index_low16(words[i]);
        row->number[2 * i + 1] = vec_index_high16(words[i]);
    }
    row->group = group;
}

/* The numbers of a slot. */
static ALWAYS_INLINE vec_index dropping_numbers(dropping_row *row, int64_t slot)
{
    if (__builtin_expect(slot / NA_DROPOUT_SLOTS != row->group, 0))
        dropping_draw(row, slot / NA_DROPOUT_SLOTS);
    return row->number[slot % NA_DROPOUT_SLOTS];
}

/* Sets the weights that are dropped, of a span's keys seen by one row, to 0. */
static void drop_weights(const dropping *d, dropping_row *row, int64_t slot, int keys, int width,
                         real *weight)
{
    for (int k = 0; k < keys; k++, weight += width) {
        const vec_index number = dropping_numbers(row, slot + k);
        if (!HALF || width == VL)
            vec_storeu(weight, vec_keep(vec_loadu(weight), d->threshold - 1, number, 0));
        else
            vec_store_part(weight, HALF,
                           vec_keep(vec_load_part(weight, HALF), d->threshold - 1, number, 0));
    }
}

/* As drop_weights in a backward: from weights and products of d_out and values, in place, to what
 * the values' gradient is made of and to gradients of scores (slope NULL: not wanted). */
static void drop_gradients(const dropping *d, dropping_row *row, int64_t slot, int keys, int width,
                           vec delta, real *weight, real *slope)
{
    const vec factor = vec_set1(d->factor);
    for (int k = 0; k < keys; k++, weight += width) {
        const vec kept = vec_keep(factor, d->threshold - 1, dropping_numbers(row, slot + k), 0);
        if (!HALF || width == VL) {
            const vec p = vec_loadu(weight);
            vec_storeu(weight, vec_mul(p, kept));
            if (slope)
                vec_storeu(slope, vec_mul(p, vec_sub(vec_mul(kept, vec_loadu(slope)), delta)));
        } else {
            const vec p = vec_load_part(weight, HALF);
            vec_store_part(weight, HALF, vec_mul(p, kept));
            if (slope)
                vec_store_part(
                    slope, HALF,
                    vec_mul(p, vec_sub(vec_mul(kept, vec_load_part(slope, HALF)), delta)));
        }
        slope += slope ? width : 0;
    }
}
