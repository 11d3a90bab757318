/* SPDX-License-Identifier: MIT
 * The host text of the words of sm_90a (device/words/hopper.h). Nothing asynchronous is there
 * before it was waited for: copies and results are NaNs until then, and products read their
 * operands as late as they may. */
#ifndef HOST_HOPPER_H
#define HOST_HOPPER_H

#define NA_KERNEL_ALONE(name, type, threads)                                                       \
    static void name##_text(const type p);                                                         \
    int name(const void *p)                                                                        \
    {                                                                                              \
        return p ? name##_text(*(const type *)p), na_host_end() : NA_HOST_SIZES(type, threads);    \
    }                                                                                              \
    static void name##_text(const type p)

static inline int na_host_end(void);

static inline char *na_host_at(uint32_t address, uint32_t bytes)
{
    if (address + (uint64_t)bytes > na_host_shared_bytes())
        na_host_fault("shared memory has %zu bytes, not %u + %u", na_host_shared_bytes(), address,
                      bytes);
    return (char *)na_host_shared() + address;
}

NA_WORD uint32_t na_shared_address(const void *place)
{
    return (uint32_t)((const char *)place - (const char *)na_host_shared());
}

/* ----------------------------------------------------------------------------------------------
 * barriers and gates */

NA_WORD void na_group_barrier(int name) { na_host_barrier(name, 128); }

NA_WORD void na_warp_barrier(void)
{
    char none = 0;
    na_host_warp("na_warp_barrier", &none, 1);
}

typedef struct na_host_gate {
    uint16_t count, pending;
    int32_t bytes : 31;
    uint32_t phase : 1;
} na_host_gate;

static inline na_host_gate *na_host_gate_at(uint32_t gate)
{
    if (gate % 8)
        na_host_fault("gate %u is not aligned", gate);
    return (na_host_gate *)na_host_at(gate, 8);
}

static inline void na_host_gate_turn(na_host_gate *g)
{
    if (g->pending || g->bytes)
        return;
    g->phase ^= 1;
    g->pending = g->count;
}

NA_WORD void na_gate_init(uint32_t gate, int arrivals)
{
    na_host_gate fresh = {.count = (uint16_t)arrivals, .pending = (uint16_t)arrivals};
    *na_host_gate_at(gate) = fresh;
}

NA_WORD void na_fence_async(void) {}

/* What threads have stored for products and copies since their last fence: nobody sees it yet. */
static struct na_host_stored {
    int count;
    uint32_t to[128], word[128];
} na_host_stored[1024];

/* How often threads have waited at gates, if they ever do. */
static uint32_t na_host_waited[1024];

/* A thread arrives for its warp. Who of them is still to look at a gate that this one has passed
 * may wait for ever: from now on it can turn twice. */
NA_WORD void na_gate_arrive(uint32_t gate)
{
    na_host_gate *g = na_host_gate_at(gate);
    for (int i = na_host_thread() & ~31; i <= (na_host_thread() | 31); i++) {
        if (na_host_stored[i].count)
            na_host_fault("arrives at gate %u, and what its warp stored has not come", gate);
        if (na_host_waited[i] && na_host_waited[i] < na_host_waited[na_host_thread()])
            na_host_fault("arrives at gate %u, and thread %d has not passed the one before", gate,
                          i);
    }
    if (!g->pending || g->pending > g->count)
        na_host_fault("arrives at gate %u, where nobody is expected", gate);
    g->pending--;
    na_host_gate_turn(g);
}

NA_WORD void na_gate_arrive_warp(uint32_t gate, int lane, int condition)
{
    if (condition && (NA_EVERY_LANE_ARRIVES || lane == 0))
        na_gate_arrive(gate);
}

NA_WORD void na_gate_arrive_expect(uint32_t gate, int bytes)
{
    na_host_gate_at(gate)->bytes += bytes;
    na_gate_arrive(gate);
}

NA_WORD int na_gate_test(uint32_t gate, uint32_t phase)
{
    if (na_host_gate_at(gate)->phase != phase)
        return 1;
    na_host_yield();
    return 0;
}

NA_WORD void na_gate_wait(uint32_t gate, uint32_t phase)
{
    while (!na_gate_test(gate, phase))
        ;
    na_host_waited[na_host_thread()]++;
}

