/* SPDX-License-Identifier: MIT */
/*
 * test_run.c - sweeps and runs against their manuals, csrc/sweep.h and csrc/run.h
 *
 *   test_run [MOST_THREADS]
 *
 * Link with layout.c, schedstat.c, sweep.c, run.c, -pthread, and as intercept.h says. To be built with -fsanitize=thread
 * too: readers, stoppers and the run meet only through kvmstats_ready, kvmstats_release and kvmstats_stop, and files fail
 * by script, not by a close during the run.
 *
 * Value w of file i is i * 1000 + w, unless a test writes another.
 */
#define _GNU_SOURCE
#include "clock.h"
#include "intercept.h"
#include "pace.h"
#include "run.h"

#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <unistd.h>

#define LENGTH(array) (sizeof(array) / sizeof((array)[0]))

/* ---- checks ---- */

static unsigned long checks, failures;
static char context[128];

#define CHECK(expression) check(__LINE__, !!(expression), #expression)

static void check(int line, int good, const char *expression)
{
    __atomic_add_fetch(&checks, 1, __ATOMIC_RELAXED);
    if (good)
        return;
    __atomic_add_fetch(&failures, 1, __ATOMIC_RELAXED);
    printf("%s:%d: %s [%s]\n", __FILE__, line, expression, context);
}

static void need(int good, const char *what)
{
    if (good)
        return;
    printf("test_run: %s: %s\n", what, strerror(errno));
    exit(1);
}

/* ---- files, and a pread that follows a script ---- */

enum { FILES = 7, WORDS = 12, POSITION = 64, MOST_SLOTS = 4096, MOST_FD = 1024 };

static int fds[FILES];

/* By fd. pread fails after `left` more calls: once with EINTR, for good with any other error. error 0: it does not. */
static struct script {
    long left;
    int error;
    int split; /* every read returns in two pieces */
} scripts[MOST_FD];
static long calls;

/* A file is read by one thread at a time, so its script needs no lock. Returns 0 to read, or what pread returns. */
static ssize_t by_script(int fd, size_t *count)
{
    __atomic_add_fetch(&calls, 1, __ATOMIC_RELAXED);
    if (fd < 0 || fd >= MOST_FD)
        return 0;
    struct script *script = &scripts[fd];
    if (script->split && *count > 8)
        *count = *count / 2 + 3;
    if (!script->error)
        return 0;
    if (script->left-- > 0)
        return 0;
    errno = script->error;
    if (script->error == EINTR)
        script->left = 1;
    return -1;
}

static ssize_t scripted_pread(int fd, void *buffer, size_t count, int64_t offset)
{
    return by_script(fd, &count) ? -1 : real_pread(fd, buffer, count, offset);
}

static void put_values(int file, uint64_t add)
{
    uint64_t values[WORDS];
    for (uint64_t w = 0; w < WORDS; ++w)
        values[w] = (uint64_t)file * 1000 + w + add;
    need(pwrite(fds[file], values, sizeof values, POSITION) == sizeof values, "pwrite");
}

static void make_files(void)
{
    for (int i = 0; i < FILES; ++i) {
        fds[i] = memfd_create("test_run", MFD_CLOEXEC);
        need(fds[i] >= 0 && fds[i] < MOST_FD, "memfd_create");
        put_values(i, 0);
    }
}

/* ---- a sampler in one struct; every buffer is on the heap in its exact size, for the sanitizers ---- */

static const uint32_t picked[] = {5, 0, 9}; /* of the values from word 1 on */

struct sampler {
    struct kvmstats_source sources[FILES];
    struct kvmstats_file files[FILES];
    struct kvmstats_sweep sweep;
    struct kvmstats_run run;
    uint64_t *rows[FILES];
};

static void *new_zeros(uint64_t n, size_t size)
{
    void *memory = calloc((size_t)n, size);
    need(memory != NULL, "calloc");
    return memory;
}

/* Odd files gather, the others keep every word. */
static struct sampler *new_sampler(uint64_t n, uint32_t threads, uint64_t chunk, uint64_t depth)
{
    struct sampler *s = new_zeros(1, sizeof *s);
    uint64_t slots = chunk * depth;

