/* SPDX-License-Identifier: MIT
 * The truth: every op as docs/spec.md defines it, in double precision, one query after the other.
 * Products of two lines are summed in long double: an error of a logit is one of the lse, and other
 * kernels' float64 is compared with this one's. Nothing here is fast. Changed only to mend a wrong
 * answer. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "core/dropout.h"
#include "core/half.h"
#include "core/kernel.h"
#include "core/problem.h"

typedef struct work {
    const natten_problem *problem;
    void *const *data;
    uint64_t seed, offset;
    double *sums[NATTEN_ROLES]; /* gradients many queries add to, contiguous */
    long double *weights;       /* a number for each slot of the query at hand */
    double *line;               /* and for each of its value's channels */
} work;

typedef struct place {
    int64_t batch, at[3], head;
} place;

/* What slot w of a query stands for. */
typedef enum slot_kind { WINDOW_KEY, FORBIDDEN, ADDITIONAL } slot_kind;

typedef struct slot {
    slot_kind kind;
    int index;
    place key;  /* of the key and value: among the block's keys, or among the additional tokens */
    place bias; /* entry of the bias */
} slot;

static int64_t offset_of(const work *w, natten_role role, place p)
{
    const natten_layout *layout = &w->problem->layout[role];
    return p.batch * layout->batch + p.at[0] * layout->axis[0] + p.at[1] * layout->axis[1] +
           p.at[2] * layout->axis[2] + p.head * layout->head;
}

static size_t size_of(const work *w, natten_role role)
{
    return na_dtype_size(na_role_dtype(w->problem, role));
}

static double element(natten_dtype dtype, const void *line, int64_t i)
{
    switch (dtype) {
    case NATTEN_F64:
        return ((const double *)line)[i];
    case NATTEN_F16:
        return na_f16_load(((const uint16_t *)line)[i]);
    case NATTEN_BF16:
        return na_bf16_load(((const uint16_t *)line)[i]);
    default:
        return ((const float *)line)[i];
    }
}

/* The channels of one token and head. */
static const void *line_of(const work *w, natten_role role, place p)
{
    return (const char *)w->data[role] + offset_of(w, role, p) * (int64_t)size_of(w, role);
}

static double load(const work *w, natten_role role, place p, int64_t channel)
{
    return element(na_role_dtype(w->problem, role), line_of(w, role, p), channel);
}

static void store(const work *w, natten_role role, place p, int64_t channel, double value)
{
    void *data = w->data[role];
    int64_t i = offset_of(w, role, p) + channel;
    switch (na_role_dtype(w->problem, role)) {
    case NATTEN_F64:
        ((double *)data)[i] = value;
        break;
    case NATTEN_F16:
        ((uint16_t *)data)[i] = na_f16_store(value);
        break;
    case NATTEN_BF16:
        ((uint16_t *)data)[i] = na_bf16_store(value);
        break;
    default:
        ((float *)data)[i] = (float)value;
    }
}

/* Where the sums of a gradient's channels are; NULL if it is not wanted. */
static double *sums_of(const work *w, natten_role role, place p)
{
    if (!w->sums[role])
        return NULL;
    na_shape s = na_role_shape(w->problem, role);
    int64_t i = p.batch;
    for (int a = 0; a < 3; a++)
        i = i * s.extent[a] + p.at[a];
    return w->sums[role] + (i * s.heads + p.head) * s.channels;
}

/* sums += factor * channels of `role` at p */
static void add_line(const work *w, double *sums, double factor, natten_role role, place p,
                     int64_t channels)
{
    natten_dtype dtype = na_role_dtype(w->problem, role);
    const void *line = line_of(w, role, p);
    for (int64_t c = 0; sums && c < channels; c++)
        sums[c] += factor * element(dtype, line, c);
}

