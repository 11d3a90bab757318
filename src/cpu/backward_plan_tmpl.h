/* SPDX-License-Identifier: MIT
 * The frame of fused backward: plans, takes the memory, and adds up what the bands of
 * backward_tmpl.h have left. Parameters: the texts kernels.c includes before this one. */

/* The row of one of a unit's heads in a tensor of keys. */
static char *backward_head_row(const backward_run *run, const tensor *tensor, int64_t unit,
                               int head, int64_t z, int64_t y)
{
    const na_geometry *g = run->state->g;
    return tensor_at(tensor, unit / g->head_sets, unit % g->head_sets * g->beside + head, z, y, 0);
}

/* The last channel of a key row's sums is the gradient of its biases. */
static void backward_store_key_bias(const backward_run *run, int64_t unit, int64_t z, int64_t y)
{
    const backward_state *s = run->state;
    const int64_t extent = s->g->axis[2].key_extent, token = run->d_key_bias.axis[2];
    int64_t step;
    const real *sum = backward_result(run, &run->sink[0], unit, z, y, 0, &step) + s->depth;
    for (int head = 0; head < s->g->beside; head++) {
        char *to = backward_head_row(run, &run->d_key_bias, unit, head, z, y);
        for (int64_t x = 0; x < extent; x++, sum += step)
            memcpy(to + x * token, sum, sizeof(real));
    }
}

/* Stores a key row's sums that were only a copy of the result. */
static void backward_store_copy(const backward_run *run, int which, int64_t unit, int64_t z,
                                int64_t y)
{
    const backward_state *s = run->state;
    const backward_sink *sink = &run->sink[which];
    const int64_t extent = s->g->axis[2].key_extent;
    int64_t step;
    const real *sum = backward_result(run, sink, unit, z, y, 0, &step);
    for (int head = 0; head < s->g->beside; head++, sum += extent * step)
        unpack_natural(sink->out.dtype, sum, step, (int)extent, which ? s->channels : s->depth,
                       backward_head_row(run, &sink->out, unit, head, z, y), sink->out.axis[2]);
}

/* Adds the bands' own cells of a key row to the result, and stores it where it was only a copy. */
static void backward_finish_row(const backward_run *run, int64_t unit, int64_t row)
{
    const backward_state *s = run->state;
    const na_bands *bands = s->bands;
    const natten_axis *axis = s->g->axis;
    const int64_t z = row / axis[1].key_extent, y = row % axis[1].key_extent;
    for (int i = 0; i < 2; i++) {
        const backward_sink *sink = &run->sink[i];
        if (!sink->wanted)
            continue;
        int64_t step;
        for (int64_t c = 0; c < bands->row_cells && bands->own; c++) {
            const int64_t x = c * bands->cell, left = na_row_keys(s->g) - x;
            real *result = backward_result(run, sink, unit, z, y, x, &step);
            for (int32_t band = 1; band < bands->count; band++) {
                const int32_t first = run->first_band[unit * bands->count + band];
                const int32_t place = na_band_place(bands, band, row * bands->row_cells + c, first);
                if (place >= 0)
                    add_tokens(sink->own + (unit * bands->own + place) * bands->cell * sink->step,
                               sink->step, left < bands->cell ? left : bands->cell, sink->channels,
                               result, step, 1);
            }
        }
        if (sink->copy && sink->out.data)
            backward_store_copy(run, i, unit, z, y);
    }
    if (s->d_key_bias)
        backward_store_key_bias(run, unit, z, y);
}

/* The bands' sums of additional tokens. */
static void backward_finish_more(const backward_run *run, int64_t unit)
{
    const backward_state *s = run->state;
    const int64_t tokens = s->g->additional, bands = s->bands->count;
    for (int i = 0; i < 2; i++) {
        const backward_sink *sink = &run->sink[i];
        if (!sink->more_out.data)
            continue;
        real *sum = sink->more + unit * bands * tokens * sink->step;
        for (int64_t band = 1; band < bands; band++)
            add_tokens(sum + band * tokens * sink->step, sink->step, tokens, sink->channels, sum,
                       sink->step, 1);
        unpack_natural(
            sink->more_out.dtype, sum, sink->step, (int)tokens, i ? s->channels : s->depth,
            tensor_at(&sink->more_out, unit / s->g->head_sets, unit % s->g->head_sets, 0, 0, 0),
            sink->more_out.axis[0]);
    }
}

