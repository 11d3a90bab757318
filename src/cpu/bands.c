/* SPDX-License-Identifier: MIT */
#include "cpu/bands.h"

#include <stdlib.h>
#include <string.h>

/* Bands of all units that suffice for any machine of the usual size; the least work of a band,
 * enough to hide what starting it costs. */
enum { ENOUGH = 16, LEAST = 1 << 20 };

/* Keys of a cell where key rows are worked on in parts. */
enum { CELL = 512 };

static void touch(const na_bands *b, const na_geometry *g, const na_work *work,
                  const na_key_row *row, unsigned char *touched)
{
    int first, last;
    na_work_parts(g, work, &first, &last);
    const int64_t cells = (row->z * g->axis[1].key_extent + row->y) * b->row_cells;
    const int from = g->part[first].first, to = g->part[last].first + g->part[last].width;
    for (int i = from / b->cell; i <= (to - 1) / b->cell; i++)
        touched[cells + i] = 1;
}

/* Gives every band its cells. `touched` has room for a unit's cells, `rows` for a task's. */
static void make_places(na_bands *b, const na_geometry *g, unsigned char *touched, na_key_row *rows)
{
    unsigned char *before = touched + b->cells;
    memset(before, 0, (size_t)b->cells);
    b->own = 0;
    for (int32_t band = 0; band < b->count; band++) {
        int32_t *place = b->place + band * b->cells;
        memset(touched, 0, (size_t)b->cells);
        for (int64_t t = na_band_task(b, 0, band); t < na_band_task(b, 0, band + 1); t++) {
            na_work work = na_work_at(g, t);
            int count = na_key_rows(g, &work, rows);
            for (int i = 0; i < count; i++)
                touch(b, g, &work, &rows[i], touched);
        }
        for (int64_t c = 0; c < b->cells; c++) {
            place[c] = !touched[c] ? -2 : before[c] ? (int32_t)b->own++ : -1;
            before[c] |= touched[c];
        }
    }
    /* Cells that nobody touches are the first band's, which sets them to zero. */
    for (int64_t c = 0; c < b->cells; c++)
        if (!before[c])
            b->place[c] = -1;
}

/* Cells of one's own cost time to add up, little where windows are large, and memory. */
static int acceptable(const na_bands *b, const na_geometry *g)
{
    const double window =
        (double)g->axis[0].window * (double)g->axis[1].window * (double)g->axis[2].window;
    const double more = (double)b->own / (double)b->cells;
    return b->count == 1 || (more * 100 <= window && more <= 4);
}

na_bands *na_bands_make(const na_geometry *g, int64_t units, int64_t products)
{
    na_bands *b = calloc(1, sizeof *b);
    if (!b)
        return NULL;
    const int64_t extent = g->axis[2].key_extent;
    b->units = units;
    b->unit_tasks = g->tasks / b->units;
    b->cell = g->parts == 1 ? (int32_t)extent : CELL;
    b->row_cells = (int32_t)((extent + b->cell - 1) / b->cell);
    b->cells = g->axis[0].key_extent * g->axis[1].key_extent * b->row_cells;
    int64_t count = (ENOUGH + b->units - 1) / b->units;
    count = count < products / LEAST ? count : products / LEAST;
    count = count < b->unit_tasks ? count : b->unit_tasks;
    b->count = (int32_t)(count > 1 ? count : 1);
    if (b->count == 1)
        return b;
    unsigned char *touched = malloc(2 * (size_t)b->cells);
    na_key_row *rows = malloc((size_t)g->key_rows * sizeof *rows);
    b->place = malloc((size_t)b->cells * (size_t)b->count * sizeof *b->place);
    const int enough = touched && rows && b->place;
    for (; enough; b->count--) {
        make_places(b, g, touched, rows);
        if (acceptable(b, g))
            break;
    }
    free(touched);
    free(rows);
    if (enough)
        return b;
    na_bands_free(b);
    return NULL;
}

void na_bands_free(na_bands *b)
{
    if (!b)
        return;
    free(b->place);
    free(b);
}
