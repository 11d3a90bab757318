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
 * tables, 0: no tables, as rows and tiles extend along axis 2 only; NA_RESIDENT: queries are kept
 * in registers. */
#include "device/sm90_forward.h"
#include "device/words/hopper.h"

#define NA_PRODUCT outputs
#define NA_PRODUCT_N NA_VALUE_DIM
#define NA_PRODUCT_B 1
#include "device/words/wgmma_tmpl.h"

enum {
    STEPS = (NA_DIM + 15) / 16, /* of products along the channels */
    OUTPUTS = NA_VALUE_DIM / 2, /* held by a thread */
    SUB_TOKENS = NA_SM90_ROWS / NA_PACK,
    TABLE_ROWS = NA_SUB_0 + NA_SUB_1 + NA_SUB_2,
    TABLE_WORDS = TABLE_ROWS * NA_POSITIONS,
    /* Only axes along which rows or keys differ have to be looked at. */
    MASKS_0 = NA_SUB_0 > 1 || NA_TILE_0 > 1,
    MASKS_1 = NA_SUB_1 > 1 || NA_TILE_1 > 1,
    HALVES_AXIS = NA_TILE_0 > 1   ? 0
                  : NA_TILE_1 > 1 ? 1
                                  : 2,
    /* The order of the walk over tiles, outermost axis first, is one that the L2 cache likes. */
    OUTER = NA_TILE_0 > 1 ? 2 : 0,
    MIDDLE = NA_TILE_0 > 1 ? 0 : 1,
    INNER = NA_TILE_0 > 1 ? 1 : 2,
    ARRIVALS = 4 * NA_GROUPS /* of warps */
};

/* What a note says about a tile; the first five are shifted left by a warpgroup's number. */
enum {
    SKIP = 1,
    MASK = 1 << 3,
    UPPER_ONLY = 1 << 16, /* the first half is not needed */
    LOWER_ONLY = 1 << 20,
    LAST = 1 << 8,  /* of its item */
    EXTRA = 1 << 9, /* additional tokens */
    END = 1 << 10   /* no tile: there is no more work */
};

/* A note: three words that say where the tile lies, its kind, and with the first tile of an item
 * the item. */
enum { NOTE_WORDS = NA_SM90_NOTE_BYTES / 4, NOTE_KIND = 3, NOTE_ITEM = 4 };

enum {
    QUERY_FULL = 0,
    QUERY_EMPTY = QUERY_FULL + NA_GROUPS,
    KEY_FULL = QUERY_EMPTY + NA_GROUPS,
    KEY_EMPTY = KEY_FULL + NA_KEY_STAGES,
    VALUE_FULL = KEY_EMPTY + NA_KEY_STAGES,
    VALUE_EMPTY = VALUE_FULL + NA_VALUE_STAGES,
    GATES = VALUE_EMPTY + NA_VALUE_STAGES
};

NA_WORD na_sm90_shared places(void)
{
    return na_sm90_shared_of(NA_GROUPS, NA_DIM, NA_VALUE_DIM, NA_KEYS, NA_KEY_STAGES,
                             NA_VALUE_STAGES, TABLE_WORDS);
}

NA_WORD uint32_t gate(uint32_t base, int index) { return base + places().gate + 8 * index; }

NA_WORD int *note_of(int stage)
{
    return (int *)((unsigned char *)na_shared() + places().note) + stage * NOTE_WORDS;
}

typedef struct ring {
    int stage;
    uint32_t phase;
} ring;

NA_WORD void next(ring *ring, int stages)
{
    if (++ring->stage == stages) {
        ring->stage = 0;
        ring->phase ^= 1;
    }
}

/* ----------------------------------------------------------------------------------------------
 * items */

typedef struct work_item {
    int first[3], end[3], residue[3]; /* queries of the tile; the group's end; the group */
    int head, batch, unused;
} work_item;

