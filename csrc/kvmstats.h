/* SPDX-License-Identifier: MIT */
/*
 * kvmstats.h - KVM's binary statistics files: layouts, structs, contracts, error codes
 *
 * This header is the manual of the C core. It needs no kernel header: all it says of the file format is written out
 * here. build_ffi.py cuts the part between the two "cdef" lines out of this file and hands it to cffi, so what Python
 * sees is what stands here.
 *
 * LIMITATIONS
 *   - Linux only, because of sweep.c, process.c and inject.c, which does nothing but on x86-64; gcc or clang, for their
 *     byte swapping and atomic builtins.
 *   - A value is one u64. KVM takes no lock while it copies: each u64 is whole on a 64-bit host, but two values of one
 *     read are not of one instant.
 *   - Nothing here is thread-safe per struct; two threads with two structs never meet (there is no global).
 *
 * THE FILE
 *   Four blocks: header, id, descriptors, data. In today's kernels they follow each other; a reader must not rely on
 *   that. Offsets are from byte 0 of the file, in the byte order of the host that made it.
 *
 *   merged (Linux 5.14 and later)                     v9 (patch series v9-v11)
 *   +0   u32 flags        0; else: a later format     +0   u32 name_size    32 or 48
 *   +4   u32 name_size    48                          +4   u32 num_desc
 *   +8   u32 num_desc                                 +8   u32 desc_offset  80
 *   +12  u32 id_offset    24                          +12  u32 data_offset
 *   +16  u32 desc_offset                              +16  char id[64]      "kvm-..."
 *   +20  u32 data_offset
 *
 *   v2 (series v2-v4; name_size 32)  and  v5 (series v5-v8; name_size 48)
 *   +0   char id[64]      "kvm-..."
 *   +64  u32 name_size
 *   +68  u32 num_desc     the series calls it "count"
 *   +72  u32 desc_offset
 *   +76  u32 data_offset
 *
 *   descriptor, all layouts, 16 + name_size bytes apart
 *   +0   u32 flags
 *   +4   s16 exponent
 *   +6   u16 size         how many u64 the statistic has: 1, or the buckets of a histogram
 *   +8   u32 offset       bytes from the start of data; unused in v2 and v5: there statistic i starts where i-1 ended
 *   +12  u32 bucket_size  width of a linear histogram's buckets; unused before Linux 5.15
 *   +16  char name[name_size]   to its NUL or to name_size, whichever is first
 *
 *   flags of a descriptor                       31        12 11   8 7    4 3    0
 *                                              [ reserved   | base | unit | type ]
 *   type  ____ ____ ____0000  cumulative   only grows (until debugfs clears it)
 *         ____ ____ ____0001  instant      goes up and down
 *         ____ ____ ____0010  peak         the highest seen                  (merged)
 *         ____ ____ ____0011  linear hist  bucket i: [i*w, (i+1)*w)          (Linux 5.15)
 *         ____ ____ ____0100  log hist     bucket 0: [0,1), i: [2^(i-1),2^i) (Linux 5.15)
 *   unit  ____ ____ 0000____  none         ____ ____ 0001____  bytes
 *         ____ ____ 0010____  seconds      ____ ____ 0011____  cycles        ____ ____ 0100____  boolean (Linux 6.0)
 *   base  ____ 0000 ________  power of 10  ____ 0001 ________  power of 2
 *   A value in base units is raw * base^exponent. Bits 12 and up are reserved and ignored. A code that is not listed
 *   is passed on as it is.
 *
 *   Sources: include/uapi/linux/kvm.h, Documentation/virt/kvm/api.rst 4.133, virt/kvm/binary_stats.c; for the earlier
 *   layouts the patch series "KVM statistics data fd-based binary interface".
 *
 * RETURN CONTRACT
 *   The functions of layout.c return 0, or a negative enum kvmstats_error and then *fault says where.
 *   The functions of sweep.c return 0, or a negative errno; kvmstats_sweep also a number of files.
 *   The functions of process.c return what they name, or a negative errno.
 *   kvmstats_inject returns 0, an enum kvmstats_inject_result, or a negative errno.
 *   Nothing allocates, nothing keeps a pointer, nothing reads a byte outside [data, data + size).
 */
