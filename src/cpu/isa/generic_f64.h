/* SPDX-License-Identifier: MIT
 * Vector words for any processor, double: 2 lanes of compiler vectors. */
#define REAL_F64
typedef double real;
typedef int64_t real_bits;
typedef double vec __attribute__((vector_size(16)));
typedef int64_t vec_index __attribute__((vector_size(16)));

#include "cpu/isa/generic_words.h"

WORD vec vec_eighths(const real *t, vec shifted)
{
    vec_index bits = (vec_index)shifted;
    return (vec)((vec_index)vec_gather(t, bits & 7) + (bits << 49));
}
