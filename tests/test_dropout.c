/* SPDX-License-Identifier: MIT
 * The generator behind dropout: known answers, and statistics of what it drops. (That kernels,
 * blocks and threads agree on it is checked by check and test_blocks.) */
#include <math.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#include "core/dropout.h"
#include "unit.h"

/* Published with the generator, for 7 rounds. */
static void test_known(void)
{
    static const struct {
        uint32_t key[2];
        na_words counter, result;
    } known[] = {{{0, 0}, {{0, 0, 0, 0}}, {{0x5f6fb709, 0x0d893f64, 0x4f121f81, 0x4f730a48}}},
                 {{0xffffffff, 0xffffffff},
                  {{0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff}},
                  {{0x5207ddc2, 0x45165e59, 0x4d8ee751, 0x8c52f662}}},
                 {{0xa4093822, 0x299f31d0},
                  {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}},
                  {{0x4dfccaba, 0x190a87f0, 0xc47362ba, 0xb6b5242a}}}};
    for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
        na_words got = na_philox(known[i].key[0], known[i].key[1], known[i].counter);
        CHECK(!memcmp(&got, &known[i].result, sizeof got));
    }
}

/* A pair, by all that its number depends on. */
typedef struct pair {
    uint64_t seed, offset;
    int batch, head, z, y, x, slot;
} pair;

static uint32_t number_of(pair p)
{
    na_words row = na_dropout_row(p.seed, p.offset, p.batch, p.head, p.z, p.y);
    return na_dropout_number(row, p.x, p.slot);
}

enum { PAIRS = 1 << 18 };

static pair pair_at(uint64_t seed, int i)
{
    pair p = {seed, 3, i >> 17 & 1, i >> 15 & 3, i >> 14 & 1, i >> 11 & 7, i >> 6 & 31, i & 63};
    return p;
}

/* How many standard deviations a count of PAIRS events of a probability is off. */
static double deviation(int count, double probability)
{
    double mean = PAIRS * probability;
    return fabs(count - mean) / sqrt(mean * (1 - probability));
}

static void test_mean(uint64_t seed)
{
    static const double probabilities[] = {0.001, 0.1, 0.25, 0.5, 0.9};
    for (int j = 0; j < 5; j++) {
        int threshold = na_dropout_threshold(probabilities[j]), dropped = 0;
        for (int i = 0; i < PAIRS; i++)
            dropped += (int)number_of(pair_at(seed, i)) < threshold;
        CHECK(deviation(dropped, threshold / 65536.0) < 6);
    }
    CHECK(na_dropout_threshold(0) == 0 && na_dropout_threshold(1) == 65536);
    CHECK(na_dropout_threshold(0.1) == 6554);
    CHECK(na_dropout_factor(0) == 1 && na_dropout_factor(32768) == 2);
    CHECK(na_dropout_factor(65536) == 0);
}

/* Each bit of a number against the same and the next bit of a pair one step further. */
static void test_neighbours(uint64_t seed)
{
    static const char *const steps[] = {"seed", "offset", "batch", "head", "z", "y", "x", "slot"};
    for (int step = 0; step < 8; step++) {
        int same[16] = {0}, next[16] = {0};
        for (int i = 0; i < PAIRS; i++) {
            pair a = pair_at(seed, i), b = a;
            b.seed += step == 0;
            b.offset += step == 1;
            b.batch += step == 2;
            b.head += step == 3;
            b.z += step == 4;
            b.y += step == 5;
            b.x += step == 6;
            b.slot += step == 7;
            uint32_t u = number_of(a), v = number_of(b), turned = v >> 1 | v << 15;
            for (int bit = 0; bit < 16; bit++) {
                same[bit] += (int)(~(u ^ v) >> bit & 1);
                next[bit] += (int)(~(u ^ turned) >> bit & 1);
            }
        }
        for (int bit = 0; bit < 16; bit++)
            if (deviation(same[bit], 0.5) >= 6 || deviation(next[bit], 0.5) >= 6)
                unit_fail("bit %d goes with that of the next %s", bit, steps[step]);
    }
}

/* Numbers fill their range evenly: chi-squared of 256 classes. */
static void test_uniform(uint64_t seed)
{
    static int count[256];
    double sum = 0, mean = PAIRS / 256.0;
    for (int i = 0; i < PAIRS; i++)
        count[number_of(pair_at(seed, i)) >> 8]++;
    for (int i = 0; i < 256; i++)
        sum += (count[i] - mean) * (count[i] - mean) / mean;
    CHECK(fabs(sum - 255) < 6 * sqrt(2 * 255.0));
}

int main(void)
{
    uint64_t seed = (uint64_t)time(NULL) * 0x9e3779b97f4a7c15u;
    printf("seed %llu\n", (unsigned long long)seed);
    unit_test("known answers");
    test_known();
    unit_test("the share that is dropped");
    test_mean(seed);
    unit_test("neighbours know nothing of each other");
    test_neighbours(seed);
    unit_test("numbers are uniform");
    test_uniform(seed);
    return unit_end("test_dropout");
}