#ifndef KVMSTATS_H
#define KVMSTATS_H

#include <stddef.h>
#include <stdint.h>

/* ---- cdef: begin ---- */

/* Limits. A file beyond them is refused, never cut. The largest table known has 98 descriptors of 48 bytes. */
#define KVMSTATS_MAX_NAME_SIZE 4096
#define KVMSTATS_MAX_DESCRIPTORS 65536
#define KVMSTATS_MAX_DATA_SIZE 268435456 /* 256 MiB; numpy's structured types end at 2 GiB */

enum kvmstats_layout {
    KVMSTATS_LAYOUT_V2 = 2,
    KVMSTATS_LAYOUT_V5 = 5,
    KVMSTATS_LAYOUT_V9 = 9,
    KVMSTATS_LAYOUT_MERGED = 14, /* as in Linux 5.14 */
};

enum kvmstats_block {
    KVMSTATS_BLOCK_HEADER,
    KVMSTATS_BLOCK_ID,
    KVMSTATS_BLOCK_DESCRIPTORS,
    KVMSTATS_BLOCK_DATA,
};

/* What can be wrong, and what stands in the fault then. "offset" is always the byte of the file that is at fault. */
enum kvmstats_error {
    KVMSTATS_E_TRUNCATED = -1,    /* offset: the end of the file; block: what it cuts; limit: where that should end */
    KVMSTATS_E_LAYOUT = -2,       /* offset: the field that fits no layout; value: what it holds */
    KVMSTATS_E_FLAGS = -3,        /* header flags: a format of the future. value: the flags */
    KVMSTATS_E_NAME_SIZE = -4,    /* value: 0, or more than limit */
    KVMSTATS_E_NUM_DESC = -5,     /* value: more than limit */
    KVMSTATS_E_COUNT_DEFECT = -6, /* the series' x86 vCPU header. value: the count; limit: the true one */
    KVMSTATS_E_BLOCK_ALIGN = -7,  /* block, value: its offset, no multiple of 8 */
    KVMSTATS_E_OVERLAP = -8,      /* block, value: its offset, inside other, which ends at limit */
    KVMSTATS_E_STAT_SIZE = -9,    /* index: the descriptor whose size is 0 */
    KVMSTATS_E_STAT_ALIGN = -10,  /* index: the descriptor; value: its offset, no multiple of 8 */
    KVMSTATS_E_STAT_NAME = -11,   /* index: the descriptor whose name is empty */
    KVMSTATS_E_DATA_SIZE = -12,   /* index: the descriptor whose values end at value, beyond limit */
    KVMSTATS_E_DUPLICATE =
        -13, /* index: the descriptor; value: offset of the earlier one with its name (from Python) */
};

struct kvmstats_fault {
    uint64_t offset;
    uint64_t value;
    uint64_t limit;
    uint32_t index; /* of a descriptor */
    int32_t block;  /* enum kvmstats_block */
    int32_t other;  /* enum kvmstats_block */
};

struct kvmstats_header {
    int32_t layout;   /* enum kvmstats_layout */
    uint32_t swapped; /* 1: the file is in the other byte order than this machine */
    uint32_t flags;   /* merged only, else 0 */
    uint32_t name_size;
    uint32_t num_desc; /* the true count, also where count_defect */
    uint32_t id_offset;
    uint32_t id_size; /* room of the id: name_size in merged, else 64 */
    uint32_t desc_offset;
    uint32_t data_offset;
    uint32_t positional; /* 1: descriptors carry no offset (v2, v5) */
    uint32_t count_defect;
    uint32_t key_offset;  /* the header without its id (v2, v5: behind it; v9: before it) ... */
    uint32_t key_size;    /* ... is [key_offset, key_offset + key_size) */
    uint64_t desc_end;    /* end of the descriptors */
    uint64_t prefix_size; /* header, id and descriptors all lie in [0, prefix_size) */
    uint64_t data_size;   /* of the data as u64; set by kvmstats_read_descriptors */
};

