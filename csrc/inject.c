/* SPDX-License-Identifier: MIT */
/* Making a thread of another process do one ioctl. The contract, and the picture of the frame, are in kvmstats.h. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE /* process_vm_readv */
#endif
#include "kvmstats.h"

#include <errno.h>

#if defined(__x86_64__) && !defined(__ILP32__)

#include <cpuid.h>
#include <elf.h>
#include <fcntl.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/uio.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum {
    SECOND = 1000000000,
    GRACE = 500000000, /* ns: how much longer than its own time limit a tracer may live */
    NAP = 100000,      /* ns between two looks at whether it has ended */
    PAGE_TEXT = 16384, /* bytes of a status file; a task in a thousand groups has 8000 */

    /* arch/x86/entry/syscalls/syscall_64.tbl */
    NR_IOCTL = 16,
    NR_CLONE = 56,
    X32_BIT = 0x40000000,

    KVM_RUN_REQUEST = 0xAE80, /* include/uapi/linux/kvm.h */
    STOP_EVENT = 128,         /* PTRACE_EVENT_STOP, include/uapi/linux/ptrace.h */

    /* include/linux/errno.h: what a call that was interrupted returns inside the kernel */
    ERESTARTSYS = 512,
    ERESTARTNOINTR = 513,
    ERESTARTNOHAND = 514,
    ERESTART_RESTARTBLOCK = 516,

    /* include/linux/sched.h */
    PF_IO_WORKER = 0x10,
    PF_USER_WORKER = 0x4000,
    PF_KTHREAD = 0x200000,

    /* arch/x86/include/asm/segment.h, uapi/asm/processor-flags.h, uapi/asm/ucontext.h */
    USER_CS = 0x33,
    FLAGS_TF_DF_RF = 0x100 | 0x400 | 0x10000,
    UC_ALL = 7,          /* UC_FP_XSTATE, UC_SIGCONTEXT_SS, UC_STRICT_RESTORE_SS */
    SS_INVALID = 0x7FFF, /* do_sigaltstack refuses it, and restore_altstack lets that pass */
    RED_ZONE = 128,
    XSTATE_MOST = 16384, /* 11008 bytes with AMX */
    XSTATE_LEAST = 576,  /* fxsave and header */
    SW_RESERVED = 464,   /* in the fxsave */
    XSTATE_BV = 512,
    FP_SSE = 3,
};

#define MAGIC1 0x46505853u /* FP_XSTATE_MAGIC1, uapi/asm/sigcontext.h */
#define MAGIC2 0x46505845u

struct frame { /* struct rt_sigframe of the kernel; the C library's ucontext_t has a longer mask */
    uint64_t pretcode;
    uint64_t uc_flags, uc_link, ss_sp;
    uint32_t ss_flags, ss_pad;
    uint64_t ss_size;
    uint64_t r8, r9, r10, r11, r12, r13, r14, r15, rdi, rsi, rbp, rbx, rdx, rax, rcx, rsp, rip, eflags;
    uint16_t cs, gs, fs, ss;
    uint64_t err, trapno, oldmask, cr2, fpstate, reserved[8];
    uint64_t mask;
    uint64_t siginfo[16];
};

struct sw_bytes { /* struct _fpx_sw_bytes */
    uint32_t magic1, extended_size;
    uint64_t xfeatures;
    uint32_t xstate_size, padding[7];
};

_Static_assert(sizeof(struct frame) == 440, "rt_sigframe");
_Static_assert(offsetof(struct frame, fpstate) == 8 + 40 + 184, "sigcontext");
_Static_assert(offsetof(struct frame, mask) == 8 + 296, "ucontext");
_Static_assert(sizeof(struct sw_bytes) == 48, "_fpx_sw_bytes");
_Static_assert(sizeof(struct user_regs_struct) == 27 * 8, "NT_PRSTATUS");

enum { IMAGE_MOST = sizeof(struct frame) + 8 + 63 + XSTATE_MOST + 4 + 63 };

