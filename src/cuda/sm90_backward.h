/* SPDX-License-Identifier: MIT
 * What a plan of the Hopper backward holds: sm90_backward.c makes it, sm90_backward_run.c runs it.
 */
#ifndef NATTEN_CUDA_SM90_BACKWARD_H
#define NATTEN_CUDA_SM90_BACKWARD_H

#include "cuda/sm90.h"

enum { NA_SM90_MOST_PASSES = 5 };

/* A launch of device/sm90_backward.cu, for each batch of a 3-D map (a tensor map has five axes). */
typedef struct na_sm90_pass {
    na_sm90_config config;
    int of_extra; /* residents are the additional tokens */
    na_launch launch;
    na_sm90_walk largest; /* over what bounds the sizes, in the first turn */
} na_sm90_pass;

/* Where d_query, or a bias' gradient of many entries, is added up, memory may not suffice for all
 * at once: batches and heads take turns, `batches` times `kv_heads` (and the heads of queries that
 * share them) at a time. The workspace of a turn: pairs of lse and delta, sums, shares of the
 * gradient of a position bias, and a counter for each launch. There are not both, sums and such
 * shares.
 *
 * Large dilations: parts of the map (na_sm90_part) follow each other within a turn and use the same
 * pairs and sums. The shares of all parts stay until they are added up. Additional tokens, whose
 * gradients every query has a part in, have a pass over the whole map beforehand. */
typedef struct na_sm90_back {
    na_sm90_pass passes[NA_SM90_MOST_PASSES];
    int count, adds, flat, parts, choices;
    na_launch delta, convert, bias;
    na_sm90_bias_end bias_arguments; /* but for addresses */
    int64_t batches, kv_heads;
    size_t pair_bytes, sum_bytes, bias_bytes;
} na_sm90_back;

/* Sizes of a pass over a turn's problem, or over a part of it; 0: too many work items. */
int na_sm90_pass_arguments(const natten_problem *problem, int flat, const na_sm90_pass *pass,
                           na_sm90_backward *arguments);

/* The problem whose sizes bound those of a pass: that of additional tokens sees the whole turn, the
 * others a part of it. */
natten_problem na_sm90_pass_problem(const natten_problem *turn, const na_sm90_pass *pass);

/* The problem of the turn that begins at a batch and a head of keys; the last turns may be
 * smaller. */
natten_problem na_sm90_turn(const natten_problem *problem, const na_sm90_back *back, int64_t batch,
                            int64_t kv_head);

int64_t na_sm90_query_tokens(const natten_problem *problem);

/* Numbers of float32, a batch: sums of d_query; shares of a bias' gradient, of all its entries. */
int64_t na_sm90_sum_count(const natten_problem *problem);
int64_t na_sm90_share_count(const natten_problem *turn, const na_sm90_back *back);

natten_status na_sm90_run_backward(const natten_plan *plan, const natten_run *run);

#endif