/* The bands' sums of a head's bias. */
static void backward_finish_bias(const backward_run *run, int64_t head)
{
    const backward_state *s = run->state;
    const int64_t sets = s->g->head_sets, group = s->g->group, bands = s->bands->count;
    for (int64_t entry = 0; entry < s->entries; entry++) {
        double sum = 0;
        for (int64_t b = 0; b < run->problem->batch; b++)
            for (int64_t band = 0; band < bands; band++) {
                const int64_t item = (b * sets + head / group) * bands + band;
                sum += run->d_bias_sums[(item * group + head % group) * s->entries + entry];
            }
        char *to = bias_at(run->problem, &run->d_bias, head, entry);
#define ONE(type)                                                                                  \
    if (run->d_bias.dtype == type)                                                                 \
        store_stored_part(type, to, 1, vec_set1((real)sum));
        STORED(ONE)
#undef ONE
    }
}

/* Key rows, units and heads to finish. */
static int64_t backward_finish_tasks(const backward_run *run, int64_t counts[3])
{
    const backward_state *s = run->state;
    const int rows = s->bands->own || run->sink[0].copy || run->sink[1].copy;
    counts[0] = rows * s->bands->units * s->g->axis[0].key_extent * s->g->axis[1].key_extent;
    counts[1] = s->g->additional ? s->bands->units : 0;
    counts[2] = s->d_bias ? run->problem->heads : 0;
    return counts[0] + counts[1] + counts[2];
}

/* A natten_task. */
static void backward_finish(void *context, int64_t worker)
{
    const backward_run *run = context;
    const natten_axis *axis = run->state->g->axis;
    const int64_t rows = axis[0].key_extent * axis[1].key_extent;
    int64_t counts[3];
    backward_finish_tasks(run, counts);
    for (na_turn turn = na_turn_of(run->queues, worker); na_turn_next(&turn);) {
        const int64_t i = turn.task;
        if (i < counts[0])
            backward_finish_row(run, i / rows, i % rows);
        else if (i < counts[0] + counts[1])
            backward_finish_more(run, i - counts[0]);
        else
            backward_finish_bias(run, i - counts[0] - counts[1]);
    }
}

/* What all workers share besides the tensors; returns its bytes. */
static size_t backward_share(backward_run *run, int64_t most_workers, char *base)
{
    enum { SHARED = 4, PARTS = SHARED + 2 * 3 };
    const backward_state *s = run->state;
    const natten_problem *p = run->problem;
    const int64_t units = s->bands->units, items = units * s->bands->count;
    const int64_t tokens =
        units * p->axis[0].key_extent * p->axis[1].key_extent * na_row_keys(s->g);
    real *bias = NULL;
    struct {
        void *part;
        int64_t count;
        size_t size;
    } parts[PARTS] = {
        {&bias, s->entries ? s->entries * p->heads + VL : 0, sizeof(real)},
        {&run->d_bias_sums, s->d_bias * items * s->g->group * s->entries, sizeof(double)},
        {&run->queues, 1, na_queues_bytes(most_workers)},
        {&run->first_band, items, sizeof *run->first_band}};
    for (int i = 0; i < 2; i++) {
        backward_sink *sink = &run->sink[i];
        const int wanted = sink->wanted, more = sink->more_out.data != NULL;
        const int copied =
            wanted && (stored_size(sink->out.dtype) != sizeof(real) || (i == 0 && s->d_key_bias));
        parts[SHARED + 3 * i].part = &sink->copy;
        parts[SHARED + 3 * i].count = copied * tokens * sink->step;
        parts[SHARED + 1 + 3 * i].part = &sink->own;
        parts[SHARED + 1 + 3 * i].count =
            wanted * units * s->bands->own * s->bands->cell * sink->step;
        parts[SHARED + 2 + 3 * i].part = &sink->more;
        parts[SHARED + 2 + 3 * i].count = more * items * s->g->additional * sink->step;
        for (int j = 0; j < 3; j++)
            parts[SHARED + 3 * i + j].size = sizeof(real);
    }
    size_t at = 0;
    for (int i = 0; i < PARTS; i++) {
        const uintptr_t place = parts[i].count && base ? (uintptr_t)base + at : 0;
        memcpy(parts[i].part, &place, sizeof place);
        at += backward_bytes(parts[i].count, parts[i].size);
    }
    run->bias = bias;
    return at;
}

