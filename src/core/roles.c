/* SPDX-License-Identifier: MIT
 * Which tensors each op reads and writes, what they look like, and how they lie in memory by
 * default. */
#include <string.h>

#include "core/kernel.h"
#include "core/problem.h"
#include "core/roles.h"

#define BIT(role) (1u << NATTEN_##role)

const na_op_roles na_roles_of[NATTEN_OPS] = {
    [NATTEN_FORWARD] = {.needs = BIT(QUERY) | BIT(KEY) | BIT(VALUE) | BIT(OUT),
                        .writes = BIT(OUT) | BIT(LSE),
                        .may = BIT(RPB) | BIT(KEY_BIAS) | BIT(ADDITIONAL_KEY) |
                               BIT(ADDITIONAL_VALUE) | BIT(LSE)},
    [NATTEN_BACKWARD] = {.needs =
                             BIT(QUERY) | BIT(KEY) | BIT(VALUE) | BIT(OUT) | BIT(LSE) | BIT(D_OUT),
                         .writes = BIT(D_QUERY) | BIT(D_KEY) | BIT(D_VALUE) | BIT(D_RPB) |
                                   BIT(D_ADDITIONAL_KEY) | BIT(D_ADDITIONAL_VALUE) |
                                   BIT(D_KEY_BIAS),
                         .usual = BIT(D_QUERY) | BIT(D_KEY) | BIT(D_VALUE),
                         .may = BIT(RPB) | BIT(KEY_BIAS) | BIT(ADDITIONAL_KEY) |
                                BIT(ADDITIONAL_VALUE) | BIT(D_LSE)},
    [NATTEN_QK] = {.needs = BIT(QUERY) | BIT(KEY) | BIT(ATTN),
                   .writes = BIT(ATTN),
                   .may = BIT(RPB) | BIT(KEY_BIAS) | BIT(ADDITIONAL_KEY)},
    [NATTEN_QK_BACKWARD] = {.needs = BIT(QUERY) | BIT(KEY) | BIT(D_ATTN),
                            .writes =
                                BIT(D_QUERY) | BIT(D_KEY) | BIT(D_RPB) | BIT(D_ADDITIONAL_KEY),
                            .usual = BIT(D_QUERY) | BIT(D_KEY),
                            .may = BIT(ADDITIONAL_KEY)},
    [NATTEN_AV] = {.needs = BIT(ATTN) | BIT(VALUE) | BIT(OUT),
                   .writes = BIT(OUT),
                   .may = BIT(ADDITIONAL_VALUE)},
    [NATTEN_AV_BACKWARD] = {.needs = BIT(ATTN) | BIT(VALUE) | BIT(D_OUT),
                            .writes = BIT(D_ATTN) | BIT(D_VALUE) | BIT(D_ADDITIONAL_VALUE),
                            .usual = BIT(D_ATTN) | BIT(D_VALUE),
                            .may = BIT(ADDITIONAL_VALUE)},
};

static const char *const names[NATTEN_ROLES] = {"query",
                                                "key",
                                                "value",
                                                "out",
                                                "lse",
                                                "attn",
                                                "rpb",
                                                "additional_key",
                                                "additional_value",
                                                "key_bias",
                                                "d_query",
                                                "d_key",
                                                "d_value",
                                                "d_out",
                                                "d_lse",
                                                "d_attn",
                                                "d_rpb",
                                                "d_additional_key",
                                                "d_additional_value",
                                                "d_key_bias"};

const char *na_role_name(natten_role role) { return names[role]; }

int na_role_is_output(natten_op op, natten_role role)
{
    return (int)(na_roles_of[op].writes >> role & 1);
}

int na_role_is_additional(natten_role role)
{
    return role == NATTEN_ADDITIONAL_KEY || role == NATTEN_ADDITIONAL_VALUE ||
           role == NATTEN_D_ADDITIONAL_KEY || role == NATTEN_D_ADDITIONAL_VALUE;
}

