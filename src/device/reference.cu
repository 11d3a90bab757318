/* SPDX-License-Identifier: MIT
 * Every op for every dtype, stride and head_dim, on every GPU: what the others are measured
 * against, and the last resort. Nothing here is fast, nothing is added up by more than one warp in
 * turns, so results do not vary.
 *
 * Parameters: NA_OP (natten_op), NA_DTYPE (natten_dtype). The kernels, and what they write:
 *   na_reference_query   a warp per query: out and lse, or d_query
 *   na_reference_slots   a warp per query: attn, or d_attn
 *   na_reference_key     a warp per key or additional token: d_key, d_value and d_key_bias
 *   na_reference_bias    a block per entry of the bias: d_rpb */
#include "device/pairs.h"

enum {
    LANES = 32,
    THREADS = NA_REFERENCE_WARPS * LANES,
    OWN = 4, /* channels a lane adds up at a time; more channels take more passes */
    PASS = OWN * LANES,
    BACKWARD = NA_OP == NATTEN_BACKWARD,
    GIVES_OUT = NA_OP == NATTEN_FORWARD || NA_OP == NATTEN_AV
};

/* ------------------------------------------------------------------------------------------
 * arithmetic of one pair, by one thread */

NA_WORD natten_role key_role(const pair *w)
{
    return w->additional ? NATTEN_ADDITIONAL_KEY : NATTEN_KEY;
}

NA_WORD natten_role value_role(const pair *w)
{
    return w->additional ? NATTEN_ADDITIONAL_VALUE : NATTEN_VALUE;
}

/* The sum over channels of a row of a times (a row of b less one of c); with c NATTEN_ROLES, of a
 * times b. One product after the other, whether or not rows are aligned: the bits are the same. */
NA_WORD real dot(const na_reference *p, natten_role a, int64_t from_a, natten_role b,
                 int64_t from_b, natten_role c, int64_t from_c, int64_t channels)
{
    int less = c != NATTEN_ROLES, is_vector = is_aligned(p, a, from_a) && is_aligned(p, b, from_b);
    int64_t at = 0;
    real sum = 0, x[VECTOR], y[VECTOR], z[VECTOR];
    if (is_vector && (!less || is_aligned(p, c, from_c)))
        for (; at + VECTOR <= channels; at += VECTOR) {
            load_vector(p, a, from_a + at, x);
            load_vector(p, b, from_b + at, y);
            if (less)
                load_vector(p, c, from_c + at, z);
#pragma unroll
            for (int i = 0; i < VECTOR; i++)
                sum += x[i] * (less ? y[i] - z[i] : y[i]);
        }
    for (; at < channels; at++) {
        real factor = load(p, b, from_b + at);
        if (less)
            factor -= load(p, c, from_c + at);
        sum += load(p, a, from_a + at) * factor;
    }
    return sum;
}

NA_WORD real logit(const na_reference *p, const pair *w)
{
    real sum = dot(p, NATTEN_QUERY, offset_of(p, NATTEN_QUERY, &w->query), key_role(w),
                   offset_of(p, key_role(w), &w->key), NATTEN_ROLES, 0, p->problem.head_dim);
    sum *= (real)p->problem.scale;
    if (!w->additional && has(p, NATTEN_RPB))
        sum += load(p, NATTEN_RPB, w->bias);
    if (!w->additional && has(p, NATTEN_KEY_BIAS))
        sum += load(p, NATTEN_KEY_BIAS, offset_of(p, NATTEN_KEY_BIAS, &w->key));
    return sum;
}

/* d_out . (value - out), or d_out . value where there is no out. */
NA_WORD real value_product(const na_reference *p, const pair *w, int less_out)
{
    return dot(p, NATTEN_D_OUT, offset_of(p, NATTEN_D_OUT, &w->query), value_role(w),
               offset_of(p, value_role(w), &w->key), less_out ? NATTEN_OUT : NATTEN_ROLES,
               less_out ? offset_of(p, NATTEN_OUT, &w->query) : 0, p->problem.value_dim);
}

/* d_out . out */
NA_WORD real out_product(const na_reference *p, const pair *w)
{
    return dot(p, NATTEN_D_OUT, offset_of(p, NATTEN_D_OUT, &w->query), NATTEN_OUT,
               offset_of(p, NATTEN_OUT, &w->query), NATTEN_ROLES, 0, p->problem.value_dim);
}

/* What dropout leaves of the pair's softmax weight (or its entry of attn), and the gradient of its
 * logit. */
