/* SPDX-License-Identifier: MIT */
#include "tensor.h"

#include <math.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { POISON = 0xff }; /* a NaN in every element type */
enum { HUGE_PAGE = 2 << 20 };

size_t tensor_element(const tensor *t)
{
    return t->dtype == NATTEN_F64 ? 8 : t->dtype == NATTEN_F32 ? 4 : 2;
}

int64_t tensor_count(const tensor *t) { return t->rows * t->shape.channel; }

static void measure(tensor *t)
{
    const int64_t sizes[] = {t->shape.batch, t->shape.axis[0], t->shape.axis[1], t->shape.axis[2],
                             t->shape.head};
    const int64_t steps[] = {t->layout.batch, t->layout.axis[0], t->layout.axis[1],
                             t->layout.axis[2], t->layout.head};
    int64_t high = t->shape.channel;
    t->low = 0;
    t->rows = 1;
    for (int i = 0; i < 5; i++) {
        t->rows *= sizes[i];
        int64_t reach = (sizes[i] - 1) * steps[i];
        if (reach < 0)
            t->low += reach;
        else
            high += reach;
    }
    t->bytes = tensor_count(t) ? (size_t)(high - t->low) * tensor_element(t) : 0;
}

int tensor_make(tensor *t, const natten_problem *problem, natten_role role, placement where)
{
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    int summed = role == NATTEN_LSE || role == NATTEN_D_LSE || role == NATTEN_KEY_BIAS ||
                 role == NATTEN_D_KEY_BIAS;
    *t = (tensor){.role = role, .dtype = (natten_dtype)problem->dtype};
    if (summed && t->dtype != NATTEN_F64)
        t->dtype = NATTEN_F32;
    t->shape = role_shape(problem, role);
    t->layout = problem->layout[role];
    measure(t);
    if (where == PLACE_HUGE)
        page = HUGE_PAGE;
    size_t inside = (t->bytes + 64 + page - 1) / page * page;
    t->map_bytes = inside + 2 * page;
    if (where == PLACE_SPARSE) {
        t->map = mmap(NULL, t->map_bytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        t->base = t->map + page;
        return t->map != MAP_FAILED;
    }
    t->map = mmap(NULL, t->map_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (t->map == MAP_FAILED)
        return 0;
    t->base = t->map + page - (uintptr_t)t->map % page;
    if (mprotect(t->base, inside, PROT_READ | PROT_WRITE))
        return 0;
    if (where == PLACE_HUGE)
        madvise(t->base, inside, MADV_HUGEPAGE);
    memset(t->base, POISON, inside);
    if (where == PLACE_END)
        t->base += inside - t->bytes;
    if (where == PLACE_ODD)
        t->base += tensor_element(t);
    return 1;
}

void tensor_free(tensor *t)
{
    if (t->map && t->map != MAP_FAILED)
        munmap(t->map, t->map_bytes);
    t->map = NULL;
}

void *tensor_data(const tensor *t) { return t->base - t->low * (int64_t)tensor_element(t); }

int64_t tensor_row_offset(const tensor *t, int64_t row)
{
    const test_shape *s = &t->shape;
    int64_t offset = row % s->head * t->layout.head;
    row /= s->head;
    for (int a = 2; a >= 0; a--) {
        offset += row % s->axis[a] * t->layout.axis[a];
        row /= s->axis[a];
    }
    return offset + row * t->layout.batch;
}

static char *row_address(const tensor *t, int64_t row)
{
    return (char *)tensor_data(t) + tensor_row_offset(t, row) * (int64_t)tensor_element(t);
}

/* Bits of significand and of exponent below the sign. */
static const struct {
    int significand, exponent;
} half_format[] = {[NATTEN_F16] = {10, 5}, [NATTEN_BF16] = {7, 8}};

static uint16_t half_encode(natten_dtype dtype, double value)
{
    int bits = half_format[dtype].significand, exponent;
    int bias = (1 << (half_format[dtype].exponent - 1)) - 1;
    uint16_t sign = signbit(value) ? 0x8000 : 0;
    int infinite = (2 * bias + 1) << bits;
    if (isnan(value))
        return (uint16_t)(sign | infinite | 1 << (bits - 1));
    if (value == 0 || isinf(value))
        return (uint16_t)(sign | (value == 0 ? 0 : infinite));
    frexp(value, &exponent);
    int field = exponent - 1 + bias;
    if (field < 1)
        field = 1;
    /* A carry out of the significand moves into the exponent field, up to infinity: as it should.
     * The leading one counts as one in the exponent field. */
    double scaled = nearbyint(ldexp(fabs(value), bits + bias - field));
    double code = scaled + (double)((int64_t)(field - 1) << bits);
    return (uint16_t)(sign | (code > infinite ? infinite : (int)code));
}

static double half_decode(natten_dtype dtype, uint16_t code)
{
    int bits = half_format[dtype].significand;
    int bias = (1 << (half_format[dtype].exponent - 1)) - 1;
    int field = (code & 0x7fff) >> bits, significand = code & ((1 << bits) - 1);
    double value = field ? ldexp(significand + (1 << bits), field - bias - bits)
                         : ldexp(significand, 1 - bias - bits);
    if (field == 2 * bias + 1)
        value = significand ? NAN : INFINITY;
    return code & 0x8000 ? -value : value;
}

double round_to(natten_dtype dtype, double value)
{
    if (dtype == NATTEN_F64)
        return value;
    return dtype == NATTEN_F32 ? (float)value : half_decode(dtype, half_encode(dtype, value));
}

void tensor_write(tensor *t, const double *values)
{
    for (int64_t row = 0; row < t->rows; row++) {
        char *at = row_address(t, row);
        for (int64_t c = 0; c < t->shape.channel; c++) {
            double value = *values++;
            if (t->dtype == NATTEN_F64)
                ((double *)at)[c] = value;
            else if (t->dtype == NATTEN_F32)
                ((float *)at)[c] = (float)value;
            else
                ((uint16_t *)at)[c] = half_encode(t->dtype, value);
        }
    }
}

void tensor_read(const tensor *t, double *values)
{
    for (int64_t row = 0; row < t->rows; row++) {
        const char *at = row_address(t, row);
        for (int64_t c = 0; c < t->shape.channel; c++)
            *values++ = t->dtype == NATTEN_F64   ? ((const double *)at)[c]
                        : t->dtype == NATTEN_F32 ? ((const float *)at)[c]
                                                 : half_decode(t->dtype, ((const uint16_t *)at)[c]);
    }
}

void tensor_bytes(const tensor *t, char *bytes)
{
    size_t line = (size_t)t->shape.channel * tensor_element(t);
    for (int64_t row = 0; row < t->rows; row++, bytes += line)
        memcpy(bytes, row_address(t, row), line);
}

int tensor_is_intact(tensor *t)
{
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    size_t line = (size_t)t->shape.channel * tensor_element(t);
    for (int64_t row = 0; row < t->rows; row++)
        memset(row_address(t, row), POISON, line);
    const unsigned char *inside = (unsigned char *)t->map + page;
    for (size_t i = 0; i < t->map_bytes - 2 * page; i++)
        if (inside[i] != POISON)
            return 0;
    return 1;
}