/* d_query can be written by aggregate: directly, and past the caches. */
static void backward_direct(backward_run *run)
{
    run->direct = stored_size(run->d_query.dtype) == sizeof(real);
    run->stream = run->direct && tensor_streams(&run->d_query, run->state->depth);
}

static natten_status backward_run_plan(const natten_plan *plan, const natten_run *addresses)
{
    const backward_state *s = plan->state;
    const natten_problem *p = &plan->merged;
    backward_run run = {.state = s, .problem = p};
    run.query = packed_of(p, addresses, NATTEN_QUERY, s->g);
    run.key = packed_of(p, addresses, NATTEN_KEY, s->g);
    run.value = packed_of(p, addresses, NATTEN_VALUE, s->g);
    run.out = tensor_of(p, addresses, NATTEN_OUT);
    run.lse = tensor_of(p, addresses, NATTEN_LSE);
    run.more_key = tensor_of(p, addresses, NATTEN_ADDITIONAL_KEY);
    run.more_value = tensor_of(p, addresses, NATTEN_ADDITIONAL_VALUE);
    run.d_out = packed_of(p, addresses, NATTEN_D_OUT, s->g);
    run.d_lse = tensor_of(p, addresses, NATTEN_D_LSE);
    run.d_query = tensor_of(p, addresses, NATTEN_D_QUERY);
    run.d_bias = tensor_of(p, addresses, NATTEN_D_RPB);
    run.sink[0] = (backward_sink){.out = tensor_of(p, addresses, NATTEN_D_KEY),
                                  .more_out = tensor_of(p, addresses, NATTEN_D_ADDITIONAL_KEY),
                                  .step = s->key_step,
                                  .channels = s->depth + s->d_key_bias};
    run.sink[1] = (backward_sink){.out = tensor_of(p, addresses, NATTEN_D_VALUE),
                                  .more_out = tensor_of(p, addresses, NATTEN_D_ADDITIONAL_VALUE),
                                  .step = s->value_step,
                                  .channels = s->channels};
    run.key_bias = tensor_of(p, addresses, NATTEN_KEY_BIAS);
    run.dropping = dropping_of(p, addresses);
    run.d_key_bias = tensor_of(p, addresses, NATTEN_D_KEY_BIAS);
    run.sink[0].wanted = run.sink[0].out.data || s->d_key_bias;
    run.sink[1].wanted = run.sink[1].out.data != NULL;
    backward_direct(&run);
    const int64_t items = s->bands->units * s->bands->count;
    const int64_t most = na_workers(addresses, INT64_MAX);
    const int64_t workers = na_workers(addresses, items);
    const size_t shared = backward_share(&run, most, NULL);
    char *scratch = na_scratch_take(shared + (size_t)workers * s->worker_bytes);
    if (!scratch)
        return na_fail(NATTEN_ERROR_MEMORY, "No memory for the scratch of a backward run.");
    backward_share(&run, most, scratch);
    run.scratch = scratch + shared;
    if (run.bias) {
        const tensor rpb = tensor_of(p, addresses, NATTEN_RPB);
        bias_pack(p, &rpb, (real)LOG2_E, (real *)scratch);
    }
    na_parallel_tasks(addresses, run.queues, workers, items, backward_work, &run);
    int64_t counts[3];
    const int64_t tasks = backward_finish_tasks(&run, counts);
    if (tasks) {
        const int64_t finishers = na_workers(addresses, tasks);
        na_parallel_tasks(addresses, run.queues, finishers, tasks, backward_finish, &run);
    }
    na_scratch_give(scratch);
    return NATTEN_OK;
}