struct kvmstats_desc {
    uint64_t name_offset; /* byte of the file */
    uint32_t name_length; /* without NUL */
    uint32_t flags;
    int32_t exponent;
    uint32_t size;
    uint32_t offset; /* bytes from the start of data, as u64 (positional layouts: computed) */
    uint32_t bucket_size;
};

/*
 * Recognise the layout and read the header at the start of [data, data + size). Only the header's own bytes are looked
 * at, so size may be less than the file's. Block offsets are checked against each other, not against size.
 * repair: 1 accepts KVMSTATS_E_COUNT_DEFECT, sets count_defect and the true num_desc. Such a file has descriptors and
 * no values: what its kernel serves as data is other kernel memory.
 */
int kvmstats_read_header(const void *data, size_t size, int repair, struct kvmstats_header *header,
                         struct kvmstats_fault *fault);

/*
 * Read header->num_desc descriptors into descs, which the caller made that long, and set header->data_size.
 * size must reach header->prefix_size (else KVMSTATS_E_TRUNCATED); the data itself is not looked at.
 */
int kvmstats_read_descriptors(const void *data, size_t size, struct kvmstats_header *header,
                              struct kvmstats_desc *descs, struct kvmstats_fault *fault);

/*
 * n values of value_size bytes at from, swapped or not, as native u64 at to. In place (from == to) is allowed.
 * value_size is 8; 4 in the VM files of 32-bit kernels in the positional layouts, whose values are unsigned long.
 */
void kvmstats_copy_values(const void *from, uint32_t value_size, uint32_t swapped, uint64_t n, uint64_t *to);

/* One file, prepared once, for the one-pointer calls of the hot path. The caller owns `values`. */
struct kvmstats_source {
    int32_t fd;
    uint32_t value_size; /* in the file: 8, or 4 */
    uint32_t swapped;
    uint64_t position; /* of the data block in the file */
    uint64_t count;    /* of values: room for that many u64 at values */
    uint64_t *values;
    uint64_t got; /* after -ENODATA: how many bytes the file still had */
};

/*
 * Read the data section of one file with one pread (more only if the kernel hands it out in pieces).
 * 0, or -errno of pread; EINTR is taken care of. -ENODATA: the file ended early; source->got says after how many bytes.
 * After an error the values are unspecified.
 */
int kvmstats_read(struct kvmstats_source *source);

/*
 * SWEEPS. One pass over many files, one pread each. A row is what one sweep keeps of one file: `width` values, either
 * all that were read, or those that `gather` picks. Sweep number s of a run writes the row of a file at
 * row + s * step, so the rows of the files of one kind make one array (sweeps, files, values).
 */
struct kvmstats_file {
    const struct kvmstats_source *source; /* fd, value_size, swapped; fd is looked up anew at each read */
    uint64_t position;                    /* of the first value that is read, in the file */
    uint64_t count;                       /* of values read */
    const uint32_t *gather;               /* which of them make the row; NULL: all */
    uint64_t width;                       /* of the row */
    uint64_t *row;
    uint64_t step;
    uint64_t failed_at; /* sweep at which it failed, counted from the start of the run */
    uint64_t got;       /* with error ENODATA: how many bytes the file still had */
    int32_t error;      /* errno, once it failed: a run then writes rows of 0, kvmstats_sweep tries again */
};

#define KVMSTATS_MAX_THREADS 64

