/* SPDX-License-Identifier: MIT
 * Of the host text of sm_90a's words (hopper.h): stores for products and copies, and boxes that are
 * added to memory. */
#ifndef HOST_HOPPER_ADD_H
#define HOST_HOPPER_ADD_H

/* Boxes on their way: first they are read, soon or only when somebody waits for that; some time
 * later they are added. */
static struct na_host_add {
    na_host_box box;
    int state, thread, is_put_off; /* state 0: free, 1: to be read, 2: to be added */
    float numbers[64 * 32];
} na_host_adds[64];

/* Of each thread: boxes not read, not added, in no group yet. */
static int na_host_unread[1024], na_host_unadded[1024], na_host_loose[1024];

static inline void na_host_store_check(uint32_t to)
{
    for (int i = 0; i < 64; i++) {
        const struct na_host_add *add = &na_host_adds[i];
        if (add->state == 1 && to >= add->box.to &&
            to < add->box.to + na_host_box_elements(&add->box.map) * 4)
            na_host_fault("stores at %u, from where a box is still read", to);
    }
}

NA_WORD void na_store_matrices(uint32_t to, const uint32_t *words)
{
    struct na_host_stored *mine = &na_host_stored[na_host_thread()];
    const uint32_t *rows = na_host_warp("na_store_matrices", &to, sizeof to);
    int lane = na_host_thread() & 31;
    for (int j = 0; j < 4; j++) {
        uint32_t place = rows[8 * j + lane / 4] + 4 * (uint32_t)(lane % 4);
        if (place % 16 != 4 * (uint32_t)(lane % 4) || mine->count == 128)
            na_host_fault("a row of 16 bytes is stored at %u, or too much without a fence", place);
        na_host_store_check(place);
        memset(na_host_at(place, 4), 0xff, 4);
        mine->to[mine->count] = place;
        mine->word[mine->count++] = words[j];
    }
}

NA_WORD void na_store_fence(void)
{
    struct na_host_stored *mine = &na_host_stored[na_host_thread()];
    for (int i = 0; i < mine->count; i++)
        memcpy(na_host_at(mine->to[i], 4), &mine->word[i], 4);
    mine->count = 0;
}

static inline void na_host_box_sum(void *context)
{
    struct na_host_add *add = *(struct na_host_add **)context;
    uint32_t count = na_host_box_elements(&add->box.map);
    for (uint32_t i = 0; i < count; i++) {
        char *to = (char *)na_host_box_source(&add->box, i);
        float sum;
        if (!to)
            continue;
        memcpy(&sum, to, 4);
        sum += add->numbers[i];
        memcpy(to, &sum, 4);
    }
    na_host_unadded[add->thread]--;
    add->state = 0;
}

static inline void na_host_box_read(void *context)
{
    struct na_host_add *add = *(struct na_host_add **)context;
    uint32_t count = na_host_box_elements(&add->box.map);
    for (uint32_t i = 0; i < count; i++)
        memcpy(&add->numbers[i], na_host_at(na_host_swizzle(add->box.to + i * 4), 4), 4);
    na_host_unread[add->thread]--;
    add->state = 2;
    na_host_later(na_host_box_sum, &add, sizeof add);
}

NA_WORD void na_box_add(const na_tensor_map *map, uint32_t from, int c0, int c1, int c2, int c3,
                        int c4)
{
    int i = 0;
    while (na_host_adds[i].state)
        if (++i == 64) {
            na_host_yield();
            i = 0;
        }
    struct na_host_add *add = &na_host_adds[i];
    *add = (struct na_host_add){
        .box = {.to = from, .at = {c0, c1, c2, c3, c4}}, .state = 1, .thread = na_host_thread()};
    memcpy(&add->box.map, map, sizeof add->box.map);
    const na_host_map *m = &add->box.map;
    if (m->rank != 5 || m->swizzle != 3 || m->element_bytes != 4 || from % 1024 ||
        na_host_box_elements(m) > 64 * 32)
        na_host_fault("no box of at most 64 times 32 numbers that can be added");
    for (int a = 0; a < 5; a++)
        if (m->element_strides[a] != 1 || add->box.at[a] < 0)
            na_host_fault("a box is added with gaps, or from before the tensor's beginning");
    na_host_unread[add->thread]++;
    na_host_unadded[add->thread]++;
    na_host_loose[add->thread]++;
    static unsigned count;
    add->is_put_off = count++ % 2 == 0;
    if (!add->is_put_off)
        na_host_later(na_host_box_read, &add, sizeof add);
}

NA_WORD void na_box_commit(void) { na_host_loose[na_host_thread()] = 0; }

static inline void na_host_box_wait(const int *left)
{
    if (na_host_loose[na_host_thread()])
        na_host_fault("waits for boxes that were not committed");
    for (int i = 0; i < 64; i++) {
        struct na_host_add *add = &na_host_adds[i];
        if (add->state == 1 && add->thread == na_host_thread() && add->is_put_off) {
            add->is_put_off = 0;
            na_host_later(na_host_box_read, &add, sizeof add);
        }
    }
    while (left[na_host_thread()])
        na_host_yield();
}

NA_WORD void na_box_read_wait(void) { na_host_box_wait(na_host_unread); }
NA_WORD void na_box_add_wait(void) { na_host_box_wait(na_host_unadded); }

/* What a thread leaves behind. */
static inline int na_host_end(void)
{
    int thread = na_host_thread();
    if (na_host_unread[thread] || na_host_unadded[thread] || na_host_stored[thread].count)
        na_host_fault("ends before what it stored, or the boxes it adds, have come");
    return 0;
}

#endif
