/* SPDX-License-Identifier: MIT */
#include "cuda/jit.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "core/env.h"
#include "core/lock.h"
#include "cuda/cache.h"
#include "cuda/driver.h"
#include "cuda/source.h"

#ifndef NATTEN_EVERY_LANE_ARRIVES
#define NATTEN_EVERY_LANE_ARRIVES "0"
#endif

/* What every text is compiled with. ptxas reports registers and spills into the log. The public
 * header marks what it exports with an attribute that NVRTC does not know (1097), and no text uses
 * every word (177). */
static const char *const options[] = {"--device-as-default-execution-space", "--ptxas-options=-v",
                                      "--diag-suppress=1097,177",
                                      ("-DNA_EVERY_LANE_ARRIVES=" NATTEN_EVERY_LANE_ARRIVES)};
enum { OPTIONS = sizeof options / sizeof *options };

enum { CAPTURE_RELAXED = 2 }; /* CUstreamCaptureMode */

/* ----------------------------------------------------------------------------------------------
 * specialisations */

void na_special_init(na_special *special, const char *source, const char *arch)
{
    memset(special, 0, sizeof *special);
    snprintf(special->source, sizeof special->source, "%s", source);
    snprintf(special->arch, sizeof special->arch, "%s", arch);
}

void na_special_set(na_special *special, const char *name, int64_t value)
{
    na_macro *macro = special->macros, *end = macro + NA_MACROS;
    while (macro < end && *macro->name)
        macro++;
    if (macro == end) /* there is room for all of any text: cuda_compile has them all */
        return;
    snprintf(macro->name, sizeof macro->name, "%s", name);
    macro->value = value;
}

size_t na_special_text(const na_special *special, char *text, size_t size)
{
    size_t at = (size_t)snprintf(text, size, "%s %s", special->source, special->arch);
    for (const na_macro *macro = special->macros; macro < special->macros + NA_MACROS; macro++)
        if (*macro->name)
            at += (size_t)snprintf(at < size ? text + at : NULL, at < size ? size - at : 0,
                                   " %s=%lld", macro->name, (long long)macro->value);
    return at;
}

/* Everything that has a say in the result. */
static void key_of(const na_special *special, int major, int minor, char *key, size_t size)
{
    const char *more = na_environment("NVRTC_APPEND_FLAGS");
    int at = snprintf(key, size, "texts %s\nnvrtc %d.%d\noptions", na_source_digest, major, minor);
    for (int i = 0; i < OPTIONS; i++)
        at += snprintf(key + at, size - (size_t)at, " %s", options[i]);
    at += snprintf(key + at, size - (size_t)at, " %.200s\n", more ? more : "");
    na_special_text(special, key + at, size - (size_t)at);
}

void na_arch_of(const na_device *device, int only_this_generation, char arch[NA_ARCH])
{
    const char *why;
    const na_nvrtc *nvrtc = na_nvrtc_find(&why);
    int wanted = device->major * 10 + device->minor, best = 0, count = 0, archs[64];
    snprintf(arch, NA_ARCH, "sm_%d%s", wanted, only_this_generation ? "a" : "");
    if (!nvrtc || nvrtc->nvrtcGetNumSupportedArchs(&count) || count > 64 ||
        nvrtc->nvrtcGetSupportedArchs(archs))
        return;
    for (int i = 0; i < count; i++)
        if (archs[i] <= wanted && archs[i] > best)
            best = archs[i];
    /* A GPU newer than NVRTC: the driver compiles the rest of the way. */
    if (best && best != wanted && !only_this_generation)
        snprintf(arch, NA_ARCH, "compute_%d", best);
}

/* ----------------------------------------------------------------------------------------------
 * compiling */

static void take_log(const na_nvrtc *nvrtc, void *program, char **log)
{
    size_t size = 0;
    nvrtc->nvrtcGetProgramLogSize(program, &size);
    *log = malloc(size + 1);
    if (!*log)
        return;
    (*log)[0] = (*log)[size] = 0;
    nvrtc->nvrtcGetProgramLog(program, *log);
}

