/* SPDX-License-Identifier: MIT
 * Plans the kernels of device/reference.cu: anything, on any GPU. */
#include "device/reference.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "core/dropout.h"
#include "core/kernel.h"
#include "core/log.h"
#include "cuda/device.h"
#include "cuda/jit.h"
#include "cuda/launch.h"
#include "cuda/reference.h"

enum { WARP = 32, MOST_BLOCKS = 1 << 30, BLOCKS_OF_A_PROCESSOR = 16, MOST_LAUNCHES = 3 };

typedef struct state {
    const na_device *device;
    na_launch launch[MOST_LAUNCHES];
    int launches;
    na_reference arguments; /* but for the addresses */
} state;

/* What an int can count. As doubles: extents may be so large that their product does not fit. */
static const double most_tokens = 0x1p31 - 1;

static double tokens(int64_t a, int64_t b, int64_t c) { return (double)a * (double)b * (double)c; }

static int wants(const natten_plan *plan, natten_role a, natten_role b)
{
    return na_has(&plan->problem, a) || na_has(&plan->problem, b);
}

/* Batch times heads times the places of the axes. */
static int64_t count(const natten_problem *p, int64_t heads, int64_t a, int64_t b, int64_t c)
{
    return p->batch * heads * a * b * c;
}

/* Adds a launch for so many tasks, a warp each. */
static natten_status add(state *s, const na_special *special, const char *name, int64_t tasks)
{
    na_launch *launch = &s->launch[s->launches++];
    int64_t blocks = (tasks + NA_REFERENCE_WARPS - 1) / NA_REFERENCE_WARPS;
    launch->blocks = blocks < MOST_BLOCKS ? blocks : MOST_BLOCKS;
    launch->threads = NA_REFERENCE_WARPS * WARP;
    return na_jit_function(special, name, &launch->function);
}

/* A block for each entry of the bias, as many as can work at a time. */
static natten_status add_bias(state *s, const na_special *special, int64_t entries)
{
    natten_status status = add(s, special, "na_reference_bias", entries);
    na_launch *launch = &s->launch[s->launches - 1];
    int64_t most = (int64_t)s->device->multiprocessors * BLOCKS_OF_A_PROCESSOR;
    launch->blocks = entries < most ? entries : most;
    launch->shared_bytes = launch->threads * (int)sizeof(double);
    return status;
}

static natten_status add_all(const natten_plan *plan, state *s, const na_special *special)
{
    const natten_problem *p = &plan->problem;
    const natten_axis *x = p->axis;
    int64_t queries = count(p, p->heads, x[0].query_extent, x[1].query_extent, x[2].query_extent);
    int64_t keys = count(p, p->kv_heads, x[0].key_extent, x[1].key_extent, x[2].key_extent) +
                   count(p, p->kv_heads, p->additional_tokens, 1, 1);
    int64_t biases =
        p->heads * (2 * x[0].window - 1) * (2 * x[1].window - 1) * (2 * x[2].window - 1);
    int gives_out = p->op == NATTEN_FORWARD || p->op == NATTEN_AV;
    int gives_slots =
        p->op == NATTEN_QK || (p->op == NATTEN_AV_BACKWARD && na_has(p, NATTEN_D_ATTN));
    natten_status status = NATTEN_OK;
    if (gives_out || na_has(p, NATTEN_D_QUERY))
        status = add(s, special, "na_reference_query", queries);
    if (status == NATTEN_OK && gives_slots)
        status = add(s, special, "na_reference_slots", queries);
    if (status == NATTEN_OK && (wants(plan, NATTEN_D_KEY, NATTEN_D_VALUE) ||
                                wants(plan, NATTEN_D_ADDITIONAL_KEY, NATTEN_D_ADDITIONAL_VALUE) ||
                                na_has(p, NATTEN_D_KEY_BIAS)))
        status = add(s, special, "na_reference_key", keys);
    if (status == NATTEN_OK && na_has(p, NATTEN_D_RPB))
        status = add_bias(s, special, biases);
    return status;
}

