/* SPDX-License-Identifier: MIT */
/* Reading data sections: of one file, and of many in one pass. The contracts are in kvmstats.h and sweep.h. */
#include "sweep.h"

#include "read.h"

#include <errno.h>

int kvmstats_read(struct kvmstats_source *source)
{
    return read_values(source, source->position, source->count, source->values, &source->got);
}

int kvmstats_lock(struct kvmstats_sweep *sweep, uint64_t owner)
{
    uint64_t none = 0;
    int taken = __atomic_compare_exchange_n(&sweep->owner, &none, owner, 0, __ATOMIC_ACQUIRE, __ATOMIC_RELAXED);
    return taken ? 0 : -EBUSY;
}

void kvmstats_unlock(struct kvmstats_sweep *sweep, uint64_t owner)
{
    __atomic_compare_exchange_n(&sweep->owner, &owner, 0, 0, __ATOMIC_RELEASE, __ATOMIC_RELAXED);
}

int kvmstats_sweep(struct kvmstats_sweep *sweep)
{
    if (kvmstats_lock(sweep, 1))
        return -EBUSY;
    if (sweep->failed)
        for (uint64_t i = 0; i < sweep->num_files; ++i)
            sweep->files[i].error = 0;
    int failed = sweep_files(sweep->files, 0, sweep->num_files, sweep->scratch, 0, 0, 0);
    sweep->failed = (uint32_t)failed;
    __atomic_store_n(&sweep->owner, 0, __ATOMIC_RELEASE); /* kvmstats_unlock, by the owner */
    return failed;
}
