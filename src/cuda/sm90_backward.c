/* SPDX-License-Identifier: MIT
 * Plans the kernels of device/sm90_backward.cu: first delta of every query, then d_query, d_key
 * with d_value, and the gradients of additional tokens; as many of them as are wanted. Or, where KV
 * parallelism is allowed, all three from one kernel that adds d_query up in the workspace. */
#include "cuda/sm90_backward.h"

#include <stdio.h>
#include <stdlib.h>

#include "core/problem.h"
#include "cuda/device.h"
#include "cuda/reference.h"

enum {
    MOST_BLOCKS = 16,  /* of a multiprocessor, of the kernels before and after */
    MOST_VISITS = 255, /* what a note has room for */
    MOST_ENTRIES = 2000000000
};

static natten_status check(natten_plan *plan)
{
    static const natten_role walked[] = {NATTEN_QUERY,          NATTEN_KEY,
                                         NATTEN_VALUE,          NATTEN_D_OUT,
                                         NATTEN_ADDITIONAL_KEY, NATTEN_ADDITIONAL_VALUE};
    static const natten_role rows[] = {
        NATTEN_OUT,     NATTEN_D_QUERY,          NATTEN_D_KEY,
        NATTEN_D_VALUE, NATTEN_D_ADDITIONAL_KEY, NATTEN_D_ADDITIONAL_VALUE};
    const natten_problem *p = &plan->problem;
    natten_status status = na_sm90_check_sizes(plan);
    for (int i = 0; status == NATTEN_OK && i < 6; i++)
        if (na_has(p, walked[i]))
            status = na_sm90_check_layout(plan, walked[i], 1);
    for (int i = 0; status == NATTEN_OK && i < 6; i++)
        if (na_has(p, rows[i]))
            status = na_sm90_check_layout(plan, rows[i], 0);
    if (status == NATTEN_OK && na_sm90_bias_is_far(p))
        return na_refuse(plan, "entries of the relative position bias are too far apart");
    if (status == NATTEN_OK && na_has(p, NATTEN_RPB) && p->heads / p->kv_heads > MOST_VISITS)
        return na_refuse(plan, "a relative position bias, and more than %d heads share keys",
                         MOST_VISITS);
    double entries = (double)p->heads * na_sm90_head_entries(p);
    if (status == NATTEN_OK && na_has(p, NATTEN_D_RPB) && entries > MOST_ENTRIES)
        return na_refuse(plan,
                         "a gradient of %.0f entries of a relative position bias, and it "
                         "counts up to 2e9",
                         entries);
    double queries = (double)p->batch * (double)p->heads;
    for (int a = 0; a < 3; a++)
        queries *= (double)p->axis[a].query_extent;
    if (status == NATTEN_OK && queries > 2e9)
        return na_refuse(plan, "%.0f queries, and it counts up to 2e9", queries);
    return status;
}

/* ----------------------------------------------------------------------------------------------
 * specialisations */

static void special_of(const natten_problem *p, const na_sm90_pass *pass, na_special *special)
{
    const na_sm90_config *c = &pass->config;
    na_special_init(special, "sm90_backward.cu", "sm_90a");
    na_sm90_special_tiles(p, c, special);
    na_special_set(special, "NA_HALF_VISITORS", c->halves ? na_sm90_visitors(c) / 2 : 0);
    na_special_set(special, "NA_SIDE", na_sm90_is_of_keys(c->what));
    na_special_set(special, "NA_ADDS", c->what == NA_SM90_D_ALL);
    na_special_set(special, "NA_GIVES", c->gives);
    na_special_set(special, "NA_STAGES", c->stages[0]);
    na_special_set(special, "NA_EXTRA", c->what == NA_SM90_D_QUERY && p->additional_tokens > 0);
    na_special_set(special, "NA_MASKS", !pass->of_extra);
    na_special_set(special, "NA_SCALED", na_sm90_is_scaled(p));
    na_special_set(special, "NA_BIAS", na_has(p, NATTEN_RPB) && !pass->of_extra);
    na_special_set(special, "NA_BIAS_ENTRIES", na_sm90_bias_entries(p, c->what));
}

static void special_of_bias(const natten_problem *p, na_special *special)
{
    na_special_init(special, "sm90_bias.cu", "sm_90a");
    na_special_set(special, "NA_DTYPE", p->dtype);
}

