/* SPDX-License-Identifier: MIT */
/* Changes, rates, resets and sums: pure functions over values. The contracts are in series.h. */
#if defined(__i386__) && !defined(__SSE2_MATH__)
/* The x87 rounds otherwise, and does not work on two doubles at once. Every x86 with KVM has SSE2. */
#ifdef __clang__
#error "compile with -msse2: the results are those of IEEE doubles"
#endif
#pragma GCC target("sse2,fpmath=sse")
#endif

#include "series.h"

#include <errno.h>
#include <math.h>
#include <string.h>

#define ALWAYS_INLINE static inline __attribute__((always_inline))

enum {
    LINE = 8,            /* u64 in a cache line */
    LARGEST_TILE = 2048, /* 16 KiB of stack for the seconds */
    LEAST_SWEEPS = 8,    /* in a tile of some of the files: the sweep that it starts from is read for two tiles */
};

enum what { GATHER, DELTAS, RATES, RESETS, TOTALS };

/* Some files, and the changes from sweep i to i + 1 for i in [sweep, sweep + sweeps). To gather: the values of sweep i. */
struct tile {
    uint64_t sweep, sweeps;
    uint64_t file, files;
    double seconds[LARGEST_TILE]; /* how long each change took */
};

/*
 * A series in a tile, as [rows][runs] of `count` values that are `step` apart. A run is the buckets of a histogram in a
 * file; of a statistic with one value all files of a sweep, or of all sweeps where there is no gap between them.
 */
struct part {
    struct kvmstats_series *series;
    const struct tile *tile;
    const uint64_t *values;
    uint64_t rows, runs, count, step;
    uint64_t out;      /* where the results start */
    uint64_t row_size; /* how many there are in a sweep */
    uintptr_t ahead;   /* bytes from a value to the same place of the next tile */
};

/* For the conversion of u64 to double; see changes.h. */
static const uint64_t LOW = 0x4330000000000000, HIGH = 0x4530000000000000, SIGNED_HIGH = 0x4530000080000000;
static const double POWERS = 0x1.00000001p84, SIGNED_POWERS = 0x1.00000801p84;

/* ---- where values lie */

/* The next tile may lie where no processor expects it. Beyond the last there may be no memory, which is ignored. */
ALWAYS_INLINE void prefetch(const uint64_t *value, uintptr_t ahead)
{
    __builtin_prefetch((const void *)((uintptr_t)value + ahead));
}

ALWAYS_INLINE void prefetch_run(const uint64_t *run, uint64_t count, uintptr_t ahead)
{
    for (uint64_t i = 0; i < count; i += LINE)
        prefetch(run + i, ahead);
}

ALWAYS_INLINE const uint64_t *find_run(const struct part *part, uint64_t row, uint64_t run)
{
    return part->values + row * part->series->sweep_step + run * part->series->file_step;
}

/* ---- the loops, for each number of lanes */

#define JOIN_BOTH(name, number) name##_##number
#define JOIN(name, number) JOIN_BOTH(name, number)
#define NAMED(name) JOIN(name, LANES)

/* Twice as many at once are worth it for rates, which are the most work. */
#if defined(__x86_64__) && !defined(KVMSTATS_TWO_LANES)
#define HAS_FOUR_LANES 1
#define LANES 4
#define TARGET __attribute__((target("avx2")))
#include "changes.h"
#undef LANES
#undef TARGET
#endif

/* 16 bytes, which every 64-bit machine works on at once; others take them apart. */
#define LANES 2
#define TARGET
#include "changes.h"

/* ---- one part */

static void change_deltas(const struct part *part)
{
    if (part->series->width > 1)
        change_part(part, 0, 1, 1, 0);
    else if (part->step == 1)
        change_part(part, 0, 0, 1, 0);
    else
        change_part(part, 0, 0, part->step, 0);
}

static void change_rates(const struct part *part)
{
#ifdef HAS_FOUR_LANES
    if (part->count >= 4 && __builtin_cpu_supports("avx2")) {
        write_rates_4(part);
        return;
    }
#endif
    write_rates(part);
}

