/* SPDX-License-Identifier: MIT */
/*
 * fuzz_core.c - any bytes at all against the contract in csrc/kvmstats.h; a broken promise aborts. Link with layout.c.
 *
 * tests/fuzz.py runs it with libFuzzer. Without: gcc -g -O1 -fsanitize=address,undefined -DSTANDALONE -Icsrc ...; then
 * fuzz_core N SEED FILE...
 */
#include "fuzz.h"
#include "kvmstats.h"

static unsigned long accepted;

static uint64_t larger(uint64_t a, uint64_t b)
{
    return a > b ? a : b;
}

static int apart(uint64_t a, uint64_t a_end, uint64_t b, uint64_t b_end)
{
    return a >= b_end || b >= a_end;
}

static uint64_t id_end_of(const struct kvmstats_header *header)
{
    return (uint64_t)header->id_offset + header->id_size;
}

static void check_header(const struct kvmstats_header *header, size_t size, int repair)
{
    int merged = header->layout == KVMSTATS_LAYOUT_MERGED;
    int positional = header->layout == KVMSTATS_LAYOUT_V2 || header->layout == KVMSTATS_LAYOUT_V5;
    uint32_t header_size = merged ? 24 : 80;
    uint64_t desc_end = header->desc_offset + header->num_desc * (16 + (uint64_t)header->name_size);

    PROMISE(merged || positional || header->layout == KVMSTATS_LAYOUT_V9);
    PROMISE(size >= header_size);
    PROMISE(header->swapped <= 1);
    PROMISE(header->flags == 0);
    PROMISE(header->name_size >= 1 && header->name_size <= KVMSTATS_MAX_NAME_SIZE);
    PROMISE(merged || header->name_size == 48 || (header->name_size == 32 && header->layout != KVMSTATS_LAYOUT_V5));
    PROMISE(header->num_desc <= KVMSTATS_MAX_DESCRIPTORS);
    PROMISE(header->positional == (uint32_t)positional);
    PROMISE(header->count_defect <= (uint32_t)(positional && repair));
    PROMISE(header->key_offset + header->key_size <= header_size);
    PROMISE(header->id_size == (merged ? header->name_size : 64));
    PROMISE(header->id_offset % 8 == 0 && header->desc_offset % 8 == 0 && header->data_offset % 8 == 0);
    PROMISE(header->desc_offset >= header_size && header->data_offset >= header_size);
    PROMISE(!merged || header->id_offset >= header_size);
    PROMISE(merged || id_end_of(header) <= header_size);
    PROMISE(header->desc_end == desc_end);
    PROMISE(header->prefix_size == larger(desc_end, id_end_of(header)));
    PROMISE(apart(header->desc_offset, desc_end, header->id_offset, id_end_of(header)));
}

/* read_header reads only the header's own bytes: from a copy of just those it returns the same. */
static void check_header_alone(const uint8_t *data, size_t size, int repair, int status,
                               const struct kvmstats_header *header, const struct kvmstats_fault *fault)
{
    struct kvmstats_header header_alone;
    struct kvmstats_fault fault_alone;
    size_t length = size < 80 ? size : 80;
    uint8_t *copy = allocate(length);
    memcpy(copy, data, length);
    PROMISE(kvmstats_read_header(copy, length, repair, &header_alone, &fault_alone) == status);
    if (status == 0)
        PROMISE(memcmp(header, &header_alone, sizeof header_alone) == 0);
    else
        PROMISE(memcmp(fault, &fault_alone, sizeof fault_alone) == 0);
    free(copy);
}