/* The kernels before and after, whose lanes go through 8 channels each. */
static void special_of_rows(const natten_problem *p, const char *source, const char *name,
                            int64_t channels, na_special *special)
{
    int lanes = 1;
    while (lanes * 8 < channels)
        lanes *= 2;
    na_special_init(special, source, "sm_90a");
    na_special_set(special, "NA_DTYPE", p->dtype);
    na_special_set(special, name, channels);
    na_special_set(special, "NA_LANES", lanes);
}

static void special_of_delta(const natten_problem *p, na_special *special)
{
    special_of_rows(p, "sm90_delta.cu", "NA_VALUE_DIM", p->value_dim, special);
}

static void special_of_convert(const natten_problem *p, na_special *special)
{
    special_of_rows(p, "sm90_convert.cu", "NA_DIM", p->head_dim, special);
}

/* ----------------------------------------------------------------------------------------------
 * passes */

/* Adds the pass that gives what is wanted; or two, where both gradients at once do not fit. */
static int add_pass(const natten_problem *p, const na_device *device, na_sm90_what what, int gives,
                    int of_extra, na_sm90_back *s)
{
    na_sm90_pass *pass = &s->passes[s->count];
    na_sm90_config *c = &pass->config;
    c->gives = gives;
    if (!na_sm90_config_choose(p, device, what, 0, c))
        return what == NA_SM90_D_KEY && gives == 3 && add_pass(p, device, what, 1, of_extra, s) &&
               add_pass(p, device, what, 2, of_extra, s);
    pass->of_extra = of_extra;
    if (of_extra) {
        /* Tokens in a line; tables are not needed, and what is free of them stays so. */
        c->sub[0] = c->sub[1] = c->raster = 1;
        c->sub[2] = NA_SM90_ROWS;
        c->stack = 2;
        c->positions = 0;
    }
    s->count++;
    return 1;
}

static void begin(const natten_problem *p, int adds, na_sm90_back *s)
{
    *s = (na_sm90_back){.adds = adds,
                        .flat = na_sm90_is_flat(p),
                        .parts = na_sm90_parts(p),
                        .batches = p->batch,
                        .kv_heads = p->kv_heads};
}

/* Kernels of their own for d_query and for keys; 0: no tiles fit. */
static int find_passes(const natten_problem *p, const na_device *device, na_sm90_back *s)
{
    int key = na_has(p, NATTEN_D_KEY), value = na_has(p, NATTEN_D_VALUE);
    int extra_key = na_has(p, NATTEN_D_ADDITIONAL_KEY);
    int extra_value = na_has(p, NATTEN_D_ADDITIONAL_VALUE);
    int query = na_has(p, NATTEN_D_QUERY) || na_has(p, NATTEN_D_RPB);
    begin(p, 0, s);
    if (query && !add_pass(p, device, NA_SM90_D_QUERY, 1, 0, s))
        return 0;
    if (key + value && !add_pass(p, device, NA_SM90_D_KEY, key + 2 * value, 0, s))
        return 0;
    return !(extra_key + extra_value) ||
           add_pass(p, device, NA_SM90_D_KEY, extra_key + 2 * extra_value, 1, s);
}

/* One kernel for all; NULL, or why not. */
static const char *find_one_pass(const natten_problem *p, const na_device *device, na_sm90_back *s)
{
    const uint64_t all = natten_bit(NATTEN_D_QUERY) | natten_bit(NATTEN_D_KEY) |
                         natten_bit(NATTEN_D_VALUE),
                   extra =
                       natten_bit(NATTEN_D_ADDITIONAL_KEY) | natten_bit(NATTEN_D_ADDITIONAL_VALUE);
    const uint64_t wanted = p->additional_tokens ? all | extra : all;
    begin(p, 1, s);
    if (!(p->preferences & NATTEN_PREFER_KV_PARALLEL))
        return "KV parallelism is not allowed";
    if ((p->roles & wanted) != wanted)
        return "not all gradients are wanted";
    if (na_has(p, NATTEN_RPB))
        return "there is a position bias";
    for (int a = 0; p->additional_tokens && a < 3; a++)
        if (p->axis[a].dilation > 1)
            return "there are additional tokens and a dilation";
    if (!add_pass(p, device, NA_SM90_D_ALL, 3, 0, s) ||
        (p->additional_tokens && !add_pass(p, device, NA_SM90_D_ALL, 3, 1, s)))
        return "three sums do not fit into registers and shared memory";
    return NULL;
}

enum { ONE_KERNEL = 1, SEVERAL = 2 }; /* choices, where KV parallelism is possible */

