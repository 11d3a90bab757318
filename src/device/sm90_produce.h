/* SPDX-License-Identifier: MIT
 * The thread of sm90_forward.cu that loads. */
typedef struct producer {
    uint32_t base;
    ring key, value;
    uint32_t query_phase;
    int waiting; /* warpgroups, as bits, whose queries are still to be loaded */
    int visit;
    work_item item;
    int later[3], later_extra; /* the tile whose values follow after the next keys */
} producer;

NA_WORD void load_tile(uint32_t to, uint32_t full, int bytes, int step, const na_tensor_map *map,
                       int head, const int *at, int batch, int flat)
{
    na_gate_arrive_expect(full, bytes);
    load_pieces(to, full, bytes, step, map, head, at, batch, flat);
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
        find_residents(&p->walk, t, g, at);
        load_tile(s->base + places().query + g * places().query_bytes,
                  gate(s->base, QUERY_FULL + g), places().query_bytes, NA_SM90_ROWS * 128,
                  &p->query, t->head * NA_PACK, at, t->batch, p->walk.flat);
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
    load_tile(s->base + places().value + stage * places().value_bytes,
              gate(s->base, VALUE_FULL + stage), places().value_bytes, NA_VISITORS * 128,
              extra ? &p->extra_value : &p->value, s->item.head / p->walk.share, s->later,
              s->item.batch, p->walk.flat || extra);
    next(&s->value, NA_VALUE_STAGES);
}

/* Loads a tile of keys, and then the values of the tile before: values are needed later. */
NA_WORD void put_tile(const na_sm90_forward *p, producer *s, const int *note, const int *at,
                      int extra, int is_first)
{
    int stage = s->key.stage, *to = note_of(stage);
    wait_for_room(p, s, gate(s->base, KEY_EMPTY + stage), s->key.phase ^ 1);
#pragma unroll
    for (int i = 0; i < NOTE_WORDS; i++)
        to[i] = note[i];
    load_tile(s->base + places().key + stage * places().key_bytes, gate(s->base, KEY_FULL + stage),
              places().key_bytes, NA_VISITORS * 128, extra ? &p->extra_key : &p->key,
              s->item.head / p->walk.share, at, s->item.batch, p->walk.flat || extra);
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

NA_WORD void start_item(producer *s) { s->waiting = (1 << NA_GROUPS) - 1; }

NA_WORD void end_item(const na_sm90_forward *p, producer *s)
{
    put_values(p, s);
    while (s->waiting)
        poll_queries(p, s);
    s->query_phase ^= 1;
}

NA_WORD void start_producer(producer *s, uint32_t base)
{
    s->base = base;
    s->key.stage = s->value.stage = 0;
    s->key.phase = s->value.phase = 0;
    s->query_phase = 1;
}