static void check_header_fault(int status, const struct kvmstats_fault *fault, size_t size)
{
    PROMISE(fault->block >= KVMSTATS_BLOCK_HEADER && fault->block <= KVMSTATS_BLOCK_DATA);
    PROMISE(fault->other >= KVMSTATS_BLOCK_HEADER && fault->other <= KVMSTATS_BLOCK_DATA);
    if (status == KVMSTATS_E_TRUNCATED) {
        PROMISE(fault->block == KVMSTATS_BLOCK_HEADER);
        PROMISE(fault->offset == size && size < fault->limit && (fault->limit == 24 || fault->limit == 80));
        return;
    }
    PROMISE(fault->offset % 4 == 0 && fault->offset + 4 <= 80 && fault->offset + 4 <= size);
    switch (status) {
    case KVMSTATS_E_LAYOUT:
    case KVMSTATS_E_FLAGS:
        PROMISE(fault->offset == 0 || (fault->offset == 64 && status == KVMSTATS_E_LAYOUT));
        PROMISE(fault->value != 0 || fault->offset == 64);
        break;
    case KVMSTATS_E_NAME_SIZE:
    case KVMSTATS_E_NUM_DESC:
        PROMISE(fault->value > fault->limit || (fault->value == 0 && status == KVMSTATS_E_NAME_SIZE));
        break;
    case KVMSTATS_E_COUNT_DEFECT:
        PROMISE(fault->value > fault->limit && fault->limit > 0 && fault->value % fault->limit == 0);
        break;
    case KVMSTATS_E_BLOCK_ALIGN:
        PROMISE(fault->value % 8 != 0);
        break;
    case KVMSTATS_E_OVERLAP:
        PROMISE(fault->block != fault->other && fault->value < fault->limit);
        break;
    default:
        PROMISE(!"a code of read_header");
    }
}

static void check_descriptors(const uint8_t *data, size_t size, const struct kvmstats_header *header,
                              const struct kvmstats_desc *descs)
{
    uint64_t data_size = 0;
    for (uint32_t i = 0; i < header->num_desc; ++i) {
        const struct kvmstats_desc *desc = &descs[i];
        uint64_t end = desc->offset + 8 * (uint64_t)desc->size;
        PROMISE(desc->name_offset == header->desc_offset + i * (16 + (uint64_t)header->name_size) + 16);
        PROMISE(desc->name_length >= 1 && desc->name_length <= header->name_size);
        PROMISE(desc->name_offset + header->name_size <= size);
        PROMISE(!memchr(data + desc->name_offset, 0, desc->name_length));
        PROMISE(desc->name_length == header->name_size || data[desc->name_offset + desc->name_length] == 0);
        PROMISE(desc->size >= 1 && desc->size <= UINT16_MAX);
        PROMISE(desc->exponent >= INT16_MIN && desc->exponent <= INT16_MAX);
        PROMISE(desc->offset % 8 == 0);
        PROMISE(!header->positional || (desc->offset == data_size && desc->bucket_size == 0));
        PROMISE(end <= header->data_size);
        data_size = larger(data_size, end);
    }
    PROMISE(header->data_size == data_size && data_size <= KVMSTATS_MAX_DATA_SIZE);
    uint64_t data_end = header->data_offset + data_size;
    PROMISE(apart(header->data_offset, data_end, header->desc_offset, header->desc_end));
    PROMISE(apart(header->data_offset, data_end, header->id_offset, id_end_of(header)));
}

static void check_descriptor_fault(int status, const struct kvmstats_fault *fault, const struct kvmstats_header *header,
                                   size_t size)
{
    PROMISE(fault->offset < size);
    PROMISE(fault->block >= KVMSTATS_BLOCK_HEADER && fault->block <= KVMSTATS_BLOCK_DATA);
    if (status == KVMSTATS_E_OVERLAP) {
        PROMISE(fault->block == KVMSTATS_BLOCK_DATA);
        PROMISE(fault->other == KVMSTATS_BLOCK_ID || fault->other == KVMSTATS_BLOCK_DESCRIPTORS);
        PROMISE(fault->offset + 4 == header->key_offset + header->key_size);
        PROMISE(fault->value == header->data_offset && fault->value < fault->limit);
        return;
    }
    uint64_t position = header->desc_offset + fault->index * (16 + (uint64_t)header->name_size);
    PROMISE(fault->index < header->num_desc);
    switch (status) {
    case KVMSTATS_E_STAT_SIZE:
        PROMISE(fault->offset == position + 6);
        break;
    case KVMSTATS_E_STAT_ALIGN:
        PROMISE(fault->offset == position + 8 && fault->value % 8 != 0 && !header->positional);
        break;
    case KVMSTATS_E_STAT_NAME:
        PROMISE(fault->offset == position + 16);
        break;
    case KVMSTATS_E_DATA_SIZE:
        PROMISE(fault->offset == position + (header->positional ? 6 : 8));
        PROMISE(fault->value > fault->limit && fault->limit == KVMSTATS_MAX_DATA_SIZE);
        break;
    default:
        PROMISE(!"a code of read_descriptors");
    }
}

