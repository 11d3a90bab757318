/* SPDX-License-Identifier: MIT
 * Work on several processors: the caller's threads if the run brings some, else the library's own
 * pool. */
#ifndef NATTEN_CPU_THREADS_H
#define NATTEN_CPU_THREADS_H

#include "natten.h"

/* How many workers a run may use for this many independent tasks: at least 1, at most `tasks`. */
int64_t na_workers(const natten_run *run, int64_t tasks);

/* Calls task(context, w) for every worker 0 <= w < workers and waits for all. Callable from several
 * threads and from inside a forked child. Which tasks a worker does says queue.h; no result may
 * depend on that, or on the number of workers. */
void na_parallel(const natten_run *run, int64_t workers, natten_task task, void *context);

#endif
