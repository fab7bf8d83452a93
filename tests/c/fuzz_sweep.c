/* SPDX-License-Identifier: MIT */
/*
 * fuzz_sweep.c - reads that go any way against the contracts in csrc/kvmstats.h and csrc/sweep.h: whole, in pieces,
 * interrupted, ending early and failing; of either width and byte order, gathered or not, and of schedstats
 *
 * Link with layout.c, schedstat.c and sweep.c, with KVMSTATS_LIBC_PREAD and -Wl,--wrap=pread. The input says what the
 * files are, then what each pread returns.
 */
#include "fuzz.h"
#include "sweep.h"

#include "schedstat.h"

#include <errno.h>
#include <sys/types.h>

enum { MOST_FILES = 4, MOST_VALUES = 24, FIRST_FD = 1000 };

/* What a file holds, and what became of reading it. */
static struct content {
    uint8_t *bytes;
    uint64_t size, position;
    int expected; /* 0 or the error that pread gave and the sweep must end with */
} contents[MOST_FILES];
static struct input script;

ssize_t __wrap_pread(int fd, void *buffer, size_t count, off_t offset);

/* A piece of the file, an interruption, or an error. */
ssize_t __wrap_pread(int fd, void *buffer, size_t count, off_t offset)
{
    struct content *content = &contents[fd - FIRST_FD];
    uint64_t how = take(&script, 1), at = (uint64_t)offset - content->position;

    PROMISE(fd >= FIRST_FD && fd < FIRST_FD + MOST_FILES && (uint64_t)offset >= content->position);
    PROMISE(content->expected == 0); /* no read behind one that failed */
    if (how == 255) {
        errno = EINTR;
        return -1;
    }
    if (how == 254) {
        errno = content->expected = EIO;
        return -1;
    }
    uint64_t left = at < content->size ? content->size - at : 0, n = count < left ? count : left;
    if (how >= 128 && n > 1)
        n = 1 + how % n;
    memcpy(buffer, content->bytes + (n ? at : 0), (size_t)n);
    return (ssize_t)n;
}

static uint64_t value_at(const struct kvmstats_source *source, const uint8_t *bytes, uint64_t index)
{
    const uint16_t one = 1;
    int big = (*(const uint8_t *)&one == 0) != (source->swapped != 0);
    uint64_t value = 0;
    for (uint32_t k = 0; k < source->value_size; ++k)
        value = value << 8 | bytes[index * source->value_size + (big ? k : source->value_size - 1 - k)];
    return value;
}

static void make_schedstat(struct input *input, struct content *content, uint64_t *numbers)
{
    char text[80];
    for (int i = 0; i < KVMSTATS_SCHEDSTAT_VALUES; ++i)
        numbers[i] = take(input, (unsigned)take(input, 1) % 9);
    content->size = (uint64_t)snprintf(text, sizeof text, "%llu %llu %llu\n", (unsigned long long)numbers[0],
                                       (unsigned long long)numbers[1], (unsigned long long)numbers[2]);
    content->bytes = allocate((size_t)content->size);
    memcpy(content->bytes, text, (size_t)content->size);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct input input = {data, data + size};
    struct kvmstats_source sources[MOST_FILES];
    struct kvmstats_file files[MOST_FILES];
    uint32_t picks[MOST_FILES][MOST_VALUES];
    uint64_t numbers[MOST_FILES][KVMSTATS_SCHEDSTAT_VALUES];
    uint64_t *scratch = allocate(MOST_VALUES * 8);
    struct kvmstats_sweep sweep = {.files = files, .scratch = scratch, .scratch_size = MOST_VALUES};

    sweep.num_files = take(&input, 1) % (MOST_FILES + 1);
    for (uint64_t i = 0; i < sweep.num_files; ++i) {
        struct content *content = &contents[i];
        uint64_t kind = take(&input, 1);
        struct kvmstats_source source = {.fd = FIRST_FD + (int)i, .swapped = kind & 1, .value_size = kind & 2 ? 4 : 8};
        struct kvmstats_file file = {.count = take(&input, 1) % (MOST_VALUES + 1), .step = 0};
        *content = (struct content){.position = kind & 4 ? take(&input, 2) * 8 : 0};
        if (kind & 8) {
            source.value_size = KVMSTATS_SCHEDSTAT;
            source.swapped = 0;
            content->position = 0;
            file.count = KVMSTATS_SCHEDSTAT_VALUES;
            make_schedstat(&input, content, numbers[i]);
        } else {
            content->size = file.count * source.value_size;
            content->bytes = allocate((size_t)content->size);
            for (uint64_t k = 0; k < content->size; ++k)
                content->bytes[k] = (uint8_t)(k * 37 + kind);
        }
        if (kind & 16 && content->size) /* it ends early */
            content->size -= 1 + take(&input, 1) % content->size;
        file.width = file.count;
        if (kind & 32 && file.count) {
            file.gather = picks[i];
            file.width = take(&input, 1) % (MOST_VALUES + 1);
            for (uint64_t k = 0; k < file.width; ++k)
                picks[i][k] = (uint32_t)(take(&input, 1) % file.count);
        }
        sources[i] = source;
        file.source = &sources[i];
        file.position = content->position;
        /* A row has room for what is read, before 4 bytes become 8. */
        file.row = allocate((size_t)file.width * 8);
        memset(file.row, 0xcc, (size_t)file.width * 8);
        files[i] = file;
    }
    script = input;
    int failed = kvmstats_sweep(&sweep), errors = 0;

    for (uint64_t i = 0; i < sweep.num_files; ++i) {
        const struct kvmstats_file *file = &files[i];
        const struct content *content = &contents[i];
        const int is_text = sources[i].value_size == KVMSTATS_SCHEDSTAT;
        int whole = is_text ? content->size && content->bytes[content->size - 1] == '\n'
                            : content->size == file->count * sources[i].value_size;
        if (content->expected)
            PROMISE(file->error == content->expected);
        else if (!whole)
            PROMISE(file->error == ENODATA && file->got == content->size);
        else
            PROMISE(file->error == 0);
        errors += file->error != 0;
        for (uint64_t k = 0; k < file->width; ++k) {
            uint64_t index = file->gather ? file->gather[k] : k, want = 0;
            if (!file->error)
                want = is_text ? numbers[i][index] : value_at(&sources[i], content->bytes, index);
            PROMISE(file->row[k] == want);
        }
    }
    PROMISE(failed == errors && sweep.failed == (uint32_t)errors && sweep.owner == 0);
    for (uint64_t i = 0; i < sweep.num_files; ++i) {
        free(files[i].row);
        free(contents[i].bytes);
    }
    free(scratch);
    return 0;
}
