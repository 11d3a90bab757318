/* SPDX-License-Identifier: MIT
 * Where the entries of a relative position bias lie, for the Hopper kernels. An entry's place
 * follows from how far the key is from the query, so along each axis it is a sum of what the
 * resident, the tile and the place in the tile give.
 *
 * Parameters: those of sm90_items.h. */

/* Entries go up with the key's place: with a visitor's, or down. */
NA_WORD int step_of(const na_sm90_bias *bias, int axis)
{
    return NA_SIDE ? -bias->step[axis] : bias->step[axis];
}

/* The place of a tile's first visitor along an axis. */
NA_WORD int first_visitor(const seat *s, int axis, const int *at)
{
    return NA_POSITIONS ? (int)s->table[TABLE_WORDS + axis] + at[axis] * tile(axis) : at[axis];
}

/* Where the entry of a row's resident and the tile's first visitor lies. Residents past the end
 * are taken for the last one, whose visitors the tile has. */
NA_WORD int first_entry(const na_sm90_walk *p, const na_sm90_bias *bias, const seat *s, int row,
                        const int *at)
{
    const work_item *t = s->item;
    int sum = 0;
#pragma unroll
    for (int a = 0; a < 3; a++) {
        int resident = t->first[a] + offset(a, s->group) + place_of(row, a);
        sum += (p->axis[a].rule.window - 1) * bias->step[a] +
               (first_visitor(s, a, at) - na_min(resident, t->end[a] - 1)) * step_of(bias, a);
    }
    return sum;
}

/* How far row `row` of NA_TILE_2 tokens of a tile is from the first. */
NA_WORD int entry_of_row(const na_sm90_bias *bias, int row)
{
    return row / NA_TILE_1 * step_of(bias, 0) + row % NA_TILE_1 * step_of(bias, 1);
}
