/* SPDX-License-Identifier: MIT */
/*
 * inject_target.c - a VMM whose threads notice if a register changes: the target of csrc/inject.c
 *
 *   inject_target VMS VCPUS [busy] [seccomp] [parked] [full] [spin] [held] [twice] [vfork]
 *
 * Every system call that a thread waits in is made by checked_call, which loads all general, x87, SSE, AVX and AVX-512
 * registers and the flags with random values before the `syscall`, and compares all of them after it. Guests count in
 * their memory, and store an SSE register that must not change; those of odd vCPUs also exit in each turn. They halt, in
 * KVM_RUN, until the next tick of 1 ms, and leave the processors to the tests.
 *
 * Options
 *   busy     guests do not halt                        parked  no vCPU runs
 *   seccomp  with a filter that allows everything      full    no fd is free
 *   spin     one thread makes no system call           held    the first VM's stats files are open
 *   twice    each VM has two fds                       vfork   one thread waits for a child, where no signal wakes it
 *
 * Commands on stdin: "report" prints one line of JSON, "wake" lets blocked calls return, "close" closes the stats
 * files; the end of stdin ends the program.
 */
#define _GNU_SOURCE
#include <cpuid.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/futex.h>
#include <linux/kvm.h>
#include <linux/seccomp.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static void need(int good, const char *what)
{
    if (good)
        return;
    fprintf(stderr, "inject_target: %s: %s\n", what, strerror(errno));
    exit(2);
}

/* ---- a system call with a value in every register */

enum { XSAVE_ROOM = 4096, USED_FEATURES = 0xe7 /* x87, SSE, AVX, AVX-512 */ };

struct context {
    uint64_t in[16], out[16]; /* rax rbx rcx rdx rsi rdi rbp r8 .. r15, flags */
    _Alignas(64) unsigned char home[XSAVE_ROOM], full[XSAVE_ROOM], after[XSAVE_ROOM];
};

_Static_assert(offsetof(struct context, out) == 128 && offsetof(struct context, home) == 256 &&
                   offsetof(struct context, full) == 4352 && offsetof(struct context, after) == 8448,
               "offsets in the assembly");

void checked_call_raw(struct context *c, uint64_t features);
__asm__(".text\n.globl checked_call_raw\nchecked_call_raw:\n"
        "push %rbx; push %rbp; push %r12; push %r13; push %r14; push %r15\n"
        "push %rsi; push %rdi\n"
        "mov %esi, %eax; xor %edx, %edx; xsave64 256(%rdi); xrstor64 4352(%rdi)\n"
        "pushq 120(%rdi); popfq\n"
        "mov 0(%rdi), %rax; mov 8(%rdi), %rbx; mov 24(%rdi), %rdx; mov 32(%rdi), %rsi; mov 48(%rdi), %rbp\n"
        "mov 56(%rdi), %r8; mov 64(%rdi), %r9; mov 72(%rdi), %r10; mov 80(%rdi), %r11; mov 88(%rdi), %r12\n"
        "mov 96(%rdi), %r13; mov 104(%rdi), %r14; mov 112(%rdi), %r15; mov 40(%rdi), %rdi\n"
        /* In the red zone, where nothing may write. */
        "mov %r15, -8(%rsp); mov %r14, -128(%rsp)\n"
        "syscall\n"
        "mov -8(%rsp), %rcx; pushfq; pop %r11\n"
        "cmp %r15, %rcx; mov $0, %rcx; jne 1f; cmp %r14, -128(%rsp); jne 1f; mov $1, %rcx\n"
        "1: mov %r11, -16(%rsp); mov (%rsp), %r11\n"
        "mov %rax, 128(%r11); mov %rbx, 136(%r11); mov %rcx, 144(%r11); mov %rdx, 152(%r11); mov %rsi, 160(%r11)\n"
        "mov %rdi, 168(%r11); mov %rbp, 176(%r11); mov %r8, 184(%r11); mov %r9, 192(%r11); mov %r10, 200(%r11)\n"
        "mov %r12, 216(%r11); mov %r13, 224(%r11); mov %r14, 232(%r11); mov %r15, 240(%r11)\n"
        "mov -16(%rsp), %rax; mov %rax, 248(%r11)\n"
        "cld; pop %rdi; pop %rsi\n"
        "mov %esi, %eax; xor %edx, %edx; xsave64 8448(%rdi); xrstor64 256(%rdi)\n"
        "pop %r15; pop %r14; pop %r13; pop %r12; pop %rbp; pop %rbx; ret\n");

