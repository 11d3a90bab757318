/* SPDX-License-Identifier: MIT */
#ifndef NATTEN_TORCH_REGISTER_H
#define NATTEN_TORCH_REGISTER_H

#include "natten.h"

/* Gives torch's dispatcher the kernels of the natten:: ops, whose schemas must have been defined.
 * `torch_library` is the path of any loaded library through which libtorch's symbols are reached
 * (torch._C.__file__). NATTEN_OK also when it was done before; otherwise torch has no usable stable
 * C interface, and `reason` (of `size` bytes) says what is missing. */
NATTEN_API natten_status natten_torch_register(const char *torch_library, char *reason,
                                               size_t size);

/* The status of this thread's latest call of an op that failed, and NATTEN_OK when asked again:
 * torch's exceptions carry only the text. */
NATTEN_API natten_status natten_torch_failure(void);

/* The preferences (a set of natten_preference) of the calls that begin from here on. */
NATTEN_API void natten_torch_prefer(uint64_t set);

#endif
