/* SPDX-License-Identifier: MIT
 * Loading: one thread goes past all tiles of visitors for each work item, another one loads the
 * residents as soon as those before are no longer needed.
 *
 * Parameters: those of sm90_items.h; NA_ARGUMENTS, the kernel's; NA_EXTRA, there are additional
 * tokens. Given before: producer, with `item`, and `visit`, which head of queries visits; and
 *   start_producer, end_item
 *   load_residents(p, base, item, group, at, phase)
 *   put_tile(p, s, note, at, extra): loads a tile, whose note is written with it */
NA_WORD int kind_along(const span spans[3][NA_GROUPS], int axis, int first)
{
    int kind = 0;
#pragma unroll 1
    for (int g = 0; g < NA_GROUPS; g++)
        kind |= classify(&spans[axis][g], first, tile(axis),
                         NA_HALF_VISITORS != 0 && axis == HALVES_AXIS)
                << g;
    return kind;
}

/* Additional tokens: masked only past their end, and left out where a warpgroup has no residents.
 */
NA_WORD void put_extra(const NA_ARGUMENTS *p, producer *s)
{
    int idle = 0;
#pragma unroll
    for (int g = 0; g < NA_GROUPS; g++)
        idle |=
            s->item.first[NA_STACK] + offset(NA_STACK, g) >= s->item.end[NA_STACK] ? SKIP << g : 0;
    for (int token = 0; token < p->walk.extra_tokens; token += NA_VISITORS) {
        int left = p->walk.extra_tokens - token, at[3] = {0, 0, token};
        int note[4] = {0, 0, na_min(left, NA_VISITORS), EXTRA | idle};
        if (left <= NA_VISITORS)
            note[NOTE_KIND] |= LAST;
        put_tile(p, s, note, at, 1);
    }
}

/* Where tiles begin along each axis, and how many there are. What is run once an item is fetched
 * from far away, some ten cycles an instruction, so it is kept short. */
NA_WORD void find_tiles(const order *o, const work_item *t, span spans[3][NA_GROUPS], int *start,
                        int *tiles)
{
#pragma unroll 1
    for (int a = 0; a < 3; a++) {
        int end = 0;
#pragma unroll 1
        for (int g = 0; g < NA_GROUPS; g++) {
            spans[a][g] = span_of(o, t, a, g);
            end = na_max(end, spans[a][g].end);
        }
        start[a] = o->start[a];
        tiles[a] = (end - start[a] + tile(a) - 1) / tile(a);
        if (NA_SIDE) /* keys may have no visitors; but there has to be a tile to end with */
            tiles[a] = na_max(tiles[a], 1);
    }
}

/* All tiles of visitors of one head. */
NA_WORD void put_tiles(const NA_ARGUMENTS *p, producer *s, const span spans[3][NA_GROUPS],
                       const int *start, const int *tiles, int is_last)
{
    int j[3], note[4], at[3], kind[3];
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
                           j[INNER] == tiles[INNER] - 1 && is_last;
#pragma unroll
                for (int a = 0; a < 3; a++) {
                    const na_sm90_axis *axis = &p->walk.axis[a];
                    int first = start[a] + j[a] * tile(a);
                    note[a] = NA_POSITIONS ? j[a] : first;
                    at[a] = first * axis->rule.dilation + s->item.residue[a] - axis->visitor_origin;
                }
                note[NOTE_KIND] = kind[2] | (last ? LAST : 0);
                put_tile(p, s, note, at, 0);
            }
        }
    }
}

/* Follows order number `number`. 0: there is no more work. */
NA_WORD int produce_item(const NA_ARGUMENTS *p, producer *s, int number)
{
    span spans[3][NA_GROUPS];
    int start[3], tiles[3];
    const order *o = order_of(number);
    wait_for_order(s->base, number);
    s->item = o->item;
    if (s->item.batch < 0)
        return 0;
    find_tiles(o, &s->item, spans, start, tiles);
    give_order(s->base, number, 1);
#if NA_SIDE
#pragma unroll 1
    for (s->visit = 0; s->visit < p->walk.share; s->visit++)
        put_tiles(p, s, spans, start, tiles, s->visit == p->walk.share - 1);
#else
    put_tiles(p, s, spans, start, tiles, !NA_EXTRA);
#endif
    if (NA_EXTRA)
        put_extra(p, s);
    end_item(p, s);
    return 1;
}

NA_WORD void produce(const NA_ARGUMENTS *p, uint32_t base)
{
    producer s;
    int number = 0;
    start_producer(&s, base);
    while (produce_item(p, &s, number))
        number++;
}

NA_WORD void load_all_residents(const NA_ARGUMENTS *p, uint32_t base)
{
    for (int number = 0;; number++) {
        wait_for_order(base, number);
        work_item item = order_of(number)->item;
        if (item.batch < 0)
            break;
        give_order(base, number, 1);
#pragma unroll 1
        for (int g = 0; g < NA_GROUPS; g++) {
            int at[3];
            find_residents(&p->walk, &item, g, at);
            load_residents(p, base, &item, g, at, number & 1);
        }
    }
}