NA_WORD void weigh(const na_reference *p, const pair *w, real *weight, real *gradient)
{
    *weight = *gradient = 0;
    if (BACKWARD) {
        real lse = load(p, NATTEN_LSE, offset_of(p, NATTEN_LSE, &w->query));
        if (lse == -na_infinity()) /* all keys are masked */
            return;
        *weight = EXP(logit(p, w) - lse);
        real d_lse = 0, kept = dropout_of(p, w);
        if (has(p, NATTEN_D_LSE))
            d_lse = load(p, NATTEN_D_LSE, offset_of(p, NATTEN_D_LSE, &w->query));
        *gradient =
            *weight * (kept == 1 ? value_product(p, w, 1) + d_lse
                                 : kept * value_product(p, w, 0) - out_product(p, w) + d_lse);
        *weight *= kept;
    } else if (NA_OP == NATTEN_QK_BACKWARD) {
        *gradient = load(p, NATTEN_D_ATTN, offset_of(p, NATTEN_D_ATTN, &w->query) + w->slot);
    } else {
        *weight = load(p, NATTEN_ATTN, offset_of(p, NATTEN_ATTN, &w->query) + w->slot);
    }
}

/* ------------------------------------------------------------------------------------------
 * sums over a warp */

NA_WORD real warp_sum(real value, int lane)
{
    for (int step = LANES / 2; step > 0; step /= 2)
        value += SHUFFLE(value, lane ^ step);
    return value;
}

NA_WORD real warp_max(real value, int lane)
{
    for (int step = LANES / 2; step > 0; step /= 2) {
        real other = SHUFFLE(value, lane ^ step);
        value = other > value ? other : value;
    }
    return value;
}

/* Adds weight times a row of each lane's choosing (`role` at `offset`; none if role is
 * NATTEN_ROLES) to the channels this lane owns. */
NA_WORD void gather(const na_reference *p, real *sum, real weight, int role, int64_t offset,
                    int64_t channel, int64_t channels)
{
    for (int i = 0; i < LANES; i++) {
        real factor = SHUFFLE(weight, i);
        natten_role from = (natten_role)na_shuffle_int(role, i);
        int64_t row = na_shuffle_int64(offset, i);
        if (from == NATTEN_ROLES)
            continue;
        for (int j = 0; j < OWN; j++)
            if (channel + j * LANES < channels)
                sum[j] += factor * load(p, from, row + channel + j * LANES);
    }
}

NA_WORD void store_row(const na_reference *p, natten_role role, const place *at, const real *sum,
                       real factor, int64_t channel, int64_t channels)
{
    int64_t row = offset_of(p, role, at);
    for (int j = 0; j < OWN; j++)
        if (channel + j * LANES < channels)
            store(p, role, row + channel + j * LANES, sum[j] * factor);
}

/* ------------------------------------------------------------------------------------------
 * kernels */

NA_WORD void query_extents(const na_reference *p, int *extent)
{
    for (int a = 0; a < 3; a++)
        extent[a] = (int)p->problem.axis[a].query_extent;
}

NA_WORD int slots_of(const na_reference *p)
{
    return window_size(p) + (int)p->problem.additional_tokens;
}

/* One pass over a query's slots for the channels from `base` on. */
#if NA_OP != 2 && NA_OP != 5 /* all but QK and AV_BACKWARD */
NA_WORD void query_pass(const na_reference *p, const place *query, int lane, int64_t base)
{
    int slots = slots_of(p);
    int64_t channels = GIVES_OUT ? p->problem.value_dim : p->problem.head_dim;
    real sum[OWN] = {0}, highest = -na_infinity(), total = 0;
    for (int first = 0; first < slots; first += LANES) {
        pair w;
        real weight = 0, gradient = 0, factor = 1;
        int valid = slot_pair(p, query, first + lane, &w), role = NATTEN_ROLES;
        if (NA_OP == NATTEN_FORWARD) {
            real own = valid ? logit(p, &w) : -na_infinity();
            real higher = warp_max(own, lane);
            higher = highest > higher ? highest : higher;
            if (higher == -na_infinity())
                continue;
            weight = valid ? EXP(own - higher) : 0;
            factor = EXP(highest - higher);
            total = total * factor + warp_sum(weight, lane);
            highest = higher;
            if (valid)
                weight *= dropout_of(p, &w);
        } else if (valid) {
            weigh(p, &w, &weight, &gradient);
        }
        for (int j = 0; j < OWN; j++)
            sum[j] *= factor;
        if (valid)
            role = GIVES_OUT ? value_role(&w) : key_role(&w);
        gather(p, sum, GIVES_OUT ? weight : gradient, role,
               valid ? offset_of(p, (natten_role)role, &w.key) : 0, base + lane, channels);
    }
    /* All keys may be masked. */
    real factor_of_total = total == 0 ? 0 : 1 / total;
    real factor = NA_OP == NATTEN_FORWARD ? factor_of_total
                  : GIVES_OUT             ? 1
                                          : (real)p->problem.scale;
    store_row(p, GIVES_OUT ? NATTEN_OUT : NATTEN_D_QUERY, query, sum, factor, base + lane,
              channels);
    if (NA_OP == NATTEN_FORWARD && base == 0 && lane == 0 && has(p, NATTEN_LSE))
        store(p, NATTEN_LSE, offset_of(p, NATTEN_LSE, query), highest + LOG(total));
}

