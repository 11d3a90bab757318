/* SPDX-License-Identifier: MIT */
#include "torch/bind.h"

#include <inttypes.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "torch/pages.h"

#define D PRId64

/* What a size of a tensor means. Two tensors that share a meaning must agree on its size. */
enum {
    BATCH,
    HEADS,
    KV_HEADS,
    HEAD_DIM,
    VALUE_DIM,
    TOKENS,      /* additional ones */
    SLOTS,       /* of attn */
    QUERIES,     /* and the two after it: an axis each */
    KEYS = 10,   /* likewise */
    BIASES = 13, /* likewise */
    MEANINGS = 16
};

/* The shape of each role, a letter for each meaning; small letters stand for all axes of the map.
 */
static const char letters[] = "BHGDENWq..k..b..";
static const char *const shapes[2][NATTEN_D_QUERY] = {
    {"BqHD", "BkGD", "BkGE", "BqHE", "BqH", "BHqW", "Hb", "BNGD", "BNGE", "BkG"},
    {"BHqD", "BGkD", "BGkE", "BHqE", "BHq", "BHqW", "Hb", "BGND", "BGNE", "BGk"}};

/* More than any tensor has of anything, and additional tokens can be added to it. */
static const int64_t no_size = INT64_MAX / 2;

/* A size, and which role it was seen at first; -1: it comes from kernel_size. */
typedef struct sizes {
    int64_t size[MEANINGS];
    int role[MEANINGS];
    int known[MEANINGS];
} sizes;

static const char *const names[NATTEN_ROLES] = {"query",
                                                "key",
                                                "value",
                                                "out",
                                                "lse",
                                                "attn",
                                                "rpb",
                                                "additional_keys",
                                                "additional_values",
                                                "key_padding_mask",
                                                "d_query",
                                                "d_key",
                                                "d_value",
                                                "d_out",
                                                "d_lse",
                                                "d_attn",
                                                "d_rpb",
                                                "d_additional_keys",
                                                "d_additional_values",
                                                "d_key_padding_mask"};

/* The parts of natten_call.window. */
enum { KERNEL_SIZE, STRIDE, DILATION, CAUSAL, QUERY_ORIGIN, KEY_ORIGIN, GLOBAL_EXTENT, PARTS };

static int64_t entry(const natten_call *call, int part, int axis)
{
    return call->window[part * call->rank + axis];
}

static int is_block(const natten_call *call) { return call->entries == PARTS * call->rank; }

/* A gradient looks like what it belongs to; the roles are in the same order. */
static natten_role primal(int role)
{
    return (natten_role)(role < NATTEN_D_QUERY ? role : role - NATTEN_D_QUERY);
}

__attribute__((format(printf, 3, 4))) static natten_status
fail(natten_call *call, natten_status status, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(call->text, sizeof call->text, format, arguments);
    va_end(arguments);
    return status;
}

#define BAD(...) fail(call, NATTEN_ERROR_ARGUMENT, __VA_ARGS__)

/* Spells out the shape of a role, a meaning for each dimension; returns their number. */
static int spell(const natten_call *call, int role, int meanings[NATTEN_TENSOR_DIMS])
{
    int dims = 0;
    for (const char *c = shapes[call->order][primal(role)]; *c; c++) {
        int meaning = (int)(strchr(letters, *c) - letters);
        int axes = meaning >= QUERIES ? (int)call->rank : 1;
        for (int i = 0; i < axes; i++)
            meanings[dims++] = meaning + i;
    }
    return dims;
}

/* "extent 12 on axis 1", for the error texts. */
static const char *phrase(int meaning, int64_t size, char *text, size_t room)
{
    static const char *const what[] = {
        "batch", "heads", "heads", "head_dim", "head_dim", "additional tokens", "slots"};
    if (meaning < QUERIES)
        snprintf(text, room, "%s %" D, what[meaning], size);
    else
        snprintf(text, room, "extent %" D " on axis %d", size, (meaning - QUERIES) % 3);
    return text;
}

static natten_status mismatch(natten_call *call, const sizes *s, int role, int meaning,
                              int64_t size)
{
    char here[64], there[64];
    phrase(meaning, size, here, sizeof here);
    phrase(meaning, s->size[meaning], there, sizeof there);
    if (meaning == SLOTS) {
        const int many = s->size[SLOTS] >= no_size;
        return BAD("%s has %" D " slots in its last dimension, but the window%s %s %s%" D ".",
                   names[role], size, s->size[TOKENS] ? " and the additional tokens" : "",
                   s->size[TOKENS] ? "have" : "has", many ? "more than " : "",
                   many ? INT32_MAX : s->size[SLOTS]);
    }
    if (s->role[meaning] < 0)
        return BAD("%s has %" D " entries on axis %d, but kernel_size %" D " asks for %" D ".",
                   names[role], size, meaning - BIASES, entry(call, KERNEL_SIZE, meaning - BIASES),
                   s->size[meaning]);
    return BAD("%s has %s, but %s has %s.", names[role], here, names[s->role[meaning]], there);
}

