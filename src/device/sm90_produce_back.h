/* SPDX-License-Identifier: MIT
 * The threads of sm90_backward.cu that load. */
typedef struct producer {
    uint32_t base;
    int lane;
    watch watch;
    ring stage;
    int visit;
    work_item item;
} producer;

NA_WORD void load_residents(const na_sm90_backward *p, uint32_t base, const work_item *t, int group,
                            const int *at, uint32_t phase)
{
    uint32_t full = gate(base, RESIDENT_FULL + group), to = base + resident_at(group, 0);
    na_gate_wait(gate(base, RESIDENT_EMPTY + group), phase ^ 1);
    na_gate_arrive_expect(full, places().resident_bytes[0] + places().resident_bytes[1]);
#pragma unroll
    for (int i = 0; i < 2; i++)
        load_pieces(to + i * places().resident_bytes[0], full, places().resident_bytes[i],
                    NA_SM90_ROWS * 128, &p->resident[i], t->head * NA_PACK, at, t->batch,
                    p->walk.flat);
}

/* Where the tile's d_query is added. */
NA_WORD void put_target(const na_sm90_backward *p, const producer *s, const int *at, int *to)
{
    int place[3];
#pragma unroll
    for (int a = 0; a < 3; a++)
        place[a] =
            na_sm90_sum_place(at[a], p->walk.axis[a].visitor_extent, p->walk.axis[a].rule.dilation);
    to[0] = place[2];
    to[1] = place[1];
    to[2] = p->walk.flat ? s->item.batch : place[0];
    to[3] = s->item.head * p->walk.share + s->visit;
}

NA_WORD void put_visitors(const na_sm90_backward *p, producer *s, const int *at, int extra)
{
    int stage = s->stage.stage, flat = p->walk.flat || extra, batch = s->item.batch;
    int head =
        NA_SIDE ? s->item.head * p->walk.share + s->visit : na_over(s->item.head, p->walk.share);
    uint32_t first_full = gate(s->base, FIRST_FULL + stage);
    uint32_t second_full = gate(s->base, SECOND_FULL + stage);
    uint32_t room = s->base + visitor_at(stage, 0);
    na_gate_arrive_expect(first_full, places().visitor_bytes[0] + places().pair_bytes);
    load_pieces(room, first_full, places().visitor_bytes[0], NA_VISITORS * 128,
                extra ? &p->extra[0] : &p->visitor[0], head, at, batch, flat);
    if (NA_SIDE)
        na_box_load(s->base + places().pair + stage * places().pair_bytes, &p->pairs, first_full, 0,
                    at[2], at[1], flat ? batch : at[0], head);
    na_gate_arrive_expect(second_full, places().visitor_bytes[1]);
    load_pieces(room + places().visitor_bytes[0], second_full, places().visitor_bytes[1],
                NA_VISITORS * 128, extra ? &p->extra[1] : &p->visitor[1], head, at, batch, flat);
}

/* Loads a tile of visitors, unless all warpgroups leave it out. */
NA_WORD void put_tile(const na_sm90_backward *p, producer *s, const int *note, const int *at,
                      int extra)
{
    const int nobody = SKIP * ((1 << NA_GROUPS) - 1);
    int stage = s->stage.stage, *to = note_of(stage);
    wait_for_room(gate(s->base, EMPTY + stage), s->stage.phase ^ 1);
    if (s->lane == 0) {
#pragma unroll
        for (int i = 0; i < NOTE_WORDS; i++)
            to[i] = note[i];
        if (NA_BIAS && NA_SIDE)
            to[NOTE_KIND] |= s->visit << VISIT;
        if (NA_ADDS)
            put_target(p, s, at, to + NOTE_TARGET);
        if ((note[NOTE_KIND] & nobody) == nobody) {
            na_gate_arrive(gate(s->base, FIRST_FULL + stage));
            na_gate_arrive(gate(s->base, SECOND_FULL + stage));
        } else {
            put_visitors(p, s, at, extra);
        }
    }
    next(&s->stage, NA_STAGES);
}

NA_WORD void start_producer(producer *s)
{
    s->visit = 0;
    s->stage.stage = 0;
    s->stage.phase = 0;
}

NA_WORD void end_item(const na_sm90_backward *p, producer *s) { (void)p, (void)s; }
