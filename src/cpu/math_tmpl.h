/* SPDX-License-Identifier: MIT
 * Powers of two and logarithms. Scores are kept as powers of two (the factor log2(e) goes into the
 * scale), and the largest score is rounded up to an integer: the power then costs five additions
 * and comparisons and a polynomial (double: a table of eight, and a polynomial for what is left).
 * Parameters: the vector words of simd.h; REAL_F64: real is double. */

#define LOG2_E 1.44269504088896340736
#define LN_2 0.69314718055994530942

/* Adding it leaves the integer part in the last bits, or, for double, the number of eighths. */
#ifdef REAL_F64
static const real magic = 0x1.8p49;
static const real smallest_power = -1021;
static const real lowest = -DBL_MAX;
#else
static const real magic = 0x1.8p23f;
static const real smallest_power = -125;
static const real lowest = -FLT_MAX;
#endif

/* What power() needs to know of the integer-valued m that it subtracts. */
typedef struct reference {
    vec shift, low;
} reference;

static ALWAYS_INLINE reference reference_of(vec m)
{
    reference r = {vec_sub(vec_set1(magic), m), vec_add(m, vec_set1(smallest_power))};
    return r;
}

#ifdef REAL_F64
/* 2^(i/8), rounded to nearest, for vec_eighths(): i times 2^49 is taken from its bits. */
static const real eighths[8] = {
    1.0,
    0x1.f72b83c7d517bp-1,
    0x1.f06fe0a31b715p-1,
    0x1.ebfdad5362a27p-1,
    0x1.ea09e667f3bcdp-1,
    0x1.eace5422aa0dbp-1,
    0x1.ee89f995ad3adp-1,
    0x1.f5818dcfba487p-1,
};

/* (2^f - 1) / f for |f| <= 1/16, of least largest relative error of the power: 4.8e-18. In pairs of
 * terms: additions wait for each other less long. */
static ALWAYS_INLINE vec power_slope(vec f)
{
    static const real c[] = {1.5251844923772691e-05, 0.00015404521945251384, 0.001333355823890329,
                             0.009618129085178775,   0.05550410866480236,    0.24022650695911515,
                             0.6931471805599453};
    const vec square = vec_mul(f, f);
    vec p = vec_set1(c[0]);
    UNROLL
    for (size_t i = 1; i < sizeof c / sizeof *c; i += 2)
        p = vec_fma(p, square, vec_fma(vec_set1(c[i]), f, vec_set1(c[i + 1])));
    return p;
}
#else
/* 2^f for |f| <= 1/2. */
static ALWAYS_INLINE vec power_of_fraction(vec f)
{
    /* Least largest relative error, 2.1e-7. */
    static const real c[] = {1.327647217e-3f, 9.675541331e-3f, 5.550713273e-2f,
                             2.402211972e-1f, 6.931469671e-1f, 1.000000072f};
    vec p = vec_set1(c[0]);
    UNROLL
    for (size_t i = 1; i < sizeof c / sizeof *c; i++)
        p = vec_fma(p, f, vec_set1(c[i]));
    return p;
}
#endif

/* 2^(a - m) for a <= m + 100; exactly 0 where that is below the smallest normal number; NaN for
 * NaN. */
static ALWAYS_INLINE vec power(vec a, reference m)
{
    vec shifted = vec_add(a, m.shift), f = vec_sub(a, vec_sub(shifted, m.shift));
#ifdef REAL_F64
    const vec near = vec_eighths(eighths, shifted);
    return vec_not_below(a, m.low, vec_fma(vec_mul(near, f), power_slope(f), near));
#else
    return vec_scale2(power_of_fraction(f), shifted, a, m.low);
#endif
}

/* Natural logarithm of a normal number. */
static ALWAYS_INLINE vec logarithm(vec a)
{
    /* 2 atanh(t) / t by powers of t^2, |t| <= 0.2. */
#ifdef REAL_F64
    /* Least largest relative error of the logarithm, 1.5e-17. */
    static const real c[] = {
        0.15367271014099512, 0.15250315769772563, 0.18186349194105414, 0.22222138684372109,
        0.2857142939283223,  0.3999999999617687,  0.6666666666667268,  2};
#else
    static const real c[] = {2.0f / 9, 2.0f / 7, 2.0f / 5, 2.0f / 3, 2};
#endif
    vec one = vec_set1(1), e, m = vec_split2(a, &e);
    vec t = vec_div(vec_sub(m, one), vec_add(m, one)), u = vec_mul(t, t);
    vec p = vec_set1(c[0]);
    UNROLL
    for (size_t i = 1; i < sizeof c / sizeof *c; i++)
        p = vec_fma(p, u, vec_set1(c[i]));
    return vec_fma(e, vec_set1((real)LN_2), vec_mul(p, t));
}
