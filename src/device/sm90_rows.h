/* SPDX-License-Identifier: MIT
 * What the computing warpgroups of the Hopper kernels share (parameters: those of sm90_items.h):
 * where a thread sits, which visitors its rows have, how rows are stored. */

/* A thread holds two rows of its warpgroup's 64, `row` and row + 8, and of every 8 columns two,
 * from `column` on: accumulator 4 n + 2 r + c is row + 8 r, column 8 n + column + c. */
typedef struct seat {
    int group, lane, row, column;
    const work_item *item;
    cell *table;
} seat;

NA_WORD void take_seat(seat *s, int group, int item_place, int table_place)
{
    int thread = na_thread() & 127;
    unsigned char *shared = (unsigned char *)na_shared();
    s->group = group;
    s->lane = thread & 31;
    s->row = (thread >> 5) * 16 + (s->lane >> 2);
    s->column = (s->lane & 3) * 2;
    s->item = (const work_item *)(shared + item_place) + group;
    s->table = (cell *)(shared + table_place) + group * (TABLE_WORDS + BIAS_WORDS);
}

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

/* A word of the mask table: for a resident's visitors along one axis and a tile's place along it,
 * which of these are in the tile. Bits are rows of NA_TILE_2 tokens; for axis 2 tokens of a row. */
NA_WORD uint32_t table_word(const edge *edges, int a, int position)
{
    int from = edges[0] - position * tile(a), to = edges[1] - position * tile(a);
    if (a == 0)
        return range(from * NA_TILE_1, to * NA_TILE_1, NA_TILE_0 * NA_TILE_1);
    if (a == 1)
        return repeat(range(from, to, NA_TILE_1), NA_TILE_1, NA_TILE_0);
    return range(from, to, NA_TILE_2);
}

/* All lanes go round equally often: the compiler does not bring those back together that leave a
 * loop before others, where a barrier follows; and a product of part of a warp is nonsense. */
NA_WORD void fill_table(const seat *s, const order *o, int thread)
{
    uint32_t begin = (uint32_t)thread;
    if (NA_ADDS && TABLE_WORDS) /* no register is free for what follows from the number */
        na_keep(&begin);
#pragma unroll 1
    for (int before = 0; before < TABLE_WORDS; before += 128) {
        int e = before + (int)begin;
        if (e >= TABLE_WORDS)
            continue;
        int row = e / (NA_POSITIONS + !NA_POSITIONS), position = e % (NA_POSITIONS + !NA_POSITIONS);
        s->table[e] = (cell)table_word(o->edges[s->group][row], axis_of_row(row), position);
    }
    if (NA_BIAS && NA_POSITIONS && thread < 3)
        s->table[TABLE_WORDS + thread] = (cell)o->start[thread];
}

/* Where row `row` of the warpgroup lies along an axis, from the warpgroup's first resident. */
NA_WORD int place_of(int row, int axis)
{
    int token = row / NA_PACK;
    return axis == 2   ? token % NA_SUB_2
           : axis == 1 ? token / NA_SUB_2 % NA_SUB_1
                       : token / (NA_SUB_2 * NA_SUB_1);
}

/* Takes order number `number`: a warpgroup keeps a copy of the item, and makes its table. 0: there
 * is no more work. */
NA_WORD int take_item(seat *s, uint32_t base, int number)
{
    const int words = (int)(sizeof(work_item) / sizeof(int)), thread = na_thread() & 127;
    /* Orders lie before the items: where d_query is added up no register is free for the address of
     * shared memory. */
    const order *o = (const order *)(s->item - s->group) - NA_ORDERS + number % NA_ORDERS;
    wait_for_order(base, number);
    if (na_uniform(o->item.batch) < 0)
        return 0;
    na_group_barrier(1 + s->group); /* nobody is at the item before any more */
    if (thread < words)
        ((int *)s->item)[thread] = ((const int *)&o->item)[thread];
    fill_table(s, o, thread);
    na_group_barrier(1 + s->group);
    give_order(base, number);
    return 1;
}

/* Whether the row is one of a resident that is there, and that's token, as the map counts. */
NA_WORD int find_row(const na_sm90_walk *p, const seat *s, int row, int *token)
{
    const work_item *t = s->item;
    int there = 1;
#pragma unroll
    for (int a = 0; a < 3; a++) {
        int place = t->first[a] + offset(a, s->group) + place_of(row, a);
        token[a] = place * p->axis[a].rule.dilation + t->residue[a] - p->axis[a].origin;
        there &= place < t->end[a];
    }
    return there;
}

NA_WORD int64_t offset_of(const natten_layout *layout, int batch, const int *token, int head)
{
    return batch * layout->batch + token[0] * layout->axis[0] + token[1] * layout->axis[1] +
           token[2] * layout->axis[2] + head * layout->head;
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

/* Stores row r of an accumulator: 16 bytes a lane while there are 32 channels, then 4. */
NA_WORD void store_row(const seat *s, const float *sums, int channels, int r, float factor,
                       uint16_t *to, int there)
{
#pragma unroll
    for (int i = 0; i < channels / 32; i++) {
        uint32_t v[4];
#pragma unroll
        for (int j = 0; j < 4; j++)
            v[j] = na_pack(sums[16 * i + 4 * j + 2 * r] * factor,
                           sums[16 * i + 4 * j + 2 * r + 1] * factor);
        exchange_in_quad(v, s->lane);
        if (there)
            na_store_16_bytes(to + 32 * i + 8 * (s->lane & 3), v);
    }
#pragma unroll
    for (int n = channels / 32 * 4; n < channels / 8; n++)
        if (there)
            *(uint32_t *)(to + 8 * n + s->column) =
                na_pack(sums[4 * n + 2 * r] * factor, sums[4 * n + 2 * r + 1] * factor);
}
