/* SPDX-License-Identifier: MIT
 * Problems as short strings, so that a line of text reproduces any failure and any figure:
 *
 *     [op_]b<batch>h<heads>d<head_dim>_<extents>_w<window>[_<option>...]
 *
 * Lists have one number per axis, joined by x: 56x56. Without an op a string stands for all of
 * them: forward, backward, qk, qk-backward, av, av-backward. Options, each joined by _:
 *
 *     d8x8 dilation       s2x2 stride          c10 causal, a bit per axis
 *     hk2 kv heads        dv48 value dim       add16 additional tokens     rpb position bias
 *     lse returned by forward, its gradient enters backward
 *     x0.5 scale (else head_dim ** -0.5)
 *     gq gradients wanted (else all): letters of query, key, value, attn, rpb,
 *        n = additional key, m = additional value, b = key bias
 *     kb key bias, part of it -infinity    drop0.25 dropout of the fused ops
 *     q8x4+16x0 block of queries: extents + origins; the extents above are then the whole map's
 *     k20x9+8x0 block of keys, likewise
 *     kvp KV parallelism allowed, with little or much memory for it
 *     choice2 of the kernel's ways of doing it
 *     hf heads-first (else heads-last)         qkv one packed projection   odd padded odd strides
 *     neg negative strides                     bcast inputs with strides of 0
 *     f32 f64 f16 bf16 (else f32)
 */
#ifndef PROBLEM_STRING_H
#define PROBLEM_STRING_H

#include "natten.h"

typedef enum test_order {
    ORDER_LAST,
    ORDER_FIRST,
    ORDER_QKV,
    ORDER_ODD,
    ORDER_NEGATIVE,
    ORDER_BROADCAST
} test_order;

typedef struct test_problem {
    char text[256];         /* as given, without the op */
    natten_problem problem; /* sizes only */
    int op;                 /* -1: all */
    test_order order;
    int rpb, lse, key_bias;
    uint64_t preferences; /* besides the usual ones */
    uint64_t gradients;   /* the gradients wanted, of any op */
} test_problem;

/* Sizes of a role's tensor; 1 for what it does not have. */
typedef struct test_shape {
    int64_t batch, axis[3], head, channel;
} test_shape;

/* NULL, or what is wrong with the text. */
const char *problem_parse(const char *text, test_problem *result);

/* The problem of one op, roles and layouts filled in; 0 when there is nothing to compute. */
int problem_of_op(const test_problem *test, natten_op op, natten_problem *problem);

/* The text of a small random problem. */
void problem_random(uint64_t *random, char *text, size_t size);

const char *op_name(natten_op op);
const char *role_name(natten_role role);
int op_from_name(const char *name);
int role_is_output(natten_op op, natten_role role);
test_shape role_shape(const natten_problem *problem, natten_role role);

/* splitmix64: the next of a stream of random numbers. */
uint64_t random_next(uint64_t *state);

#endif
