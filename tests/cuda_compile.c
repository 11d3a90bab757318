/* SPDX-License-Identifier: MIT
 * Every specialisation that ships, compiled by NVRTC for the architectures it serves, without a
 * GPU: no warnings, no spills that are not accounted for, registers within the launch bounds. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/kernel.h"
#include "cuda/driver.h"
#include "cuda/jit.h"

static int failures, compiled;

/* The largest number that stands before `word` in the log. */
static long highest(const char *log, const char *word)
{
    long best = 0;
    for (const char *at = strstr(log, word); at; at = strstr(at + 1, word)) {
        const char *digit = at;
        while (digit > log && digit[-1] >= '0' && digit[-1] <= '9')
            digit--;
        long value = strtol(digit, NULL, 10);
        best = value > best ? value : best;
    }
    return best;
}

static void compile(const na_special *special, long registers, long spills)
{
    char line[512], *log;
    na_cubin cubin;
    na_special_text(special, line, sizeof line);
    compiled++;
    if (na_jit_compile(special, &cubin, &log) != NATTEN_OK) {
        printf("FAIL %s\n%s\n", line, natten_last_error());
        failures++;
        free(log);
        return;
    }
    long used = highest(log, " registers"), stores = highest(log, " bytes spill stores"),
         loads = highest(log, " bytes spill loads");
    int bad = !log[0] || used == 0 || used > registers || stores + loads > spills ||
              strstr(log, "warning");
    printf("%s %s: %ld registers, %ld + %ld bytes spilled, %zu bytes\n", bad ? "FAIL" : "ok", line,
           used, stores, loads, cubin.size);
    if (bad)
        printf("%s\n", log);
    failures += bad;
    free(cubin.bytes);
    free(log);
}

/* The reference kernels run everywhere; 128 threads may have 255 registers each. They divide 64-bit
 * task numbers, which is a call, and once per task may spill a few registers around it. */
static void compile_reference(const char *const *archs)
{
    for (; *archs; archs++)
        for (int op = 0; op < NATTEN_OPS; op++)
            for (int dtype = 0; dtype < NATTEN_DTYPES; dtype++) {
                na_special special;
                na_special_init(&special, "reference.cu", *archs);
                na_special_set(&special, "NA_OP", op);
                na_special_set(&special, "NA_DTYPE", dtype);
                compile(&special, 255, 128);
            }
}

int main(int count, char **words)
{
    static const char *const oldest_and_newest[] = {"sm_75", "sm_90", NULL};
    const char *why;
    const na_nvrtc *nvrtc = na_nvrtc_find(&why);
    if (!nvrtc) {
        printf("SKIP cuda_compile: %s\n", why);
        return 77;
    }
    printf("NVRTC %d.%d, %s\n", nvrtc->major, nvrtc->minor, nvrtc->path);
    compile_reference(count > 1 ? (const char *const *)words + 1 : oldest_and_newest);
    printf("%d specialisations, %d failures\n", compiled, failures);
    return failures != 0;
}
