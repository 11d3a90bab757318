/* SPDX-License-Identifier: MIT
 * check: every kernel of the list against the reference, over problem strings (problem_string.h).
 * For each problem and each kernel that takes it: outputs poisoned before, everything around them
 * intact and every element written after; inputs unchanged; the same bits when run twice, by 1, 2,
 * 3 and 5 workers, aligned and unaligned, before and behind forbidden pages; errors within
 * trial_compare's bounds. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "bench.h"
#include "device_memory.h"
#include "peak.h"
#include "trial.h"

enum { KERNELS = 256 };

typedef struct options {
    uint64_t seed;
    const char *kernel; /* only kernels whose names begin so; "!name": only others */
    int op;             /* -1: as the problem says */
    int verbose;
    int typical; /* see trial.h */
    int bench, threads, csv, taken, choices, huge, some;
    const char *with; /* an option that every problem gets besides its own */
} options;

typedef struct record {
    int passed, failed, refused;
    double error[NATTEN_DTYPES]; /* the worst; of a lse not counted */
    double worst;                /* error over allowed error, and where that was */
    natten_role role;
    char problem[300];
} record;

static record records[KERNELS];
static int failures, passes;

static void fail(const options *o, const char *kernel, const char *problem, const char *what)
{
    printf("FAIL %s: %s\n     again: check -s %llu -k %s %s\n", kernel, what,
           (unsigned long long)o->seed, kernel, problem);
}

static int is_cuda(const char *kernel) { return !strncmp(kernel, "cuda", 4); }

/* Whether the parts of d_query may be added up in any order, so that its bits vary. */
static int is_in_any_order(const natten_plan *plan, const trial *t)
{
    return is_cuda(natten_plan_kernel(plan)) &&
           t->problem.preferences & NATTEN_PREFER_KV_PARALLEL &&
           !strcmp(natten_plan_choice(plan), "one kernel");
}

/* The elements' bytes of all outputs but those `except`, one after the other. */
static char *result_bytes(const trial *t, const tensor tensors[NATTEN_ROLES], uint64_t except,
                          size_t *size)
{
    const uint64_t outputs = t->outputs & ~except;
    *size = 0;
    for (int role = 0; role < NATTEN_ROLES; role++)
        if (outputs >> role & 1)
            *size += (size_t)tensor_count(&tensors[role]) * tensor_element(&tensors[role]);
    char *bytes = malloc(*size + 1), *at = bytes;
    for (int role = 0; bytes && role < NATTEN_ROLES; role++)
        if (outputs >> role & 1) {
            tensor_bytes(&tensors[role], at);
            at += (size_t)tensor_count(&tensors[role]) * tensor_element(&tensors[role]);
        }
    return bytes;
}

/* NULL, or which output is wrong. */
static const char *compare_outputs(const trial *t, const tensor tensors[NATTEN_ROLES],
                                   record *record, const char *problem)
{
    static char complaint[300];
    for (int role = 0; role < NATTEN_ROLES; role++) {
        if (!(t->outputs >> role & 1))
            continue;
        double *got = malloc((size_t)tensor_count(&tensors[role]) * sizeof *got + 1);
        if (!got)
            return "no memory";
        tensor_read(&tensors[role], got);
        trial_error error = trial_compare(t, (natten_role)role, got);
        free(got);
        double *most = &record->error[t->problem.dtype];
        if (role != NATTEN_LSE && error.worst > *most)
            *most = error.worst;
        if (error.share > record->worst) {
            record->worst = error.share;
            record->role = (natten_role)role;
            snprintf(record->problem, sizeof record->problem, "%s", problem);
        }
        if (error.share > 1) {
            snprintf(complaint, sizeof complaint,
                     "%s: error %.3g, allowed %.3g; element %lld is %.9g, should be %.9g",
                     role_name((natten_role)role), error.worst, error.allowed, (long long)error.at,
                     error.got, error.expected);
            return complaint;
        }
    }
    return NULL;
}