/* The data that is there, converted in all four ways, and widened in place; one value of 8 bytes is two of 4. */
static void check_values(const uint8_t *from, size_t available, uint32_t width, uint32_t swapped)
{
    const uint16_t one = 1;
    int big = (*(const uint8_t *)&one == 0) != (swapped != 0);
    size_t n = available / width;
    uint64_t *values = allocate(n * 8);
    uint64_t *in_place = allocate(n * 8);

    kvmstats_copy_values(from, width, swapped, n, values);
    if (n)
        memcpy(in_place, from, n * width);
    kvmstats_copy_values(in_place, width, swapped, n, in_place);
    for (size_t i = 0; i < n; ++i) {
        uint64_t value = 0;
        for (uint32_t k = 0; k < width; ++k)
            value = value << 8 | from[i * width + (big ? k : width - 1 - k)];
        PROMISE(values[i] == value && in_place[i] == value);
    }
    free(in_place);
    free(values);
}

/* 1: header and descriptors are good. */
static int check_file(const uint8_t *data, size_t size, int repair, int *status)
{
    struct kvmstats_header header;
    struct kvmstats_fault fault;

    memset(&header, 0xa5, sizeof header);
    memset(&fault, 0xa5, sizeof fault);
    *status = kvmstats_read_header(data, size, repair, &header, &fault);
    check_header_alone(data, size, repair, *status, &header, &fault);
    if (*status) {
        PROMISE(!repair || *status != KVMSTATS_E_COUNT_DEFECT);
        check_header_fault(*status, &fault, size);
        return 0;
    }
    check_header(&header, size, repair);

    /* Room for the descriptors only if they lie in the input; otherwise none of them may be written. */
    struct kvmstats_desc *descs = NULL;
    if (header.desc_end <= size)
        descs = allocate(header.num_desc * sizeof *descs);
    memset(&fault, 0xa5, sizeof fault);
    int good = kvmstats_read_descriptors(data, size, &header, descs, &fault);
    if (header.prefix_size > size) {
        PROMISE(good == KVMSTATS_E_TRUNCATED);
        PROMISE(fault.offset == size && fault.limit > size && fault.limit <= header.prefix_size);
        PROMISE(fault.block == KVMSTATS_BLOCK_ID || fault.block == KVMSTATS_BLOCK_DESCRIPTORS);
    } else if (good) {
        check_descriptor_fault(good, &fault, &header, size);
    } else {
        check_descriptors(data, size, &header, descs);
        if (header.data_offset <= size) {
            uint64_t available = size - header.data_offset;
            if (available > header.data_size)
                available = header.data_size;
            for (uint32_t width = 4; width <= 8; width += 4)
                for (uint32_t swapped = 0; swapped < 2; ++swapped)
                    check_values(data + header.data_offset, (size_t)available, width, swapped);
        }
    }
    free(descs);
    return good == 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    int plain_status, repaired_status;
    int plain = check_file(data, size, 0, &plain_status);
    int repaired = check_file(data, size, 1, &repaired_status);

    /* `repair` is for one error, and changes nothing else. */
    if (plain_status != KVMSTATS_E_COUNT_DEFECT)
        PROMISE(plain_status == repaired_status && plain == repaired);
    accepted += repaired != 0;
    return 0;
}

#ifdef STANDALONE

struct bytes {
    uint8_t *data;
    size_t size;
};

static uint64_t state;

/* splitmix64 */
static uint64_t next(void)
{
    uint64_t z = state += 0x9e3779b97f4a7c15;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return z ^ z >> 31;
}

static size_t below(size_t n)
{
    return n ? (size_t)(next() % n) : 0;
}

static struct bytes load(const char *path)
{
    struct bytes file = {allocate(1 << 20), 0};
    FILE *stream = fopen(path, "rb");
    if (!stream) {
        perror(path);
        exit(2);
    }
    file.size = fread(file.data, 1, 1 << 20, stream);
    fclose(stream);
    return file;
}

