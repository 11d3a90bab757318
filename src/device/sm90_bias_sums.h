/* SPDX-License-Identifier: MIT
 * The gradient of a relative position bias, where residents are queries: an entry's is the sum of
 * the gradients of the logits of all pairs that are as far apart. A warpgroup puts a tile of them
 * into shared memory; then each entry that the tile has pairs of is one thread's, who adds them up,
 * in order, to what the item has of it already, in shared memory; or, of more entries than there is
 * room for, where it goes in the end, which is 0 at launch. What items have is added up later, in
 * order too (sm90_bias.cu).
 *
 * Parameters: those of sm90_backward.cu; NA_PACK is 1. */
enum { BIAS_ROOM = NA_BIAS_ENTRIES > 0 ? NA_BIAS_ENTRIES : 0 };

NA_WORD int count_of_entries(const na_sm90_backward *p)
{
    const int *extent = p->bias_sums.extent;
    return extent[0] * extent[1] * extent[2];
}

/* Where the sums of the warpgroup's item go. */
NA_WORD float *share_of_item(const na_sm90_backward *p, const seat *s)
{
    int64_t share = (int64_t)s->item->number * NA_GROUPS + s->group;
    return p->bias_sums.parts + share * (int64_t)count_of_entries(p);
}

NA_WORD float *bias_words(const seat *s)
{
    return (float *)(s->table + TABLE_WORDS + (NA_POSITIONS ? 3 : 0));
}

NA_WORD float *staged(const seat *s, int row, int column)
{
    return bias_words(s) + BIAS_ROOM + row * (NA_VISITORS + 1) + column;
}

/* Pairs of the tile whose visitor is `apart` places behind their resident, along each axis. */
NA_WORD float sum_of_pairs(const seat *s, const int *apart)
{
    int low[3], high[3], at[3];
    float sum = 0;
#pragma unroll
    for (int a = 0; a < 3; a++) {
        low[a] = na_max(0, -apart[a]);
        high[a] = na_min(sub(a), tile(a) - apart[a]);
    }
#pragma unroll 1
    for (at[0] = low[0]; at[0] < high[0]; at[0]++)
#pragma unroll 1
        for (at[1] = low[1]; at[1] < high[1]; at[1]++)
#pragma unroll 1
            for (at[2] = low[2]; at[2] < high[2]; at[2]++)
                sum += *staged(s, (at[0] * NA_SUB_1 + at[1]) * NA_SUB_2 + at[2],
                               ((at[0] + apart[0]) * NA_TILE_1 + at[1] + apart[1]) * NA_TILE_2 +
                                   at[2] + apart[2]);
    return sum;
}

NA_WORD void add_bias_sums(const na_sm90_backward *p, const seat *s, const int *at)
{
    enum {
        APART_0 = NA_SUB_0 + NA_TILE_0 - 1,
        APART_1 = NA_SUB_1 + NA_TILE_1 - 1,
        APART_2 = NA_SUB_2 + NA_TILE_2 - 1,
        ENTRIES = APART_0 * APART_1 * APART_2
    };
    const work_item *t = s->item;
    const int *extent = p->bias_sums.extent;
    float *entries = BIAS_ROOM ? bias_words(s) : share_of_item(p, s);
    int first[3];
#pragma unroll
    for (int a = 0; a < 3; a++)
        first[a] = first_visitor(s, a, at) - t->first[a] - offset(a, s->group) +
                   p->walk.axis[a].rule.window - 1;
    na_group_barrier(1 + s->group); /* the whole tile is there */
#pragma unroll 1
    for (int before = 0; before < ENTRIES; before += 128) { /* as in fill_table */
        int i = before + (na_thread() & 127);
        int apart[3] = {i / (APART_1 * APART_2), i / APART_2 % APART_1, i % APART_2};
        int place = 0, there = i < ENTRIES;
#pragma unroll
        for (int a = 0; a < 3; a++) {
            apart[a] -= sub(a) - 1;
            int entry = first[a] + apart[a];
            there &= entry >= 0 && entry < extent[a];
            place = place * extent[a] + entry;
        }
        if (there)
            entries[place] += sum_of_pairs(s, apart);
    }
    na_group_barrier(1 + s->group); /* nobody reads it any more */
}

NA_WORD void clear_bias_sums(const seat *s)
{
    for (int before = 0; before < BIAS_ROOM; before += 128)
        if (before + (na_thread() & 127) < BIAS_ROOM)
            bias_words(s)[before + (na_thread() & 127)] = 0;
}

NA_WORD void store_bias_sums(const na_sm90_backward *p, const seat *s)
{
    int count = BIAS_ROOM ? count_of_entries(p) : 0;
    float *to = share_of_item(p, s);
    for (int before = 0; before < count; before += 128) {
        int i = before + (na_thread() & 127);
        if (i < count)
            to[i] = bias_words(s)[i];
    }
}
