/* SPDX-License-Identifier: MIT
 * Bad input and bad luck on GPUs, on the driver made for tests: calls of the driver that fail,
 * several devices, addresses and strides that a fast kernel cannot take, tensors of more than 2^31
 * elements. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "unit.h"

enum { TOKENS = 24, DIM = 16, SIZE = TOKENS * DIM };

/* Halves: query, key, value, out; then a bias. */
typedef struct tensors {
    _Alignas(16) uint16_t data[4][SIZE];
    uint16_t bias[8];
} tensors;

/* Numbers from -1 to 1, as float16. */
static void fill(tensors *t)
{
    uint16_t *all = t->data[0];
    for (int i = 0; i < 3 * SIZE; i++)
        all[i] = (uint16_t)((i * 37 % 2 ? 0x8000 : 0) | (0x3000 + i * 53 % 0xc00));
    for (int i = 0; i < 8; i++)
        t->bias[i] = (uint16_t)(0x3400 + 100 * i);
    memset(t->data[3], 0xff, sizeof t->data[3]);
}

static natten_problem problem_of(void)
{
    natten_problem problem;
    natten_problem_init(&problem, NATTEN_FORWARD, NATTEN_F16, 1);
    problem.device = NATTEN_CUDA;
    problem.axis[0].query_extent = TOKENS;
    problem.axis[0].window = 3;
    problem.head_dim = DIM;
    problem.scale = 0.25;
    natten_problem_pack(&problem, NATTEN_HEADS_LAST);
    return problem;
}

/* Plans and runs. */
static natten_status compute(const natten_problem *problem, const char *kernel, tensors *t)
{
    natten_plan *plan;
    static int counters[64];
    natten_run run = {.data = {t->data[0], t->data[1], t->data[2], t->data[3]}};
    natten_status status = natten_plan_create(problem, kernel, &plan);
    run.data[NATTEN_RPB] = t->bias;
    run.workspace = counters;
    CHECK(!plan || natten_plan_workspace(plan) <= sizeof counters);
    if (status == NATTEN_OK)
        status = natten_plan_run(plan, &run);
    natten_plan_destroy(plan);
    return status;
}

static int same_out(const tensors *a, const tensors *b)
{
    return !memcmp(a->data[3], b->data[3], sizeof a->data[3]);
}

static float half(uint16_t bits)
{
    _Float16 value;
    memcpy(&value, &bits, sizeof value);
    return (float)value;
}

/* Apart by no more than roundings: another kernel's result. */
static int close_out(const tensors *a, const tensors *b)
{
    int close = 1;
    for (int i = 0; i < SIZE; i++) {
        float x = half(a->data[3][i]), y = half(b->data[3][i]);
        close &= x - y < 4e-3f && y - x < 4e-3f;
    }
    return close;
}

/* In a child, as a process keeps what it has loaded: the call fails with its name and the driver's
 * reason; once it works again, so does everything. 2: it was not called at all. */
static int fails_once(const char *kernel, const char *call)
{
    static tensors t;
    natten_problem problem = problem_of();
    char words[128];
    fill(&t);
    setenv("HOST_FAIL", call, 1);
    natten_status status = compute(&problem, kernel, &t);
    if (status == NATTEN_OK)
        return 2;
    snprintf(words, sizeof words, "CUDA: %s failed with error 2: out of memory.", call);
    if (status != NATTEN_ERROR_DEVICE || strcmp(natten_last_error(), words))
        return printf("%s\n", natten_last_error()), 1;
    for (int i = 0; i < SIZE; i++)
        if (t.data[3][i] != 0xffff)
            return printf("%s failed, yet something was written\n", call), 1;
    unsetenv("HOST_FAIL");
    return compute(&problem, kernel, &t) != NATTEN_OK || half(t.data[3][0]) > 1;
}

static void failures(void)
{
    static const struct {
        const char *call;
        int of_reference; /* the Hopper kernel calls all of them */
    } calls[] = {{"cuDevicePrimaryCtxRetain", 1},
                 {"cuCtxPushCurrent", 1},
                 {"cuThreadExchangeStreamCaptureMode", 1},
                 {"cuLibraryLoadData", 1},
                 {"cuLibraryGetKernel", 1},
                 {"cuKernelGetFunction", 1},
                 {"cuKernelSetAttribute", 0},
                 {"cuTensorMapEncodeTiled", 0},
                 {"cuLaunchKernel", 1}};
    unit_test("each call of the driver may fail");
    for (size_t i = 0; i < 2 * sizeof calls / sizeof *calls; i++) {
        const char *kernel = i % 2 ? "cuda-reference-forward" : "cuda-sm90-forward";
        fflush(stdout);
        pid_t child = fork();
        if (child == 0)
            exit(fails_once(kernel, calls[i / 2].call));
        int status, expected = i % 2 && !calls[i / 2].of_reference ? 2 : 0;
        CHECK(waitpid(child, &status, 0) == child);
        if (!WIFEXITED(status) || WEXITSTATUS(status) != expected)
            unit_fail("%s of %s: status %#x", calls[i / 2].call, kernel, status);
    }
}

/* Both devices, from two plans at once. */
static int two_devices(void)
{
    static tensors t[2];
    natten_problem problem = problem_of();
    setenv("HOST_DEVICES", "2", 1);
    for (int i = 0; i < 2; i++) {
        problem.device_index = i;
        fill(&t[i]);
        if (compute(&problem, "cuda-sm90-forward", &t[i]) != NATTEN_OK)
            return printf("device %d: %s\n", i, natten_last_error()), 1;
    }
    problem.device_index = 2;
    return !same_out(&t[0], &t[1]) || half(t[0].data[3][0]) > 1 ||
           compute(&problem, NULL, &t[0]) != NATTEN_ERROR_UNSUPPORTED ||
           !unit_error_has("there is no CUDA device 2, there are 2");
}