static natten_status learn(natten_call *call, sizes *s, int role)
{
    const natten_tensor *tensor = &call->tensor[role];
    int meanings[NATTEN_TENSOR_DIMS];
    int dims = spell(call, role, meanings);
    if (tensor->dims != dims)
        return BAD("%s must have %d dimensions for a map of rank %" D ", got %" D ".", names[role],
                   dims, call->rank, tensor->dims);
    for (int i = 0; i < dims; i++) {
        int meaning = meanings[i];
        if (s->known[meaning] && s->size[meaning] != tensor->size[i])
            return mismatch(call, s, role, meaning, tensor->size[i]);
        if (s->known[meaning])
            continue;
        s->known[meaning] = 1;
        s->size[meaning] = tensor->size[i];
        s->role[meaning] = role;
    }
    return NATTEN_OK;
}

/* The LSE and biases of keys are kept in the type that sums are taken in. */
static int64_t dtype_for(int role, int64_t dtype)
{
    int summed = primal(role) == NATTEN_LSE || primal(role) == NATTEN_KEY_BIAS;
    return summed && dtype != NATTEN_F64 ? NATTEN_F32 : dtype;
}

static natten_status check_place(natten_call *call, int role, int first)
{
    static const char *const dtypes[] = {"float32", "float64", "float16", "bfloat16"};
    static const char *const devices[] = {"cpu", "cuda"};
    const natten_tensor *tensor = &call->tensor[role], *other = &call->tensor[first];
    if (tensor->dtype < 0)
        return BAD("%s must be float32, float64, float16 or bfloat16.", names[role]);
    if (tensor->device < 0)
        return BAD("%s must be on a CPU or a CUDA device.", names[role]);
    if (tensor->dtype != dtype_for(role, other->dtype))
        return BAD("%s is %s, but %s is %s.", names[role], dtypes[tensor->dtype], names[first],
                   dtypes[other->dtype]);
    if (tensor->device != other->device)
        return BAD("%s is on %s, but %s is on %s.", names[role], devices[tensor->device],
                   names[first], devices[other->device]);
    if (tensor->device_index != other->device_index)
        return BAD("%s is on %s:%" D ", but %s is on %s:%" D ".", names[role],
                   devices[tensor->device], tensor->device_index, names[first],
                   devices[other->device], other->device_index);
    return NATTEN_OK;
}

/* What the window alone says about sizes. The product may be too large for any tensor to have it:
 * it then stays at a size no tensor has. */
static natten_status learn_window(natten_call *call, sizes *s)
{
    int64_t slots = 1;
    for (int i = 0; i < call->rank; i++) {
        int64_t window = entry(call, KERNEL_SIZE, i);
        /* Else the first tensor whose size follows from it would be what is wrong. */
        if (window < 1)
            return BAD("kernel_size must be at least 1, got %" D " for axis %d.", window, i);
        slots = window > INT32_MAX || slots > INT32_MAX ? no_size : slots * window;
        s->size[BIASES + i] = window > no_size ? INT64_MAX : 2 * window - 1;
        s->known[BIASES + i] = 1;
        s->role[BIASES + i] = -1;
    }
    static const int additional[] = {NATTEN_ADDITIONAL_KEY, NATTEN_ADDITIONAL_VALUE};
    for (int i = 0; i < 2; i++) {
        const natten_tensor *tensor = &call->tensor[additional[i]];
        if (tensor->dims == 4 && !s->size[TOKENS])
            s->size[TOKENS] = tensor->size[call->order == NATTEN_HEADS_FIRST ? 2 : 1];
    }
    s->size[SLOTS] = slots + s->size[TOKENS];
    s->known[SLOTS] = 1;
    s->role[SLOTS] = -1;
    return NATTEN_OK;
}

/* Zero stands for "as the other" in a problem: a size that really is zero must not get there. */
static natten_status check_empty(natten_call *call, const sizes *s)
{
    static const int meanings[] = {HEADS, KV_HEADS, HEAD_DIM, VALUE_DIM};
    for (size_t i = 0; i < sizeof meanings / sizeof *meanings; i++) {
        int meaning = meanings[i];
        if (s->known[meaning] && s->size[meaning] < 1)
            return BAD("%s has %s 0: there must be at least 1.", names[s->role[meaning]],
                       meaning <= KV_HEADS ? "heads" : "head_dim");
    }
    for (int i = 0; i < call->rank; i++)
        for (int j = 0; j < 2; j++) {
            int meaning = (j ? KEYS : QUERIES) + i;
            if (s->known[meaning] && s->size[meaning] < 1)
                return BAD("%s has extent 0 on axis %d: there must be at least 1 token.",
                           names[s->role[meaning]], i);
        }
    if (call->tensor[NATTEN_ADDITIONAL_KEY].dims >= 0 ||
        call->tensor[NATTEN_ADDITIONAL_VALUE].dims >= 0)
        if (s->size[TOKENS] < 1)
            return BAD("There are 0 additional tokens: leave additional_keys and "
                       "additional_values out instead.");
    return NATTEN_OK;
}

