/* SPDX-License-Identifier: MIT
 * All choices of a problem take turns, so that all see the same machine; one is better than choice
 * 0 if it is in most rounds. */
#include "tune.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "core/kernel.h"
#include "core/lock.h"
#include "core/log.h"
#include "cpu/cpuid.h"
#include "cpu/threads.h"
#include "cuda/device.h"
#include "cuda/timer.h"
#include "tuned.h"

enum { MOST_CALLS = 64, MOST_STEPS = 1 << 20 };

/* A sample is at least so long. A choice this much slower than the best, at first, is dropped; it
 * must take at most this part of choice 0's time to replace it. */
static const double sample_seconds = 1e-4, hopeless = 1.25, better = 0.98;

atomic_int na_tunes[NATTEN_OPS];
static natten_tuning settings[NATTEN_OPS]; /* under NA_LOCK_TUNED */

/* The process in which a thread is tuning. Others would only disturb the clock; a forked child has
 * no such thread. */
static atomic_long busy;

/* ----------------------------------------------------------------------------------------------
 * timing */

typedef struct candidate {
    natten_plan *plan;
    int64_t choice;
    double first;         /* seconds of its first timed call */
    double *seconds;      /* of each round */
    double median, ratio; /* ratio: to choice 0's time of the same round, the median */
} candidate;

typedef struct contest {
    const natten_run *run;
    natten_tuning tuning;
    candidate *all; /* all[0] is choice 0 */
    int64_t count;
    int64_t calls; /* of a sample */
    double *room;
} contest;

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

/* Seconds of one call, from several. */
static natten_status sample(const natten_plan *plan, const natten_run *run, int64_t calls,
                            double *seconds)
{
    const int on_gpu = plan->problem.device == NATTEN_CUDA;
    natten_status status = NATTEN_OK;
    na_timer timer;
    if (on_gpu)
        status = na_timer_start(&timer, (int)plan->problem.device_index, run->stream);
    if (status != NATTEN_OK)
        return status;
    const double from = now();
    for (int64_t i = 0; i < calls && status == NATTEN_OK; i++)
        status = natten_plan_run(plan, run);
    *seconds = now() - from;
    if (on_gpu) {
        natten_status stopped = na_timer_stop(&timer, seconds);
        status = status == NATTEN_OK ? stopped : status;
    }
    *seconds /= (double)calls;
    return status;
}

/* Whether a choice can differ from choice 0 in this run, and has what it needs. */
static int may_run(const natten_plan *plan, const natten_plan *usual, const natten_run *run)
{
    if (plan->kernel != usual->kernel || plan->workspace > usual->workspace)
        return 0;
    return !plan->most_workers || plan->most_workers < na_workers(run, INT64_MAX);
}

/* Plans a choice and times a first call of it; one->plan stays NULL if it cannot take part. */
static natten_status enter(contest *c, const natten_problem *problem, candidate *one)
{
    double ignored;
    natten_status status = natten_plan_create(problem, NULL, &one->plan);
    const int may = status == NATTEN_OK && may_run(one->plan, c->all[0].plan, c->run);
    one->choice = problem->choice;
    if (may)
        status = sample(one->plan, c->run, 1, &ignored);
    if (may && status == NATTEN_OK)
        status = sample(one->plan, c->run, 1, &one->first);
    if (may && status == NATTEN_OK) {
        na_log(NA_LOG_PROGRESS, "choice %lld (%s): %.1f us", (long long)one->choice,
               one->plan->choice, one->first * 1e6);
        return NATTEN_OK;
    }
    natten_plan_destroy(one->plan);
    one->plan = NULL;
    return status;
}

/* A first call of each choice; the hopeless ones are dropped, all others warmed up. */
static natten_status gather(contest *c, const natten_problem *problem, int64_t choices)
{
    natten_problem p = *problem;
    double best = 0, ignored;
    int64_t kept = 1;
    for (p.choice = 0; p.choice <= choices; p.choice++) {
        candidate *one = &c->all[c->count];
        natten_status status = enter(c, &p, one);
        if (!one->plan && p.choice == 0)
            return status;
        if (!one->plan)
            continue;
        best = best > 0 && best < one->first ? best : one->first;
        const int drops = p.choice && !c->tuning.thorough && one->first > hopeless * best;
        if (drops)
            natten_plan_destroy(one->plan);
        c->count += !drops;
    }
    /* Those that were tried before the best was. */
    for (int64_t i = 1; i < c->count; i++)
        if (c->tuning.thorough || c->all[i].first <= hopeless * best) {
            double *seconds = c->all[kept].seconds;
            c->all[kept] = c->all[i];
            c->all[kept++].seconds = seconds;
        } else {
            natten_plan_destroy(c->all[i].plan);
        }
    c->count = kept;
    c->calls = best < sample_seconds ? (int64_t)(sample_seconds / (best + 1e-9)) + 1 : 1;
    c->calls = c->calls < MOST_CALLS ? c->calls : MOST_CALLS;
    for (int64_t i = 0; i < c->count; i++)
        for (int64_t j = 2; j < c->tuning.warmups; j++)
            if (sample(c->all[i].plan, c->run, 1, &ignored) != NATTEN_OK)
                return NATTEN_ERROR_DEVICE;
    return NATTEN_OK;
}

