"""A small VMM in a process of its own, which holds its stats files."""

import subprocess
import sys
from pathlib import Path

#: What a program begins with that makes its VMs by itself.
WITH_GUESTS = (
    f"import sys; sys.path.append({str(Path(__file__).parent)!r})\nfrom small_guest import TinyGuest, stats_of\n"
)

#: Each line of its stdin is run; `guest`, `files` and `spare`, fds below those of the VM, are there.
_PROGRAM = f"""{WITH_GUESTS}
import ctypes, os
spare = [os.open(os.devnull, os.O_RDONLY) for _ in range(3)]
if len(sys.argv) > 4:
    with open("/proc/self/comm", "w") as comm:
        comm.write("qemu-system-x86")
guest = TinyGuest(int(sys.argv[1]))
files = guest.open_stats() if sys.argv[2] == "all" else guest.open_stats()[1:] if sys.argv[2] == "vcpus" else []
exec(sys.argv[3])
print(*(file.fileno() for file in files), flush=True)
for line in sys.stdin:
    exec(line)
    print("done", flush=True)
"""


class Holder:
    """A process with a VM and its vCPUs; in a ``with`` block, or until `end`.

    hold: which stats files it opens: "all", "vcpus" or "nothing". before: what it runs before it is ready. name: what
    its command line calls the guest, as QEMU's does. fds: numbers of the stats files in it.
    """

    def __init__(self, vcpus=2, hold="all", before="", name=None):
        command = [sys.executable, "-W", "ignore", "-c", _PROGRAM, str(vcpus), hold, before]
        command += [] if name is None else ["-name", f"guest={name}"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.pid = self.process.pid
        self.fds = [int(word) for word in self.process.stdout.readline().split()]

    def do(self, line):
        """Have it run a line of Python, and wait for that."""
        print(line, file=self.process.stdin, flush=True)
        assert self.process.stdout.readline() == "done\n"

    def end(self):
        """Kill it."""
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.end()
