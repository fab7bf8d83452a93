"""Imports point one way, so that a room can be understood, tested and changed without those to its right."""

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import kvmstats_fast

PACKAGE = Path(kvmstats_fast.__file__).parent

#: The rooms and wings, from left to right. One imports from those further left, from its own wing, and from its
#: neighbours of the same line, but not in a circle.
LAYERS = (
    ("_kvmstats", "_resource", "_arguments", "_cgroups", "_text", "_unpatched"),
    ("abi", "errors"),
    ("stat", "series", "encoding", "schema", "image", "conformance"),
    ("file_info", "groups", "handle", "schedstat", "stats_file"),
    ("changes", "joining", "selection", "spans", "answers", "conversions", "samples", "vmm"),
    ("sampling", "analysis", "formats"),
    ("plot", "export"),
    ("testing",),
    ("cli", "plugins", "top"),
    ("__main__",),
)
#: The rooms of Samples' methods, which import what is right of them when they are called.
OF_SAMPLES = {"samples": "Samples", "answers": "Answers", "conversions": "Conversions"}
LAYER = {room: number for number, rooms in enumerate(LAYERS) for room in rooms}


def module_of(path):
    """The dotted name of a file below the package's folder; the package itself is the empty name."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


class Import(NamedTuple):
    """One module's use of another."""

    by: str
    module: str
    within: str | None  # the innermost class
    for_types: bool  # under TYPE_CHECKING


def imports_of(module):
    """What a module imports of the package, wherever the import stands."""
    found = set()

    def visit(node, within, for_types):
        for child in ast.iter_child_nodes(node):
            names = []
            if isinstance(child, ast.ImportFrom) and child.module:
                assert not child.level, f"{module} imports relatively"
                names = [f"{child.module}.{alias.name}" for alias in child.names]
            elif isinstance(child, ast.Import):
                names = [alias.name for alias in child.names]
            for name in names:
                package, _, rest = name.partition(".")
                if package == kvmstats_fast.__name__ and rest not in ("", "__version__"):
                    found.add(Import(module, rest if rest in MODULES else rest.rpartition(".")[0], within, for_types))
            visit(
                child,
                child.name if isinstance(child, ast.ClassDef) else within,
                for_types or (isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"),
            )

    visit(ast.parse(MODULES[module].read_text()), None, for_types=False)
    return found


def room(module):
    """The part of a module's name that the table has."""
    return module.partition(".")[0]


def imports():
    """Every import, without those of Samples' methods and the types that these return."""
    for module in MODULES:
        for one in imports_of(module) if module else ():
            if module not in OF_SAMPLES or (one.within is None and not one.for_types):
                yield one


def test_every_room_has_a_layer():
    """A new room takes its place in the table; there is no line for a room that is gone."""
    rooms = {room(module) for module in MODULES if module} | {"_kvmstats"}
    assert rooms == set(LAYER)


def test_imports_point_left():
    """No room knows of one further right: imports for type checkers count, too."""
    assert not [one for one in imports() if LAYER[room(one.module)] > LAYER[room(one.by)]]


def test_imports_make_no_circle():
    """Not within a wing either; graphlib names the circle."""
    graph = {}
    for one in imports():
        if not one.for_types:
            graph.setdefault(one.by, set()).add(one.module)
    assert "schema" in TopologicalSorter(graph).static_order()


def test_the_methods_of_samples_import_what_is_right_of_them_when_they_are_called():
    """The one circle that is there on purpose: x.to_pandas() is a line that imports the room which does the work."""
    for module, name in OF_SAMPLES.items():
        rightwards = {one for one in imports_of(module) if LAYER[room(one.module)] > LAYER["samples"]}
        assert {one.within for one in rightwards if not one.for_types} == {name}
        assert {room(one.module) for one in rightwards} <= {"analysis", "formats", "plot"}


def test_the_map_for_contributors_names_every_room():
    """CONTRIBUTING.md has each module where it stands, and no module that is gone."""
    text = (PACKAGE.parent / "CONTRIBUTING.md").read_text().partition("## Where things are")[2].partition("\n## ")[0]
    package_map = text.partition("The package, `kvmstats_fast/`:")[2]
    shown = {}
    for line in package_map.splitlines():
        if line.startswith("| `"):
            rooms, holds = line.strip("|").split("|")
            for name in re.findall(r"`([^`]+)`", rooms):
                shown[name.removesuffix("/").removesuffix(".py")] = set(re.findall(r"`([a-z_]+)`", holds))
    modules = {module for module in MODULES if module and not module.startswith("__")}
    assert set(shown) - {"__init__"} == {room(module) for module in modules}
    for wing in ("sampling", "vmm", "analysis", "export", "plugins", "top"):
        assert shown[wing] == {module.partition(".")[2] for module in modules if module.startswith(f"{wing}.")}


def test_dir_lists_the_public_names():
    """Those that can be had, before any of them was asked for: an interactive shell completes them."""
    code = "import kvmstats_fast as kf; print(set(dir(kf)) == {*kf.__all__, '__version__'})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "True\n"
    assert all(hasattr(kvmstats_fast, name) for name in dir(kvmstats_fast))
