/* SPDX-License-Identifier: MIT
 *
 * natten.h - neighborhood attention in C
 *
 * Neighborhood attention is softmax attention in which every token of a 1-D, 2-D or 3-D map attends
 * to the window of tokens around it (Hassani et al., "Neighborhood Attention Transformer", CVPR
 * 2023; dilation: Hassani and Shi, "Dilated Neighborhood Attention Transformer", 2022; stride:
 * Hassani et al., "Generalized Neighborhood Attention", 2025). At the borders the window is shifted
 * inside, never cut.
 *
 * How it is used:
 *
 *     natten_problem problem;
 *     natten_problem_init(&problem, NATTEN_FORWARD, NATTEN_F32, 2);
 *     ...fill in extents, window, heads...
 *     natten_problem_pack(&problem, NATTEN_HEADS_LAST);
 *     natten_run run = {.data = {[NATTEN_QUERY] = q, [NATTEN_KEY] = k, [NATTEN_VALUE] = v,
 * [NATTEN_OUT] = o}}; if (natten_compute(&problem, &run) != NATTEN_OK) puts(natten_last_error());
 *
 * A problem says what is computed: sizes, windows, strides in memory, never addresses. A plan is a
 * problem for which a kernel was found; all that can be wrong with the sizes is found out while
 * planning. A run is a set of addresses. natten_compute keeps a table of plans; natten_plan_create
 * makes one by hand.
 *
 * Every function may be called from several threads at once. No function ends the process or
 * prints. A function that fails says why in natten_last_error(); it has then written to no output
 * tensor.
 */
#ifndef NATTEN_H
#define NATTEN_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(_WIN32)
#define NATTEN_API __declspec(dllexport)
#else
#define NATTEN_API __attribute__((visibility("default")))
#endif

#define NATTEN_VERSION "0.18.0"

/* The version of the library that is loaded, for example "0.18.0". */
NATTEN_API const char *natten_version(void);

/* ----------------------------------------------------------------------------------------------
 * errors */

typedef enum natten_status {
    NATTEN_OK = 0,
    NATTEN_ERROR_ARGUMENT = 1, /* a value is wrong; the text names it, the axis and the numbers */
    NATTEN_ERROR_UNSUPPORTED = 2, /* no kernel does this; the text holds every kernel's reason */
    NATTEN_ERROR_MEMORY = 3,      /* memory could not be had */
    NATTEN_ERROR_DEVICE = 4       /* the device or its driver reported a fault */
} natten_status;

/* What went wrong in this thread's latest failed call: one sentence, never NULL, valid until the
 * thread's next call into the library. */
NATTEN_API const char *natten_last_error(void);

/* ---------------------------------------------------------------------------------------------
 * problem */

/* What is computed. W is the number of tokens in a window (the product of the axes' windows), N the
 * number of additional tokens, w runs over both: 0 <= w < W + N. */
typedef enum natten_op {
    /* out = sum_w m_w p_w value_w, p = softmax_w(scale * query . key_w + rpb_w + key_bias_w); lse =
       ln sum_w exp(...); m_w is 1 without dropout, with it 0 or 1 / (1 - dropout) */
    NATTEN_FORWARD = 0,
    /* gradients of FORWARD with respect to every input, from d_out and, if given, d_lse; needs out,
       lse, and with dropout the forward's seed and offset */
    NATTEN_BACKWARD = 1,
    /* attn_w = scale * query . key_w + rpb_w + key_bias_w; slots a causal mask forbids hold
       -infinity */
    NATTEN_QK = 2,
    /* d_query, d_key, d_rpb, d_additional_key from d_attn; forbidden slots of d_attn are not read.
       (d_key_bias is what AV_BACKWARD gives as d_value for an attn of this d_attn and a d_out of
       one channel that is 1.) */
    NATTEN_QK_BACKWARD = 3,
    /* out = sum_w attn_w value_w, no softmax; forbidden slots of attn are not read */
    NATTEN_AV = 4,
    /* d_attn (forbidden slots hold 0), d_value, d_additional_value from d_out */
    NATTEN_AV_BACKWARD = 5,
    NATTEN_OPS = 6
} natten_op;

/* The element type of every tensor except lse, key_bias and their gradients, which are float32, or
 * float64 for float64. Sums and softmax are taken in float32 (float64 for float64). */
