/* SPDX-License-Identifier: MIT
 * The library's few locks. A fork takes them all first, so that the child never inherits one that a
 * thread it does not have is holding. */
#ifndef NATTEN_CORE_LOCK_H
#define NATTEN_CORE_LOCK_H

#include <pthread.h>

/* In the order in which a thread may take them. */
typedef enum na_lock {
    NA_LOCK_TUNED,
    NA_LOCK_TABLE,
    NA_LOCK_JIT,
    NA_LOCK_SCRATCH,
    NA_LOCK_POOL,
    NA_LOCKS
} na_lock;

void na_lock_take(na_lock lock);
void na_lock_give(na_lock lock);

/* Gives the lock, waits for the condition, takes the lock again. */
void na_lock_wait(na_lock lock, pthread_cond_t *condition);

#endif
