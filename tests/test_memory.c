/* SPDX-License-Identifier: MIT
 * Every allocation fails in turn: the library then says so, has written nothing and leaks nothing,
 * or finds another way. Each attempt is a child process, so that none finds memory kept from
 * earlier. Linked with --wrap for the functions below. */
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "trial.h"
#include "unit.h"

/* Counts down to the allocation that fails; negative: none does. With `from_then_on` all later ones
 * fail too. */
static atomic_int countdown = -1;
static int from_then_on;
static atomic_int refused;

static int must_fail(void)
{
    if (atomic_load(&countdown) < 0)
        return 0;
    int left = atomic_load(&countdown);
    if (left > 0)
        atomic_fetch_sub(&countdown, 1);
    else if (!from_then_on)
        atomic_store(&countdown, -1);
    if (left == 0)
        atomic_fetch_add(&refused, 1);
    return left == 0;
}

void *__real_malloc(size_t size);
void *__real_calloc(size_t count, size_t size);
void *__real_realloc(void *block, size_t size);
void *__real_aligned_alloc(size_t alignment, size_t size);
int __real_posix_memalign(void **block, size_t alignment, size_t size);
int __real_pthread_create(pthread_t *thread, const pthread_attr_t *attributes,
                          void *(*body)(void *), void *argument);

void *__wrap_malloc(size_t size) { return must_fail() ? NULL : __real_malloc(size); }

void *__wrap_calloc(size_t count, size_t size)
{
    return must_fail() ? NULL : __real_calloc(count, size);
}

void *__wrap_realloc(void *block, size_t size)
{
    return must_fail() ? NULL : __real_realloc(block, size);
}

void *__wrap_aligned_alloc(size_t alignment, size_t size)
{
    return must_fail() ? NULL : __real_aligned_alloc(alignment, size);
}

int __wrap_posix_memalign(void **block, size_t alignment, size_t size)
{
    return must_fail() ? ENOMEM : __real_posix_memalign(block, alignment, size);
}

int __wrap_pthread_create(pthread_t *thread, const pthread_attr_t *attributes,
                          void *(*body)(void *), void *argument)
{
    return must_fail() ? EAGAIN : __real_pthread_create(thread, attributes, body, argument);
}

static int64_t device = NATTEN_CPU;

static natten_status compute(const trial *t, const char *kernel, const natten_run *run)
{
    natten_problem problem = t->problem;
    problem.device = device;
    if (!kernel)
        return natten_compute(&problem, run);
    natten_plan *plan;
    natten_status status = natten_plan_create(&problem, kernel, &plan);
    if (status == NATTEN_OK)
        status = natten_plan_run(plan, run);
    natten_plan_destroy(plan);
    return status;
}

static int outputs_intact(const trial *t, tensor tensors[NATTEN_ROLES])
{
    int intact = 1;
    for (int role = 0; role < NATTEN_ROLES; role++) {
        if (!(t->outputs >> role & 1))
            continue;
        size_t size = (size_t)tensor_count(&tensors[role]) * tensor_element(&tensors[role]);
        unsigned char *bytes = malloc(size);
        tensor_bytes(&tensors[role], (char *)bytes);
        for (size_t i = 0; i < size; i++)
            intact &= bytes[i] == 0xff;
        free(bytes);
    }
    return intact;
}

static int outputs_right(const trial *t, tensor tensors[NATTEN_ROLES])
{
    int right = 1;
    for (int role = 0; role < NATTEN_ROLES; role++) {
        if (!(t->outputs >> role & 1))
            continue;
        double *values = malloc((size_t)tensor_count(&tensors[role]) * sizeof *values);
        tensor_read(&tensors[role], values);
        trial_error error = trial_compare(t, (natten_role)role, values);
        right &= error.share <= 1;
        free(values);
    }
    return right;
}

/* How an attempt ended; in a child, an exit status. */
enum { ALL_GIVEN, SURVIVED, REFUSED, WRONG_STATUS, WROTE, WRONG_RESULT, NO_SENTENCE };

