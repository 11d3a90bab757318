/* SPDX-License-Identifier: MIT
 * The backward of Hopper around its kernels, on the driver made for tests: which of its two ways is
 * taken and said to be, how much workspace that needs, when it is compiled, and that a whole step
 * of training can be captured by a graph. */
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "core/kernel.h"
#include "core/problem.h"
#include "cuda/device.h"
#include "cuda/sm90.h"
#include "problem_string.h"
#include "unit.h"

static const char name[] = "cuda-sm90-backward";

static natten_problem problem_of(const char *text, natten_op op)
{
    test_problem parsed;
    natten_problem problem = {.size = 0};
    const char *wrong = problem_parse(text, &parsed);
    CHECK(!wrong && problem_of_op(&parsed, op, &problem));
    problem.device = NATTEN_CUDA;
    return problem;
}

/* The plan's workspace, and what it says. */
static size_t plan(const char *text, const char *only, char said[4096])
{
    natten_problem problem = problem_of(text, NATTEN_BACKWARD);
    natten_plan *plan;
    size_t bytes = 0;
    *said = 0;
    if (natten_plan_create(&problem, only, &plan) == NATTEN_OK) {
        bytes = natten_plan_workspace(plan);
        natten_plan_explain(plan, said, 4096);
        natten_plan_destroy(plan);
    }
    return bytes;
}

/* ----------------------------------------------------------------------------------------------
 * which way */

static void ways(void)
{
    unit_test("which way is taken, and why");
    static const struct {
        const char *text, *says;
    } table[] = {
        {"b1h2d16_40_w9_bf16", "in the same order every time, as KV parallelism is not allowed\n"},
        {"b1h2d16_40_w9_bf16_kvp_choice1",
         "adds d_query up in any order, as KV parallelism is allowed; 1 of "
         "1 times 2 heads of keys at a time\n"},
        {"b1h2d16_40_w9_bf16_kvp_choice1",
         "\nKV parallelism: allowed, and cuda-sm90-backward makes use"},
        {"b1h2d16_40_w9_bf16_kvp_much_choice1",
         "\nmuch memory: allowed, and cuda-sm90-backward makes use"},
        {"b1h2d16_40_w9_bf16_kvp_gqk", "same order every time, as not all gradients are wanted\n"},
        {"b1h2d16_40_w9_bf16_kvp_gqk",
         "\nKV parallelism: allowed, but cuda-sm90-backward makes no"},
        {"b1h2d16_40_w9_d2_add3_bf16_kvp", "as there are additional tokens and a dilation\n"},
        {"b1h2d16_9x13_w3x5_rpb_bf16_kvp", "same order every time, as there is a position bias\n"},
        {"b1h2d16_9x13_w3x5_x-0.5_bf16_kvp_choice1", "adds d_query up in any order"},
        {"b1h2d16_9x13_w3x5_x0_bf16_kvp_choice1", "adds d_query up in any order"},
        {"b1h2d16_40x41_w3x5_d8x7_bf16_kvp_choice1", "adds d_query up in any order"},
        {"b1h2d16_40x41_w3x5_d9x1_bf16", "not allowed; 3 parts of the map after each other\n"},
        {"b1h2d16_40x41_w3x5_d9x1_bf16_kvp_choice1",
         "is allowed; 1 of 1 times 2 heads of keys at a time; 3 parts of the map"},
        {"b1h2d16_40_w9_d4_bf16_kvp_choice1", "heads of keys at a time\n"},
        {"b4h16d64_128x128_w13x13_bf16_kvp", "every time, as that is expected to take less time\n"},
        {"b1h24d128_256x256_w80x80_bf16_kvp", "(choice 0 of 2: one kernel)"},
        {"b1h24d128_256x256_w80x80_add40_bf16_kvp", "(choice 0 of 2: one kernel)"},
        {"b1h24d128_256x256_w80x80_bf16_kvp_choice2", "(choice 2 of 2: several)"},
        {"b1h24d128_256x256_w80x80_bf16_kvp_choice2", "every time, as that choice is asked for\n"},
        {"b1h2d16_40x41_w33x33_rpb_bf16_kvp_little",
         "as there is a position bias; 2 of 1 times 1 heads of keys at a time; d_rpb added up in "
         "memory, as it has many entries\n"},
        {"b1h2d16_40x41_w33x33_rpb_bf16_little", "\nlittle memory: allowed, and cuda-sm90-backward "
                                                 "makes use"},
        {"b1h2d16_40x41_w33x31_rpb_bf16", "not allowed\n"},
        {"b1h2d256_40_w9_bf16_kvp", "as three sums do not fit into registers and shared memory\n"},
    };
    char said[4096];
    for (size_t i = 0; i < sizeof table / sizeof *table; i++) {
        plan(table[i].text, name, said);
        if (!strstr(said, table[i].says))
            printf("%s: %s", table[i].text, said);
        CHECK(strstr(said, table[i].says));
    }
}

