/* SPDX-License-Identifier: MIT
 * How large the terms are whose sum an element is: the yardstick of its rounding error (Higham,
 * "Accuracy and Stability of Numerical Algorithms", section 3.1: the error of an inner product is
 * at most a multiple of the roundoff times the sum of its terms' magnitudes). What cancels leaves
 * errors as large as before. Computed by the reference kernels from the magnitudes of the inputs.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "trial.h"

static int64_t elements(const natten_problem *p, natten_role role)
{
    test_shape s = role_shape(p, role);
    return s.batch * s.axis[0] * s.axis[1] * s.axis[2] * s.head * s.channel;
}

static int has(const natten_problem *p, natten_role role) { return (int)(p->roles >> role & 1); }

/* What a computation works on. */
typedef struct arrays {
    double *of[NATTEN_ROLES];
} arrays;

/* Room for a role, with the magnitudes of `from` in it. */
static int add_array(arrays *a, const natten_problem *p, natten_role role, const double *from)
{
    int64_t count = elements(p, role);
    a->of[role] = malloc((size_t)count * sizeof(double) + 1);
    for (int64_t i = 0; a->of[role] && from && i < count; i++)
        a->of[role][i] = fabs(from[i]);
    return a->of[role] != NULL;
}

static void free_arrays(arrays *a)
{
    for (int role = 0; role < NATTEN_ROLES; role++)
        free(a->of[role]);
}

/* The trial's op on the magnitudes of its inputs, but for those of a set. */
static const char *run_magnitudes(trial *t, natten_problem p, uint64_t signed_roles)
{
    arrays a = {{NULL}};
    const char *complaint = NULL;
    for (int role = 0; role < NATTEN_ROLES && !complaint; role++) {
        const double *from = t->outputs >> role & 1 ? NULL : t->values[role];
        if (has(&p, (natten_role)role) && !add_array(&a, &p, (natten_role)role, from))
            complaint = "no memory";
        else if (signed_roles >> role & 1 && a.of[role])
            memcpy(a.of[role], from, (size_t)elements(&p, (natten_role)role) * sizeof(double));
    }
    p.scale = signed_roles ? p.scale : fabs(p.scale);
    if (!complaint)
        complaint = trial_run_exactly(a.of, &p, t->outputs, "cpu-reference");
    for (int role = 0; role < NATTEN_ROLES; role++)
        if (t->outputs >> role & 1) {
            t->magnitude[role] = a.of[role];
            a.of[role] = NULL;
        }
    free_arrays(&a);
    return complaint;
}

static uint64_t bits(int count, const natten_role *roles)
{
    uint64_t set = 0;
    for (int i = 0; i < count; i++)
        set |= natten_bit(roles[i]);
    return set;
}

#define SET(...)                                                                                   \
    bits((int)(sizeof((natten_role[]){__VA_ARGS__}) / sizeof(natten_role)),                        \
         (natten_role[]){__VA_ARGS__})

/* A step of the backward. */
static natten_problem step(const trial *t, natten_op op, uint64_t roles)
{
    natten_problem p = t->problem;
    p.op = op;
    p.roles = roles;
    return p;
}

/* attn: from logits to probabilities. */
static void normalise(const trial *t, const natten_problem *p, double *attn)
{
    int64_t slots = role_shape(p, NATTEN_ATTN).channel;
    for (int64_t i = 0; i < elements(p, NATTEN_ATTN); i++)
        attn[i] = exp(attn[i] - t->values[NATTEN_LSE][i / slots]);
}

/* d_attn: from magnitudes of d_out . value to those of the gradient of the logits. */
static void through_softmax(const trial *t, const natten_problem *p, const double *attn,
                            double *d_attn)
{
    int64_t slots = role_shape(p, NATTEN_ATTN).channel, channels = p->value_dim;
    for (int64_t row = 0; row < elements(p, NATTEN_ATTN) / slots; row++) {
        double delta = t->values[NATTEN_D_LSE] ? fabs(t->values[NATTEN_D_LSE][row]) : 0;
        for (int64_t c = row * channels; c < (row + 1) * channels; c++)
            delta += fabs(t->values[NATTEN_D_OUT][c] * t->values[NATTEN_OUT][c]);
        for (int64_t i = row * slots; i < (row + 1) * slots; i++)
            d_attn[i] = attn[i] * (d_attn[i] + delta);
    }
}

/* The chain of the backward, each step on magnitudes: probabilities; gradients of attn and value;
 * through the softmax; gradients of query, key, bias. */