typedef enum natten_dtype {
    NATTEN_F32 = 0,
    NATTEN_F64 = 1,
    NATTEN_F16 = 2,  /* IEEE 754 binary16 */
    NATTEN_BF16 = 3, /* the upper half of a float32 */
    NATTEN_DTYPES = 4
} natten_dtype;

typedef enum natten_device { NATTEN_CPU = 0, NATTEN_CUDA = 1 } natten_device;

/* What a kernel may do where there is a choice. On a CPU there is none. */
typedef enum natten_preference {
    NATTEN_PREFER_GEMM = 1,  /* QK, AV and their backwards: kernels over matrix units */
    NATTEN_PREFER_TILED = 2, /* likewise: other kernels that keep tiles in shared memory */
    NATTEN_PREFER_TF32 = 4,  /* float32 factors may be rounded to TF32, 11 significant bits */
    /* BACKWARD: parts of d_query may be added up in any order, in a workspace; faster, and not
       bitwise repeatable */
    NATTEN_PREFER_KV_PARALLEL = 8,
    NATTEN_PREFER_LITTLE_MEMORY = 16, /* that workspace: at most a quarter of the inputs' size */
    NATTEN_PREFER_MUCH_MEMORY = 32,   /* as large as it likes; without either: the inputs' size */
    NATTEN_PREFER_USUAL = 3,          /* what natten_problem_init sets */
    NATTEN_PREFERENCES = 63           /* all of them */
} natten_preference;

/* The part a tensor plays. Shapes are written heads-last; memory order is the layout's business.
 * B batch, Q query extents, S key extents, Hq heads, Hk kv_heads, D head_dim, E value_dim. */
typedef enum natten_role {
    NATTEN_QUERY = 0, /* [B, Q..., Hq, D] */
    NATTEN_KEY = 1,   /* [B, S..., Hk, D] */
    NATTEN_VALUE = 2, /* [B, S..., Hk, E] */
    NATTEN_OUT = 3,   /* [B, Q..., Hq, E] */
    NATTEN_LSE = 4,   /* [B, Q..., Hq], natural logarithm */
    NATTEN_ATTN = 5,  /* [B, Q..., Hq, W + N]; W row-major over the window, first key first */
    NATTEN_RPB = 6,   /* [Hq, 2K-1 for each axis], relative position bias; entry (key - query) /
                         dilation + K-1 */
    NATTEN_ADDITIONAL_KEY = 7,   /* [B, N, Hk, D]: tokens that every query attends to */
    NATTEN_ADDITIONAL_VALUE = 8, /* [B, N, Hk, E] */
    NATTEN_KEY_BIAS = 9, /* [B, S..., Hk], added to every score of a key; -infinity masks the key.
                            Additional tokens have none */
    NATTEN_D_QUERY = 10, /* the gradients, shaped like what they belong to */
    NATTEN_D_KEY = 11,
    NATTEN_D_VALUE = 12,
    NATTEN_D_OUT = 13,
    NATTEN_D_LSE = 14,
    NATTEN_D_ATTN = 15,
    NATTEN_D_RPB = 16,
    NATTEN_D_ADDITIONAL_KEY = 17,
    NATTEN_D_ADDITIONAL_VALUE = 18,
    NATTEN_D_KEY_BIAS = 19,
    NATTEN_ROLES = 20
} natten_role;

/* A role as a member of a set: problem.roles |= natten_bit(NATTEN_LSE). */
static inline uint64_t natten_bit(natten_role role) { return (uint64_t)1 << role; }

/* One axis of the map. A problem usually holds a whole map: query_extent = key_extent =
 * global_extent, origins 0. It may also hold a block of queries and the block of keys around it,
 * cut from a larger map: the origins then say where the blocks begin, and global_extent how long
 * the whole axis is; the result is exactly that part of the whole result. A block of keys must hold
 * every key its queries attend to. Where the window is the whole axis (window = global_extent,
 * dilation 1) queries may lie past its end: that is cross attention, and causal then aligns query 0
 * with key 0. */
