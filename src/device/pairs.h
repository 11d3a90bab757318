/* SPDX-License-Identifier: MIT
 * Queries, keys and the pairs they make, for kernels that go through them one by one.
 *
 * Parameters: NA_DTYPE (natten_dtype). Gives `real`, what sums are taken in. */
#ifndef NATTEN_DEVICE_PAIRS_H
#define NATTEN_DEVICE_PAIRS_H

#include "core/dropout.h"
#include "device/divide.h"
#include "device/reference.h"
#include "device/words/words.h"

#if NA_DTYPE == 1 /* NATTEN_F64 */
typedef double real;
#define SHUFFLE na_shuffle_double
#define EXP exp
#define LOG log
#else
typedef float real;
#define SHUFFLE na_shuffle_float
#define EXP expf
#define LOG logf
#endif

typedef struct place {
    int batch, head, at[3]; /* as the layout counts */
} place;

/* A query and one of the tokens it attends to. */
typedef struct pair {
    place query, key;
    int additional;
    int slot;     /* among the query's */
    int64_t bias; /* where the pair's entry of the bias lies */
} pair;

/* ------------------------------------------------------------------------------------------
 * memory */

NA_WORD int has(const na_reference *p, natten_role role)
{
    return (int)(p->problem.roles >> role & 1);
}

NA_WORD int64_t offset_of(const na_reference *p, natten_role role, const place *at)
{
    const natten_layout *layout = &p->problem.layout[role];
    return at->batch * layout->batch + at->at[0] * layout->axis[0] + at->at[1] * layout->axis[1] +
           at->at[2] * layout->axis[2] + at->head * layout->head;
}

/* Whether a role is in the type that sums are taken in. */
NA_WORD int is_summed(natten_role role)
{
    return role == NATTEN_LSE || role == NATTEN_D_LSE || role == NATTEN_KEY_BIAS ||
           role == NATTEN_D_KEY_BIAS;
}

NA_WORD real load(const na_reference *p, natten_role role, int64_t index)
{
    const void *data = p->data[role];
    if (NA_DTYPE == NATTEN_F64)
        return (real)((const double *)data)[index];
    if (NA_DTYPE == NATTEN_F32 || is_summed(role))
        return ((const float *)data)[index];
    if (NA_DTYPE == NATTEN_F16)
        return na_float_of_f16(((const uint16_t *)data)[index]);
    return na_float_of_bf16(((const uint16_t *)data)[index]);
}

/* Elements in 16 bytes. */
enum { VECTOR = NA_DTYPE == NATTEN_F64 ? 2 : NA_DTYPE == NATTEN_F32 ? 4 : 8 };

NA_WORD const char *address_of(const na_reference *p, natten_role role, int64_t index)
{
    return (const char *)p->data[role] + index * (16 / VECTOR);
}

NA_WORD int is_aligned(const na_reference *p, natten_role role, int64_t index)
{
    return (uint64_t)address_of(p, role, index) % 16 == 0;
}

/* VECTOR elements from an aligned place. */
NA_WORD void load_vector(const na_reference *p, natten_role role, int64_t index, real *to)
{
    uint32_t bits[4];
    na_load_16_bytes(address_of(p, role, index), bits);
#pragma unroll
    for (int i = 0; i < VECTOR; i++) {
        uint16_t half = (uint16_t)(bits[i * 4 / VECTOR] >> (i % 2 ? 16 : 0));
        if (NA_DTYPE == NATTEN_F64)
            to[i] = (real)na_double_of_bits(bits[i % 2 * 2], bits[i % 2 * 2 + 1]);
        else if (NA_DTYPE == NATTEN_F32)
            to[i] = na_float_of_bits(bits[i % 4]);
        else if (NA_DTYPE == NATTEN_F16)
            to[i] = na_float_of_f16(half);
        else
            to[i] = na_float_of_bf16(half);
    }
}

NA_WORD void store(const na_reference *p, natten_role role, int64_t index, real value)
{
    void *data = p->data[role];
    if (NA_DTYPE == NATTEN_F64)
        ((double *)data)[index] = value;
    else if (NA_DTYPE == NATTEN_F32 || is_summed(role))
        ((float *)data)[index] = (float)value;
    else if (NA_DTYPE == NATTEN_F16)
        ((uint16_t *)data)[index] = na_f16_of_float((float)value);
    else
        ((uint16_t *)data)[index] = na_bf16_of_float((float)value);
}

/* ------------------------------------------------------------------------------------------
 * places and pairs */

/* Token `index` of a box as coordinates, innermost axis fastest. */
NA_WORD void token_of(int index, const int *extent, int *at)
{
    for (int a = 2; a >= 0; a--) {
        at[a] = index % extent[a];
        index /= extent[a];
    }
}

