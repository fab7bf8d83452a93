/* SPDX-License-Identifier: MIT */
/*
 * test_core.c - the parsers, kvmstats_read and process.c against their manuals, kvmstats.h, schedstat.h and process.h
 *
 * Link with layout.c, schedstat.c, sweep.c, process.c, and as intercept.h says.
 *
 * Files are written byte by byte here, so that the core's byte order code does not vouch for itself. Every input lies
 * once right before and once right after a page that cannot be accessed, every output right before one.
 */
#include "intercept.h"
#include "kvmstats.h"
#include "process.h"
#include "schedstat.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/types.h>
#include <unistd.h>

#define LENGTH(array) (sizeof(array) / sizeof((array)[0]))

/* ---- checks ---- */

static unsigned long checks, failures;
static char context[128];

#define CHECK_AT(line, expression) check((line), !!(expression), #expression)
#define CHECK(expression) CHECK_AT(__LINE__, expression)

static void check(int line, int good, const char *expression)
{
    ++checks;
    if (good)
        return;
    ++failures;
    printf("%s:%d: %s [%s]\n", __FILE__, line, expression, context);
}

/* ---- memory between two pages that cannot be accessed ---- */

struct arena {
    uint8_t *begin, *end;
};

static struct arena input, output;

static struct arena new_arena(size_t room)
{
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    room = (room + page - 1) / page * page;
    uint8_t *base = mmap(NULL, room + 2 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base == MAP_FAILED || mprotect(base, page, PROT_NONE) || mprotect(base + page + room, page, PROT_NONE)) {
        perror("test_core: mmap");
        exit(1);
    }
    return (struct arena){base + page, base + page + room};
}

/* ---- stats files ---- */

enum { IMAGE_ROOM = 2 << 20, SERIES_HEADER = 80, MERGED_HEADER = 24 };

struct statistic {
    const char *name; /* cut at name_size, and then without NUL */
    uint32_t flags;
    int exponent;
    uint32_t size;
    uint32_t offset;
    uint32_t bucket_size;
};

/* Offsets of the header's fields in a layout. */
struct fields {
    uint32_t header_size, name_size, num_desc, id_offset, desc_offset, data_offset;
};

static const struct fields series_fields = {SERIES_HEADER, 64, 68, 0, 72, 76};
static const struct fields v9_fields = {SERIES_HEADER, 0, 4, 0, 8, 12};
static const struct fields merged_fields = {MERGED_HEADER, 4, 8, 12, 16, 20};

struct spec {
    int layout, big;
    const struct fields *at;
    uint32_t flags, name_size, num_desc, id_offset, desc_offset, data_offset;
    const struct statistic *stats;
};

/* Not in order, with a gap in the data, a name without NUL in each layout, and the extremes of each field. */
static const struct statistic standard_stats[] = {
    {"exits", 0x000, 0, 1, 0, 0},
    {"halt_wait_ns", 0x020, -9, 1, 24, 0},
    {"a_name_that_is_longer_than_any_field_of_any_layout_is", 0xffffffff, 32767, 2, 8, 0xffffffff},
    {"halt_wait_hist", 0x024, -9, 4, 40, 0},
    {"linear_hist_of_exactly_32_letters", 0x80000113, -32768, 3, 80, 0x01020304},
};
enum { STANDARD_COUNT = 5 };

static uint8_t image[IMAGE_ROOM];

static int host_is_big(void)
{
    const uint16_t one = 1;
    uint8_t first;
    memcpy(&first, &one, 1);
    return first == 0;
}

static int is_swapped(const struct spec *spec)
{
    return spec->big != host_is_big();
}

static void put(uint8_t *at, int big, unsigned width, uint64_t value)
{
    for (unsigned i = 0; i < width; ++i)
        at[big ? width - 1 - i : i] = (uint8_t)(value >> (8 * i));
}

static uint64_t get(const uint8_t *at, int big, unsigned width)
{
    uint64_t value = 0;
    for (unsigned i = 0; i < width; ++i)
        value |= (uint64_t)at[big ? width - 1 - i : i] << (8 * i);
    return value;
}

static int is_positional(const struct spec *spec)
{
    return spec->layout == KVMSTATS_LAYOUT_V2 || spec->layout == KVMSTATS_LAYOUT_V5;
}

static uint64_t stride_of(const struct spec *spec)
{
    return 16 + (uint64_t)spec->name_size;
}

static uint64_t desc_end_of(const struct spec *spec)
{
    return spec->desc_offset + spec->num_desc * stride_of(spec);
}

static uint64_t id_end_of(const struct spec *spec)
{
    return spec->id_offset + (uint64_t)(spec->layout == KVMSTATS_LAYOUT_MERGED ? spec->name_size : 64);
}

static uint64_t prefix_of(const struct spec *spec)
{
    return desc_end_of(spec) > id_end_of(spec) ? desc_end_of(spec) : id_end_of(spec);
}

static uint64_t data_size_of(const struct spec *spec)
{
    uint64_t size = 0;
    for (uint32_t i = 0; i < spec->num_desc; ++i) {
        uint64_t begin = is_positional(spec) ? size : spec->stats[i].offset;
        uint64_t end = begin + 8 * (uint64_t)spec->stats[i].size;
        size = end > size ? end : size;
    }
    return size;
}

static struct spec standard(int layout, int big)
{
    struct spec spec = {.layout = layout, .big = big, .num_desc = STANDARD_COUNT, .stats = standard_stats};
    spec.at = layout == KVMSTATS_LAYOUT_MERGED ? &merged_fields
              : layout == KVMSTATS_LAYOUT_V9   ? &v9_fields
                                               : &series_fields;
    spec.name_size = layout == KVMSTATS_LAYOUT_V2 ? 32 : 48;
    spec.id_offset = layout == KVMSTATS_LAYOUT_MERGED ? MERGED_HEADER : layout == KVMSTATS_LAYOUT_V9 ? 16 : 0;
    spec.desc_offset = layout == KVMSTATS_LAYOUT_MERGED ? MERGED_HEADER + 48 : SERIES_HEADER;
    spec.data_offset = (uint32_t)desc_end_of(&spec);
    snprintf(context, sizeof context, "layout %d, %s endian", layout, big ? "big" : "little");
    return spec;
}

static const int layouts[] = {KVMSTATS_LAYOUT_V2, KVMSTATS_LAYOUT_V5, KVMSTATS_LAYOUT_V9, KVMSTATS_LAYOUT_MERGED};

/* All layouts, each in both byte orders. */
enum { KINDS = 8 };

static struct spec kind(int i)
{
    return standard(layouts[i / 2], i % 2);
}

/* Gaps, and bytes after a NUL, are 0xCC: neither 0 nor anything that could pass for a field. */
static size_t build_header(const struct spec *spec)
{
    size_t size = spec->at->header_size;
    memset(image, 0xcc, size);
    if (spec->layout == KVMSTATS_LAYOUT_MERGED) {
        put(image, spec->big, 4, spec->flags);
        put(image + spec->at->id_offset, spec->big, 4, spec->id_offset);
    } else {
        memcpy(image + spec->id_offset, "kvm-4711", 9);
    }
    put(image + spec->at->name_size, spec->big, 4, spec->name_size);
    put(image + spec->at->num_desc, spec->big, 4, spec->num_desc);
    put(image + spec->at->desc_offset, spec->big, 4, spec->desc_offset);
    put(image + spec->at->data_offset, spec->big, 4, spec->data_offset);
    return size;
}

/* The data is included if there is room: the functions of layout.c do not read it. */
static size_t build(const struct spec *spec)
{
    size_t size = (size_t)prefix_of(spec);
    uint64_t data_end = spec->data_offset + data_size_of(spec);
    if (size > IMAGE_ROOM) {
        puts("test_core: no room for the image");
        exit(1);
    }
    if (data_end > size && data_end <= IMAGE_ROOM)
        size = (size_t)data_end;
    memset(image, 0xcc, size);
    build_header(spec);
    if (spec->layout == KVMSTATS_LAYOUT_MERGED)
        memcpy(image + spec->id_offset, "kvm-4711", spec->name_size < 9 ? spec->name_size : 9);
    for (uint32_t i = 0; i < spec->num_desc; ++i) {
        const struct statistic *stat = &spec->stats[i];
        uint8_t *at = image + spec->desc_offset + i * stride_of(spec);
        size_t length = strlen(stat->name) + 1;
        put(at, spec->big, 4, stat->flags);
        put(at + 4, spec->big, 2, (uint16_t)stat->exponent);
        put(at + 6, spec->big, 2, stat->size);
        put(at + 8, spec->big, 4, stat->offset);
        put(at + 12, spec->big, 4, stat->bucket_size);
        memcpy(at + 16, stat->name, length < spec->name_size ? length : spec->name_size);
    }
    return size;
}