    memset(scripts, 0, sizeof scripts);
    need(n <= FILES && slots <= MOST_SLOTS, "sampler");
    for (uint64_t i = 0; i < n; ++i) {
        int gathers = i % 2 == 1;
        s->sources[i].fd = fds[i];
        s->sources[i].value_size = 8;
        s->files[i].source = &s->sources[i];
        s->files[i].position = POSITION + (gathers ? 8 : 0);
        s->files[i].count = gathers ? WORDS - 2 : WORDS;
        s->files[i].gather = gathers ? picked : NULL;
        s->files[i].width = gathers ? LENGTH(picked) : WORDS;
        s->files[i].step = s->files[i].width;
        s->rows[i] = s->files[i].row = new_zeros(slots * s->files[i].width, sizeof(uint64_t));
    }
    s->sweep.files = s->files;
    s->sweep.num_files = n;
    s->sweep.scratch_size = WORDS - 2;
    s->sweep.scratch = new_zeros(threads * s->sweep.scratch_size, sizeof(uint64_t));
    s->run.files = s->files;
    s->run.num_files = n;
    s->run.scratch = s->sweep.scratch;
    s->run.scratch_size = s->sweep.scratch_size;
    s->run.ticks = UINT64_MAX >> 2;
    s->run.threads = threads;
    s->run.event_fd = -1;
    s->run.spin_ns = 100000;
    s->run.wait = KVMSTATS_WAIT_SLEEP;
    s->run.chunk = chunk;
    s->run.depth = depth;
    s->run.chunks = new_zeros(depth, sizeof *s->run.chunks);
    s->run.time = new_zeros(slots, sizeof *s->run.time);
    s->run.sweep_ns = new_zeros(slots, sizeof *s->run.sweep_ns);
    s->run.tick = new_zeros(slots, sizeof *s->run.tick);
    return s;
}

static void end_sampler(struct sampler *s)
{
    for (uint64_t i = 0; i < s->sweep.num_files; ++i)
        free(s->rows[i]);
    free(s->sweep.scratch);
    free(s->run.chunks);
    free(s->run.time);
    free(s->run.sweep_ns);
    free(s->run.tick);
    free(s);
}

static int row_is(const struct sampler *s, uint64_t file, uint64_t slot, uint64_t add)
{
    uint64_t width = s->files[file].width;
    const uint64_t *row = s->rows[file] + slot * width;
    for (uint64_t w = 0; w < width; ++w)
        if (row[w] != file * 1000 + (s->files[file].gather ? picked[w] + 1 : w) + add)
            return 0;
    return 1;
}

static int row_is_zero(const struct sampler *s, uint64_t file, uint64_t slot)
{
    uint64_t width = s->files[file].width;
    for (uint64_t w = 0; w < width; ++w)
        if (s->rows[file][slot * width + w])
            return 0;
    return 1;
}

static void nap(int64_t ns)
{
    struct timespec time = to_timespec(ns);
    clock_nanosleep(CLOCK_MONOTONIC, 0, &time, NULL);
}

/* ---- a run, with a reader and a stopper ---- */

struct reading {
    struct sampler *s;
    int64_t pause;   /* ns spent on each chunk */
    uint64_t most;   /* chunks to read, at most */
    int ended;       /* set, atomically, when kvmstats_run has returned */
    uint64_t chunks; /* read */
    uint64_t sweeps, missed, overruns, zeros;
    uint64_t last_tick; /* to check that both grow */
    int64_t last_time, last_end;
};

static void read_chunk(struct reading *r)
{
    struct kvmstats_run *run = &r->s->run;
    uint64_t place = r->chunks % run->depth;
    const struct kvmstats_chunk *chunk = &run->chunks[place];

    CHECK(chunk->used >= 1 && chunk->used <= run->chunk);
    CHECK(chunk->first == r->sweeps);
    CHECK(chunk->overruns <= chunk->missed);
    for (uint64_t j = 0; j < chunk->used; ++j) {
        uint64_t slot = place * run->chunk + j;
        CHECK(r->sweeps == 0 || run->tick[slot] > r->last_tick);
        CHECK(r->sweeps == 0 || run->time[slot] >= r->last_end);
        CHECK(run->sweep_ns[slot] >= 0);
        if (run->interval) { /* neither early, nor after the next tick was due */
            int64_t due = run->start + (int64_t)run->tick[slot] * run->interval;
            CHECK(run->time[slot] >= due);
            CHECK(run->time[slot] < due + run->interval || run->tick[slot] == run->ticks - 1);
        }
        r->last_tick = run->tick[slot];
        r->last_time = run->time[slot];
        r->last_end = run->time[slot] + run->sweep_ns[slot];
        for (uint64_t i = 0; i < r->s->sweep.num_files; ++i)
            if (row_is_zero(r->s, i, slot))
                ++r->zeros;
            else
                CHECK(row_is(r->s, i, slot, 0));
        ++r->sweeps;
    }
    r->missed += chunk->missed;
    r->overruns += chunk->overruns;
}

static void *read_all(void *argument)
{
    struct reading *r = argument;

    for (;;) {
        int ended = __atomic_load_n(&r->ended, __ATOMIC_ACQUIRE); /* read before kvmstats_ready */
        if (r->chunks < r->most && kvmstats_ready(&r->s->run) > r->chunks) {
            if (r->pause)
                nap(r->pause);
            read_chunk(r);
            ++r->chunks;
            kvmstats_release(&r->s->run, r->chunks);
        } else if (ended) {
            return NULL;
        } else {
            nap(100000);
        }
    }
}

struct stopper {
    struct kvmstats_run *run;
    long calls;        /* of pread to wait for */
    int64_t after, at; /* ns to wait then; when it stopped */
};

