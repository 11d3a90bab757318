/* SPDX-License-Identifier: MIT
 * How a problem is cut for vector kernels, as tables made once per plan.
 *
 * The lanes of a vector are consecutive queries of the innermost axis (lane tile). A tile has up to
 * NA_ROWS rows of such lanes that see the same keys, so that a loaded key serves all of them: the
 * heads of a group that share a key head, times either map rows a dilation apart along axis 1
 * (upright) or lane tiles a whole number of dilations apart in one map row (across: 1-D maps, and
 * others whose upright parts would be packed too often).
 * Keys are packed by key rows of one part (a range of the innermost axis) into a ring of slots. A
 * span is a run of keys in one slot that the tile's rows [lo, hi) see. */
#ifndef NATTEN_CPU_TILES_H
#define NATTEN_CPU_TILES_H

#include <stdint.h>

#include "core/kernel.h"

/* Bounds: lanes of a vector, rows of a tile, keys of a span (so that a block of probabilities can
 * stay in the first-level cache). */
enum { NA_LANES = 16, NA_ROWS = 6, NA_RUN = 48 };

/* Where the keys of a tile's lanes lie in transposed memory, lane l at start[l]:
 * SHIFT start[l] = l; PERMUTE start[l] < lanes; BROADCAST start[l] = 0; SPLIT start[l] = l, but
 * from some lane on l + n; PERMUTE2 start[l] < 2 * lanes; GATHER anything. SLIDE is SHIFT for a run
 * of neighbours, which lie in two vectors: no tile has it, it is taken where loads would limit the
 * speed. */
enum { NA_SHIFT, NA_PERMUTE, NA_BROADCAST, NA_SPLIT, NA_PERMUTE2, NA_GATHER, NA_SLIDE, NA_MODES };

/* Up to `lanes` consecutive queries of the innermost axis, but for where they lie: most lane tiles
 * of a map are alike. Lanes that are no queries have start 0 (l for SHIFT). */
typedef struct na_lanes {
    int32_t count; /* lanes that are queries */
    int32_t keys;  /* most keys of a lane */
    int32_t mode;
    int32_t half;    /* 1: the half words suffice */
    int32_t masked;  /* 1: some lane has fewer keys than `keys` */
    int32_t uniform; /* 1: bias is the same in all lanes */
    int32_t spread;  /* the largest start of a lane that is a query */
    int32_t start[NA_LANES];
    int32_t limit[NA_LANES]; /* keys of the lane */
    /* Place of the lane's first key in the innermost axis of the rpb of the first head. */
    int32_t bias[NA_LANES];
    int32_t bias_low;                        /* the lowest of these, and how far from it they lie */
    int32_t bias_step[NA_LANES], bias_reach; /* and the farthest */
    /* Not 0: some lanes' entries are those of the next head, so much further on, and their steps
     * are counted from a vector there, if the farthest is in one. */
    int32_t bias_apart;
} na_lanes;

/* A lane tile. Its first query is its number times `lanes`, counted over the heads that lie side by
 * side: query x of one of them. */
typedef struct na_tile {
    int32_t base; /* the key all starts are counted from */
    int32_t kind; /* its lanes */
    int32_t head, x;
} na_tile;

/* Rows of a tile before heads are counted. */
typedef struct na_block {
    int32_t rows;
    int32_t index[NA_ROWS];  /* upright: query of axis 1; across: number of the lane tile */
    na_window y[NA_ROWS];    /* upright: of these queries, the first key local */
    int32_t offset[NA_ROWS]; /* across: keys between the first row's window start and this one's */
    int32_t keys;            /* across: keys from the first row's start to the last row's end */
} na_block;

/* A range of the innermost axis packed together. upright: the keys of the lane tiles [tile, end);
 * across: `width` keys, of which runs begin only in the first `cut`. */
typedef struct na_part {
    int32_t tile, end;
    int32_t first, width, cut;
} na_part;

