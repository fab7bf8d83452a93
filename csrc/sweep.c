/* SPDX-License-Identifier: MIT */
/* Reading data sections: of one file, and of many in one pass. The contracts are in kvmstats.h and sweep.h. */
#include "sweep.h"

#include <errno.h>
#include <unistd.h>

/* ---- one file */

/* Returns 0, or -errno; -ENODATA if the file ends early, with the number of bytes it had in *got. */
static int read_at(int fd, void *to, size_t wanted, uint64_t position, uint64_t *got)
{
    size_t done = 0;

    for (;;) {
        ssize_t n = pread(fd, (char *)to + done, wanted - done, (off_t)(position + done));
        if (n < 0) {
            if (errno == EINTR)
                continue;
            return -errno;
        }
        done += (size_t)n;
        if (done == wanted)
            return 0;
        if (n == 0) {
            *got = done;
            return -ENODATA;
        }
    }
}

static int read_values(const struct kvmstats_source *source, uint64_t position, uint64_t count, uint64_t *to,
                       uint64_t *got)
{
    if (count > SIZE_MAX / 16) /* pread takes no more than SSIZE_MAX bytes */
        return -EOVERFLOW;
    int status = read_at(source->fd, to, (size_t)count * source->value_size, position, got);
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

int kvmstats_sweep_part(struct kvmstats_file *files, uint64_t begin, uint64_t end, uint64_t *scratch, uint64_t slot,
                        uint64_t number)
{
    int failed = 0;

    for (uint64_t i = begin; i < end; ++i) {
        struct kvmstats_file *file = &files[i];
        uint64_t *row = file->row + slot * file->step;
        if (file->error) {
            clear(row, file->width); /* an earlier lap of the ring may have used the slot */
            continue;
        }
        const uint32_t *gather = file->gather;
        int status = read_values(file->source, file->position, file->count, gather ? scratch : row, &file->got);
        if (status) {
            file->failed_at = number;
            /* Last, so that a thread that sees the error sees the other fields too. */
            __atomic_store_n(&file->error, -status, __ATOMIC_RELEASE);
            clear(row, file->width); /* the read may have failed halfway */
            ++failed;
        } else if (gather) {
            for (uint64_t j = 0; j < file->width; ++j)
                row[j] = scratch[gather[j]];
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
