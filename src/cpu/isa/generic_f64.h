/* SPDX-License-Identifier: MIT
 * Vector words for any processor, double: 2 lanes of compiler vectors. */
#define REAL_F64
typedef double real;
typedef int64_t real_bits;
typedef double vec __attribute__((vector_size(16)));
typedef int64_t vec_index __attribute__((vector_size(16)));
typedef uint64_t vec_bits __attribute__((vector_size(16)));

#include "cpu/isa/generic_words.h"

WORD vec vec_eighths(const real *t, vec shifted)
{
    /* Of powers that are too small, and not used, it wraps around. */
    return (vec)((vec_bits)vec_gather(t, (vec_index)shifted & 7) + ((vec_bits)shifted << 49));
}
WORD vec vec_split2(vec a, vec *exponent)
{
    vec_index bits = (vec_index)a, above = (bits - 0x3fe8000000000000) >> 52;
    *exponent = __builtin_convertvector(above, vec);
    return (vec)(bits - (above << 52));
}
