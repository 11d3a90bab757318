/* SPDX-License-Identifier: MIT
 * The host text of the device words (device/words/words.h): what a kernel compiled by a C compiler
 * calls. The other side is fibre.c, inside a libcuda.so.1 made for tests (driver.c). */
#ifndef HOST_H
#define HOST_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

/* ----------------------------------------------------------------------------------------------
 * what fibre.c gives: the threads of a block are fibres of one system thread, which change only
 * inside these calls, in seeded random order */

int na_host_thread(void);
int na_host_threads(void);
int64_t na_host_block(void);
int64_t na_host_blocks(void);

/* The block's dynamic shared memory: NaNs until written, aligned to 1024, a forbidden page behind
 * it. */
void *na_host_shared(void);
size_t na_host_shared_bytes(void);

/* A collective of the threads first, ..., first + count - 1 (32 or 128 of them): each gives some
 * bytes, 64 at most, and gets, once all have come by the same word, everybody's, in order. They
 * stay there until the thread's next exchange. */
const void *na_host_exchange(const char *word, int first, int count, const void *give,
                             size_t bytes);

/* Barrier `id` (0 is the block's own, 16 of them): waits until `count` threads have come. arrive
 * counts and does not wait. */
void na_host_barrier(int id, int count);
void na_host_arrive(int id, int count);

/* This thread gives registers back, or takes more, until it has so many: all come from those that a
 * block is launched with, 65536 divided by its threads and rounded down to a multiple of 8 for
 * each. Where there are none, hardware waits for ever. */
void na_host_keep_registers(int count);

/* Lets others go first: to be called in loops that wait for something. A kernel in which everybody
 * only waits is stopped as a deadlock. */
void na_host_yield(void);

/* Calls act(copy of the context) at some later time, in random order among the threads and other
 * such calls: for what the hardware does by itself, asynchronous copies and products. */
void na_host_later(void (*act)(void *), const void *context, size_t bytes);

/* Ends the kernel: the launch fails with this sentence. */
__attribute__((format(printf, 1, 2), noreturn)) void na_host_fault(const char *format, ...);

/* What cuTensorMapEncodeTiled leaves in a map, after checking what the hardware's one checks. */
typedef struct na_host_map {
    const char *base;
    uint64_t byte_strides[4];
    uint32_t extents[5];
    uint16_t box[5];
    uint8_t element_strides[5];
    uint8_t rank, element_bytes, swizzle; /* swizzle: 0 none, 1 32 bytes, 2 64, 3 128 */
} na_host_map;

_Static_assert(sizeof(na_host_map) <= 128, "a tensor map has 128 bytes");

/* ----------------------------------------------------------------------------------------------
 * the words */

#define NA_WORD static inline
/* Without parameters a kernel only says how many threads it may have, and how large they are. */
#define NA_HOST_SIZES(type, threads) ((int)sizeof(type) << 11 | (threads))
#define NA_KERNEL(name, type, threads)                                                             \
    static void name##_text(const type p);                                                         \
    int name(const void *p)                                                                        \
    {                                                                                              \
        return p ? name##_text(*(const type *)p), 0 : NA_HOST_SIZES(type, threads);                \
    }                                                                                              \
    static void name##_text(const type p)

NA_WORD int na_thread(void) { return na_host_thread(); }
NA_WORD int64_t na_block(void) { return na_host_block(); }
NA_WORD int64_t na_blocks(void) { return na_host_blocks(); }
NA_WORD void *na_shared(void) { return na_host_shared(); }
NA_WORD void na_barrier(void) { na_host_barrier(0, na_host_threads()); }

static inline const void *na_host_warp(const char *word, const void *give, size_t bytes)
{
    return na_host_exchange(word, na_host_thread() & ~31, 32, give, bytes);
}

NA_WORD int na_shuffle_int(int value, int lane)
{
    return ((const int *)na_host_warp("na_shuffle_int", &value, sizeof value))[lane & 31];
}

NA_WORD int64_t na_shuffle_int64(int64_t value, int lane)
{
    return ((const int64_t *)na_host_warp("na_shuffle_int64", &value, sizeof value))[lane & 31];
}

NA_WORD float na_shuffle_float(float value, int lane)
{
    return ((const float *)na_host_warp("na_shuffle_float", &value, sizeof value))[lane & 31];
}

NA_WORD double na_shuffle_double(double value, int lane)
{
    return ((const double *)na_host_warp("na_shuffle_double", &value, sizeof value))[lane & 31];
}

NA_WORD uint32_t na_bits_of_float(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

NA_WORD float na_float_of_bits(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

NA_WORD double na_double_of_bits(uint32_t low, uint32_t high)
{
    uint64_t bits = (uint64_t)high << 32 | low;
    double value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

NA_WORD void na_load_16_bytes(const void *from, uint32_t *to)
{
    if ((uintptr_t)from % 16)
        na_host_fault("16 bytes are loaded from %p", from);
    memcpy(to, from, 16);
}

NA_WORD uint16_t na_load_2_bytes_if(const uint16_t *from, int condition)
{
    return condition ? *from : 0;
}

NA_WORD float na_float_of_f16(uint16_t bits)
{
    _Float16 half;
    memcpy(&half, &bits, sizeof half);
    return (float)half;
}

NA_WORD uint16_t na_f16_of_float(float value)
{
    _Float16 half = (_Float16)value;
    uint16_t bits;
    memcpy(&bits, &half, sizeof bits);
    return bits;
}

#endif