/* ---- the tracer: a child of a process with threads, so nothing but system calls and its own stack */

struct tracer {
    struct kvmstats_inject *job; /* shared with the parent */
    int64_t deadline;
    char stat[64], status[64]; /* paths */
    struct user_regs_struct regs;
    uint64_t mask;
    uint64_t xsize; /* of the xstate as ptrace gives it, which is the most a task has */
    _Alignas(64) unsigned char xstate[XSTATE_MOST];
    unsigned char image[IMAGE_MOST];
    char text[PAGE_TEXT];
};

static int64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * SECOND + now.tv_nsec;
}

static void done(struct kvmstats_inject *job, int32_t step)
{
    job->step = step;
    if (job->kill_after == step)
        kill(getpid(), SIGKILL);
}

static int refuse(struct kvmstats_inject *job, int result, uint64_t value)
{
    job->value = value;
    return result;
}

/* -errno of a call that failed; a thread that is gone has its own result. */
static int failed(void)
{
    return errno == ESRCH || errno == ENOENT || errno == ECHILD ? KVMSTATS_INJECT_GONE : -errno;
}

/* The thread's file in /proc, into t->text. 0, or as failed(). */
static int read_text(struct tracer *t, const char *path)
{
    size_t length = 0;
    ssize_t n;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return failed();
    while ((n = read(fd, t->text + length, sizeof t->text - 1 - length)) > 0)
        length += (size_t)n;
    int result = n < 0 ? failed() : length == sizeof t->text - 1 ? -EOVERFLOW : 0;
    close(fd);
    t->text[length] = 0;
    return result;
}

/* The decimal number at the start of a text. */
static uint64_t number(const char *text)
{
    uint64_t value = 0;

    for (; *text >= '0' && *text <= '9'; ++text)
        value = value * 10 + (uint64_t)(*text - '0');
    return value;
}

/* The number behind a key of a status file, 0 if this kernel has no such key. */
static uint64_t number_of(const struct tracer *t, const char *key)
{
    const char *found = strstr(t->text, key);
    return found ? number(found + strlen(key)) : 0;
}

/* What can be seen from outside. */
static int look_at_task(struct tracer *t)
{
    int result = read_text(t, t->stat);
    if (result)
        return result;
    /* PID (name, which may hold anything) state ppid pgrp session tty tpgid flags */
    const char *field = strrchr(t->text, ')');
    if (!field || field[1] != ' ')
        return -EPROTO;
    char state = field[2];
    for (int i = 0; i < 7; ++i) {
        field = strchr(field + 1, ' ');
        if (!field)
            return -EPROTO;
    }
    if (state == 'Z' || state == 'X')
        return KVMSTATS_INJECT_GONE;
    if (number(field + 1) & (PF_KTHREAD | PF_USER_WORKER | PF_IO_WORKER))
        return KVMSTATS_INJECT_KERNEL_THREAD;
    result = read_text(t, t->status);
    if (result)
        return result;
    uint64_t tracer = number_of(t, "\nTracerPid:\t");
    if (tracer)
        return refuse(t->job, KVMSTATS_INJECT_TRACED, tracer);
    return state == 'T' ? KVMSTATS_INJECT_HALTED : 0;
}

/* What must not change any more: looked at while the thread stands still. */
static int look_at_filters(struct tracer *t)
{
    int result = read_text(t, t->status);
    if (result)
        return result;
    uint64_t seccomp = number_of(t, "\nSeccomp:\t");
    if (seccomp)
        return refuse(t->job, KVMSTATS_INJECT_SECCOMP, seccomp);
    const char *features = strstr(t->text, "\nx86_Thread_features:\t");
    if (features) {
        const char *shadow = strstr(features, "shstk"), *end = strchr(features + 1, '\n');
        if (shadow && (!end || shadow < end))
            return KVMSTATS_INJECT_SHADOW_STACK;
    }
    return 0;
}