/* What the passes are expected to take, but for that of additional tokens, which both ways have and
 * of which the planner knows nothing; with sums in memory, which are cleared, read and turned into
 * d_query, also that. */
static double seconds_of(const natten_problem *p, const na_sm90_back *s)
{
    const double bytes_of_a_sum = 10, bytes_per_second = 2.5e12;
    double seconds = s->adds ? (double)p->batch * (double)na_sm90_sum_count(p) * bytes_of_a_sum /
                                   bytes_per_second
                             : 0;
    for (int i = 0; i < s->count; i++)
        seconds += s->passes[i].of_extra ? 0 : s->passes[i].config.seconds;
    return seconds;
}

/* One kernel, or several: what is asked for, else what is faster. 0: nothing fits. `why`: what
 * speaks against one. */
static int find_way(const natten_problem *p, const na_device *device, na_sm90_back *s,
                    const char **why)
{
    na_sm90_back several;
    const char *against = find_one_pass(p, device, s);
    int choices = against ? 0 : SEVERAL, fits = find_passes(p, device, &several);
    if (!against && p->choice == SEVERAL)
        against = "that choice is asked for";
    if (!against && p->choice != ONE_KERNEL && fits && seconds_of(p, &several) < seconds_of(p, s))
        against = "that is expected to take less time";
    if (against && fits)
        *s = several;
    s->choices = choices;
    *why = against;
    return !against || fits;
}

/* ----------------------------------------------------------------------------------------------
 * workspace */

static double input_bytes(const natten_problem *p)
{
    double keys = (double)p->additional_tokens, queries = (double)na_sm90_query_tokens(p);
    keys += (double)p->axis[0].key_extent * (double)p->axis[1].key_extent *
            (double)p->axis[2].key_extent;
    return 2 * (double)p->batch *
           (queries * (double)p->heads * (double)p->head_dim +
            keys * (double)p->kv_heads * (double)(p->head_dim + p->value_dim));
}

/* What the pass that gives d_query, which is the first, has of a bias' gradient. */
static void size_bias(const natten_problem *turn, na_sm90_back *s)
{
    na_sm90_bias_end *end = &s->bias_arguments;
    const natten_problem part = na_sm90_largest_part(turn);
    na_sm90_backward of_pass = {.scale = 0};
    na_sm90_pass_arguments(&part, s->flat, &s->passes[0], &of_pass);
    end->entries = 1;
    for (int a = 0; a < 3; a++) {
        end->extent[a] = of_pass.bias_sums.extent[a];
        end->entries *= end->extent[a];
    }
    int64_t rows = turn->heads * (s->flat ? turn->batch : 1);
    end->parts_of_head = (int)(of_pass.walk.items / rows) * s->passes[0].config.groups;
}

/* The sizes of a turn's workspace, in bytes; returns their sum. */
static double size_turn(const natten_problem *whole, na_sm90_back *s)
{
    const natten_problem p = na_sm90_turn(whole, s, 0, 0), part = na_sm90_largest_part(&p);
    double batches = (double)p.batch * sizeof(float), queries = (double)na_sm90_query_tokens(&p);
    double pairs = batches * (double)p.heads * queries * NA_SM90_PAIR;
    double sums = s->adds ? batches * (double)na_sm90_sum_count(&part) : 0, shares = 0;
    if (na_has(&p, NATTEN_D_RPB)) {
        size_bias(&p, s);
        shares = batches * (double)na_sm90_share_count(&p, s) * s->parts;
    }
    s->pair_bytes = (size_t)pairs;
    s->sum_bytes = (size_t)sums;
    s->bias_bytes = (size_t)shares;
    return pairs + sums + shares + batches * s->count * s->parts;
}

static int64_t even_share(int64_t count, double most)
{
    int64_t turns = most >= (double)count ? 1
                    : most <= 1           ? count
                                          : (count + (int64_t)most - 1) / (int64_t)most;
    return (count + turns - 1) / turns;
}

/* Whether batches or heads may take turns: where sums or shares of many entries need memory. */
static int takes_turns(const natten_problem *p, const na_sm90_back *s)
{
    return s->adds || na_sm90_bias_entries(p, NA_SM90_D_QUERY) < 0;
}

/* As many batches and heads at a time as the preference allows, but at least one of each, and all
 * batches of a bias' gradient: that is a sum over them. */
