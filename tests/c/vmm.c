/* SPDX-License-Identifier: MIT */
/*
 * vmm.c - a VMM that does what VMMs may do, and prints what it sees
 *
 * vmm MODE prints the result of each call, its errno, and its fds below 512: the same with and without the hold
 * library. Lines that start with "held" count the fds from 512 on, so they may differ.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <pthread.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <unistd.h>

enum {
    GET_API_VERSION = 0xAE00,
    CREATE_VM = 0xAE01,
    CREATE_VCPU = 0xAE41,
    GET_STATS_FD = 0xAECE,
    FIRST_HELD = 512,
    THREADS = 16,
};
#define GET_REGS 0x8090AE81U /* bit 31 is set: as an int it is negative */

static int kvm;

/* ---- printing */

static void say(const char *what, long result)
{
    int error = errno;
    printf("%s: %ld, errno %d\n", what, result, error);
    errno = 77; /* must survive a call that succeeds */
}

/* Returns how many fds there are from 512 on; prints that, and with `aloud` the fds below. */
static int list(const char *when, int aloud)
{
    int held = 0;
    if (aloud)
        printf("%s:", when);
    for (int fd = 0; fd < 2048; ++fd) {
        char path[64], link[64];
        snprintf(path, sizeof path, "/proc/thread-self/fd/%d", fd);
        ssize_t n = readlink(path, link, sizeof link - 1);
        if (n < 0)
            continue;
        link[n] = '\0';
        if (fd >= FIRST_HELD)
            held += 1;
        else if (aloud)
            printf(" %d%s", fd, strstr(link, "kvm") ? link : "");
    }
    if (aloud)
        printf("\n");
    printf("held %s: %d\n", when, held);
    errno = 77;
    return held;
}

static int check(int result, const char *what)
{
    if (result < 0) {
        printf("%s failed: %s\n", what, strerror(errno));
        exit(1);
    }
    return result;
}

static int make(int fd, unsigned long request, long argument, const char *what)
{
    return check(ioctl(fd, (int)request, argument), what);
}

/* ---- modes */

static void basic(void)
{
    int vm = ioctl(kvm, CREATE_VM, 0);
    say("a VM", vm);
    int vcpu = ioctl(vm, CREATE_VCPU, 0);
    say("a vCPU", vcpu);
    say("another", ioctl(vm, CREATE_VCPU, 1));
    say("the same again", ioctl(vm, CREATE_VCPU, 1));
    say("a VM of no known type", ioctl(kvm, CREATE_VM, 0x7f));
    say("a vCPU of no VM", ioctl(kvm, CREATE_VCPU, 2));
    say("no third argument", ioctl(kvm, GET_API_VERSION));
    say("no fd", ioctl(-1, CREATE_VM, 0));

    int (*wide)(int, unsigned long, ...) = (int (*)(int, unsigned long, ...))(void *)ioctl;
    uint64_t registers[18] = {0};
    say("sign-extended", wide(vcpu, (unsigned long)(int)GET_REGS, registers));
    say("its rflags", (long)registers[17]);
    if (sizeof(long) == 8)
        say("more than 32 bits", wide(kvm, (unsigned long)((uint64_t)1 << 40 | CREATE_VM), 0));

    int (*found)(int, unsigned long, ...) = (int (*)(int, unsigned long, ...))dlsym(RTLD_DEFAULT, "ioctl");
    say("dlsym", found(vm, CREATE_VCPU, 2));

    int stats = ioctl(vcpu, GET_STATS_FD);
    say("a stats fd of its own", stats);
    char id[5] = "";
    say("read", pread(stats, id, 4, 24));
    printf("%s\n", id);

    int ends[2];
    check(pipe(ends), "pipe");
    say("KVM's number to a pipe", ioctl(ends[0], CREATE_VM, 0));
    say("no arguments but two", ioctl(ends[0], FIOCLEX));
    list("made", 1);
    say("close the second vCPU", close(vcpu + 1));
    say("close it twice", close(vcpu + 1));
    say("close nothing", close(-1));
    say("close far off", close(100000));
    say("a vCPU's own stats fd", close(stats));
    say("a file takes its number", dup(ends[0]));
    say("close that", close(vcpu + 1));
    say("close the VM", close(vm));
    list("closed", 1);
}