NA_KERNEL(na_reference_query, na_reference, THREADS)
{
    int extent[3];
    int64_t step = na_blocks() * NA_REFERENCE_WARPS;
    int lane = na_thread() % LANES;
    query_extents(&p, extent);
    int64_t tasks = p.problem.batch * p.problem.heads * tokens_of(extent);
    int64_t channels = GIVES_OUT ? p.problem.value_dim : p.problem.head_dim;
    for (int64_t i = na_block() * NA_REFERENCE_WARPS + na_thread() / LANES; i < tasks; i += step) {
        place query = place_of(i, extent, (int)p.problem.heads);
        for (int64_t base = 0; base < channels; base += PASS)
            query_pass(&p, &query, lane, base);
    }
}
#endif

#if NA_OP == 2 || NA_OP == 5 /* QK, AV_BACKWARD */
NA_KERNEL(na_reference_slots, na_reference, THREADS)
{
    int extent[3];
    int64_t step = na_blocks() * NA_REFERENCE_WARPS;
    int slots = slots_of(&p);
    query_extents(&p, extent);
    int64_t tasks = p.problem.batch * p.problem.heads * tokens_of(extent);
    natten_role role = NA_OP == NATTEN_QK ? NATTEN_ATTN : NATTEN_D_ATTN;
    for (int64_t i = na_block() * NA_REFERENCE_WARPS + na_thread() / LANES; i < tasks; i += step) {
        place query = place_of(i, extent, (int)p.problem.heads);
        for (int slot = na_thread() % LANES; slot < slots; slot += LANES) {
            pair w;
            real result = NA_OP == NATTEN_QK ? -na_infinity() : 0;
            if (slot_pair(&p, &query, slot, &w))
                result = NA_OP == NATTEN_QK ? logit(&p, &w) : value_product(&p, &w, 0);
            store(&p, role, offset_of(&p, role, &query) + slot, result);
        }
    }
}
#endif

#if NA_OP % 2 == 1 /* the backward ops */
typedef struct key_sums {
    real key[OWN], value[OWN], bias; /* bias: of this lane's queries */
} key_sums;

/* Adds up what the queries of one head in a box send to a key (or additional token), for the
 * channels from `base` on. */
NA_WORD void key_pass(const na_reference *p, const place *key, int additional, const span *box,
                      int head, int64_t base, key_sums *sums)
{
    int lane = na_thread() % LANES, extent[3] = {box[0].count, box[1].count, box[2].count};
    int queries = tokens_of(extent);
    for (int first = 0; first < queries; first += LANES) {
        pair w;
        real weight = 0, gradient = 0;
        int64_t query_row = 0, d_out_row = 0;
        int valid = first + lane < queries;
        if (valid) {
            place query;
            token_of(first + lane, extent, query.at);
            query.batch = key->batch;
            query.head = head;
            for (int a = 0; a < 3; a++)
                query.at[a] = box[a].first + query.at[a] * box[a].step;
            w = additional ? additional_pair(p, &query, key->at[0]) : key_pair(p, &query, key);
            weigh(p, &w, &weight, &gradient);
            query_row = offset_of(p, NATTEN_QUERY, &query);
            d_out_row = offset_of(p, NATTEN_D_OUT, &query);
        }
        sums->bias += gradient;
        if (NA_OP != NATTEN_AV_BACKWARD)
            gather(p, sums->key, gradient, valid ? NATTEN_QUERY : NATTEN_ROLES, query_row,
                   base + lane, p->problem.head_dim);
        if (NA_OP != NATTEN_QK_BACKWARD)
            gather(p, sums->value, weight, valid ? NATTEN_D_OUT : NATTEN_ROLES, d_out_row,
                   base + lane, p->problem.value_dim);
    }
}

