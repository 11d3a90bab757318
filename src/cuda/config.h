/* SPDX-License-Identifier: MIT
 * The planner: which tiles the Hopper kernels work on. A pure function of the problem and
 * of what the device is. */
#ifndef NATTEN_CUDA_CONFIG_H
#define NATTEN_CUDA_CONFIG_H

#include "cuda/device.h"
#include "natten.h"

/* Which kernel. Residents stay with a block, visitors pass by (device/sm90_walk.h): of the forward
 * and of what gives d_query residents are queries, of what gives d_key and d_value, or all three,
 * keys. */
typedef enum na_sm90_what {
    NA_SM90_FORWARD,
    NA_SM90_D_QUERY,
    NA_SM90_D_KEY,
    NA_SM90_D_ALL
} na_sm90_what;

static inline int na_sm90_is_of_keys(na_sm90_what what) { return what >= NA_SM90_D_KEY; }

typedef struct na_sm90_config {
    na_sm90_what what;
    int gives;  /* of D_KEY: 1 d_key, 2 d_value, 3 both; of D_ALL: 3 */
    int sub[3]; /* residents of a warpgroup; times pack: 64 */
    int pack;   /* heads that share keys, worked on together */
    int groups; /* warpgroups that compute, side by side along axis `stack` */
    int stack;
    int tile[3];   /* visitors of a tile */
    int halves;    /* a warpgroup may do one half of a tile */
    int stages[2]; /* of keys, of values; of the backward: of both, 0 */
    int positions; /* of tiles along one axis, in the mask tables; 0: no tables */
    int orders;    /* items that are looked ahead for */
    int raster;    /* tiles of axis 1 that follow each other */
    int shared_bytes;
    /* What is expected of it. */
    double waste;  /* computed products, relative to those of the windows */
    double masked; /* the share of them that lies in tiles that are masked */
    double seconds;
} na_sm90_config;

/* Visitors of a tile. */
static inline int na_sm90_visitors(const na_sm90_config *config)
{
    return config->tile[0] * config->tile[1] * config->tile[2];
}

/* Entries that a head of a position bias has. */
double na_sm90_head_entries(const natten_problem *problem);

/* Room for the entries of a bias whose gradient D_QUERY gives as well: all of one head; 0: it does
 * not, -1: there are too many for shared memory. */
int na_sm90_bias_entries(const natten_problem *problem, na_sm90_what what);

/* Boxes of tensor maps step by 8 tokens at most, and reach over 256, which the lines of 64 and more
 * tokens of a 1-D map do with less. An axis of larger dilation is cut into so many sets of tokens,
 * each with the dilation divided by their number (na_sm90_part). */
int na_sm90_split(const natten_problem *problem, int axis);

/* Choices of tiles besides the first. */
enum { NA_SM90_CHOICES = 5 };

/* Bytes of a word of the mask tables, which has a bit for each row of visitors of a tile. */
static inline int na_sm90_cell_bytes(const na_sm90_config *config)
{
    if (config->what != NA_SM90_D_ALL)
        return 4;
    return config->tile[0] * config->tile[1] <= 8 ? 1 : 2;
}

/* Chooses for a checked problem whose channels are multiples of 8. Of D_KEY, `config->gives` says
 * beforehand what is wanted. `choice` 0: the tiles that are expected to be fastest; 1 to
 * NA_SM90_CHOICES: the next ones. 0: nothing, or no such choice, fits. */
int na_sm90_config_choose(const natten_problem *problem, const na_device *device, na_sm90_what what,
                          int64_t choice, na_sm90_config *config);

/* The tiles in words. */
void na_sm90_config_describe(const na_sm90_config *config, char *text, size_t size);

/* Fills in what follows from the tiles (stages, positions, bytes, expectations) or returns 0 if
 * they do not fit. For tests and measurements of tiles that the planner would not choose. */
int na_sm90_config_complete(const natten_problem *problem, const na_device *device,
                            na_sm90_config *config);

#endif
