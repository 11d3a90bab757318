/* SPDX-License-Identifier: MIT
 * Plans the vector kernels: what an instruction set needs of the machine, and what all of them need
 * of a problem. The rest is each kernel's own business. */
#include "core/env.h"
#include "cpu/cpuid.h"
#include "cpu/kernels.h"
#include "cpu/pairs.h"

/* Tables count keys in int. */
static const int64_t largest_window = INT32_MAX / 4;

static natten_status plan_with(natten_plan *plan, const na_cpu_kernels *f32,
                               const na_cpu_kernels *f64)
{
    const natten_problem *p = &plan->merged;
    int64_t queries = p->batch;
    for (int i = 0; i < 3; i++)
        queries *= p->axis[i].query_extent != 0;
    if (!queries)
        return na_refuse(plan, "nothing to compute");
    if (na_window_size(p) > largest_window)
        return na_refuse(plan, "the window holds too many tokens");
    const na_cpu_kernels *kernels = p->dtype == NATTEN_F64 ? f64 : f32;
    return kernels->plan[p->op](plan);
}

natten_status na_cpu_generic_plan(natten_plan *plan)
{
    return plan_with(plan, &na_cpu_generic_f32, &na_cpu_generic_f64);
}

#if defined(__aarch64__)

/* Every such processor has it. */
natten_status na_cpu_neon_plan(natten_plan *plan)
{
    if (na_disabled("neon"))
        return na_refuse(plan, "NEON is switched off by NATTEN_DISABLE");
    return plan_with(plan, &na_cpu_neon_f32, &na_cpu_neon_f64);
}

#else

natten_status na_cpu_neon_plan(natten_plan *plan)
{
    return na_refuse(plan, "NEON is for AArch64 processors");
}

#endif

#if defined(__x86_64__)

natten_status na_cpu_avx512_plan(natten_plan *plan)
{
    if (na_disabled("avx512"))
        return na_refuse(plan, "AVX-512 is switched off by NATTEN_DISABLE");
    if (!na_cpu_has_avx512())
        return na_refuse(plan, "this processor has no AVX-512 (F, DQ, BW, VL)");
    return plan_with(plan, &na_cpu_avx512_f32, &na_cpu_avx512_f64);
}

#if defined(NATTEN_HAS_AVX512BF16)

natten_status na_cpu_avx512bf16_plan(natten_plan *plan)
{
    if (plan->merged.dtype != NATTEN_BF16)
        return na_refuse(plan, "only for bfloat16");
    if (na_disabled("avx512bf16") || na_disabled("avx512"))
        return na_refuse(plan, "AVX-512 BF16 is switched off by NATTEN_DISABLE");
    if (!na_cpu_has_avx512bf16())
        return na_refuse(plan, "this processor has no AVX-512 BF16");
    if (plan->merged.dropout > 0 || na_has(&plan->merged, NATTEN_KEY_BIAS))
        return na_refuse(plan, "neither dropout nor a key bias");
    if (plan->merged.head_dim % 2)
        return na_refuse(plan, "an odd number of channels");
    const double gain = na_pairs_gain();
    if (gain <= 0)
        return na_refuse(plan, gain < 0 ? "no memory to try it" : "wrong results when tried here");
    if (gain < 1.1)
        return na_refuse(plan, "tried here, it was %.2f times as fast as the kernel for float",
                         gain);
    na_refuse(plan, "%.2f times as fast as the kernel for float when tried here", gain);
    return plan_with(plan, &na_cpu_avx512bf16_f32, NULL);
}

#else

natten_status na_cpu_avx512bf16_plan(natten_plan *plan)
{
    return na_refuse(plan, "the compiler of this library did not know AVX-512 BF16");
}

#endif

#if defined(NATTEN_HAS_AMX)

natten_status na_cpu_amx_plan(natten_plan *plan)
{
    const natten_problem *p = &plan->merged;
    if (p->dtype != NATTEN_BF16)
        return na_refuse(plan, "only for bfloat16");
    if (na_disabled("amx") || na_disabled("avx512"))
        return na_refuse(plan, "AMX is switched off by NATTEN_DISABLE");
    if (!na_cpu_has_amx())
        return na_refuse(plan, "this processor has no AMX for bfloat16");
    if (!na_cpu_allows_amx())
        return na_refuse(plan, "this system does not let the process use AMX");
    if (p->dropout > 0 || na_has(p, NATTEN_KEY_BIAS) || na_has(p, NATTEN_RPB))
        return na_refuse(plan, "neither dropout nor a bias of any kind");
    if (p->additional_tokens)
        return na_refuse(plan, "no additional tokens");
    return plan_with(plan, &na_cpu_amx_bf16, NULL);
}

#else

natten_status na_cpu_amx_plan(natten_plan *plan)
{
    return na_refuse(plan, "the compiler of this library did not know AMX");
}

#endif

natten_status na_cpu_avx2_plan(natten_plan *plan)
{
    if (na_disabled("avx2"))
        return na_refuse(plan, "AVX2 is switched off by NATTEN_DISABLE");
    if (!na_cpu_has_avx2())
        return na_refuse(plan, "this processor has no AVX2 with FMA and F16C");
    return plan_with(plan, &na_cpu_avx2_f32, &na_cpu_avx2_f64);
}

#else

natten_status na_cpu_avx512_plan(natten_plan *plan)
{
    return na_refuse(plan, "AVX-512 is for x86-64 processors");
}

natten_status na_cpu_avx512bf16_plan(natten_plan *plan)
{
    return na_refuse(plan, "AVX-512 is for x86-64 processors");
}

natten_status na_cpu_amx_plan(natten_plan *plan)
{
    return na_refuse(plan, "AMX is for x86-64 processors");
}

natten_status na_cpu_avx2_plan(natten_plan *plan)
{
    return na_refuse(plan, "AVX2 is for x86-64 processors");
}

#endif