/* What there is to choose about a geometry. */
typedef struct na_cut {
    int32_t rows; /* most rows of a tile */
    /* Across: keys of a part, long enough that the keys packed twice (a window's reach of lanes)
     * are few, short enough that a ring of parts slides. Upright: most queries of one, so that the
     * ring of key rows stays in the second-level cache. */
    int32_t part;
    int32_t across; /* -1: what shares more keys */
    int32_t planes; /* 0: never a ring of whole planes; 1: where it is small enough */
    /* Key heads side by side, if upright and in one part; divides their number. 0: what wastes the
     * fewest lanes. */
    int32_t beside;
    /* 1: what is packed next is fetched during other work; 0: only if the first of it turns out to
     * come from memory; -1: 0 if what is read fits in the last-level cache of a processor of
     * AMD, else 1. */
    int32_t ahead;
} na_cut;

enum { NA_PART = 512 };

typedef struct na_geometry {
    na_cut cut;
    int32_t lanes, half;
    int32_t across;
    /* Key heads whose rows are one long row to lanes and slots: query x of the one of number h is
     * query h * query_extent + x of it, and so with keys. Where a head's rows fill their vectors
     * badly (28 = 1.75 x 16), four of them fill seven. Each has its own borders: axis[2] is that of
     * one head. */
    int32_t beside;
    int64_t head_sets;    /* key heads by so many */
    int32_t bias_entries; /* of each head, if there are several */
    int32_t group;        /* query heads per key head */
    int32_t heads;        /* query heads of one tile */
    int32_t head_tiles;   /* tiles that take to cover a group */
    int32_t lane_tiles, blocks, parts;
    int32_t ring_z, ring_y, ring_part; /* slots of the ring: key rows of axes 0, 1; parts */
    int32_t planes;   /* 1: the ring holds whole planes of axes 1, 2, and tasks run along axis 1;
                         0: the key rows of one tile, and tasks run along axis 0 */
    int32_t *order_z; /* queries of axis 0 in the order of work: those a dilation apart together */
    int32_t width;    /* most keys of a part, with room for a vector beyond the last start */
    int32_t apart;    /* natural tokens from slot to slot: an odd number, or keys of neighbouring
                         rows would share few sets of the first-level cache */
    int32_t spread;   /* the largest start of any lane */
    int32_t spans;    /* most spans of a tile */
    int32_t key_rows; /* most key rows of a tile */
    int64_t slots;    /* of the ring, then those of the additional tokens */
    int64_t tasks;
    na_tile *tile;
    na_lanes *lane; /* the kinds of lane tiles */
    int32_t lane_kinds;
    na_block *block;
    na_part *part;
    natten_axis axis[3];
    int64_t additional;
    int64_t additional_slot; /* the first slot of additional tokens, geometry->width in each */
} na_geometry;

static inline int na_ceil_div(int a, int b) { return (a + b - 1) / b; }

/* The window of a local query, its first key local. */
static inline na_window na_local_window(const natten_axis *axis, int query)
{
    na_window window = na_window_of(na_axis_of(axis), (int)axis->query_origin + query);
    window.first -= (int)axis->key_origin;
    return window;
}

/* Entries of a head's position bias; 0: there is none. */
int64_t na_bias_entries(const natten_problem *problem);

/* Heads side by side of a cut: upright, and if their rows fit one part. */
static inline int32_t na_cut_beside(const natten_axis axis[3], int lanes, na_cut cut, int across)
{
    const int64_t tiles = (cut.beside * axis[2].query_extent + lanes - 1) / lanes;
    return !across && tiles * lanes <= cut.part ? cut.beside : 1;
}

/* Makes the tables: lanes of a vector, lanes of a half vector (0: none). NULL: no memory. */
na_geometry *na_geometry_make(const natten_problem *problem, int lanes, int half, na_cut cut);
void na_geometry_free(void *geometry);

/* Across: lane tiles from one row of a tile to the next, the fewest that are a whole number of
 * dilations. */
static inline int32_t na_tiles_apart(const na_geometry *geometry)
{
    int32_t a = geometry->lanes, b = (int32_t)geometry->axis[2].dilation;
    while (a) {
        const int32_t rest = b % a;
        b = a;
        a = rest;
    }
    return (int32_t)geometry->axis[2].dilation / b;
}