static char logged[1024];
static int warnings;

static void note(int64_t level, const char *text)
{
    warnings += level == 2;
    snprintf(logged, sizeof logged, "%s", text);
}

static void slow(void)
{
    unit_test("a backward that no fast kernel takes says so, in the log once");
    char said[4096];
    natten_log_set(note);
    plan("b1h2d17_40_w9_bf16", "cuda-reference", said);
    CHECK(!strstr(said, "slow") && warnings == 0);
    for (int i = 0; i < 2; i++) {
        plan("b1h2d17_40_w9_bf16", NULL, said);
        CHECK(strstr(said, "cuda-sm90-backward: only multiples of 8 up to 256 channels, not 17 and "
                           "17\ncuda-reference-backward: taken: right, but slow: no fast kernel"));
    }
    CHECK(warnings == 1 && strstr(logged, "A backward on host words 0 runs on reference kernels"));
    CHECK(strstr(logged, "only multiples of 8"));
    natten_log_set(NULL);
}

/* ----------------------------------------------------------------------------------------------
 * workspace */

static double bytes_of(const char *text, natten_role role)
{
    natten_problem problem = problem_of(text, NATTEN_BACKWARD);
    test_shape s = role_shape(&problem, role);
    return 2.0 * (double)(s.batch * s.axis[0] * s.axis[1] * s.axis[2] * s.head * s.channel);
}

/* Bounds of docs/kv-parallelism.md, but at least one head of keys and what visits it. */
static void workspace(void)
{
    enum { SIZES = 6 };
    unit_test("workspace where d_query, or a bias' gradient of many entries, is added up");
    static const struct {
        const char *text;
        int turns; /* with little memory, usual, much */
    } table[SIZES][3] = {
        {{"b1h24d128_256x256_w80x80_bf16_kvp_little", 3},
         {"b1h24d128_256x256_w80x80_bf16_kvp", 1},
         {"b1h24d128_256x256_w80x80_bf16_kvp_much", 1}},
        {{"b2h24d64_30x48x80_w18x24x24_hk6_bf16_kvp_little", 6},
         {"b2h24d64_30x48x80_w18x24x24_hk6_bf16_kvp", 2},
         {"b2h24d64_30x48x80_w18x24x24_hk6_bf16_kvp_much", 1}},
        {{"b8h2d32_500_w20_f16_kvp_little", 4},
         {"b8h2d32_500_w20_f16_kvp", 1},
         {"b8h2d32_500_w20_f16_kvp_much", 1}},
        {{"b1h8d64_500_w20_hk1_f16_kvp_little_choice1", 1},
         {"b1h8d64_500_w20_hk1_f16_kvp_choice1", 1},
         {"b1h8d64_500_w20_hk1_f16_kvp_much_choice1", 1}},
        {{"b1h24d128_256x256_w15x80_d16x1_bf16_kvp_little", 2},
         {"b1h24d128_256x256_w15x80_d16x1_bf16_kvp", 1},
         {"b1h24d128_256x256_w15x80_d16x1_bf16_kvp_much", 1}},
        {{"b2h24d128_256x256_w75x75_hk12_rpb_bf16_little", 12},
         {"b2h24d128_256x256_w75x75_hk12_rpb_bf16", 3},
         {"b2h24d128_256x256_w75x75_hk12_rpb_bf16_much", 1}},
    };
    for (int i = 0; i < SIZES; i++)
        for (int j = 0; j < 3; j++) {
            const char *text = table[i][j].text, *at;
            char said[4096];
            size_t bytes = plan(text, name, said);
            double inputs = bytes_of(text, NATTEN_QUERY) + bytes_of(text, NATTEN_KEY) +
                            bytes_of(text, NATTEN_VALUE);
            int turns = 0;
            if ((at = strstr(said, "allowed; ")))
                sscanf(at, "allowed; %d of ", &turns);
            printf("%s: %.1f MB, inputs %.1f MB, %d turns\n", text, (double)bytes / 1e6,
                   inputs / 1e6, turns);
            CHECK(turns == table[i][j].turns);
            CHECK(i == 3 || j == 2 || (double)bytes <= (j ? inputs : inputs / 4));
            /* Parts of the map share their sums. */
            CHECK(j != 2 || (double)bytes >= (i == 4 ? 1 : 2) * bytes_of(text, NATTEN_QUERY));
        }
}

