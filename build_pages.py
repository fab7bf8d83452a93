"""Write the man page and the completions of bash, zsh and fish, from the parser of the command line.

``python build_pages.py LIB OUT``: of the package in LIB, where its core has been built, into folders of OUT as they are
below share/. The exit status is 3 if something that this needs cannot be imported: a wheel can do without.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from pathlib import Path

MISSING = 3
#: Where each system looks for them, below share/; see bash-completion(7), zshcontrib(1), fish's doc "Completions".
COMPLETIONS = {
    "bash": "bash-completion/completions/kvmstats",
    "zsh": "zsh/site-functions/_kvmstats",
    "fish": "fish/vendor_completions.d/kvmstats.fish",
}
MAN_PAGE = "man/man1/kvmstats.1"
FILES, FOLDERS = {"FILE", "A", "B", "OUT", "PATH"}, {"DIR"}


def write(library: str, out: Path) -> None:
    """Write them."""
    sys.path[0] = library  # not the sources beside this file, whose core is not built
    import shtab
    from argparse_manpage.manpage import Manpage

    import kvmstats_fast
    from kvmstats_fast.cli import make_parser

    for shell, path in COMPLETIONS.items():
        parser = make_parser()
        name_files(parser, shtab.FILE, shtab.DIR)
        put(out / path, shtab.complete(parser, shell))
    about = {
        "project_name": "kvmstats_fast",
        "version": kvmstats_fast.__version__,
        "manual_title": "User Commands",
        "description": "read KVM's binary statistics, per VM and per vCPU",
    }
    os.environ["COLUMNS"] = "74"  # of usages, whatever the terminal: a page of 80 indents by 7
    page = str(Manpage(make_parser(), about))
    put(out / MAN_PAGE, re.sub("(?m)^'", r"\\&'", page))  # which begins a request, too


def name_files(parser: argparse.ArgumentParser, file: object, folder: object) -> None:
    """Have arguments that are files, or folders, completed as such."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for verb in action.choices.values():
                name_files(verb, file, folder)
        elif action.metavar in FILES | FOLDERS:
            action.complete = folder if action.metavar in FOLDERS else file  # type: ignore[attr-defined]


def put(path: Path, text: str) -> None:
    """Write a file, and make its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    try:
        write(sys.argv[1], Path(sys.argv[2]))
    except ImportError as error:
        print(error, file=sys.stderr)
        sys.exit(MISSING)
