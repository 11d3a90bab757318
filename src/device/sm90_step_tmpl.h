/* SPDX-License-Identifier: MIT
 * One step of the backward op on Hopper: a warpgroup's residents against a tile of visitors.
 * Parameter: NA_COLUMNS, the digits of the number of visitors, those from row `from` of the tile
 * on. Gives step_<columns>. */
#define NA_PRODUCT NA_JOIN(scores_, NA_COLUMNS)
#define NA_PRODUCT_N NA_COLUMNS
#define NA_PRODUCT_B 0
#include "device/words/wgmma_tmpl.h"

#include "device/sm90_mask_tmpl.h"
#if NA_BIAS
#include "device/sm90_bias_tmpl.h"
#endif

/* Begins residents times visitors: of head_dim channels, or of value_dim. */
NA_WORD void NA_JOIN(multiply_, NA_COLUMNS)(const consumer *s, float *result, int which,
                                            int channels, int from)
{
    uint32_t resident = s->base + resident_at(s->seat.group, which);
    uint32_t visitor = s->base + visitor_at(s->stage.stage, which) + from * 128;
    hold(result, NA_COLUMNS / 2);
    na_product_fence();
#pragma unroll
    for (int k = 0; k < (channels + 15) / 16; k++) {
        uint64_t rows = na_matrix(resident + k / 4 * (NA_SM90_ROWS * 128) + k % 4 * 32, 16);
        uint64_t columns = na_matrix(visitor + k / 4 * (NA_VISITORS * 128) + k % 4 * 32, 16);
        NA_JOIN(NA_JOIN(scores_, NA_COLUMNS), _shared)(result, rows, columns, k > 0);
    }
    na_product_commit();
}

/* Begins to add weights times visitors of head_dim channels. */
NA_WORD void NA_JOIN(add_sums_, NA_COLUMNS)(consumer *s, uint32_t *weights, int from)
{
    uint32_t visitor = s->base + visitor_at(s->stage.stage, 0) + from * 128;
    hold(s->sums, NA_DIM / 2);
    na_product_fence();
#pragma unroll
    for (int k = 0; k < NA_COLUMNS / 16; k++)
        sums_registers(s->sums, weights + 4 * k,
                       na_matrix(visitor + k * 16 * 128, NA_VISITORS * 128), 1);
    na_product_commit();
}

NA_WORD void NA_JOIN(add_value_sums_, NA_COLUMNS)(consumer *s, uint32_t *weights, int from)
{
    uint32_t visitor = s->base + visitor_at(s->stage.stage, 1) + from * 128;
    hold(s->value_sums, NA_VALUE_DIM / 2);
    na_product_fence();
#pragma unroll
    for (int k = 0; k < NA_COLUMNS / 16; k++)
        value_sums_registers(s->value_sums, weights + 4 * k,
                             na_matrix(visitor + k * 16 * 128, NA_VISITORS * 128), 1);
    na_product_commit();
}

/* Scores of pairs that do not meet become -infinity; a bias is added to the others. */
NA_WORD void NA_JOIN(settle_, NA_COLUMNS)(const na_sm90_backward *p, const consumer *s,
                                          float *scores, const int *note, int kind, int from)
{
#if NA_SCALED
#pragma unroll
    for (int i = 0; i < NA_COLUMNS / 2; i++)
        scores[i] *= p->scale_log2;
#endif
    if (NA_EXTRA && kind & EXTRA) {
        int count = note[2] - from;
#pragma unroll
        for (int r = 0; r < 2; r++)
            NA_JOIN(keep_range_, NA_COLUMNS)(&s->seat, scores, r, 0, count);
    } else if (NA_MASKS && kind >> s->seat.group & MASK) {
        int at[3] = {note[0], note[1], note[2]};
        NA_JOIN(mask_, NA_COLUMNS)(&p->walk, &s->seat, scores, at, from);
    } else if (NA_ADDS && kind >> s->seat.group & MASK) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            int token[3], there = find_row(&p->walk, &s->seat, s->seat.row + 8 * r, token);
            NA_JOIN(keep_range_, NA_COLUMNS)(&s->seat, scores, r, 0, there ? NA_COLUMNS : 0);
        }
    }
#if NA_BIAS
    if (!(kind & EXTRA)) {
        int at[3] = {note[0], note[1], note[2]}, head = s->seat.item->head;
        head = NA_SIDE ? head * p->walk.share + (kind >> VISIT) : head * NA_PACK;
        NA_JOIN(add_bias_, NA_COLUMNS)(&p->walk, &p->bias, &s->seat, scores, head, at, from);
    }
