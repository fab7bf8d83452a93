/* SPDX-License-Identifier: MIT */
/*
 * sweep.h - many stats files in one pass
 *
 * A sweep reads the data section of every file once, with one pread(2) each. A row is what a sweep keeps of one file:
 * `width` values, either all that were read or those that `gather` selects. Sweep s of a run writes the row of a file
 * at row + s * step, so the rows of the files of one kind form one array (sweeps, files, values).
 */
#ifndef KVMSTATS_SWEEP_H
#define KVMSTATS_SWEEP_H

#include "kvmstats.h"

/* ---- cdef: begin ---- */

struct kvmstats_file {
    const struct kvmstats_source *source; /* fd, value_size, swapped; the fd is read from there at each read */
    uint64_t position;                    /* in the file, of the first value that is read */
    uint64_t count;                       /* of values that are read */
    const uint32_t *gather;               /* indices of those that form the row; NULL: all of them */
    uint64_t width;                       /* of the row */
    uint64_t *row;
    uint64_t step;
    uint64_t failed_at; /* number of the sweep that failed, counted from the start of the run */
    uint64_t got;       /* with error ENODATA: how many bytes the file still had */
    int32_t error;      /* errno, once the file has failed: a run then writes rows of 0, kvmstats_sweep tries again */
};

struct kvmstats_sweep {
    struct kvmstats_file *files;
    uint64_t num_files;
    uint64_t *scratch; /* scratch_size values per thread, for files that gather; NULL if none does */
    uint64_t scratch_size;
    uint64_t owner;  /* see kvmstats_lock; 0: none */
    uint32_t failed; /* number of files that failed in the last kvmstats_sweep */
};

/*
 * Reserve the files and scratch of a sweep for one owner, any number from 2 on. kvmstats_sweep does so itself, as owner
 * 1; a run over the same files does not, so whoever starts one holds the lock until the run has ended.
 *
 * Returns 0, or -EBUSY if it has an owner. Allocates nothing, never waits. Any thread, also on the same struct.
 */
int kvmstats_lock(struct kvmstats_sweep *sweep, uint64_t owner);

/* Undo kvmstats_lock; does nothing if the owner is another. Allocates nothing. Any thread, also on the same struct. */
void kvmstats_unlock(struct kvmstats_sweep *sweep, uint64_t owner);

/*
 * Read every file once, into slot 0 of its row. Files that failed before are tried again.
 *
 * Returns how many files failed (`error` says why, their rows are 0), or -EBUSY if the struct has an owner.
 * Allocates nothing. Any thread, also on the same struct: all but one get -EBUSY.
 */
int kvmstats_sweep(struct kvmstats_sweep *sweep);

/* ---- cdef: end ---- */

#endif
