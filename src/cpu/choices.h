/* SPDX-License-Identifier: MIT
 * What natten_problem.choice means to the vector kernels: ways to cut the map, then fewer threads.
 * The list depends on the problem and the instruction set alone, so that a choice made by one
 * process means the same to another. */
#ifndef NATTEN_CPU_CHOICES_H
#define NATTEN_CPU_CHOICES_H

#include "cpu/tiles.h"

/* Makes the geometry of the plan's choice, at first one of `rows` rows, and notes in the plan how
 * many choices there are and what this one is. A choice there is not is the plan's maker's to
 * reject: it gets the first. `most`: rows the kernel can do. NULL: no memory. */
na_geometry *na_choose(natten_plan *plan, int lanes, int half, int rows, int most);

#endif
