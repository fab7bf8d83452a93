/* SPDX-License-Identifier: MIT */
/*
 * test_series.c - csrc/series.h against its manual: each result is that of the plainest loop, to the last bit
 *
 * Link with series.c. What is read and what is written lies right before a page that cannot be accessed, or right behind
 * one.
 */
#if defined(__i386__) && !defined(__SSE2_MATH__)
#pragma GCC target("sse2,fpmath=sse") /* as in series.c */
#endif

#include "plain_series.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define LENGTH(array) (sizeof(array) / sizeof((array)[0]))

/* ---- checks ---- */

static unsigned long checks, failures;
static char context[160];

#define CHECK(expression) check(__LINE__, !!(expression), #expression)

static void check(int line, int good, const char *expression)
{
    ++checks;
    if (good)
        return;
    ++failures;
    printf("%s:%d: %s [%s]\n", __FILE__, line, expression, context);
}

/* ---- memory between two pages that cannot be accessed ---- */

enum { SERIES = 4, ROOM = 1 << 20 };

static uint8_t *new_arena(void)
{
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    uint8_t *base = mmap(NULL, ROOM + 2 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base == MAP_FAILED || mprotect(base, page, PROT_NONE) || mprotect(base + page + ROOM, page, PROT_NONE)) {
        perror("test_series: mmap");
        exit(1);
    }
    return base + page;
}

static uint8_t *inputs[SERIES], *outputs[SERIES];
static int at_end;

static void *place(uint8_t *arena, uint64_t size)
{
    if (size > ROOM)
        exit(2);
    return at_end ? arena + ROOM - size : arena;
}

/* ---- values ---- */

static uint64_t state = 88172645463325252;

static uint64_t draw(void)
{
    state ^= state << 13;
    state ^= state >> 7;
    return state ^= state << 17;
}

/* What follows a value: mostly a bit more, now and then less or something at an edge. */
static uint64_t follow(uint64_t before)
{
    static const uint64_t edges[] = {
        0, 1, UINT64_C(1) << 32, (UINT64_C(1) << 53) + 1, INT64_MAX, UINT64_C(1) << 63, UINT64_MAX - 1, UINT64_MAX,
    };
    switch (draw() % 64) {
    case 0:
        return edges[draw() % LENGTH(edges)];
    case 1:
        return draw();
    case 2:
        return before >> 1;
    case 3:
        return before;
    default:
        return before + draw() % 1000;
    }
}

/* ---- a table, and what must come out ---- */

enum { LARGEST = 40, MOST_SWEEPS = 600 };

static const uint64_t widths[SERIES] = {1, 3, 1, 32};
static struct kvmstats_series series[SERIES];
static int64_t times[MOST_SWEEPS];
static struct kvmstats_table table = {.series = series, .num_series = SERIES, .time = times};

/* In rows with values between them, of which every skip-th is used; or each series by itself. */
static void arrange(uint64_t sweeps, uint64_t files, uint64_t skip, int in_rows)
{
    uint64_t words = 2, word = 1;

    table.sweeps = sweeps;
    table.files = files;
    for (int i = 0; i < SERIES; ++i)
        words += widths[i];
    for (int i = 0; i < SERIES; ++i) {
        uint64_t step = in_rows ? words : widths[i];
        uint64_t rows = sweeps ? (sweeps - 1) * skip + 1 : 0;
        uint64_t *values = place(inputs[in_rows ? 0 : i], rows * files * step * 8);
        for (uint64_t j = 0; j < rows * files * step && (i == 0 || !in_rows); ++j)
            values[j] = follow(j < files * step ? draw() >> draw() % 64 : values[j - files * step]);
        series[i] = (struct kvmstats_series){
            .values = values + (in_rows ? word : 0),
            .sweep_step = skip * files * step,
            .file_step = step,
            .width = widths[i],
            .grows = draw() % 4 != 0,
            .divide = draw() % 2 ? 1 : 1e9,
            .multiply = draw() % 2 ? 1 : 1024,
        };
        word += widths[i];
    }
    for (uint64_t i = 1; i < sweeps; ++i)
        times[i] = times[i - 1] + (draw() % 8 ? (int64_t)(draw() % 4000000000) : 0);
}

static void work(int (*function)(const struct kvmstats_table *), uint64_t size)
{
    for (int i = 0; i < SERIES; ++i) {
        uint64_t bytes = size * widths[i] * 8;
        series[i].out = place(outputs[i], bytes);
        memset(series[i].out, 0xcc, bytes);
        series[i].overflowed = 0xcc;
    }
    CHECK(function(&table) == 0);
}

