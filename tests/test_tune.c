/* SPDX-License-Identifier: MIT
 * Choices: each gives right results; what tuning remembers, in memory, as text and in files. */
#define _GNU_SOURCE
#include <dirent.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "device_memory.h"
#include "trial.h"
#include "unit.h"

enum { MOST_BYTES = 1 << 19, CALLERS = 4 };

static const natten_tuning quick = {.warmups = 0, .rounds = 2};
static char folder[] = "/tmp/natten-tune-XXXXXX";

static int make_trial(trial *t, const char *text, natten_op op)
{
    test_problem test;
    natten_problem problem;
    if (problem_parse(text, &test) || !problem_of_op(&test, op, &problem))
        return 0;
    const char *complaint = trial_make(t, &problem, 11);
    CHECK(complaint == NULL);
    return complaint == NULL;
}

/* Runs a plan on fresh tensors; all outputs' bytes, one role after the other, 0 if it failed. */
static size_t run_plan(const trial *t, const natten_plan *plan, char *bytes, size_t ends[])
{
    tensor tensors[NATTEN_ROLES];
    natten_run run = {.threads = 2};
    size_t at = 0;
    CHECK(trial_tensors(t, PLACE_END, tensors, &run));
    const int on_gpu = t->problem.device == NATTEN_CUDA;
    const char *complaint = on_gpu ? device_run(plan, tensors, run) : NULL;
    const int good = on_gpu ? !complaint : natten_plan_run(plan, &run) == NATTEN_OK;
    CHECK(good);
    for (int role = 0; good && role < NATTEN_ROLES; role++) {
        if (!(t->outputs >> role & 1))
            continue;
        tensor *one = &tensors[role];
        double *got = malloc((size_t)tensor_count(one) * sizeof *got);
        tensor_read(one, got);
        trial_error error = trial_compare(t, (natten_role)role, got);
        if (error.share > 1)
            unit_fail("%s: error %g, allowed %g", role_name((natten_role)role), error.worst,
                      error.allowed);
        free(got);
        CHECK(at + (size_t)tensor_count(one) * tensor_element(one) <= MOST_BYTES);
        tensor_bytes(one, bytes + at);
        at += (size_t)tensor_count(one) * tensor_element(one);
        ends[role] = at;
    }
    trial_tensors_free(tensors);
    return at;
}

/* Choices for fewer threads change no bits; no choice does where no sum is over tokens. */
static int has_same_bits(const natten_plan *plan, int role)
{
    return role == NATTEN_ATTN || role == NATTEN_D_ATTN || strstr(natten_plan_choice(plan), "thr");
}

static void expect_bits(const trial *t, const natten_plan *plan, const char *got, const char *usual,
                        const size_t ends[])
{
    size_t from = 0;
    for (int role = 0; role < NATTEN_ROLES; role++) {
        if (!(t->outputs >> role & 1))
            continue;
        if (has_same_bits(plan, role) && memcmp(got + from, usual + from, ends[role] - from))
            unit_fail("%s, choice %lld (%s): other bits of %s", natten_plan_kernel(plan),
                      (long long)t->problem.choice, natten_plan_choice(plan),
                      role_name((natten_role)role));
        from = ends[role];
    }
}

static int64_t try_choices(trial *t, const char *only)
{
    static char usual[MOST_BYTES], got[MOST_BYTES];
    size_t ends[NATTEN_ROLES];
    int64_t choices = 0;
    for (t->problem.choice = 0; t->problem.choice <= choices; t->problem.choice++) {
        natten_plan *plan;
        natten_problem p = t->problem;
        if (natten_plan_create(&p, only, &plan) != NATTEN_OK) {
            CHECK(t->problem.choice == 0); /* a processor without these instructions */
            break;
        }
        choices = natten_plan_choices(plan);
        CHECK(strlen(natten_plan_choice(plan)) > 0);
        CHECK(run_plan(t, plan, t->problem.choice ? got : usual, ends) > 0);
        if (t->problem.choice)
            expect_bits(t, plan, got, usual, ends);
        natten_plan_destroy(plan);
    }
    t->problem.choice = 0;
    return choices;
}

