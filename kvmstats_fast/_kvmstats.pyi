# What cffi compiles from csrc/kvmstats.h. C pointers and structs are Any: cffi checks them when they are passed.
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
    def kvmstats_read_header(self, data: Any, size: int, repair: int, header: Any, fault: Any, /) -> int: ...
    def kvmstats_read_descriptors(self, data: Any, size: int, header: Any, descs: Any, fault: Any, /) -> int: ...
    def kvmstats_copy_values(self, from_: Any, value_size: int, swapped: int, n: int, to: Any, /) -> None: ...
    def kvmstats_read(self, source: Any, /) -> int: ...
    def kvmstats_sweep(self, sweep: Any, /) -> int: ...
    def kvmstats_run(self, run: Any, /) -> int: ...
    def kvmstats_stop(self, run: Any, /) -> None: ...
    def kvmstats_ready(self, run: Any, /) -> int: ...
    def kvmstats_release(self, run: Any, /) -> None: ...

ffi: _FFI
lib: _Lib
