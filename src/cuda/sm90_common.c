/* SPDX-License-Identifier: MIT
 * What the plans of the Hopper kernels share. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "core/problem.h"
#include "cuda/driver.h"
#include "cuda/sm90.h"

enum { ALIGNMENT = 8, MOST_CHANNELS = 256 };

/* ----------------------------------------------------------------------------------------------
 * planning */

natten_status na_sm90_device_of(natten_plan *plan, const na_device **device)
{
    natten_status status = na_device_of(plan, device);
    if (status == NATTEN_OK && ((*device)->major != 9 || (*device)->minor != 0))
        return na_refuse(plan, "%s has compute capability %d.%d, and 9.0 is needed",
                         (*device)->name, (*device)->major, (*device)->minor);
    return status;
}

/* Whether a tensor map can walk along an axis of so many elements. */
static int is_walkable(int64_t stride, int64_t extent)
{
    return extent <= 1 || (stride > 0 && stride % ALIGNMENT == 0 && stride < (int64_t)1 << 38);
}

natten_status na_sm90_check_layout(natten_plan *plan, natten_role role, int is_walked)
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

natten_status na_sm90_check_sizes(natten_plan *plan)
{
    const natten_problem *p = &plan->problem;
    if (p->dtype != NATTEN_F16 && p->dtype != NATTEN_BF16)
        return na_refuse(plan, "only float16 and bfloat16");
    if (p->head_dim % 8 || p->value_dim % 8 || p->head_dim > MOST_CHANNELS ||
        p->value_dim > MOST_CHANNELS)
        return na_refuse(plan, "only multiples of 8 up to %d channels, not %lld and %lld",
                         MOST_CHANNELS, (long long)p->head_dim, (long long)p->value_dim);
    if (na_has(p, NATTEN_KEY_BIAS))
        return na_refuse(plan, "no key bias");
    if (p->dropout > 0)
        return na_refuse(plan, "no dropout");
    return NATTEN_OK;
}

int na_sm90_bias_is_far(const natten_problem *p)
{
    const natten_layout *bias = &p->layout[NATTEN_RPB];
    double reach = fabs((double)bias->head) * (double)p->heads;
    for (int a = 0; a < 3; a++)
        reach += fabs((double)bias->axis[a]) * (double)(2 * p->axis[a].window);
    return na_has(p, NATTEN_RPB) && reach > 2e9;
}

int na_sm90_is_scaled(const natten_problem *p)
{
    return na_has(p, NATTEN_RPB) || !((float)p->scale > 0);
}

void na_sm90_bias_of(const natten_problem *p, na_sm90_bias *bias)
{
    *bias = (na_sm90_bias){.head = (int)p->layout[NATTEN_RPB].head};
    for (int a = 0; a < 3; a++)
        bias->step[a] = (int)p->layout[NATTEN_RPB].axis[a];
}

void na_sm90_special_tiles(const natten_problem *p, const na_sm90_config *c, na_special *special)
{
    static const char *const subs[] = {"NA_SUB_0", "NA_SUB_1", "NA_SUB_2"};
    static const char *const tiles[] = {"NA_TILE_0", "NA_TILE_1", "NA_TILE_2"};
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
    na_special_set(special, "NA_VISITORS", na_sm90_visitors(c));
    na_special_set(special, "NA_POSITIONS", c->positions);
    na_special_set(special, "NA_ORDERS", c->orders);
}

int na_sm90_is_flat(const natten_problem *p)
{
    return p->axis[0].query_extent == 1 && p->axis[0].key_extent == 1;
}

int na_sm90_walk_of(const natten_problem *p, const na_sm90_config *c, int flat, na_sm90_walk *walk)
{
    int of_keys = na_sm90_is_of_keys(c->what);
    double items = 1;
    for (int a = 0; a < 3; a++) {
        const natten_axis *from = &p->axis[a];
        na_sm90_axis *axis = &walk->axis[a];
        int step = c->sub[a] * (a == c->stack ? c->groups : 1);
        axis->rule = na_axis_of(from);
        axis->origin = (int)(of_keys ? from->key_origin : from->query_origin);
        axis->extent = (int)(of_keys ? from->key_extent : from->query_extent);
        axis->visitor_origin = (int)(of_keys ? from->query_origin : from->key_origin);
        axis->visitor_extent = (int)(of_keys ? from->query_extent : from->key_extent);
        int residents = (int)((axis->extent + from->dilation - 1) / from->dilation);
        axis->tiles = (residents + step - 1) / step;
        int slots = axis->tiles * axis->rule.dilation;
        items *= a == 1 ? (slots + c->raster - 1) / c->raster * c->raster : slots;
    }
    walk->flat = flat;
    walk->heads = (int)(of_keys ? p->kv_heads : p->heads / c->pack);
    walk->share = (int)(p->heads / p->kv_heads) / c->pack;
    items *= (double)walk->heads * (flat ? (double)p->batch : 1);
    walk->items = items < 2e9 ? (int)items : 0;
    walk->raster = c->raster;
    walk->extra_tokens = (int)p->additional_tokens;
    return walk->items > 0;
}

