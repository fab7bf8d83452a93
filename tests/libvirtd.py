"""A libvirtd of our own, and domains for it; tests/test_libvirt.py says what is tested with it."""

import os
import re
import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest
from helpers import until
from qemu import QEMU

from kvmstats_fast.vmm.hold import hold_library

ROOT = Path(__file__).parent.parent
#: Of libvirtd's own: what it has on this host, domains and networks too, is neither seen nor touched.
FOLDERS = [f"{top}/libvirt" for top in ("/etc", "/run", "/var/lib", "/var/cache", "/var/log")]

needs_libvirt = [
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can start qemu:///system"),
    pytest.mark.skipif(
        None in map(shutil.which, ("libvirtd", "virsh")),
        reason="there is no libvirt (apt-get install libvirt-daemon-system libvirt-clients)",
    ),
]

#: Runs libvirtd in a mount namespace where its folders are empty, and /dev/kvm is as a distribution has it.
START = """
set -e
mount --make-rprivate /
for folder in $FOLDERS; do mkdir -p $folder; mount -t tmpfs -o mode=755 tmpfs $folder; done
mknod /run/libvirt/kvm c $KVM
chgrp kvm /run/libvirt/kvm
chmod 660 /run/libvirt/kvm
mount --bind /run/libvirt/kvm /dev/kvm
echo 'cgroup_controllers = []' > /etc/libvirt/qemu.conf
echo 'stdio_handler = "file"' >> /etc/libvirt/qemu.conf
install -m 755 "$LIBRARY" /run/libvirt/hold.so
exec libvirtd
"""


class Libvirt:
    """A libvirtd of our own."""

    def __init__(self, log):
        self.log = log
        device = Path("/dev/kvm").stat().st_rdev
        environment = os.environ | {
            "FOLDERS": " ".join(FOLDERS),
            "KVM": f"{os.major(device)} {os.minor(device)}",
            "LIBRARY": str(hold_library()),
        }
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                ["unshare", "--mount", "/bin/sh", "-c", START],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        self.root = Path(f"/proc/{self.process.pid}/root")
        self.uri = f"qemu+unix:///system?socket={self.root}/run/libvirt/libvirt-sock"

    def virsh(self, *arguments, check=True):
        """Do a command; its output, or None if it failed."""
        done = subprocess.run(
            ["virsh", "-c", self.uri, *arguments], capture_output=True, text=True, check=False, timeout=60
        )
        assert done.returncode == 0 or not check, done.stderr
        return done.stdout if done.returncode == 0 else None

    def create(self, xml):
        """Make and start a domain that libvirt forgets when it ends."""
        (self.root / "run/libvirt/domain.xml").write_text(xml)
        # virsh reads the file itself, and is not in the namespace.
        return self.virsh("create", str(self.root / "run/libvirt/domain.xml"), check=False)

    def pid(self, name):
        """The process of a domain."""
        return int((self.root / f"run/libvirt/qemu/{name}.pid").read_text())

    def text(self, path):
        """What a file says that libvirt wrote."""
        return (self.root / path.lstrip("/")).read_text()

    def close(self):
        """End it and its domains."""
        for name in (self.virsh("list", "--name", check=False) or "").split():
            self.virsh("destroy", name, check=False)
        self.process.terminate()
        self.process.wait()


def domain(name, extra=""):
    """The XML of a small domain, with the hold library as docs/attach.md names it or without."""
    return f"""<domain type='kvm' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
      <name>{name}</name>
      <memory unit='MiB'>64</memory>
      <vcpu current='2'>4</vcpu>
      <os><type arch='x86_64' machine='pc'>hvm</type></os>
      <devices>
        <emulator>{QEMU}</emulator>
        <controller type='usb' model='none'/>
        <memballoon model='none'/>
      </devices>
      {extra}
    </domain>"""


def documented():
    """The part of a domain's XML that docs/attach.md says, with the path of our copy."""
    (xml,) = re.findall(r"<qemu:commandline>.*?</qemu:commandline>", (ROOT / "docs/attach.md").read_text(), re.DOTALL)
    assert xml.count("/usr/lib/kvmstats/libkvmstats-hold.so") == 1
    return xml.replace("/usr/lib/kvmstats/libkvmstats-hold.so", "/run/libvirt/hold.so")


@contextmanager
def running_libvirt(folder):
    """A libvirtd that runs a domain "plain"; skips with its own words where it cannot."""
    log = folder / "log"
    one = Libvirt(log)
    try:
        if not until(lambda: one.process.poll() is not None or one.virsh("version", check=False), 20):
            pytest.skip(f"libvirtd does not answer: {log.read_text()[-300:]}")
        if one.process.poll() is not None:
            pytest.skip(f"libvirtd has ended: {log.read_text()[-300:]}")
        if one.create(domain("plain")) is None:
            pytest.skip(f"libvirt starts no domain: {log.read_text()[-300:]}")
        yield one
    finally:
        one.close()
