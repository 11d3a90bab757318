/* SPDX-License-Identifier: MIT
 * Items of different sizes in packed tensors: each becomes a problem of its own, on views of the
 * packed tensors. */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "torch/bind.h"
#include "torch/pages.h"

#define D PRId64

/* Problems found so far, and which item each began with. Equal neighbours are one problem with a
 * larger batch. */
typedef struct batches {
    natten_problem *problems;
    natten_run *runs;
    int64_t *first;
    size_t count;
} batches;

static natten_status fail(natten_call *call, natten_status status, int64_t item, const char *text)
{
    char copy[sizeof call->text]; /* text may be the call's own */
    snprintf(copy, sizeof copy, "%s", text);
    snprintf(call->text, sizeof call->text, "Item %" D ": %.960s", item, copy);
    return status;
}

static int is_of_keys(int role)
{
    return role == NATTEN_KEY || role == NATTEN_VALUE || role == NATTEN_D_KEY ||
           role == NATTEN_D_VALUE;
}

/* The part of a packed tensor that holds `batch` maps, from token `at` on; or, of a packed tensor
 * with a batch of its own, one map of each. */
static natten_tensor part(const natten_tensor *packed, int64_t batch, const int64_t *extent,
                          int64_t rank, int64_t at)
{
    natten_tensor view = *packed;
    int64_t step = packed->stride[1];
    view.data = (char *)packed->data + at * step * (int64_t)na_element_size(packed->dtype);
    view.dims = packed->dims - 1 + rank;
    for (int64_t i = rank; i > 0; i--) {
        view.size[i] = extent[i - 1];
        view.stride[i] = step;
        step *= extent[i - 1];
    }
    if (packed->size[0] == 1) {
        view.size[0] = batch;
        view.stride[0] = step;
    }
    for (int64_t i = 2; i < packed->dims; i++) {
        view.size[i - 1 + rank] = packed->size[i];
        view.stride[i - 1 + rank] = packed->stride[i];
    }
    return view;
}

static void set_window(natten_call *call, const natten_item_axis *item, int64_t rank)
{
    call->entries = 7 * rank;
    for (int64_t i = 0; i < rank; i++) {
        int64_t *entry = call->window + i;
        entry[0] = item[i].kernel_size ? item[i].kernel_size : item[i].key_extent;
        entry[rank] = item[i].stride;
        entry[2 * rank] = item[i].dilation;
        entry[3 * rank] = item[i].is_causal;
        entry[4 * rank] = entry[5 * rank] = 0;
        entry[6 * rank] = item[i].key_extent;
    }
}

/* `batch` items like `item`, the first of which begins at tokens at[0] of queries, at[1] of keys.
 */
static natten_status add(const natten_call *packed, natten_call *call, batches *all,
                         const natten_item_axis *item, int64_t rank, int64_t batch,
                         const int64_t at[2])
{
    int64_t extent[2][3];
    *call = *packed;
    set_window(call, item, rank);
    for (int64_t i = 0; i < rank; i++) {
        extent[0][i] = item[i].query_extent;
        extent[1][i] = item[i].key_extent;
    }
    for (int role = 0; role < NATTEN_ROLES; role++) {
        int keys = is_of_keys(role);
        if (packed->tensor[role].dims >= 0)
            call->tensor[role] = part(&packed->tensor[role], batch, extent[keys], rank, at[keys]);
    }
    natten_status status = natten_call_bind(call);
    if (status != NATTEN_OK)
        return status;
    all->problems[all->count] = call->problem;
    for (int role = 0; role < NATTEN_ROLES; role++)
        all->runs[all->count].data[role] =
            call->problem.roles >> role & 1 ? call->tensor[role].data : NULL;
    all->count++;
    return NATTEN_OK;
}

/* Tokens of an item, or -1 if there are more than `room`. */
static int64_t tokens(const natten_item_axis *item, int64_t rank, int keys, int64_t room)
{
    int64_t count = 1;
    for (int64_t i = 0; i < rank; i++)
        if (!(keys ? item[i].key_extent : item[i].query_extent))
            return 0;
    for (int64_t i = 0; i < rank; i++) {
        int64_t extent = keys ? item[i].key_extent : item[i].query_extent;
        if (extent < 0 || extent > room / count)
            return -1;
        count *= extent;
    }
    return count;
}

