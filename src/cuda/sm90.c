/* SPDX-License-Identifier: MIT
 * Plans and runs the kernel of device/sm90_forward.cu. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "core/kernel.h"
#include "core/problem.h"
#include "cuda/config.h"
#include "cuda/device.h"
#include "cuda/driver.h"
#include "cuda/jit.h"
#include "cuda/launch.h"
#include "cuda/reference.h"
#include "cuda/sm90.h"
#include "device/sm90_forward.h"

enum { ALIGNMENT = 8, MOST_CHANNELS = 256, MOST_DILATION = 8, WARPGROUP = 128 };

typedef struct state {
    na_forward_config config;
    na_launch launch;
    int launches;              /* one for each batch of a 3-D map: a tensor map has five axes */
    na_sm90_forward arguments; /* but for addresses and tensor maps */
} state;

/* ----------------------------------------------------------------------------------------------
 * planning */

/* Whether a tensor map can walk along an axis of so many elements. */
static int is_walkable(int64_t stride, int64_t extent)
{
    return extent <= 1 || (stride > 0 && stride % ALIGNMENT == 0 && stride < (int64_t)1 << 38);
}

static natten_status check_layout(natten_plan *plan, natten_role role, int is_walked)
{
    const natten_layout *layout = &plan->problem.layout[role];
    na_shape shape = na_role_shape(&plan->problem, role);
    int64_t strides[] = {layout->batch, layout->axis[0], layout->axis[1], layout->axis[2],
                         layout->head};
    int64_t extents[] = {shape.batch, shape.extent[0], shape.extent[1], shape.extent[2],
                         shape.heads};
    for (int i = 0; i < 5; i++)
        if (is_walked ? !is_walkable(strides[i], extents[i])
                      : extents[i] > 1 && strides[i] % ALIGNMENT)
            return na_refuse(plan, "%s has a stride of %lld elements, and %s multiples of %d",
                             na_role_name(role), (long long)strides[i],
                             is_walked ? "only positive" : "only", ALIGNMENT);
    return NATTEN_OK;
}

static natten_status check_sizes(natten_plan *plan)
{
    const natten_problem *p = &plan->problem;
    if (p->dtype != NATTEN_F16 && p->dtype != NATTEN_BF16)
        return na_refuse(plan, "only float16 and bfloat16");
    if (p->head_dim % 8 || p->value_dim % 8 || p->head_dim > MOST_CHANNELS ||
        p->value_dim > MOST_CHANNELS)
        return na_refuse(plan, "only multiples of 8 up to %d channels, not %lld and %lld",
                         MOST_CHANNELS, (long long)p->head_dim, (long long)p->value_dim);
    if (na_has(p, NATTEN_RPB))
        return na_refuse(plan, "no relative position bias");
    if (na_has(p, NATTEN_KEY_BIAS))
        return na_refuse(plan, "no key bias");
    if (p->dropout > 0)
        return na_refuse(plan, "no dropout");
    if (!(p->scale > 0) || isinf((float)p->scale))
        return na_refuse(plan, "only positive scales, not %g", p->scale);
    for (int a = 0; a < 3; a++)
        if (p->axis[a].dilation > MOST_DILATION)
            return na_refuse(plan, "axis %d has dilation %lld, and only up to %d", a,
                             (long long)p->axis[a].dilation, MOST_DILATION);
    natten_role walked[] = {NATTEN_QUERY, NATTEN_KEY, NATTEN_VALUE, NATTEN_ADDITIONAL_KEY,
                            NATTEN_ADDITIONAL_VALUE};
    for (int i = 0; i < (p->additional_tokens ? 5 : 3); i++)
        if (check_layout(plan, walked[i], 1) != NATTEN_OK)
            return NA_REFUSED;
    return check_layout(plan, NATTEN_OUT, 0);
}

