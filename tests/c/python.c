/* A Python with the sanitizers inside, for an extension that is built with them: programs that it starts know nothing
 * of that, as they would of an LD_PRELOAD in their environment, and a Python that it starts is this one again. */
#include <Python.h>

/* Leaks are Python's own, by design. A size that cannot be had is the caller's MemoryError. A test may preload. */
#define OPTIONS "detect_leaks=0:allocator_may_return_null=1:verify_asan_link_order=0:log_path=" REPORTS

const char *__asan_default_options(void);
const char *__ubsan_default_options(void);

const char *__asan_default_options(void)
{
    return OPTIONS;
}

const char *__ubsan_default_options(void)
{
    return OPTIONS;
}

int main(int argc, char **argv)
{
    PyPreConfig config;
    PyPreConfig_InitPythonConfig(&config);
    config.allocator = PYMEM_ALLOCATOR_MALLOC; /* Python's own would keep small objects from ASan */
    PyStatus status = Py_PreInitializeFromBytesArgs(&config, argc, argv);
    if (PyStatus_Exception(status))
        Py_ExitStatusException(status);
    return Py_BytesMain(argc, argv);
}
