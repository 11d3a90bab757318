/* SPDX-License-Identifier: MIT
 * Device words: everything a kernel asks of the hardware, each with two texts. NVRTC compiles the
 * first. A C compiler compiles the second, against tests/host/host.h, where every thread of a block
 * is a fibre and a warp's threads exchange values through a buffer: so kernels are tested where
 * there is no GPU. Kernels keep to the C that both compilers share.
 *
 * A kernel is NA_KERNEL(name, type, threads) { ... }, whose only argument is `const type p`. Its
 * grid has one axis. Shared memory is dynamic, one piece, at na_shared(). Two blocks fit on a
 * multiprocessor: without a number the compiler spills registers to have room for more. */
#ifndef NATTEN_DEVICE_WORDS_H
#define NATTEN_DEVICE_WORDS_H

#include <stdint.h>

#ifdef __CUDACC__

#define NA_WORD static __device__ __forceinline__
#define NA_KERNEL(name, type, threads)                                                             \
    extern "C" __global__ void __launch_bounds__(threads, 2) name(const __grid_constant__ type p)

/* This thread of its block, the block, how many blocks there are. */
NA_WORD int na_thread(void) { return (int)threadIdx.x; }
NA_WORD int64_t na_block(void) { return blockIdx.x; }
NA_WORD int64_t na_blocks(void) { return gridDim.x; }

extern __shared__ __align__(1024) unsigned char na_shared_bytes[];
NA_WORD void *na_shared(void) { return na_shared_bytes; }

/* All threads of the block. */
NA_WORD void na_barrier(void) { __syncthreads(); }

/* The value of another lane; all 32 lanes of the warp take part. */
NA_WORD int na_shuffle_int(int value, int lane) { return __shfl_sync(~0u, value, lane); }
NA_WORD int64_t na_shuffle_int64(int64_t value, int lane) { return __shfl_sync(~0u, value, lane); }
NA_WORD float na_shuffle_float(float value, int lane) { return __shfl_sync(~0u, value, lane); }
NA_WORD double na_shuffle_double(double value, int lane) { return __shfl_sync(~0u, value, lane); }

NA_WORD uint32_t na_bits_of_float(float value) { return __float_as_uint(value); }
NA_WORD float na_float_of_bits(uint32_t bits) { return __uint_as_float(bits); }

NA_WORD double na_double_of_bits(uint32_t low, uint32_t high)
{
    return __hiloint2double((int)high, (int)low);
}

/* 16 bytes from an address that is a multiple of 16. */
NA_WORD void na_load_16_bytes(const void *from, uint32_t *to)
{
    uint4 v = *(const uint4 *)from;
    to[0] = v.x;
    to[1] = v.y;
    to[2] = v.z;
    to[3] = v.w;
}

/* What the whole launch only reads, or 0. Not an `if`, so that loads do not wait for each other. */
NA_WORD uint16_t na_load_2_bytes_if(const uint16_t *from, int condition)
{
    uint16_t bits;
    asm("{.reg .pred p; setp.ne.s32 p, %2, 0; mov.b16 %0, 0; @p ld.global.nc.u16 %0, [%1];}"
        : "=h"(bits)
        : "l"(from), "r"(condition));
    return bits;
}

NA_WORD float na_float_of_f16(uint16_t bits)
{
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

NA_WORD uint16_t na_f16_of_float(float value)
{
    uint16_t bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

#else
#include "host/host.h"
#endif

/* What follows needs no hardware. */

NA_WORD float na_float_of_bf16(uint16_t bits) { return na_float_of_bits((uint32_t)bits << 16); }

/* Rounded to nearest, ties to even. */
NA_WORD uint16_t na_bf16_of_float(float value)
{
    uint32_t bits = na_bits_of_float(value);
    if (value != value)
        return (uint16_t)(bits >> 16 | 64);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

NA_WORD float na_infinity(void) { return na_float_of_bits(0x7f800000); }

#endif
