/* SPDX-License-Identifier: MIT
 * The forward op on Hopper. A block is one warpgroup that loads (a single thread of it does) and
 * NA_GROUPS that compute, each for 64 rows: a box of queries times NA_PACK heads that share their
 * keys. The boxes lie side by side along axis NA_STACK. Blocks take work items, one after the
 * other, from a counter; for each item tiles of keys and values stream through shared memory,
 * beginning where the union of the windows begins. The producer tells with each tile which
 * warpgroups can leave it out, which need one half of it only, and which must mask it.
 *
 * Inside a warpgroup nothing overlaps; the warpgroups overlap each other. Tokens are counted in
 * places of their dilation group, unless said otherwise.
 *
 * Parameters: NA_DTYPE (f16 or bf16); NA_DIM and NA_VALUE_DIM, channels, multiples of 8;
 * NA_SUB_0..2 (times NA_PACK: 64), NA_PACK, NA_GROUPS, NA_STACK; NA_TILE_0..2, the keys of a tile,
 * NA_KEYS their product, NA_HALF_KEYS half of it, or 0 where tiles are not halved; NA_KEY_STAGES
 * and NA_VALUE_STAGES, at least 2; NA_POSITIONS, places for tiles along one axis in the mask
 * tables, 0: no tables, as rows and tiles extend along axis 2 only; NA_EXTRA: there are additional
 * tokens. */
#include "device/sm90_forward.h"
#include "device/words/hopper.h"

#define NA_PRODUCT outputs
#define NA_PRODUCT_N NA_VALUE_DIM
#define NA_PRODUCT_B 1
#include "device/words/wgmma_tmpl.h"

#include "device/sm90_items.h"
#include "device/sm90_produce.h"

/* ----------------------------------------------------------------------------------------------
 * the warpgroups that compute */

/* A thread holds two rows of its warpgroup's 64, `row` and row + 8, and of every 8 columns two,
 * from `column` on: accumulator 4 n + 2 r + c is row + 8 r, column 8 n + column + c. */
typedef struct consumer {
    uint32_t base, query; /* shared memory; this warpgroup's queries in it */
    int group, lane, row, column;
    ring key, value;
    uint32_t query_phase;
    int holds_query; /* not given back yet */
    int owes_value;  /* the stage of values before this one is not given back yet */
    const work_item *item;
    uint32_t *table;
    float out[OUTPUTS];
    float highest[2], total[2]; /* reference maxima (no higher than the true ones), sums */
} consumer;

#define NONE (-1e30f) /* below every score, yet finite: less itself it gives 0 */

NA_WORD uint32_t range(int from, int to, int limit)
{
    from = na_min(na_max(from, 0), limit);
    to = na_min(na_max(to, 0), limit);
    return na_bits(from, to - from);
}

/* `times` copies of a word's lower `width` bits. */
NA_WORD uint32_t repeat(uint32_t word, int width, int times)
{
    uint32_t ones = 0;
#pragma unroll
    for (int i = 0; i < times; i++)
        ones |= 1u << i * width;
    return word * ones;
}

/* A word of the mask table: for a query's place along one axis and a tile's place along it, which
 * keys the query sees. Bits are rows of NA_TILE_2 keys; for axis 2 keys of a row. */
NA_WORD uint32_t table_word(const na_sm90_forward *p, const work_item *t, int a, int query,
                            int position)
{
    const na_sm90_axis *axis = &p->axis[a];
    if (query >= t->end[a])
        return 0;
    na_window window = window_at(axis, t->residue[a], query);
    int start = window_at(axis, t->residue[a], t->first[a]).first + position * tile(a);
    int from = window.first - start, to = from + window.count;
    if (a == 0)
        return range(from * NA_TILE_1, to * NA_TILE_1, NA_TILE_0 * NA_TILE_1);
    if (a == 1)
        return repeat(range(from, to, NA_TILE_1), NA_TILE_1, NA_TILE_0);
    return range(from, to, NA_TILE_2);
}

NA_WORD void fill_table(const na_sm90_forward *p, const consumer *s, const work_item *t, int thread)
{
    for (int e = thread; e < TABLE_WORDS; e += 128) {
        int place = e / (NA_POSITIONS + !NA_POSITIONS),
            position = e % (NA_POSITIONS + !NA_POSITIONS);
        int a = place < NA_SUB_0 ? 0 : place < NA_SUB_0 + NA_SUB_1 ? 1 : 2;
        place -= a == 0 ? 0 : a == 1 ? NA_SUB_0 : NA_SUB_0 + NA_SUB_1;
        int query = t->first[a] + (a == NA_STACK ? s->group * sub(a) : 0) + place;
        s->table[e] = table_word(p, t, a, query, position);
    }
}

