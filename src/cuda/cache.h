/* SPDX-License-Identifier: MIT
 * Compiled kernels on disk, a file each, found by a key: a text that says everything the kernel was
 * made from. A file holds its key and a checksum, and whatever is wrong with it - cut off, damaged,
 * another key, no permission - makes it a miss, never an error. Writers work on a file of their own
 * and rename it, so readers need no lock and the last of several writers wins with the same
 * bytes. */
#ifndef NATTEN_CUDA_CACHE_H
#define NATTEN_CUDA_CACHE_H

#include <stddef.h>

#include "cuda/jit.h"

/* The folders in the order they are asked: those of NATTEN_CACHE_DIR, a list with ':' between, of
 * which the first is the user's and is written to, the others are only read and asked first.
 * Without it $XDG_CACHE_HOME/natten, $HOME/.cache/natten or /tmp/natten-<uid>, none if they belong
 * to another user. Writes folder `index` to path; 0 past the last one. The last one is the user's.
 */
int na_cache_folder(int index, char *path, size_t size);

/* What a file holds, as its name ends: compiled kernels, or other bytes by the same rules. */
#define NA_CACHE_KERNEL ".kernel"
#define NA_CACHE_TUNED ".tuned"

/* Fills in the kernel if a folder has it. */
int na_cache_load(const char *key, na_cubin *cubin);
int na_cache_load_from(int index, const char *kind, const char *key, na_cubin *cubin);

/* Whether any folder has any file of a kernel. */
int na_cache_holds_any(void);

/* Keeps the kernel in the user's folder, which is made if it is not there; 0 if it could not be
 * kept. */
int na_cache_store(const char *key, const na_cubin *cubin);
int na_cache_store_as(const char *kind, const char *key, const na_cubin *cubin);

/* Reads one file as na_cache_load would, whatever its key; the key is malloc'ed. For listing and
 * verifying. */
int na_cache_read(const char *path, char **key, na_cubin *cubin);

#endif
