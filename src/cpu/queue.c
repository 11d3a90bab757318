/* SPDX-License-Identifier: MIT */
#include "cpu/queue.h"

#include <stdatomic.h>

/* What is left of a worker's run, in pieces: first << 32 | end. On a cache line of its own. */
typedef struct queue {
    _Alignas(64) atomic_uint_fast64_t left;
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

void na_queues_fill(na_queues *s, int64_t workers, int64_t tasks)
{
    s->workers = workers;
    s->tasks = tasks;
    s->piece = tasks / UINT32_MAX + 1;
    const int64_t pieces = (tasks + s->piece - 1) / s->piece;
    for (int64_t w = 0; w < workers; w++)
        atomic_init(&s->of[w].left, run_of((uint64_t)(pieces * w / workers),
                                           (uint64_t)(pieces * (w + 1) / workers)));
}

na_turn na_turn_of(na_queues *queues, int64_t worker) { return (na_turn){queues, worker, -1, 0}; }

/* The worker whose run is the longest; -1: nothing is left of any. */
static int64_t longest(na_queues *s, uint64_t *run)
{
    int64_t found = -1;
    uint64_t most = 0;
    for (int64_t w = 0; w < s->workers; w++) {
        const uint64_t left = atomic_load_explicit(&s->of[w].left, memory_order_relaxed);
        if (end_of(left) - first_of(left) > most) {
            most = end_of(left) - first_of(left);
            found = w;
            *run = left;
        }
    }
    return found;
}

/* Takes over the back half of the longest run; 0: nothing is left. */
static int steal(na_queues *s, int64_t worker)
{
    uint64_t run;
    for (int64_t w; (w = longest(s, &run)) >= 0;) {
        const uint64_t middle = (first_of(run) + end_of(run)) / 2;
        if (!atomic_compare_exchange_strong_explicit(&s->of[w].left, &run,
                                                     run_of(first_of(run), middle),
                                                     memory_order_relaxed, memory_order_relaxed))
            continue;
        atomic_store_explicit(&s->of[worker].left, run_of(middle, end_of(run)),
                              memory_order_relaxed);
        return 1;
    }
    return 0;
}

/* Takes the first piece of the worker's own run; 0: it is empty. */
static int take(na_turn *turn)
{
    na_queues *s = turn->queues;
    atomic_uint_fast64_t *left = &s->of[turn->worker].left;
    uint64_t run = atomic_load_explicit(left, memory_order_relaxed);
    do {
        if (first_of(run) == end_of(run))
            return 0;
    } while (!atomic_compare_exchange_weak_explicit(left, &run,
                                                    run_of(first_of(run) + 1, end_of(run)),
                                                    memory_order_relaxed, memory_order_relaxed));
    turn->task = (int64_t)first_of(run) * s->piece;
    turn->end = turn->task + s->piece < s->tasks ? turn->task + s->piece : s->tasks;
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
    const na_queues *s = turn->queues;
    if (turn->task + 1 < turn->end)
        return turn->task + 1;
    const uint64_t run = atomic_load_explicit(&s->of[turn->worker].left, memory_order_relaxed);
    return first_of(run) < end_of(run) ? (int64_t)first_of(run) * s->piece : -1;
}
