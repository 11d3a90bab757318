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
    static const char *const names[] = {"forward", "d_query", "d_key", "d_all"};
    printf(
        "%-44s %s: %d of %dx%dx%d pack %d, axis %d; past %dx%dx%d%s, stages %d + %d, waste %.3f, "
        "masked %.0f%%, %.3f ms\n",
        text, names[c->what], c->groups, c->sub[0], c->sub[1], c->sub[2], c->pack, c->stack,
        c->tile[0], c->tile[1], c->tile[2], c->halves ? " halves" : "", c->stages[0], c->stages[1],
        c->waste, 100 * c->masked, 1e3 * c->seconds);
}

/* Waste: computed products over those of the windows, at most. For large windows the bounds are
 * what an exhaustive search over boxes of 64 queries and unaligned tiles finds, halves of tiles
 * counted apart in 2-D and 3-D. For small ones the planner gives some waste away (4.57 would be the
 * least of 56x56, 3.41 with dilation 4, 2.31 of 128x128, 2.57 in 3-D) for fewer, larger items. */
static const struct {
    const char *text, *tiles;
    double waste;
} choices[] = {
    {"b1h24d128_256x256_w80x80", "3 warpgroups of 1x8x8 by 1 heads, tiles of 1x16x8", 1.143},
    {"b1h24d128_256x256_w80x80_d2x1", "3 warpgroups of 1x8x8 by 1 heads, tiles of 1x16x8", 1.11},
    {"b1h24d128_256x256_w80x80_d3x3", "3 warpgroups of 1x8x8 by 1 heads, tiles of 1x16x8", 1.084},
    {"b1h24d128_256x256_w80x80_s16x16", "3 warpgroups of 1x8x8 by 1 heads, tiles of 1x16x8", 1.0},
    {"b1h24d128_256x256_w80x80_c11", "3 warpgroups of 1x8x8 by 1 heads, tiles of 1x16x8", 1.21},
    {"b1h24d128_256x256_w80x80_hk6", "3 warpgroups of 1x4x4 by 4 heads, tiles of 1x24x4", 1.137},
    {"b1h24d128_256x256_w80x80_hk3", "3 warpgroups of 1x1x8 by 8 heads, tiles of 1x16x8", 1.0695},
    {"b1h24d128_30x48x80_w18x24x24", "3 warpgroups of 2x4x8 by 1 heads, tiles of 4x4x8", 1.4335},
    {"b1h24d128_30x48x80_w18x24x24_d1x2x2", "3 warpgroups of 2x8x4 by 1 heads, tiles of 4x8x4",
     1.1145},
    {"b1h24d128_30x48x80_w18x24x24_s16x8x8", "3 warpgroups of 2x4x8 by 1 heads, tiles of 4x8x4",
     1.0},
    {"b1h24d128_30x48x80_w18x24x24_c100", "3 warpgroups of 2x4x8 by 1 heads, tiles of 4x4x8", 1.49},
    {"b1h24d128_30x48x80_w18x24x24_hk6", "3 warpgroups of 4x4x1 by 4 heads, tiles of 4x4x8", 1.252},
    {"b1h24d128_30x48x80_w18x24x24_hk3", "3 warpgroups of 2x4x1 by 8 heads, tiles of 4x4x8", 1.135},
    {"b1h24d128_32768_w2048", "3 warpgroups of 1x1x64 by 1 heads, tiles of 1x1x128", 1.0595},
    {"b1h24d128_32768_w2048_d4", "3 warpgroups of 1x1x64 by 1 heads, tiles of 1x1x64", 1.03},
    {"b1h24d128_32768_w2048_d16", "3 warpgroups of 1x1x64 by 1 heads, tiles of 1x1x64", 1.0},
    {"b1h24d128_32768_w2048_s256", "3 warpgroups of 1x1x64 by 1 heads, tiles of 1x1x128", 1.0},
    {"b1h24d128_32768_w2048_c1", "3 warpgroups of 1x1x64 by 1 heads, tiles of 1x1x128", 1.0625},
    {"b1h24d128_32768_w2048_hk6", "3 warpgroups of 1x1x32 by 2 heads, tiles of 1x1x128", 1.059},
    {"b1h24d128_16384_w16384", "3 warpgroups of 1x1x64 by 1 heads, tiles of 1x1x128", 1.0},
    {"b128h4d32_56x56_w7x7", "3 warpgroups of 1x8x8 by 1 heads, tiles of 1x14x8", 5.23},
    {"b128h4d32_56x56_w7x7_d4x4", "3 warpgroups of 1x16x4 by 1 heads, tiles of 1x14x8", 4.48},
    {"b128h4d32_56x56_w7x7_d8x8", "3 warpgroups of 1x8x8 by 1 heads, tiles of 1x8x8", 1.71},
    {"b128h4d32_56x56_w7x7_s3x3", "3 warpgroups of 1x8x8 by 1 heads, tiles of 1x16x4", 5.04},
    {"b128h4d32_56x56_w7x7_c11", "3 warpgroups of 1x8x8 by 1 heads, tiles of 1x14x8", 4.74},
    {"b128h4d32_56x56_w7x7_hk1", "3 warpgroups of 1x8x2 by 4 heads, tiles of 1x32x4", 3.04},
    {"b4h16d64_128x128_w13x13", "3 warpgroups of 1x8x8 by 1 heads, tiles of 1x20x4", 2.37},
    {"b4h16d64_128x128_w13x13_d9x9", "3 warpgroups of 1x8x8 by 1 heads, tiles of 1x14x8", 1.68},
    {"b4h16d64_128x128_w13x13_s4x4", "3 warpgroups of 1x8x8 by 1 heads, tiles of 1x20x4", 2.31},
    {"b4h16d64_128x128_w13x13_c11", "3 warpgroups of 1x8x8 by 1 heads, tiles of 1x20x4", 2.48},
    {"b4h16d64_128x128_w13x13_hk4", "3 warpgroups of 1x4x4 by 4 heads, tiles of 1x16x8", 1.76},
    {"b1h8d64_16x56x56_w7x7x7", "3 warpgroups of 8x4x2 by 1 heads, tiles of 12x1x8", 2.68},
    {"b1h8d64_16x56x56_w7x7x7_d2x2x2", "3 warpgroups of 8x4x2 by 1 heads, tiles of 8x2x8", 1.87},
    {"b1h8d64_16x56x56_w7x7x7_s1x2x2", "3 warpgroups of 8x4x2 by 1 heads, tiles of 12x1x8", 2.44},
    {"b1h8d64_16x56x56_w7x7x7_c100", "3 warpgroups of 8x4x2 by 1 heads, tiles of 8x2x8", 3.45},
    {"b1h8d64_16x56x56_w7x7x7_hk1", "3 warpgroups of 2x2x2 by 8 heads, tiles of 2x8x8", 1.4},
};