typedef struct natten_axis {
    int64_t query_extent;  /* queries along this axis, >= 0 */
    int64_t key_extent;    /* keys along this axis; 0: as query_extent */
    int64_t global_extent; /* tokens of the whole axis; 0: as key_extent */
    int64_t query_origin;  /* place of query 0 on the whole axis, >= 0 */
    int64_t key_origin;    /* place of key 0 on the whole axis, >= 0 */
    int64_t
        window; /* kernel_size K: keys a query attends to, 1 <= K, K * dilation <= global_extent */
    int64_t stride;   /* queries that share one window, 1 <= stride <= K; 1: a window each */
    int64_t dilation; /* step between the keys of a window, >= 1 */
    int64_t causal;   /* 1: only keys at or before the query; 0: both sides */
} natten_axis;

/* Where a tensor's elements lie, in elements from its first: element (b, i, h, c) is at
 * b * batch + sum_a i[a] * axis[a] + h * head + c. Channels (and attention slots) are always
 * consecutive. For additional tokens axis[0] is the step between tokens; a position bias has no
 * batch, a lse and a key bias no channels. Any stride goes for inputs, 0 (a key bias that all heads
 * share) and negative ones included; outputs must not overlap. */
typedef struct natten_layout {
    int64_t batch;
    int64_t axis[3];
    int64_t head;
} natten_layout;

typedef struct natten_problem {
    uint64_t size;        /* sizeof(natten_problem), set by natten_problem_init */
    int64_t op;           /* natten_op */
    int64_t dtype;        /* natten_dtype */
    int64_t device;       /* natten_device */
    int64_t device_index; /* which of several devices */
    uint64_t preferences; /* a set of natten_preference */
    int64_t choice;       /* a way of doing it: 0 the library's, up to natten_plan_choices others */
    int64_t rank;         /* 1, 2 or 3 axes; axis[rank - 1] is the innermost */
    natten_axis axis[3];
    int64_t batch;             /* >= 0; 0 computes nothing and succeeds */
    int64_t heads;             /* of queries */
    int64_t kv_heads;          /* of keys and values; divides heads; 0: as heads */
    int64_t head_dim;          /* channels of queries and keys */
    int64_t value_dim;         /* channels of values; 0: as head_dim */
    int64_t additional_tokens; /* N; 0: none */
    double scale;   /* multiplies query . key; in size at most 2^127, for float64 2^1023 */
    double dropout; /* FORWARD, BACKWARD: probability, from 0 to 1, that a weight is dropped; taken
                       to the nearest multiple of 2^-16. What is dropped depends on the run's seed
                       and offset, batch, head, the query's place on the whole axes and the slot,
                       and on nothing else */
    uint64_t roles; /* which tensors take part: a set of natten_bit(role) */
    natten_layout layout[NATTEN_ROLES];
} natten_problem;

/* Sets every field to its default: strides and dilations 1, batch and heads 1, scale 1, not causal,
 * on the CPU, and in `roles` the inputs and outputs the op cannot do without; all gradients the op
 * can give. To be filled in afterwards: each axis' query_extent and window, head_dim, heads,
 * scale... Optional roles (RPB, KEY_BIAS, ADDITIONAL_KEY and _VALUE, LSE of FORWARD, D_LSE, and
 * their gradients) are added, gradients nobody wants taken away, through `roles`. */
NATTEN_API void natten_problem_init(natten_problem *problem, natten_op op, natten_dtype dtype,
                                    int rank);

typedef enum natten_order {
    NATTEN_HEADS_LAST = 0, /* [B, Q..., H, D], additional tokens [B, N, H, D], lse [B, Q..., H] */
    NATTEN_HEADS_FIRST = 1 /* [B, H, Q..., D], additional tokens [B, H, N, D], lse [B, H, Q...] */
} natten_order;

/* Fills in every layout for contiguous tensors in the given order. ATTN and D_ATTN are heads-first
 * in either order, as is the custom, and so is a position bias. Call it when all sizes are set. */
NATTEN_API void natten_problem_pack(natten_problem *problem, natten_order order);

/* The window of one query of an axis: *first is the place (on the whole axis) of its first key and
 * *count the number of keys, `dilation` apart. Says which keys a block of queries needs. */
NATTEN_API natten_status natten_axis_window(const natten_axis *axis, int64_t query, int64_t *first,
                                            int64_t *count);