static void test_choices(void)
{
    static const char *const texts[] = {
        "b1h2d8_19x21_w7x7_lse",           "b1h2d8_25x37_w5x7_d3x2_lse_rpb_c01",
        "b1h2d8_700_w33_lse_add3",         "b1h6d8_17x18_w5x5_hk2_lse",
        "b1h1d8_6x9x18_w3x4x5_lse",        "b1h1d16_2x300_w1x91_s1x3_lse",
        "b1h2d8_13x14_w5x5_s2x3_lse_bf16", "b1h1d8_300_w120_lse_f64"};
    static const char *const kernels[] = {"cpu-amx",  "cpu-avx512bf16", "cpu-avx512-",
                                          "cpu-avx2", "cpu-neon",       "cpu-generic"};
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++)
        for (int op = 0; op < NATTEN_OPS; op++) {
            trial t;
            if (!make_trial(&t, texts[i], (natten_op)op))
                continue;
            for (size_t k = 0; k < sizeof kernels / sizeof *kernels; k++) {
                t.kernel = kernels[k];
                int64_t choices = try_choices(&t, kernels[k]);
                CHECK(choices > 2 || k < 5);
            }
            trial_free(&t);
        }
}

static void test_bad_choice(void)
{
    natten_problem p;
    natten_plan *plan;
    trial t;
    CHECK(make_trial(&t, "b1h1d8_9_w3", NATTEN_FORWARD));
    p = t.problem;
    CHECK(natten_plan_create(&p, NULL, &plan) == NATTEN_OK);
    char words[80];
    snprintf(words, sizeof words, "choice must be 0 to %d", (int)natten_plan_choices(plan));
    p.choice = natten_plan_choices(plan) + 1;
    natten_plan_destroy(plan);
    CHECK(natten_plan_create(&p, NULL, &plan) == NATTEN_ERROR_ARGUMENT && !plan);
    CHECK(unit_error_has(words));
    p.choice = -1;
    CHECK(natten_plan_create(&p, NULL, &plan) == NATTEN_ERROR_ARGUMENT && !plan);
    CHECK(unit_error_has("got -1"));
    p.choice = 1;
    CHECK(natten_plan_create(&p, "cpu-reference", &plan) == NATTEN_ERROR_ARGUMENT && !plan);
    CHECK(unit_error_has("choice must be 0 to 0") && unit_error_has("got 1"));
    CHECK(natten_tune(&p, NULL, &quick, NULL) == NATTEN_ERROR_ARGUMENT);
    natten_run none = {0};
    CHECK(natten_tune(&t.problem, &none, &quick, NULL) == NATTEN_ERROR_ARGUMENT);
    CHECK(unit_error_has("NULL"));
    CHECK(natten_tune(&t.problem, &none, &(natten_tuning){.rounds = 0}, NULL) ==
          NATTEN_ERROR_ARGUMENT);
    CHECK(natten_autotune((natten_op)6, &quick) == NATTEN_ERROR_ARGUMENT);
    CHECK(natten_autotune(NATTEN_QK, &(natten_tuning){.warmups = -1}) == NATTEN_ERROR_ARGUMENT);
    CHECK(unit_error_has("got -1"));
    trial_free(&t);
}

/* A trial with tensors to compute on. */
typedef struct subject {
    trial t;
    tensor tensors[NATTEN_ROLES];
    natten_run run;
} subject;

static void subject_make(subject *s, const char *text, natten_op op)
{
    CHECK(make_trial(&s->t, text, op));
    s->run = (natten_run){.threads = 2};
    CHECK(trial_tensors(&s->t, PLACE_START, s->tensors, &s->run));
}

static void subject_free(subject *s)
{
    trial_tensors_free(s->tensors);
    trial_free(&s->t);
}

static int is_right(const subject *s)
{
    double got[1 << 14];
    int right = 1;
    for (int role = 0; role < NATTEN_ROLES; role++)
        if (s->t.outputs >> role & 1) {
            CHECK(tensor_count(&s->tensors[role]) <= 1 << 14);
            tensor_read(&s->tensors[role], got);
            right &= trial_compare(&s->t, (natten_role)role, got).share <= 1;
        }
    return right;
}

static char *exported(void)
{
    const size_t size = natten_tuned_export(NULL, 0);
    char *text = malloc(size + 1);
    CHECK(natten_tuned_export(text, size + 1) == size && strlen(text) == size);
    return text;
}

static int lines_of(const char *text)
{
    int lines = 0;
    for (; *text; text++)
        lines += *text == '\n';
    return lines;
}