static void backward_destroy(void *state)
{
    backward_state *s = state;
    na_geometry_free(s->g);
    na_bands_free(s->bands);
    free(s->kinds.of);
    free(s);
}

static void backward_sizes(backward_state *s, const natten_problem *p)
{
    const int64_t line = 64 / (int64_t)sizeof(real), most = (int64_t)s->rows * NA_RUN * VL;
    s->depth = (int)p->head_dim;
    s->channels = (int)p->value_dim;
    s->terms = s->depth + na_has(p, NATTEN_KEY_BIAS);
    s->d_key_bias = na_has(p, NATTEN_D_KEY_BIAS);
    s->key_step = padded(s->depth + s->d_key_bias);
    s->value_step = padded(s->channels);
    /* An odd number of cache lines, so that channels do not fall into the same cache sets. */
    s->line = ((s->g->width + line - 1) / line | 1) * line;
    s->key_group = channel_group(s->depth);
    s->block = block_reals(s->rows, padded(s->depth > s->channels ? s->depth : s->channels),
                           p->axis[2].window);
    s->block_room = (s->block > most ? s->block : most) + (int64_t)s->rows * 2 * VL;
    s->entries = na_bias_entries(p);
    s->kind_reals = padded(s->entries * VL) + VL;
    s->d_query = na_has(p, NATTEN_D_QUERY);
    s->d_key = na_has(p, NATTEN_D_KEY) || na_has(p, NATTEN_D_ADDITIONAL_KEY) || s->d_key_bias;
    s->d_value = na_has(p, NATTEN_D_VALUE) || na_has(p, NATTEN_D_ADDITIONAL_VALUE);
    s->d_bias = na_has(p, NATTEN_D_RPB);
    s->d_slope = s->d_query || s->d_key || s->d_bias;
}

static natten_status backward_plan(natten_plan *plan)
{
    const natten_problem *p = &plan->merged;
    backward_state *s = calloc(1, sizeof *s);
    if (!s)
        return na_fail(NATTEN_ERROR_MEMORY, "No memory to make a plan.");
    plan->state = s;
    plan->destroy = backward_destroy;
    plan->run = backward_run_plan;
    /* What is scattered at a time, or twice that: more share a loaded key, of which large windows
     * have many. */
    const int more = ROWS_MAX / SCATTER_ROWS * SCATTER_ROWS;
    const int rows = na_window_size(p) > 200 ? more : SCATTER_ROWS;
    na_cut cut = na_usual_cut(rows);
    cut.beside = 0;
    s->g = na_choose(plan, VL, HALF, cut, ROWS_MAX);
    if (!s->g || !bias_find_kinds(&s->kinds, s->g))
        return na_fail(NATTEN_ERROR_MEMORY, "No memory to make a plan.");
    s->rows = s->g->cut.rows;
    const int64_t units = p->batch * s->g->head_sets;
    int64_t products = (na_window_size(p) + p->additional_tokens) * (p->head_dim + p->value_dim);
    products *= p->heads / s->g->head_sets;
    for (int i = 0; i < 3; i++)
        products *= p->axis[i].query_extent;
    s->bands = na_bands_make(s->g, units, products);
    if (!s->bands)
        return na_fail(NATTEN_ERROR_MEMORY, "No memory to make a plan.");
    backward_sizes(s, p);
    backward_worker w;
    s->worker_bytes = backward_layout(s, &w, NULL);
    return NATTEN_OK;
}