/* A gradient looks like what it belongs to; the roles are in the same order. */
static natten_role primal(natten_role role)
{
    return (natten_role)(role < NATTEN_D_QUERY ? role : role - NATTEN_D_QUERY);
}

/* Sizes are not checked yet where these are used: wrapping around is not an error here. */
static int64_t product(int64_t a, int64_t b) { return (int64_t)((uint64_t)a * (uint64_t)b); }

static int64_t either(int64_t value, int64_t otherwise) { return value ? value : otherwise; }

na_shape na_role_shape(const natten_problem *problem, natten_role role)
{
    const natten_problem *p = problem;
    int64_t kv_heads = either(p->kv_heads, p->heads), value_dim = either(p->value_dim, p->head_dim);
    na_shape shape = {p->batch, {1, 1, 1}, p->heads, 1};
    int64_t slots = p->additional_tokens;
    role = primal(role);
    if (na_role_is_additional(role)) {
        shape.extent[0] = p->additional_tokens;
        shape.heads = kv_heads;
        shape.channels = role == NATTEN_ADDITIONAL_KEY ? p->head_dim : value_dim;
        return shape;
    }
    int64_t window = 1;
    int keys = role == NATTEN_KEY || role == NATTEN_VALUE || role == NATTEN_KEY_BIAS;
    for (int i = 0; i < p->rank; i++) {
        const natten_axis *axis = &p->axis[i];
        shape.extent[i] = role == NATTEN_RPB ? product(2, axis->window) - 1
                          : keys             ? either(axis->key_extent, axis->query_extent)
                                             : axis->query_extent;
        window = product(window, axis->window);
    }
    if (role == NATTEN_RPB)
        shape.batch = 1;
    if (keys)
        shape.heads = kv_heads;
    if (role == NATTEN_QUERY || role == NATTEN_KEY)
        shape.channels = p->head_dim;
    if (role == NATTEN_VALUE || role == NATTEN_OUT)
        shape.channels = value_dim;
    if (role == NATTEN_ATTN)
        shape.channels = (int64_t)((uint64_t)window + (uint64_t)slots);
    return shape;
}

void natten_problem_init(natten_problem *problem, natten_op op, natten_dtype dtype, int rank)
{
    if (!problem)
        return; /* planning will say so */
    /* All of it, padding included: problems are compared byte by byte. */
    memset(problem, 0, sizeof *problem);
    problem->size = sizeof *problem;
    problem->op = op;
    problem->dtype = dtype;
    problem->rank = rank;
    problem->batch = problem->heads = 1;
    problem->scale = 1;
    problem->preferences = NATTEN_PREFER_USUAL;
    for (int i = 0; i < 3; i++)
        problem->axis[i].stride = problem->axis[i].dilation = 1;
    if (op >= 0 && op < NATTEN_OPS)
        problem->roles = na_roles_of[op].needs | na_roles_of[op].usual;
}

static natten_layout contiguous(const na_shape *shape, int rank, natten_order order)
{
    natten_layout layout = {0};
    int64_t step = shape->channels;
    if (order == NATTEN_HEADS_LAST) {
        layout.head = step;
        step = product(step, shape->heads);
    }
    for (int i = rank; i-- > 0;) {
        layout.axis[i] = step;
        step = product(step, shape->extent[i]);
    }
    if (order == NATTEN_HEADS_FIRST) {
        layout.head = step;
        step = product(step, shape->heads);
    }
    layout.batch = step;
    return layout;
}

void natten_problem_pack(natten_problem *problem, natten_order order)
{
    if (!problem || problem->rank < 1 || problem->rank > 3)
        return; /* planning will say so */
    for (int role = 0; role < NATTEN_ROLES; role++) {
        natten_role whole = primal((natten_role)role);
        na_shape shape = na_role_shape(problem, whole);
        int rank = na_role_is_additional(whole) ? 1 : (int)problem->rank;
        int heads_first = whole == NATTEN_ATTN || whole == NATTEN_RPB;
        problem->layout[role] = contiguous(&shape, rank, heads_first ? NATTEN_HEADS_FIRST : order);
    }
}
