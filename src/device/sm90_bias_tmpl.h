/* SPDX-License-Identifier: MIT
 * A relative position bias in the Hopper kernels: scores, which are powers of two by now, and those
 * of pairs that do not meet -infinity, get the entry of their pair added (places: sm90_bias.h).
 *
 * Parameter: NA_COLUMNS, as in sm90_mask_tmpl.h. Gives add_bias_<columns>. */

NA_WORD void NA_JOIN(add_bias_, NA_COLUMNS)(const na_sm90_walk *p, const na_sm90_bias *bias,
                                            const seat *s, float *scores, int head, const int *at,
                                            int from)
{
    const int step = step_of(bias, 2);
    const int upper = NA_TILE_2 < 8 && s->column >= NA_TILE_2; /* of two rows in 8 columns */
#pragma unroll
    for (int r = 0; r < 2; r++) {
        int row = s->row + 8 * r;
        int place = first_entry(p, bias, s, row, at) +
                    (NA_SIDE ? head : head + row % NA_PACK) * bias->head + s->column * step;
        if (NA_POSITIONS)
            place += entry_of_row(bias, from / NA_TILE_2) - (upper ? NA_TILE_2 * step : 0);
        else
            place += from * step;
#pragma unroll
        for (int n = 0; n < NA_COLUMNS / 8; n++) {
            int along = 8 * n * step;
            if (NA_POSITIONS)
                along = NA_TILE_2 == 8 ? entry_of_row(bias, n)
                        : upper        ? entry_of_row(bias, 2 * n + 1)
                                       : entry_of_row(bias, 2 * n);
#pragma unroll
            for (int c = 0; c < 2; c++) {
                float *score = &scores[4 * n + 2 * r + c];
                uint16_t bits = na_load_2_bytes_if(bias->entries + (place + along + c * step),
                                                   *score > -na_infinity());
                float entry =
                    NA_DTYPE == NATTEN_F16 ? na_float_of_f16(bits) : na_float_of_bf16(bits);
                *score = na_fma(entry, 1.4426950408889634f, *score);
            }
        }
    }
}