/* Cuts the packed tensors into problems. */
static natten_status cut(natten_call *packed, natten_call *call, batches *all,
                         const natten_item_axis *items, int64_t count, int64_t rank)
{
    static const char *const names[2] = {"query", "key"};
    const int64_t room[2] = {packed->tensor[NATTEN_QUERY].size[1],
                             packed->tensor[NATTEN_KEY].size[1]};
    const int64_t whole = packed->tensor[NATTEN_QUERY].size[0];
    int64_t at[2] = {0, 0};
    for (int64_t i = 0, next; i < count; i = next) {
        const natten_item_axis *item = items + i * rank;
        int64_t size[2], batch;
        char text[128];
        for (next = i + 1; next < count; next++)
            if (whole != 1 || memcmp(item, items + next * rank, (size_t)rank * sizeof *item))
                break;
        batch = next - i;
        for (int keys = 0; keys < 2; keys++) {
            size[keys] = tokens(item, rank, keys, room[keys] - at[keys]);
            if (size[keys] == 0 ||
                (size[keys] > 0 && batch <= (room[keys] - at[keys]) / size[keys]))
                continue;
            snprintf(text, sizeof text,
                     "extents must be at least 0 and fit into the %" D " tokens of %s.", room[keys],
                     names[keys]);
            return fail(packed, NATTEN_ERROR_ARGUMENT, i, text);
        }
        if (size[0] && size[1]) {
            all->first[all->count] = i;
            natten_status status = add(packed, call, all, item, rank, batch, at);
            if (status != NATTEN_OK)
                return fail(packed, status, i, call->text);
        }
        at[0] += size[0] * batch;
        at[1] += size[1] * batch;
    }
    for (int keys = 0; keys < 2; keys++)
        if (at[keys] != room[keys]) {
            snprintf(packed->text, sizeof packed->text,
                     "%s has %" D " tokens, but the items have %" D " together.", names[keys],
                     room[keys], at[keys]);
            return NATTEN_ERROR_ARGUMENT;
        }
    return NATTEN_OK;
}

static natten_status compute(natten_call *packed, batches *all, const natten_run *run,
                             size_t *workspace)
{
    size_t failed = 0;
    natten_status status = NATTEN_OK;
    if (!run) {
        *workspace = 0;
        for (size_t i = 0, bytes; status == NATTEN_OK && i < all->count; i++) {
            failed = i;
            status = natten_workspace(&all->problems[i], &bytes);
            *workspace = status == NATTEN_OK && bytes > *workspace ? bytes : *workspace;
        }
    } else {
        for (int role = 0; role < NATTEN_ROLES; role++)
            if (packed->outputs >> role & 1)
                na_prefer_huge_pages(&packed->tensor[role], packed->tensor[role].data);
        for (size_t i = 0; i < all->count; i++) {
            natten_run mine = *run;
            memcpy(mine.data, all->runs[i].data, sizeof mine.data);
            all->runs[i] = mine;
        }
        status = natten_compute_all(all->problems, all->runs, all->count, &failed);
    }
    return status == NATTEN_OK ? status
                               : fail(packed, status, all->first[failed], natten_last_error());
}

natten_status natten_call_items(natten_call *packed, const natten_item_axis *items, int64_t count,
                                int64_t rank, const natten_run *run, size_t *workspace)
{
    size_t room = count > 0 ? (size_t)count : 1;
    natten_call *call = malloc(sizeof *call);
    batches all = {malloc(room * sizeof *all.problems), malloc(room * sizeof *all.runs),
                   malloc(room * sizeof *all.first), 0};
    natten_status status = NATTEN_ERROR_MEMORY;
    if (call && all.problems && all.runs && all.first) {
        status = cut(packed, call, &all, items, count, rank);
        if (status == NATTEN_OK)
            status = compute(packed, &all, run, workspace);
    } else {
        snprintf(packed->text, sizeof packed->text, "No memory for %" D " items.", count);
    }
    free(call);
    free(all.problems);
    free(all.runs);
    free(all.first);
    return status;
}