static void *stop_later(void *argument)
{
    struct stopper *stopper = argument;
    while (__atomic_load_n(&calls, __ATOMIC_RELAXED) < stopper->calls)
        nap(100000);
    nap(stopper->after);
    stopper->at = now_ns();
    kvmstats_stop(stopper->run);
    return NULL;
}

static int run_with(struct reading *reading, struct stopper *stopper)
{
    pthread_t reader, other;
    need(pthread_create(&reader, NULL, read_all, reading) == 0, "pthread_create");
    if (stopper)
        need(pthread_create(&other, NULL, stop_later, stopper) == 0, "pthread_create");
    int status = kvmstats_run(&reading->s->run);
    __atomic_store_n(&reading->ended, 1, __ATOMIC_RELEASE);
    pthread_join(reader, NULL);
    if (stopper)
        pthread_join(other, NULL);
    return status;
}

/* All sweeps that were taken were read, and all other ticks were missed. */
static void check_accounts(const struct reading *r, uint64_t ticks)
{
    const struct kvmstats_run *run = &r->s->run;
    CHECK(run->status == 0);
    CHECK(run->first_tick + run->taken + run->missed == ticks);
    CHECK(run->overruns <= run->missed);
    CHECK(r->sweeps == run->taken);
    CHECK(r->chunks == run->head && r->chunks == run->tail);
    CHECK(r->missed <= run->missed && r->overruns <= run->overruns);
    CHECK(r->last_tick + 1 + (run->missed - r->missed) == ticks);
}

/* ---- the tests ---- */

static const uint32_t thread_counts[] = {1, 2, 4, 64};
static uint32_t most_threads = 64;
static const int waits[] = {KVMSTATS_WAIT_SLEEP, KVMSTATS_WAIT_SPIN, KVMSTATS_WAIT_HYBRID};

static void test_sweep(void)
{
    struct sampler *s = new_sampler(FILES, 1, 1, 1);

    snprintf(context, sizeof context, "sweep");
    CHECK(kvmstats_sweep(&s->sweep) == 0);
    for (uint64_t i = 0; i < FILES; ++i)
        CHECK(row_is(s, i, 0, 0));

    /* One pread per file; more only if it is interrupted or returns in pieces. */
    calls = 0;
    CHECK(kvmstats_sweep(&s->sweep) == 0);
    CHECK(calls == FILES);
    for (int i = 0; i < FILES; ++i)
        scripts[fds[i]] = (struct script){.left = 0, .error = EINTR, .split = 1};
    for (uint64_t i = 0; i < FILES; ++i)
        memset(s->rows[i], 0xa5, s->files[i].width * 8);
    CHECK(kvmstats_sweep(&s->sweep) == 0);
    for (uint64_t i = 0; i < FILES; ++i)
        CHECK(row_is(s, i, 0, 0));
    memset(scripts, 0, sizeof scripts);

    /* Files fail, each for a different reason, and the next sweep tries them again. */
    scripts[fds[0]] = (struct script){.error = EIO};
    s->sources[3].fd = -1;
    need(ftruncate(fds[4], POSITION + 20) == 0, "ftruncate");
    CHECK(kvmstats_sweep(&s->sweep) == 3);
    CHECK(s->sweep.failed == 3);
    CHECK(s->files[0].error == EIO && s->files[3].error == EBADF && s->files[4].error == ENODATA);
    CHECK(s->files[4].got == 20);
    for (uint64_t i = 0; i < FILES; ++i)
        CHECK(i == 0 || i == 3 || i == 4 ? row_is_zero(s, i, 0) : row_is(s, i, 0, 0));
    CHECK(kvmstats_sweep(&s->sweep) == 3);
    memset(scripts, 0, sizeof scripts);
    s->sources[3].fd = fds[3];
    put_values(4, 0);
    CHECK(kvmstats_sweep(&s->sweep) == 0);
    for (uint64_t i = 0; i < FILES; ++i)
        CHECK(s->files[i].error == 0 && row_is(s, i, 0, 0));

    /* In use by another owner. */
    CHECK(kvmstats_lock(&s->sweep, 7) == 0);
    CHECK(kvmstats_lock(&s->sweep, 7) == -EBUSY);
    kvmstats_unlock(&s->sweep, 8); /* not the owner */
    CHECK(kvmstats_sweep(&s->sweep) == -EBUSY);
    kvmstats_unlock(&s->sweep, 7);
    CHECK(kvmstats_sweep(&s->sweep) == 0);
    end_sampler(s);
}

