/* SPDX-License-Identifier: MIT
 * Memory that will be wanted soon, fetched bit by bit during other work. Rows of tokens with other
 * heads' tokens in between are nothing that processors foresee by themselves.
 * Parameters: WHOLE_LINES. */

enum { AHEAD_RUNS = 128 };

/* Some processors foresee long tokens by themselves when they are packed by whole lines: asking for
 * them then costs 3 to 6 % where a token has 512 bytes, and is worth its while up to 384. */
static int ahead_foreseen(int64_t bytes)
{
#ifdef WHOLE_LINES
    return bytes > 384 && na_cpu_foresees();
#else
    return (void)bytes, 0;
#endif
}

/* Pieces of so many bytes, `step` bytes apart. */
typedef struct ahead_run {
    const char *at;
    int64_t step;
    int bytes, left;
} ahead_run;

typedef struct ahead {
    int count, next; /* next: the first run with pieces left */
    int64_t pieces;
    int quota; /* pieces to be fetched each time */
    ahead_run run[AHEAD_RUNS];
} ahead;

static void ahead_clear(ahead *a)
{
    a->count = a->next = a->quota = 0;
    a->pieces = 0;
}

static void ahead_add(ahead *a, const char *at, int64_t step, int64_t bytes, int pieces)
{
    if (a->count == AHEAD_RUNS || ahead_foreseen(bytes))
        return;
    a->run[a->count++] = (ahead_run){at, step, (int)bytes, pieces};
    a->pieces += pieces;
}

/* So that all are fetched in this many times. */
static void ahead_share(ahead *a, int64_t times)
{
    a->quota = (int)((a->pieces + times - 1) / times);
}

static void ahead_fetch(ahead *a, int some)
{
    while (some > 0 && a->next < a->count) {
        ahead_run *run = &a->run[a->next];
        const int pieces = some < run->left ? some : run->left, bytes = run->bytes;
        const char *at = run->at;
        for (int n = 0; n < pieces; n++, at += run->step)
            for (int i = 0; i < bytes; i += 64)
                __builtin_prefetch(at + i, 0, 2);
        run->at = at;
        run->left -= pieces;
        some -= pieces;
        a->next += run->left == 0;
    }
}
