/* SPDX-License-Identifier: MIT
 * The CUDA driver and NVRTC, found at run time: nothing of CUDA is needed to build the library, and
 * without CUDA it works on the CPU. Both are looked for at most once per process, on first use. */
#ifndef NATTEN_CUDA_DRIVER_H
#define NATTEN_CUDA_DRIVER_H

#include <stddef.h>
#include <stdint.h>

#include "core/status.h"

typedef struct na_driver {
#define DRIVER(name, symbol, parameters) int(*name) parameters;
#include "cuda/driver.def"
} na_driver;

typedef struct na_nvrtc {
#define NVRTC(name, parameters) int(*name) parameters;
#include "cuda/driver.def"
    int major, minor;
    char path[512]; /* where it was found */
} na_nvrtc;

/* The driver, initialised; NULL if there is none that works, and then *why says so in a sentence
 * that stays valid. */
const na_driver *na_driver_find(const char **why);

/* NVRTC, with its builtins loaded. With a driver, one whose cubins the driver takes: of the
 * driver's major version or an older one. Without a driver any version goes: what it compiles can
 * be kept for elsewhere. */
const na_nvrtc *na_nvrtc_find(const char **why);

/* Fails with NATTEN_ERROR_DEVICE and a sentence if `error` is not 0: na_driver_check(error,
 * "cuLaunchKernel"). */
natten_status na_driver_check(int error, const char *call);

#endif