natten_status na_sm90_load(natten_plan *plan, const na_device *device, const na_special *special,
                           const char *name, na_launch *launch)
{
    na_context context;
    natten_status status = na_context_enter(device->index, &context);
    if (status != NATTEN_OK)
        return status;
    status = na_jit_function(special, name, &launch->function);
    if (status == NATTEN_OK)
        status = na_launch_allow(device, launch->function, launch->shared_bytes);
    na_context_leave(context);
    return status == NATTEN_ERROR_UNSUPPORTED ? na_refuse(plan, "%s", natten_last_error()) : status;
}

/* ----------------------------------------------------------------------------------------------
 * parts */

int na_sm90_parts(const natten_problem *p)
{
    int parts = 1;
    for (int a = 0; a < 3; a++)
        parts *= na_sm90_split(p, a);
    return parts;
}

/* Of tokens origin..origin + extent - 1 those that are congruent to `residue`: counted as a set of
 * their own. Gives the place of the first among all of them. */
static int64_t cut(int64_t *origin, int64_t *extent, int split, int residue)
{
    int64_t first = (*origin - residue + split - 1) / split;
    int64_t end = (*origin + *extent - residue + split - 1) / split;
    int64_t place = first * split + residue - *origin;
    *origin = first;
    *extent = end - first;
    return end > first ? place : 0;
}

static int is_of_keys(natten_role role)
{
    return role == NATTEN_KEY || role == NATTEN_VALUE || role == NATTEN_KEY_BIAS ||
           role == NATTEN_D_KEY || role == NATTEN_D_VALUE || role == NATTEN_D_KEY_BIAS;
}

static int has_tokens(natten_role role)
{
    return role != NATTEN_RPB && role != NATTEN_D_RPB && role != NATTEN_ADDITIONAL_KEY &&
           role != NATTEN_ADDITIONAL_VALUE && role != NATTEN_D_ADDITIONAL_KEY &&
           role != NATTEN_D_ADDITIONAL_VALUE;
}

int na_sm90_part(const natten_problem *problem, int number, natten_problem *part,
                 int64_t first[NATTEN_ROLES])
{
    *part = *problem;
    memset(first, 0, NATTEN_ROLES * sizeof *first);
    for (int a = 2; a >= 0; a--) {
        natten_axis *x = &part->axis[a];
        int split = na_sm90_split(problem, a), residue = number % split;
        int64_t queries = cut(&x->query_origin, &x->query_extent, split, residue);
        int64_t keys = cut(&x->key_origin, &x->key_extent, split, residue);
        number /= split;
        x->global_extent = (x->global_extent - residue + split - 1) / split;
        x->dilation /= split;
        for (int role = 0; role < NATTEN_ROLES; role++)
            if (has_tokens(role)) {
                first[role] += problem->layout[role].axis[a] * (is_of_keys(role) ? keys : queries);
                part->layout[role].axis[a] *= split;
            }
    }
    return part->axis[0].query_extent * part->axis[1].query_extent * part->axis[2].query_extent > 0;
}

natten_problem na_sm90_largest_part(const natten_problem *problem)
{
    natten_problem p = *problem;
    for (int a = 0; a < 3; a++) {
        int split = na_sm90_split(problem, a);
        p.axis[a].query_extent = (p.axis[a].query_extent + split - 1) / split;
        p.axis[a].key_extent = (p.axis[a].key_extent + split - 1) / split;
        p.axis[a].dilation /= split;
    }
    return p;
}

/* ----------------------------------------------------------------------------------------------
 * tensor maps */

enum { /* of the driver */
       MAP_F16 = 6,
       MAP_F32 = 7,
       MAP_BF16 = 9,
       MAP_SWIZZLE_NONE = 0,
       MAP_SWIZZLE_128_BYTES = 3,
       MAP_L2_128_BYTES = 2,
       MAP_AXES = 5
};

/* Axes from the innermost. Axes of one element have any stride. */
static natten_status make_map(na_tensor_map *map, int type, void *data,
                              const int64_t extents[MAP_AXES], const int64_t strides[MAP_AXES],
                              const int64_t boxes[MAP_AXES], const int64_t steps[MAP_AXES])
{
    /* Rows of 128 bytes, as products read them and as columns of sums are stored. */
    const int64_t row = boxes[0] * (type == MAP_F32 ? 4 : 2);
    const char *why;
    const na_driver *cuda = na_driver_find(&why);
    uint64_t extent[MAP_AXES], bytes[MAP_AXES];
    uint32_t box[MAP_AXES], step[MAP_AXES];
    for (int i = 0; i < MAP_AXES; i++) {
        extent[i] = (uint64_t)extents[i];
        bytes[i] = extents[i] > 1 ? (uint64_t)strides[i] * (type == MAP_F32 ? 4 : 2) : 16;
        box[i] = (uint32_t)(boxes[i] * steps[i]);
        step[i] = (uint32_t)steps[i];
    }
    int swizzle = row == 128 ? MAP_SWIZZLE_128_BYTES : MAP_SWIZZLE_NONE;
    return na_driver_check(cuda->cuTensorMapEncodeTiled(map, type, MAP_AXES, data, extent,
                                                        bytes + 1, box, step, 0, swizzle,
                                                        MAP_L2_128_BYTES, 0),
                           "cuTensorMapEncodeTiled");
}