struct kvmstats_sweep {
    struct kvmstats_file *files;
    uint64_t num_files;
    uint64_t *scratch; /* scratch_size values per thread, for files that gather; may be NULL if none does */
    uint64_t scratch_size;
    uint64_t owner;  /* see kvmstats_lock; 0: nobody */
    uint32_t failed; /* files that failed in the last kvmstats_sweep */
};

/*
 * Take the struct for an owner (any number from 2 on), or -EBUSY; and give it back, which does nothing if it is not that
 * owner's. kvmstats_sweep does both by itself, as owner 1; whoever starts a run over the same files and scratch holds it
 * from before the run until after it.
 */
int kvmstats_lock(struct kvmstats_sweep *sweep, uint64_t owner);
void kvmstats_unlock(struct kvmstats_sweep *sweep, uint64_t owner);

/*
 * Read every file once, into slot 0 of its row. Returns how many files failed (their rows are unspecified, `error`
 * says why), or -EBUSY if another thread is at work on the same struct.
 */
int kvmstats_sweep(struct kvmstats_sweep *sweep);

/*
 * RUNS. Sweeps on a schedule: tick t is due at start + t * interval. A tick that comes late is taken late; ticks that
 * were overtaken meanwhile are counted as missed: at any time taken + missed = ticks so far. The sweeps are kept in a
 * ring of `depth` chunks of `chunk` sweeps; sweep j of chunk c is slot (c % depth) * chunk + j of every row and of
 * time, sweep_ns and tick. A reader takes the chunks in order: chunk c is ready once head > c; when it is done with
 * it, it calls kvmstats_release with c + 1. While the ring is full, ticks are missed and also counted as overruns (with interval
 * 0 there are no ticks to miss: the run waits).
 */
enum kvmstats_wait {
    KVMSTATS_WAIT_SLEEP,  /* clock_nanosleep: no processor time, late by the timer's and scheduler's mood */
    KVMSTATS_WAIT_SPIN,   /* reads the clock all the time */
    KVMSTATS_WAIT_HYBRID, /* sleeps, and spins the last spin_ns */
};

struct kvmstats_chunk {
    uint64_t first;    /* number of its first sweep, counted from the start of the run */
    uint64_t used;     /* sweeps in it */
    uint64_t missed;   /* ticks missed since the sweep before, for each of them */
    uint64_t overruns; /* those of missed for which the ring had no room */
};

struct kvmstats_run {
    struct kvmstats_file *files; /* of this run alone, with rows of depth * chunk slots */
    uint64_t num_files;
    uint64_t *scratch; /* as in kvmstats_sweep */
    uint64_t scratch_size;
    int64_t interval; /* ns; 0: as fast as possible */
    uint64_t ticks;   /* how many there are; the run ends behind the last */
    int64_t duration; /* ns: it ends then too; 0: no limit */
    int64_t spin_ns;
    int32_t wait; /* enum kvmstats_wait */
    uint32_t threads;
    int32_t strict;   /* 1: the first file that fails ends the run; 0: the last one */
    int32_t event_fd; /* an eventfd that is told of every chunk that is ready and of the end, or -1 */
    uint64_t depth;
    uint64_t chunk;
    struct kvmstats_chunk *chunks; /* depth */
    int64_t *time;                 /* depth * chunk: CLOCK_MONOTONIC at the start of the sweep */
    int64_t *sweep_ns;             /* depth * chunk: how long it took */
    uint64_t *tick;                /* depth * chunk: its number on the schedule */
    int64_t start;                 /* set by the run: when tick 0 was due */
    uint64_t taken;                /* set by the run: sweeps */
    uint64_t missed, overruns;     /* set by the run: in all, those behind the last sweep included */
    uint64_t head;                 /* set by the run: chunks ready so far */
    uint64_t tail;                 /* set by kvmstats_release: chunks done with so far */
    uint32_t stop;                 /* set by kvmstats_stop */
    int32_t status;                /* set at the end: what kvmstats_run returned */
};

