/* SPDX-License-Identifier: MIT
 * Everything that can be wrong with a problem or a run is found here, with the axis and the
 * numbers. */
#include "core/problem.h"

#include <inttypes.h>
#include <math.h>
#include <string.h>

#include "core/kernel.h"
#include "core/roles.h"

#define BAD(...) na_fail(NATTEN_ERROR_ARGUMENT, __VA_ARGS__)
#define D PRId64

/* Coordinates are ints in window.h, and sums of a few of them must fit. */
static const int64_t extent_limit = (int64_t)1 << 29;

static natten_status check_head(const natten_problem *p)
{
    if (p->size != sizeof *p)
        return BAD("The problem says it has %" PRIu64
                   " bytes, this library's has %zu: set it up with "
                   "natten_problem_init, compiled against this version's natten.h (%s).",
                   p->size, sizeof *p, NATTEN_VERSION);
    if (p->op < 0 || p->op >= NATTEN_OPS)
        return BAD("op must be 0 to %d (natten_op), got %" D ".", NATTEN_OPS - 1, p->op);
    if (p->dtype < 0 || p->dtype >= NATTEN_DTYPES)
        return BAD("dtype must be 0 to %d (natten_dtype), got %" D ".", NATTEN_DTYPES - 1,
                   p->dtype);
    if (p->device != NATTEN_CPU && p->device != NATTEN_CUDA)
        return BAD("device must be 0 (CPU) or 1 (CUDA), got %" D ".", p->device);
    if (p->rank < 1 || p->rank > 3)
        return BAD("rank must be 1, 2 or 3, got %" D ".", p->rank);
    const uint64_t memory = NATTEN_PREFER_LITTLE_MEMORY | NATTEN_PREFER_MUCH_MEMORY;
    if (p->preferences > NATTEN_PREFERENCES || (p->preferences & memory) == memory)
        return BAD("preferences must be a set of natten_preference, with at most one about memory, "
                   "got %#" PRIx64 ".",
                   p->preferences);
    return NATTEN_OK;
}

/* Kernels multiply the scale by log2(e), in the type that sums are taken in. */
static natten_status check_scale(const natten_problem *p)
{
    const int wide = p->dtype == NATTEN_F64;
    if (!isfinite(p->scale))
        return BAD("scale must be finite, got %g.", p->scale);
    if (fabs(p->scale) > (wide ? 0x1p1023 : 0x1p127))
        return BAD("scale must be at most 2^%d in size where sums are float%d, got %g.",
                   wide ? 1023 : 127, wide ? 64 : 32, p->scale);
    return NATTEN_OK;
}

static natten_status check_sizes(const natten_problem *p)
{
    if (p->batch < 0)
        return BAD("batch must not be negative, got %" D ".", p->batch);
    if (p->heads < 1)
        return BAD("heads must be at least 1, got %" D ".", p->heads);
    if (p->kv_heads < 1)
        return BAD("kv_heads must be at least 1, got %" D ".", p->kv_heads);
    if (p->heads % p->kv_heads)
        return BAD("heads must be a multiple of kv_heads, got %" D " and %" D ".", p->heads,
                   p->kv_heads);
    if (p->head_dim < 1)
        return BAD("head_dim must be at least 1, got %" D ".", p->head_dim);
    if (p->value_dim < 1)
        return BAD("value_dim must be at least 1, got %" D ".", p->value_dim);
    if (p->additional_tokens < 0)
        return BAD("additional_tokens must not be negative, got %" D ".", p->additional_tokens);
    if (!(p->dropout >= 0 && p->dropout <= 1))
        return BAD("dropout must be between 0 and 1, got %g.", p->dropout);
    if (p->dropout > 0 && p->op != NATTEN_FORWARD && p->op != NATTEN_BACKWARD)
        return BAD("dropout is for the fused operations only, got %g.", p->dropout);
    const int64_t sizes[] = {p->batch, p->heads, p->head_dim, p->value_dim, p->additional_tokens};
    const char *const names[] = {"batch", "heads", "head_dim", "value_dim", "additional_tokens"};
    for (int i = 0; i < 5; i++)
        if (sizes[i] > extent_limit)
            return BAD("%s must be at most %" D ", got %" D ".", names[i], extent_limit, sizes[i]);
    return check_scale(p);
}