/* Until the thread stands in the stop that PTRACE_INTERRUPT asked for. SIGCHLD, blocked, tells of every stop. */
static int wait_for_stop(struct tracer *t)
{
    int32_t tid = t->job->tid;
    sigset_t child;

    sigemptyset(&child);
    sigaddset(&child, SIGCHLD);
    for (;;) {
        int status;
        pid_t who = waitpid(tid, &status, __WALL | WNOHANG);
        if (who < 0)
            return failed();
        if (who == 0) {
            int64_t left = t->deadline - now_ns();
            if (left <= 0)
                return KVMSTATS_INJECT_TIMEOUT;
            struct timespec most = {.tv_sec = (time_t)(left / SECOND), .tv_nsec = (long)(left % SECOND)};
            sigtimedwait(&child, NULL, &most);
            continue;
        }
        if (!WIFSTOPPED(status))
            return KVMSTATS_INJECT_GONE;
        if (status >> 16 == STOP_EVENT)
            return WSTOPSIG(status) == SIGTRAP ? 0 : KVMSTATS_INJECT_HALTED;
        /* A signal that was under way before the interrupt: it goes on, and the interrupt is still to come. */
        if (ptrace(PTRACE_CONT, tid, NULL, (void *)(intptr_t)WSTOPSIG(status)))
            return failed();
        ++t->job->signals;
    }
}

static int get_registers(struct tracer *t)
{
    struct iovec room = {.iov_base = &t->regs, .iov_len = sizeof t->regs};
    if (ptrace(PTRACE_GETREGSET, t->job->tid, (void *)(uintptr_t)NT_PRSTATUS, &room))
        return failed();
    if (room.iov_len != sizeof t->regs || t->regs.cs != USER_CS)
        return refuse(t->job, KVMSTATS_INJECT_FOREIGN_ABI, room.iov_len == sizeof t->regs ? t->regs.cs : room.iov_len);
    return 0;
}

static int has_bytes(struct tracer *t, uint64_t address, const void *bytes, size_t size)
{
    unsigned char found[16];
    struct iovec to = {.iov_base = found, .iov_len = size};
    struct iovec from = {.iov_base = (void *)(uintptr_t)address, .iov_len = size};
    return process_vm_readv(t->job->pid, &to, 1, &from, 1, 0) == (ssize_t)size && memcmp(found, bytes, size) == 0;
}

/* Right behind a syscall, and the right one; sets job->fd. Elsewhere it might be in a restartable sequence (rseq(2)). */
static int look_at_call(struct tracer *t)
{
    struct kvmstats_inject *job = t->job;
    uint64_t call = t->regs.orig_rax;

    if ((int64_t)call < 0 || !has_bytes(t, t->regs.rip - 2, "\x0f\x05", 2))
        return refuse(job, KVMSTATS_INJECT_NO_SYSCALL, t->regs.rip);
    if (call & X32_BIT)
        return refuse(job, KVMSTATS_INJECT_FOREIGN_ABI, call);
    job->fd = job->fds[0];
    if (!job->in_run)
        return 0;
    if (call == NR_IOCTL && (uint32_t)t->regs.rsi == KVM_RUN_REQUEST)
        for (uint64_t i = 0; i < job->num_fds; ++i)
            if ((int32_t)t->regs.rdi == job->fds[i]) {
                job->fd = job->fds[i];
                return 0;
            }
    return refuse(job, KVMSTATS_INJECT_OTHER_CALL, call);
}

static int get_xstate(struct tracer *t)
{
    struct iovec room = {.iov_base = t->xstate, .iov_len = sizeof t->xstate};
    if (ptrace(PTRACE_GETREGSET, t->job->tid, (void *)(uintptr_t)NT_X86_XSTATE, &room))
        return failed();
    t->xsize = room.iov_len;
    if (t->xsize < XSTATE_LEAST || t->xsize >= sizeof t->xstate) /* all of the room: there may be more */
        return refuse(t->job, KVMSTATS_INJECT_XSTATE, t->xsize);
    return 0;
}