static const char *check_memory(const trial *t, tensor tensors[NATTEN_ROLES])
{
    static char complaint[100];
    for (int role = 0; role < NATTEN_ROLES; role++) {
        if (!(t->problem.roles >> role & 1))
            continue;
        int output = (int)(t->outputs >> role & 1), same = 1;
        if (!output) {
            double *now = malloc((size_t)tensor_count(&tensors[role]) * sizeof *now + 1);
            if (!now)
                return "no memory";
            tensor_read(&tensors[role], now);
            for (int64_t i = 0; i < tensor_count(&tensors[role]); i++)
                same &=
                    now[i] == t->values[role][i] || (isnan(now[i]) && isnan(t->values[role][i]));
            free(now);
        }
        if (!same || !tensor_is_intact(&tensors[role])) {
            snprintf(complaint, sizeof complaint,
                     same ? "wrote beside the elements of %s" : "changed its input %s",
                     role_name((natten_role)role));
            return complaint;
        }
    }
    return NULL;
}

/* One run; its bits must be those of the first. On a GPU a kernel may hand addresses that are not
 * aligned to another one, whose bits are its own. */
static const char *check_run(const trial *t, const natten_plan *plan, placement where, int threads,
                             char **first, record *record, const char *problem)
{
    tensor tensors[NATTEN_ROLES];
    natten_run run = {.threads = threads};
    const char *complaint = "no memory";
    if (trial_tensors(t, where, tensors, &run)) {
        if (is_cuda(natten_plan_kernel(plan)))
            complaint = device_run(plan, tensors, run);
        else
            complaint = natten_plan_run(plan, &run) == NATTEN_OK ? NULL : natten_last_error();
        size_t size;
        int other = where == PLACE_ODD && is_cuda(natten_plan_kernel(plan));
        int varies = is_in_any_order(plan, t);
        uint64_t except = varies ? natten_bit(NATTEN_D_QUERY) : 0;
        char *bytes = complaint ? NULL : result_bytes(t, tensors, except, &size);
        if (!complaint && (!*first || other || varies))
            complaint = compare_outputs(t, tensors, record, problem);
        if (!complaint && *first && !other && memcmp(*first, bytes, size))
            complaint = "not the same bits";
        if (!complaint)
            complaint = check_memory(t, tensors);
        if (!*first)
            *first = bytes;
        else
            free(bytes);
    }
    trial_tensors_free(tensors);
    return complaint;
}

static const char *check_plan(const trial *t, const natten_plan *plan, record *record,
                              const char *problem)
{
    static const struct {
        placement where;
        int threads;
        const char *what;
    } runs[] = {{PLACE_START, 1, "1 worker"},
                {PLACE_END, 3, "3 workers, before a forbidden page"},
                {PLACE_START, 1, "1 worker, second run"},
                {PLACE_ODD, 2, "2 workers, one element off"},
                {PLACE_ODD, 1, "1 worker, one element off"},
                {PLACE_END, 5, "5 workers, before a forbidden page"}};
    static char complaint[500];
    char *first = NULL;
    const char *wrong = NULL;
    /* The reference is slow and has one worker. */
    size_t count = strstr(natten_plan_kernel(plan), "reference") ? 2 : sizeof runs / sizeof *runs;
    for (size_t i = 0; !wrong && i < count; i++)
        if ((wrong = check_run(t, plan, runs[i].where, runs[i].threads, &first, record, problem))) {
            snprintf(complaint, sizeof complaint, "(%s) %s", runs[i].what, wrong);
            wrong = complaint;
        }
    free(first);
    return wrong;
}

/* The plan of exactly this kernel. NULL: it does not take the problem; *reason is then its
 * sentence, or NULL when it is a kernel of another op. */
static natten_plan *plan_of(const natten_problem *problem, const char *name, const char **reason)
{
    static char sentence[400];
    natten_plan *plan;
    *reason = NULL;
    natten_status status = natten_plan_create(problem, name, &plan);
    if (status == NATTEN_OK && !strcmp(natten_plan_kernel(plan), name))
        return plan;
    natten_plan_destroy(plan);
    char line[100];
    snprintf(line, sizeof line, "\n%s: ", name);
    const char *found = strstr(natten_last_error(), line);
    if (status == NATTEN_ERROR_UNSUPPORTED && found) {
        found += strlen(line);
        snprintf(sentence, sizeof sentence, "%.*s", (int)strcspn(found, "\n"), found);
        *reason = sentence;
    } else if (status != NATTEN_OK && status != NATTEN_ERROR_UNSUPPORTED) {
        *reason = natten_last_error();
    }
    return NULL;
}

