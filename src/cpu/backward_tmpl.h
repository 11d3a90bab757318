/* SPDX-License-Identifier: MIT
 * Fused backward: the gradients of every input, weights computed again from the lse. Gradients of
 * keys and values are summed beside the packed keys while these are in use, and then added to where
 * they belong; who adds to what is settled by bands.h. Parameters: the texts kernels.c includes
 * before this one. */

static size_t backward_bytes(int64_t count, size_t size)
{
    return count > 0 ? ((size_t)count * size + 127) / 64 * 64 : 0;
}

/* Lays a worker's memory out from `base`; returns the bytes it takes. */
static size_t backward_layout(const backward_state *s, backward_worker *w, char *base)
{
    const na_geometry *g = s->g;
    const int64_t tokens = g->slots * g->apart, lanes = (int64_t)s->rows * VL;
    const int deeper = s->terms > s->channels ? s->terms : s->channels;
    const struct {
        void *part;
        int64_t count;
        size_t size;
    } parts[] = {
        {&w->key, g->slots * s->line * s->terms + 2 * VL, sizeof(real)},
        {&w->value, s->d_slope * (g->slots * s->line * s->channels + 2 * VL), sizeof(real)},
        {&w->natural, s->d_query * tokens * s->key_step, sizeof(real)},
        {&w->sum[0], s->d_key * tokens * s->key_step, sizeof(real)},
        {&w->sum[1], s->d_value * tokens * s->value_step, sizeof(real)},
        {&w->query, lanes * s->terms, sizeof(real)},
        {&w->grad, s->d_slope * lanes * s->channels, sizeof(real)},
        {&w->query_natural, s->d_key * lanes * s->key_step, sizeof(real)},
        {&w->grad_natural, lanes * s->value_step, sizeof(real)},
        {&w->weight, s->block_room, sizeof(real)},
        {&w->slope, s->d_slope * s->block_room, sizeof(real)},
        {&w->partial, s->d_query * lanes * s->key_step, sizeof(real)},
        {&w->room, ((int64_t)deeper * KEYS_MAX + 1) * VL, sizeof(real)},
        {&w->bias_sum, s->d_bias * g->group * s->kinds.count * s->kind_reals, sizeof(real)},
        {&w->tags, g->additional_slot + 1, sizeof *w->tags},
        {&w->held, g->additional_slot, sizeof *w->held},
        {&w->seen, s->bands->cells, 1},
        {&w->key_rows, 2 * g->key_rows, sizeof *w->key_rows},
        {&w->spans, g->spans, sizeof *w->spans},
    };
    size_t at = 0;
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) {
        const uintptr_t place = (uintptr_t)base + at;
        memcpy(parts[i].part, &place, sizeof place);
        at += backward_bytes(parts[i].count, parts[i].size);
    }
    return at;
}

/* Adds packed tokens to others, or (add 0) sets these. */
static void add_tokens(const real *from, int64_t from_step, int64_t tokens, int64_t channels,
                       real *to, int64_t to_step, int add)
{
    const int64_t whole = channels / VL * VL;
    const int rest = (int)(channels - whole);
    for (int64_t t = 0; t < tokens; t++, from += from_step, to += to_step) {
        for (int64_t c = 0; c < whole; c += VL) {
            const vec x = vec_load(from + c);
            vec_storeu(to + c, add ? vec_add(vec_loadu(to + c), x) : x);
        }
        if (rest) {
            const vec x = vec_load(from + whole);
            vec_store_part(to + whole, rest, add ? vec_add(vec_load_part(to + whole, rest), x) : x);
        }
    }
}

/* Takes packed tokens away: adds them to others, or sets these (past the caches, where vectors are
 * whole and nobody reads them again soon), and leaves zeros. */
