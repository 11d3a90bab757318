/* SPDX-License-Identifier: MIT
 * Which weights dropout keeps (docs/spec.md). The only text of the rule, as window.h is of its own.
 *
 * Random bits come from Philox4x32 with 7 rounds (Salmon, Moraes, Dror, Shaw: "Parallel random
 * numbers: as easy as 1, 2, 3", SC 2011, where 7 is the least number of rounds that passes
 * BigCrush): a function of a key and a counter, without state. */
#ifndef NATTEN_CORE_DROPOUT_H
#define NATTEN_CORE_DROPOUT_H

#include <stdint.h>

#include "core/window.h"

enum { NA_PHILOX_ROUNDS = 7 };

#define NA_PHILOX_FACTOR_0 0xd2511f53u
#define NA_PHILOX_FACTOR_1 0xcd9e8d57u
#define NA_PHILOX_WEYL_0 0x9e3779b9u
#define NA_PHILOX_WEYL_1 0xbb67ae85u

typedef struct na_words {
    uint32_t word[4];
} na_words;

NA_INLINE na_words na_philox(uint32_t key0, uint32_t key1, na_words counter)
{
    na_words c = counter;
    for (int i = 0; i < NA_PHILOX_ROUNDS; i++) {
        uint64_t a = (uint64_t)NA_PHILOX_FACTOR_0 * c.word[0];
        uint64_t b = (uint64_t)NA_PHILOX_FACTOR_1 * c.word[2];
        na_words next = {{(uint32_t)(b >> 32) ^ c.word[1] ^ key0, (uint32_t)b,
                          (uint32_t)(a >> 32) ^ c.word[3] ^ key1, (uint32_t)a}};
        c = next;
        key0 += NA_PHILOX_WEYL_0;
        key1 += NA_PHILOX_WEYL_1;
    }
    return c;
}

/* What the queries of one head share that have the same places on axes 0 and 1 (of the whole axes;
 * of three: a 1-D map is the innermost one). */
NA_INLINE na_words na_dropout_row(uint64_t seed, uint64_t offset, int batch, int head, int z, int y)
{
    na_words counter = {
        {(uint32_t)offset, (uint32_t)(offset >> 32), (uint32_t)batch, (uint32_t)head}};
    na_words a = na_philox((uint32_t)seed, (uint32_t)(seed >> 32), counter);
    na_words places = {{(uint32_t)z, (uint32_t)y, a.word[2], a.word[3]}};
    return na_philox(a.word[0], a.word[1], places);
}

/* Slots that one call of the generator serves: 16 bits for each. */
enum { NA_DROPOUT_SLOTS = 8 };

/* The number, below 2^16, of the pair of a row's query at place x of axis 2 and a slot. */
NA_INLINE uint32_t na_dropout_number(na_words row, int x, int slot)
{
    na_words counter = {
        {(uint32_t)(slot / NA_DROPOUT_SLOTS), (uint32_t)x, row.word[2], row.word[3]}};
    na_words bits = na_philox(row.word[0], row.word[1], counter);
    return bits.word[slot / 2 % 4] >> slot % 2 * 16 & 0xffff;
}

/* A pair is kept if its number is not below this: the probability in units of 2^-16. */
NA_INLINE int na_dropout_threshold(double probability) { return (int)(probability * 65536 + 0.5); }

/* What kept weights are multiplied by. */
NA_INLINE double na_dropout_factor(int threshold)
{
    return threshold < 65536 ? 65536.0 / (65536 - threshold) : 0;
}

#endif
