/* SPDX-License-Identifier: MIT */
#include "problem_string.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char *const op_names[NATTEN_OPS] = {"forward",     "backward", "qk",
                                                 "qk-backward", "av",       "av-backward"};
static const char *const dtype_names[NATTEN_DTYPES] = {"f32", "f64", "f16", "bf16"};
static const char *const order_names[] = {"hl", "hf", "qkv", "odd", "neg", "bcast"};

uint64_t random_next(uint64_t *state)
{
    uint64_t z = *state += 0x9e3779b97f4a7c15;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return z ^ z >> 31;
}

static const char *const role_names[NATTEN_ROLES] = {"query",
                                                     "key",
                                                     "value",
                                                     "out",
                                                     "lse",
                                                     "attn",
                                                     "rpb",
                                                     "additional_key",
                                                     "additional_value",
                                                     "key_bias",
                                                     "d_query",
                                                     "d_key",
                                                     "d_value",
                                                     "d_out",
                                                     "d_lse",
                                                     "d_attn",
                                                     "d_rpb",
                                                     "d_additional_key",
                                                     "d_additional_value",
                                                     "d_key_bias"};

const char *role_name(natten_role role) { return role_names[role]; }

const char *op_name(natten_op op) { return op_names[op]; }

int op_from_name(const char *name)
{
    for (int op = 0; op < NATTEN_OPS; op++)
        if (!strcmp(name, op_names[op]))
            return op;
    return -1;
}

int role_is_output(natten_op op, natten_role role)
{
    switch (op) {
    case NATTEN_FORWARD:
    case NATTEN_AV:
        return role == NATTEN_OUT || role == NATTEN_LSE;
    case NATTEN_QK:
        return role == NATTEN_ATTN;
    case NATTEN_AV_BACKWARD:
        return role >= NATTEN_D_QUERY && role != NATTEN_D_OUT;
    default:
        return role >= NATTEN_D_QUERY && role != NATTEN_D_OUT && role != NATTEN_D_LSE &&
               role != NATTEN_D_ATTN;
    }
}

static int64_t window_size(const natten_problem *problem)
{
    int64_t size = 1;
    for (int a = 0; a < problem->rank; a++)
        size *= problem->axis[a].window;
    return size;
}

test_shape role_shape(const natten_problem *problem, natten_role role)
{
    const natten_problem *p = problem;
    test_shape shape = {p->batch, {1, 1, 1}, p->heads, 1};
    int gradient_of[] = {NATTEN_QUERY,
                         NATTEN_KEY,
                         NATTEN_VALUE,
                         NATTEN_OUT,
                         NATTEN_LSE,
                         NATTEN_ATTN,
                         NATTEN_RPB,
                         NATTEN_ADDITIONAL_KEY,
                         NATTEN_ADDITIONAL_VALUE,
                         NATTEN_KEY_BIAS};
    int what = role < NATTEN_D_QUERY ? (int)role : gradient_of[role - NATTEN_D_QUERY];
    int of_keys = what == NATTEN_KEY || what == NATTEN_VALUE || what == NATTEN_KEY_BIAS;
    int added = what == NATTEN_ADDITIONAL_KEY || what == NATTEN_ADDITIONAL_VALUE;
    for (int a = 0; a < p->rank; a++)
        shape.axis[a] = of_keys              ? p->axis[a].key_extent
                        : what == NATTEN_RPB ? 2 * p->axis[a].window - 1
                        : added              ? (a ? 1 : p->additional_tokens)
                                             : p->axis[a].query_extent;
    if (of_keys || added)
        shape.head = p->kv_heads;
    if (what == NATTEN_RPB)
        shape.batch = 1;
    if (what == NATTEN_QUERY || what == NATTEN_KEY || what == NATTEN_ADDITIONAL_KEY)
        shape.channel = p->head_dim;
    if (what == NATTEN_VALUE || what == NATTEN_OUT || what == NATTEN_ADDITIONAL_VALUE)
        shape.channel = p->value_dim;
    if (what == NATTEN_ATTN)
        shape.channel = window_size(p) + p->additional_tokens;
    return shape;
}