static int is_asked_for(const options *o, const char *name)
{
    if (!o->kernel)
        return 1;
    const int others = *o->kernel == '!';
    return others != !strncmp(name, o->kernel + others, strlen(o->kernel + others));
}

/* Returns how many kernels took the problem. What is expected is worked out for the first. */
static int check_op(const test_problem *test, natten_op op, const options *o)
{
    natten_problem problem;
    char text[300];
    trial t;
    if (!problem_of_op(test, op, &problem))
        return 0;
    const natten_problem on_cpu = problem;
    snprintf(text, sizeof text, "%s_%s", op_name(op), test->text);
    const char *name, *reason, *complaint = NULL;
    int taken = 0;
    for (size_t i = 0; !complaint && i < KERNELS && (name = natten_kernel_name(i)); i++) {
        if (!is_asked_for(o, name))
            continue;
        problem.device = is_cuda(name) ? NATTEN_CUDA : NATTEN_CPU;
        natten_plan *plan = plan_of(&problem, name, &reason);
        if (!plan) {
            records[i].refused += reason != NULL;
            if (reason && o->verbose)
                printf("%s refuses %s: %s\n", name, text, reason);
            continue;
        }
        if (!taken++ && (complaint = trial_make(&t, &on_cpu, o->seed))) {
            fail(o, "cpu-reference", text, complaint);
            failures++;
            natten_plan_destroy(plan);
            break;
        }
        t.kernel = name;
        t.typical = o->typical;
        const char *wrong = check_plan(&t, plan, &records[i], text);
        natten_plan_destroy(plan);
        if (wrong)
            fail(o, name, text, wrong);
        else if (o->verbose)
            printf("ok   %s %s\n", name, text);
        records[i].failed += wrong != NULL;
        records[i].passed += wrong == NULL;
    }
    if (taken)
        trial_free(&t);
    return taken;
}

static int check_problem(const char *given, const options *o)
{
    char text[400];
    test_problem test;
    snprintf(text, sizeof text, o->with ? "%s_%s" : "%s", given, o->with);
    const char *complaint = problem_parse(text, &test);
    if (complaint) {
        printf("FAIL %s\n", complaint);
        failures++;
        return 0;
    }
    int taken = 0;
    for (int op = 0; op < NATTEN_OPS; op++)
        if ((test.op < 0 || test.op == op) && (o->op < 0 || o->op == op)) {
            if (o->bench)
                bench_problem(&test, (natten_op)op,
                              &(bench_options){o->kernel, o->seed, o->threads, o->csv, o->taken,
                                               o->choices, o->huge});
            else
                taken += check_op(&test, (natten_op)op, o);
        }
    return taken;
}

static int check_file(const char *path, const options *o)
{
    char line[256];
    FILE *file = fopen(path, "r");
    if (!file) {
        printf("FAIL cannot open %s\n", path);
        return failures++;
    }
    while (fgets(line, sizeof line, file)) {
        line[strcspn(line, " #\r\n")] = 0;
        if (*line)
            check_problem(line, o);
    }
    return fclose(file);
}

/* So many; or, of --some, so many that some kernel takes, among a thousand times as many. */
static void check_random(int count, const options *o)
{
    uint64_t random = o->seed;
    for (int i = 0, tried = 0; i < count && tried < 1000 * count; tried++) {
        char text[256];
        problem_random(&random, text, sizeof text);
        int taken = check_problem(text, o);
        i += !o->some || taken;
    }
}

