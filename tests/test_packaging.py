"""What is installed is what the sources say."""

import ast
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import kvmstats_fast
from kvmstats_fast import _kvmstats, abi, errors
from kvmstats_fast._kvmstats import ffi, lib

ROOT = Path(__file__).parent.parent
PACKAGE = Path(kvmstats_fast.__file__).parent


def test_the_stub_names_what_the_compiled_module_has_and_nothing_else():
    """Every constant and function of lib is in the stub, and the other way round."""
    tree = ast.parse((PACKAGE / "_kvmstats.pyi").read_text())
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    stubbed = {
        node.name if isinstance(node, ast.FunctionDef) else node.target.id
        for node in classes["_Lib"].body
        if isinstance(node, ast.FunctionDef | ast.AnnAssign)
    }
    assert stubbed == set(dir(lib))
    for node in classes["_FFI"].body:
        name = node.name if isinstance(node, ast.FunctionDef) else node.target.id
        assert hasattr(ffi, name)
    assert {"ffi", "lib"} <= set(dir(_kvmstats))


def test_every_code_of_the_core_has_its_enum_member_and_message():
    """Error codes, blocks and layouts of C are all known in Python."""
    codes = {name for name in dir(lib) if name.startswith("KVMSTATS_E_")}
    assert codes == {f"KVMSTATS_E_{code.name}" for code in errors.ErrorCode}
    assert set(errors._MESSAGES) == set(errors.ErrorCode)
    assert set(errors._BLOCKS) == {getattr(lib, name) for name in dir(lib) if name.startswith("KVMSTATS_BLOCK_")}
    layouts = {getattr(lib, name) for name in dir(lib) if name.startswith("KVMSTATS_LAYOUT_")}
    assert set(abi.LAYOUT_OF_CODE) == layouts
    assert set(abi.LAYOUT_OF_CODE.values()) == set(abi.Layout)


def test_the_hot_call_takes_exactly_one_pointer():
    """Cffi calls a function of one argument the cheap way."""
    assert len(ffi.typeof(lib.kvmstats_read).args) == 1
    assert len(ffi.typeof(lib.kvmstats_sweep).args) == 1


def test_public_names_are_documented_and_exported():
    """Everything in __all__ is there and has a docstring."""
    for name in kvmstats_fast.__all__:
        assert getattr(kvmstats_fast, name).__doc__


def test_each_public_name_has_one_room_for_type_checkers_and_at_run_time():
    """The imports under TYPE_CHECKING, __all__ and the rooms that names come from at run time agree."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    checked = {node.module: tuple(alias.name for alias in node.names) for node in block.body}
    rooms = {f"kvmstats_fast.{room}": names for room, names in kvmstats_fast._ROOMS.items()}
    assert checked == rooms
    assert sorted(name for names in rooms.values() for name in names) == sorted(kvmstats_fast.__all__)


def test_the_package_shows_its_public_names_only():
    """dir() lists what is promised, whatever was imported before; an unknown name is an AttributeError with a hint."""
    assert kvmstats_fast.StatsFile is kvmstats_fast.StatsFile
    assert set(dir(kvmstats_fast)) == {*kvmstats_fast.__all__, "__version__"}
    with pytest.raises(AttributeError, match=r"module 'kvmstats_fast' has no attribute 'Statsfile'"):
        kvmstats_fast.Statsfile  # noqa: B018 - the attribute is what is tested
    assert not hasattr(kvmstats_fast, "np")


def test_a_folder_of_the_same_name_does_not_hide_the_package(tmp_path):
    """In the folder above a clone, whose own name is the package's, the import finds what is installed."""
    (tmp_path / "kvmstats_fast" / "kvmstats_fast").mkdir(parents=True)
    code = "import kvmstats_fast; print(kvmstats_fast.__version__)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == f"{kvmstats_fast.__version__}\n"


@pytest.mark.parametrize("name", ["StatsFile", "FormatError", "launch", "parse"])
def test_sources_in_which_nothing_was_built_say_what_to_do(name, unbuilt):
    """One ImportError, of whatever is used first."""
    done = run_in(unbuilt, "-c", f"import kvmstats_fast; kvmstats_fast.{name}")
    assert done.stderr.count("Traceback") == 1
    assert done.stderr.splitlines()[-1].startswith(f"ImportError: {unbuilt}/kvmstats_fast has no C core")
    assert "`pip install -e .`" in done.stderr


