/* SPDX-License-Identifier: MIT
 * What natten_problem.choice means to the vector kernels: ways to cut the map, then fewer threads.
 * The list depends on the problem, the instruction set and the processor, by whose name choices are
 * remembered: one made by one process means the same to another. */
#ifndef NATTEN_CPU_CHOICES_H
#define NATTEN_CPU_CHOICES_H

#include "cpu/tiles.h"

/* So many rows, and all else as it usually is. */
static inline na_cut na_usual_cut(int rows) { return (na_cut){rows, NA_PART, -1, 1, 1, -1}; }

/* Multiplications of a problem, borders and masks not looked at. */
double na_products(const natten_problem *problem);

/* Makes the geometry of the plan's choice, at first the usual one, and notes in the plan how many
 * choices there are and what this one is. A choice there is not is the plan's maker's to reject: it
 * gets the first. `most`: rows the kernel can do. NULL: no memory. */
na_geometry *na_choose(natten_plan *plan, int lanes, int half, na_cut usual, int most);

/* The same for kernels with cuts of their own, best first: notes how many choices there are,
 * threads included, and returns the number of the cut. */
int na_choose_cut(natten_plan *plan, int cuts);

/* Notes in the plan what its choice is: words for the cut, and threads. */
NA_PRINTF(2, 3) void na_describe_choice(natten_plan *plan, const char *format, ...);

#endif