/* A unit of work: the tiles of one block. Tasks are numbered so that neighbours share packed keys.
 */
typedef struct na_work {
    int64_t batch, kv_head; /* kv_head: the first of those side by side */
    int32_t head;           /* first query head */
    int32_t heads;          /* query heads of its tiles */
    int32_t z, y;           /* query of axis 0; across: of axis 1 */
    int32_t part;           /* upright */
    int32_t rows; /* of its tiles: rows of the block times heads, the head running fastest */
    uint8_t row_block[NA_ROWS]; /* of each tile row: its row of the block */
    uint8_t row_head[NA_ROWS];  /* and which of the heads */
    const na_block *block;
} na_work;

na_work na_work_at(const na_geometry *geometry, int64_t task);

/* The query of axis 1 of tile row r. */
static inline int32_t na_work_query(const na_geometry *geometry, const na_work *work, int row)
{
    return geometry->across ? work->y : work->block->index[work->row_block[row]];
}

/* The query head of tile row r. */
static inline int32_t na_work_head(const na_work *work, int row)
{
    return work->head + work->row_head[row];
}

/* Across: keys between the starts of tile row 0's window and of tile row r's. */
static inline int32_t na_work_offset(const na_work *work, int row)
{
    return work->block->offset[work->row_block[row]];
}

/* Lanes [lane, end) of a lane tile: queries of one of the heads side by side, from x on. */
typedef struct na_piece {
    int32_t head, x, lane, end;
} na_piece;

#define NA_EACH_PIECE(piece, geometry, tile, count)                                                \
    for (na_piece piece = na_first_piece(geometry, tile, count); piece.lane < (count);             \
         piece = na_next_piece(geometry, piece, count))

/* The first one of a lane tile of `count` queries, and the one after another: there is one if its
 * lane is less than count. */
static inline na_piece na_first_piece(const na_geometry *geometry, int32_t tile, int32_t count)
{
    const na_tile *t = &geometry->tile[tile];
    return (na_piece){t->head, t->x, 0,
                      na_min(count, (int32_t)geometry->axis[2].query_extent - t->x)};
}

static inline na_piece na_next_piece(const na_geometry *geometry, na_piece piece, int32_t count)
{
    const int32_t extent = (int32_t)geometry->axis[2].query_extent;
    return (na_piece){piece.head + 1, 0, piece.end, na_min(count, piece.end + extent)};
}

/* The number of tile row r's lane tile; `tile` is the tile at hand (upright: part->tile <= tile <
 * end). */
static inline int32_t na_work_tile(const na_geometry *geometry, const na_work *work, int tile,
                                   int row)
{
    return geometry->across ? work->block->index[work->row_block[row]] : tile;
}

/* Lane tiles of a task: [first, end). Across there is one for all of them, 0. */
typedef struct na_tiles {
    int32_t first, end;
} na_tiles;

static inline na_tiles na_work_tiles(const na_geometry *geometry, const na_work *work)
{
    if (geometry->across)
        return (na_tiles){0, 1};
    return (na_tiles){geometry->part[work->part].tile, geometry->part[work->part].end};
}

/* Keys of a head in the slots of a part: keys [x, x + count) of its rows, from key `place` of the
 * part on. */
typedef struct na_keys {
    int32_t x, place, count;
} na_keys;

static inline na_keys na_keys_of(const na_geometry *geometry, const na_part *part, int head)
{
    const int extent = (int)geometry->axis[2].key_extent;
    return geometry->beside > 1 ? (na_keys){0, head * extent, extent}
                                : (na_keys){part->first, 0, part->width};
}

/* Keys of a row of slots, of all heads. */
static inline int64_t na_row_keys(const na_geometry *geometry)
{
    return geometry->beside * geometry->axis[2].key_extent;
}

static inline const na_lanes *na_tile_lanes(const na_geometry *geometry, int32_t tile)
{
    return geometry->lane + geometry->tile[tile].kind;
}