static int take_result(const na_nvrtc *nvrtc, void *program, int ptx, na_cubin *cubin)
{
    if (ptx ? nvrtc->nvrtcGetPTXSize(program, &cubin->size)
            : nvrtc->nvrtcGetCUBINSize(program, &cubin->size))
        return 0;
    cubin->bytes = malloc(cubin->size + 1);
    if (!cubin->bytes)
        return 0;
    if (ptx ? nvrtc->nvrtcGetPTX(program, cubin->bytes)
            : nvrtc->nvrtcGetCUBIN(program, cubin->bytes)) {
        free(cubin->bytes);
        return 0;
    }
    return 1;
}

static int compile(const na_nvrtc *nvrtc, void *program, const na_special *special)
{
    char words[NA_MACROS + 1][64];
    const char *list[NA_MACROS + 1 + OPTIONS];
    int count = 0;
    for (; count < OPTIONS; count++)
        list[count] = options[count];
    snprintf(words[0], sizeof words[0], "--gpu-architecture=%s", special->arch);
    list[count++] = words[0];
    for (int i = 0; i < NA_MACROS && *special->macros[i].name; i++) {
        snprintf(words[i + 1], sizeof words[0], "-D%s=%lld", special->macros[i].name,
                 (long long)special->macros[i].value);
        list[count++] = words[i + 1];
    }
    return nvrtc->nvrtcCompileProgram(program, count, list);
}

/* NVRTC has no headers at all; this is what ours want of the standard ones. */
static const na_source standard[] = {
    {"stddef.h", ""},
    {"stdint.h", "typedef unsigned char uint8_t;"
                 "typedef short int16_t; typedef unsigned short uint16_t;"
                 "typedef int int32_t; typedef unsigned uint32_t;"
                 "typedef long long int64_t; typedef unsigned long long uint64_t;"}};
enum { STANDARD = 2, MOST_SOURCES = 64 };

static void *create_program(const na_nvrtc *nvrtc, const char *source)
{
    const char *texts[MOST_SOURCES], *names[MOST_SOURCES], *text = NULL;
    void *program;
    int count = 0;
    for (; count < STANDARD + na_source_count && count < MOST_SOURCES; count++) {
        const na_source *one = count < STANDARD ? &standard[count] : &na_sources[count - STANDARD];
        texts[count] = one->text;
        names[count] = one->name;
        if (!strncmp(one->name, "device/", 7) && !strcmp(one->name + 7, source))
            text = one->text;
    }
    if (!text || nvrtc->nvrtcCreateProgram(&program, text, source, count, texts, names))
        return NULL;
    return program;
}

natten_status na_jit_compile(const na_special *special, na_cubin *cubin, char **log)
{
    const char *why;
    char line[512], *said = NULL;
    const na_nvrtc *nvrtc = na_nvrtc_find(&why);
    natten_status status = NATTEN_OK;
    na_special_text(special, line, sizeof line);
    if (log)
        *log = NULL;
    if (!nvrtc)
        return na_fail(NATTEN_ERROR_UNSUPPORTED, "%s cannot be compiled: %s.", line, why);
    void *program = create_program(nvrtc, special->source);
    if (!program)
        return na_fail(NATTEN_ERROR_UNSUPPORTED, "NVRTC %d.%d (%s) takes no program for %s.",
                       nvrtc->major, nvrtc->minor, nvrtc->path, line);
    int error = compile(nvrtc, program, special);
    take_log(nvrtc, program, &said);
    if (error || !take_result(nvrtc, program, !strncmp(special->arch, "compute", 7), cubin))
        status = na_fail(NATTEN_ERROR_UNSUPPORTED,
                         "NVRTC %d.%d (%s) did not compile %s (error %d): %.600s", nvrtc->major,
                         nvrtc->minor, nvrtc->path, line, error, said ? said : "");
    nvrtc->nvrtcDestroyProgram(&program);
    if (log)
        *log = said;
    else
        free(said);
    return status;
}

