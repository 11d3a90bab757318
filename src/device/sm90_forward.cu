/* SPDX-License-Identifier: MIT
 * The forward op on Hopper. A block is one warpgroup that looks ahead (a warp of it) and loads
 * (two more), and NA_GROUPS that compute, each for 64 rows: a box of queries times NA_PACK heads
 * that share their keys. The boxes lie side by side along axis NA_STACK. Blocks take work items,
 * one after the other, from a counter; for each item tiles of keys and values stream through shared
 * memory, beginning where the union of the windows begins. Each tile comes with a note about which
 * warpgroups can leave it out, which need one half of it only, and which must mask it.
 *
 * Inside a warpgroup nothing overlaps; the warpgroups overlap each other. Tokens are counted in
 * places of their dilation group, unless said otherwise.
 *
 * Parameters: NA_DTYPE (f16 or bf16); NA_DIM and NA_VALUE_DIM, channels, multiples of 8;
 * NA_SUB_0..2 (times NA_PACK: 64), NA_PACK, NA_GROUPS, NA_STACK; NA_TILE_0..2, the keys of a tile,
 * NA_VISITORS their product, NA_HALF_VISITORS half of it, or 0 where tiles are not halved;
 * NA_KEY_STAGES and NA_VALUE_STAGES, at least 2; NA_ORDERS, of sm90_scout.h; NA_POSITIONS, places
 * for tiles along one axis in the mask tables, 0: no tables, as rows and tiles extend along axis 2
 * only; NA_EXTRA: there are additional tokens; NA_SCALED: scores are scaled before they are
 * compared, as the scale is not positive or there is NA_BIAS, a relative position bias. */
#include "device/sm90_forward.h"
#include "device/words/hopper.h"

#define NA_PRODUCT outputs
#define NA_PRODUCT_N NA_VALUE_DIM
#define NA_PRODUCT_B 1
#include "device/words/wgmma_tmpl.h"

#define NA_SIDE 0
#define NA_BIAS_ENTRIES 0
#define NA_ARGUMENTS na_sm90_forward
#include "device/sm90_items.h"

enum {
    STEPS = (NA_DIM + 15) / 16, /* of products along the channels */
    OUTPUTS = NA_VALUE_DIM / 2  /* held by a thread */
};

enum {
    QUERY_FULL = 0,
    QUERY_EMPTY = QUERY_FULL + NA_GROUPS,
    KEY_FULL = QUERY_EMPTY + NA_GROUPS,
    KEY_EMPTY = KEY_FULL + NA_KEY_STAGES,
    VALUE_FULL = KEY_EMPTY + NA_KEY_STAGES,
    VALUE_EMPTY = VALUE_FULL + NA_VALUE_STAGES,
    ORDER_FULL = VALUE_EMPTY + NA_VALUE_STAGES,
    ORDER_EMPTY = ORDER_FULL + NA_ORDERS,
    GATES = ORDER_EMPTY + NA_ORDERS
};

NA_WORD na_sm90_shared places(void)
{
    return na_sm90_shared_of(
        NA_GROUPS, NA_DIM, NA_VALUE_DIM, NA_VISITORS, NA_KEY_STAGES, NA_VALUE_STAGES, NA_ORDERS,
        na_sm90_order_bytes(NA_GROUPS, TABLE_ROWS, NA_POSITIONS), TABLE_WORDS + BIAS_WORDS);
}

NA_WORD uint32_t gate(uint32_t base, int index) { return base + places().gate + 8 * index; }

NA_WORD int *note_of(int stage)
{
    return (int *)((unsigned char *)na_shared() + places().note) + stage * NOTE_WORDS;
}

#include "device/sm90_scout.h"
#include "device/sm90_produce.h"
#include "device/sm90_tour.h"
#include "device/sm90_rows.h"
#if NA_BIAS
#include "device/sm90_bias.h"
#endif

/* ----------------------------------------------------------------------------------------------
 * the warpgroups that compute */

typedef struct consumer {
    seat seat;
    uint32_t base, query; /* shared memory; this warpgroup's queries in it */
    ring key, value;
    int items;       /* begun */
    int holds_query; /* not given back yet */
    int owes_value;  /* the stage of values before this one is not given back yet */
    float out[OUTPUTS];
    float highest[2], total[2]; /* reference maxima (no higher than the true ones), sums */
} consumer;

#define NONE (-1e30f) /* below every score, yet finite: less itself it gives 0 */

/* What scores are multiplied by as they become exponents. */
NA_WORD float exponent_scale(const na_sm90_forward *p) { return NA_SCALED ? 1 : p->scale_log2; }

NA_WORD void give_key(consumer *s)
{
    na_gate_arrive_warp(gate(s->base, KEY_EMPTY + s->key.stage), s->seat.lane, 1);
}

NA_WORD void give_query(consumer *s)
{
    na_gate_arrive_warp(gate(s->base, QUERY_EMPTY + s->seat.group), s->seat.lane, s->holds_query);
    s->holds_query = 0;
}

/* Leaves a tile out. Its values are given back with the next ones: to wait for them now would make
 * this warpgroup as slow as the slowest, and an arrival before they came would count for the phase
 * before. */
