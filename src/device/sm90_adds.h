/* SPDX-License-Identifier: MIT
 * How the backward of sm90_backward.cu adds up d_query while it goes past the keys. A tile's ds, of
 * all residents, meets in shared memory as a **part**, and one of the two warpgroups multiplies it
 * by the keys: part number i is warpgroup i's, so that they take turns. It does so one tile late,
 * when the other has long given its half. What comes out is added to memory as a box, in float32
 * and in any order. */
enum { TARGET_WORDS = NA_SM90_TARGET_BYTES / 4 };

NA_WORD void start_parts(consumer *s)
{
    uint32_t row = (s->seat.row & 48) + (s->seat.lane & 15);
    s->matrix = row * 128 + ((s->seat.lane >> 4 ^ (s->seat.lane & 7)) << 4);
    na_keep(&s->matrix);
    s->parts = s->pending = 0;
}

/* The part that a tile belongs to, and how often that was used, modulo 2. */
NA_WORD int part_of(const consumer *s) { return (int)(s->parts & 1); }
NA_WORD uint32_t part_phase(const consumer *s) { return s->parts >> 1 & 1; }

/* Whether any warpgroup looks at the tile. */
NA_WORD int is_visited(int kind)
{
    const int nobody = SKIP * ((1 << NA_GROUPS) - 1);
    return (kind & nobody) != nobody;
}

/* Gives this warpgroup's half of ds: rows of 64 queries, one for each resident. */
NA_WORD void put_part(consumer *s, const uint32_t *packed)
{
    uint32_t to = s->base + places().part + part_of(s) * places().part_bytes +
                  s->seat.group * (NA_SM90_ROWS * 128) + s->matrix;
    na_gate_wait(gate(s->base, PART_EMPTY + part_of(s)), part_phase(s) ^ 1);
#pragma unroll
    for (int k = 0; k < NA_VISITORS / 16; k++)
        na_store_matrices(to ^ k << 5, packed + 4 * k);
    na_store_fence();
    na_warp_barrier();
    na_gate_arrive_warp(gate(s->base, PART_FULL + part_of(s)), s->seat.lane, 1);
}

/* Where what this warpgroup will multiply goes. Only one thread wants to know, and no register is
 * free. */
NA_WORD int *target_of(const consumer *s)
{
    return (int *)((unsigned char *)na_shared() + places().target) + s->seat.group * TARGET_WORDS;
}

NA_WORD void take_target(const consumer *s, const int *note)
{
    if (part_of(s) == s->seat.group && (na_thread() & 127) == 0)
#pragma unroll
        for (int i = 0; i < TARGET_WORDS; i++)
            target_of(s)[i] = note[NOTE_TARGET + i];
}

/* ds times the keys of both warpgroups, for this warpgroup's part. */
NA_WORD void multiply_part(consumer *s, float *sums)
{
    uint32_t part = s->base + places().part + s->seat.group * places().part_bytes;
    /* That of the tile before: of part 1 when part 0's next phase has begun. */
    na_gate_wait(gate(s->base, PART_FULL + s->seat.group), part_phase(s) ^ s->seat.group);
    hold(sums, NA_DIM / 2);
    na_product_fence();
#pragma unroll
    for (int k = 0; k < NA_GROUPS * NA_SM90_ROWS / 16; k++)
        parts_shared(
            sums, na_matrix(part + k * 16 * 128, NA_SM90_ROWS * 128),
            na_matrix(s->base + resident_at(k / 4, 0) + k % 4 * 16 * 128, NA_SM90_ROWS * 128),
            k > 0);
    na_product_commit();
    na_product_wait();
    hold(sums, NA_DIM / 2);
    na_gate_arrive_warp(gate(s->base, PART_EMPTY + s->seat.group), s->seat.lane, 1);
}

/* Even columns, then odd ones, of every 8: as matrices hold 4 numbers in a row. */
NA_WORD void store_sums(const consumer *s, const float *sums, uint32_t tile)
{
    uint32_t to = tile + s->matrix;
#pragma unroll
    for (int n = 0; n < NA_DIM / 8; n++) {
        uint32_t words[4];
#pragma unroll
        for (int i = 0; i < 4; i++)
            words[i] = na_bits_of_float(sums[4 * n + 2 * (i & 1) + (i >> 1)]);
        na_store_matrices((to ^ n % 4 << 5) + n / 4 * (NA_SM90_ROWS * 128), words);
    }
}

NA_WORD void add_part(const na_sm90_backward *p, consumer *s)
{
    float sums[NA_DIM / 2];
    uint32_t from = s->base + places().sum + s->seat.group * places().sum_bytes;
    int thread = na_thread() & 127;
    multiply_part(s, sums);
    if (thread == 0)
        na_box_read_wait();
    na_group_barrier(1 + s->seat.group);
    store_sums(s, sums, from);
    na_store_fence();
    na_group_barrier(1 + s->seat.group);
    if (thread == 0) {
        const int *to = target_of(s);
#pragma unroll
        for (int i = 0; i * NA_SM90_ADDED_COLUMNS < NA_DIM; i++)
            na_box_add(&p->d_query, from + i * (NA_SM90_ROWS * 128), i * NA_SM90_ADDED_COLUMNS,
                       to[0], to[1], to[2], to[3]);
        na_box_commit();
    }
}

/* After the part of a tile has been given, that of the tile before is due. */
NA_WORD void follow_part(const na_sm90_backward *p, consumer *s)
{
    if (s->pending && part_of(s) != s->seat.group)
        add_part(p, s);
    s->parts++;
    s->pending = 1;
}

/* The part of an item's last tile. */
NA_WORD void finish_parts(const na_sm90_backward *p, consumer *s)
{
    if (s->pending && part_of(s) != s->seat.group)
        add_part(p, s);
}

/* Boxes are read while the block is there. */
NA_WORD void end_parts(void)
{
    if ((na_thread() & 127) == 0)
        na_box_add_wait();
}