static int look_at_code(struct tracer *t)
{
    const struct kvmstats_inject *job = t->job;

    if (!has_bytes(t, job->call, "\x0f\x05\xc3", 3))
        return refuse(t->job, KVMSTATS_INJECT_CODE, job->call);
    if (!has_bytes(t, job->restorer, "\x48\xc7\xc0\x0f\x00\x00\x00\x0f\x05", 9) &&
        !has_bytes(t, job->restorer, "\xb8\x0f\x00\x00\x00\x0f\x05", 7))
        return refuse(t->job, KVMSTATS_INJECT_CODE, job->restorer);
    return 0;
}

/*
 * Where the last of the features that are in use ends, or 0. A frame must not claim more: the kernel takes nothing but
 * the fxsave of one that is larger than the task's own, and ptrace gives room for what the task may not use (AMX).
 */
static uint64_t xstate_end(uint64_t features, uint64_t size)
{
    uint64_t end = XSTATE_LEAST;

    for (unsigned i = 2; i < 63; ++i) {
        unsigned length, offset, c, d;
        if (!(features >> i & 1))
            continue;
        __cpuid_count(0xD, i, length, offset, c, d);
        if (length == 0 || offset < XSTATE_LEAST)
            return 0;
        if ((uint64_t)offset + length > end)
            end = (uint64_t)offset + length;
    }
    return end <= size && features >> 63 == 0 ? end : 0;
}

/* What the call returns to the thread, as handle_signal() of the kernel has it for a handler with SA_RESTART. */
static void set_result(const struct user_regs_struct *regs, struct frame *frame)
{
    frame->rax = regs->rax;
    frame->rip = regs->rip;
    switch (-(int64_t)regs->rax) {
    case ERESTARTSYS:
    case ERESTARTNOINTR:
        frame->rax = regs->orig_rax;
        frame->rip -= 2;
        break;
    case ERESTARTNOHAND:
    case ERESTART_RESTARTBLOCK:
        frame->rax = (uint64_t)-EINTR;
        break;
    default:
        break;
    }
}

/* Put the frame below the stack; *at is its address. */
static int write_frame(struct tracer *t, uint64_t *at)
{
    const struct user_regs_struct *regs = &t->regs;
    uint64_t features;
    memcpy(&features, t->xstate + XSTATE_BV, sizeof features);
    uint64_t used = xstate_end(features, t->xsize);
    if (used == 0)
        return refuse(t->job, KVMSTATS_INJECT_XSTATE, t->xsize);

    if (regs->rsp < RED_ZONE + IMAGE_MOST)
        return refuse(t->job, KVMSTATS_INJECT_STACK, regs->rsp);
    /* Room for all of it: the kernel wants to be able to read as much as the task may have. */
    uint64_t fpstate = (regs->rsp - RED_ZONE - t->xsize - 4) & ~UINT64_C(63);
    *at = ((fpstate - sizeof(struct frame)) & ~UINT64_C(15)) - 8;

    struct frame frame = {
        .pretcode = t->job->restorer,
        .uc_flags = UC_ALL,
        .ss_flags = SS_INVALID,
        .r8 = regs->r8,
        .r9 = regs->r9,
        .r10 = regs->r10,
        .r11 = regs->r11,
        .r12 = regs->r12,
        .r13 = regs->r13,
        .r14 = regs->r14,
        .r15 = regs->r15,
        .rdi = regs->rdi,
        .rsi = regs->rsi,
        .rbp = regs->rbp,
        .rbx = regs->rbx,
        .rdx = regs->rdx,
        .rcx = regs->rcx,
        .rsp = regs->rsp,
        .eflags = regs->eflags,
        .cs = (uint16_t)regs->cs,
        .ss = (uint16_t)regs->ss,
        .oldmask = t->mask,
        .fpstate = fpstate,
        .mask = t->mask,
    };
    set_result(regs, &frame);

    /* As the kernel saves it: fxsave and SSE always count as in use. */
    features |= FP_SSE;
    struct sw_bytes sw = {
        .magic1 = MAGIC1,
        .extended_size = (uint32_t)used + 4,
        .xfeatures = features,
        .xstate_size = (uint32_t)used,
    };
    uint32_t magic2 = MAGIC2;
    memcpy(t->xstate + XSTATE_BV, &features, sizeof features);
    memcpy(t->xstate + SW_RESERVED, &sw, sizeof sw);

    uint64_t inside = fpstate - *at;
    memset(t->image, 0, sizeof t->image);
    memcpy(t->image, &frame, sizeof frame);
    memcpy(t->image + inside, t->xstate, t->xsize);
    memcpy(t->image + inside + used, &magic2, sizeof magic2);

    /* Not through /proc/PID/mem or POKEDATA: those write to a guard page, too. */
    size_t size = (size_t)(inside + t->xsize + 4);
    struct iovec from = {.iov_base = t->image, .iov_len = size};
    struct iovec to = {.iov_base = (void *)(uintptr_t)*at, .iov_len = size};
    if (process_vm_writev(t->job->pid, &from, 1, &to, 1, 0) != (ssize_t)size)
        return refuse(t->job, KVMSTATS_INJECT_STACK, *at);
    return 0;
}