/* A problem without blocks is about one map, that queries and keys share. */
static natten_status check_map(natten_call *call, const sizes *s)
{
    for (int i = 0; i < call->rank; i++)
        if (!is_block(call) && s->known[KEYS + i] && s->known[QUERIES + i] &&
            s->size[KEYS + i] != s->size[QUERIES + i])
            return BAD("%s has extent %" D " on axis %d, but %s has %" D
                       ". (Blocks of a larger map need query_origin, key_origin and "
                       "global_extent.)",
                       names[s->role[KEYS + i]], s->size[KEYS + i], i, names[s->role[QUERIES + i]],
                       s->size[QUERIES + i]);
    if (call->op == NATTEN_FORWARD && (call->tensor[NATTEN_ADDITIONAL_KEY].dims < 0) !=
                                          (call->tensor[NATTEN_ADDITIONAL_VALUE].dims < 0))
        return BAD("additional_keys and additional_values go together, got only one of them.");
    return NATTEN_OK;
}

static void set_axes(natten_call *call, const sizes *s)
{
    for (int i = 0; i < call->rank; i++) {
        natten_axis *axis = &call->problem.axis[i];
        axis->query_extent = s->size[QUERIES + i];
        axis->key_extent = s->known[KEYS + i] ? s->size[KEYS + i] : s->size[QUERIES + i];
        axis->global_extent = is_block(call) ? entry(call, GLOBAL_EXTENT, i) : axis->key_extent;
        axis->query_origin = is_block(call) ? entry(call, QUERY_ORIGIN, i) : 0;
        axis->key_origin = is_block(call) ? entry(call, KEY_ORIGIN, i) : 0;
        axis->window = entry(call, KERNEL_SIZE, i);
        axis->stride = entry(call, STRIDE, i);
        axis->dilation = entry(call, DILATION, i);
        axis->causal = entry(call, CAUSAL, i);
    }
}

static void set_layout(natten_call *call, int role)
{
    const natten_tensor *tensor = &call->tensor[role];
    natten_layout *layout = &call->problem.layout[role];
    int meanings[NATTEN_TENSOR_DIMS];
    int dims = spell(call, role, meanings), axes = 0;
    for (int i = 0; i < dims; i++) {
        /* The step along an axis of one token is never taken: one plan for all of them. */
        int64_t step = tensor->size[i] > 1 ? tensor->stride[i] : 0;
        if (meanings[i] == BATCH)
            layout->batch = step;
        else if (meanings[i] == HEADS || meanings[i] == KV_HEADS)
            layout->head = step;
        else if (meanings[i] >= QUERIES || meanings[i] == TOKENS)
            layout->axis[axes++] = step;
    }
}

static void shape_output(natten_call *call, const sizes *s, int role, int first)
{
    natten_tensor *tensor = &call->tensor[role];
    int meanings[NATTEN_TENSOR_DIMS];
    int dims = spell(call, role, meanings);
    int64_t step = 1;
    for (int i = dims; i-- > 0;) {
        tensor->size[i] = s->size[meanings[i]];
        tensor->stride[i] = step;
        step *= tensor->size[i] > 1 ? tensor->size[i] : 1;
    }
    tensor->dims = dims;
    tensor->dtype = dtype_for(role, call->tensor[first].dtype);
    tensor->device = call->tensor[first].device;
    tensor->device_index = call->tensor[first].device_index;
}

static void set_problem(natten_call *call, const sizes *s, uint64_t inputs, int first)
{
    natten_problem *p = &call->problem;
    natten_problem_init(p, (natten_op)call->op, (natten_dtype)call->tensor[first].dtype,
                        (int)call->rank);
    p->device = call->tensor[first].device;
    p->device_index = call->tensor[first].device_index;
    p->batch = s->size[BATCH];
    p->heads = s->size[HEADS];
    p->kv_heads = s->known[KV_HEADS] ? s->size[KV_HEADS] : p->heads;
    p->head_dim = s->known[HEAD_DIM] ? s->size[HEAD_DIM] : s->size[VALUE_DIM];
    p->value_dim = s->known[VALUE_DIM] ? s->size[VALUE_DIM] : p->head_dim;
    p->additional_tokens = s->size[TOKENS];
    p->scale = call->default_scale ? pow((double)p->head_dim, -0.5) : call->scale;
    p->dropout = call->dropout;
    p->preferences = call->preferences;
    p->roles = inputs | call->outputs;
    set_axes(call, s);
}