static void devices(void)
{
    unit_test("several devices");
    fflush(stdout);
    pid_t child = fork();
    if (child == 0)
        exit(two_devices());
    int status;
    CHECK(waitpid(child, &status, 0) == child && status == 0);
}

/* What the plan for any kernel says. */
static int explained(const natten_problem *problem, const char *kernel, const char *words)
{
    natten_plan *plan;
    char text[2048] = "";
    CHECK(natten_plan_create(problem, NULL, &plan) == NATTEN_OK);
    natten_plan_explain(plan, text, sizeof text);
    int good = plan && !strcmp(natten_plan_kernel(plan), kernel) && strstr(text, words);
    if (!good)
        unit_fail("not \"%s\" in: %s", words, text);
    natten_plan_destroy(plan);
    return good;
}

static void addresses(void)
{
    unit_test("addresses that are no multiples of 16");
    static tensors straight, crooked;
    static uint16_t room[4 * (SIZE + 8)];
    natten_problem problem = problem_of();
    natten_run run = {.data = {NULL}};
    natten_plan *plan;
    fill(&straight);
    CHECK(compute(&problem, "cuda-sm90-forward", &straight) == NATTEN_OK);
    for (int i = 0; i < 4; i++) {
        run.data[i] = room + i * (SIZE + 8) + 1 + i;
        memcpy(run.data[i], straight.data[i], sizeof straight.data[i]);
    }
    memset(run.data[NATTEN_OUT], 0xff, sizeof straight.data[3]);
    CHECK(natten_plan_create(&problem, "cuda-sm90-forward", &plan) == NATTEN_OK);
    CHECK(plan && natten_plan_run(plan, &run) == NATTEN_OK);
    memcpy(crooked.data[3], run.data[NATTEN_OUT], sizeof crooked.data[3]);
    CHECK(close_out(&straight, &crooked));
    natten_plan_destroy(plan);
}

static void strides(void)
{
    unit_test("strides of 0, of odd numbers, and negative ones");
    natten_problem problem = problem_of();
    const int64_t bad[] = {0, 3, -DIM};
    for (int i = 0; i < 3; i++) {
        char words[128];
        problem.layout[NATTEN_KEY].axis[0] = bad[i];
        snprintf(words, sizeof words,
                 "cuda-sm90-forward: key has a stride of %d elements, and only positive multiples",
                 (int)bad[i]);
        CHECK(explained(&problem, "cuda-reference-forward", words));
    }
}

/* Tokens so far apart that their numbers pass 2^31 elements, of which only a few pages are there.
 */
static void far_apart(void)
{
    unit_test("more than 2^31 elements");
    static tensors packed, got;
    const int64_t stretch = (int64_t)1 << 27;
    size_t bytes = (size_t)(TOKENS * stretch) * sizeof(uint16_t);
    natten_problem problem = problem_of();
    fill(&packed);
    CHECK(compute(&problem, "cuda-sm90-forward", &packed) == NATTEN_OK);
    uint16_t *far = mmap(NULL, bytes, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (far == MAP_FAILED) {
        unit_skip("no address space");
        return;
    }
    natten_run run = {.data = {far, far + 2048, far + 4096, far + 6144}};
    for (int i = 0; i < 4; i++)
        problem.layout[i].axis[0] = stretch;
    for (int i = 0; i < 3; i++)
        for (int token = 0; token < TOKENS; token++)
            memcpy((uint16_t *)run.data[i] + token * stretch, packed.data[i] + token * DIM,
                   DIM * sizeof(uint16_t));
    for (int hopper = 0; hopper < 2; hopper++) {
        natten_plan *plan;
        const char *kernel = hopper ? "cuda-sm90-forward" : "cuda-reference-forward";
        CHECK(natten_plan_create(&problem, kernel, &plan) == NATTEN_OK);
        CHECK(plan && natten_plan_run(plan, &run) == NATTEN_OK);
        for (int token = 0; token < TOKENS; token++)
            memcpy(got.data[3] + token * DIM, (uint16_t *)run.data[3] + token * stretch,
                   DIM * sizeof(uint16_t));
        CHECK(close_out(&packed, &got) && (!hopper || same_out(&packed, &got)));
        natten_plan_destroy(plan);
    }
    munmap(far, bytes);
}

static void biased(void)
{
    unit_test("a position bias and a scale below 0, beside the reference kernel");
    static tensors a, b;
    natten_problem problem = problem_of();
    fill(&a);
    fill(&b);
    problem.scale = -0.5;
    CHECK(explained(&problem, "cuda-sm90-forward", "taken"));
    problem.roles |= natten_bit(NATTEN_RPB);
    natten_problem_pack(&problem, NATTEN_HEADS_LAST);
    CHECK(compute(&problem, "cuda-sm90-forward", &a) == NATTEN_OK);
    CHECK(compute(&problem, "cuda-reference", &b) == NATTEN_OK);
    CHECK(close_out(&a, &b) && half(a.data[3][0]) <= 1);
    problem.layout[NATTEN_RPB].head = (int64_t)1 << 32;
    CHECK(explained(&problem, "cuda-reference-forward", "bias are too far apart"));
}

int main(void)
{
    failures(); /* these fork, before anything starts CUDA here */
    devices();
    addresses();
    strides();
    far_apart();
    biased();
    return unit_end("test_cuda_luck");
}
