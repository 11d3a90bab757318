/* SPDX-License-Identifier: MIT
 * Compiled kernels on disk: damage, races, kills, full and forbidden folders. No GPU, no compiler.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "cuda/cache.h"
#include "unit.h"

static char root[64];

/* A folder of its own for each test, not there yet. */
static const char *fresh_folder(void)
{
    static char folder[128];
    static int count;
    snprintf(folder, sizeof folder, "%s/%d/kernels", root, ++count);
    setenv("NATTEN_CACHE_DIR", folder, 1);
    return folder;
}

/* Bytes that depend on the key, so that a mix-up is seen. */
static na_cubin kernel_of(const char *key, size_t size)
{
    na_cubin cubin = {malloc(size + 1), size};
    for (size_t i = 0; cubin.bytes && i < size; i++)
        ((char *)cubin.bytes)[i] = (char)(key[i % strlen(key)] + (char)i);
    return cubin;
}

static int store(const char *key, size_t size)
{
    na_cubin cubin = kernel_of(key, size);
    int stored = na_cache_store(key, &cubin);
    free(cubin.bytes);
    return stored;
}

/* -1: not there; 1: there and right. */
static int look(const char *key, size_t size)
{
    na_cubin found, expected = kernel_of(key, size);
    int result = -1;
    if (na_cache_load(key, &found)) {
        result = found.size == size && !memcmp(found.bytes, expected.bytes, size);
        free(found.bytes);
    }
    free(expected.bytes);
    return result;
}

/* Visits the files of a folder; the path of the last one that ends so, and how many there are. */
static int files(const char *folder, const char *end, char path[512])
{
    DIR *list = opendir(folder);
    int count = 0;
    for (struct dirent *file; list && (file = readdir(list));) {
        size_t length = strlen(file->d_name), tail = strlen(end);
        if (!strcmp(file->d_name, ".") || !strcmp(file->d_name, "..") || length < tail ||
            strcmp(file->d_name + length - tail, end))
            continue;
        if (path)
            snprintf(path, 512, "%.250s/%.250s", folder, file->d_name);
        count++;
    }
    if (list)
        closedir(list);
    return count;
}

static void keeps(void)
{
    unit_test("keeps kernels, and tells them apart");
    struct stat status;
    const char *folder = fresh_folder();
    CHECK(look("a", 10) == -1);
    CHECK(stat(folder, &status) != 0); /* looking makes no folder */
    CHECK(store("a", 1000) && store("b", 0) && store("a longer key\nof two lines", 70000));
    CHECK(!stat(folder, &status) && (status.st_mode & 0777) == 0700);
    CHECK(look("a", 1000) == 1 && look("b", 0) == 1 && look("c", 0) == -1);
    CHECK(look("a longer key\nof two lines", 70000) == 1);
    CHECK(store("a", 1000) && look("a", 1000) == 1 && files(folder, "", NULL) == 3);
}

static void rewrite(const char *path, const char *bytes, size_t size)
{
    FILE *file = fopen(path, "wb");
    CHECK(file && fwrite(bytes, 1, size, file) == size);
    if (file)
        fclose(file);
}

static void damage(void)
{
    unit_test("any damage is a miss, and is mended by the next store");
    char path[512] = "", bytes[600];
    const char *folder = fresh_folder();
    CHECK(store("key", 300) && files(folder, ".kernel", path) == 1);
    FILE *file = fopen(path, "rb");
    size_t size = file ? fread(bytes, 1, sizeof bytes, file) : 0;
    if (file)
        fclose(file);
    CHECK(size > 300 && size < sizeof bytes - 1);
    for (size_t i = 0; i < size; i++) {
        bytes[i] ^= 1 << i % 8;
        rewrite(path, bytes, size);
        if (look("key", 300) != -1)
            unit_fail("byte %zu may be wrong", i);
        bytes[i] ^= 1 << i % 8;
        rewrite(path, bytes, i);
        if (look("key", 300) != -1)
            unit_fail("it may end at byte %zu", i);
    }
    bytes[size] = 0;
    rewrite(path, bytes, size + 1);
    CHECK(look("key", 300) == -1);
    CHECK(store("key", 300) && look("key", 300) == 1);
    unlink(path);
    CHECK(mkfifo(path, 0600) == 0 && look("key", 300) == -1);
    CHECK(store("key", 300) && look("key", 300) == 1);
    unlink(path);
    CHECK(mkdir(path, 0700) == 0 && look("key", 300) == -1 && !store("key", 300));
}

