/* SPDX-License-Identifier: MIT
 * The gradient of a relative position bias: adds up what the work items of the backward have of it
 * (sm90_bias_sums.h), in order.
 *
 * Parameter: NA_DTYPE. */
#include "device/sm90_backward.h"
#include "device/words/words.h"

enum { LANES = NA_SM90_BIAS_BLOCK, WARPS = 4 };

/* A share of the parts of one entry. */
NA_WORD float share_of(const na_sm90_bias_end *p, int64_t task, int warp)
{
    int head = (int)(task / p->entries);
    float sum = 0;
    for (int batch = 0; batch < p->batches; batch++) {
        int64_t row = ((int64_t)batch * p->heads + head) * p->parts_of_head;
        const float *part = p->parts + row * p->entries + task % p->entries;
        for (int i = warp; i < p->parts_of_head; i += WARPS)
            sum += part[(int64_t)i * p->entries];
    }
    return sum;
}

NA_WORD uint16_t *place_of(const na_sm90_bias_end *p, int64_t task)
{
    int entry = (int)(task % p->entries);
    int64_t place = task / p->entries * p->head;
#pragma unroll
    for (int a = 2; a >= 0; a--) {
        place += entry % p->extent[a] * p->step[a];
        entry /= p->extent[a];
    }
    return p->d_bias + place;
}

/* Blocks of 32 entries; each of 4 warps adds up its share of their parts. */
NA_KERNEL(na_sm90_bias_kernel, na_sm90_bias_end, LANES *WARPS)
{
    int64_t tasks = (int64_t)p.heads * p.entries;
    float *shares = (float *)na_shared();
    int lane = na_thread() % LANES, warp = na_thread() / LANES;
    for (int64_t first = na_block() * LANES; first < tasks; first += na_blocks() * LANES) {
        int64_t task = first + lane;
        shares[na_thread()] = task < tasks ? share_of(&p, task, warp) : 0;
        na_barrier();
        if (warp == 0 && task < tasks) {
            float sum = 0;
#pragma unroll
            for (int i = 0; i < WARPS; i++)
                sum += shares[i * LANES + lane];
            *place_of(&p, task) =
                NA_DTYPE == NATTEN_F16 ? na_f16_of_float(sum) : na_bf16_of_float(sum);
        }
        na_barrier();
    }
}