/* ----------------------------------------------------------------------------------------------
 * finding */

static int is_off(void)
{
    const char *value = na_environment("NATTEN_JIT");
    return value && !strcmp(value, "off");
}

/* A kernel that any version of NVRTC the driver takes has left on disk. */
static int load_any_version(const na_special *special, na_cubin *cubin)
{
    const char *why;
    char key[2048];
    int version = 0;
    const na_driver *cuda = na_driver_find(&why);
    if (cuda)
        cuda->cuDriverGetVersion(&version);
    for (int major = version / 1000; major >= 12; major--)
        for (int minor = 9; minor >= 0; minor--) {
            key_of(special, major, minor, key, sizeof key);
            if (na_cache_load(key, cubin))
                return 1;
        }
    return 0;
}

/* From disk, or compiled and kept there; that it cannot be kept only matters if it must. */
static natten_status obtain(const na_special *special, na_cubin *cubin, int must_keep)
{
    const char *why;
    char key[2048], line[512];
    const na_nvrtc *nvrtc = na_nvrtc_find(&why);
    if (nvrtc) {
        key_of(special, nvrtc->major, nvrtc->minor, key, sizeof key);
        if (na_cache_load(key, cubin))
            return NATTEN_OK;
    }
    if (nvrtc && !is_off()) {
        natten_status status = na_jit_compile(special, cubin, NULL);
        if (status != NATTEN_OK || na_cache_store(key, cubin) || !must_keep)
            return status;
        free(cubin->bytes);
        return na_fail(NATTEN_ERROR_DEVICE, "There is no folder to keep compiled kernels in.");
    }
    if (load_any_version(special, cubin))
        return NATTEN_OK;
    na_special_text(special, line, sizeof line);
    return na_fail(NATTEN_ERROR_UNSUPPORTED,
                   "No folder of compiled kernels holds %s, and it cannot be compiled: %s.", line,
                   nvrtc ? "NATTEN_JIT is off" : why);
}

/* ----------------------------------------------------------------------------------------------
 * the table in memory */

typedef enum state { MISSING, WORKING, READY } state;

typedef struct entry {
    struct entry *next;
    na_special special;
    state state;
    pid_t worker; /* a child does not wait for what its parent was compiling */
    na_cubin cubin;
    void *library; /* the driver's, for every device */
} entry;

enum { BUCKETS = 64 };
static entry *buckets[BUCKETS];
static pthread_cond_t finished = PTHREAD_COND_INITIALIZER;

static entry *find_entry(const na_special *special)
{
    const unsigned char *byte = (const unsigned char *)special;
    uint32_t hash = 0x811c9dc5u;
    for (size_t i = 0; i < sizeof *special; i++)
        hash = (hash ^ byte[i]) * 0x01000193u;
    entry **bucket = &buckets[hash % BUCKETS], *e = *bucket;
    while (e && memcmp(&e->special, special, sizeof *special))
        e = e->next;
    if (!e && (e = calloc(1, sizeof *e))) {
        e->special = *special;
        e->next = *bucket;
        *bucket = e;
    }
    return e;
}

/* Called and returns with the lock held, but gives it up while it reads or compiles: different
 * kernels compile side by side, the same kernel once. */
static natten_status fill_entry(entry *e)
{
    while (e->state == WORKING && e->worker == getpid())
        na_lock_wait(NA_LOCK_JIT, &finished);
    if (e->state == READY)
        return NATTEN_OK;
    e->state = WORKING;
    e->worker = getpid();
    na_lock_give(NA_LOCK_JIT);
    na_cubin cubin;
    natten_status status = obtain(&e->special, &cubin, 0);
    na_lock_take(NA_LOCK_JIT);
    if (status == NATTEN_OK)
        e->cubin = cubin;
    e->state = status == NATTEN_OK ? READY : MISSING;
    pthread_cond_broadcast(&finished);
    return status;
}

