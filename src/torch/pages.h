/* SPDX-License-Identifier: MIT
 * Large outputs and the pages of memory they lie in. */
#ifndef NATTEN_TORCH_PAGES_H
#define NATTEN_TORCH_PAGES_H

#include "torch/bind.h"

/* Asks for huge pages for an output of 4 MiB and more. glibc's allocator gives such memory back to
 * the system soon, from 32 MiB on at once, and whoever then touches it first waits for each page:
 * with small ones that was up to half of a call's time. */
void na_prefer_huge_pages(const natten_tensor *tensor, const void *data);

#endif