static long double dot(const work *w, natten_role a, place at_a, natten_role b, place at_b,
                       int64_t n)
{
    natten_dtype dtype = (natten_dtype)w->problem->dtype;
    const void *line_a = line_of(w, a, at_a), *line_b = line_of(w, b, at_b);
    long double sum = 0;
    for (int64_t c = 0; c < n; c++)
        sum += (long double)element(dtype, line_a, c) * element(dtype, line_b, c);
    return sum;
}

static slot slot_of(const work *w, place query, int64_t index)
{
    const natten_problem *p = w->problem;
    slot s = {WINDOW_KEY, (int)index, query, query};
    s.key.head = query.head / (p->heads / p->kv_heads);
    s.bias.batch = 0;
    int64_t window = na_window_size(p);
    if (index >= window) {
        s.kind = ADDITIONAL;
        s.key.at[0] = index - window;
        s.key.at[1] = s.key.at[2] = 0;
        return s;
    }
    for (int a = 2; a >= 0; a--) {
        const natten_axis *axis = &p->axis[a];
        int64_t step = index % axis->window;
        index /= axis->window;
        int64_t from = axis->query_origin + query.at[a];
        na_window keys = na_window_of(na_axis_of(axis), (int)from);
        int64_t to = keys.first + step * axis->dilation;
        if (step >= keys.count)
            s.kind = FORBIDDEN;
        s.key.at[a] = to - axis->key_origin;
        /* Exact: both are in one dilation group. */
        s.bias.at[a] = (to - from) / axis->dilation + axis->window - 1;
    }
    return s;
}

static natten_role key_role(slot s)
{
    return s.kind == ADDITIONAL ? NATTEN_ADDITIONAL_KEY : NATTEN_KEY;
}

static natten_role value_role(slot s)
{
    return s.kind == ADDITIONAL ? NATTEN_ADDITIONAL_VALUE : NATTEN_VALUE;
}

static long double logit(const work *w, place query, slot s)
{
    long double product = dot(w, NATTEN_QUERY, query, key_role(s), s.key, w->problem->head_dim);
    long double logit = product * w->problem->scale;
    if (s.kind == WINDOW_KEY && na_has(w->problem, NATTEN_RPB))
        logit += load(w, NATTEN_RPB, s.bias, 0);
    if (s.kind == WINDOW_KEY && na_has(w->problem, NATTEN_KEY_BIAS))
        logit += load(w, NATTEN_KEY_BIAS, s.key, 0);
    return logit;
}

/* What dropout multiplies a weight by. */
static double dropout(const work *w, place query, slot s)
{
    const natten_axis *axis = w->problem->axis;
    int threshold = na_dropout_threshold(w->problem->dropout);
    if (!threshold)
        return 1;
    na_words row = na_dropout_row(w->seed, w->offset, (int)query.batch, (int)query.head,
                                  (int)(axis[0].query_origin + query.at[0]),
                                  (int)(axis[1].query_origin + query.at[1]));
    int x = (int)(axis[2].query_origin + query.at[2]);
    int kept = (int)na_dropout_number(row, x, s.index) >= threshold;
    return kept ? na_dropout_factor(threshold) : 0;
}

/* d_out . value */
static long double value_product(const work *w, place query, slot s)
{
    return dot(w, NATTEN_D_OUT, query, value_role(s), s.key, w->problem->value_dim);
}

/* out = sum of weight times value */
static void gather_values(const work *w, place query, int64_t slots)
{
    int64_t channels = w->problem->value_dim;
    memset(w->line, 0, (size_t)channels * sizeof *w->line);
    for (int64_t i = 0; i < slots; i++) {
        slot s = slot_of(w, query, i);
        if (s.kind != FORBIDDEN)
            add_line(w, w->line, w->weights[i], value_role(s), s.key, channels);
    }
    for (int64_t c = 0; c < channels; c++)
        store(w, NATTEN_OUT, query, c, w->line[c]);
}

