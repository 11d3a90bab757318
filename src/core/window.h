/* SPDX-License-Identifier: MIT
 * The window rule (docs/spec.md): which keys a query attends to along one axis. The only text of
 * the rule: the C library, the device code and the tests all include it, so it keeps to what gcc
 * and NVRTC share. */
#ifndef NATTEN_CORE_WINDOW_H
#define NATTEN_CORE_WINDOW_H

#ifdef __CUDACC__
#define NA_INLINE static __device__ __forceinline__
#else
#define NA_INLINE static inline
#endif

typedef struct na_axis {
    int extent, window, stride, dilation, causal;
} na_axis;

/* Keys (or queries) first, first + dilation, ..., count of them. */
typedef struct na_window {
    int first, count;
} na_window;

NA_INLINE int na_min(int a, int b) { return a < b ? a : b; }
NA_INLINE int na_max(int a, int b) { return a > b ? a : b; }

/* a / by, for the usual case without a division, which takes a GPU longer than all the rest. */
NA_INLINE int na_over(int a, int by) { return by == 1 ? a : a / by; }

/* The window of the query at place `query` of the whole axis. Tokens that are congruent modulo the
 * dilation form a group; the rule works on places inside the group. Queries of one stride share the
 * window of their leader: the middle one, or the last one when causal. */
NA_INLINE na_window na_window_of(na_axis axis, int query)
{
    int place = na_over(query, axis.dilation);
    int residue = query - place * axis.dilation;
    int group = na_over(axis.extent - residue + axis.dilation - 1, axis.dilation);
    int lead = axis.causal ? axis.stride - 1 : axis.stride / 2;
    int leader = na_min(na_over(place, axis.stride) * axis.stride + lead, group - 1);
    int start, end;
    if (axis.causal) {
        start = na_max(leader - axis.window + 1, 0);
        end = na_min(place + 1, group);
    } else {
        start = na_min(na_max(leader - axis.window / 2, 0), group - axis.window);
        end = start + axis.window;
    }
    na_window window = {residue + start * axis.dilation, end - start};
    return window;
}

/* The first query of a group of `group` tokens whose window begins at place `from` or later;
 * without end, where none does. */
NA_INLINE int na_first_from(na_axis axis, int group, int from)
{
    int lead = axis.causal ? axis.stride - 1 : axis.stride / 2;
    int reach = axis.causal ? axis.window - 1 : axis.window / 2;
    if (from > group - axis.window)
        return 1 << 30;
    return from <= 0 ? 0
                     : na_over(na_max(from + reach - lead + axis.stride - 1, 0), axis.stride) *
                           axis.stride;
}

/* The other way round: which of the queries at places begin..end - 1 of the whole axis attend to
 * the key at place `key`. As windows move forward along a group, these are neighbours in it: first,
 * first + dilation, ..., count of them. */
NA_INLINE na_window na_visitors_of(na_axis axis, int key, int begin, int end)
{
    int place = na_over(key, axis.dilation), residue = key - place * axis.dilation;
    int round = axis.dilation - 1 - residue;
    int group = na_over(axis.extent + round, axis.dilation);
    int from = na_over(na_max(begin + round, 0), axis.dilation),
        to = na_over(na_max(end + round, 0), axis.dilation);
    int low = axis.causal ? place : na_first_from(axis, group, place - axis.window + 1);
    int high = na_first_from(axis, group, place + 1);
    low = na_min(na_max(low, from), to);
    high = na_min(na_max(high, low), to);
    na_window visitors = {residue + low * axis.dilation, high - low};
    return visitors;
}

#endif