static void take_tokens(real *from, int64_t from_step, int64_t tokens, int64_t channels, real *to,
                        int64_t to_step, int add, int again)
{
    const int64_t line = VL * (int64_t)sizeof(real);
    const int stream = !add && !again && channels % VL == 0 &&
                       (uintptr_t)to % (uintptr_t)line == 0 && to_step % VL == 0;
    if (!stream)
        add_tokens(from, from_step, tokens, channels, to, to_step, add);
    for (int64_t t = 0; t < tokens; t++, from += from_step, to += to_step)
        for (int64_t c = 0; c < from_step; c += VL) {
            if (stream)
                vec_stream(to + c, vec_load(from + c));
            vec_store(from + c, vec_zero());
        }
}

static void zero_tokens(int64_t tokens, int64_t channels, real *to, int64_t step)
{
    for (int64_t t = 0; t < tokens; t++, to += step)
        memset(to, 0, (size_t)channels * sizeof *to);
}

/* Where the result of key x of a row of heads is summed up; *step: from key to key of a head. */
static real *backward_result(const backward_run *run, const backward_sink *sink, int64_t unit,
                             int64_t z, int64_t y, int64_t x, int64_t *step)
{
    const na_geometry *g = run->state->g;
    const natten_axis *axis = g->axis;
    if (sink->copy) {
        *step = sink->step;
        const int64_t row = (unit * axis[0].key_extent + z) * axis[1].key_extent + y;
        return sink->copy + (row * na_row_keys(g) + x) * sink->step;
    }
    *step = sink->out.axis[2] / (int64_t)sizeof(real);
    const int64_t beside = g->beside > 1 ? x / axis[2].key_extent : 0;
    return (real *)tensor_at(&sink->out, unit / g->head_sets,
                             unit % g->head_sets * g->beside + beside, z, y,
                             x - beside * axis[2].key_extent);
}

/* Where a band sums up the cell that begins at key x; NULL: it has no part in it. */
static real *backward_cell(const backward_worker *w, const backward_sink *sink, int64_t z,
                           int64_t y, int64_t x, int64_t *step)
{
    const backward_state *s = w->run->state;
    const na_bands *bands = s->bands;
    const int64_t cell = (z * s->g->axis[1].key_extent + y) * bands->row_cells + x / bands->cell;
    const int32_t place = na_band_place(bands, w->band, cell, w->first_band);
    if (place == -1)
        return backward_result(w->run, sink, w->unit, z, y, x, step);
    *step = sink->step;
    return place < 0 ? NULL : sink->own + (w->unit * bands->own + place) * bands->cell * sink->step;
}

/* Whether a slot's sums are added to what stands in a cell. */
static int backward_adds(const backward_worker *w, int64_t cell)
{
    const na_bands *bands = w->run->state->bands;
    /* What an earlier band has summed up stays. */
    const int later = bands->place && bands->place[w->band * bands->cells + cell] >= 0 &&
                      na_band_place(bands, w->band, cell, w->first_band) == -1;
    return w->seen[cell] || later;
}

/* The number of the cell of a slot's key row that holds key x. */
static int64_t backward_cell_number(const backward_state *s, const backward_held *held, int x)
{
    const int64_t row = held->z * s->g->axis[1].key_extent + held->y;
    return row * s->bands->row_cells + x / s->bands->cell;
}

/* Takes the sums of a slot's keys [from, to) to their cell. */
static void backward_flush_cell(backward_worker *w, int64_t slot, int from, int to)
{
    const backward_state *s = w->run->state;
    const na_bands *bands = s->bands;
    const backward_held *held = &w->held[slot];
    const int64_t begin = from / bands->cell * bands->cell, extent = na_row_keys(s->g);
    const int64_t end = begin + bands->cell < extent ? begin + bands->cell : extent;
    const int64_t number = backward_cell_number(s, held, from);
    const int add = backward_adds(w, number);
    for (int i = 0; i < 2; i++) {
        const backward_sink *sink = &w->run->sink[i];
        if (!sink->wanted)
            continue;
        int64_t step;
        real *cell = backward_cell(w, sink, held->z, held->y, begin, &step);
        if (!add) {
            zero_tokens(from - begin, sink->channels, cell, step);
            zero_tokens(end - to, sink->channels, cell + (to - begin) * step, step);
        }
        real *sum = w->sum[i] + (slot * s->g->apart + from - held->part->first) * sink->step;
        take_tokens(sum, sink->step, to - from, sink->channels, cell + (from - begin) * step, step,
                    add, !w->fetches && na_band_shares(bands, w->band, number));
    }
    w->seen[number] = 1;
}

