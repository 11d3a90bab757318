/* SPDX-License-Identifier: MIT
 * An NVRTC for tests: it has a C compiler make a shared object of a device text, with the host text
 * of the words. HOST_MUTANT=text.cu:n leaves out the n-th statement that waits (a line with a word
 * that ends in _barrier, _wait or _fence) of the text and of its own headers, and says in its
 * log which; past the last one it fails. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))

enum {
    OUT_OF_MEMORY = 1,
    INVALID = 3,
    INVALID_OPTION = 5,
    COMPILATION = 6,
    OPTIONS = 64,
    TEMPLATES = 16
};

typedef struct program {
    char folder[64], name[64];
    struct {
        char *name, *text;
    } templates[TEMPLATES];
    int template_count;
    char *text, *result, log[8192];
    size_t size;
    int is_ptx; /* in name: the driver takes a shared object for either */
} program;

#define NVRTC(name, parameters) EXPORT int name parameters;
#include "cuda/driver.def"

int nvrtcVersion(int *major, int *minor)
{
    *major = 13;
    *minor = 0;
    return 0;
}

int nvrtcGetNumSupportedArchs(int *count)
{
    *count = 3;
    return 0;
}

int nvrtcGetSupportedArchs(int *archs)
{
    const int known[] = {75, 80, 90};
    memcpy(archs, known, sizeof known);
    return 0;
}

static int write_file(const char *folder, const char *name, const char *text)
{
    char path[256];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    for (char *at = path + strlen(folder) + 1; (at = strchr(at, '/')); at++) {
        *at = 0;
        mkdir(path, 0700);
        *at = '/';
    }
    FILE *file = fopen(path, "w");
    if (!file)
        return 0;
    fputs(text, file);
    return fclose(file) == 0;
}

static int includes(const char *text, const char *header)
{
    char line[128];
    snprintf(line, sizeof line, "#include \"%s\"\n", header);
    return strstr(text, line) != NULL;
}

/* A header of this text's own, "device/sm90_rows.h" of "sm90_forward.cu", that it includes, itself
 * or through another one. */
static int belongs(const program *p, const char *header)
{
    size_t length = strcspn(p->name, "_.");
    if (strncmp(header, "device/", 7) || strncmp(header + 7, p->name, length))
        return 0;
    for (int i = 0; i < p->template_count; i++) {
        if (!strcmp(p->templates[i].name, header))
            return 0;
        if (includes(p->templates[i].text, header))
            return 1;
    }
    return includes(p->text, header);
}

/* Until nothing is found any more. */
static void find_templates(program *p, int headers, const char *const *texts,
                           const char *const *names)
{
    for (int i = 0; i < headers && p->template_count < TEMPLATES; i++)
        if (belongs(p, names[i])) {
            p->templates[p->template_count].name = strdup(names[i]);
            p->templates[p->template_count++].text = strdup(texts[i]);
            i = -1;
        }
}

int nvrtcCreateProgram(void **result, const char *text, const char *name, int headers,
                       const char *const *header_texts, const char *const *header_names)
{
    program *p = calloc(1, sizeof *p);
    *result = p;
    if (!p || !(p->text = strdup(text)))
        return OUT_OF_MEMORY;
    snprintf(p->name, sizeof p->name, "%s", name);
    snprintf(p->folder, sizeof p->folder, "/tmp/natten-host-XXXXXX");
    if (!mkdtemp(p->folder))
        return INVALID;
    /* The C compiler has its own standard headers. */
    for (int i = 0; i < headers; i++) {
        const char *header = header_names[i];
        if (strncmp(header, "std", 3) && !write_file(p->folder, header, header_texts[i]))
            return INVALID;
    }
    find_templates(p, headers, header_texts, header_names);
    return 0;
}

