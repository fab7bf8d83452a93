/* SPDX-License-Identifier: MIT */
/*
 * hold.c - libkvmstats-hold.so: under LD_PRELOAD, a VMM opens the stats file of each VM and vCPU it makes, and keeps it
 *
 * Only the process that made a VM may ask for its stats files (others get EIO), and a vCPU's cannot be had while it is
 * in KVM_RUN. Whoever may ptrace the VMM can take a copy of a file that is open there already (pidfd_getfd). So this
 * library asks at the one moment when it is allowed and costs nothing: right after KVM_CREATE_VM or KVM_CREATE_VCPU,
 * in the same thread, before the vCPU has run. It uses three symbols, of any libc: dlsym, syscall, __errno_location.
 *
 * WHERE A STATS FD IS KEPT
 *   The one of KVM fd n is fd n + HOLD_OFFSET. The kernel opens it low, and it is moved before ioctl returns, so the
 *   VMM's own fds get the numbers they always get, until it has HOLD_OFFSET of them: half of the usual limit of 1024.
 *   That the place follows from n keeps the leak bounded whatever happens: no number ever has two kept fds, and a
 *   stale one is replaced by the next of its place. If the place is taken or beyond RLIMIT_NOFILE, nothing is kept.
 *
 * CLOSE
 *   A stats file pins its VM. Therefore close(n) closes n + HOLD_OFFSET first (then n cannot be handed out anew in
 *   between), or the VM would live on until the process ends. The only state is a bit for each n that says that its
 *   place is ours. vfork shares that bit, but not the fds, so a bit is dropped rather early than late: what is
 *   forgotten is kept until its place is needed, what is remembered wrongly would close a file of the VMM's. close
 *   makes no system call but close, for VMMs that by then have a seccomp filter.
 *
 * LIMITS
 *   - A VM that is closed otherwise than by close() (close_range, dup2 onto it, fclose, a bare system call) is pinned
 *     until its number is closed or is a KVM fd again, or the process ends. A VMM that goes on with a duplicate of the fd
 *     it closed loses the stats.
 *   - A VMM that closes a kept fd otherwise than by close(), has a file of its own in exactly its place, and then closes
 *     the KVM fd, loses that file. So does one with more than HOLD_OFFSET fds whose own stats fd is in the place of a new
 *     KVM fd.
 *   - ioctl by a bare system call, or by dlsym on libc itself, is not seen.
 *   - /proc must be there: nothing is asked of an fd that it does not call a KVM fd, whatever driver returned it.
 *   - A seccomp filter that kills for an ioctl it does not know kills here, before the guest has run. There is no way to
 *     ask a filter first: start such a VMM with its filter off or only logging. One that answers with an errno is fine.
 *
 * libc's ioctl and close are called, not the kernel's: ioctl is more than the system call on some machines (powerpc's
 * termios, 32-bit time), close is a cancellation point, and another preloaded library may want to see them. Looking
 * them up is not async-signal-safe, so the constructor does it; before it has run, the system call takes their place.
 * What the library asks for itself goes through syscall(), which is no cancellation point, and leaves errno as it was.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE /* RTLD_NEXT, F_DUPFD_CLOEXEC */
#endif
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <unistd.h>

#define HOLD_OFFSET 512
#define HOLD_MAX 8192 /* n is below it; a VM has at most 4096 vCPUs */

/* include/uapi/linux/kvm.h: _IO(0xAE, nr), where mips and powerpc encode "no data" as 1 << 29 */
#if defined(__mips__) || defined(__powerpc__)
#define KVM_IO(nr) (0x20000000U | 0xAE00U | (nr))
#else
#define KVM_IO(nr) (0xAE00U | (nr))
#endif
#define KVM_CREATE_VM KVM_IO(0x01U)
#define KVM_CREATE_VCPU KVM_IO(0x41U)
#define KVM_GET_STATS_FD KVM_IO(0xCEU)

#ifdef SYS_fcntl64 /* some 32-bit machines have only this one */
#define HOLD_FCNTL SYS_fcntl64
#else
#define HOLD_FCNTL SYS_fcntl
#endif

#define EXPORT __attribute__((visibility("default")))

typedef int ioctl_function(int fd, unsigned long request, ...);
typedef int close_function(int fd);

/* Not <sys/ioctl.h>: the second parameter is an int in musl. Only its low 32 bits reach the kernel either way. */
ioctl_function ioctl;

#pragma weak dlsym /* before glibc 2.34 it is in libdl, which not every program has */

static ioctl_function *next_ioctl;
static close_function *next_close;
static uint32_t held[HOLD_MAX / 32];

/* ---- the bits */

static void remember(int fd)
{
    __atomic_fetch_or(&held[fd / 32], 1U << fd % 32, __ATOMIC_RELAXED);
}

