/* SPDX-License-Identifier: MIT */
#include "core/lock.h"

static pthread_mutex_t mutexes[NA_LOCKS] = {PTHREAD_MUTEX_INITIALIZER, PTHREAD_MUTEX_INITIALIZER,
                                            PTHREAD_MUTEX_INITIALIZER, PTHREAD_MUTEX_INITIALIZER,
                                            PTHREAD_MUTEX_INITIALIZER};
static pthread_once_t once = PTHREAD_ONCE_INIT;

static void take_all(void)
{
    for (int i = 0; i < NA_LOCKS; i++)
        pthread_mutex_lock(&mutexes[i]);
}

static void give_all(void)
{
    for (int i = NA_LOCKS; i-- > 0;)
        pthread_mutex_unlock(&mutexes[i]);
}

static void watch_forks(void) { pthread_atfork(take_all, give_all, give_all); }

void na_lock_take(na_lock lock)
{
    pthread_once(&once, watch_forks);
    pthread_mutex_lock(&mutexes[lock]);
}

void na_lock_give(na_lock lock) { pthread_mutex_unlock(&mutexes[lock]); }

void na_lock_wait(na_lock lock, pthread_cond_t *condition)
{
    pthread_cond_wait(condition, &mutexes[lock]);
}