static void folders(void)
{
    unit_test("folders: the user's and read-only ones");
    char list[512], path[512];
    const char *site = fresh_folder();
    CHECK(store("site", 50));
    snprintf(list, sizeof list, "%s/user:%s", root, site);
    setenv("NATTEN_CACHE_DIR", list, 1);
    CHECK(na_cache_folder(0, path, sizeof path) && !strcmp(path, site));
    CHECK(na_cache_folder(1, path, sizeof path) && strstr(path, "/user"));
    CHECK(!na_cache_folder(2, path, sizeof path));
    CHECK(look("site", 50) == 1 && store("own", 60) && look("own", 60) == 1);
    CHECK(files(site, "", NULL) == 1 && files(path, "", NULL) == 1);
    unsetenv("NATTEN_CACHE_DIR");
    snprintf(list, sizeof list, "%s/xdg", root);
    setenv("XDG_CACHE_HOME", list, 1);
    CHECK(store("xdg", 5) && look("xdg", 5) == 1);
    CHECK(na_cache_folder(0, path, sizeof path) && strstr(path, "/xdg/natten"));
    /* Somebody else could put kernels there. */
    CHECK(chmod(path, 0777) == 0 && look("xdg", 5) == -1 && !store("xdg", 5));
    CHECK(chmod(path, 0700) == 0 && look("xdg", 5) == 1);
    if (geteuid() == 0)
        CHECK(chown(path, 12345, 12345) == 0 && look("xdg", 5) == -1 && !store("xdg", 5));
    unsetenv("XDG_CACHE_HOME");
    setenv("HOME", root, 1);
    CHECK(store("home", 5));
    CHECK(na_cache_folder(0, path, sizeof path) && strstr(path, "/.cache/natten"));
    unsetenv("HOME");
    CHECK(na_cache_folder(0, path, sizeof path) && !strncmp(path, "/tmp/natten-", 12));
}

static void no_room(void)
{
    unit_test("a folder that cannot be had, a disk that is full");
    char path[512];
    struct rlimit before, small = {4096, 4096};
    const char *folder = fresh_folder();
    snprintf(path, sizeof path, "%s/file", root);
    rewrite(path, "x", 1);
    snprintf(path, sizeof path, "%s/file/kernels", root);
    setenv("NATTEN_CACHE_DIR", path, 1);
    CHECK(look("key", 10) == -1 && !store("key", 10));
    setenv("NATTEN_CACHE_DIR", folder, 1);
    getrlimit(RLIMIT_FSIZE, &before);
    small.rlim_max = before.rlim_max;
    signal(SIGXFSZ, SIG_IGN);
    CHECK(setrlimit(RLIMIT_FSIZE, &small) == 0);
    CHECK(!store("large", 100000) && store("small", 1000));
    setrlimit(RLIMIT_FSIZE, &before);
    CHECK(look("large", 100000) == -1 && look("small", 1000) == 1);
    CHECK(files(folder, "", NULL) == 1); /* nothing is left of the attempt */
}

static void clocks(void)
{
    unit_test("times of files mean nothing");
    char path[512] = "";
    const char *folder = fresh_folder();
    CHECK(store("key", 100) && files(folder, ".kernel", path) == 1);
    const time_t times[] = {0, time(NULL) + 10L * 365 * 86400};
    for (int i = 0; i < 2; i++) {
        const struct timespec at[2] = {{.tv_sec = times[i]}, {.tv_sec = times[i]}};
        CHECK(utimensat(AT_FDCWD, path, at, 0) == 0 && look("key", 100) == 1);
    }
}

/* Stores and looks for the same few keys; exits with 1 if it ever finds something wrong. */
static void race_child(int rounds)
{
    for (int i = 0; i < rounds; i++) {
        char key[16];
        snprintf(key, sizeof key, "key %d", i % 7);
        if (look(key, 20000) == 0 || !store(key, 20000) || look(key, 20000) != 1)
            _exit(1);
    }
    _exit(0);
}

static void race(void)
{
    unit_test("8 processes in one folder");
    pid_t children[8];
    const char *folder = fresh_folder();
    for (int i = 0; i < 8; i++)
        if ((children[i] = fork()) == 0)
            race_child(40);
    for (int i = 0; i < 8; i++) {
        int status;
        CHECK(waitpid(children[i], &status, 0) > 0 && WIFEXITED(status) &&
              WEXITSTATUS(status) == 0);
    }
    CHECK(files(folder, "", NULL) == 7);
}

static void kills(void)
{
    unit_test("killed half-way");
    fresh_folder();
    for (int i = 0; i < 40; i++) {
        pid_t child = fork();
        if (child == 0)
            race_child(1000000);
        usleep((useconds_t)(i * 250));
        kill(child, SIGKILL);
        waitpid(child, NULL, 0);
        for (int j = 0; j < 7; j++) {
            char key[16];
            snprintf(key, sizeof key, "key %d", j);
            CHECK(look(key, 20000) != 0);
        }
    }
}

int main(void)
{
    snprintf(root, sizeof root, "/tmp/natten-cache-XXXXXX");
    if (!mkdtemp(root))
        return 1;
    keeps();
    damage();
    folders();
    no_room();
    clocks();
    race();
    kills();
    char command[128];
    snprintf(command, sizeof command, "rm -rf %s", root);
    return system(command) | unit_end("test_cuda_cache");
}
