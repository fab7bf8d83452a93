/* SPDX-License-Identifier: MIT */
/* fuzz_schedstat.c - any text against the contract in csrc/schedstat.h. Link with schedstat.c. */
#include "fuzz.h"
#include "schedstat.h"

#include <errno.h>

enum { NONE, GOOD, TOO_LARGE };

/* Digits up to `end`, which comes after *at: what the plainest reading makes of it. */
static int read_number(const char **at, const char *text_end, char end, uint64_t *value)
{
    unsigned __int128 number = 0;
    int digits = 0;

    for (; *at < text_end && **at >= '0' && **at <= '9'; ++*at, ++digits)
        if (digits < 20)
            number = number * 10 + (unsigned)(**at - '0');
    if (digits == 0 || *at == text_end || *(*at)++ != end)
        return NONE;
    *value = (uint64_t)number;
    if (number > UINT64_MAX)
        return TOO_LARGE;
    return digits > 20 ? NONE : GOOD; /* zeros in front */
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    const char *text = (const char *)data, *at = text, *end = text + size;
    uint64_t values[KVMSTATS_SCHEDSTAT_VALUES] = {7, 8, 9}, want[KVMSTATS_SCHEDSTAT_VALUES] = {0};
    int found = GOOD;

    int status = kvmstats_parse_schedstat(text, size, values);
    for (int i = 0; i < KVMSTATS_SCHEDSTAT_VALUES && found == GOOD; ++i)
        found = read_number(&at, end, i + 1 < KVMSTATS_SCHEDSTAT_VALUES ? ' ' : '\n', &want[i]);
    if (found == GOOD && at != end)
        found = NONE;
    PROMISE(status == 0 || status == -EBADMSG || status == -EOVERFLOW);
    PROMISE((status == 0) == (found == GOOD));
    PROMISE(found != TOO_LARGE || status == -EOVERFLOW);
    for (int i = 0; i < KVMSTATS_SCHEDSTAT_VALUES; ++i)
        PROMISE(values[i] == (status ? (uint64_t)i + 7 : want[i]));
    return 0;
}
