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

/* Keys first, first + dilation, ..., count of them. */
typedef struct na_window {
    int first, count;
} na_window;

NA_INLINE int na_min(int a, int b) { return a < b ? a : b; }
NA_INLINE int na_max(int a, int b) { return a > b ? a : b; }

/* The window of the query at place `query` of the whole axis. Tokens that are congruent modulo the
 * dilation form a group; the rule works on places inside the group. Queries of one stride share the
 * window of their leader: the middle one, or the last one when causal. */
NA_INLINE na_window na_window_of(na_axis axis, int query)
{
    int residue = query % axis.dilation;
    int place = query / axis.dilation;
    int group = (axis.extent - residue + axis.dilation - 1) / axis.dilation;
    int lead = axis.causal ? axis.stride - 1 : axis.stride / 2;
    int leader = na_min(place / axis.stride * axis.stride + lead, group - 1);
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

#endif
