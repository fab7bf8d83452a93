"""A VM under libvirt, which runs as another user and under a seccomp filter, set up as docs/attach.md says."""

import re
import shutil

import pytest
from helpers import until
from libvirtd import documented, domain, needs_libvirt, running_libvirt
from qemu import needs_qemu

import kvmstats_fast as kf
from kvmstats_fast.cli import main
from kvmstats_fast.vmm.hold import hold_library
from kvmstats_fast.vmm.ways import HOLD_DOMAIN

pytestmark = [pytest.mark.real_vm, needs_qemu, *needs_libvirt]


@pytest.fixture(scope="module")
def libvirt(tmp_path_factory):
    """A libvirtd that can run a domain; skips where it cannot."""
    with running_libvirt(tmp_path_factory.mktemp("libvirt")) as one:
        yield one


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
