/* SPDX-License-Identifier: MIT
 * Device words of sm_90a: barriers in shared memory, boxes copied by tensor maps, products of a
 * warpgroup (128 threads). Shared memory is addressed by 32-bit numbers.
 *
 * Parameters: NA_DTYPE, NATTEN_F16 or NATTEN_BF16; NA_EVERY_LANE_ARRIVES, 0 or 1. */
#ifndef NATTEN_DEVICE_HOPPER_H
#define NATTEN_DEVICE_HOPPER_H

#include "device/words/tensor_map.h"
#include "device/words/wgmma.h"
#include "device/words/words.h"
#include "natten.h"

#if NA_DTYPE == 2 /* NATTEN_F16 */
#define NA_HALF_TEXT "f16"
#else
#define NA_HALF_TEXT "bf16"
#endif

#ifdef __CUDACC__

/* A kernel whose block has a multiprocessor to itself, and all its registers from the start:
 * NA_REGISTERS_MORE waits for ever for what was not allocated. */
#define NA_KERNEL_ALONE(name, type, threads)                                                       \
    extern "C" __global__ void __launch_bounds__(threads, 1) name(const __grid_constant__ type p)

NA_WORD uint32_t na_shared_address(const void *place)
{
    uint32_t address;
    asm("{.reg .b64 a; cvta.to.shared.u64 a, %1; cvt.u32.u64 %0, a;}" : "=r"(address) : "l"(place));
    return address;
}

/* A barrier's phase ends when `arrivals` threads have arrived and all bytes expected of it have
 * come. Phases count 0, 1, 0, 1...: a wait for phase 1 of a fresh barrier returns at once. */
NA_WORD void na_gate_init(uint32_t gate, int arrivals)
{
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(gate), "r"(arrivals) : "memory");
}

/* Makes fresh barriers known to the copies, and this thread's writes to products. */
NA_WORD void na_fence_async(void)
{
    asm volatile("fence.mbarrier_init.release.cluster; fence.proxy.async.shared::cta;" ::
                     : "memory");
}

NA_WORD void na_gate_arrive(uint32_t gate)
{
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(gate) : "memory");
}

/* For a whole warp, all of whose lanes are done with what the gate guards: its first lane arrives,
 * if the condition holds. Not an `if`: a branch between products makes the compiler wait for each
 * of them. The barrier costs nothing where lanes go together, and is what the memory model wants.
 * With NA_EVERY_LANE_ARRIVES all lanes arrive, for a tool that watches threads one by one. */
NA_WORD void na_gate_arrive_warp(uint32_t gate, int lane, int condition)
{
    __syncwarp();
    asm volatile("{.reg .pred p; setp.ne.s32 p, %1, 0;"
                 " @p mbarrier.arrive.shared::cta.b64 _, [%0];}" ::"r"(gate),
                 "r"((int)(condition && (NA_EVERY_LANE_ARRIVES || lane == 0)))
                 : "memory");
}

NA_WORD void na_gate_arrive_expect(uint32_t gate, int bytes)
{
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(gate), "r"(bytes)
                 : "memory");
}

NA_WORD void na_gate_wait(uint32_t gate, uint32_t phase)
{
    asm volatile("{.reg .pred p; again%=: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;"
                 " @p bra done%=; bra again%=; done%=: }" ::"r"(gate),
                 "r"(phase)
                 : "memory");
}

NA_WORD int na_gate_test(uint32_t gate, uint32_t phase)
{
    int over;
    asm volatile("{.reg .pred p; mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;"
                 " selp.s32 %0, 1, 0, p;}"
                 : "=r"(over)
                 : "r"(gate), "r"(phase)
                 : "memory");
    return over;
}

/* Copies the box that begins at c0 (innermost)... c4 to `to`, a multiple of 1024, or of 128 where
 * the map does not swizzle; its bytes count for the gate. */
NA_WORD void na_box_load(uint32_t to, const na_tensor_map *map, uint32_t gate, int c0, int c1,
                         int c2, int c3, int c4)
{
    asm volatile("cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes"
                 " [%0], [%1, {%3, %4, %5, %6, %7}], [%2];" ::"r"(to),
                 "l"(map), "r"(gate), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
                 : "memory");
}

/* Four matrices of 8 rows of 16 bytes: lane 8 j + i says where row i of matrix j goes, and lane
 * 4 i + k has its bytes 4 k to 4 k + 3, in word j. For products and copies, which see what a thread
 * has stored after its na_store_fence. */
