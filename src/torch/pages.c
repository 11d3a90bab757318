/* SPDX-License-Identifier: MIT */
#if defined(__linux__)
#define _GNU_SOURCE
#endif
#include "torch/pages.h"

#include <stdint.h>
#include <sys/mman.h>

void na_prefer_huge_pages(const natten_tensor *tensor, const void *data)
{
#if defined(MADV_HUGEPAGE)
    const uint64_t least = (uint64_t)4 << 20, huge = (uint64_t)2 << 20;
    const uint64_t at = (uintptr_t)data;
    uint64_t bytes = na_element_size(tensor->dtype);
    for (int64_t i = 0; i < tensor->dims; i++)
        bytes *= (uint64_t)tensor->size[i];
    if (tensor->device != NATTEN_CPU || bytes < least)
        return;
    const uint64_t first = (at + huge - 1) / huge * huge, end = (at + bytes) / huge * huge;
    /* Where there are none nothing is lost. */
    (void)madvise((void *)(uintptr_t)first, (size_t)(end - first), MADV_HUGEPAGE);
#else
    (void)tensor, (void)data;
#endif
}
