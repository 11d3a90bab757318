/* SPDX-License-Identifier: MIT
 * The window rule against its meaning, by search: for every small axis, every key is asked whether
 * the query should see it. */
#include "core/window.h"
#include "unit.h"

enum { LONGEST = 32 };

/* Tokens of the query's dilation group, in order; returns how many. */
static int group_of(na_axis axis, int query, int *tokens)
{
    int count = 0;
    for (int token = 0; token < axis.extent; token++)
        if ((token - query) % axis.dilation == 0)
            tokens[count++] = token;
    return count;
}

/* The queries of a group are dealt out in lots of `stride`; a lot shares the window of one of them,
 * the middle one (the later of two), or the last one when causal; of what there is of the lot. */
static int leader_of(na_axis axis, int place, int count)
{
    int lot = 0;
    while (place >= lot + axis.stride)
        lot += axis.stride;
    int chosen = 0;
    for (int member = lot; member < lot + axis.stride && member < count; member++)
        if (axis.causal || member - lot <= axis.stride / 2)
            chosen = member;
    return chosen;
}

/* Not causal: of all runs of `window` neighbours in the group, the one whose middle (the later of
 * two) is nearest to the leader. Causal: the tokens among the `window` up to the leader that are
 * not after the query. Returns the places [*start, *end) in the group. */
static void search(na_axis axis, int place, int count, int *start, int *end)
{
    int leader = leader_of(axis, place, count);
    int best = LONGEST;
    *start = *end = -1;
    for (int run = 0; !axis.causal && run + axis.window <= count; run++) {
        int distance = run + axis.window / 2 - leader;
        distance = distance < 0 ? -distance : distance;
        if (distance < best) {
            best = distance;
            *start = run;
            *end = run + axis.window;
        }
    }
    for (int key = 0; axis.causal && key < count; key++) {
        int behind = leader - key;
        if (behind < 0 || behind >= axis.window || key > place)
            continue;
        *start = *start < 0 ? key : *start;
        *end = key + 1;
    }
}

static void test_axis(na_axis axis)
{
    int tokens[LONGEST], before = -1;
    for (int query = 0; query < axis.extent; query++) {
        int count = group_of(axis, query, tokens), place = 0, start, end;
        while (tokens[place] != query)
            place++;
        search(axis, place, count, &start, &end);
        na_window window = na_window_of(axis, query);
        if (window.first != tokens[start] || window.count != end - start)
            unit_fail("extent %d window %d stride %d dilation %d causal %d query %d: %d keys from "
                      "%d, should be %d from %d",
                      axis.extent, axis.window, axis.stride, axis.dilation, axis.causal, query,
                      window.count, window.first, end - start, tokens[start]);
        if (axis.dilation == 1) {
            CHECK(window.first >= before);
            before = window.first;
        }
        CHECK(
            axis.causal || axis.stride > 1 ||
            (window.first <= query && query <= window.first + (window.count - 1) * axis.dilation));
        natten_axis whole = {.query_extent = axis.extent,
                             .window = axis.window,
                             .stride = axis.stride,
                             .dilation = axis.dilation,
                             .causal = axis.causal};
        natten_axis block = whole;
        block.query_extent = 1;
        block.query_origin = query;
        block.global_extent = axis.extent;
        block.key_extent = axis.extent;
        int64_t first, keys;
        CHECK(natten_axis_window(&whole, query, &first, &keys) == NATTEN_OK);
        CHECK(first == window.first && keys == window.count);
        CHECK(natten_axis_window(&block, 0, &first, &keys) == NATTEN_OK);
        CHECK(first == window.first && keys == window.count);
    }
}

