/* SPDX-License-Identifier: MIT
 * What the kernels of sm90_backward.cu and sm90_delta.cu are called with, and where things lie in
 * shared memory. */
#ifndef NATTEN_DEVICE_SM90_BACKWARD_H
#define NATTEN_DEVICE_SM90_BACKWARD_H

#include "device/sm90_walk.h"

/* Numbers about a query, [batch, head, axis 0, 1, 2]: lse (of powers of two) and delta, each of the
 * query and of the next one along axis 2 in its dilation group: lse, lse, delta, delta. Boxes begin
 * at multiples of 16 bytes, and neighbours are wanted together. */
enum { NA_SM90_PAIR = 4 };

typedef struct na_sm90_delta {
    const uint16_t *out, *d_out;
    const float *lse, *d_lse; /* d_lse may be NULL */
    float *pairs;
    natten_layout out_layout, d_out_layout, lse_layout, d_lse_layout;
    int extent[3], heads, step; /* of queries; step: dilation of axis 2 */
    int rows;                   /* batch * heads * tokens */
} na_sm90_delta;

typedef struct na_sm90_backward {
    /* Axes as of na_sm90_forward. First what has head_dim channels, then value_dim: queries and
     * d_out, keys and values. */
    na_tensor_map resident[2], visitor[2], extra[2];
    na_tensor_map pairs, d_query; /* d_query: a sum in float32 (na_sm90_sum_place) */
    na_sm90_walk walk;
    const float *pair; /* where residents are queries: the pairs themselves, of this batch */
    void *out[2];      /* d_query; or d_key, d_value */
    natten_layout layout[2];
    int extent[3]; /* of queries */
    float scale, scale_log2;
    na_sm90_bias bias;
    struct { /* of its gradient: what each warpgroup of each item has of it */
        float *parts;
        int extent[3]; /* entries along each axis */
    } bias_sums;
} na_sm90_backward;

enum { NA_SM90_BIAS_BLOCK = 32 /* entries that a block adds up at a time */ };

typedef struct na_sm90_bias_end {
    const float *parts; /* [batch, head, part, entry] */
    uint16_t *d_bias;
    int64_t head, step[3]; /* how far apart entries are */
    int extent[3], entries;
    int batches, heads, parts_of_head;
} na_sm90_bias_end;

typedef struct na_sm90_convert {
    const float *sums;
    uint16_t *d_query;
    natten_layout layout;
    int extent[3], dilation[3], heads;
    int rows; /* batch * heads * tokens */
    float scale;
} na_sm90_convert;

/* Where a query's sum lies along an axis of [batch, head, axis 0, 1, 2, channel]: dilation groups
 * one after the other, so that tiles are boxes without gaps. Of every 8 channels the even ones come
 * first. */
NA_INLINE int na_sm90_sum_place(int at, int extent, int dilation)
{
    return dilation == 1 ? at
                         : at % dilation * ((extent + dilation - 1) / dilation) + at / dilation;
}

NA_INLINE int na_sm90_sum_extent(int extent, int dilation)
{
    return (extent + dilation - 1) / dilation * dilation;
}

enum {
    NA_SM90_PARTS = 2,         /* tiles of ds in shared memory, where they are added up */
    NA_SM90_TARGET_BYTES = 16, /* of what says where a tile is added: the last of its note */
    NA_SM90_ADDED_COLUMNS = 32 /* of a piece of a box of sums: 128 bytes */
};

/* Offsets in bytes. */
typedef struct na_sm90_back_shared {
    int resident_bytes[2], visitor_bytes[2], pair_bytes; /* of one warpgroup, of one stage */
    int part_bytes, sum_bytes, note_bytes;               /* of one tile, one warpgroup, one stage */
    int resident, visitor, part, sum, pair, note, target, gate, order, item, table, bytes;
} na_sm90_back_shared;

/* `adds`: also gives d_query; `side`, then, is 1. */
NA_INLINE na_sm90_back_shared na_sm90_back_shared_of(int side, int adds, int groups, int dim,
                                                     int value_dim, int visitors, int stages,
                                                     int orders, int order_bytes, int table_bytes)
{
    na_sm90_back_shared at;
    int item_bytes = 4 * (NA_SM90_ITEM_WORDS - adds);
    at.resident_bytes[0] = na_sm90_bytes(NA_SM90_ROWS, dim);
    at.resident_bytes[1] = na_sm90_bytes(NA_SM90_ROWS, value_dim);
    at.visitor_bytes[0] = na_sm90_bytes(visitors, dim);
    at.visitor_bytes[1] = na_sm90_bytes(visitors, value_dim);
    at.pair_bytes = side ? visitors * NA_SM90_PAIR * 4 : 0;
    at.part_bytes = adds ? groups * NA_SM90_ROWS * 128 : 0;
    at.sum_bytes = adds ? na_sm90_bytes(NA_SM90_ROWS, 2 * dim) : 0;
    at.note_bytes = NA_SM90_NOTE_BYTES + (adds ? NA_SM90_TARGET_BYTES : 0);
    at.resident = 0;
    at.visitor = groups * (at.resident_bytes[0] + at.resident_bytes[1]);
    at.part = at.visitor + stages * (at.visitor_bytes[0] + at.visitor_bytes[1]);
    at.sum = at.part + NA_SM90_PARTS * at.part_bytes;
    at.pair = at.sum + groups * at.sum_bytes;
    at.note = at.pair + stages * at.pair_bytes;
    at.target = at.note + stages * at.note_bytes;
    at.gate = at.target + (adds ? groups * NA_SM90_TARGET_BYTES : 0);
    at.order = at.gate + 8 * (2 * (groups + orders) + 3 * stages + (adds ? 2 * NA_SM90_PARTS : 0));
    at.item = at.order + orders * (order_bytes - 4 * adds);
    if (!adds) { /* else there is no byte to spare */
        at.item = na_sm90_items_at(at.order, orders * order_bytes);
        at.order = at.item - orders * order_bytes;
    }
    at.table = at.item + groups * item_bytes;
    at.bytes = at.table + groups * table_bytes;
    return at;
}

#endif