/* ----------------------------------------------------------------------------------------------
 * boxes */

/* Pieces of 16 bytes are exchanged by the number of their 128-byte row. */
static inline uint32_t na_host_swizzle(uint32_t address)
{
    return address ^ (address >> 7 & 7) << 4;
}

typedef struct na_host_box {
    na_host_map map;
    uint32_t to, gate;
    int at[5];
} na_host_box;

static inline uint32_t na_host_box_side(const na_host_map *map, int axis)
{
    int step = axis ? map->element_strides[axis] : 1;
    return (uint32_t)((map->box[axis] + step - 1) / step);
}

static inline uint32_t na_host_box_elements(const na_host_map *map)
{
    uint32_t count = 1;
    for (int i = 0; i < 5; i++)
        count *= na_host_box_side(map, i);
    return count;
}

/* The element where it lies in memory; NULL outside of the tensor. */
static inline const char *na_host_box_source(const na_host_box *box, uint32_t number)
{
    const na_host_map *map = &box->map;
    const char *from = map->base;
    for (int i = 0; i < 5; i++) {
        uint32_t side = na_host_box_side(map, i);
        int64_t at = box->at[i] + (int64_t)(number % side) * (i ? map->element_strides[i] : 1);
        number /= side;
        if (at < 0 || at >= map->extents[i])
            return NULL;
        from += at * (i ? (int64_t)map->byte_strides[i - 1] : map->element_bytes);
    }
    return from;
}

static inline void na_host_box_deliver(void *context)
{
    const na_host_box *box = context;
    uint32_t size = box->map.element_bytes, count = na_host_box_elements(&box->map);
    na_host_gate *gate = na_host_gate_at(box->gate);
    for (uint32_t i = 0; i < count; i++) {
        const char *from = na_host_box_source(box, i);
        uint32_t place = box->to + i * size;
        char *to = na_host_at(box->map.swizzle ? na_host_swizzle(place) : place, size);
        if (from)
            memcpy(to, from, size);
        else
            memset(to, 0, size);
    }
    gate->bytes -= (int)(count * size);
    na_host_gate_turn(gate);
}

NA_WORD void na_box_load(uint32_t to, const na_tensor_map *map, uint32_t gate, int c0, int c1,
                         int c2, int c3, int c4)
{
    na_host_box box = {.to = to, .gate = gate, .at = {c0, c1, c2, c3, c4}};
    memcpy(&box.map, map, sizeof box.map);
    uint32_t bytes = na_host_box_elements(&box.map) * box.map.element_bytes;
    if (box.map.rank != 5 || (box.map.swizzle && box.map.swizzle != 3))
        na_host_fault("no box of five axes, swizzled by 128 bytes or not at all");
    if (to % (box.map.swizzle ? 1024 : 128))
        na_host_fault("a box has to go to a multiple of 1024, or 128 without swizzle, not %u", to);
    memset(na_host_at(to, bytes), 0xff, bytes);
    na_host_later(na_host_box_deliver, &box, sizeof box);
}

#include "host/hopper_add.h"

/* ----------------------------------------------------------------------------------------------
 * products */

typedef struct na_host_step {
    uint64_t a, b;
    const uint32_t *registers;
    int left_transposed, transposed, more;
} na_host_step;

/* Products that are added up in one result. */
typedef struct na_host_sum {
    int steps, columns;
    float *result, before[128];
    na_host_step step[32];
} na_host_sum;

/* What a thread has under way: sums committed, oldest first, and the one that is being put
 * together. */
static struct na_host_pending {
    int fenced, committed, read; /* read: right matrices so far */
    na_host_sum sum[3];
} na_host_pending[1024];

static inline float na_host_half(uint32_t address)
{
    uint16_t bits;
    memcpy(&bits, na_host_at(na_host_swizzle(address), 2), 2);
    return NA_DTYPE == 2 ? na_float_of_f16(bits) : na_float_of_bits((uint32_t)bits << 16);
}

/* Element (row, k) of a matrix whose rows lie along k, or (k, column) of one whose rows lie across:
 * as descriptors say. */
