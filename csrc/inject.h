/* SPDX-License-Identifier: MIT */
/*
 * inject.h - making a thread of a running VMM open a stats file (x86-64 only)
 *
 * KVM gives a stats file only to the process that made the VM; pidfd_getfd lets others borrow one that is open there.
 * So a thread of the running VMM is made to open it, and it stays open in the VMM.
 *
 * The thread is stopped by ptrace (SEIZE, INTERRUPT: no signal is sent) right after a `syscall` instruction. Below its
 * stack pointer goes what the kernel puts there to deliver a signal (arch/x86/kernel/signal_64.c, asm/sigframe.h,
 * uapi/asm/sigcontext.h). Then one PTRACE_SETREGSET makes it run the ioctl and return into rt_sigreturn:
 *
 *   rsp before ->   +---------------------------------+
 *                   | red zone, 128 bytes             |
 *                   +---------------------------------+
 *                   | magic2, after the xstate        |   what XRSTOR takes: the regset NT_X86_XSTATE, with sw_reserved
 *   64-aligned ->   | xstate (fxsave, header, ...)    |   (magic1, extended_size, xfeatures, xstate_size) in its fxsave
 *                   +---------------------------------+
 *                   | siginfo, 128 bytes of 0         |
 *                   | ucontext: flags, stack, mask,   |   all registers of the interrupted call; ss_flags is invalid,
 *                   |           sigcontext -> xstate  |   which keeps the thread's own sigaltstack
 *   16n + 8 = rsp ->| pretcode: the restorer          |
 *                   +---------------------------------+
 *   rip -> syscall; ret (rax = ioctl, orig_rax = -1)     -> restorer: mov $15, %eax; syscall (rt_sigreturn)
 *
 * No code is patched and the thread is not single-stepped: memory is written before the commit, and after it the thread
 * finds its way back alone. So the tracer may die at any point. To the thread it looks like a signal whose handler has
 * SA_RESTART: the call it was in starts again (ERESTARTSYS, ERESTARTNOINTR) or fails with EINTR (all others, KVM_RUN
 * among them). Its stack needs the room that any such handler needs, 3 KiB (12 KiB with AMX): a thread on a stack that
 * may have less below it (Go's, or a small sigaltstack) must not be used.
 */
#ifndef KVMSTATS_INJECT_H
#define KVMSTATS_INJECT_H

#include <stdint.h>

/* ---- cdef: begin ---- */

enum kvmstats_inject_result {
    KVMSTATS_INJECT_DONE,          /* committed: the thread makes the call when it next runs */
    KVMSTATS_INJECT_UNSUPPORTED,   /* this build is not for x86-64 */
    KVMSTATS_INJECT_GONE,          /* there is no such thread, or it is ending */
    KVMSTATS_INJECT_KERNEL_THREAD, /* it has no user registers */
    KVMSTATS_INJECT_TRACED,        /* value: pid of its tracer */
    KVMSTATS_INJECT_HALTED,        /* stopped by SIGSTOP or the like */
    KVMSTATS_INJECT_SECCOMP,       /* it has a filter, which might kill the process for the call. value: the mode */
    KVMSTATS_INJECT_SHADOW_STACK,  /* CET: the way back would be a forged return */
    KVMSTATS_INJECT_FOREIGN_ABI,   /* 32-bit or x32 code. value: the code segment, or the number of the call */
    KVMSTATS_INJECT_NO_SYSCALL,    /* it was interrupted outside system calls: try again. value: its rip */
    KVMSTATS_INJECT_OTHER_CALL,    /* in_run, and it was not in KVM_RUN of any of `fds`: try again. value: its call */
    KVMSTATS_INJECT_CODE,          /* `call` or `restorer` is not such code. value: the address */
    KVMSTATS_INJECT_XSTATE,        /* extended state of an unknown size. value: the size */
    KVMSTATS_INJECT_STACK,         /* no writable memory for the frame. value: its address */
    KVMSTATS_INJECT_TIMEOUT,       /* it did not stop in time: it sleeps where no signal wakes it */
    KVMSTATS_INJECT_KILLED,        /* the tracer ended early. `step`: the last thing it did */
};

/* What the tracer does, in order. From COMMIT on the call will be made, whatever becomes of the tracer. */
enum kvmstats_inject_step {
    KVMSTATS_STEP_NONE,
    KVMSTATS_STEP_SEIZE,
    KVMSTATS_STEP_INTERRUPT,
    KVMSTATS_STEP_STOP,   /* waited for; signals that arrive first are passed on */
    KVMSTATS_STEP_REGS,   /* read, and the call that the thread is in recognised */
    KVMSTATS_STEP_STATUS, /* of /proc read: no seccomp filter, no shadow stack */
    KVMSTATS_STEP_XSTATE, /* read */
    KVMSTATS_STEP_MASK,   /* of signals read */
    KVMSTATS_STEP_CODE,   /* at `call` and `restorer` verified */
    KVMSTATS_STEP_FRAME,  /* written */
    KVMSTATS_STEP_COMMIT, /* registers set */
    KVMSTATS_STEP_DETACH,
};

struct kvmstats_inject {
    int32_t pid;
    int32_t tid;
    const int32_t *fds; /* of the process; num_fds of them, at least 1 */
    uint64_t num_fds;
    uint64_t request;   /* of the ioctl, which takes no argument: KVM_GET_STATS_FD */
    uint64_t call;      /* address of: syscall; ret (0f 05 c3) */
    uint64_t restorer;  /* address of: mov $15, %rax; syscall (48 c7 c0 0f 00 00 00 0f 05), or with %eax (b8 0f ...) */
    int64_t timeout_ns; /* for all of it; more than 0 */
    int32_t in_run;     /* 0: the ioctl is made on fds[0]. 1: on the one of fds whose KVM_RUN the thread is in */
    int32_t kill_after; /* enum kvmstats_inject_step after which the tracer kills itself, for tests; else 0 */
    int32_t fd;         /* set: the one that the ioctl is made on */
    int32_t step;       /* set: enum kvmstats_inject_step, the last that was completed */
    int32_t signals;    /* set: how many were passed on */
    int64_t stopped_ns; /* set: from before the interrupt until after the detach (CLOCK_MONOTONIC) */
    uint64_t value;     /* set: see the result */
};

/*
 * Make the thread do the ioctl. It is not waited for, and what its ioctl returns is not known: look for the new fd in
 * /proc/PID/fd.
 *
 * in_run 1 is for vCPUs. Their ioctls wait for vcpu->mutex, which KVM_RUN holds: only the thread that was in KVM_RUN of
 * that very vCPU is certain not to wait. in_run 0 is for VMs, whose ioctl waits for nothing.
 *
 * The tracer is a child process with all signals blocked and no exit signal: there is no SIGCHLD, and no other wait()
 * sees it. It has timeout_ns, is killed after that, and always reaped before the return.
 *
 * Returns an enum kvmstats_inject_result, or -errno of the call that failed after `step` (-EPERM: tracing the thread is
 * not permitted). The ioctl will not be made, except after DONE, and after KILLED from STEP_COMMIT on.
 * Allocates a page shared with the tracer, and frees it. Any thread. Blocks.
 */
int kvmstats_inject(struct kvmstats_inject *job);

/* ---- cdef: end ---- */

#endif
