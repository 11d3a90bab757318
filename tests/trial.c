/* SPDX-License-Identifier: MIT */
#include "trial.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static int has(const natten_problem *problem, int role)
{
    return (int)(problem->roles >> role & 1);
}

static double uniform(uint64_t *random) { return (double)(random_next(random) >> 11) * 0x1p-53; }

/* Variance 1; twelve uniforms would do, four keep their extremes nearer to real data's. */
static double normal(uint64_t *random)
{
    double sum = -2;
    for (int i = 0; i < 4; i++)
        sum += uniform(random);
    return sum * 1.7320508075688772;
}

/* Attention slots that a causal mask forbids: true when the slot may be used. */
static int slot_allowed(const natten_problem *p, int64_t token, int64_t slot)
{
    for (int a = (int)p->rank - 1; a >= 0; a--) {
        int64_t first, count, query = token % p->axis[a].query_extent;
        natten_axis_window(&p->axis[a], query, &first, &count);
        if (slot % p->axis[a].window >= count)
            return 0;
        slot /= p->axis[a].window;
        token /= p->axis[a].query_extent;
    }
    return 1;
}

/* Forbidden slots of an input must not be read: NaN there would show. */
static void forbid_slots(const natten_problem *p, natten_role role, double *values)
{
    test_shape shape = role_shape(p, role);
    int64_t tokens = shape.axis[0] * shape.axis[1] * shape.axis[2];
    int64_t window = shape.channel - p->additional_tokens;
    int causal = 0;
    for (int a = 0; a < p->rank; a++)
        causal |= p->axis[a].causal != 0;
    for (int64_t row = 0; causal && row < shape.batch * tokens * shape.head; row++)
        for (int64_t slot = 0; slot < window; slot++)
            if (!slot_allowed(p, row / shape.head % tokens, slot))
                values[row * shape.channel + slot] = NAN;
}

/* As the role's tensor will hold them: rounded, and shared where strides are 0. */
static int settle(const natten_problem *problem, natten_role role, double *values)
{
    tensor t;
    int made = tensor_make(&t, problem, role, PLACE_START);
    if (made) {
        tensor_write(&t, values);
        tensor_read(&t, values);
    }
    tensor_free(&t);
    return made;
}

/* Some keys are masked, and towards the end of the innermost axis all of them: of the last queries
 * no key is left. */
static void mask_keys(const natten_problem *p, uint64_t *random, double *values)
{
    test_shape s = role_shape(p, NATTEN_KEY_BIAS);
    int64_t rest = 1;
    for (int a = (int)p->rank; a < 3; a++)
        rest *= s.axis[a];
    const int64_t extent = s.axis[p->rank - 1], count = s.batch * s.axis[0] * s.axis[1] * s.axis[2];
    int64_t end = extent;
    for (int64_t token = 0; token < count; token++) {
        if (token % (count / s.batch) == 0)
            end = extent - (int64_t)(random_next(random) % (uint64_t)(extent / 2 + 1));
        for (int64_t h = 0; h < s.head; h++)
            if (token / rest % extent >= end || random_next(random) % 8 == 0)
                values[token * s.head + h] = -INFINITY;
    }
}

static const char *make_input(trial *t, natten_role role, uint64_t seed)
{
    uint64_t random = seed * 0x9e3779b97f4a7c15 + (uint64_t)role + 1;
    test_shape shape = role_shape(&t->problem, role);
    int64_t tokens = shape.axis[0] * shape.axis[1] * shape.axis[2];
    int64_t count = shape.batch * tokens * shape.head * shape.channel;
    for (int64_t i = 0; i < count; i++)
        t->values[role][i] = normal(&random);
    if (role == NATTEN_ATTN || role == NATTEN_D_ATTN)
        forbid_slots(&t->problem, role, t->values[role]);
    if (role == NATTEN_KEY_BIAS && count)
        mask_keys(&t->problem, &random, t->values[role]);
    return settle(&t->problem, role, t->values[role]) ? NULL : "no memory";
}

const char *trial_run_exactly(double *const values[NATTEN_ROLES], const natten_problem *problem,
                              uint64_t outputs, const char *only)
{
    trial exact = {.problem = *problem, .outputs = outputs};
    exact.problem.dtype = NATTEN_F64;
    exact.problem.choice = 0;
    natten_problem_pack(&exact.problem, NATTEN_HEADS_LAST);
    memcpy(exact.values, values, sizeof exact.values);
    natten_plan *plan;
    if (natten_plan_create(&exact.problem, only, &plan) != NATTEN_OK)
        return natten_last_error();
    tensor tensors[NATTEN_ROLES];
    natten_run run = {0};
    const char *complaint = "no memory";
    if (trial_tensors(&exact, PLACE_START, tensors, &run)) {
        complaint = natten_plan_run(plan, &run) == NATTEN_OK ? NULL : natten_last_error();
        for (int role = 0; role < NATTEN_ROLES; role++)
            if (outputs >> role & 1)
                tensor_read(&tensors[role], values[role]);
    }
    trial_tensors_free(tensors);
    natten_plan_destroy(plan);
    return complaint;
}

