/* SPDX-License-Identifier: MIT */
/* Making a thread of another process do one ioctl. The contract, and a picture of the frame, are in inject.h. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE /* process_vm_readv */
#endif
#include "inject.h"

#include <errno.h>

#if defined(__x86_64__) && !defined(__ILP32__)

#include "clock.h"

#include <cpuid.h>
#include <elf.h>
#include <fcntl.h>
#include <signal.h>
#include <stddef.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/uio.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <unistd.h>

enum {
    GRACE = 500000000, /* ns that a tracer may live beyond its time limit */
    POLL = 100000,     /* ns between two checks whether it has ended */
    PAGE_TEXT = 16384, /* bytes of a status file; that of a task in a thousand groups has 8000 */

    /* arch/x86/entry/syscalls/syscall_64.tbl */
    NR_IOCTL = 16,
    NR_CLONE = 56,
    X32_BIT = 0x40000000,

    KVM_RUN_REQUEST = 0xAE80, /* include/uapi/linux/kvm.h */
    STOP_EVENT = 128,         /* PTRACE_EVENT_STOP, include/uapi/linux/ptrace.h */

    /* include/linux/errno.h: what an interrupted call returns inside the kernel */
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
    SS_INVALID = 0x7FFF, /* do_sigaltstack refuses it, which restore_altstack ignores */
    RED_ZONE = 128,
    XSTATE_MOST = 16384, /* bytes; 11008 with AMX */
    XSTATE_LEAST = 576,  /* fxsave and header */
    SW_RESERVED = 464,   /* in the fxsave */
    XSTATE_BV = 512,
    FP_SSE = 3,
};

#define MAGIC1 0x46505853u /* FP_XSTATE_MAGIC1, uapi/asm/sigcontext.h */
#define MAGIC2 0x46505845u

struct frame { /* the kernel's struct rt_sigframe; the mask of the C library's ucontext_t is longer */
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

/* ---- the tracer: a child of a process with threads, so it may use only system calls and its own stack */

struct tracer {
    struct kvmstats_inject *job; /* shared with the parent */
    int64_t deadline;
    char stat[64], status[64]; /* paths */
    struct user_regs_struct regs;
    uint64_t mask;
    uint64_t xsize; /* of the xstate as ptrace returns it: the largest a task can have */
    _Alignas(64) unsigned char xstate[XSTATE_MOST];
    unsigned char image[IMAGE_MOST];
    char text[PAGE_TEXT];
};

static void complete(struct kvmstats_inject *job, int32_t step)
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

/* The result of a call that failed: -errno, or GONE if the thread no longer exists. */
static int failed(void)
{
    return errno == ESRCH || errno == ENOENT || errno == ECHILD ? KVMSTATS_INJECT_GONE : -errno;
}

/* Read a file of the thread's in /proc into t->text. Returns 0, or as failed(). */
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
static uint64_t parse_number(const char *text)
{
    uint64_t value = 0;

    for (; *text >= '0' && *text <= '9'; ++text)
        value = value * 10 + (uint64_t)(*text - '0');
    return value;
}

/* The number after a key of the status file in t->text; 0 if this kernel has no such key. */
static uint64_t find_number(const struct tracer *t, const char *key)
{
    const char *found = strstr(t->text, key);
    return found ? parse_number(found + strlen(key)) : 0;
}

/* What can be seen before the thread is traced. */
static int check_task(struct tracer *t)
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
    if (parse_number(field + 1) & (PF_KTHREAD | PF_USER_WORKER | PF_IO_WORKER))
        return KVMSTATS_INJECT_KERNEL_THREAD;
    result = read_text(t, t->status);
    if (result)
        return result;
    uint64_t tracer = find_number(t, "\nTracerPid:\t");
    if (tracer)
        return refuse(t->job, KVMSTATS_INJECT_TRACED, tracer);
    return state == 'T' ? KVMSTATS_INJECT_HALTED : 0;
}

/* What could change until now: checked while the thread is stopped. */
static int check_filters(struct tracer *t)
{
    int result = read_text(t, t->status);
    if (result)
        return result;
    uint64_t seccomp = find_number(t, "\nSeccomp:\t");
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

/* Wait until the thread is in the stop that PTRACE_INTERRUPT requested. SIGCHLD, which is blocked, announces stops. */
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
            struct timespec most = to_timespec(left);
            sigtimedwait(&child, NULL, &most);
            continue;
        }
        if (!WIFSTOPPED(status))
            return KVMSTATS_INJECT_GONE;
        if (status >> 16 == STOP_EVENT)
            return WSTOPSIG(status) == SIGTRAP ? 0 : KVMSTATS_INJECT_HALTED;
        /* A signal that arrived before the interrupt: pass it on; the stop for the interrupt is still to come. */
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

