/* SPDX-License-Identifier: MIT
 * From a front end's tensors to a problem: what each front end (torch, from C and from Python, and
 * NumPy) would otherwise do for itself. Not part of natten.h: the Python package and the library
 * it comes with are the only users. */
#ifndef NATTEN_TORCH_BIND_H
#define NATTEN_TORCH_BIND_H

#include "natten.h"

enum { NATTEN_TENSOR_DIMS = 6, NATTEN_WINDOW_ENTRIES = 21 };

/* A tensor as its framework knows it. */
typedef struct natten_tensor {
    void *data;
    int64_t dims;                       /* -1: the tensor is not given */
    int64_t size[NATTEN_TENSOR_DIMS];   /* the first six, whatever dims is */
    int64_t stride[NATTEN_TENSOR_DIMS]; /* in elements */
    int64_t dtype;                      /* natten_dtype; -1: any other */
    int64_t device;                     /* natten_device; -1: any other */
    int64_t device_index;
} natten_tensor;

/* Bytes of an element. */
static inline size_t na_element_size(int64_t dtype)
{
    return dtype == NATTEN_F64 ? 8 : dtype == NATTEN_F32 ? 4 : 2;
}

/* A call as a front end receives it. The caller sets everything up to `tensor` (there: the inputs);
 * natten_call_bind checks it, sets what follows, and the sizes, strides, dtype and device of the
 * outputs in `tensor`, which the caller then allocates. */
typedef struct natten_call {
    int64_t op;    /* natten_op */
    int64_t order; /* natten_order of all but attn, d_attn, rpb and d_rpb */
    /* kernel_size, stride, dilation, is_causal and, of a block, query_origin, key_origin and
     * global_extent, each with an entry for each axis; and the number of all of these entries. */
    int64_t window[NATTEN_WINDOW_ENTRIES];
    int64_t entries;
    double scale;
    int64_t default_scale; /* 1: scale is head_dim ** -0.5, whatever stands above */
    double dropout;        /* as in natten_problem */
    uint64_t preferences;  /* a set of natten_preference */
    uint64_t outputs;      /* the roles to compute: a set of natten_bit(role) */
    natten_tensor tensor[NATTEN_ROLES];
    int64_t rank;
    natten_problem problem;
    char text[1024]; /* what is wrong, if something is */
} natten_call;

/* Finds out whether the tensors fit each other and the window. What only a plan finds out is left
 * to natten_call_run. */
NATTEN_API natten_status natten_call_bind(natten_call *call);

/* Computes what was bound. The caller has set data of the outputs; of the run only what is not
 * data. */
natten_status natten_call_run(natten_call *call, natten_run *run);

/* What differs from one run of a bound call to the next. In one piece, because in Python every
 * argument of a C function costs time. */
typedef struct natten_repeat {
    int64_t threads;
    void *workspace, *stream;
    uint64_t seed;
    void *data[]; /* of each role of the problem, in the order of the roles */
} natten_repeat;

/* Computes what was bound. The call stays as it is, and may run in several threads at once; what
 * went wrong is in natten_last_error. */
NATTEN_API natten_status natten_call_repeat(const natten_call *call, const natten_repeat *repeat);

/* One axis of one of several items, which are maps of different sizes. */
typedef struct natten_item_axis {
    int64_t query_extent;
    int64_t key_extent;
    int64_t kernel_size; /* along with the three below: as in natten_axis; 0: every key */
    int64_t stride;
    int64_t dilation;
    int64_t is_causal;
} natten_item_axis;

/* Computes attention within each of `count` items that lie one after another along the token axis
 * of heads-last tensors [batch, tokens, heads, channels]; `items` has rank axes for each. The call
 * is not bound: op, order, scale, outputs and all tensors, the outputs contiguous, are set. Items
 * without queries or without keys are passed over. Without a run it only checks, and *workspace is
 * set. */
NATTEN_API natten_status natten_call_items(natten_call *call, const natten_item_axis *items,
                                           int64_t count, int64_t rank, const natten_run *run,
                                           size_t *workspace);

/* Notes that there is no memory for the tensor in a role, or, if it is an input, for a contiguous
 * copy of it: its text has the name and the bytes. */
NATTEN_API natten_status natten_call_no_memory(natten_call *call, int64_t role);

/* 1 if the last axis of a tensor in this role must be consecutive in memory and is not. */
NATTEN_API int natten_call_must_copy(const natten_tensor *tensor, int64_t role);

#endif
