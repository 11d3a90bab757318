/* SPDX-License-Identifier: MIT */
#include "tuned.h"

#include <inttypes.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/lock.h"
#include "cuda/cache.h"

enum { MOST_RECORDS = 4096, MOST_DEVICES = 16, LINE = 512, FIELDS = 8 };

static const char title[] = "natten tuned 1 " NATTEN_VERSION;
static const double nano = 1e-9;

/* All under NA_LOCK_TUNED. */
static struct {
    na_record *record; /* the oldest is overwritten when there are too many */
    int count, room, next;
    char loaded[MOST_DEVICES][64]; /* devices whose files were read */
    int loaded_count;
} table;

/* ----------------------------------------------------------------------------------------------
 * records */

static uint64_t mix(uint64_t sum, const void *bytes, size_t size)
{
    const unsigned char *byte = bytes;
    for (size_t i = 0; i < size; i++)
        sum = (sum ^ byte[i]) * 0x100000001b3u + (sum >> 31);
    return sum;
}

/* Text of one field: what separates fields and lines is not in it. */
static void copy_text(char *to, size_t size, const char *from)
{
    snprintf(to, size, "%s", from);
    for (; *to; to++)
        if ((unsigned char)*to < ' ')
            *to = ' ';
}

/* "forward f32 b1h4d32 56x56 w7x7 d2x2". */
static void describe(const natten_problem *p, char *text, size_t size)
{
    static const char *const ops[] = {"forward",     "backward", "qk",
                                      "qk-backward", "av",       "av-backward"};
    static const char *const dtypes[] = {"f32", "f64", "f16", "bf16"};
    int first = 0; /* axes before it are padding */
    while (first < 2 && p->axis[first].query_extent == 1 && p->axis[first].window == 1)
        first++;
    const natten_axis *axis = p->axis;
    const struct {
        char letter;
        int64_t of[3];
    } parts[] = {{0, {axis[0].query_extent, axis[1].query_extent, axis[2].query_extent}},
                 {'w', {axis[0].window, axis[1].window, axis[2].window}},
                 {'d', {axis[0].dilation, axis[1].dilation, axis[2].dilation}},
                 {'s', {axis[0].stride, axis[1].stride, axis[2].stride}},
                 {'c', {axis[0].causal, axis[1].causal, axis[2].causal}}};
    size_t at = (size_t)snprintf(text, size, "%s %s b%lldh%lldd%lld", ops[p->op], dtypes[p->dtype],
                                 (long long)p->batch, (long long)p->heads, (long long)p->head_dim);
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) {
        int usual = i > 1;
        for (int a = first; a < 3; a++)
            usual &= parts[i].of[a] == (parts[i].letter != 'c');
        for (int a = first; a < 3 && !usual && at < size; a++) {
            const char begin[] = {' ', parts[i].letter, 0};
            at += (size_t)snprintf(text + at, size - at, "%s%lld", a > first ? "x" : begin,
                                   (long long)parts[i].of[a]);
        }
    }
}

void na_record_init(na_record *record, const natten_plan *plan, const char *device)
{
    natten_problem p = plan->problem;
    const char *kernel = plan->kernel->name;
    memset(record, 0, sizeof *record);
    p.device_index = p.choice = 0;
    p.preferences &= plan->honours; /* others make no difference to this kernel */
    copy_text(record->device, sizeof record->device, device);
    for (int i = 0; i < 2; i++) {
        uint64_t sum = mix(i ? 0x9e3779b97f4a7c15u : 0xcbf29ce484222325u, &p, sizeof p);
        sum = mix(sum, kernel, strlen(kernel) + 1);
        record->digest[i] = mix(sum, record->device, strlen(record->device));
    }
    describe(&plan->problem, record->problem, sizeof record->problem);
}

static na_record *find(const uint64_t digest[2])
{
    for (int i = 0; i < table.count; i++)
        if (!memcmp(table.record[i].digest, digest, sizeof table.record[i].digest))
            return &table.record[i];
    return NULL;
}

/* Without memory the record is not kept, and will be found again by trying. */
static void keep(const na_record *record)
{
    na_record *place = find(record->digest);
    if (!place && table.count == table.room && table.room < MOST_RECORDS) {
        const int room = table.room ? 2 * table.room : 16;
        na_record *more = realloc(table.record, (size_t)room * sizeof *more);
        if (!more)
            return;
        table.record = more;
        table.room = room;
    }
    if (!place)
        place =
            &table.record[table.count < table.room ? table.count++ : table.next++ % MOST_RECORDS];
    *place = *record;
}

int na_tuned_find(na_record *record)
{
    na_lock_take(NA_LOCK_TUNED);
    const na_record *found = find(record->digest);
    if (found)
        *record = *found;
    na_lock_give(NA_LOCK_TUNED);
    return found != NULL;
}

void na_tuned_keep(const na_record *record)
{
    na_lock_take(NA_LOCK_TUNED);
    keep(record);
    na_lock_give(NA_LOCK_TUNED);
}

void na_tuned_clear(void)
{
    na_lock_take(NA_LOCK_TUNED);
    free(table.record);
    memset(&table, 0, sizeof table);
    na_lock_give(NA_LOCK_TUNED);
}

/* ----------------------------------------------------------------------------------------------
 * text */

