/* SPDX-License-Identifier: MIT
 * What the kernel of sm90_forward.cu is called with, and where things lie in its shared memory. */
#ifndef NATTEN_DEVICE_SM90_FORWARD_H
#define NATTEN_DEVICE_SM90_FORWARD_H

#include "core/window.h"
#include "device/words/tensor_map.h"
#include "natten.h"

enum {
    NA_SM90_ROWS = 64,       /* of the tile of queries that a warpgroup works on */
    NA_SM90_COLUMNS = 64,    /* of a piece of a tile: 128 bytes, as wide as boxes get */
    NA_SM90_NOTE_BYTES = 64, /* what the producer writes about a tile of keys */
    NA_SM90_ITEM_WORDS = 12  /* of a note, and of a warpgroup's own copy */
};

typedef struct na_sm90_axis {
    na_axis rule; /* of the whole axis */
    int query_origin, query_extent, key_origin;
    int tiles; /* tiles of queries of one dilation group, at most */
} na_sm90_axis;

typedef struct na_sm90_forward {
    /* Axes from the innermost: channel, head, axis 2, axis 1, then axis 0, or the batch if `flat`.
     * Of additional tokens: channel, head, token, nothing, batch. */
    na_tensor_map query, key, value, extra_key, extra_value;
    na_sm90_axis axis[3];
    natten_layout out_layout, lse_layout;
    void *out;
    float *lse;   /* NULL: not wanted */
    int *counter; /* 0 at launch; NULL where every block has one item at most */
    int flat;
    int heads;         /* of queries, divided by those packed into a tile */
    int kv_share;      /* of these, how many share a head of keys */
    int items, raster; /* work items, and how many tiles of axis 1 follow each other */
    int extra_tokens;
    float scale_log2; /* scale, for powers of two */
    float slack;      /* by how much a score may exceed the reference maximum of its row */
} na_sm90_forward;

/* Offsets in bytes. */
typedef struct na_sm90_shared {
    int query_bytes, key_bytes, value_bytes; /* of one warpgroup's tile, one stage's tiles */
    int query, key, value, note, gate, item, table, bytes;
} na_sm90_shared;

NA_INLINE na_sm90_shared na_sm90_shared_of(int groups, int dim, int value_dim, int keys,
                                           int key_stages, int value_stages, int table_words)
{
    na_sm90_shared at;
    at.query_bytes = NA_SM90_ROWS * 128 * ((dim + NA_SM90_COLUMNS - 1) / NA_SM90_COLUMNS);
    at.key_bytes = keys * 128 * ((dim + NA_SM90_COLUMNS - 1) / NA_SM90_COLUMNS);
    at.value_bytes = keys * 128 * ((value_dim + NA_SM90_COLUMNS - 1) / NA_SM90_COLUMNS);
    at.query = 0;
    at.key = groups * at.query_bytes;
    at.value = at.key + key_stages * at.key_bytes;
    at.note = at.value + value_stages * at.value_bytes;
    at.gate = at.note + key_stages * NA_SM90_NOTE_BYTES;
    at.item = at.gate + 16 * (groups + key_stages + value_stages);
    at.table = at.item + groups * NA_SM90_ITEM_WORDS * 4;
    at.bytes = at.table + groups * table_words * 4;
    return at;
}

#endif