static void test_choices(void)
{
    for (size_t i = 0; i < sizeof choices / sizeof *choices; i++) {
        natten_problem p;
        na_sm90_config c;
        char text[128], tiles[80];
        snprintf(text, sizeof text, "%s_bf16", choices[i].text);
        CHECK(plan(text, NA_SM90_FORWARD, &p, &c));
        show(text, &c);
        na_sm90_config_describe(&c, tiles, sizeof tiles);
        if (strcmp(tiles, choices[i].tiles))
            unit_fail("%s: %s, not %s", text, tiles, choices[i].tiles);
        if (!(c.waste >= 0.9999 && c.waste < choices[i].waste + 0.0005))
            unit_fail("%s: waste %.4f, allowed %.4f", text, c.waste, choices[i].waste);
        CHECK(c.sub[0] * c.sub[1] * c.sub[2] * c.pack == NA_SM90_ROWS);
        CHECK(na_sm90_visitors(&c) % 16 == 0 && c.stages[0] >= 2 && c.stages[1] >= 2);
        CHECK(c.shared_bytes <= h100.shared_memory);
    }
}

/* With the fastest tiles on an H100: of d_query 3 warpgroups, or 2 and larger tiles in 3-D. */
static void test_backward_choices(void)
{
    static const struct {
        const char *text;
        double d_query, d_key;
        int groups;   /* of d_query */
        int visitors; /* of a tile of queries */
    } table[] = {
        {"b1h24d128_256x256_w80x80_bf16", 1.143, 1.143, 3, 64},
        {"b1h24d128_30x48x80_w18x24x24_bf16", 1.4, 1.449, 2, 64},
        {"b1h24d128_32768_w2048_bf16", 1.03, 1.03, 3, 64},
        {"b1h24d128_16384_w16384_bf16", 1.001, 1.001, 3, 64},
        {"b128h4d32_56x56_w7x7_bf16", 5.3, 5, 3, 0},
        {"b4h16d64_128x128_w13x13_bf16", 2.4, 2.7, 3, 0},
        {"b1h8d64_16x56x56_w7x7x7_bf16", 2.7, 3, 3, 0},
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
        CHECK(k.pack == 1 && q.groups == table[i].groups && k.groups == 2);
        CHECK(q.stages[0] >= 2 && k.stages[0] >= 2);
        CHECK(q.shared_bytes <= h100.shared_memory && k.shared_bytes <= h100.shared_memory);
    }
}

