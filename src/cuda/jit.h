/* SPDX-License-Identifier: MIT
 * Device texts made into kernels at run time. A specialisation says which text of src/device, for
 * which architecture, under which macros. It is looked up in memory, in the folders of compiled
 * kernels (cache.h), and then compiled by NVRTC. */
#ifndef NATTEN_CUDA_JIT_H
#define NATTEN_CUDA_JIT_H

#include <stddef.h>
#include <stdint.h>

#include "core/status.h"
#include "cuda/device.h"

enum { NA_MACROS = 32, NA_ARCH = 24 };

typedef struct na_macro {
    char name[24];
    int64_t value;
} na_macro;

/* Compared by its bytes: made by na_special_init, extended by na_special_set, never by hand. Put
 * into macros what changes the code, and only that; sizes, windows and strides are arguments. */
typedef struct na_special {
    char source[32];    /* "reference.cu" */
    char arch[NA_ARCH]; /* "sm_75", "sm_90a" */
    na_macro macros[NA_MACROS];
} na_special;

void na_special_init(na_special *special, const char *source, const char *arch);

/* -Dname=value. The order of calls is part of the identity. */
void na_special_set(na_special *special, const char *name, int64_t value);

/* Writes the specialisation as a line of text: "reference.cu sm_75 NA_OP=0 NA_DTYPE=2". */
size_t na_special_text(const na_special *special, char *text, size_t size);

/* A kernel compiled for its architecture; bytes are malloc'ed. */
typedef struct na_cubin {
    void *bytes;
    size_t size;
} na_cubin;

/* Compiles, without looking anywhere first; needs NVRTC, but no driver and no GPU. If log is not
 * NULL, *log is what the compiler said (registers, spills, warnings), malloc'ed, also on failure.
 */
natten_status na_jit_compile(const na_special *special, na_cubin *cubin, char **log);

/* The loaded kernel: `name` is that of a __global__ function of the text. Valid on every
 * device that takes the architecture, until the process ends. Fails with NATTEN_ERROR_UNSUPPORTED
 * where it would have to be compiled and there is no NVRTC, or NATTEN_JIT=off. Call it with a
 * context entered (na_context_enter). Safe during stream capture. */
natten_status na_jit_function(const na_special *special, const char *name, void **function);

/* Starts to look for, or compile, what will be wanted soon, on a thread of its own, and returns.
 * What goes wrong is left for na_jit_function to meet again. */
void na_jit_prepare(const na_special *special);

/* The architecture to compile for: "sm_90" for compute capability 9.0, and "sm_90a" where the text
 * needs what only that generation has. */
void na_arch_of(const na_device *device, int only_this_generation, char arch[NA_ARCH]);

#endif
