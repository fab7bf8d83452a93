"""Whose a row is: the files of one VM have one label, and no other VM has it."""

import itertools
import os
from collections.abc import Mapping
from dataclasses import replace

import hypothesis
import pytest
from helpers import examples, exit_status, forked
from holder import Holder
from hypothesis import strategies as st

import kvmstats_fast as kf
from kvmstats_fast.file_info import identify
from kvmstats_fast.testing import SyntheticStats, TinyGuest

HOST = os.uname().nodename


def info(file_id="kvm-1/vcpu-0", pid=None, name="", vm=""):
    """A file that says so much of itself."""
    kind, vcpu_id = ("vcpu", int(file_id.rpartition("-")[2])) if "vcpu" in file_id else ("vm", None)
    return kf.FileInfo(file_id, kind, vcpu_id, pid, name, vm)


# ---- the rule


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        # The files of one VMM are joined by its pid, whichever threads their ids name, and called after the guest.
        ([info("kvm-7", 7, "web"), info("kvm-8/vcpu-0", 7, "web"), info("kvm-9/vcpu-1", 7, "web")], ["web"] * 3),
        ([info("kvm-8/vcpu-0", 7), info("kvm-9/vcpu-1", 7)], ["pid 7", "pid 7"]),
        # Where two VMs have the same name, their pids tell them apart; the third keeps its name.
        (
            [info(pid=7, name="web"), info(pid=8, name="web"), info(pid=9, name="db")],
            ["web (pid 7)", "web (pid 8)", "db"],
        ),
        # A name that looks like such a label is another VM's all the same.
        (
            [info(pid=7, name="a"), info(pid=8, name="a"), info(pid=9, name="a (pid 7)")],
            ["a (pid 7) (pid 7)", "a (pid 8)", "a (pid 7) (pid 9)"],
        ),
        # Without an owner, what one thread made is joined, and what several threads made is not.
        ([info("kvm-7"), info("kvm-7/vcpu-0"), info("kvm-7/vcpu-1"), info("kvm-8/vcpu-2")], ["kvm-7"] * 3 + ["kvm-8"]),
        # Two VMs of a process, or of a thread: nothing says which file is of which, so nothing is joined.
        (
            [info("kvm-7", 7, "web"), info("kvm-7", 7, "web"), info("kvm-7/vcpu-0", 7, "web")],
            ["web (file 0)", "web (file 1)", "web (file 2)"],
        ),
        ([info("kvm-7/vcpu-0"), info("kvm-7/vcpu-0")], ["kvm-7 (file 0)", "kvm-7 (file 1)"]),
        # What the caller called them stands, even if another VM is called that.
        (
            [info(pid=7, vm="web"), info("kvm-7", pid=8, vm="web"), info(pid=9, name="web")],
            ["web", "web", "web (pid 9)"],
        ),
        # Ids that say nothing join nothing.
        ([info(""), info("vcpu-3"), info("")], ["file 0", "file 1", "file 2"]),
        # Names of any script; bytes that are no text become escapes.
        ([info(pid=7, name="datenbänk 数据"), info(pid=8, name="no\udcfftext")], ["datenbänk 数据", "no\\udcfftext"]),
    ],
)
def test_a_label_joins_the_files_of_a_vm_as_far_as_something_says_which_they_are(files, wanted):
    """By what the caller said, the VMM, or the thread that made them, in this order."""
    assert [one.vm for one in identify(files, HOST)] == wanted


FILES = st.builds(
    info,
    st.sampled_from(["", "kvm-7", "a (pid 7)", "kvm-7/vcpu-0", "kvm-7/vcpu-1", "a/vcpu-0"]),
    st.sampled_from([None, 7, 8]),
    st.sampled_from(["", "a", "b", "pid 7", "kvm-7", "a (pid 7)", "a (file 1)", "file 0"]),
    st.sampled_from(["", "", "a", "a (pid 7)"]),
)


@examples(500)
@hypothesis.given(st.lists(FILES, max_size=8))
def test_no_two_vms_have_the_same_label(files):
    """Whatever names and ids are; and no label that was not given has two files of one vCPU, or is empty."""
    found = identify(files, HOST)
    given = {one.vm for one in files}
    for one, other in itertools.combinations(found, 2):
        if one.vm == other.vm and one.vm not in given:
            assert one.pid == other.pid
            assert (one.kind, one.vcpu_id) != (other.kind, other.vcpu_id)
    for before, after in zip(files, found, strict=True):
        assert after.vm
        assert after == replace(before, vm=before.vm or after.vm, host=HOST)
        assert before.vm or after.vm not in given
    assert identify(found, "elsewhere") == found


def test_the_five_fields_of_version_0_1_stand_where_they_stood():
    """New ones follow them, and may be left out; as text a file is its VM and vCPU."""
    old = kf.FileInfo("kvm-1/vcpu-0", "vcpu", 0, 7, "web")
    assert old == kf.FileInfo(id="kvm-1/vcpu-0", kind="vcpu", vcpu_id=0, pid=7, name="web", vm="", host="")
    assert [str(one) for one in identify([old, replace(old, kind="vm", vcpu_id=None)], HOST)] == ["web/0", "web"]


# ---- what a Sampler makes of it


