/* SPDX-License-Identifier: MIT
 * The least a test program needs. A test passes when all its checks hold; the last line that
 * unit_end prints is what `make test` adds up. */
#ifndef UNIT_H
#define UNIT_H

#include "natten.h"

/* Begins a test, and so ends the one before. */
void unit_test(const char *name);

#define CHECK(condition) unit_check((condition) != 0, __FILE__, __LINE__, #condition)
void unit_check(int holds, const char *file, int line, const char *what);

/* Fails the test at hand with a sentence. */
#if defined(__GNUC__)
__attribute__((format(printf, 1, 2)))
#endif
void unit_fail(const char *format, ...);

/* The test at hand cannot run here. */
void unit_skip(const char *why);

/* The latest error's text holds these words. */
int unit_error_has(const char *words);

/* Prints the counts; the exit status of the program. */
int unit_end(const char *program);

#endif
