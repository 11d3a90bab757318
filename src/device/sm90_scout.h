/* SPDX-License-Identifier: MIT
 * Looking ahead. While the others are at a work item, one warp, the scout, finds the next one and
 * the visitors of its residents, and writes them into shared memory: an order, from which those who
 * load and those who compute copy what they need. All of that is divisions, and one thread would
 * need ten thousand cycles for it, for which everybody would wait.
 *
 * Parameters: those of sm90_items.h; NA_ARGUMENTS, the kernel's; NA_ORDERS, how many there is room
 * for, 1 or 2. Given before: gate, places, and the numbers of gates ORDER_FULL and ORDER_EMPTY, so
 * many of each. */
#if NA_POSITIONS
typedef int16_t edge;
#else
typedef int edge;
#endif

enum {
    /* Residents whose visitors are told of: all, as tables are made from that; else first, last. */
    KNOWN_2 = NA_POSITIONS ? NA_SUB_2 : 2,
    KNOWN = NA_SUB_0 + NA_SUB_1 + KNOWN_2
};

typedef struct order {
    work_item item;
    int start[3];                    /* where tiles of visitors begin */
    edge edges[NA_GROUPS][KNOWN][2]; /* from there: a resident's visitors, first and end */
} order;

NA_WORD order *order_of(int number)
{
    return (order *)((unsigned char *)na_shared() + places().order) + number % NA_ORDERS;
}

NA_WORD void wait_for_order(uint32_t base, int number)
{
    na_gate_wait(gate(base, ORDER_FULL + number % NA_ORDERS), number / NA_ORDERS & 1);
}

/* For each thread that has waited for it: none arrives for others, so it is plain to see that
 * nobody writes what somebody still reads. */
NA_WORD void give_order(uint32_t base, int number)
{
    na_gate_arrive(gate(base, ORDER_EMPTY + number % NA_ORDERS));
}

NA_WORD int axis_of_row(int row) { return row < NA_SUB_0 ? 0 : row < NA_SUB_0 + NA_SUB_1 ? 1 : 2; }
NA_WORD int row_of_axis(int axis)
{
    return axis == 0 ? 0 : axis == 1 ? NA_SUB_0 : NA_SUB_0 + NA_SUB_1;
}

/* Residents of a warpgroup along an axis; none or fewer: there are none. */
NA_WORD int count_residents(const work_item *t, int a, int group)
{
    return na_min(sub(a), t->end[a] - t->first[a] - offset(a, group));
}

NA_WORD void find_edges(const na_sm90_walk *p, order *o, int number)
{
    int group = number / KNOWN, row = number % KNOWN, a = axis_of_row(row);
    int place = row - row_of_axis(a), count = count_residents(&o->item, a, group);
    edge *to = o->edges[group][row];
    to[0] = to[1] = 0;
    if (!NA_POSITIONS && place)
        place = count - 1;
    if (place >= count)
        return;
    place += o->item.first[a] + offset(a, group);
    na_window window = visitors_at(&p->axis[a], o->item.residue[a], place);
    to[0] = (edge)(window.first - o->start[a]);
    to[1] = (edge)(window.first + window.count - o->start[a]);
}

NA_WORD void find_all_edges(const na_sm90_walk *p, order *o, int lane)
{
    const work_item *t = &o->item;
    if (lane < 3) /* which has written the same lane's part of the item */
        o->start[lane] = visitors_at(&p->axis[lane], t->residue[lane], t->first[lane]).first;
    na_warp_barrier();
#pragma unroll 1
    for (int before = 0; before < NA_GROUPS * KNOWN; before += 32)
        if (before + lane < NA_GROUPS * KNOWN)
            find_edges(p, o, before + lane);
}

NA_WORD int following_item(const na_sm90_walk *p, int lane)
{
    int w = p->items;
    if (p->counter && lane == 0)
        w = na_count_up(p->counter) + (int)na_blocks();
    return na_uniform(w);
}

NA_WORD void scout(const NA_ARGUMENTS *p, uint32_t base)
{
    const na_sm90_walk *walk = &p->walk;
    int lane = na_thread() & 31, w = -1, number = 0;
    for (;;) {
        order *o = order_of(number);
        na_gate_wait(gate(base, ORDER_EMPTY + number % NA_ORDERS), (number / NA_ORDERS & 1) ^ 1);
        /* Taken no earlier than that: blocks are to be at neighboring items at the same time. */
        w = w < 0 ? (int)na_block() : following_item(walk, lane);
        if (w >= walk->items)
            break;
        if (find_item(walk, w, lane, &o->item)) {
            find_all_edges(walk, o, lane);
            na_gate_arrive(gate(base, ORDER_FULL + number % NA_ORDERS));
            number++;
        }
    }
    if (lane == 0)
        order_of(number)->item.batch = -1;
    na_gate_arrive(gate(base, ORDER_FULL + number % NA_ORDERS));
}

/* For the whole loading warp. No lane goes on while another one still waits: once the first has
 * loaded, the gate may turn twice, and who has not seen it by then waits for ever. */
NA_WORD void wait_for_room(uint32_t empty, uint32_t phase)
{
    na_gate_wait(empty, phase);
    na_warp_barrier();
}

/* A lane's part of what is known of an item: the visitors of a warpgroup along an axis (3: none).
 */
typedef struct watch {
    int axis, group;
    span span;
} watch;

/* The visitors of a warpgroup's residents along an axis. */
NA_WORD span span_of(const order *o, const work_item *t, int a, int group)
{
    int count = count_residents(t, a, group), row = row_of_axis(a);
    span none = {1 << 29, -1, 1 << 29, -1};
    if (count <= 0)
        return none;
    const edge *low = o->edges[group][row];
    const edge *high = o->edges[group][row + (!NA_POSITIONS && a == 2 ? 1 : count - 1)];
    span s = {o->start[a] + low[0], o->start[a] + high[1], o->start[a] + high[0],
              o->start[a] + low[1]};
    if (NA_ADDS && count < sub(a))
        s.inner_first = 1 << 29;
    return s;
}
