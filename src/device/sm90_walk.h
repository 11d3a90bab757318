/* SPDX-License-Identifier: MIT
 * What the forward and the backward kernels of Hopper are called with alike. A block works on
 * **residents**, boxes of tokens that stay; tiles of **visitors**, the tokens that attend to them
 * or are attended to, stream past. Residents are queries and visitors keys, or the other way
 * round. */
#ifndef NATTEN_DEVICE_SM90_WALK_H
#define NATTEN_DEVICE_SM90_WALK_H

#include "core/window.h"
#include "device/words/tensor_map.h"
#include "natten.h"

enum {
    NA_SM90_ROWS = 64,       /* of the tile of residents that a warpgroup works on */
    NA_SM90_COLUMNS = 64,    /* of a piece of a tile: 128 bytes, as wide as boxes get */
    NA_SM90_NOTE_BYTES = 16, /* what the producer writes about a tile of visitors */
    NA_SM90_ITEM_WORDS = 12  /* of an order, and of a warpgroup's own copy */
};

typedef struct na_sm90_axis {
    na_axis rule;       /* of the whole axis */
    int origin, extent; /* of residents */
    int visitor_origin, visitor_extent;
    int tiles; /* tiles of residents of one dilation group, at most */
} na_sm90_axis;

typedef struct na_sm90_walk {
    na_sm90_axis axis[3];
    int *counter;      /* 0 at launch; NULL where every block has one item at most */
    int flat;          /* the outermost axis of boxes is the batch, not axis 0 */
    int heads;         /* of residents, divided by those packed into a tile */
    int share;         /* how many heads of queries, divided so, share a head of keys */
    int items, raster; /* work items, and how many tiles of axis 1 follow each other */
    int extra_tokens;  /* additional tokens, which visit like keys */
} na_sm90_walk;

/* A relative position bias: entries, of the first head where query and key are as far apart as they
 * get, the query behind; how far apart heads and places along an axis are. */
typedef struct na_sm90_bias {
    const uint16_t *entries;
    int head, step[3];
} na_sm90_bias;

/* Words of shared memory that a warpgroup needs for it, behind its mask table: where tiles begin;
 * of the backward so many sums of entries (-1: they are elsewhere), and a tile of gradients. */
#define NA_SM90_BIAS_WORDS(positions, entries, visitors)                                           \
    (((positions) ? 3 : 0) + ((entries) > 0 ? (entries) : 0) +                                     \
     ((entries) ? NA_SM90_ROWS * ((visitors) + 1) : 0))

/* Bytes of an order (sm90_scout.h): a work item, where tiles begin, and both ends of the visitors
 * of each resident along each axis; where there are no mask tables to be made, of the first and the
 * last one. `rows`: the sizes of a warpgroup's box of residents along all axes, added up. */
NA_INLINE int na_sm90_order_bytes(int groups, int rows, int positions)
{
    return (NA_SM90_ITEM_WORDS + 3) * 4 + 2 * groups * (positions ? 2 * rows : 4 * 4);
}

/* Where items lie, which follow orders that may begin at `free`: at a multiple of 16 bytes, as
 * compilers load so many at a time, and would load a neighbor's with them. */
NA_INLINE int na_sm90_items_at(int free, int bytes_of_orders)
{
    return (free + bytes_of_orders + 15) / 16 * 16;
}

/* Bytes of so many tokens' channels in shared memory. */
NA_INLINE int na_sm90_bytes(int tokens, int channels)
{
    return tokens * 128 * ((channels + NA_SM90_COLUMNS - 1) / NA_SM90_COLUMNS);
}

#endif