static int run(char *const *words, const char *log)
{
    int status;
    pid_t child = fork();
    if (child == 0) {
        int file = open(log, O_CREAT | O_TRUNC | O_WRONLY, 0600);
        dup2(file, 2);
        execvp(words[0], words);
        _exit(127);
    }
    while (waitpid(child, &status, 0) < 0 && errno == EINTR)
        ;
    return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

int nvrtcDestroyProgram(void **result)
{
    program *p = *result;
    char *words[] = {"rm", "-rf", p->folder, NULL};
    run(words, "/dev/null");
    for (int i = 0; i < p->template_count; i++) {
        free(p->templates[i].name);
        free(p->templates[i].text);
    }
    free(p->text);
    free(p->result);
    free(p);
    *result = NULL;
    return 0;
}

static int waits(const char *line)
{
    return strstr(line, "_barrier(") || strstr(line, "_wait(") || strstr(line, "_fence(") ||
           strstr(line, "_wait_first(");
}

/* Blanks the statement of the n-th line that waits. Statements that wait are lines of their own. */
static int mutate(program *p, char *text, const char *name, int *wanted)
{
    int number = 0;
    for (char *line = text; line && *line;) {
        char *end = strchr(line, '\n');
        if (!end)
            return 0;
        *end = 0;
        number++;
        int found = line[0] == ' ' && waits(line) && end[-1] == ';' && --*wanted == 0;
        if (found) {
            snprintf(p->log, sizeof p->log, "without line %d of %s: %s\n", number, name, line);
            memset(line, ' ', (size_t)(end - line));
            end[-1] = ';';
        }
        *end = '\n';
        if (found)
            return 1;
        line = end + 1;
    }
    return 0;
}

/* 0: there are fewer such statements. */
static int mutate_any(program *p, int wanted)
{
    if (mutate(p, p->text, "the text", &wanted))
        return 1;
    for (int i = 0; i < p->template_count; i++)
        if (mutate(p, p->templates[i].text, p->templates[i].name, &wanted))
            return write_file(p->folder, p->templates[i].name, p->templates[i].text);
    return 0;
}

static char *read_file(const char *path, size_t *size)
{
    struct stat status;
    int file = open(path, O_RDONLY);
    if (file < 0 || fstat(file, &status))
        return NULL;
    char *bytes = calloc(1, (size_t)status.st_size + 1);
    *size = bytes ? (size_t)read(file, bytes, (size_t)status.st_size) : 0;
    close(file);
    return bytes;
}

/* As nvrtcGetSupportedArchs says, but for sm_80, of which it is wrong: for tests. */
static int takes_architecture(program *p, int count, const char *const *options)
{
    static const char *const known[] = {"sm_75", "sm_90", "sm_90a", "compute_90"};
    for (int i = 0; i < count; i++) {
        const char *arch = strchr(options[i], '=');
        if (!arch || strncmp(options[i], "--gpu-architecture=", 19))
            continue;
        for (int j = 0; j < 4; j++)
            if (!strcmp(arch + 1, known[j])) {
                p->is_ptx = j == 3;
                return 1;
            }
    }
    snprintf(p->log, sizeof p->log, "invalid value for --gpu-architecture\n");
    return 0;
}

int nvrtcCompileProgram(void *result, int count, const char *const *options)
{
    program *p = result;
    const char *mutant = getenv("HOST_MUTANT");
    char source[128], object[128], log[128], include[128];
    /* -O0: a kernel runs for less time than gcc would take to make it faster. */
    char *words[OPTIONS + 24] = {HOST_CC, "-x",    "c",       "-std=gnu11", "-O0",
                                 "-w",    "-fPIC", "-shared", include,      "-I" HOST_TESTS};
    size_t named = strlen(p->name);
    if (!takes_architecture(p, count, options))
        return INVALID_OPTION;
    int is_mutant = mutant && !strncmp(mutant, p->name, named) && mutant[named] == ':';
    if (is_mutant && !mutate_any(p, atoi(mutant + named + 1))) {
        /* Sentences of refusals are cut where specialisations are long. */
        fprintf(stderr, "there is no statement %s that waits\n", mutant);
        return COMPILATION;
    }
    snprintf(source, sizeof source, "%s/kernel.c", p->folder);
    snprintf(object, sizeof object, "%s/kernel.so", p->folder);
    snprintf(log, sizeof log, "%s/log", p->folder);
    snprintf(include, sizeof include, "-I%s", p->folder);
    int at = 10;
    for (int i = 0; i < count && at < OPTIONS; i++)
        if (!strncmp(options[i], "-D", 2))
            words[at++] = (char *)options[i];
    char *const rest[] = {"-o", object, source, "-L" HOST_LIBRARIES, "-l:libcuda.so.1", "-lm"};
    memcpy(words + at, rest, sizeof rest);
    if (!write_file(p->folder, "kernel.c", p->text))
        return INVALID;
    int good = run(words, log);
    size_t size, said = strlen(p->log);
    char *text = read_file(log, &size);
    snprintf(p->log + said, sizeof p->log - said, "%s", text ? text : "");
    free(text);
    p->result = good ? read_file(object, &p->size) : NULL;
    return p->result ? 0 : COMPILATION;
}

int nvrtcGetProgramLogSize(void *result, size_t *bytes)
{
    *bytes = strlen(((program *)result)->log) + 1;
    return 0;
}

int nvrtcGetProgramLog(void *result, char *log)
{
    strcpy(log, ((program *)result)->log);
    return 0;
}

int nvrtcGetCUBINSize(void *result, size_t *bytes)
{
    *bytes = ((program *)result)->size;
    return ((program *)result)->is_ptx ? INVALID : 0;
}

int nvrtcGetCUBIN(void *result, char *cubin)
{
    memcpy(cubin, ((program *)result)->result, ((program *)result)->size);
    return 0;
}

int nvrtcGetPTXSize(void *result, size_t *bytes)
{
    *bytes = ((program *)result)->size;
    return ((program *)result)->is_ptx ? 0 : INVALID;
}

int nvrtcGetPTX(void *result, char *ptx) { return nvrtcGetCUBIN(result, ptx); }