@pytest.fixture
def files(resources):
    """Files of a VM and its two vCPUs, and of another VM's vCPU 0."""
    vcpus = [SyntheticStats(vcpu_id=vcpu_id, pid=pid) for vcpu_id, pid in ((0, 5), (1, 5), (0, 6))]
    made = [SyntheticStats(kind="vm", pid=5), *vcpus]
    return [resources.enter_context(resources.enter_context(one).open()) for one in made]


def measured(files):
    """What `measure` read of these files."""
    with kf.measure(files) as m:
        pass
    return m.samples


@pytest.mark.parametrize("sample", [lambda files: kf.Sampler(files).run(0, count=2), measured])
def test_a_mapping_gives_vms_labels_of_the_callers(sample, files):
    """Its values are files, lists of them and of lists, or a file; a label is any text."""
    x = sample({"web ☃": [files[:1], files[1:3]], "db": files[3]})
    assert x.vms == ("web ☃", "db")
    assert [(str(one), one.kind, one.host) for one in x.files] == [
        ("web ☃", "vm", HOST),
        ("web ☃/0", "vcpu", HOST),
        ("web ☃/1", "vcpu", HOST),
        ("db/0", "vcpu", HOST),
    ]


def test_files_that_were_handed_over_are_joined_by_the_thread_in_their_ids(files):
    """A stats file says no more of itself; nothing is made of the pid in it, which may be of another machine."""
    sampler = kf.Sampler(files)
    assert [(str(one), one.pid) for one in sampler.files] == [
        ("kvm-5", None),
        ("kvm-5/0", None),
        ("kvm-5/1", None),
        ("kvm-6/0", None),
    ]
    assert kf.Sampler(files, "exits").files == sampler.files[1:]


def test_labels_do_not_depend_on_the_statistics_that_are_chosen(files):
    """Of two VMs of one thread, a vCPU has a label of its own also where no other file of it is sampled."""
    twins = [files[0], files[0], files[1]]
    assert [one.vm for one in kf.Sampler(twins, "exits").files] == ["kvm-5 (file 2)"]


class Twice(Mapping):
    """A mapping that has one key twice, as a multidict."""

    def __init__(self, files):
        self.files = files

    def __getitem__(self, key):
        return self.files

    def __iter__(self):
        return iter(["web", "web"])

    def __len__(self):
        return 2


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda files: {7: files[:3]}, TypeError, "files has an int as the label of a VM; it must be a str"),
        (
            lambda files: {"": files[:3]},
            ValueError,
            "files has '' as the label of a VM; it must be text, and not empty",
        ),
        (lambda files: {"no\udcfftext": files[:3]}, ValueError, "it must be text"),
        (
            lambda files: {"n" * 4097: files[:3]},
            ValueError,
            r"'n+\.\.\.' as the label .* of 4097 characters; it may have",
        ),
        (lambda _: {"web": 3}, TypeError, r"files\['web'\] is an int; it must be StatsFiles, or lists of them"),
        (lambda files: {"web": files[:3], "db": [3]}, TypeError, r"files\['db'\] has an int; it must be StatsFiles"),
        (lambda files: {"web": files}, ValueError, r"files\['web'\] has 2 files of vCPU 0; a label joins the files of"),
        (lambda files: {"web": [files[0], files[0]]}, ValueError, r"files\['web'\] has 2 files of a VM"),
        (
            lambda files: Twice(files[:3]),
            ValueError,
            r"files\['web'\] is there twice; each VM must have a label of its",
        ),
        (lambda _: {}, ValueError, "nothing to sample"),
    ],
)
def test_a_label_that_cannot_be_one_is_refused(files, make, error, text):
    """The error names the label, and says what it must be."""
    with pytest.raises(error, match=text):
        kf.Sampler(make(files))


@pytest.mark.real_vm
def test_the_files_of_ones_own_vm_have_ones_own_pid(stats):
    """Only the process that made a VM can open them; so they are joined whichever thread made them."""
    pid = os.getpid()
    assert {(one.vm, one.pid, one.host) for one in kf.Sampler(stats).files} == {(f"pid {pid}", pid, HOST)}


@pytest.mark.real_vm
def test_the_files_of_a_forked_childs_vm_have_its_pid():
    """Not that of the parent, which opened files of its own before."""

    def work():
        with TinyGuest(1) as guest:
            for file in guest.open_stats():
                with file:
                    assert [one.pid for one in kf.Sampler([file]).files] == [os.getpid()]

    assert exit_status(forked(work)) == 0


@pytest.mark.real_vm
def test_a_guests_name_of_any_length_spoils_no_recording(resources, tmp_path):
    """Its owner chooses it, on a command line of some 100 kB: two VMs of one such name have labels that files take."""
    machines = [kf.attach(resources.enter_context(Holder(1, name="n" * 100_000)).pid) for _ in range(2)]
    for machine in machines:
        resources.callback(machine.close)
    name = "n" * 1024
    with kf.follow([machine.pid for machine in machines], 0.001, count=5) as chunks:
        followed = kf.Samples.concatenate(list(chunks))
    for number, x in enumerate((kf.Sampler(machines).run(0, count=2), followed)):
        assert {info.name for info in x.files} == {name}
        assert len(x.vms) == 2
        assert all(vm.startswith(name) and len(vm) < len(name) + 20 for vm in x.vms)
        path = tmp_path / str(number)
        x.save(path)
        x.save(path.with_suffix(".npz"))
        assert kf.Samples.load(path).files == kf.Samples.load(path.with_suffix(".npz")).files == x.files