/* Heads-last, with `pad` elements of nothing after each line of each dimension. */
static natten_layout padded_layout(test_shape shape, int64_t channels, int64_t pad, int64_t sign)
{
    natten_layout layout;
    int64_t step = shape.channel + pad;
    layout.head = sign * step;
    step = channels ? channels : step * shape.head + pad;
    for (int a = 2; a >= 0; a--) {
        layout.axis[a] = sign * step;
        step = step * shape.axis[a] + pad;
    }
    layout.batch = sign * step;
    return layout;
}

static natten_layout role_layout(const test_problem *test, const natten_problem *p,
                                 natten_role role)
{
    test_shape shape = role_shape(p, role);
    int64_t channels = p->heads * p->head_dim + p->kv_heads * (p->head_dim + p->value_dim);
    int packed = role == NATTEN_QUERY || role == NATTEN_KEY || role == NATTEN_VALUE ||
                 (role >= NATTEN_D_QUERY && role <= NATTEN_D_VALUE);
    if (test->order == ORDER_QKV)
        return packed ? padded_layout(shape, channels, 0, 1) : p->layout[role];
    if (test->order == ORDER_ODD)
        return padded_layout(shape, 0, 3, 1);
    if (test->order == ORDER_NEGATIVE)
        return padded_layout(shape, 0, 1, -1);
    natten_layout layout = p->layout[role];
    if (test->order == ORDER_BROADCAST && !role_is_output((natten_op)p->op, role)) {
        if (role == NATTEN_RPB || role == NATTEN_KEY_BIAS)
            layout.head = 0;
        else if (role != NATTEN_OUT && role != NATTEN_LSE)
            layout.batch = 0;
        if (role == NATTEN_VALUE)
            layout.axis[p->rank - 1] = 0;
    }
    return layout;
}

static uint64_t roles_of_op(const test_problem *test, natten_op op, uint64_t roles)
{
    int backward = op == NATTEN_BACKWARD || op == NATTEN_QK_BACKWARD || op == NATTEN_AV_BACKWARD;
    int keys = op != NATTEN_AV && op != NATTEN_AV_BACKWARD;
    int values = op != NATTEN_QK && op != NATTEN_QK_BACKWARD;
    if (test->rpb && keys)
        roles |= (op == NATTEN_QK_BACKWARD ? 0 : natten_bit(NATTEN_RPB)) |
                 (backward ? natten_bit(NATTEN_D_RPB) : 0);
    if (test->key_bias && (op == NATTEN_FORWARD || op == NATTEN_BACKWARD || op == NATTEN_QK))
        roles |= natten_bit(NATTEN_KEY_BIAS) |
                 (op == NATTEN_BACKWARD ? natten_bit(NATTEN_D_KEY_BIAS) : 0);
    if (test->problem.additional_tokens && keys)
        roles |= natten_bit(NATTEN_ADDITIONAL_KEY) |
                 (backward ? natten_bit(NATTEN_D_ADDITIONAL_KEY) : 0);
    if (test->problem.additional_tokens && values)
        roles |= natten_bit(NATTEN_ADDITIONAL_VALUE) |
                 (backward ? natten_bit(NATTEN_D_ADDITIONAL_VALUE) : 0);
    if (test->lse && op == NATTEN_FORWARD)
        roles |= natten_bit(NATTEN_LSE);
    if (test->lse && op == NATTEN_BACKWARD)
        roles |= natten_bit(NATTEN_D_LSE);
    for (int role = NATTEN_D_QUERY; role < NATTEN_ROLES; role++)
        if (role_is_output(op, (natten_role)role) && !(test->gradients >> role & 1))
            roles &= ~natten_bit((natten_role)role);
    return roles;
}

