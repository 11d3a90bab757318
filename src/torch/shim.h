/* SPDX-License-Identifier: MIT
 * torch's stable C interface, looked up at run time: nothing of torch is needed to build or to load
 * the library. */
#ifndef NATTEN_TORCH_SHIM_H
#define NATTEN_TORCH_SHIM_H

#include "natten.h"

/* How the dispatcher calls: arguments on a stack of 64-bit words, results left in their place. The
 * callee owns every tensor and list it is handed. */
typedef void (*na_boxed)(uint64_t *stack, uint64_t arguments, uint64_t results);

typedef struct na_shim {
#define SHIM(field, symbol, result, arguments) result(*field) arguments;
#define OPTIONAL_SHIM SHIM
#include "torch/shim.def"
#undef SHIM
#undef OPTIONAL_SHIM
} na_shim;

extern na_shim na_torch;

/* The ops, one for each natten_op, as the dispatcher calls them. */
void na_torch_call(natten_op op, uint64_t *stack);

/* To be called in a forked child. */
void na_torch_note_fork(void);

#endif