static uint64_t features;
static struct {
    unsigned offset, size;
} parts[8];

static void find_features(void)
{
    unsigned a, b, c, d;
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    features = low & USED_FEATURES;
    for (unsigned i = 2; i < 8; ++i)
        if (features >> i & 1) {
            __cpuid_count(0xD, i, a, b, c, d);
            parts[i].offset = b;
            parts[i].size = a;
            need(a + b <= XSAVE_ROOM, "xsave area");
        }
}

struct thread {
    const char *name;
    int number, fd;
    void *(*work)(void *);
    struct kvm_run *run;
    pthread_t thread;
    pid_t tid;
    unsigned long calls, eintr, other, bad;
    char first[80]; /* the first thing that was bad */
    uint64_t random;
};

static uint64_t next(struct thread *t)
{
    t->random ^= t->random << 13;
    t->random ^= t->random >> 7;
    t->random ^= t->random << 17;
    return t->random;
}

static void fill(struct thread *t, unsigned char *at, size_t size)
{
    for (size_t i = 0; i + 8 <= size; i += 8) {
        uint64_t value = next(t);
        memcpy(at + i, &value, 8);
    }
}

static void bad(struct thread *t, const char *what, int which)
{
    if (t->bad++ == 0)
        snprintf(t->first, sizeof t->first, "%s %d", what, which);
}

static long checked_call(struct thread *t, struct context *c, long nr, long a, long b, long d, long e, long f, long g)
{
    const long arguments[] = {a, b, d, e, f, g};
    static const int place[] = {5, 4, 3, 9, 7, 8}; /* rdi rsi rdx r10 r8 r9 */
    const uint16_t fcw = 0x0f7f, fsw = 0;
    const uint32_t mxcsr = 0x7fbf;
    int flags = 0x4c5 | 0x800 | 0x10; /* CF PF ZF SF, DF, OF, AF */

    for (int i = 0; i < 15; ++i)
        c->in[i] = next(t);
    for (int i = 0; i < 6; ++i)
        c->in[place[i]] = (uint64_t)arguments[i];
    c->in[0] = (uint64_t)nr;
    c->in[15] = (uint64_t)flags | 0x202;
    memset(c->full, 0, sizeof c->full);
    memcpy(c->full, &fcw, 2);
    memcpy(c->full + 2, &fsw, 2);
    c->full[4] = 0xff;
    memcpy(c->full + 24, &mxcsr, 4);
    for (int i = 0; i < 8; ++i) {
        unsigned char *st = c->full + 32 + 16 * i;
        fill(t, st, 8);
        st[8] = (unsigned char)next(t);
        st[9] = 0x3f;
    }
    fill(t, c->full + 160, 256);
    for (int i = 2; i < 8; ++i)
        fill(t, c->full + parts[i].offset, parts[i].size);
    memcpy(c->full + 512, &features, 8);

    checked_call_raw(c, features);

    ++t->calls;
    for (int i = 1; i < 15; ++i)
        if (i != 2 && i != 10 && c->in[i] != c->out[i])
            bad(t, "register", i);
    if (c->out[2] != 1)
        bad(t, "red zone", 0);
    if ((c->out[15] ^ c->in[15]) & 0xcd5)
        bad(t, "flags", (int)c->out[15]);
    if (memcmp(c->full, c->after, 5) || memcmp(c->full + 24, c->after + 24, 4))
        bad(t, "control words", 0);
    for (int i = 0; i < 8; ++i)
        if (memcmp(c->full + 32 + 16 * i, c->after + 32 + 16 * i, 10))
            bad(t, "st", i);
    if (memcmp(c->full + 160, c->after + 160, 256))
        bad(t, "xmm", 0);
    for (int i = 2; i < 8; ++i)
        if (memcmp(c->full + parts[i].offset, c->after + parts[i].offset, parts[i].size))
            bad(t, "xstate part", i);
    return (long)c->out[0];
}

/* ---- threads that wait in a call */

static int pipes[2], idle[2], epoll;
static uint32_t futex_word;
static volatile int quit;
static unsigned long handled;