int problem_of_op(const test_problem *test, natten_op op, natten_problem *problem)
{
    const natten_problem *sizes = &test->problem;
    natten_problem_init(problem, op, (natten_dtype)sizes->dtype, (int)sizes->rank);
    memcpy(problem->axis, sizes->axis, sizeof problem->axis);
    problem->batch = sizes->batch;
    problem->heads = sizes->heads;
    problem->kv_heads = sizes->kv_heads;
    problem->head_dim = sizes->head_dim;
    problem->value_dim = sizes->value_dim;
    problem->additional_tokens = sizes->additional_tokens;
    problem->scale = sizes->scale;
    problem->preferences |= test->preferences;
    problem->choice = sizes->choice;
    if (op == NATTEN_FORWARD || op == NATTEN_BACKWARD)
        problem->dropout = sizes->dropout;
    problem->roles = roles_of_op(test, op, problem->roles);
    natten_problem_pack(problem,
                        test->order == ORDER_FIRST ? NATTEN_HEADS_FIRST : NATTEN_HEADS_LAST);
    int outputs = 0;
    for (int role = 0; role < NATTEN_ROLES; role++) {
        if (!(problem->roles >> role & 1))
            continue;
        problem->layout[role] = role_layout(test, problem, (natten_role)role);
        outputs += role_is_output(op, (natten_role)role);
    }
    return outputs > 0;
}

/* Reads 7x7x3; returns what follows, NULL when there are not `rank` numbers. */
static const char *read_list(const char *text, int64_t rank, int64_t list[3])
{
    for (int a = 0; a < rank; a++) {
        char *end;
        list[a] = strtoll(text, &end, 10);
        if (end == text || (a + 1 < rank && *end != 'x'))
            return NULL;
        text = a + 1 < rank ? end + 1 : end;
    }
    return text;
}

static int read_axes(const char *text, natten_problem *problem, int64_t *field)
{
    int64_t list[3];
    const char *end = read_list(text, problem->rank, list);
    for (int a = 0; end && !*end && a < problem->rank; a++)
        field[a * (int64_t)(sizeof(natten_axis) / sizeof(int64_t))] = list[a];
    return end && !*end;
}

static int read_block(const char *text, natten_problem *problem, int64_t *extent, int64_t *origin)
{
    char extents[64];
    const char *plus = strchr(text, '+');
    if (!plus || plus - text >= (int)sizeof extents)
        return 0;
    memcpy(extents, text, (size_t)(plus - text));
    extents[plus - text] = 0;
    return read_axes(extents, problem, extent) && read_axes(plus + 1, problem, origin);
}

static int read_gradients(const char *letters, uint64_t *gradients)
{
    static const char names[] = "qkv??arnmb";
    *gradients = 0;
    for (; *letters; letters++) {
        const char *found = *letters == '?' ? NULL : strchr(names, *letters);
        if (!found)
            return 0;
        *gradients |= natten_bit((natten_role)(NATTEN_D_QUERY + (found - names)));
    }
    return 1;
}

static int read_number(const char *text, int64_t *number)
{
    char *end;
    *number = strtoll(text, &end, 10);
    return end != text && !*end;
}

static int read_causal(const char *bits, natten_problem *problem)
{
    int a = 0;
    for (; bits[a] == '0' || bits[a] == '1'; a++)
        if (a < problem->rank)
            problem->axis[a].causal = bits[a] - '0';
    return a == problem->rank && !bits[a];
}

static const struct {
    const char *name;
    uint64_t bit;
} preferences[] = {{"kvp", NATTEN_PREFER_KV_PARALLEL},
                   {"little", NATTEN_PREFER_LITTLE_MEMORY},
                   {"much", NATTEN_PREFER_MUCH_MEMORY}};

static int read_word(const char *word, test_problem *test)
{
    for (int i = 0; i < NATTEN_DTYPES; i++)
        if (!strcmp(word, dtype_names[i])) {
            test->problem.dtype = i;
            return 1;
        }
    for (size_t i = 0; i < sizeof order_names / sizeof *order_names; i++)
        if (!strcmp(word, order_names[i])) {
            test->order = (test_order)i;
            return 1;
        }
    for (size_t i = 0; i < sizeof preferences / sizeof *preferences; i++)
        if (!strcmp(word, preferences[i].name)) {
            test->preferences |= preferences[i].bit;
            return 1;
        }
    if (!strcmp(word, "rpb"))
        return test->rpb = 1;
    if (!strcmp(word, "lse"))
        return test->lse = 1;
    if (!strcmp(word, "kb"))
        return test->key_bias = 1;
    return 0;
}