/* Values of 4 bytes and of the other byte order, all of them or some, and a count that no read can have. */
static void test_kinds(void)
{
    for (uint32_t size = 4; size <= 8; size += 4)
        for (uint32_t swapped = 0; swapped < 2; ++swapped) {
            struct sampler *s = new_sampler(2, 1, 1, 1);
            uint64_t values[WORDS], all[2 * WORDS];
            snprintf(context, sizeof context, "value_size %u, swapped %u", size, swapped);
            for (uint64_t i = 0; i < 2; ++i) {
                const struct kvmstats_file *file = &s->files[i];
                need(pread(fds[i], values, sizeof values, (off_t)file->position) >= (ssize_t)(8 * file->count),
                     "pread");
                kvmstats_copy_values(values, size, swapped, file->count, all);
                s->sources[i].value_size = size;
                s->sources[i].swapped = swapped;
                CHECK(kvmstats_sweep(&s->sweep) == 0);
                for (uint64_t w = 0; w < file->width; ++w)
                    CHECK(s->rows[i][w] == all[file->gather ? file->gather[w] : w]);
            }
            s->files[0].count = SIZE_MAX / size + 1;
            CHECK(kvmstats_sweep(&s->sweep) == 1);
            CHECK(s->files[0].error == EOVERFLOW && row_is_zero(s, 0, 0));
            end_sampler(s);
        }
}

/* As fast as possible: every sweep is taken, in order, with any number of chunks and threads. */
static void test_interval_0(void)
{
    static const uint64_t shapes[][2] = {{1, 1}, {1, 3}, {7, 1}, {10, 4}}; /* chunk, depth */

    for (size_t t = 0; t < LENGTH(thread_counts) && thread_counts[t] <= most_threads; ++t)
        for (size_t k = 0; k < LENGTH(shapes); ++k) {
            struct sampler *s = new_sampler(t == 0 ? 1 : FILES, thread_counts[t], shapes[k][0], shapes[k][1]);
            struct reading r = {.s = s, .most = UINT64_MAX};
            snprintf(context, sizeof context, "interval 0, %u threads, chunk %d, depth %d", thread_counts[t],
                     (int)shapes[k][0], (int)shapes[k][1]);
            s->run.ticks = 45;
            CHECK(run_with(&r, NULL) == 0);
            check_accounts(&r, 45);
            CHECK(s->run.missed == 0 && s->run.overruns == 0 && r.zeros == 0);
            CHECK(r.chunks == (45 + shapes[k][0] - 1) / shapes[k][0]);
            CHECK(s->run.chunks[(r.chunks - 1) % shapes[k][1]].used == (45 - 1) % shapes[k][0] + 1);
            end_sampler(s);
        }
}

/* Schedules that can be kept, and that cannot: taken + missed are all ticks, and no tick is early. */
static void test_schedule(void)
{
    static const int64_t intervals[] = {1, 3000, 200000};

    for (size_t w = 0; w < LENGTH(waits); ++w)
        for (size_t i = 0; i < LENGTH(intervals); ++i)
            for (size_t t = 0; t < LENGTH(thread_counts) - 1; ++t) {
                struct sampler *s = new_sampler(FILES, thread_counts[t], 16, 64);
                struct reading r = {.s = s, .most = UINT64_MAX};
                snprintf(context, sizeof context, "interval %d ns, wait %d, %u threads", (int)intervals[i], waits[w],
                         thread_counts[t]);
                s->run.interval = intervals[i];
                s->run.wait = waits[w];
                s->run.ticks = 100;
                CHECK(run_with(&r, NULL) == 0);
                check_accounts(&r, 100);
                CHECK(r.zeros == 0 && s->run.overruns == 0 && r.last_tick == 99);
                CHECK(r.last_time >= s->run.start + 99 * intervals[i]);
                end_sampler(s);
            }
}

