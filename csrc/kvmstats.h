/* SPDX-License-Identifier: MIT */
/*
 * kvmstats.h - KVM's binary statistics files: the format, and the parser
 *
 * This header is the manual of the C core, together with sweep.h (many files at once), run.h (on a schedule), series.h
 * (what follows from the values of a run), schedstat.h (what the scheduler counts), process.h (other processes),
 * inject.h (opening files inside a running VMM) and rename.h (what is written to disk). None of them needs a kernel
 * header: everything they rely on of the file format is written down here. build_ffi.py cuts the part between the two
 * "cdef" lines out of each and hands it to cffi, so Python sees exactly what is declared here.
 *
 * LIMITATIONS
 *   - layout.c is pure C11 over bytes. The rest is for Linux; inject.c does nothing except on x86-64. gcc or clang is
 *     required, for their byte-swapping and atomic builtins.
 *   - A value is one u64. KVM takes no lock while it copies them out: on a 64-bit host each u64 is consistent, but two
 *     values of one read need not be from the same instant.
 *
 * THE FILE
 *   Four blocks: header, id, descriptors, data. Today's kernels write them one after the other; a reader must not rely
 *   on that. Offsets count from byte 0 of the file. Integers are in the byte order of the host that wrote the file.
 *
 *   merged (Linux 5.14 and later)                     v9 (patch series v9-v11)
 *   +0   u32 flags        0; else: a later format     +0   u32 name_size    32 or 48
 *   +4   u32 name_size    48                          +4   u32 num_desc
 *   +8   u32 num_desc                                 +8   u32 desc_offset  80
 *   +12  u32 id_offset    24                          +12  u32 data_offset
 *   +16  u32 desc_offset                              +16  char id[64]      "kvm-..."
 *   +20  u32 data_offset
 *
 *   v2 (series v2-v4; name_size 32)  and  v5 (series v5-v8; name_size 48)
 *   +0   char id[64]      "kvm-..."
 *   +64  u32 name_size
 *   +68  u32 num_desc     the series calls it "count"
 *   +72  u32 desc_offset
 *   +76  u32 data_offset
 *
 *   descriptor, all layouts, 16 + name_size bytes apart
 *   +0   u32 flags
 *   +4   s16 exponent
 *   +6   u16 size         how many u64 the statistic has: 1, or the buckets of a histogram
 *   +8   u32 offset       bytes from the start of data; unused in v2 and v5, where each statistic follows the last
 *   +12  u32 bucket_size  width of a linear histogram's buckets; unused before Linux 5.15
 *   +16  char name[name_size]   up to its NUL, or name_size bytes without one
 *
 *   flags of a descriptor                       31        12 11   8 7    4 3    0
 *                                              [ reserved   | base | unit | type ]
 *   type  ____ ____ ____0000  cumulative   only grows (until debugfs clears it)
 *         ____ ____ ____0001  instant      goes up and down
 *         ____ ____ ____0010  peak         the highest seen                  (merged)
 *         ____ ____ ____0011  linear hist  bucket i: [i*w, (i+1)*w)          (Linux 5.15)
 *         ____ ____ ____0100  log hist     bucket 0: [0,1), i: [2^(i-1),2^i) (Linux 5.15)
 *   unit  ____ ____ 0000____  none         ____ ____ 0001____  bytes
 *         ____ ____ 0010____  seconds      ____ ____ 0011____  cycles        ____ ____ 0100____  boolean (Linux 6.0)
 *   base  ____ 0000 ________  power of 10  ____ 0001 ________  power of 2
 *   A value in base units is raw * base^exponent. Bits 12 and up are reserved and ignored. Codes not listed here
 *   are passed on unchanged.
 *
 *   Sources: include/uapi/linux/kvm.h, Documentation/virt/kvm/api.rst 4.133, virt/kvm/binary_stats.c; for the earlier
 *   layouts the patch series "KVM statistics data fd-based binary interface".
 *
 * CONVENTIONS, for every header
 *   Functions return 0, or a negative number: an enum kvmstats_error in layout.c, -errno everywhere else. Positive
 *   results are described at the function that has them.
 *   No file has writable static data, so calls on different structs never affect each other. Each function says what it
 *   allocates, and which threads may call it. "Any thread" means: any number at once, on different structs.
 */
#ifndef KVMSTATS_H
#define KVMSTATS_H

#include <stddef.h>
#include <stdint.h>

/* ---- cdef: begin ---- */

/* Limits. A file that exceeds them is refused, never truncated. The largest known table has 98 descriptors. */
#define KVMSTATS_MAX_NAME_SIZE 4096
#define KVMSTATS_MAX_DESCRIPTORS 65536
#define KVMSTATS_MAX_DATA_SIZE 268435456 /* 256 MiB; numpy's structured types are limited to 2 GiB */

enum kvmstats_layout {
    KVMSTATS_LAYOUT_V2 = 2,
    KVMSTATS_LAYOUT_V5 = 5,
    KVMSTATS_LAYOUT_V9 = 9,
    KVMSTATS_LAYOUT_MERGED = 14, /* as in Linux 5.14 */
};

enum kvmstats_block {
    KVMSTATS_BLOCK_HEADER,
    KVMSTATS_BLOCK_ID,
    KVMSTATS_BLOCK_DESCRIPTORS,
    KVMSTATS_BLOCK_DATA,
};