NA_WORD void na_store_matrices(uint32_t to, const uint32_t *words)
{
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to),
                 "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
                 : "memory");
}
NA_WORD void na_store_fence(void) { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

/* Adds the box that lies at `from`, as a load would leave it there, to a tensor in memory; what
 * lies outside is left out. Boxes of one thread, until commit, are a group. */
NA_WORD void na_box_add(const na_tensor_map *map, uint32_t from, int c0, int c1, int c2, int c3,
                        int c4)
{
    asm volatile("cp.reduce.async.bulk.tensor.5d.global.shared::cta.add.tile.bulk_group"
                 " [%0, {%2, %3, %4, %5, %6}], [%1];" ::"l"(map),
                 "r"(from), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
                 : "memory");
}
NA_WORD void na_box_commit(void) { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
/* Until this thread's groups have been read, and until they have been added. */
NA_WORD void na_box_read_wait(void)
{
    asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}
NA_WORD void na_box_add_wait(void) { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

/* The next work item: what the counter held. */
NA_WORD int na_count_up(int *counter) { return atomicAdd(counter, 1); }

/* The threads of one warpgroup; names 1 to 15. */
NA_WORD void na_group_barrier(int name)
{
    asm volatile("bar.sync %0, 128;" ::"r"(name) : "memory");
}

/* The threads of one warp. */
NA_WORD void na_warp_barrier(void) { __syncwarp(); }

/* Gives registers back, takes more: `count` of them for each thread of the warpgroup. */
#define NA_REGISTERS_LESS(count) asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count))
#define NA_REGISTERS_MORE(count) asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count))

/* Products: fence, any number of products for one result, commit, wait; between fence and wait
 * nothing else may touch their results, which na_hold tells the compiler. */
NA_WORD void na_product_fence(void) { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
NA_WORD void na_product_commit(void)
{
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
NA_WORD void na_product_wait(void)
{
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
}
/* For all but the products committed last. */
NA_WORD void na_product_wait_first(void)
{
    asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
}
NA_WORD void na_hold(float *value) { asm volatile("" : "+f"(*value)::"memory"); }

/* A number that is to stay in its register, not to be worked out again each time. */
NA_WORD void na_keep(uint32_t *value) { asm volatile("" : "+r"(*value)); }

NA_WORD float na_exp2(float x)
{
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

NA_WORD float na_log2(float x)
{
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

NA_WORD float na_fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }
NA_WORD float na_maximum(float a, float b) { return fmaxf(a, b); }

/* Two numbers of NA_DTYPE, the first in the lower half. */
NA_WORD uint32_t na_pack(float first, float second)
{
    uint32_t both;
    asm("cvt.rn." NA_HALF_TEXT "x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
    return both;
}

/* Bits first..first + count - 1, both at most 32. */
NA_WORD uint32_t na_bits(int first, int count)
{
    uint32_t bits;
    asm("bmsk.clamp.b32 %0, %1, %2;" : "=r"(bits) : "r"(first), "r"(count));
    return bits;
}

NA_WORD int na_any(int condition) { return __any_sync(~0u, condition); }
/* Over all lanes: bits that any of them has, the largest number. */
NA_WORD int na_any_bits(int bits)
{
    int all;
    asm volatile("redux.sync.or.b32 %0, %1, 0xffffffff;" : "=r"(all) : "r"(bits));
    return all;
}
NA_WORD int na_largest(int value)
{
    int largest;
    asm volatile("redux.sync.max.s32 %0, %1, 0xffffffff;" : "=r"(largest) : "r"(value));
    return largest;
}
NA_WORD float na_exchange(float value, int mask) { return __shfl_xor_sync(~0u, value, mask); }
NA_WORD uint32_t na_exchange_bits(uint32_t value, int mask)
{
    return __shfl_xor_sync(~0u, value, mask);
}

/* Tells the compiler that all lanes of the warp hold this value. */
NA_WORD int na_uniform(int value) { return __shfl_sync(~0u, value, 0); }

/* Two numbers from an address that is a multiple of 8. */
NA_WORD void na_load_8_bytes(const float *from, float *to)
{
    float2 v = *(const float2 *)from;
    to[0] = v.x;
    to[1] = v.y;
}

NA_WORD void na_store_16_bytes(void *to, const uint32_t *v)
{
    *(uint4 *)to = make_uint4(v[0], v[1], v[2], v[3]);
}

#else
#include "host/hopper.h"
#endif

/* Describes a matrix in shared memory to a product: rows of 128 bytes whose 16-byte pieces are
 * exclusive-or'ed with the row's number modulo 8, as a box load leaves them. `wide`: bytes from one
 * 64-column piece to the next, where columns are not the summed axis. */
NA_WORD uint64_t na_matrix(uint32_t address, int wide)
{
    return (uint64_t)((address & 0x3ffff) >> 4) | (uint64_t)(wide >> 4) << 16 |
           (uint64_t)(1024 >> 4) << 32 | (uint64_t)1 << 62;
}

#endif
