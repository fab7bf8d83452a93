"""The ways to get at stats files are told in one order, with the same words, wherever they are told."""

import errno
import re
from pathlib import Path

import pytest

from kvmstats_fast import stats_file
from kvmstats_fast.vmm.refusal import Facts, explain
from kvmstats_fast.vmm.ways import BORROW, HAND_OVER, HOLD, HOLD_DOMAIN, INHERIT, INJECT, QEMU, WAYS, advise

ROOT = Path(__file__).parent.parent


def test_the_table_of_the_guide_is_the_data():
    """docs/attach.md has a row for each way, in their order."""
    text = (ROOT / "docs" / "attach.md").read_text()
    table = text.partition("| way | call |")[2].partition("\n\n")[0].splitlines()[2:]
    assert table == [f"| **{way.name}** | {way.call} | {way.needs} | {way.effect} |" for way in WAYS]


@pytest.mark.parametrize("inject", [True, False])
@pytest.mark.parametrize("vcpus", [True, False])
def test_advice_is_in_order_and_leaves_out_what_would_not_help(inject, vcpus):
    """QEMU 8.1 is no remedy for a VM's file, and injection none where it would be refused."""
    text = advise(inject=inject, vcpus=vcpus)
    left_out = {BORROW} | ({INJECT} if not inject else set()) | ({QEMU} if not vcpus else set())
    places = [text.find(way.advice) for way in WAYS if way not in left_out]
    assert places == sorted(places)
    assert -1 not in places
    assert not [way for way in left_out if way.advice in text]


@pytest.mark.parametrize("vcpus", [True, False])
def test_a_domain_of_libvirt_gets_only_what_works_for_it(vcpus):
    """Nobody starts, or changes, the QEMU of a domain but libvirt; its copy of the library is the guide's."""
    text = advise(inject=False, vcpus=vcpus, domain=True)
    assert text.startswith(HOLD_DOMAIN.advice)
    assert (QEMU.advice in text) is vcpus
    assert not [way for way in (HOLD, HAND_OVER, INHERIT, INJECT) if way.advice in text]
    guide = (ROOT / "docs" / "attach.md").read_text()
    assert all(line in guide for line in re.findall("`(install[^`]*)`", HOLD_DOMAIN.advice))


def test_refusals_and_the_hint_for_eio_have_the_same_words():
    """What a refused attach says, and what StatsFile.open says of another process' VM."""
    ids = (1000, 1000, 1000, 100, 100, 100)
    assert HOLD.advice in explain(Facts(7, errno.EPERM, my_ids=(1000, 100), ids=ids, yama=1))
    assert HAND_OVER.advice in explain(Facts(7, errno.EPERM, my_ids=(1000, 100), ids=ids, yama=2))
    assert BORROW.advice in stats_file._OPEN_HINTS[errno.EIO]
    assert HAND_OVER.advice in stats_file._OPEN_HINTS[errno.EIO]


def test_each_way_has_all_its_words():
    """No cell of the table is empty, and none breaks it."""
    assert len({way.name for way in WAYS}) == len(WAYS)
    assert not [text for way in WAYS for text in way if not text or re.search(r"[|\n]", text)]
