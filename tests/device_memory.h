/* SPDX-License-Identifier: MIT
 * Runs of CUDA plans with the tensors of a trial: copied to the device with the poison around them,
 * and back. */
#ifndef DEVICE_MEMORY_H
#define DEVICE_MEMORY_H

#include "tensor.h"

/* NULL, or what went wrong. */
const char *device_run(const natten_plan *plan, tensor tensors[NATTEN_ROLES], natten_run run);

#endif