/* Queries of a block's tile along an axis. */
NA_WORD int sub(int axis) { return axis == 0 ? NA_SUB_0 : axis == 1 ? NA_SUB_1 : NA_SUB_2; }
NA_WORD int tile(int axis) { return axis == 0 ? NA_TILE_0 : axis == 1 ? NA_TILE_1 : NA_TILE_2; }
NA_WORD int offset(int axis, int group) { return axis == NA_STACK ? group * sub(axis) : 0; }

/* Item number w; 0: there is nothing in it. Axis 0 runs fastest, then `raster` tiles of axis 1,
 * axis 2, the rest of axis 1: neighbors share keys in the L2 cache. */
NA_WORD int find_item(const na_sm90_forward *p, int w, work_item *t)
{
    int count[3], x[3], there = 1;
    for (int a = 0; a < 3; a++)
        count[a] = p->axis[a].tiles * p->axis[a].rule.dilation;
    int blocks = (count[1] + p->raster - 1) / p->raster;
    x[0] = w % count[0];
    w /= count[0];
    x[1] = w % p->raster;
    w /= p->raster;
    x[2] = w % count[2];
    w /= count[2];
    x[1] += w % blocks * p->raster;
    w /= blocks;
    t->head = w % p->heads;
    t->batch = w / p->heads;
    t->unused = 0;
#pragma unroll
    for (int a = 0; a < 3; a++) {
        const na_sm90_axis *axis = &p->axis[a];
        int dilation = axis->rule.dilation, residue = x[a] / axis->tiles;
        int before = axis->query_origin - residue + dilation - 1;
        int step = sub(a) * (a == NA_STACK ? NA_GROUPS : 1);
        t->residue[a] = residue;
        t->first[a] = before / dilation + x[a] % axis->tiles * step;
        t->end[a] = (before + axis->query_extent) / dilation;
        there &= residue < dilation && t->first[a] < t->end[a];
    }
    return there;
}

NA_WORD na_window window_at(const na_sm90_axis *axis, int residue, int place)
{
    na_axis group = axis->rule;
    group.extent = (group.extent - residue + group.dilation - 1) / group.dilation;
    group.dilation = 1;
    return na_window_of(group, place);
}

/* The union of the windows of some queries, and what is in all of them. */
typedef struct span {
    int first, end, inner_first, inner_end;
} span;

NA_WORD span span_of(const na_sm90_axis *axis, const work_item *t, int a, int group)
{
    int from = t->first[a] + offset(a, group), to = na_min(from + sub(a), t->end[a]) - 1;
    span none = {1 << 29, -1, 1 << 29, -1};
    if (from > to)
        return none;
    na_window low = window_at(axis, t->residue[a], from);
    na_window high = window_at(axis, t->residue[a], to);
    span s = {low.first, high.first + high.count, high.first, low.first + low.count};
    return s;
}

/* The bits of a note for `width` keys from `key` on, along one axis. */
NA_WORD int classify(const span *s, int key, int width, int halves)
{
    int from = key, to = key + width, middle = key + width / 2, kind = 0;
    if (halves && (middle <= s->first || key >= s->end)) {
        kind |= UPPER_ONLY;
        from = middle;
    }
    if (halves && (to <= s->first || middle >= s->end)) {
        kind |= LOWER_ONLY;
        to = middle;
    }
    if (key + width <= s->first || key >= s->end)
        kind |= SKIP;
    return kind | (from >= s->inner_first && to <= s->inner_end ? 0 : MASK);
}

/* ----------------------------------------------------------------------------------------------
 * the thread that loads */

typedef struct producer {
    uint32_t base;
    ring key, value;
    uint32_t query_phase;
    int waiting; /* warpgroups, as bits, whose queries are still to be loaded */
    work_item item;
    int later[3], later_extra; /* the tile whose values follow after the next keys */
} producer;

NA_WORD void load_pieces(const na_sm90_forward *p, uint32_t to, uint32_t full, int bytes, int step,
                         const na_tensor_map *map, int head, const int *at, int batch, int flat)
{
    na_gate_arrive_expect(full, bytes);
#pragma unroll
    for (int piece = 0; piece * step < bytes; piece++)
        na_box_load(to + piece * step, map, full, piece * NA_SM90_COLUMNS, head, at[2], at[1],
                    flat ? batch : at[0]);
}