/* ----------------------------------------------------------------------------------------------
 * beforehand */

/* Plans a forward, and the backward by itself, in a folder of its own; how many kernels are there
 * in the end. Those that were compiled beforehand are those that the backward takes, or it would
 * add others. */
static int prepared(const char *text)
{
    char folder[] = "/tmp/natten-ahead-XXXXXX", command[128];
    int status, count = 0;
    CHECK(mkdtemp(folder) != NULL);
    setenv("NATTEN_CACHE_DIR", folder, 1);
    pid_t child = fork();
    if (child == 0) {
        natten_problem problem = problem_of(text, NATTEN_FORWARD);
        natten_plan *plan;
        problem.roles |= natten_bit(NATTEN_LSE);
        natten_problem_pack(&problem, NATTEN_HEADS_LAST);
        if (natten_plan_create(&problem, "cuda-sm90-forward", &plan) != NATTEN_OK)
            exit(1);
        natten_plan_destroy(plan);
        problem = problem_of(text, NATTEN_BACKWARD);
        problem.choice = 0;
        exit(natten_plan_create(&problem, name, &plan) != NATTEN_OK);
    }
    CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status));
    CHECK(WEXITSTATUS(status) == 0);
    snprintf(command, sizeof command, "ls %s | wc -l", folder);
    FILE *pipe = popen(command, "r");
    CHECK(pipe && fscanf(pipe, "%d", &count) == 1);
    pclose(pipe);
    snprintf(command, sizeof command, "rm -rf %s", folder);
    CHECK(system(command) == 0);
    return count;
}

static void ahead(void)
{
    unit_test("the backward's kernels are compiled while the forward runs");
    CHECK(prepared("b1h2d16_40_w9_bf16") == 1 + 3);     /* d_query, d_key and d_value, delta */
    CHECK(prepared("b1h2d16_40_w9_bf16_kvp") == 1 + 3); /* the same: several are faster */
    /* All, delta, d_query's rounding. */
    CHECK(prepared("b1h24d128_32768_w2048_bf16_kvp") == 1 + 3);
    CHECK(prepared("b1h2d16_40_w9_bf16_kvp_choice2") == 1 + 3); /* the choice is the forward's */
    CHECK(prepared("b1h2d16_9x10_w3x3_add3_bf16") == 1 + 4);    /* and the additional tokens' */
    CHECK(prepared("b1h2d16_9x10_w3x3_rpb_bf16_kvp") == 1 + 4); /* and the bias' */
    CHECK(prepared("b1h2d16_40_w3_d10_bf16_kvp") == 1 + 3);     /* parts share them */
    CHECK(prepared("b1h2d16_9x9x9_w9x9x9_rpb_bf16") == 1 + 4);
}

/* ----------------------------------------------------------------------------------------------
 * graphs */

enum { BYTES = 1 << 16 };
static _Alignas(1024) char tensors[NATTEN_ROLES][BYTES], workspaces[2][1 << 20];
static char results[3][NATTEN_ROLES][BYTES];

static void fill(unsigned seed)
{
    static const natten_role inputs[] = {NATTEN_QUERY,           NATTEN_KEY, NATTEN_VALUE,
                                         NATTEN_D_OUT,           NATTEN_RPB, NATTEN_ADDITIONAL_KEY,
                                         NATTEN_ADDITIONAL_VALUE};
    memset(tensors, 0xff, sizeof tensors);
    for (int i = 0; i < 7; i++)
        for (size_t j = 0; j < BYTES / 2; j++) {
            seed = seed * 1664525 + 1013904223;
            /* bfloat16 from -2 to 2 */
            ((uint16_t *)tensors[inputs[i]])[j] =
                (uint16_t)(0x3f80 ^ (seed >> 16 & 0x8000) ^ (seed >> 12 & 0x7f));
        }
}

