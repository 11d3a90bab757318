/* SPDX-License-Identifier: MIT
 * How many multiply-adds the processor can do, as a yardstick for kernels. */
#ifndef PEAK_H
#define PEAK_H

typedef enum peak_width { PEAK_GENERIC, PEAK_AVX2, PEAK_AVX512, PEAK_PAIRS } peak_width;

/* The vectors a kernel of this name uses. PEAK_PAIRS: of pairs of bfloat16, in AVX-512. */
peak_width peak_of_kernel(const char *name);

/* GFLOP/s of independent multiply-adds in vectors of this width, on so many threads at
 * once, measured for about a millisecond. */
double peak_measure(peak_width width, int threads);

/* Seconds of a steady clock; of processor time, where that was asked for. */
double seconds_now(void);
void seconds_of_processor(void);

#endif
