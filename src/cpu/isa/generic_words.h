/* SPDX-License-Identifier: MIT
 * Vector words in the vector language gcc and clang share, for any processor.
 * Parameters: real, real_bits (integer of its size), vec and vec_index (16 bytes of them). */
#include <string.h>

enum { VL = 16 / sizeof(real), HALF = 0 };
#if defined(__aarch64__)
#define REGISTERS 32
#else
#define REGISTERS 16
#endif
#define NOT_FUSED

/* A vector in memory of no particular alignment. */
typedef vec vec_unaligned __attribute__((aligned(sizeof(real)), may_alias));
typedef vec vec_aligned __attribute__((may_alias));

WORD vec vec_set1(real a)
{
    vec zero = {0};
    return zero + a;
}
WORD vec vec_zero(void) { return (vec){0}; }
WORD vec vec_load(const real *p) { return *(const vec_aligned *)p; }
WORD vec vec_loadu(const real *p) { return *(const vec_unaligned *)p; }
WORD vec vec_load_part(const real *p, int n)
{
    vec a = {0};
    for (int i = 0; i < VL; i++)
        a[i] = i < n ? p[i] : 0;
    return a;
}
WORD void vec_store(real *p, vec a) { *(vec_aligned *)p = a; }
WORD void vec_storeu(real *p, vec a) { *(vec_unaligned *)p = a; }
WORD void vec_stream(real *p, vec a) { vec_store(p, a); }
WORD void vec_fence(void) {}
WORD void vec_store_part(real *p, int n, vec a)
{
    for (int i = 0; i < VL; i++)
        if (i < n)
            p[i] = a[i];
}
WORD vec vec_add(vec a, vec b) { return a + b; }
WORD vec vec_sub(vec a, vec b) { return a - b; }
WORD vec vec_mul(vec a, vec b) { return a * b; }
WORD vec vec_div(vec a, vec b) { return a / b; }
WORD vec vec_fma(vec a, vec b, vec c) { return a * b + c; }
WORD vec vec_select(vec_index mask, vec a, vec b)
{
    return (vec)((mask & (vec_index)a) | (~mask & (vec_index)b));
}
WORD vec vec_max(vec a, vec b) { return vec_select(a > b, a, b); }
WORD vec vec_ceil(vec a)
{
    for (int i = 0; i < VL; i++)
        a[i] = sizeof(real) == 4 ? (real)__builtin_ceilf((float)a[i]) : (real)__builtin_ceil(a[i]);
    return a;
}
WORD real vec_sum(vec a)
{
    real sum = 0;
    for (int i = 0; i < VL; i++)
        sum += a[i];
    return sum;
}
WORD vec vec_pin(vec a) { return a; }

WORD vec_index vec_index_load(const int32_t *p)
{
    vec_index a = {0};
    for (int i = 0; i < VL; i++)
        a[i] = p[i];
    return a;
}
WORD vec_index vec_index_set1(uint32_t a)
{
    vec_index zero = {0};
    return zero + (real_bits)a;
}
WORD vec_index vec_index_xor(vec_index a, vec_index b) { return a ^ b; }
WORD vec_index vec_index_multiply(vec_index a, uint32_t m, vec_index *high)
{
    vec_index low = {0};
    for (int i = 0; i < VL; i++) {
        uint64_t product = (uint64_t)(uint32_t)a[i] * m;
        low[i] = (real_bits)(uint32_t)product;
        (*high)[i] = (real_bits)(product >> 32);
    }
    return low;
}
WORD vec_index vec_index_low16(vec_index a) { return a & 0xffff; }
WORD vec_index vec_index_high16(vec_index a) { return a >> 16 & 0xffff; }
WORD vec vec_gather(const real *p, vec_index i)
{
    vec a = {0};
    for (int l = 0; l < VL; l++)
        a[l] = p[i[l]];
    return a;
}
WORD vec vec_permute(vec_index i, vec a) { return vec_gather((const real *)&a, i); }
WORD vec vec_permute2(vec_index i, vec a, vec b)
{
    vec both[2] = {a, b};
    return vec_gather((const real *)both, i);
}
WORD vec vec_keep(vec a, int key, vec_index limit, real other)
{
    return vec_select(limit > (real_bits)key, a, vec_set1(other));
}

WORD vec vec_not_below(vec a, vec low, vec x)
{
    return (vec)(~(vec_index)(a < low) & (vec_index)x);
}

WORD void vec_transpose(vec r[VL])
{
    real t[VL][VL];
    for (int i = 0; i < VL; i++)
        for (int j = 0; j < VL; j++)
            t[j][i] = r[i][j];
    for (int i = 0; i < VL; i++)
        r[i] = vec_loadu(t[i]);
}
