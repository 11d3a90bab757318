/* SPDX-License-Identifier: MIT
 * Fused forward: workers, their memory and packed keys, runs and plans.
 * Parameters: the texts kernels.c includes before this one. */

static size_t aligned_bytes(size_t bytes) { return (bytes + 127) / 64 * 64; }

/* Lays a worker's memory out from `base`; returns the bytes it takes. */
static size_t forward_layout(const forward_state *s, forward_worker *w, char *base)
{
    const na_geometry *g = s->g;
    const size_t reals[] = {(size_t)(g->slots * s->slot_step + 2 * VL),
                            (size_t)(s->groups * s->value_group),
                            (size_t)s->rows * s->terms * VL,
                            (size_t)s->rows * s->score_row,
                            (size_t)(s->groups * s->rows * VL * s->value_step),
                            ((size_t)s->terms * KEYS_MAX + 1) * VL};
    real **const part[] = {&w->key, &w->value, &w->query, &w->score, &w->sum, &w->room};
    size_t at = 0;
    for (int i = 0; i < 6; i++) {
        *part[i] = (real *)((uintptr_t)base + at);
        at += aligned_bytes(reals[i] * sizeof(real));
    }
    w->tags = (int64_t *)((uintptr_t)base + at);
    at += aligned_bytes((size_t)(g->additional_slot + 1) * sizeof *w->tags);
    w->key_rows = (na_key_row *)((uintptr_t)base + at);
    w->next_rows = w->key_rows + g->key_rows;
    at += aligned_bytes(2 * (size_t)g->key_rows * sizeof *w->key_rows);
    w->spans = (na_span *)((uintptr_t)base + at);
    at += aligned_bytes((size_t)g->spans * sizeof *w->spans);
    return at;
}

/* Packs values naturally, each group of channels into its own ring; `to`: in that of the first. */
static void pack_groups(const forward_state *s, int dtype, const char *from, int64_t token,
                        int64_t further, int tokens, int step, real *to)
{
    for (int c = 0; c < s->channels; c += (int)s->value_step, to += s->value_group)
        pack_values(dtype, from + c * (int64_t)stored_size(dtype), token, further, tokens, step,
                    na_min(s->channels - c, (int)s->value_step), to, s->value_step);
}

/* A na_pack: keys transposed, values natural. */
static void forward_pack(void *context, int64_t slot, int32_t z, int32_t y, const na_part *part)
{
    const forward_worker *w = context;
    const forward_run *run = w->run;
    const forward_state *s = run->state;
    const int64_t b = w->work.batch, h = w->work.kv_head;
    real *const key = w->key + slot * s->slot_step;
    real *const value = w->value + slot * s->g->apart * s->value_step;
    pack_keys_transposed(s->g, &run->key, packed_as(run->key.dtype), b, h, z, y, part, s->depth,
                         key, s->key_depth);
    pack_key_biases(s->g, &run->key_bias, b, h, z, y, part, key + s->depth * s->key_depth);
    for (int i = 0; i < s->g->beside; i++) {
        const na_keys keys = na_keys_of(s->g, part, i);
        pack_groups(s, run->value.dtype, tensor_at(&run->value, b, h + i, z, y, keys.x),
                    run->value.axis[2], run->value.further, keys.count, (int)s->g->axis[2].dilation,
                    value + keys.place * s->value_step);
    }
}

/* A na_pack that packs nothing: has fetched what will be packed. Much of a small window's time
 * would otherwise go into waiting for it. */
static void forward_look(void *context, int64_t slot, int32_t z, int32_t y, const na_part *part)
{
    forward_worker *w = context;
    const forward_state *s = w->run->state;
    const tensor *k = &w->run->key, *v = &w->run->value;
    const int64_t b = w->next.batch, h = w->next.kv_head;
    (void)slot;
    keys_ahead(&w->tokens, s->g, k, b, h, z, y, part,
               (int64_t)s->depth * stored_size(packed_as(k->dtype)));
    keys_ahead(&w->tokens, s->g, v, b, h, z, y, part, (int64_t)s->channels * stored_size(v->dtype));
}

/* Additional tokens are packed when the batch or the head changes. */
static void forward_pack_more(forward_worker *w)
{
    const forward_run *run = w->run;
    const forward_state *s = run->state;
    const na_geometry *g = s->g;
    const int64_t tag = w->work.batch * g->head_sets + w->work.kv_head;
    if (w->tags[g->additional_slot] == tag)
        return;
    w->tags[g->additional_slot] = tag;
    for (int64_t n = 0, slot = g->additional_slot; n < g->additional; n += g->width, slot++) {
        const int64_t left = g->additional - n;
        const int some = left < g->width ? (int)left : g->width;
        const tensor *k = &run->more_key, *v = &run->more_value;
        pack_transposed(packed_as(k->dtype), tensor_at(k, w->work.batch, w->work.kv_head, n, 0, 0),
                        k->axis[0], 0, some, s->depth, 1, w->key + slot * s->slot_step,
                        s->key_depth);
        if (run->key_bias.data)
            key_bias_pack(NULL, NULL, some, w->key + slot * s->slot_step + s->depth * s->key_depth);
        pack_groups(s, v->dtype,
                    tensor_at(v, w->work.batch, w->work.kv_head, 0, 0, 0) + n * v->axis[0],
                    v->axis[0], 0, some, 1, w->value + slot * g->apart * s->value_step);
    }
}