/* The thread must be right after a `syscall`, and in the right call; elsewhere it might be in a restartable sequence
 * (rseq(2)). Sets job->fd. */
static int check_call(struct tracer *t)
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
    if (t->xsize < XSTATE_LEAST || t->xsize >= sizeof t->xstate) /* all of the room is used: there may be more */
        return refuse(t->job, KVMSTATS_INJECT_XSTATE, t->xsize);
    return 0;
}

static int check_code(struct tracer *t)
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
 * The end of the last feature in use, or 0 if a feature is not understood. A frame must not claim more: of one that is
 * larger than the task's own, the kernel restores only the fxsave, and ptrace's has room for what the task may not use
 * (AMX).
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

/* What the interrupted call returns to the thread: as the kernel's handle_signal() does it with SA_RESTART. */
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

/* Write the frame below the stack pointer; *at is its address. */
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
    /* Room for all of it, because the kernel checks that it can read as much as the task may have. */
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

    /* As the kernel saves it: x87 and SSE always count as in use. */
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

    /* Not through /proc/PID/mem or POKEDATA, which would write to a guard page too. */
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
    regs.orig_rax = UINT64_MAX; /* not in a call, so nothing is restarted */
    regs.eflags &= ~(uint64_t)FLAGS_TF_DF_RF;
    return ptrace(PTRACE_SETREGSET, t->job->tid, (void *)(uintptr_t)NT_PRSTATUS, &all) ? failed() : 0;
}

/* While the thread is stopped. */
static int prepare_and_commit(struct tracer *t)
{
    uint64_t frame = 0;
    int result = get_registers(t);
    if (!result)
        result = check_call(t);
    if (result)
        return result;
    complete(t->job, KVMSTATS_STEP_REGS);
    if ((result = check_filters(t)))
        return result;
    complete(t->job, KVMSTATS_STEP_STATUS);
    if ((result = get_xstate(t)))
        return result;
    complete(t->job, KVMSTATS_STEP_XSTATE);
    /* As in a handler's frame: the mask from before a ppoll or the like, which has a mask of its own. */
    if (ptrace(PTRACE_GETSIGMASK, t->job->tid, (void *)sizeof t->mask, &t->mask))
        return failed();
    complete(t->job, KVMSTATS_STEP_MASK);
    if ((result = check_code(t)))
        return result;
    complete(t->job, KVMSTATS_STEP_CODE);
    if ((result = write_frame(t, &frame)))
        return result;
    complete(t->job, KVMSTATS_STEP_FRAME);
    if ((result = commit(t, frame)))
        return result;
    complete(t->job, KVMSTATS_STEP_COMMIT);
    return KVMSTATS_INJECT_DONE;
}

/* All of it. If it returns without a detach, the end of the tracer detaches. */
static int trace(struct tracer *t)
{
    struct kvmstats_inject *job = t->job;
    int result = check_task(t);
    if (result)
        return result;
    if (ptrace(PTRACE_SEIZE, job->tid, NULL, NULL))
        return failed();
    complete(job, KVMSTATS_STEP_SEIZE);
    int64_t start = now_ns();
    if (ptrace(PTRACE_INTERRUPT, job->tid, NULL, NULL))
        return failed();
    complete(job, KVMSTATS_STEP_INTERRUPT);
    if ((result = wait_for_stop(t)) && result != KVMSTATS_INJECT_HALTED)
        return result;
    if (!result) {
        complete(job, KVMSTATS_STEP_STOP);
        result = prepare_and_commit(t);
    }
    if (ptrace(PTRACE_DETACH, job->tid, NULL, NULL) == 0 && result == KVMSTATS_INJECT_DONE)
        complete(job, KVMSTATS_STEP_DETACH);
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

/* Reap the tracer, once it has ended or been killed at the deadline. Some other wait may have reaped it. */
static void reap(pid_t child, int64_t deadline)
{
    const struct timespec nap = {.tv_nsec = POLL};
    int killed = 0;

    for (;;) {
        pid_t who = waitpid(child, NULL, __WALL | (killed ? 0 : WNOHANG));
        if (who == child || (who < 0 && errno != EINTR))
            return;
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

    sigaction(SIGCHLD, &plain, NULL); /* if it were ignored, no stop would be announced */
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
    /* fork, without the handlers that libraries register for it, and without SIGCHLD at its end */
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