/* ----------------------------------------------------------------------------------------------
 * ahead of its use */

static int preparing;
static pid_t preparing_process;

static void *prepare_entry(void *which)
{
    na_lock_take(NA_LOCK_JIT);
    fill_entry(which);
    preparing--;
    pthread_cond_broadcast(&finished);
    na_lock_give(NA_LOCK_JIT);
    return NULL;
}

/* At exit NVRTC tears itself down: no thread may be inside it then. */
static void finish_preparing(void)
{
    na_lock_take(NA_LOCK_JIT);
    while (preparing && preparing_process == getpid())
        na_lock_wait(NA_LOCK_JIT, &finished);
    na_lock_give(NA_LOCK_JIT);
}

void na_jit_prepare(const na_special *special)
{
    static int registered;
    pthread_t thread;
    if (na_device_is_rehearsed())
        return;
    na_lock_take(NA_LOCK_JIT);
    entry *e = find_entry(special);
    if (!registered)
        registered = atexit(finish_preparing) == 0;
    if (preparing_process != getpid())
        preparing = 0;
    preparing_process = getpid();
    if (registered && e && e->state == MISSING &&
        !pthread_create(&thread, NULL, prepare_entry, e)) {
        pthread_detach(thread);
        preparing++;
    }
    na_lock_give(NA_LOCK_JIT);
}

/* ----------------------------------------------------------------------------------------------
 * loading */

static natten_status load_library(const na_driver *cuda, entry *e)
{
    if (e->library)
        return NATTEN_OK;
    return na_driver_check(
        cuda->cuLibraryLoadData(&e->library, e->cubin.bytes, NULL, NULL, 0, NULL, NULL, 0),
        "cuLibraryLoadData");
}

static natten_status take_function(const na_driver *cuda, entry *e, const char *name,
                                   void **function)
{
    void *loaded;
    /* Loading must not disturb what another stream of this thread is capturing. */
    int mode = CAPTURE_RELAXED;
    natten_status status = na_driver_check(cuda->cuThreadExchangeStreamCaptureMode(&mode),
                                           "cuThreadExchangeStreamCaptureMode");
    if (status != NATTEN_OK)
        return status;
    status = load_library(cuda, e);
    if (status == NATTEN_OK)
        status = na_driver_check(cuda->cuLibraryGetKernel(function, e->library, name),
                                 "cuLibraryGetKernel");
    /* Now, and not at the first launch, which may be a captured one. */
    if (status == NATTEN_OK)
        status =
            na_driver_check(cuda->cuKernelGetFunction(&loaded, *function), "cuKernelGetFunction");
    cuda->cuThreadExchangeStreamCaptureMode(&mode);
    return status;
}

/* For a GPU that need not be here: all but loading. */
static natten_status rehearse(const na_special *special)
{
    na_cubin cubin;
    natten_status status = obtain(special, &cubin, 1);
    if (status == NATTEN_OK)
        free(cubin.bytes);
    return status;
}

natten_status na_jit_function(const na_special *special, const char *name, void **function)
{
    const char *why;
    *function = NULL;
    if (na_device_is_rehearsed())
        return rehearse(special);
    const na_driver *cuda = na_driver_find(&why);
    if (!cuda)
        return na_fail(NATTEN_ERROR_DEVICE, "CUDA cannot be used: %s.", why);
    na_lock_take(NA_LOCK_JIT);
    entry *e = find_entry(special);
    natten_status status =
        e ? fill_entry(e) : na_fail(NATTEN_ERROR_MEMORY, "No memory for a compiled kernel.");
    if (status == NATTEN_OK)
        status = take_function(cuda, e, name, function);
    na_lock_give(NA_LOCK_JIT);
    return status;
}
