/* SPDX-License-Identifier: MIT */
/*
 * read.h - reading data sections, inline: one system call, one file, one pass over many
 *
 * Everything is inline, because the return of a function that made a system call is mispredicted: the kernel has
 * overwritten what returns are predicted by. The C library's pread returns too, and is a cancellation point. So where
 * the calling convention is given here, the system call is made in place; elsewhere pread is called.
 *
 * No sanitizer sees what such a system call writes: ASan would miss a read past the end of a buffer, TSan a race, and
 * MSan would take the values for uninitialised. So a build with a sanitizer calls pread, which they intercept. So does
 * one with KVMSTATS_LIBC_PREAD, in which the tests replace pread. valgrind sees every system call.
 */
#ifndef KVMSTATS_READ_H
#define KVMSTATS_READ_H

#include "schedstat.h"
#include "sweep.h"

#include <errno.h>
#include <unistd.h>

#if defined(KVMSTATS_LIBC_PREAD)
#elif defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__) /* gcc */
#define KVMSTATS_LIBC_PREAD
#elif defined(__has_feature) /* clang */
#if __has_feature(address_sanitizer) || __has_feature(memory_sanitizer) || __has_feature(thread_sanitizer)
#define KVMSTATS_LIBC_PREAD
#endif
#endif

#define LIKELY(condition) __builtin_expect(!!(condition), 1)
#define MAX_COUNT (SIZE_MAX / 16) /* of values in a read: pread takes no more than SSIZE_MAX bytes */
#define ALWAYS_INLINE static inline __attribute__((always_inline))

enum { CACHE_LINE = 64 };     /* bytes, at least; on machines with longer ones, some are prefetched twice */
enum { SCHEDSTAT_ROOM = 64 }; /* bytes: more than three numbers of 20 digits, their blanks and the newline */

/* ---- one system call */

/* pread(2). Returns the number of bytes read, or -errno. Allocates nothing; not a cancellation point where in place. */
static inline int64_t pread_once(int fd, void *to, size_t size, uint64_t position)
{
#if !defined(KVMSTATS_LIBC_PREAD) && defined(__x86_64__) && !defined(__ILP32__)
    register uint64_t r10 __asm__("r10") = position;
    int64_t result = 17; /* pread64: arch/x86/entry/syscalls/syscall_64.tbl */
    __asm__ volatile("syscall"
                     : "+a"(result)
                     : "D"((int64_t)fd), "S"(to), "d"(size), "r"(r10)
                     : "rcx", "r11", "memory");
    return result;
#elif !defined(KVMSTATS_LIBC_PREAD) && defined(__aarch64__) && !defined(__ILP32__)
    register int64_t x0 __asm__("x0") = fd;
    register void *x1 __asm__("x1") = to;
    register size_t x2 __asm__("x2") = size;
    register uint64_t x3 __asm__("x3") = position;
    register int64_t x8 __asm__("x8") = 67; /* pread64: include/uapi/asm-generic/unistd.h */
    __asm__ volatile("svc #0" : "+r"(x0) : "r"(x1), "r"(x2), "r"(x3), "r"(x8) : "memory");
    return x0;
#else
    ssize_t n = pread(fd, to, size, (off_t)position);
    return n < 0 ? -errno : n;
#endif
}

/* ---- one file */

/*
 * Continue a read whose first call returned n, unless that was all. Returns 0, or -errno; -ENODATA if the file ends
 * early, with the number of bytes it had in *got.
 */
static inline int finish_read(int fd, void *to, size_t wanted, uint64_t position, int64_t n, uint64_t *got)
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

/*
 * Read the schedstat of a thread, to its newline. Returns 0, or -errno; -ENODATA if there is no newline, with the
 * number of bytes it had in *got; -EBADMSG if it is longer than three numbers can be.
 */
static inline int read_schedstat(int fd, uint64_t *to, uint64_t *got)
{
    char text[SCHEDSTAT_ROOM];
    size_t done = 0;

    while (done == 0 || text[done - 1] != '\n') {
        if (done == sizeof text)
            return -EBADMSG;
        int64_t n = pread_once(fd, text + done, sizeof text - done, done);
        if (n == 0) {
            *got = done;
            return -ENODATA;
        }
        if (n > 0)
            done += (size_t)n;
        else if (n != -EINTR)
            return (int)n;
    }
    return kvmstats_parse_schedstat(text, done, to);
}

static inline int read_values(const struct kvmstats_source *source, uint64_t position, uint64_t count, uint64_t *to,
                              uint64_t *got)
{
    if (source->value_size == KVMSTATS_SCHEDSTAT)
        return count == KVMSTATS_SCHEDSTAT_VALUES ? read_schedstat(source->fd, to, got) : -EINVAL;
    if (count > MAX_COUNT)
        return -EOVERFLOW;
    size_t wanted = (size_t)count * source->value_size;
    int64_t n = pread_once(source->fd, to, wanted, position);
    int status = n == (int64_t)wanted ? 0 : finish_read(source->fd, to, wanted, position, n, got);
    if (status == 0 && (source->value_size != 8 || source->swapped))
        kvmstats_copy_values(to, source->value_size, source->swapped, count, to);
    return status;
}

/* ---- one pass over many */

static inline void clear(uint64_t *row, uint64_t width)
{
    for (uint64_t i = 0; i < width; ++i)
        row[i] = 0;
}

/* What a sweep does after a read that returned `status`. Returns whether the file failed. */
static inline int settle(struct kvmstats_file *file, int status, uint64_t *row, uint64_t number)
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
static inline int read_row(struct kvmstats_file *file, uint64_t *row, uint64_t *scratch, uint64_t number)
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
static inline int is_plain(const struct kvmstats_file *file)
{
    return !file->error && !file->gather && file->source->value_size == 8 && !file->source->swapped &&
           file->count <= MAX_COUNT;
}

/* Have a row in the cache when the kernel writes to it. All of it: a part is slower than nothing. */
static inline void prefetch_row(const struct kvmstats_file *file, uint64_t slot)
{
    uintptr_t row = (uintptr_t)file->row + (uintptr_t)(slot * file->step) * 8;

    for (uintptr_t line = row & ~(uintptr_t)(CACHE_LINE - 1); line < row + file->width * 8; line += CACHE_LINE)
        __builtin_prefetch((const void *)line, 1);
}

/*
 * Read files [begin, end) into a slot of their rows; `number` is the sweep's, for failed_at. A file that fails is
 * marked and its row cleared; of one that is marked already only the row is cleared. scratch: scratch_size values.
 * next_slot is that of the next sweep; if it is another, each row is prefetched while the one before it is read.
 *
 * Returns how many failed. Allocates nothing. Any thread; each file belongs to one thread at a time.
 */
ALWAYS_INLINE int sweep_files(struct kvmstats_file *files, uint64_t begin, uint64_t end, uint64_t *scratch,
                              uint64_t slot, uint64_t next_slot, uint64_t number)
{
    int failed = 0;

    for (uint64_t i = begin; i < end; ++i) {
        struct kvmstats_file *file = &files[i];
        uint64_t *row = file->row + slot * file->step;
        if (next_slot != slot) {
            int is_last = i + 1 == end;
            prefetch_row(is_last ? &files[begin] : file + 1, is_last ? next_slot : slot);
        }
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

#endif
