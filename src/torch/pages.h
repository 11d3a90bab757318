/* SPDX-License-Identifier: MIT
 * Large outputs and the pages of memory they lie in. */
#ifndef NATTEN_TORCH_PAGES_H
#define NATTEN_TORCH_PAGES_H

#include "torch/bind.h"

/* Asks for huge pages for an output, if it is large. glibc's allocator maps 32 MiB and more anew
 * each time, and whoever touches it first waits for each page: with small ones that was 10 to 40 %
 * of a forward's time. (What is smaller comes from memory that was touched before.) */
void na_prefer_huge_pages(const natten_tensor *tensor, const void *data);

#endif