/* The gradients of one key (or additional token). */
NA_WORD void key_task(const na_reference *p, const place *key, int additional)
{
    span box[3];
    natten_role d_key = additional ? NATTEN_D_ADDITIONAL_KEY : NATTEN_D_KEY;
    natten_role d_value = additional ? NATTEN_D_ADDITIONAL_VALUE : NATTEN_D_VALUE;
    int64_t head_dim = p->problem.head_dim, value_dim = p->problem.value_dim;
    int64_t channels = head_dim > value_dim ? head_dim : value_dim;
    int group = (int)p->problem.heads / (int)p->problem.kv_heads, lane = na_thread() % LANES;
    for (int a = 0; a < 3; a++) {
        span whole = {0, 1, (int)p->problem.axis[a].query_extent};
        box[a] = additional ? whole : queries_of(p, a, key->at[a]);
    }
    for (int64_t base = 0; base < channels; base += PASS) {
        key_sums sums = {{0}, {0}, 0};
        for (int head = key->head * group; head < (key->head + 1) * group; head++)
            key_pass(p, key, additional, box, head, base, &sums);
        if (has(p, d_key))
            store_row(p, d_key, key, sums.key, (real)p->problem.scale, base + lane, head_dim);
        if (has(p, d_value))
            store_row(p, d_value, key, sums.value, 1, base + lane, value_dim);
        if (has(p, NATTEN_D_KEY_BIAS) && !additional && base == 0) {
            real sum = warp_sum(sums.bias, lane);
            if (lane == 0)
                store(p, NATTEN_D_KEY_BIAS, offset_of(p, NATTEN_D_KEY_BIAS, key), sum);
        }
    }
}

NA_KERNEL(na_reference_key, na_reference, THREADS)
{
    const natten_axis *axis = p.problem.axis;
    int extent[3] = {(int)axis[0].key_extent, (int)axis[1].key_extent, (int)axis[2].key_extent};
    int more[3] = {(int)p.problem.additional_tokens, 1, 1}, heads = (int)p.problem.kv_heads;
    int64_t rows = p.problem.batch * heads, step = na_blocks() * NA_REFERENCE_WARPS;
    int wants_keys = has(&p, NATTEN_D_KEY) || has(&p, NATTEN_D_VALUE) || has(&p, NATTEN_D_KEY_BIAS);
    int wants_more = has(&p, NATTEN_D_ADDITIONAL_KEY) || has(&p, NATTEN_D_ADDITIONAL_VALUE);
    int64_t keys = wants_keys ? rows * tokens_of(extent) : 0;
    int64_t tasks = keys + (wants_more ? rows * more[0] : 0);
    for (int64_t i = na_block() * NA_REFERENCE_WARPS + na_thread() / LANES; i < tasks; i += step) {
        int additional = i >= keys;
        place key = additional ? place_of(i - keys, more, heads) : place_of(i, extent, heads);
        key_task(&p, &key, additional);
    }
}
#endif

#if NA_OP == 1 || NA_OP == 3 /* BACKWARD, QK_BACKWARD */
/* What this thread's share of the queries adds to one entry of the bias. */
NA_WORD real bias_share(const na_reference *p, const place *entry)
{
    int extent[3];
    query_extents(p, extent);
    int64_t queries = p->problem.batch * tokens_of(extent);
    real sum = 0;
    for (int64_t i = na_thread(); i < queries; i += THREADS) {
        place query = place_of(i, extent, 1);
        query.head = entry->head;
        int step[3], inside = 1;
        for (int a = 0; a < 3; a++) {
            na_axis axis = p->axis[a];
            int from = (int)p->problem.axis[a].query_origin + query.at[a];
            int to = from + (entry->at[a] - axis.window + 1) * axis.dilation;
            na_window window = na_window_of(axis, from);
            step[a] = (to - window.first) / axis.dilation;
            inside &= to >= window.first && step[a] < window.count;
        }
        pair w;
        real weight, gradient = 0;
        if (inside && window_pair(p, &query, step, &w))
            weigh(p, &w, &weight, &gradient);
        sum += gradient;
    }
    return sum;
}

NA_KERNEL(na_reference_bias, na_reference, THREADS)
{
    int extent[3] = {2 * p.axis[0].window - 1, 2 * p.axis[1].window - 1, 2 * p.axis[2].window - 1};
    int64_t tasks = p.problem.heads * tokens_of(extent);
    real *shares = (real *)na_shared();
    for (int64_t i = na_block(); i < tasks; i += na_blocks()) {
        place entry = place_of(i, extent, (int)p.problem.heads);
        shares[na_thread()] = bias_share(&p, &entry);
        na_barrier();
        if (na_thread() == 0) {
            real sum = 0;
            for (int t = 0; t < THREADS; t++)
                sum += shares[t];
            store(&p, NATTEN_D_RPB, offset_of(&p, NATTEN_D_RPB, &entry), sum);
        }
        na_barrier();
    }
}
#endif
