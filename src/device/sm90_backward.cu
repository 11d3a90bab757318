/* SPDX-License-Identifier: MIT
 * The backward op on Hopper, in two kernels from this text; nothing is added by atomics, so results
 * are the same bits every time. With p = 2^(s - lse) and ds = p (d_out . value - delta):
 *   NA_SIDE 0: residents are queries, visitors keys     d_query = scale * sum of ds key
 *   NA_SIDE 1: residents are keys, visitors queries     d_key = scale * sum of ds query
 *                                                       d_value = sum of p d_out
 * NA_SIDE 1 with NA_ADDS 1 is all in one kernel: d_query, too, is added up there, which is done by
 * atomics (sm90_adds.h).
 * Blocks, items, boxes, notes and masks are those of sm90_forward.cu. Which queries visit a key is
 * an interval along each axis (na_visitors_of), so that both kernels go the same way. Where heads
 * of queries share keys, their visits follow each other in one item. Additional tokens visit
 * queries last; their own gradients come from a launch in which they are the residents and every
 * query visits, for which nothing has to be masked: what is loaded of queries past the end is 0,
 * and so is what they give.
 *
 * Products of a step: s and d_out . value side by side, then the sums; at its end all is waited
 * for. The warpgroups overlap each other.
 *
 * Parameters: NA_DTYPE, NA_DIM, NA_VALUE_DIM, NA_SUB_0..2, NA_PACK (1 for keys), NA_GROUPS,
 * NA_STACK, NA_TILE_0..2, NA_VISITORS, NA_HALF_VISITORS (0 for keys), NA_POSITIONS, NA_EXTRA: as in
 * sm90_forward.cu; NA_SIDE; NA_ADDS; NA_GIVES, 1 d_key, 2 d_value, 3 both (d_query: 1); NA_STAGES,
 * at least 2; NA_ORDERS; NA_MASKS, 0 where every visitor meets every resident; NA_SCALED, NA_BIAS:
 * as there; NA_BIAS_ENTRIES: where d_query is given the gradient of the bias is as well, if it has
 * no more entries, or with -1 however many it has; 0: it is not. */
#include "device/sm90_backward.h"
#include "device/words/hopper.h"

#define NA_ARGUMENTS na_sm90_backward

#define NA_PRODUCT sums
#define NA_PRODUCT_N NA_DIM
#define NA_PRODUCT_B 1
#include "device/words/wgmma_tmpl.h"
#define NA_PRODUCT value_sums
#define NA_PRODUCT_N NA_VALUE_DIM
#define NA_PRODUCT_B 1
#include "device/words/wgmma_tmpl.h"
#define NA_PRODUCT parts
#define NA_PRODUCT_N NA_DIM
#define NA_PRODUCT_A 1
#define NA_PRODUCT_B 1
#include "device/words/wgmma_tmpl.h"

#include "device/sm90_items.h"

enum {
    GIVES_SUMS = NA_GIVES & 1,        /* d_query or d_key */
    GIVES_VALUE_SUMS = NA_GIVES >> 1, /* d_value */
    WEIGHTS = NA_VISITORS / 4         /* held by a thread, two in a word */
};

enum {
    RESIDENT_FULL = 0,
    RESIDENT_EMPTY = RESIDENT_FULL + NA_GROUPS,
    FIRST_FULL = RESIDENT_EMPTY + NA_GROUPS, /* what has NA_DIM channels, and pairs */
    SECOND_FULL = FIRST_FULL + NA_STAGES,    /* what has NA_VALUE_DIM channels */
    EMPTY = SECOND_FULL + NA_STAGES,
    PART_FULL = EMPTY + NA_STAGES,
    PART_EMPTY = PART_FULL + (NA_ADDS ? NA_SM90_PARTS : 0),
    ORDER_FULL = PART_EMPTY + (NA_ADDS ? NA_SM90_PARTS : 0),
    ORDER_EMPTY = ORDER_FULL + NA_ORDERS,
    GATES = ORDER_EMPTY + NA_ORDERS
};

NA_WORD na_sm90_back_shared places(void)
{
    return na_sm90_back_shared_of(NA_SIDE, NA_ADDS, NA_GROUPS, NA_DIM, NA_VALUE_DIM, NA_VISITORS,
                                  NA_STAGES, NA_ORDERS,
                                  na_sm90_order_bytes(NA_GROUPS, TABLE_ROWS, NA_POSITIONS),
                                  (TABLE_WORDS + BIAS_WORDS) * (int)sizeof(cell));
}

