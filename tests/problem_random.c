/* SPDX-License-Identifier: MIT
 * Random problem strings: every feature, in small sizes. */
#include "problem_string.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

typedef struct writer {
    uint64_t *random;
    char *text;
    size_t size;
    int rank;
} writer;

static int below(writer *w, int n) { return (int)(random_next(w->random) % (uint64_t)n); }

static int one_in(writer *w, int n) { return below(w, n) == 0; }

static void put(writer *w, const char *format, ...)
{
    size_t used = strlen(w->text);
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(w->text + used, w->size - used, format, arguments);
    va_end(arguments);
}

static void put_list(writer *w, const char *name, const int list[3])
{
    for (int a = 0; a < w->rank; a++)
        put(w, "%s%d", a ? "x" : name, list[a]);
}

/* A block of queries and just the keys it needs, sometimes more. */
static void put_blocks(writer *w, const natten_axis axis[3])
{
    int extent[3], origin[3], key_extent[3], key_origin[3];
    for (int a = 0; a < w->rank; a++) {
        int whole = (int)axis[a].global_extent;
        origin[a] = below(w, whole);
        extent[a] = 1 + below(w, whole - origin[a]);
        int64_t low = whole, high = 0;
        for (int q = 0; q < extent[a]; q++) {
            int64_t first, count;
            natten_axis block = axis[a];
            block.query_extent = extent[a];
            block.query_origin = origin[a];
            natten_axis_window(&block, q, &first, &count);
            low = first < low ? first : low;
            high = first + (count - 1) * block.dilation + 1 > high
                       ? first + (count - 1) * block.dilation + 1
                       : high;
        }
        key_origin[a] = below(w, (int)low + 1);
        key_extent[a] = (int)high - key_origin[a] + below(w, whole - (int)high + 1);
    }
    put_list(w, "_q", extent);
    put_list(w, "+", origin);
    put_list(w, "_k", key_extent);
    put_list(w, "+", key_origin);
}

static void put_axes(writer *w, int odd_windows)
{
    static const int longest[] = {70, 24, 11};
    natten_axis axis[3];
    int extent[3], window[3], dilation[3], stride[3];
    for (int a = 0; a < w->rank; a++) {
        extent[a] = 1 + below(w, longest[w->rank - 1]);
        int most = one_in(w, 4) ? extent[a] : extent[a] < 9 ? extent[a] : 9;
        window[a] = 1 + below(w, most);
        if (odd_windows)
            window[a] -= window[a] % 2 == 0;
        int widest = extent[a] / window[a];
        dilation[a] = one_in(w, 2) ? 1 : 1 + below(w, widest);
        stride[a] = one_in(w, 3) ? 1 + below(w, window[a]) : 1;
        axis[a] = (natten_axis){extent[a], extent[a], extent[a],   0, 0,
                                window[a], stride[a], dilation[a], 0};
    }
    put_list(w, "_", extent);
    put_list(w, "_w", window);
    put_list(w, "_d", dilation);
    put_list(w, "_s", stride);
    if (one_in(w, 3)) {
        put(w, "_c");
        for (int a = 0; a < w->rank; a++)
            put(w, "%d", (int)(axis[a].causal = below(w, 2)));
    }
    if (one_in(w, 4))
        put_blocks(w, axis);
}

static void write_problem(uint64_t *random, char *text, size_t size)
{
    static const char *const dtypes[] = {"f32", "f32", "f64", "f16", "bf16"};
    static const char *const orders[] = {"hl", "hf", "qkv", "odd", "neg", "bcast"};
    static const char *const gradients[] = {"q", "k", "v", "kv", "qa", "r", "nm", "qrn", "b", "vb"};
    static const char *const dropouts[] = {"0.1", "0.5", "0.9", "0.00001", "1"};
    static const int dims[] = {1, 3, 8, 16, 17, 32, 40, 64, 72};
    writer w = {random, text, size, 1 + below(&(writer){random, text, size, 0}, 3)};
    int rpb = one_in(&w, 4), share = 1 + below(&w, 3);
    int kv_heads = 1 + below(&w, one_in(&w, 4) ? 16 : 3);
    *text = 0;
    put(&w, "b%dh%dd%d", 1 + below(&w, 2), kv_heads * share, dims[below(&w, 9)]);
    put_axes(&w, rpb);
    put(&w, "_hk%d", kv_heads);
    if (one_in(&w, 3))
        put(&w, "_dv%d", dims[below(&w, 9)]);
    if (one_in(&w, 4))
        put(&w, "_add%d", 1 + below(&w, 9));
    if (rpb)
        put(&w, "_rpb");
    if (one_in(&w, 2))
        put(&w, "_lse");
    if (one_in(&w, 5))
        put(&w, "_kb");
    if (one_in(&w, 5))
        put(&w, "_drop%s", dropouts[below(&w, 5)]);
    if (one_in(&w, 5))
        put(&w, "_g%s", gradients[below(&w, 10)]);
    put(&w, "_%s_%s", orders[below(&w, 6)], dtypes[below(&w, 5)]);
}

/* The reference takes a second for some 1e8 of these. */
static double work_of(const char *text)
{
    test_problem test;
    if (problem_parse(text, &test))
        return 0; /* whoever runs it will say so */
    const natten_problem *p = &test.problem;
    double work = (double)(p->batch * p->heads * (p->head_dim + p->value_dim + 30));
    for (int a = 0; a < p->rank; a++)
        work *= (double)(p->axis[a].query_extent * p->axis[a].window);
    return work;
}

void problem_random(uint64_t *random, char *text, size_t size)
{
    do
        write_problem(random, text, size);
    while (work_of(text) > 3e6);
}
