/* SPDX-License-Identifier: MIT
 * A call of a natten:: op by torch's dispatcher: tensors off the stack, bound to a problem,
 * computed on torch's own threads or stream, results in torch's memory. Built with -fexceptions,
 * because torch's way to raise an error is to throw through these frames. */
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>

#include "torch/bind.h"
#include "torch/register.h"
#include "torch/shim.h"

na_shim na_torch;

enum { MOST_TENSORS = 10, ABSENT = -1 };

/* The arguments of an op: tensors, then the window (natten_call), scale, and for a backward op the
 * set of results that are wanted, bit i for result i. */
typedef struct op {
    const char *name;
    natten_op op;
    natten_order order;
    int inputs, outputs, chooses;
    natten_role input[MOST_TENSORS], output[6];
} op;

static const op ops[NATTEN_OPS] = {
    {"na",
     NATTEN_FORWARD,
     NATTEN_HEADS_LAST,
     6,
     2,
     0,
     {NATTEN_QUERY, NATTEN_KEY, NATTEN_VALUE, NATTEN_RPB, NATTEN_ADDITIONAL_KEY,
      NATTEN_ADDITIONAL_VALUE},
     {NATTEN_OUT, NATTEN_LSE}},
    {"na_backward",
     NATTEN_BACKWARD,
     NATTEN_HEADS_LAST,
     10,
     6,
     1,
     {NATTEN_D_OUT, NATTEN_D_LSE, NATTEN_QUERY, NATTEN_KEY, NATTEN_VALUE, NATTEN_RPB,
      NATTEN_ADDITIONAL_KEY, NATTEN_ADDITIONAL_VALUE, NATTEN_OUT, NATTEN_LSE},
     {NATTEN_D_QUERY, NATTEN_D_KEY, NATTEN_D_VALUE, NATTEN_D_RPB, NATTEN_D_ADDITIONAL_KEY,
      NATTEN_D_ADDITIONAL_VALUE}},
    {"qk",
     NATTEN_QK,
     NATTEN_HEADS_FIRST,
     4,
     1,
     0,
     {NATTEN_QUERY, NATTEN_KEY, NATTEN_RPB, NATTEN_ADDITIONAL_KEY},
     {NATTEN_ATTN}},
    {"qk_backward",
     NATTEN_QK_BACKWARD,
     NATTEN_HEADS_FIRST,
     4,
     4,
     1,
     {NATTEN_D_ATTN, NATTEN_QUERY, NATTEN_KEY, NATTEN_ADDITIONAL_KEY},
     {NATTEN_D_QUERY, NATTEN_D_KEY, NATTEN_D_RPB, NATTEN_D_ADDITIONAL_KEY}},
    {"av",
     NATTEN_AV,
     NATTEN_HEADS_FIRST,
     3,
     1,
     0,
     {NATTEN_ATTN, NATTEN_VALUE, NATTEN_ADDITIONAL_VALUE},
     {NATTEN_OUT}},
    {"av_backward",
     NATTEN_AV_BACKWARD,
     NATTEN_HEADS_FIRST,
     4,
     3,
     1,
     {NATTEN_D_OUT, NATTEN_ATTN, NATTEN_VALUE, NATTEN_ADDITIONAL_VALUE},
     {NATTEN_D_ATTN, NATTEN_D_VALUE, NATTEN_D_ADDITIONAL_VALUE}},
};

static int may_be_none(natten_role role)
{
    return role == NATTEN_RPB || role == NATTEN_ADDITIONAL_KEY || role == NATTEN_ADDITIONAL_VALUE ||
           role == NATTEN_D_LSE;
}

static _Thread_local natten_status failure;

static _Atomic uint64_t preferences = NATTEN_PREFER_USUAL;

void natten_torch_prefer(uint64_t set) { atomic_store(&preferences, set); }

natten_status natten_torch_failure(void)
{
    natten_status status = failure;
    failure = NATTEN_OK;
    return status;
}

/* ---------------------------------------------------------------------------------------------
 * threads */

/* torch's OpenMP threads do not survive a fork, and waiting for them would never end. */
static atomic_int forked;

void na_torch_note_fork(void) { atomic_store(&forked, 1); }

typedef struct errand {
    natten_task task;
    void *context;
} errand;

static void do_errand(int64_t begin, int64_t end, void *context)
{
    const errand *e = context;
    for (int64_t worker = begin; worker < end; worker++)
        e->task(e->context, worker);
}

static void in_torch_threads(void *pool, int64_t workers, natten_task task, void *context)
{
    (void)pool;
    errand e = {task, context};
    if (na_torch.parallel_for(0, workers, 1, do_errand, &e))
        do_errand(0, workers, &e);
}