/* BACKWARD reads what FORWARD wrote, as rounded there. */
static const char *make_forward_results(trial *t, const char *only)
{
    const uint64_t results = natten_bit(NATTEN_OUT) | natten_bit(NATTEN_LSE);
    const uint64_t inputs = natten_bit(NATTEN_QUERY) | natten_bit(NATTEN_KEY) |
                            natten_bit(NATTEN_VALUE) | natten_bit(NATTEN_RPB) |
                            natten_bit(NATTEN_KEY_BIAS) | natten_bit(NATTEN_ADDITIONAL_KEY) |
                            natten_bit(NATTEN_ADDITIONAL_VALUE);
    natten_problem forward = t->problem;
    forward.op = NATTEN_FORWARD;
    forward.roles &= inputs | results;
    const char *complaint = trial_run_exactly(t->values, &forward, results, only);
    if (!complaint && (!settle(&t->problem, NATTEN_OUT, t->values[NATTEN_OUT]) ||
                       !settle(&t->problem, NATTEN_LSE, t->values[NATTEN_LSE])))
        complaint = "no memory";
    return complaint;
}

static const char *make_inputs(trial *t, const natten_problem *problem, uint64_t seed,
                               const char *only)
{
    const char *complaint = NULL;
    natten_op op = (natten_op)problem->op;
    *t = (trial){.problem = *problem};
    for (int role = 0; role < NATTEN_ROLES; role++) {
        if (!has(problem, role))
            continue;
        test_shape s = role_shape(problem, (natten_role)role);
        int64_t count = s.batch * s.axis[0] * s.axis[1] * s.axis[2] * s.head * s.channel;
        t->values[role] = malloc((size_t)count * sizeof(double) + 1);
        if (!t->values[role])
            return "no memory";
        int later = op == NATTEN_BACKWARD && (role == NATTEN_OUT || role == NATTEN_LSE);
        if (role_is_output(op, (natten_role)role))
            t->outputs |= natten_bit((natten_role)role);
        else if (!later && !complaint)
            complaint = make_input(t, (natten_role)role, seed);
    }
    if (!complaint && op == NATTEN_BACKWARD)
        complaint = make_forward_results(t, only);
    return complaint;
}

const char *trial_make_inputs(trial *t, const natten_problem *problem, uint64_t seed)
{
    return make_inputs(t, problem, seed, NULL);
}

static double largest_magnitude(const double *values, int64_t count)
{
    double largest = 0;
    for (int64_t i = 0; i < count; i++)
        if (isfinite(values[i]))
            largest = fmax(largest, fabs(values[i]));
    return largest;
}

const char *trial_make(trial *t, const natten_problem *problem, uint64_t seed)
{
    const char *complaint = make_inputs(t, problem, seed, "cpu-reference");
    if (!complaint)
        complaint = trial_run_exactly(t->values, problem, t->outputs, "cpu-reference");
    const natten_role factors[] = {NATTEN_QUERY, NATTEN_KEY, NATTEN_VALUE, NATTEN_D_OUT};
    for (int i = 0; i < 4 && !complaint; i++)
        if (has(problem, (int)factors[i])) {
            test_shape f = role_shape(problem, factors[i]);
            int64_t count = f.batch * f.axis[0] * f.axis[1] * f.axis[2] * f.head * f.channel;
            t->largest = fmax(t->largest, largest_magnitude(t->values[factors[i]], count));
        }
    t->largest *= fmax(1, fabs(problem->scale));
    return complaint ? complaint : trial_make_magnitudes(t);
}

void trial_free(trial *t)
{
    for (int role = 0; role < NATTEN_ROLES; role++) {
        free(t->values[role]);
        free(t->magnitude[role]);
    }
}

int trial_tensors(const trial *t, placement where, tensor tensors[NATTEN_ROLES], natten_run *run)
{
    memset(tensors, 0, NATTEN_ROLES * sizeof *tensors);
    run->seed = TRIAL_SEED;
    run->offset = TRIAL_OFFSET;
    for (int role = 0; role < NATTEN_ROLES; role++) {
        if (!has(&t->problem, role))
            continue;
        if (!tensor_make(&tensors[role], &t->problem, (natten_role)role, where))
            return 0;
        if (!(t->outputs >> role & 1))
            tensor_write(&tensors[role], t->values[role]);
        run->data[role] = tensor_data(&tensors[role]);
    }
    return 1;
}

void trial_tensors_free(tensor tensors[NATTEN_ROLES])
{
    for (int role = 0; role < NATTEN_ROLES; role++)
        tensor_free(&tensors[role]);
}

/* Terms of an element, those of its factors counted in. Sums over all queries (d_rpb, additional
 * tokens) are longer. */
static double terms_of(const trial *t, natten_role role)
{
    const natten_problem *p = &t->problem;
    double terms = (double)p->additional_tokens, queries = (double)p->batch, slots = 1;
    for (int a = 0; a < p->rank; a++) {
        queries *= (double)p->axis[a].query_extent;
        slots *= (double)p->axis[a].window;
    }
    terms += slots + (double)p->head_dim + (double)p->value_dim;
    if (role == NATTEN_D_RPB || role == NATTEN_D_ADDITIONAL_KEY ||
        role == NATTEN_D_ADDITIONAL_VALUE)
        terms += queries;
    return terms;
}

