/* SPDX-License-Identifier: MIT
 * Who adds to which cell in a backward, against the definition: task by task, and of each task key
 * by key. */
#include <stdlib.h>
#include <string.h>

#include "core/problem.h"
#include "cpu/bands.h"
#include "problem_string.h"
#include "unit.h"

/* Much work, so that only tasks and cells limit the number of bands. */
static const int64_t products = (int64_t)1 << 40;

/* Counts, for each key of a unit, how many times a slot comes to hold it in a band. */
static void count_held(const na_geometry *g, const na_bands *b, int band, int *held)
{
    const int64_t extent = na_row_keys(g);
    int64_t *tags = malloc((size_t)g->additional_slot * sizeof *tags);
    na_key_row *rows = malloc((size_t)g->key_rows * sizeof *rows);
    memset(tags, -1, (size_t)g->additional_slot * sizeof *tags);
    memset(held, 0,
           (size_t)(g->axis[0].key_extent * g->axis[1].key_extent * extent) * sizeof *held);
    for (int64_t t = na_band_task(b, 0, band); t < na_band_task(b, 0, band + 1); t++) {
        const na_work work = na_work_at(g, t);
        int first, last;
        na_work_parts(g, &work, &first, &last);
        const int count = na_key_rows(g, &work, 0, rows);
        for (int i = 0; i < count; i++)
            for (int p = first; p <= last; p = na_work_part_after(g, &work, p)) {
                const int64_t row = rows[i].z * g->axis[1].key_extent + rows[i].y;
                int64_t *tag = &tags[rows[i].slot + p % g->ring_part];
                if (*tag == row * g->parts + p)
                    continue;
                *tag = row * g->parts + p;
                for (int x = 0; x < g->part[p].width; x++)
                    held[row * extent + g->part[p].first + x]++;
            }
    }
    free(tags);
    free(rows);
}

/* What the band is to do with a cell, from the times its keys were held and from what earlier bands
 * did; `late`: whether one of these adds to it only when all are done. */
static int agrees(const na_geometry *g, const na_bands *b, int band, int64_t cell, const int *held,
                  unsigned char *late, int64_t *own)
{
    const int64_t extent = na_row_keys(g), x = cell % b->row_cells * b->cell;
    const int64_t row = cell / b->row_cells, left = extent - x;
    int least = INT32_MAX, most = 0;
    for (int64_t i = 0; i < (left < b->cell ? left : b->cell); i++) {
        const int times = held[row * extent + x + i];
        least = times < least ? times : least;
        most = times > most ? times : most;
    }
    const int32_t place = b->place[band * b->cells + cell], owner = b->owner[cell];
    const int once = b->once[band * b->cells + cell];
    if (!most)
        return place == (band || owner >= 0 ? -2 : -1) && !once;
    const int whole = least == 1 && most == 1;
    if (owner == band)
        return place == -1 && once == whole;
    late[cell] |= !whole;
    return owner >= 0 && owner < band && place == (*own)++ && once == (whole && !late[cell]);
}

static void test_cut(const natten_problem *p, const char *text, na_cut cut)
{
    na_geometry *g = na_geometry_make(p, NA_LANES, NA_LANES / 2, cut);
    na_bands *b = na_bands_make(g, p->batch * g->head_sets, products);
    const int64_t keys = g->axis[0].key_extent * g->axis[1].key_extent * na_row_keys(g);
    int *held = malloc((size_t)keys * sizeof *held);
    unsigned char *late = calloc((size_t)b->cells, 1);
    int64_t own = 0;
    for (int band = 0; b->count > 1 && band < b->count; band++) {
        count_held(g, b, band, held);
        for (int64_t c = 0; c < b->cells; c++)
            if (!agrees(g, b, band, c, held, late, &own))
                unit_fail("%s, %s: band %d of %d, cell %d", text, g->across ? "across" : "upright",
                          band, b->count, (int)c);
    }
    CHECK(own == b->own);
    free(held);
    free(late);
    na_bands_free(b);
    na_geometry_free(g);
}

static void test_text(const char *text)
{
    test_problem parsed;
    natten_problem problem, padded;
    const char *wrong = problem_parse(text, &parsed);
    if (wrong)
        unit_fail("%s: %s", text, wrong);
    else if (problem_of_op(&parsed, NATTEN_BACKWARD, &problem) &&
             na_problem_check(&problem, &padded) == NATTEN_OK)
        for (int i = 0; i < 6; i++) {
            const int part = i / 2 == 1 ? NA_PART / 8 : NA_PART;
            const int beside = i / 2 == 2 ? (int)padded.kv_heads : 1;
            test_cut(&padded, text, (na_cut){6, part, i % 2, 1, beside, 0});
        }
}

int main(void)
{
    const char *const texts[] = {
        "b1h1d8_20000_w3_d5000",    "b1h1d8_9000_w3000",        "b1h1d8_9000_w9000",
        "b1h2d8_5000_w65_d7_c1",    "b1h1d8_3000_w1025_s512",   "b1h4d8_4000_w301_hk1",
        "b2h1d8_7x1500_w3x33_d1x9", "b1h1d8_40x40_w13x13_s3x2", "b1h1d8_5x6x700_w3x5x129_c100"};
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++) {
        unit_test(texts[i]);
        test_text(texts[i]);
    }
    unit_test("random problems");
    uint64_t random = 1;
    for (int i = 0; i < 300; i++) {
        char text[256];
        problem_random(&random, text, sizeof text);
        test_text(text);
    }
    return unit_end("test_bands");
}
