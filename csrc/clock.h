/* SPDX-License-Identifier: MIT */
/* clock.h - the clocks, in nanoseconds */
#ifndef KVMSTATS_CLOCK_H
#define KVMSTATS_CLOCK_H

#include <stdint.h>
#include <time.h>

enum { NS_PER_SECOND = 1000000000 };

static inline struct timespec to_timespec(int64_t ns)
{
    return (struct timespec){.tv_sec = (time_t)(ns / NS_PER_SECOND), .tv_nsec = (long)(ns % NS_PER_SECOND)};
}

static inline int64_t read_clock_ns(clockid_t clock)
{
    struct timespec now;
    clock_gettime(clock, &now);
    return (int64_t)now.tv_sec * NS_PER_SECOND + now.tv_nsec;
}

static inline int64_t now_ns(void)
{
    return read_clock_ns(CLOCK_MONOTONIC);
}

#endif