/* How many pairs of a query and a token in its window, or an additional one, there are, over all
 * heads and batches: what is left of a dense score matrix, borders and causal masks counted
 * exactly. Each costs head_dim multiplications for its score and value_dim for its value. */
NATTEN_API natten_status natten_pairs(const natten_problem *problem, int64_t *pairs);

/* ------------------------------------------------------------------------------------------------
 * plan */

typedef struct natten_plan natten_plan;

/* Checks the problem and finds a kernel for it: the first of the ordered list that agrees. `only`
 * limits the choice to kernels whose name begins so ("cpu-avx2", "cpu-reference"); NULL limits
 * nothing. On success *plan is to be given back with natten_plan_destroy; otherwise *plan is NULL,
 * of which the functions below say nothing: empty texts and 0. */
NATTEN_API natten_status natten_plan_create(const natten_problem *problem, const char *only,
                                            natten_plan **plan);
NATTEN_API void natten_plan_destroy(natten_plan *plan);

/* Writes which kernel was taken and why each one before it refused, a line each, into text (at most
 * size bytes, always terminated). Returns the length of the whole explanation, as snprintf does. */
NATTEN_API size_t natten_plan_explain(const natten_plan *plan, char *text, size_t size);

/* The name of the kernel taken, for example "cpu-avx512-forward". */
NATTEN_API const char *natten_plan_kernel(const natten_plan *plan);

/* Bytes of device memory that a run of this plan needs in run.workspace; 0 on a CPU. */
NATTEN_API size_t natten_plan_workspace(const natten_plan *plan);

/* How many ways of doing it the plan's kernel knows besides the one it takes by itself: its
 * problem's `choice` may be 1 to that many. And the way that this plan takes, in words. What the
 * choices are depends on the problem, the device and the version of the library. Each gives the
 * same bits again and again, for any number of threads, but for d_query where
 * NATTEN_PREFER_KV_PARALLEL is set; two that differ in more than threads may take sums in another
 * order, and so differ in last bits. */
NATTEN_API int64_t natten_plan_choices(const natten_plan *plan);
NATTEN_API const char *natten_plan_choice(const natten_plan *plan);

/* Names of all kernels, best first; NULL past the last one. */
NATTEN_API const char *natten_kernel_name(size_t index);

/* -------------------------------------------------------------------------------------------------
 * run */

/* A caller's own threads: calls task(context, w) once for each worker 0 <= w < workers, in any
 * order, on any threads, and returns when all are done. */
typedef void (*natten_task)(void *context, int64_t worker);
typedef void (*natten_parallel)(void *pool, int64_t workers, natten_task task, void *context);

typedef struct natten_run {
    void *data[NATTEN_ROLES]; /* address of each role's first element; inputs are only read */
    void *workspace;          /* natten_plan_workspace bytes of device memory */
    void *stream;             /* CUDA stream to launch on; NULL: the default stream */
    int64_t threads; /* CPU workers; 0: natten_threads() of them. Results do not depend on it */
    natten_parallel parallel; /* the caller's threads; NULL: the library's own pool */
    void *pool;               /* handed to parallel */
    uint64_t seed;            /* of dropout, along with offset: the backward wants the forward's */
    uint64_t offset;
} natten_run;

/* Runs a plan: writes every element of every output role, and nothing else. Addresses must be
 * aligned to the element size. On a CPU it returns when all is written; on CUDA when all is
 * launched. (On a CPU new outputs of several MB are written up to twice as fast if their memory was
 * asked to lie in huge pages, by madvise() on Linux: small ones are cleared one by one.) */
NATTEN_API natten_status natten_plan_run(const natten_plan *plan, const natten_run *run);

/* Plan and run in one call, with plans kept in a table (of bounded size) and looked up by the
 * problem's bytes. What front ends use. */
NATTEN_API natten_status natten_compute(const natten_problem *problem, const natten_run *run);

/* natten_compute of several problems that do not read what another writes: sequences or maps of
 * different sizes, say. All are planned and checked before anything is written; only where memory
 * then runs out while one runs, others have been written. On a CPU the small ones run side by side,
 * on the threads that runs[0] says. If one fails and `failed` is not NULL, *failed is its number.
 */
NATTEN_API natten_status natten_compute_all(const natten_problem *problems, const natten_run *runs,
                                            size_t count, size_t *failed);