static void size_workspace(const natten_problem *p, na_sm90_back *s)
{
    double limit =
        p->preferences & NATTEN_PREFER_LITTLE_MEMORY ? input_bytes(p) / 4 : input_bytes(p);
    double all = size_turn(p, s);
    if (!takes_turns(p, s) || p->preferences & NATTEN_PREFER_MUCH_MEMORY || all <= limit)
        return;
    if (s->adds)
        s->batches = even_share(p->batch, limit / (all / (double)p->batch));
    double head = all / (double)(p->batch * p->kv_heads) * (double)s->batches;
    if (size_turn(p, s) > limit)
        s->kv_heads = even_share(p->kv_heads, limit / head);
    size_turn(p, s);
}

/* ----------------------------------------------------------------------------------------------
 * planning */

static natten_status load_pass(natten_plan *plan, const na_device *device, na_sm90_back *s,
                               na_sm90_pass *pass)
{
    const natten_problem turn = na_sm90_turn(&plan->problem, s, 0, 0);
    const natten_problem p = na_sm90_pass_problem(&turn, pass);
    na_special special;
    na_sm90_backward arguments;
    if (!na_sm90_pass_arguments(&p, s->flat, pass, &arguments))
        return na_refuse(plan, "too many tiles");
    pass->largest = arguments.walk;
    int items = arguments.walk.items, blocks = device->multiprocessors;
    special_of(&p, pass, &special);
    pass->launch.blocks = items < blocks ? items : blocks;
    pass->launch.threads = NA_SM90_WARPGROUP * (pass->config.groups + 1);
    pass->launch.shared_bytes = pass->config.shared_bytes;
    return na_sm90_load(plan, device, &special, "na_sm90_backward_kernel", &pass->launch);
}

/* The kernels before and after: as many blocks as there are groups of 4 rows, up to a limit. */
static natten_status load_rows(natten_plan *plan, const na_device *device, const na_sm90_back *s,
                               const na_special *special, const char *name, na_launch *launch)
{
    int64_t blocks = ((int64_t)(s->pair_bytes / (NA_SM90_PAIR * sizeof(float))) + 3) / 4;
    int64_t most = (int64_t)device->multiprocessors * MOST_BLOCKS;
    launch->blocks = blocks < most ? blocks : most;
    launch->threads = NA_SM90_WARPGROUP;
    return na_sm90_load(plan, device, special, name, launch);
}

/* What adds up the gradient of the bias, after the passes. */
static natten_status load_bias(natten_plan *plan, const na_device *device, na_sm90_back *s)
{
    const natten_problem p = na_sm90_turn(&plan->problem, s, 0, 0);
    na_sm90_bias_end *arguments = &s->bias_arguments;
    na_special special;
    special_of_bias(&p, &special);
    arguments->head = p.layout[NATTEN_D_RPB].head;
    for (int a = 0; a < 3; a++)
        arguments->step[a] = p.layout[NATTEN_D_RPB].axis[a];
    int64_t blocks = (p.heads * arguments->entries + NA_SM90_BIAS_BLOCK - 1) / NA_SM90_BIAS_BLOCK;
    int64_t most = (int64_t)device->multiprocessors * MOST_BLOCKS;
    s->bias.blocks = blocks < most ? blocks : most;
    s->bias.threads = NA_SM90_WARPGROUP;
    s->bias.shared_bytes = NA_SM90_WARPGROUP * (int)sizeof(float);
    return na_sm90_load(plan, device, &special, "na_sm90_bias_kernel", &s->bias);
}

static natten_status load(natten_plan *plan, const na_device *device, na_sm90_back *s)
{
    natten_status status = NATTEN_OK;
    na_special special;
    for (int i = 0; status == NATTEN_OK && i < s->count; i++)
        status = load_pass(plan, device, s, &s->passes[i]);
    if (status == NATTEN_OK && na_has(&plan->problem, NATTEN_D_RPB))
        status = load_bias(plan, device, s);
    if (status != NATTEN_OK)
        return status;
    special_of_delta(&plan->problem, &special);
    status = load_rows(plan, device, s, &special, "na_sm90_delta_kernel", &s->delta);
    if (status != NATTEN_OK || !s->adds)
        return status;
    special_of_convert(&plan->problem, &special);
    return load_rows(plan, device, s, &special, "na_sm90_convert_kernel", &s->convert);
}

