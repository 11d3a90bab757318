/* SPDX-License-Identifier: MIT */
#include "table.h"

#include <stdlib.h>
#include <string.h>

#include "core/lock.h"

/* Sets of a few ways: a program that alternates between problems of one set still finds them all.
 */
enum { sets = 64, ways = 4 };

static na_entry *table[sets][ways];

static uint64_t mix(uint64_t sum, const natten_problem *problem, size_t word)
{
    uint64_t number;
    memcpy(&number, (const char *)problem + word * sizeof number, sizeof number);
    return (sum ^ number) * 0x9e3779b97f4a7c15u + (sum >> 29);
}

/* Two sums side by side: one alone would wait for its own multiplications. */
static uint64_t hash(const natten_problem *problem)
{
    size_t half = sizeof *problem / sizeof(uint64_t) / 2;
    uint64_t first = 0, second = 0;
    for (size_t i = 0; i < half; i++) {
        first = mix(first, problem, i);
        second = mix(second, problem, i + half);
    }
    return first ^ first >> 32 ^ second << 8 ^ second >> 40;
}

/* Drops a hold on an entry; the last one frees it. Under the lock only the count changes. */
static void drop(na_entry *entry)
{
    na_lock_take(NA_LOCK_TABLE);
    int last = entry && --entry->holders == 0;
    na_lock_give(NA_LOCK_TABLE);
    if (last) {
        natten_plan *tuned = atomic_load(&entry->tuned);
        if (tuned != entry->plan)
            natten_plan_destroy(tuned);
        natten_plan_destroy(entry->plan);
        free(entry);
    }
}

/* Finds the problem in its set, moves it to the front and holds it; NULL if it is not there. */
static na_entry *find(na_entry **set, const natten_problem *problem)
{
    for (int i = 0; i < ways && set[i]; i++) {
        na_entry *entry = set[i];
        if (memcmp(&entry->problem, problem, sizeof *problem))
            continue;
        memmove(set + 1, set, (size_t)i * sizeof *set);
        set[0] = entry;
        entry->holders++;
        return entry;
    }
    return NULL;
}

natten_status na_table_take(const natten_problem *problem, na_entry **result)
{
    if (!problem || problem->size != sizeof *problem) {
        natten_plan *none;
        return natten_plan_create(problem, NULL, &none);
    }
    na_entry **set = table[hash(problem) % sets];
    na_lock_take(NA_LOCK_TABLE);
    *result = find(set, problem);
    na_lock_give(NA_LOCK_TABLE);
    if (*result)
        return NATTEN_OK;
    na_entry *entry = malloc(sizeof *entry);
    if (!entry)
        return na_fail(NATTEN_ERROR_MEMORY, "No memory to keep a plan.");
    entry->problem = *problem;
    entry->holders = 2;
    atomic_init(&entry->tuned, NULL);
    natten_status status = natten_plan_create(problem, NULL, &entry->plan);
    if (status != NATTEN_OK) {
        free(entry);
        return status;
    }
    na_lock_take(NA_LOCK_TABLE);
    na_entry *evicted = set[ways - 1];
    memmove(set + 1, set, (ways - 1) * sizeof *set);
    set[0] = entry;
    na_lock_give(NA_LOCK_TABLE);
    if (evicted)
        drop(evicted);
    *result = entry;
    return NATTEN_OK;
}

void na_table_give(na_entry *entry) { drop(entry); }

void na_table_forget(void)
{
    for (int i = 0; i < sets * ways; i++) {
        na_lock_take(NA_LOCK_TABLE);
        na_entry *entry = table[i / ways][i % ways];
        table[i / ways][i % ways] = NULL;
        na_lock_give(NA_LOCK_TABLE);
        if (entry)
            drop(entry);
    }
}
