/* SPDX-License-Identifier: MIT
 * Finds libcuda and libnvrtc. */
#define _GNU_SOURCE
#include "cuda/driver.h"

#include <dlfcn.h>
#include <link.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "core/env.h"

enum { OLDEST = 12, NEWEST = 29 }; /* major versions of CUDA that are looked for */

static pthread_once_t driver_once = PTHREAD_ONCE_INIT, nvrtc_once = PTHREAD_ONCE_INIT;
static na_driver driver;
static na_nvrtc nvrtc;
static pid_t driver_process;
static int driver_major;
static char driver_why[256], nvrtc_why[768];

/* ISO C has no way from void * to a function; POSIX promises that the bytes do. */
static int take_symbol(void *library, const char *symbol, void *function)
{
    void *address = dlsym(library, symbol);
    memcpy(function, &address, sizeof address);
    return address != NULL;
}

static void find_driver(void)
{
    driver_process = getpid();
    if (na_disabled("cuda")) {
        snprintf(driver_why, sizeof driver_why, "CUDA is switched off by NATTEN_DISABLE");
        return;
    }
    void *library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (!library) {
        snprintf(driver_why, sizeof driver_why, "there is no NVIDIA driver: %s", dlerror());
        return;
    }
    int version = 0;
    if (!take_symbol(library, "cuDriverGetVersion", &driver.cuDriverGetVersion) ||
        driver.cuDriverGetVersion(&version) || version / 1000 < OLDEST) {
        snprintf(driver_why, sizeof driver_why,
                 "the NVIDIA driver is too old: it serves CUDA %d.%d, and %d.0 is needed",
                 version / 1000, version % 1000 / 10, OLDEST);
        return;
    }
    const char *missing = NULL;
#define DRIVER(name, symbol, parameters)                                                           \
    if (!take_symbol(library, symbol, &driver.name))                                               \
        missing = symbol;
#include "cuda/driver.def"
    if (missing) {
        snprintf(driver_why, sizeof driver_why, "the NVIDIA driver has no %s", missing);
        return;
    }
    int error = driver.cuInit(0);
    const char *text = NULL;
    if (error && driver.cuGetErrorString(error, &text) == 0 && text)
        snprintf(driver_why, sizeof driver_why, "the NVIDIA driver does not start: %s", text);
    else if (error)
        snprintf(driver_why, sizeof driver_why, "the NVIDIA driver does not start: error %d",
                 error);
    else
        driver_major = version / 1000;
}

const na_driver *na_driver_find(const char **why)
{
    pthread_once(&driver_once, find_driver);
    *why = driver_why;
    if (driver_major && driver_process != getpid())
        *why = "this process was forked from one that used CUDA already; start it with spawn";
    return driver_major && driver_process == getpid() ? &driver : NULL;
}

natten_status na_driver_check(int error, const char *call)
{
    const char *text = NULL;
    if (!error)
        return NATTEN_OK;
    if (driver.cuGetErrorString(error, &text) || !text)
        text = "unknown error";
    return na_fail(NATTEN_ERROR_DEVICE, "CUDA: %s failed with error %d: %s.", call, error, text);
}

/* NVRTC opens its builtins by their plain name, which finds them only on the loader's path or when
 * they are mapped already. */
static void load_builtins(const char *path)
{
    char name[600];
    const char *end = strrchr(path, '/');
    int length = end ? (int)(end - path + 1) : 0;
    snprintf(name, sizeof name, "%.*slibnvrtc-builtins.so.%d.%d", length, path, nvrtc.major,
             nvrtc.minor);
    dlopen(name, RTLD_NOW | RTLD_LOCAL);
}

static int try_library(const char *path)
{
    void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!library)
        return 0;
    int found = 1;
#define NVRTC(name, parameters) found &= take_symbol(library, #name, &nvrtc.name);
#include "cuda/driver.def"
    if (!found || nvrtc.nvrtcVersion(&nvrtc.major, &nvrtc.minor))
        return 0;
    if (nvrtc.major < OLDEST || (driver_major && nvrtc.major > driver_major)) {
        snprintf(nvrtc_why, sizeof nvrtc_why,
                 "%s is version %d.%d, but the driver takes kernels of CUDA %d to %d", path,
                 nvrtc.major, nvrtc.minor, OLDEST, driver_major);
        return 0;
    }
    Dl_info info;
    void *address;
    memcpy(&address, &nvrtc.nvrtcVersion, sizeof address);
    if (dladdr(address, &info) && info.dli_fname)
        path = info.dli_fname;
    snprintf(nvrtc.path, sizeof nvrtc.path, "%s", path);
    load_builtins(path);
    return 1;
}