/* What a hybrid wait learns of sleeps that end late, and of a processor that is taken away. */
static void test_pace(void)
{
    const int64_t second = NS_PER_SECOND;
    struct kvmstats_run run = {.wait = KVMSTATS_WAIT_HYBRID, .interval = 100000, .spin_ns = 150000};
    struct pace pace = start_pace(&run);

    snprintf(context, sizeof context, "pace");
    CHECK(choose_spin(&run, &pace, 0) == 0); /* nothing is known yet */
    note_sleep(&run, &pace, 40000, 0);
    CHECK(choose_spin(&run, &pace, 0) == 2 * LEAST_SPIN);
    for (int64_t i = 1; i < 8; ++i)
        CHECK(choose_spin(&run, &pace, i * START) >= (LEAST_SPIN << i < 40000 ? LEAST_SPIN << i : 40000));
    CHECK(choose_spin(&run, &pace, 8 * START) < 50000);
    for (int i = 0; i < 1000; ++i)
        note_sleep(&run, &pace, 8000, 0);
    CHECK(choose_spin(&run, &pace, 0) >= 8000 && choose_spin(&run, &pace, 0) < 10000);
    note_sleep(&run, &pace, 400000, 0); /* longer than it would spin in any case */
    note_sleep(&run, &pace, -1, 0);     /* a signal */
    CHECK(choose_spin(&run, &pace, 0) >= 8000 && choose_spin(&run, &pace, 0) < 10000);

    /* It spins all the time if nearly every sleep would miss a tick, and not because one did. */
    note_sleep(&run, &pace, 140000, 0);
    CHECK(choose_spin(&run, &pace, 0) == run.spin_ns);
    for (int i = 0; i < 20; ++i)
        note_sleep(&run, &pace, 140000, 0);
    CHECK(choose_spin(&run, &pace, 0) == INT64_MAX);
    int64_t now = now_ns();
    for (int i = 0; i < 150000 && choose_spin(&run, &pace, 0) == INT64_MAX; ++i)
        now = wait_until(&run, &pace, now, now);
    CHECK(choose_spin(&run, &pace, 0) == run.spin_ns); /* it tries a sleep again */

    /* Others had their turns: hardly any spin, and each time it takes longer until it is as much again. */
    for (int k = 0; k < 3; ++k) {
        note_sleep(&run, &pace, 5000000, 0);
        CHECK(choose_spin(&run, &pace, 0) == LEAST_SPIN);
        CHECK(choose_spin(&run, &pace, (second << k) - 1) == LEAST_SPIN);
        CHECK(choose_spin(&run, &pace, second << k) == 2 * LEAST_SPIN);
    }
    for (int i = 1; i < 9; ++i)
        choose_spin(&run, &pace, i * (LAST_REGAIN + 1));
    CHECK(choose_spin(&run, &pace, INT64_MAX - 1) == run.spin_ns);
    note_sleep(&run, &pace, 5000000, 0);
    CHECK(pace.regain == FIRST_REGAIN); /* they were away for long enough */

    run.wait = KVMSTATS_WAIT_SPIN;
    CHECK(choose_spin(&run, &pace, 0) == INT64_MAX);
    run.wait = KVMSTATS_WAIT_SLEEP;
    CHECK(choose_spin(&run, &pace, 0) == 0);
}

struct hog {
    int over; /* set, atomically, to end it */
};

static void *use_processor(void *argument)
{
    struct hog *hog = argument;
    while (!__atomic_load_n(&hog->over, __ATOMIC_RELAXED))
        relax();
    return NULL;
}

/* A hybrid wait that spins where another thread wants the processor notices that it is taken away. */
static void test_pace_beside_another(void)
{
    struct kvmstats_run run = {.wait = KVMSTATS_WAIT_HYBRID, .interval = 100000, .spin_ns = 150000};
    struct hog hog = {.over = 0};
    pthread_t other;
    cpu_set_t before, one;

    snprintf(context, sizeof context, "pace beside another thread");
    need(sched_getaffinity(0, sizeof before, &before) == 0, "sched_getaffinity");
    CPU_ZERO(&one);
    for (size_t cpu = 0; cpu < CPU_SETSIZE && !CPU_COUNT(&one); ++cpu)
        if (CPU_ISSET(cpu, &before))
            CPU_SET(cpu, &one);
    need(sched_setaffinity(0, sizeof one, &one) == 0, "sched_setaffinity");
    need(pthread_create(&other, NULL, use_processor, &hog) == 0, "pthread_create"); /* on the same processor */
    struct pace pace = start_pace(&run);
    int64_t now = now_ns(), end = now + (int64_t)10 * NS_PER_SECOND;
    while (pace.regain != FIRST_REGAIN && now < end) {
        pace.usual = run.interval; /* so that it never sleeps, and a late sleep tells it nothing */
        CHECK(choose_spin(&run, &pace, now) == INT64_MAX);
        now = wait_until(&run, &pace, now + run.interval, now);
    }
    CHECK(pace.regain == FIRST_REGAIN && pace.most == LEAST_SPIN && choose_spin(&run, &pace, now) <= LEAST_SPIN);
    __atomic_store_n(&hog.over, 1, __ATOMIC_RELAXED);
    pthread_join(other, NULL);
    need(sched_setaffinity(0, sizeof before, &before) == 0, "sched_setaffinity");
}

