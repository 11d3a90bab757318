/* SPDX-License-Identifier: MIT */
#ifndef NATTEN_CUDA_REFERENCE_H
#define NATTEN_CUDA_REFERENCE_H

#include "core/kernel.h"
#include "cuda/device.h"

/* For plans of forward kernels: whoever wants a lse will probably want gradients, so their kernels
 * are compiled meanwhile. */
void na_reference_prepare_backward(const natten_plan *plan, const na_device *device);

#endif