static void expect_lines(int lines)
{
    char *text = exported();
    CHECK(lines_of(text) == lines);
    free(text);
}

static atomic_int told[2];

static void note(int64_t level, const char *text)
{
    CHECK(level == 0 || level == 1);
    CHECK(strlen(text) > 10);
    atomic_fetch_add(&told[level], 1);
}

/* The choice that natten_compute takes. */
static int64_t taken(const natten_problem *problem)
{
    char text[4000];
    natten_explain(problem, text, sizeof text);
    const char *found = strstr(text, "taken (choice ");
    return found ? atoll(found + strlen("taken (choice ")) : -1;
}

/* A text that says the problem's fastest choice is another one. */
static char *altered(const char *text, int64_t choice, const char *words)
{
    char *result = malloc(strlen(text) + 200), digest[33];
    long long choices;
    const char *line = strchr(text, '\n') + 1, *device = line;
    for (int i = 0; i < 5; i++)
        device = strchr(device, '\t') + 1;
    CHECK(sscanf(line, "%32s %*d %lld", digest, &choices) == 2);
    sprintf(result, "%.*s%s\t%lld\t%lld\t1000\t2000\t%.*s\t%s\tproblem\n", (int)(line - text), text,
            digest, (long long)choice, choices, (int)strcspn(device, "\t"), device, words);
    return result;
}

static void test_tune(void)
{
    subject s;
    natten_tuned tuned = {.choice = -1};
    subject_make(&s, "b1h2d8_20x21_w5x5", NATTEN_FORWARD);
    natten_log_set(note);
    CHECK(natten_tune(&s.t.problem, &s.run, &(natten_tuning){.rounds = 3, .thorough = 1}, &tuned) ==
          NATTEN_OK);
    natten_log_set(NULL);
    CHECK(is_right(&s));
    CHECK(tuned.choices > 2 && tuned.choice >= 0 && tuned.choice <= tuned.choices);
    CHECK(tuned.seconds > 0 && tuned.seconds <= tuned.default_seconds);
    CHECK(atomic_exchange(&told[0], 0) >= 3 && atomic_exchange(&told[1], 0) == 1);
    CHECK(taken(&s.t.problem) == 0); /* what is remembered is not asked for */
    char *text = exported();
    CHECK(lines_of(text) == 2);
    CHECK(natten_autotune(NATTEN_FORWARD, &(natten_tuning){.rounds = 0}) == NATTEN_OK);
    CHECK(taken(&s.t.problem) == tuned.choice);
    /* Another choice, as if another process had found it. */
    natten_problem p = s.t.problem;
    natten_plan *plan;
    p.choice = 2;
    CHECK(natten_plan_create(&p, NULL, &plan) == NATTEN_OK);
    char *other = altered(text, 2, natten_plan_choice(plan));
    CHECK(natten_tuned_import(other) == NATTEN_OK && taken(&s.t.problem) == 2);
    CHECK(natten_compute(&s.t.problem, &s.run) == NATTEN_OK && is_right(&s));
    p.choice = 1;
    CHECK(taken(&p) == 1); /* a choice of one's own goes first */
    char *wrong = altered(text, 3, natten_plan_choice(plan));
    CHECK(natten_tuned_import(wrong) == NATTEN_OK && taken(&s.t.problem) == 0);
    natten_plan_destroy(plan);
    CHECK(natten_tuned_import(text) == NATTEN_OK && taken(&s.t.problem) == tuned.choice);
    char *again = exported();
    CHECK(!strcmp(text, again));
    natten_tuned_clear();
    CHECK(taken(&s.t.problem) == 0);
    CHECK(natten_compute(&s.t.problem, &s.run) == NATTEN_OK);
    expect_lines(1); /* rounds = 0: nothing was tried */
    CHECK(natten_autotune(NATTEN_FORWARD, NULL) == NATTEN_OK);
    free(text);
    free(other);
    free(wrong);
    free(again);
    subject_free(&s);
}