static const char *chain(const trial *t, arrays *a)
{
    const uint64_t have = t->problem.roles;
    const uint64_t keys = have & SET(NATTEN_RPB, NATTEN_ADDITIONAL_KEY);
    const uint64_t values = have & SET(NATTEN_ADDITIONAL_VALUE);
    const uint64_t d_values = have & SET(NATTEN_D_VALUE, NATTEN_D_ADDITIONAL_VALUE);
    const uint64_t d_keys =
        have & SET(NATTEN_D_QUERY, NATTEN_D_KEY, NATTEN_D_RPB, NATTEN_D_ADDITIONAL_KEY);
    natten_problem qk = step(t, NATTEN_QK, SET(NATTEN_QUERY, NATTEN_KEY, NATTEN_ATTN) | keys);
    natten_problem av =
        step(t, NATTEN_AV_BACKWARD,
             SET(NATTEN_ATTN, NATTEN_VALUE, NATTEN_D_OUT, NATTEN_D_ATTN) | values | d_values);
    natten_problem back = step(t, NATTEN_QK_BACKWARD,
                               SET(NATTEN_QUERY, NATTEN_KEY, NATTEN_D_ATTN) |
                                   (keys & ~natten_bit(NATTEN_RPB)) | d_keys);
    arrays exact = {{NULL}};
    memcpy(exact.of, t->values, sizeof exact.of);
    for (int role = 0; role < NATTEN_ROLES; role++) {
        const uint64_t all = qk.roles | av.roles | back.roles;
        const double *from = (d_values | d_keys) >> role & 1 ? NULL : t->values[role];
        if ((all >> role & 1) && role != NATTEN_RPB && !add_array(a, &av, (natten_role)role, from))
            return "no memory";
    }
    exact.of[NATTEN_ATTN] = a->of[NATTEN_ATTN];
    const char *complaint =
        trial_run_exactly(exact.of, &qk, natten_bit(NATTEN_ATTN), "cpu-reference");
    if (complaint)
        return complaint;
    normalise(t, &qk, a->of[NATTEN_ATTN]);
    complaint =
        trial_run_exactly(a->of, &av, d_values | natten_bit(NATTEN_D_ATTN), "cpu-reference");
    if (complaint || !d_keys)
        return complaint;
    through_softmax(t, &av, a->of[NATTEN_ATTN], a->of[NATTEN_D_ATTN]);
    back.scale = fabs(back.scale);
    return trial_run_exactly(a->of, &back, d_keys, "cpu-reference");
}

static const char *backward_magnitudes(trial *t)
{
    arrays a = {{NULL}};
    const char *complaint = chain(t, &a);
    for (int role = 0; role < NATTEN_ROLES; role++)
        if (t->outputs >> role & 1) {
            t->magnitude[role] = a.of[role];
            a.of[role] = NULL;
        }
    free_arrays(&a);
    return complaint;
}

/* The largest magnitude of a logit. */
static const char *find_logits(trial *t)
{
    const uint64_t inputs =
        SET(NATTEN_QUERY, NATTEN_KEY, NATTEN_RPB, NATTEN_ADDITIONAL_KEY) & t->problem.roles;
    natten_problem qk = step(t, NATTEN_QK, inputs | natten_bit(NATTEN_ATTN));
    trial logits = {.problem = qk, .outputs = natten_bit(NATTEN_ATTN)};
    memcpy(logits.values, t->values, sizeof logits.values);
    const char *complaint = run_magnitudes(&logits, qk, 0);
    const double *attn = logits.magnitude[NATTEN_ATTN];
    for (int64_t i = 0; !complaint && i < elements(&qk, NATTEN_ATTN); i++)
        if (attn[i] > t->logits)
            t->logits = attn[i];
    free(logits.magnitude[NATTEN_ATTN]);
    return complaint;
}

const char *trial_make_magnitudes(trial *t)
{
    const natten_op op = (natten_op)t->problem.op;
    const char *complaint = op == NATTEN_FORWARD || op == NATTEN_BACKWARD ? find_logits(t) : NULL;
    if (complaint)
        return complaint;
    if (op == NATTEN_BACKWARD)
        return backward_magnitudes(t);
    /* Probabilities depend on the signs of what the logits are made of. */
    const uint64_t logits = SET(NATTEN_QUERY, NATTEN_KEY, NATTEN_RPB, NATTEN_ADDITIONAL_KEY);
    return run_magnitudes(t, t->problem, op == NATTEN_FORWARD ? logits : 0);
}
