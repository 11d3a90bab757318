/* SPDX-License-Identifier: MIT
 * Loading: one warp goes past all tiles of visitors for each work item, a thread of another one
 * loads the residents as soon as those before are no longer needed.
 *
 * While others compute, an instruction of a single warp takes some ten cycles, so the way to an
 * item's first tile has to be short. Each lane looks after the visitors of one warpgroup along one
 * axis; what lanes say about a tile is put together. Lane 0 loads.
 *
 * Parameters: those of sm90_items.h; NA_ARGUMENTS, the kernel's; NA_EXTRA, there are additional
 * tokens. Given before: producer, with `watch`, `item`, and `visit`, which head of queries visits;
 * and
 *   start_producer, end_item
 *   load_residents(p, base, item, group, at, phase)
 *   put_tile(p, s, note, at, extra): loads a tile, whose note is written with it */
NA_WORD int find_kind(const watch *w, const int *first)
{
    int at = w->axis == 0 ? first[0] : w->axis == 1 ? first[1] : first[2], kind = 0;
    if (w->axis < 3)
        kind =
            classify(&w->span, at, tile(w->axis), NA_HALF_VISITORS != 0 && w->axis == HALVES_AXIS)
            << w->group;
    return na_any_bits(kind);
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

/* How many tiles there are along each axis. */
NA_WORD void find_tiles(const order *o, watch *w, const work_item *t, int *tiles)
{
    int end = 0;
    if (w->axis < 3) {
        w->span = span_of(o, t, w->axis, w->group);
        end = w->span.end - o->start[w->axis];
    }
#pragma unroll
    for (int a = 0; a < 3; a++) {
        tiles[a] = (na_largest(w->axis == a ? end : 0) + tile(a) - 1) / tile(a);
        if (NA_SIDE) /* keys may have no visitors; but there has to be a tile to end with */
            tiles[a] = na_max(tiles[a], 1);
    }
}

/* All tiles of visitors of one head. */
NA_WORD void put_tiles(const NA_ARGUMENTS *p, producer *s, const int *start, const int *tiles,
                       int is_last)
{
    int j[3], note[4], at[3], first[3];
#pragma unroll 1
    for (j[OUTER] = 0; j[OUTER] < tiles[OUTER]; j[OUTER]++)
#pragma unroll 1
        for (j[MIDDLE] = 0; j[MIDDLE] < tiles[MIDDLE]; j[MIDDLE]++)
#pragma unroll 1
            for (j[INNER] = 0; j[INNER] < tiles[INNER]; j[INNER]++) {
                int last = j[OUTER] == tiles[OUTER] - 1 && j[MIDDLE] == tiles[MIDDLE] - 1 &&
                           j[INNER] == tiles[INNER] - 1 && is_last;
#pragma unroll
                for (int a = 0; a < 3; a++) {
                    const na_sm90_axis *axis = &p->walk.axis[a];
                    first[a] = start[a] + j[a] * tile(a);
                    note[a] = NA_POSITIONS ? j[a] : first[a];
                    at[a] =
                        first[a] * axis->rule.dilation + s->item.residue[a] - axis->visitor_origin;
                }
                note[NOTE_KIND] = find_kind(&s->watch, first) | (last ? LAST : 0);
                put_tile(p, s, note, at, 0);
            }
}

/* Follows order number `number`. 0: there is no more work. */
NA_WORD int produce_item(const NA_ARGUMENTS *p, producer *s, int number)
{
    int start[3], tiles[3];
    const order *o = order_of(number);
    wait_for_order(s->base, number);
    s->item = o->item;
    if (s->item.batch < 0)
        return 0;
    find_tiles(o, &s->watch, &s->item, tiles);
#pragma unroll
    for (int a = 0; a < 3; a++)
        start[a] = o->start[a];
    give_order(s->base, number);
#if NA_SIDE
#pragma unroll 1
    for (s->visit = 0; s->visit < p->walk.share; s->visit++)
        put_tiles(p, s, start, tiles, s->visit == p->walk.share - 1);
#else
    put_tiles(p, s, start, tiles, !NA_EXTRA);
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
    s.base = base;
    s.lane = na_thread() & 31;
    s.watch.axis = s.lane / NA_GROUPS;
    s.watch.group = s.lane % NA_GROUPS;
    start_producer(&s);
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
        give_order(base, number);
#pragma unroll 1
        for (int g = 0; g < NA_GROUPS; g++) {
            int at[3];
            find_residents(&p->walk, &item, g, at);
            load_residents(p, base, &item, g, at, number & 1);
        }
    }
}