void na_sm90_special(const natten_problem *p, const na_forward_config *c, na_special *special)
{
    static const char *const subs[] = {"NA_SUB_0", "NA_SUB_1", "NA_SUB_2"};
    static const char *const tiles[] = {"NA_TILE_0", "NA_TILE_1", "NA_TILE_2"};
    na_special_init(special, "sm90_forward.cu", "sm_90a");
    na_special_set(special, "NA_DTYPE", p->dtype);
    na_special_set(special, "NA_DIM", p->head_dim);
    na_special_set(special, "NA_VALUE_DIM", p->value_dim);
    for (int a = 0; a < 3; a++) {
        na_special_set(special, subs[a], c->sub[a]);
        na_special_set(special, tiles[a], c->tile[a]);
    }
    na_special_set(special, "NA_PACK", c->pack);
    na_special_set(special, "NA_GROUPS", c->groups);
    na_special_set(special, "NA_STACK", c->stack);
    na_special_set(special, "NA_KEYS", na_forward_keys(c));
    na_special_set(special, "NA_HALF_KEYS", c->halves ? na_forward_keys(c) / 2 : 0);
    na_special_set(special, "NA_KEY_STAGES", c->key_stages);
    na_special_set(special, "NA_VALUE_STAGES", c->value_stages);
    na_special_set(special, "NA_POSITIONS", c->positions);
    na_special_set(special, "NA_EXTRA", p->additional_tokens > 0);
}

/* Sizes; 0: more work items than can be counted. */
int na_sm90_arguments(const natten_problem *p, const na_forward_config *c,
                      na_sm90_forward *arguments)
{
    double items = 1;
    for (int a = 0; a < 3; a++) {
        const natten_axis *from = &p->axis[a];
        na_sm90_axis *axis = &arguments->axis[a];
        int step = c->sub[a] * (a == c->stack ? c->groups : 1);
        axis->rule = na_axis_of(from);
        axis->query_origin = (int)from->query_origin;
        axis->query_extent = (int)from->query_extent;
        axis->key_origin = (int)from->key_origin;
        int queries = (int)((from->query_extent + from->dilation - 1) / from->dilation);
        axis->tiles = (queries + step - 1) / step;
        int slots = axis->tiles * axis->rule.dilation;
        items *= a == 1 ? (slots + c->raster - 1) / c->raster * c->raster : slots;
    }
    arguments->flat = p->axis[0].query_extent == 1 && p->axis[0].key_extent == 1;
    arguments->heads = (int)p->heads / c->pack;
    arguments->kv_share = (int)(p->heads / p->kv_heads) / c->pack;
    items *= (double)arguments->heads * (arguments->flat ? (double)p->batch : 1);
    arguments->items = items < 2e9 ? (int)items : 0;
    arguments->raster = c->raster;
    arguments->extra_tokens = (int)p->additional_tokens;
    arguments->scale_log2 = (float)(p->scale * 1.4426950408889634);
    /* Weights may reach 2^8 before references follow: far from where half precision ends. */
    arguments->slack = fminf(8 / arguments->scale_log2, 1e20f);
    arguments->out_layout = p->layout[NATTEN_OUT];
    arguments->lse_layout = p->layout[NATTEN_LSE];
    return arguments->items > 0;
}

static natten_status run_sm90(const natten_plan *plan, const natten_run *run);

static natten_status load(natten_plan *plan, const na_device *device, state *s)
{
    na_special special;
    na_context context;
    na_sm90_special(&plan->problem, &s->config, &special);
    natten_status status = na_context_enter(device->index, &context);
    if (status != NATTEN_OK)
        return status;
    status = na_jit_function(&special, "na_sm90_forward_kernel", &s->launch.function);
    if (status == NATTEN_OK)
        status = na_launch_allow(device, s->launch.function, s->config.shared_bytes);
    na_context_leave(context);
    return status == NATTEN_ERROR_UNSUPPORTED ? na_refuse(plan, "%s", natten_last_error()) : status;
}