/* The queries of a block that attend to a key, against asking each of them. */
static void test_visitors(na_axis axis, int begin, int end)
{
    for (int key = 0; key < axis.extent; key++) {
        na_window visitors = na_visitors_of(axis, key, begin, end);
        int last = visitors.first + (visitors.count - 1) * axis.dilation, wrong = 0;
        for (int query = begin; query < end; query++) {
            na_window window = na_window_of(axis, query);
            int far = key - window.first;
            int sees = far >= 0 && far % axis.dilation == 0 && far / axis.dilation < window.count;
            int told = query >= visitors.first && query <= last &&
                       (query - visitors.first) % axis.dilation == 0;
            wrong += sees != told;
        }
        if (wrong || visitors.count < 0)
            unit_fail("extent %d window %d stride %d dilation %d causal %d, queries %d..%d: key %d "
                      "has %d visitors from %d",
                      axis.extent, axis.window, axis.stride, axis.dilation, axis.causal, begin,
                      end - 1, key, visitors.count, visitors.first);
    }
}

static void test_all_visitors(void)
{
    na_axis a;
    for (a.causal = 0; a.causal < 2; a.causal++)
        for (a.extent = 1; a.extent <= LONGEST / 2; a.extent++)
            for (a.dilation = 1; a.dilation <= a.extent; a.dilation++)
                for (a.window = 1; a.window * a.dilation <= a.extent; a.window++)
                    for (a.stride = 1; a.stride <= a.window; a.stride++) {
                        test_visitors(a, 0, a.extent);
                        test_visitors(a, a.extent / 3, a.extent - a.extent / 4);
                        /* Cross attention: queries past the end. */
                        if (a.window == a.extent)
                            test_visitors(a, 0, 2 * a.extent + 1);
                    }
}

static void test_all(int causal)
{
    na_axis a = {.causal = causal};
    for (a.extent = 1; a.extent <= LONGEST; a.extent++)
        for (a.dilation = 1; a.dilation <= a.extent; a.dilation++)
            for (a.window = 1; a.window * a.dilation <= a.extent; a.window++)
                for (a.stride = 1; a.stride <= a.window; a.stride++)
                    test_axis(a);
}

static void test_dense(void)
{
    for (int extent = 1; extent <= 100; extent++)
        for (int query = 0; query < extent; query++) {
            na_window all = na_window_of((na_axis){extent, extent, 1, 1, 0}, query);
            na_window past = na_window_of((na_axis){extent, extent, 1, 1, 1}, query);
            CHECK(all.first == 0 && all.count == extent);
            CHECK(past.first == 0 && past.count == query + 1);
        }
}

/* What docs/spec.md and the papers show: windows shifted inside at the borders. */
static void test_examples(void)
{
    static const struct {
        na_axis axis;
        int query, first, count;
    } examples[] = {
        {{10, 3, 1, 1, 0}, 0, 0, 3}, {{10, 3, 1, 1, 0}, 5, 4, 3}, {{10, 3, 1, 1, 0}, 9, 7, 3},
        {{10, 4, 1, 1, 0}, 5, 3, 4}, {{10, 4, 4, 1, 0}, 3, 0, 4}, {{10, 4, 4, 1, 0}, 4, 4, 4},
        {{10, 4, 4, 1, 0}, 9, 6, 4}, {{10, 3, 1, 3, 0}, 1, 1, 3}, {{10, 3, 1, 3, 0}, 9, 3, 3},
        {{10, 4, 1, 1, 1}, 2, 0, 3}, {{10, 4, 1, 1, 1}, 6, 3, 4}, {{12, 4, 4, 1, 1}, 5, 4, 2},
    };
    for (size_t i = 0; i < sizeof examples / sizeof *examples; i++) {
        na_window window = na_window_of(examples[i].axis, examples[i].query);
        if (window.first != examples[i].first || window.count != examples[i].count)
            unit_fail("example %d: %d keys from %d", (int)i, window.count, window.first);
    }
}

int main(void)
{
    unit_test("not causal, against a search");
    test_all(0);
    unit_test("causal, against a search");
    test_all(1);
    unit_test("visitors of keys, against asking every query");
    test_all_visitors();
    unit_test("window = extent is dense attention");
    test_dense();
    unit_test("examples worked out by hand");
    test_examples();
    return unit_end("test_window");
}
