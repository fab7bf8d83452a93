/* SPDX-License-Identifier: MIT */
/*
 * series.h - what is worked out over all sweeps: each statistic by itself, its changes, rates, resets and sums
 *
 * A series is one statistic of several files, sweep by sweep; a table is the series of the same files and sweeps. Their
 * values may lie between others, as in the rows that a run fills. All series of a table are worked out in one pass,
 * which fetches each cache line from memory once, however many series have values in it.
 *
 * Results are the same on every machine: u64 modulo 2^64, and IEEE doubles, each operation rounded to nearest.
 */
#ifndef KVMSTATS_SERIES_H
#define KVMSTATS_SERIES_H

#include <stdint.h>

/* ---- cdef: begin ---- */

struct kvmstats_series {
    const uint64_t *values; /* of the first file in the first sweep */
    uint64_t sweep_step;    /* in u64: from a sweep to the next */
    uint64_t file_step;     /* in u64: from a file to the next */
    uint64_t width;         /* values of a file, side by side: 1, or the buckets of a histogram */
    uint32_t grows;         /* 1: what fell was cleared and counts from 0 again, a histogram as a whole; 0: signed */
    uint32_t overflowed;    /* set by kvmstats_totals: 1 if the sum of one that grows is 2^64 or more */
    double divide;          /* for kvmstats_rates: the scale of the values is multiply / divide */
    double multiply;
    void *out; /* in the order of sweeps, files and buckets, without gaps */
};

struct kvmstats_table {
    struct kvmstats_series *series;
    uint64_t num_series;
    uint64_t sweeps;
    uint64_t files;
    uint64_t tile;       /* about how many (sweep, file) are worked on at once: what they have should fit the cache */
    const int64_t *time; /* ns at the start of each sweep; for kvmstats_rates, else NULL */
};

/*
 * All of these read each series at [0, (sweeps - 1) * sweep_step + (files - 1) * file_step + width) from its values and
 * prefetch beyond; `out` must not overlap with that.
 *
 * They return 0, or -EOVERFLOW without having written anything if there are not so many addresses. They allocate
 * nothing, need some 20 KiB of stack, and keep no pointer. Any thread, also on the same values.
 */

/* The values as they are: `out` is u64 [sweeps][files][width]. */
int kvmstats_gather(const struct kvmstats_table *table);

/*
 * The change from each sweep to the next: `out` is u64 [sweeps - 1][files][width]. Of what grows it is the new value
 * where it fell; of others the difference modulo 2^64, to be read as signed.
 */
int kvmstats_deltas(const struct kvmstats_table *table);

/*
 * The change per second: `out` is double [sweeps - 1][files][width]. Change / (seconds * divide) * multiply, each step
 * rounded; NaN between two sweeps of the same ns.
 */
int kvmstats_rates(const struct kvmstats_table *table);

/* Whether a value fell that grows, or one in a histogram: `out` is uint8_t [sweeps - 1][files], 1 or 0. */
int kvmstats_resets(const struct kvmstats_table *table);

/* The sum of the changes over all sweeps: `out` is u64 [files][width], modulo 2^64; see `overflowed`. */
int kvmstats_totals(const struct kvmstats_table *table);

/* ---- cdef: end ---- */

#endif
