/* SPDX-License-Identifier: MIT
 * Every specialisation that ships, compiled by NVRTC for the architectures it serves, without a
 * GPU: no warnings, no spills that are not accounted for, registers within the launch bounds. */
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "core/kernel.h"
#include "core/problem.h"
#include "cuda/driver.h"
#include "cuda/config.h"
#include "cuda/jit.h"
#include "cuda/sm90.h"
#include "problem_string.h"

enum { MOST = 1024 };

typedef struct trial {
    na_special special;
    long registers, spills; /* at most */
    int exactly;            /* so many registers, no fewer */
} trial;

static trial trials[MOST];
static int count;
static atomic_int next, failures;

static void add(const na_special *special, long registers, long spills, int exactly)
{
    for (int i = 0; i < count; i++)
        if (!memcmp(&trials[i].special, special, sizeof *special))
            return;
    trials[count++] = (trial){*special, registers, spills, exactly};
}

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

/* For a disassembler: in the folder CUBINS, if that is set. */
static void keep(const trial *t, const na_cubin *cubin)
{
    char path[300];
    if (!getenv("CUBINS"))
        return;
    snprintf(path, sizeof path, "%s/%s_%d.cubin", getenv("CUBINS"), t->special.source,
             (int)(t - trials));
    FILE *file = fopen(path, "wb");
    if (!file || fwrite(cubin->bytes, 1, cubin->size, file) != cubin->size || fclose(file))
        perror(path);
}

static int compile(const trial *t)
{
    char line[512], *log;
    na_cubin cubin;
    na_special_text(&t->special, line, sizeof line);
    if (na_jit_compile(&t->special, &cubin, &log) != NATTEN_OK) {
        printf("FAIL %s\n%s\n", line, natten_last_error());
        free(log);
        return 0;
    }
    long used = highest(log, " registers"), stores = highest(log, " bytes spill stores"),
         loads = highest(log, " bytes spill loads");
    int bad = !log[0] || used == 0 || used > t->registers || (t->exactly && used != t->registers) ||
              stores + loads > t->spills || strstr(log, "warning") || strstr(log, "serialized");
    printf("%s %s: %ld registers, %ld + %ld bytes spilled, %zu bytes\n", bad ? "FAIL" : "ok", line,
           used, stores, loads, cubin.size);
    if (bad)
        printf("%s\n", log);
    keep(t, &cubin);
    free(cubin.bytes);
    free(log);
    return !bad;
}

/* NVRTC compiles on several threads at once. */
static void *work(void *unused)
{
    for (int i; (i = atomic_fetch_add(&next, 1)) < count;)
        if (!compile(&trials[i]))
            atomic_fetch_add(&failures, 1);
    return unused;
}

/* The reference kernels run everywhere; 128 threads may have 255 registers each. */
static void add_reference(const char *arch)
{
    for (int op = 0; op < NATTEN_OPS; op++)
        for (int dtype = 0; dtype < NATTEN_DTYPES; dtype++) {
            na_special special;
            na_special_init(&special, "reference.cu", arch);
            na_special_set(&special, "NA_OP", op);
            na_special_set(&special, "NA_DTYPE", dtype);
            add(&special, 255, 0, 0);
        }
}

static int64_t macro_of(const na_special *special, const char *name)
{
    for (int i = 0; i < NA_MACROS; i++)
        if (!strcmp(special->macros[i].name, name))
            return special->macros[i].value;
    return 0;
}

/* At launch a thread of a Hopper block must have 65536 registers divided by their number, as the
 * loading warpgroup then gives most of its own away, and the others wait for them. What its warps
 * spill nobody waits for; so spills are bounded, not forbidden, by so little that a warpgroup which
 * computes cannot spill much of a tile. */
static void add_special(const na_special *special)
{
    int64_t groups = macro_of(special, "NA_GROUPS");
    const long spills = 144;
    if (groups)
        add(special, 65536 / (128 * (groups + 1)) / 8 * 8, spills, 1);
    else
        add(special, 255, 0, 0);
}

/* What the planner chooses on an H100 for a problem. */
static int add_problem(const test_problem *parsed, natten_op op)
{
    const na_device h100 = {.major = 9, .multiprocessors = 132, .shared_memory = 232448};
    na_sm90_config config = {0};
    na_special specials[NA_SM90_BACKWARD_TEXTS];
    natten_plan plan = {0};
    int found = 0;
    if (!problem_of_op(parsed, op, &plan.problem) ||
        na_problem_check(&plan.problem, &plan.problem) != NATTEN_OK)
        return 0;
    if (op == NATTEN_BACKWARD) {
        found = na_sm90_backward_specials(&plan.problem, &h100, specials);
    } else if (na_sm90_config_choose(&plan.problem, &h100, NA_SM90_FORWARD, 0, &config)) {
        na_sm90_special(&plan.problem, &config, &specials[0]);
        found = 1;
    }
    for (int i = 0; i < found; i++)
        add_special(&specials[i]);
    return found;
}

/* For all problems of a file, forward and backward. */
static int add_hopper(const char *path)
{
    char line[256];
    FILE *file = fopen(path, "r");
    while (file && fgets(line, sizeof line, file)) {
        test_problem parsed;
        line[strcspn(line, "\n")] = 0;
        if (!*line || *line == '#')
            continue;
        const char *wrong = problem_parse(line, &parsed);
        if (wrong || !add_problem(&parsed, NATTEN_FORWARD) ||
            !add_problem(&parsed, NATTEN_BACKWARD)) {
            printf("FAIL %s: %s\n", line, wrong ? wrong : natten_last_error());
            return 0;
        }
    }
    return file && !fclose(file);
}

int main(int argc, char **argv)
{
    const char *why;
    pthread_t threads[64];
    const na_nvrtc *nvrtc = na_nvrtc_find(&why);
    if (!nvrtc) {
        printf("SKIP %s\ncuda_compile: 0 passed, 0 failed, 1 skipped\n", why);
        return 0;
    }
    printf("NVRTC %d.%d, %s\n", nvrtc->major, nvrtc->minor, nvrtc->path);
    for (int i = 1; i < argc; i++)
        if (!strstr(argv[i], ".txt"))
            add_reference(argv[i]);
        else if (!add_hopper(argv[i]))
            return 1;
    long workers = sysconf(_SC_NPROCESSORS_ONLN), started = 0;
    for (; started < workers && started < 64; started++)
        if (pthread_create(&threads[started], NULL, work, NULL))
            break;
    work(NULL);
    for (int i = 0; i < started; i++)
        pthread_join(threads[i], NULL);
    printf("cuda_compile: %d passed, %d failed, 0 skipped\n", count - failures, failures);
    return failures != 0;
}
