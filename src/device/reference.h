/* SPDX-License-Identifier: MIT
 * What the kernels of reference.cu are called with. */
#ifndef NATTEN_DEVICE_REFERENCE_H
#define NATTEN_DEVICE_REFERENCE_H

#include "core/window.h"
#include "natten.h"

enum { NA_REFERENCE_WARPS = 4 }; /* of a block */

typedef struct na_reference {
    natten_problem problem; /* padded to three axes */
    na_axis axis[3];        /* the same axes, as the window rule wants them */
    void *data[NATTEN_ROLES];
    uint64_t seed, offset; /* of dropout */
    /* Of dropout as well: made once, as dividing for each pair would be a slow call. */
    int threshold;
    double factor;
} na_reference;

#endif