/* A forward and its backward, from the tensors of all roles. */
static natten_status step(const char *text, void *stream)
{
    natten_status status = NATTEN_OK;
    for (int i = 0; status == NATTEN_OK && i < 2; i++) {
        natten_problem problem = problem_of(text, i ? NATTEN_BACKWARD : NATTEN_FORWARD);
        problem.roles |= natten_bit(NATTEN_LSE);
        natten_problem_pack(&problem, NATTEN_HEADS_LAST);
        natten_run run = {.workspace = workspaces[i], .stream = stream};
        for (int role = 0; role < NATTEN_ROLES; role++)
            run.data[role] = problem.roles >> role & 1 ? tensors[role] : NULL;
        natten_plan *plan;
        status = natten_plan_create(&problem, i ? name : NULL, &plan);
        if (status == NATTEN_OK) {
            CHECK(natten_plan_workspace(plan) <= sizeof *workspaces);
            status = natten_plan_run(plan, &run);
            natten_plan_destroy(plan);
        }
    }
    return status;
}

static int is_same(int a, int b, natten_role role)
{
    return !memcmp(results[a][role], results[b][role], BYTES);
}

/* A step that is captured before anything of it was ever compiled, replayed with other numbers in
 * the same places, gives what the same step gives. */
static void graph(const char *text, int steps)
{
    static const natten_role bits[] = {NATTEN_OUT,   NATTEN_LSE,     NATTEN_D_QUERY,
                                       NATTEN_D_KEY, NATTEN_D_VALUE, NATTEN_D_RPB};
    void *driver = dlopen("libcuda.so.1", RTLD_NOW), *address;
    void (*capture)(int);
    int (*replay)(void);
    address = dlsym(driver, "host_capture");
    memcpy(&capture, &address, sizeof address);
    address = dlsym(driver, "host_replay");
    memcpy(&replay, &address, sizeof address);
    if (!capture || !replay) {
        unit_fail("the loader does not find the driver made for tests");
        return;
    }
    capture(1);
    CHECK(step(text, (void *)1) == NATTEN_OK);
    capture(0);
    for (int i = 0; i < 2; i++) {
        fill((unsigned)i + 1);
        CHECK(replay() == steps);
        memcpy(results[i], tensors, sizeof tensors);
    }
    fill(2);
    CHECK(step(text, NULL) == NATTEN_OK);
    memcpy(results[2], tensors, sizeof tensors);
    for (int i = 0; i < (strstr(text, "rpb") ? 6 : 5); i++) {
        int any_order = bits[i] == NATTEN_D_QUERY && strstr(text, "kvp");
        CHECK(!is_same(0, 1, bits[i]));
        CHECK(any_order || is_same(1, 2, bits[i]));
    }
}

static void graphs(void)
{
    unit_test("a graph captures a whole step");
    char folder[] = "/tmp/natten-graph-XXXXXX", command[64];
    CHECK(mkdtemp(folder) != NULL);
    setenv("NATTEN_CACHE_DIR", folder, 1);
    /* One forward; counters and sums set, delta, d_query, d_key and d_value. */
    graph("b1h2d16_40_w9_bf16", 1 + 4);
    graph("b1h2d16_40_w9_bf16_kvp_choice1", 1 + 4);
    graph("b1h2d16_9x10_w3x3_rpb_bf16", 1 + 5);                /* and the bias' gradient */
    graph("b1h4d24_40_w9_bf16_kvp_little_choice1", 1 + 4 * 4); /* a head at a time */
    /* Parts; beforehand delta and the gradients of additional tokens; sums are set for each. */
    graph("b1h2d16_40_w3_d10_bf16", 5 + 1 + 5 * 3);
    graph("b1h2d16_40_w3_d10_rpb_add3_bf16", 5 + 1 + 2 + 5 * 3 + 1);
    graph("b1h2d16_40_w3_d10_bf16_kvp", 5 + 5 * 4);
    snprintf(command, sizeof command, "rm -rf %s", folder);
    CHECK(system(command) == 0);
}

int main(void)
{
    ahead(); /* before anything starts CUDA, as it forks */
    graphs();
    ways();
    slow();
    workspace();
    return unit_end("test_sm90_backward");
}
