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
    return settle(&t->problem, role, t->values[role]) ? NULL : "no memory";
}

/* Runs a kernel in float64 over t->values: `outputs` are computed from the other roles. */
static const char *run_exactly(trial *t, const natten_problem *problem, uint64_t outputs,
                               const char *only)
{
    trial exact = {.problem = *problem, .outputs = outputs};
    exact.problem.dtype = NATTEN_F64;
    natten_problem_pack(&exact.problem, NATTEN_HEADS_LAST);
    memcpy(exact.values, t->values, sizeof exact.values);
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
                tensor_read(&tensors[role], t->values[role]);
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
                            natten_bit(NATTEN_ADDITIONAL_KEY) | natten_bit(NATTEN_ADDITIONAL_VALUE);
    natten_problem forward = t->problem;
    forward.op = NATTEN_FORWARD;
    forward.roles &= inputs | results;
    const char *complaint = run_exactly(t, &forward, results, only);
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

const char *trial_make(trial *t, const natten_problem *problem, uint64_t seed)
{
    const char *complaint = make_inputs(t, problem, seed, "cpu-reference");
    return complaint ? complaint : run_exactly(t, problem, t->outputs, "cpu-reference");
}

void trial_free(trial *t)
{
    for (int role = 0; role < NATTEN_ROLES; role++)
        free(t->values[role]);
}

int trial_tensors(const trial *t, placement where, tensor tensors[NATTEN_ROLES], natten_run *run)
{
    memset(tensors, 0, NATTEN_ROLES * sizeof *tensors);
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

/* How much error an output may have, in units of the accumulator's roundoff u = 2^-24 (2^-53 for
 * float64), relative to its largest element. Sums of W terms err by about sqrt(W) u, products and
 * the exponential by a constant, weights by the roundoff of their logits, which grows with them.
 * Sums over all queries (d_rpb, additional tokens) are longer. */
static double roundoffs(const natten_problem *p, natten_role role)
{
    double window = (double)p->additional_tokens, queries = (double)p->batch, slots = 1;
    for (int a = 0; a < p->rank; a++) {
        queries *= (double)p->axis[a].query_extent;
        slots *= (double)p->axis[a].window;
    }
    window += slots;
    double logits = p->op > NATTEN_BACKWARD ? 0 : 4 * fabs(p->scale) * sqrt((double)p->head_dim);
    if (role == NATTEN_D_RPB || role == NATTEN_D_ADDITIONAL_KEY ||
        role == NATTEN_D_ADDITIONAL_VALUE)
        return 48 + logits + 0.5 * sqrt(window + queries);
    if (role >= NATTEN_D_QUERY)
        return 48 + logits + 0.5 * sqrt(window);
    return 24 + logits + 0.25 * sqrt(window);
}

/* Whether neighbours share one key or value. */
static int repeats(const natten_problem *p, natten_role role)
{
    for (int a = 0; a < p->rank; a++)
        if (p->axis[a].window > 1 && p->layout[role].axis[a] == 0)
            return 1;
    return 0;
}

/* Where a window holds one key the gradient through the softmax is 0: what would be left of it
 * elsewhere is the yardstick there. So it is where all keys or values of a window are the same, but
 * then the roundoffs of its terms are the same too, and add up. */
static double usual_size(const natten_problem *p, natten_role role)
{
    double slots = (double)p->additional_tokens, window = 1;
    for (int a = 0; a < p->rank; a++)
        window *= (double)p->axis[a].window;
    if (p->op != NATTEN_BACKWARD || role == NATTEN_D_VALUE || role == NATTEN_D_ADDITIONAL_VALUE)
        return 0;
    double terms = repeats(p, NATTEN_KEY) || repeats(p, NATTEN_VALUE) ? 1 : slots + window;
    /* The largest of many is some three times the usual one. */
    double through_softmax = 3 * sqrt((double)p->value_dim / terms);
    return role == NATTEN_D_RPB ? through_softmax : fabs(p->scale) * through_softmax;
}

trial_error trial_compare(const trial *t, natten_role role, const double *got)
{
    const double *expected = t->values[role];
    natten_dtype dtype = (natten_dtype)t->problem.dtype;
    int is_lse = role == NATTEN_LSE, half = dtype == NATTEN_F16 || dtype == NATTEN_BF16;
    test_shape s = role_shape(&t->problem, role);
    int64_t count = s.batch * s.axis[0] * s.axis[1] * s.axis[2] * s.head * s.channel;
    trial_error error = {.role = role};
    double largest = 0, rounding = 0;
    for (int64_t i = 0; i < count; i++) {
        double exact = expected[i], off = fabs(got[i] - exact);
        if (isinf(exact) || isnan(exact))
            off = got[i] == exact ? 0 : INFINITY;
        else if (fabs(exact) > largest)
            largest = fabs(exact);
        if (half && !is_lse && isfinite(exact))
            rounding = fmax(rounding, fabs(round_to(dtype, exact) - exact));
        if (isnan(off) || off == INFINITY)
            off = INFINITY;
        if (off > error.worst) {
            error.worst = off;
            error.at = i;
            error.got = got[i];
            error.expected = exact;
        }
    }
    largest = fmax(largest, usual_size(&t->problem, role));
    double unit = dtype == NATTEN_F64 ? 0x1p-53 : 0x1p-24;
    /* An error of the logits, which grows with them, is an absolute error of a lse. */
    error.allowed = is_lse ? unit * (32 + 4 * largest)
                           : roundoffs(&t->problem, role) * unit * largest + 2 * rounding;
    /* Errors of rounded weights add up like noise: half the rounding of the largest result. */
    if (half && !is_lse && t->rounds_weights)
        error.allowed += (dtype == NATTEN_BF16 ? 0x1p-8 : 0x1p-11) / 2 * largest;
    if (!is_lse && largest > 0) {
        error.worst /= largest;
        error.allowed /= largest;
    }
    return error;
}
