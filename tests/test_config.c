/* SPDX-License-Identifier: MIT
 * The planner of the Hopper kernels: what it chooses for the problems people run, held
 * against waste measured or computed elsewhere, and the sums it is made from, held against counting
 * pair by pair. */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "core/problem.h"
#include "cuda/config.h"
#include "cuda/sm90.h"
#include "device/sm90_forward.h"
#include "problem_string.h"
#include "unit.h"

static const na_device h100 = {.major = 9, .multiprocessors = 132, .shared_memory = 232448};

static int plan(const char *text, na_sm90_what what, natten_problem *p, na_sm90_config *c)
{
    c->gives = 3;
    test_problem parsed;
    natten_problem problem;
    const char *wrong = problem_parse(text, &parsed);
    if (wrong || !problem_of_op(&parsed, NATTEN_FORWARD, &problem) ||
        na_problem_check(&problem, p) != NATTEN_OK) {
        printf("%s: %s\n", text, wrong ? wrong : natten_last_error());
        return 0;
    }
    return na_sm90_config_choose(p, &h100, what, 0, c);
}

static void show(const char *text, const na_sm90_config *c)
{
    static const char *const names[] = {"forward", "d_query", "d_key"};
    printf(
        "%-44s %s: %d of %dx%dx%d pack %d, axis %d; past %dx%dx%d%s, stages %d + %d, waste %.3f, "
        "masked %.0f%%, %.3f ms\n",
        text, names[c->what], c->groups, c->sub[0], c->sub[1], c->sub[2], c->pack, c->stack,
        c->tile[0], c->tile[1], c->tile[2], c->halves ? " halves" : "", c->stages[0], c->stages[1],
        c->waste, 100 * c->masked, 1e3 * c->seconds);
}

/* Waste: computed products over those of the windows, at most. For large windows the bounds are
 * what an exhaustive search over boxes of 64 queries and unaligned tiles finds. For small ones the
 * planner gives some waste away (4.57 of 56x56 would be the least) for fewer, larger items. */
static void test_choices(void)
{
    static const struct {
        const char *text;
        double waste;
        int pack, groups;
    } table[] = {
        {"b1h24d128_256x256_w80x80_bf16", 1.143, 1, 3},
        {"b1h24d128_256x256_w80x80_s16x16_bf16", 1.05, 1, 3},
        {"b1h24d128_256x256_w80x80_hk3_bf16", 1.143, 8, 3},
        {"b1h24d128_256x256_w80x80_c11_bf16", 1.21, 1, 3},
        {"b1h24d128_30x48x80_w18x24x24_bf16", 1.399, 1, 3},
        {"b1h24d128_30x48x80_w18x24x24_c100_bf16", 1.49, 1, 3},
        {"b1h24d128_30x48x80_w18x24x24_s16x8x8_bf16", 1.2, 1, 3},
        {"b1h24d128_30x48x80_w18x24x24_hk6_bf16", 1.3, 4, 3},
        {"b1h24d128_32768_w2048_bf16", 1.06, 1, 3},
        {"b1h24d128_32768_w2048_c1_bf16", 1.063, 1, 3},
        {"b1h24d128_16384_w16384_bf16", 1.02, 1, 3},
        {"b128h4d32_56x56_w7x7_bf16", 5.23, 1, 0},
        {"b128h4d32_56x56_w7x7_d4x4_bf16", 4.48, 1, 0},
        {"b128h4d32_56x56_w7x7_d8x8_bf16", 1.72, 1, 0},
        {"b4h16d64_128x128_w13x13_bf16", 2.37, 1, 0},
        {"b1h8d64_16x56x56_w7x7x7_bf16", 2.68, 1, 0},
    };
    for (size_t i = 0; i < sizeof table / sizeof *table; i++) {
        natten_problem p;
        na_sm90_config c;
        CHECK(plan(table[i].text, NA_SM90_FORWARD, &p, &c));
        show(table[i].text, &c);
        CHECK(c.waste <= table[i].waste);
        CHECK(c.waste >= 0.999);
        CHECK(c.pack == table[i].pack);
        CHECK(table[i].groups == 0 || c.groups == table[i].groups);
        CHECK(c.sub[0] * c.sub[1] * c.sub[2] * c.pack == NA_SM90_ROWS);
        CHECK(na_sm90_visitors(&c) % 16 == 0 && c.stages[0] >= 2 && c.stages[1] >= 2);
        CHECK(c.shared_bytes <= h100.shared_memory);
    }
}

/* As sketches of the kernels had it on an H100, with 2 warpgroups and the fastest of their tiles.
 */
static void test_backward_choices(void)
{
    static const struct {
        const char *text;
        double d_query, d_key;
        int visitors; /* of a tile of queries */
    } table[] = {
        {"b1h24d128_256x256_w80x80_bf16", 1.2, 1.143, 64},
        {"b1h24d128_30x48x80_w18x24x24_bf16", 1.51, 1.449, 64},
        {"b1h24d128_32768_w2048_bf16", 1.066, 1.03, 64},
        {"b1h24d128_16384_w16384_bf16", 1.02, 1.001, 64},
        {"b128h4d32_56x56_w7x7_bf16", 5, 5, 0},
        {"b4h16d64_128x128_w13x13_bf16", 2.4, 2.7, 0},
        {"b1h8d64_16x56x56_w7x7x7_bf16", 2.7, 3, 0},
    };
    for (size_t i = 0; i < sizeof table / sizeof *table; i++) {
        natten_problem p;
        na_sm90_config q, k;
        CHECK(plan(table[i].text, NA_SM90_D_QUERY, &p, &q));
        CHECK(plan(table[i].text, NA_SM90_D_KEY, &p, &k));
        show(table[i].text, &q);
        show(table[i].text, &k);
        CHECK(q.waste >= 0.999 && q.waste <= table[i].d_query);
        CHECK(k.waste >= 0.999 && k.waste <= table[i].d_key);
        CHECK(!table[i].visitors || na_sm90_visitors(&k) == table[i].visitors);
        CHECK(k.pack == 1 && q.groups == 2 && k.groups == 2);
        CHECK(q.stages[0] >= 2 && k.stages[0] >= 2);
        CHECK(q.shared_bytes <= h100.shared_memory && k.shared_bytes <= h100.shared_memory);
    }
}