static void start(struct thread *t, struct context **c)
{
    static __thread _Alignas(64) struct context mine;
    t->tid = (pid_t)syscall(SYS_gettid);
    t->random = 88172645463325252u + (uint64_t)t->tid;
    *c = &mine;
}

static void note(struct thread *t, long result, long good1, long good2)
{
    if (result == -EINTR)
        ++t->eintr;
    else if (result != good1 && result != good2) {
        if (t->other++ == 0)
            snprintf(t->first, sizeof t->first, "result %ld", result);
    }
}

static void *in_nanosleep(void *argument)
{
    struct thread *t = argument;
    struct context *c;
    struct timespec long_time = {.tv_sec = 1000}, rest;
    for (start(t, &c); !quit;)
        note(t, checked_call(t, c, SYS_nanosleep, (long)&long_time, (long)&rest, 0, 0, 0, 0), -EINTR, -EINTR);
    return NULL;
}

static void *in_futex(void *argument)
{
    struct thread *t = argument;
    struct context *c;
    for (start(t, &c); !quit;) {
        uint32_t seen = __atomic_load_n(&futex_word, __ATOMIC_ACQUIRE);
        note(t, checked_call(t, c, SYS_futex, (long)&futex_word, FUTEX_WAIT, (long)seen, 0, 0, 0), 0, -EAGAIN);
    }
    return NULL;
}

static void *in_timed_futex(void *argument)
{
    struct thread *t = argument;
    struct context *c;
    struct timespec long_time = {.tv_sec = 1000};
    for (start(t, &c); !quit;) {
        uint32_t seen = __atomic_load_n(&futex_word, __ATOMIC_ACQUIRE);
        note(t, checked_call(t, c, SYS_futex, (long)&futex_word, FUTEX_WAIT, (long)seen, (long)&long_time, 0, 0), 0,
             -EAGAIN);
    }
    return NULL;
}

static void *in_read(void *argument)
{
    struct thread *t = argument;
    struct context *c;
    char byte;
    for (start(t, &c); !quit;)
        note(t, checked_call(t, c, SYS_read, pipes[0], (long)&byte, 1, 0, 0, 0), 1, 0);
    return NULL;
}

static void *in_epoll(void *argument)
{
    struct thread *t = argument;
    struct context *c;
    struct epoll_event event;
    for (start(t, &c); !quit;)
        note(t, checked_call(t, c, SYS_epoll_wait, epoll, (long)&event, 1, 1000000, 0, 0), 0, 0);
    return NULL;
}

/* With a signal mask for the time of the call: SIGUSR2 is unblocked only there. */
static void *in_ppoll(void *argument)
{
    struct thread *t = argument;
    struct context *c;
    sigset_t blocked, open, now;
    sigemptyset(&blocked);
    sigaddset(&blocked, SIGUSR2);
    sigaddset(&blocked, SIGWINCH);
    pthread_sigmask(SIG_SETMASK, &blocked, &open);
    uint64_t inside = 0;
    stack_t had; /* none, except under a sanitizer */
    sigaltstack(NULL, &had);
    for (start(t, &c); !quit;) {
        struct timespec long_time = {.tv_sec = 1000};
        struct pollfd poll = {.fd = idle[0], .events = POLLIN};
        note(t, checked_call(t, c, SYS_ppoll, (long)&poll, 1, (long)&long_time, (long)&inside, 8, 0), 0, 0);
        pthread_sigmask(SIG_SETMASK, NULL, &now);
        if (!sigismember(&now, SIGUSR2) || !sigismember(&now, SIGWINCH) || sigismember(&now, SIGUSR1))
            bad(t, "mask", 0);
        stack_t stack;
        sigaltstack(NULL, &stack);
        if (stack.ss_sp != had.ss_sp || stack.ss_flags != had.ss_flags)
            bad(t, "sigaltstack", 0);
    }
    return NULL;
}

static void *in_poll(void *argument)
{
    static char room[65536];
    struct thread *t = argument;
    struct context *c;
    stack_t stack = {.ss_sp = room, .ss_size = sizeof room}, now;
    sigaltstack(&stack, NULL);
    for (start(t, &c); !quit;) {
        struct pollfd poll = {.fd = idle[0], .events = POLLIN};
        note(t, checked_call(t, c, SYS_poll, (long)&poll, 1, 1000000, 0, 0, 0), 0, 0);
        sigaltstack(NULL, &now);
        if (now.ss_sp != room || now.ss_size != sizeof room || now.ss_flags)
            bad(t, "sigaltstack", 1);
    }
    return NULL;
}