/*
 * Do the run, in this thread and threads - 1 more that end with it. Returns 0 at its end (ticks or duration over,
 * stopped, no file left, strict and a file failed), or -errno if a thread or semaphore could not be made. The thread's timer slack is set to 1 ns and put back.
 */
int kvmstats_run(struct kvmstats_run *run);

/* From another thread: end the run within 20 ms and a sweep; how many chunks are ready; done with the first `chunks`. */
void kvmstats_stop(struct kvmstats_run *run);
uint64_t kvmstats_ready(const struct kvmstats_run *run);
void kvmstats_release(struct kvmstats_run *run, uint64_t chunks);

/*
 * OTHER PROCESSES. Two system calls, as they are.
 *
 * kvmstats_getfd: pidfd_getfd(2), a new close-on-exec fd for the file that the process of `pidfd` has as `fd`. The
 * kernel looks at the permission (PTRACE_MODE_ATTACH_REALCREDS: -EPERM) before it looks for the fd (-EBADF), so that an
 * fd that no process can have, INT_MAX, asks for the permission alone. -ENOSYS before Linux 5.6, -ESRCH: it has ended.
 *
 * kvmstats_same_file: kcmp(2), 1 if two fds of a process are one open file (dup, try_clone), 0 if not. -EPERM: not
 * permitted (PTRACE_MODE_READ_REALCREDS), -ENOSYS: a kernel without CONFIG_KCMP.
 */
int kvmstats_getfd(int pidfd, int fd);
int kvmstats_same_file(int pid, int fd, int other);

/*
 * INJECTION (inject.c, x86-64 only). KVM gives a stats file only to the process that made the VM; pidfd_getfd lets others
 * borrow one that is open there. So a thread of the running VMM is made to open it, and it stays open in the VMM.
 *
 * The thread is stopped by ptrace (SEIZE, INTERRUPT: no signal is sent) right behind a `syscall` instruction. Below its
 * stack goes what the kernel puts there when it delivers a signal (arch/x86/kernel/signal_64.c, asm/sigframe.h,
 * uapi/asm/sigcontext.h). Then one PTRACE_SETREGSET makes it run the ioctl and return into rt_sigreturn:
 *
 *   rsp before ->   +---------------------------------+
 *                   | red zone, 128 bytes             |
 *                   +---------------------------------+
 *                   | magic2, behind the xstate       |   what XRSTOR takes: the regset NT_X86_XSTATE, with sw_reserved
 *   64-aligned ->   | xstate (fxsave, header, ...)    |   (magic1, extended_size, xfeatures, xstate_size) in its fxsave
 *                   +---------------------------------+
 *                   | siginfo, 128 bytes of 0         |
 *                   | ucontext: flags, stack, mask,   |   all registers of the interrupted call; ss_flags invalid, which
 *                   |           sigcontext -> xstate  |   keeps the thread's own sigaltstack
 *   16n + 8 = rsp ->| pretcode: the restorer          |
 *                   +---------------------------------+
 *   rip -> syscall; ret (rax = ioctl, orig_rax = -1)     -> restorer: mov $15, %eax; syscall (rt_sigreturn)
 *
 * Nobody steps and nothing is patched: memory is written before the commit, and from the commit on the thread finds back
 * by itself. So the tracer may die at any point. What the thread sees of it is what a signal with an SA_RESTART handler
 * would have done to the call it was in: it starts again (ERESTARTSYS, ERESTARTNOINTR) or fails with EINTR (the others;
 * KVM_RUN too). The thread's stack needs room as for any such handler, 3 KiB (with AMX 12 KiB): a thread on a stack that
 * has none below it which is its own (Go's, or a small sigaltstack) must not be used.
 */