/* Looks at the task that will come after this one. */
static void forward_look_ahead(forward_worker *w, int64_t task)
{
    const na_geometry *g = w->run->state->g;
    const na_tiles tiles = na_work_tiles(g, &w->work);
    w->next = na_work_at(g, task);
    w->next_task = task;
    w->next_row_count = na_key_rows(g, &w->next, !w->run->dropping.threshold, w->next_rows);
    na_ring_missing(g, &w->next, w->next_rows, w->next_row_count, w->tags, forward_look, w);
    ahead_share(&w->tokens, (int64_t)(tiles.end - tiles.first) * w->key_row_count);
}

/* A natten_task. */
static void forward_work(void *context, int64_t worker)
{
    const forward_run *run = context;
    const forward_state *s = run->state;
    const na_geometry *g = s->g;
    forward_worker w = {.run = run, .fetches = -1};
    forward_layout(s, &w, run->scratch + (size_t)worker * s->worker_bytes);
    for (int64_t i = 0; i <= g->additional_slot; i++)
        w.tags[i] = -1;
    for (na_turn turn = na_turn_of(run->queues, worker); na_turn_next(&turn);) {
        if (w.next.block && w.next_task == turn.task) {
            na_key_row *rows = w.key_rows;
            w.work = w.next;
            w.key_rows = w.next_rows;
            w.key_row_count = w.next_row_count;
            w.next_rows = rows;
        } else {
            w.work = na_work_at(g, turn.task);
            w.key_row_count = na_key_rows(g, &w.work, !run->dropping.threshold, w.key_rows);
        }
        if (w.fetches < 0)
            w.fetches = needs_ahead(g, &w.work, w.key_rows, w.key_row_count, &run->key,
                                    s->depth * stored_size(packed_as(run->key.dtype)));
        na_ring_fill(g, &w.work, w.key_rows, w.key_row_count, w.tags, forward_pack, &w);
        forward_pack_more(&w);
        w.next.block = NULL;
        ahead_clear(&w.tokens);
        const int64_t ahead = na_turn_ahead(&turn);
        if (w.fetches && ahead >= 0)
            forward_look_ahead(&w, ahead);
        const na_tiles tiles = na_work_tiles(g, &w.work);
        for (int i = tiles.first; i < tiles.end; i++)
            forward_tile_run(&w, i);
    }
    vec_fence();
}

static natten_status forward_run_plan(const natten_plan *plan, const natten_run *addresses)
{
    const forward_state *s = plan->state;
    const natten_problem *p = &plan->merged;
    forward_run run = {.state = s, .problem = p};
    run.query = packed_of(p, addresses, NATTEN_QUERY, s->g);
    run.key = packed_of(p, addresses, NATTEN_KEY, s->g);
    run.value = packed_of(p, addresses, NATTEN_VALUE, s->g);
    run.out = tensor_of(p, addresses, NATTEN_OUT);
    run.lse = tensor_of(p, addresses, NATTEN_LSE);
    run.more_key = tensor_of(p, addresses, NATTEN_ADDITIONAL_KEY);
    run.more_value = tensor_of(p, addresses, NATTEN_ADDITIONAL_VALUE);
    run.key_bias = tensor_of(p, addresses, NATTEN_KEY_BIAS);
    run.dropping = dropping_of(p, addresses);
    /* Rounding parts of vectors, too, would take aggregate more registers than there are. */
    run.direct =
        stored_size((int)p->dtype) == sizeof(out_real) && (PER_REAL == 1 || s->channels % VL == 0);
    run.stream = run.direct && tensor_streams(&run.out, s->channels);
    const int64_t workers = na_workers(addresses, s->g->tasks);
    const size_t bias = aligned_bytes((size_t)(s->bias_head * p->heads + VL) * sizeof(real));
    const size_t queues = na_queues_bytes(workers);
    char *scratch = na_scratch_take(bias + queues + (size_t)workers * s->worker_bytes);
    if (!scratch)
        return na_fail(NATTEN_ERROR_MEMORY, "No memory for the scratch of a forward run.");
    run.queues = (na_queues *)(void *)(scratch + bias);
    run.scratch = scratch + bias + queues;
    if (s->bias_head) {
        const tensor rpb = tensor_of(p, addresses, NATTEN_RPB);
        bias_pack(p, &rpb, (real)LOG2_E, (real *)scratch);
        run.bias = (real *)scratch;
    }
    na_parallel_tasks(addresses, run.queues, workers, s->g->tasks, forward_work, &run);
    na_scratch_give(scratch);
    return NATTEN_OK;
}

static void forward_destroy(void *state)
{
    forward_state *s = state;
    na_geometry_free(s->g);
    free(s);
}

