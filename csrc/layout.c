/* SPDX-License-Identifier: MIT */
/* Layout, header, descriptors and values: pure functions over bytes. The contracts are in kvmstats.h. */
#include "kvmstats.h"

#include <string.h>

enum { ID_SIZE = 64, HEADER_SIZE_SERIES = 80, HEADER_SIZE_MERGED = 24, DESC_FIXED_SIZE = 16 };

/* memcpy, because the caller's bytes need not be aligned. */
static uint32_t load_u32(const uint8_t *at, uint32_t swapped)
{
    uint32_t value;
    memcpy(&value, at, sizeof value);
    return swapped ? __builtin_bswap32(value) : value;
}

static uint16_t load_u16(const uint8_t *at, uint32_t swapped)
{
    uint16_t value;
    memcpy(&value, at, sizeof value);
    return swapped ? __builtin_bswap16(value) : value;
}

static int fail(struct kvmstats_fault *fault, enum kvmstats_error code, uint64_t offset, uint64_t value, uint64_t limit)
{
    fault->offset = offset;
    fault->value = value;
    fault->limit = limit;
    return code;
}

static int truncated(struct kvmstats_fault *fault, enum kvmstats_block block, size_t size, uint64_t needed)
{
    fault->block = (int32_t)block;
    return fail(fault, KVMSTATS_E_TRUNCATED, size, 0, needed);
}

static int is_name_size(uint32_t value)
{
    return value != 0 && value <= KVMSTATS_MAX_NAME_SIZE;
}

/* name_size in the layouts of the series is 32 or 48, which also gives away the byte order. Returns it, or 0. */
static int series_name_size(const uint8_t *at, uint32_t *swapped)
{
    for (*swapped = 0; *swapped < 2; ++*swapped) {
        uint32_t name_size = load_u32(at, *swapped);
        if (name_size == 32 || name_size == 48)
            return (int)name_size;
    }
    *swapped = 0;
    return 0;
}

/* Find the layout; set layout, swapped, id and key of *header, and *field to the offset of name_size. */
static int recognise(const uint8_t *bytes, size_t size, struct kvmstats_header *header, uint32_t *field,
                     struct kvmstats_fault *fault)
{
    int starts_with_id = size >= 4 && memcmp(bytes, "kvm-", 4) == 0;
    uint32_t header_size = starts_with_id ? HEADER_SIZE_SERIES : HEADER_SIZE_MERGED;
    if (size < header_size)
        return truncated(fault, KVMSTATS_BLOCK_HEADER, size, header_size);

    header->id_size = ID_SIZE;
    if (starts_with_id) {
        int name_size = series_name_size(bytes + ID_SIZE, &header->swapped);
        if (!name_size)
            return fail(fault, KVMSTATS_E_LAYOUT, ID_SIZE, load_u32(bytes + ID_SIZE, 0), 0);
        header->layout = name_size == 32 ? KVMSTATS_LAYOUT_V2 : KVMSTATS_LAYOUT_V5;
        header->positional = 1;
        header->id_offset = 0;
        header->key_offset = *field = ID_SIZE;
        header->key_size = HEADER_SIZE_SERIES - ID_SIZE;
        return 0;
    }
    if (series_name_size(bytes, &header->swapped) && load_u32(bytes + 8, header->swapped) == HEADER_SIZE_SERIES &&
        memcmp(bytes + 16, "kvm-", 4) == 0) {
        if (size < HEADER_SIZE_SERIES)
            return truncated(fault, KVMSTATS_BLOCK_HEADER, size, HEADER_SIZE_SERIES);
        header->layout = KVMSTATS_LAYOUT_V9;
        header->id_offset = HEADER_SIZE_SERIES - ID_SIZE;
        header->key_offset = *field = 0;
        header->key_size = HEADER_SIZE_SERIES - ID_SIZE;
        return 0;
    }
    /* Merged: flags are 0, which says nothing of the byte order. Every kernel puts the id right after the header, so
     * id_offset does. With an id elsewhere it is name_size: if that is within the limit one way round, it is not the
     * other way round, since its two high bytes are 0 and its two low bytes are not. */
    uint32_t flags = load_u32(bytes, 0);
    int native_id = load_u32(bytes + 12, 0) == HEADER_SIZE_MERGED;
    int foreign_id = load_u32(bytes + 12, 1) == HEADER_SIZE_MERGED;
    int only_foreign_fits = !is_name_size(load_u32(bytes + 4, 0)) && is_name_size(load_u32(bytes + 4, 1));
    header->swapped = foreign_id || (!native_id && only_foreign_fits);
    if (flags != 0) {
        if (native_id || foreign_id)
            return fail(fault, KVMSTATS_E_FLAGS, 0, load_u32(bytes, header->swapped), 0);
        return fail(fault, KVMSTATS_E_LAYOUT, 0, flags, 0);
    }
    header->layout = KVMSTATS_LAYOUT_MERGED;
    header->id_offset = load_u32(bytes + 12, header->swapped);
    header->key_offset = 0;
    header->key_size = HEADER_SIZE_MERGED;
    *field = 4;
    return 0;
}

