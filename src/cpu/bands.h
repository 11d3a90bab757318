/* SPDX-License-Identifier: MIT
 * How sums over queries (the gradients of keys, values, additional tokens and the bias) are shared
 * out. The tasks of one batch and of the key heads side by
 * side are a unit; units are cut into bands by sizes alone, so
 * that sums are taken in one order for any number of workers. Key rows are cut into cells: the
 * first band that touches a cell adds to the result itself, each later one to a cell of its own,
 * and these are added in the order of bands when all bands are done. */
#ifndef NATTEN_CPU_BANDS_H
#define NATTEN_CPU_BANDS_H

#include "cpu/tiles.h"

typedef struct na_bands {
    int32_t count; /* bands of a unit */
    int64_t units;
    int64_t unit_tasks;
    int64_t grain;     /* tasks that are in one band together */
    int32_t cell;      /* keys of a cell, all of one head; the last of a row may have fewer */
    int32_t row_cells; /* cells of a key row */
    int64_t cells;     /* of a unit */
    int64_t own;       /* cells that are not of the result, of a unit */
    int32_t *place;    /* [band][cell]: number of the band's own cell; -1: the result's; -2: none */
    int32_t *owner;    /* of each cell: the first band that touches it */
    unsigned char *once; /* [band][cell]: 1: the band adds to the cell once, to all of it, and so do
                            those between the first and this one */
} na_bands;

/* products: query-key pairs times channels of a unit, which its work is measured by. NULL: no
 * memory. */
na_bands *na_bands_make(const na_geometry *geometry, int64_t units, int64_t products);
void na_bands_free(na_bands *bands);

/* The first task of a band; band = count: the end. */
static inline int64_t na_band_task(const na_bands *bands, int64_t unit, int32_t band)
{
    const int64_t grains = bands->unit_tasks / bands->grain;
    return unit * bands->unit_tasks + grains * band / bands->count * bands->grain;
}

/* Where a band sums up a cell: the number of its own cell; -1: the result's, -2: nowhere. first: of
 * the bands that its worker has done one after another up to this one. If all earlier ones that add
 * to the cell are among these, the band adds to the result at once: one sum more is the same as the
 * sum of its own cell, and cheaper. */
static inline int32_t na_band_place(const na_bands *bands, int32_t band, int64_t cell,
                                    int32_t first)
{
    if (!bands->place)
        return -1;
    const int32_t place = bands->place[band * bands->cells + cell];
    const int at_once = bands->once[band * bands->cells + cell] && bands->owner[cell] >= first;
    return place >= 0 && at_once ? -1 : place;
}

/* Whether the band after this one adds to a cell, too. */
static inline int na_band_shares(const na_bands *bands, int32_t band, int64_t cell)
{
    return bands->place && band + 1 < bands->count &&
           bands->place[(band + 1) * bands->cells + cell] != -2;
}

#endif