static void *in_pause(void *argument)
{
    struct thread *t = argument;
    struct context *c;
    for (start(t, &c); !quit;)
        note(t, checked_call(t, c, SYS_pause, 0, 0, 0, 0, 0, 0), -EINTR, -EINTR);
    return NULL;
}

static void *in_no_call(void *argument)
{
    struct thread *t = argument;
    t->tid = (pid_t)syscall(SYS_gettid);
    while (!quit)
        ++*(volatile unsigned long *)&t->calls;
    return NULL;
}

/* Wait in the kernel where only a fatal signal wakes the thread. */
static void *in_vfork(void *argument)
{
    struct thread *t = argument;
    t->tid = (pid_t)syscall(SYS_gettid);
    if (vfork() == 0) {
        struct timespec rest = {.tv_nsec = 1000000};
        syscall(SYS_prctl, PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0);
        while (!__atomic_load_n(&futex_word, __ATOMIC_ACQUIRE))
            syscall(SYS_nanosleep, &rest, NULL);
        _exit(0);
    }
    ++t->calls;
    return NULL;
}

/* ---- vCPUs */

/* Below CODE are the vectors and the stack. */
enum { CODE = 0x1000, DATA = 0x2000, SIZE = 0x4000, STRIDE = 64, MOST = 64, NMI = 2 };
static unsigned char *memory[8];
static int vms[8], num_vms, num_vcpus;

static void *in_guest(void *argument)
{
    struct thread *t = argument;
    struct context *c;
    for (start(t, &c); !quit;) {
        long result = checked_call(t, c, SYS_ioctl, t->fd, KVM_RUN, 0, 0, 0, 0);
        note(t, result, 0, 0);
        if (result == 0 && t->run->exit_reason != KVM_EXIT_IO && t->other++ == 0)
            snprintf(t->first, sizeof t->first, "exit reason %u", t->run->exit_reason);
        if (t->other) /* do not spin */
            usleep(1000);
    }
    return NULL;
}

static void *in_park(void *argument)
{
    struct thread *t = argument;
    t->tid = (pid_t)syscall(SYS_gettid);
    while (!quit)
        usleep(100000);
    return NULL;
}

static void make_vcpu(struct thread *t, int kvm, int vm, int number, int busy)
{
    struct kvm_mp_state runnable = {KVM_MP_STATE_RUNNABLE}; /* vCPUs but the first would wait to be started by it */
    struct kvm_sregs sregs;
    struct kvm_regs regs = {
        .rip = (uint64_t)CODE + 32u * (number & 1), .rflags = 2, .rbx = DATA + (uint64_t)number * STRIDE, .rsp = CODE};
    int size = ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
    t->number = number;
    t->fd = ioctl(vm, KVM_CREATE_VCPU, number);
    need(t->fd >= 0 && size > 0, "KVM_CREATE_VCPU");
    t->run = mmap(NULL, (size_t)size, PROT_READ | PROT_WRITE, MAP_SHARED, t->fd, 0);
    need(t->run != MAP_FAILED, "mmap of a vCPU");
    need(ioctl(t->fd, KVM_GET_SREGS, &sregs) == 0, "KVM_GET_SREGS");
    sregs.cs.base = 0;
    sregs.cs.selector = 0;
    sregs.cr4 |= 0x200; /* OSFXSR */
    need(ioctl(t->fd, KVM_SET_SREGS, &sregs) == 0, "KVM_SET_SREGS");
    need(ioctl(t->fd, KVM_SET_REGS, &regs) == 0, "KVM_SET_REGS");
    need(busy || ioctl(t->fd, KVM_SET_MP_STATE, &runnable) == 0, "KVM_SET_MP_STATE");
}