struct block {
    enum kvmstats_block kind;
    uint32_t field; /* offset, in the header, of the block's offset */
    uint64_t begin, end;
};

/* An empty block may lie between two others, but not inside one. The fault names `block`, whose field is wrong. */
static int check_apart(const struct block *block, const struct block *other, struct kvmstats_fault *fault)
{
    if (block->begin >= other->end || other->begin >= block->end)
        return 0;
    fault->block = (int32_t)block->kind;
    fault->other = (int32_t)other->kind;
    return fail(fault, KVMSTATS_E_OVERLAP, block->field, block->begin, other->end);
}

static int check_start(const struct block *block, uint64_t header_size, struct kvmstats_fault *fault)
{
    fault->block = (int32_t)block->kind;
    if (block->begin % 8 != 0)
        return fail(fault, KVMSTATS_E_BLOCK_ALIGN, block->field, block->begin, 8);
    fault->other = KVMSTATS_BLOCK_HEADER;
    if (block->begin < header_size) /* for empty blocks too: an offset of 0 was never set */
        return fail(fault, KVMSTATS_E_OVERLAP, block->field, block->begin, header_size);
    return 0;
}

int kvmstats_read_header(const void *data, size_t size, int repair, struct kvmstats_header *header,
                         struct kvmstats_fault *fault)
{
    const uint8_t *bytes = data;
    uint32_t field;
    int status;

    memset(header, 0, sizeof *header);
    memset(fault, 0, sizeof *fault);
    status = recognise(bytes, size, header, &field, fault);
    if (status)
        return status;

    int merged = header->layout == KVMSTATS_LAYOUT_MERGED;
    uint32_t desc_field = merged ? 16 : field + 8;
    uint32_t data_field = desc_field + 4;
    uint64_t header_size = merged ? HEADER_SIZE_MERGED : HEADER_SIZE_SERIES;

    header->name_size = load_u32(bytes + field, header->swapped);
    header->num_desc = load_u32(bytes + field + 4, header->swapped);
    header->desc_offset = load_u32(bytes + desc_field, header->swapped);
    header->data_offset = load_u32(bytes + data_field, header->swapped);
    if (merged)
        header->id_size = header->name_size;

    if (!is_name_size(header->name_size))
        return fail(fault, KVMSTATS_E_NAME_SIZE, field, header->name_size, KVMSTATS_MAX_NAME_SIZE);
    uint64_t stride = DESC_FIXED_SIZE + (uint64_t)header->name_size;

    /* The x86 vCPU header of the series has sizeof(array) instead of ARRAY_SIZE(array). */
    uint64_t table_size = (uint64_t)header->data_offset - header->desc_offset;
    if (header->positional && header->num_desc != 0 && header->data_offset > header->desc_offset &&
        header->num_desc == table_size && table_size % stride == 0) {
        if (!repair)
            return fail(fault, KVMSTATS_E_COUNT_DEFECT, field + 4, header->num_desc, table_size / stride);
        header->num_desc = (uint32_t)(table_size / stride);
        header->count_defect = 1;
    }
    if (header->num_desc > KVMSTATS_MAX_DESCRIPTORS)
        return fail(fault, KVMSTATS_E_NUM_DESC, field + 4, header->num_desc, KVMSTATS_MAX_DESCRIPTORS);

    /* No sum here can wrap: u32 + 65536 * 4112 is far below 2^64. */
    struct block descs = {KVMSTATS_BLOCK_DESCRIPTORS, desc_field, header->desc_offset,
                          header->desc_offset + header->num_desc * stride};
    struct block values = {KVMSTATS_BLOCK_DATA, data_field, header->data_offset, (uint64_t)header->data_offset + 1};
    struct block id = {KVMSTATS_BLOCK_ID, 12, header->id_offset, (uint64_t)header->id_offset + header->id_size};
    if (header->num_desc == 0)
        values.end = values.begin; /* empty */

