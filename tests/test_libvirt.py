"""A VM under libvirt, which runs as another user and under a seccomp filter, set up as docs/attach.md says."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from qemu import QEMU, needs_qemu, until

import kvmstats_fast as kf
from kvmstats_fast.cli import main
from kvmstats_fast.vmm.hold import hold_library
from kvmstats_fast.vmm.ways import HOLD_DOMAIN

ROOT = Path(__file__).parent.parent
#: Of libvirtd's own: what it has on this host, domains and networks too, is neither seen nor touched.
FOLDERS = [f"{top}/libvirt" for top in ("/etc", "/run", "/var/lib", "/var/cache", "/var/log")]

pytestmark = [
    pytest.mark.real_vm,
    needs_qemu,
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

    def virsh(self, *arguments, check=True):
        """Do a command; its output, or None if it failed."""
        uri = f"qemu+unix:///system?socket={self.root}/run/libvirt/libvirt-sock"
        done = subprocess.run(["virsh", "-c", uri, *arguments], capture_output=True, text=True, check=False, timeout=60)
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


@pytest.fixture(scope="module")
def libvirt(tmp_path_factory):
    """A libvirtd that can run a domain; skips with its own words where it cannot."""
    log = tmp_path_factory.mktemp("libvirt") / "log"
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


@pytest.fixture
def web(libvirt):
    """A domain that was set up as documented."""
    assert libvirt.create(domain("web", documented())) is not None, libvirt.log.read_text()[-300:]
    yield libvirt.pid("web")
    libvirt.virsh("destroy", "web", check=False)


def test_a_domain_is_listed_by_its_name_with_what_it_holds(web, capsys):
    """`kvmstats list` says the domain's name, and that all files can be borrowed."""
    assert main(["list"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.split()[0] == str(web))
    assert line.split()[2] == "web"
    assert "vm, vcpu 0-1" in line
    assert line.endswith("yes")


def test_the_values_are_those_that_libvirt_shows(libvirt, web):
    """While the domain is suspended, every number equals that of `virsh domstats`."""
    with kf.attach(web) as machine:
        assert (machine.how, machine.name, len(machine.files)) == ("borrow", "web", 3)
        libvirt.virsh("suspend", "web")
        said = dict(line.strip().split("=", 1) for line in libvirt.virsh("domstats", "web").splitlines() if "=" in line)
        compared = 0
        for file in machine.files:
            prefix = "vm" if file.kind == "vm" else f"vcpu.{file.vcpu_id}"
            for name, value in file.snapshot().items():
                stat = file.schema[name]
                suffix = {kf.StatType.CUMULATIVE: ".sum", kf.StatType.INSTANT: ".cur", kf.StatType.PEAK: ".max"}
                key = f"{prefix}.{name}{suffix.get(stat.type, '')}"
                if key in said:
                    compared += 1
                    assert {"yes": 1, "no": 0}.get(said[key]) == value or int(said[key]) == value, key
    if not compared:
        pytest.skip("this libvirt shows no statistics of KVM (they came with 8.9)")
    assert compared > 50


def test_a_vcpu_that_is_plugged_in_is_taken_up(libvirt, web):
    """`virsh setvcpus --live`, then refresh()."""
    with kf.attach(web) as machine:
        libvirt.virsh("setvcpus", "web", "3", "--live")
        assert until(machine.refresh)
        assert [file.vcpu_id for file in machine.vcpus] == [0, 1, 2]
        assert machine.vcpus[2].snapshot()["exits"] >= 0


def test_a_domain_is_gone_when_it_is_saved_and_holds_its_files_when_it_is_restored(libvirt, web):
    """The first process' files are revoked; the next one has the environment of the XML."""
    with kf.attach(web) as machine:
        libvirt.virsh("save", "web", "/run/libvirt/web.save")
        assert until(lambda: not machine.alive)
        assert until(lambda: all(file.closed for file in machine.files))
        with pytest.raises(kf.VmGoneError):
            machine.files[0].read()
    libvirt.virsh("restore", "/run/libvirt/web.save")
    again = libvirt.pid("web")
    assert again != web
    with kf.attach(again) as machine:
        assert (machine.how, len(machine.files)) == ("borrow", 3)


def test_a_run_goes_on_when_a_domain_is_destroyed(libvirt, web):
    """Its files fail with VmGoneError, those of another domain are sampled to the end."""
    assert libvirt.create(domain("db", documented())) is not None
    with kf.attach(web) as one, kf.attach(libvirt.pid("db")) as other:
        with kf.Sampler([one, other]).stream(interval=0.01) as stream:
            for x in stream:
                if not x.errors:
                    libvirt.virsh("destroy", "web", check=False)
                    continue
                break
        assert {error.file for error in x.errors} == {0, 1, 2}
        assert all(isinstance(error.error, kf.VmGoneError) for error in x.errors)
        assert other.alive
        assert other.vcpus[0].snapshot()["exits"] > 0
    libvirt.virsh("destroy", "db")


def test_a_reboot_keeps_the_process(libvirt, web):
    """And so what it was started with: a domain takes up LD_PRELOAD only when it is stopped and started."""
    libvirt.virsh("reset", "web")
    assert libvirt.pid("web") == web
    with kf.attach(web) as machine:
        assert len(machine.files) == 3


def test_a_domain_without_the_library_is_refused_and_injecting_into_it_too(libvirt):
    """The reason is the seccomp filter, and what is advised, before and after, is what works for a domain."""
    pid = libvirt.pid("plain")
    with pytest.raises(kf.AttachError, match="LD_PRELOAD") as plain:
        kf.attach(pid)
    with pytest.raises(kf.AttachError, match="seccomp") as refused:
        kf.attach(pid, inject=True)
    for caught in (plain, refused):
        assert "inject=True" not in str(caught.value)
        assert HOLD_DOMAIN.advice in str(caught.value)


def test_what_the_user_of_qemu_cannot_read_is_in_the_log_of_the_domain(libvirt):
    """A path that is closed to others: the domain starts without the library, and ld.so says so where documented."""
    closed = libvirt.root / "run/libvirt/closed"
    closed.mkdir(mode=0o700, exist_ok=True)
    shutil.copy(hold_library(), closed / "hold.so")
    xml = documented().replace("/run/libvirt/hold.so", "/run/libvirt/closed/hold.so")
    assert libvirt.create(domain("closed", xml)) is not None
    text = libvirt.text("/var/log/libvirt/qemu/closed.log")
    assert re.search(r"ld\.so: object '/run/libvirt/closed/hold\.so' .*cannot open shared object file", text)
    assert "tainted: custom-argv" in text
    libvirt.virsh("destroy", "closed")
