/* SPDX-License-Identifier: MIT */
/* The contract is in rename.h. */
#include "rename.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/syscall.h>
#include <unistd.h>

int kvmstats_rename(const char *from, const char *to, unsigned flag)
{
    return syscall(SYS_renameat2, AT_FDCWD, from, AT_FDCWD, to, flag) ? -errno : 0;
}