enum kvmstats_inject_result {
    KVMSTATS_INJECT_DONE,          /* committed: the thread makes the call when it next runs */
    KVMSTATS_INJECT_UNSUPPORTED,   /* this build is not for x86-64 */
    KVMSTATS_INJECT_GONE,          /* there is no such thread, or it is ending */
    KVMSTATS_INJECT_KERNEL_THREAD, /* it has no user registers */
    KVMSTATS_INJECT_TRACED,        /* value: by which process */
    KVMSTATS_INJECT_HALTED,        /* by SIGSTOP or the like */
    KVMSTATS_INJECT_SECCOMP,       /* a filter might kill the process for the call. value: the mode */
    KVMSTATS_INJECT_SHADOW_STACK,  /* CET: the way back would be a forged return */
    KVMSTATS_INJECT_FOREIGN_ABI,   /* 32-bit or x32 code. value: the code segment, or the number of the call */
    KVMSTATS_INJECT_NO_SYSCALL,    /* it was interrupted elsewhere: try again. value: its rip */
    KVMSTATS_INJECT_OTHER_CALL,    /* in_run, and it was in no KVM_RUN of `fds`: try again. value: number of the call */
    KVMSTATS_INJECT_CODE,          /* what stands at `call` or `restorer` is not that. value: the address */
    KVMSTATS_INJECT_XSTATE,        /* extended state of an unknown size. value: the size */
    KVMSTATS_INJECT_STACK,         /* no writable memory for the frame. value: its address */
    KVMSTATS_INJECT_TIMEOUT,       /* it did not stop in time: asleep in the kernel where no signal wakes it */
    KVMSTATS_INJECT_KILLED,        /* the tracer ended early; `step` says behind what */
};

/* What the tracer does, in turn. From STEP_COMMIT on the call will be made, whatever becomes of the tracer. */
enum kvmstats_inject_step {
    KVMSTATS_STEP_NONE,
    KVMSTATS_STEP_SEIZE,
    KVMSTATS_STEP_INTERRUPT,
    KVMSTATS_STEP_STOP, /* waited for; signals that come first are handed on */
    KVMSTATS_STEP_REGS,
    KVMSTATS_STEP_STATUS, /* in /proc: seccomp, shadow stack */
    KVMSTATS_STEP_XSTATE,
    KVMSTATS_STEP_MASK,
    KVMSTATS_STEP_CODE,
    KVMSTATS_STEP_FRAME,
    KVMSTATS_STEP_COMMIT,
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
    int64_t timeout_ns; /* for the whole; more than 0 */
    int32_t in_run;     /* 0: the ioctl is made on fds[0]. 1: on that one of fds whose KVM_RUN the thread was in */
    int32_t kill_after; /* enum kvmstats_inject_step: there the tracer kills itself. For tests; else 0 */
    int32_t fd;         /* set: what the ioctl is made on */
    int32_t step;       /* set: the last step that was done */
    int32_t signals;    /* set: how many were handed on */
    int64_t stopped_ns; /* set: from before the interrupt until behind the detach (CLOCK_MONOTONIC) */
    uint64_t value;     /* set: see the result */
};

/*
 * Make the thread do the ioctl. Returns an enum kvmstats_inject_result, or -errno of the call that failed behind `step`
 * (EPERM: not permitted to trace it). Except after DONE, or KILLED from STEP_COMMIT on, no call will be made. What the
 * ioctl returns is not known: look for the new fd in /proc/PID/fd. The thread is not waited for.
 *
 * in_run 1 is for vCPUs. Their ioctls wait for vcpu->mutex, which KVM_RUN holds: only a thread that was in KVM_RUN of the
 * very vCPU cannot be kept waiting by itself. in_run 0 is for VM fds, whose ioctl waits for nothing.
 *
 * The tracer is a child with all signals blocked and without an exit signal: no SIGCHLD, no other wait() sees it. It is
 * given timeout_ns, then killed, and always reaped before the return. Thread-safe; blocks.
 */
int kvmstats_inject(struct kvmstats_inject *job);

/* ---- cdef: end ---- */

#endif
