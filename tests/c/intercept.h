/* SPDX-License-Identifier: MIT */
/*
 * intercept.h - every pread of the core becomes a call of scripted_pread(), which the test defines
 *
 * A test is built in two ways. With KVMSTATS_LIBC_PREAD and -Wl,--wrap=pread,--wrap=pread64 the core calls pread, and the
 * linker puts __wrap_pread in its place: that works under the sanitizers, which see what pread writes, and under
 * valgrind. With neither, the core is as it is shipped and makes the system call in place: then a seccomp filter hands
 * each pread64 of the threads that the test starts, and of main, to a thread that answers it. Where there are no such
 * filters, the test ends with NO_SECCOMP.
 */
#ifndef INTERCEPT_H
#define INTERCEPT_H

#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/types.h>
#include <unistd.h>

/* Returns what pread does. It may read a file by real_pread. */
static ssize_t scripted_pread(int fd, void *buffer, size_t count, int64_t offset);

#ifdef KVMSTATS_LIBC_PREAD

ssize_t __real_pread(int fd, void *buffer, size_t count, off_t offset);
ssize_t __wrap_pread(int fd, void *buffer, size_t count, off_t offset);
ssize_t __wrap_pread64(int fd, void *buffer, size_t count, int64_t offset);

ssize_t __wrap_pread(int fd, void *buffer, size_t count, off_t offset)
{
    return scripted_pread(fd, buffer, count, offset);
}

/* What glibc makes of pread where _FILE_OFFSET_BITS is 64. */
ssize_t __wrap_pread64(int fd, void *buffer, size_t count, int64_t offset)
{
    return scripted_pread(fd, buffer, count, offset);
}

__attribute__((unused)) static ssize_t real_pread(int fd, void *buffer, size_t count, int64_t offset)
{
    return __real_pread(fd, buffer, count, (off_t)offset);
}

static void start_intercepting(void)
{
}

#else

#include <linux/filter.h>
#include <linux/seccomp.h>
#include <pthread.h>
#include <stddef.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/syscall.h>

enum { NO_SECCOMP = 77 };

static int listener = -1;
static pthread_barrier_t listener_is_set;

__attribute__((unused)) static ssize_t real_pread(int fd, void *buffer, size_t count, int64_t offset)
{
    return pread(fd, buffer, count, (off_t)offset);
}

/* In a thread without the filter: it answers what the filter hands to it. */
static void *answer(void *unused)
{
    pthread_barrier_wait(&listener_is_set);
    for (;;) {
        struct seccomp_notif call = {0};
        if (ioctl(listener, SECCOMP_IOCTL_NOTIF_RECV, &call) != 0)
            continue; /* EINTR, or the caller has ended */
        const uint64_t *arguments = (const uint64_t *)call.data.args;
        ssize_t n = scripted_pread((int)arguments[0], (void *)(uintptr_t)arguments[1], (size_t)arguments[2],
                                   (int64_t)arguments[3]);
        struct seccomp_notif_resp reply = {.id = call.id, .val = n, .error = n < 0 ? -errno : 0};
        if (n < 0)
            reply.val = 0;
        ioctl(listener, SECCOMP_IOCTL_NOTIF_SEND, &reply);
    }
    return unused;
}

static void start_intercepting(void)
{
    struct sock_filter code[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_pread64, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_USER_NOTIF),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog program = {sizeof code / sizeof *code, code};
    pthread_t thread;

    pthread_barrier_init(&listener_is_set, NULL, 2);
    if (pthread_create(&thread, NULL, answer, NULL) != 0 || prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0)
        exit(NO_SECCOMP);
    listener = (int)syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_NEW_LISTENER, &program);
    if (listener < 0) {
        perror("seccomp");
        exit(NO_SECCOMP);
    }
    pthread_barrier_wait(&listener_is_set);
}

#endif
#endif