/* What can be wrong, and what the fault holds then. `offset` is always the byte of the file that is at fault. */
enum kvmstats_error {
    KVMSTATS_E_TRUNCATED = -1, /* offset: end of the file; block: the one it cuts short; limit: where that should end */
    KVMSTATS_E_LAYOUT = -2,    /* offset: the field that matches no layout; value: what it holds */
    KVMSTATS_E_FLAGS = -3,     /* header flags are set: a later format. value: the flags */
    KVMSTATS_E_NAME_SIZE = -4, /* value: 0, or more than limit */
    KVMSTATS_E_NUM_DESC = -5,  /* value: more than limit */
    KVMSTATS_E_COUNT_DEFECT = -6, /* the series' x86 vCPU header. value: the count given; limit: the true count */
    KVMSTATS_E_BLOCK_ALIGN = -7,  /* block; value: its offset, which is not a multiple of 8 */
    KVMSTATS_E_OVERLAP = -8,      /* block; value: its offset, which lies inside `other`, which ends at limit */
    KVMSTATS_E_STAT_SIZE = -9,    /* index: the descriptor whose size is 0 */
    KVMSTATS_E_STAT_ALIGN = -10,  /* index: the descriptor; value: its offset, which is not a multiple of 8 */
    KVMSTATS_E_STAT_NAME = -11,   /* index: the descriptor whose name is empty */
    KVMSTATS_E_DATA_SIZE = -12,   /* index: the descriptor whose values end at `value`, beyond limit */
    KVMSTATS_E_DUPLICATE =
        -13, /* index: the descriptor; value: offset of the earlier one with its name (from Python) */
};

struct kvmstats_fault {
    uint64_t offset;
    uint64_t value;
    uint64_t limit;
    uint32_t index; /* of the descriptor */
    int32_t block;  /* enum kvmstats_block */
    int32_t other;  /* enum kvmstats_block */
};

struct kvmstats_header {
    int32_t layout;   /* enum kvmstats_layout */
    uint32_t swapped; /* 1: the file's byte order is not this machine's */
    uint32_t flags;   /* in the merged layout, else 0 */
    uint32_t name_size;
    uint32_t num_desc; /* the true count, even if count_defect */
    uint32_t id_offset;
    uint32_t id_size; /* room for the id: name_size in the merged layout, else 64 */
    uint32_t desc_offset;
    uint32_t data_offset;
    uint32_t positional; /* 1: descriptors carry no offset (v2, v5) */
    uint32_t count_defect;
    uint32_t key_offset;  /* the header without its id (v2, v5: after it; v9: before it) ... */
    uint32_t key_size;    /* ... is [key_offset, key_offset + key_size) */
    uint64_t desc_end;    /* end of the descriptors */
    uint64_t prefix_size; /* header, id and descriptors all lie in [0, prefix_size) */
    uint64_t data_size;   /* of the data as u64; set by kvmstats_read_descriptors */
};

struct kvmstats_desc {
    uint64_t name_offset; /* byte of the file */
    uint32_t name_length; /* without NUL */
    uint32_t flags;
    int32_t exponent;
    uint32_t size;
    uint32_t offset; /* bytes from the start of data, as u64 (positional layouts: computed) */
    uint32_t bucket_size;
};

/*
 * Recognise the layout, and read the header at the start of [data, data + size) into *header. Only the header's own
 * bytes are read, so size may be less than the file's. Block offsets are checked against each other, not against size.
 *
 * repair: 1 accepts a header with KVMSTATS_E_COUNT_DEFECT, and sets count_defect and the true num_desc. Such a file has
 * descriptors but no values: what its kernel serves as data is other kernel memory.
 *
 * Returns 0, or an enum kvmstats_error with the place in *fault. Allocates nothing, keeps no pointer. Any thread.
 */
int kvmstats_read_header(const void *data, size_t size, int repair, struct kvmstats_header *header,
                         struct kvmstats_fault *fault);

/*
 * Read header->num_desc descriptors into descs, which has room for that many, and set header->data_size.
 * size must be at least header->prefix_size (else KVMSTATS_E_TRUNCATED); the data block itself is not read.
 *
 * Returns 0, or an enum kvmstats_error with the place in *fault. Allocates nothing, keeps no pointer. Any thread.
 */
int kvmstats_read_descriptors(const void *data, size_t size, struct kvmstats_header *header,
                              struct kvmstats_desc *descs, struct kvmstats_fault *fault);

/*
 * Convert n values of value_size bytes at `from`, byte-swapped if `swapped`, to native u64 at `to`. `from` need not be
 * aligned, and may equal `to`. value_size is 8, or 4 in the VM files of 32-bit kernels in the positional layouts, whose
 * values are unsigned long.
 *
 * Allocates nothing, keeps no pointer. Any thread.
 */
void kvmstats_copy_values(const void *from, uint32_t value_size, uint32_t swapped, uint64_t n, uint64_t *to);

/* One file's data section, described once, so that a read takes one pointer. The caller owns `values`. */
struct kvmstats_source {
    int32_t fd;
    uint32_t value_size; /* in the file: 8, or 4; KVMSTATS_SCHEDSTAT: the text of schedstat.h */
    uint32_t swapped;
    uint64_t position; /* of the data block in the file */
    uint64_t count;    /* of values, and of u64 at `values` */
    uint64_t *values;
    uint64_t got; /* set with -ENODATA: how many bytes the file still had */
};

/*
 * Read the data section of one file into source->values: one pread(2), or more if the kernel returns it in pieces or a
 * signal interrupts it.
 *
 * Returns 0, or -errno of pread; -ENODATA if the file ends early. After an error the values are unspecified.
 * Allocates nothing, keeps no pointer. Any thread; two threads may not read through the same struct at once.
 */
int kvmstats_read(struct kvmstats_source *source);

/* ---- cdef: end ---- */

#endif
