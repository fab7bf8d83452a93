/* SPDX-License-Identifier: MIT */
/* Reading data sections, once or on a schedule: the only system calls of the core. The contracts are in kvmstats.h. */
#include "kvmstats.h"

#include <errno.h>
#include <pthread.h>
#include <semaphore.h>
#include <signal.h>
#include <time.h>
#include <unistd.h>

enum {
    SECOND = 1000000000,
    NAP = 20000000,       /* ns: how long a sleep may keep a stop waiting */
    FULL_NAP = 200000,    /* ns: how often a full ring is looked at when there is no schedule */
    HANDOVER = 50000,     /* ns: how long a thread spins for its part of a sweep before it sleeps */
    TIMER_SLACK_SET = 29, /* PR_SET_TIMERSLACK of prctl(2), whose header would pull in the kernel's */
    TIMER_SLACK_GET = 30,
};

int prctl(int option, ...);

/* ---- one file */

/* 0 or -errno; -ENODATA and *got at an early end of the file. */
static int read_at(int fd, void *to, size_t wanted, uint64_t position, uint64_t *got)
{
    size_t done = 0;

    for (;;) {
        ssize_t n = pread(fd, (char *)to + done, wanted - done, (off_t)(position + done));
        if (n < 0) {
            if (errno == EINTR)
                continue;
            return -errno;
        }
        done += (size_t)n;
        if (done == wanted)
            return 0;
        if (n == 0) {
            *got = done;
            return -ENODATA;
        }
    }
}

static int read_values(const struct kvmstats_source *source, uint64_t position, uint64_t count, uint64_t *to,
                       uint64_t *got)
{
    if (count > SIZE_MAX / 16) /* what pread can be asked for ends at SSIZE_MAX */
        return -EOVERFLOW;
    int status = read_at(source->fd, to, (size_t)count * source->value_size, position, got);
    if (status == 0 && (source->value_size != 8 || source->swapped))
        kvmstats_copy_values(to, source->value_size, source->swapped, count, to);
    return status;
}

int kvmstats_read(struct kvmstats_source *source)
{
    return read_values(source, source->position, source->count, source->values, &source->got);
}

/* ---- one pass over many */

static void clear(uint64_t *row, uint64_t width)
{
    for (uint64_t i = 0; i < width; ++i)
        row[i] = 0;
}

/* Read files [begin, end) into a slot; returns how many failed. */
static int sweep_part(struct kvmstats_file *files, uint64_t begin, uint64_t end, uint64_t *scratch, uint64_t slot,
                      uint64_t number)
{
    int failed = 0;

    for (uint64_t i = begin; i < end; ++i) {
        struct kvmstats_file *file = &files[i];
        uint64_t *row = file->row + slot * file->step;
        if (file->error) {
            clear(row, file->width); /* the slot may have been used before */
            continue;
        }
        const uint32_t *gather = file->gather;
        int status = read_values(file->source, file->position, file->count, gather ? scratch : row, &file->got);
        if (status) {
            file->failed_at = number;
            /* Last: whoever sees the error in another thread sees the rest too. */
            __atomic_store_n(&file->error, -status, __ATOMIC_RELEASE);
            clear(row, file->width); /* nothing of a read that failed half way */
            ++failed;
        } else if (gather) {
            for (uint64_t j = 0; j < file->width; ++j)
                row[j] = scratch[gather[j]];
        }
    }
    return failed;
}

int kvmstats_lock(struct kvmstats_sweep *sweep, uint64_t owner)
{
    uint64_t nobody = 0;
    return __atomic_compare_exchange_n(&sweep->owner, &nobody, owner, 0, __ATOMIC_ACQUIRE, __ATOMIC_RELAXED) ? 0
                                                                                                             : -EBUSY;
}

void kvmstats_unlock(struct kvmstats_sweep *sweep, uint64_t owner)
{
    __atomic_compare_exchange_n(&sweep->owner, &owner, 0, 0, __ATOMIC_RELEASE, __ATOMIC_RELAXED);
}

