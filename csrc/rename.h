/* SPDX-License-Identifier: MIT */
/* rename.h - renameat2(2), which not every C library has a function for */
#ifndef KVMSTATS_RENAME_H
#define KVMSTATS_RENAME_H

/* ---- cdef: begin ---- */

/* include/uapi/linux/fs.h: RENAME_NOREPLACE and RENAME_EXCHANGE */
enum kvmstats_rename_flag {
    KVMSTATS_RENAME_NEW = 1,      /* the new name must be free: -EEXIST */
    KVMSTATS_RENAME_EXCHANGE = 2, /* both names exist, and change places */
};

/*
 * renameat2(2) of two paths, relative ones from the current directory. Symbolic links are not followed.
 *
 * Returns 0, or -errno: -ENOSYS before Linux 3.15, -EINVAL on a file system that does not know the flag (NFS). Allocates
 * nothing. Any thread.
 */
int kvmstats_rename(const char *from, const char *to, unsigned flag);

/* ---- cdef: end ---- */

#endif
