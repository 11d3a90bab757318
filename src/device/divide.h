/* SPDX-License-Identifier: MIT
 * Division of task numbers, which may need 64 bits though hardly any do. The compiler would make it
 * a call, around which a kernel's registers are spilled. */
#ifndef NATTEN_DEVICE_DIVIDE_H
#define NATTEN_DEVICE_DIVIDE_H

#include <stdint.h>

#include "core/window.h"

/* number / by; *rest: number % by. 0 <= number, 0 < by. */
NA_INLINE int64_t na_divide(int64_t number, int by, int *rest)
{
    const uint32_t high = (uint32_t)(number >> 32), low = (uint32_t)number, divisor = (uint32_t)by;
    if (high == 0) {
        *rest = (int)(low % divisor);
        return (int64_t)(low / divisor);
    }
    uint64_t quotient = high / divisor;
    uint32_t remainder = high % divisor;
    /* Long division, a bit at a time: the remainder stays below 2^31. */
#ifdef __CUDACC__
#pragma unroll 1
#endif
    for (int bit = 31; bit >= 0; bit--) {
        remainder = remainder << 1 | (low >> bit & 1);
        quotient = quotient << 1 | (remainder >= divisor);
        remainder -= remainder >= divisor ? divisor : 0;
    }
    *rest = (int)remainder;
    return (int64_t)quotient;
}

#endif