natten_status na_cuda_sm90_plan(natten_plan *plan)
{
    const natten_problem *p = &plan->problem;
    const na_device *device;
    natten_status status = na_device_of(plan, &device);
    if (status == NATTEN_OK && (device->major != 9 || device->minor != 0))
        return na_refuse(plan, "%s has compute capability %d.%d, and 9.0 is needed", device->name,
                         device->major, device->minor);
    if (status == NATTEN_OK)
        status = check_sizes(plan);
    if (status != NATTEN_OK)
        return status;
    state *s = calloc(1, sizeof *s);
    if (!s)
        return na_fail(NATTEN_ERROR_MEMORY, "No memory to make a plan.");
    if (!na_forward_config_choose(p, device, &s->config))
        status = na_refuse(plan, "no tiles fit");
    /* Once wrong on an H100, in a form that is no more, for a reason not found: not until it is. */
    else if (p->additional_tokens && !s->config.positions)
        status = na_refuse(plan, "no additional tokens where tiles of keys are lines");
    else if (!na_sm90_arguments(p, &s->config, &s->arguments))
        status = na_refuse(plan, "too many tiles of queries");
    else
        status = load(plan, device, s);
    if (status != NATTEN_OK) {
        free(s);
        return status;
    }
    int items = s->arguments.items, blocks = device->multiprocessors;
    s->launch.blocks = items < blocks ? items : blocks;
    s->launch.threads = WARPGROUP * (s->config.groups + 1);
    s->launch.shared_bytes = s->config.shared_bytes;
    s->launches = s->arguments.flat ? 1 : (int)p->batch;
    plan->workspace = items > blocks ? (size_t)s->launches * sizeof(int) : 0;
    plan->state = s;
    plan->run = run_sm90;
    na_reference_prepare_backward(plan, device);
    return NATTEN_OK;
}

/* ----------------------------------------------------------------------------------------------
 * running */

enum { /* of the driver */
       MAP_F16 = 6,
       MAP_BF16 = 9,
       MAP_SWIZZLE_128_BYTES = 3,
       MAP_L2_128_BYTES = 2,
       MAP_AXES = 5
};

/* Axes from the innermost: channel, head, three more. Axes of one element have any step. */
static natten_status make_map(const natten_problem *p, na_tensor_map *map, void *data,
                              const int64_t extents[MAP_AXES], const int64_t strides[MAP_AXES],
                              const int64_t boxes[MAP_AXES], const int64_t steps[MAP_AXES])
{
    const char *why;
    const na_driver *cuda = na_driver_find(&why);
    uint64_t extent[MAP_AXES], bytes[MAP_AXES];
    uint32_t box[MAP_AXES], step[MAP_AXES];
    for (int i = 0; i < MAP_AXES; i++) {
        extent[i] = (uint64_t)extents[i];
        bytes[i] = extents[i] > 1 ? (uint64_t)strides[i] * 2 : 16;
        box[i] = (uint32_t)(boxes[i] * steps[i]);
        step[i] = (uint32_t)steps[i];
    }
    return na_driver_check(
        cuda->cuTensorMapEncodeTiled(map, p->dtype == NATTEN_F16 ? MAP_F16 : MAP_BF16, MAP_AXES,
                                     data, extent, bytes + 1, box, step, 0, MAP_SWIZZLE_128_BYTES,
                                     MAP_L2_128_BYTES, 0),
        "cuTensorMapEncodeTiled");
}

/* The map of queries, keys or values: boxes of `sub` tokens times `heads`. */
static natten_status map_tokens(const natten_plan *plan, natten_role role, void *data,
                                const int sub[3], int heads, na_tensor_map *map)
{
    const natten_problem *p = &plan->problem;
    const natten_layout *layout = &p->layout[role];
    na_shape shape = na_role_shape(p, role);
    int flat = ((const state *)plan->state)->arguments.flat;
    const int64_t extents[] = {shape.channels, shape.heads, shape.extent[2], shape.extent[1],
                               flat ? shape.batch : shape.extent[0]};
    const int64_t strides[] = {1, layout->head, layout->axis[2], layout->axis[1],
                               flat ? layout->batch : layout->axis[0]};
    const int64_t boxes[] = {NA_SM90_COLUMNS, heads, sub[2], sub[1], flat ? 1 : sub[0]};
    const int64_t steps[] = {1, 1, p->axis[2].dilation, p->axis[1].dilation,
                             flat ? 1 : p->axis[0].dilation};
    return make_map(p, map, data, extents, strides, boxes, steps);
}