/* Lines of a device, of all for NULL; returns their length. */
static size_t write_lines(const char *device, char *text, size_t size)
{
    size_t at = 0;
    for (int i = 0; i < table.count; i++) {
        const na_record *r = &table.record[i];
        if (device && strcmp(device, r->device))
            continue;
        at += (size_t)snprintf(
            at < size ? text + at : NULL, at < size ? size - at : 0,
            "%016" PRIx64 "%016" PRIx64 "\t%lld\t%lld\t%lld\t%lld\t%s\t%s\t%s\n", r->digest[0],
            r->digest[1], (long long)r->tuned.choice, (long long)r->tuned.choices,
            (long long)(r->tuned.seconds / nano + 0.5),
            (long long)(r->tuned.default_seconds / nano + 0.5), r->device, r->choice, r->problem);
    }
    return at;
}

static int read_number(const char *text, int base, uint64_t *number)
{
    char *end;
    *number = strtoull(text, &end, base);
    return *text && *text != '-' && !*end;
}

/* One line, without its end. */
static int read_line(const char *line, size_t length, na_record *r)
{
    char text[LINE], *field[FIELDS], high[17];
    uint64_t number[4];
    int fields = 0, good = length < LINE;
    if (!good)
        return 0;
    memcpy(text, line, length);
    text[length] = 0;
    for (char *at = text; at && fields < FIELDS; fields++) {
        field[fields] = at;
        at = strchr(at, '\t');
        if (at)
            *at++ = 0;
        good = !at || fields < FIELDS - 1;
    }
    if (!good || fields != FIELDS || strlen(field[0]) != 32)
        return 0;
    memset(r, 0, sizeof *r);
    snprintf(high, sizeof high, "%.16s", field[0]);
    good = read_number(high, 16, &r->digest[0]) && read_number(field[0] + 16, 16, &r->digest[1]);
    for (int i = 0; i < 4; i++)
        good = good && read_number(field[1 + i], 10, &number[i]) && number[i] <= INT64_MAX;
    if (!good || number[0] > number[1] || strlen(field[5]) >= sizeof r->device ||
        strlen(field[6]) >= sizeof r->choice || strlen(field[7]) >= sizeof r->problem)
        return 0;
    r->tuned = (natten_tuned){(int64_t)number[0], (int64_t)number[1], (double)number[2] * nano,
                              (double)number[3] * nano};
    copy_text(r->device, sizeof r->device, field[5]);
    copy_text(r->choice, sizeof r->choice, field[6]);
    copy_text(r->problem, sizeof r->problem, field[7]);
    return 1;
}

/* Keeps all lines, or, if `keeps` is 0, only says whether they can be read. Returns 0, or the
 * number of the first line that cannot. `missing`: only those not remembered yet. */
static int read_lines(const char *text, int keeps, int missing)
{
    for (int number = 1; *text; number++) {
        const size_t length = strcspn(text, "\n");
        na_record record;
        if (!read_line(text, length, &record))
            return number;
        if (keeps && !(missing && find(record.digest)))
            keep(&record);
        text += length + (text[length] == '\n');
    }
    return 0;
}

size_t natten_tuned_export(char *text, size_t size)
{
    const size_t head = (size_t)snprintf(text, size, "%s\n", title);
    na_lock_take(NA_LOCK_TUNED);
    const size_t lines =
        write_lines(NULL, head < size ? text + head : NULL, head < size ? size - head : 0);
    na_lock_give(NA_LOCK_TUNED);
    return head + lines;
}

natten_status na_tuned_read(const char *text)
{
    const size_t head = text ? strcspn(text, "\n") : 0;
    if (!text || head != strlen(title) || memcmp(text, title, head))
        return na_fail(NATTEN_ERROR_ARGUMENT,
                       "The text must begin with the line \"%s\": these are no choices, or another "
                       "version's.",
                       title);
    text += head + (text[head] == '\n');
    const int bad = read_lines(text, 0, 0);
    if (bad)
        return na_fail(NATTEN_ERROR_ARGUMENT, "Line %d of the choices cannot be read.", bad + 1);
    na_lock_take(NA_LOCK_TUNED);
    read_lines(text, 1, 0);
    na_lock_give(NA_LOCK_TUNED);
    return NATTEN_OK;
}

/* ----------------------------------------------------------------------------------------------
 * files */

static void key_of(const char *device, char *key, size_t size)
{
    snprintf(key, size, "choices that were tuned\n%s\n%s", title, device);
}

static void load(const char *device)
{
    char key[256], folder[PATH_MAX];
    na_cubin file;
    key_of(device, key, sizeof key);
    for (int i = 0; na_cache_folder(i, folder, sizeof folder); i++) {
        if (!na_cache_load_from(i, NA_CACHE_TUNED, key, &file))
            continue;
        if (!read_lines(file.bytes, 0, 0))
            read_lines(file.bytes, 1, 1);
        free(file.bytes);
    }
}

void na_tuned_load(const char *device)
{
    na_lock_take(NA_LOCK_TUNED);
    int known = table.loaded_count == MOST_DEVICES;
    for (int i = 0; i < table.loaded_count; i++)
        known |= !strcmp(table.loaded[i], device);
    if (!known) {
        copy_text(table.loaded[table.loaded_count++], sizeof *table.loaded, device);
        load(device);
    }
    na_lock_give(NA_LOCK_TUNED);
}

int na_tuned_save(const char *device)
{
    char key[256];
    key_of(device, key, sizeof key);
    na_lock_take(NA_LOCK_TUNED);
    load(device); /* what other processes have found since */
    const size_t size = write_lines(device, NULL, 0);
    na_cubin file = {malloc(size + 1), size};
    int good = file.bytes && write_lines(device, file.bytes, size + 1) == size;
    na_lock_give(NA_LOCK_TUNED);
    good = good && na_cache_store_as(NA_CACHE_TUNED, key, &file);
    free(file.bytes);
    return good;
}
