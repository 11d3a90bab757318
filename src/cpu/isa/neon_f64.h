/* SPDX-License-Identifier: MIT
 * Vector words of NEON (AArch64) for double: 2 lanes. simd.h says what each word means. */
#include <arm_neon.h>

#define REAL_F64
typedef double real;
typedef float64x2_t vec;
typedef int64x2_t vec_index;

#define REGISTERS 32
enum { VL = 2, HALF = 0 };

WORD vec vec_zero(void) { return vdupq_n_f64(0); }
WORD vec vec_set1(real a) { return vdupq_n_f64(a); }
WORD vec vec_load(const real *p) { return vld1q_f64(p); }
WORD vec vec_loadu(const real *p) { return vld1q_f64(p); }
WORD vec vec_load_part(const real *p, int n)
{
    vec a = vec_zero();
    a = n > 0 ? vld1q_lane_f64(p, a, 0) : a;
    return n > 1 ? vld1q_lane_f64(p + 1, a, 1) : a;
}
WORD void vec_store(real *p, vec a) { vst1q_f64(p, a); }
WORD void vec_storeu(real *p, vec a) { vst1q_f64(p, a); }
WORD void vec_stream(real *p, vec a) { vst1q_f64(p, a); }
WORD void vec_fence(void) {}
WORD void vec_store_part(real *p, int n, vec a)
{
    if (n > 0)
        vst1q_lane_f64(p, a, 0);
    if (n > 1)
        vst1q_lane_f64(p + 1, a, 1);
}
WORD vec vec_add(vec a, vec b) { return vaddq_f64(a, b); }
WORD vec vec_sub(vec a, vec b) { return vsubq_f64(a, b); }
WORD vec vec_mul(vec a, vec b) { return vmulq_f64(a, b); }
WORD vec vec_div(vec a, vec b) { return vdivq_f64(a, b); }
WORD vec vec_fma(vec a, vec b, vec c) { return vfmaq_f64(c, a, b); }
WORD vec vec_max(vec a, vec b) { return vmaxnmq_f64(a, b); }
WORD vec vec_ceil(vec a) { return vrndpq_f64(a); }
WORD real vec_sum(vec a) { return vaddvq_f64(a); }
WORD vec vec_pin(vec a)
{
    __asm__("" : "+w"(a));
    return a;
}

WORD vec_index vec_index_load(const int32_t *p) { return vmovl_s32(vld1_s32(p)); }
WORD vec_index vec_index_set1(uint32_t a) { return vdupq_n_s64(a); }
WORD vec_index vec_index_xor(vec_index a, vec_index b) { return veorq_s64(a, b); }
WORD vec_index vec_index_multiply(vec_index a, uint32_t m, vec_index *high)
{
    uint64x2_t product = vmull_u32(vmovn_u64(vreinterpretq_u64_s64(a)), vdup_n_u32(m));
    *high = vreinterpretq_s64_u64(vshrq_n_u64(product, 32));
    return vreinterpretq_s64_u64(product);
}
WORD vec_index vec_index_low16(vec_index a) { return vandq_s64(a, vdupq_n_s64(0xffff)); }
WORD vec_index vec_index_high16(vec_index a) { return vec_index_low16(vshrq_n_s64(a, 16)); }
/* The table lookups of NEON count bytes: of lane i, eight from 8 i on. */
WORD uint8x16_t neon_bytes(vec_index i)
{
    int8x16_t first = vreinterpretq_s8_s64(vshlq_n_s64(i, 3));
    const int8x16_t lane = {0, 0, 0, 0, 0, 0, 0, 0, 8, 8, 8, 8, 8, 8, 8, 8};
    const int8x16_t byte = {0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7};
    return vreinterpretq_u8_s8(vaddq_s8(vqtbl1q_s8(first, vreinterpretq_u8_s8(lane)), byte));
}
WORD vec vec_permute(vec_index i, vec a)
{
    return vreinterpretq_f64_u8(vqtbl1q_u8(vreinterpretq_u8_f64(a), neon_bytes(i)));
}
WORD vec vec_permute2(vec_index i, vec a, vec b)
{
    uint8x16x2_t both = {{vreinterpretq_u8_f64(a), vreinterpretq_u8_f64(b)}};
    return vreinterpretq_f64_u8(vqtbl2q_u8(both, neon_bytes(i)));
}
WORD vec vec_gather(const real *p, vec_index i)
{
    vec a = vdupq_n_f64(p[vgetq_lane_s64(i, 0)]);
    return vld1q_lane_f64(p + vgetq_lane_s64(i, 1), a, 1);
}
WORD vec vec_keep(vec a, int key, vec_index limit, real other)
{
    return vbslq_f64(vcgtq_s64(limit, vdupq_n_s64(key)), a, vdupq_n_f64(other));
}

WORD vec vec_not_below(vec a, vec low, vec x)
{
    return vreinterpretq_f64_u64(vbicq_u64(vreinterpretq_u64_f64(x), vcltq_f64(a, low)));
}
WORD vec vec_eighths(const real *t, vec shifted)
{
    int64x2_t bits = vreinterpretq_s64_f64(shifted);
    vec near = vec_gather(t, vandq_s64(bits, vdupq_n_s64(7)));
    return vreinterpretq_f64_s64(vaddq_s64(vreinterpretq_s64_f64(near), vshlq_n_s64(bits, 49)));
}
WORD vec vec_split2(vec a, vec *exponent)
{
    int64x2_t bits = vreinterpretq_s64_f64(a);
    int64x2_t above = vshrq_n_s64(vsubq_s64(bits, vdupq_n_s64(0x3fe8000000000000)), 52);
    *exponent = vcvtq_f64_s64(above);
    return vreinterpretq_f64_s64(vsubq_s64(bits, vshlq_n_s64(above, 52)));
}

WORD void vec_transpose(vec r[VL])
{
    vec a = r[0], b = r[1];
    r[0] = vzip1q_f64(a, b);
    r[1] = vzip2q_f64(a, b);
}
