# What cffi compiles from the headers in csrc/. C pointers and structs are Any: cffi checks them when they are passed.
from typing import Any, Final

class _FFI:
    NULL: Any
    def new(self, cdecl: str, init: Any = ..., /) -> Any: ...
    def from_buffer(self, cdecl: str, python_buffer: Any, require_writable: bool = ..., /) -> Any: ...
    def buffer(self, cdata: Any, size: int = ..., /) -> Any: ...
    def typeof(self, cdecl: str, /) -> Any: ...
    def sizeof(self, cdecl: str, /) -> int: ...
    def memmove(self, dest: Any, src: Any, n: int) -> None: ...

class _Lib:
    KVMSTATS_MAX_NAME_SIZE: Final[int]
    KVMSTATS_MAX_DESCRIPTORS: Final[int]
    KVMSTATS_MAX_DATA_SIZE: Final[int]
    KVMSTATS_MAX_THREADS: Final[int]
    KVMSTATS_WAIT_SLEEP: Final[int]
    KVMSTATS_WAIT_SPIN: Final[int]
    KVMSTATS_WAIT_HYBRID: Final[int]
    KVMSTATS_LAYOUT_V2: Final[int]
    KVMSTATS_LAYOUT_V5: Final[int]
    KVMSTATS_LAYOUT_V9: Final[int]
    KVMSTATS_LAYOUT_MERGED: Final[int]
    KVMSTATS_BLOCK_HEADER: Final[int]
    KVMSTATS_BLOCK_ID: Final[int]
    KVMSTATS_BLOCK_DESCRIPTORS: Final[int]
    KVMSTATS_BLOCK_DATA: Final[int]
    KVMSTATS_E_TRUNCATED: Final[int]
    KVMSTATS_E_LAYOUT: Final[int]
    KVMSTATS_E_FLAGS: Final[int]
    KVMSTATS_E_NAME_SIZE: Final[int]
    KVMSTATS_E_NUM_DESC: Final[int]
    KVMSTATS_E_COUNT_DEFECT: Final[int]
    KVMSTATS_E_BLOCK_ALIGN: Final[int]
    KVMSTATS_E_OVERLAP: Final[int]
    KVMSTATS_E_STAT_SIZE: Final[int]
    KVMSTATS_E_STAT_ALIGN: Final[int]
    KVMSTATS_E_STAT_NAME: Final[int]
    KVMSTATS_E_DATA_SIZE: Final[int]
    KVMSTATS_E_DUPLICATE: Final[int]
    KVMSTATS_INJECT_DONE: Final[int]
    KVMSTATS_INJECT_UNSUPPORTED: Final[int]
    KVMSTATS_INJECT_GONE: Final[int]
    KVMSTATS_INJECT_KERNEL_THREAD: Final[int]
    KVMSTATS_INJECT_TRACED: Final[int]
    KVMSTATS_INJECT_HALTED: Final[int]
    KVMSTATS_INJECT_SECCOMP: Final[int]
    KVMSTATS_INJECT_SHADOW_STACK: Final[int]
    KVMSTATS_INJECT_FOREIGN_ABI: Final[int]
    KVMSTATS_INJECT_NO_SYSCALL: Final[int]
    KVMSTATS_INJECT_OTHER_CALL: Final[int]
    KVMSTATS_INJECT_CODE: Final[int]
    KVMSTATS_INJECT_XSTATE: Final[int]
    KVMSTATS_INJECT_STACK: Final[int]
    KVMSTATS_INJECT_TIMEOUT: Final[int]
    KVMSTATS_INJECT_KILLED: Final[int]
    KVMSTATS_STEP_NONE: Final[int]
    KVMSTATS_STEP_SEIZE: Final[int]
    KVMSTATS_STEP_INTERRUPT: Final[int]
    KVMSTATS_STEP_STOP: Final[int]
    KVMSTATS_STEP_REGS: Final[int]
    KVMSTATS_STEP_STATUS: Final[int]
    KVMSTATS_STEP_XSTATE: Final[int]
    KVMSTATS_STEP_MASK: Final[int]
    KVMSTATS_STEP_CODE: Final[int]
    KVMSTATS_STEP_FRAME: Final[int]
    KVMSTATS_STEP_COMMIT: Final[int]
    KVMSTATS_STEP_DETACH: Final[int]
    KVMSTATS_RENAME_NEW: Final[int]
    KVMSTATS_RENAME_EXCHANGE: Final[int]
    def kvmstats_read_header(self, data: Any, size: int, repair: int, header: Any, fault: Any, /) -> int: ...
    def kvmstats_read_descriptors(self, data: Any, size: int, header: Any, descs: Any, fault: Any, /) -> int: ...
    def kvmstats_copy_values(self, from_: Any, value_size: int, swapped: int, n: int, to: Any, /) -> None: ...
    def kvmstats_read(self, source: Any, /) -> int: ...
    def kvmstats_sweep(self, sweep: Any, /) -> int: ...
    def kvmstats_run(self, run: Any, /) -> int: ...
    def kvmstats_start(self, run: Any, /) -> int: ...
    def kvmstats_wait(self, run: Any, chunks: int, timeout_ms: int, /) -> int: ...
    def kvmstats_join(self, run: Any, /) -> None: ...
    def kvmstats_stop(self, run: Any, /) -> None: ...
    def kvmstats_ready(self, run: Any, /) -> int: ...
    def kvmstats_release(self, run: Any, chunks: int, /) -> None: ...
    def kvmstats_wall_offset(self) -> int: ...
    def kvmstats_lock(self, sweep: Any, owner: int, /) -> int: ...
    def kvmstats_unlock(self, sweep: Any, owner: int, /) -> None: ...
    def kvmstats_getfd(self, pidfd: int, fd: int, /) -> int: ...
    def kvmstats_same_file(self, pid: int, fd: int, other_pid: int, other_fd: int, /) -> int: ...
    def kvmstats_rename(self, from_: bytes, to: bytes, flag: int, /) -> int: ...
    def kvmstats_inject(self, job: Any, /) -> int: ...

ffi: _FFI
lib: _Lib