static pthread_barrier_t barrier;
static int shared_vm;

static void *make_vcpu(void *number)
{
    pthread_barrier_wait(&barrier);
    errno = 77;
    int vcpu = ioctl(shared_vm, CREATE_VCPU, (long)(intptr_t)number);
    if (vcpu < 0 || errno != 77)
        printf("thread %ld: %d, errno %d\n", (long)(intptr_t)number, vcpu, errno);
    return (void *)(intptr_t)vcpu;
}

static void threads(void)
{
    pthread_t thread[THREADS];
    int vcpu[THREADS];
    for (int round = 0; round < 20; ++round) {
        shared_vm = make(kvm, CREATE_VM, 0, "CREATE_VM");
        pthread_barrier_init(&barrier, NULL, THREADS);
        for (intptr_t i = 0; i < THREADS; ++i)
            check(-pthread_create(&thread[i], NULL, make_vcpu, (void *)i), "pthread_create");
        for (int i = 0; i < THREADS; ++i) {
            void *result;
            pthread_join(thread[i], &result);
            vcpu[i] = (int)(intptr_t)result;
        }
        pthread_barrier_destroy(&barrier);
        list("made", 0);
        for (int i = 0; i < THREADS; ++i)
            check(close(vcpu[i]), "close");
        check(close(shared_vm), "close");
    }
    list("closed", 1);
}

static volatile sig_atomic_t handled;

static void on_signal(int signal)
{
    int saved = errno;
    (void)signal;
    int vm = ioctl(kvm, CREATE_VM, 0);
    int vcpu = ioctl(vm, CREATE_VCPU, 0);
    if (vm < 0 || vcpu < 0 || close(vcpu) || close(vm))
        _exit(3);
    ++handled;
    errno = saved;
}

/* A signal while a VM is made or closed, once in each round: with more of them, KVM would make no progress. */
static void signals(void)
{
    struct sigaction action = {.sa_handler = on_signal, .sa_flags = SA_RESTART};
    check(sigaction(SIGALRM, &action, NULL), "sigaction");
    for (int round = 0; round < 100; ++round) {
        struct itimerval soon = {.it_value.tv_usec = 10 + 7 * round};
        setitimer(ITIMER_REAL, &soon, NULL);
        int vm = ioctl(kvm, CREATE_VM, 0);
        if (vm >= 0)
            check(close(vm), "close");
        else if (errno != EINTR) /* a signal makes KVM give up */
            check(vm, "CREATE_VM");
        while (handled <= round)
            usleep(100);
    }
    list("closed", 1);
}

static void forks(void)
{
    int vm = make(kvm, CREATE_VM, 0, "CREATE_VM");
    int vcpu = make(vm, CREATE_VCPU, 0, "CREATE_VCPU");
    list("made", 1);
    fflush(stdout);
    pid_t child = check(fork(), "fork");
    if (child == 0) {
        errno = 77;
        say("a vCPU in the child", ioctl(vm, CREATE_VCPU, 1));
        say("a VM of its own", ioctl(kvm, CREATE_VM, 0));
        list("in the child", 1);
        say("the child closes", close(vm));
        say("the child closes", close(vcpu));
        list("in the child", 1);
        fflush(stdout);
        _exit(0);
    }
    waitpid(child, NULL, 0);
    list("in the parent", 1);
    fflush(stdout);

    child = vfork();
    if (child == 0) {
        execl("/proc/self/exe", "vmm", "list", (char *)NULL);
        _exit(127);
    }
    waitpid(check(child, "vfork"), NULL, 0);

    /* A child that closes, in the parent's memory, fds that stay open in the parent. */
    static int i; /* not in a register, which the child could change */
    for (; i < 20; ++i) {
        child = vfork();
        if (child == 0) {
            close(vm);
            close(vcpu);
            _exit(0);
        }
        waitpid(check(child, "vfork"), NULL, 0);
        check(close(vcpu), "close");
        check(close(vm), "close");
        int again = make(kvm, CREATE_VM, 0, "CREATE_VM");
        if (again != vm || make(vm, CREATE_VCPU, 0, "CREATE_VCPU") != vcpu)
            printf("the numbers changed\n");
    }
    list("after vfork", 1);
}

