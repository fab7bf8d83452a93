/* SPDX-License-Identifier: MIT */
/*
 * covered.h - included by force where lines are counted (tests/covered.py), with -Wl,--wrap=_exit: a process that ends
 * by _exit writes down what it counted, as the one does that injects. A Python that ends by os._exit calls covered_dump.
 */
#if __STDC_HOSTED__
void __gcov_dump(void);
void __real__exit(int status) __attribute__((noreturn));
void __wrap__exit(int status) __attribute__((weak, noreturn));
void covered_dump(void) __attribute__((weak, visibility("default")));

void covered_dump(void)
{
    __gcov_dump();
}

void __wrap__exit(int status)
{
    __gcov_dump();
    __real__exit(status);
}
#endif
