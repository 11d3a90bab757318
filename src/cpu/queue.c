/* SPDX-License-Identifier: MIT */
#include "cpu/queue.h"

#include <stdatomic.h>

#include "cpu/threads.h"

/* A worker's run, on a cache line of its own. */
typedef struct queue {
    _Alignas(64) atomic_uint_fast64_t left; /* of it, in pieces: first << 32 | end */
    atomic_int begun;                       /* 1: the worker is there */
} queue;

struct na_queues {
    _Alignas(64) int64_t workers;
    int64_t tasks;
    int64_t piece; /* tasks of a piece: 1, or so many that 32 bits number all pieces */
    queue of[];
};

static uint64_t run_of(uint64_t first, uint64_t end) { return first << 32 | end; }
static uint64_t first_of(uint64_t run) { return run >> 32; }
static uint64_t end_of(uint64_t run) { return run & UINT32_MAX; }

size_t na_queues_bytes(int64_t workers)
{
    return sizeof(na_queues) + (size_t)workers * sizeof(queue);
}

void na_queues_fill(na_queues *q, int64_t workers, int64_t tasks)
{
    q->workers = workers;
    q->tasks = tasks;
    q->piece = tasks / UINT32_MAX + 1;
    const int64_t pieces = (tasks + q->piece - 1) / q->piece;
    for (int64_t w = 0; w < workers; w++) {
        atomic_init(&q->of[w].left, run_of((uint64_t)(pieces * w / workers),
                                           (uint64_t)(pieces * (w + 1) / workers)));
        atomic_init(&q->of[w].begun, 0);
    }
}

void na_parallel_tasks(const natten_run *run, na_queues *queues, int64_t workers, int64_t tasks,
                       natten_task body, void *context)
{
    na_queues_fill(queues, workers, tasks);
    na_parallel(run, workers, body, context);
}

na_turn na_turn_of(na_queues *queues, int64_t worker)
{
    atomic_store_explicit(&queues->of[worker].begun, 1, memory_order_relaxed);
    return (na_turn){queues, worker, -1, 0};
}

/* The worker whose run is the longest; -1: nothing is left of any. */
static int64_t longest(na_queues *q, uint64_t *run)
{
    int64_t found = -1;
    uint64_t most = 0;
    for (int64_t w = 0; w < q->workers; w++) {
        const uint64_t left = atomic_load_explicit(&q->of[w].left, memory_order_relaxed);
        if (end_of(left) - first_of(left) > most) {
            most = end_of(left) - first_of(left);
            found = w;
            *run = left;
        }
    }
    return found;
}

/* Takes over the back half of the longest run, or all of it if its worker is not there yet: his
 * thread may be the one that does this. 0: nothing is left. */
static int steal(na_queues *q, int64_t worker)
{
    uint64_t run;
    for (int64_t w; (w = longest(q, &run)) >= 0;) {
        const int begun = atomic_load_explicit(&q->of[w].begun, memory_order_relaxed);
        const uint64_t middle = begun ? (first_of(run) + end_of(run)) / 2 : first_of(run);
        if (!atomic_compare_exchange_strong_explicit(&q->of[w].left, &run,
                                                     run_of(first_of(run), middle),
                                                     memory_order_relaxed, memory_order_relaxed))
            continue;
        atomic_store_explicit(&q->of[worker].left, run_of(middle, end_of(run)),
                              memory_order_relaxed);
        return 1;
    }
    return 0;
}

/* Takes the first piece of the worker's own run; 0: it is empty. */
static int take(na_turn *turn)
{
    na_queues *q = turn->queues;
    atomic_uint_fast64_t *left = &q->of[turn->worker].left;
    uint64_t run = atomic_load_explicit(left, memory_order_relaxed);
    do {
        if (first_of(run) == end_of(run))
            return 0;
    } while (!atomic_compare_exchange_weak_explicit(left, &run,
                                                    run_of(first_of(run) + 1, end_of(run)),
                                                    memory_order_relaxed, memory_order_relaxed));
    turn->task = (int64_t)first_of(run) * q->piece;
    turn->end = turn->task + q->piece < q->tasks ? turn->task + q->piece : q->tasks;
    return 1;
}

int na_turn_next(na_turn *turn)
{
    if (++turn->task < turn->end)
        return 1;
    do {
        if (take(turn))
            return 1;
    } while (steal(turn->queues, turn->worker));
    return 0;
}

int64_t na_turn_ahead(const na_turn *turn)
{
    const na_queues *q = turn->queues;
    if (turn->task + 1 < turn->end)
        return turn->task + 1;
    const uint64_t run = atomic_load_explicit(&q->of[turn->worker].left, memory_order_relaxed);
    return first_of(run) < end_of(run) ? (int64_t)first_of(run) * q->piece : -1;
}