static natten_status map_extra(const natten_plan *plan, natten_role role, void *data, int keys,
                               na_tensor_map *map)
{
    const natten_problem *p = &plan->problem;
    const natten_layout *layout = &p->layout[role];
    na_shape shape = na_role_shape(p, role);
    const int64_t extents[] = {shape.channels, shape.heads, p->additional_tokens, 1, shape.batch};
    const int64_t strides[] = {1, layout->head, layout->axis[0], 0, layout->batch};
    const int64_t boxes[] = {NA_SM90_COLUMNS, 1, keys, 1, 1};
    const int64_t steps[] = {1, 1, 1, 1, 1};
    return make_map(p, map, data, extents, strides, boxes, steps);
}

/* Launches for the batches from `batch` on that one launch covers. */
static natten_status run_batch(const natten_plan *plan, const natten_run *run, int batch)
{
    const state *s = plan->state;
    const natten_problem *p = &plan->problem;
    const na_forward_config *c = &s->config;
    const int keys = na_forward_keys(c);
    na_sm90_forward arguments = s->arguments;
    char *data[NATTEN_ROLES];
    natten_status status;
    for (int role = 0; role < NATTEN_ROLES; role++)
        data[role] = (char *)run->data[role] +
                     (run->data[role] ? batch * p->layout[role].batch *
                                            (int64_t)na_dtype_size(na_role_dtype(p, role))
                                      : 0);
    arguments.out = data[NATTEN_OUT];
    arguments.lse = na_has(p, NATTEN_LSE) ? (float *)data[NATTEN_LSE] : NULL;
    arguments.counter = plan->workspace ? (int *)run->workspace + batch : NULL;
    status = map_tokens(plan, NATTEN_QUERY, data[NATTEN_QUERY], c->sub, c->pack, &arguments.query);
    if (status == NATTEN_OK)
        status = map_tokens(plan, NATTEN_KEY, data[NATTEN_KEY], c->tile, 1, &arguments.key);
    if (status == NATTEN_OK)
        status = map_tokens(plan, NATTEN_VALUE, data[NATTEN_VALUE], c->tile, 1, &arguments.value);
    if (status == NATTEN_OK && p->additional_tokens)
        status = map_extra(plan, NATTEN_ADDITIONAL_KEY, data[NATTEN_ADDITIONAL_KEY], keys,
                           &arguments.extra_key);
    if (status == NATTEN_OK && p->additional_tokens)
        status = map_extra(plan, NATTEN_ADDITIONAL_VALUE, data[NATTEN_ADDITIONAL_VALUE], keys,
                           &arguments.extra_value);
    return status == NATTEN_OK ? na_launch_run(&s->launch, run->stream, &arguments) : status;
}

/* Tensor maps and wide stores want addresses that are multiples of 16. */
static int is_aligned(const natten_problem *p, const natten_run *run)
{
    for (int role = 0; role < NATTEN_ROLES; role++)
        if (na_has(p, role) && role != NATTEN_LSE && (uintptr_t)run->data[role] % 16)
            return 0;
    return 1;
}

static natten_status run_unaligned(const natten_plan *plan, const natten_run *run)
{
    natten_plan other = {.problem = plan->problem};
    natten_status status = na_cuda_reference_plan(&other);
    if (status == NA_REFUSED)
        return na_fail(NATTEN_ERROR_UNSUPPORTED, "%s", other.refusal);
    if (status == NATTEN_OK)
        status = other.run(&other, run);
    free(other.state);
    return status;
}

static natten_status run_sm90(const natten_plan *plan, const natten_run *run)
{
    const state *s = plan->state;
    const char *why;
    const na_driver *cuda = na_driver_find(&why);
    na_context context;
    if (!is_aligned(&plan->problem, run))
        return run_unaligned(plan, run);
    if (plan->workspace && !run->workspace)
        return na_fail(NATTEN_ERROR_ARGUMENT, "The run needs %zu bytes of workspace, got none.",
                       plan->workspace);
    natten_status status = na_context_enter((int)plan->problem.device_index, &context);
    if (status != NATTEN_OK)
        return status;
    if (plan->workspace)
        status = na_driver_check(cuda->cuMemsetD32Async((uint64_t)(uintptr_t)run->workspace, 0,
                                                        plan->workspace / sizeof(int), run->stream),
                                 "cuMemsetD32Async");
    for (int batch = 0; status == NATTEN_OK && batch < s->launches; batch++)
        status = run_batch(plan, run, batch);
    na_context_leave(context);
    return status;
}
