/* SPDX-License-Identifier: MIT */
/* Parsing schedstat: pure, over bytes. The contract is in schedstat.h. */
#include "schedstat.h"

#include <errno.h>

/* Parse digits up to `end`, which must follow them. Returns how many bytes that were, end included, or -errno. */
static int parse_number(const char *text, size_t size, char end, uint64_t *value)
{
    uint64_t number = 0;
    size_t i = 0;

    for (; i < size && text[i] >= '0' && text[i] <= '9'; ++i) {
        unsigned digit = (unsigned)(text[i] - '0');
        if (number > (UINT64_MAX - digit) / 10)
            return -EOVERFLOW;
        number = number * 10 + digit;
        if (i == 20) /* no u64 has more; so what is returned fits an int, whatever the size */
            return -EBADMSG;
    }
    if (i == 0 || i == size || text[i] != end)
        return -EBADMSG;
    *value = number;
    return (int)i + 1;
}

int kvmstats_parse_schedstat(const char *text, size_t size, uint64_t *values)
{
    uint64_t numbers[KVMSTATS_SCHEDSTAT_VALUES];
    size_t done = 0;

    for (int i = 0; i < KVMSTATS_SCHEDSTAT_VALUES; ++i) {
        char end = i + 1 < KVMSTATS_SCHEDSTAT_VALUES ? ' ' : '\n';
        int used = parse_number(text + done, size - done, end, &numbers[i]);
        if (used < 0)
            return used;
        done += (size_t)used;
    }
    if (done != size)
        return -EBADMSG;
    for (int i = 0; i < KVMSTATS_SCHEDSTAT_VALUES; ++i)
        values[i] = numbers[i];
    return 0;
}
