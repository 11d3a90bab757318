/* SPDX-License-Identifier: MIT
 * A file: the header below, the key without its final zero, the kernel. */
#define _GNU_SOURCE
#include "cuda/cache.h"

#include <dirent.h>
#include <fcntl.h>
#include <inttypes.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "core/env.h"

typedef struct header {
    char magic[8];
    uint64_t key_size, kernel_size, checksum; /* of key and kernel */
} header;

static const char magic[8] = "natten1";
static const uint64_t size_limit = (uint64_t)1 << 28; /* of a kernel that is believed */

/* FNV-1a, 64 bits: against damage and chance, not against malice. */
static uint64_t hash(uint64_t state, const void *bytes, size_t size)
{
    const unsigned char *byte = bytes;
    for (size_t i = 0; i < size; i++)
        state = (state ^ byte[i]) * 0x100000001b3u;
    return state;
}

static uint64_t checksum(const char *key, size_t key_size, const na_cubin *cubin)
{
    uint64_t state = hash(0xcbf29ce484222325u, key, key_size);
    return hash(state, cubin->bytes, cubin->size);
}

/* Keys that share a name would only displace each other: the key inside decides. */
static void file_name(const char *key, const char *kind, char name[40])
{
    size_t size = strlen(key);
    snprintf(name, 40, "%016" PRIx64 "%016" PRIx64 "%s", hash(0xcbf29ce484222325u, key, size),
             hash(0x9e3779b97f4a7c15u, key, size), kind);
}

/* Item `index` of a list with ':' between. */
static int list_item(const char *list, int index, char *path, size_t size)
{
    for (; index > 0 && list; index--) {
        list = strchr(list, ':');
        list = list ? list + 1 : NULL;
    }
    if (!list || !*list)
        return 0;
    int length = (int)strcspn(list, ":");
    return length > 0 && snprintf(path, size, "%.*s", length, list) < (int)size;
}

static int list_length(const char *list)
{
    int count = 1;
    for (; *list; list++)
        count += *list == ':';
    return count;
}

/* Not a folder that somebody else could put kernels into. */
static int is_ours(const char *path)
{
    struct stat status;
    if (lstat(path, &status))
        return 1;
    return S_ISDIR(status.st_mode) && status.st_uid == geteuid() && !(status.st_mode & 022);
}

static int default_folder(char *path, size_t size)
{
    const char *xdg = na_environment("XDG_CACHE_HOME"), *home = na_environment("HOME");
    int length;
    if (xdg)
        length = snprintf(path, size, "%s/natten", xdg);
    else if (home)
        length = snprintf(path, size, "%s/.cache/natten", home);
    else
        length = snprintf(path, size, "/tmp/natten-%ld", (long)geteuid());
    return length < (int)size && is_ours(path);
}

int na_cache_folder(int index, char *path, size_t size)
{
    const char *list = na_environment("NATTEN_CACHE_DIR");
    if (!list)
        return index == 0 && default_folder(path, size);
    int count = list_length(list);
    return index < count && list_item(list, index == count - 1 ? 0 : index + 1, path, size);
}

static int holds_any(const char *path)
{
    DIR *folder = opendir(path);
    const struct dirent *file;
    int found = 0;
    while (folder && !found && (file = readdir(folder)))
        found = strstr(file->d_name, ".kernel") != NULL;
    if (folder)
        closedir(folder);
    return found;
}

int na_cache_holds_any(void)
{
    char path[PATH_MAX];
    int found = 0;
    for (int i = 0; !found && na_cache_folder(i, path, sizeof path); i++)
        found = holds_any(path);
    return found;
}

static int user_folder(char *path, size_t size)
{
    int count = 0;
    while (na_cache_folder(count, path, size))
        count++;
    return count > 0 && na_cache_folder(count - 1, path, size);
}

static int read_all(int file, void *to, size_t size)
{
    for (char *at = to; size > 0;) {
        ssize_t got = read(file, at, size);
        if (got <= 0)
            return 0;
        at += got;
        size -= (size_t)got;
    }
    return 1;
}