static void test_table(void)
{
    const uint64_t sweeps = table.sweeps ? table.sweeps - 1 : 0, files = table.files;

    work(kvmstats_gather, table.sweeps * files);
    for (int i = 0; i < SERIES; ++i)
        for (uint64_t s = 0; s < table.sweeps; ++s)
            for (uint64_t f = 0; f < files; ++f)
                CHECK(!memcmp((uint64_t *)series[i].out + (s * files + f) * widths[i], value(&series[i], s, f),
                              widths[i] * 8));
    work(kvmstats_deltas, sweeps * files);
    for (int i = 0; i < SERIES; ++i) {
        const uint64_t *out = series[i].out;
        for (uint64_t j = 0; j < sweeps * files * widths[i]; ++j)
            CHECK(out[j] == change_of(&series[i], j / widths[i] / files, j / widths[i] % files, j % widths[i]));
    }
    work(kvmstats_rates, sweeps * files);
    for (int i = 0; i < SERIES; ++i) {
        const double *out = series[i].out;
        for (uint64_t j = 0; j < sweeps * files * widths[i]; ++j) {
            uint64_t s = j / widths[i] / files;
            double rate =
                rate_of(&series[i], times + s, change_of(&series[i], s, j / widths[i] % files, j % widths[i]));
            CHECK(!memcmp(&out[j], &rate, sizeof rate));
        }
    }
    for (int i = 0; i < SERIES; ++i)
        series[i].out = place(outputs[i], sweeps * files);
    CHECK(kvmstats_resets(&table) == 0);
    for (int i = 0; i < SERIES; ++i)
        for (uint64_t j = 0; j < sweeps * files; ++j)
            CHECK(((const uint8_t *)series[i].out)[j] == was_cleared(&series[i], j / files, j % files));
    work(kvmstats_totals, files);
    for (int i = 0; i < SERIES; ++i) {
        uint32_t overflowed = 0;
        for (uint64_t j = 0; j < files * widths[i]; ++j) {
            uint64_t sum = 0;
            for (uint64_t s = 0; s < sweeps; ++s) {
                uint64_t change = change_of(&series[i], s, j / widths[i], j % widths[i]);
                sum += change;
                overflowed |= series[i].grows && sum < change;
            }
            CHECK(((const uint64_t *)series[i].out)[j] == sum);
        }
        CHECK(series[i].overflowed == overflowed);
    }
}

/* ---- tests ---- */

static void test_all_shapes(void)
{
    static const uint64_t sweeps[] = {0, 1, 2, 3, 8, 21}, files[] = {0, 1, 2, 5, 8, 17}, tiles[] = {0, 1, 5, 40, 300};

    for (size_t i = 0; i < LENGTH(sweeps); ++i)
        for (size_t j = 0; j < LENGTH(files); ++j)
            for (size_t k = 0; k < LENGTH(tiles); ++k)
                for (unsigned way = 0; way < 4; ++way) {
                    table.tile = tiles[k];
                    at_end = (int)(i + j + k + way) % 2;
                    arrange(sweeps[i], files[j], way / 2 + 1, way % 2);
                    snprintf(context, sizeof context, "%u sweeps, %u files, tile %u, way %u", (unsigned)sweeps[i],
                             (unsigned)files[j], (unsigned)tiles[k], way);
                    test_table();
                }
}

static void test_largest_tile(void)
{
    table.tile = UINT64_MAX;
    snprintf(context, sizeof context, "the largest tile");
    arrange(MOST_SWEEPS, 5, 1, 1);
    test_table();
    arrange(3, 600, 1, 1);
    test_table();
}

static void test_no_series(void)
{
    arrange(5, 3, 1, 1);
    table.num_series = 0;
    CHECK(kvmstats_rates(&table) == 0);
    CHECK(kvmstats_totals(&table) == 0);
    table.num_series = SERIES;
}

static void test_no_addresses(void)
{
    int (*const functions[])(const struct kvmstats_table *) = {
        kvmstats_gather, kvmstats_deltas, kvmstats_rates, kvmstats_resets, kvmstats_totals,
    };
    const uint64_t huge = SIZE_MAX / 8;
    /* sweeps, files, sweep_step, file_step, width */
    const uint64_t cases[][5] = {
        {3, 1, UINT64_MAX / 2 + 1, 1, 1},
        {1, 3, 1, UINT64_MAX / 2 + 1, 1},
        {2, 2, UINT64_MAX, 1, 1},
        {2, 1, 1, 1, UINT64_MAX},
        {2, 1, huge, 1, 1},
        {UINT64_MAX, 2, 0, 0, 1},
        {huge, 2, 0, 0, 1},
        {1, 1, 1, 1, huge + 1},
    };

    for (size_t i = 0; i < LENGTH(cases); ++i)
        for (size_t j = 0; j < LENGTH(functions); ++j) {
            uint64_t written = 7;
            snprintf(context, sizeof context, "case %u, function %u", (unsigned)i, (unsigned)j);
            series[1] = (struct kvmstats_series){NULL, cases[i][2], cases[i][3], cases[i][4], 1, 0, 1, 1, &written};
            series[0] = (struct kvmstats_series){NULL, 0, 0, 1, 1, 0, 1, 1, &written};
            struct kvmstats_table impossible = {series, 2, cases[i][0], cases[i][1], 64, times};
            CHECK(functions[j](&impossible) == -EOVERFLOW);
            CHECK(written == 7);
        }
}

int main(void)
{
    for (int i = 0; i < SERIES; ++i) {
        inputs[i] = new_arena();
        outputs[i] = new_arena();
    }
    test_all_shapes();
    test_largest_tile();
    test_no_series();
    test_no_addresses();
    if (failures) {
        printf("test_series: %lu checks, %lu failed\n", checks, failures);
        return 1;
    }
    printf("test_series: %lu checks\n", checks);
    return 0;
}