/* All three gradients from one kernel: tiles nearly as good as those for d_key, although shared
 * memory is nearly full. Above 128 channels there are none. */
static void test_choices_of_all(void)
{
    static const struct {
        const char *text;
        double waste;
    } table[] = {
        {"b1h24d128_256x256_w80x80_bf16", 1.143},      {"b1h24d128_30x48x80_w18x24x24_bf16", 1.49},
        {"b1h24d128_32768_w2048_bf16", 1.03},          {"b1h24d128_16384_w16384_bf16", 1.001},
        {"b1h24d128_256x256_w80x80_s16x16_bf16", 1.2}, {"b4h16d64_128x128_w13x13_bf16", 3},
        {"b1h8d64_16x56x56_w7x7x7_bf16", 3.3},
    };
    natten_problem p;
    na_sm90_config c;
    for (size_t i = 0; i < sizeof table / sizeof *table; i++) {
        CHECK(plan(table[i].text, NA_SM90_D_ALL, &p, &c));
        show(table[i].text, &c);
        CHECK(c.waste >= 0.999 && c.waste <= table[i].waste);
        CHECK(na_sm90_visitors(&c) == NA_SM90_ROWS && c.groups == 2 && c.stages[0] >= 2);
        CHECK(c.shared_bytes <= h100.shared_memory && c.gives == 3);
    }
    CHECK(!plan("b1h1d136_50_w9_dv8_bf16", NA_SM90_D_ALL, &p, &c));
    CHECK(!plan("b1h1d128_50_w9_dv136_bf16", NA_SM90_D_ALL, &p, &c));
}

