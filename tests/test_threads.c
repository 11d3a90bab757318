/* SPDX-License-Identifier: MIT
 * The pool of threads and the table of plans, used from everywhere at once. */
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "cpu/threads.h"
#include "trial.h"
#include "unit.h"

enum { WORKERS = 7, CALLERS = 5, MOST_BYTES = 1 << 18 };

static atomic_int calls[WORKERS], misses;

static void count_call(void *context, int64_t worker)
{
    CHECK(context == calls);
    atomic_fetch_add(&calls[worker], 1);
}

static void nested(void *context, int64_t worker)
{
    (void)worker;
    na_parallel(context, WORKERS, count_call, calls);
}

/* The caller's threads: here one, and the workers in reverse order. */
static void backwards(void *pool, int64_t workers, natten_task task, void *context)
{
    atomic_fetch_add((atomic_int *)pool, 1);
    while (workers-- > 0)
        task(context, workers);
}

static void expect_calls(int each)
{
    for (int i = 0; i < WORKERS; i++)
        CHECK(atomic_exchange(&calls[i], 0) == each);
}

static void test_pool(void)
{
    natten_run run = {0};
    for (int i = 0; i < 500; i++)
        na_parallel(&run, WORKERS, count_call, calls);
    expect_calls(500);
    na_parallel(&run, 3, nested, &run);
    expect_calls(3);
    CHECK(na_workers(&run, 0) == 1);
    CHECK(na_workers(&(natten_run){.threads = 9}, 4) == 4);
    CHECK(na_workers(&(natten_run){.threads = 2}, 4) == 2);
    CHECK(na_workers(&(natten_run){.threads = INT64_MAX}, INT64_MAX) <= 4096);
    atomic_int used = 0;
    run.parallel = backwards;
    run.pool = &used;
    na_parallel(&run, WORKERS, count_call, calls);
    expect_calls(1);
    CHECK(used == 1);
}

static void test_count(void)
{
    int64_t before = natten_threads();
    CHECK(before >= 1);
    CHECK(natten_threads_set(3) == NATTEN_OK && natten_threads() == 3);
    CHECK(na_workers(&(natten_run){0}, 100) == 3);
    CHECK(natten_threads_set(before) == NATTEN_OK);
}

/* A computation whose result is known, through natten_compute. */
typedef struct known {
    trial t;
    tensor tensors[NATTEN_ROLES];
    natten_run run;
    char bytes[MOST_BYTES];
} known;

static void known_make(known *k, const char *text, natten_op op)
{
    test_problem test;
    natten_problem problem;
    CHECK(problem_parse(text, &test) == NULL && problem_of_op(&test, op, &problem));
    CHECK(trial_make_inputs(&k->t, &problem, 5) == NULL);
    k->run = (natten_run){.threads = 1};
    CHECK(trial_tensors(&k->t, PLACE_START, k->tensors, &k->run));
    CHECK(natten_compute(&k->t.problem, &k->run) == NATTEN_OK);
    for (int role = 0; role < NATTEN_ROLES; role++)
        if (k->t.outputs >> role & 1) {
            const tensor *t = &k->tensors[role];
            CHECK((size_t)tensor_count(t) * tensor_element(t) <= MOST_BYTES);
            tensor_bytes(t, k->bytes); /* the last output will do */
        }
}

static void known_free(known *k)
{
    trial_tensors_free(k->tensors);
    trial_free(&k->t);
}

/* Computes again, with other threads and into other memory; true if the bits are the same. */
static int known_again(const known *k, int threads)
{
    tensor tensors[NATTEN_ROLES];
    natten_run run = {.threads = threads};
    static _Thread_local char bytes[MOST_BYTES];
    int good = trial_tensors(&k->t, PLACE_ODD, tensors, &run) &&
               natten_compute(&k->t.problem, &run) == NATTEN_OK;
    size_t size = 0;
    for (int role = 0; good && role < NATTEN_ROLES; role++)
        if (k->t.outputs >> role & 1) {
            size = (size_t)tensor_count(&tensors[role]) * tensor_element(&tensors[role]);
            tensor_bytes(&tensors[role], bytes);
        }
    trial_tensors_free(tensors);
    return good && !memcmp(bytes, k->bytes, size);
}

/* Not a multiple of the 4 numbers of threads they are computed with. */
enum { SHARED = 5 };

static known shared[SHARED];

static void *call_many_times(void *argument)
{
    int offset = *(int *)argument;
    for (int i = 0; i < 60; i++)
        if (!known_again(&shared[(i + offset) % SHARED], 1 + (i + offset) % 4))
            atomic_fetch_add(&misses, 1);
    return NULL;
}

