/* SPDX-License-Identifier: MIT */
#ifndef NATTEN_CORE_ROLES_H
#define NATTEN_CORE_ROLES_H

#include "natten.h"

/* Sets of roles: an op cannot do without `needs`, writes some of `writes` (`usual` is what it
 * writes unless told otherwise) and reads `may` if it is there. */
typedef struct na_op_roles {
    uint32_t needs, writes, usual, may;
} na_op_roles;

extern const na_op_roles na_roles_of[NATTEN_OPS];

/* Additional tokens have one axis whatever the rank of the map. */
int na_role_is_additional(natten_role role);

#endif