/* Tokens of a box; the plan has made sure that an int counts them. */
NA_WORD int tokens_of(const int *extent) { return extent[0] * extent[1] * extent[2]; }

/* Task `index`: a token of a head of a batch. */
NA_WORD place place_of(int64_t index, const int *extent, int heads)
{
    int token;
    int64_t row = na_divide(index, tokens_of(extent), &token);
    place at;
    token_of(token, extent, at.at);
    at.batch = (int)na_divide(row, heads, &at.head);
    return at;
}

NA_WORD int kv_head(const na_reference *p, int head)
{
    return head / ((int)p->problem.heads / (int)p->problem.kv_heads);
}

/* Tokens in a window. */
NA_WORD int window_size(const na_reference *p)
{
    return p->axis[0].window * p->axis[1].window * p->axis[2].window;
}

NA_WORD pair additional_pair(const na_reference *p, const place *query, int token)
{
    pair result;
    result.query = *query;
    result.key.batch = query->batch;
    result.key.head = kv_head(p, query->head);
    result.key.at[0] = token;
    result.key.at[1] = result.key.at[2] = 0;
    result.additional = 1;
    result.slot = window_size(p) + token;
    result.bias = 0;
    return result;
}

/* The pair of a query and the keys `step` steps into its window; 0 if the causal mask forbids it.
 */
NA_WORD int window_pair(const na_reference *p, const place *query, const int *step, pair *result)
{
    int allowed = 1;
    result->query = *query;
    result->key.batch = query->batch;
    result->key.head = kv_head(p, query->head);
    result->additional = 0;
    result->slot = 0;
    result->bias = query->head * p->problem.layout[NATTEN_RPB].head;
    for (int a = 0; a < 3; a++) {
        na_axis axis = p->axis[a];
        int from = (int)p->problem.axis[a].query_origin + query->at[a];
        na_window window = na_window_of(axis, from);
        int to = window.first + step[a] * axis.dilation;
        allowed &= step[a] < window.count;
        result->key.at[a] = to - (int)p->problem.axis[a].key_origin;
        result->slot = result->slot * axis.window + step[a];
        result->bias +=
            ((to - from) / axis.dilation + axis.window - 1) * p->problem.layout[NATTEN_RPB].axis[a];
    }
    return allowed;
}

/* The pair behind a query's slot; 0 if there is none or it is forbidden. */
NA_WORD int slot_pair(const na_reference *p, const place *query, int slot, pair *result)
{
    int keys = window_size(p), step[3];
    if (slot >= keys) {
        *result = additional_pair(p, query, slot - keys);
        return slot < keys + p->problem.additional_tokens;
    }
    for (int a = 2; a >= 0; a--) {
        step[a] = slot % p->axis[a].window;
        slot /= p->axis[a].window;
    }
    return window_pair(p, query, step, result);
}

/* Queries first, first + step, ..., count of them, along one axis. */
typedef struct span {
    int first, step, count;
} span;

/* The queries that attend to a key. */
NA_WORD span queries_of(const na_reference *p, int a, int key)
{
    const natten_axis *block = &p->problem.axis[a];
    int begin = (int)block->query_origin, end = begin + (int)block->query_extent;
    na_window visitors = na_visitors_of(p->axis[a], key + (int)block->key_origin, begin, end);
    span result = {visitors.first - begin, p->axis[a].dilation, visitors.count};
    return result;
}

/* The pair of a key and a query known to attend to it. */
NA_WORD pair key_pair(const na_reference *p, const place *query, const place *key)
{
    int step[3];
    pair result;
    for (int a = 0; a < 3; a++) {
        int from = (int)p->problem.axis[a].query_origin + query->at[a];
        int to = (int)p->problem.axis[a].key_origin + key->at[a];
        step[a] = (to - na_window_of(p->axis[a], from).first) / p->axis[a].dilation;
    }
    window_pair(p, query, step, &result);
    return result;
}

/* What dropout multiplies the pair's weight by. */
NA_WORD real dropout_of(const na_reference *p, const pair *w)
{
    const natten_axis *axis = p->problem.axis;
    if (!p->threshold)
        return 1;
    na_words row = na_dropout_row(p->seed, p->offset, w->query.batch, w->query.head,
                                  (int)axis[0].query_origin + w->query.at[0],
                                  (int)axis[1].query_origin + w->query.at[1]);
    int number = (int)na_dropout_number(row, (int)axis[2].query_origin + w->query.at[2], w->slot);
    return number < p->threshold ? 0 : (real)p->factor;
}

#endif
