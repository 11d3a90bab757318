/* SPDX-License-Identifier: MIT
 * The thread of sm90_forward.cu that loads. */
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
                           j[INNER] == tiles[INNER] - 1 && !NA_EXTRA;
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
    if (NA_EXTRA)
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
