/* SPDX-License-Identifier: MIT */
/* plain_series.h - what csrc/series.h promises of one value, written as plainly as can be, for the tests and the fuzzer. */
#ifndef PLAIN_SERIES_H
#define PLAIN_SERIES_H

#include "series.h"

#include <math.h>

static const uint64_t *value(const struct kvmstats_series *one, uint64_t sweep, uint64_t file)
{
    return one->values + sweep * one->sweep_step + file * one->file_step;
}

static int was_cleared(const struct kvmstats_series *one, uint64_t sweep, uint64_t file)
{
    int fell = 0;

    for (uint64_t i = 0; i < one->width; ++i)
        fell |= value(one, sweep + 1, file)[i] < value(one, sweep, file)[i];
    return fell && one->grows;
}

static uint64_t change_of(const struct kvmstats_series *one, uint64_t sweep, uint64_t file, uint64_t i)
{
    uint64_t after = value(one, sweep + 1, file)[i];

    return was_cleared(one, sweep, file) ? after : after - value(one, sweep, file)[i];
}

/* Of a change from times[0] to times[1]. */
static double rate_of(const struct kvmstats_series *one, const int64_t *times, uint64_t change)
{
    int64_t ns = (int64_t)((uint64_t)times[1] - (uint64_t)times[0]);
    double seconds = ns ? (double)ns / 1e9 : (double)NAN;

    return (one->grows ? (double)change : (double)(int64_t)change) / (seconds * one->divide) * one->multiply;
}

#endif
