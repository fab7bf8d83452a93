/* SPDX-License-Identifier: MIT */
/* Reading data sections: the only system calls of the core. The contracts are in kvmstats.h. */
#include "kvmstats.h"

#include <errno.h>
#include <unistd.h>

int kvmstats_read(struct kvmstats_source *source)
{
    if (source->count > SIZE_MAX / 16) /* what pread can be asked for ends at SSIZE_MAX */
        return -EOVERFLOW;
    size_t wanted = (size_t)source->count * source->value_size;
    size_t got = 0;

    for (;;) {
        ssize_t n = pread(source->fd, (char *)source->values + got, wanted - got, (off_t)(source->position + got));
        if (n < 0) {
            if (errno == EINTR)
                continue;
            return -errno;
        }
        got += (size_t)n;
        if (got == wanted)
            break;
        if (n == 0) {
            source->got = got;
            return -ENODATA;
        }
    }
    if (source->value_size != 8 || source->swapped)
        kvmstats_copy_values(source->values, source->value_size, source->swapped, source->count, source->values);
    return 0;
}