/* A run that goes on where another ended: its ticks are due when they would have been, and none is lost between them. */
static void test_resumed(void)
{
    static const int64_t intervals[] = {0, 100000, 2000000};

    for (size_t i = 0; i < LENGTH(intervals); ++i) {
        uint64_t next = 0, missed = 0;
        int64_t start = 0;
        for (int k = 0; k < 3; ++k) {
            struct sampler *s = new_sampler(3, 1, 4, 64);
            struct reading r = {.s = s, .most = UINT64_MAX};
            snprintf(context, sizeof context, "resumed, interval %d ns, run %d", (int)intervals[i], k);
            s->run.interval = intervals[i];
            s->run.first_tick = next;
            s->run.start = start;
            s->run.ticks = (uint64_t)(k + 1) * 10;
            int64_t began = now_ns();
            CHECK(run_with(&r, NULL) == 0);
            check_accounts(&r, s->run.ticks);
            CHECK(k == 0 ? s->run.start >= began : s->run.start == start);
            CHECK(s->run.tick[0] >= next && s->run.tick[0] <= next + s->run.chunks[0].missed);
            next = s->run.first_tick + s->run.taken + s->run.missed;
            start = s->run.start;
            missed += r.missed;
            CHECK(r.missed == s->run.missed);
            end_sampler(s);
            nap(5 * intervals[i]);
        }
        CHECK(next == 30);
        CHECK(intervals[i] ? missed >= 8 : missed == 0); /* at least 4 ticks are due in each nap */
    }

    /* After its last tick there is nothing to do; the duration counts from the start, too. */
    for (int k = 0; k < 2; ++k) {
        struct sampler *s = new_sampler(1, 1, 4, 2);
        snprintf(context, sizeof context, "resumed after the end, way %d", k);
        s->run.start = now_ns() - 1000;
        s->run.first_tick = s->run.ticks = k ? 7 : UINT64_MAX >> 2;
        s->run.ticks += k ? 0 : 1;
        s->run.duration = k ? 0 : 1000;
        CHECK(kvmstats_run(&s->run) == 0);
        CHECK(s->run.taken == 0 && s->run.missed == 0 && s->run.head == 0);
        end_sampler(s);
    }
}

/* A reader that is slow, or stops reading: the ring overruns, and every missed tick is counted. */
static void test_overruns(void)
{
    uint64_t overruns = 0;

    for (uint64_t depth = 1; depth <= 3; ++depth)
        for (uint64_t most = 1; most <= 100; most += 99) {
            struct sampler *s = new_sampler(3, 2, 2, depth);
            struct reading r = {.s = s, .most = most, .pause = 5000000};
            snprintf(context, sizeof context, "overruns, depth %d, reader takes %d", (int)depth, (int)most);
            s->run.interval = 100000;
            s->run.ticks = 300;
            CHECK(run_with(&r, NULL) == 0);
            CHECK(s->run.taken + s->run.missed == 300);
            CHECK(s->run.overruns <= s->run.missed);
            overruns += s->run.overruns;
            CHECK(s->run.head - s->run.tail <= depth);
            if (most == 1) { /* only what fills the ring */
                CHECK(r.chunks == 1 && s->run.head <= 1 + depth && s->run.taken <= 2 * (1 + depth));
                CHECK(r.sweeps == 2);
            } else {
                check_accounts(&r, 300);
            }
            end_sampler(s);
        }

    CHECK(overruns > 0);

    /* Without a schedule the run waits for its reader, until it is stopped. */
    struct sampler *s = new_sampler(2, 1, 4, 2);
    struct reading r = {.s = s, .most = 0};
    struct stopper stopper = {.run = &s->run, .calls = calls + 8 * 2, .after = 20000000};
    snprintf(context, sizeof context, "a full ring without a schedule");
    CHECK(run_with(&r, &stopper) == 0);
    CHECK(s->run.taken == 8 && s->run.head == 2 && s->run.missed == 0 && s->run.overruns == 0);
    end_sampler(s);
}

static void test_failures(void)
{
    for (size_t t = 0; t < LENGTH(thread_counts) && thread_counts[t] <= most_threads; ++t)
        for (int strict = 0; strict < 2; ++strict) {
            struct sampler *s = new_sampler(FILES, thread_counts[t], 50, 1);
            struct reading r = {.s = s, .most = UINT64_MAX};
            snprintf(context, sizeof context, "failures, %u threads, strict %d", thread_counts[t], strict);
            for (int i = 0; i < 3; ++i) /* sweeps 10, 20 and 30 */
                scripts[fds[2 * i + 1]] = (struct script){.left = 10 * (i + 1), .error = i == 1 ? EBADF : EIO};
            s->run.ticks = 50;
            s->run.strict = strict;
            CHECK(run_with(&r, NULL) == 0);
            CHECK(s->files[1].error == EIO && s->files[1].failed_at == 10);
            if (strict) {
                check_accounts(&r, 11);
                CHECK(r.zeros == 1 && row_is_zero(s, 1, 10) && row_is(s, 1, 9, 0));
            } else {
                check_accounts(&r, 50);
                CHECK(r.zeros == 40 + 30 + 20);
                CHECK(s->files[3].error == EBADF && s->files[3].failed_at == 20);
                CHECK(s->files[5].error == EIO && s->files[5].failed_at == 30);
                CHECK(row_is(s, 5, 29, 0) && row_is_zero(s, 5, 30));
            }
            CHECK(s->files[0].error == 0 && s->files[6].error == 0);
            end_sampler(s);
        }

    /* The run ends with the sweep in which the last file fails. */
    struct sampler *s = new_sampler(2, 2, 8, 1);
    struct reading r = {.s = s, .most = UINT64_MAX};
    snprintf(context, sizeof context, "no file left");
    scripts[fds[0]] = (struct script){.left = 2, .error = EIO};
    scripts[fds[1]] = (struct script){.left = 5, .error = EIO};
    s->run.interval = 1000;
    s->run.wait = KVMSTATS_WAIT_SPIN;
    CHECK(run_with(&r, NULL) == 0);
    CHECK(s->run.taken == 6 && r.sweeps == 6 && r.zeros == 4 + 1 && s->files[1].failed_at == 5);
    end_sampler(s);

    /* A file that is too short: `got` says after how many bytes it ends. */
    s = new_sampler(2, 1, 4, 1);
    r = (struct reading){.s = s, .most = UINT64_MAX};
    snprintf(context, sizeof context, "a short file");
    need(ftruncate(fds[0], POSITION + 17) == 0, "ftruncate");
    s->run.ticks = 4;
    CHECK(run_with(&r, NULL) == 0);
    check_accounts(&r, 4);
    CHECK(s->files[0].error == ENODATA && s->files[0].got == 17 && s->files[0].failed_at == 0 && r.zeros == 4);
    put_values(0, 0);
    end_sampler(s);
}