static int attempt(const trial *t, const char *kernel, int allocation)
{
    tensor tensors[NATTEN_ROLES];
    natten_run run = {.threads = 3};
    if (!trial_tensors(t, PLACE_START, tensors, &run))
        return WRONG_STATUS;
    atomic_store(&countdown, allocation);
    natten_status status = compute(t, kernel, &run);
    atomic_store(&countdown, -1);
    int result = atomic_load(&refused) ? SURVIVED : ALL_GIVEN;
    if (status == NATTEN_ERROR_MEMORY) {
        result = REFUSED;
        if (!strstr(natten_last_error(), "memory"))
            result = NO_SENTENCE;
        if (!outputs_intact(t, tensors))
            result = WROTE;
    } else if (status != NATTEN_OK) {
        result = WRONG_STATUS;
    } else if (!outputs_right(t, tensors)) {
        result = WRONG_RESULT;
    }
    /* What failed once must work now. */
    if (result == REFUSED && compute(t, kernel, &run) != NATTEN_OK)
        result = WRONG_STATUS;
    trial_tensors_free(tensors);
    return result;
}

/* True when the attempt got all it asked for, so that there is nothing left to refuse. */
static int in_child(const trial *t, const char *kernel, int allocation)
{
    static const char *const words[] = {
        "", "", "", "not an error of memory", "wrote its output", "a wrong result", "no sentence"};
    fflush(stdout);
    pid_t child = fork();
    if (child == 0)
        exit(attempt(t, kernel, allocation)); /* exit: so that leaks are looked for */
    int status = -1;
    waitpid(child, &status, 0);
    int result = WIFEXITED(status) ? WEXITSTATUS(status) : -1;
    if (result < ALL_GIVEN || result > REFUSED)
        unit_fail(
            "%s %s, allocation %d%s: %s (status %#x)", op_name((natten_op)t->problem.op),
            kernel ? kernel : "natten_compute", allocation, from_then_on ? " and all later" : "",
            result > 0 && result <= NO_SENTENCE ? words[result] : "crashed or leaked", status);
    return result == ALL_GIVEN || result < 0;
}

static void test_kernel(const trial *t, const char *kernel)
{
    /* One mode for each kernel, both for the way front ends go: children are slow with asan. */
    for (from_then_on = 0; from_then_on < (kernel ? 1 : 2); from_then_on++) {
        int allocation = 0;
        while (allocation < 200 && !in_child(t, kernel, allocation))
            allocation++;
        CHECK(allocation > 0 && allocation < 200);
    }
}

/* The driver made for tests starts in the children, once in each. */
static void test_cuda(const trial *t)
{
    device = NATTEN_CUDA;
    if (!in_child(t, NULL, 10000)) /* leaves what is compiled on disk */
        unit_fail("more allocations than there can be");
    test_kernel(t, NULL);
    device = NATTEN_CPU;
}

/* All kernels that take the problem, and the way front ends go. */
static void test_op(const natten_problem *problem, int cuda)
{
    trial t;
    const char *name;
    natten_plan *first;
    CHECK(trial_make(&t, problem, 3) == NULL);
    if (natten_plan_create(problem, NULL, &first) == NATTEN_OK)
        t.kernel = natten_plan_kernel(first); /* which decides about errors allowed */
    natten_plan_destroy(first);
    if (cuda)
        test_cuda(&t);
    else
        test_kernel(&t, NULL);
    for (size_t i = 0; !cuda && (name = natten_kernel_name(i)); i++) {
        natten_plan *plan;
        t.kernel = name;
        if (natten_plan_create(problem, name, &plan) == NATTEN_OK)
            test_kernel(&t, name);
        natten_plan_destroy(plan);
    }
    trial_free(&t);
}

int main(int argc, char **argv)
{
    const int cuda = argc > 1 && !strcmp(argv[1], "cuda");
    test_problem test;
    natten_problem problem;
    unit_test("the problem");
    CHECK(problem_parse("b1h2d8_5x6_w3x3_lse_rpb_add2_kb_drop0.3", &test) == NULL);
    for (int op = 0; op < NATTEN_OPS; op++) {
        problem_of_op(&test, (natten_op)op, &problem);
        unit_test(op_name((natten_op)op));
        test_op(&problem, cuda);
    }
    if (cuda)
        return unit_end("test_memory");
    /* The kernels for bfloat16 take less. */
    unit_test("forward in bfloat16");
    CHECK(problem_parse("b1h2d8_5x6_w3x3_lse_bf16", &test) == NULL);
    problem_of_op(&test, NATTEN_FORWARD, &problem);
    test_op(&problem, 0);
    return unit_end("test_memory");
}