static void exhausted(void)
{
    struct rlimit limit;
    getrlimit(RLIMIT_NOFILE, &limit);
    limit.rlim_cur = 64;
    setrlimit(RLIMIT_NOFILE, &limit);
    int vm = ioctl(kvm, CREATE_VM, 0);
    say("a VM with room for 64", vm);
    list("below the limit", 1);
    int fill, last = -1;
    while ((fill = dup(kvm)) >= 0)
        last = fill;
    say("close the last", close(last));
    say("a vCPU as the last fd", ioctl(vm, CREATE_VCPU, 0));
    say("one more", ioctl(vm, CREATE_VCPU, 1));
    list("full", 1);
}

static void churn(void)
{
    for (int i = 0; i < 700; ++i) {
        int vm = make(kvm, CREATE_VM, 0, "CREATE_VM");
        int vcpu = make(vm, CREATE_VCPU, 0, "CREATE_VCPU");
        check(close(i % 2 ? vm : vcpu), "close");
        check(close(i % 2 ? vcpu : vm), "close");
    }
    list("after churn", 1);
    /* Closed in a way that the library does not see. */
    for (int i = 0; i < 200; ++i) {
        int vm = make(kvm, CREATE_VM, 0, "CREATE_VM");
        make(vm, CREATE_VCPU, i % 3, "CREATE_VCPU");
        check((int)syscall(SYS_close, vm), "close");
        check((int)syscall(SYS_close, vm + 1), "close");
    }
    list("after bare system calls", 1);
    int vm = make(kvm, CREATE_VM, 0, "CREATE_VM");
    check(close(make(vm, CREATE_VCPU, 0, "CREATE_VCPU")), "close");
    check(close(vm), "close");
    list("after close", 1);
}

/* Make a VM whose slot a duplicate of another file is in, and close both; return its number. */
static int make_beside(int other)
{
    int vm = make(kvm, CREATE_VM, 0, "CREATE_VM");
    check(close(vm), "close");
    check(dup2(other, vm + FIRST_HELD), "dup2");
    say("a VM whose slot is in use", ioctl(kvm, CREATE_VM, 0));
    say("close it", close(vm));
    say("the file is still there", fcntl(vm + FIRST_HELD, F_GETFD));
    say("close it", close(vm + FIRST_HELD));
    return vm;
}

static void slots(void)
{
    int vm = make_beside(kvm);

    say("a VM", ioctl(kvm, CREATE_VM, 0));
    close(vm + FIRST_HELD); /* open only with the library */
    check(dup2(kvm, vm + FIRST_HELD), "dup2");
    errno = 77;
    say("close it", close(vm));
    say("the file in its slot is still there", fcntl(vm + FIRST_HELD, F_GETFD));
    say("close it", close(vm + FIRST_HELD));

    int other = check(eventfd(0, EFD_CLOEXEC), "eventfd"); /* the kernel's too, and none of KVM's */
    make_beside(other);
    say("close the other", close(other));
    vm = other; /* the number of the next */

    say("a VM", ioctl(kvm, CREATE_VM, 0));
    syscall(SYS_close, vm + FIRST_HELD);
    errno = 77;
    say("close it when its stats file is gone", close(vm));
}

/* A file whose path is longer than PATH_MAX, in the slot of the VM: its link cannot be read. */
static void long_path(void)
{
    enum { DEPTH = 20 };
    char base[] = P_tmpdir "/vmm-XXXXXX", name[251], link[64];
    memset(name, 'd', sizeof name - 1);
    name[sizeof name - 1] = '\0';
    check(mkdtemp(base) && chdir(base) == 0 ? 0 : -1, "mkdtemp");
    for (int i = 0; i < DEPTH; ++i)
        check(mkdir(name, 0700) == 0 ? chdir(name) : -1, "mkdir");
    int far = check(open("file", O_RDWR | O_CREAT | O_CLOEXEC, 0600), "open");

    int vm = make(kvm, CREATE_VM, 0, "CREATE_VM");
    check(close(vm), "close");
    check(dup2(far, vm + FIRST_HELD), "dup2");
    snprintf(link, sizeof link, "/proc/thread-self/fd/%d", vm + FIRST_HELD);
    errno = 77;
    say("its link", readlink(link, base, 1));
    errno = 77;
    say("a VM whose slot is in use", ioctl(kvm, CREATE_VM, 0));
    say("the next slot is free", fcntl(vm + FIRST_HELD + 1, F_GETFD));
    errno = 77;
    say("close the VM", close(vm));
    say("the file is still there", fcntl(vm + FIRST_HELD, F_GETFD));

    check(unlink("file"), "unlink");
    for (int i = 0; i < DEPTH; ++i)
        check(chdir("..") == 0 ? rmdir(name) : -1, "rmdir");
    check(chdir("/") == 0 ? rmdir(base) : -1, "rmdir");
}