static void gather_part(const struct part *part)
{
    for (uint64_t row = 0; row < part->rows; ++row) {
        uint64_t *out = (uint64_t *)part->series->out + part->out + row * part->row_size;
        for (uint64_t run = 0; run < part->runs; ++run) {
            const uint64_t *value = find_run(part, row, run);
            for (uint64_t i = 0; i < part->count; ++i, value += part->step) {
                prefetch(value, part->ahead);
                *out++ = *value;
            }
        }
    }
}

ALWAYS_INLINE int any_fell(const struct part *part, uint64_t step)
{
    const uint64_t apart = part->series->sweep_step;
    words fallen = {0};

    for (uint64_t row = 0; row < part->rows; ++row)
        for (uint64_t run = 0; run < part->runs; ++run) {
            const uint64_t *before = find_run(part, row, run);
            uint64_t i = 0;
            if (step == 1)
                prefetch_run(before + apart, part->count, part->ahead);
            for (; i + LANES <= part->count; i += LANES, before += LANES * step) {
                for (uint64_t j = 0; j < LANES && step != 1; ++j)
                    prefetch(before + apart + j * step, part->ahead);
                fallen |= borrow(load(before, step), load(before + apart, step));
            }
            if (i < part->count) {
                prefetch(before + apart, part->ahead);
                fallen |= borrow(load(before, 0), load(before + apart, 0));
            }
        }
    return has_fallen(fallen);
}

/* Whether anything in a part was cleared. */
static int was_any_cleared(const struct part *part)
{
    if (!part->series->grows)
        return 0;
    return part->step == 1 ? any_fell(part, 1) : any_fell(part, part->step);
}

static int was_cleared(const struct kvmstats_series *series, const uint64_t *before)
{
    for (uint64_t i = 0; i < series->width; ++i)
        if (before[series->sweep_step + i] < before[i])
            return 1;
    return 0;
}

static void mark_part(const struct part *part)
{
    const struct kvmstats_series *series = part->series;
    const struct tile *tile = part->tile;
    const uint64_t files = tile->files, row = part->row_size / series->width;
    uint8_t *out = (uint8_t *)series->out + part->out / series->width;

    if (was_any_cleared(part))
        for (uint64_t i = 0; i < tile->sweeps; ++i)
            for (uint64_t file = 0; file < files; ++file)
                out[i * row + file] = was_cleared(series, find_run(part, i, file)) != 0;
    else if (row == files)
        memset(out, 0, (size_t)(tile->sweeps * files));
    else
        for (uint64_t i = 0; i < tile->sweeps; ++i)
            memset(out + i * row, 0, (size_t)files);
}

static void add_part(const struct part *part)
{
    struct kvmstats_series *series = part->series;
    const struct tile *tile = part->tile;
    const int any = was_any_cleared(part);
    /* Where nothing was cleared, all changes together are the last value less the first. */
    const uint64_t sweeps = any ? 1 : tile->sweeps;

    for (uint64_t i = 0; i < tile->sweeps; i += sweeps)
        for (uint64_t file = 0; file < tile->files; ++file) {
            const uint64_t *before = find_run(part, i, file), *after = before + sweeps * series->sweep_step;
            uint64_t *sums = (uint64_t *)series->out + (tile->file + file) * series->width;
            const int cleared = any && was_cleared(series, before);
            for (uint64_t j = 0; j < series->width; ++j) {
                uint64_t change = cleared ? after[j] : after[j] - before[j];
                sums[j] += change;
                series->overflowed |= series->grows && sums[j] < change;
            }
        }
}

/* ---- a table */

/* Whether all that is read and written has addresses. */
static int fits(const struct kvmstats_table *table)
{
    const uint64_t sweeps = table->sweeps ? table->sweeps : 1; /* there are sums without a sweep, too */
    const uint64_t files = table->files ? table->files : 1;

    for (uint64_t i = 0; i < table->num_series; ++i) {
        const struct kvmstats_series *series = &table->series[i];
        uint64_t in_sweeps, in_files, end, size;
        if (__builtin_mul_overflow(sweeps - 1, series->sweep_step, &in_sweeps) ||
            __builtin_mul_overflow(files - 1, series->file_step, &in_files) ||
            __builtin_add_overflow(in_sweeps, in_files, &end) || __builtin_add_overflow(end, series->width, &end) ||
            __builtin_mul_overflow(sweeps, files, &size) || __builtin_mul_overflow(size, series->width, &size) ||
            end > SIZE_MAX / 8 || size > SIZE_MAX / 8)
            return 0;
    }
    return 1;
}

