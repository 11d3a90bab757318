/* SPDX-License-Identifier: MIT */
#if defined(__linux__)
#define _GNU_SOURCE
#endif
#include "cpu/cpuid.h"

#include <stdio.h>
#include <string.h>

#if defined(__x86_64__)

#include <cpuid.h>
#include <stdatomic.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

enum {
    KNOWN = 1,
    AVX2 = 2,
    AVX512 = 4,
    AVX512BF16 = 8,
    AMX = 16,
    FORESEES = 32,
    TICKS = 64,
    SPLITS = 128
};

/* Register state that the system saves when it switches threads; without it the instructions trap.
 */
static unsigned saved_state(void)
{
    unsigned low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return low;
}

/* What only processors of AMD are asked. */
static int look_for_habits(void)
{
    const unsigned units = 0x8000001a, of_256 = 1 << 2, of_512 = 1 << 3;
    const int zen5 = 26;
    unsigned a, b, c, d;
    char vendor[12];
    if (!__get_cpuid(0, &a, &b, &c, &d))
        return 0;
    memcpy(vendor, &b, 4);
    memcpy(vendor + 4, &d, 4);
    memcpy(vendor + 8, &c, 4);
    if (memcmp(vendor, "AuthenticAMD", 12) != 0 || !__get_cpuid(1, &a, &b, &c, &d))
        return 0;
    const int family = (int)((a >> 8 & 15) + (a >> 20 & 255));
    const int split = __get_cpuid(units, &a, &b, &c, &d) && (a & (of_256 | of_512)) == of_256;
    return (family >= zen5 ? FORESEES : 0) | (split ? SPLITS : 0);
}

static int look_for_words(void)
{
    const unsigned avx_state = 0x6, avx512_state = 0xe6;
    const unsigned leaf1 = bit_OSXSAVE | bit_AVX | bit_FMA | bit_F16C;
    const unsigned leaf7 = bit_AVX512F | bit_AVX512DQ | bit_AVX512BW | bit_AVX512VL;
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || (c & leaf1) != leaf1)
        return KNOWN;
    unsigned state = saved_state();
    if ((state & avx_state) != avx_state || !__get_cpuid_count(7, 0, &a, &b, &c, &d))
        return KNOWN;
    if (!(b & bit_AVX2))
        return KNOWN;
    if ((b & leaf7) != leaf7 || (state & avx512_state) != avx512_state)
        return KNOWN | AVX2;
    const unsigned amx_state = 3 << 17, leaf7_amx = 1 << 22 | 1 << 24, leaf7_1 = 1 << 5;
    const int amx = (d & leaf7_amx) == leaf7_amx && (state & amx_state) == amx_state;
    if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a & leaf7_1))
        return KNOWN | AVX2 | AVX512;
    return KNOWN | AVX2 | AVX512 | AVX512BF16 | (amx ? AMX : 0);
}

static int has_ticks(void)
{
    const unsigned rdtscp = 1 << 27;
    unsigned a, b, c, d;
    return __get_cpuid(0x80000001, &a, &b, &c, &d) && (d & rdtscp);
}

static int look(void) { return look_for_words() | look_for_habits() | (has_ticks() ? TICKS : 0); }

/* By itself a process has no room for tiles. The answer is the same for every thread. */
static int ask_for_tiles(void)
{
#if defined(SYS_arch_prctl)
    const int request_permission = 0x1023, tile_data = 18;
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
    return 0;
#endif
}

/* Looked up once; two threads that look at the same time find the same. */
static int features(void)
{
    static atomic_int found;
    int known = atomic_load_explicit(&found, memory_order_relaxed);
    if (!known) {
        known = look();
        atomic_store_explicit(&found, known, memory_order_relaxed);
    }
    return known;
}

int na_cpu_has_avx2(void) { return (features() & AVX2) != 0; }
int na_cpu_has_avx512(void) { return (features() & AVX512) != 0; }
int na_cpu_has_avx512bf16(void) { return (features() & AVX512BF16) != 0; }
int na_cpu_has_amx(void) { return (features() & AMX) != 0; }
int na_cpu_foresees(void) { return (features() & FORESEES) != 0; }
int na_cpu_splits_vectors(void) { return (features() & SPLITS) != 0; }

/* As AMD describes caches, from the first to the last. */
static int64_t look_for_last_cache(void)
{
    const unsigned leaf = 0x8000001d;
    int64_t bytes = 0;
    unsigned a, b, c, d;
    for (unsigned i = 0; i < 8 && __get_cpuid_count(leaf, i, &a, &b, &c, &d) && (a & 31); i++)
        bytes = (int64_t)((b >> 22) + 1) * ((b >> 12 & 1023) + 1) * ((b & 4095) + 1) * (c + 1LL);
    return bytes;
}

/* Looked up once, as features are: to ask may take a guest's host to answer. */
int64_t na_cpu_last_cache(void)
{
    static _Atomic int64_t found = -1;
    int64_t known = atomic_load_explicit(&found, memory_order_relaxed);
    if (known < 0) {
        known = look_for_last_cache();
        atomic_store_explicit(&found, known, memory_order_relaxed);
    }
    return known;
}

uint64_t na_cpu_ticks(void)
{
    unsigned processor;
    return features() & TICKS ? __builtin_ia32_rdtscp(&processor) : 0;
}

int na_cpu_allows_amx(void)
{
    enum { ALLOWED = 1, FORBIDDEN };
    static atomic_int answer;
    int known = atomic_load_explicit(&answer, memory_order_relaxed);
    if (!known) {
        known = ask_for_tiles() ? ALLOWED : FORBIDDEN;
        atomic_store_explicit(&answer, known, memory_order_relaxed);
    }
    return known == ALLOWED;
}

void na_cpu_name(char *text, size_t size)
{
    unsigned words[13] = {0};
    for (unsigned i = 0; i < 3; i++) {
        unsigned *w = words + 4 * i;
        if (!__get_cpuid(0x80000002u + i, w, w + 1, w + 2, w + 3))
            snprintf((char *)words, sizeof words, "x86-64");
    }
    const char *name = (const char *)words;
    snprintf(text, size, "%s", name + strspn(name, " "));
}

#else

#include <sys/utsname.h>

int na_cpu_has_avx2(void) { return 0; }
int na_cpu_has_avx512(void) { return 0; }
int na_cpu_has_avx512bf16(void) { return 0; }
int na_cpu_has_amx(void) { return 0; }
int na_cpu_foresees(void) { return 0; }
int na_cpu_splits_vectors(void) { return 0; }
int64_t na_cpu_last_cache(void) { return 0; }
uint64_t na_cpu_ticks(void) { return 0; }
int na_cpu_allows_amx(void) { return 0; }

void na_cpu_name(char *text, size_t size)
{
    /* Where Linux says which core it is, on Arm. */
    FILE *file = fopen("/sys/devices/system/cpu/cpu0/regs/identification/midr_el1", "r");
    struct utsname machine;
    char core[32] = "";
    if (file && !fgets(core, sizeof core, file))
        core[0] = 0;
    if (file)
        fclose(file);
    core[strcspn(core, "\n")] = 0;
    snprintf(text, size, "%s%s%s", uname(&machine) < 0 ? "unknown" : machine.machine,
             *core ? " " : "", core);
}

#endif