/* natten_plan_workspace of the plan that natten_compute would use. */
NATTEN_API natten_status natten_workspace(const natten_problem *problem, size_t *bytes);

/* As natten_plan_explain, for the plan that natten_compute would use. */
NATTEN_API natten_status natten_explain(const natten_problem *problem, char *text, size_t size);

/* ---------------------------------------------------------------------------------------------
 * tuning
 *
 * Which choice is fastest is found by trying, and remembered for the problem's bytes (not its
 * device_index: devices of one name are alike), in this process and, by natten_autotune, in a file
 * for each device and version in the user's folder of natten_cache_folder. */

typedef struct natten_tuning {
    int64_t warmups;  /* untimed calls of each choice, >= 0 */
    int64_t rounds;   /* timed calls of each, in turns, >= 1. For natten_autotune also 0: nothing is
                         tried and no file is read, only what is remembered is used */
    int64_t thorough; /* 0: choices that look slow at first are dropped */
} natten_tuning;

typedef struct natten_tuned {
    int64_t choice;         /* the fastest */
    int64_t choices;        /* of 0..choices */
    double seconds;         /* of a call, the median */
    double default_seconds; /* the same with choice 0 */
} natten_tuned;

/* Tries the choices of a problem's plan, writing every output again and again, and remembers the
 * fastest; 0 unless another one is faster by more than chance. The outputs hold a result at the
 * end. Choices that want more workspace than choice 0 are not tried. `tuned` may be NULL. */
NATTEN_API natten_status natten_tune(const natten_problem *problem, const natten_run *run,
                                     const natten_tuning *tuning, natten_tuned *tuned);

/* Has natten_compute tune each new problem of an op whose choice is 0, and take what is remembered
 * from then on; NULL: no longer, which is how a process starts. Calls that come while another
 * thread tunes, or while their CUDA stream is captured, are not held up: they take choice 0. */
NATTEN_API natten_status natten_autotune(natten_op op, const natten_tuning *tuning);

/* Has sentences handed to a function, NULL: to none: about what tuning tries (level 0) and chooses
 * (level 1), and what a user may want to know (level 2), such as that no fast kernel takes a
 * backward. The library goes on when it returns. */
typedef void (*natten_log)(int64_t level, const char *text);
NATTEN_API void natten_log_set(natten_log log);

/* All that is remembered, as text, a line for each problem; returns its length, as snprintf does.
 * import adds such a text to what is remembered (all of it or, with an error, nothing): the version
 * must be the same. clear forgets everything, files excepted. */
NATTEN_API size_t natten_tuned_export(char *text, size_t size);
NATTEN_API natten_status natten_tuned_import(const char *text);
NATTEN_API void natten_tuned_clear(void);

/* ---------------------------------------------------------------------------------------------
 * compiled kernels
 *
 * CUDA kernels are compiled for the problem's dtype, head_dim and so on when they are first
 * planned, which takes about a second, and kept in files. */

/* Compute capability of a GPU, times ten, if there are a driver for it and a compiler, or kernels
 * that were compiled before; otherwise 0. */
NATTEN_API int64_t natten_cuda_capability(int64_t device_index);

/* Compiles what a CUDA problem's plan needs on GPUs of an architecture ("sm_90"), unless it is
 * there already, and keeps it in the user's folder. Needs no GPU, but NVRTC. */
NATTEN_API natten_status natten_compile(const natten_problem *problem, const char *arch);

/* The folders where compiled kernels are looked for, as they are asked; the last is the user's, to
 * which new ones are written. Writes the path of folder `index` and returns its length, as snprintf
 * does; 0 past the last one. */
NATTEN_API size_t natten_cache_folder(size_t index, char *path, size_t size);

/* Writes what a file of such a folder was compiled from, and returns the length of that, as
 * snprintf does; 0 if the file is no compiled kernel or is damaged. */
NATTEN_API size_t natten_cache_describe(const char *path, char *text, size_t size);

/* ---------------------------------------------------------------------------------------------
 * threads */

/* CPU workers used by default: at first as many as the process may use processors. set: count >= 1.
 */
NATTEN_API int64_t natten_threads(void);
NATTEN_API natten_status natten_threads_set(int64_t count);

#ifdef __cplusplus
}
#endif
#endif
