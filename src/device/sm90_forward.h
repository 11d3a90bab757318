/* SPDX-License-Identifier: MIT
 * What the kernel of sm90_forward.cu is called with, and where things lie in its shared memory. */
#ifndef NATTEN_DEVICE_SM90_FORWARD_H
#define NATTEN_DEVICE_SM90_FORWARD_H

#include "device/sm90_walk.h"

typedef struct na_sm90_forward {
    /* Axes from the innermost: channel, head, axis 2, axis 1, then axis 0, or the batch if `flat`.
     * Of additional tokens: channel, head, token, nothing, batch. */
    na_tensor_map query, key, value, extra_key, extra_value;
    na_sm90_walk walk;
    natten_layout out_layout, lse_layout;
    void *out;
    float *lse;       /* NULL: not wanted */
    float scale_log2; /* scale, for powers of two */
    float slack;      /* by how much a score may exceed the reference maximum of its row */
    na_sm90_bias bias;
} na_sm90_forward;

/* Offsets in bytes. */
typedef struct na_sm90_shared {
    int query_bytes, key_bytes, value_bytes; /* of one warpgroup's tile, one stage's tiles */
    int query, key, value, note, gate, order, item, table, bytes;
} na_sm90_shared;

NA_INLINE na_sm90_shared na_sm90_shared_of(int groups, int dim, int value_dim, int keys,
                                           int key_stages, int value_stages, int orders,
                                           int order_bytes, int table_words)
{
    na_sm90_shared at;
    at.query_bytes = na_sm90_bytes(NA_SM90_ROWS, dim);
    at.key_bytes = na_sm90_bytes(keys, dim);
    at.value_bytes = na_sm90_bytes(keys, value_dim);
    at.query = 0;
    at.key = groups * at.query_bytes;
    at.value = at.key + key_stages * at.key_bytes;
    at.note = at.value + value_stages * at.value_bytes;
    at.gate = at.note + key_stages * NA_SM90_NOTE_BYTES;
    at.item = na_sm90_items_at(at.gate + 16 * (groups + key_stages + value_stages + orders),
                               orders * order_bytes);
    at.order = at.item - orders * order_bytes;
    at.table = at.item + groups * NA_SM90_ITEM_WORDS * 4;
    at.bytes = at.table + groups * table_words * 4;
    return at;
}

#endif
