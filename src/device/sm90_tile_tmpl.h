/* SPDX-License-Identifier: MIT
 * One step of the forward op on Hopper: a warpgroup's queries against a tile of keys and values.
 * Parameter: NA_COLUMNS, the digits of the number of keys, those from row `from` of the tile on.
 * Gives tile_<columns>. */
#define NA_PRODUCT NA_JOIN(scores_, NA_COLUMNS)
#define NA_PRODUCT_N NA_COLUMNS
#define NA_PRODUCT_B 0
#include "device/words/wgmma_tmpl.h"

#include "device/sm90_mask_tmpl.h"
#if NA_BIAS
#include "device/sm90_bias_tmpl.h"
#endif

NA_WORD void NA_JOIN(multiply_, NA_COLUMNS)(consumer *s, float *scores, int from)
{
    uint32_t key = s->base + places().key + s->key.stage * places().key_bytes + from * 128;
#pragma unroll
    for (int i = 0; i < NA_COLUMNS / 2; i++)
        na_hold(&scores[i]);
    na_product_fence();
#pragma unroll
    for (int k = 0; k < STEPS; k++) {
        uint64_t keys = na_matrix(key + k / 4 * (NA_VISITORS * 128) + k % 4 * 32, 16);
        uint32_t query = s->query + k / 4 * (NA_SM90_ROWS * 128) + k % 4 * 32;
        NA_JOIN(NA_JOIN(scores_, NA_COLUMNS), _shared)(scores, na_matrix(query, 16), keys, k > 0);
    }
    na_product_commit();
    na_product_wait();
#pragma unroll
    for (int i = 0; i < NA_COLUMNS / 2; i++)
        na_hold(&scores[i]);
}

/* Turns scores into weights, that is powers of two relative to the rows' reference maxima, and sums
 * them up. The references follow the true maxima only when these are ahead by more than the slack,
 * as what was added up before then has to be scaled: rarely. The final division makes up for any
 * reference. */
NA_WORD void NA_JOIN(weigh_, NA_COLUMNS)(const na_sm90_forward *p, consumer *s, float *scores)
{
    float high[2], offset[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float even = scores[2 * r], odd = scores[2 * r + 1];
#pragma unroll
        for (int n = 1; n < NA_COLUMNS / 8; n++) {
            even = na_maximum(even, scores[4 * n + 2 * r]);
            odd = na_maximum(odd, scores[4 * n + 2 * r + 1]);
        }
        high[r] = na_maximum(even, odd);
        high[r] = na_maximum(high[r], na_exchange(high[r], 1));
        high[r] = na_maximum(high[r], na_exchange(high[r], 2));
    }
    if (na_any(high[0] > s->highest[0] + p->slack || high[1] > s->highest[1] + p->slack)) {
        float factor[2];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float raised = high[r] > s->highest[r] + p->slack ? high[r] : s->highest[r];
            factor[r] = na_exp2((s->highest[r] - raised) * exponent_scale(p));
            s->highest[r] = raised;
            s->total[r] *= factor[r];
        }
#pragma unroll
        for (int i = 0; i < OUTPUTS; i++)
            s->out[i] *= factor[i >> 1 & 1];
    }
#pragma unroll
    for (int r = 0; r < 2; r++)
        offset[r] = s->highest[r] * exponent_scale(p);
#pragma unroll
    for (int i = 0; i < NA_COLUMNS / 2; i++) {
        scores[i] = na_exp2(na_fma(scores[i], exponent_scale(p), -offset[i >> 1 & 1]));
        s->total[i >> 1 & 1] += scores[i];
    }
}

NA_WORD void NA_JOIN(add_values_, NA_COLUMNS)(consumer *s, uint32_t *weights, int from)
{
    uint32_t value = s->base + places().value + s->value.stage * places().value_bytes + from * 128;
#pragma unroll
    for (int i = 0; i < OUTPUTS; i++)
        na_hold(&s->out[i]);
    na_product_fence();
#pragma unroll
    for (int k = 0; k < NA_COLUMNS / 16; k++)
        outputs_registers(s->out, weights + 4 * k,
                          na_matrix(value + k * 16 * 128, NA_VISITORS * 128), 1);
    na_product_commit();
    na_product_wait();
#pragma unroll
    for (int i = 0; i < OUTPUTS; i++)
        na_hold(&s->out[i]);
}

NA_WORD void NA_JOIN(tile_, NA_COLUMNS)(const na_sm90_forward *p, consumer *s, const int *note,
                                        int kind, int from)
{
    float scores[NA_COLUMNS / 2];
    uint32_t weights[NA_COLUMNS / 4];
    /* Read before the keys are given back: the note goes with them. */
    int at[3] = {note[0], note[1], note[2]};
    NA_JOIN(multiply_, NA_COLUMNS)(s, scores, from);
    give_key(s);
    if (kind & LAST)
        give_query(s);
#if NA_SCALED
#pragma unroll
    for (int i = 0; i < NA_COLUMNS / 2; i++)
        scores[i] *= p->scale_log2;
#endif
    if (NA_EXTRA && kind & EXTRA) {
#pragma unroll
        for (int r = 0; r < 2; r++)
            NA_JOIN(keep_range_, NA_COLUMNS)(&s->seat, scores, r, 0, at[2] - from);
    } else if (kind >> s->seat.group & MASK) {
        NA_JOIN(mask_, NA_COLUMNS)(&p->walk, &s->seat, scores, at, from);
    }
#if NA_BIAS
    if (!(kind & EXTRA))
        NA_JOIN(add_bias_, NA_COLUMNS)
    (&p->walk, &p->bias, &s->seat, scores, s->seat.item->head * NA_PACK, at, from);
#endif
    NA_JOIN(weigh_, NA_COLUMNS)(p, s, scores);
#pragma unroll
    for (int i = 0; i < NA_COLUMNS / 4; i++)
        weights[i] = na_pack(scores[2 * i], scores[2 * i + 1]);
    na_gate_wait(gate(s->base, VALUE_FULL + s->value.stage), s->value.phase);
    NA_JOIN(add_values_, NA_COLUMNS)(s, weights, from);
    give_owed_value(s);
    na_gate_arrive_warp(gate(s->base, VALUE_EMPTY + s->value.stage), s->seat.lane, 1);
}

#undef NA_COLUMNS
