/* SPDX-License-Identifier: MIT
 * All vector kernels, built once for each instruction set and real type: NA_ISA_HEADER names the
 * vector words, NA_KERNELS the table. */
#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "core/dropout.h"
#include "core/problem.h"
#include "cpu/bands.h"
#include "cpu/choices.h"
#include "cpu/cpuid.h"
#include "cpu/kernels.h"
#include "cpu/scratch.h"
#include "cpu/queue.h"
#include "cpu/simd.h"
#include "cpu/threads.h"
#include "cpu/tiles.h"

#include "cpu/ahead_tmpl.h"
#include "cpu/pack_tmpl.h"
#include "cpu/micro_tmpl.h"
#include "cpu/runs_tmpl.h"
#include "cpu/aggregate_tmpl.h"
#include "cpu/math_tmpl.h"
#include "cpu/pairs_tmpl.h"
#include "cpu/bias_tmpl.h"
#include "cpu/dropout_tmpl.h"
#include "cpu/queries_tmpl.h"
#include "cpu/forward_tile_tmpl.h"
#include "cpu/forward_tmpl.h"
#ifndef PAIRS
#include "cpu/weights_tmpl.h"
#include "cpu/scatter_tmpl.h"
#include "cpu/unfused_tmpl.h"
#include "cpu/unfused_plan_tmpl.h"
#include "cpu/backward_tile_tmpl.h"
#include "cpu/backward_tmpl.h"
#include "cpu/backward_plan_tmpl.h"
#endif

const na_cpu_kernels NA_KERNELS = {{
    [NATTEN_FORWARD] = forward_plan,
#ifndef PAIRS
    [NATTEN_BACKWARD] = backward_plan,
    [NATTEN_QK] = unfused_plan,
    [NATTEN_QK_BACKWARD] = unfused_plan,
    [NATTEN_AV] = unfused_plan,
    [NATTEN_AV_BACKWARD] = unfused_plan,
#endif
}};
