"""Build the C core and the hold library: cffi's ffibuilder, and the setuptools commands that pyproject.toml names.

The declarations are cut out of the headers in csrc/, so they are written in one place. The hold library
(csrc/hold.c) is not a Python module but a plain shared library beside the extension, for the LD_PRELOAD of a VMM.

A wheel also gets a man page and completions, which build_pages.py makes once the package is built; without the modules
that takes they are left out.

Environment
-----------
KVMSTATS_SANITIZE : e.g. ``address,undefined``: build the extension with these sanitizers.
KVMSTATS_COVERAGE : ``1``: have the extension count which of its lines are executed (tests/covered.py).
KVMSTATS_WERROR : ``1``: warnings are errors, as in CI.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

from cffi import FFI, setuptools_ext
from setuptools import Extension
from setuptools.command.bdist_wheel import bdist_wheel as _bdist_wheel
from setuptools.command.build import build as _build
from setuptools.command.build_ext import build_ext as _build_ext
from setuptools.command.egg_info import egg_info as _egg_info
from setuptools.command.sdist import sdist as _sdist

# setuptools wants source paths relative to the project's folder, which is where it runs.
_TOPICS = ("schedstat", "sweep", "run", "series", "process", "inject", "rename")
SOURCES = [f"csrc/{name}.c" for name in ("layout", *_TOPICS)]
#: In the order of what they declare: run.h needs the structs of sweep.h, and those the structs of kvmstats.h.
HEADERS = [f"csrc/{name}.h" for name in ("kvmstats", *_TOPICS)]
INLINE = [f"csrc/{name}.h" for name in ("changes", "clock", "pace", "read")]


def cdef() -> str:
    """Return the declarations of all headers: the part of each between its two cdef lines."""
    texts = [(Path(__file__).parent / header).read_text(encoding="ascii") for header in HEADERS]
    begin, end = "/* ---- cdef: begin ---- */", "/* ---- cdef: end ---- */"
    return "".join(text.partition(begin)[2].partition(end)[0] for text in texts)


def _compile_args() -> list[str]:
    args = ["-std=c11", "-O2", "-Wall", "-Wextra", "-fvisibility=hidden"]
    return [*args, "-Werror"] if os.environ.get("KVMSTATS_WERROR") == "1" else args


def _instrument_args() -> list[str]:
    sanitizers = os.environ.get("KVMSTATS_SANITIZE")
    args = [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all", "-g"] if sanitizers else []
    return [*args, "--coverage", "-O0"] if os.environ.get("KVMSTATS_COVERAGE") == "1" else args


def _link_args() -> list[str]:
    """Return the linker's options: bind every symbol on loading; strip the others, unless it is instrumented."""
    # inject.c forks in a process with threads: the child may not need the dynamic linker to find a function.
    return ["-Wl,-z,now", *(_instrument_args() or ["-s"])]


ffibuilder = FFI()
ffibuilder.cdef(cdef())
ffibuilder.set_source(
    "kvmstats_fast._kvmstats",
    "".join(f'#include "{Path(header).name}"\n' for header in HEADERS),
    sources=SOURCES,
    include_dirs=["csrc"],
    # setuptools rebuilds when one of these changes, and puts them into the sdist.
    depends=[*HEADERS, *INLINE, "build_ffi.py", "build_pages.py"],
    # Files beyond 2 GiB on 32-bit hosts; pread without the compiler's own dialect.
    define_macros=[("_FILE_OFFSET_BITS", "64"), ("_DEFAULT_SOURCE", None)],
    libraries=["pthread"],  # a part of the C library itself since glibc 2.34
    # The glue that cffi generates does not pass -Wextra.
    extra_compile_args=[
        *_compile_args(),
        "-Wno-unused-parameter",
        "-Wno-missing-field-initializers",
        *_instrument_args(),
    ],
    extra_link_args=_link_args(),
)

# It must load into any VMM, of any C library: no code of the compiler's that needs a runtime library or start-up files,
# whatever CFLAGS say. Every symbol is bound on loading, because its functions may run in a signal handler.
HOLD = Extension(
    "kvmstats_fast.libkvmstats-hold",
    ["csrc/hold.c"],
    extra_compile_args=[
        *_compile_args(),
        *("-ffreestanding", "-fno-stack-protector", "-fno-sanitize=all", "-fno-profile-arcs", "-fno-lto"),
        "-fasynchronous-unwind-tables",  # a thread may be cancelled in close
    ],
    extra_link_args=["-nostdlib", "-fno-sanitize=all", "-fno-lto", "-s", "-Wl,-z,now", "-Wl,-z,relro", "-lgcc"],
    py_limited_api=True,
)


class build_ext(_build_ext):  # noqa: N801 - setuptools finds commands by this name
    """setuptools' build_ext, with a plain file name for the hold library."""

    def get_ext_filename(self, fullname: str) -> str:
        """Return the path of an extension's file; the hold library's has no ABI tag."""
        if fullname.endswith("libkvmstats-hold"):
            return fullname.replace(".", "/") + ".so"
        name: str = super().get_ext_filename(fullname)
        return name


class build(_build):  # noqa: N801 - setuptools finds commands by this name
    """setuptools' build, with the core and the hold library as extensions."""

    def finalize_options(self) -> None:
        """Add the extensions, once: an editable install calls this twice."""
        if not self.distribution.has_ext_modules():
            setuptools_ext.cffi_modules(self.distribution, "cffi_modules", ["build_ffi.py:ffibuilder"])
            self.distribution.ext_modules.append(HOLD)
        super().finalize_options()

    def run(self) -> None:
        """Build, and add the man page and completions to what is installed below share/."""
        super().run()
        if not self.get_finalized_command("build_py").editable_mode:
            self._add_pages()

    def _add_pages(self) -> None:
        out = Path(self.build_temp) / "pages"
        command = [sys.executable, "build_pages.py", self.build_lib, str(out)]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode == 3:
            self.warn(f"the man page and completions are left out: {done.stderr.strip()}")
            return
        if done.returncode:
            raise RuntimeError(f"build_pages.py failed:\n{done.stderr}")
        files = self.distribution.data_files = self.distribution.data_files or []
        for path in sorted(out.rglob("*")):
            if path.is_file():
                files.append((str("share" / path.parent.relative_to(out)), [str(path)]))


class bdist_wheel(_bdist_wheel):  # noqa: N801 - setuptools finds commands by this name
    """One wheel for CPython 3.10 and later; a free-threaded build, which cannot load that, gets its own.

    3.14t has no stable ABI. 3.15t has abi3t (PEP 803), which cffi 2.1 and setuptools 84 can make; it was not tried.
    """

    def finalize_options(self) -> None:
        """Ask for the stable ABI, but not of a free-threaded build."""
        if not sysconfig.get_config_var("Py_GIL_DISABLED"):
            self.py_limited_api = "cp310"
        super().finalize_options()


class egg_info(_egg_info):  # noqa: N801 - setuptools finds commands by this name
    """The metadata. Its description is the README; on PyPI its relative links would lead nowhere, so they are text."""

    def run(self) -> None:
        """Write the metadata."""
        about = self.distribution.metadata
        relative = r"\[([^\]]*)\]\((?!\w+://)[^)]*\)"
        about.long_description = re.sub(relative, r"\1", re.sub("!" + relative + r"\n*", "", about.long_description))
        super().run()


class sdist(_sdist):  # noqa: N801 - setuptools finds commands by this name
    """The sources that a build needs, without the tests, whose captures are in the repository only."""

    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        """Leave out the tests that setuptools finds by itself."""
        super().make_release_tree(base_dir, [name for name in files if not name.startswith("tests/")])
