/* SPDX-License-Identifier: MIT
 * Threads of a block as fibres of one system thread. A fibre runs until it has to wait; then the
 * next is drawn from those that can run, and from what the hardware still has to do. */
#define _GNU_SOURCE
#undef _FORTIFY_SOURCE /* its longjmp refuses to leave a stack for another */
#include "fibre.h"

#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

#include "host.h"

enum {
    FIBRES = 1024,
    BARRIERS = 16,
    EVENTS = 4096,
    EVENT_BYTES = 512,
    STACK = 1 << 18,
    REGISTERS = 65536, /* of a multiprocessor */
    LATEST = 100,      /* how often a late event is put off */
    GIVE = 64,         /* bytes a thread may give to an exchange */
    PATIENCE = 4 << 20 /* yields in a row without anything else happening */
};

typedef struct fibre {
    jmp_buf at;
    char *stack;
    const char *waits_for;
    int started, done;
} fibre;

/* What the threads of a warp or warpgroup give lies in `given` until their next exchange but one.
 */
typedef struct gathering {
    const char *word;
    int come, turn;
    size_t bytes;
    _Alignas(16) char given[2][128 * GIVE];
} gathering;

typedef struct event {
    void (*act)(void *);
    int put_off;
    _Alignas(16) char context[EVENT_BYTES];
} event;

static pthread_mutex_t one_launch = PTHREAD_MUTEX_INITIALIZER;
static const fibre_launch *launch;
static fibre fibres[FIBRES];
static int current, alive;
static int64_t block;
static char *shared, *shared_map;
static size_t shared_map_bytes;
static uint64_t random_state;
static long yields;
static int registers; /* what threads of the block said they keep, together */

static gathering warps[FIBRES / 32], groups[FIBRES / 128];
static struct {
    int come, waiting[FIBRES], waiters;
} barriers[BARRIERS];

/* Fibres that can run, and FIBRES + i for event i. */
static int ready[FIBRES + EVENTS], ready_count;
static event events[EVENTS];
static int free_events[EVENTS], free_event_count;

static jmp_buf scheduler;
static ucontext_t starter;
static char fault_text[512];
static int faulted;

static uint32_t draw(uint32_t below)
{
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return (uint32_t)((random_state >> 32) * below >> 32);
}

int na_host_thread(void) { return current; }
int na_host_threads(void) { return launch->threads; }
int64_t na_host_block(void) { return block; }
int64_t na_host_blocks(void) { return launch->blocks; }
void *na_host_shared(void) { return shared; }
size_t na_host_shared_bytes(void) { return launch->shared_bytes; }

void na_host_fault(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    int length = snprintf(fault_text, sizeof fault_text,
                          "block %lld, thread %d: ", (long long)block, current);
    vsnprintf(fault_text + length, sizeof fault_text - (size_t)length, format, arguments);
    va_end(arguments);
    faulted = 1;
    _longjmp(scheduler, 1);
}

static void make_ready(int what) { ready[ready_count++] = what; }

/* Leaves the fibre until somebody makes it ready. */
static void leave(const char *waits_for)
{
    fibres[current].waits_for = waits_for;
    if (!_setjmp(fibres[current].at))
        _longjmp(scheduler, 1);
}

void na_host_yield(void)
{
    if (++yields > PATIENCE)
        na_host_fault("everybody waits and nothing happens");
    make_ready(current);
    leave("its turn");
}

const void *na_host_exchange(const char *word, int first, int count, const void *give, size_t bytes)
{
    if ((count != 32 && count != 128) || first % count || bytes > GIVE)
        na_host_fault("%s is no exchange of a warp or a warpgroup", word);
    gathering *g = count == 32 ? &warps[first / 32] : &groups[first / 128];
    if (g->come && ((g->word != word && strcmp(g->word, word)) || g->bytes != bytes))
        na_host_fault("comes to %s while others of its warp are at %s", word, g->word);
    char *given = g->given[g->turn];
    memcpy(given + (size_t)(current - first) * bytes, give, bytes);
    g->word = word;
    g->bytes = bytes;
    yields = 0;
    if (++g->come < count) {
        leave(word);
        return given;
    }
    g->come = 0;
    g->turn ^= 1;
    for (int i = first; i < first + count; i++)
        if (i != current)
            make_ready(i);
    return given;
}

/* One more has come; releases the waiters if it was the last. */
static int come(int id, int count)
{
    yields = 0;
    if (id < 0 || id >= BARRIERS || count < 1 || count > launch->threads || count % 32)
        na_host_fault("there is no barrier %d of %d threads", id, count);
    if (++barriers[id].come < count)
        return 0;
    for (int i = 0; i < barriers[id].waiters; i++)
        make_ready(barriers[id].waiting[i]);
    barriers[id].come = barriers[id].waiters = 0;
    return 1;
}

