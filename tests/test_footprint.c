/* SPDX-License-Identifier: MIT
 * How much memory a plan and a run take beside the tensors: on large maps, per thread, at most
 * twice the packed key rows of a tile, 4 bytes for each token of each head, and 4 MiB; for half
 * types one float32 copy of the gradients of keys and values as well. (On 3-D maps whose planes are
 * small threads keep whole ones, up to 8 MiB.) */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "natten.h"
#include "problem_string.h"
#include "unit.h"

enum { ROWS = 6, LANES = 16, THREADS = 2 };

/* Kilobytes: of memory in use now, or at most since the last reset. */
static long kilobytes(const char *what)
{
    char line[128];
    long found = -1;
    FILE *file = fopen("/proc/self/status", "r");
    while (file && fgets(line, sizeof line, file))
        if (!strncmp(line, what, strlen(what)))
            found = strtol(line + strlen(what) + 1, NULL, 10);
    if (file)
        fclose(file);
    return found;
}

/* 0: this system cannot, or memory is not used as it would be by itself. */
static int reset_peak(void)
{
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
    return 0;
#endif
    FILE *file = fopen("/proc/self/clear_refs", "w");
    int written = file && fputs("5", file) >= 0;
    return file && fclose(file) == 0 && written;
}

static double allowed_bytes(const natten_problem *p)
{
    const int half = p->dtype == NATTEN_F16 || p->dtype == NATTEN_BF16;
    const int backward = p->op == NATTEN_BACKWARD;
    double tokens = (double)p->batch, keys = 1;
    for (int a = 0; a < p->rank; a++) {
        const double extent = (double)p->axis[a].key_extent, window = (double)p->axis[a].window;
        tokens *= extent;
        if (a + 1 == p->rank) /* rows of a map; of a sequence, rows of lanes */
            keys *= p->rank > 1 ? extent : window + (ROWS - 1) * LANES;
        else
            keys *= window + (a == p->rank - 2 ? ROWS - 1 : 0);
    }
    const double channels = (double)(p->head_dim + p->value_dim);
    double bytes = 2 * keys * channels * sizeof(float) + 4 * tokens * (double)p->heads + (4 << 20);
    bytes *= THREADS;
    if (half && backward)
        bytes += tokens * (double)p->kv_heads * channels * sizeof(float);
    return bytes;
}

/* With a kernel, or as front ends go. */
static natten_status compute(const natten_problem *p, const natten_run *run, const char *kernel)
{
    natten_plan *plan;
    if (!kernel)
        return natten_compute(p, run);
    natten_status status = natten_plan_create(p, kernel, &plan);
    if (status == NATTEN_OK)
        status = natten_plan_run(plan, run);
    natten_plan_destroy(plan);
    return status;
}

/* 1: it took no more than allowed. */
static int keeps_bounds(const char *text, natten_op op, const char *kernel)
{
    test_problem test;
    natten_problem p;
    natten_run run = {.threads = THREADS};
    if (problem_parse(text, &test) || !problem_of_op(&test, op, &p))
        return 0;
    for (int role = 0; role < NATTEN_ROLES; role++) {
        if (!(p.roles >> role & 1))
            continue;
        test_shape s = role_shape(&p, (natten_role)role);
        const size_t count =
            (size_t)(s.batch * s.axis[0] * s.axis[1] * s.axis[2] * s.head * s.channel);
        const size_t size = count * (p.dtype == NATTEN_F32 || role == NATTEN_LSE ? 4 : 2);
        run.data[role] = malloc(size);
        if (!run.data[role])
            return 0;
        memset(run.data[role], 1, size); /* so that its pages are there; calloc has none for 0 */
    }
    if (!reset_peak())
        return 0;
    const long before = kilobytes("VmRSS:");
    const int done = compute(&p, &run, kernel) == NATTEN_OK;
    const double extra = 1024.0 * (double)(kilobytes("VmHWM:") - before);
    printf("%s_%s%s%s: %.1f MiB beside the tensors, %.1f allowed\n", op_name(op), text,
           kernel ? " by " : "", kernel ? kernel : "", extra / 0x1p20, allowed_bytes(&p) / 0x1p20);
    return done && before > 0 && extra <= allowed_bytes(&p);
}

/* In a process of its own, which has no memory from earlier runs to use again. */
static void test_op(const char *text, natten_op op, const char *kernel)
{
    int status = -1;
    fflush(stdout);
    const pid_t child = fork();
    if (child == 0) {
        const int good = keeps_bounds(text, op, kernel);
        fflush(stdout);
        _exit(!good);
    }
    CHECK(child > 0 && waitpid(child, &status, 0) == child);
    CHECK(status == 0);
}

/* The forward by each kernel that takes the problem, but for the reference, which takes nothing. */
static void test_kernels(const char *text)
{
    test_problem test;
    natten_problem p;
    const char *name;
    int takers = 0;
    CHECK(problem_parse(text, &test) == NULL && problem_of_op(&test, NATTEN_FORWARD, &p));
    for (size_t i = 0; (name = natten_kernel_name(i)); i++) {
        natten_plan *plan;
        if (strstr(name, "reference") || natten_plan_create(&p, name, &plan) != NATTEN_OK)
            continue;
        natten_plan_destroy(plan);
        test_op(text, NATTEN_FORWARD, name);
        takers++;
    }
    CHECK(takers > 0);
}

int main(void)
{
    static const char *const problems[] = {"b1h1d16_2048x2048_w7x7_lse", "b1h1d16_1048576_w65_lse",
                                           "b1h1d16_64x256x256_w3x5x5_lse",
                                           "b1h1d16_1024x1024_w7x7_lse_bf16"};
    /* bfloat16 has kernels of its own. Of the last one AMX makes 294 masks. */
    static const char *const halves[] = {
        "b1h1d16_1024x1024_w7x7_lse_bf16", "b1h1d32_262144_w65_c1_lse_bf16",
        "b1h1d32_8x256x256_w3x5x5_lse_bf16", "b1h1d32_256x256_w31x31_s7x11_c11_bf16"};
    if (!reset_peak()) {
        unit_test("memory");
        unit_skip("no peak of this process's memory is to be had, or a sanitizer adds to it");
        return unit_end("test_footprint");
    }
    for (size_t i = 0; i < sizeof problems / sizeof *problems; i++)
        for (natten_op op = NATTEN_FORWARD; op <= NATTEN_BACKWARD; op++) {
            unit_test(problems[i]);
            test_op(problems[i], op, NULL);
        }
    for (size_t i = 0; i < sizeof halves / sizeof *halves; i++) {
        unit_test(halves[i]);
        test_kernels(halves[i]);
    }
    return unit_end("test_footprint");
}