static void test_bad_text(void)
{
    static const char *const ends[] = {
        "x\n",
        "00000000000000000000000000000000\t1\t2\t3\t4\td\tw\n",
        "00000000000000000000000000000000\t3\t2\t3\t4\td\tw\tp\n",
        "00000000000000000000000000000000\t-1\t2\t3\t4\td\tw\tp\n",
        "0000000000000000000000000000000g\t1\t2\t3\t4\td\tw\tp\n",
        "00000000000000000000000000000000\t1\t2\t3\t4\td\tw\tp\tq\n",
        "00000000000000000000000000000000\t1\t2\t3\t99999999999999999999\td\tw\tp\n"};
    char *good = exported(), text[1000];
    for (size_t i = 0; i < sizeof ends / sizeof *ends; i++) {
        snprintf(text, sizeof text, "%s00000000000000000000000000000000\t1\t2\t3\t4\td\tw\tp\n%s",
                 good, ends[i]);
        CHECK(natten_tuned_import(text) == NATTEN_ERROR_ARGUMENT);
        CHECK(unit_error_has("Line 3"));
    }
    CHECK(natten_tuned_import(NULL) == NATTEN_ERROR_ARGUMENT);
    CHECK(natten_tuned_import("natten tuned 1 0.0.1\n") == NATTEN_ERROR_ARGUMENT);
    CHECK(unit_error_has(natten_version()));
    char *after = exported();
    CHECK(!strcmp(good, after)); /* with an error, nothing */
    free(good);
    free(after);
}

/* The one file of choices. */
static int file_path(char *path, size_t size)
{
    DIR *list = opendir(folder);
    const struct dirent *entry;
    int count = 0;
    while (list && (entry = readdir(list)))
        if (strstr(entry->d_name, ".tuned")) {
            snprintf(path, size, "%s/%s", folder, entry->d_name);
            count++;
        }
    if (list)
        closedir(list);
    return count == 1;
}

static void damage(const char *path)
{
    FILE *file = fopen(path, "r+");
    CHECK(file && !fseek(file, -9, SEEK_END) && fputc('~', file) == '~');
    if (file)
        fclose(file);
}

static void test_files(void)
{
    subject one, two;
    char path[4096];
    subject_make(&one, "b1h2d8_20x22_w5x5", NATTEN_FORWARD);
    subject_make(&two, "b1h2d8_20x23_w5x5", NATTEN_FORWARD);
    CHECK(natten_autotune(NATTEN_FORWARD, &quick) == NATTEN_OK);
    CHECK(natten_compute(&one.t.problem, &one.run) == NATTEN_OK && is_right(&one));
    char *first = exported();
    CHECK(lines_of(first) == 2 && file_path(path, sizeof path));
    natten_tuned_clear(); /* as if in another process */
    CHECK(natten_compute(&two.t.problem, &two.run) == NATTEN_OK && is_right(&two));
    char *both = exported();
    CHECK(lines_of(both) == 3 && strstr(both, strchr(first, '\n') + 1));
    natten_tuned_clear();
    CHECK(natten_compute(&one.t.problem, &one.run) == NATTEN_OK);
    char *third = exported();
    CHECK(!strcmp(third, both)); /* found, not tuned */
    damage(path);
    natten_tuned_clear();
    taken(&one.t.problem);
    expect_lines(1);
    CHECK(natten_compute(&one.t.problem, &one.run) == NATTEN_OK && is_right(&one));
    natten_tuned_clear();
    taken(&one.t.problem);
    expect_lines(2); /* and the file is whole again */
    CHECK(natten_autotune(NATTEN_FORWARD, NULL) == NATTEN_OK);
    natten_tuned_clear();
    unlink(path);
    free(first);
    free(both);
    free(third);
    subject_free(&one);
    subject_free(&two);
}

static atomic_int misses;

static subject subjects[CALLERS][3]; /* each caller's own */

static void *call_many_times(void *argument)
{
    const int offset = *(int *)argument;
    for (int i = 0; i < 12; i++) {
        const subject *one = &subjects[offset][(i + offset) % 3];
        if (natten_compute(&one->t.problem, &one->run) != NATTEN_OK || !is_right(one))
            atomic_fetch_add(&misses, 1);
        if (i == 6 && offset == 0)
            natten_tuned_clear();
    }
    return NULL;
}

