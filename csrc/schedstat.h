/* SPDX-License-Identifier: MIT */
/*
 * schedstat.h - what the scheduler counts of a thread: /proc/PID/task/TID/schedstat
 *
 * One line of text, "%llu %llu %lu\n" (fs/proc/base.c, proc_pid_schedstat; Documentation/scheduler/sched-stats.rst):
 *
 *   run_ns      how long the thread ran. Of a thread that is running it is brought up to date at scheduler ticks.
 *   wait_ns     how long it was runnable and waited for a processor. Added when the wait ends.
 *   timeslices  how often it was given a processor.
 *
 * There with CONFIG_SCHED_INFO; "0 0 0\n" where that is switched off at run time. Reading fails with ESRCH once the
 * thread has ended.
 */
#ifndef KVMSTATS_SCHEDSTAT_H
#define KVMSTATS_SCHEDSTAT_H

#include <stddef.h>
#include <stdint.h>

/* ---- cdef: begin ---- */

/* value_size of a kvmstats_source that is such a text, whose position is 0 and whose count is: */
#define KVMSTATS_SCHEDSTAT 0
#define KVMSTATS_SCHEDSTAT_VALUES 3

/*
 * Parse a whole text: three decimal numbers, a blank between them, a newline at the end and nothing else.
 *
 * Returns 0; or -EBADMSG for any other text and -EOVERFLOW for a number above 2^64 - 1, and leaves the values alone.
 * Allocates nothing, keeps no pointer. Any thread.
 */
int kvmstats_parse_schedstat(const char *text, size_t size, uint64_t *values);

/* ---- cdef: end ---- */

#endif