/* The visitors of resident `place` of a dilation group, as the kernel sees it. */
static na_window window_in_group(const natten_axis *axis, na_sm90_what what, int residue, int place)
{
    na_axis group = na_axis_of(axis);
    group.extent = (group.extent - residue + group.dilation - 1) / group.dilation;
    group.dilation = 1;
    return what == NA_SM90_D_KEY ? na_visitors_of(group, place, 0, group.extent)
                                 : na_window_of(group, place);
}

/* Cells of one axis by looking at every cell of every warpgroup. */
static double count_cells(const natten_axis *axis, na_sm90_what what, int sub, int groups, int tile,
                          int cell)
{
    double cells = 0;
    for (int residue = 0; residue < axis->dilation; residue++) {
        int end = 0;
        while (residue + end * axis->dilation < axis->query_extent)
            end++;
        for (int from = 0; from < end; from += sub * groups) {
            int start = window_in_group(axis, what, residue, from).first, last = 0;
            for (int q = from; q < end && q < from + sub * groups; q++) {
                na_window w = window_in_group(axis, what, residue, q);
                last = w.first + w.count > last ? w.first + w.count : last;
            }
            for (int g = 0; g < groups; g++)
                for (int k = start; k < start + (last - start + tile - 1) / tile * tile;
                     k += cell) {
                    int needed = 0;
                    for (int q = from + g * sub; q < end && q < from + (g + 1) * sub; q++) {
                        na_window w = window_in_group(axis, what, residue, q);
                        needed |= k < w.first + w.count && k + cell > w.first;
                    }
                    cells += needed;
                }
        }
    }
    return cells;
}

static void test_sums(na_sm90_what what)
{
    static const char *const texts[] = {
        "b1h1d64_61x67_w9x12_bf16",         "b1h1d64_61x67_w9x12_s4x7_bf16",
        "b1h1d64_61x67_w9x12_c10_bf16",     "b1h1d64_61x67_w9x12_d3x2_bf16",
        "b1h1d64_13x20x21_w5x7x6_bf16",     "b1h1d64_13x20x21_w5x7x6_s3x1x5_c010_bf16",
        "b2h4d64_13x20x21_w5x7x6_hk1_bf16", "b1h1d128_777_w100_s9_bf16",
    };
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++) {
        natten_problem p;
        na_sm90_config c;
        CHECK(plan(texts[i], what, &p, &c));
        double cells = 1, useful = 1;
        int split = c.halves ? (c.tile[0] > 1 ? 0 : 1) : -1;
        for (int a = 0; a < 3; a++) {
            double pairs = 0;
            for (int q = 0; q < p.axis[a].query_extent; q++)
                pairs += na_window_of(na_axis_of(&p.axis[a]), q).count;
            useful *= pairs;
            cells *= count_cells(&p.axis[a], what, c.sub[a], a == c.stack ? c.groups : 1, c.tile[a],
                                 c.tile[a] >> (a == split));
        }
        double waste = cells * NA_SM90_ROWS * (na_sm90_visitors(&c) >> c.halves) / useful / c.pack;
        show(texts[i], &c);
        CHECK(fabs(waste - c.waste) < 1e-9 * waste);
    }
}

/* Choices come in the order of what is expected of them, each with tiles of its own. */
static void test_next(void)
{
    natten_problem p;
    na_sm90_config c[NA_SM90_CHOICES + 2];
    CHECK(plan("b4h16d64_128x128_w13x13_bf16", NA_SM90_FORWARD, &p, &c[0]));
    for (int i = 1; i <= NA_SM90_CHOICES; i++) {
        c[i].gives = 3;
        CHECK(na_sm90_config_choose(&p, &h100, NA_SM90_FORWARD, i, &c[i]));
        CHECK(c[i].seconds >= c[i - 1].seconds && c[i].seconds < 3 * c[0].seconds);
        show("next", &c[i]);
        for (int j = 0; j < i; j++)
            CHECK(memcmp(c[i].sub, c[j].sub, sizeof c[i].sub) || c[i].pack != c[j].pack ||
                  c[i].groups != c[j].groups || memcmp(c[i].tile, c[j].tile, sizeof c[i].tile));
    }
    const int too_many = NA_SM90_CHOICES + 1;
    CHECK(!na_sm90_config_choose(&p, &h100, NA_SM90_FORWARD, too_many, &c[too_many]));
}

int main(void)
{
    unit_test("what is chosen");
    test_choices();
    unit_test("what is chosen for the backward");
    test_backward_choices();
    unit_test("choices after the first");
    test_next();
    unit_test("sums, against counting");
    test_sums(NA_SM90_FORWARD);
    test_sums(NA_SM90_D_QUERY);
    test_sums(NA_SM90_D_KEY);
    return unit_end("test_config");
}