/* Takes the sums of a slot away. */
static void backward_flush(backward_worker *w, int64_t slot)
{
    backward_held *held = &w->held[slot];
    if (!held->dirty)
        return;
    held->dirty = 0;
    const int cell = w->run->state->bands->cell, end = held->part->first + held->part->width;
    for (int from = held->part->first, to; from < end; from = to) {
        to = (from / cell + 1) * cell;
        to = to < end ? to : end;
        backward_flush_cell(w, slot, from, to);
    }
}

/* Where the biases of a slot's keys are. */
static real *backward_key_bias(const backward_worker *w, int64_t slot)
{
    const backward_state *s = w->run->state;
    return w->key + (slot * s->terms + s->depth) * s->line;
}

/* A na_pack. */
static void backward_pack(void *context, int64_t slot, int32_t z, int32_t y, const na_part *part)
{
    backward_worker *w = context;
    const backward_run *run = w->run;
    const int64_t b = w->work.batch, h = w->work.kv_head;
    backward_flush(w, slot);
    const backward_state *s = run->state;
    const na_geometry *g = s->g;
    pack_keys_transposed(g, &run->key, run->key.dtype, b, h, z, y, part, s->depth,
                         w->key + slot * s->line * s->terms, s->line);
    if (s->d_slope)
        pack_keys_transposed(g, &run->value, run->value.dtype, b, h, z, y, part, s->channels,
                             w->value + slot * s->line * s->channels, s->line);
    if (s->d_query)
        pack_keys_naturally(g, &run->key, b, h, z, y, part, s->depth,
                            w->natural + slot * g->apart * s->key_step, s->key_step);
    pack_key_biases(g, &run->key_bias, b, h, z, y, part, backward_key_bias(w, slot));
}

/* Zeroes the sums of slots. */
static void backward_zero_slots(const backward_worker *w, int64_t from, int64_t to)
{
    const backward_state *s = w->run->state;
    for (int i = 0; i < 2; i++) {
        const int64_t slot = s->g->apart * w->run->sink[i].step;
        if (i ? s->d_value : s->d_key)
            memset(w->sum[i] + from * slot, 0, (size_t)((to - from) * slot) * sizeof(real));
    }
}

/* Notes what the slots of a task's keys hold; their sums are zero unless they are dirty. */
static void backward_open_slots(backward_worker *w)
{
    const na_geometry *g = w->run->state->g;
    int first, last;
    na_work_parts(g, &w->work, &first, &last);
    for (int i = 0; i < w->key_row_count; i++)
        for (int p = first; p <= last; p = na_work_part_after(g, &w->work, p)) {
            const int64_t slot = w->key_rows[i].slot + p % g->ring_part;
            if (w->held[slot].dirty)
                continue;
            w->held[slot] = (backward_held){1, w->key_rows[i].z, w->key_rows[i].y, &g->part[p]};
        }
}

/* Additional tokens are packed when the batch or the head changes; their sums begin with the band.
 */
static void backward_open_more(backward_worker *w)
{
    const backward_run *run = w->run;
    const backward_state *s = run->state;
    const na_geometry *g = s->g;
    const tensor *k = &run->more_key, *v = &run->more_value;
    const int64_t b = w->unit / g->head_sets, h = w->unit % g->head_sets;
    const int fresh = w->tags[g->additional_slot] != w->unit;
    w->tags[g->additional_slot] = w->unit;
    backward_zero_slots(w, g->additional_slot, g->slots);
    for (int64_t n = 0, slot = g->additional_slot; fresh && n < g->additional;
         n += g->width, slot++) {
        const int64_t left = g->additional - n;
        const int some = left < g->width ? (int)left : g->width;
        const char *keys = tensor_at(k, b, h, n, 0, 0), *values = tensor_at(v, b, h, n, 0, 0);
        pack_transposed(k->dtype, keys, k->axis[0], 0, some, s->depth, 1,
                        w->key + slot * s->line * s->terms, s->line);
        if (s->d_slope)
            pack_transposed(k->dtype, values, v->axis[0], 0, some, s->channels, 1,
                            w->value + slot * s->line * s->channels, s->line);
        if (s->d_query)
            pack_natural(k->dtype, keys, k->axis[0], 0, some, s->depth, 1,
                         w->natural + slot * g->apart * s->key_step, s->key_step);
        if (run->key_bias.data)
            key_bias_pack(NULL, NULL, some, backward_key_bias(w, slot));
    }
}

