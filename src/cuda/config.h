/* SPDX-License-Identifier: MIT
 * The planner: which tiles the Hopper forward kernel works on. A pure function of the problem and
 * of what the device is. */
#ifndef NATTEN_CUDA_CONFIG_H
#define NATTEN_CUDA_CONFIG_H

#include "cuda/device.h"
#include "natten.h"

typedef struct na_forward_config {
    int sub[3]; /* queries of a warpgroup; times pack: 64 */
    int pack;   /* heads that share keys, worked on together */
    int groups; /* warpgroups that compute, side by side along axis `stack` */
    int stack;
    int tile[3]; /* keys of a tile */
    int halves;  /* a warpgroup may do one half of a tile */
    int key_stages, value_stages;
    int positions; /* of tiles along one axis, in the mask tables; 0: no tables */
    int raster;    /* tiles of axis 1 that follow each other */
    int shared_bytes;
    /* What is expected of it. */
    double waste;  /* computed products, relative to those of the windows */
    double masked; /* the share of them that lies in tiles that are masked */
    double seconds;
} na_forward_config;

/* Keys of a tile. */
static inline int na_forward_keys(const na_forward_config *config)
{
    return config->tile[0] * config->tile[1] * config->tile[2];
}

/* Chooses for a checked problem whose channels are multiples of 8; 0: nothing fits. */
int na_forward_config_choose(const natten_problem *problem, const na_device *device,
                             na_forward_config *config);

/* Fills in what follows from the tiles (stages, positions, bytes, expectations) or returns 0 if
 * they do not fit. For tests and measurements of tiles that the planner would not choose. */
int na_forward_config_complete(const natten_problem *problem, const na_device *device,
                               na_forward_config *config);

#endif
