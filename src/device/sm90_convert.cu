/* SPDX-License-Identifier: MIT
 * d_query from the sums in float32 that the backward on Hopper left where it adds them up.
 *
 * Parameters: NA_DTYPE; NA_DIM, a multiple of 8; NA_LANES, a power of two that many lanes go
 * through 8 channels each: NA_DIM / 8 or more, at most 32. */
#include "device/sm90_backward.h"
#include "device/words/hopper.h"

enum { ROWS = 128 / NA_LANES /* of a block at a time */ };

/* 8 channels, of which the even ones come first. */
NA_WORD void convert(const float *sums, float scale, uint16_t *to)
{
    uint32_t even[4], odd[4], both[4];
    na_load_16_bytes(sums, even);
    na_load_16_bytes(sums + 4, odd);
#pragma unroll
    for (int i = 0; i < 4; i++)
        both[i] = na_pack(na_float_of_bits(even[i]) * scale, na_float_of_bits(odd[i]) * scale);
    na_store_16_bytes(to, both);
}

NA_KERNEL(na_sm90_convert_kernel, na_sm90_convert, 128)
{
    int channel = na_thread() % NA_LANES * 8;
    int64_t step = na_blocks() * ROWS;
    if (channel >= NA_DIM)
        return;
    for (int64_t row = na_block() * ROWS + na_thread() / NA_LANES; row < p.rows; row += step) {
        int rest = (int)row, at[3];
        int64_t place = 0, offset = 0;
#pragma unroll
        for (int a = 2; a >= 0; a--) {
            at[a] = rest % p.extent[a];
            rest /= p.extent[a];
            offset += at[a] * p.layout.axis[a];
        }
        offset += rest % p.heads * p.layout.head + rest / p.heads * p.layout.batch;
        place = rest;
#pragma unroll
        for (int a = 0; a < 3; a++)
            place = place * na_sm90_sum_extent(p.extent[a], p.dilation[a]) +
                    na_sm90_sum_place(at[a], p.extent[a], p.dilation[a]);
        convert(p.sums + place * NA_DIM + channel, p.scale, p.d_query + offset + channel);
    }
}
