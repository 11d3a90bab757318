/* SPDX-License-Identifier: MIT
 * Tensors for tests: memory between two forbidden pages, every byte that is no element poisoned, so
 * that reading or writing where nothing belongs is seen. */
#ifndef TENSOR_H
#define TENSOR_H

#include "problem_string.h"

typedef enum placement {
    PLACE_START,  /* begins at a forbidden page's end: aligned to everything */
    PLACE_END,    /* ends where a forbidden page begins */
    PLACE_ODD,    /* one element past an aligned address */
    PLACE_SPARSE, /* pages only where elements are, no poison: for huge strides */
    PLACE_HUGE    /* on huge pages, where the system gives them; only to be timed */
} placement;

typedef struct tensor {
    natten_role role;
    natten_dtype dtype; /* of the elements: f32 or f64 for a lse */
    test_shape shape;
    natten_layout layout;
    int64_t rows; /* lines of shape.channel elements */
    int64_t low;  /* offset of the lowest element, <= 0 */
    size_t bytes; /* from the lowest element to the end of the highest */
    char *map;    /* the mapping, with the forbidden pages */
    size_t map_bytes;
    char *base; /* where the lowest element is */
} tensor;

/* Makes the tensor of a role; 0 when there is no memory. All bytes are poison. */
int tensor_make(tensor *t, const natten_problem *problem, natten_role role, placement where);
void tensor_free(tensor *t);

/* Address of the first element, for natten_run. */
void *tensor_data(const tensor *t);
int64_t tensor_count(const tensor *t);
int64_t tensor_row_offset(const tensor *t, int64_t row);

/* Every element, in the order of the role's shape (heads before channels); write rounds. */
void tensor_write(tensor *t, const double *values);
void tensor_read(const tensor *t, double *values);

/* The elements' bytes, in the same order. */
void tensor_bytes(const tensor *t, char *bytes);
size_t tensor_element(const tensor *t);

/* Writes poison over all elements; then true if every byte is poison. */
int tensor_is_intact(tensor *t);

/* A number as the element type holds it. */
double round_to(natten_dtype dtype, double value);

#endif
