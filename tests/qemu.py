"""A real QEMU with KVM, and its monitor."""

import json
import re
import shutil
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest
from helpers import until

QEMU = shutil.which("qemu-system-x86_64")
needs_qemu = pytest.mark.skipif(QEMU is None, reason="there is no qemu-system-x86_64 (apt-get install qemu-system-x86)")


def version():
    """Which QEMU this is, as (major, minor); (0, 0) if there is none."""
    if QEMU is None:
        return (0, 0)
    said = subprocess.run([QEMU, "--version"], capture_output=True, text=True, check=True).stdout
    return tuple(map(int, re.search(r"version (\d+)\.(\d+)", said).groups()))


#: Whether it opens the stats files of its vCPUs itself, and keeps them (accel/kvm/kvm-all.c, kvm_init_vcpu).
HOLDS_VCPUS = version() >= (8, 1)

FIRMWARE = Path(__file__).parent / "c" / "firmware.S"


def arguments(folder, *more, vcpus=4):
    """The command line of a QEMU whose firmware boots, and the path of its monitor."""
    path = folder / f"qmp-{time.monotonic_ns()}"
    command = [QEMU, "-accel", "kvm", "-smp", str(vcpus), "-display", "none", "-nodefaults", *more]
    return [*command, "-qmp", f"unix:{path},server=on,wait=off"], path


def firmware(folder, *macros):
    """Arguments for a firmware that counts at 0x7000 as fast as it can, and the ticks of its clock at 0x46c.

    With REST it halts between ticks, and leaves the processor to the tests. Its other vCPUs halt, or with SPIN have no
    exits and no halts.
    """
    if shutil.which("gcc") is None:
        pytest.skip("there is no gcc to build a firmware")
    image = folder / "firmware"
    linker = "-Wl,--oformat=binary,-Ttext=0,--entry=0,--build-id=none"
    defined = [f"-D{macro}" for macro in macros]
    subprocess.run(["gcc", *defined, "-nostdlib", "-static", "-no-pie", linker, FIRMWARE, "-o", image], check=True)
    return "-bios", str(image)


class Qmp:
    """The monitor of a QEMU: call it with a command."""

    def __init__(self, path, process):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(10)

        def connect():
            with suppress(FileNotFoundError, ConnectionRefusedError):
                self.socket.connect(str(path))
                return True
            assert process.poll() is None, "QEMU has ended"
            return False

        assert until(connect), "QEMU's monitor does not answer"
        self.file = self.socket.makefile("rw")
        self.file.readline()
        self("qmp_capabilities")

    def __call__(self, command, **options):
        """Do a command, and return its answer."""
        self.file.write(json.dumps({"execute": command, "arguments": options}) + "\n")
        self.file.flush()
        while "return" not in (answer := json.loads(self.file.readline())):
            assert "error" not in answer, answer
        return answer["return"]

    def word(self, address):
        """A word of the guest's memory."""
        return int(self("human-monitor-command", **{"command-line": f"xp /1wx {address:#x}"}).split()[1], 16)

    def close(self):
        """Hang up."""
        self.file.close()
        self.socket.close()


def plain_qemu(folder, resources, *more, vcpus=4):
    """Start QEMU as anybody would: (process, monitor); both end with `resources`."""
    command, path = arguments(folder, *more, vcpus=vcpus)
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    resources.callback(process.wait)
    resources.callback(process.kill)
    monitor = Qmp(path, process)
    resources.callback(monitor.close)
    return process, monitor