/* A window larger than its axis makes attn a tensor that should not be asked for: the reason must
 * come first. */
static natten_status check_window(natten_call *call)
{
    for (int i = 0; i < call->rank; i++) {
        const natten_axis *axis = &call->problem.axis[i];
        if (axis->window <= axis->global_extent)
            continue;
        natten_plan *plan;
        natten_status status = natten_plan_create(&call->problem, NULL, &plan);
        if (status != NATTEN_OK)
            return fail(call, status, "%s", natten_last_error());
        natten_plan_destroy(plan);
    }
    return NATTEN_OK;
}

static natten_status set_rank(natten_call *call)
{
    for (int64_t rank = 1; rank <= 3; rank++)
        if (call->entries == (CAUSAL + 1) * rank || call->entries == PARTS * rank)
            call->rank = rank;
    if (call->rank < 1)
        return BAD("A window is kernel_size, stride, dilation and is_causal and, of a block, "
                   "query_origin, key_origin and global_extent, with 1, 2 or 3 entries each: got "
                   "%" D " entries.",
                   call->entries);
    return NATTEN_OK;
}

natten_status natten_call_bind(natten_call *call)
{
    sizes s = {.size = {0}};
    uint64_t inputs = 0;
    int first = -1;
    call->rank = 0;
    if (set_rank(call) != NATTEN_OK || learn_window(call, &s) != NATTEN_OK)
        return NATTEN_ERROR_ARGUMENT;
    for (int role = 0; role < NATTEN_ROLES; role++) {
        if ((call->outputs >> role & 1) || call->tensor[role].dims < 0)
            continue;
        /* The LSE has a type of its own; it is never the first. */
        first = first < 0 ? role : first;
        natten_status status = learn(call, &s, role);
        if (status == NATTEN_OK)
            status = check_place(call, role, first);
        if (status != NATTEN_OK)
            return status;
        inputs |= natten_bit((natten_role)role);
    }
    if (first < 0)
        return BAD("There are no tensors.");
    natten_status status = check_empty(call, &s);
    if (status == NATTEN_OK)
        status = check_map(call, &s);
    if (status != NATTEN_OK)
        return status;
    set_problem(call, &s, inputs, first);
    status = check_window(call);
    for (int role = 0; status == NATTEN_OK && role < NATTEN_ROLES; role++) {
        if (call->outputs >> role & 1)
            shape_output(call, &s, role, first);
        if (call->problem.roles >> role & 1)
            set_layout(call, role);
    }
    return status;
}

static natten_status compute(const natten_call *call, const natten_run *run)
{
    for (int role = 0; role < NATTEN_ROLES; role++)
        if (call->outputs & call->problem.roles & natten_bit((natten_role)role))
            na_prefer_huge_pages(&call->tensor[role], run->data[role]);
    return natten_compute(&call->problem, run);
}

natten_status natten_call_run(natten_call *call, natten_run *run)
{
    for (int role = 0; role < NATTEN_ROLES; role++)
        run->data[role] = call->problem.roles >> role & 1 ? call->tensor[role].data : NULL;
    natten_status status = compute(call, run);
    if (status != NATTEN_OK)
        fail(call, status, "%s", natten_last_error());
    return status;
}

natten_status natten_call_repeat(const natten_call *call, const natten_repeat *repeat)
{
    natten_run run = {.workspace = repeat->workspace,
                      .stream = repeat->stream,
                      .threads = repeat->threads,
                      .seed = repeat->seed};
    for (int role = 0, i = 0; role < NATTEN_ROLES; role++)
        if (call->problem.roles >> role & 1)
            run.data[role] = repeat->data[i++];
    return compute(call, &run);
}

natten_status natten_call_no_memory(natten_call *call, int64_t role)
{
    const natten_tensor *tensor = &call->tensor[role];
    double bytes = tensor->dims < 0 ? 0 : (double)na_element_size(tensor->dtype);
    for (int i = 0; i < tensor->dims; i++)
        bytes *= (double)tensor->size[i];
    return fail(call, NATTEN_ERROR_MEMORY, "No memory for %s%s of %.0f bytes.",
                call->outputs >> role & 1 ? "" : "a contiguous copy of ", names[role], bytes);
}

int natten_call_must_copy(const natten_tensor *tensor, int64_t role)
{
    natten_role whole = primal((int)role);
    if (whole == NATTEN_LSE || whole == NATTEN_RPB || whole == NATTEN_KEY_BIAS ||
        tensor->dims < 1 || tensor->dims > NATTEN_TENSOR_DIMS)
        return 0;
    int last = (int)tensor->dims - 1;
    return tensor->size[last] > 1 && tensor->stride[last] != 1;
}
