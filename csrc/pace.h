/* SPDX-License-Identifier: MIT */
/*
 * pace.h - waiting for a tick, inline: asleep, reading the clock, or first one and then the other
 *
 * A sleep ends late, by what the timer and the scheduler take: 2 us on a server, 50 us in a virtual machine. Spinning
 * until the tick is due hides that, but it is work: a thread that works much has the processor taken away, or does not
 * get it when it wakes up, for as long as the others' turns last. So the hybrid wait spins for as long as sleeps have
 * been late lately, beginning with 1 us and doubling that, and falls back to it once others have had the processor.
 */
#ifndef KVMSTATS_PACE_H
#define KVMSTATS_PACE_H

#include "clock.h"
#include "run.h"

#include <sys/resource.h>

#ifndef RUSAGE_THREAD
#define RUSAGE_THREAD 1 /* of Linux; glibc declares it for _GNU_SOURCE only */
#endif

enum {
    LONGEST_SLEEP = 20000000, /* ns: how soon a stop is noticed */
    OTHERS_TURN = 500000,     /* ns: what is so late has probably waited for another thread's turn to end */
    LEAST_SPIN = 1000, /* ns: the spin begins with that, and falls back to it; then it is doubled again and again: */
    START = 10000000,  /* ns: so soon as long as nothing is known of others, */
};

#define FIRST_REGAIN ((int64_t)NS_PER_SECOND)     /* ns: so soon once they have had their turns, */
#define LAST_REGAIN ((int64_t)16 * NS_PER_SECOND) /* ns: and twice as late each time they come again, up to this */

/* What a hybrid wait has learned. */
struct pace {
    int64_t usual;     /* ns by which sleeps end late on average, but for those that were others' turns */
    int64_t late;      /* ns by which the worst of them end late */
    int64_t most;      /* ns to spin at most */
    int64_t regain_at; /* when that is doubled ... */
    int64_t regain;    /* ... and how long after it was set */
    long switches;     /* how often the scheduler has taken the processor away */
};

/* How often the scheduler has had the calling thread stop although it wanted to go on. */
static inline long count_switches(void)
{
    struct rusage usage;
    return getrusage(RUSAGE_THREAD, &usage) == 0 ? usage.ru_nivcsw : 0;
}

static inline struct pace start_pace(const struct kvmstats_run *run)
{
    return (struct pace){
        .most = LEAST_SPIN, .regain = START, .switches = run->wait == KVMSTATS_WAIT_HYBRID ? count_switches() : 0};
}

/* Signals may end it early. */
static inline void sleep_until(int64_t when)
{
    struct timespec until = to_timespec(when);
    clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, NULL);
}

static inline void relax(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static inline int is_stopped(const struct kvmstats_run *run)
{
    return __atomic_load_n(&run->stop, __ATOMIC_RELAXED) != 0;
}

/* Returns how long before it is due a tick is waited for awake. */
static inline int64_t choose_spin(const struct kvmstats_run *run, struct pace *pace, int64_t now)
{
    if (run->wait != KVMSTATS_WAIT_HYBRID)
        return run->wait == KVMSTATS_WAIT_SPIN ? INT64_MAX : 0;
    if (pace->usual >= run->interval)
        return INT64_MAX; /* asleep it would miss one tick after another */
    if (now >= pace->regain_at) {
        pace->most *= 2;
        pace->regain_at = now + pace->regain;
        if (pace->most >= run->spin_ns) {
            pace->most = run->spin_ns;
            pace->regain_at = INT64_MAX;
            pace->regain = START;
        }
    }
    int64_t spin = pace->late + pace->late / 8;
    return spin < pace->most ? spin : pace->most;
}

/* Others want the processor: they have had it for their turns. */
static inline void note_others(struct pace *pace, int64_t now)
{
    pace->usual = 0; /* if it did not sleep because of that, it finds out anew */
    pace->most = LEAST_SPIN;
    pace->regain = pace->regain < FIRST_REGAIN  ? FIRST_REGAIN
                   : pace->regain < LAST_REGAIN ? 2 * pace->regain
                                                : LAST_REGAIN;
    pace->regain_at = now + pace->regain;
}

/*
 * A sleep ended so late. No spinning would have helped against others' turns, and so they are not learned. Returns
 * whether they were such.
 */
static inline int note_sleep(const struct kvmstats_run *run, struct pace *pace, int64_t late, int64_t now)
{
    int is_turn = late > OTHERS_TURN;
    if (is_turn)
        note_others(pace, now);
    if (late > run->spin_ns || late < 0)
        return is_turn;
    pace->usual += (late - pace->usual) / 8;
    if (late > pace->late)
        pace->late = late;
    else
        pace->late -= (pace->late - late) / 64; /* forget the worst within some hundred sleeps */
    return is_turn;
}

/*
 * A tick is taken late, after a sweep or a wait: because the scheduler has taken the processor away? What a sleep has
 * noted already is not noted twice.
 */
static inline void note_late(struct pace *pace, int64_t now, int noted)
{
    long switches = count_switches();
    if (switches != pace->switches && !noted)
        note_others(pace, now);
    pace->switches = switches;
}

/* Wait until `when`, or until stopped. Returns the time, which is `now` when it is called. */
static inline int64_t wait_until(const struct kvmstats_run *run, struct pace *pace, int64_t when, int64_t now)
{
    int64_t spin = choose_spin(run, pace, now);
    int slept = 0, noted = 0;

    while (now < when && !is_stopped(run)) {
        if (when - now > spin) {
            int64_t until = when - now - spin > LONGEST_SLEEP ? now + LONGEST_SLEEP : when - spin;
            sleep_until(until);
            now = now_ns();
            noted |= note_sleep(run, pace, now - until, now);
            slept = 1;
        } else {
            relax();
            now = now_ns();
        }
    }
    if (run->wait == KVMSTATS_WAIT_HYBRID) {
        if (!slept && pace->usual > 0)
            --pace->usual; /* by and by, a sleep is tried again */
        if (now - when > OTHERS_TURN)
            note_late(pace, now, noted);
    }
    return now;
}

#endif
