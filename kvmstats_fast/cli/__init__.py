"""The command line: a module for each verb. stdout is data, stderr is messages."""

from __future__ import annotations

import argparse
import errno
import io
import os
import sys
import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any

import kvmstats_fast
from kvmstats_fast._text import describe_error

if TYPE_CHECKING:
    from collections.abc import Container, Sequence

#: The verbs and what ``--help`` says of them. The module of a verb is imported only if it is named; it has
#: ``configure(parser)``, which adds its arguments, and ``run(arguments)``, which returns the exit status.
_VERBS = {
    "list": "list VMs, or the statistics of a VM or recording",
    "stat": "count for a while, or while a command runs",
    "top": "show VMs live on a terminal, or replay a recording",
    "run": "start a VMM, and show its statistics when it exits",
    "record": "record the VMs of this host, as they come and go",
    "report": "summarize recordings, as text or as an HTML page",
    "export": "export the VMs of this host to Prometheus",
    "compare": "compare recordings or benchmark results, with confidence intervals",
    "convert": "convert a recording or a captured stats file",
    "capture": "save the raw stats files of a VM, for a bug report",
    "check": "check stats files against the rules of their format",
    "demo": "run a tiny VM, and show what KVM counted",
    "hold-path": "print the path of the hold library, for LD_PRELOAD",
}


#: What errors recommend to who calls the library, and how a command line says it.
_OPTIONS = {"overwrite=True": "--force", "take samples.vm or samples.vcpu": "choose one with --kind vm or --kind vcpu"}

#: Verbs after whose ``--`` a command follows. (`run` takes one without it, too.)
_WITH_COMMAND = ("stat", "record")


def _module(verb: str) -> Any:
    return import_module(f"kvmstats_fast.cli.{verb.replace('-', '_')}")


def make_parser(configured: Container[str] | None = None) -> argparse.ArgumentParser:
    """Return the parser of the command line.

    Parameters
    ----------
    configured : container of str, optional
        The verbs that get their arguments, for which their modules are imported; by default all.
    """
    parser = argparse.ArgumentParser(
        prog="kvmstats",
        description="Read the binary statistics that KVM keeps for every VM and vCPU.",
        epilog="Run 'kvmstats VERB --help' for the options of a verb.",
    )
    parser.add_argument("--version", action="version", version=f"kvmstats {kvmstats_fast.__version__}")
    verbs = parser.add_subparsers(title="verbs", dest="verb", required=True, metavar="VERB")
    for verb, text in _VERBS.items():
        verb_parser = verbs.add_parser(verb, help=text)
        verb_parser.set_defaults(refuse=verb_parser.error)
        if configured is None or verb in configured:
            _module(verb).configure(verb_parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Parameters
    ----------
    argv : sequence of str, optional
        The arguments; default ``sys.argv[1:]``.

    Returns
    -------
    int
        Exit status: 0; 1 for an error, which stderr names; 2 for arguments that do not fit; 3 where a permission is
        missing; 4 if the VM is gone; 130 after Ctrl-C; that of a command that was run, 126 if it cannot be executed and
        127 if it is not found.
    """
    argv = sys.argv[1:] if argv is None else argv
    if not argv:
        make_parser(()).print_help(sys.stderr)
        return 2
    if sys.stdout is None:  # a shell's >&-
        sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115 - for as long as the process is
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that has no µ, a name that is no text
            stream.reconfigure(errors="backslashreplace")
    try:
        arguments = _parse(argv)
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            warnings.showwarning = _show_warning
            status: int = _module(arguments.verb).run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output has gone
        _end_output()
        return 1
    except KeyboardInterrupt:
        return 130
    except ImportError as error:  # by itself: if it is of the core, the package's own errors cannot be imported
        return _fail(error, 1)
    except (kvmstats_fast.KvmStatsError, OSError, MemoryError) as error:
        return _fail(error, _status(error))
    return status


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    """Return what the command line says; SystemExit if it asks for help, or makes no sense."""
    command: list[str] = []
    if "--" in argv and argv[0] in _WITH_COMMAND:
        at = argv.index("--")
        argv, command = argv[:at], [*argv[at + 1 :]]
    try:
        arguments, left = make_parser(argv).parse_known_args(argv)
    finally:
        sys.stdout.flush()  # the help
    files = getattr(arguments, "file", None)
    if not isinstance(files, str | None):  # of several, argparse takes those that stand together
        files += [word for word in left if not word.startswith("-")]
        left = [word for word in left if word.startswith("-")]
    if left:
        arguments.refuse(f"unrecognized arguments: {' '.join(left)}")
    if arguments.verb in _WITH_COMMAND:
        arguments.command = command
    return arguments


def _fail(error: Exception, status: int) -> int:
    text = describe_error(error)
    for call, option in _OPTIONS.items():
        text = text.replace(call, option)
    print(f"kvmstats: {text}", file=sys.stderr)
    _end_output()
    return status


def _end_output() -> None:
    """Write what is left of the output, or drop it: the interpreter would try at exit, with a status of its own."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    print(f"kvmstats: {message}", file=sys.stderr)


def _status(error: Exception) -> int:
    if isinstance(error, kvmstats_fast.VmGoneError):
        return 4
    if isinstance(error, OSError) and error.errno in (errno.EPERM, errno.EACCES):
        return 3
    return getattr(error, "status", 1)