static int commit(struct tracer *t, uint64_t frame)
{
    struct user_regs_struct regs = t->regs;
    struct iovec all = {.iov_base = &regs, .iov_len = sizeof regs};

    regs.rip = t->job->call;
    regs.rsp = frame;
    regs.rax = NR_IOCTL;
    regs.rdi = (unsigned)t->job->fd;
    regs.rsi = t->job->request;
    regs.rdx = 0;
    regs.orig_rax = UINT64_MAX; /* in no call: nothing to start again */
    regs.eflags &= ~(uint64_t)FLAGS_TF_DF_RF;
    return ptrace(PTRACE_SETREGSET, t->job->tid, (void *)(uintptr_t)NT_PRSTATUS, &all) ? failed() : 0;
}

/* While the thread stands still. */
static int prepare_and_commit(struct tracer *t)
{
    uint64_t frame = 0;
    int result = get_registers(t);
    if (!result)
        result = look_at_call(t);
    if (result)
        return result;
    done(t->job, KVMSTATS_STEP_REGS);
    if ((result = look_at_filters(t)))
        return result;
    done(t->job, KVMSTATS_STEP_STATUS);
    if ((result = get_xstate(t)))
        return result;
    done(t->job, KVMSTATS_STEP_XSTATE);
    /* What a handler's frame would hold: the mask from before a ppoll or the like that has its own. */
    if (ptrace(PTRACE_GETSIGMASK, t->job->tid, (void *)sizeof t->mask, &t->mask))
        return failed();
    done(t->job, KVMSTATS_STEP_MASK);
    if ((result = look_at_code(t)))
        return result;
    done(t->job, KVMSTATS_STEP_CODE);
    if ((result = write_frame(t, &frame)))
        return result;
    done(t->job, KVMSTATS_STEP_FRAME);
    if ((result = commit(t, frame)))
        return result;
    done(t->job, KVMSTATS_STEP_COMMIT);
    return KVMSTATS_INJECT_DONE;
}

/* All of it. A return without a detach leaves that to the end of the tracer. */
static int trace(struct tracer *t)
{
    struct kvmstats_inject *job = t->job;
    int result = look_at_task(t);
    if (result)
        return result;
    if (ptrace(PTRACE_SEIZE, job->tid, NULL, NULL))
        return failed();
    done(job, KVMSTATS_STEP_SEIZE);
    int64_t start = now_ns();
    if (ptrace(PTRACE_INTERRUPT, job->tid, NULL, NULL))
        return failed();
    done(job, KVMSTATS_STEP_INTERRUPT);
    if ((result = wait_for_stop(t)) && result != KVMSTATS_INJECT_HALTED)
        return result;
    if (!result) {
        done(job, KVMSTATS_STEP_STOP);
        result = prepare_and_commit(t);
    }
    if (ptrace(PTRACE_DETACH, job->tid, NULL, NULL) == 0 && result == KVMSTATS_INJECT_DONE)
        done(job, KVMSTATS_STEP_DETACH);
    job->stopped_ns = now_ns() - start;
    return result;
}

