/* SPDX-License-Identifier: MIT */
/* System calls on another process' files. The contracts are in process.h. */
#include "process.h"

#include <errno.h>
#include <sys/syscall.h>
#include <unistd.h>

/* For headers before Linux 5.6; the number is the same on all but two machines (include/uapi/asm-generic/unistd.h). */
#if !defined(SYS_pidfd_getfd) && !defined(__mips__) && !defined(__alpha__)
#define SYS_pidfd_getfd 438
#endif

enum { KCMP_FILE = 0 }; /* include/uapi/linux/kcmp.h */

int kvmstats_getfd(int pidfd, int fd)
{
    long got = syscall(SYS_pidfd_getfd, pidfd, fd, 0);

    return got < 0 ? -errno : (int)got;
}

int kvmstats_same_file(int pid, int fd, int other_pid, int other_fd)
{
    long order = syscall(SYS_kcmp, pid, other_pid, KCMP_FILE, fd, other_fd);

    return order < 0 ? -errno : order == 0;
}