/* ---- calls, each with its input at both ends of the arena ---- */

static int read_header(int line, size_t size, int repair, struct kvmstats_header *header, struct kvmstats_fault *fault)
{
    struct kvmstats_header other_header;
    struct kvmstats_fault other_fault;

    memset(header, 0xa5, sizeof *header);
    memset(fault, 0xa5, sizeof *fault);
    memset(&other_header, 0x5a, sizeof other_header);
    memset(&other_fault, 0x5a, sizeof other_fault);
    memcpy(input.begin, image, size);
    int other_status = kvmstats_read_header(input.begin, size, repair, &other_header, &other_fault);
    memcpy(input.end - size, image, size);
    int status = kvmstats_read_header(input.end - size, size, repair, header, fault);
    CHECK_AT(line, status == other_status);
    if (status == 0)
        CHECK_AT(line, header->prefix_size == other_header.prefix_size);
    else
        CHECK_AT(line, fault->offset == other_fault.offset);
    return status;
}

/* *descs: right before the page that cannot be accessed. */
static int read_descriptors(int line, size_t size, struct kvmstats_header *header, const struct kvmstats_desc **descs,
                            struct kvmstats_fault *fault)
{
    struct kvmstats_header other_header = *header;
    struct kvmstats_fault other_fault;
    size_t room = header->num_desc * sizeof **descs;
    struct kvmstats_desc *at = (void *)(output.end - room);

    if (room > (size_t)(output.end - output.begin)) {
        puts("test_core: no room for the descriptors");
        exit(1);
    }
    memset(fault, 0xa5, sizeof *fault);
    memset(at, 0x5a, room);
    memcpy(input.begin, image, size);
    int other_status = kvmstats_read_descriptors(input.begin, size, &other_header, at, &other_fault);
    memset(at, 0xa5, room);
    memcpy(input.end - size, image, size);
    int status = kvmstats_read_descriptors(input.end - size, size, header, at, fault);
    CHECK_AT(line, status == other_status);
    *descs = at;
    return status;
}

/* ---- expectations ---- */

/* What kvmstats.h promises about the fault for this error. */
static void check_fault(int line, int status, const struct kvmstats_fault *fault, enum kvmstats_error code,
                        const struct kvmstats_fault *want)
{
    CHECK_AT(line, status == code);
    if (status != code) {
        printf("    status %d\n", status);
        return;
    }
    CHECK_AT(line, fault->offset == want->offset);
    switch (code) {
    case KVMSTATS_E_TRUNCATED:
        CHECK_AT(line, fault->block == want->block);
        CHECK_AT(line, fault->limit == want->limit);
        break;
    case KVMSTATS_E_LAYOUT:
    case KVMSTATS_E_FLAGS:
        CHECK_AT(line, fault->value == want->value);
        break;
    case KVMSTATS_E_NAME_SIZE:
    case KVMSTATS_E_NUM_DESC:
    case KVMSTATS_E_COUNT_DEFECT:
        CHECK_AT(line, fault->value == want->value);
        CHECK_AT(line, fault->limit == want->limit);
        break;
    case KVMSTATS_E_BLOCK_ALIGN:
        CHECK_AT(line, fault->block == want->block);
        CHECK_AT(line, fault->value == want->value);
        break;
    case KVMSTATS_E_OVERLAP:
        CHECK_AT(line, fault->block == want->block);
        CHECK_AT(line, fault->value == want->value);
        CHECK_AT(line, fault->other == want->other);
        CHECK_AT(line, fault->limit == want->limit);
        break;
    case KVMSTATS_E_STAT_SIZE:
    case KVMSTATS_E_STAT_NAME:
        CHECK_AT(line, fault->index == want->index);
        break;
    case KVMSTATS_E_STAT_ALIGN:
        CHECK_AT(line, fault->index == want->index);
        CHECK_AT(line, fault->value == want->value);
        break;
    case KVMSTATS_E_DATA_SIZE:
        CHECK_AT(line, fault->index == want->index);
        CHECK_AT(line, fault->value == want->value);
        CHECK_AT(line, fault->limit == want->limit);
        break;
    case KVMSTATS_E_DUPLICATE:
        CHECK_AT(line, !"found in Python only");
        break;
    }
}

static void check_header(int line, const struct spec *spec, const struct kvmstats_header *header)
{
    int merged = spec->layout == KVMSTATS_LAYOUT_MERGED;
    CHECK_AT(line, header->layout == spec->layout);
    CHECK_AT(line, header->swapped == (uint32_t)is_swapped(spec));
    CHECK_AT(line, header->flags == 0);
    CHECK_AT(line, header->name_size == spec->name_size);
    CHECK_AT(line, header->num_desc == spec->num_desc);
    CHECK_AT(line, header->id_offset == spec->id_offset);
    CHECK_AT(line, header->id_size == (merged ? spec->name_size : 64));
    CHECK_AT(line, header->desc_offset == spec->desc_offset);
    CHECK_AT(line, header->data_offset == spec->data_offset);
    CHECK_AT(line, header->positional == (uint32_t)is_positional(spec));
    CHECK_AT(line, header->key_offset == (is_positional(spec) ? 64 : 0));
    CHECK_AT(line, header->key_size == (merged ? 24 : 16));
    CHECK_AT(line, header->desc_end == desc_end_of(spec));
    CHECK_AT(line, header->prefix_size == prefix_of(spec));
}

static void check_descriptors(int line, const struct spec *spec, const struct kvmstats_desc *descs)
{
    uint64_t position = 0;
    for (uint32_t i = 0; i < spec->num_desc; ++i) {
        const struct statistic *stat = &spec->stats[i];
        const struct kvmstats_desc *desc = &descs[i];
        size_t length = strlen(stat->name);
        int positional = is_positional(spec);
        CHECK_AT(line, desc->name_offset == spec->desc_offset + i * stride_of(spec) + 16);
        CHECK_AT(line, desc->name_length == (length < spec->name_size ? length : spec->name_size));
        CHECK_AT(line, desc->flags == stat->flags);
        CHECK_AT(line, desc->exponent == stat->exponent);
        CHECK_AT(line, desc->size == stat->size);
        CHECK_AT(line, desc->offset == (positional ? position : stat->offset));
        CHECK_AT(line, desc->bucket_size == (positional ? 0 : stat->bucket_size));
        position += 8 * (uint64_t)stat->size;
    }
}

/* The whole file is read as it was written; `repair` changes nothing. */
static void accept(int line, const struct spec *spec)
{
    size_t size = build(spec);
    for (int repair = 0; repair < 2; ++repair) {
        struct kvmstats_header header;
        struct kvmstats_fault fault;
        const struct kvmstats_desc *descs;
        int status = read_header(line, size, repair, &header, &fault);
        CHECK_AT(line, status == 0);
        if (status)
            continue;
        check_header(line, spec, &header);
        CHECK_AT(line, header.count_defect == 0);
        status = read_descriptors(line, size, &header, &descs, &fault);
        CHECK_AT(line, status == 0);
        if (status)
            continue;
        CHECK_AT(line, header.data_size == data_size_of(spec));
        check_descriptors(line, spec, descs);
    }
}

/* The header alone is read as it was written, from just its own bytes. */
static void accept_header(int line, const struct spec *spec, struct kvmstats_header *header)
{
    struct kvmstats_fault fault;
    int status = read_header(line, build_header(spec), 0, header, &fault);
    CHECK_AT(line, status == 0);
    if (status == 0)
        check_header(line, spec, header);
}

static void reject_header(int line, const struct spec *spec, enum kvmstats_error code, struct kvmstats_fault want)
{
    struct kvmstats_header header;
    struct kvmstats_fault fault;
    size_t size = build_header(spec);
    int status = read_header(line, size, 0, &header, &fault);
    check_fault(line, status, &fault, code, &want);
}

