"""Names that other programs choose do nothing to a terminal, nor to the lines of a message."""

import os
import shutil
import socket
import subprocess
from contextlib import contextmanager

import pytest
from helpers import examples, until
from hypothesis import given
from hypothesis import strategies as st

import kvmstats_fast as kf
from kvmstats_fast._resource import describe_fd
from kvmstats_fast._text import format_html, format_si, printable, waits_for
from kvmstats_fast.cli import main
from kvmstats_fast.testing import SyntheticStats

EVIL = [
    "\x1b]0;title\x07\x1b[31mred",
    "two\nlines\r\ttabs",
    "\u202eturned\u2066\u200b\u2028\ufeff",
    "\x9b31m\x85\x7f\xad",
    os.fsdecode(b"not utf-8: \xff\xfe"),
]


@examples(300)
@given(st.text(st.characters(codec=None)), st.integers(4, 80))
def test_printable_text_has_printable_characters_only(text, most):
    """Any text, lone surrogates too; printable text stays as it is, and long text is cut."""
    shown = printable(text, most)
    assert shown.isprintable()
    shown.encode()
    if text.isprintable():
        assert shown == (text if len(text) <= most else text[: most - 3] + "...")


@pytest.mark.parametrize(
    ("names", "which"),
    [(None, ""), (["web-*"], " called web-*"), ([7, "a\x1b"], " of process 7 or called a\\x1b")],
)
def test_who_is_waited_for_is_named_as_it_was_given(names, which):
    """A pid is a process, and no name of a VM."""
    assert waits_for(names) == f"no VM{which} yet; it waits for one"


@contextmanager
def evil_vmm(folder, name, fds):
    """A copy of the shell with these fds of a VM, whose program and guest are named so."""
    program = folder / ("qemu-system-" + name.replace("/", ""))
    shutil.copy(shutil.which("sh"), program)
    command = [program, "-c", "echo ready; read x", "-name", name]
    with subprocess.Popen(command, pass_fds=fds, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout.readline() == b"ready\n"
            yield process
        finally:
            process.kill()


@pytest.mark.real_vm
@pytest.mark.parametrize("name", EVIL, ids=ascii)
def test_a_vmms_names_reach_no_message_as_they_are(tmp_path, capsys, guest, stats, name):
    """list, repr, explain, the refusal of attach, and the error of a VMM that is gone; the attributes have them raw."""
    fds = [guest.vm_fd, *guest.vcpu_fds]
    said = []
    with evil_vmm(tmp_path, name, fds) as process:
        with pytest.raises(kf.AttachError) as caught:
            kf.attach(process.pid)
        said.append(str(caught.value))
        assert main(["list"]) == 0
        said += capsys.readouterr().out.splitlines()
        assert main(["list", "--json"]) == 0
        said += capsys.readouterr().out.splitlines()
        said += [repr(found) for found in kf.find_vms()]
    with evil_vmm(tmp_path, name, [*fds, stats[1].fileno()]) as process, kf.attach(process.pid) as machine:
        assert "qemu-system-" in machine.vmm
        assert not machine.name.isprintable() or "not utf-8" in name
        said += [repr(machine), machine.explain()]
        process.kill()
        process.wait()
        with pytest.raises(kf.VmGoneError) as caught:
            machine.refresh()
        assert until(lambda: machine.files[0].closed)
        said += [str(caught.value), machine.explain(), repr(machine), repr(machine.files)]
    for text in said:
        assert text.isprintable()


@pytest.mark.parametrize("name", EVIL, ids=ascii)
def test_what_a_peer_sends_reaches_no_message_as_it_is(resources, tmp_path, name):
    """The path of a file that is not a stats file, and the id in one that is."""
    ours, theirs = (resources.enter_context(end) for end in socket.socketpair())
    (tmp_path / name.replace("/", "")).write_bytes(b"not a stats file" * 10)
    with (tmp_path / name.replace("/", "")).open("rb") as odd:
        assert describe_fd(odd.fileno()).isprintable()
        kf.send_files(ours, [odd])
    with pytest.raises(kf.FormatError) as caught:
        kf.receive_files(theirs)
    assert str(caught.value).isprintable()
    with SyntheticStats("x86", "vm") as made:
        data = bytearray(made.to_bytes())
        mark = name.encode("utf-8", "surrogateescape")[:20] + b"\0"
        data[24 : 24 + len(mark)] = mark
        with kf.StatsFile.from_bytes(data) as file:
            assert repr(file).isprintable()
        with pytest.raises(ValueError, match="closed") as caught:
            file.read()
        assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (float("nan"), "s", "-"),
        (float("inf"), "s", "∞"),
        (float("inf"), "", "∞"),
        (0.0, "s", "0 s"),
        (1.64e-5, "s", "16.4 µs"),
        (9.996e-4, "s", "1 ms"),
        (1234567.0, "", "1.23457e+06"),
    ],
)
def test_numbers_have_the_prefix_that_suits_them(value, unit, text):
    """Also after they are rounded; what is no number is said."""
    assert format_si(value, unit) == text


def test_a_table_is_html_with_text_at_the_left_and_numbers_at_the_right():
    """The first row is the head; what would be markup is text."""
    assert format_html([["VM", "exits"], ["<web>", "1"]], "<>") == (
        '<table><tr><th style="text-align:left">VM</th><th style="text-align:right">exits</th></tr>'
        '<tr><td style="text-align:left">&lt;web&gt;</td><td style="text-align:right">1</td></tr></table>'
    )