static void set_threads(natten_run *run)
{
    uint32_t count = 1;
    na_torch.thread_count(&count);
    run->threads = count;
    run->parallel = atomic_load_explicit(&forked, memory_order_relaxed) ? NULL : in_torch_threads;
}

/* ---------------------------------------------------------------------------------------------
 * a call */

static int64_t dtype_of(int32_t code)
{
    return code == na_torch.float32()    ? NATTEN_F32
           : code == na_torch.float64()  ? NATTEN_F64
           : code == na_torch.float16()  ? NATTEN_F16
           : code == na_torch.bfloat16() ? NATTEN_BF16
                                         : ABSENT;
}

static int32_t code_of(int64_t dtype)
{
    return dtype == NATTEN_F32   ? na_torch.float32()
           : dtype == NATTEN_F64 ? na_torch.float64()
           : dtype == NATTEN_F16 ? na_torch.float16()
                                 : na_torch.bfloat16();
}

static void describe(void *handle, natten_tensor *tensor)
{
    int64_t *sizes, *strides;
    int32_t dtype, device, index;
    const void *data;
    na_torch.dims(handle, &tensor->dims);
    na_torch.sizes(handle, &sizes);
    na_torch.strides(handle, &strides);
    na_torch.dtype(handle, &dtype);
    na_torch.device_type(handle, &device);
    na_torch.device_index(handle, &index);
    na_torch.data(handle, &data);
    for (int i = 0; i < tensor->dims && i < NATTEN_TENSOR_DIMS; i++) {
        tensor->size[i] = sizes[i];
        tensor->stride[i] = strides[i];
    }
    tensor->data = (void *)data;
    tensor->dtype = dtype_of(dtype);
    tensor->device = device == na_torch.cpu()    ? NATTEN_CPU
                     : device == na_torch.cuda() ? NATTEN_CUDA
                                                 : ABSENT;
    tensor->device_index = index < 0 ? 0 : index;
}

static void *allocate(const natten_tensor *like, int64_t dims, const int64_t *sizes,
                      const int64_t *strides, int32_t dtype)
{
    void *handle;
    int cuda = like->device == NATTEN_CUDA;
    int failed =
        na_torch.empty_strided(dims, sizes, strides, dtype, cuda ? na_torch.cuda() : na_torch.cpu(),
                               cuda ? (int32_t)like->device_index : -1, &handle);
    return failed ? NULL : handle;
}

/* Replaces a tensor whose channels are not consecutive by a contiguous copy. */
static int make_contiguous(void **handle, natten_tensor *tensor)
{
    int64_t strides[NATTEN_TENSOR_DIMS], step = 1;
    for (int64_t i = tensor->dims; i-- > 0;) {
        strides[i] = step;
        step *= tensor->size[i] > 1 ? tensor->size[i] : 1;
    }
    void *copy = NULL;
    if (tensor->dtype >= 0 && tensor->device >= 0)
        copy = allocate(tensor, tensor->dims, tensor->size, strides, code_of(tensor->dtype));
    if (!copy)
        return 0;
    int failed = na_torch.copy(copy, *handle, 0);
    na_torch.delete_tensor(*handle);
    *handle = copy;
    describe(copy, tensor);
    return !failed;
}

static int64_t take_list(uint64_t word, int64_t *items, size_t room)
{
    void *list = (void *)(uintptr_t)word;
    size_t size = 0;
    na_torch.list_size(list, &size);
    for (size_t i = 0; i < size && i < room; i++) {
        uint64_t item = 0;
        na_torch.list_item(list, i, &item);
        items[i] = (int64_t)item;
    }
    na_torch.delete_list(list);
    return (int64_t)size;
}

/* False if the argument is None. */
static int take_optional(uint64_t word, uint64_t *value)
{
    uint64_t *cell = (uint64_t *)(uintptr_t)word;
    if (!cell)
        return 0;
    *value = *cell;
    if (na_torch.delete_optional)
        na_torch.delete_optional(cell);
    else
        na_torch.operator_delete(cell);
    return 1;
}

static void *take_tensor(uint64_t word, int optional)
{
    if (optional && !take_optional(word, &word))
        return NULL;
    return (void *)(uintptr_t)word;
}

/* Takes the numbers that follow the tensors. */
static void take_numbers(const op *o, const uint64_t *word, natten_call *call)
{
    call->entries = take_list(word[0], call->window, NATTEN_WINDOW_ENTRIES);
    uint64_t scale = 0;
    call->default_scale = !take_optional(word[1], &scale);
    memcpy(&call->scale, &scale, sizeof call->scale);
    uint64_t wanted = o->chooses ? word[2] : ~(uint64_t)0;
    for (int i = 0; i < o->outputs; i++)
        if (wanted >> i & 1)
            call->outputs |= natten_bit(o->output[i]);
}