static int read_option(const char *word, test_problem *test)
{
    natten_problem *p = &test->problem;
    natten_axis *axis = p->axis;
    if (read_word(word, test))
        return 1;
    if (!strncmp(word, "add", 3))
        return read_number(word + 3, &p->additional_tokens);
    if (!strncmp(word, "hk", 2))
        return read_number(word + 2, &p->kv_heads);
    if (!strncmp(word, "dv", 2))
        return read_number(word + 2, &p->value_dim);
    if (!strncmp(word, "choice", 6))
        return read_number(word + 6, &p->choice);
    if (!strncmp(word, "drop", 4)) {
        p->dropout = strtod(word + 4, NULL);
        return 1;
    }
    switch (*word) {
    case 'w':
        return read_axes(word + 1, p, &axis->window);
    case 'd':
        return read_axes(word + 1, p, &axis->dilation);
    case 's':
        return read_axes(word + 1, p, &axis->stride);
    case 'c':
        return read_causal(word + 1, p);
    case 'q':
        return read_block(word + 1, p, &axis->query_extent, &axis->query_origin);
    case 'k':
        return read_block(word + 1, p, &axis->key_extent, &axis->key_origin);
    case 'g':
        return read_gradients(word + 1, &test->gradients);
    case 'x':
        p->scale = strtod(word + 1, NULL);
        return 1;
    default:
        return 0;
    }
}

static int read_sizes(const char *word, natten_problem *problem)
{
    long long batch, heads, dim;
    int end = 0;
    if (sscanf(word, "b%lldh%lldd%lld%n", &batch, &heads, &dim, &end) != 3 || word[end])
        return 0;
    problem->batch = batch;
    problem->heads = problem->kv_heads = heads;
    problem->head_dim = problem->value_dim = dim;
    problem->scale = dim ? 1 / sqrt((double)dim) : 1;
    return 1;
}

static int read_extents(const char *word, natten_problem *problem)
{
    problem->rank = 1;
    for (const char *at = word; *at; at++)
        problem->rank += *at == 'x';
    if (problem->rank > 3 || !read_axes(word, problem, &problem->axis->query_extent))
        return 0;
    for (int a = 0; a < problem->rank; a++) {
        natten_axis *axis = &problem->axis[a];
        axis->key_extent = axis->global_extent = axis->query_extent;
        axis->stride = axis->dilation = 1;
    }
    return 1;
}

const char *problem_parse(const char *text, test_problem *result)
{
    static char complaint[320];
    char words[sizeof result->text];
    test_problem test = {.op = -1, .gradients = ~(uint64_t)0};
    if (strlen(text) >= sizeof words)
        return "the problem string is too long";
    strcpy(words, text);
    char *word = strtok(words, "_");
    if (word && (test.op = op_from_name(word)) >= 0)
        word = strtok(NULL, "_");
    strcpy(test.text, text + (word ? word - words : 0));
    snprintf(complaint, sizeof complaint, "cannot read \"%s\" of \"%s\"", word ? word : "", text);
    if (!word || !read_sizes(word, &test.problem))
        return complaint;
    word = strtok(NULL, "_");
    if (!word || !read_extents(word, &test.problem))
        return complaint;
    while ((word = strtok(NULL, "_")))
        if (!read_option(word, &test)) {
            snprintf(complaint, sizeof complaint, "cannot read \"%s\" of \"%s\"", word, text);
            return complaint;
        }
    for (int a = 0; a < test.problem.rank; a++)
        if (!test.problem.axis[a].window)
            return "a problem string needs a window";
    *result = test;
    return NULL;
}
