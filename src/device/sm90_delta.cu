/* SPDX-License-Identifier: MIT
 * What the backward kernels of Hopper want to know about each query beforehand: its lse, and delta
 * = out . d_out - d_lse, by which the gradient of a logit is p (d_out . value - delta).
 *
 * Parameters: NA_DTYPE; NA_VALUE_DIM, a multiple of 8; NA_LANES, a power of two that many lanes go
 * through 8 channels each: NA_VALUE_DIM / 8 or more, at most 32. */
#include "device/sm90_backward.h"
#include "device/words/hopper.h"

enum { ROWS = 128 / NA_LANES /* of a block at a time */ };

NA_WORD float number(uint32_t both, int second)
{
    uint16_t bits = (uint16_t)(second ? both >> 16 : both);
    return NA_DTYPE == NATTEN_F16 ? na_float_of_f16(bits) : na_float_of_bf16(bits);
}

NA_WORD int64_t offset_of(const natten_layout *layout, int batch, const int *at, int head)
{
    return batch * layout->batch + at[0] * layout->axis[0] + at[1] * layout->axis[1] +
           at[2] * layout->axis[2] + head * layout->head;
}

NA_WORD float dot(const na_sm90_delta *p, int batch, const int *at, int head)
{
    int lane = na_thread() % NA_LANES;
    float sum = 0;
    if (lane * 8 < NA_VALUE_DIM) {
        uint32_t a[4], b[4];
        na_load_16_bytes(p->out + offset_of(&p->out_layout, batch, at, head) + lane * 8, a);
        na_load_16_bytes(p->d_out + offset_of(&p->d_out_layout, batch, at, head) + lane * 8, b);
#pragma unroll
        for (int i = 0; i < 8; i++)
            sum = na_fma(number(a[i / 2], i % 2), number(b[i / 2], i % 2), sum);
    }
#pragma unroll
    for (int mask = NA_LANES / 2; mask > 0; mask /= 2)
        sum += na_exchange(sum, mask);
    return sum;
}

NA_WORD void put(const na_sm90_delta *p, int row, const int *at, float lse, float delta)
{
    float *pair = p->pairs + (int64_t)row * NA_SM90_PAIR;
    pair[0] = lse;
    pair[2] = delta;
    if (at[2] >= p->step) {
        pair[1 - p->step * NA_SM90_PAIR] = lse;
        pair[3 - p->step * NA_SM90_PAIR] = delta;
    }
    if (at[2] + p->step >= p->extent[2])
        pair[1] = pair[3] = 0;
}

NA_KERNEL(na_sm90_delta_kernel, na_sm90_delta, 128)
{
    int64_t step = na_blocks() * ROWS;
    /* Whole warps go round together, as they exchange. */
    for (int64_t first = na_block() * ROWS; first < p.rows; first += step) {
        int64_t number = first + na_thread() / NA_LANES;
        int there = number < p.rows, row = there ? (int)number : p.rows - 1, at[3], rest = row;
#pragma unroll
        for (int a = 2; a >= 0; a--) {
            at[a] = rest % p.extent[a];
            rest /= p.extent[a];
        }
        int head = rest % p.heads, batch = rest / p.heads;
        float delta = dot(&p, batch, at, head);
        if (!there || na_thread() % NA_LANES)
            continue;
        if (p.d_lse)
            delta -= p.d_lse[offset_of(&p.d_lse_layout, batch, at, head)];
        float lse = p.lse[offset_of(&p.lse_layout, batch, at, head)];
        put(&p, row, at, lse * 1.4426950408889634f, delta);
    }
}