/* What the gradient of one logit adds to query, key and biases. */
static void spread_logit(const work *w, place query, slot s, double gradient)
{
    natten_role d_key = s.kind == ADDITIONAL ? NATTEN_D_ADDITIONAL_KEY : NATTEN_D_KEY;
    double scaled = gradient * w->problem->scale;
    int64_t channels = w->problem->head_dim;
    add_line(w, sums_of(w, NATTEN_D_QUERY, query), scaled, key_role(s), s.key, channels);
    add_line(w, sums_of(w, d_key, s.key), scaled, NATTEN_QUERY, query, channels);
    if (s.kind == WINDOW_KEY && w->sums[NATTEN_D_RPB])
        *sums_of(w, NATTEN_D_RPB, s.bias) += gradient;
    if (s.kind == WINDOW_KEY && w->sums[NATTEN_D_KEY_BIAS])
        *sums_of(w, NATTEN_D_KEY_BIAS, s.key) += gradient;
}

/* What one weight sends back to its value. */
static void spread_value(const work *w, place query, slot s, double weight)
{
    natten_role d_value = s.kind == ADDITIONAL ? NATTEN_D_ADDITIONAL_VALUE : NATTEN_D_VALUE;
    double *sums = sums_of(w, d_value, s.key);
    add_line(w, sums, weight, NATTEN_D_OUT, query, w->problem->value_dim);
}

static void forward(const work *w, place query, int64_t slots)
{
    long double highest = -INFINITY;
    double sum = 0;
    for (int64_t i = 0; i < slots; i++) {
        slot s = slot_of(w, query, i);
        w->weights[i] = s.kind == FORBIDDEN ? -INFINITY : logit(w, query, s);
        highest = fmaxl(highest, w->weights[i]);
    }
    long double base = highest == -INFINITY ? 0 : highest; /* all keys may be masked */
    for (int64_t i = 0; i < slots; i++)
        sum += w->weights[i] = exp((double)(w->weights[i] - base));
    for (int64_t i = 0; i < slots && sum != 0; i++)
        w->weights[i] *= dropout(w, query, slot_of(w, query, i)) / sum;
    gather_values(w, query, slots);
    if (na_has(w->problem, NATTEN_LSE))
        store(w, NATTEN_LSE, query, 0, highest + log(sum));
}

/* With p the weights and m what dropout multiplies them by: d_logit = p (m d_out . value - delta),
 * delta = d_out . out - d_lse. */
static void backward(const work *w, place query, int64_t slots)
{
    double lse = load(w, NATTEN_LSE, query, 0);
    long double delta = na_has(w->problem, NATTEN_D_LSE) ? -load(w, NATTEN_D_LSE, query, 0) : 0;
    delta += dot(w, NATTEN_D_OUT, query, NATTEN_OUT, query, w->problem->value_dim);
    for (int64_t i = 0; i < slots; i++) {
        slot s = slot_of(w, query, i);
        if (s.kind == FORBIDDEN)
            continue;
        double weight = lse == -INFINITY ? 0 : exp((double)(logit(w, query, s) - lse));
        double kept = dropout(w, query, s);
        spread_logit(w, query, s, weight * (kept * value_product(w, query, s) - delta));
        spread_value(w, query, s, weight * kept);
    }
}

static void qk(const work *w, place query, int64_t slots)
{
    for (int64_t i = 0; i < slots; i++) {
        slot s = slot_of(w, query, i);
        store(w, NATTEN_ATTN, query, i, s.kind == FORBIDDEN ? -INFINITY : logit(w, query, s));
    }
}

static void qk_backward(const work *w, place query, int64_t slots)
{
    for (int64_t i = 0; i < slots; i++) {
        slot s = slot_of(w, query, i);
        if (s.kind != FORBIDDEN)
            spread_logit(w, query, s, load(w, NATTEN_D_ATTN, query, i));
    }
}

static void av(const work *w, place query, int64_t slots)
{
    for (int64_t i = 0; i < slots; i++)
        w->weights[i] = load(w, NATTEN_ATTN, query, i);
    gather_values(w, query, slots);
}