    if (merged && (status = check_start(&id, header_size, fault)))
        return status;
    if ((status = check_start(&descs, header_size, fault)) || (status = check_start(&values, header_size, fault)))
        return status;
    if (merged && ((status = check_apart(&descs, &id, fault)) || (status = check_apart(&values, &id, fault))))
        return status;
    if ((status = check_apart(&values, &descs, fault)))
        return status;

    header->desc_end = descs.end;
    header->prefix_size = descs.end > id.end ? descs.end : id.end;
    return 0;
}

int kvmstats_read_descriptors(const void *data, size_t size, struct kvmstats_header *header,
                              struct kvmstats_desc *descs, struct kvmstats_fault *fault)
{
    const uint8_t *bytes = data;
    uint32_t swapped = header->swapped;
    uint64_t stride = DESC_FIXED_SIZE + (uint64_t)header->name_size;
    uint64_t data_size = 0;
    uint64_t id_end = (uint64_t)header->id_offset + header->id_size;

    memset(fault, 0, sizeof *fault);
    if (size < id_end)
        return truncated(fault, KVMSTATS_BLOCK_ID, size, id_end);
    if (size < header->desc_end)
        return truncated(fault, KVMSTATS_BLOCK_DESCRIPTORS, size, header->desc_end);

    for (uint32_t i = 0; i < header->num_desc; ++i) {
        uint64_t position = header->desc_offset + i * stride;
        const uint8_t *at = bytes + position;
        const uint8_t *name = at + DESC_FIXED_SIZE;
        const uint8_t *nul = memchr(name, 0, header->name_size);
        struct kvmstats_desc *desc = &descs[i];

        fault->index = i;
        desc->name_offset = position + DESC_FIXED_SIZE;
        desc->name_length = nul ? (uint32_t)(nul - name) : header->name_size;
        desc->flags = load_u32(at, swapped);
        desc->exponent = (int16_t)load_u16(at + 4, swapped);
        desc->size = load_u16(at + 6, swapped);
        desc->offset = header->positional ? (uint32_t)data_size : load_u32(at + 8, swapped);
        desc->bucket_size = header->positional ? 0 : load_u32(at + 12, swapped);

        if (desc->name_length == 0)
            return fail(fault, KVMSTATS_E_STAT_NAME, desc->name_offset, 0, header->name_size);
        if (desc->size == 0)
            return fail(fault, KVMSTATS_E_STAT_SIZE, position + 6, 0, 0);
        if (desc->offset % 8 != 0)
            return fail(fault, KVMSTATS_E_STAT_ALIGN, position + 8, desc->offset, 8);
        uint64_t end = desc->offset + 8 * (uint64_t)desc->size;
        if (end > KVMSTATS_MAX_DATA_SIZE)
            return fail(fault, KVMSTATS_E_DATA_SIZE, position + (header->positional ? 6 : 8), end,
                        KVMSTATS_MAX_DATA_SIZE);
        if (end > data_size)
            data_size = end;
    }
    header->data_size = data_size;
    fault->index = 0;

    /* Only now is the end of the data known: the block may start before another and extend into it. */
    struct block values = {KVMSTATS_BLOCK_DATA, header->key_offset + header->key_size - 4, header->data_offset,
                           header->data_offset + data_size};
    struct block table = {KVMSTATS_BLOCK_DESCRIPTORS, 0, header->desc_offset, header->desc_end};
    struct block id = {KVMSTATS_BLOCK_ID, 0, header->id_offset, id_end};
    int status = check_apart(&values, &id, fault);
    return status ? status : check_apart(&values, &table, fault);
}

void kvmstats_copy_values(const void *from, uint32_t value_size, uint32_t swapped, uint64_t n, uint64_t *to)
{
    const uint8_t *bytes = from;

    if (value_size == 8 && !swapped) {
        if ((const void *)to != from && n)
            memcpy(to, from, (size_t)(n * 8));
        return;
    }
    /* From the last to the first, so that widening in place overwrites nothing that is still to be read. */
    for (uint64_t i = n; i-- > 0;) {
        uint64_t value;
        if (value_size == 4) {
            value = load_u32(bytes + i * 4, swapped);
        } else {
            memcpy(&value, bytes + i * 8, sizeof value);
            value = __builtin_bswap64(value);
        }
        to[i] = value;
    }
}