static void *close_when_cancelled(void *fd)
{
    pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, NULL);
    pthread_cancel(pthread_self());
    pthread_setcancelstate(PTHREAD_CANCEL_ENABLE, NULL);
    ioctl(kvm, GET_API_VERSION, 0);
    ioctl(kvm, CREATE_VM, 0); /* not a cancellation point: it is made */
    close((int)(intptr_t)fd);
    return NULL;
}

static void cancelled(void)
{
    pthread_t thread;
    void *result;
    intptr_t vm = make(kvm, CREATE_VM, 0, "CREATE_VM");
    check(-pthread_create(&thread, NULL, close_when_cancelled, (void *)vm), "pthread_create");
    pthread_join(thread, &result);
    printf("cancelled: %d\n", result == PTHREAD_CANCELED);
    list("afterwards", 1);
}

/* From now on a seccomp filter answers the ioctl for a stats fd with this. */
static void filter(unsigned answer)
{
    struct sock_filter code[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_ioctl, 0, 3),
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, args[1])),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, GET_STATS_FD, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, answer),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog program = {sizeof code / sizeof *code, code};
    check(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "PR_SET_NO_NEW_PRIVS");
    check(prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program, 0, 0), "PR_SET_SECCOMP");
    errno = 77;
}

static void filtered(void)
{
    filter(SECCOMP_RET_ERRNO | EPERM);
    say("a VM", ioctl(kvm, CREATE_VM, 0));
    list("filtered", 1);
}

/* For a driver that has KVM's requests and returns numbers: nothing is asked of the fd of that number. */
static void foreign(void)
{
    filter(SECCOMP_RET_KILL);
    say("a number", ioctl(check(open("/dev/null", O_RDONLY), "/dev/null"), CREATE_VM, 0));
    say("a number", ioctl(kvm, CREATE_VCPU, 0));
    list("foreign", 1);
}

static void list_fds(void)
{
    list("after exec", 1);
}

/* Make a VM with vCPUs for a borrower, say so, and wait for the end of stdin. */
static void wait_here(void)
{
    int vm = make(kvm, CREATE_VM, 0, "CREATE_VM");
    for (int i = 0; i < 3; ++i)
        make(vm, CREATE_VCPU, i, "CREATE_VCPU");
    printf("ready\n");
    fflush(stdout);
    char byte;
    while (read(0, &byte, 1) > 0)
        ;
}

int main(int count, char **words)
{
    static const struct {
        const char *name;
        void (*run)(void);
    } modes[] = {
        {"basic", basic},         {"threads", threads}, {"signals", signals}, {"forks", forks},
        {"exhausted", exhausted}, {"churn", churn},     {"slots", slots},     {"cancelled", cancelled},
        {"filtered", filtered},   {"foreign", foreign}, {"wait", wait_here},  {"long-path", long_path},
    };
    if (count == 2 && strcmp(words[1], "list") == 0) {
        list_fds();
        return 0;
    }
    syscall(SYS_close_range, 3U, ~0U, 0U); /* some VMMs start like this */
    kvm = check(open("/dev/kvm", O_RDWR | O_CLOEXEC), "/dev/kvm");
    for (size_t i = 0; count == 2 && i < sizeof modes / sizeof *modes; ++i) {
        if (strcmp(words[1], modes[i].name) == 0) {
            errno = 77;
            modes[i].run();
            return 0;
        }
    }
    fprintf(stderr, "usage: vmm MODE\n");
    return 2;
}