static natten_status check_rule(const natten_axis *axis, int i)
{
    if (axis->window < 1)
        return BAD("kernel_size must be at least 1, got %" D " for axis %d.", axis->window, i);
    if (axis->dilation < 1)
        return BAD("dilation must be at least 1, got %" D " for axis %d.", axis->dilation, i);
    if (axis->stride < 1)
        return BAD("stride must be at least 1, got %" D " for axis %d.", axis->stride, i);
    if (axis->stride > axis->window)
        return BAD("stride must be at most kernel_size, got stride %" D " and kernel_size %" D
                   " for axis %d.",
                   axis->stride, axis->window, i);
    if (axis->causal != 0 && axis->causal != 1)
        return BAD("causal must be 0 or 1, got %" D " for axis %d.", axis->causal, i);
    /* Divided, not multiplied: the product may not fit. */
    if (axis->window > axis->global_extent / axis->dilation)
        return BAD("kernel_size times dilation must be at most the extent, got kernel_size %" D
                   ", dilation %" D " and extent %" D " for axis %d.",
                   axis->window, axis->dilation, axis->global_extent, i);
    return NATTEN_OK;
}

static natten_status check_extents(const natten_axis *axis, int i)
{
    const int64_t sizes[] = {axis->query_extent, axis->key_extent, axis->global_extent,
                             axis->query_origin, axis->key_origin};
    const char *const names[] = {"query extent", "key extent", "global extent", "query origin",
                                 "key origin"};
    for (int j = 0; j < 5; j++)
        if (sizes[j] < 0 || sizes[j] > extent_limit)
            return BAD("%s must be between 0 and %" D ", got %" D " for axis %d.", names[j],
                       extent_limit, sizes[j], i);
    if (axis->key_origin + axis->key_extent > axis->global_extent)
        return BAD("The keys of axis %d end at %" D " (origin %" D " + extent %" D
                   "), past its global extent %" D ".",
                   i, axis->key_origin + axis->key_extent, axis->key_origin, axis->key_extent,
                   axis->global_extent);
    int sees_all = axis->window == axis->global_extent && axis->dilation == 1;
    if (axis->query_origin + axis->query_extent > axis->global_extent && !sees_all)
        return BAD("The queries of axis %d end at %" D " (origin %" D " + extent %" D
                   "), past its global extent %" D ".",
                   i, axis->query_origin + axis->query_extent, axis->query_origin,
                   axis->query_extent, axis->global_extent);
    return NATTEN_OK;
}

/* A block of keys must hold every window of the block of queries. Windows move forward along a
 * dilation group, so only each group's first and last query matter. */
static natten_status check_block(const natten_axis *axis, int i)
{
    na_axis rule = na_axis_of(axis);
    int64_t begin = axis->query_origin, end = begin + axis->query_extent;
    if (begin == end || (axis->key_origin == 0 && axis->key_extent == axis->global_extent))
        return NATTEN_OK;
    int64_t groups = axis->dilation < axis->query_extent ? axis->dilation : axis->query_extent;
    for (int64_t j = 0; j < groups; j++) {
        int64_t query = begin + j;
        int64_t latest = query + (end - 1 - query) / axis->dilation * axis->dilation;
        na_window low = na_window_of(rule, (int)query), high = na_window_of(rule, (int)latest);
        int64_t first = low.first, last = high.first + (high.count - 1) * axis->dilation;
        if (first < axis->key_origin || last >= axis->key_origin + axis->key_extent)
            return BAD("The windows of queries %" D " to %" D " reach from key %" D " to key %" D
                       " of axis %d, but the block of keys holds only %" D " to %" D ".",
                       query, latest, first, last, i, axis->key_origin,
                       axis->key_origin + axis->key_extent - 1);
    }
    return NATTEN_OK;
}

