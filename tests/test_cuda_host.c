/* SPDX-License-Identifier: MIT
 * The CUDA half's manners, on the driver made for tests: threads, forks, contexts, devices. */
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "torch/bind.h"
#include "unit.h"

static natten_problem problem_of(natten_op op, int64_t extent)
{
    natten_problem problem;
    natten_problem_init(&problem, op, NATTEN_F32, 1);
    problem.device = NATTEN_CUDA;
    problem.axis[0].query_extent = extent;
    problem.axis[0].window = 3;
    problem.head_dim = 8;
    natten_problem_pack(&problem, NATTEN_HEADS_LAST);
    return problem;
}

static void *current_context(void)
{
    int (*get)(void **);
    void *context = NULL, *library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);
    void *address = library ? dlsym(library, "cuCtxGetCurrent") : NULL;
    memcpy(&get, &address, sizeof address);
    CHECK(address && get(&context) == 0);
    return context;
}

static void *plan_and_run(void *result)
{
    float data[4][16 * 8];
    natten_problem problem = problem_of(NATTEN_FORWARD, 16);
    natten_run run = {.data = {data[0], data[1], data[2], data[3]}};
    for (int i = 0; i < 16 * 8; i++) {
        data[0][i] = data[1][i] = 1;
        data[2][i] = (float)(i / 8);
    }
    *(int *)result = natten_compute(&problem, &run) == NATTEN_OK && data[3][0] == 1 &&
                     data[3][5 * 8] == 5 && data[3][15 * 8 + 7] == 14;
    return NULL;
}

static void threads(void)
{
    unit_test("8 threads want the same kernel");
    pthread_t thread[8];
    int good[8] = {0};
    for (int i = 0; i < 8; i++)
        CHECK(pthread_create(&thread[i], NULL, plan_and_run, &good[i]) == 0);
    for (int i = 0; i < 8; i++) {
        pthread_join(thread[i], NULL);
        CHECK(good[i]);
    }
}

static void contexts(void)
{
    unit_test("the caller's context is as it was");
    int good = 0;
    CHECK(current_context() == NULL);
    plan_and_run(&good);
    CHECK(good && current_context() == NULL);
}

static void sizes(void)
{
    unit_test("sizes and devices that are refused, empty ones that are not");
    natten_plan *plan;
    natten_problem problem = problem_of(NATTEN_FORWARD, 16);
    problem.device_index = 3;
    CHECK(natten_plan_create(&problem, NULL, &plan) == NATTEN_ERROR_UNSUPPORTED);
    CHECK(unit_error_has("there is no CUDA device 3, there are 1"));
    problem = problem_of(NATTEN_BACKWARD, 16);
    problem.batch = 0;
    CHECK(natten_plan_create(&problem, NULL, &plan) == NATTEN_OK);
    natten_run run = {.stream = NULL};
    CHECK(plan && natten_plan_run(plan, &run) == NATTEN_OK);
    natten_plan_destroy(plan);
    natten_problem_init(&problem, NATTEN_FORWARD, NATTEN_F16, 2);
    problem.device = NATTEN_CUDA;
    for (int i = 0; i < 2; i++) {
        problem.axis[i].query_extent = 1 << 16;
        problem.axis[i].window = 1;
    }
    problem.head_dim = 1;
    natten_problem_pack(&problem, NATTEN_HEADS_LAST);
    CHECK(natten_plan_create(&problem, "cuda-reference", &plan) == NATTEN_ERROR_UNSUPPORTED);
    CHECK(unit_error_has("31 bits"));
}

/* A problem nobody compiled before: whether the program's end waits for what was started is seen by
 * its not crashing. */
static void backward_ahead(void)
{
    unit_test("the backward is compiled while the forward runs");
    char folder[] = "/tmp/natten-ahead-XXXXXX", command[64];
    CHECK(mkdtemp(folder) != NULL);
    setenv("NATTEN_CACHE_DIR", folder, 1);
    pid_t child = fork();
    if (child == 0) {
        natten_problem problem = problem_of(NATTEN_FORWARD, 16);
        problem.roles |= natten_bit(NATTEN_LSE);
        natten_problem_pack(&problem, NATTEN_HEADS_LAST);
        natten_plan *plan;
        exit(natten_plan_create(&problem, "cuda-reference", &plan) != NATTEN_OK);
    }
    int status;
    CHECK(waitpid(child, &status, 0) == child && status == 0);
    snprintf(command, sizeof command, "test $(ls %s | wc -l) = 2", folder);
    CHECK(system(command) == 0);
    snprintf(command, sizeof command, "rm -rf %s", folder);
    CHECK(system(command) == 0);
}

/* Attention within packed items: two alike, one of no tokens, a longer one, each query to 3 keys.
 */
enum { TOKENS = 40, CHANNELS = 8 };

