/* SPDX-License-Identifier: MIT
 * From a front end's tensors to a problem: what each front end (torch, from C and from Python, and
 * NumPy) would otherwise do for itself. Not part of natten.h: the Python package and the library
 * it comes with are the only users. */
#ifndef NATTEN_TORCH_BIND_H
#define NATTEN_TORCH_BIND_H

#include "natten.h"

enum { NATTEN_TENSOR_DIMS = 6 };

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

/* A call as a front end receives it. The caller sets everything up to `tensor` (there: the inputs);
 * natten_call_bind checks it, sets `problem`, and the sizes, strides, dtype and device of the
 * outputs in `tensor`, which the caller then allocates. */
typedef struct natten_call {
    int64_t op;    /* natten_op */
    int64_t order; /* natten_order of all but attn, d_attn, rpb and d_rpb */
    int64_t rank;  /* entries of kernel_size; stride, dilation and is_causal have as many */
    int64_t kernel_size[3]; /* along with the three below: as in natten_axis */
    int64_t stride[3];
    int64_t dilation[3];
    int64_t is_causal[3];
    int64_t blocks; /* 1: query_origin, key_origin, global_extent are given; 0: whole maps */
    int64_t query_origin[3];
    int64_t key_origin[3];
    int64_t global_extent[3];
    double scale;
    uint64_t outputs; /* the roles to compute: a set of natten_bit(role) */
    natten_tensor tensor[NATTEN_ROLES];
    natten_problem problem;
    char text[1024]; /* what is wrong, if something is */
} natten_call;

/* Finds out whether the tensors fit each other and the window. What only a plan finds out is left
 * to natten_call_run. */
NATTEN_API natten_status natten_call_bind(natten_call *call);

/* Computes what was bound. The caller has set data of the outputs; of the run only what is not
 * data. */
NATTEN_API natten_status natten_call_run(natten_call *call, natten_run *run);

/* 1 if the last axis of a tensor in this role must be consecutive in memory and is not. */
NATTEN_API int natten_call_must_copy(const natten_tensor *tensor, int64_t role);

#endif