static natten_status check_roles(const natten_problem *p)
{
    const na_op_roles *sets = &na_roles_of[p->op];
    for (int role = 0; role < NATTEN_ROLES; role++) {
        int here = na_has(p, (natten_role)role), bit = 1 << role;
        if ((sets->needs & bit) && !here)
            return BAD("This operation needs %s, which is not among the problem's roles.",
                       na_role_name((natten_role)role));
        if (here && !((sets->needs | sets->may | sets->writes) & bit))
            return BAD("This operation has no use for %s, which is among the problem's roles.",
                       na_role_name((natten_role)role));
        if (here && na_role_is_additional((natten_role)role) && p->additional_tokens == 0)
            return BAD("%s is among the problem's roles, but additional_tokens is 0.",
                       na_role_name((natten_role)role));
    }
    if (p->roles >> NATTEN_ROLES)
        return BAD("The problem's roles hold unknown bits: %#" PRIx64 ".", p->roles);
    for (int i = 0; i < 2; i++) {
        natten_role role = i ? NATTEN_ADDITIONAL_VALUE : NATTEN_ADDITIONAL_KEY;
        if (p->additional_tokens > 0 && (sets->may >> role & 1) && !na_has(p, role))
            return BAD("There are %" D
                       " additional_tokens, but %s is not among the problem's roles.",
                       p->additional_tokens, na_role_name(role));
    }
    if (na_has(p, NATTEN_D_RPB) && p->op == NATTEN_BACKWARD && !na_has(p, NATTEN_RPB))
        return BAD("d_rpb is among the problem's roles, but rpb is not.");
    if (na_has(p, NATTEN_D_KEY_BIAS) && !na_has(p, NATTEN_KEY_BIAS))
        return BAD("d_key_bias is among the problem's roles, but key_bias is not.");
    return NATTEN_OK;
}

static natten_status check_bias(const natten_problem *p)
{
    if (!na_has(p, NATTEN_RPB) && !na_has(p, NATTEN_D_RPB))
        return NATTEN_OK;
    for (int i = 0; i < p->rank; i++)
        if (p->axis[i].window % 2 == 0)
            return BAD("A relative position bias needs an odd kernel_size, got %" D " for axis %d.",
                       p->axis[i].window, i);
    for (int i = 0; i < p->rank; i++) {
        const natten_axis *axis = &p->axis[i];
        if (axis->query_origin + axis->query_extent > axis->global_extent)
            return BAD("A relative position bias has no entries for queries past the end of the "
                       "keys, got queries up to %" D " and global extent %" D " for axis %d.",
                       axis->query_origin + axis->query_extent - 1, axis->global_extent, i);
    }
    return NATTEN_OK;
}

/* No offset, of however many bytes an element has, may leave an int64. */
static natten_status check_counts(const natten_problem *p)
{
    for (int role = 0; role < NATTEN_ROLES; role++) {
        if (!na_has(p, (natten_role)role))
            continue;
        na_shape shape = na_role_shape(p, (natten_role)role);
        double count = (double)shape.batch * (double)shape.heads * (double)shape.channels;
        for (int i = 0; i < 3; i++)
            count *= (double)shape.extent[i];
        if (count > 0x1p60)
            return BAD("%s would have %.3g elements.", na_role_name((natten_role)role), count);
        const natten_layout *layout = &p->layout[role];
        /* Counting none as one: strides of what is empty are multiplied too. */
        double reach = fmax((double)shape.batch, 1) * fabs((double)layout->batch) +
                       (double)shape.heads * fabs((double)layout->head);
        for (int i = 0; i < 3; i++)
            reach += fmax((double)shape.extent[i], 1) * fabs((double)layout->axis[i]);
        if (reach > 0x1p59)
            return BAD("The strides of %s reach %.3g elements far.",
                       na_role_name((natten_role)role), reach);
    }
    double slots = (double)p->additional_tokens;
    double window = 1;
    for (int i = 0; i < p->rank; i++)
        window *= (double)p->axis[i].window;
    if (slots + window > (double)extent_limit)
        return BAD("A query may attend to at most %" D " tokens, got %.0f.", extent_limit,
                   slots + window);
    return NATTEN_OK;
}

/* A stride of 0 would have several results written to one place. Other overlaps are not looked for.
 */
static natten_status check_outputs(const natten_problem *p)
{
    for (int role = 0; role < NATTEN_ROLES; role++) {
        if (!na_has(p, (natten_role)role) ||
            !na_role_is_output((natten_op)p->op, (natten_role)role))
            continue;
        na_shape shape = na_role_shape(p, (natten_role)role);
        const natten_layout *layout = &p->layout[role];
        int overlaps = (shape.batch > 1 && !layout->batch) || (shape.heads > 1 && !layout->head);
        int empty = !shape.batch;
        for (int i = 0; i < 3; i++) {
            overlaps |= shape.extent[i] > 1 && !layout->axis[i];
            empty |= !shape.extent[i];
        }
        if (overlaps && !empty)
            return BAD("The layout of %s has a stride of 0: its elements would overlap.",
                       na_role_name((natten_role)role));
    }
    return NATTEN_OK;
}

