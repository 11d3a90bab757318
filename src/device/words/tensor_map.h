/* SPDX-License-Identifier: MIT */
#ifndef NATTEN_DEVICE_TENSOR_MAP_H
#define NATTEN_DEVICE_TENSOR_MAP_H

#include <stdint.h>

/* What the driver tells the hardware about a tensor in memory; opaque. */
typedef struct na_tensor_map {
    uint64_t opaque[16];
} __attribute__((aligned(64))) na_tensor_map;

#endif