/* Takes the sums of additional tokens to where the band's are. */
static void backward_close_more(const backward_worker *w, int which, int64_t item)
{
    const na_geometry *g = w->run->state->g;
    const backward_sink *sink = &w->run->sink[which];
    const real *sum = w->sum[which] + g->additional_slot * g->apart * sink->step;
    real *to = sink->more + item * g->additional * sink->step;
    for (int64_t n = 0; n < g->additional; n += g->width, sum += g->apart * sink->step) {
        const int64_t left = g->additional - n, tokens = left < g->width ? left : g->width;
        add_tokens(sum, sink->step, tokens, sink->channels, to + n * sink->step, sink->step, 0);
    }
}

/* The band is done: what stands beside the packed keys is taken away. */
static void backward_close(backward_worker *w)
{
    const backward_run *run = w->run;
    const backward_state *s = run->state;
    const na_geometry *g = s->g;
    const na_bands *bands = s->bands;
    const int64_t item = w->unit * bands->count + w->band, extent = na_row_keys(g);
    for (int64_t slot = 0; slot < g->additional_slot; slot++)
        backward_flush(w, slot);
    for (int i = 0; i < 2; i++) {
        const backward_sink *sink = &run->sink[i];
        for (int64_t c = 0; c < bands->cells && sink->wanted; c++) {
            const int64_t row = c / bands->row_cells, x = c % bands->row_cells * bands->cell;
            const int64_t left = extent - x < bands->cell ? extent - x : bands->cell;
            int64_t step;
            /* Cells that nobody touches are the first band's. */
            const int nobody = bands->place ? bands->owner[c] < 0 && !w->band : !w->seen[c];
            real *cell = !nobody ? NULL
                                 : backward_cell(w, sink, row / g->axis[1].key_extent,
                                                 row % g->axis[1].key_extent, x, &step);
            if (cell)
                zero_tokens(left, sink->channels, cell, step);
        }
        if (sink->more_out.data)
            backward_close_more(w, i, item);
    }
    for (int64_t i = 0; s->d_bias && i < g->group * s->kinds.count; i++) {
        const int64_t head = i / s->kinds.count, kind = i % s->kinds.count;
        double *sums = run->d_bias_sums + (item * g->group + head) * s->entries;
        if (kind == 0)
            memset(sums, 0, (size_t)s->entries * sizeof *sums);
        bias_fold(&g->lane[s->kinds.first[kind]], w->bias_sum + i * s->kind_reals, s->entries,
                  sums);
    }
}

/* Has what a slot's sums of a head's first keys will be added to fetched. */
static void backward_look_cell(backward_worker *w, const backward_held *held, na_keys keys)
{
    const int x = held->part->first + keys.place, cell = w->run->state->bands->cell;
    const int begin = x / cell * cell, count = na_min(keys.count, begin + cell - x);
    if (!backward_adds(w, backward_cell_number(w->run->state, held, x)))
        return;
    for (int i = 0; i < 2; i++) {
        const backward_sink *sink = &w->run->sink[i];
        if (!sink->wanted)
            continue;
        int64_t step;
        const real *to =
            backward_cell(w, sink, held->z, held->y, begin, &step) + (x - begin) * step;
        ahead_add(&w->keys_ahead, (const char *)to, step * (int64_t)sizeof(real),
                  sink->channels * (int64_t)sizeof(real), count);
    }
}

