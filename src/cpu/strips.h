/* SPDX-License-Identifier: MIT
 * How a problem is cut for kernels that multiply dense blocks, as tables made once per plan.
 *
 * 32 queries (a box) are multiplied with all keys that some of them see. The keys of neighbouring
 * boxes along one axis overlap, so these boxes form a strip: its keys are packed once, row by row,
 * where a row holds the keys of the other two axes at one place of the strip's axis. A box sees a
 * run of rows. Tokens a dilation apart have strips of their own.
 * Which of the keys a query of a box does not see is written down as bits (a mask); most boxes have
 * the same ones. */
#ifndef NATTEN_CPU_STRIPS_H
#define NATTEN_CPU_STRIPS_H

#include <stdint.h>

#include "core/kernel.h"

/* Queries of a box; keys that are multiplied at once; keys of half a block. */
enum { NA_BOX = 32, NA_BLOCK = 32, NA_HALF = 16 };

/* Queries of one axis a dilation apart, at most as many as a box has on that axis, and the keys
 * they see, likewise apart. All places are local. */
typedef struct na_stretch {
    int32_t query, queries; /* the first one, their number */
    int32_t key, keys;
    int32_t kind;
} na_stretch;

/* What is alike in most stretches: the window of each query, its first key counted in keys of the
 * stretch. */
typedef struct na_windows {
    int32_t queries, keys;
    int32_t uses; /* stretches of this kind */
    int32_t first[NA_BOX], count[NA_BOX];
} na_windows;

typedef struct na_stretches {
    int32_t cut; /* queries of a box on this axis, a power of two */
    int32_t dilation;
    int32_t count, kinds;
    na_stretch *at;
    na_windows *kind;
} na_stretches;

/* Stretches [begin, end) of a strip's axis that are done with one packing of keys. */
typedef struct na_section {
    int32_t begin, end;
    int32_t key, rows;
} na_section;

/* Which keys the queries of a box see, in blocks of 32 keys from its first one on. */
typedef struct na_mask {
    int32_t blocks;
    int32_t half_lo[2], half_hi[2]; /* blocks that some of the first or last 16 queries see */
    int32_t lo[NA_BOX], hi[NA_BOX]; /* blocks that a query sees; lo = hi: no query */
    int64_t words;                  /* [query][block][2]: place of the first in na_strips */
} na_mask;

typedef struct na_strips {
    int32_t axis, across[2]; /* of the strips; the other two */
    na_stretches axes[3];
    int32_t sections;
    na_section *section;
    int32_t *mask_of; /* by kinds of stretches and the first key's place in half a block */
    int32_t masks;
    na_mask *mask;
    uint16_t *words;
    int64_t keys;    /* most of a section, padded to whole blocks */
    int64_t strips;  /* of a head, sections counted: tasks of a head */
    double computed; /* pairs of a query and a key of a head that are multiplied */
    double useful;   /* those of them that count */
} na_strips;

/* Why there are no tables. */
enum { NA_STRIPS_MADE, NA_STRIPS_NO_MEMORY, NA_STRIPS_TOO_LARGE };

/* Queries of a box on each axis: 32 in all. */
typedef struct na_box_cut {
    int32_t queries[3];
    double cost; /* an estimate, to compare with others */
} na_box_cut;

enum { NA_BOX_CUTS = 6 };

/* The cuts that seem best, best first; returns their number. */
int na_box_cuts(const natten_problem *problem, na_box_cut cuts[NA_BOX_CUTS]);

/* Makes the tables: so many heads are worked on, and a packed key takes so many bytes. */
int na_strips_make(na_strips *s, const natten_problem *problem, const na_box_cut *cut,
                   int64_t heads, int64_t key_bytes);
void na_strips_free(na_strips *s);

/* The share of products that count. */
double na_strips_useful(const na_strips *s);

typedef struct na_box {
    int64_t head;              /* a number below `heads` */
    const na_stretch *axis[3]; /* its queries */
    const na_section *section;
    const na_mask *mask;
    int32_t across;        /* keys of the second of the other axes */
    int32_t width, length; /* keys of a row of the strip; with padding */
    int32_t start;         /* the first key it is multiplied with, counted in the section */
} na_box;

/* Box number n of a task; returns 0 past the last one. */
int na_box_at(const na_strips *s, int64_t task, int n, na_box *box);

#endif