#endif
}

/* Scores become weights p. */
NA_WORD void NA_JOIN(weigh_, NA_COLUMNS)(const na_sm90_backward *p, const consumer *s,
                                         float *scores, int from)
{
#pragma unroll
    for (int n = 0; n < NA_COLUMNS / 8; n++) {
        float lse[2];
        if (NA_SIDE)
            load_pair(s, from + 8 * n, 0, lse);
#pragma unroll
        for (int i = 0; i < 4; i++)
            scores[4 * n + i] = na_exp2(na_fma(scores[4 * n + i], NA_SCALED ? 1 : p->scale_log2,
                                               NA_SIDE ? -lse[i & 1] : -s->lse[i >> 1]));
    }
}

/* Weights of d_query or d_key: ds. */
NA_WORD void NA_JOIN(differentiate_, NA_COLUMNS)(const consumer *s, const float *weights,
                                                 const float *d_weights, uint32_t *packed, int from)
{
#pragma unroll
    for (int n = 0; n < NA_COLUMNS / 8; n++) {
        float delta[2], d[4];
        if (NA_SIDE)
            load_pair(s, from + 8 * n, 2, delta);
#pragma unroll
        for (int i = 0; i < 4; i++)
            d[i] = weights[4 * n + i] *
                   (d_weights[4 * n + i] - (NA_SIDE ? delta[i & 1] : s->delta[i >> 1]));
#if NA_BIAS_ENTRIES
#pragma unroll
        for (int i = 0; i < 4; i++)
            *staged(&s->seat, s->seat.row + i / 2 * 8, from + 8 * n + s->seat.column + i % 2) =
                d[i];
#endif
        packed[2 * n] = na_pack(d[0], d[1]);
        packed[2 * n + 1] = na_pack(d[2], d[3]);
    }
}

NA_WORD void NA_JOIN(step_, NA_COLUMNS)(const na_sm90_backward *p, consumer *s, const int *note,
                                        int kind, int from)
{
    float scores[NA_COLUMNS / 2], d_weights[NA_COLUMNS / 2];
    uint32_t weights[NA_COLUMNS / 4], packed[NA_COLUMNS / 4];
#if NA_BIAS_ENTRIES
    int at[3] = {note[0], note[1], note[2]};
#endif
    NA_JOIN(multiply_, NA_COLUMNS)(s, scores, 0, NA_DIM, from);
    na_gate_wait(gate(s->base, SECOND_FULL + s->stage.stage), s->stage.phase);
    if (GIVES_SUMS) {
        NA_JOIN(multiply_, NA_COLUMNS)(s, d_weights, 1, NA_VALUE_DIM, from);
        na_product_wait_first();
    } else {
        na_product_wait();
    }
    hold(scores, NA_COLUMNS / 2);
    NA_JOIN(settle_, NA_COLUMNS)(p, s, scores, note, kind, from);
    NA_JOIN(weigh_, NA_COLUMNS)(p, s, scores, from);
    if (GIVES_VALUE_SUMS) {
#pragma unroll
        for (int i = 0; i < NA_COLUMNS / 4; i++)
            weights[i] = na_pack(scores[2 * i], scores[2 * i + 1]);
    }
    if (GIVES_SUMS) {
        na_product_wait();
        hold(d_weights, NA_COLUMNS / 2);
    }
    if (GIVES_VALUE_SUMS)
        NA_JOIN(add_value_sums_, NA_COLUMNS)(s, weights, from);
    if (GIVES_SUMS) {
        NA_JOIN(differentiate_, NA_COLUMNS)(s, scores, d_weights, packed, from);
        if (NA_ADDS)
            put_part(s, packed);
        NA_JOIN(add_sums_, NA_COLUMNS)(s, packed, from);
    }
    na_product_wait();
    if (GIVES_VALUE_SUMS)
        hold(s->value_sums, NA_VALUE_DIM / 2);
    if (GIVES_SUMS)
        hold(s->sums, NA_DIM / 2);
    if (NA_ADDS)
        take_target(s, note);
    give_stage(s);
#if NA_BIAS_ENTRIES
    if (!(kind & EXTRA))
        add_bias_sums(p, &s->seat, at);
#endif
}

#undef NA_COLUMNS
