/* SPDX-License-Identifier: MIT
 * Problems made of arbitrary bytes: planning must end in a plan or in a sentence, and a small
 * problem that got a plan must run without touching anything but its tensors. With libFuzzer's main
 * it searches; with replay.c's it repeats files or makes up its own inputs. */
#include <stdlib.h>
#include <string.h>

#include "problem_string.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

enum { MOST_ELEMENTS = 1 << 14 };

/* Values that are likely to be on the edge of something. The largest extent that is allowed is not
 * among them: planning looks at every query of an axis, and this must take milliseconds. */
static int64_t value_of(uint8_t code)
{
    static const int64_t edges[] = {INT64_MIN, INT64_MAX,        -1,        (int64_t)1 << 16,
                                    INT32_MAX, (int64_t)1 << 32, INT32_MIN, ((int64_t)1 << 29) + 1};
    return code < 240 ? code % 24 : edges[code % 8];
}

/* Offsets of the lowest and highest element; 0 if the tensor is too large to try. */
static int measure(const natten_problem *p, natten_role role, int64_t *low, int64_t *high)
{
    test_shape s = role_shape(p, role);
    const natten_layout *l = &p->layout[role];
    const int64_t sizes[] = {s.batch, s.head, s.axis[0], s.axis[1], s.axis[2]};
    const int64_t steps[] = {l->batch, l->head, l->axis[0], l->axis[1], l->axis[2]};
    double reach = (double)s.channel;
    *low = 0;
    *high = s.channel;
    for (int i = 0; i < 5; i++) {
        if (sizes[i] <= 0)
            *high = *low;
        reach += (double)sizes[i] * (steps[i] < 0 ? -(double)steps[i] : (double)steps[i]);
        if (reach > MOST_ELEMENTS)
            return 0;
        int64_t last = (sizes[i] - 1) * steps[i];
        *low += last < 0 ? last : 0;
        *high += last > 0 ? last : 0;
    }
    return 1;
}

/* Defaults as the library resolves them; role_shape wants them explicit. */
static natten_problem resolved(const natten_problem *problem)
{
    natten_problem p = *problem;
    for (int a = 0; a < p.rank; a++)
        if (!p.axis[a].key_extent)
            p.axis[a].key_extent = p.axis[a].query_extent;
    p.kv_heads = p.kv_heads ? p.kv_heads : p.heads;
    p.value_dim = p.value_dim ? p.value_dim : p.head_dim;
    return p;
}

static void run_plan(const natten_plan *plan, const natten_problem *problem)
{
    natten_problem p = resolved(problem);
    natten_run run = {.threads = 2};
    char *blocks[NATTEN_ROLES] = {NULL};
    double work = (double)p.batch * (double)p.heads;
    int possible = 1;
    for (int a = 0; a < p.rank; a++)
        work *= (double)p.axis[a].query_extent * (double)p.axis[a].window;
    for (int role = 0; possible && role < NATTEN_ROLES; role++) {
        int64_t low, high;
        if (!(p.roles >> role & 1))
            continue;
        possible = measure(&p, (natten_role)role, &low, &high);
        size_t bytes = possible ? (size_t)(high - low) * 8 : 0;
        blocks[role] = possible ? calloc(1, bytes + 8) : NULL;
        if (blocks[role])
            run.data[role] = blocks[role] - low * (p.dtype == NATTEN_F64   ? 8
                                                   : p.dtype == NATTEN_F32 ? 4
                                                                           : 2);
    }
    /* A lse of halves is in floats; its offsets are then larger than reckoned above. */
    int is_half = p.dtype == NATTEN_F16 || p.dtype == NATTEN_BF16;
    uint64_t floats = natten_bit(NATTEN_LSE) | natten_bit(NATTEN_D_LSE) |
                      natten_bit(NATTEN_KEY_BIAS) | natten_bit(NATTEN_D_KEY_BIAS);
    if (possible && work < 1e5 && !(is_half && (p.roles & floats)))
        natten_plan_run(plan, &run);
    for (int role = 0; role < NATTEN_ROLES; role++)
        free(blocks[role]);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    natten_problem p;
    natten_plan *plan;
    char text[512];
    if (size < 3)
        return 0;
    /* A good problem first, then changes: a field and a value, two bytes each. */
    natten_problem_init(&p, (natten_op)(data[0] % NATTEN_OPS), (natten_dtype)(data[1] % 4),
                        1 + data[2] % 3);
    for (int a = 0; a < 3; a++) {
        p.axis[a].query_extent = 5 + a;
        p.axis[a].window = 3;
    }
    p.head_dim = 4;
    const size_t fields = offsetof(natten_problem, layout) / sizeof(int64_t);
    const size_t strides = NATTEN_ROLES * sizeof *p.layout / sizeof(int64_t);
    for (size_t i = 3; i + 1 < size && i < 40; i += 2) {
        int64_t value = value_of(data[i + 1]);
        if (data[i] >= 128) {
            natten_problem_pack(&p, (natten_order)(data[i + 1] & 1));
            memcpy((int64_t *)p.layout + (data[i] - 128) % strides, &value, sizeof value);
        } else if (data[i] % fields == offsetof(natten_problem, roles) / sizeof(int64_t)) {
            p.roles ^= (uint64_t)1 << data[i + 1] % 22;
        } else if (data[i] % fields == offsetof(natten_problem, dropout) / sizeof(int64_t)) {
            p.dropout = (double)value / 16;
        } else if (data[i] % fields != offsetof(natten_problem, scale) / sizeof(int64_t)) {
            memcpy((int64_t *)&p + data[i] % fields, &value, sizeof value);
        }
    }
    if (p.device == NATTEN_CUDA)
        p.device = NATTEN_CPU;
    if (data[size - 1] & 1)
        natten_problem_pack(&p, NATTEN_HEADS_FIRST);
    if (natten_plan_create(&p, NULL, &plan) == NATTEN_OK) {
        natten_plan_explain(plan, text, sizeof text);
        run_plan(plan, &p);
    } else if (!*natten_last_error()) {
        abort(); /* no sentence */
    }
    natten_plan_destroy(plan);
    return 0;
}
