/* SPDX-License-Identifier: MIT */
#ifndef NATTEN_CUDA_SM90_H
#define NATTEN_CUDA_SM90_H

#include "core/kernel.h"
#include "cuda/config.h"
#include "cuda/jit.h"
#include "device/sm90_forward.h"

natten_status na_cuda_sm90_plan(natten_plan *plan);
natten_status na_cuda_reference_plan(natten_plan *plan);

/* The pieces of planning, for tests: the specialisation, and the sizes the kernel is called with
 * (0: too many work items). */
void na_sm90_special(const natten_problem *problem, const na_forward_config *config,
                     na_special *special);
int na_sm90_arguments(const natten_problem *problem, const na_forward_config *config,
                      na_sm90_forward *arguments);

#endif
