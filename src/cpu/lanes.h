/* SPDX-License-Identifier: MIT
 * Lane tiles: which queries share a vector, and where the keys of its lanes lie. */
#ifndef NATTEN_CPU_LANES_H
#define NATTEN_CPU_LANES_H

#include "cpu/tiles.h"

/* Makes the geometry's lane tiles, whose number of heads side by side is settled. 0: no memory. */
int na_make_lane_tiles(na_geometry *geometry);

/* How many key heads should lie side by side: as few as make the best use of lanes, if their rows
 * fit one part and enough tasks are left for threads. */
int32_t na_choose_beside(const na_geometry *geometry, const natten_problem *problem);

#endif