static natten_status race(contest *c)
{
    for (int64_t round = 0; round < c->tuning.rounds; round++)
        for (int64_t i = 0; i < c->count; i++) {
            candidate *one = &c->all[(i + round) % c->count];
            natten_status status = sample(one->plan, c->run, c->calls, &one->seconds[round]);
            if (status != NATTEN_OK)
                return status;
        }
    return NATTEN_OK;
}

static int ascending(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median(double *values, int64_t count)
{
    qsort(values, (size_t)count, sizeof *values, ascending);
    return (values[(count - 1) / 2] + values[count / 2]) / 2;
}

/* The number of the winner. */
static int64_t judge(contest *c)
{
    const int64_t rounds = c->tuning.rounds;
    int64_t winner = 0;
    for (int64_t i = 0; i < c->count; i++) {
        candidate *one = &c->all[i];
        for (int64_t r = 0; r < rounds; r++)
            c->room[r] = one->seconds[r] / (c->all[0].seconds[r] + 1e-12);
        one->ratio = median(c->room, rounds);
        memcpy(c->room, one->seconds, (size_t)rounds * sizeof *c->room);
        one->median = median(c->room, rounds);
        if (i && one->ratio <= better && one->median <= better * c->all[0].median &&
            (!winner || one->ratio < c->all[winner].ratio))
            winner = i;
    }
    return winner;
}

static natten_status compete(contest *c, const natten_problem *problem, na_record *record,
                             const char *device)
{
    natten_plan *usual;
    natten_problem p = *problem;
    p.choice = 0;
    natten_status status = natten_plan_create(&p, NULL, &usual);
    if (status != NATTEN_OK)
        return status;
    na_record_init(record, usual, device);
    const int64_t choices = usual->choices, rounds = c->tuning.rounds;
    natten_plan_destroy(usual);
    c->all = calloc((size_t)choices + 1, sizeof *c->all);
    c->room = calloc((size_t)((choices + 2) * rounds), sizeof *c->room);
    if (!c->all || !c->room)
        return na_fail(NATTEN_ERROR_MEMORY, "No memory to tune.");
    for (int64_t i = 0; i <= choices; i++)
        c->all[i].seconds = c->room + (i + 1) * rounds;
    na_log(NA_LOG_PROGRESS, "Tuning %s on %s: %lld choices.", record->problem, device,
           (long long)choices + 1);
    status = gather(c, problem, choices);
    if (status == NATTEN_OK)
        status = race(c);
    if (status != NATTEN_OK)
        return status;
    const candidate *winner = &c->all[judge(c)];
    record->tuned = (natten_tuned){winner->choice, choices, winner->median, c->all[0].median};
    snprintf(record->choice, sizeof record->choice, "%s", winner->plan->choice);
    na_log(NA_LOG_RESULT, "Tuned %s: choice %lld of %lld (%s), %.1f us; choice 0 takes %.1f us.",
           record->problem, (long long)winner->choice, (long long)choices, record->choice,
           winner->median * 1e6, c->all[0].median * 1e6);
    return NATTEN_OK;
}

/* Tunes and remembers. */
static natten_status tune(const natten_problem *problem, const natten_run *run,
                          const natten_tuning *tuning, const char *device, na_record *record)
{
    contest c = {.run = run, .tuning = *tuning};
    natten_status status = compete(&c, problem, record, device);
    for (int64_t i = 0; i < c.count; i++)
        natten_plan_destroy(c.all[i].plan);
    free(c.all);
    free(c.room);
    if (status == NATTEN_OK)
        na_tuned_keep(record);
    return status;
}

/* ----------------------------------------------------------------------------------------------
 * when */

static int begin(void)
{
    long other = atomic_load(&busy);
    return other != (long)getpid() && atomic_compare_exchange_strong(&busy, &other, (long)getpid());
}

static void end(void) { atomic_store(&busy, 0); }

static int may_wait(const natten_plan *plan, const natten_run *run)
{
    const natten_problem *p = &plan->problem;
    return p->device != NATTEN_CUDA || na_timer_may_wait((int)p->device_index, run->stream);
}

static void device_name(natten_plan *plan, char *name, size_t size)
{
    const na_device *device;
    if (plan->problem.device != NATTEN_CUDA)
        na_cpu_name(name, size);
    else if (na_device_of(plan, &device) == NATTEN_OK)
        snprintf(name, size, "%s", device->name);
    else
        snprintf(name, size, "no device");
}

static natten_status check(const natten_tuning *t, int64_t least_rounds)
{
    if (t->warmups < 0 || t->warmups > MOST_STEPS)
        return na_fail(NATTEN_ERROR_ARGUMENT, "warmups must be 0 to %d, got %lld.", MOST_STEPS,
                       (long long)t->warmups);
    if (t->rounds < least_rounds || t->rounds > MOST_STEPS)
        return na_fail(NATTEN_ERROR_ARGUMENT, "rounds must be %d to %d, got %lld.",
                       (int)least_rounds, MOST_STEPS, (long long)t->rounds);
    return NATTEN_OK;
}

natten_status natten_tune(const natten_problem *problem, const natten_run *run,
                          const natten_tuning *tuning, natten_tuned *tuned)
{
    na_entry *entry;
    na_record record;
    char device[64];
    if (!problem || !run || !tuning)
        return na_fail(NATTEN_ERROR_ARGUMENT,
                       "natten_tune needs a problem, a run and a tuning, got NULL.");
    natten_status status = check(tuning, 1);
    if (status == NATTEN_OK)
        status = na_table_take(problem, &entry);
    if (status != NATTEN_OK)
        return status;
    device_name(entry->plan, device, sizeof device);
    if (!may_wait(entry->plan, run))
        status = na_fail(NATTEN_ERROR_ARGUMENT, "A stream that is captured cannot be tuned on.");
    else if (!begin())
        status = na_fail(NATTEN_ERROR_ARGUMENT, "Another thread is tuning.");
    else {
        status = tune(problem, run, tuning, device, &record);
        end();
    }
    na_table_give(entry);
    if (status != NATTEN_OK)
        return status;
    na_table_forget();
    if (tuned)
        *tuned = record.tuned;
    return NATTEN_OK;
}

natten_status natten_autotune(natten_op op, const natten_tuning *tuning)
{
    if ((unsigned)op >= NATTEN_OPS)
        return na_fail(NATTEN_ERROR_ARGUMENT, "There is no op %d to tune.", (int)op);
    natten_status status = tuning ? check(tuning, 0) : NATTEN_OK;
    if (status != NATTEN_OK)
        return status;
    na_lock_take(NA_LOCK_TUNED);
    settings[op] = tuning ? *tuning : (natten_tuning){0};
    na_lock_give(NA_LOCK_TUNED);
    atomic_store(&na_tunes[op], tuning != NULL);
    na_table_forget();
    return NATTEN_OK;
}

natten_status natten_tuned_import(const char *text)
{
    natten_status status = na_tuned_read(text);
    na_table_forget();
    return status;
}

void natten_tuned_clear(void)
{
    na_tuned_clear();
    na_table_forget();
}

/* Finds a record, or makes one; 0: neither, and *again says whether a later call may. */
static int obtain(na_entry *entry, const natten_run *run, na_record *record, int *again)
{
    natten_tuning tuning;
    char device[64];
    na_lock_take(NA_LOCK_TUNED);
    tuning = settings[entry->problem.op];
    na_lock_give(NA_LOCK_TUNED);
    device_name(entry->plan, device, sizeof device);
    na_record_init(record, entry->plan, device);
    if (tuning.rounds)
        na_tuned_load(device);
    if (na_tuned_find(record))
        return 1;
    *again = tuning.rounds > 0;
    if (!tuning.rounds || !run || na_device_is_rehearsed() || !may_wait(entry->plan, run) ||
        !begin())
        return 0;
    const int tuned = tune(&entry->problem, run, &tuning, device, record) == NATTEN_OK;
    end();
    *again = tuned;
    if (tuned && !na_tuned_save(device))
        na_log(NA_LOG_PROGRESS, "The choice could not be kept in a file.");
    return tuned;
}

/* The plan of a remembered choice; the entry's if it is not what it was. */
static natten_plan *make(const na_entry *entry, const na_record *record)
{
    natten_problem p = entry->problem;
    natten_plan *plan;
    p.choice = record->tuned.choice;
    if (!p.choice || natten_plan_create(&p, NULL, &plan) != NATTEN_OK)
        return entry->plan;
    if (!strcmp(plan->choice, record->choice) && plan->kernel == entry->plan->kernel &&
        plan->workspace <= entry->plan->workspace)
        return plan;
    natten_plan_destroy(plan);
    return entry->plan;
}

const natten_plan *na_tuned_plan_of(na_entry *entry, const natten_run *run)
{
    natten_plan *tuned = atomic_load_explicit(&entry->tuned, memory_order_acquire), *none = NULL;
    na_record record;
    int again = 0;
    if (tuned)
        return tuned;
    if (entry->problem.choice || !entry->plan->choices)
        tuned = entry->plan;
    else if (obtain(entry, run, &record, &again))
        tuned = make(entry, &record);
    else if (again)
        return entry->plan;
    else
        tuned = entry->plan;
    if (atomic_compare_exchange_strong(&entry->tuned, &none, tuned))
        return tuned;
    if (tuned != entry->plan)
        natten_plan_destroy(tuned);
    return none;
}
