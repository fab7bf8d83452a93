/* SPDX-License-Identifier: MIT */
/*
 * read.h - the system call of the hot loops, made in place
 *
 * The C library's pread is a cancellation point: two atomic operations and several branches around the system call. And
 * it returns, which the processor mispredicts after a system call, because the kernel flushes what predicts returns. So
 * where the calling convention is given here, the system call is made in place; elsewhere it is pread.
 *
 * No sanitizer sees what such a system call writes: ASan would miss a read past the end of a buffer, TSan a race, and to
 * MSan the values would be uninitialised. So a build with a sanitizer calls pread, which they intercept. So does one with
 * KVMSTATS_LIBC_PREAD, in which the tests replace pread. valgrind sees every system call.
 */
#ifndef KVMSTATS_READ_H
#define KVMSTATS_READ_H

#include <errno.h>
#include <stddef.h>
#include <stdint.h>
#include <unistd.h>

#if defined(KVMSTATS_LIBC_PREAD)
#elif defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__) /* gcc */
#define KVMSTATS_LIBC_PREAD
#elif defined(__has_feature) /* clang */
#if __has_feature(address_sanitizer) || __has_feature(memory_sanitizer) || __has_feature(thread_sanitizer)
#define KVMSTATS_LIBC_PREAD
#endif
#endif

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

#endif