static int type_of(const natten_problem *p) { return p->dtype == NATTEN_F16 ? MAP_F16 : MAP_BF16; }

natten_status na_sm90_map(const natten_problem *p, const na_sm90_boxes *b, void *data,
                          na_tensor_map *map)
{
    const natten_layout *layout = &p->layout[b->role];
    na_shape shape = na_role_shape(p, b->role);
    const int64_t extents[] = {shape.channels, shape.heads, shape.extent[2], shape.extent[1],
                               b->flat ? shape.batch : shape.extent[0]};
    const int64_t strides[] = {1, layout->head, layout->axis[2], layout->axis[1],
                               b->flat ? layout->batch : layout->axis[0]};
    const int64_t boxes[] = {NA_SM90_COLUMNS, b->heads, b->box[2], b->box[1],
                             b->flat ? 1 : b->box[0]};
    const int64_t steps[] = {1, 1, b->step[2], b->step[1], b->flat ? 1 : b->step[0]};
    return make_map(map, type_of(p), data, extents, strides, boxes, steps);
}

natten_status na_sm90_map_extra(const natten_problem *p, natten_role role, void *data, int tokens,
                                int flat, na_tensor_map *map)
{
    const natten_layout *layout = &p->layout[role];
    na_shape shape = na_role_shape(p, role);
    const int64_t extents[] = {shape.channels, shape.heads, p->additional_tokens, 1,
                               flat ? shape.batch : 1};
    const int64_t strides[] = {1, layout->head, layout->axis[0], 0, layout->batch};
    const int64_t boxes[] = {NA_SM90_COLUMNS, 1, tokens, 1, 1};
    const int64_t steps[] = {1, 1, 1, 1, 1};
    return make_map(map, type_of(p), data, extents, strides, boxes, steps);
}

natten_status na_sm90_map_pairs(const natten_problem *p, const na_sm90_boxes *b, void *data,
                                na_tensor_map *map)
{
    const int64_t n[] = {p->axis[0].query_extent, p->axis[1].query_extent, p->axis[2].query_extent};
    const int64_t row = NA_SM90_PAIR * n[2], plane = row * n[1], head = plane * n[0];
    const int64_t extents[] = {NA_SM90_PAIR, n[2], n[1], b->flat ? p->batch : n[0], p->heads};
    const int64_t strides[] = {1, NA_SM90_PAIR, row, b->flat ? head * p->heads : plane, head};
    const int64_t boxes[] = {NA_SM90_PAIR, b->box[2], b->box[1], b->flat ? 1 : b->box[0], 1};
    const int64_t steps[] = {1, b->step[2], b->step[1], b->flat ? 1 : b->step[0], 1};
    return make_map(map, MAP_F32, data, extents, strides, boxes, steps);
}

natten_status na_sm90_map_sums(const natten_problem *p, const na_sm90_boxes *b, void *data,
                               na_tensor_map *map)
{
    int64_t n[3];
    for (int a = 0; a < 3; a++)
        n[a] = na_sm90_sum_extent((int)p->axis[a].query_extent, (int)p->axis[a].dilation);
    const int64_t row = p->head_dim * n[2], plane = row * n[1], head = plane * n[0];
    const int64_t extents[] = {p->head_dim, n[2], n[1], b->flat ? p->batch : n[0], p->heads};
    const int64_t strides[] = {1, p->head_dim, row, b->flat ? head * p->heads : plane, head};
    const int64_t boxes[] = {NA_SM90_ADDED_COLUMNS, b->box[2], b->box[1], b->flat ? 1 : b->box[0],
                             1};
    const int64_t steps[] = {1, 1, 1, 1, 1};
    return make_map(map, MAP_F32, data, extents, strides, boxes, steps);
}

/* ----------------------------------------------------------------------------------------------
 * running */

void na_sm90_addresses(const natten_problem *p, const natten_run *run, int batch,
                       char *data[NATTEN_ROLES])
{
    for (int role = 0; role < NATTEN_ROLES; role++)
        data[role] = (char *)run->data[role] +
                     (run->data[role] ? batch * p->layout[role].batch *
                                            (int64_t)na_dtype_size(na_role_dtype(p, role))
                                      : 0);
}

int na_sm90_is_aligned(const natten_problem *p, const natten_run *run)
{
    for (int role = 0; role < NATTEN_ROLES; role++)
        if (na_has(p, role) && role != NATTEN_LSE && role != NATTEN_D_LSE && role != NATTEN_RPB &&
            role != NATTEN_D_RPB && (uintptr_t)run->data[role] % 16)
            return 0;
    return 1;
}

natten_status na_sm90_run_unaligned(const natten_plan *plan, const natten_run *run)
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
