/* SPDX-License-Identifier: MIT */
/*
 * fuzz_series.c - tables of any shape and values against the contract in csrc/series.h: gather, deltas, rates, resets and
 * totals are those of the plainest loops, to the last bit. Link with series.c.
 *
 * The input says the shape, then a byte or more for each value. What is read and what is written is allocated in just
 * the size that the manual gives it.
 */
#include "fuzz.h"
#include "plain_series.h"

#include <errno.h>

enum { MOST_SERIES = 3, MOST_SWEEPS = 20, MOST_FILES = 12, MOST_WIDTH = 20 };

typedef int (*function)(const struct kvmstats_table *);

static int64_t times[MOST_SWEEPS];
static struct kvmstats_series series[MOST_SERIES];
static uint64_t *values[MOST_SERIES]; /* of each series, as large as what it may read */

static int is_same(double a, double b)
{
    return isnan(a) ? isnan(b) : memcmp(&a, &b, sizeof a) == 0;
}

static void check(const struct kvmstats_table *table, function work, uint64_t rows, uint64_t item)
{
    const uint64_t files = table->files, changes = table->sweeps ? table->sweeps - 1 : 0;
    uint8_t *outs[MOST_SERIES];

    for (uint64_t k = 0; k < table->num_series; ++k) {
        uint64_t size = rows * files * (item == 1 ? 1 : series[k].width * 8);
        series[k].out = outs[k] = allocate((size_t)size);
        memset(outs[k], 0xcc, (size_t)size);
        series[k].overflowed = 0xcc;
    }
    PROMISE(work(table) == 0);
    for (uint64_t k = 0; k < table->num_series; ++k) {
        const struct kvmstats_series *one = &series[k];
        const uint64_t *out = one->out;
        for (uint64_t s = 0; s < rows && work != kvmstats_totals; ++s)
            for (uint64_t f = 0; f < files; ++f) {
                if (work == kvmstats_resets) {
                    PROMISE(outs[k][s * files + f] == was_cleared(one, s, f));
                    continue;
                }
                for (uint64_t i = 0; i < one->width; ++i, ++out) {
                    uint64_t change = work == kvmstats_gather ? value(one, s, f)[i] : change_of(one, s, f, i);
                    double rate;
                    memcpy(&rate, out, sizeof rate);
                    PROMISE(work == kvmstats_rates ? is_same(rate, rate_of(one, times + s, change)) : *out == change);
                }
            }
        uint32_t overflowed = 0;
        for (uint64_t j = 0; j < files * one->width && work == kvmstats_totals; ++j) {
            uint64_t sum = 0;
            for (uint64_t s = 0; s < changes; ++s) {
                uint64_t change = change_of(one, s, j / one->width, j % one->width);
                sum += change;
                overflowed |= one->grows && sum < change;
            }
            PROMISE(out[j] == sum);
        }
        PROMISE(work != kvmstats_totals || one->overflowed == overflowed);
        free(outs[k]);
    }
}

/* A shape that has no addresses is refused, and nothing is written. Others are too large to be tried. */
static void check_huge(struct input *input)
{
    static const function functions[] = {kvmstats_gather, kvmstats_deltas, kvmstats_rates, kvmstats_resets,
                                         kvmstats_totals};
    uint64_t written = 7;
    struct kvmstats_series one = {.grows = 1, .divide = 1, .multiply = 1, .out = &written};
    struct kvmstats_table table = {.series = &one, .num_series = 1, .tile = 64, .time = times};

    table.sweeps = take(input, 8);
    table.files = take(input, 8);
    one.sweep_step = take(input, 8);
    one.file_step = take(input, 8);
    one.width = take(input, 8);
    unsigned __int128 sweeps = table.sweeps ? table.sweeps : 1, files = table.files ? table.files : 1;
    unsigned __int128 end = (sweeps - 1) * one.sweep_step, more = (files - 1) * one.file_step, size = sweeps * files;
    int has_no_addresses = __builtin_add_overflow(end, more, &end) || __builtin_add_overflow(end, one.width, &end) ||
                           __builtin_mul_overflow(size, one.width, &size) || end > SIZE_MAX / 8 || size > SIZE_MAX / 8;
    for (size_t i = 0; i < sizeof functions / sizeof *functions && has_no_addresses; ++i)
        PROMISE(functions[i](&table) == -EOVERFLOW && written == 7);
}

/* What follows a value: mostly a bit more, now and then less or something at an edge. */
static uint64_t follow(struct input *input, uint64_t before)
{
    uint64_t how = take(input, 1);
    switch (how) {
    case 255:
        return UINT64_MAX;
    case 254:
        return 0;
    case 253:
        return before >> 1;
    case 252:
        return (uint64_t)INT64_MAX + 1;
    case 251:
        return take(input, 8);
    case 250:
        return before + take(input, 4);
    case 249:
        return before - 1;
    default:
        return before + how;
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static const double scales[] = {1, 1e9, 1e-9, 1024, 1e300, 5e-324, 3, 0x1p-1022};
    struct input input = {data, data + size};
    struct kvmstats_table table = {.series = series, .time = times};

    uint64_t sweeps = take(&input, 1);
    if (sweeps == 255) {
        check_huge(&input);
        return 0;
    }
    table.sweeps = sweeps % (MOST_SWEEPS + 1);
    table.files = take(&input, 1) % (MOST_FILES + 1);
    table.tile = take(&input, 2);
    table.num_series = take(&input, 1) % (MOST_SERIES + 1);
    for (uint64_t s = 0; s < table.sweeps; ++s)
        times[s] = (int64_t)((s ? (uint64_t)times[s - 1] : 0) + take(&input, take(&input, 1) % 9));
    for (uint64_t k = 0; k < table.num_series; ++k) {
        struct kvmstats_series *one = &series[k];
        uint64_t shape = take(&input, 1), width = take(&input, 1);
        one->width = width < 128 ? 1 : 1 + width % MOST_WIDTH;
        one->file_step = one->width + shape % 4;
        one->sweep_step = table.files * one->file_step + shape / 4 % 4;
        one->grows = shape / 16 % 2;
        one->divide = scales[take(&input, 1) % 8];
        one->multiply = scales[take(&input, 1) % 8];
        uint64_t count = 0;
        if (table.sweeps && table.files)
            count = (table.sweeps - 1) * one->sweep_step + (table.files - 1) * one->file_step + one->width;
        values[k] = allocate((size_t)count * 8);
        for (uint64_t i = 0; i < count; ++i)
            values[k][i] = follow(&input, i < one->sweep_step ? 1000 : values[k][i - one->sweep_step]);
        one->values = values[k];
    }
    uint64_t changes = table.sweeps ? table.sweeps - 1 : 0;
    check(&table, kvmstats_gather, table.sweeps, 8);
    check(&table, kvmstats_deltas, changes, 8);
    check(&table, kvmstats_rates, changes, 8);
    check(&table, kvmstats_resets, changes, 1);
    check(&table, kvmstats_totals, 1, 8);
    for (uint64_t k = 0; k < table.num_series; ++k)
        free(values[k]);
    return 0;
}
