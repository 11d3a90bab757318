/* SPDX-License-Identifier: MIT */
#include "cpu/bands.h"

#include <stdlib.h>
#include <string.h>

/* Bands of all units that suffice for any machine of the usual size; the least work of a band,
 * enough to hide what starting it costs. */
enum { ENOUGH = 16, LEAST = 1 << 20 };

/* Most places of cells in bands: tables of some 80 MB. */
static const int64_t most_places = (int64_t)1 << 24;

/* Keys of a cell where key rows are worked on in parts. */
enum { CELL = 512 };

/* What is needed to go through the bands of a unit. */
typedef struct walk {
    int64_t *held;       /* what each slot of the ring holds, -1: nothing yet */
    uint32_t *more;      /* of each cell: how many more slots hold it than the cell before; one that
                            holds a piece of a cell counts twice */
    unsigned char *late; /* of each cell: 1: a band before adds to it only when all are done */
    na_key_row *rows;
    int32_t z, y, first, last; /* of the band's task before: its queries of axes 0, 1; its parts */
} walk;

/* Notes the cells that a part of a key row adds to: of all but those at its ends it has all keys.
 */
static void add_part(const na_bands *b, const na_geometry *g, int64_t number, int part,
                     uint32_t *more)
{
    const int64_t from = g->part[part].first, to = from + g->part[part].width;
    const int64_t first = from / b->cell, last = (to - 1) / b->cell;
    const int ends = to == na_row_keys(g) || to % b->cell == 0;
    more += number * b->row_cells;
    more[first]++;
    more[last + 1]--;
    if (from % b->cell || (first == last && !ends)) {
        more[first]++;
        more[first + 1]--;
    }
    if (first != last && !ends) {
        more[last]++;
        more[last + 1]--;
    }
}

/* Notes what a slot holds when a task finds its key row there. */
static void touch(const na_bands *b, const na_geometry *g, const na_key_row *row, int part,
                  const walk *w)
{
    const int64_t number = row->z * g->axis[1].key_extent + row->y;
    const int64_t slot = row->slot + part % g->ring_part, holds = number * g->parts + part;
    if (w->held[slot] == holds)
        return;
    w->held[slot] = holds;
    add_part(b, g, number, part, w->more);
}

/* Notes what slots hold for a task. Where it has the key rows of the one before, so do the slots
 * hold the parts of that: of a long row they are too many to look at for every task. (Those that
 * dilations leave out are not the same for all.) */
static void touch_all(const na_bands *b, const na_geometry *g, int64_t task, walk *w)
{
    const na_work work = na_work_at(g, task);
    const int same =
        g->across && g->axis[2].dilation <= g->part[0].cut && work.z == w->z && work.y == w->y;
    int first, last;
    na_work_parts(g, &work, &first, &last);
    const int count = na_key_rows(g, &work, 0, w->rows);
    for (int i = 0; i < count; i++)
        for (int p = first; p <= last; p = na_work_part_after(g, &work, p))
            if (same && w->first <= p && p <= w->last)
                p = w->last;
            else
                touch(b, g, &w->rows[i], p, w);
    w->z = work.z;
    w->y = work.y;
    w->first = first;
    w->last = last;
}

/* Gives every band its cells. */
static void make_places(na_bands *b, const na_geometry *g, walk *w)
{
    b->own = 0;
    memset(w->late, 0, (size_t)b->cells);
    for (int64_t c = 0; c < b->cells; c++)
        b->owner[c] = -1;
    for (int32_t band = 0; band < b->count; band++) {
        int32_t *place = b->place + band * b->cells;
        uint32_t slots = 0;
        memset(w->held, -1, (size_t)g->additional_slot * sizeof *w->held);
        memset(w->more, 0, (size_t)(b->cells + 1) * sizeof *w->more);
        w->z = -1;
        for (int64_t t = na_band_task(b, 0, band); t < na_band_task(b, 0, band + 1); t++)
            touch_all(b, g, t, w);
        for (int64_t c = 0; c < b->cells; c++) {
            slots += w->more[c];
            place[c] = !slots ? -2 : b->owner[c] >= 0 ? (int32_t)b->own++ : -1;
            if (slots && b->owner[c] < 0)
                b->owner[c] = band;
            else if (slots > 1)
                w->late[c] = 1;
            b->once[band * b->cells + c] = slots == 1 && !w->late[c];
        }
    }
    /* Cells that nobody touches are the first band's, which sets them to zero. */
    for (int64_t c = 0; c < b->cells; c++)
        if (b->owner[c] < 0)
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

/* Tasks that are better not parted: those of the axis that tasks run along. A band that began
 * within would share a whole block's keys with the one before, not just a window's. 1: too few are
 * left. */
static int64_t grain_of(const na_geometry *g, int64_t unit_tasks, int64_t bands)
{
    const int64_t along = g->across || g->planes ? g->blocks : g->axis[0].query_extent;
    const int64_t grain = along * g->head_tiles;
    return unit_tasks / grain >= 2 * bands ? grain : 1;
}

na_bands *na_bands_make(const na_geometry *g, int64_t units, int64_t products)
{
    na_bands *b = calloc(1, sizeof *b);
    if (!b)
        return NULL;
    const int64_t extent = na_row_keys(g);
    b->units = units;
    b->unit_tasks = g->tasks / b->units;
    b->cell = g->parts == 1 ? (int32_t)g->axis[2].key_extent : CELL;
    b->row_cells = (int32_t)((extent + b->cell - 1) / b->cell);
    b->cells = g->axis[0].key_extent * g->axis[1].key_extent * b->row_cells;
    int64_t count = (ENOUGH + b->units - 1) / b->units;
    count = count < products / LEAST ? count : products / LEAST;
    count = count < b->unit_tasks ? count : b->unit_tasks;
    if (count > most_places / b->cells)
        count = most_places / b->cells;
    b->count = (int32_t)(count > 1 ? count : 1);
    b->grain = grain_of(g, b->unit_tasks, b->count);
    if (b->count == 1)
        return b;
    const size_t cells = (size_t)b->cells, places = cells * (size_t)b->count;
    walk w = {.held = malloc((size_t)g->additional_slot * sizeof *w.held),
              .more = malloc((cells + 1) * sizeof *w.more),
              .late = malloc(cells),
              .rows = malloc((size_t)g->key_rows * sizeof *w.rows)};
    b->place = malloc(places * sizeof *b->place);
    b->once = malloc(places);
    b->owner = malloc(cells * sizeof *b->owner);
    const int enough = w.held && w.more && w.late && w.rows && b->place && b->once && b->owner;
    for (; enough; b->count--) {
        make_places(b, g, &w);
        if (acceptable(b, g))
            break;
    }
    free(w.held);
    free(w.more);
    free(w.late);
    free(w.rows);
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
    free(b->once);
    free(b->owner);
    free(b);
}
