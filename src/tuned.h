/* SPDX-License-Identifier: MIT
 * What tuning has found: a bounded list of records in memory, as text, and as a file for each
 * device. */
#ifndef NATTEN_TUNED_H
#define NATTEN_TUNED_H

#include "core/kernel.h"
#include "natten.h"

typedef struct na_record {
    uint64_t digest[2]; /* of the problem's bytes, the kernel's name and the device's */
    natten_tuned tuned;
    char device[64];
    char choice[80]; /* in words: a number whose words are others is not believed */
    char problem[120];
} na_record;

/* Fills in all but `tuned` and `choice`, from the plan of choice 0. */
void na_record_init(na_record *record, const natten_plan *plan, const char *device);

/* Completes a record; 0: nothing is remembered for its digest. */
int na_tuned_find(na_record *record);
void na_tuned_keep(const na_record *record);

/* What natten_tuned_import and natten_tuned_clear do to the list. */
natten_status na_tuned_read(const char *text);
void na_tuned_clear(void);

/* Adds what the device's files hold to what is remembered; later calls do nothing. */
void na_tuned_load(const char *device);

/* Writes what is remembered for a device, and what its file held besides; 0 if it could not be. */
int na_tuned_save(const char *device);

#endif