static void report(void)
{
    const char *name;
    printf("%-27s %6s %6s %7s  %29s  %s\n", "kernel", "passed", "failed", "refused",
           "worst error: f32 f64 f16 bf16", "nearest to its bound");
    for (size_t i = 0; i < KERNELS && (name = natten_kernel_name(i)); i++) {
        const record *r = &records[i];
        passes += r->passed;
        failures += r->failed;
        if (r->passed + r->failed)
            printf("%-27s %6d %6d %7d  %.1e %.1e %.1e %.1e  %.0f%% %s %s\n", name, r->passed,
                   r->failed, r->refused, r->error[NATTEN_F32], r->error[NATTEN_F64],
                   r->error[NATTEN_F16], r->error[NATTEN_BF16], 100 * r->worst,
                   r->worst > 0 ? role_name(r->role) : "", r->problem);
    }
    for (size_t i = 0; i < KERNELS && (name = natten_kernel_name(i)); i++)
        if (records[i].refused && !records[i].passed && !records[i].failed)
            printf("%-27s refused all of %d\n", name, records[i].refused);
}

static int usage(void)
{
    puts("check [option...] [problem or file.txt...]\n"
         "  -s seed     data (and --random's problems); else from the clock\n"
         "  -k name     only kernels whose names begin so; !name: only others\n"
         "  -o op       forward, backward, qk, qk-backward, av, av-backward; else all\n"
         "  -v          every check, and why kernels refuse\n"
         "  --with kvp  an option that every problem gets besides its own\n"
         "  --typical   rounded weights cost no more than usual (for chosen seeds)\n"
         "  --random n  n random small problems over all features; --some n: that are taken\n"
         "  --bench     time instead; -t threads (1), --csv, --taken: the first kernel only,\n"
         "              --choices: of that kernel, --busy: by processor time, one thread,\n"
         "              --huge: tensors on huge pages");
    return 2;
}

/* Options first; what is left are problems. Returns the index of the first, 0 if misused. */
static int read_options(int argc, char **argv, options *o, int *random_count)
{
    int i = 1;
    for (; i < argc && argv[i][0] == '-'; i++) {
        const char *name = argv[i];
        int takes = !strcmp(name, "-s") || !strcmp(name, "-k") || !strcmp(name, "-o") ||
                    !strcmp(name, "-t") || !strcmp(name, "--random") || !strcmp(name, "--with") ||
                    !strcmp(name, "--some");
        if (takes && ++i == argc)
            return 0;
        if (!strcmp(name, "-s"))
            o->seed = strtoull(argv[i], NULL, 10);
        else if (!strcmp(name, "-k"))
            o->kernel = argv[i];
        else if (!strcmp(name, "-o") && (o->op = op_from_name(argv[i])) < 0)
            return 0;
        else if (!strcmp(name, "--with"))
            o->with = argv[i];
        else if (!strcmp(name, "-t"))
            o->threads = atoi(argv[i]);
        else if (!strcmp(name, "--random") || !strcmp(name, "--some")) {
            *random_count = atoi(argv[i]);
            o->some = name[2] == 's';
        } else if (!strcmp(name, "-v"))
            o->verbose = 1;
        else if (!strcmp(name, "--bench"))
            o->bench = 1;
        else if (!strcmp(name, "--busy"))
            seconds_of_processor();
        else if (!strcmp(name, "--csv"))
            o->csv = 1;
        else if (!strcmp(name, "--typical"))
            o->typical = 1;
        else if (!strcmp(name, "--taken"))
            o->taken = 1;
        else if (!strcmp(name, "--choices"))
            o->choices = 1;
        else if (!strcmp(name, "--huge"))
            o->huge = 1;
        else if (!takes)
            return 0;
    }
    return i;
}

int main(int argc, char **argv)
{
    int random_count = 0;
    options o = {.seed = (uint64_t)time(NULL), .op = -1, .threads = 1};
    int first = read_options(argc, argv, &o, &random_count);
    if (!first || (first == argc && !random_count))
        return usage();
    printf("seed %llu\n", (unsigned long long)o.seed);
    for (int i = first; i < argc; i++) {
        size_t length = strlen(argv[i]);
        if (length > 4 && !strcmp(argv[i] + length - 4, ".txt"))
            check_file(argv[i], &o);
        else
            check_problem(argv[i], &o);
        fflush(stdout);
    }
    check_random(random_count, &o);
    if (o.bench)
        return failures > 0;
    report();
    printf("check: %d passed, %d failed, 0 skipped\n", passes, failures);
    return failures > 0;
}