static natten_status run_reference(const natten_plan *plan, const natten_run *run)
{
    const state *s = plan->state;
    na_reference arguments = s->arguments;
    na_context context;
    memcpy(arguments.data, run->data, sizeof arguments.data);
    arguments.seed = run->seed;
    arguments.offset = run->offset;
    natten_status status = na_context_enter((int)plan->problem.device_index, &context);
    if (status != NATTEN_OK)
        return status;
    for (int i = 0; status == NATTEN_OK && i < s->launches; i++)
        status = na_launch_run(&s->launch[i], run->stream, &arguments);
    na_context_leave(context);
    return status;
}

static na_special special_of(const natten_plan *plan, const na_device *device, natten_op op)
{
    na_special special;
    char arch[NA_ARCH];
    na_arch_of(device, 0, arch);
    na_special_init(&special, "reference.cu", arch);
    na_special_set(&special, "NA_OP", op);
    na_special_set(&special, "NA_DTYPE", plan->problem.dtype);
    return special;
}

void na_reference_prepare_backward(const natten_plan *plan, const na_device *device)
{
    if (plan->problem.op != NATTEN_FORWARD || !na_has(&plan->problem, NATTEN_LSE))
        return;
    na_special special = special_of(plan, device, NATTEN_BACKWARD);
    na_jit_prepare(&special);
}

/* Training that would be far faster with other sizes should not stay so unnoticed. Whoever asks for
 * these kernels by name knows. */
static void warn(natten_plan *plan, const na_device *device)
{
    static atomic_flag warned = ATOMIC_FLAG_INIT;
    if (plan->problem.op != NATTEN_BACKWARD || plan->asked || na_device_is_rehearsed())
        return;
    na_refuse(plan, "right, but slow: no fast kernel takes this backward");
    if (!atomic_flag_test_and_set(&warned))
        na_log(NA_LOG_WARNING,
               "A backward on %s runs on reference kernels, which are right, but slow. %s",
               device->name,
               plan->explanation ? plan->explanation : "Addresses are not multiples of 16.");
}

natten_status na_cuda_reference_plan(natten_plan *plan)
{
    const natten_axis *x = plan->problem.axis;
    const na_device *device;
    na_context context;
    natten_status status = na_device_of(plan, &device);
    if (status != NATTEN_OK)
        return status;
    if (tokens(x[0].query_extent, x[1].query_extent, x[2].query_extent) > most_tokens ||
        tokens(x[0].key_extent, x[1].key_extent, x[2].key_extent) > most_tokens ||
        tokens(2 * x[0].window, 2 * x[1].window, 2 * x[2].window) > most_tokens)
        return na_refuse(plan,
                         "it counts the tokens of a map and the entries of a bias in 31 bits");
    na_special special = special_of(plan, device, (natten_op)plan->problem.op);
    state *s = calloc(1, sizeof *s);
    if (!s)
        return na_fail(NATTEN_ERROR_MEMORY, "No memory to make a plan.");
    s->device = device;
    s->arguments.problem = plan->problem;
    s->arguments.threshold = na_dropout_threshold(plan->problem.dropout);
    s->arguments.factor = na_dropout_factor(s->arguments.threshold);
    for (int i = 0; i < 3; i++)
        s->arguments.axis[i] = na_axis_of(&plan->problem.axis[i]);
    status = na_context_enter(device->index, &context);
    if (status == NATTEN_OK) {
        status = add_all(plan, s, &special);
        na_context_leave(context);
    }
    if (status == NATTEN_OK) {
        plan->state = s;
        plan->run = run_reference;
        warn(plan, device);
        na_reference_prepare_backward(plan, device);
        return NATTEN_OK;
    }
    free(s);
    return status == NATTEN_ERROR_UNSUPPORTED ? na_refuse(plan, "%s", natten_last_error()) : status;
}