static inline float na_host_element(uint64_t matrix, int row, int k, int transposed)
{
    uint32_t start = (uint32_t)(matrix & 0x3fff) << 4, wide = (uint32_t)(matrix >> 16 & 0x3fff)
                                                              << 4;
    uint32_t high = (uint32_t)(matrix >> 32 & 0x3fff) << 4;
    if (matrix >> 62 != 1)
        na_host_fault("the matrix is not swizzled by 128 bytes");
    if (transposed)
        return na_host_half(start + (uint32_t)(row / 64) * wide + (uint32_t)(k / 8) * high +
                            (uint32_t)(k % 8) * 128 + (uint32_t)(row % 64) * 2);
    return na_host_half(start + (uint32_t)(row / 8) * high + (uint32_t)(row % 8) * 128 +
                        (uint32_t)k * 2);
}

static inline void na_host_product(float *result, const uint32_t *registers, uint64_t a, uint64_t b,
                                   int columns, int left_transposed, int transposed, int more)
{
    struct na_host_pending *w = &na_host_pending[na_host_thread()];
    const na_host_step step = {a, b, registers, left_transposed, transposed, more};
    if (!w->fenced)
        na_host_fault("a product without a fence before it");
    if (w->committed == 2)
        na_host_fault("three sums of products at once");
    na_host_sum *sum = &w->sum[w->committed];
    for (int i = 0; i < w->committed; i++)
        if (w->sum[i].result == result)
            na_host_fault("a result that is under way is added to");
    if (sum->steps && (sum->result != result || sum->columns != columns || sum->steps == 32))
        na_host_fault("products of several results at once");
    if (!sum->steps)
        memcpy(sum->before, result, (size_t)columns / 2 * sizeof *result);
    sum->result = result;
    sum->columns = columns;
    sum->step[sum->steps++] = step;
    memset(result, 0xff, (size_t)columns / 2 * sizeof *result);
}

/* The 16 elements of this thread's rows r and r + 8 of the left matrix. */
static inline void na_host_rows(const na_host_step *step, float a[2][16])
{
    int thread = na_host_thread() & 127, row = thread / 32 * 16 + thread % 32 / 4;
    if (!step->registers) {
        for (int k = 0; k < 32; k++)
            a[k / 16][k % 16] =
                na_host_element(step->a, row + k / 16 * 8, k % 16, step->left_transposed);
        return;
    }
    const uint16_t *quads =
        na_host_exchange("product", na_host_thread() & ~127, 128, step->registers, 16);
    for (int k = 0; k < 32; k++) {
        int lane = (thread & ~3) + k % 8 / 2, number = k % 16 / 8 * 2 + k / 16;
        uint16_t bits = quads[lane * 8 + number * 2 + k % 2];
        a[k / 16][k % 16] =
            NA_DTYPE == 2 ? na_float_of_f16(bits) : na_float_of_bits((uint32_t)bits << 16);
    }
}

/* The right matrices that the warpgroups of a block are at, as numbers: [k][column]. There are two
 * of each warpgroup, as some of its threads may be ahead by one. */
static float na_host_right[1024 / 128][2][16][256];

/* Each thread reads its share of a right matrix, for all. */
static inline const float (*na_host_read_right(const na_host_step *step, int columns))[256]
{
    int number = na_host_pending[na_host_thread()].read++;
    float(*right)[256] = na_host_right[na_host_thread() / 128][number % 2];
    char none = 0;
    for (int i = na_host_thread() % 128; i < 16 * columns; i += 128)
        right[i % 16][i / 16] = na_host_element(step->b, i / 16, i % 16, step->transposed);
    na_host_exchange("product", na_host_thread() & ~127, 128, &none, 1);
    return right;
}

static inline void na_host_multiply(const na_host_step *step, float *sum, int columns)
{
    float a[2][16];
    na_host_rows(step, a);
    const float(*right)[256] = na_host_read_right(step, columns);
    for (int i = 0; i < columns / 2; i++) {
        int column = i / 4 * 8 + na_host_thread() % 4 * 2 + i % 2;
        float total = step->more ? sum[i] : 0;
        for (int k = 0; k < 16; k++)
            total += a[i / 2 % 2][k] * right[k][column];
        sum[i] = total;
    }
}

