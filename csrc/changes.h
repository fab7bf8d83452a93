/* SPDX-License-Identifier: MIT */
/*
 * changes.h - the changes of a part, or its rates, LANES values at once: a part of series.c, which includes it once for
 * each number of lanes. With more than two, runs must have that many values.
 *
 * What it defines is called after the number: write_rates is write_rates_2 or write_rates_4. TARGET says what these
 * functions may be compiled to. All numbers of lanes give the same results.
 */

#define words NAMED(words)
#define doubles NAMED(doubles)
#define stored_words NAMED(stored_words)
#define stored_doubles NAMED(stored_doubles)
#define recipe NAMED(recipe)
#define load NAMED(load)
#define borrow NAMED(borrow)
#define has_fallen NAMED(has_fallen)
#define convert NAMED(convert)
#define change_some NAMED(change_some)
#define finish NAMED(finish)
#define change_part NAMED(change_part)
#define write_rates NAMED(write_rates)

typedef uint64_t words __attribute__((vector_size(8 * LANES)));
typedef double doubles __attribute__((vector_size(8 * LANES)));
/* In memory they need only be aligned as a u64 is. gcc 16 for aarch64 fails where such a type is a parameter. */
typedef words stored_words __attribute__((aligned(8), may_alias));
typedef doubles stored_doubles __attribute__((aligned(8), may_alias));

/* How changes become results. */
struct recipe {
    words goes_down; /* -1: what fell has fallen; 0: it was cleared and counts from 0 */
    words high;
    doubles offset, divide, multiply;
};

/* With a step of 0, the same value again and again. */
TARGET ALWAYS_INLINE words load(const uint64_t *from, uint64_t step)
{
    if (step == 1)
        return *(const stored_words *)from;
#if LANES == 2
    return (words){from[0], from[step]};
#else
    return (words){from[0], from[step], from[2 * step], from[3 * step]};
#endif
}

/* Bit 63 is set where `after` is less: the borrow of the subtraction, for SSE2 does not compare u64. */
TARGET ALWAYS_INLINE words borrow(words before, words after)
{
    return (~after & before) | (~(after ^ before) & (after - before));
}

TARGET ALWAYS_INLINE int has_fallen(words fallen)
{
    uint64_t any = 0;

    for (int i = 0; i < LANES; ++i)
        any |= fallen[i];
    return any >> 63 != 0;
}

/*
 * u64 to double, rounded once, for which neither SSE2 nor AVX2 has an instruction. Each half becomes the end of the
 * mantissa of a double with an exponent that gives it its worth: 2^84 + upper * 2^32, and 2^52 + lower. Taking both
 * powers off the first is exact; adding the second rounds. Of a signed word 2^63 is added to the upper half, and taken
 * off too.
 */
TARGET ALWAYS_INLINE doubles convert(words word, words high, doubles offset)
{
    words upper = (word >> 32) ^ high;
    words lower = (word & 0xffffffff) | LOW;
    return ((doubles)upper - offset) + (doubles)lower;
}

/* Adds to *fallen what fell; of values that are cleared together, its change is not yet known. */
TARGET ALWAYS_INLINE words change_some(words before, words after, const struct recipe *recipe, int together,
                                       words *fallen)
{
    words fell = borrow(before, after);

    if (!together)
        return after - (before & (((fell >> 63) - 1) | recipe->goes_down));
    *fallen |= fell;
    return after - before;
}

/* Returns changes, or the bits of rates if there is something to divide by. */
TARGET ALWAYS_INLINE words finish(words change, const struct recipe *recipe, const doubles *by)
{
    return by ? (words)(convert(change, recipe->high, recipe->offset) / *by * recipe->multiply) : change;
}

/*
 * Write the changes of a part, or rates. When it is compiled, these are known: as_rates; `together`, whether the values
 * of a run are cleared together; the step, if it is 1; `each`, whether a run has a value of each sweep.
 */
TARGET ALWAYS_INLINE void change_part(const struct part *part, int as_rates, int together, uint64_t step, int each)
{
    const struct kvmstats_series *series = part->series;
    const uint64_t apart = series->sweep_step, count = part->count;
    const uintptr_t ahead = part->ahead;
    const struct recipe recipe = {
        .goes_down = (words){0} - (uint64_t)!series->grows,
        .high = (words){0} + (series->grows ? HIGH : SIGNED_HIGH),
        .offset = (series->grows ? POWERS : SIGNED_POWERS) - (doubles){0},
        .divide = series->divide - (doubles){0},
        .multiply = series->multiply - (doubles){0},
    };

    for (uint64_t row = 0; row < part->rows; ++row) {
        uint64_t *out = (uint64_t *)series->out + part->out + row * part->row_size;
        const double *seconds = part->tile->seconds + row;
        doubles by = recipe.divide;
        if (as_rates)
            by *= *seconds;
        for (uint64_t run = 0; run < part->runs; ++run, out += count) {
            const uint64_t *before = find_run(part, row, run);
            words fallen = {0};
            if (step == 1)
                prefetch_run(before + apart, count, ahead);
            const uint64_t *from = before;
            uint64_t i = 0;
            for (; i + LANES <= count; i += LANES, from += LANES * step) {
                for (uint64_t j = 0; j < LANES && step != 1; ++j)
                    prefetch(from + apart + j * step, ahead);
                if (each)
                    by = *(const stored_doubles *)(seconds + i) * recipe.divide;
                words change = change_some(load(from, step), load(from + apart, step), &recipe, together, &fallen);
                *(stored_words *)(out + i) = finish(change, &recipe, as_rates ? &by : NULL);
            }
#if LANES == 2
            if (i < count) {
                prefetch(from + apart, ahead);
                if (each)
                    by = seconds[i] * recipe.divide;
                words change = change_some(load(from, 0), load(from + apart, 0), &recipe, together, &fallen);
                out[i] = finish(change, &recipe, as_rates ? &by : NULL)[0];
            }
#else
            if (i < count) { /* the last LANES, some of them once more */
                from = before + (count - LANES) * step;
                prefetch(before + (count - 1) * step + apart, ahead);
                if (each)
                    by = *(const stored_doubles *)(seconds + count - LANES) * recipe.divide;
                words change = change_some(load(from, step), load(from + apart, step), &recipe, together, &fallen);
                *(stored_words *)(out + count - LANES) = finish(change, &recipe, as_rates ? &by : NULL);
            }
#endif
            /* That a histogram was cleared is known at its end. */
            if (together && series->grows && has_fallen(fallen))
                for (i = 0; i < count; ++i)
                    out[i] = finish(load(before + apart + i, 0), &recipe, as_rates ? &by : NULL)[0];
        }
    }
}

TARGET static void write_rates(const struct part *part)
{
    if (part->series->width > 1)
        change_part(part, 1, 1, 1, 0);
    else if (part->rows < part->tile->sweeps)
        change_part(part, 1, 0, part->step, 1);
    else if (part->step == 1)
        change_part(part, 1, 0, 1, 0);
    else
        change_part(part, 1, 0, part->step, 0);
}