/* Stopped by a third thread, long before the next tick and between sweeps; and ended by its duration. */
static void test_stop(void)
{
    static const int64_t intervals[] = {0, 20000, 3600000000000};

    for (size_t w = 0; w < LENGTH(waits); ++w)
        for (size_t i = 0, tries = 0; i < LENGTH(intervals); ++i) {
            struct sampler *s = new_sampler(FILES, 4, 5, 3);
            struct reading r = {.s = s, .most = UINT64_MAX};
            struct stopper stopper = {.run = &s->run, .calls = calls + FILES, .after = 15000000};
            snprintf(context, sizeof context, "stop, interval %lld, wait %d", (long long)intervals[i], waits[w]);
            s->run.interval = intervals[i];
            s->run.wait = waits[w];
            CHECK(run_with(&r, &stopper) == 0);
            int prompt = now_ns() - stopper.at < 500000000; /* 20 ms, if the machine is free */
            CHECK(s->run.taken >= 1 && r.sweeps == s->run.taken && r.chunks == s->run.head);
            CHECK(r.zeros == 0);
            if (intervals[i] == 3600000000000)
                CHECK(s->run.taken == 1 && s->run.missed == 0 && s->run.chunks[0].used == 1);
            if (!prompt && ++tries < 3)
                --i; /* it may not have run us */
            else
                CHECK(prompt);
            end_sampler(s);
        }

    /* Stopped before it starts. */
    struct sampler *s = new_sampler(1, 4, 5, 1);
    snprintf(context, sizeof context, "stopped before");
    kvmstats_stop(&s->run);
    CHECK(kvmstats_run(&s->run) == 0);
    CHECK(s->run.taken == 0 && s->run.missed == 0 && kvmstats_ready(&s->run) == 0);
    end_sampler(s);

    snprintf(context, sizeof context, "duration");
    for (int tries = 1; tries <= 3; ++tries) {
        s = new_sampler(2, 1, 64, 32);
        struct reading r = {.s = s, .most = UINT64_MAX};
        s->run.duration = 20000000;
        int64_t begin = now_ns();
        CHECK(run_with(&r, NULL) == 0);
        CHECK(now_ns() - begin >= 20000000);
        CHECK(r.sweeps == s->run.taken);
        CHECK(r.last_time < s->run.start + 20000000);
        int many = s->run.taken > 1; /* if the machine is free */
        end_sampler(s);
        if (many)
            break;
        CHECK(tries < 3);
    }
}

/* The eventfd is signalled for every chunk and at the end. */
static void test_event(void)
{
    struct sampler *s = new_sampler(1, 1, 4, 8);
    uint64_t signalled = 0;

    snprintf(context, sizeof context, "eventfd");
    s->run.event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    need(s->run.event_fd >= 0, "eventfd");
    s->run.ticks = 10;
    CHECK(kvmstats_run(&s->run) == 0);
    CHECK(s->run.head == 3 && s->run.chunks[2].used == 2);
    CHECK(read(s->run.event_fd, &signalled, sizeof signalled) == sizeof signalled && signalled == 3 + 1);

    /* With a full eventfd the run continues. */
    signalled = UINT64_MAX - 1;
    need(write(s->run.event_fd, &signalled, sizeof signalled) == sizeof signalled, "write");
    kvmstats_release(&s->run, 4); /* more than are ready: ignored */
    CHECK(s->run.tail == 0);
    kvmstats_release(&s->run, 2);
    CHECK(kvmstats_run(&s->run) == 0);
    CHECK(s->run.taken == 20 && s->run.head == 6);
    close(s->run.event_fd);
    end_sampler(s);
}

struct delay {
    struct kvmstats_run *run;
    int event_fd; /* to empty, or -1: release the first chunk */
    int64_t end;
};

/* Once the first chunk is ready, keep the run waiting for 5 ms more. */
static void *delay_second_chunk(void *argument)
{
    struct delay *delay = argument;
    uint64_t count;

    while (kvmstats_ready(delay->run) == 0)
        nap(100000);
    nap(5000000);
    delay->end = now_ns();
    if (delay->event_fd < 0)
        kvmstats_release(delay->run, 1);
    else
        need(read(delay->event_fd, &count, sizeof count) == sizeof count, "read");
    return NULL;
}

