/* SPDX-License-Identifier: MIT */
/*
 * run.h - sweeps on a schedule
 *
 * Tick t is due at start + t * interval. A late tick is taken late; ticks that were overtaken in the meantime are
 * counted as missed, so at any moment taken + missed is the number of ticks so far, from first_tick on. A run that is
 * given the start of another, and as its first tick the one after the other's last, goes on with its schedule: what was
 * overtaken between the two is missed, and so counted.
 *
 * The sweeps are kept in a ring of `depth` chunks of `chunk` sweeps. Sweep j of chunk c is slot (c % depth) * chunk + j
 * of every row and of time, sweep_ns and tick. A reader takes the chunks in order: chunk c may be read once
 * kvmstats_ready returns more than c, and is given back by kvmstats_release(run, c + 1). While the ring is full, ticks
 * are missed, and also counted as overruns; with interval 0 there are no ticks to miss, and the run waits.
 */
#ifndef KVMSTATS_RUN_H
#define KVMSTATS_RUN_H

#include "sweep.h"

/* ---- cdef: begin ---- */

#define KVMSTATS_MAX_THREADS 64

enum kvmstats_wait {
    KVMSTATS_WAIT_SLEEP,  /* clock_nanosleep: no processor time; late by the timer's and the scheduler's latency */
    KVMSTATS_WAIT_SPIN,   /* reads the clock until the tick is due: exact, and uses a processor */
    KVMSTATS_WAIT_HYBRID, /* sleeps, and spins for as long as sleeps end late; less where others want the processor */
};

struct kvmstats_chunk {
    uint64_t first;      /* number of its first sweep, counted from the start of the run */
    uint64_t used;       /* sweeps in it */
    uint64_t missed;     /* ticks missed before each of its sweeps, since the sweep before; the sum */
    uint64_t overruns;   /* those of `missed` that the ring had no room for */
    int64_t wall_offset; /* kvmstats_wall_offset at its first sweep */
};

struct kvmstats_run {
    struct kvmstats_file *files; /* used by nobody else meanwhile; rows of depth * chunk slots */
    uint64_t num_files;
    uint64_t *scratch; /* scratch_size values for each of `threads`; NULL if no file gathers */
    uint64_t scratch_size;
    int64_t interval; /* ns; 0: as fast as possible */
    uint64_t ticks;   /* of the schedule, from tick 0 on; the run ends after the last */
    int64_t duration; /* ns from `start`, after which the run ends too; 0: no limit */
    int64_t spin_ns;  /* of KVMSTATS_WAIT_HYBRID, for one tick; at most: csrc/pace.h */
    int32_t wait;     /* enum kvmstats_wait */
    int32_t priority; /* kvmstats_start: that of SCHED_FIFO, from 1 on; 0: the caller's policy and priority */
    uint32_t threads;
    int32_t strict;            /* 1: the run ends when the first file fails; 0: when the last one has */
    int32_t event_fd;          /* an eventfd that is signalled for each chunk that is ready and at the end, or -1 */
    const unsigned long *cpus; /* kvmstats_start: the processors to run on, a bit each; NULL: those of the caller */
    uint64_t cpu_words;
    uint64_t depth;
    uint64_t chunk;
    struct kvmstats_chunk *chunks; /* depth */
    int64_t *time;                 /* depth * chunk: CLOCK_MONOTONIC at the start of the sweep, ns */
    int64_t *sweep_ns;             /* depth * chunk: how long it took */
    uint64_t *tick;                /* depth * chunk: its tick */
    uint64_t first_tick;           /* the run begins with it; those before it are another run's */
    int64_t start;                 /* when tick 0 is due, or was; 0: now, which the run then sets */
    uint64_t taken;                /* set by the run: sweeps */
    uint64_t missed, overruns;     /* set by the run: totals, including ticks after the last sweep */
    uint64_t head;                 /* set by the run: chunks that are ready */
    uint64_t tail;                 /* set by kvmstats_release: chunks given back */
    uint32_t stop;                 /* set by kvmstats_stop */
    int32_t status;                /* set at the end: what kvmstats_run returned */
    uint32_t ended;                /* set at the end, when everything else of the run has been set */
    uint32_t joinable;             /* set by kvmstats_start, cleared by kvmstats_join */
    uintptr_t thread;              /* set by kvmstats_start */
};

/*
 * Do the run, in this thread and threads - 1 more, which end with it and block all signals. For that time this thread's
 * timer slack is 1 ns.
 *
 * Returns 0 when it ends (the last tick, the duration, kvmstats_stop, no file left, or strict and a file failed), or
 * -errno if a thread could not be created. Allocates nothing itself; pthread_create allocates the stacks of the other
 * threads. Any thread; a struct is for one run at a time. Blocks.
 */
int kvmstats_run(struct kvmstats_run *run);

/*
 * Do the run in a new thread, in which all signals are blocked; it has the priority, and so have the other threads of
 * the run, which inherit it. The struct and all that it points to must stay until
 * kvmstats_join has returned; after a fork there is no such thread in the child, which clears `joinable`.
 *
 * Returns 0, or -errno if the thread could not be created: -EPERM if it may not have the priority, -EINVAL if there is
 * no such. Allocates nothing itself; pthread_create allocates a stack. Any thread.
 */
int kvmstats_start(struct kvmstats_run *run);

/*
 * Wait until more than `chunks` chunks are ready or the run has ended, but no longer than timeout_ms, and not once a
 * signal was handled. Needs an event_fd that does not block.
 *
 * Returns 1 if either is so, or 0. Allocates nothing. One thread at a time: the reader. Blocks.
 */
int kvmstats_wait(struct kvmstats_run *run, uint64_t chunks, int timeout_ms);

/* Wait for the thread of kvmstats_start to end; does nothing if there is none. Allocates nothing. Any thread. Blocks. */
void kvmstats_join(struct kvmstats_run *run);

/* End the run within 20 ms plus one sweep, or before it starts. Allocates nothing, never waits. Any thread. */
void kvmstats_stop(struct kvmstats_run *run);

/* Returns how many chunks have been completed. Allocates nothing, never waits. Any thread. */
uint64_t kvmstats_ready(const struct kvmstats_run *run);

/*
 * Give back the first `chunks` chunks, counted from the start of the run; ignored if fewer are ready.
 * Allocates nothing, never waits. One thread at a time: the reader.
 */
void kvmstats_release(struct kvmstats_run *run, uint64_t chunks);

/*
 * Returns what must be added to CLOCK_MONOTONIC for CLOCK_REALTIME, in ns. The two cannot be read at once; of some tries
 * the one counts in which the least time passed. Allocates nothing, never waits. Any thread.
 */
int64_t kvmstats_wall_offset(void);

/* ---- cdef: end ---- */

#endif