static inline const na_lanes *na_work_lanes(const na_geometry *geometry, const na_work *work,
                                            int tile, int row)
{
    return na_tile_lanes(geometry, na_work_tile(geometry, work, tile, row));
}

/* Lanes that are queries: of the rows of a tile, but for the last so many, which have fewer. (The
 * last lane tile of a map is the last one of its block.) */
typedef struct na_row_lanes {
    int32_t most, shorter, least;
} na_row_lanes;

static inline na_row_lanes na_lanes_of_rows(const na_geometry *geometry, const na_work *work,
                                            int tile)
{
    na_row_lanes lanes = {.most = na_work_lanes(geometry, work, tile, 0)->count};
    lanes.least =
        geometry->across ? na_work_lanes(geometry, work, tile, work->rows - 1)->count : lanes.most;
    lanes.shorter = lanes.least < lanes.most ? work->heads : 0;
    return lanes;
}

/* Those of tile row r of so many. */
static inline int na_lanes_of_row(na_row_lanes lanes, int rows, int row)
{
    return row < rows - lanes.shorter ? lanes.most : lanes.least;
}

/* A row of keys that rows [lo, hi) of the tiles see. */
typedef struct na_key_row {
    int32_t z, y; /* keys of axes 0, 1 */
    int32_t lo, hi;
    int64_t slot; /* of part 0; part p is at slot + p % ring_part */
} na_key_row;

/* The key rows of a task, at most geometry->key_rows; returns their number. `together`: those that
 * the same rows of the tiles see stand together, else those of one query of axis 0. */
int na_key_rows(const na_geometry *geometry, const na_work *work, int together, na_key_row *rows);

/* The parts a task's keys lie in. */
void na_work_parts(const na_geometry *geometry, const na_work *work, int *first, int *last);

/* The one of them after `part`, or what lies behind the last: a dilation longer than parts leaves
 * some out. */
int na_work_part_after(const na_geometry *geometry, const na_work *work, int part);

/* Packs what a slot is to hold: keys [part->first, + part->width) of the innermost axis, of key row
 * (z, y). */
typedef void (*na_pack)(void *context, int64_t slot, int32_t z, int32_t y, const na_part *part);

/* Has every slot a task needs packed, except those that hold it already by their tags: one for each
 * slot before additional_slot, -1 at first. */
void na_ring_fill(const na_geometry *geometry, const na_work *work, const na_key_row *rows,
                  int row_count, int64_t *tags, na_pack pack, void *context);

/* Calls `pack` likewise, but notes nothing: says what a later task will find missing. */
void na_ring_missing(const na_geometry *geometry, const na_work *work, const na_key_row *rows,
                     int row_count, const int64_t *tags, na_pack pack, void *context);

/* A run of keys, or of additional tokens (z = -1). */
typedef struct na_span {
    int64_t slot;   /* in the ring; additional tokens: after the ring's slots */
    int64_t token;  /* the first key (of a lane of start 0): slot * geometry->apart + x */
    int32_t x;      /* the same, counted inside the slot */
    int32_t key;    /* the same, counted in the tensor */
    int32_t step;   /* from one key to the next */
    int32_t len;    /* keys */
    int32_t lo, hi; /* rows of the tile that see it */
    int32_t first;  /* place of the first key in the run of all the tile's keys of this row */
    int32_t mode;
    int32_t spread;       /* the largest start of a lane */
    int32_t z, y;         /* keys of axes 0, 1; additional: -1, number of the first token */
    int32_t limit_step;   /* between the limits of the tile's rows; upright 0: all are alike */
    const int32_t *start; /* of lanes */
    const int32_t *limit; /* `first` counts on to it; NULL: all lanes see all keys */
} na_span;

/* The spans of one tile, at most geometry->spans, in the order of their keys, additional tokens
 * last; `together`: those that the same rows of the tile see stand together. Across, `tile` is not
 * looked at. Writes the limits that the spans point to. */
int na_spans(const na_geometry *geometry, const na_work *work, int tile, int together,
             const na_key_row *rows, int row_count, na_span *spans,
             int32_t limits[NA_ROWS][NA_LANES]);

#endif