/* Where row `row` of the warpgroup lies along an axis, from the warpgroup's first query. */
NA_WORD int place_of(int row, int axis)
{
    int token = row / NA_PACK;
    return axis == 2   ? token % NA_SUB_2
           : axis == 1 ? token / NA_SUB_2 % NA_SUB_1
                       : token / (NA_SUB_2 * NA_SUB_1);
}

NA_WORD void give_key(consumer *s)
{
    na_gate_arrive_if(gate(s->base, KEY_EMPTY + s->key.stage), !s->lane);
}

NA_WORD void give_query(consumer *s)
{
    na_gate_arrive_if(gate(s->base, QUERY_EMPTY + s->group), !s->lane && s->holds_query);
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
        na_gate_arrive_if(gate(s->base, VALUE_EMPTY + before), !s->lane);
    }
    s->owes_value = 1;
}

/* Called when this stage's values have come. */
NA_WORD void give_owed_value(consumer *s)
{
    int before = s->value.stage ? s->value.stage - 1 : NA_VALUE_STAGES - 1;
    na_gate_arrive_if(gate(s->base, VALUE_EMPTY + before), !s->lane && s->owes_value);
    s->owes_value = 0;
}

#define NA_COLUMNS NA_KEYS
#include "device/sm90_tile_tmpl.h"
#if NA_HALF_KEYS
#define NA_COLUMNS NA_HALF_KEYS
#include "device/sm90_tile_tmpl.h"
#endif

NA_WORD void begin_item(const na_sm90_forward *p, consumer *s, int thread)
{
    const int *note = note_of(s->key.stage);
    na_group_barrier(1 + s->group); /* nobody is at the item before any more */
    if (thread < NA_SM90_ITEM_WORDS)
        ((int *)s->item)[thread] = note[NOTE_ITEM + thread];
    fill_table(p, s, (const work_item *)(note + NOTE_ITEM), thread);
    na_group_barrier(1 + s->group);
#pragma unroll
    for (int i = 0; i < OUTPUTS; i++)
        s->out[i] = 0;
    s->highest[0] = s->highest[1] = NONE;
    s->total[0] = s->total[1] = 0;
    na_gate_wait(gate(s->base, QUERY_FULL + s->group), s->query_phase);
    s->query_phase ^= 1;
    s->holds_query = 1;
}

/* Four lanes hold 8 columns of each of four pieces of a row; after it each lane holds 8 columns. */
NA_WORD void exchange_in_quad(uint32_t *v, int lane)
{
    uint32_t a = na_exchange_bits(lane & 1 ? v[0] : v[1], 1);
    uint32_t b = na_exchange_bits(lane & 1 ? v[2] : v[3], 1);
    v[0] = lane & 1 ? a : v[0];
    v[1] = lane & 1 ? v[1] : a;
    v[2] = lane & 1 ? b : v[2];
    v[3] = lane & 1 ? v[3] : b;
    a = na_exchange_bits(lane & 2 ? v[0] : v[2], 2);
    b = na_exchange_bits(lane & 2 ? v[1] : v[3], 2);
    v[0] = lane & 2 ? a : v[0];
    v[2] = lane & 2 ? v[2] : a;
    v[1] = lane & 2 ? b : v[1];
    v[3] = lane & 2 ? v[3] : b;
}

/* Stores a row: 16 bytes a lane while there are 32 channels, then 4. */
NA_WORD void store_row(consumer *s, int r, float factor, uint16_t *to, int there)
{
#pragma unroll
    for (int i = 0; i < NA_VALUE_DIM / 32; i++) {
        uint32_t v[4];
#pragma unroll
        for (int j = 0; j < 4; j++)
            v[j] = na_pack(s->out[16 * i + 4 * j + 2 * r] * factor,
                           s->out[16 * i + 4 * j + 2 * r + 1] * factor);
        exchange_in_quad(v, s->lane);
        if (there)
            na_store_16_bytes(to + 32 * i + 8 * (s->lane & 3), v);
    }
#pragma unroll
    for (int n = NA_VALUE_DIM / 32 * 4; n < NA_VALUE_DIM / 8; n++)
        if (there)
            *(uint32_t *)(to + 8 * n + s->column) =
                na_pack(s->out[4 * n + 2 * r] * factor, s->out[4 * n + 2 * r + 1] * factor);
}

