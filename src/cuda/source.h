/* SPDX-License-Identifier: MIT
 * The device texts, kept in the library as bytes (tools/embed.cmake). */
#ifndef NATTEN_CUDA_SOURCE_H
#define NATTEN_CUDA_SOURCE_H

#include <stddef.h>

/* One embedded file, by the name it is included by: "device/reference.cu", "core/window.h". */
typedef struct na_source {
    const char *name, *text;
} na_source;

extern const na_source na_sources[];
extern const int na_source_count;

/* Of all texts together: any change of one makes what was compiled before worthless. */
extern const char na_source_digest[];

#endif
