"""Many small VMMs in processes of their own: forked from one that has imported everything, so that each is cheap."""

import os
import signal
import subprocess
import sys

#: A line of its stdin is a number of vCPUs; what it forks prints its pid, and when it held all files.
_PROGRAM = """
import os, signal, sys, time
from kvmstats_fast.testing import TinyGuest, exit_counter
exit_counter()
with open("/proc/self/comm", "w") as comm:
    comm.write("qemu-system-x86")
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
print("ready", flush=True)
for line in sys.stdin:
    if not os.fork():
        guest = TinyGuest(int(line))
        files = guest.open_stats()
        held = time.monotonic_ns()
        for vcpu in range(int(line)):
            guest.run(100, vcpu)
        os.write(1, f"{os.getpid()} {held}\\n".encode())
        signal.pause()
"""


class Nursery:
    """Makes VMMs, whose guests all have one name; in a ``with`` block, at whose end they are killed."""

    def __init__(self):
        self.name = f"nursling of {os.getpid()}"
        command = [sys.executable, "-W", "ignore", "-c", _PROGRAM, "-name", self.name]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.alive = []
        assert self._process.stdout.readline() == "ready\n"

    def bear(self, vcpus=1):
        """Make a VMM, whose vCPUs make 100 exits each; give its pid, and the time when it held all its files, in ns."""
        print(vcpus, file=self._process.stdin, flush=True)
        pid, held = map(int, self._process.stdout.readline().split())
        self.alive.append(pid)
        return pid, held

    def kill(self, pid):
        """End a VMM."""
        self.alive.remove(pid)
        os.kill(pid, signal.SIGKILL)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for pid in list(self.alive):
            self.kill(pid)
        self._process.kill()
        self._process.communicate()