/* Returns whether it was held. */
static int forget(int fd)
{
    if (fd < 0 || fd >= HOLD_MAX)
        return 0;
    uint32_t bit = 1U << fd % 32;
    if (!(__atomic_load_n(&held[fd / 32], __ATOMIC_RELAXED) & bit))
        return 0; /* nearly every close there is */
    return (__atomic_fetch_and(&held[fd / 32], ~bit, __ATOMIC_RELAXED) & bit) != 0;
}

/* ---- what an fd is */

enum kind { NONE, OTHER, KVM, STATS };

/* Behind `prefix`, or NULL if `text` does not start so. */
static const char *behind(const char *text, const char *prefix)
{
    for (; *prefix; ++prefix, ++text)
        if (*text != *prefix)
            return NULL;
    return text;
}

/* By the kernel's name for it: anon_inode:kvm-vm, kvm-vcpu:0, kvm-vm-stats, kvm-vcpu-stats:0, or [kvm-vm] and so on. */
static enum kind kind_of(int fd)
{
    /* Not self: that is the first thread's, which may have ended, or have other fds. */
    char path[] = "/proc/thread-self/fd/\0\0\0\0"; /* fd < HOLD_MAX + HOLD_OFFSET: 4 digits */
    char link[32];
    size_t end = sizeof "/proc/thread-self/fd/" - 1;
    for (int unit = 1000; unit; unit /= 10)
        if (fd >= unit || unit == 1)
            path[end++] = (char)('0' + fd / unit % 10);
    long n = syscall(SYS_readlinkat, AT_FDCWD, path, link, sizeof link - 1);
    if (n < 0)
        return NONE;
    link[n] = '\0';
    const char *name = behind(link, "anon_inode:");
    if (!name)
        return OTHER;
    if (*name == '[')
        ++name;
    const char *rest = behind(name, "kvm-vm");
    if (!rest)
        rest = behind(name, "kvm-vcpu");
    if (!rest)
        return OTHER;
    return behind(rest, "-stats") ? STATS : KVM;
}

/* ---- keeping */

/* Whether a duplicate of stats_fd is now at `place`. */
static int put(int stats_fd, int place)
{
    switch (kind_of(place)) {
    case NONE:
        /* Never over a file that came meanwhile. What lands behind it then is in the place of another: stale. */
        return syscall(HOLD_FCNTL, stats_fd, F_DUPFD_CLOEXEC, (long)place) == place;
    case STATS: /* what is left of a VM whose end was not seen */
        return syscall(SYS_dup3, stats_fd, place, O_CLOEXEC) == place;
    default:
        return 0;
    }
}

static void keep(int fd)
{
    if (fd >= HOLD_MAX || kind_of(fd) != KVM)
        return;
    int stats_fd = (int)syscall(SYS_ioctl, fd, KVM_GET_STATS_FD, 0L);
    if (stats_fd < 0)
        return;
    if (put(stats_fd, fd + HOLD_OFFSET))
        remember(fd);
    else
        forget(fd);
    syscall(SYS_close, stats_fd);
}

static int forward(ioctl_function *next, int fd, unsigned long request, void *argument)
{
    int result = next ? next(fd, request, argument) : (int)syscall(SYS_ioctl, fd, request, argument);
    uint32_t number = (uint32_t)request;
    if (result >= 0 && (number == KVM_CREATE_VM || number == KVM_CREATE_VCPU)) {
        int saved = errno;
        keep(result);
        errno = saved;
    }
    return result;
}

/* ---- what the VMM calls */

/* The third argument may be missing; then something is passed on that nobody looks at, as libc's own ioctl does. */
EXPORT int ioctl(int fd, unsigned long request, ...)
{
    va_list rest;
    va_start(rest, request);
    void *argument = va_arg(rest, void *);
    va_end(rest);
    return forward(next_ioctl, fd, request, argument);
}

#if __SIZEOF_POINTER__ == 4
/* What glibc 2.34 calls ioctl in programs of 32-bit machines with a 64-bit time_t. */
static ioctl_function *next_ioctl_time64;
ioctl_function __ioctl_time64;

EXPORT int __ioctl_time64(int fd, unsigned long request, ...)
{
    va_list rest;
    va_start(rest, request);
    void *argument = va_arg(rest, void *);
    va_end(rest);
    return forward(next_ioctl_time64, fd, request, argument);
}
#endif

EXPORT int close(int fd)
{
    if (forget(fd)) {
        int saved = errno;
        syscall(SYS_close, fd + HOLD_OFFSET);
        errno = saved;
    }
    if (fd >= HOLD_OFFSET)
        forget(fd - HOLD_OFFSET); /* the VMM closes a kept fd: it may put its own there */
    return next_close ? next_close(fd) : (int)syscall(SYS_close, fd);
}

__attribute__((constructor)) static void find_next(void)
{
    if (!dlsym)
        return;
    next_ioctl = (ioctl_function *)dlsym(RTLD_NEXT, "ioctl");
    next_close = (close_function *)dlsym(RTLD_NEXT, "close");
#if __SIZEOF_POINTER__ == 4
    next_ioctl_time64 = (ioctl_function *)dlsym(RTLD_NEXT, "__ioctl_time64");
#endif
}