/* Rows of a tile: of windows of some size a call's rows share keys well enough, and scores then
 * stay in the first-level cache. Blocks are of nearly equal size: 14 rows by at most four are 3.5
 * on average, by five 4.7. */
static int forward_rows(const natten_problem *p)
{
    const int64_t window = na_window_size(p);
    if (window <= 40 || window > 64)
        return ROWS_MAX;
    const natten_axis *y = &p->axis[1];
    const int rows = few_rows(p), all = na_ceil_div((int)y->query_extent, (int)y->dilation);
    const int blocks = na_ceil_div(all, rows), fewer = na_ceil_div(all, rows + 1);
    return rows < SHIFT_ROWS && fewer < blocks && 8 * all <= 7 * rows * blocks ? rows + 1 : rows;
}

/* Queries of a part of a wide map: with a small window much time goes into packing and little into
 * each packed key, so the ring of key rows should fill less than half of the second-level cache.
 * Keys that are packed for two parts should be few. (Rings of 3-D maps do not fit either way.) */
static int forward_part(const natten_problem *p, int rows)
{
    enum { RING_BYTES = 400 << 10 };
    const natten_axis *x = &p->axis[2];
    const int64_t reach = (x->window - 1) * x->dilation;
    const int64_t key_rows = p->axis[1].window + rows - 1;
    const int64_t token = (p->head_dim + p->value_dim) * (int64_t)sizeof(real);
    const int64_t least = VL + 8 * reach, room = RING_BYTES / (key_rows * token) - reach;
    const int64_t part = room < least ? least : room;
    const int pays = p->axis[0].window == 1 && na_window_size(p) <= 64;
    return pays && part < NA_PART ? (int)part : NA_PART;
}

/* Channels of a value that aggregate takes at a time. With few, blocks of weights are larger, so
 * that sums are stored less often, and lanes are taken two by two, but weights are loaded more
 * often: for short runs in many key rows a Zen 5 takes 4 to 6 % less time then, a Zen 4 3 to 4 %
 * (with AVX-512, and not of pairs), a Xeon 5 % more. */
static int forward_group(const natten_problem *p)
{
    const int usual = channel_group((int)p->value_dim);
    const int few = FEW_HALVES > 0 ? FEW_HALVES / 2 * VL : usual;
    const int splits = PER_REAL == 1 && na_cpu_splits_vectors();
    const int pays = (na_cpu_foresees() || splits) && p->axis[0].window > 1;
    return pays && p->value_dim % few == 0 ? few : usual;
}

/* How many times larger blocks of weights are than for the first-level cache. Who takes two turns
 * for a vector need not wait for the next cache, if a weight is multiplied often enough, and takes
 * 2 to 4 % less time with fewer sums to store. */
static int larger_blocks(int64_t value_step)
{
    const int64_t vectors = value_step / VL;
    const int often = vectors <= FEW_HALVES / 2 || vectors % CHANNELS_MAX == 0;
    return often && VL * sizeof(real) == 64 && na_cpu_splits_vectors() ? 4 : 1;
}

static natten_status forward_plan(natten_plan *plan)
{
    const natten_problem *p = &plan->merged;
    forward_state *s = calloc(1, sizeof *s);
    if (!s)
        return na_fail(NATTEN_ERROR_MEMORY, "No memory to make a plan.");
    na_cut cut = na_usual_cut(forward_rows(p));
    cut.part = forward_part(p, cut.rows);
    cut.beside = 0;
    s->g = na_choose(plan, VL, HALF, cut, ROWS_MAX);
    if (!s->g) {
        free(s);
        return na_fail(NATTEN_ERROR_MEMORY, "No memory to make a plan.");
    }
    s->rows = s->g->cut.rows;
    const int64_t line = 64 / (int64_t)sizeof(real),
                  keys = na_window_size(p) + p->additional_tokens;
    const int64_t room = CHAPTER_BYTES / (s->rows * VL * (int64_t)sizeof(real));
    s->depth = (int)p->head_dim / PER_REAL;
    s->channels = (int)p->value_dim;
    /* An odd number of cache lines, so that channels do not fall into the same cache sets. */
    s->key_depth = ((s->g->width + line - 1) / line | 1) * line;
    s->terms = s->depth + na_has(p, NATTEN_KEY_BIAS);
    s->slot_step = s->key_depth * s->terms;
    s->value_step = forward_group(p);
    s->groups = (s->channels + s->value_step - 1) / s->value_step;
    s->value_group = s->g->slots * s->g->apart * s->value_step;
    s->block =
        larger_blocks(s->value_step) * block_reals(s->rows, s->value_step, p->axis[2].window);
    s->whole = keys <= room;
    s->chapter = (int)(s->whole ? keys : room);
    s->score_row = (int64_t)s->chapter * VL + 2 * VL;
    s->bias_head = na_bias_entries(p);
    forward_worker w;
    s->worker_bytes = forward_layout(s, &w, NULL);
    plan->state = s;
    plan->destroy = forward_destroy;
    plan->run = forward_run_plan;
    return NATTEN_OK;
}