static natten_status packed(int64_t device, float *tensors, size_t *workspace)
{
    static const natten_item_axis items[] = {
        {8, 8, 3, 1, 1, 0}, {8, 8, 3, 1, 1, 0}, {0, 0, 3, 1, 1, 0}, {24, 24, 3, 1, 2, 1}};
    static const natten_role roles[] = {NATTEN_QUERY, NATTEN_KEY, NATTEN_VALUE, NATTEN_OUT};
    natten_call call = {.op = NATTEN_FORWARD, .order = NATTEN_HEADS_LAST, .scale = 0.5};
    call.preferences = NATTEN_PREFER_USUAL;
    call.outputs = natten_bit(NATTEN_OUT);
    for (int role = 0; role < NATTEN_ROLES; role++)
        call.tensor[role].dims = -1;
    for (int i = 0; i < 4; i++)
        call.tensor[roles[i]] = (natten_tensor){
            .data = tensors + i * TOKENS * CHANNELS,
            .dims = 4,
            .size = {1, TOKENS, 1, CHANNELS},
            .stride = {TOKENS * CHANNELS, CHANNELS, CHANNELS, 1},
            .dtype = NATTEN_F32,
            .device = device,
        };
    natten_run run = {.threads = 2};
    natten_status status = natten_call_items(&call, items, 4, 1, NULL, workspace);
    if (status == NATTEN_OK)
        status = natten_call_items(&call, items, 4, 1, &run, workspace);
    return status;
}

static void items(void)
{
    unit_test("packed items give what they give on a CPU");
    static float tensors[2][4 * TOKENS * CHANNELS];
    size_t workspace = 99;
    for (int i = 0; i < 3 * TOKENS * CHANNELS; i++)
        tensors[0][i] = tensors[1][i] = (float)(i * 37 % 64) / 32 - 1;
    CHECK(packed(NATTEN_CPU, tensors[0], &workspace) == NATTEN_OK);
    CHECK(packed(NATTEN_CUDA, tensors[1], &workspace) == NATTEN_OK && workspace == 0);
    for (int i = 3 * TOKENS * CHANNELS; i < 4 * TOKENS * CHANNELS; i++) {
        float difference = tensors[0][i] - tensors[1][i];
        CHECK(tensors[0][i] != 0 && difference < 1e-5f && difference > -1e-5f);
    }
}

static void forks(void)
{
    unit_test("a forked child is told so");
    int status, good = 0;
    plan_and_run(&good);
    pid_t child = fork();
    if (child == 0) {
        natten_problem problem = problem_of(NATTEN_AV, 16);
        natten_plan *plan;
        int refused = natten_plan_create(&problem, NULL, &plan) == NATTEN_ERROR_UNSUPPORTED;
        _exit(refused && unit_error_has("forked") ? 0 : 1);
    }
    CHECK(good && waitpid(child, &status, 0) == child && status == 0);
}

/* What the plan of a problem with these preferences says. */
static const char *said(natten_op op, uint64_t preferences)
{
    static char text[4096];
    natten_plan *plan;
    natten_problem problem = problem_of(op, 16);
    problem.preferences = preferences;
    CHECK(natten_plan_create(&problem, "cuda-reference", &plan) == NATTEN_OK);
    natten_plan_explain(plan, text, sizeof text);
    natten_plan_destroy(plan);
    return text;
}

static void preferences(void)
{
    unit_test("explanations say what became of the preferences");
    const char *unused = "allowed, but cuda-reference-qk makes no use of it\n";
    char line[200];
    snprintf(line, sizeof line, "taken\nGEMM kernels: %stiled kernels: %s", unused, unused);
    CHECK(strstr(said(NATTEN_QK, NATTEN_PREFER_USUAL), line));
    CHECK(strstr(said(NATTEN_AV, NATTEN_PREFER_TILED), "taken\nGEMM kernels: switched off\ntiled"));
    CHECK(strstr(said(NATTEN_AV_BACKWARD, 0), "\ntiled kernels: switched off\n"));
    CHECK(strstr(said(NATTEN_QK, 0), "\nnaive kernels: cuda-reference-qk is of this kind\n"));
    CHECK(!strstr(said(NATTEN_FORWARD, NATTEN_PREFER_USUAL), "GEMM"));
    unused = "allowed, but cuda-reference-forward makes no use of it\n";
    snprintf(line, sizeof line, "taken\nTF32: %s", unused);
    CHECK(strstr(said(NATTEN_FORWARD, NATTEN_PREFER_TF32), line));
    unused = "allowed, but cuda-reference-backward makes no use of it\n";
    snprintf(line, sizeof line, "taken\nKV parallelism: %smuch memory: %s", unused, unused);
    CHECK(
        strstr(said(NATTEN_BACKWARD, NATTEN_PREFER_KV_PARALLEL | NATTEN_PREFER_MUCH_MEMORY), line));
    CHECK(!strstr(said(NATTEN_BACKWARD, NATTEN_PREFER_USUAL), "allowed"));
}

int main(void)
{
    backward_ahead(); /* before anything starts CUDA, as it forks */
    threads();
    contexts();
    sizes();
    preferences();
    items();
    forks();
    return unit_end("test_cuda_host");
}