/* Has what a slot's sums will be added to fetched. */
static void backward_look_back(backward_worker *w, int64_t slot)
{
    const backward_held *held = &w->held[slot];
    if (!held->dirty)
        return;
    /* Of several cells of a head, the first one only. */
    const na_geometry *g = w->run->state->g;
    for (int h = 0; h < g->beside; h++)
        backward_look_cell(w, held, na_keys_of(g, held->part, h));
}

/* A na_pack that packs nothing: has what the next task will pack fetched during this one. */
static void backward_look(void *context, int64_t slot, int32_t z, int32_t y, const na_part *part)
{
    backward_worker *w = context;
    const backward_run *run = w->run;
    const int64_t b = w->next.batch, h = w->next.kv_head, size = stored_size(run->key.dtype);
    backward_look_back(w, slot);
    keys_ahead(&w->keys_ahead, run->state->g, &run->key, b, h, z, y, part,
               run->state->depth * size);
    keys_ahead(&w->keys_ahead, run->state->g, &run->value, b, h, z, y, part,
               run->state->channels * size);
}

/* The tiles of the task at hand; task `next` < end comes after it. */
static void backward_task(backward_worker *w, int64_t next, int64_t end)
{
    const na_geometry *g = w->run->state->g;
    const na_tiles tiles = na_work_tiles(g, &w->work);
    w->key_row_count = na_key_rows(g, &w->work, !w->run->dropping.threshold, w->key_rows);
    if (w->fetches < 0)
        w->fetches = needs_ahead(g, &w->work, w->key_rows, w->key_row_count, &w->run->key,
                                 w->run->state->depth * (int64_t)stored_size(w->run->key.dtype));
    na_ring_fill(g, &w->work, w->key_rows, w->key_row_count, w->tags, backward_pack, w);
    backward_open_slots(w);
    ahead_clear(&w->keys_ahead);
    w->next.block = NULL;
    if (w->fetches && next < end) {
        na_key_row *rows = w->key_rows + g->key_rows;
        w->next = na_work_at(g, next);
        const int count = na_key_rows(g, &w->next, !w->run->dropping.threshold, rows);
        na_ring_missing(g, &w->next, rows, count, w->tags, backward_look, w);
        ahead_share(&w->keys_ahead, (int64_t)w->key_row_count * (tiles.end - tiles.first));
    }
    for (int i = tiles.first; i < tiles.end; i++)
        backward_tile_run(w, i, tiles.end);
}

/* more: 1 if the band after this one comes next, whose first keys are then fetched ahead, too. */
static void backward_band(backward_worker *w, int more)
{
    const backward_run *run = w->run;
    const backward_state *s = run->state;
    const na_geometry *g = s->g;
    memset(w->seen, 0, (size_t)s->bands->cells);
    if (s->d_bias)
        memset(w->bias_sum, 0, (size_t)(g->group * s->kinds.count * s->kind_reals) * sizeof(real));
    backward_open_more(w);
    const int64_t end = na_band_task(s->bands, w->unit, w->band + 1);
    for (int64_t task = na_band_task(s->bands, w->unit, w->band); task < end; task++) {
        w->work = na_work_at(g, task);
        backward_task(w, task + 1, end + more);
    }
    backward_close(w);
}

/* A natten_task. */
static void backward_work(void *context, int64_t worker)
{
    const backward_run *run = context;
    const backward_state *s = run->state;
    backward_worker w = {.run = run, .fetches = -1};
    backward_layout(s, &w, run->scratch + (size_t)worker * s->worker_bytes);
    for (int64_t i = 0; i <= s->g->additional_slot; i++)
        w.tags[i] = -1;
    memset(w.held, 0, (size_t)s->g->additional_slot * sizeof *w.held);
    backward_zero_slots(&w, 0, s->g->additional_slot);
    int64_t before = -1;
    for (na_turn turn = na_turn_of(run->queues, worker); na_turn_next(&turn); before = turn.task) {
        w.unit = turn.task / s->bands->count;
        w.band = (int32_t)(turn.task % s->bands->count);
        if (w.band == 0 || turn.task != before + 1)
            w.first_band = w.band;
        run->first_band[turn.task] = w.first_band;
        backward_band(&w, na_turn_ahead(&turn) == turn.task + 1);
    }
    vec_fence();
}
