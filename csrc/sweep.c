/* SPDX-License-Identifier: MIT */
/* Reading data sections: of one file, and of many in one pass. The contracts are in kvmstats.h and sweep.h. */
#include "sweep.h"

#include "read.h"

#include <errno.h>

#define LIKELY(condition) __builtin_expect(!!(condition), 1)
#define MAX_COUNT (SIZE_MAX / 16) /* of values in a read: pread takes no more than SSIZE_MAX bytes */

/* ---- one file */

/*
 * Continue a read whose first call returned n, unless that was all. Returns 0, or -errno; -ENODATA if the file ends
 * early, with the number of bytes it had in *got.
 */
static int finish_read(int fd, void *to, size_t wanted, uint64_t position, int64_t n, uint64_t *got)
{
    size_t done = 0;

    for (;;) {
        if (n < 0 && n != -EINTR)
            return (int)n;
        if (n > 0)
            done += (size_t)n;
        if (done == wanted)
            return 0;
        if (n == 0) {
            *got = done;
            return -ENODATA;
        }
        n = pread_once(fd, (char *)to + done, wanted - done, position + done);
    }
}

static int read_values(const struct kvmstats_source *source, uint64_t position, uint64_t count, uint64_t *to,
                       uint64_t *got)
{
    if (count > MAX_COUNT)
        return -EOVERFLOW;
    size_t wanted = (size_t)count * source->value_size;
    int64_t n = pread_once(source->fd, to, wanted, position);
    int status = n == (int64_t)wanted ? 0 : finish_read(source->fd, to, wanted, position, n, got);
    if (status == 0 && (source->value_size != 8 || source->swapped))
        kvmstats_copy_values(to, source->value_size, source->swapped, count, to);
    return status;
}

int kvmstats_read(struct kvmstats_source *source)
{
    return read_values(source, source->position, source->count, source->values, &source->got);
}

/* ---- one pass over many */

static void clear(uint64_t *row, uint64_t width)
{
    for (uint64_t i = 0; i < width; ++i)
        row[i] = 0;
}

/* What a sweep does after a read that returned `status`. Returns whether the file failed. */
static int settle(struct kvmstats_file *file, int status, uint64_t *row, uint64_t number)
{
    if (status == 0)
        return 0;
    file->failed_at = number;
    /* Last, so that a thread that sees the error sees the other fields too. */
    __atomic_store_n(&file->error, -status, __ATOMIC_RELEASE);
    clear(row, file->width); /* the read may have failed halfway */
    return 1;
}

/* Read a file of any kind into a row. Returns whether it failed. */
static int read_row(struct kvmstats_file *file, uint64_t *row, uint64_t *scratch, uint64_t number)
{
    const uint32_t *gather = file->gather;

    if (file->error) {
        clear(row, file->width); /* an earlier lap of the ring may have used the slot */
        return 0;
    }
    int status = read_values(file->source, file->position, file->count, gather ? scratch : row, &file->got);
    if (status == 0 && gather)
        for (uint64_t i = 0; i < file->width; ++i)
            row[i] = scratch[gather[i]];
    return settle(file, status, row, number);
}

/* Whether the row is what is read, as it is: 8-byte values of this machine's byte order, all of them. */
static int is_plain(const struct kvmstats_file *file)
{
    return !file->error && !file->gather && file->source->value_size == 8 && !file->source->swapped &&
           file->count <= MAX_COUNT;
}

int kvmstats_sweep_part(struct kvmstats_file *files, uint64_t begin, uint64_t end, uint64_t *scratch, uint64_t slot,
                        uint64_t number)
{
    int failed = 0;

    for (uint64_t i = begin; i < end; ++i) {
        struct kvmstats_file *file = &files[i];
        uint64_t *row = file->row + slot * file->step;
        if (!LIKELY(is_plain(file))) {
            failed += read_row(file, row, scratch, number);
            continue;
        }
        /* The common kind in a straight line, without a function that returns between two system calls. */
        size_t wanted = (size_t)file->count * 8;
        int64_t n = pread_once(file->source->fd, row, wanted, file->position);
        if (!LIKELY(n == (int64_t)wanted)) {
            int status = finish_read(file->source->fd, row, wanted, file->position, n, &file->got);
            failed += settle(file, status, row, number);
        }
    }
    return failed;
}

int kvmstats_lock(struct kvmstats_sweep *sweep, uint64_t owner)
{
    uint64_t none = 0;
    int taken = __atomic_compare_exchange_n(&sweep->owner, &none, owner, 0, __ATOMIC_ACQUIRE, __ATOMIC_RELAXED);
    return taken ? 0 : -EBUSY;
}

void kvmstats_unlock(struct kvmstats_sweep *sweep, uint64_t owner)
{
    __atomic_compare_exchange_n(&sweep->owner, &owner, 0, 0, __ATOMIC_RELEASE, __ATOMIC_RELAXED);
}

int kvmstats_sweep(struct kvmstats_sweep *sweep)
{
    if (kvmstats_lock(sweep, 1))
        return -EBUSY;
    if (sweep->failed)
        for (uint64_t i = 0; i < sweep->num_files; ++i)
            sweep->files[i].error = 0;
    int failed = kvmstats_sweep_part(sweep->files, 0, sweep->num_files, sweep->scratch, 0, 0);
    sweep->failed = (uint32_t)failed;
    kvmstats_unlock(sweep, 1);
    return failed;
}