NA_WORD void na_product_fence(void) { na_host_pending[na_host_thread()].fenced = 1; }

NA_WORD void na_product_commit(void)
{
    struct na_host_pending *w = &na_host_pending[na_host_thread()];
    if (!w->sum[w->committed].steps)
        na_host_fault("commits no products");
    w->committed++;
    w->fenced = 0;
}

/* Until `left` sums are under way. */
static inline void na_host_product_wait(const char *word, int left)
{
    struct na_host_pending *w = &na_host_pending[na_host_thread()];
    char none = 0;
    na_host_exchange(word, na_host_thread() & ~127, 128, &none, 1);
    if (w->sum[w->committed].steps)
        na_host_fault("waits for products that were not committed");
    while (w->committed > left) {
        na_host_sum *sum = &w->sum[0];
        for (int i = 0; i < sum->steps; i++)
            na_host_multiply(&sum->step[i], sum->before, sum->columns);
        memcpy(sum->result, sum->before, (size_t)sum->columns / 2 * sizeof *sum->result);
        w->sum[0] = w->sum[1];
        w->sum[1].steps = 0;
        w->committed--;
    }
    /* Nobody goes on while others still read. */
    na_host_exchange(word, na_host_thread() & ~127, 128, &none, 1);
}

NA_WORD void na_product_wait(void) { na_host_product_wait("na_product_wait", 0); }
NA_WORD void na_product_wait_first(void) { na_host_product_wait("na_product_wait_first", 1); }

NA_WORD void na_hold(float *value) { (void)value; }
NA_WORD void na_keep(uint32_t *value) { (void)value; }

/* ----------------------------------------------------------------------------------------------
 * the rest */

NA_WORD int na_count_up(int *counter) { return (*counter)++; }

#define NA_REGISTERS_LESS(count) na_host_keep_registers(count)
#define NA_REGISTERS_MORE(count) na_host_keep_registers(count)

NA_WORD float na_exp2(float x) { return exp2f(x); }
NA_WORD float na_log2(float x) { return log2f(x); }
NA_WORD float na_fma(float a, float b, float c) { return fmaf(a, b, c); }
NA_WORD float na_maximum(float a, float b) { return fmaxf(a, b); }

NA_WORD uint32_t na_pack(float first, float second)
{
    return NA_DTYPE == 2 ? na_f16_of_float(first) | (uint32_t)na_f16_of_float(second) << 16
                         : na_bf16_of_float(first) | (uint32_t)na_bf16_of_float(second) << 16;
}

NA_WORD uint32_t na_bits(int first, int count)
{
    return (uint32_t)((((uint64_t)1 << count) - 1) << first);
}

NA_WORD int na_any(int condition)
{
    const int *all = na_host_warp("na_any", &condition, sizeof condition);
    int any = 0;
    for (int i = 0; i < 32; i++)
        any |= all[i];
    return any;
}

NA_WORD int na_any_bits(int bits)
{
    const int *all = na_host_warp("na_any_bits", &bits, sizeof bits);
    int any = 0;
    for (int i = 0; i < 32; i++)
        any |= all[i];
    return any;
}

NA_WORD int na_largest(int value)
{
    const int *all = na_host_warp("na_largest", &value, sizeof value);
    int largest = value;
    for (int i = 0; i < 32; i++)
        largest = all[i] > largest ? all[i] : largest;
    return largest;
}

NA_WORD float na_exchange(float value, int mask)
{
    return na_shuffle_float(value, (na_host_thread() & 31) ^ mask);
}

NA_WORD uint32_t na_exchange_bits(uint32_t value, int mask)
{
    return (uint32_t)na_shuffle_int((int)value, (na_host_thread() & 31) ^ mask);
}

NA_WORD int na_uniform(int value) { return na_shuffle_int(value, 0); }

NA_WORD void na_load_8_bytes(const float *from, float *to)
{
    if ((uintptr_t)from % 8)
        na_host_fault("8 bytes are loaded from %p", (const void *)from);
    memcpy(to, from, 8);
}

NA_WORD void na_store_16_bytes(void *to, const uint32_t *v)
{
    if ((uintptr_t)to % 16)
        na_host_fault("16 bytes are stored at %p", to);
    memcpy(to, v, 16);
}

#endif
