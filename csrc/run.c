/* SPDX-License-Identifier: MIT */
/* Sweeps on a schedule: the threads that share a sweep, and the ring. The contract is in run.h. */
#include "run.h"

#include "clock.h"
#include "pace.h"
#include "read.h"

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <semaphore.h>
#include <signal.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

enum {
    FULL_RING_SLEEP = 200000, /* ns between two looks at a full ring when there is no schedule */
    HANDOVER_SPIN = 50000,    /* ns that a thread spins for its part of a sweep before it sleeps */
    CLOCK_TRIES = 8,          /* how often both clocks are read, because the thread may be interrupted in between */
    CLOCK_CLOSE = 1000,       /* ns between the two at which one try is enough */

    /* prctl(2): PR_SET_TIMERSLACK and PR_GET_TIMERSLACK, whose header would include the kernel's */
    SET_TIMER_SLACK = 29,
    GET_TIMER_SLACK = 30,
};

int prctl(int option, ...);

/* ---- the wall clock */

int64_t kvmstats_wall_offset(void)
{
    int64_t least = INT64_MAX, offset = 0;

    for (int i = 0; i < CLOCK_TRIES && least > CLOCK_CLOSE; ++i) {
        int64_t before = now_ns();
        int64_t wall = read_clock_ns(CLOCK_REALTIME);
        int64_t apart = now_ns() - before;
        if (apart < least) {
            least = apart;
            offset = wall - before - apart / 2;
        }
    }
    return offset;
}

/* ---- the threads that share a sweep */

struct worker {
    struct kvmstats_run *run;
    uint64_t begin, end; /* its files */
    uint64_t *scratch;
    uint64_t slot, next_slot, number; /* of the sweep to take */
    int failed, quit;
    sem_t go, done;
    pthread_t thread;
};

/* sem_wait, after a spin that usually makes it unnecessary. */
static void wait_for(sem_t *semaphore)
{
    for (int64_t until = now_ns() + HANDOVER_SPIN; now_ns() < until; relax())
        if (sem_trywait(semaphore) == 0)
            return;
    while (sem_wait(semaphore) != 0)
        ; /* EINTR */
}

