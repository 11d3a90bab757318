/* SPDX-License-Identifier: MIT
 * What a kernel is: an entry of src/kernels.def. To plan is to look at a checked problem, padded to
 * three axes, and either take it or refuse it with a sentence. */
#ifndef NATTEN_CORE_KERNEL_H
#define NATTEN_CORE_KERNEL_H

#include "core/status.h"
#include "core/window.h"
#include "natten.h"

typedef struct na_kernel {
    const char *name; /* <device>-<generation>-<what> */
    natten_op op;
    natten_device device;
    /* NATTEN_OK: taken, run (and state, destroy, workspace) are set.
     * NA_REFUSED: not for this kernel, na_refuse has noted why. Anything else: planning failed. */
    natten_status (*plan)(natten_plan *plan);
} na_kernel;

#define NA_REFUSED ((natten_status) - 1)

struct natten_plan {
    natten_problem
        problem; /* checked, defaults resolved, rank 3: a 2-D map has axis[0] of extent 1 */
    natten_problem merged; /* on a CPU, the same with as few axes as will do (merge.h): what every
                              kernel but the reference works on */
    int axes_merged;       /* how many axes it has fewer */
    const na_kernel *kernel;
    const char *asked; /* how names of kernels have to begin; NULL: however. Only while planning */
    natten_status (*run)(const natten_plan *plan, const natten_run *run);
    void *state;                  /* the kernel's own */
    void (*destroy)(void *state); /* NULL: free */
    size_t workspace;
    uint64_t honours;     /* the preferences that the kernel makes use of, set while planning */
    int64_t choices;      /* ways of doing it besides the first: problem.choice may be 1..choices */
    int64_t most_workers; /* of a choice for few threads; 0: as many as the run brings */
    char choice[80];      /* the one taken, in words */
    char refusal[256]; /* of the kernel asked last; if it agreed, what it had to say about that */
    char *explanation;
};

/* Notes why a kernel does not (or does) take the plan's problem; returns NA_REFUSED. */
NA_PRINTF(2, 3) natten_status na_refuse(natten_plan *plan, const char *format, ...);

/* The axis as window.h wants it. */
static inline na_axis na_axis_of(const natten_axis *axis)
{
    na_axis result = {(int)axis->global_extent, (int)axis->window, (int)axis->stride,
                      (int)axis->dilation, (int)axis->causal};
    return result;
}

static inline int na_has(const natten_problem *problem, natten_role role)
{
    return (int)(problem->roles >> role & 1);
}

/* Tokens in a window, W. */
static inline int64_t na_window_size(const natten_problem *problem)
{
    return problem->axis[0].window * problem->axis[1].window * problem->axis[2].window;
}

/* Bytes of one element. */
static inline size_t na_dtype_size(natten_dtype dtype)
{
    return dtype == NATTEN_F64 ? 8 : dtype == NATTEN_F32 ? 4 : 2;
}

static inline natten_dtype na_role_dtype(const natten_problem *problem, natten_role role)
{
    int sums = role == NATTEN_LSE || role == NATTEN_D_LSE || role == NATTEN_KEY_BIAS ||
               role == NATTEN_D_KEY_BIAS;
    return sums && problem->dtype != NATTEN_F64 ? NATTEN_F32 : (natten_dtype)problem->dtype;
}

#endif