/* A warpgroup's queries are loaded as soon as it has given back the ones before; meanwhile keys and
 * values of the new item go on. */
NA_WORD void poll_queries(const na_sm90_forward *p, producer *s)
{
    const work_item *t = &s->item;
#pragma unroll 1
    for (int g = 0; g < NA_GROUPS; g++) {
        int at[3];
        if (!(s->waiting >> g & 1) || !na_gate_test(gate(s->base, QUERY_EMPTY + g), s->query_phase))
            continue;
        s->waiting &= ~(1 << g);
#pragma unroll
        for (int a = 0; a < 3; a++)
            at[a] = (t->first[a] + offset(a, g)) * p->axis[a].rule.dilation + t->residue[a] -
                    p->axis[a].query_origin;
        load_pieces(p, s->base + places().query + g * places().query_bytes,
                    gate(s->base, QUERY_FULL + g), places().query_bytes, NA_SM90_ROWS * 128,
                    &p->query, t->head * NA_PACK, at, t->batch, p->flat);
    }
}

NA_WORD void wait_for_room(const na_sm90_forward *p, producer *s, uint32_t empty, uint32_t phase)
{
    while (s->waiting) {
        poll_queries(p, s);
        if (na_gate_test(empty, phase))
            return;
    }
    na_gate_wait(empty, phase);
}

NA_WORD void put_values(const na_sm90_forward *p, producer *s)
{
    int stage = s->value.stage, extra = s->later_extra;
    wait_for_room(p, s, gate(s->base, VALUE_EMPTY + stage), s->value.phase ^ 1);
    load_pieces(p, s->base + places().value + stage * places().value_bytes,
                gate(s->base, VALUE_FULL + stage), places().value_bytes, NA_KEYS * 128,
                extra ? &p->extra_value : &p->value, s->item.head / p->kv_share, s->later,
                s->item.batch, p->flat || extra);
    next(&s->value, NA_VALUE_STAGES);
}

/* Loads a tile of keys, and then the values of the tile before: values are needed later. */
NA_WORD void put_tile(const na_sm90_forward *p, producer *s, const int *note, const int *at,
                      int extra, int is_first)
{
    int stage = s->key.stage, *to = note_of(stage);
    wait_for_room(p, s, gate(s->base, KEY_EMPTY + stage), s->key.phase ^ 1);
#pragma unroll
    for (int i = 0; i < NOTE_ITEM; i++)
        to[i] = note[i];
    if (is_first)
        *(work_item *)(to + NOTE_ITEM) = s->item;
    load_pieces(p, s->base + places().key + stage * places().key_bytes,
                gate(s->base, KEY_FULL + stage), places().key_bytes, NA_KEYS * 128,
                extra ? &p->extra_key : &p->key, s->item.head / p->kv_share, at, s->item.batch,
                p->flat || extra);
    if (is_first)
        poll_queries(p, s);
    else
        put_values(p, s);
#pragma unroll
    for (int a = 0; a < 3; a++)
        s->later[a] = at[a];
    s->later_extra = extra;
    next(&s->key, NA_KEY_STAGES);
}

NA_WORD int kind_along(const span spans[3][NA_GROUPS], int axis, int key)
{
    int kind = 0;
#pragma unroll
    for (int g = 0; g < NA_GROUPS; g++)
        kind |= classify(&spans[axis][g], key, tile(axis), NA_HALF_KEYS != 0 && axis == HALVES_AXIS)
                << g;
    return kind;
}

/* Additional tokens: masked only past their end, and left out where a warpgroup has no queries. */
NA_WORD void put_extra(const na_sm90_forward *p, producer *s, int idle)
{
    for (int token = 0; token < p->extra_tokens; token += NA_KEYS) {
        int left = p->extra_tokens - token, at[3] = {0, 0, token};
        int note[4] = {0, 0, na_min(left, NA_KEYS), EXTRA | idle};
        if (left <= NA_KEYS)
            note[NOTE_KIND] |= LAST;
        put_tile(p, s, note, at, 1, 0);
    }
}

