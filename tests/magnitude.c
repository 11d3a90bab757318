/* SPDX-License-Identifier: MIT
 * How large the terms are whose sum an element is: the yardstick of its rounding error (Higham,
 * "Accuracy and Stability of Numerical Algorithms", section 3.1: the error of an inner product is
 * at most a multiple of the roundoff times the sum of its terms' magnitudes). What cancels leaves
 * errors as large as before. Computed by the reference kernels from the magnitudes of the inputs.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "core/dropout.h"
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
        a->of[role][i] = isinf(from[i]) ? 0 : fabs(from[i]); /* masked keys */
    return a->of[role] != NULL;
}

static void free_arrays(arrays *a)
{
    for (int role = 0; role < NATTEN_ROLES; role++)
        free(a->of[role]);
}

/* Hands the outputs over to the trial and frees the others. */
static void keep_outputs(trial *t, arrays *a)
{
    for (int role = 0; role < NATTEN_ROLES; role++)
        if (t->outputs >> role & 1) {
            t->magnitude[role] = a->of[role];
            a->of[role] = NULL;
        }
    free_arrays(a);
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
    keep_outputs(t, &a);
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
    p.dropout = 0;
    return p;
}

/* attn: from logits to probabilities. */
static void normalise(const trial *t, const natten_problem *p, double *attn)
{
    int64_t slots = role_shape(p, NATTEN_ATTN).channel;
    for (int64_t i = 0; i < elements(p, NATTEN_ATTN); i++) {
        double lse = t->values[NATTEN_LSE][i / slots];
        attn[i] = lse == -INFINITY ? 0 : exp(attn[i] - lse);
    }
}

/* attn times what dropout multiplies it by; NULL: no memory. */
static double *dropped(const trial *t, const natten_problem *p, const double *attn)
{
    double *kept = malloc((size_t)elements(p, NATTEN_ATTN) * sizeof *kept + 1);
    if (!kept)
        return NULL;
    memcpy(kept, attn, (size_t)elements(p, NATTEN_ATTN) * sizeof *kept);
    test_shape s = role_shape(p, NATTEN_ATTN);
    int threshold = na_dropout_threshold(t->problem.dropout), shift = 3 - (int)p->rank;
    for (int64_t i = 0; threshold && i < elements(p, NATTEN_ATTN); i++) {
        int64_t rest = i / s.channel / s.head;
        int at[3] = {0, 0, 0};
        for (int a = (int)p->rank - 1; a >= 0; a--) {
            at[a + shift] = (int)(rest % s.axis[a] + p->axis[a].query_origin);
            rest /= s.axis[a];
        }
        na_words row = na_dropout_row(TRIAL_SEED, TRIAL_OFFSET, (int)rest,
                                      (int)(i / s.channel % s.head), at[0], at[1]);
        int number = (int)na_dropout_number(row, at[2], (int)(i % s.channel));
        kept[i] *= number < threshold ? 0 : na_dropout_factor(threshold);
    }
    return kept;
}

/* d_attn: from magnitudes of d_out . value to those of the gradient of the logits. */
static void through_softmax(const trial *t, const natten_problem *p, const double *attn,
                            const double *kept, double *d_attn)
{
    int64_t slots = role_shape(p, NATTEN_ATTN).channel, channels = p->value_dim;
    for (int64_t row = 0; row < elements(p, NATTEN_ATTN) / slots; row++) {
        double delta = t->values[NATTEN_D_LSE] ? fabs(t->values[NATTEN_D_LSE][row]) : 0;
        for (int64_t c = row * channels; c < (row + 1) * channels; c++)
            delta += fabs(t->values[NATTEN_D_OUT][c] * t->values[NATTEN_OUT][c]);
        for (int64_t i = row * slots; i < (row + 1) * slots; i++)
            d_attn[i] = kept[i] * d_attn[i] + attn[i] * delta;
    }
}

