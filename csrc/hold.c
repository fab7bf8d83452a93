/* SPDX-License-Identifier: MIT */
/*
 * hold.c - libkvmstats-hold.so: with LD_PRELOAD, a VMM opens the stats file of each VM and vCPU it makes, and keeps it
 *
 * Only the process that made a VM may ask for its stats files (others get EIO), and a vCPU's is not to be had while the
 * vCPU is in KVM_RUN. But a stats file that is open in the VMM can be copied by anyone who may ptrace the VMM
 * (pidfd_getfd). So this library asks at the one moment when it is allowed and costs nothing: right after KVM_CREATE_VM
 * or KVM_CREATE_VCPU, in the same thread, before the vCPU has run. It needs three symbols, of any libc: dlsym, syscall,
 * __errno_location. It allocates nothing. Its functions may be called by any thread, and in signal handlers.
 *
 * WHERE A STATS FD IS KEPT
 *   The stats fd of KVM fd n is fd n + HOLD_OFFSET, its slot. The kernel returns it as a low number, and it is moved
 *   before ioctl returns, so the VMM's own fds keep the numbers they would have without the library, until it has
 *   HOLD_OFFSET of them: half of the usual limit of 1024. Because the slot follows from n, the number of kept fds is
 *   bounded whatever happens: no KVM fd ever has two, and a stale one is replaced by the next of its slot. If the slot
 *   is in use or beyond RLIMIT_NOFILE, nothing is kept.
 *
 * CLOSE
 *   A stats file pins its VM. So close(n) closes n + HOLD_OFFSET first (n cannot be reused in between), or the VM would
 *   live on until the process ends. The only state is a bit for each n: whether its slot is ours. vfork shares the bits
 *   but not the fds, so in doubt a bit is cleared: a slot that is forgotten is kept until the slot is needed again, but
 *   one remembered wrongly would close a file of the VMM's. close makes no system call but close, because by then the
 *   VMM may have a seccomp filter.
 *
 * LIMITS
 *   - A VM that is closed by other means than close() (close_range, dup2 onto it, fclose, a bare system call) is pinned
 *     until close() is called with its number, its number is a KVM fd again, or the process ends. A VMM that closes a
 *     KVM fd and continues with a duplicate of it loses the stats.
 *   - A VMM that closes a kept fd by other means than close(), opens a file of its own in exactly that slot, and then
 *     closes the KVM fd, loses that file. So does one with more than HOLD_OFFSET fds that has a stats fd of its own in
 *     the slot of a new KVM fd.
 *   - ioctl as a bare system call, or looked up by dlsym in libc itself, is not seen.
 *   - /proc must be mounted: nothing is asked of an fd that it does not show to be KVM's, whichever driver returned it.
 *   - A seccomp filter that kills for an unknown ioctl kills here, before the guest has run. A filter cannot be asked
 *     beforehand: start such a VMM with its filter off or only logging. One that returns an errno is no problem.
 *
 * libc's ioctl and close are called, not the kernel's: ioctl is more than the system call on some machines (powerpc's
 * termios, 32-bit time), close is a cancellation point, and another preloaded library may want to see them. Looking
 * them up is not async-signal-safe, so the constructor does it; before it has run, the system call is made instead.
 * What the library asks on its own behalf goes through syscall(), which is not a cancellation point, and leaves errno
 * as it was.
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

/* Not <sys/ioctl.h>: in musl the second parameter is an int. Only its low 32 bits reach the kernel either way. */
ioctl_function ioctl;

#pragma weak dlsym /* before glibc 2.34 it is in libdl, which not every program loads */

static ioctl_function *next_ioctl;
static close_function *next_close;
#if __SIZEOF_POINTER__ == 4
static ioctl_function *next_ioctl_time64;
#endif
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
        return 0; /* nearly every close */
    return (__atomic_fetch_and(&held[fd / 32], ~bit, __ATOMIC_RELAXED) & bit) != 0;
}

/* ---- what an fd is */

enum kind { NONE, OTHER, KVM, STATS }; /* no such fd; anything else; a VM or vCPU; a stats file */

/* What follows `prefix` in `text`, or NULL if it does not start with it. */
static const char *skip(const char *text, const char *prefix)
{
    for (; *prefix; ++prefix, ++text)
        if (*text != *prefix)
            return NULL;
    return text;
}

/* By the kernel's name of the file: anon_inode:kvm-vm, kvm-vcpu:0, kvm-vm-stats, kvm-vcpu-stats:0, or in brackets. */
static enum kind kind_of(int fd)
{
    /* Not self: that is the first thread, which may have ended, or have other fds. */
    char path[] = "/proc/thread-self/fd/\0\0\0\0"; /* fd < HOLD_MAX + HOLD_OFFSET: 4 digits */
    char link[32];
    size_t end = sizeof "/proc/thread-self/fd/" - 1;
    for (int unit = 1000; unit; unit /= 10)
        if (fd >= unit || unit == 1)
            path[end++] = (char)('0' + fd / unit % 10);
    long n = syscall(SYS_readlinkat, AT_FDCWD, path, link, sizeof link - 1);
    if (n < 0) /* any other errno is of an fd that exists: ENAMETOOLONG, if its path is longer than PATH_MAX */
        return errno == ENOENT ? NONE : OTHER;
    link[n] = '\0';
    const char *name = skip(link, "anon_inode:");
    if (!name)
        return OTHER;
    if (*name == '[')
        ++name;
    const char *rest = skip(name, "kvm-vm");
    if (!rest)
        rest = skip(name, "kvm-vcpu");
    if (!rest)
        return OTHER;
    return skip(rest, "-stats") ? STATS : KVM;
}

/* ---- keeping */

/* Returns whether `slot` is now a duplicate of stats_fd. */
static int duplicate(int stats_fd, int slot)
{
    switch (kind_of(slot)) {
    case NONE: {
        /* Not dup3, which would replace a file that was opened meanwhile. */
        long fd = syscall(HOLD_FCNTL, stats_fd, F_DUPFD_CLOEXEC, (long)slot);
        if (fd > slot)
            syscall(SYS_close, (int)fd);
        return fd == slot;
    }
    case STATS: /* of a VM whose end was not seen */
        return syscall(SYS_dup3, stats_fd, slot, O_CLOEXEC) == slot;
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
    if (duplicate(stats_fd, fd + HOLD_OFFSET))
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

/* If there is no third argument, something is passed on that nobody reads, as in libc's own ioctl. */
#define FORWARD(name, next) \
    EXPORT int name(int fd, unsigned long request, ...) \
    { \
        va_list rest; \
        va_start(rest, request); \
        void *argument = va_arg(rest, void *); \
        va_end(rest); \
        return forward(next, fd, request, argument); \
    }

FORWARD(ioctl, next_ioctl)

#if __SIZEOF_POINTER__ == 4
/* glibc 2.34's name for ioctl in programs of 32-bit machines with a 64-bit time_t. */
ioctl_function __ioctl_time64;
FORWARD(__ioctl_time64, next_ioctl_time64)
#endif

EXPORT int close(int fd)
{
    if (forget(fd)) {
        int saved = errno;
        syscall(SYS_close, fd + HOLD_OFFSET);
        errno = saved;
    }
    if (fd >= HOLD_OFFSET)
        forget(fd - HOLD_OFFSET); /* the VMM closes a kept fd, and may open its own there */
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