/* A sweep's time does not include what came before it: here a full eventfd, or a full ring, which the run waits for. */
static void test_time_after_a_chunk(void)
{
    for (uint64_t depth = 1; depth <= 2; ++depth) {
        struct sampler *s = new_sampler(1, 1, 1, depth);
        struct delay delay = {.run = &s->run, .event_fd = -1};
        uint64_t full = UINT64_MAX - 1;
        pthread_t thread;

        snprintf(context, sizeof context, "time after a chunk, depth %d", (int)depth);
        if (depth == 2) {
            s->run.event_fd = delay.event_fd = eventfd(0, EFD_CLOEXEC);
            need(write(delay.event_fd, &full, sizeof full) == sizeof full, "eventfd");
        }
        s->run.ticks = 2;
        need(pthread_create(&thread, NULL, delay_second_chunk, &delay) == 0, "pthread_create");
        CHECK(kvmstats_run(&s->run) == 0);
        pthread_join(thread, NULL);
        CHECK(s->run.taken == 2 && s->run.time[depth - 1] >= delay.end); /* the second sweep */
        if (depth == 2)
            close(delay.event_fd);
        end_sampler(s);
    }
}

/* A run in a thread of its own: what a reader that waits for it gets, how it is ended, and that it can fail to begin. */
static void test_thread(void)
{
    for (int k = 0; k < 4; ++k) {
        struct sampler *s = new_sampler(3, 2, 4, 2);
        struct kvmstats_run *run = &s->run;
        struct reading reading = {.s = s};
        unsigned long no_cpus = 0;

        snprintf(context, sizeof context, "thread, way %d", k);
        run->event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
        need(run->event_fd >= 0, "eventfd");
        kvmstats_join(run); /* there is none */
        CHECK(kvmstats_wait(run, 0, 0) == 0);
        run->ticks = k == 0 ? 10 : UINT64_MAX >> 2;
        run->interval = 1000000;
        if (k == 2) {
            run->cpus = &no_cpus;
            run->cpu_words = 1;
        }
        if (k == 3) { /* no such priority: there is no thread */
            run->priority = 1000;
            CHECK(kvmstats_start(run) == -EINVAL);
            CHECK(run->joinable == 0 && run->taken == 0);
            close(run->event_fd);
            end_sampler(s);
            continue;
        }
        CHECK(kvmstats_start(run) == 0);
        if (k == 1) { /* a stop ends it, and nothing else does */
            CHECK(kvmstats_wait(run, UINT64_MAX, 50) == 0);
            kvmstats_stop(run);
        }
        for (;;) {
            while (!kvmstats_wait(run, reading.chunks, 1000))
                ;
            if (kvmstats_ready(run) <= reading.chunks)
                break;
            read_chunk(&reading);
            CHECK(run->chunks[reading.chunks % run->depth].wall_offset > INT64_MAX / 100); /* later than 1972 */
            kvmstats_release(run, ++reading.chunks);
        }
        CHECK(__atomic_load_n(&run->ended, __ATOMIC_ACQUIRE) == 1);
        CHECK(kvmstats_wait(run, UINT64_MAX, 0) == 1);
        kvmstats_join(run);
        kvmstats_join(run);
        CHECK(run->joinable == 0);
        CHECK(run->status == (k == 2 ? -EINVAL : 0));
        CHECK(k == 2 ? run->taken == 0 : run->taken > 0);
        if (k == 0)
            check_accounts(&reading, 10);
        close(run->event_fd);
        end_sampler(s);
    }
}

static void test_timer_slack(void)
{
    struct sampler *s = new_sampler(1, 2, 4, 1);
    snprintf(context, sizeof context, "timer slack");
    need(prctl(PR_SET_TIMERSLACK, 12345L, 0L, 0L, 0L) == 0, "prctl");
    s->run.ticks = 3;
    s->run.interval = 1000;
    CHECK(kvmstats_run(&s->run) == 0);
    CHECK(prctl(PR_GET_TIMERSLACK, 0L, 0L, 0L, 0L) == 12345);
    end_sampler(s);
}

int main(int argc, char **argv)
{
    if (argc > 1)
        most_threads = (uint32_t)strtoul(argv[1], NULL, 10);
    start_intercepting();
    make_files();

    test_sweep();
    test_kinds();
    test_interval_0();
    test_schedule();
    test_pace();
    test_pace_beside_another();
    test_resumed();
    test_overruns();
    test_failures();
    test_stop();
    test_event();
    test_time_after_a_chunk();
    test_timer_slack();
    test_thread();

    if (failures) {
        printf("test_run: %lu checks, %lu failed\n", checks, failures);
        return 1;
    }
    printf("test_run: %lu checks\n", checks);
    return 0;
}