static void av_backward(const work *w, place query, int64_t slots)
{
    for (int64_t i = 0; i < slots; i++) {
        slot s = slot_of(w, query, i);
        int forbidden = s.kind == FORBIDDEN;
        if (na_has(w->problem, NATTEN_D_ATTN))
            store(w, NATTEN_D_ATTN, query, i, forbidden ? 0 : value_product(w, query, s));
        if (!forbidden)
            spread_value(w, query, s, load(w, NATTEN_ATTN, query, i));
    }
}

static void each_query(const work *w, void (*visit)(const work *, place, int64_t))
{
    const natten_problem *p = w->problem;
    const natten_axis *axis = p->axis;
    int64_t slots = na_window_size(p) + p->additional_tokens;
    place q;
    for (q.batch = 0; q.batch < p->batch; q.batch++)
        for (q.head = 0; q.head < p->heads; q.head++)
            for (q.at[0] = 0; q.at[0] < axis[0].query_extent; q.at[0]++)
                for (q.at[1] = 0; q.at[1] < axis[1].query_extent; q.at[1]++)
                    for (q.at[2] = 0; q.at[2] < axis[2].query_extent; q.at[2]++)
                        visit(w, q, slots);
}

static void store_sums(const work *w, natten_role role)
{
    na_shape s = na_role_shape(w->problem, role);
    const double *sum = w->sums[role];
    place p;
    for (p.batch = 0; p.batch < s.batch; p.batch++)
        for (p.at[0] = 0; p.at[0] < s.extent[0]; p.at[0]++)
            for (p.at[1] = 0; p.at[1] < s.extent[1]; p.at[1]++)
                for (p.at[2] = 0; p.at[2] < s.extent[2]; p.at[2]++)
                    for (p.head = 0; p.head < s.heads; p.head++)
                        for (int64_t c = 0; c < s.channels; c++)
                            store(w, role, p, c, *sum++);
}

static int has_sums(const natten_problem *p, natten_role role)
{
    return na_has(p, role) && na_role_is_output((natten_op)p->op, role) && role >= NATTEN_D_QUERY &&
           role != NATTEN_D_ATTN;
}

static natten_status run_reference(const natten_plan *plan, const natten_run *run)
{
    static void (*const visits[NATTEN_OPS])(const work *, place, int64_t) = {
        forward, backward, qk, qk_backward, av, av_backward};
    const natten_problem *p = &plan->problem;
    size_t slots = (size_t)(na_window_size(p) + p->additional_tokens);
    work w = {.problem = p, .data = run->data, .seed = run->seed, .offset = run->offset};
    w.weights = malloc(slots * sizeof *w.weights);
    w.line = malloc((size_t)p->value_dim * sizeof *w.line);
    int enough = w.weights && w.line;
    for (int role = 0; role < NATTEN_ROLES; role++) {
        if (!has_sums(p, (natten_role)role))
            continue;
        na_shape s = na_role_shape(p, (natten_role)role);
        int64_t count = s.batch * s.extent[0] * s.extent[1] * s.extent[2] * s.heads * s.channels;
        w.sums[role] = calloc((size_t)count + 1, sizeof(double));
        enough &= w.sums[role] != NULL;
    }
    if (enough) {
        each_query(&w, visits[p->op]);
        for (int role = 0; role < NATTEN_ROLES; role++)
            if (w.sums[role])
                store_sums(&w, (natten_role)role);
    }
    for (int role = 0; role < NATTEN_ROLES; role++)
        free(w.sums[role]);
    free(w.line);
    free(w.weights);
    return enough ? NATTEN_OK
                  : na_fail(NATTEN_ERROR_MEMORY, "No memory for the sums of a gradient.");
}

natten_status na_cpu_reference_plan(natten_plan *plan)
{
    plan->run = run_reference;
    return NATTEN_OK;
}