NA_WORD void leave_out(consumer *s)
{
    give_key(s);
    if (s->owes_value) {
        int before = s->value.stage ? s->value.stage - 1 : NA_VALUE_STAGES - 1;
        na_gate_wait(gate(s->base, VALUE_FULL + before),
                     s->value.stage ? s->value.phase : s->value.phase ^ 1);
        /* Once the first lane has arrived, the gate may turn twice: whoever still waited at it
         * would do so for ever. */
        na_warp_barrier();
        na_gate_arrive_warp(gate(s->base, VALUE_EMPTY + before), s->seat.lane, 1);
    }
    s->owes_value = 1;
}

/* Called when this stage's values have come. */
NA_WORD void give_owed_value(consumer *s)
{
    int before = s->value.stage ? s->value.stage - 1 : NA_VALUE_STAGES - 1;
    na_gate_arrive_warp(gate(s->base, VALUE_EMPTY + before), s->seat.lane, s->owes_value);
    s->owes_value = 0;
}

#define NA_COLUMNS NA_VISITORS
#include "device/sm90_tile_tmpl.h"
#if NA_HALF_VISITORS
#define NA_COLUMNS NA_HALF_VISITORS
#include "device/sm90_tile_tmpl.h"
#endif

/* 0: there is none. */
NA_WORD int begin_item(consumer *s)
{
    if (!take_item(&s->seat, s->base, s->items))
        return 0;
#pragma unroll
    for (int i = 0; i < OUTPUTS; i++)
        s->out[i] = 0;
    s->highest[0] = s->highest[1] = NONE;
    s->total[0] = s->total[1] = 0;
    na_gate_wait(gate(s->base, QUERY_FULL + s->seat.group), s->items & 1);
    s->items++;
    s->holds_query = 1;
    return 1;
}

NA_WORD void finish_item(const na_sm90_forward *p, consumer *s)
{
    const work_item *t = s->seat.item;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        int row = s->seat.row + 8 * r, head = t->head * NA_PACK + row % NA_PACK, token[3];
        int there = find_row(&p->walk, &s->seat, row, token);
        float total = s->total[r];
        total += na_exchange(total, 1);
        total += na_exchange(total, 2);
        store_row(&s->seat, s->out, NA_VALUE_DIM, r, NA_BIAS && total == 0 ? 0 : 1 / total,
                  (uint16_t *)p->out + offset_of(&p->out_layout, t->batch, token, head), there);
        if (there && p->lse && !(s->seat.lane & 3))
            p->lse[offset_of(&p->lse_layout, t->batch, token, head)] =
                (s->highest[r] * exponent_scale(p) + na_log2(total)) * 0.69314718f;
    }
}

NA_WORD void consume(const na_sm90_forward *p, uint32_t base, int group)
{
    consumer s;
    int kind;
    take_seat(&s.seat, group, places().item, places().table);
    s.base = base;
    s.query = base + places().query + group * places().query_bytes;
    s.key.stage = s.value.stage = 0;
    s.key.phase = s.value.phase = 0;
    s.items = 0;
    s.owes_value = 0;
    while (begin_item(&s)) {
        do {
            na_gate_wait(gate(base, KEY_FULL + s.key.stage), s.key.phase);
            const int *note = note_of(s.key.stage);
            kind = na_uniform(note[NOTE_KIND]);
            if (kind >> group & SKIP)
                leave_out(&s);
#if NA_HALF_VISITORS
            else if (kind >> group & (UPPER_ONLY | LOWER_ONLY))
                NA_JOIN(tile_, NA_HALF_VISITORS)
            (p, &s, note, kind, kind >> group & UPPER_ONLY ? NA_HALF_VISITORS : 0);
#endif
            else NA_JOIN(tile_, NA_VISITORS)(p, &s, note, kind, 0);
            next(&s.key, NA_KEY_STAGES);
            next(&s.value, NA_VALUE_STAGES);
        } while (!(kind & LAST));
        give_query(&s);
        finish_item(p, &s);
    }
}

NA_WORD int arrivals_of(int gate)
{
    if (gate >= ORDER_FULL)
        return gate >= ORDER_EMPTY ? ORDER_TAKERS : SCOUTS;
    if (gate >= QUERY_EMPTY && gate < KEY_FULL)
        return ARRIVALS / NA_GROUPS;
    return (gate >= KEY_EMPTY && gate < VALUE_FULL) || (gate >= VALUE_EMPTY && gate < ORDER_FULL)
               ? ARRIVALS
               : 1;
}

NA_KERNEL_ALONE(na_sm90_forward_kernel, na_sm90_forward, 128 * (NA_GROUPS + 1))
{
    uint32_t base = na_shared_address(na_shared());
    int warpgroup = na_uniform(na_thread() >> 7);
    if (na_thread() == 0) {
        for (int i = 0; i < GATES; i++)
            na_gate_init(gate(base, i), arrivals_of(i));
        na_fence_async();
    }
    na_barrier();
    if (warpgroup == 0) {
        NA_REGISTERS_LESS(NA_GROUPS == 3 ? 32 : 24);
        int warp = na_uniform(na_thread() >> 5);
        if (warp == 0)
            produce(&p, base);
        else if (warp == 1)
            scout(&p, base);
        else if (na_thread() == 64)
            load_all_residents(&p, base);
    } else {
        NA_REGISTERS_MORE(NA_GROUPS == 3 ? 160 : 240);
        consume(&p, base, warpgroup - 1);
    }
}