/* The visitors of resident `place` of a dilation group, as the kernel sees it. */
static na_window window_in_group(const natten_axis *axis, na_sm90_what what, int residue, int place)
{
    na_axis group = na_axis_of(axis);
    group.extent = (group.extent - residue + group.dilation - 1) / group.dilation;
    group.dilation = 1;
    return na_sm90_is_of_keys(what) ? na_visitors_of(group, place, 0, group.extent)
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

/* Parts of an axis, of a map of so many lines: every query is in one of them, sees the keys that it
 * sees in the whole, and both lie where the part says. */
static void check_parts(const natten_axis *axis, int lines)
{
    natten_problem whole = {.axis = {{1, 1, 1, 0, 0, 1, 1, 1, 0}, {0}, *axis}};
    whole.axis[1] = (natten_axis){lines, lines, lines, 0, 0, 1, 1, 1, 0};
    int seen[64] = {0}, parts = na_sm90_parts(&whole);
    whole.layout[NATTEN_QUERY].axis[2] = whole.layout[NATTEN_KEY].axis[2] = 1;
    const natten_axis largest = na_sm90_largest_part(&whole).axis[2];
    CHECK(axis->dilation % parts == 0 && axis->dilation / parts <= (lines > 1 ? 8 : 4));
    for (int i = 0; i < parts; i++) {
        natten_problem part;
        int64_t first[NATTEN_ROLES];
        int there = na_sm90_part(&whole, i, &part, first);
        const natten_axis *x = &part.axis[2];
        CHECK(there == (x->query_extent > 0));
        CHECK(x->query_extent >= 0 && x->query_extent <= largest.query_extent);
        CHECK(x->key_extent >= 0 && x->key_extent <= largest.key_extent);
        CHECK(x->dilation == largest.dilation);
        for (int q = 0; q < x->query_extent; q++) {
            int at = (int)(first[NATTEN_QUERY] + q * part.layout[NATTEN_QUERY].axis[2]);
            na_window in_part = na_window_of(na_axis_of(x), (int)x->query_origin + q);
            na_window in_whole = na_window_of(na_axis_of(axis), (int)axis->query_origin + at);
            int64_t key = first[NATTEN_KEY] +
                          (in_part.first - x->key_origin) * part.layout[NATTEN_KEY].axis[2];
            CHECK(at >= 0 && at < axis->query_extent && !seen[at]++);
            CHECK(in_part.count == in_whole.count && key == in_whole.first - axis->key_origin);
            CHECK(in_part.first + (in_part.count - 1) * x->dilation <
                  x->key_origin + x->key_extent);
        }
    }
    for (int q = 0; q < axis->query_extent; q++)
        CHECK(seen[q] == 1);
}

/* Cuts the block of keys down to those that its queries see. */
static void trim_keys(natten_axis *axis)
{
    int first = (int)axis->global_extent, end = 0;
    for (int q = 0; q < axis->query_extent; q++) {
        na_window w = na_window_of(na_axis_of(axis), (int)axis->query_origin + q);
        first = na_min(first, w.first);
        end = na_max(end, w.first + (w.count - 1) * (int)axis->dilation + 1);
    }
    axis->key_origin = first;
    axis->key_extent = end - first;
}

static void test_parts(void)
{
    for (int dilation = 1; dilation <= 25; dilation++)
        for (int extent = 2 * dilation; extent <= 60; extent += 3)
            for (int i = 0; i < 4; i++) {
                int origin = i % 2 ? dilation / 2 : 0;
                natten_axis axis = {.query_extent = (extent - origin + i % 2) / (1 + i % 2),
                                    .key_extent = extent,
                                    .global_extent = extent,
                                    .query_origin = origin,
                                    .window = extent / dilation > 2 ? 3 : 2,
                                    .stride = 1 + i / 2,
                                    .dilation = dilation,
                                    .causal = i / 2};
                if (i % 2)
                    trim_keys(&axis);
                check_parts(&axis, 1);
                check_parts(&axis, 2);
            }
}

/* All channels that the kernels serve find tiles, whatever else takes registers and room. */
static void test_channels(void)
{
    static const char *const maps[] = {"500_w101_hk1", "40x41_w7x9", "9x12x30_w3x5x7"};
    static const char *const options[] = {"", "_rpb", "_add100_rpb"};
    for (int dim = 8; dim <= 256; dim += 8)
        for (int i = 0; i < 9; i++) {
            const int value_dims[] = {dim, 8, 256};
            for (int j = 0; j < 3; j++) {
                char text[128];
                natten_problem p;
                na_sm90_config c;
                snprintf(text, sizeof text, "b1h4d%d_%s_dv%d%s_bf16", dim, maps[i % 3],
                         value_dims[j], options[i / 3]);
                CHECK(plan(text, NA_SM90_FORWARD, &p, &c));
                CHECK(c.shared_bytes <= h100.shared_memory);
            }
        }
}

int main(void)
{
    unit_test("parts of large dilations");
    test_parts();
    unit_test("any channels");
    test_channels();
    unit_test("what is chosen");
    test_choices();
    unit_test("what is chosen for the backward");
    test_backward_choices();
    test_choices_of_all();
    unit_test("choices after the first");
    test_next();
    unit_test("sums, against counting");
    test_sums(NA_SM90_FORWARD);
    test_sums(NA_SM90_D_QUERY);
    test_sums(NA_SM90_D_KEY);
    test_sums(NA_SM90_D_ALL);
    return unit_end("test_config");
}
