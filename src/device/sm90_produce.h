/* SPDX-License-Identifier: MIT
 * The threads of sm90_forward.cu that load. */
typedef struct producer {
    uint32_t base;
    int lane;
    watch watch;
    ring key, value;
    int visit;
    work_item item;
    int later[3], later_extra; /* the tile whose values follow after the next keys */
    int is_later;              /* whether there is one */
} producer;

NA_WORD void load_tile(uint32_t to, uint32_t full, int bytes, int step, const na_tensor_map *map,
                       int head, const int *at, int batch, int flat)
{
    na_gate_arrive_expect(full, bytes);
    load_pieces(to, full, bytes, step, map, head, at, batch, flat);
}

NA_WORD void load_residents(const na_sm90_forward *p, uint32_t base, const work_item *t, int group,
                            const int *at, uint32_t phase)
{
    na_gate_wait(gate(base, QUERY_EMPTY + group), phase ^ 1);
    load_tile(base + places().query + group * places().query_bytes, gate(base, QUERY_FULL + group),
              places().query_bytes, NA_SM90_ROWS * 128, &p->query, t->head * NA_PACK, at, t->batch,
              p->walk.flat);
}

NA_WORD void put_values(const na_sm90_forward *p, producer *s)
{
    int stage = s->value.stage, extra = s->later_extra;
    wait_for_room(gate(s->base, VALUE_EMPTY + stage), s->value.phase ^ 1);
    if (s->lane == 0)
        load_tile(s->base + places().value + stage * places().value_bytes,
                  gate(s->base, VALUE_FULL + stage), places().value_bytes, NA_VISITORS * 128,
                  extra ? &p->extra_value : &p->value, na_over(s->item.head, p->walk.share),
                  s->later, s->item.batch, p->walk.flat || extra);
    next(&s->value, NA_VALUE_STAGES);
}

/* Loads a tile of keys, and then the values of the tile before: values are needed later. */
NA_WORD void put_tile(const na_sm90_forward *p, producer *s, const int *note, const int *at,
                      int extra)
{
    int stage = s->key.stage, *to = note_of(stage);
    wait_for_room(gate(s->base, KEY_EMPTY + stage), s->key.phase ^ 1);
    if (s->lane == 0) {
#pragma unroll
        for (int i = 0; i < NOTE_WORDS; i++)
            to[i] = note[i];
        load_tile(s->base + places().key + stage * places().key_bytes,
                  gate(s->base, KEY_FULL + stage), places().key_bytes, NA_VISITORS * 128,
                  extra ? &p->extra_key : &p->key, na_over(s->item.head, p->walk.share), at,
                  s->item.batch, p->walk.flat || extra);
    }
    if (s->is_later)
        put_values(p, s);
    s->is_later = 1;
#pragma unroll
    for (int a = 0; a < 3; a++)
        s->later[a] = at[a];
    s->later_extra = extra;
    next(&s->key, NA_KEY_STAGES);
}

NA_WORD void end_item(const na_sm90_forward *p, producer *s)
{
    put_values(p, s);
    s->is_later = 0;
}

NA_WORD void start_producer(producer *s)
{
    s->is_later = 0;
    s->key.stage = s->value.stage = 0;
    s->key.phase = s->value.phase = 0;
}
