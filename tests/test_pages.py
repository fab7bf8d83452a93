"""The man page and the completions say what the parser does."""

import argparse
import os
import subprocess
import sys
from pathlib import Path

from kvmstats_fast import cli

ROOT = Path(__file__).parent.parent


def build_pages(folder, *path):
    """Have the man page and completions written; where Python looks first, in front of what is installed."""
    command = [sys.executable, ROOT / "build_pages.py", ROOT, folder]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path))}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_man_page_and_completions_know_each_verb_and_option(tmp_path):
    """They are written from the parser, in the folders where systems look for them, and bash reads its own."""
    assert build_pages(tmp_path).returncode == 0
    pages = {str(path.relative_to(tmp_path)): path for path in tmp_path.rglob("*") if path.is_file()}
    assert set(pages) == {
        "man/man1/kvmstats.1",
        "bash-completion/completions/kvmstats",
        "zsh/site-functions/_kvmstats",
        "fish/vendor_completions.d/kvmstats.fish",
    }
    verbs = next(one for one in cli.make_parser()._actions if isinstance(one, argparse._SubParsersAction)).choices
    assert set(verbs) == set(cli._VERBS)
    options = {option for verb in verbs.values() for action in verb._actions for option in action.option_strings}
    for path in pages.values():
        text = path.read_text().replace("\\", "")
        assert not [word for word in {*verbs, *options - {"-h", "--help"}} if word.lstrip("-") not in text], path
    assert "_shtab_compgen_files" in pages["bash-completion/completions/kvmstats"].read_text()
    assert subprocess.run(["bash", "-n", pages["bash-completion/completions/kvmstats"]], check=False).returncode == 0


def test_the_man_page_is_the_same_of_every_terminal_and_loses_no_line(tmp_path, monkeypatch):
    """Its lines fit 80 columns, and one that begins with a quote is text, not a request that troff does not know."""
    pages = []
    for columns in ("50", "200"):
        monkeypatch.setenv("COLUMNS", columns)
        assert build_pages(tmp_path / columns).returncode == 0
        pages.append((tmp_path / columns / "man/man1/kvmstats.1").read_text())
    assert pages[0] == pages[1]
    lines = pages[0].splitlines()
    assert not [line for line in lines if line.startswith("'")]
    assert r"\&'exits>50000/s' or 'halted_fraction<5%': what to keep sweeps around" in lines
    at = [number for number, line in enumerate(lines) if line.startswith("usage: ")]
    assert len(at) == len(cli._VERBS)
    usages = [line.replace("\\", "") for number in at for line in lines[number : lines.index("", number)]]
    assert max(map(len, usages)) <= 73


def test_a_build_can_do_without_man_page_and_completions(tmp_path):
    """Where what makes them is not installed, as off line, the status says so and nothing is written."""
    (tmp_path / "shtab.py").write_text("raise ImportError('no shtab')")
    done = build_pages(tmp_path / "out", tmp_path)
    assert (done.returncode, done.stderr) == (3, "no shtab\n")
    assert not (tmp_path / "out").exists()
