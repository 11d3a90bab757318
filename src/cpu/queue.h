/* SPDX-License-Identifier: MIT
 * Who does which task of a list. Each worker begins with a run of neighbours, which share packed
 * keys; who has done all of his takes the back half of the longest run that is left, or all of it
 * if its worker has not begun (work stealing: Blumofe and Leiserson, 1999). So a slow processor, or
 * one that is taken away for a while, holds nobody up for longer than a task takes. No result may
 * depend on who does what. */
#ifndef NATTEN_CPU_QUEUE_H
#define NATTEN_CPU_QUEUE_H

#include "natten.h"

typedef struct na_queues na_queues;

/* Bytes that the queues of so many workers take, a multiple of 64. */
size_t na_queues_bytes(int64_t workers);

/* Shares tasks 0 to tasks - 1 out; the queues are memory aligned to 64. */
void na_queues_fill(na_queues *queues, int64_t workers, int64_t tasks);

/* Fills the queues and calls body(context, w) for every worker 0 <= w < workers, as na_parallel. */
void na_parallel_tasks(const natten_run *run, na_queues *queues, int64_t workers, int64_t tasks,
                       natten_task body, void *context);

/* A worker on his way through his tasks. */
typedef struct na_turn {
    na_queues *queues;
    int64_t worker, task, end; /* task: the one at hand; those up to `end` are his, too */
} na_turn;

na_turn na_turn_of(na_queues *queues, int64_t worker);

/* Goes on to the next task; 0: there is none. */
int na_turn_next(na_turn *turn);

/* Which task will come next, unless somebody takes it; -1: another one, or none. */
int64_t na_turn_ahead(const na_turn *turn);

#endif