/* How much error an output may have, in units of the accumulator's roundoff u = 2^-24 (2^-53 for
 * float64), relative to the magnitude of its terms. Sums of n terms err by about sqrt(n) u,
 * products and the exponential by a constant, weights by the roundoffs of their logit and of the
 * lse. */
static double roundoffs(const trial *t, natten_role role)
{
    return 12 + 3 * t->logits + 0.5 * sqrt(terms_of(t, role));
}

/* Some kernels round softmax weights, and gradients of logits, to half precision: each by the unit
 * roundoff of that type at most. Nothing less would do: a key may have a single visitor, and a
 * query a single key that matters. */
static double weight_error(const trial *t)
{
    static const char *const rounding[] = {"cuda-sm", "cpu-avx512bf16", "cpu-amx"};
    int rounds = 0;
    for (size_t i = 0; t->kernel && i < sizeof rounding / sizeof *rounding; i++)
        rounds |= !strncmp(t->kernel, rounding[i], strlen(rounding[i]));
    if (!rounds)
        return 0;
    return t->problem.dtype == NATTEN_BF16 ? 0x1p-8 : t->problem.dtype == NATTEN_F16 ? 0x1p-11 : 0;
}

/* Below 2^-14 weights in float16 have an absolute error instead: half of 2^-24, for each of an
 * element's terms, times what a weight multiplies. */
static double tiny_weights(const trial *t, natten_role role)
{
    if (weight_error(t) == 0 || t->problem.dtype != NATTEN_F16)
        return 0;
    const double heads = (double)t->problem.heads / (double)t->problem.kv_heads;
    return 0x1p-25 * terms_of(t, role) * heads * t->largest;
}

/* The bound on the error of one element, but for its last rounding. */
static double allowed_error(const trial *t, natten_role role, double magnitude)
{
    double unit = t->problem.dtype == NATTEN_F64 ? 0x1p-53 : 0x1p-24;
    /* An error of the logits, which grows with them, is an absolute error of a lse. */
    if (role == NATTEN_LSE)
        return unit * (12 + 3 * t->logits + magnitude);
    /* Weights that underflow are as good as 0. */
    const double error = roundoffs(t, role) * unit * magnitude + 0x1p-120;
    return error + weight_error(t) * magnitude + tiny_weights(t, role);
}

trial_error trial_compare(const trial *t, natten_role role, const double *got)
{
    const double *expected = t->values[role];
    test_shape s = role_shape(&t->problem, role);
    int64_t count = s.batch * s.axis[0] * s.axis[1] * s.axis[2] * s.head * s.channel;
    double largest = largest_magnitude(expected, count);
    natten_dtype dtype = (natten_dtype)t->problem.dtype;
    int half = dtype == NATTEN_F16 || dtype == NATTEN_BF16;
    trial_error error = {.role = role};
    double roundings = 0, worst = 0, sums = 0;
    for (int64_t i = 0; i < count; i++) {
        double exact = expected[i], off = fabs(got[i] - exact);
        double magnitude = role == NATTEN_LSE ? largest : t->magnitude[role][i];
        double allowed = allowed_error(t, role, magnitude), rounding = 0;
        if (isinf(exact) || isnan(exact)) {
            off = got[i] == exact ? 0 : INFINITY;
            allowed = magnitude = 1;
        } else if (isnan(off)) {
            off = INFINITY;
        }
        /* Beyond a midpoint the exact result and this one round to either side of it. */
        if (half && role != NATTEN_LSE && role != NATTEN_D_KEY_BIAS && isfinite(exact)) {
            rounding = fabs(round_to(dtype, exact) - exact);
            allowed *= 2;
        }
        roundings = fmax(roundings, rounding);
        worst = fmax(worst, off);
        if (role != NATTEN_LSE)
            sums = fmax(sums, roundoffs(t, role) * 0x1p-24 * magnitude);
        double share = fmax(off - rounding, 0) / allowed;
        if (share <= error.share && i)
            continue;
        magnitude = role == NATTEN_LSE || magnitude == 0 ? 1 : magnitude;
        error = (trial_error){
            share, off / magnitude, (allowed + rounding) / magnitude, role, i, got[i], exact};
    }
    /* Usually rounded weights cost no more than the rounding of the results does; gradients twice
     * that, as a key may have a single visitor, and gradients of logits add up to 0. Usually only:
     * of random problems one in some hundreds has a larger error within its bounds. Results that
     * are exactly 0, as of windows of one key, have no rounding, but sums still have theirs. */
    const int64_t enough = 1000;
    double most = role >= NATTEN_D_QUERY ? 3 : 2;
    if (t->typical && weight_error(t) > 0 && role != NATTEN_LSE && count >= enough)
        error.share = fmax(error.share, worst / (most * roundings + sums));
    return error;
}