def test_a_command_in_sources_in_which_nothing_was_built_says_what_to_do(unbuilt):
    """One line and status 1; `--help` needs no core."""
    done = run_in(unbuilt, "-m", "kvmstats_fast", "list")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"kvmstats: {unbuilt}/kvmstats_fast has no C core")
    assert run_in(unbuilt, "-m", "kvmstats_fast").stderr.startswith("usage: kvmstats")


@pytest.fixture
def unbuilt(tmp_path):
    """A clone in which nothing was built."""
    shutil.copytree(PACKAGE, tmp_path / "kvmstats_fast", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return tmp_path


def run_in(folder, *words):
    """What Python says of these arguments in a folder, which comes first in its path."""
    return subprocess.run([sys.executable, *words], cwd=folder, capture_output=True, text=True, check=False)


def loaded_by(code):
    """The modules that a fresh interpreter has after running `code`."""
    code += "\nimport sys; print(*sys.modules)"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_the_import_of_the_package_loads_neither_numpy_nor_the_core():
    """They come with the first name that needs them; an exception needs the core only."""
    assert loaded_by("import kvmstats_fast").isdisjoint({"numpy", "cffi", "_cffi_backend", "kvmstats_fast.errors"})
    assert "numpy" not in loaded_by("import kvmstats_fast; kvmstats_fast.FormatError")
    assert "numpy" in loaded_by("import kvmstats_fast; kvmstats_fast.StatsFile")


def test_a_stats_file_loads_nothing_slow_beyond_numpy():
    """Modules that only an error or a rare call needs are imported by these."""
    own = loaded_by("import numpy, kvmstats_fast; kvmstats_fast.StatsFile")
    own -= loaded_by("import numpy, dataclasses")  # which imports inspect, and numpy both, but for Python 3.10
    assert own.isdisjoint({"pathlib", "difflib", "hashlib", "unicodedata", "inspect", "subprocess", "pyarrow"})


def test_a_child_forked_while_a_name_is_imported_can_use_it():
    """The fork waits until another thread has imported what it uses for the first time."""
    code = (
        "import os, signal, sys, threading, time, kvmstats_fast as kf\n"
        "started = threading.Event()\n"
        "class Slow:\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name == 'kvmstats_fast.image': started.set(); time.sleep(0.2)\n"
        "sys.meta_path.insert(0, Slow())\n"
        "thread = threading.Thread(target=lambda: kf.parse)\n"
        "thread.start()\n"
        "started.wait()\n"
        "pid = os.fork()\n"
        "if not pid: signal.alarm(20); kf.parse; os._exit(7)\n"
        "sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))\n"
    )
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=False).returncode == 7


def test_no_kernel_header_is_needed_to_build():
    """The C sources include nothing of linux/ or asm/."""
    sources = sorted((ROOT / "csrc").glob("*.[ch]"))
    assert len(sources) >= 3
    for source in sources:
        included = re.findall(r"#\s*include\s*<([^>]+)>", source.read_text())
        assert not [name for name in included if name.startswith(("linux/", "asm/"))], source.name


def test_the_pure_part_of_the_core_makes_no_system_call():
    """layout.c includes nothing but string.h and its own header."""
    assert set(re.findall(r"#include (\S+)", (ROOT / "csrc" / "layout.c").read_text())) == {
        '"kvmstats.h"',
        "<string.h>",
    }


@pytest.mark.parametrize(
    "name", ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "LICENSE", "pyproject.toml", "build_ffi.py"]
)
def test_the_top_level_has_what_a_user_looks_for(name):
    """The files are there; there is no setup.py."""
    assert (ROOT / name).is_file()
    assert not (ROOT / "setup.py").exists()


def test_the_version_is_that_of_the_distribution_and_in_the_changelog():
    """The build takes it from the package; the changelog has an entry."""
    assert kvmstats_fast.__version__ == metadata.version("kvmstats-fast")
    assert f"## [{kvmstats_fast.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_the_description_has_no_link_that_leads_nowhere_on_pypi():
    """It is the README as of the installation, with relative links as text, without pictures of the repository."""
    description = metadata.metadata("kvmstats-fast")["Description"]  # with importlib_metadata no payload
    assert [target for target in re.findall(r"\]\(([^)#]+)", description) if "://" not in target] == []
    assert "docs/cli.md has the rest" in description


@pytest.mark.parametrize(
    "document", sorted(str(path.relative_to(ROOT)) for path in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
)
def test_links_lead_somewhere(document):
    """Every relative link of the documents names a file that is there."""
    path = ROOT / document
    for target in re.findall(r"\]\(([^)#]+)", path.read_text()):
        if "://" not in target:
            assert (path.parent / target).exists(), target