static void reject_descriptors(int line, const struct spec *spec, enum kvmstats_error code, struct kvmstats_fault want)
{
    struct kvmstats_header header;
    struct kvmstats_fault fault;
    const struct kvmstats_desc *descs;
    size_t size = build(spec);
    int status = read_header(line, size, 0, &header, &fault);
    CHECK_AT(line, status == 0);
    if (status)
        return;
    status = read_descriptors(line, size, &header, &descs, &fault);
    check_fault(line, status, &fault, code, &want);
}

#define ACCEPT(spec) accept(__LINE__, &(spec))
#define ACCEPT_HEADER(spec, header) accept_header(__LINE__, &(spec), (header))
#define REJECT_HEADER(spec, code, ...) \
    reject_header(__LINE__, &(spec), KVMSTATS_E_##code, (struct kvmstats_fault){__VA_ARGS__})
#define REJECT_DESCRIPTORS(spec, code, ...) \
    reject_descriptors(__LINE__, &(spec), KVMSTATS_E_##code, (struct kvmstats_fault){__VA_ARGS__})

/* ---- layout.c: what is accepted ---- */

static void test_layouts(void)
{
    for (int i = 0; i < KINDS; ++i) {
        struct spec spec = kind(i);
        ACCEPT(spec);
    }
}

/* The blocks of the merged layout in any order, adjacent or not; name_size 5 gives them odd ends. */
static struct spec arranged(int order, int big, uint32_t name_size, uint32_t gap)
{
    static const int orders[6][3] = {{0, 1, 2}, {0, 2, 1}, {1, 0, 2}, {1, 2, 0}, {2, 0, 1}, {2, 1, 0}};
    struct spec spec = standard(KVMSTATS_LAYOUT_MERGED, big);
    spec.name_size = name_size;
    uint32_t *begins[3] = {&spec.id_offset, &spec.desc_offset, &spec.data_offset};
    uint64_t sizes[3] = {name_size, spec.num_desc * stride_of(&spec), data_size_of(&spec)};
    uint64_t cursor = MERGED_HEADER;
    for (int i = 0; i < 3; ++i) {
        int block = orders[order][i];
        cursor = (cursor + 7) / 8 * 8 + gap;
        *begins[block] = (uint32_t)cursor;
        cursor += sizes[block];
    }
    snprintf(context, sizeof context, "merged, order %d, big %d, name_size %u, gap %u", order, big, name_size, gap);
    return spec;
}

/* v2 and v5 with the data before the descriptors. */
static struct spec data_first(int layout, int big)
{
    struct spec spec = standard(layout, big);
    spec.data_offset = SERIES_HEADER;
    spec.desc_offset = SERIES_HEADER + (uint32_t)data_size_of(&spec);
    return spec;
}

static void test_arrangements(void)
{
    for (int order = 0; order < 6; ++order)
        for (int big = 0; big < 2; ++big)
            for (uint32_t gap = 0; gap <= 24; gap += 8) {
                struct spec wide = arranged(order, big, 48, gap);
                ACCEPT(wide);
                struct spec odd = arranged(order, big, 5, gap);
                ACCEPT(odd);
            }
    for (int i = 0; i < 4; ++i) {
        struct spec spec = data_first(layouts[i / 2], i % 2);
        ACCEPT(spec);
        spec.desc_offset += 16;
        ACCEPT(spec);
    }
    for (int i = 0; i < KINDS; ++i) {
        struct spec spec = kind(i);
        spec.data_offset += 64;
        ACCEPT(spec);
    }
}

static void test_name_sizes(void)
{
    static const uint32_t good[] = {1, 2, 31, 32, 33, 48, 255, 256, 257, 4095, 4096};
    static const uint32_t bad[] = {0, 4097, 0x10000, 0x7fffffff, 0x80000000, 0xffffffff};
    static char name[5000];
    memset(name, 'n', sizeof name - 1);
    const struct statistic stats[] = {{name, 0, 0, 1, 0, 0}, {"x", 0, 0, 1, 8, 0}, {name + 1, 0, 0, 1, 16, 0}};

    for (int big = 0; big < 2; ++big) {
        for (size_t i = 0; i < LENGTH(good); ++i) {
            struct spec spec = standard(KVMSTATS_LAYOUT_MERGED, big);
            spec.name_size = good[i];
            spec.num_desc = LENGTH(stats);
            spec.stats = stats;
            spec.desc_offset = MERGED_HEADER + (good[i] + 7) / 8 * 8;
            spec.data_offset = (uint32_t)(desc_end_of(&spec) + 7) / 8 * 8;
            snprintf(context, sizeof context, "merged, big %d, name_size %u", big, good[i]);
            ACCEPT(spec);
            /* With the id elsewhere, only name_size shows the byte order. */
            spec.id_offset = (uint32_t)(spec.data_offset + data_size_of(&spec));
            ACCEPT(spec);
        }
        for (size_t i = 0; i < LENGTH(bad); ++i) {
            struct spec spec = standard(KVMSTATS_LAYOUT_MERGED, big);
            spec.name_size = bad[i];
            REJECT_HEADER(spec, NAME_SIZE, .offset = 4, .value = bad[i], .limit = KVMSTATS_MAX_NAME_SIZE);
        }
    }
}

static void test_counts(void)
{
    static struct statistic many[KVMSTATS_MAX_DESCRIPTORS];
    for (uint32_t i = 0; i < KVMSTATS_MAX_DESCRIPTORS; ++i)
        many[i] = (struct statistic){"x", i, 0, 1, 8 * (i ^ 1), ~i};

    struct spec full = standard(KVMSTATS_LAYOUT_MERGED, !host_is_big());
    full.name_size = 1;
    full.num_desc = KVMSTATS_MAX_DESCRIPTORS;
    full.stats = many;
    full.desc_offset = 32;
    full.data_offset = (uint32_t)desc_end_of(&full);
    ACCEPT(full);

    for (int i = 0; i < KINDS; ++i) {
        static const uint32_t bad[] = {65537, 0x10000000, 0x7fffffff, 0x80000000, 0xffffffff};
        struct spec spec = kind(i);
        struct kvmstats_header header;
        spec.num_desc = 65536;
        spec.data_offset = (uint32_t)desc_end_of(&spec);
        ACCEPT_HEADER(spec, &header);
        for (size_t k = 0; k < LENGTH(bad); ++k) {
            spec.num_desc = bad[k];
            REJECT_HEADER(spec, NUM_DESC, .offset = spec.at->num_desc, .value = bad[k],
                          .limit = KVMSTATS_MAX_DESCRIPTORS);
        }
    }
}

/* No descriptors is legal in every layout; both blocks are empty then. */
static void test_no_descriptors(void)
{
    for (int i = 0; i < KINDS; ++i) {
        struct spec spec = kind(i);
        spec.num_desc = 0;
        ACCEPT(spec);
        spec.data_offset = spec.desc_offset;
        ACCEPT(spec);
        spec.data_offset += 8;
        ACCEPT(spec);
        spec.data_offset = spec.at->header_size;
        ACCEPT(spec);

        struct kvmstats_header header;
        struct kvmstats_fault fault;
        size_t size = build(&spec);
        CHECK(kvmstats_read_header(image, size, 0, &header, &fault) == 0);
        CHECK(kvmstats_read_descriptors(image, size, &header, NULL, &fault) == 0);
        CHECK(header.data_size == 0);

        spec.data_offset = 0;
        REJECT_HEADER(spec, OVERLAP, .offset = spec.at->data_offset, .block = KVMSTATS_BLOCK_DATA,
                      .other = KVMSTATS_BLOCK_HEADER, .limit = spec.at->header_size);
    }
    for (int big = 0; big < 2; ++big) {
        struct spec spec = standard(KVMSTATS_LAYOUT_MERGED, big);
        spec.num_desc = 0;
        /* Empty blocks may lie at either end of the id, but not inside. */
        spec.desc_offset = spec.data_offset = MERGED_HEADER;
        ACCEPT(spec);
        spec.desc_offset = MERGED_HEADER + 40;
        REJECT_HEADER(spec, OVERLAP, .offset = 16, .block = KVMSTATS_BLOCK_DESCRIPTORS, .value = MERGED_HEADER + 40,
                      .other = KVMSTATS_BLOCK_ID, .limit = MERGED_HEADER + 48);
        spec.desc_offset = MERGED_HEADER + 48;
        spec.data_offset = MERGED_HEADER + 8;
        REJECT_HEADER(spec, OVERLAP, .offset = 20, .block = KVMSTATS_BLOCK_DATA, .value = MERGED_HEADER + 8,
                      .other = KVMSTATS_BLOCK_ID, .limit = MERGED_HEADER + 48);
    }
}

/* ---- layout.c: what is refused ---- */

/* Cut after every byte: no crash, TRUNCATED at the cut, and `limit` is no more than the block needs. */
static void cut_everywhere(int line, const struct spec *spec)
{
    size_t size = build(spec);
    size_t arrangement = strlen(context);
    struct kvmstats_header whole;
    struct kvmstats_fault fault;

    int whole_status = read_header(line, size, 0, &whole, &fault);
    CHECK_AT(line, whole_status == 0);
    if (whole_status)
        return;
    for (size_t length = 0; length <= size; ++length) {
        struct kvmstats_header header = whole;
        const struct kvmstats_desc *descs;
        int status = read_header(line, length, 0, &header, &fault);
        snprintf(context + arrangement, sizeof context - arrangement, ", cut at %zu", length);
        if (length < spec->at->header_size) {
            /* Before the layout is known, `limit` can only be the end of the shorter header. */
            int uncertain = fault.limit == MERGED_HEADER && length < MERGED_HEADER;
            CHECK_AT(line, status == KVMSTATS_E_TRUNCATED);
            CHECK_AT(line, fault.offset == length);
            CHECK_AT(line, fault.block == KVMSTATS_BLOCK_HEADER);
            CHECK_AT(line, fault.limit == spec->at->header_size || uncertain);
            continue;
        }
        CHECK_AT(line, status == 0);
        check_header(line, spec, &header);
        header = whole;
        status = read_descriptors(line, length, &header, &descs, &fault);
        if (length < prefix_of(spec)) {
            int in_id = fault.block == KVMSTATS_BLOCK_ID;
            CHECK_AT(line, status == KVMSTATS_E_TRUNCATED);
            CHECK_AT(line, fault.offset == length);
            CHECK_AT(line, in_id || fault.block == KVMSTATS_BLOCK_DESCRIPTORS);
            CHECK_AT(line, fault.limit == (in_id ? id_end_of(spec) : desc_end_of(spec)));
            CHECK_AT(line, fault.limit > length);
        } else {
            CHECK_AT(line, status == 0);
            CHECK_AT(line, header.data_size == data_size_of(spec));
            check_descriptors(line, spec, descs);
        }
    }
}

static void test_truncation(void)
{
    for (int i = 0; i < KINDS; ++i) {
        struct spec spec = kind(i);
        cut_everywhere(__LINE__, &spec);
        spec.num_desc = 0;
        cut_everywhere(__LINE__, &spec);
    }
    for (int order = 0; order < 6; ++order) {
        struct spec wide = arranged(order, 0, 48, 8);
        cut_everywhere(__LINE__, &wide);
        struct spec odd = arranged(order, 1, 5, 0);
        cut_everywhere(__LINE__, &odd);
    }
    for (int i = 0; i < 4; ++i) {
        struct spec spec = data_first(layouts[i / 2], i % 2);
        cut_everywhere(__LINE__, &spec);
    }

    struct kvmstats_header header;
    struct kvmstats_fault fault;
    int status = kvmstats_read_header(NULL, 0, 0, &header, &fault);
    CHECK(status == KVMSTATS_E_TRUNCATED && fault.offset == 0 && fault.limit == MERGED_HEADER);
}

/* The image matches no layout. Its byte order is unknown then, so the value is in this machine's. */
static void reject_layout(int line, size_t size, uint64_t offset)
{
    struct kvmstats_header header;
    struct kvmstats_fault fault;
    struct kvmstats_fault want = {.offset = offset, .value = get(image + offset, host_is_big(), 4)};
    for (int repair = 0; repair < 2; ++repair) {
        int status = read_header(line, size, repair, &header, &fault);
        check_fault(line, status, &fault, KVMSTATS_E_LAYOUT, &want);
    }
}

static void test_unknown_layouts(void)
{
    for (int big = 0; big < 2; ++big) {
        static const uint32_t sizes[] = {0, 16, 31, 33, 47, 49, 64, 0xffffffff, 0x20002000};
        for (size_t i = 0; i < LENGTH(sizes); ++i) {
            struct spec series = standard(KVMSTATS_LAYOUT_V5, big);
            series.name_size = sizes[i];
            size_t size = build_header(&series);
            reject_layout(__LINE__, size, 64);
            if (sizes[i] == 0)
                continue; /* flags 0: that is the merged layout */
            struct spec v9 = standard(KVMSTATS_LAYOUT_V9, big);
            v9.name_size = sizes[i];
            size = build_header(&v9);
            reject_layout(__LINE__, size, 0);
        }

        struct spec v9 = standard(KVMSTATS_LAYOUT_V9, big);
        v9.desc_offset = 88;
        reject_layout(__LINE__, build_header(&v9), 0);
        v9 = standard(KVMSTATS_LAYOUT_V9, big);
        size_t size = build_header(&v9);
        image[19] = '_';
        reject_layout(__LINE__, size, 0);

        struct spec v2 = standard(KVMSTATS_LAYOUT_V2, big);
        size = build_header(&v2);
        image[3] = '_';
        reject_layout(__LINE__, size, 0);

        struct spec merged = standard(KVMSTATS_LAYOUT_MERGED, big);
        merged.flags = 1;
        merged.id_offset = 32;
        reject_layout(__LINE__, build_header(&merged), 0);
    }
    memset(image, 0xff, 80);
    reject_layout(__LINE__, 80, 0);
}

static void test_future_flags(void)
{
    static const uint32_t flags[] = {1, 2, 32, 48, 0x100, 0x01020304, 0x80000000, 0xffffffff};
    for (int big = 0; big < 2; ++big)
        for (size_t i = 0; i < LENGTH(flags); ++i) {
            struct spec spec = standard(KVMSTATS_LAYOUT_MERGED, big);
            spec.flags = flags[i];
            REJECT_HEADER(spec, FLAGS, .offset = 0, .value = flags[i]);
        }
}

static void test_count_defect(void)
{
    for (int i = 0; i < 4; ++i) {
        struct spec healthy = kind(i);
        struct spec spec = healthy;
        struct kvmstats_header header;
        struct kvmstats_fault fault;
        const struct kvmstats_desc *descs;
        uint32_t stride = (uint32_t)stride_of(&spec);
        uint32_t table = STANDARD_COUNT * stride;

        spec.num_desc = table;
        REJECT_HEADER(spec, COUNT_DEFECT, .offset = 68, .value = table, .limit = STANDARD_COUNT);

        size_t size = build(&healthy);
        put(image + 68, spec.big, 4, table);
        int status = read_header(__LINE__, size, 1, &header, &fault);
        CHECK(status == 0);
        if (status == 0) {
            check_header(__LINE__, &healthy, &header);
            CHECK(header.count_defect == 1);
            CHECK(read_descriptors(__LINE__, size, &header, &descs, &fault) == 0);
            check_descriptors(__LINE__, &healthy, descs);
        }

        /* Any other count that is too large makes the table extend into the data. */
        for (int step = -1; step <= 1; step += 2) {
            spec.num_desc = table + (uint32_t)step;
            REJECT_HEADER(spec, OVERLAP, .offset = 76, .block = KVMSTATS_BLOCK_DATA, .value = spec.data_offset,
                          .other = KVMSTATS_BLOCK_DESCRIPTORS, .limit = desc_end_of(&spec));
        }
        spec.num_desc = table + 8;
        spec.data_offset += 8;
        REJECT_HEADER(spec, OVERLAP, .offset = 76, .block = KVMSTATS_BLOCK_DATA, .value = spec.data_offset,
                      .other = KVMSTATS_BLOCK_DESCRIPTORS, .limit = desc_end_of(&spec));

        /* The true count has the same limit. */
        uint32_t true_counts[] = {65536, 65537};
        for (size_t k = 0; k < LENGTH(true_counts); ++k) {
            spec.num_desc = true_counts[k] * stride;
            spec.data_offset = spec.desc_offset + spec.num_desc;
            REJECT_HEADER(spec, COUNT_DEFECT, .offset = 68, .value = spec.num_desc, .limit = true_counts[k]);
            status = read_header(__LINE__, build_header(&spec), 1, &header, &fault);
            if (true_counts[k] <= KVMSTATS_MAX_DESCRIPTORS) {
                CHECK(status == 0 && header.num_desc == true_counts[k] && header.count_defect == 1);
            } else {
                struct kvmstats_fault want = {.offset = 68, .value = true_counts[k], .limit = 65536};
                check_fault(__LINE__, status, &fault, KVMSTATS_E_NUM_DESC, &want);
            }
        }
    }
    /* There is no repair for the layouts whose kernels never had the defect. */
    for (int i = 4; i < KINDS; ++i) {
        struct spec spec = kind(i);
        struct kvmstats_header header;
        struct kvmstats_fault fault;
        spec.num_desc = spec.data_offset - spec.desc_offset;
        struct kvmstats_fault want = {.offset = spec.at->data_offset,
                                      .block = KVMSTATS_BLOCK_DATA,
                                      .value = spec.data_offset,
                                      .other = KVMSTATS_BLOCK_DESCRIPTORS,
                                      .limit = desc_end_of(&spec)};
        int status = read_header(__LINE__, build_header(&spec), 1, &header, &fault);
        check_fault(__LINE__, status, &fault, KVMSTATS_E_OVERLAP, &want);
    }
}

static void test_block_align(void)
{
    for (int i = 0; i < KINDS; ++i)
        for (uint32_t off = 1; off < 8; ++off) {
            struct spec spec = kind(i);
            if (spec.layout == KVMSTATS_LAYOUT_MERGED) {
                spec.id_offset += off;
                REJECT_HEADER(spec, BLOCK_ALIGN, .offset = 12, .block = KVMSTATS_BLOCK_ID, .value = spec.id_offset);
                spec = kind(i);
            }
            if (spec.layout != KVMSTATS_LAYOUT_V9) { /* whose layout is recognised by 80, among others */
                spec.desc_offset += off;
                REJECT_HEADER(spec, BLOCK_ALIGN, .offset = spec.at->desc_offset, .block = KVMSTATS_BLOCK_DESCRIPTORS,
                              .value = spec.desc_offset);
                spec = kind(i);
            }
            spec.data_offset += off;
            REJECT_HEADER(spec, BLOCK_ALIGN, .offset = spec.at->data_offset, .block = KVMSTATS_BLOCK_DATA,
                          .value = spec.data_offset);
        }
}

static void test_overlap_with_header(void)
{
    for (int i = 0; i < KINDS; ++i) {
        struct spec spec = kind(i);
        for (uint32_t begin = 0; begin < spec.at->header_size; begin += 8) {
            struct kvmstats_fault want = {
                .value = begin, .other = KVMSTATS_BLOCK_HEADER, .limit = spec.at->header_size};
            spec = kind(i);
            if (spec.layout == KVMSTATS_LAYOUT_MERGED) {
                spec.id_offset = begin;
                want.offset = 12;
                want.block = KVMSTATS_BLOCK_ID;
                reject_header(__LINE__, &spec, KVMSTATS_E_OVERLAP, want);
                spec = kind(i);
            }
            if (spec.layout != KVMSTATS_LAYOUT_V9) {
                spec.desc_offset = begin;
                want.offset = spec.at->desc_offset;
                want.block = KVMSTATS_BLOCK_DESCRIPTORS;
                reject_header(__LINE__, &spec, KVMSTATS_E_OVERLAP, want);
                spec = kind(i);
            }
            spec.data_offset = begin;
            want.offset = spec.at->data_offset;
            want.block = KVMSTATS_BLOCK_DATA;
            reject_header(__LINE__, &spec, KVMSTATS_E_OVERLAP, want);
        }
    }
}

static void test_overlap(void)
{
    for (int i = 0; i < KINDS; ++i) {
        struct spec spec = kind(i);
        uint32_t end = spec.data_offset;
        for (spec.data_offset = spec.desc_offset; spec.data_offset < end; spec.data_offset += 8)
            if (!is_positional(&spec) || spec.num_desc != spec.data_offset - spec.desc_offset)
                REJECT_HEADER(spec, OVERLAP, .offset = spec.at->data_offset, .block = KVMSTATS_BLOCK_DATA,
                              .value = spec.data_offset, .other = KVMSTATS_BLOCK_DESCRIPTORS, .limit = end);
    }
    for (int big = 0; big < 2; ++big) {
        struct spec spec = standard(KVMSTATS_LAYOUT_MERGED, big);
        uint32_t id_end = MERGED_HEADER + 48;
        for (spec.desc_offset = MERGED_HEADER; spec.desc_offset < id_end; spec.desc_offset += 8)
            REJECT_HEADER(spec, OVERLAP, .offset = 16, .block = KVMSTATS_BLOCK_DESCRIPTORS, .value = spec.desc_offset,
                          .other = KVMSTATS_BLOCK_ID, .limit = id_end);
        for (spec.data_offset = MERGED_HEADER; spec.data_offset < id_end; spec.data_offset += 8)
            REJECT_HEADER(spec, OVERLAP, .offset = 20, .block = KVMSTATS_BLOCK_DATA, .value = spec.data_offset,
                          .other = KVMSTATS_BLOCK_ID, .limit = id_end);
        /* The id inside the descriptors, and around their start. */
        spec = standard(KVMSTATS_LAYOUT_MERGED, big);
        for (spec.id_offset = 32; spec.id_offset < desc_end_of(&spec); spec.id_offset += 8)
            REJECT_HEADER(spec, OVERLAP, .offset = 16, .block = KVMSTATS_BLOCK_DESCRIPTORS, .value = spec.desc_offset,
                          .other = KVMSTATS_BLOCK_ID, .limit = id_end_of(&spec));
        spec.id_offset = spec.data_offset;
        REJECT_HEADER(spec, OVERLAP, .offset = 20, .block = KVMSTATS_BLOCK_DATA, .value = spec.data_offset,
                      .other = KVMSTATS_BLOCK_ID, .limit = id_end_of(&spec));
    }
}

/* Data before another block and too long for the gap is found once the descriptors are known. */
static void test_data_reaches_into_a_block(void)
{
    for (int i = 0; i < 4; ++i)
        for (uint32_t short_by = 8; short_by < 88; short_by += 8) {
            struct spec spec = data_first(layouts[i / 2], i % 2);
            spec.desc_offset -= short_by;
            REJECT_DESCRIPTORS(spec, OVERLAP, .offset = 76, .block = KVMSTATS_BLOCK_DATA, .value = spec.data_offset,
                               .other = KVMSTATS_BLOCK_DESCRIPTORS, .limit = desc_end_of(&spec));
        }
    for (int big = 0; big < 2; ++big)
        for (int order = 0; order < 6; ++order)
            for (uint32_t name_size = 5; name_size <= 48; name_size += 43) {
                struct spec spec = arranged(order, big, name_size, 0);
                int before_descs = spec.data_offset < spec.desc_offset;
                int before_id = spec.data_offset < spec.id_offset;
                if (!before_descs && !before_id)
                    continue;
                int into_id = before_id && (!before_descs || spec.id_offset < spec.desc_offset);
                spec.data_offset += 8;
                REJECT_DESCRIPTORS(spec, OVERLAP, .offset = 20, .block = KVMSTATS_BLOCK_DATA, .value = spec.data_offset,
                                   .other = into_id ? KVMSTATS_BLOCK_ID : KVMSTATS_BLOCK_DESCRIPTORS,
                                   .limit = into_id ? id_end_of(&spec) : desc_end_of(&spec));
            }
}

static void test_statistics(void)
{
    for (int i = 0; i < KINDS; ++i)
        for (uint32_t index = 0; index < STANDARD_COUNT; ++index) {
            struct statistic stats[STANDARD_COUNT];
            struct spec spec = kind(i);
            uint64_t position = spec.desc_offset + index * stride_of(&spec);
            spec.stats = stats;

            memcpy(stats, standard_stats, sizeof stats);
            stats[index].size = 0;
            REJECT_DESCRIPTORS(spec, STAT_SIZE, .offset = position + 6, .index = index);

            memcpy(stats, standard_stats, sizeof stats);
            stats[index].name = "";
            REJECT_DESCRIPTORS(spec, STAT_NAME, .offset = position + 16, .index = index);

            for (uint32_t off = 1; off < 8; ++off) {
                memcpy(stats, standard_stats, sizeof stats);
                stats[index].offset += off;
                if (is_positional(&spec))
                    ACCEPT(spec); /* the field is unused there */
                else
                    REJECT_DESCRIPTORS(spec, STAT_ALIGN, .offset = position + 8, .index = index,
                                       .value = stats[index].offset);
            }
        }
}

static void test_data_sizes(void)
{
    for (int i = 4; i < KINDS; ++i)
        for (uint32_t index = 0; index < STANDARD_COUNT; ++index) {
            static const struct {
                uint32_t offset, size;
            } bad[] = {{0x10000000, 1}, {0x0ffffff8, 2}, {0xfffffff8, 1}, {0xfffffff8, 0xffff}, {0x80000000, 1}};
            struct statistic stats[STANDARD_COUNT];
            struct spec spec = kind(i);
            spec.stats = stats;
            for (size_t k = 0; k < LENGTH(bad); ++k) {
                memcpy(stats, standard_stats, sizeof stats);
                stats[index].offset = bad[k].offset;
                stats[index].size = bad[k].size;
                REJECT_DESCRIPTORS(spec, DATA_SIZE, .offset = spec.desc_offset + index * stride_of(&spec) + 8,
                                   .index = index, .value = bad[k].offset + 8 * (uint64_t)bad[k].size,
                                   .limit = KVMSTATS_MAX_DATA_SIZE);
            }
            memcpy(stats, standard_stats, sizeof stats);
            stats[index].offset = KVMSTATS_MAX_DATA_SIZE - 8 * 0xffff;
            stats[index].size = 0xffff;
            ACCEPT(spec);
        }

    /* Positional: 512 histograms of 65535 and one of 512 fill the limit; one value more is too much. */
    static struct statistic stats[514];
    for (size_t k = 0; k < LENGTH(stats); ++k)
        stats[k] = (struct statistic){"x", 0, 0, 0xffff, 0, 0};
    for (int i = 0; i < 4; ++i) {
        struct spec spec = kind(i);
        spec.stats = stats;
        spec.num_desc = 513;
        spec.data_offset = (uint32_t)desc_end_of(&spec);
        stats[512].size = 512;
        ACCEPT(spec);
        stats[512].size = 513;
        REJECT_DESCRIPTORS(spec, DATA_SIZE, .offset = spec.desc_offset + 512 * stride_of(&spec) + 6, .index = 512,
                           .value = KVMSTATS_MAX_DATA_SIZE + 8, .limit = KVMSTATS_MAX_DATA_SIZE);
        stats[512].size = 512;
        stats[513].size = 1;
        spec.num_desc = 514;
        spec.data_offset = (uint32_t)desc_end_of(&spec);
        REJECT_DESCRIPTORS(spec, DATA_SIZE, .offset = spec.desc_offset + 513 * stride_of(&spec) + 6, .index = 513,
                           .value = KVMSTATS_MAX_DATA_SIZE + 8, .limit = KVMSTATS_MAX_DATA_SIZE);
    }
}

/* The header is good, but its blocks end far beyond the few bytes of the file. */
static void check_far(int line, const struct spec *spec, enum kvmstats_block block, uint64_t limit)
{
    struct kvmstats_header header;
    struct kvmstats_fault fault;
    const struct kvmstats_desc *descs;
    struct kvmstats_fault want = {.offset = spec->at->header_size, .block = block, .limit = limit};
    accept_header(line, spec, &header);
    int status = read_descriptors(line, spec->at->header_size, &header, &descs, &fault);
    check_fault(line, status, &fault, KVMSTATS_E_TRUNCATED, &want);
}

/* Offsets whose sums would wrap in 32 bits. */
static void test_wrap(void)
{
    const uint32_t far = 0xfffffff8;
    for (int i = 0; i < KINDS; ++i) {
        struct spec spec = kind(i);
        spec.data_offset = far;
        ACCEPT(spec);
        spec.num_desc = 0;
        ACCEPT(spec);

        if (spec.layout == KVMSTATS_LAYOUT_V9)
            continue;
        static const uint32_t counts[] = {0, 1, 5, 65536};
        for (size_t k = 0; k < LENGTH(counts); ++k) {
            spec = kind(i);
            spec.num_desc = counts[k];
            spec.desc_offset = far;
            int id_first = spec.layout == KVMSTATS_LAYOUT_MERGED;
            check_far(__LINE__, &spec, id_first ? KVMSTATS_BLOCK_ID : KVMSTATS_BLOCK_DESCRIPTORS,
                      id_first ? id_end_of(&spec) : far + counts[k] * stride_of(&spec));
        }
        spec = kind(i);
        spec.num_desc = 65536;
        spec.desc_offset = 0xffff0000;
        spec.data_offset = far;
        REJECT_HEADER(spec, OVERLAP, .offset = spec.at->data_offset, .block = KVMSTATS_BLOCK_DATA, .value = far,
                      .other = KVMSTATS_BLOCK_DESCRIPTORS, .limit = 0xffff0000 + 65536 * stride_of(&spec));
    }
    for (int big = 0; big < 2; ++big) {
        struct spec spec = standard(KVMSTATS_LAYOUT_MERGED, big);
        spec.id_offset = far;
        check_far(__LINE__, &spec, KVMSTATS_BLOCK_ID, (uint64_t)far + 48);
        spec.desc_offset = far;
        REJECT_HEADER(spec, OVERLAP, .offset = 16, .block = KVMSTATS_BLOCK_DESCRIPTORS, .value = far,
                      .other = KVMSTATS_BLOCK_ID, .limit = (uint64_t)far + 48);
        spec = standard(KVMSTATS_LAYOUT_MERGED, big);
        spec.id_offset = far - 16;
        spec.data_offset = far;
        REJECT_HEADER(spec, OVERLAP, .offset = 20, .block = KVMSTATS_BLOCK_DATA, .value = far,
                      .other = KVMSTATS_BLOCK_ID, .limit = (uint64_t)far + 32);
        /* The largest possible table, after everything else. */
        spec = standard(KVMSTATS_LAYOUT_MERGED, big);
        spec.name_size = 4096;
        spec.num_desc = 65536;
        spec.data_offset = 8192;
        spec.desc_offset = far;
        struct kvmstats_header header;
        ACCEPT_HEADER(spec, &header);
        /* Descriptors that all lie in the file, and the id 4 GiB away. */
        spec = standard(KVMSTATS_LAYOUT_MERGED, big);
        size_t size = build(&spec);
        put(image + 12, big, 4, far);
        struct kvmstats_fault fault;
        const struct kvmstats_desc *descs;
        struct kvmstats_fault want = {.offset = size, .block = KVMSTATS_BLOCK_ID, .limit = (uint64_t)far + 48};
        CHECK(read_header(__LINE__, size, 0, &header, &fault) == 0);
        int status = read_descriptors(__LINE__, size, &header, &descs, &fault);
        check_fault(__LINE__, status, &fault, KVMSTATS_E_TRUNCATED, &want);
    }
}

/* ---- layout.c: values ---- */

static uint8_t pattern(size_t i)
{
    return (uint8_t)(0x81 + 37 * i);
}

static void fill(uint8_t *at, size_t size)
{
    for (size_t i = 0; i < size; ++i)
        at[i] = pattern(i);
}

static uint64_t pattern_value(size_t index, unsigned width, int swapped)
{
    uint8_t bytes[8];
    for (unsigned i = 0; i < width; ++i)
        bytes[i] = pattern(index * width + i);
    return get(bytes, host_is_big() != !!swapped, width);
}

static void check_values(int line, const uint64_t *values, size_t n, unsigned width, uint32_t swapped)
{
    for (size_t i = 0; i < n; ++i)
        CHECK_AT(line, values[i] == pattern_value(i, width, (int)swapped));
}

static void test_copy_values(void)
{
    for (unsigned width = 4; width <= 8; width += 4)
        for (uint32_t swapped = 0; swapped < 2; ++swapped)
            for (size_t n = 0; n < 20; ++n) {
                uint64_t *to = (uint64_t *)(void *)output.end - n;
                snprintf(context, sizeof context, "width %u, swapped %u, n %zu", width, swapped, n);

                uint8_t *from = input.end - n * width;
                fill(from, n * width);
                memset(to, 0xa5, n * 8);
                kvmstats_copy_values(from, width, swapped, n, to);
                check_values(__LINE__, to, n, width, swapped);
                for (size_t i = 0; i < n * width; ++i)
                    CHECK(from[i] == pattern(i));

                for (size_t shift = 0; shift < 8; ++shift) {
                    fill(input.begin + shift, n * width);
                    memset(to, 0xa5, n * 8);
                    kvmstats_copy_values(input.begin + shift, width, swapped, n, to);
                    check_values(__LINE__, to, n, width, swapped);
                }

                memset(to, 0xa5, n * 8);
                fill((uint8_t *)to, n * width);
                to[-1] = 0x123456789abcdef0;
                kvmstats_copy_values(to, width, swapped, n, to);
                check_values(__LINE__, to, n, width, swapped);
                CHECK(to[-1] == 0x123456789abcdef0);

                /* Nothing is written after the last value. */
                to = (uint64_t *)(void *)output.begin;
                to[n] = 0x0fedcba987654321;
                kvmstats_copy_values(from, width, swapped, n, to);
                check_values(__LINE__, to, n, width, swapped);
                CHECK(to[n] == 0x0fedcba987654321);
            }
    kvmstats_copy_values(NULL, 8, 0, 0, NULL);
    kvmstats_copy_values(NULL, 8, 1, 0, NULL);
    kvmstats_copy_values(NULL, 4, 0, 0, NULL);
}

/* ---- sweep.c: kvmstats_read, on a pread that follows a script ---- */

struct step {
    size_t most; /* bytes returned, or ... */
    int error;   /* ... errno */
};

static struct {
    const struct step *steps; /* after the last: whatever is asked for */
    const char *text;         /* the file's bytes from begin on, if not NULL */
    size_t left;
    uint64_t begin, end; /* without a text, the file's bytes are pattern(0), pattern(1) ... from begin on */
    int fd;
    unsigned calls;
    uint64_t first_offset;
    size_t first_count;
} script;

static ssize_t scripted_pread(int fd, void *buffer, size_t count, int64_t offset)
{
    uint64_t at = (uint64_t)offset;
    size_t n = count;

    if (script.calls++ == 0) {
        script.first_offset = at;
        script.first_count = count;
    }
    if (script.calls > 1000) {
        printf("%s:%d: pread is called without end [%s]\n", __FILE__, __LINE__, context);
        exit(1);
    }
    CHECK(fd == script.fd);
    if (fd < 0) {
        errno = EBADF;
        return -1;
    }
    if (script.left) {
        struct step step = *script.steps++;
        --script.left;
        if (step.error) {
            errno = step.error;
            return -1;
        }
        n = n < step.most ? n : step.most;
    }
    CHECK(at >= script.begin);
    /* Each call asks for all that is missing, and for no byte after the values. */
    CHECK(at + count == script.first_offset + script.first_count);
    if (at >= script.end || at < script.begin)
        return 0;
    if (n > script.end - at)
        n = (size_t)(script.end - at);
    for (size_t i = 0; i < n; ++i)
        ((uint8_t *)buffer)[i] =
            script.text ? (uint8_t)script.text[at - script.begin + i] : pattern((size_t)(at - script.begin) + i);
    return (ssize_t)n;
}

enum { POSITION = 1472, FD = 7 };

/* A source whose values end at the page that cannot be accessed; the file has `bytes` bytes of data. */
static struct kvmstats_source new_source(uint32_t width, uint32_t swapped, uint64_t n, uint64_t bytes)
{
    struct kvmstats_source source = {.fd = FD,
                                     .value_size = width,
                                     .swapped = swapped,
                                     .position = POSITION,
                                     .count = n,
                                     .values = (uint64_t *)(void *)output.end - n,
                                     .got = 0x5a5a};
    memset(source.values, 0xa5, (size_t)n * 8);
    memset(&script, 0, sizeof script);
    script.fd = FD;
    script.begin = POSITION;
    script.end = POSITION + bytes;
    snprintf(context, sizeof context, "width %u, swapped %u, count %" PRIu64 ", file %" PRIu64, width, swapped, n,
             bytes);
    return source;
}

static void play(const struct step *steps, size_t count)
{
    script.steps = steps;
    script.left = count;
}

static void test_read(void)
{
    static const struct step interrupted[] = {{0, EINTR}, {0, EINTR}, {0, EINTR}};
    static const struct step odd[] = {{1, 0}, {3, 0}, {0, EINTR}, {7, 0}, {13, 0}, {0, EINTR}, {2, 0}, {1, 0}};
    static const struct step zero[] = {{5, 0}, {0, 0}};
    static const struct step interrupted_end[] = {{13, 0}, {0, EINTR}, {0, EINTR}, {0, 0}};

    for (uint32_t width = 4; width <= 8; width += 4)
        for (uint32_t swapped = 0; swapped < 2; ++swapped) {
            for (size_t n = 0; n < 20; ++n) {
                struct kvmstats_source source = new_source(width, swapped, n, n * width);
                CHECK(kvmstats_read(&source) == 0);
                CHECK(script.calls <= 1 && (n == 0 || script.calls == 1));
                CHECK(n == 0 || (script.first_offset == POSITION && script.first_count == n * width));
                check_values(__LINE__, source.values, n, width, swapped);

                source = new_source(width, swapped, n, n * width + 100);
                play(interrupted, LENGTH(interrupted));
                CHECK(kvmstats_read(&source) == 0);
                CHECK(n == 0 || script.calls == 4);
                check_values(__LINE__, source.values, n, width, swapped);

                source = new_source(width, swapped, n, n * width + 100);
                play(odd, LENGTH(odd));
                CHECK(kvmstats_read(&source) == 0);
                check_values(__LINE__, source.values, n, width, swapped);

                /* The file ends at every byte before the last one. */
                for (size_t bytes = 0; bytes < n * width; ++bytes) {
                    source = new_source(width, swapped, n, bytes);
                    CHECK(kvmstats_read(&source) == -ENODATA);
                    CHECK(source.got == bytes);
                }
            }

            struct kvmstats_source source = new_source(width, swapped, 9, 9 * width);
            play(zero, LENGTH(zero));
            CHECK(kvmstats_read(&source) == -ENODATA);
            CHECK(source.got == 5);

            source = new_source(width, swapped, 9, 9 * width);
            play(interrupted_end, LENGTH(interrupted_end));
            CHECK(kvmstats_read(&source) == -ENODATA);
            CHECK(source.got == 13);
        }
}

static void test_read_errors(void)
{
    static const int errors[] = {EIO, EFAULT, EINVAL, ESPIPE, EAGAIN, EISDIR};
    for (size_t i = 0; i < LENGTH(errors); ++i) {
        const struct step at_once[] = {{0, errors[i]}};
        const struct step later[] = {{0, EINTR}, {11, 0}, {0, EINTR}, {0, errors[i]}};
        struct kvmstats_source source = new_source(8, 0, 4, 32);
        play(at_once, LENGTH(at_once));
        CHECK(kvmstats_read(&source) == -errors[i]);
        CHECK(script.calls == 1);
        source = new_source(8, 0, 4, 32);
        play(later, LENGTH(later));
        CHECK(kvmstats_read(&source) == -errors[i]);
        CHECK(script.calls == 4);
    }

    struct kvmstats_source source = new_source(8, 0, 4, 32);
    source.fd = script.fd = -1;
    CHECK(kvmstats_read(&source) == -EBADF);

    /* More than there are addresses: refused before any byte is read. */
    static const uint64_t counts[] = {(uint64_t)(SIZE_MAX / 8) + 1, UINT64_MAX / 8 + 1, UINT64_MAX};
    for (size_t i = 0; i < LENGTH(counts); ++i)
        for (uint32_t width = 4; width <= 8; width += 4) {
            source = new_source(width, 0, 4, 32);
            source.count = counts[i];
            CHECK(kvmstats_read(&source) == -EOVERFLOW);
            CHECK(script.calls == 0);
        }

    /* Values beyond 4 GiB in the file. */
    if (sizeof(off_t) == 8) {
        source = new_source(8, 0, 4, 32);
        source.position = script.begin = 0xfffffff8;
        script.end = script.begin + 32;
        const struct step pieces[] = {{5, 0}, {9, 0}};
        play(pieces, LENGTH(pieces));
        CHECK(kvmstats_read(&source) == 0);
        CHECK(script.first_offset == 0xfffffff8);
        check_values(__LINE__, source.values, 4, 8, 0);
    }
}

/* ---- schedstat.c */

static int parse_schedstat(int line, const char *text, size_t size, uint64_t *values)
{
    uint64_t *to = (uint64_t *)(void *)output.end - KVMSTATS_SCHEDSTAT_VALUES;
    char *from = (char *)input.end - size;
    int status;

    memset(to, 0x5a, 8 * KVMSTATS_SCHEDSTAT_VALUES);
    memcpy(from, text, size);
    status = kvmstats_parse_schedstat(from, size, to);
    memcpy(input.begin, text, size);
    CHECK_AT(line, kvmstats_parse_schedstat((char *)input.begin, size, to) == status);
    for (size_t i = 0; i < KVMSTATS_SCHEDSTAT_VALUES; ++i) {
        CHECK_AT(line, status == 0 || to[i] == 0x5a5a5a5a5a5a5a5a);
        values[i] = to[i];
    }
    return status;
}

static const struct {
    const char *text;
    int status;
    uint64_t values[KVMSTATS_SCHEDSTAT_VALUES];
} schedstats[] = {
    {"0 0 0\n", 0, {0, 0, 0}},
    {"1 23 456\n", 0, {1, 23, 456}},
    {"18446744073709551615 18446744073709551615 18446744073709551615\n", 0, {UINT64_MAX, UINT64_MAX, UINT64_MAX}},
    {"18446744073709551616 0 0\n", -EOVERFLOW, {0}},
    {"0 18446744073709551616 0\n", -EOVERFLOW, {0}},
    {"0 0 99999999999999999999\n", -EOVERFLOW, {0}},
    {"00000000000000000000000 0 0\n", -EBADMSG, {0}},
    {"\n", -EBADMSG, {0}},
    {" \n", -EBADMSG, {0}},
    {"1\n", -EBADMSG, {0}},
    {"1 2\n", -EBADMSG, {0}},
    {"1 2 \n", -EBADMSG, {0}},
    {"1  3\n", -EBADMSG, {0}},
    {" 1 2 3\n", -EBADMSG, {0}},
    {"1  2 3\n", -EBADMSG, {0}},
    {"1 2 3 \n", -EBADMSG, {0}},
    {"1 2 3 4\n", -EBADMSG, {0}},
    {"1 2 3\n\n", -EBADMSG, {0}},
    {"1 2 3\n4\n", -EBADMSG, {0}},
    {"1 2\n3\n", -EBADMSG, {0}},
    {"-1 2 3\n", -EBADMSG, {0}},
    {"+1 2 3\n", -EBADMSG, {0}},
    {"1.0 2 3\n", -EBADMSG, {0}},
    {"0x1 2 3\n", -EBADMSG, {0}},
    {"1\t2\t3\n", -EBADMSG, {0}},
    {"1 2 3\r\n", -EBADMSG, {0}},
    {"1:2:3\n", -EBADMSG, {0}},
    {"1 2 \xb3\n", -EBADMSG, {0}},
    {"a b c\n", -EBADMSG, {0}},
};

static void test_parse_schedstat(void)
{
    uint64_t values[KVMSTATS_SCHEDSTAT_VALUES];

    for (size_t i = 0; i < LENGTH(schedstats); ++i) {
        const char *text = schedstats[i].text;
        size_t size = strlen(text);
        snprintf(context, sizeof context, "schedstat %zu", i);
        CHECK(parse_schedstat(__LINE__, text, size, values) == schedstats[i].status);
        if (schedstats[i].status == 0)
            CHECK(memcmp(values, schedstats[i].values, sizeof values) == 0);
        for (size_t cut = 0; cut < size; ++cut) { /* no part of it is one */
            int status = parse_schedstat(__LINE__, text, cut, values);
            CHECK(status == -EBADMSG || (status == -EOVERFLOW && schedstats[i].status == -EOVERFLOW) ||
                  schedstats[i].status == -EBADMSG);
        }
        for (size_t at = 0; at < size; ++at) { /* a NUL is no end */
            char nul[80];
            memcpy(nul, text, size);
            nul[at] = '\0';
            CHECK(parse_schedstat(__LINE__, nul, size, values) < 0);
        }
    }
}

static struct kvmstats_source new_schedstat(const char *text)
{
    struct kvmstats_source source = new_source(KVMSTATS_SCHEDSTAT, 0, KVMSTATS_SCHEDSTAT_VALUES, strlen(text));
    source.position = script.begin = 0;
    script.end = strlen(text);
    script.text = text;
    return source;
}

static void test_read_schedstat(void)
{
    static const struct step odd[] = {{0, EINTR}, {1, 0}, {0, EINTR}, {0, EINTR}, {2, 0}, {1, 0}};
    static const struct step gone[] = {{0, ESRCH}};
    static const struct step later[] = {{0, EINTR}, {3, 0}, {0, EINTR}, {0, EIO}};

    for (size_t i = 0; i < LENGTH(schedstats); ++i) {
        struct kvmstats_source source = new_schedstat(schedstats[i].text);
        CHECK(kvmstats_read(&source) == schedstats[i].status);
        CHECK(script.calls == 1);
        if (schedstats[i].status == 0)
            CHECK(memcmp(source.values, schedstats[i].values, sizeof schedstats[i].values) == 0);
    }
    struct kvmstats_source source = new_schedstat("12 345 6789\n");
    play(odd, LENGTH(odd));
    CHECK(kvmstats_read(&source) == 0);
    CHECK(script.calls == 7);
    CHECK(source.values[0] == 12 && source.values[1] == 345 && source.values[2] == 6789);

    /* It ends without a newline, at once or later; a part of it is not taken for it. */
    static const char *cut[] = {"", "1", "1 2 3", "1 2 34"};
    for (size_t i = 0; i < LENGTH(cut); ++i) {
        source = new_schedstat(cut[i]);
        CHECK(kvmstats_read(&source) == -ENODATA);
        CHECK(source.got == strlen(cut[i]));
    }
    /* More than fits, with and without a newline behind it. */
    static char endless[5000];
    memset(endless, '1', sizeof endless - 1);
    source = new_schedstat(endless);
    CHECK(kvmstats_read(&source) == -EBADMSG);
    CHECK(script.calls == 1);
    endless[sizeof endless - 2] = '\n';
    source = new_schedstat(endless);
    CHECK(kvmstats_read(&source) == -EBADMSG);

    source = new_schedstat("1 2 3\n");
    play(gone, LENGTH(gone));
    CHECK(kvmstats_read(&source) == -ESRCH);
    source = new_schedstat("1 2 3\n");
    play(later, LENGTH(later));
    CHECK(kvmstats_read(&source) == -EIO);

    /* A text has as many values as it has. */
    static const uint64_t counts[] = {0, 1, 2, 4, UINT64_MAX};
    for (size_t i = 0; i < LENGTH(counts); ++i) {
        source = new_schedstat("1 2 3\n");
        source.count = counts[i];
        CHECK(kvmstats_read(&source) == -EINVAL);
        CHECK(script.calls == 0);
    }
}

/* With our own fds; the calls may be missing in the kernel, or filtered. */
static void test_process(void)
{
    int fd = open("/dev/null", O_RDONLY), copy = dup(fd), other = open("/dev/null", O_RDONLY);
    int same = kvmstats_same_file(getpid(), fd, getpid(), copy);

    if (same != -ENOSYS && same != -EPERM) {
        CHECK(same == 1);
        CHECK(kvmstats_same_file(getpid(), fd, getpid(), other) == 0);
        CHECK(kvmstats_same_file(getpid(), fd, getpid(), -1) == -EBADF);
    }
    int got = kvmstats_getfd(-1, fd);
    CHECK(got == -EBADF || got == -ENOSYS || got == -EPERM);
    close(fd);
    close(copy);
    close(other);
}

int main(void)
{
    start_intercepting();
    input = new_arena(IMAGE_ROOM);
    output = new_arena(KVMSTATS_MAX_DESCRIPTORS * sizeof(struct kvmstats_desc));

    test_layouts();
    test_arrangements();
    test_name_sizes();
    test_counts();
    test_no_descriptors();
    test_truncation();
    test_unknown_layouts();
    test_future_flags();
    test_count_defect();
    test_block_align();
    test_overlap_with_header();
    test_overlap();
    test_data_reaches_into_a_block();
    test_statistics();
    test_data_sizes();
    test_wrap();
    test_copy_values();
    test_read();
    test_read_errors();
    test_parse_schedstat();
    test_read_schedstat();
    test_process();

    if (failures) {
        printf("test_core: %lu checks, %lu failed\n", checks, failures);
        return 1;
    }
    printf("test_core: %lu checks\n", checks);
    return 0;
}