static void test_threads(void)
{
    static const char *const texts[] = {"b1h2d8_12x13_w5x5", "b1h1d8_40_w9", "b1h1d8_9x9_w3x3_lse"};
    static const natten_op ops[] = {NATTEN_FORWARD, NATTEN_QK, NATTEN_BACKWARD};
    pthread_t threads[CALLERS];
    int numbers[CALLERS];
    for (int i = 0; i < 3 * CALLERS; i++)
        subject_make(&subjects[i / 3][i % 3], texts[i % 3], ops[i % 3]);
    for (int op = 0; op < NATTEN_OPS; op++)
        CHECK(natten_autotune((natten_op)op, &quick) == NATTEN_OK);
    for (int i = 0; i < CALLERS; i++) {
        numbers[i] = i;
        CHECK(pthread_create(&threads[i], NULL, call_many_times, &numbers[i]) == 0);
    }
    for (int i = 0; i < CALLERS; i++)
        pthread_join(threads[i], NULL);
    for (int i = 0; i < 3 * CALLERS; i++)
        subject_free(&subjects[i / 3][i % 3]);
    CHECK(atomic_load(&misses) == 0);
    CHECK(natten_tuned_export(NULL, 0) > 100); /* more than the title */
    for (int op = 0; op < NATTEN_OPS; op++)
        CHECK(natten_autotune((natten_op)op, NULL) == NATTEN_OK);
    natten_tuned_clear();
}

/* Tiles of the Hopper kernel, on the driver made for tests. */
static void test_cuda(void)
{
    static char bytes[MOST_BYTES];
    size_t ends[NATTEN_ROLES];
    subject s;
    natten_plan *plan;
    natten_tuned tuned;
    unit_test("tiles of CUDA kernels");
    subject_make(&s, "b1h2d16_9x20_w3x5_bf16", NATTEN_FORWARD);
    natten_problem *p = &s.t.problem;
    p->device = NATTEN_CUDA;
    s.t.kernel = "cuda-sm90-forward";
    int tried = 0;
    CHECK(natten_plan_create(p, "cuda-sm90", &plan) == NATTEN_OK);
    const int64_t choices = natten_plan_choices(plan);
    natten_plan_destroy(plan);
    for (p->choice = 0; p->choice <= choices; p->choice++, tried++) {
        if (natten_plan_create(p, "cuda-sm90", &plan) != NATTEN_OK)
            break;
        CHECK(run_plan(&s.t, plan, bytes, ends) > 0);
        natten_plan_destroy(plan);
    }
    CHECK(choices > 1 && tried > 1);
    p->choice = choices + 1;
    CHECK(natten_plan_create(p, NULL, &plan) != NATTEN_OK);
    p->choice = 0;
    CHECK(natten_tune(p, &s.run, &(natten_tuning){.rounds = 1, .thorough = 1}, &tuned) ==
          NATTEN_OK);
    CHECK(is_right(&s) && tuned.choice < tried && tuned.choices == choices && tuned.seconds > 0);
    char *text = exported();
    CHECK(lines_of(text) == 2 && strstr(text, "host words"));
    free(text);
    natten_tuned_clear();
    s.run.stream = (void *)1; /* which that driver says is captured */
    CHECK(natten_tune(p, &s.run, &quick, NULL) == NATTEN_ERROR_ARGUMENT);
    CHECK(unit_error_has("captured"));
    CHECK(natten_autotune(NATTEN_FORWARD, &quick) == NATTEN_OK);
    CHECK(natten_compute(p, &s.run) == NATTEN_OK && is_right(&s));
    expect_lines(1);
    s.run.stream = NULL;
    CHECK(natten_compute(p, &s.run) == NATTEN_OK && is_right(&s));
    expect_lines(2);
    CHECK(natten_autotune(NATTEN_FORWARD, NULL) == NATTEN_OK);
    subject_free(&s);
}

/* "threads": only what several threads do, for a thread sanitizer; "cuda": only that, for the
 * driver made for tests. */
int main(int argc, char **argv)
{
    const int all = argc < 2, cuda = !all && !strcmp(argv[1], "cuda");
    char command[64];
    CHECK(mkdtemp(folder) && setenv("NATTEN_CACHE_DIR", folder, 1) == 0);
    if (cuda)
        test_cuda();
    if (all) {
        unit_test("every choice is right");
        test_choices();
        unit_test("choices there are not");
        test_bad_choice();
        unit_test("tuned, remembered, exported");
        test_tune();
        unit_test("texts that are none");
        test_bad_text();
        unit_test("files");
        test_files();
    }
    if (!cuda) {
        unit_test("tuned from several threads");
        test_threads();
    }
    snprintf(command, sizeof command, "rm -r %s", folder);
    CHECK(system(command) == 0);
    return unit_end(cuda ? "test_tune cuda" : "test_tune");
}