void na_host_barrier(int id, int count)
{
    if (come(id, count))
        return;
    barriers[id].waiting[barriers[id].waiters++] = current;
    leave("a barrier");
}

void na_host_arrive(int id, int count) { come(id, count); }

void na_host_keep_registers(int count)
{
    const int each = REGISTERS / launch->threads / 8 * 8;
    registers += count;
    if (registers > each * launch->threads)
        na_host_fault("threads want more registers than the %d x %d that a block is launched with",
                      launch->threads, each);
}

void na_host_later(void (*act)(void *), const void *context, size_t bytes)
{
    if (!free_event_count || bytes > EVENT_BYTES)
        na_host_fault("too much is under way");
    int i = free_events[--free_event_count];
    events[i].act = act;
    /* Some come late: whoever does not wait for them is found out. */
    events[i].put_off = draw(8) ? 0 : (int)draw(LATEST);
    memcpy(events[i].context, context, bytes);
    make_ready(FIBRES + i);
}

static void body(void)
{
    launch->kernel(launch->parameters);
    fibres[current].done = 1;
    alive--;
    _longjmp(scheduler, 1);
}

static void start(fibre *f)
{
    static ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = f->stack;
    context.uc_stack.ss_size = STACK;
    context.uc_link = NULL;
    makecontext(&context, body, 0);
    f->started = 1;
    swapcontext(&starter, &context);
}

static void prepare_block(void)
{
    memset(shared_map, 0xff, shared_map_bytes);
    memset(warps, 0, sizeof warps);
    memset(groups, 0, sizeof groups);
    memset(barriers, 0, sizeof barriers);
    ready_count = 0;
    free_event_count = EVENTS;
    for (int i = 0; i < EVENTS; i++)
        free_events[i] = i;
    alive = launch->threads;
    yields = registers = 0;
    for (int i = 0; i < launch->threads; i++) {
        fibres[i].started = fibres[i].done = 0;
        make_ready(i);
    }
}

/* What the fibres that are left wait for. */
static void report_deadlock(void)
{
    int i = 0;
    while (i < launch->threads - 1 && fibres[i].done)
        i++;
    snprintf(fault_text, sizeof fault_text,
             "block %lld: %d threads wait for ever, thread %d of them for %s", (long long)block,
             alive, i, fibres[i].waits_for);
    faulted = 1;
}

static void run_block(void)
{
    prepare_block();
    /* Fibres come back here, wherever they were. */
    _setjmp(scheduler);
    while (!faulted && (alive || ready_count)) {
        if (!ready_count) {
            report_deadlock();
            return;
        }
        int i = (int)draw((uint32_t)ready_count), what = ready[i];
        ready[i] = ready[--ready_count];
        if (what >= FIBRES && events[what - FIBRES].put_off && ready_count) {
            events[what - FIBRES].put_off--;
            make_ready(what);
            continue;
        }
        if (what >= FIBRES) {
            event now = events[what - FIBRES];
            free_events[free_event_count++] = what - FIBRES;
            yields = 0;
            now.act(now.context);
            continue;
        }
        current = what;
        if (fibres[current].started)
            _longjmp(fibres[current].at, 1);
        start(&fibres[current]);
    }
}

static int allocate(void)
{
    size_t page = 4096;
    shared_map_bytes = (launch->shared_bytes + 1023) / 1024 * 1024;
    shared_map_bytes = (shared_map_bytes + page - 1) / page * page;
    shared_map = mmap(NULL, shared_map_bytes + page, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (shared_map == MAP_FAILED)
        return 0;
    mprotect(shared_map + shared_map_bytes, page, PROT_NONE);
    /* The end of the last full 1024 bytes lies before the forbidden page. */
    shared = shared_map + shared_map_bytes - (launch->shared_bytes + 1023) / 1024 * 1024;
    for (int i = 0; i < launch->threads; i++)
        if (!fibres[i].stack) {
            fibres[i].stack = mmap(NULL, STACK, PROT_READ | PROT_WRITE,
                                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
            if (fibres[i].stack == MAP_FAILED)
                return 0;
        }
    return 1;
}

const char *fibre_run(const fibre_launch *what)
{
    pthread_mutex_lock(&one_launch);
    launch = what;
    random_state = launch->seed * 0x9e3779b97f4a7c15u + 1;
    faulted = 0;
    const char *fault = allocate() ? NULL : "no memory for a block";
    for (block = 0; !fault && block < launch->blocks; block++) {
        run_block();
        if (faulted)
            fault = fault_text;
    }
    munmap(shared_map, shared_map_bytes + 4096);
    pthread_mutex_unlock(&one_launch);
    return fault;
}