NA_WORD void finish_item(const na_sm90_forward *p, consumer *s)
{
    const work_item *t = s->item;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const natten_layout *out = &p->out_layout, *lse = &p->lse_layout;
        int row = s->row + 8 * r, head = t->head * NA_PACK + row % NA_PACK, there = 1;
        int64_t to = t->batch * out->batch + head * out->head;
        int64_t to_lse = t->batch * lse->batch + head * lse->head;
        float total = s->total[r];
        total += na_exchange(total, 1);
        total += na_exchange(total, 2);
#pragma unroll
        for (int a = 0; a < 3; a++) {
            int place = t->first[a] + (a == NA_STACK ? s->group * sub(a) : 0) + place_of(row, a);
            int token = place * p->axis[a].rule.dilation + t->residue[a] - p->axis[a].query_origin;
            there &= place < t->end[a];
            to += token * out->axis[a];
            to_lse += token * lse->axis[a];
        }
        store_row(s, r, 1 / total, (uint16_t *)p->out + to, there);
        if (there && p->lse && !(s->lane & 3))
            p->lse[to_lse] = (s->highest[r] * p->scale_log2 + na_log2(total)) * 0.69314718f;
    }
}

NA_WORD void consume(const na_sm90_forward *p, uint32_t base, int group)
{
    consumer s;
    int thread = na_thread() & 127, kind;
    s.base = base;
    s.group = group;
    s.lane = thread & 31;
    s.row = (thread >> 5) * 16 + (s.lane >> 2);
    s.column = (s.lane & 3) * 2;
    s.query = base + places().query + group * places().query_bytes;
    s.key.stage = s.value.stage = 0;
    s.key.phase = s.value.phase = s.query_phase = 0;
    s.owes_value = 0;
    s.item = (const work_item *)((unsigned char *)na_shared() + places().item +
                                 group * NA_SM90_ITEM_WORDS * 4);
    s.table = (uint32_t *)((unsigned char *)na_shared() + places().table) + group * TABLE_WORDS;
    for (;;) {
        na_gate_wait(gate(base, KEY_FULL + s.key.stage), s.key.phase);
        if (na_uniform(note_of(s.key.stage)[NOTE_KIND]) & END)
            break;
        begin_item(p, &s, thread);
        do {
            na_gate_wait(gate(base, KEY_FULL + s.key.stage), s.key.phase);
            const int *note = note_of(s.key.stage);
            kind = na_uniform(note[NOTE_KIND]);
            if (kind >> group & SKIP)
                leave_out(&s);
#if NA_HALF_KEYS
            else if (kind >> group & (UPPER_ONLY | LOWER_ONLY))
                NA_JOIN(tile_, NA_HALF_KEYS)
            (p, &s, note, kind, kind >> group & UPPER_ONLY ? NA_HALF_KEYS : 0);
#endif
            else NA_JOIN(tile_, NA_KEYS)(p, &s, note, kind, 0);
            next(&s.key, NA_KEY_STAGES);
            next(&s.value, NA_VALUE_STAGES);
        } while (!(kind & LAST));
        give_query(&s);
        finish_item(p, &s);
    }
}

NA_KERNEL_ALONE(na_sm90_forward_kernel, na_sm90_forward, 128 * (NA_GROUPS + 1))
{
    uint32_t base = na_shared_address(na_shared());
    int warpgroup = na_uniform(na_thread() >> 7);
    if (na_thread() == 0) {
        for (int i = 0; i < GATES; i++) {
            int is_full = i < QUERY_EMPTY || (i >= KEY_FULL && i < KEY_EMPTY) ||
                          (i >= VALUE_FULL && i < VALUE_EMPTY);
            na_gate_init(gate(base, i), is_full ? 1 : i < KEY_FULL ? 4 : ARRIVALS);
        }
        na_fence_async();
    }
    na_barrier();
    if (warpgroup == 0) {
        NA_REGISTERS_LESS(NA_GROUPS == 3 ? 32 : 24);
        if (na_thread() == 0)
            produce(&p, base);
    } else {
        NA_REGISTERS_MORE(NA_GROUPS == 3 ? 160 : 240);
        consume(&p, base, warpgroup - 1);
    }
}