static struct part find_part(const struct kvmstats_table *table, struct kvmstats_series *series,
                             const struct tile *tile, enum what what)
{
    const int is_whole = tile->files == table->files;
    const int has_gaps = series->sweep_step != table->files * series->file_step;
    struct part part = {.series = series, .tile = tile, .rows = tile->sweeps};

    part.values = series->values + tile->sweep * series->sweep_step + tile->file * series->file_step;
    part.out = (tile->sweep * table->files + tile->file) * series->width;
    part.row_size = table->files * series->width;
    part.runs = series->width > 1 ? tile->files : 1;
    part.count = series->width > 1 ? series->width : tile->files;
    part.step = series->width > 1 ? 1 : series->file_step;
    /* In rates the changes of a run have the same seconds, or each its own. */
    if (series->width == 1 && is_whole && !has_gaps && (what != RATES || table->files == 1)) {
        part.rows = 1;
        part.count *= tile->sweeps;
    }
    uint64_t ahead = tile->files * series->file_step;
    if (tile->file + tile->files == table->files) /* the next tile begins with the first file */
        ahead = tile->sweeps * series->sweep_step - tile->file * series->file_step;
    part.ahead = (uintptr_t)(ahead * 8);
    return part;
}

static void find_seconds(const struct kvmstats_table *table, struct tile *tile)
{
    for (uint64_t i = 0; i < tile->sweeps; ++i) {
        const int64_t *time = table->time + tile->sweep + i;
        int64_t ns = (int64_t)((uint64_t)time[1] - (uint64_t)time[0]);
        tile->seconds[i] = ns ? (double)ns / 1e9 : (double)NAN;
    }
}

static void work_on(const struct part *part, enum what what)
{
    if (what == GATHER)
        gather_part(part);
    else if (what == DELTAS)
        change_deltas(part);
    else if (what == RATES)
        change_rates(part);
    else if (what == RESETS)
        mark_part(part);
    else
        add_part(part);
}

static int work(const struct kvmstats_table *table, enum what what)
{
    const uint64_t results = table->sweeps && what != GATHER ? table->sweeps - 1 : table->sweeps;
    struct tile tile;

    if (!fits(table))
        return -EOVERFLOW;
    for (uint64_t i = 0; i < table->num_series && what == TOTALS; ++i) {
        table->series[i].overflowed = 0;
        memset(table->series[i].out, 0, (size_t)(table->files * table->series[i].width * 8));
    }
    if (table->files == 0)
        return 0;
    /* All files of some sweeps, or of at least LEAST_SWEEPS as many files as there is room for. */
    const uint64_t room = table->tile > LARGEST_TILE ? LARGEST_TILE : table->tile ? table->tile : 1;
    const uint64_t most = room > LEAST_SWEEPS ? room / LEAST_SWEEPS : 1;
    const uint64_t files = table->files < most ? table->files : most, sweeps = room / files;
    for (tile.sweep = 0; tile.sweep < results; tile.sweep += sweeps)
        for (tile.file = 0; tile.file < table->files; tile.file += files) {
            tile.sweeps = results - tile.sweep < sweeps ? results - tile.sweep : sweeps;
            tile.files = table->files - tile.file < files ? table->files - tile.file : files;
            if (what == RATES && tile.file == 0)
                find_seconds(table, &tile);
            for (uint64_t i = 0; i < table->num_series; ++i) {
                const struct part part = find_part(table, &table->series[i], &tile, what);
                work_on(&part, what);
            }
        }
    return 0;
}

int kvmstats_gather(const struct kvmstats_table *table)
{
    return work(table, GATHER);
}

int kvmstats_deltas(const struct kvmstats_table *table)
{
    return work(table, DELTAS);
}

int kvmstats_rates(const struct kvmstats_table *table)
{
    return work(table, RATES);
}

int kvmstats_resets(const struct kvmstats_table *table)
{
    return work(table, RESETS);
}

int kvmstats_totals(const struct kvmstats_table *table)
{
    return work(table, TOTALS);
}
