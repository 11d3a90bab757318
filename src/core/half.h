/* SPDX-License-Identifier: MIT
 * Half-precision numbers as bits, one at a time: for the reference and for tests. */
#ifndef NATTEN_CORE_HALF_H
#define NATTEN_CORE_HALF_H

#include <math.h>
#include <stdint.h>
#include <string.h>

static inline float na_float_of_bits(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline uint32_t na_bits_of_float(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float na_bf16_load(uint16_t bits) { return na_float_of_bits((uint32_t)bits << 16); }

static inline double na_f16_load(uint16_t bits)
{
    int exponent = bits >> 10 & 31, fraction = bits & 1023;
    double magnitude = exponent == 31  ? (fraction ? NAN : INFINITY)
                       : exponent == 0 ? ldexp(fraction, -24)
                                       : ldexp(1024 + fraction, exponent - 25);
    return bits & 0x8000 ? -magnitude : magnitude;
}

/* A double to a float such that rounding the float to a half rounds the double once: where the
 * float is not exact its last bit is set ("round to odd"). */
static inline float na_float_to_odd(double value)
{
    float nearest = (float)value;
    if ((double)nearest == value || isnan(value) || isinf(nearest))
        return nearest;
    uint32_t bits = na_bits_of_float(nearest);
    if (fabs((double)nearest) > fabs(value))
        bits -= 1;
    return na_float_of_bits(bits | 1);
}

static inline uint16_t na_bf16_store(double value)
{
    uint32_t bits = na_bits_of_float(na_float_to_odd(value));
    if (isnan(value))
        return (uint16_t)(bits >> 16 | 64);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static inline uint16_t na_f16_store(double value)
{
    uint16_t sign = signbit(value) ? 0x8000 : 0;
    double magnitude = fabs(value);
    if (isnan(value))
        return sign | 0x7e00;
    if (magnitude >= 65520.0)
        return sign | 0x7c00;
    if (magnitude == 0) /* has no exponent */
        return sign;
    int exponent;
    frexp(magnitude, &exponent);
    /* Halves of this size are multiples of 2^step; below 2^-14 all are of 2^-24. */
    int step = exponent - 11 < -24 ? -24 : exponent - 11;
    long quotient = lrint(ldexp(magnitude, -step));
    /* A carry out of the fraction runs into the exponent, as it should. */
    return sign | (uint16_t)(quotient + (step > -24 ? (long)(step + 24) * 1024 : 0));
}

#endif