/* Where the numbers of the format are: in the header, in a descriptor's first 16 bytes, or anywhere. */
static size_t somewhere(size_t size)
{
    size_t at;
    switch (below(4)) {
    case 0:
        at = below(24);
        break;
    case 1:
        at = below(88);
        break;
    case 2:
        at = (below(2) ? 72 : 80) + below(32) * (below(4) ? 64 : 48) + below(17);
        break;
    default:
        at = below(size);
    }
    return at < size ? at : below(size);
}

static uint32_t interesting(size_t size)
{
    static const uint32_t values[] = {
        0,     1,        2,          7,          8,          16,         24,         29,         32,         48,
        64,    72,       80,         88,         1392,       1472,       4096,       4097,       65535,      65536,
        65537, 1u << 24, 0x0ffffff8, 0x10000000, 0x20000000, 0x30000000, 0x7fffffff, 0x80000000, 0xfffffff8, 0xffffffff,
    };
    if (below(4) == 0)
        return (uint32_t)(size - size % 8 + 8 * below(9) - 32);
    return values[below(sizeof values / sizeof *values)];
}

/* Make 1 to 4 changes; the buffer has room for twice the largest seed. */
static size_t mutate(uint8_t *data, size_t size, size_t room, const struct bytes *seeds, size_t n_seeds)
{
    for (size_t changes = 1 + below(4); changes > 0; --changes) {
        const struct bytes *seed = &seeds[below(n_seeds)];
        size_t at = somewhere(size);
        size_t length = below(129);
        uint32_t value = interesting(size);
        int width;

        switch (size ? below(8) : 7) {
        case 0:
            data[at] ^= (uint8_t)(1u << below(8));
            break;
        case 1:
            data[at] = (uint8_t)next();
            break;
        case 2: /* a number, in either byte order */
        case 3:
            at -= at % 4;
            width = below(4) ? 4 : 2;
            for (int big = (int)below(2), k = 0; k < width && at + (size_t)k < size; ++k)
                data[at + (size_t)k] = (uint8_t)(value >> 8 * (big ? width - 1 - k : k));
            break;
        case 4:
            size = below(2) ? somewhere(size) : size - below(size < 64 ? size : 64);
            break;
        case 5: /* the same piece of another file */
            at -= at % 8;
            length = length > size - at ? size - at : length;
            if (at < seed->size)
                memcpy(data + at, seed->data + at, length < seed->size - at ? length : seed->size - at);
            break;
        case 6: /* a piece twice, and the rest shifted */
            length = length / 8 * 8;
            length = length > size - at ? size - at : length;
            if (size + length <= room) {
                memmove(data + at + length, data + at, size - at);
                size += length;
            }
            break;
        default: /* the end of another file */
            if (seed->size > at) {
                memcpy(data + at, seed->data + at, seed->size - at);
                size = seed->size;
            }
        }
    }
    return size;
}

int main(int argc, char **argv)
{
    if (argc < 4) {
        fprintf(stderr, "usage: %s N SEED FILE...\n", argv[0]);
        return 2;
    }
    unsigned long n = strtoul(argv[1], NULL, 0);
    size_t n_seeds = (size_t)argc - 3;
    struct bytes *seeds = allocate(n_seeds * sizeof *seeds);
    size_t room = 0;
    state = strtoull(argv[2], NULL, 0);

    /* The seeds unchanged, then the mutations, each in an allocation of exactly its size. */
    for (size_t i = 0; i < n_seeds; ++i) {
        seeds[i] = load(argv[3 + i]);
        room = seeds[i].size > room ? seeds[i].size : room;
    }
    room *= 2;
    uint8_t *work = allocate(room);
    for (unsigned long i = 0; i < n_seeds + n; ++i) {
        const struct bytes *seed = &seeds[i < n_seeds ? i : below(n_seeds)];
        size_t size = seed->size;
        memcpy(work, seed->data, size);
        if (i >= n_seeds)
            size = mutate(work, size, room, seeds, n_seeds);
        uint8_t *exact = allocate(size);
        memcpy(exact, work, size);
        LLVMFuzzerTestOneInput(exact, size);
        free(exact);
    }
    printf("fuzz_core: %lu inputs, %lu accepted\n", n_seeds + n, accepted);

    free(work);
    for (size_t i = 0; i < n_seeds; ++i)
        free(seeds[i].data);
    free(seeds);
    return 0;
}

#endif