static int write_all(int file, const void *from, size_t size)
{
    for (const char *at = from; size > 0;) {
        ssize_t put = write(file, at, size);
        if (put <= 0)
            return 0;
        at += put;
        size -= (size_t)put;
    }
    return 1;
}

/* The rest of a file whose header was read. */
static int read_body(int file, const header *head, char **key, na_cubin *cubin)
{
    char past_end;
    cubin->size = (size_t)head->kernel_size;
    cubin->bytes = malloc(cubin->size + 1);
    *key = malloc((size_t)head->key_size + 1);
    int good = cubin->bytes && *key && read_all(file, *key, (size_t)head->key_size) &&
               read_all(file, cubin->bytes, cubin->size) && read(file, &past_end, 1) == 0 &&
               checksum(*key, (size_t)head->key_size, cubin) == head->checksum;
    if (!good) {
        free(cubin->bytes);
        free(*key);
        return 0;
    }
    (*key)[head->key_size] = 0;
    ((char *)cubin->bytes)[cubin->size] = 0; /* PTX is text */
    return 1;
}

int na_cache_read(const char *path, char **key, na_cubin *cubin)
{
    /* Not blocking: a pipe of that name must not hold anybody up. */
    int file = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (file < 0)
        return 0;
    header head;
    struct stat status;
    int good = !fstat(file, &status) && S_ISREG(status.st_mode) &&
               read_all(file, &head, sizeof head) && !memcmp(head.magic, magic, sizeof magic) &&
               head.key_size <= size_limit && head.kernel_size <= size_limit &&
               (uint64_t)status.st_size == sizeof head + head.key_size + head.kernel_size &&
               read_body(file, &head, key, cubin);
    close(file);
    return good;
}

int na_cache_load_from(int index, const char *kind, const char *key, na_cubin *cubin)
{
    char folder[PATH_MAX], path[PATH_MAX + 64], name[40], *found;
    file_name(key, kind, name);
    if (!na_cache_folder(index, folder, sizeof folder))
        return 0;
    snprintf(path, sizeof path, "%s/%s", folder, name);
    if (!na_cache_read(path, &found, cubin))
        return 0;
    int same = !strcmp(found, key);
    free(found);
    if (!same)
        free(cubin->bytes);
    return same;
}

int na_cache_load(const char *key, na_cubin *cubin)
{
    char folder[PATH_MAX];
    for (int i = 0; na_cache_folder(i, folder, sizeof folder); i++)
        if (na_cache_load_from(i, NA_CACHE_KERNEL, key, cubin))
            return 1;
    return 0;
}

/* As mkdir -p, 0700 for what is new. */
static int make_folder(char *path)
{
    for (char *at = path + 1; *at; at++) {
        if (*at != '/')
            continue;
        *at = 0;
        mkdir(path, 0700);
        *at = '/';
    }
    mkdir(path, 0700);
    return access(path, W_OK | X_OK) == 0;
}

int na_cache_store_as(const char *kind, const char *key, const na_cubin *cubin)
{
    char folder[PATH_MAX], path[PATH_MAX + 64], own[PATH_MAX + 64], name[40];
    if (!user_folder(folder, sizeof folder) || !make_folder(folder) ||
        !user_folder(folder, sizeof folder))
        return 0;
    file_name(key, kind, name);
    snprintf(path, sizeof path, "%s/%s", folder, name);
    snprintf(own, sizeof own, "%s/.%s.XXXXXX", folder, name);
    int file = mkostemp(own, O_CLOEXEC);
    if (file < 0)
        return 0;
    header head = {.key_size = strlen(key), .kernel_size = cubin->size};
    memcpy(head.magic, magic, sizeof magic);
    head.checksum = checksum(key, strlen(key), cubin);
    int good = write_all(file, &head, sizeof head) && write_all(file, key, strlen(key)) &&
               write_all(file, cubin->bytes, cubin->size) && fsync(file) == 0;
    good &= close(file) == 0;
    good = good && rename(own, path) == 0;
    if (!good)
        unlink(own);
    return good;
}

int na_cache_store(const char *key, const na_cubin *cubin)
{
    return na_cache_store_as(NA_CACHE_KERNEL, key, cubin);
}