/* ---- the parent */

/* "/proc/PID/task/TID/name" */
static void make_path(char *to, int32_t pid, int32_t tid, const char *name)
{
    const char *const parts[] = {"/proc/", NULL, "/task/", NULL, "/", name};

    for (int i = 0; i < 6; ++i) {
        char digits[12];
        const char *part = parts[i];
        if (!part) {
            char *first = &digits[11];
            *first = 0;
            for (int32_t left = i == 1 ? pid : tid; left; left /= 10)
                *--first = (char)('0' + left % 10);
            part = first;
        }
        size_t length = strlen(part);
        memcpy(to, part, length);
        to += length;
    }
    *to = 0;
}

/* Reap the tracer, after killing it if it is late. Returns its wait status, or -1 if somebody else has reaped it. */
static int reap(pid_t child, int64_t deadline)
{
    const struct timespec nap = {.tv_nsec = NAP};
    int status = 0, killed = 0;

    for (;;) {
        pid_t who = waitpid(child, &status, __WALL | (killed ? 0 : WNOHANG));
        if (who == child)
            return status;
        if (who < 0 && errno != EINTR)
            return -1;
        if (!killed && now_ns() > deadline) {
            kill(child, SIGKILL);
            killed = 1;
        }
        if (!killed)
            nanosleep(&nap, NULL);
    }
}

struct shared {
    struct kvmstats_inject job;
    int32_t result;
};

static void run_tracer(struct shared *shared, int64_t deadline)
{
    struct tracer t = {.job = &shared->job, .deadline = deadline};
    struct sigaction plain = {.sa_handler = SIG_DFL};

    sigaction(SIGCHLD, &plain, NULL); /* where it is ignored, no stop would be told of */
    make_path(t.stat, t.job->pid, t.job->tid, "stat");
    make_path(t.status, t.job->pid, t.job->tid, "status");
    shared->result = trace(&t);
    _exit(0);
}

int kvmstats_inject(struct kvmstats_inject *job)
{
    sigset_t all, before;

    if (job->pid < 1 || job->tid < 1 || job->num_fds < 1 || job->timeout_ns < 1)
        return -EINVAL;
    struct shared *shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (shared == MAP_FAILED)
        return -errno;
    int64_t start = now_ns(), most = INT64_MAX - GRACE - start;
    int64_t deadline = start + (job->timeout_ns < most ? job->timeout_ns : most);
    shared->job = *job;
    shared->job.fd = -1;
    shared->job.step = shared->job.signals = 0;
    shared->job.stopped_ns = 0;
    shared->job.value = 0;
    shared->result = KVMSTATS_INJECT_KILLED;

    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    /* fork, without the handlers that libraries hang into it, and without SIGCHLD at its end */
    long child = syscall(NR_CLONE, 0L, 0L, 0L, 0L, 0L);
    if (child == 0)
        run_tracer(shared, deadline);
    int error = errno;
    pthread_sigmask(SIG_SETMASK, &before, NULL);

    int result = -error;
    if (child > 0) {
        reap((pid_t)child, deadline + GRACE);
        *job = shared->job;
        result = shared->result;
    }
    munmap(shared, sizeof *shared);
    return result;
}

#else

int kvmstats_inject(struct kvmstats_inject *job)
{
    job->fd = -1;
    job->step = KVMSTATS_STEP_NONE;
    return KVMSTATS_INJECT_UNSUPPORTED;
}

#endif
