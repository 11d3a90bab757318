/* SPDX-License-Identifier: MIT
 * Masks of the Hopper kernels: scores of residents and visitors that do not meet become -infinity.
 * Parameter: NA_COLUMNS, the digits of the number of visitors, those from row `from` of the tile
 * on. Gives keep_range_<columns> and mask_<columns>. */

/* Keeps the scores whose bits are set: bit n * step of word[c] is for column 8 n + column + c. */
NA_WORD void NA_JOIN(keep_, NA_COLUMNS)(float *scores, int r, const uint32_t *word, int step)
{
#pragma unroll
    for (int n = 0; n < NA_COLUMNS / 8; n++)
#pragma unroll
        for (int c = 0; c < 2; c++)
            if (!(word[c] >> n * step & 1))
                scores[4 * n + 2 * r + c] = -na_infinity();
}

/* Columns first..end - 1 of the part of the tile that is worked on. */
NA_WORD void NA_JOIN(keep_range_, NA_COLUMNS)(const seat *s, float *scores, int r, int first,
                                              int end)
{
    uint32_t word[2];
#pragma unroll
    for (int c = 0; c < 2; c++)
        word[c] =
            range((first - s->column - c + 7) >> 3, (end - s->column - c + 7) >> 3, NA_COLUMNS / 8);
    NA_JOIN(keep_, NA_COLUMNS)(scores, r, word, 1);
}

NA_WORD void NA_JOIN(mask_, NA_COLUMNS)(const na_sm90_walk *p, const seat *s, float *scores,
                                        const int *at, int from)
{
    const work_item *t = s->item;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        int row = s->row + 8 * r;
#if NA_POSITIONS
        /* Rows of NA_TILE_2 tokens: one, or two, for each 8 columns. */
        int step = 8 / NA_TILE_2;
        const cell *table = s->table;
        uint32_t rows = ~0u, word[2],
                 tokens = table[(NA_SUB_0 + NA_SUB_1 + place_of(row, 2)) * NA_POSITIONS + at[2]];
        tokens >>= s->column & (NA_TILE_2 - 1);
        if (MASKS_0)
            rows = table[place_of(row, 0) * NA_POSITIONS + at[0]];
        if (MASKS_1)
            rows &= table[(NA_SUB_0 + place_of(row, 1)) * NA_POSITIONS + at[1]];
        rows >>= from / NA_TILE_2 + s->column / NA_TILE_2;
        word[0] = tokens & 1 ? rows : 0;
        word[1] = tokens & 2 ? rows : 0;
        NA_JOIN(keep_, NA_COLUMNS)(scores, r, word, step);
#else
        int resident = t->first[2] + offset(2, s->group) + place_of(row, 2);
        na_window visitors =
            visitors_at(&p->axis[2], t->residue[2], na_min(resident, t->end[2] - 1));
        int first = visitors.first - at[2] - from;
        int count = NA_ADDS && resident >= t->end[2] ? 0 : visitors.count;
        NA_JOIN(keep_range_, NA_COLUMNS)(s, scores, r, first, first + count);
#endif
    }
}