NA_WORD uint32_t gate(uint32_t base, int index) { return base + places().gate + 8 * index; }

NA_WORD int *note_of(int stage)
{
    return (int *)((unsigned char *)na_shared() + places().note + stage * places().note_bytes);
}

NA_WORD uint32_t resident_at(int group, int which)
{
    return places().resident + group * (places().resident_bytes[0] + places().resident_bytes[1]) +
           which * places().resident_bytes[0];
}

NA_WORD uint32_t visitor_at(int stage, int which)
{
    return places().visitor + stage * (places().visitor_bytes[0] + places().visitor_bytes[1]) +
           which * places().visitor_bytes[0];
}

#include "device/sm90_scout.h"
#include "device/sm90_produce_back.h"
#include "device/sm90_rows.h"
#include "device/sm90_tour.h"
#if NA_BIAS
#include "device/sm90_bias.h"
#endif
#if NA_BIAS_ENTRIES
#include "device/sm90_bias_sums.h"
#endif

/* ----------------------------------------------------------------------------------------------
 * the warpgroups that compute */

typedef struct consumer {
    seat seat;
    uint32_t base;
    ring stage;
    int items; /* begun */
    float sums[NA_DIM / 2], value_sums[NA_VALUE_DIM / 2];
    float lse[2], delta[2]; /* of the two rows, where they are queries */
    /* Of sm90_adds.h. matrix: where this lane's row of a matrix lies in a tile whose rows have 128
     * bytes; matrices to the right are at this, exclusive or 32, 64 and 96. */
    int pending;
    uint32_t parts, matrix;
} consumer;

NA_WORD void hold(float *values, int count)
{
#pragma unroll
    for (int i = 0; i < count; i++)
        na_hold(&values[i]);
}

/* Of the two columns of 8 that this thread has: lse (which 0) or delta (2). Queries that visit
 * additional tokens are neighbors on the map, not in a dilation group as in a pair. */
NA_WORD void load_pair(const consumer *s, int from, int which, float *pair)
{
    const float *pairs = (const float *)((const unsigned char *)na_shared() + places().pair +
                                         s->stage.stage * places().pair_bytes);
    pairs += (from + s->seat.column) * NA_SM90_PAIR + which;
    if (NA_MASKS) {
        na_load_8_bytes(pairs, pair);
    } else {
        pair[0] = pairs[0];
        pair[1] = pairs[NA_SM90_PAIR];
    }
}

NA_WORD void give_stage(const consumer *s)
{
    na_gate_arrive_warp(gate(s->base, EMPTY + s->stage.stage), s->seat.lane, 1);
}

#include "device/sm90_adds.h"

/* A tile that the warpgroup leaves out can be given back before all of it has come: another
 * one waits for it, or nothing was loaded. */
NA_WORD void pass(consumer *s, const int *note, int kind)
{
    uint32_t none[WEIGHTS];
#pragma unroll
    for (int i = 0; i < WEIGHTS; i++)
        none[i] = 0;
    if (NA_ADDS && is_visited(kind)) {
        put_part(s, none);
        take_target(s, note);
    }
    give_stage(s);
}

#define NA_COLUMNS NA_VISITORS
#include "device/sm90_step_tmpl.h"
#if NA_HALF_VISITORS
#define NA_COLUMNS NA_HALF_VISITORS
#include "device/sm90_step_tmpl.h"
#endif

/* The rows' own numbers, where they are queries. */
NA_WORD void load_pairs(const na_sm90_backward *p, consumer *s)
{
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const work_item *t = s->seat.item;
        int row = s->seat.row + 8 * r, head = t->head * NA_PACK + row % NA_PACK, token[3];
        int there = find_row(&p->walk, &s->seat, row, token);
        int64_t line = (int64_t)t->batch * (p->walk.heads * NA_PACK) + head;
#pragma unroll
        for (int a = 0; a < 3; a++)
            line = line * p->extent[a] + token[a];
        s->lse[r] = there ? p->pair[line * NA_SM90_PAIR] : 0;
        s->delta[r] = there ? p->pair[line * NA_SM90_PAIR + 2] : 0;
    }
}