/* Says which of the two ways was taken, and why; and what else is not done at once. */
static void say(natten_plan *plan, const na_sm90_back *s, const char *why)
{
    const natten_problem *p = &plan->problem;
    const uint64_t memory = NATTEN_PREFER_LITTLE_MEMORY | NATTEN_PREFER_MUCH_MEMORY;
    char parts[64] = "", turns[128] = "";
    if (s->parts > 1)
        snprintf(parts, sizeof parts, "; %d parts of the map after each other", s->parts);
    if (takes_turns(p, s)) {
        int64_t count = ((p->batch + s->batches - 1) / s->batches) *
                        ((p->kv_heads + s->kv_heads - 1) / s->kv_heads);
        snprintf(turns, sizeof turns, "; %lld of %lld times %lld heads of keys at a time",
                 (long long)count, (long long)s->batches, (long long)s->kv_heads);
        plan->honours |= p->preferences & memory;
    }
    if (s->adds) {
        plan->honours |= NATTEN_PREFER_KV_PARALLEL;
        na_refuse(plan,
                  "in one kernel that adds d_query up in any order, as KV parallelism is "
                  "allowed%s%s",
                  turns, parts);
    } else {
        na_refuse(plan, "d_query, d_key and d_value in the same order every time, as %s%s%s%s", why,
                  turns, *turns ? "; d_rpb added up in memory, as it has many entries" : "", parts);
    }
}

/* One kernel, or several, or not at all. */
static natten_status prepare(natten_plan *plan, const na_device *device, na_sm90_back *s)
{
    const char *why;
    if (!find_way(&plan->problem, device, s, &why))
        return na_refuse(plan, "no tiles fit");
    size_workspace(&plan->problem, s);
    natten_status status = load(plan, device, s);
    if (status == NATTEN_OK)
        say(plan, s, why);
    return status;
}

natten_status na_cuda_sm90_backward_plan(natten_plan *plan)
{
    const na_device *device;
    natten_status status = na_sm90_device_of(plan, &device);
    if (status == NATTEN_OK)
        status = check(plan);
    if (status != NATTEN_OK)
        return status;
    na_sm90_back *s = calloc(1, sizeof *s);
    if (!s)
        return na_fail(NATTEN_ERROR_MEMORY, "No memory to make a plan.");
    status = prepare(plan, device, s);
    if (status != NATTEN_OK) {
        free(s);
        return status;
    }
    int64_t launches = (int64_t)s->parts * s->count * (s->flat ? 1 : s->batches);
    plan->workspace = s->pair_bytes + s->sum_bytes + s->bias_bytes + (size_t)launches * sizeof(int);
    plan->choices = s->choices;
    if (plan->choices)
        snprintf(plan->choice, sizeof plan->choice, "%s", s->adds ? "one kernel" : "several");
    plan->state = s;
    plan->run = na_sm90_run_backward;
    return NATTEN_OK;
}

/* ----------------------------------------------------------------------------------------------
 * beforehand */

int na_sm90_backward_specials(const natten_problem *p, const na_device *device,
                              na_special specials[NA_SM90_BACKWARD_TEXTS])
{
    na_sm90_back s;
    const char *why;
    if (!find_way(p, device, &s, &why))
        return 0;
    for (int i = 0; i < s.count; i++)
        special_of(p, &s.passes[i], &specials[i]);
    special_of_delta(p, &specials[s.count++]);
    if (s.adds)
        special_of_convert(p, &specials[s.count++]);
    if (na_has(p, NATTEN_D_RPB))
        special_of_bias(p, &specials[s.count++]);
    return s.count;
}

void na_sm90_prepare_backward(const natten_plan *plan, const na_device *device)
{
    natten_plan back = {.problem = plan->problem};
    na_special specials[NA_SM90_BACKWARD_TEXTS];
    natten_problem *p = &back.problem;
    if (p->op != NATTEN_FORWARD || !na_has(p, NATTEN_LSE))
        return;
    /* All gradients, laid out like what they belong to, as a training step wants them. */
    for (int role = 0; role < NATTEN_D_QUERY; role++)
        if (na_has(p, role)) {
            p->roles |= natten_bit(role + NATTEN_D_QUERY);
            p->layout[role + NATTEN_D_QUERY] = p->layout[role];
        }
    p->roles &= ~natten_bit(NATTEN_D_LSE);
    p->op = NATTEN_BACKWARD;
    p->choice = 0; /* the forward's is none of its */
    int count = 0;
    if (check(&back) == NATTEN_OK)
        count = na_sm90_backward_specials(p, device, specials);
    for (int i = 0; i < count; i++)
        na_jit_prepare(&specials[i]);
    if (!count)
        na_reference_prepare_backward(plan, device);
}