static int try_folder(const char *folder, int length, const char *below)
{
    char path[1024];
    for (int major = driver_major ? driver_major : NEWEST; major >= OLDEST; major--) {
        snprintf(path, sizeof path, "%.*s%s/libnvrtc.so.%d", length, folder, below, major);
        if (access(path, R_OK) == 0 && try_library(path))
            return 1;
    }
    return 0;
}

/* The folders where wheels put NVRTC, seen from one where a wheel put something else. */
static int try_beside(const char *path)
{
    static const char *const roots[] = {"/..", "/../..", "/../../.."};
    const char *end = strrchr(path, '/');
    int length = (int)(end - path);
    if (try_folder(path, length, ""))
        return 1;
    char below[64];
    for (int i = 0; i < 3; i++) {
        for (int major = driver_major ? driver_major : NEWEST; major >= OLDEST; major--) {
            snprintf(below, sizeof below, "%s/nvidia/cu%d/lib", roots[i], major);
            if (try_folder(path, length, below))
                return 1;
        }
        snprintf(below, sizeof below, "%s/nvidia/cuda_nvrtc/lib", roots[i]);
        if (try_folder(path, length, below))
            return 1;
    }
    return 0;
}

/* Which of the files that are mapped into the process are looked at. */
static int is_nvrtc(const char *name) { return !strncmp(name, "libnvrtc.so", 11); }

static int is_neighbour(const char *name)
{
    return !strncmp(name, "libcudart", 9) || !strncmp(name, "libtorch_", 9) ||
           !strncmp(name, "libnatten", 9);
}

typedef struct mapped {
    int (*wanted)(const char *name);
    char paths[8][512];
    int count;
} mapped;

static int note_mapped(struct dl_phdr_info *info, size_t size, void *context)
{
    (void)size;
    mapped *m = context;
    const char *name = info->dlpi_name ? strrchr(info->dlpi_name, '/') : NULL;
    if (name && m->wanted(name + 1) && m->count < 8)
        snprintf(m->paths[m->count++], sizeof m->paths[0], "%s", info->dlpi_name);
    return 0;
}

/* Opening libraries while the list of them is walked would lock up: first note, then try. */
static int try_mapped(int (*wanted)(const char *), int (*attempt)(const char *))
{
    mapped m = {.wanted = wanted};
    dl_iterate_phdr(note_mapped, &m);
    for (int i = 0; i < m.count; i++)
        if (attempt(m.paths[i]))
            return 1;
    return 0;
}

static int try_sonames(void)
{
    char name[32];
    for (int major = driver_major ? driver_major : NEWEST; major >= OLDEST; major--) {
        snprintf(name, sizeof name, "libnvrtc.so.%d", major);
        if (try_library(name))
            return 1;
    }
    return 0;
}

static int try_toolkits(void)
{
    const char *roots[] = {na_environment("CUDA_HOME"), "/usr/local/cuda"};
    for (int i = 0; i < 2; i++)
        if (roots[i] && (try_folder(roots[i], (int)strlen(roots[i]), "/lib64") ||
                         try_folder(roots[i], (int)strlen(roots[i]), "/lib")))
            return 1;
    return 0;
}

static void find_nvrtc(void)
{
    const char *ignored, *path = na_environment("NATTEN_NVRTC");
    na_driver_find(&ignored);
    if (path && *path) {
        if (!try_library(path) && !*nvrtc_why)
            snprintf(nvrtc_why, sizeof nvrtc_why, "NATTEN_NVRTC names %s, which is no NVRTC", path);
        return;
    }
    if (try_mapped(is_nvrtc, try_library) || try_mapped(is_neighbour, try_beside) ||
        try_sonames() || try_toolkits())
        return;
    if (!*nvrtc_why)
        snprintf(nvrtc_why, sizeof nvrtc_why,
                 "NVRTC, the compiler for CUDA kernels, is neither beside PyTorch nor on the "
                 "loader's path nor under CUDA_HOME; the package nvidia-cuda-nvrtc has it, and "
                 "NATTEN_NVRTC may name it");
}

const na_nvrtc *na_nvrtc_find(const char **why)
{
    pthread_once(&nvrtc_once, find_nvrtc);
    *why = nvrtc_why;
    return *nvrtc.path ? &nvrtc : NULL;
}