static void resolve_defaults(natten_problem *p)
{
    for (int i = 0; i < p->rank; i++) {
        natten_axis *axis = &p->axis[i];
        if (!axis->key_extent)
            axis->key_extent = axis->query_extent;
        if (!axis->global_extent)
            axis->global_extent = axis->key_extent;
    }
    if (!p->kv_heads)
        p->kv_heads = p->heads;
    if (!p->value_dim)
        p->value_dim = p->head_dim;
}

/* Puts axes of one token in front, until there are three. */
static void pad(natten_problem *p)
{
    int shift = 3 - (int)p->rank;
    for (int role = 0; role < NATTEN_ROLES; role++)
        if (!na_has(p, (natten_role)role)) /* nobody checked these strides */
            p->layout[role] = (natten_layout){0};
    for (int i = 3; i-- > 0;) {
        p->axis[i] = i >= shift ? p->axis[i - shift] : na_point;
        for (int role = 0; role < NATTEN_ROLES; role++)
            if (!na_role_is_additional((natten_role)role))
                p->layout[role].axis[i] = i >= shift ? p->layout[role].axis[i - shift] : 0;
    }
    p->rank = 3;
}

natten_status na_problem_check(const natten_problem *problem, natten_problem *padded)
{
    if (!problem)
        return BAD("The problem is NULL.");
    natten_status status = check_head(problem);
    if (status != NATTEN_OK)
        return status;
    natten_problem *p = padded;
    *p = *problem;
    resolve_defaults(p);
    status = check_sizes(p);
    for (int i = 0; status == NATTEN_OK && i < p->rank; i++) {
        status = check_extents(&p->axis[i], i);
        if (status == NATTEN_OK)
            status = check_rule(&p->axis[i], i);
        if (status == NATTEN_OK)
            status = check_block(&p->axis[i], i);
    }
    static natten_status (*const checks[])(const natten_problem *) = {check_roles, check_bias,
                                                                      check_counts, check_outputs};
    for (int i = 0; status == NATTEN_OK && i < 4; i++)
        status = checks[i](p);
    if (status == NATTEN_OK)
        pad(p);
    return status;
}

natten_status na_run_check(const natten_problem *padded, const natten_run *run)
{
    if (run->threads < 0)
        return BAD("threads must not be negative, got %" D ".", run->threads);
    for (int i = 0; i < NATTEN_ROLES; i++) {
        natten_role role = (natten_role)i;
        if (!na_has(padded, role))
            continue;
        na_shape shape = na_role_shape(padded, role);
        int empty = !shape.batch || !shape.extent[0] || !shape.extent[1] || !shape.extent[2];
        if (!run->data[role] && !empty)
            return BAD("The address of %s is NULL.", na_role_name(role));
        size_t size = na_dtype_size(na_role_dtype(padded, role));
        if ((uintptr_t)run->data[role] % size)
            return BAD("The address of %s, %p, is not a multiple of its element size %zu.",
                       na_role_name(role), run->data[role], size);
    }
    return NATTEN_OK;
}

natten_status natten_axis_window(const natten_axis *axis, int64_t query, int64_t *first,
                                 int64_t *count)
{
    if (!axis || !first || !count)
        return BAD("natten_axis_window needs an axis and two places to write to, got NULL.");
    natten_axis resolved = *axis;
    if (!resolved.key_extent)
        resolved.key_extent = resolved.query_extent;
    if (!resolved.global_extent)
        resolved.global_extent = resolved.key_extent;
    natten_status status = check_extents(&resolved, 0);
    if (status == NATTEN_OK)
        status = check_rule(&resolved, 0);
    if (status != NATTEN_OK)
        return status;
    if (query < 0 || query >= resolved.query_extent)
        return BAD("The axis has queries 0 to %" D ", got %" D ".", resolved.query_extent - 1,
                   query);
    na_window window = na_window_of(na_axis_of(&resolved), (int)(resolved.query_origin + query));
    *first = window.first;
    *count = window.count;
    return NATTEN_OK;
}
