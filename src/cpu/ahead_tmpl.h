/* SPDX-License-Identifier: MIT
 * Memory that will be wanted soon, fetched bit by bit during other work. Rows of tokens with other
 * heads' tokens in between are nothing that processors foresee by themselves.
 * Parameters: WHOLE_LINES. */

enum { AHEAD_RUNS = 128 };

/* Where it goes. A Zen 5 takes 1 to 8 % less time if longer tokens come to the first level. The
 * longest, if it packs whole lines, are best fetched while those before them are packed
 * (packed_of): asking for them earlier costs 3 to 6 % where they have 512 bytes. Else all is
 * fetched to the second level. */
typedef enum ahead_level { AHEAD_NOWHERE, AHEAD_FIRST, AHEAD_SECOND } ahead_level;

static ahead_level ahead_level_of(int64_t bytes)
{
    if (bytes <= 128 || !na_cpu_foresees())
        return AHEAD_SECOND;
#ifdef WHOLE_LINES
    if (bytes > 384)
        return AHEAD_NOWHERE;
#endif
    return AHEAD_FIRST;
}

/* Pieces of so many bytes, `step` bytes apart. */
typedef struct ahead_run {
    const char *at;
    int64_t step;
    int bytes, left;
    ahead_level level;
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
    const ahead_level level = ahead_level_of(bytes);
    if (a->count == AHEAD_RUNS || level == AHEAD_NOWHERE)
        return;
    a->run[a->count++] = (ahead_run){at, step, (int)bytes, pieces, level};
    a->pieces += pieces;
}

/* So that all are fetched in this many times. */
static void ahead_share(ahead *a, int64_t times)
{
    a->quota = (int)((a->pieces + times - 1) / times);
}

static ALWAYS_INLINE const char *fetch_pieces(const ahead_level level, const char *at, int64_t step,
                                              int bytes, int pieces)
{
    for (int n = 0; n < pieces; n++, at += step)
        for (int i = 0; i < bytes; i += 64)
            if (level == AHEAD_FIRST)
                __builtin_prefetch(at + i, 0, 3);
            else
                __builtin_prefetch(at + i, 0, 2);
    return at;
}

static void ahead_fetch(ahead *a, int some)
{
    while (some > 0 && a->next < a->count) {
        ahead_run *run = &a->run[a->next];
        const int pieces = some < run->left ? some : run->left;
        if (__builtin_expect(run->level == AHEAD_SECOND, 1))
            run->at = fetch_pieces(AHEAD_SECOND, run->at, run->step, run->bytes, pieces);
        else
            run->at = fetch_pieces(AHEAD_FIRST, run->at, run->step, run->bytes, pieces);
        run->left -= pieces;
        some -= pieces;
        a->next += run->left == 0;
    }
}