static int make_vm(int kvm, int which, int busy)
{
    /* movups xmm0, [bx+32]; again: inc dword [bx]; movups [bx+16], xmm0; (out 16, al;) hlt or nop; jmp again */
    static const unsigned char counts[] = {0x0f, 0x10, 0x47, 0x20, 0x66, 0xff, 0x07,
                                           0x0f, 0x11, 0x47, 0x10, 0xf4, 0xeb, 0xf6};
    static const unsigned char exits[] = {0x0f, 0x10, 0x47, 0x20, 0x66, 0xff, 0x07, 0x0f,
                                          0x11, 0x47, 0x10, 0xe6, 0x10, 0xf4, 0xeb, 0xf4};
    static const unsigned char nop = 0x90, iret = 0xcf, vector[] = {0x40, CODE >> 8, 0, 0}; /* CODE + 64 */
    int vm = ioctl(kvm, KVM_CREATE_VM, 0);
    need(vm >= 0, "KVM_CREATE_VM");
    ioctl(vm, KVM_SET_TSS_ADDR, 0x7fffd000);
    need(busy || ioctl(vm, KVM_CREATE_IRQCHIP) == 0, "KVM_CREATE_IRQCHIP"); /* which halts inside KVM_RUN */
    unsigned char *room = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    need(room != MAP_FAILED, "mmap");
    memcpy(room + 4 * NMI, vector, sizeof vector);
    memcpy(room + CODE, counts, sizeof counts);
    memcpy(room + CODE + 32, exits, sizeof exits);
    room[CODE + 64] = iret;
    if (busy)
        room[CODE + 11] = room[CODE + 32 + 13] = nop;
    for (int i = 0; i < MOST; ++i)
        for (int j = 0; j < 16; ++j)
            room[DATA + i * STRIDE + 16 + j] = room[DATA + i * STRIDE + 32 + j] = (unsigned char)(i * 16 + j + 7);
    struct kvm_userspace_memory_region region = {.memory_size = SIZE, .userspace_addr = (uint64_t)(uintptr_t)room};
    need(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region) == 0, "KVM_SET_USER_MEMORY_REGION");
    memory[which] = room + DATA;
    return vms[which] = vm;
}

/* Wake what is halted: an NMI to all vCPUs, which needs nothing of a guest but an iret. */
static void *in_ticks(void *argument)
{
    struct kvm_msi nmi = {.address_lo = 0xfee00000 | 0xff << 12 /* all */, .data = 4 << 8 /* NMI */};
    (void)argument;
    for (;; usleep(1000))
        for (int vm = 0; vm < num_vms; ++vm)
            ioctl(vms[vm], KVM_SIGNAL_MSI, &nmi);
    return NULL;
}

/* ---- */

static void handler(int number)
{
    (void)number;
    __atomic_add_fetch(&handled, 1, __ATOMIC_RELAXED);
}

static struct thread threads[8 * MOST + 16];
static int num_threads;

static void report(void)
{
    printf("{\"handled\": %lu, \"guest_bad\": ", __atomic_load_n(&handled, __ATOMIC_RELAXED));
    int guest_bad = 0;
    for (int vm = 0; vm < num_vms; ++vm)
        for (int i = 0; i < num_vcpus; ++i)
            guest_bad += memcmp(memory[vm] + i * STRIDE + 16, memory[vm] + i * STRIDE + 32, 16) != 0;
    printf("%d, \"guest\": [", guest_bad);
    for (int vm = 0; vm < num_vms; ++vm)
        for (int i = 0; i < num_vcpus; ++i) {
            uint32_t count;
            memcpy(&count, memory[vm] + i * STRIDE, 4);
            printf("%s%u", vm || i ? ", " : "", count);
        }
    printf("], \"threads\": {");
    for (int i = 0; i < num_threads; ++i) {
        struct thread *t = &threads[i];
        printf("%s\"%s%d\": {\"tid\": %d, \"calls\": %lu, \"eintr\": %lu, \"other\": %lu, \"bad\": %lu, \"first\": "
               "\"%s\"}",
               i ? ", " : "", t->name, i, t->tid, t->calls, t->eintr, t->other, t->bad, t->first);
    }
    printf("}}\n");
    fflush(stdout);
}

static void close_stats(void)
{
    struct rlimit limit;
    char path[32], link[64];
    getrlimit(RLIMIT_NOFILE, &limit);
    for (int fd = 3, free_in_a_row = 0; fd < (int)limit.rlim_cur && free_in_a_row < 100; ++fd) {
        snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
        ssize_t length = readlink(path, link, sizeof link - 1);
        free_in_a_row = length < 0 ? free_in_a_row + 1 : 0;
        if (length < 0)
            continue;
        link[length] = 0;
        if (strstr(link, "kvm-") && strstr(link, "-stats"))
            close(fd);
    }
}

