/* SPDX-License-Identifier: MIT
 * A main for fuzz targets without libFuzzer: repeats the inputs of the named files, or makes up so
 * many inputs from a seed. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "problem_string.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static int replay(const char *path)
{
    static uint8_t data[4096];
    FILE *file = fopen(path, "rb");
    if (!file) {
        perror(path);
        return 1;
    }
    LLVMFuzzerTestOneInput(data, fread(data, 1, sizeof data, file));
    return fclose(file);
}

int main(int argc, char **argv)
{
    int count = argc > 1 ? atoi(argv[1]) : 20000;
    uint64_t random = argc > 2 ? strtoull(argv[2], NULL, 10) : (uint64_t)time(NULL);
    for (int i = 1; argc > 1 && !count && i < argc; i++)
        if (replay(argv[i]))
            return 1;
    printf("seed %llu\n", (unsigned long long)random);
    fflush(stdout);
    for (int i = 0; i < count; i++) {
        uint8_t data[16];
        size_t size = 3 + random_next(&random) % 13;
        for (size_t j = 0; j < size; j++)
            data[j] = (uint8_t)random_next(&random);
        LLVMFuzzerTestOneInput(data, size);
    }
    printf("fuzz_problem: 1 passed, 0 failed, 0 skipped\n");
    return 0;
}
