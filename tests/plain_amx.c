/* SPDX-License-Identifier: MIT
 * The kernel for AMX on a processor with AVX-512 but without that extension: programs are linked
 * with the one built with PLAIN_TILES in place of the library's own, and with --wrap for what would
 * refuse it. */
#include "cpu/cpuid.h"
#include "cpu/strips.h"

int __wrap_na_cpu_has_amx(void);
int __wrap_na_cpu_allows_amx(void);
double __wrap_na_strips_useful(const na_strips *strips);

int __wrap_na_cpu_has_amx(void) { return na_cpu_has_avx512(); }
int __wrap_na_cpu_allows_amx(void) { return 1; }

/* So that small problems are taken too: most are boxes with a few queries and keys that count. */
double __wrap_na_strips_useful(const na_strips *strips)
{
    (void)strips;
    return 100;
}
