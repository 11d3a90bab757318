/* SPDX-License-Identifier: MIT
 * Every environment variable the library reads, each read once. */
#ifndef NATTEN_CORE_ENV_H
#define NATTEN_CORE_ENV_H

/* NATTEN_DISABLE: words, separated by commas, that switch parts of the library off: names of
 * instruction sets ("avx512", "avx2"), devices ("cuda"), kernels ("cpu-avx2-forward"), or "native"
 * (the torch tier). */
int na_disabled(const char *word);

/* Any other variable, NULL if it is unset or empty: NATTEN_CACHE_DIR, NATTEN_JIT, NATTEN_NVRTC, and
 * HOME, XDG_CACHE_HOME, CUDA_HOME, NVRTC_APPEND_FLAGS, which are others' to define. */
const char *na_environment(const char *name);

#endif
