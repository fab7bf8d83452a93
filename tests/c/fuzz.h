/* SPDX-License-Identifier: MIT */
/*
 * fuzz.h - what the fuzz targets share: promises, and an input that is taken apart number by number
 *
 * A target defines LLVMFuzzerTestOneInput, and aborts where the core breaks a promise of its manual. tests/fuzz.py builds
 * and runs all of them with libFuzzer.
 */
#ifndef FUZZ_H
#define FUZZ_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define PROMISE(expression) \
    do { \
        if (!(expression)) { \
            fprintf(stderr, "%s:%d: broken: %s\n", __FILE__, __LINE__, #expression); \
            abort(); \
        } \
    } while (0)

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* Memory of exactly that size, so that ASan sees what reaches beyond it. */
static inline void *allocate(size_t size)
{
    void *memory = malloc(size ? size : 1);
    if (!memory)
        exit(2);
    return memory;
}

struct input {
    const uint8_t *at, *end;
};

/* The next bytes as a number; 0 where the input has ended. */
static inline uint64_t take(struct input *input, unsigned bytes)
{
    uint64_t value = 0;
    for (unsigned i = 0; i < bytes && input->at < input->end; ++i)
        value = value << 8 | *input->at++;
    return value;
}

#endif
