/* SPDX-License-Identifier: MIT */
#include "core/preference.h"

#include <stdio.h>

enum {
    NAIVE = 0, /* no preference: these kernels are always there */
    UNFUSED = 1 << NATTEN_QK | 1 << NATTEN_QK_BACKWARD | 1 << NATTEN_AV | 1 << NATTEN_AV_BACKWARD,
    ANY = (1 << NATTEN_OPS) - 1,
    TRAINING = 1 << NATTEN_BACKWARD
};

/* What a preference is called, and the ops on CUDA that it is about. */
static const struct {
    uint64_t bit;
    const char *name;
    int ops;
} known[] = {{NATTEN_PREFER_GEMM, "GEMM kernels", UNFUSED},
             {NATTEN_PREFER_TILED, "tiled kernels", UNFUSED},
             {NAIVE, "naive kernels", UNFUSED},
             {NATTEN_PREFER_TF32, "TF32", ANY},
             {NATTEN_PREFER_KV_PARALLEL, "KV parallelism", TRAINING},
             {NATTEN_PREFER_LITTLE_MEMORY, "little memory", TRAINING},
             {NATTEN_PREFER_MUCH_MEMORY, "much memory", TRAINING}};

static const int count = sizeof known / sizeof *known;

/* Not worth a line: preferences that say nothing unusual and that nothing is lost with. */
static int is_silent(const natten_problem *p, uint64_t bit)
{
    int usual = NATTEN_PREFER_USUAL & bit ? 1 : 0, set = p->preferences & bit ? 1 : 0;
    if (bit == NAIVE)
        return p->device == NATTEN_CPU;
    if (p->device == NATTEN_CPU || !(bit & NATTEN_PREFER_USUAL))
        return set == usual;
    return 0;
}

static int is_about(int index, const natten_problem *p)
{
    int tf32 = known[index].bit == NATTEN_PREFER_TF32;
    return (known[index].ops >> p->op & 1) && !(tf32 && p->dtype != NATTEN_F32);
}

const char *na_preference_describe(const natten_plan *plan, int *index, char *text, size_t size)
{
    const natten_problem *p = &plan->problem;
    while (*index < count && (!is_about(*index, p) || is_silent(p, known[*index].bit)))
        (*index)++;
    if (*index >= count)
        return NULL;
    uint64_t bit = known[*index].bit;
    if (bit == NAIVE) {
        snprintf(text, size, "%s%s", plan->run ? plan->kernel->name : "none takes this problem",
                 plan->run ? " is of this kind" : "");
        return known[(*index)++].name;
    }
    const char *said = p->preferences & bit ? "allowed" : "switched off";
    if (p->device == NATTEN_CPU)
        snprintf(text, size, "%s, without effect on a CPU", said);
    else if (!plan->run || !(p->preferences & bit))
        snprintf(text, size, "%s", said);
    else if (plan->honours & bit)
        snprintf(text, size, "%s, and %s makes use of it", said, plan->kernel->name);
    else
        snprintf(text, size, "%s, but %s makes no use of it", said, plan->kernel->name);
    return known[(*index)++].name;
}