/* d_key_bias from the gradient of the logits: that of values for a d_out of 1. */
static const char *sum_over_queries(const trial *t, arrays *a)
{
    const uint64_t more = t->problem.additional_tokens ? natten_bit(NATTEN_ADDITIONAL_VALUE) : 0;
    natten_problem p = step(t, NATTEN_AV_BACKWARD,
                            SET(NATTEN_ATTN, NATTEN_VALUE, NATTEN_D_OUT, NATTEN_D_VALUE) | more);
    arrays x = {{NULL}};
    const char *complaint = NULL;
    p.value_dim = 1;
    for (int role = 0; role < NATTEN_ROLES && !complaint; role++)
        if (has(&p, (natten_role)role) &&
            !add_array(&x, &p, (natten_role)role,
                       role == NATTEN_ATTN ? a->of[NATTEN_D_ATTN] : NULL))
            complaint = "no memory";
    for (int64_t i = 0; !complaint && i < elements(&p, NATTEN_D_OUT); i++)
        x.of[NATTEN_D_OUT][i] = 1;
    if (!complaint)
        complaint = trial_run_exactly(x.of, &p, natten_bit(NATTEN_D_VALUE), "cpu-reference");
    a->of[NATTEN_D_KEY_BIAS] = x.of[NATTEN_D_VALUE];
    x.of[NATTEN_D_VALUE] = NULL;
    free_arrays(&x);
    return complaint;
}

/* The chain of the backward, each step on magnitudes: probabilities; gradients of attn and value;
 * through the softmax; gradients of query, key, bias. */
static const char *chain(const trial *t, arrays *a)
{
    const uint64_t have = t->problem.roles;
    const uint64_t keys = have & SET(NATTEN_RPB, NATTEN_KEY_BIAS, NATTEN_ADDITIONAL_KEY);
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
                                   (keys & natten_bit(NATTEN_ADDITIONAL_KEY)) | d_keys);
    arrays exact = {{NULL}};
    memcpy(exact.of, t->values, sizeof exact.of);
    for (int role = 0; role < NATTEN_ROLES; role++) {
        const uint64_t all = qk.roles | av.roles | back.roles;
        const double *from = (d_values | d_keys) >> role & 1 ? NULL : t->values[role];
        if ((all >> role & 1) && role != NATTEN_RPB && role != NATTEN_KEY_BIAS &&
            !add_array(a, &av, (natten_role)role, from))
            return "no memory";
    }
    exact.of[NATTEN_ATTN] = a->of[NATTEN_ATTN];
    const char *complaint =
        trial_run_exactly(exact.of, &qk, natten_bit(NATTEN_ATTN), "cpu-reference");
    if (complaint)
        return complaint;
    normalise(t, &qk, a->of[NATTEN_ATTN]);
    arrays weighted = *a;
    double *kept = weighted.of[NATTEN_ATTN] = dropped(t, &qk, a->of[NATTEN_ATTN]);
    if (!kept)
        return "no memory";
    complaint =
        trial_run_exactly(weighted.of, &av, d_values | natten_bit(NATTEN_D_ATTN), "cpu-reference");
    through_softmax(t, &av, a->of[NATTEN_ATTN], kept, a->of[NATTEN_D_ATTN]);
    free(kept);
    if (!complaint && has(&t->problem, NATTEN_D_KEY_BIAS))
        complaint = sum_over_queries(t, a);
    back.scale = fabs(back.scale);
    return complaint || !d_keys ? complaint
                                : trial_run_exactly(a->of, &back, d_keys, "cpu-reference");
}

static const char *backward_magnitudes(trial *t)
{
    arrays a = {{NULL}};
    const char *complaint = chain(t, &a);
    keep_outputs(t, &a);
    return complaint;
}

/* The largest magnitude of a logit. */
static const char *find_logits(trial *t)
{
    const uint64_t inputs =
        SET(NATTEN_QUERY, NATTEN_KEY, NATTEN_RPB, NATTEN_KEY_BIAS, NATTEN_ADDITIONAL_KEY) &
        t->problem.roles;
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
    const uint64_t logits =
        SET(NATTEN_QUERY, NATTEN_KEY, NATTEN_RPB, NATTEN_KEY_BIAS, NATTEN_ADDITIONAL_KEY);
    return run_magnitudes(t, t->problem, op == NATTEN_FORWARD ? logits : 0);
}
