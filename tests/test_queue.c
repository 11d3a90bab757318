/* SPDX-License-Identifier: MIT
 * Tasks shared out among workers: each is done once, whoever is fast or slow. */
#include <stdatomic.h>
#include <stdlib.h>

#include "cpu/queue.h"
#include "unit.h"

enum { WORKERS = 7, TASKS = 1000 };

static na_queues *make(int64_t workers, int64_t tasks)
{
    na_queues *q = aligned_alloc(64, na_queues_bytes(workers));
    CHECK(q);
    na_queues_fill(q, workers, tasks);
    return q;
}

typedef struct tally {
    na_queues *queues;
    atomic_int done[TASKS];
} tally;

static void do_tasks(void *context, int64_t worker)
{
    tally *t = context;
    for (na_turn turn = na_turn_of(t->queues, worker); na_turn_next(&turn);) {
        atomic_fetch_add(&t->done[turn.task], 1);
        /* The first tasks take longer: others have to help with them. */
        for (volatile int i = 0; i < 20 * (TASKS - (int)turn.task); i++)
            continue;
    }
}

static void test_each_once(void)
{
    static const int64_t counts[] = {1, 2, WORKERS, WORKERS + 1, TASKS};
    const natten_run run = {.threads = WORKERS};
    for (size_t c = 0; c < sizeof counts / sizeof *counts; c++)
        for (int64_t workers = 1; workers <= WORKERS; workers++) {
            tally *t = calloc(1, sizeof *t);
            CHECK(t);
            t->queues = make(workers, 0);
            na_parallel_tasks(&run, t->queues, workers, counts[c], do_tasks, t);
            for (int i = 0; i < TASKS; i++)
                CHECK(atomic_load(&t->done[i]) == (i < counts[c]));
            free(t->queues);
            free(t);
        }
}

/* Worker 0 is held up in his first task. */
static void test_others_help(void)
{
    na_queues *q = make(3, TASKS);
    na_turn held = na_turn_of(q, 0), quick = na_turn_of(q, 1), late = na_turn_of(q, 2);
    CHECK(na_turn_next(&held) && held.task == 0 && na_turn_ahead(&held) == 1);
    CHECK(na_turn_next(&quick) && quick.task == TASKS / 3 &&
          na_turn_ahead(&quick) == quick.task + 1);
    int done = 2;
    while (na_turn_next(&quick))
        done++;
    CHECK(done == TASKS);
    CHECK(na_turn_ahead(&held) == -1 && !na_turn_next(&held));
    CHECK(!na_turn_next(&late) && na_turn_ahead(&late) == -1);
    free(q);
}

static void expect_order(na_turn *turn, const int64_t *order, int64_t count)
{
    for (int64_t i = 0; i < count; i++)
        CHECK(na_turn_next(turn) && turn->task == order[i]);
    CHECK(!na_turn_next(turn));
}

/* A worker's own tasks come in order, then those of others: from the back if these are there. */
static void test_order(void)
{
    static const int64_t halves[] = {4, 5, 6, 7, 2, 3, 1, 0}, alone[] = {4, 5, 6, 7, 0, 1, 2, 3};
    na_queues *q = make(2, 8);
    na_turn other = na_turn_of(q, 0), turn = na_turn_of(q, 1);
    expect_order(&turn, halves, 8);
    CHECK(!na_turn_next(&other));
    na_queues_fill(q, 2, 8);
    turn = na_turn_of(q, 1);
    expect_order(&turn, alone, 8);
    other = na_turn_of(q, 0);
    CHECK(!na_turn_next(&other));
    free(q);
}

/* More tasks than 32 bits number. */
static void test_many(void)
{
    const int64_t tasks = ((int64_t)3 << 40) + 1;
    na_queues *q = make(2, tasks);
    na_turn first = na_turn_of(q, 0), second = na_turn_of(q, 1);
    for (int64_t i = 0; i < 2000; i++)
        CHECK(na_turn_next(&first) && first.task == i && na_turn_ahead(&first) == i + 1);
    CHECK(na_turn_next(&second));
    CHECK(second.task > tasks / 2 - 2000 && second.task < tasks / 2 + 2000);
    free(q);
}

int main(void)
{
    unit_test("each task is done once");
    test_each_once();
    unit_test("others help a slow worker");
    test_others_help();
    unit_test("the order of tasks");
    test_order();
    unit_test("more tasks than 32 bits number");
    test_many();
    return unit_end("test_queue");
}