/* 0: there is none. */
NA_WORD int begin_item(const na_sm90_backward *p, consumer *s)
{
    if (!take_item(&s->seat, s->base, s->items))
        return 0;
#if NA_BIAS_ENTRIES
    clear_bias_sums(&s->seat);
#endif
    if (NA_SIDE == 0)
        load_pairs(p, s);
#pragma unroll
    for (int i = 0; i < NA_DIM / 2; i++)
        s->sums[i] = 0;
#pragma unroll
    for (int i = 0; i < NA_VALUE_DIM / 2; i++)
        s->value_sums[i] = 0;
    s->pending = 0;
    na_gate_wait(gate(s->base, RESIDENT_FULL + s->seat.group), s->items & 1);
    s->items++;
    return 1;
}

NA_WORD void finish_item(const na_sm90_backward *p, consumer *s)
{
    const work_item *t = s->seat.item;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        int row = s->seat.row + 8 * r, head = t->head * NA_PACK + row % NA_PACK, token[3];
        int there = find_row(&p->walk, &s->seat, row, token);
        if (GIVES_SUMS && (!NA_BIAS_ENTRIES || p->out[0]))
            store_row(&s->seat, s->sums, NA_DIM, r, p->scale,
                      (uint16_t *)p->out[0] + offset_of(&p->layout[0], t->batch, token, head),
                      there);
        if (GIVES_VALUE_SUMS)
            store_row(&s->seat, s->value_sums, NA_VALUE_DIM, r, 1,
                      (uint16_t *)p->out[1] + offset_of(&p->layout[1], t->batch, token, head),
                      there);
    }
}

/* The residents are read no more. Where d_query is added up, a warpgroup reads the other's keys,
 * and both have to give them back. */
NA_WORD void give_residents(const na_sm90_backward *p, consumer *s)
{
    if (NA_ADDS)
        finish_parts(p, s);
#pragma unroll
    for (int g = 0; g < NA_GROUPS; g++)
        if (NA_ADDS || g == s->seat.group)
            na_gate_arrive_warp(gate(s->base, RESIDENT_EMPTY + g), s->seat.lane, 1);
}

NA_WORD void consume(const na_sm90_backward *p, uint32_t base, int group)
{
    consumer s;
    int kind;
    take_seat(&s.seat, group, places().item, places().table);
    s.base = base;
    s.stage.stage = 0;
    s.stage.phase = 0;
    s.items = 0;
    start_parts(&s);
    while (begin_item(p, &s)) {
        do {
            na_gate_wait(gate(base, FIRST_FULL + s.stage.stage), s.stage.phase);
            const int *note = note_of(s.stage.stage);
            kind = na_uniform(note[NOTE_KIND]);
            if (kind >> group & SKIP)
                pass(&s, note, kind);
#if NA_HALF_VISITORS
            else if (kind >> group & (UPPER_ONLY | LOWER_ONLY))
                NA_JOIN(step_, NA_HALF_VISITORS)
            (p, &s, note, kind, kind >> group & UPPER_ONLY ? NA_HALF_VISITORS : 0);
#endif
            else NA_JOIN(step_, NA_VISITORS)(p, &s, note, kind, 0);
            if (NA_ADDS && is_visited(kind))
                follow_part(p, &s);
            next(&s.stage, NA_STAGES);
        } while (!(kind & LAST));
        give_residents(p, &s);
        finish_item(p, &s);
#if NA_BIAS_ENTRIES
        store_bias_sums(p, &s.seat);
#endif
    }
    if (NA_ADDS)
        end_parts();
}

NA_WORD int arrivals_of(int gate)
{
    if (gate >= ORDER_FULL)
        return gate >= ORDER_EMPTY ? ORDER_TAKERS : SCOUTS;
    if (gate >= PART_EMPTY || (!NA_ADDS && gate >= RESIDENT_EMPTY && gate < FIRST_FULL))
        return ARRIVALS / NA_GROUPS;
    return gate >= EMPTY || (gate >= RESIDENT_EMPTY && gate < FIRST_FULL) ? ARRIVALS : 1;
}

NA_KERNEL_ALONE(na_sm90_backward_kernel, na_sm90_backward, 128 * (NA_GROUPS + 1))
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
