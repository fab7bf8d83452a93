"""Ctrl-C at any instruction of attach, refresh, close and launch leaves neither an fd nor a process."""

import gc
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from contextlib import suppress
from itertools import count
from pathlib import Path

import pytest
from helpers import CtrlC, exit_status, forked
from holder import Holder
from qemu import until

import kvmstats_fast as kf
from kvmstats_fast.testing import SyntheticStats

# Every instruction: KVMSTATS_INTERRUPT_STEP=1, some twenty minutes.
STEP = int(os.environ.get("KVMSTATS_INTERRUPT_STEP", "499"))

pytestmark = [
    pytest.mark.real_vm,
    pytest.mark.filterwarnings("ignore:unclosed <:ResourceWarning"),  # of what the interpreter closes in our place
]


def open_files():
    """What is open here, and how often."""
    links = []
    for fd in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # the one that lists them
            links.append(str(fd.readlink()))
    return Counter(links)


def children():
    """Processes that this one has started and not waited for."""
    return {child for task in Path("/proc/self/task").iterdir() for child in (task / "children").read_text().split()}


def end(machines):
    """Close machines, and end the VMMs that were started for them."""
    for machine in filter(None, machines):
        machine.close()
        if machine.process is not None:
            machine.process.kill()
            machine.process.wait()


def interrupt_everywhere(work, before=lambda: None, settle=lambda: None, *, least):
    """Do `work` with Ctrl-C at one instruction after another, of which there are at least so many.

    `settle` is what lets go of the rest.

    In a forked child: a trace raises also between the end of a ``with`` block and its ``__exit__``, where no signal
    handler runs, and so leaves the lock of the watch locked for the rest of the process.
    """

    def interrupt():
        # A Ctrl-C that comes in a __del__ is only reported. pytest's report would keep its traceback, and with it all
        # that the frames of the work own.
        sys.unraisablehook = lambda _: None
        assert _interrupt(work, before, settle) > least

    assert exit_status(forked(interrupt)) == 0


def _interrupt(work, before, settle):
    """Return how many instructions there were."""
    machine = before()
    end([machine, work(machine)])  # the first time, what is kept for good is made: the watch has its fds
    files, processes = open_files(), children()
    gc.collect()
    gc.freeze()  # each collection below is of what is made below

    def is_clean():
        settle()
        gc.collect()
        return not open_files() - files and children() == processes

    for at in count(1, STEP):
        got = [before()]
        with CtrlC(at) as ctrl_c:
            got.append(work(got[0]))
        assert sys.exc_info() == (None, None, None)  # nothing is kept that was being handled
        left = ctrl_c.left
        del ctrl_c
        end(got)
        machine = got = None
        # The watch may be at work on it, and lets go of it then: what is in a cycle can be collected only after that.
        assert until(is_clean), (at, open_files() - files, children() - processes)
        if left > 0:
            return at
    return 0


def test_attach():
    """Interrupted anywhere, it leaves nothing; uninterrupted, it works."""
    with Holder(1) as vmm:
        kf.attach(vmm.pid).close()
        interrupt_everywhere(lambda _: kf.attach(vmm.pid), least=1000)


def test_refresh():
    """With a file to add and one to close, too."""
    with Holder(1) as vmm:

        def before():
            vmm.do("files.pop().close(); files += guest.open_stats()[1:]")
            machine = kf.attach(vmm.pid)
            vmm.do("files.pop().close(); files += guest.open_stats()[1:]")
            return machine

        before().close()
        interrupt_everywhere(lambda machine: machine.refresh() and None, before, least=1000)


def test_close():
    """What it has not closed goes with the object."""
    with Holder(1) as vmm:
        kf.attach(vmm.pid).close()
        interrupt_everywhere(lambda machine: machine.close(), lambda: kf.attach(vmm.pid), least=100)


def test_follow():
    """Where its block begins, in a look at the host, in a change of files, at its end."""
    with Holder(1) as vmm, SyntheticStats() as made, made.open() as file:
        kf.attach(vmm.pid).close()

        def work(_):
            with kf.follow(vmm.pid, 0.0005, "exits", rescan=1e-6, count=4, chunk=2) as chunks:
                for _ in chunks:
                    pass

        def settle():
            kf.Sampler([file]).run(0, count=1)  # a run that was dropped while it ran is ended by the next one

        interrupt_everywhere(work, settle=settle, least=5000)


def test_launch(tmp_path):
    """The VMM is ended, too, from the instant it was started."""
    if shutil.which("gcc") is None:
        pytest.skip("there is no gcc")
    (tmp_path / "vmm.c").write_text("""
        #include <fcntl.h>
        #include <sys/ioctl.h>
        #include <unistd.h>
        int main(void)
        {
            int vm = ioctl(open("/dev/kvm", O_RDWR), 0xAE01, 0);
            return ioctl(vm, 0xAE41, 0) < 0 || pause();
        }
    """)
    subprocess.run(["gcc", tmp_path / "vmm.c", "-o", tmp_path / "vmm"], check=True)

    def launch(_=None):
        return kf.launch([tmp_path / "vmm"], vcpus=1, stdout=subprocess.PIPE)

    with launch() as machine, machine.process as process:
        process.kill()
    interrupt_everywhere(launch, least=1000)


def test_launch_interrupted_within_popen(monkeypatch):
    """A real SIGINT between the fork and the line that stores the pid leaves no VMM: it takes effect behind that."""
    module, name = (
        (subprocess, "_fork_exec") if sys.version_info >= (3, 11) else (subprocess._posixsubprocess, "fork_exec")
    )
    real = getattr(module, name)

    def fork_and_interrupt(*arguments):
        pid = real(*arguments)
        signal.raise_signal(signal.SIGINT)
        return pid

    monkeypatch.setattr(subprocess, "_USE_POSIX_SPAWN", False)  # as Python 3.13 would
    monkeypatch.setattr(module, name, fork_and_interrupt)
    before, processes = open_files(), children()
    with pytest.raises(KeyboardInterrupt):
        kf.launch(["/bin/sleep", "100"], stdout=subprocess.PIPE)
    gc.collect()
    assert children() == processes
    assert not open_files() - before
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
