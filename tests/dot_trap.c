/* SPDX-License-Identifier: MIT
 * What makes check_pairs of check: the kernels for AVX-512 BF16 on a processor with AVX-512 but
 * without that extension. Its only instruction they use, VDPBF16PS, traps there, and is carried out
 * here as Intel's manual describes it; all others are the processor's own. */
#define _GNU_SOURCE
#include <cpuid.h>
#include <math.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <ucontext.h>
#include <unistd.h>

#include "cpu/cpuid.h"
#include "cpu/pairs.h"

/* Parts of the saved registers, by their numbers in XCR0. */
enum { SSE = 1, AVX = 2, ZMM_HIGH = 6, ZMM_MORE = 7, LANES = 16 };
static const size_t part_bytes[8] = {[SSE] = 256, [AVX] = 256, [ZMM_HIGH] = 512, [ZMM_MORE] = 1024};
static size_t part_at[8] = {[SSE] = 160};

int __wrap_na_cpu_has_avx512bf16(void);
double __real_na_pairs_gain(void);
double __wrap_na_pairs_gain(void);

int __wrap_na_cpu_has_avx512bf16(void) { return na_cpu_has_avx512(); }

/* Trapped it is never worth it. */
double __wrap_na_pairs_gain(void)
{
    double gain = __real_na_pairs_gain();
    return gain > 0 ? 2 : gain;
}

/* The four 128-bit parts of a register. */
static void find_register(char *saved, unsigned number, char *quarter[4])
{
    for (int i = 0; i < 4; i++)
        quarter[i] = number >= 16 ? saved + part_at[ZMM_MORE] + 64 * (number - 16) + 16 * i
                     : i == 0     ? saved + part_at[SSE] + 16 * number
                     : i == 1     ? saved + part_at[AVX] + 16 * number
                                  : saved + part_at[ZMM_HIGH] + 32 * number + 16 * (i - 2);
}

static void read_register(char *saved, unsigned number, uint32_t lane[LANES])
{
    char *quarter[4];
    find_register(saved, number, quarter);
    for (int i = 0; i < 4; i++)
        memcpy(lane + 4 * i, quarter[i], 16);
}

static void write_register(char *saved, unsigned number, const uint32_t lane[LANES])
{
    char *quarter[4];
    find_register(saved, number, quarter);
    for (int i = 0; i < 4; i++)
        memcpy(quarter[i], lane + 4 * i, 16);
}

/* A float of these bits; denormal ones count as 0. */
static float number_of(uint32_t bits)
{
    float a;
    memcpy(&a, &bits, sizeof a);
    return fpclassify(a) == FP_SUBNORMAL ? copysignf(0, a) : a;
}

static uint32_t bits_of(float a)
{
    uint32_t bits;
    a = fpclassify(a) == FP_SUBNORMAL ? copysignf(0, a) : a;
    memcpy(&bits, &a, sizeof bits);
    return bits;
}

static uint32_t dot(uint32_t a, uint32_t b, uint32_t sum)
{
    const uint32_t high = 0xffff0000;
    sum = bits_of(fmaf(number_of(a & high), number_of(b & high), number_of(sum)));
    return bits_of(fmaf(number_of(a << 16), number_of(b << 16), number_of(sum)));
}

/* EVEX.512.F3.0F38.W0 52 /r between registers, without a mask, or EVEX.256. Bits that extend the
 * numbers of registers are stored inverted. The lanes; 0: it is another instruction. */
static int dot_lanes(const uint8_t *code)
{
    if (code[0] != 0x62 || (code[1] & 0x0f) != 2 || (code[2] & 0x87) != 0x06 || code[4] != 0x52 ||
        code[5] < 0xc0)
        return 0;
    return (code[3] & 0xf7) == 0x40 ? LANES : (code[3] & 0xf7) == 0x20 ? LANES / 2 : 0;
}

static void on_trap(int signal_number, siginfo_t *info, void *context)
{
    ucontext_t *user = context;
    char *saved = (char *)user->uc_mcontext.fpregs;
    const uint8_t *code = (const uint8_t *)user->uc_mcontext.gregs[REG_RIP];
    uint64_t present;
    uint32_t a[LANES], b[LANES], sum[LANES];
    const int lanes = dot_lanes(code);
    (void)info;
    if (!lanes) {
        signal(signal_number, SIG_DFL); /* happens again, and ends the program */
        return;
    }
    /* Parts that were all zero need not have been saved. */
    memcpy(&present, saved + 512, sizeof present);
    for (int part = SSE; part <= ZMM_MORE; part++)
        if (part_bytes[part] && !(present >> part & 1)) {
            memset(saved + part_at[part], 0, part_bytes[part]);
            present |= (uint64_t)1 << part;
        }
    memcpy(saved + 512, &present, sizeof present);
    const unsigned more[] = {0, code[1] ^ 0xff, code[2] ^ 0xff, code[3] ^ 0xff};
    const unsigned to = (code[5] >> 3 & 7) | (more[1] >> 4 & 8) | (more[1] & 16);
    read_register(saved, (more[2] >> 3 & 15) | (more[3] << 1 & 16), a);
    read_register(saved, (code[5] & 7) | (more[1] >> 2 & 8) | (more[1] >> 2 & 16), b);
    read_register(saved, to, sum);
    for (int l = 0; l < LANES; l++)
        sum[l] = l < lanes ? dot(a[l], b[l], sum[l]) : 0;
    write_register(saved, to, sum);
    user->uc_mcontext.gregs[REG_RIP] += 6;
}

__attribute__((constructor)) static void set_trap(void)
{
    struct sigaction action = {.sa_sigaction = on_trap, .sa_flags = SA_SIGINFO};
    if (!na_cpu_has_avx512()) {
        puts("SKIP check_pairs: this processor has no AVX-512\n"
             "check_pairs: 0 passed, 0 failed, 1 skipped");
        fflush(stdout);
        _exit(0);
    }
    for (int part = AVX; part <= ZMM_MORE; part++) {
        unsigned bytes, at, c, d;
        __cpuid_count(13, part, bytes, at, c, d);
        part_at[part] = at;
    }
    sigaction(SIGILL, &action, NULL);
}