/* Stack in, handles and call out; false, with a text, if a tensor could not be made contiguous. */
static natten_status take(const op *o, const uint64_t *stack, void **handles, natten_call *call)
{
    call->op = o->op;
    call->order = o->order;
    call->preferences = atomic_load_explicit(&preferences, memory_order_relaxed);
    for (int role = 0; role < NATTEN_ROLES; role++)
        call->tensor[role].dims = ABSENT;
    for (int i = 0; i < o->inputs; i++)
        handles[i] = take_tensor(stack[i], may_be_none(o->input[i]));
    take_numbers(o, stack + o->inputs, call);
    for (int i = 0; i < o->inputs; i++) {
        natten_tensor *tensor = &call->tensor[o->input[i]];
        if (!handles[i])
            continue;
        describe(handles[i], tensor);
        if (natten_call_must_copy(tensor, o->input[i]) && tensor->dtype >= 0 &&
            tensor->device >= 0 && !make_contiguous(&handles[i], tensor))
            return natten_call_no_memory(call, o->input[i]);
    }
    return NATTEN_OK;
}

/* Makes the outputs, those nobody wants empty. */
static natten_status make_outputs(const op *o, natten_call *call, void **outputs)
{
    static const int64_t nothing[1] = {0}, one[1] = {1};
    for (int i = 0; i < o->outputs; i++) {
        natten_role role = o->output[i];
        natten_tensor *tensor = &call->tensor[role];
        if (call->outputs & natten_bit(role))
            outputs[i] = allocate(tensor, tensor->dims, tensor->size, tensor->stride,
                                  code_of(tensor->dtype));
        else
            outputs[i] = allocate(&call->tensor[o->input[0]], 1, nothing, one,
                                  code_of(call->tensor[o->input[0]].dtype));
        if (!outputs[i])
            return natten_call_no_memory(call, role);
        na_torch.mutable_data(outputs[i], &tensor->data);
    }
    return NATTEN_OK;
}

static natten_status compute(natten_call *call)
{
    natten_run run = {.threads = 0};
    void *workspace = NULL;
    natten_status status = NATTEN_OK;
    if (call->problem.device == NATTEN_CUDA) {
        size_t bytes = 0;
        status = natten_workspace(&call->problem, &bytes);
        if (status != NATTEN_OK)
            snprintf(call->text, sizeof call->text, "%s", natten_last_error());
        else if (na_torch.cuda_stream)
            na_torch.cuda_stream((int32_t)call->problem.device_index, &run.stream);
        if (status == NATTEN_OK && bytes) {
            const int64_t size[1] = {(int64_t)bytes}, step[1] = {1};
            natten_tensor like = {.device = NATTEN_CUDA,
                                  .device_index = call->problem.device_index};
            workspace = allocate(&like, 1, size, step, na_torch.uint8());
            if (!workspace) {
                snprintf(call->text, sizeof call->text, "No memory for a workspace of %zu bytes.",
                         bytes);
                return NATTEN_ERROR_MEMORY;
            }
            na_torch.mutable_data(workspace, &run.workspace);
        }
    } else {
        set_threads(&run);
    }
    if (status == NATTEN_OK)
        status = natten_call_run(call, &run);
    if (workspace)
        na_torch.delete_tensor(workspace);
    return status;
}

static void release(void **handles, int count)
{
    for (int i = 0; i < count; i++)
        if (handles[i])
            na_torch.delete_tensor(handles[i]);
}

void na_torch_call(natten_op which, uint64_t *stack)
{
    const op *o = &ops[which];
    natten_call call;
    failure = NATTEN_OK;
    memset(&call, 0, sizeof call);
    void *inputs[MOST_TENSORS] = {NULL}, *outputs[6] = {NULL};
    natten_status status = take(o, stack, inputs, &call);
    if (status == NATTEN_OK)
        status = natten_call_bind(&call);
    if (status == NATTEN_OK)
        status = make_outputs(o, &call, outputs);
    if (status == NATTEN_OK)
        status = compute(&call);
    release(inputs, o->inputs);
    if (status != NATTEN_OK) {
        release(outputs, o->outputs);
        failure = status;
        na_torch.check(0, o->name, "natten", 0, call.text);
        return;
    }
    for (int i = 0; i < o->outputs; i++)
        stack[i] = (uint64_t)(uintptr_t)outputs[i];
}