int kvmstats_sweep(struct kvmstats_sweep *sweep)
{
    if (kvmstats_lock(sweep, 1))
        return -EBUSY;
    if (sweep->failed) /* tried again, each time */
        for (uint64_t i = 0; i < sweep->num_files; ++i)
            sweep->files[i].error = 0;
    int failed = sweep_part(sweep->files, 0, sweep->num_files, sweep->scratch, 0, 0);
    sweep->failed = (uint32_t)failed;
    kvmstats_unlock(sweep, 1);
    return failed;
}

/* ---- many passes on a schedule */

static int64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * SECOND + now.tv_nsec;
}

static void sleep_until(int64_t when)
{
    struct timespec until = {.tv_sec = (time_t)(when / SECOND), .tv_nsec = (long)(when % SECOND)};
    clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, NULL); /* an early end is looked at by the caller */
}

static void relax(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static int stopped(const struct kvmstats_run *run)
{
    return __atomic_load_n(&run->stop, __ATOMIC_RELAXED) != 0;
}

/* Until `when`, or until stopped. */
static void wait_until(const struct kvmstats_run *run, int64_t when)
{
    int64_t spin = run->wait == KVMSTATS_WAIT_SPIN ? INT64_MAX : run->wait == KVMSTATS_WAIT_HYBRID ? run->spin_ns : 0;

    for (int64_t now = now_ns(); now < when && !stopped(run); now = now_ns()) {
        if (when - now > spin) {
            int64_t until = when - spin;
            sleep_until(until - now > NAP ? now + NAP : until);
        } else {
            relax();
        }
    }
}

/* A thread that takes a part of every sweep, for as long as the run. */
struct worker {
    struct kvmstats_run *run;
    uint64_t begin, end; /* of its files */
    uint64_t *scratch;
    uint64_t slot, number;
    int failed, quit;
    sem_t go, done;
    pthread_t thread;
};

static void take(sem_t *semaphore)
{
    for (int64_t until = now_ns() + HANDOVER; now_ns() < until; relax())
        if (sem_trywait(semaphore) == 0)
            return;
    while (sem_wait(semaphore) != 0)
        ; /* EINTR */
}

static void *work(void *argument)
{
    struct worker *worker = argument;

    for (;;) {
        take(&worker->go);
        if (worker->quit)
            return NULL;
        worker->failed =
            sweep_part(worker->run->files, worker->begin, worker->end, worker->scratch, worker->slot, worker->number);
        sem_post(&worker->done);
    }
}

static void end_workers(struct worker *workers, int n)
{
    for (int i = 1; i < n; ++i) {
        workers[i].quit = 1;
        sem_post(&workers[i].go);
        pthread_join(workers[i].thread, NULL);
        sem_destroy(&workers[i].go);
        sem_destroy(&workers[i].done);
    }
}

/* Start threads 1 .. n-1; worker 0 is the caller. Returns how many there are, itself included, or -errno. */
static int start_workers(struct kvmstats_run *run, struct worker *workers)
{
    uint64_t n = run->threads < 1 ? 1 : run->threads > KVMSTATS_MAX_THREADS ? KVMSTATS_MAX_THREADS : run->threads;
    sigset_t all, before;
    int error = 0;
    uint64_t i;

    for (i = 0; i < n; ++i) {
        workers[i].run = run;
        workers[i].begin = run->num_files / n * i + (run->num_files % n < i ? run->num_files % n : i);
        workers[i].scratch = run->scratch ? run->scratch + i * run->scratch_size : NULL;
        workers[i].quit = 0;
    }
    for (i = 0; i < n; ++i)
        workers[i].end = i + 1 < n ? workers[i + 1].begin : run->num_files;

    /* Signals are for the threads that the program knows. */
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    for (i = 1; i < n && !error; ++i) {
        if (sem_init(&workers[i].go, 0, 0) || sem_init(&workers[i].done, 0, 0)) {
            error = errno;
            break;
        }
        error = pthread_create(&workers[i].thread, NULL, work, &workers[i]);
        if (error) {
            sem_destroy(&workers[i].go);
            sem_destroy(&workers[i].done);
            break;
        }
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (!error)
        return (int)n;
    end_workers(workers, (int)i);
    return -error;
}

static int sweep_all(struct kvmstats_run *run, struct worker *workers, int n, uint64_t slot)
{
    for (int i = 1; i < n; ++i) {
        workers[i].slot = slot;
        workers[i].number = run->taken;
        sem_post(&workers[i].go);
    }
    int failed = sweep_part(run->files, workers[0].begin, workers[0].end, workers[0].scratch, slot, run->taken);
    for (int i = 1; i < n; ++i) {
        take(&workers[i].done);
        failed += workers[i].failed;
    }
    return failed;
}

static void tell(const struct kvmstats_run *run)
{
    static const uint64_t one = 1;

    if (run->event_fd >= 0) {
        ssize_t written = write(run->event_fd, &one, sizeof one);
        (void)written; /* a full eventfd is told already */
    }
}

/* The chunk that was being filled is ready. */
static void hand_out(struct kvmstats_run *run)
{
    __atomic_store_n(&run->head, run->head + 1, __ATOMIC_RELEASE);
    tell(run);
}

static int ring_is_full(const struct kvmstats_run *run)
{
    return run->head - __atomic_load_n(&run->tail, __ATOMIC_ACQUIRE) >= run->depth;
}

static void loop(struct kvmstats_run *run, struct worker *workers, int n)
{
    uint64_t alive = 0, tick = 0, missed = 0, overruns = 0; /* the latter two since the last sweep */
    struct kvmstats_chunk *chunk = NULL;                    /* the one that is being filled, if any */

    for (uint64_t i = 0; i < run->num_files; ++i)
        alive += run->files[i].error == 0;
    run->start = now_ns();
    while (tick < run->ticks && alive && !stopped(run)) {
        int64_t now = now_ns();
        if (run->interval) {
            wait_until(run, run->start + (int64_t)tick * run->interval);
            if (stopped(run))
                break;
            now = now_ns();
            uint64_t due = (uint64_t)((now - run->start) / run->interval);
            if (due >= run->ticks)
                due = run->ticks - 1;
            if (due > tick) {
                missed += due - tick;
                run->missed += due - tick;
                tick = due;
            }
        }
        if (run->duration && now - run->start >= run->duration)
            break;
        uint64_t place = run->head % run->depth;
        if (!chunk) {
            if (ring_is_full(run)) {
                if (run->interval) {
                    ++missed, ++overruns;
                    ++run->missed, ++run->overruns;
                    ++tick;
                } else {
                    sleep_until(now + FULL_NAP);
                }
                continue;
            }
            chunk = &run->chunks[place];
            chunk->first = run->taken;
            chunk->used = chunk->missed = chunk->overruns = 0;
        }
        uint64_t slot = place * run->chunk + chunk->used;
        int failed = sweep_all(run, workers, n, slot);
        run->sweep_ns[slot] = now_ns() - now;
        run->time[slot] = now;
        run->tick[slot] = tick++;
        ++run->taken;
        alive -= (uint64_t)failed;
        chunk->missed += missed;
        chunk->overruns += overruns;
        missed = overruns = 0;
        if (++chunk->used == run->chunk) {
            hand_out(run);
            chunk = NULL;
        }
        if (failed && run->strict)
            break;
    }
    if (chunk)
        hand_out(run);
}

int kvmstats_run(struct kvmstats_run *run)
{
    struct worker workers[KVMSTATS_MAX_THREADS];

    int slack = prctl(TIMER_SLACK_GET, 0L, 0L, 0L, 0L);
    prctl(TIMER_SLACK_SET, 1L, 0L, 0L, 0L);
    int n = start_workers(run, workers);
    if (n > 0) {
        loop(run, workers, n);
        end_workers(workers, n);
    }
    if (slack > 0)
        prctl(TIMER_SLACK_SET, (long)slack, 0L, 0L, 0L);
    run->status = n > 0 ? 0 : n;
    tell(run);
    return run->status;
}

void kvmstats_stop(struct kvmstats_run *run)
{
    __atomic_store_n(&run->stop, 1, __ATOMIC_RELAXED);
}

uint64_t kvmstats_ready(const struct kvmstats_run *run)
{
    return __atomic_load_n(&run->head, __ATOMIC_ACQUIRE);
}

void kvmstats_release(struct kvmstats_run *run, uint64_t chunks)
{
    if (chunks <= kvmstats_ready(run))
        __atomic_store_n(&run->tail, chunks, __ATOMIC_RELEASE);
}
