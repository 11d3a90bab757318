/* SPDX-License-Identifier: MIT
 * A pool of threads that help whoever calls. The caller works on its own job too, so a job gets
 * done even if no helper is free, or none could be started. */
#if defined(__linux__)
#define _GNU_SOURCE
#endif
#include "cpu/threads.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <time.h>
#include <unistd.h>

#include "core/lock.h"
#include "core/status.h"

typedef struct job {
    natten_task task;
    void *context;
    int64_t workers, claimed; /* claimed: under the lock */
    atomic_int_fast64_t done;
    struct job *next;
} job;

/* All under NA_LOCK_POOL, but `posted` may be read without. */
static struct {
    job *jobs; /* those with unclaimed workers */
    int64_t helpers;
    pid_t process; /* whose helpers they are: a forked child has none */
    atomic_uint posted;
} pool;
static pthread_cond_t work_posted = PTHREAD_COND_INITIALIZER;
static pthread_cond_t work_done = PTHREAD_COND_INITIALIZER;
static atomic_int_fast64_t thread_count;

enum { most_threads = 4096 };

/* Waking a thread costs more than a small problem, so threads watch for a moment before they sleep.
 * Never longer: they may be in somebody's way. */
static const int64_t watch_nanoseconds = 50000;

static int64_t nanoseconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

static void pause_briefly(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* Takes a worker's number from a job, and the job off the list with its last one. Under the lock.
 */
static int64_t claim(job *j)
{
    int64_t worker = j->claimed++;
    if (j->claimed < j->workers)
        return worker;
    for (job **link = &pool.jobs; *link; link = &(*link)->next)
        if (*link == j) {
            *link = j->next;
            break;
        }
    return worker;
}

/* Does one worker's part; the lock is held before and after, not meanwhile. */
static void work_on(job *j)
{
    int64_t worker = claim(j);
    na_lock_give(NA_LOCK_POOL);
    j->task(j->context, worker);
    na_lock_take(NA_LOCK_POOL);
    /* The caller may be gone as soon as it can see the last worker done: j is not touched after. */
    int last = j->workers == atomic_load(&j->done) + 1;
    atomic_fetch_add(&j->done, 1);
    if (last)
        pthread_cond_broadcast(&work_done);
}

static void watch_for_work(void)
{
    unsigned seen = atomic_load(&pool.posted);
    int64_t until = nanoseconds() + watch_nanoseconds;
    na_lock_give(NA_LOCK_POOL);
    while (atomic_load(&pool.posted) == seen && nanoseconds() < until)
        pause_briefly();
    na_lock_take(NA_LOCK_POOL);
}

static void *help(void *unused)
{
    (void)unused;
    na_lock_take(NA_LOCK_POOL);
    for (;;) {
        if (!pool.jobs)
            watch_for_work();
        while (!pool.jobs)
            na_lock_wait(NA_LOCK_POOL, &work_posted);
        work_on(pool.jobs);
    }
    return NULL;
}

/* Starts helpers until there are enough, or no more can be had. Under the lock. */
static void hire(int64_t helpers)
{
    if (pool.process != getpid()) {
        static const pthread_cond_t fresh = PTHREAD_COND_INITIALIZER;
        work_posted = work_done = fresh;
        pool.process = getpid();
        pool.jobs = NULL;
        pool.helpers = 0;
    }
    pthread_attr_t attributes;
    if (pool.helpers >= helpers || pthread_attr_init(&attributes))
        return;
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    pthread_t thread;
    while (pool.helpers < helpers && !pthread_create(&thread, &attributes, help, NULL))
        pool.helpers++;
    pthread_attr_destroy(&attributes);
}

static void run_in_pool(int64_t workers, natten_task task, void *context)
{
    job j = {.task = task, .context = context, .workers = workers};
    na_lock_take(NA_LOCK_POOL);
    hire(workers - 1);
    j.next = pool.jobs;
    pool.jobs = &j;
    atomic_fetch_add(&pool.posted, 1);
    pthread_cond_broadcast(&work_posted);
    while (j.claimed < j.workers)
        work_on(&j);
    na_lock_give(NA_LOCK_POOL);
    int64_t until = nanoseconds() + watch_nanoseconds;
    while (atomic_load(&j.done) < workers && nanoseconds() < until)
        pause_briefly();
    na_lock_take(NA_LOCK_POOL);
    while (atomic_load(&j.done) < workers)
        na_lock_wait(NA_LOCK_POOL, &work_done);
    na_lock_give(NA_LOCK_POOL);
}

int64_t na_workers(const natten_run *run, int64_t tasks)
{
    int64_t workers = run->threads > 0 ? run->threads : natten_threads();
    if (workers > tasks)
        workers = tasks;
    if (workers > most_threads) /* the pool starts as many as it is asked for */
        workers = most_threads;
    return workers > 1 ? workers : 1;
}

void na_parallel(const natten_run *run, int64_t workers, natten_task task, void *context)
{
    if (workers == 1)
        task(context, 0);
    else if (run->parallel)
        run->parallel(run->pool, workers, task, context);
    else
        run_in_pool(workers, task, context);
}

static int64_t usable_processors(void)
{
#if defined(__linux__)
    cpu_set_t set;
    if (!sched_getaffinity(0, sizeof set, &set))
        return CPU_COUNT(&set);
#endif
    long online = sysconf(_SC_NPROCESSORS_ONLN);
    return online > 0 ? online : 1;
}

int64_t natten_threads(void)
{
    int64_t count = atomic_load(&thread_count);
    if (count == 0) {
        count = usable_processors();
        atomic_store(&thread_count, count);
    }
    return count;
}

natten_status natten_threads_set(int64_t count)
{
    if (count < 1 || count > most_threads)
        return na_fail(NATTEN_ERROR_ARGUMENT, "threads must be 1 to %d, got %lld.", most_threads,
                       (long long)count);
    atomic_store(&thread_count, count);
    return NATTEN_OK;
}