static void add(const char *name, void *(*work)(void *))
{
    threads[num_threads].name = name;
    threads[num_threads++].work = work;
}

int main(int argc, char **argv)
{
    int busy = 0, seccomp = 0, parked = 0, full = 0, spin = 0, held = 0, twice = 0, in_child = 0;
    need(argc >= 3, "VMS VCPUS");
    num_vms = atoi(argv[1]);
    num_vcpus = atoi(argv[2]);
    need(num_vms >= 0 && num_vms <= 8 && num_vcpus >= 0 && num_vcpus <= MOST, "VMS VCPUS");
    for (int i = 3; i < argc; ++i) {
        busy |= !strcmp(argv[i], "busy");
        seccomp |= !strcmp(argv[i], "seccomp");
        parked |= !strcmp(argv[i], "parked");
        full |= !strcmp(argv[i], "full");
        spin |= !strcmp(argv[i], "spin");
        held |= !strcmp(argv[i], "held");
        twice |= !strcmp(argv[i], "twice");
        in_child |= !strcmp(argv[i], "vfork");
    }
    find_features();
    need(pipe2(pipes, O_CLOEXEC) == 0 && pipe2(idle, O_CLOEXEC) == 0, "pipe2");
    epoll = epoll_create1(EPOLL_CLOEXEC);
    need(epoll >= 0, "epoll_create1");
    struct sigaction action = {.sa_handler = handler, .sa_flags = SA_RESTART};
    sigaction(SIGUSR1, &action, NULL);
    sigaction(SIGUSR2, &action, NULL);
    sigaction(SIGRTMIN, &action, NULL);

    int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
    need(kvm >= 0, "/dev/kvm");
    for (int i = 0; i < num_vms; ++i) {
        int vm = make_vm(kvm, i, busy);
        for (int j = 0; j < num_vcpus; ++j) {
            add("vcpu", parked ? in_park : in_guest);
            make_vcpu(&threads[num_threads - 1], kvm, vm, j, busy);
            if (held && i == 0)
                need(ioctl(threads[num_threads - 1].fd, 0xAECE) >= 0, "KVM_GET_STATS_FD");
        }
        if (held && i == 0)
            need(ioctl(vm, 0xAECE) >= 0, "KVM_GET_STATS_FD");
        if (twice) /* a second fd of the same VM */
            need(fcntl(vm, F_DUPFD_CLOEXEC, 0) >= 0, "dup");
    }
    add("nanosleep", in_nanosleep);
    add("futex", in_futex);
    add("timed_futex", in_timed_futex);
    add("read", in_read);
    add("epoll", in_epoll);
    add("ppoll", in_ppoll);
    add("poll", in_poll);
    add("pause", in_pause);
    if (spin)
        add("spin", in_no_call);
    if (in_child)
        add("vfork", in_vfork);
    if (full) {
        int free_fd = dup(0);
        struct rlimit limit = {.rlim_cur = (rlim_t)free_fd + 1, .rlim_max = (rlim_t)free_fd + 1};
        need(setrlimit(RLIMIT_NOFILE, &limit) == 0, "setrlimit");
    }
    if (seccomp) {
        struct sock_filter allow[] = {BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW)};
        struct sock_fprog program = {.len = 1, .filter = allow};
        need(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 && prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) == 0,
             "seccomp");
    }
    for (int i = 0; i < num_threads; ++i)
        need(pthread_create(&threads[i].thread, NULL, threads[i].work, &threads[i]) == 0, "pthread_create");
    pthread_t ticks;
    need(busy || pthread_create(&ticks, NULL, in_ticks, NULL) == 0, "pthread_create");
    for (int i = 0; i < num_threads; ++i)
        while (!__atomic_load_n(&threads[i].tid, __ATOMIC_ACQUIRE))
            usleep(1000);
    printf("ready\n");
    fflush(stdout);

    char line[64];
    while (fgets(line, sizeof line, stdin)) {
        if (!strcmp(line, "report\n"))
            report();
        else if (!strcmp(line, "close\n"))
            close_stats();
        else if (!strcmp(line, "wake\n")) {
            need(write(pipes[1], "x", 1) == 1, "write");
            __atomic_add_fetch(&futex_word, 1, __ATOMIC_RELEASE);
            syscall(SYS_futex, &futex_word, FUTEX_WAKE, 100, NULL, NULL, 0);
        }
    }
    _exit(0);
}
