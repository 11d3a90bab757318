/* SPDX-License-Identifier: MIT
 * What one writes without a library: neighborhood attention (forward, float32, two axes, heads
 * last) as plain loops, one query after the other, for bench/cpu.py to compare with. The loops over
 * channels are the innermost and contiguous, as a careful author would have them. */
#include <math.h>
#include <stdint.h>
#include <time.h>

#include "core/window.h"

enum { MOST_SLOTS = 1 << 14 };

typedef struct map {
    na_axis axis[2];
    int heads, channels;
    float scale;
} map;

static void attend(const map *m, const float *query, const float *key, const float *value,
                   float *out, na_window rows, na_window columns)
{
    float weights[MOST_SLOTS], highest = -INFINITY, sum = 0;
    int64_t token = (int64_t)m->heads * m->channels;
    int slots = 0;
    for (int r = 0; r < rows.count; r++)
        for (int c = 0; c < columns.count; c++) {
            int64_t y = rows.first + (int64_t)r * m->axis[0].dilation;
            int64_t x = columns.first + (int64_t)c * m->axis[1].dilation;
            const float *k = key + (y * m->axis[1].extent + x) * token;
            float dot = 0;
            for (int i = 0; i < m->channels; i++)
                dot += query[i] * k[i];
            dot *= m->scale;
            highest = dot > highest ? dot : highest;
            weights[slots++] = dot;
        }
    for (int s = 0; s < slots; s++)
        sum += weights[s] = expf(weights[s] - highest);
    for (int i = 0; i < m->channels; i++)
        out[i] = 0;
    slots = 0;
    for (int r = 0; r < rows.count; r++)
        for (int c = 0; c < columns.count; c++) {
            int64_t y = rows.first + (int64_t)r * m->axis[0].dilation;
            int64_t x = columns.first + (int64_t)c * m->axis[1].dilation;
            const float *v = value + (y * m->axis[1].extent + x) * token;
            float weight = weights[slots++] / sum;
            for (int i = 0; i < m->channels; i++)
                out[i] += weight * v[i];
        }
}

/* Rows begin <= y < end of all batch entries' maps laid under each other. */
void plain_forward(const map *m, const float *query, const float *key, const float *value,
                   float *out, int64_t begin, int64_t end)
{
    int64_t token = (int64_t)m->heads * m->channels, row = m->axis[1].extent * token;
    for (int64_t line = begin; line < end; line++) {
        int y = (int)(line % m->axis[0].extent);
        int64_t start = (line - y) * row;
        na_window rows = na_window_of(m->axis[0], y);
        for (int x = 0; x < m->axis[1].extent; x++)
            for (int h = 0; h < m->heads; h++) {
                int64_t head = (int64_t)h * m->channels, place = line * row + x * token + head;
                attend(m, query + place, key + start + head, value + start + head, out + place,
                       rows, na_window_of(m->axis[1], x));
            }
    }
}

static double now(clockid_t clock)
{
    struct timespec time;
    clock_gettime(clock, &time);
    return (double)time.tv_sec + (double)time.tv_nsec * 1e-9;
}

/* The share of a processor that a thread gets at present, watched for some seconds. */
double plain_share(double seconds)
{
    double wall = now(CLOCK_MONOTONIC), cpu = now(CLOCK_THREAD_CPUTIME_ID);
    while (now(CLOCK_MONOTONIC) < wall + seconds)
        ;
    return (now(CLOCK_THREAD_CPUTIME_ID) - cpu) / (now(CLOCK_MONOTONIC) - wall);
}

void plain_window(const na_axis *axis, int query, na_window *window)
{
    *window = na_window_of(*axis, query);
}