static void *work(void *argument)
{
    struct worker *worker = argument;

    for (;;) {
        wait_for(&worker->go);
        if (worker->quit)
            return NULL;
        worker->failed = sweep_files(worker->run->files, worker->begin, worker->end, worker->scratch, worker->slot,
                                     worker->next_slot, worker->number);
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

/* Start threads 1 to n - 1; worker 0 is the calling thread. Returns n, or -errno. */
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

    /* Signals go to the threads that the program knows. */
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

/* Read every file into a slot. Returns how many failed. */
static int sweep_all(struct kvmstats_run *run, struct worker *workers, int n, uint64_t slot)
{
    uint64_t next_slot = slot + 1 < run->depth * run->chunk ? slot + 1 : 0;

    for (int i = 1; i < n; ++i) {
        workers[i].slot = slot;
        workers[i].next_slot = next_slot;
        workers[i].number = run->taken;
        sem_post(&workers[i].go);
    }
    int failed =
        sweep_files(run->files, workers[0].begin, workers[0].end, workers[0].scratch, slot, next_slot, run->taken);
    for (int i = 1; i < n; ++i) {
        wait_for(&workers[i].done);
        failed += workers[i].failed;
    }
    return failed;
}

/* ---- the ring */

static void signal_event(const struct kvmstats_run *run)
{
    static const uint64_t one = 1;

    if (run->event_fd >= 0) {
        ssize_t written = write(run->event_fd, &one, sizeof one);
        (void)written; /* a full eventfd is readable already */
    }
}

/* The chunk that was being filled is ready. */
static void publish(struct kvmstats_run *run)
{
    __atomic_store_n(&run->head, run->head + 1, __ATOMIC_RELEASE);
    signal_event(run);
}

static int is_full(const struct kvmstats_run *run)
{
    return run->head - __atomic_load_n(&run->tail, __ATOMIC_ACQUIRE) >= run->depth;
}

/* ---- the run */

static void loop(struct kvmstats_run *run, struct worker *workers, int n)
{
    uint64_t alive = 0, tick = run->first_tick;
    uint64_t missed = 0, overruns = 0;   /* since the last sweep */
    struct kvmstats_chunk *chunk = NULL; /* the one that is being filled, if any */
    uint64_t first_slot = 0;             /* of that chunk */
    struct pace pace = start_pace(run);

    for (uint64_t i = 0; i < run->num_files; ++i)
        alive += run->files[i].error == 0;
    /* The end of a sweep is also the time from which the next one is waited for, or begins. */
    int64_t now = now_ns();
    if (!run->start)
        run->start = now;
    while (tick < run->ticks && alive && !is_stopped(run)) {
        if (run->interval) {
            now = wait_until(run, &pace, run->start + (int64_t)tick * run->interval, now);
            if (is_stopped(run))
                break;
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
        if (!chunk) {
            if (is_full(run)) {
                if (run->interval) {
                    ++missed, ++overruns;
                    ++run->missed, ++run->overruns;
                    ++tick;
                } else {
                    sleep_until(now + FULL_RING_SLEEP);
                    now = now_ns();
                }
                continue;
            }
            uint64_t place = run->head % run->depth;
            first_slot = place * run->chunk;
            chunk = &run->chunks[place];
            chunk->first = run->taken;
            chunk->used = chunk->missed = chunk->overruns = 0;
        }
        uint64_t slot = first_slot + chunk->used;
        int failed = sweep_all(run, workers, n, slot);
        run->time[slot] = now;
        now = now_ns();
        run->sweep_ns[slot] = now - run->time[slot];
        run->tick[slot] = tick++;
        if (!chunk->used) {
            chunk->wall_offset = kvmstats_wall_offset();
            now = now_ns();
        }
        ++run->taken;
        alive -= (uint64_t)failed;
        chunk->missed += missed;
        chunk->overruns += overruns;
        missed = overruns = 0;
        if (++chunk->used == run->chunk) {
            publish(run);
            chunk = NULL;
            now = now_ns();
        }
        if (failed && run->strict)
            break;
    }
    if (chunk)
        publish(run);
}

/* The last that is done to the struct, but for the signal: who waits looks at `ended` first. */
static void end(struct kvmstats_run *run, int status)
{
    run->status = status;
    __atomic_store_n(&run->ended, 1, __ATOMIC_RELEASE);
    signal_event(run);
}

int kvmstats_run(struct kvmstats_run *run)
{
    struct worker workers[KVMSTATS_MAX_THREADS];

    int slack = prctl(GET_TIMER_SLACK, 0L, 0L, 0L, 0L);
    prctl(SET_TIMER_SLACK, 1L, 0L, 0L, 0L);
    int n = start_workers(run, workers);
    if (n > 0) {
        loop(run, workers, n);
        end_workers(workers, n);
    }
    if (slack > 0)
        prctl(SET_TIMER_SLACK, (long)slack, 0L, 0L, 0L);
    end(run, n > 0 ? 0 : n);
    return run->status;
}

/* ---- the thread of a run */

static void *run_in_thread(void *argument)
{
    struct kvmstats_run *run = argument;

    /* A word each: what is wider than a register of a 32-bit machine would be two of the arguments. */
    if (run->cpus && syscall(SYS_sched_setaffinity, 0L, (size_t)run->cpu_words * sizeof *run->cpus, run->cpus) != 0)
        end(run, -errno);
    else
        kvmstats_run(run);
    return NULL;
}

/* Have a thread with these attributes run before all others that are not real-time themselves. Returns 0, or an errno. */
static int set_priority(pthread_attr_t *attributes, int priority)
{
    struct sched_param parameters = {.sched_priority = priority};

    int error = pthread_attr_setinheritsched(attributes, PTHREAD_EXPLICIT_SCHED);
    if (!error)
        error = pthread_attr_setschedpolicy(attributes, SCHED_FIFO);
    return error ? error : pthread_attr_setschedparam(attributes, &parameters);
}

int kvmstats_start(struct kvmstats_run *run)
{
    sigset_t all, before;
    pthread_attr_t attributes;
    pthread_t thread;

    _Static_assert(sizeof thread <= sizeof run->thread, "a pthread_t fits");
    int error = pthread_attr_init(&attributes);
    if (error)
        return -error;
    if (run->priority)
        error = set_priority(&attributes, run->priority);
    if (!error) {
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before);
        error = pthread_create(&thread, &attributes, run_in_thread, run);
        if (!error) {
            memcpy(&run->thread, &thread, sizeof thread);
            __atomic_store_n(&run->joinable, 1, __ATOMIC_RELEASE);
        }
        pthread_sigmask(SIG_SETMASK, &before, NULL);
    }
    pthread_attr_destroy(&attributes);
    return -error;
}

void kvmstats_join(struct kvmstats_run *run)
{
    pthread_t thread;

    if (__atomic_exchange_n(&run->joinable, 0, __ATOMIC_ACQ_REL)) {
        memcpy(&thread, &run->thread, sizeof thread);
        pthread_join(thread, NULL);
    }
}

/* ---- what other threads ask of it */

static int is_due(const struct kvmstats_run *run, uint64_t chunks)
{
    return kvmstats_ready(run) > chunks || __atomic_load_n(&run->ended, __ATOMIC_ACQUIRE);
}

int kvmstats_wait(struct kvmstats_run *run, uint64_t chunks, int timeout_ms)
{
    struct pollfd event = {.fd = run->event_fd, .events = POLLIN};
    uint64_t signals;

    if (is_due(run, chunks))
        return 1;
    if (poll(&event, 1, timeout_ms) > 0) {
        ssize_t taken = read(run->event_fd, &signals, sizeof signals);
        (void)taken; /* another reader may have been faster */
    }
    return is_due(run, chunks);
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
