/* SPDX-License-Identifier: MIT
 * Powers of two and logarithms. Scores are kept as powers of two (the factor log2(e) goes into the
 * scale), and the largest score is rounded up to an integer: the power then costs five additions
 * and comparisons and a polynomial.
 * Parameters: the vector words of simd.h; REAL_F64: real is double. */

#define LOG2_E 1.44269504088896340736
#define LN_2 0.69314718055994530942

/* Adding it leaves the integer part in the last bits. */
#ifdef REAL_F64
static const real magic = 0x1.8p52;
static const real smallest_power = -1021;
static const real lowest = -DBL_MAX;
#else
static const real magic = 0x1.8p23f;
static const real smallest_power = -125;
static const real lowest = -FLT_MAX;
#endif

/* 2^f for |f| <= 1/2. */
static ALWAYS_INLINE vec power_of_fraction(vec f)
{
#ifdef REAL_F64
    /* Least largest relative error, 3.5e-17. */
    static const real c[] = {4.4352809446103363e-10, 7.074105626245659e-09,  1.0178198033328528e-07,
                             1.321543308959463e-06,  1.5252733489960805e-05, 0.00015403530462514614,
                             0.001333355814678995,   0.009618129107588335,   0.055504108664819925,
                             0.24022650695910155,    0.6931471805599453,     1.0};
#else
    /* Least largest relative error, 2.1e-7. */
    static const real c[] = {1.327647217e-3f, 9.675541331e-3f, 5.550713273e-2f,
                             2.402211972e-1f, 6.931469671e-1f, 1.000000072f};
#endif
    vec p = vec_set1(c[0]);
    UNROLL
    for (size_t i = 1; i < sizeof c / sizeof *c; i++)
        p = vec_fma(p, f, vec_set1(c[i]));
    return p;
}

/* What power() needs to know of the integer-valued m that it subtracts. */
typedef struct reference {
    vec shift, low;
} reference;

static ALWAYS_INLINE reference reference_of(vec m)
{
    reference r = {vec_sub(vec_set1(magic), m), vec_add(m, vec_set1(smallest_power))};
    return r;
}

/* 2^(a - m) for a <= m + 100; exactly 0 where that is below the smallest normal number; NaN for
 * NaN. */
static ALWAYS_INLINE vec power(vec a, reference m)
{
    vec shifted = vec_add(a, m.shift), f = vec_sub(a, vec_sub(shifted, m.shift));
    return vec_scale2(power_of_fraction(f), shifted, a, m.low);
}

/* Natural logarithm of a normal number. */
static ALWAYS_INLINE vec logarithm(vec a)
{
#ifdef REAL_F64
    real x[VL] __attribute__((aligned(64)));
    vec_store(x, a);
    for (int l = 0; l < VL; l++)
        x[l] = log(x[l]);
    return vec_load(x);
#else
    vec one = vec_set1(1), e, m = vec_split2(a, &e);
    /* 2 atanh(t), |t| <= 0.2 */
    vec t = vec_div(vec_sub(m, one), vec_add(m, one)), u = vec_mul(t, t);
    vec p = vec_set1(2.0f / 9);
    p = vec_fma(p, u, vec_set1(2.0f / 7));
    p = vec_fma(p, u, vec_set1(2.0f / 5));
    p = vec_fma(p, u, vec_set1(2.0f / 3));
    p = vec_fma(p, u, vec_set1(2));
    return vec_fma(e, vec_set1((real)LN_2), vec_mul(p, t));
#endif
}
