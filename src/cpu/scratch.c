/* SPDX-License-Identifier: MIT */
#if defined(__linux__)
#define _GNU_SOURCE
#endif
#include "cpu/scratch.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "core/lock.h"

/* Stands before every block, on a cache line of its own. */
typedef union header {
    struct {
        size_t bytes;
        union header *next;
    } block;
    char line[64];
} header;

static const size_t huge_page = (size_t)1 << 21;
static const size_t keep_limit = (size_t)256 << 20;

/* Blocks for the next run, under NA_LOCK_SCRATCH. */
static header *kept;
static size_t kept_bytes;

/* A kept block that is large enough and not more than four times too large. */
static header *take_kept(size_t bytes)
{
    na_lock_take(NA_LOCK_SCRATCH);
    header **link = &kept, *found = NULL;
    for (; *link; link = &(*link)->block.next)
        if ((*link)->block.bytes >= bytes && (*link)->block.bytes / 4 <= bytes) {
            found = *link;
            *link = found->block.next;
            kept_bytes -= found->block.bytes;
            break;
        }
    na_lock_give(NA_LOCK_SCRATCH);
    return found;
}

static header *make(size_t bytes)
{
    size_t alignment = bytes >= huge_page ? huge_page : 64;
    size_t whole = (bytes + sizeof(header) + alignment - 1) / alignment * alignment;
    void *memory;
    if (posix_memalign(&memory, alignment, whole))
        return NULL;
#if defined(MADV_HUGEPAGE)
    /* Packed rows are walked in many streams: small pages cost 7-20 %. */
    if (alignment == huge_page)
        madvise(memory, whole, MADV_HUGEPAGE);
#endif
    header *block = memory;
    block->block.bytes = whole - sizeof *block;
    return block;
}

void *na_scratch_take(size_t bytes)
{
    if (bytes > SIZE_MAX / 2)
        return NULL;
    header *block = take_kept(bytes);
    if (!block)
        block = make(bytes);
    if (!block)
        return NULL;
#if defined(__SANITIZE_ADDRESS__)
    /* Whatever a kernel reads before it has written it becomes NaN, and some test fails. Not more
     * than small problems need: huge ones only reserve memory. */
    const size_t poisoned = (size_t)4 << 20;
    memset(block + 1, 0xff, bytes < poisoned ? bytes : poisoned);
#endif
    return block + 1;
}

void na_scratch_give(void *memory)
{
    if (!memory)
        return;
    header *block = (header *)memory - 1;
    na_lock_take(NA_LOCK_SCRATCH);
    int keep = kept_bytes + block->block.bytes <= keep_limit;
    if (keep) {
        block->block.next = kept;
        kept = block;
        kept_bytes += block->block.bytes;
    }
    na_lock_give(NA_LOCK_SCRATCH);
    if (!keep)
        free(block);
}
