/* SPDX-License-Identifier: MIT
 * Vector words for any processor, float: 4 lanes of compiler vectors. */
typedef float real;
typedef int32_t real_bits;
typedef float vec __attribute__((vector_size(16)));
typedef int32_t vec_index __attribute__((vector_size(16)));
typedef uint32_t vec_bits __attribute__((vector_size(16)));

#include "core/half.h"
#include "cpu/isa/generic_words.h"

WORD vec vec_scale2(vec p, vec shifted, vec a, vec low)
{
    /* Of powers that are too small, and not used, it wraps around. */
    return vec_not_below(a, low, (vec)((vec_bits)p + ((vec_bits)shifted << 23)));
}
WORD vec vec_split2(vec a, vec *exponent)
{
    vec_index bits = (vec_index)a, above = bits - 0x3f400000;
    *exponent = __builtin_convertvector(above >> 23, vec);
    return (vec)(bits - (above & (int32_t)0xff800000));
}

/* The exponent is moved by a multiplication, so that denormal halves come out right. */
WORD vec vec_load_f16(const uint16_t *p)
{
    vec_index half = {0};
    for (int i = 0; i < VL; i++)
        half[i] = p[i];
    vec magnitude = (vec)((half & 0x7fff) << 13) * 0x1p112f;
    vec_index special = ((half & 0x7c00) == 0x7c00) & 0x7f800000;
    return (vec)((vec_index)magnitude | special | (half & 0x8000) << 16);
}
WORD void vec_store_f16(uint16_t *p, vec a)
{
    for (int i = 0; i < VL; i++)
        p[i] = na_f16_store(a[i]);
}
WORD vec vec_load_bf16(const uint16_t *p)
{
    vec_index bits = {0};
    for (int i = 0; i < VL; i++)
        bits[i] = (int32_t)((uint32_t)p[i] << 16);
    return (vec)bits;
}
WORD void vec_store_bf16(uint16_t *p, vec a)
{
    for (int i = 0; i < VL; i++)
        p[i] = na_bf16_store(a[i]);
}
