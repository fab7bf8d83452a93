/* SPDX-License-Identifier: MIT */
/* process.h - another process' files: two system calls that the C library has no function for */
#ifndef KVMSTATS_PROCESS_H
#define KVMSTATS_PROCESS_H

/* ---- cdef: begin ---- */

/*
 * pidfd_getfd(2): a new close-on-exec fd for the file that the process of `pidfd` has open as `fd`. The kernel checks
 * the permission (PTRACE_MODE_ATTACH_REALCREDS: -EPERM) before the fd (-EBADF), so INT_MAX, which no process has as an
 * fd, tests the permission alone.
 *
 * Returns the fd, which the caller owns, or -errno: -ENOSYS before Linux 5.6, -ESRCH if the process has ended.
 * Allocates nothing else. Any thread.
 */
int kvmstats_getfd(int pidfd, int fd);

/*
 * kcmp(2): whether an fd of one process and one of another, or of the same, refer to one open file description (dup,
 * pidfd_getfd).
 *
 * Returns 1 or 0, or -errno: -EPERM if not permitted (PTRACE_MODE_READ_REALCREDS), -ENOSYS in kernels without
 * CONFIG_KCMP. Allocates nothing. Any thread.
 */
int kvmstats_same_file(int pid, int fd, int other_pid, int other_fd);

/* ---- cdef: end ---- */

#endif
