/* SPDX-License-Identifier: MIT */
#include "core/merge.h"

#include <stdio.h>

#include "core/kernel.h"
#include "core/problem.h"
#include "core/roles.h"

/* Far below what an axis may have. */
static const int64_t most_tokens = (int64_t)1 << 28;

static int is_point(const natten_axis *axis)
{
    return axis->query_extent == 1 && axis->global_extent == 1;
}

/* Whether every query sees every key, and all keys are here. The stride does not matter then, nor
 * do the places of queries. */
static int is_whole(const natten_axis *axis)
{
    return axis->window == axis->global_extent && axis->key_extent == axis->global_extent &&
           axis->dilation == 1 && !axis->causal;
}

/* Whether tokens of a role follow each other with one step from axis to axis. */
static int flattens(const natten_problem *p, natten_role role, int outer)
{
    const na_shape shape = na_role_shape(p, role);
    const natten_layout *layout = &p->layout[role];
    return !na_has(p, role) || na_role_is_additional(role) || shape.extent[outer] <= 1 ||
           shape.extent[outer + 1] <= 1 ||
           layout->axis[outer] == layout->axis[outer + 1] * shape.extent[outer + 1];
}

static int can_merge(const natten_problem *p, int outer)
{
    const natten_axis *a = &p->axis[outer], *b = a + 1;
    int can = !is_point(a) && is_whole(a) && is_whole(b) &&
              a->query_extent * b->query_extent <= most_tokens &&
              a->window * b->window <= most_tokens;
    for (int role = 0; role < NATTEN_ROLES; role++)
        can = can && flattens(p, (natten_role)role, outer);
    return can;
}

/* The axes before the two move up; in front there is one of one token more. */
static void merge(natten_problem *p, int outer)
{
    for (int role = 0; role < NATTEN_ROLES; role++) {
        natten_layout *layout = &p->layout[role];
        if (na_role_is_additional((natten_role)role))
            continue;
        if (na_role_shape(p, (natten_role)role).extent[outer + 1] <= 1)
            layout->axis[outer + 1] = layout->axis[outer];
        for (int i = outer; i > 0; i--)
            layout->axis[i] = layout->axis[i - 1];
        layout->axis[0] = 0;
    }
    natten_axis *a = &p->axis[outer], *b = a + 1;
    const int64_t keys = a->window * b->window;
    *b = (natten_axis){a->query_extent * b->query_extent, keys, keys, 0, 0, keys, 1, 1, 0};
    for (int i = outer; i > 0; i--)
        p->axis[i] = p->axis[i - 1];
    p->axis[0] = na_point;
}

int na_problem_merge(natten_problem *p)
{
    int merged = 0;
    if (p->dropout > 0 || na_has(p, NATTEN_RPB) || na_has(p, NATTEN_D_RPB))
        return 0;
    for (int outer = 1; outer >= 0; outer--)
        for (; can_merge(p, outer); merged++)
            merge(p, outer);
    return merged;
}

/* The extents, but for leading ones. */
static void write_extents(const natten_problem *p, char *text, size_t size)
{
    int i = 0;
    while (i < 2 && is_point(&p->axis[i]))
        i++;
    for (size_t at = 0; i < 3 && at < size; i++)
        at += (size_t)snprintf(text + at, size - at, "%lld%s", (long long)p->axis[i].key_extent,
                               i < 2 ? " x " : "");
}

void na_merge_describe(const natten_problem *padded, const natten_problem *merged, char *text,
                       size_t size)
{
    char before[64], after[64];
    write_extents(padded, before, sizeof before);
    write_extents(merged, after, sizeof after);
    snprintf(text, size,
             "windows are whole axes, so that %s keys are %s for all kernels but the reference",
             before, after);
}