static void in_threads(void *(*body)(void *))
{
    pthread_t threads[CALLERS];
    int numbers[CALLERS];
    for (int i = 0; i < CALLERS; i++) {
        numbers[i] = i;
        CHECK(pthread_create(&threads[i], NULL, body, &numbers[i]) == 0);
    }
    for (int i = 0; i < CALLERS; i++)
        pthread_join(threads[i], NULL);
}

static void test_callers(void)
{
    in_threads(call_many_times);
    CHECK(atomic_exchange(&misses, 0) == 0);
}

/* More problems than the table holds, so that plans are thrown out while others use them. */
static void *evict(void *argument)
{
    float query[64], key[64], value[64], out[64];
    for (int i = 0; i < 64; i++)
        query[i] = key[i] = value[i] = 1;
    for (int i = 0; i < 1500; i++) {
        natten_problem p;
        natten_problem_init(&p, NATTEN_FORWARD, NATTEN_F32, 1);
        p.axis[0].query_extent = 8;
        p.axis[0].window = 3;
        p.head_dim = 8;
        p.scale = (i * (1 + *(int *)argument)) % 700;
        natten_problem_pack(&p, NATTEN_HEADS_LAST);
        natten_run run = {.data = {query, key, value, out}};
        memset(out, 0, sizeof out);
        int good = natten_compute(&p, &run) == NATTEN_OK;
        for (int j = 0; j < 64; j++) /* the mean of ones, whatever the scale */
            good &= out[j] > 0.999999f && out[j] < 1.000001f;
        if (!good)
            atomic_fetch_add(&misses, 1);
    }
    return NULL;
}

static void test_table(void)
{
    in_threads(evict);
    CHECK(atomic_exchange(&misses, 0) == 0);
}

/* The error's text belongs to the thread. */
static void *fail_alone(void *argument)
{
    natten_problem p;
    char words[40];
    for (int i = 0; i < 300; i++) {
        natten_problem_init(&p, NATTEN_FORWARD, NATTEN_F32, 1);
        p.batch = -1 - *(int *)argument - 100 * i;
        snprintf(words, sizeof words, "got %d.", (int)p.batch);
        if (natten_compute(&p, &(natten_run){0}) != NATTEN_ERROR_ARGUMENT ||
            !strstr(natten_last_error(), words))
            atomic_fetch_add(&misses, 1);
    }
    return NULL;
}

static void test_errors(void)
{
    in_threads(fail_alone);
    CHECK(atomic_exchange(&misses, 0) == 0);
}

/* The child has the pool's book-keeping but none of its threads. */
static void expect_child(void)
{
    pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        alarm(60); /* not for ever */
        int good = 1;
        for (int i = 0; i < 6; i++)
            good &= known_again(&shared[i % SHARED], 4);
        _exit(!good);
    }
    int status = -1;
    CHECK(waitpid(child, &status, 0) == child);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

static void test_fork(void)
{
    for (int i = 0; i < 5; i++) {
        CHECK(known_again(&shared[i % SHARED], 4)); /* warms the pool */
        expect_child();
        CHECK(known_again(&shared[i % SHARED], 4));
    }
}

static void test_fork_while_busy(void)
{
    pthread_t busy[2];
    int numbers[2] = {0, 1};
    for (int i = 0; i < 2; i++)
        CHECK(pthread_create(&busy[i], NULL, call_many_times, &numbers[i]) == 0);
    for (int i = 0; i < 10; i++)
        expect_child();
    for (int i = 0; i < 2; i++)
        pthread_join(busy[i], NULL);
    CHECK(atomic_exchange(&misses, 0) == 0);
}

int main(void)
{
    unit_test("every worker once");
    test_pool();
    unit_test("thread count");
    test_count();
    unit_test("several callers");
    known_make(&shared[0], "b1h2d16_12x13_w5x5", NATTEN_FORWARD);
    known_make(&shared[1], "b1h2d16_9x9_w3x3_lse", NATTEN_BACKWARD);
    known_make(&shared[2], "b2h1d8_60_w9_d2", NATTEN_QK);
    /* By the kernel for AMX, in plain C where there is none. */
    known_make(&shared[3], "b1h4d32_18x20_w7x7_hk2_bf16", NATTEN_FORWARD);
    known_make(&shared[4], "b2h2d32_300_w65_c1_bf16", NATTEN_FORWARD);
    test_callers();
    unit_test("plans thrown out while in use");
    test_table();
    unit_test("errors of several threads");
    test_errors();
    unit_test("fork with a warm pool");
    test_fork();
    unit_test("fork while others compute");
    test_fork_while_busy();
    for (int i = 0; i < SHARED; i++)
        known_free(&shared[i]);
    return unit_end("test_threads");
}
