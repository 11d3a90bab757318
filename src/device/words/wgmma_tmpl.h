/* SPDX-License-Identifier: MIT
 * The matrix product of a warpgroup for one shape: result[64, N] (+)= a[64, 16] b[16, N].
 * Parameters: NA_PRODUCT, the name; NA_PRODUCT_N, the digits of N, a multiple of 8 up to 256;
 * NA_PRODUCT_B: 0 if b lies in shared memory as [N, 16] (keys), 1 as [16, N] (values);
 * NA_PRODUCT_A, if it is not 0: 1 if a, in shared memory, lies there as [16, 64].
 *
 * <name>_shared takes a from shared memory, <name>_registers from registers. `more`: whether the
 * product is added to the result or replaces it. Inputs are written as outputs ("+") so that they
 * come first, and the results' numbers do not depend on how many there are. */
#ifndef NA_PRODUCT_A
#define NA_PRODUCT_A 0
#endif
#define NA_JOIN_(a, b) a##b
#define NA_JOIN(a, b) NA_JOIN_(a, b)
#define NA_TEXT_(a) #a
#define NA_TEXT(a) NA_TEXT_(a)
#define NA_WGMMA                                                                                   \
    "{.reg .pred more; setp.ne.b32 more, %5, 0; wgmma.mma_async.sync.aligned.m64n" NA_TEXT(        \
        NA_PRODUCT_N) "k16.f32." NA_HALF_TEXT "." NA_HALF_TEXT                                     \
                      " {" NA_JOIN(NA_REGISTERS_, NA_PRODUCT_N) "}, "

NA_WORD void NA_JOIN(NA_PRODUCT, _shared)(float *result, uint64_t a, uint64_t b, int more)
{
#ifdef __CUDACC__
    int unused = 0;
    asm volatile(NA_WGMMA
                 "%0, %1, more, 1, 1, " NA_TEXT(NA_PRODUCT_A) ", " NA_TEXT(NA_PRODUCT_B) ";}"
                 : "+l"(a), "+l"(b), "+r"(unused), "+r"(unused), "+r"(unused), "+r"(more),
                   NA_JOIN(NA_ACCUMULATORS_, NA_PRODUCT_N)(result));
#else
    na_host_product(result, NULL, a, b, NA_PRODUCT_N, NA_PRODUCT_A, NA_PRODUCT_B, more);
#endif
}

NA_WORD void NA_JOIN(NA_PRODUCT, _registers)(float *result, uint32_t *a, uint64_t b, int more)
{
#ifdef __CUDACC__
    asm volatile(NA_WGMMA "{%0, %1, %2, %3}, %4, more, 1, 1, " NA_TEXT(NA_PRODUCT_B) ";}"
                 : "+r"(a[0]), "+r"(a[1]), "+r"(a[2]), "+r"(a[3]), "+l"(b), "+r"(more),
                   NA_JOIN(NA_ACCUMULATORS_, NA_PRODUCT_N)(result));
#else
    na_host_product(result, a, 0, b, NA_PRODUCT_N, 0, NA_PRODUCT_B, more);
#endif
}

#undef NA_WGMMA
#undef NA_PRODUCT
#undef NA_PRODUCT_N
#undef NA_PRODUCT_B
#undef NA_PRODUCT_A
