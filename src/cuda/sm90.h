/* SPDX-License-Identifier: MIT
 * Plans of the Hopper kernels: sm90.c has the forward, sm90_backward.c the backward, sm90_common.c
 * what they share. */
#ifndef NATTEN_CUDA_SM90_H
#define NATTEN_CUDA_SM90_H

#include "core/kernel.h"
#include "cuda/config.h"
#include "cuda/jit.h"
#include "cuda/launch.h"
#include "device/sm90_backward.h"
#include "device/sm90_forward.h"

enum { NA_SM90_WARPGROUP = 128 }; /* threads */

natten_status na_cuda_sm90_plan(natten_plan *plan);
natten_status na_cuda_sm90_backward_plan(natten_plan *plan);
natten_status na_cuda_reference_plan(natten_plan *plan);

/* The pieces of planning, for tests: the specialisation, and the sizes the kernel is called with
 * (0: too many work items). */
void na_sm90_special(const natten_problem *problem, const na_sm90_config *config,
                     na_special *special);
int na_sm90_arguments(const natten_problem *problem, const na_sm90_config *config,
                      na_sm90_forward *arguments);

/* The specialisations of a backward, most that there are; returns how many (0: no tiles fit). */
enum { NA_SM90_BACKWARD_TEXTS = 7 };
int na_sm90_backward_specials(const natten_problem *problem, const na_device *device,
                              na_special specials[NA_SM90_BACKWARD_TEXTS]);

/* Starts to compile the backward of a forward whose lse is wanted: it is at hand, then, when it is
 * called. */
void na_sm90_prepare_backward(const natten_plan *plan, const na_device *device);

/* ----------------------------------------------------------------------------------------------
 * shared by the plans */

/* The device, if it is a Hopper; else NA_REFUSED. */
natten_status na_sm90_device_of(natten_plan *plan, const na_device **device);

/* Refuse what no kernel of Hopper does: by sizes; by a role's layout, `is_walked` by boxes, or
 * else by rows. */
natten_status na_sm90_check_sizes(natten_plan *plan);
natten_status na_sm90_check_layout(natten_plan *plan, natten_role role, int is_walked);

/* Whether entries of a position bias lie further behind the first than 31 bits count; whether
 * scores are scaled before they are compared with each other; the bias, but for its address. */
int na_sm90_bias_is_far(const natten_problem *problem);
int na_sm90_is_scaled(const natten_problem *problem);
void na_sm90_bias_of(const natten_problem *problem, na_sm90_bias *bias);

/* Large dilations: the problem is so many parts that know nothing of each other, each of tokens
 * that are congruent modulo na_sm90_split along each axis, and of smaller dilations. */
int na_sm90_parts(const natten_problem *problem);

/* Part number `number`, and how many elements behind a role's first its own first is. 0: it has no
 * queries (but maybe keys, whose gradients are 0). */
int na_sm90_part(const natten_problem *problem, int number, natten_problem *part,
                 int64_t first[NATTEN_ROLES]);

/* Sizes that no part exceeds: walks over it have as many tiles as any part's, or more. */
natten_problem na_sm90_largest_part(const natten_problem *problem);

/* Macros that all texts have. */
void na_sm90_special_tiles(const natten_problem *problem, const na_sm90_config *config,
                           na_special *special);

/* Whether the outermost axis of boxes is the batch (a tensor map has five axes). Of deep maps it is
 * axis 0, and each batch has a launch. */
int na_sm90_is_flat(const natten_problem *problem);

/* Sizes of the walk; 0: more work items than can be counted. */
int na_sm90_walk_of(const natten_problem *problem, const na_sm90_config *config, int flat,
                    na_sm90_walk *walk);

/* Compiles and loads; a kernel that cannot be had is a refusal. */
natten_status na_sm90_load(natten_plan *plan, const na_device *device, const na_special *special,
                           const char *name, na_launch *launch);

/* A tensor as boxes of tokens, `step` apart, times heads. */
typedef struct na_sm90_boxes {
    natten_role role;
    int flat;
    int box[3], step[3], heads;
} na_sm90_boxes;
natten_status na_sm90_map(const natten_problem *problem, const na_sm90_boxes *boxes, void *data,
                          na_tensor_map *map);

/* Additional keys or values, as boxes of so many tokens; outermost axis: the batch if `flat`. */
natten_status na_sm90_map_extra(const natten_problem *problem, natten_role role, void *data,
                                int tokens, int flat, na_tensor_map *map);

/* lse and delta of queries (device/sm90_backward.h). */
natten_status na_sm90_map_pairs(const natten_problem *problem, const na_sm90_boxes *boxes,
                                void *data, na_tensor_map *map);

/* The sums that become d_query (na_sm90_sum_place). */
natten_status na_sm90_map_sums(const natten_problem *problem, const na_sm90_boxes *boxes,
                               void *data, na_tensor_map *map);

/* Addresses for the batch, where there is a launch for each. */
void na_sm90_addresses(const natten_problem *problem, const natten_run *run, int batch,
                       char *data[NATTEN_ROLES]);

/* Tensor maps and wide stores want addresses that are multiples of 16; without, the reference
 * kernels run. */
int na_sm90_is_aligned(const natten_problem *problem, const natten_run *run);
natten_status na_sm90_run_unaligned(const natten_plan *plan, const natten_run *run);

#endif