NA_WORD void produce_item(const na_sm90_forward *p, producer *s)
{
    const work_item *t = &s->item;
    span spans[3][NA_GROUPS];
    int start[3], tiles[3], j[3], note[4], at[3], kind[3], is_first = 1;
    s->waiting = (1 << NA_GROUPS) - 1;
#pragma unroll
    for (int a = 0; a < 3; a++) {
        int end = 0;
#pragma unroll
        for (int g = 0; g < NA_GROUPS; g++) {
            spans[a][g] = span_of(&p->axis[a], t, a, g);
            end = na_max(end, spans[a][g].end);
        }
        start[a] = spans[a][0].first;
        tiles[a] = (end - start[a] + tile(a) - 1) / tile(a);
    }
#pragma unroll 1
    for (j[OUTER] = 0; j[OUTER] < tiles[OUTER]; j[OUTER]++) {
        kind[0] = kind_along(spans, OUTER, start[OUTER] + j[OUTER] * tile(OUTER));
#pragma unroll 1
        for (j[MIDDLE] = 0; j[MIDDLE] < tiles[MIDDLE]; j[MIDDLE]++) {
            kind[1] = kind[0] | kind_along(spans, MIDDLE, start[MIDDLE] + j[MIDDLE] * tile(MIDDLE));
#pragma unroll 1
            for (j[INNER] = 0; j[INNER] < tiles[INNER]; j[INNER]++) {
                kind[2] = kind[1] | kind_along(spans, INNER, start[INNER] + j[INNER] * tile(INNER));
                int last = j[OUTER] == tiles[OUTER] - 1 && j[MIDDLE] == tiles[MIDDLE] - 1 &&
                           j[INNER] == tiles[INNER] - 1 && !p->extra_tokens;
#pragma unroll
                for (int a = 0; a < 3; a++) {
                    int key = start[a] + j[a] * tile(a);
                    note[a] = NA_POSITIONS ? j[a] : key;
                    at[a] = key * p->axis[a].rule.dilation + t->residue[a] - p->axis[a].key_origin;
                }
                note[NOTE_KIND] = kind[2] | (last ? LAST : 0);
                put_tile(p, s, note, at, 0, is_first);
                is_first = 0;
            }
        }
    }
    int idle = 0;
#pragma unroll
    for (int g = 0; g < NA_GROUPS; g++)
        idle |= t->first[NA_STACK] + offset(NA_STACK, g) >= t->end[NA_STACK] ? SKIP << g : 0;
    put_extra(p, s, idle);
    put_values(p, s);
    while (s->waiting)
        poll_queries(p, s);
    s->query_phase ^= 1;
}

NA_WORD void produce(const na_sm90_forward *p, uint32_t base)
{
    producer s;
    int w = (int)na_block();
    s.base = base;
    s.key.stage = s.value.stage = 0;
    s.key.phase = s.value.phase = 0;
    s.query_phase = 1;
    while ((w = na_uniform_alone(w)) < p->items) {
        int following = p->counter ? na_count_up(p->counter) + (int)na_blocks() : p->items;
        if (find_item(p, w, &s.item))
            produce_item(p, &s);
        w = following;
    }
    na_gate_wait(gate(base, KEY_EMPTY + s.key.stage), s.key.phase ^ 1);
    note_of(s.key.stage)[NOTE_KIND] = END;
    na_gate_arrive(gate(base, KEY_FULL + s.key.stage));
}

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
#if NA_RESIDENT
    uint32_t queries[4 * STEPS];
#endif
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
#if NA_RESIDENT
    int row = (thread >> 5) * 16 + (s->lane & 15);
#pragma unroll
    for (int k = 0; k < STEPS; k++)
        na_matrix_load(s->queries + 4 * k, s->query + k / 4 * (NA_SM90_ROWS * 128) + row * 128 +
                                               ((2 * (k % 4) + (s->lane >> 4) ^ (row & 7)) << 4));
#endif
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
