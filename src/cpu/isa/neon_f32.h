/* SPDX-License-Identifier: MIT
 * Vector words of NEON (AArch64) for float: 4 lanes. simd.h says what each word means. */
#include <arm_neon.h>

typedef float real;
typedef float32x4_t vec;
typedef int32x4_t vec_index;

#define REGISTERS 32
enum { VL = 4, HALF = 0 };

WORD vec vec_zero(void) { return vdupq_n_f32(0); }
WORD vec vec_set1(real a) { return vdupq_n_f32(a); }
WORD vec vec_load(const real *p) { return vld1q_f32(p); }
WORD vec vec_loadu(const real *p) { return vld1q_f32(p); }
WORD vec vec_load_part(const real *p, int n)
{
    vec a = vec_zero();
    a = n > 0 ? vld1q_lane_f32(p, a, 0) : a;
    a = n > 1 ? vld1q_lane_f32(p + 1, a, 1) : a;
    a = n > 2 ? vld1q_lane_f32(p + 2, a, 2) : a;
    return n > 3 ? vld1q_lane_f32(p + 3, a, 3) : a;
}
WORD void vec_store(real *p, vec a) { vst1q_f32(p, a); }
WORD void vec_storeu(real *p, vec a) { vst1q_f32(p, a); }
WORD void vec_stream(real *p, vec a) { vst1q_f32(p, a); }
WORD void vec_fence(void) {}
WORD void vec_store_part(real *p, int n, vec a)
{
    if (n > 0)
        vst1q_lane_f32(p, a, 0);
    if (n > 1)
        vst1q_lane_f32(p + 1, a, 1);
    if (n > 2)
        vst1q_lane_f32(p + 2, a, 2);
    if (n > 3)
        vst1q_lane_f32(p + 3, a, 3);
}
WORD vec vec_add(vec a, vec b) { return vaddq_f32(a, b); }
WORD vec vec_sub(vec a, vec b) { return vsubq_f32(a, b); }
WORD vec vec_mul(vec a, vec b) { return vmulq_f32(a, b); }
WORD vec vec_div(vec a, vec b) { return vdivq_f32(a, b); }
WORD vec vec_fma(vec a, vec b, vec c) { return vfmaq_f32(c, a, b); }
WORD vec vec_max(vec a, vec b) { return vmaxnmq_f32(a, b); }
WORD vec vec_ceil(vec a) { return vrndpq_f32(a); }
WORD real vec_sum(vec a) { return vaddvq_f32(a); }
WORD vec vec_pin(vec a)
{
    __asm__("" : "+w"(a));
    return a;
}

WORD vec_index vec_index_load(const int32_t *p) { return vld1q_s32(p); }
WORD vec_index vec_index_set1(uint32_t a) { return vdupq_n_s32((int32_t)a); }
WORD vec_index vec_index_xor(vec_index a, vec_index b) { return veorq_s32(a, b); }
WORD vec_index vec_index_multiply(vec_index a, uint32_t m, vec_index *high)
{
    uint32x4_t bits = vreinterpretq_u32_s32(a), factor = vdupq_n_u32(m);
    uint32x4_t front = vreinterpretq_u32_u64(vmull_u32(vget_low_u32(bits), vget_low_u32(factor)));
    uint32x4_t back = vreinterpretq_u32_u64(vmull_high_u32(bits, factor));
    *high = vreinterpretq_s32_u32(vuzp2q_u32(front, back));
    return vreinterpretq_s32_u32(vuzp1q_u32(front, back));
}
WORD vec_index vec_index_low16(vec_index a) { return vandq_s32(a, vdupq_n_s32(0xffff)); }
WORD vec_index vec_index_high16(vec_index a)
{
    return vreinterpretq_s32_u32(vshrq_n_u32(vreinterpretq_u32_s32(a), 16));
}
/* The table lookups of NEON count bytes. */
WORD uint8x16_t neon_bytes(vec_index i)
{
    return vreinterpretq_u8_s32(vmlaq_s32(vdupq_n_s32(0x03020100), i, vdupq_n_s32(0x04040404)));
}
WORD vec vec_permute(vec_index i, vec a)
{
    return vreinterpretq_f32_u8(vqtbl1q_u8(vreinterpretq_u8_f32(a), neon_bytes(i)));
}
WORD vec vec_permute2(vec_index i, vec a, vec b)
{
    uint8x16x2_t both = {{vreinterpretq_u8_f32(a), vreinterpretq_u8_f32(b)}};
    return vreinterpretq_f32_u8(vqtbl2q_u8(both, neon_bytes(i)));
}
WORD vec vec_gather(const real *p, vec_index i)
{
    vec a = vdupq_n_f32(p[vgetq_lane_s32(i, 0)]);
    a = vld1q_lane_f32(p + vgetq_lane_s32(i, 1), a, 1);
    a = vld1q_lane_f32(p + vgetq_lane_s32(i, 2), a, 2);
    return vld1q_lane_f32(p + vgetq_lane_s32(i, 3), a, 3);
}
WORD vec vec_keep(vec a, int key, vec_index limit, real other)
{
    return vbslq_f32(vcgtq_s32(limit, vdupq_n_s32(key)), a, vdupq_n_f32(other));
}

WORD vec vec_not_below(vec a, vec low, vec x)
{
    return vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(x), vcltq_f32(a, low)));
}
WORD vec vec_scale2(vec p, vec shifted, vec a, vec low)
{
    int32x4_t exponent = vshlq_n_s32(vreinterpretq_s32_f32(shifted), 23);
    int32x4_t sum = vaddq_s32(vreinterpretq_s32_f32(p), exponent);
    return vreinterpretq_f32_s32(vbicq_s32(sum, vreinterpretq_s32_u32(vcltq_f32(a, low))));
}
WORD vec vec_split2(vec a, vec *exponent)
{
    int32x4_t bits = vreinterpretq_s32_f32(a);
    int32x4_t above = vsubq_s32(bits, vdupq_n_s32(0x3f400000));
    *exponent = vcvtq_f32_s32(vshrq_n_s32(above, 23));
    above = vandq_s32(above, vdupq_n_s32((int32_t)0xff800000));
    return vreinterpretq_f32_s32(vsubq_s32(bits, above));
}

WORD vec vec_load_f16(const uint16_t *p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
WORD void vec_store_f16(uint16_t *p, vec a) { vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(a))); }
WORD vec vec_load_bf16(const uint16_t *p)
{
    return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16));
}
WORD void vec_store_bf16(uint16_t *p, vec a)
{
    uint32x4_t bits = vreinterpretq_u32_f32(a);
    uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    uint32x4_t up = vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7fff)), odd);
    uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
    vst1_u16(p, vshrn_n_u32(vbslq_u32(vceqq_f32(a, a), up, quiet), 16));
}

WORD void vec_transpose(vec r[VL])
{
    float32x4x2_t a = vzipq_f32(r[0], r[2]), b = vzipq_f32(r[1], r[3]);
    float32x4x2_t c = vzipq_f32(a.val[0], b.val[0]), d = vzipq_f32(a.val[1], b.val[1]);
    r[0] = c.val[0];
    r[1] = c.val[1];
    r[2] = d.val[0];
    r[3] = d.val[1];
}
