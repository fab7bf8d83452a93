"""Derived figures, duty cycles and advice against plain arithmetic and brute force."""

import itertools
import json
import math
import os
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from helpers import DATA, examples
from hypothesis import example, given
from hypothesis import strategies as st
from made import group_of, run_of

import kvmstats_fast as kf
from kvmstats_fast.analysis import halt_poll
from kvmstats_fast.testing import SyntheticStats

COUNTER = kf.Stat("", kf.StatType.CUMULATIVE, kf.StatUnit.NONE, kf.StatBase.POW10, 0, 1, -1)
NS = replace(COUNTER, unit=kf.StatUnit.SECONDS, exponent=-9)
GAUGE = replace(COUNTER, type=kf.StatType.INSTANT)
BOOLEAN = replace(GAUGE, name="blocking", unit=kf.StatUnit.BOOLEAN)


def counters(*names):
    """Cumulative counters; those that end in _ns are in ns."""
    return [replace(NS if name.endswith("_ns") else COUNTER, name=name) for name in names]


# ---- figures

HALTS = {"halt_poll_success_ratio", "halt_poll_time_ratio"}
WAITS = {"halted_fraction", "halted_imbalance"}
FAULTS = ("emulate", "fast", "fixed", "mmio_spte_created", "spurious")
X86_EXITS = (
    "exits io_exits mmio_exits signal_exits irq_window_exits nmi_window_exits halt_exits request_irq_exits irq_exits"
)


def per_second(names):
    """Names of the rates of these counters."""
    return {f"{name}/s" for name in names.split()}


#: From which statistics which figures follow, for the lists of each architecture.
EXPECTED = {
    "x86": HALTS
    | WAITS
    | per_second(X86_EXITS + " notify_window_exits pf_taken")
    | {f"pf_{name}_share" for name in FAULTS}
    | {"exits_imbalance", "other_exits/s"},
    "arm64": HALTS
    | per_second("hvc_exit_stat wfe_exit_stat wfi_exit_stat mmio_exit_user mmio_exit_kernel exits")
    | {"exits_imbalance", "other_exits/s"},
    "s390": HALTS
    | per_second(
        "exit_userspace exit_null exit_external_request exit_io_request exit_external_interrupt exit_stop_request "
        "exit_validity exit_instruction exit_pei exit_program_interruption exit_instr_and_program "
        "exit_operation_exception exit_wait_state"
    ),
    "powerpc-book3s": HALTS
    | WAITS
    | per_second(
        "sum_exits mmio_exits signal_exits light_exits itlb_real_miss_exits itlb_virt_miss_exits dtlb_real_miss_exits "
        "dtlb_virt_miss_exits syscall_exits isi_exits dsi_exits emulated_inst_exits dec_exits ext_intr_exits "
        "dbell_exits gdbell_exits"
    )
    | {"sum_exits_imbalance", "other_exits/s"},
}
EXPECTED["powerpc-booke"] = EXPECTED["powerpc-book3s"]
RISCV = (
    HALTS
    | WAITS
    | per_second(
        "ecall_exit_stat wfi_exit_stat wrs_exit_stat mmio_exit_user mmio_exit_kernel csr_exit_user csr_exit_kernel "
        "signal_exits exits"
    )
    | {"exits_imbalance", "other_exits/s"}
)
OF_CAPTURES = {
    "x86_64-6.1": EXPECTED["x86"],
    "x86_64-6.18-pvm": EXPECTED["x86"],
    "arm64-6.1": EXPECTED["arm64"] | WAITS | per_second("signal_exits"),
    "riscv64-6.12": RISCV,
    "v2-x86_64": HALTS | per_second(X86_EXITS) | {"exits_imbalance", "other_exits/s"},
}


#: No kinds of exits: all of them, and why KVM_RUN returned.
NO_KIND = ("exits", "sum_exits", "signal_exits", "request_irq_exits", "light_exits")


def changed(values, grows=True):
    """Sum of the changes of one file's readings; one that fell was cleared, and its value is the change."""
    total = 0
    for before, after in itertools.pairwise(values):
        total += after if grows and after < before else after - before
    return total


def ratio(a, b):
    """One number by another, NaN if that is 0."""
    return a / b if b else math.nan


def imbalance(values):
    """How far the largest of those that are known is above their mean."""
    known = [value for value in values if not math.isnan(value)]
    return ratio(max(known), sum(known) / len(known)) - 1 if known else math.nan


def expected_of_vcpu(values, seconds):
    """What is expected of one vCPU with these readings by name, up to where it failed."""
    if not seconds:
        seconds = math.nan
    change = {name: changed(row) if len(row) > 1 else math.nan for name, row in values.items()}
    result = {}
    for name, by in change.items():
        words = name.split("_")
        if ("exits" in words or "exit" in words or name == "pf_taken") and "ns" not in words:
            result[f"{name}/s"] = by / seconds
        if name in ("exits", "sum_exits"):
            kinds = [one for one in change if {"exit", "exits"} & {*one.split("_")} and one not in NO_KIND]
            kinds = [one for one in kinds if not one.endswith("_ns")]
            if kinds:
                result["other_exits/s"] = max(by - sum(change[one] for one in kinds), 0) / seconds
        if name.startswith("pf_") and name not in ("pf_taken", "pf_guest") and "pf_taken" in change:
            result[f"{name}_share"] = ratio(by, change["pf_taken"])
    if "halt_attempted_poll" in change:
        result["halt_poll_success_ratio"] = ratio(change["halt_successful_poll"], change["halt_attempted_poll"])
    if "halt_poll_fail_ns" in change:
        success, fail = change["halt_poll_success_ns"] / 1e9, change["halt_poll_fail_ns"] / 1e9
        result["halt_poll_time_ratio"] = ratio(success, success + fail)
        if "halt_wait_ns" in change:
            result["halted_fraction"] = (change["halt_wait_ns"] / 1e9 + success + fail) / seconds
    return result


def check_figures(figures, expected, files):
    """Compare figures with what is expected of each file, by its index."""
    names = {name for of_file in expected.values() for name in of_file}
    totals = {"exits/s": "exits_imbalance", "sum_exits/s": "sum_exits_imbalance", "halted_fraction": "halted_imbalance"}
    assert set(figures) == names | {totals[name] for name in names if name in totals}
    for name in names:
        having = [index for index in sorted(expected) if name in expected[index]]
        figure = figures[name]
        assert figure.name == name
        assert figure.files == tuple(files[index] for index in having), name
        numbers = [expected[index][name] for index in having]
        np.testing.assert_allclose(figure.values, numbers, rtol=1e-12, err_msg=name)
        assert figure.units == ("1/s" if name.endswith("/s") else "")
        assert (figure.values.dtype, figure.values.shape) == (np.float64, (len(having),))
        total = sum(number for number in numbers if not math.isnan(number)) if figure.units else math.nan
        np.testing.assert_allclose(figure.sum, total if np.isfinite(numbers).any() else math.nan, rtol=1e-12)
        if name in totals:
            whole = figures[totals[name]]
            assert (whole.files, whole.units, whole.values.shape) == ((), "", (1,))
            np.testing.assert_allclose(whole.values, [imbalance(numbers)], rtol=1e-9, atol=1e-12, err_msg=whole.name)
    lines = str(figures).splitlines()
    assert (
        [line.split()[0] for line in lines[1:]] == list(figures)
        if figures
        else lines == ["no figures: these files have the statistics of none"]
    )


def readings(draw_rows, stats, sweeps, files):
    """Counters that grow, and now and then are cleared: (T, n) of each scalar statistic."""
    result = {}
    for stat in stats:
        if stat.shape:
            continue
        steps = draw_rows.integers(0, 1000, (sweeps, files))
        values = np.cumsum(steps, axis=0)
        if draw_rows.random() < 0.3 and sweeps:
            at = draw_rows.integers(0, sweeps)
            values[at:] -= values[at]
        result[stat.name] = values.astype(np.uint64)
    return result


@pytest.mark.parametrize("arch", EXPECTED)
def test_an_architecture_has_the_figures_that_its_statistics_give(arch):
    """Every figure is there and equals plain arithmetic, and one for which a part is missing is not there."""
    with SyntheticStats(arch) as made:
        stats = list(made.stats.values())
    random = np.random.default_rng(5)
    values = readings(random, stats, 6, 3)
    time = np.cumsum(random.integers(1, 10**9, 6))
    x = run_of(group_of(stats, range(3), values), times=time)
    seconds = int(time[-1] - time[0]) / 1e9
    figures = x.figures()
    assert set(figures) == EXPECTED[arch]
    expected = {
        file: expected_of_vcpu({name: rows[:, file].tolist() for name, rows in values.items()}, seconds)
        for file in range(3)
    }
    check_figures(figures, expected, x.files)
    with pytest.raises(KeyError):
        figures["large_page_share"]


def captured(kernel, prefix=""):
    """Samples of two captures of a real kernel's vCPU, a second apart."""
    folder = DATA / "captures" / kernel
    images = [kf.parse((folder / f"{prefix}vcpu0-{when}.bin").read_bytes()) for when in ("before", "after")]
    return run_of(group_of(images[0].schema.stats, [0], {name: [[one[name]] for one in images] for name in images[0]}))


@pytest.mark.parametrize("kernel", OF_CAPTURES)
def test_the_figures_of_a_real_kernel_follow_from_its_captures(kernel):
    """Two captures a second apart, of which one is the sweep before and one the sweep after."""
    for prefix in ("", "halt-"):
        x = captured(kernel, prefix)
        plain = [name for name in x.names if not x.stat(name).shape]
        expected = {0: expected_of_vcpu({name: x[name][:, 0].tolist() for name in plain}, 1)}
        assert set(x.figures()) == OF_CAPTURES[kernel]
        check_figures(x.figures(), expected, x.files)


HALT_NS = ("halt_wait_ns", "halt_poll_success_ns", "halt_poll_fail_ns")
NAMES = ["exits", "io_exits", "last_exit_ns", "tlb_flush", "halt_successful_poll", "halt_attempted_poll", *HALT_NS]
NAMES += ["pf_taken", "pf_fixed", "pf_guest", "exitless_irqs"]
PAIRS = [{"halt_successful_poll", "halt_attempted_poll"}, {"halt_poll_success_ns", "halt_poll_fail_ns"}]


@st.composite
def mixed_runs(draw):
    """Draw runs of files of one or two kernels: which statistics each has, which files fail and when."""
    sweeps = draw(st.integers(0, 5))
    kernels = []
    for _ in range(draw(st.integers(1, 2))):
        names = draw(st.lists(st.sampled_from(NAMES), min_size=1, unique=True))
        names = [name for name in names if all(name not in pair or pair <= set(names) for pair in PAIRS)] or ["exits"]
        kernels.append(names)
    owners = draw(st.lists(st.integers(0, len(kernels) - 1), min_size=1, max_size=4))
    failed = draw(st.lists(st.tuples(st.integers(0, len(owners) - 1), st.integers(0, 6)), unique_by=lambda one: one[0]))
    failed = [(file, sweep) for file, sweep in failed if sweep < sweeps]
    steps = draw(st.lists(st.sampled_from([0, 1, 10**6, 10**9]), min_size=sweeps, max_size=sweeps))
    seed = draw(st.integers(0, 2**32))
    return kernels, owners, sweeps, failed, list(itertools.accumulate(steps)), seed


def mixed_run(drawn, storage):
    """The Samples of such a run; and of each file its readings by name, up to where it failed, and over how long."""
    kernels, owners, sweeps, failed, times, seed = drawn
    random = np.random.default_rng(seed)
    groups, rows = [], {}
    for kernel, names in enumerate(kernels):
        columns = [file for file, owner in enumerate(owners) if owner == kernel]
        if not columns:
            continue
        stats = counters(*names)
        values = readings(random, stats, sweeps, len(columns))
        for place, file in enumerate(columns):
            end = dict(failed).get(file, sweeps)
            seconds = (times[end - 1] - times[0]) / 1e9 if end else 0
            rows[file] = {name: values[name][:end, place].tolist() for name in names}, seconds
            for name in names:
                values[name][end:, place] = 77  # means nothing
        groups.append(group_of(stats, columns, values, storage=storage))
    return run_of(*groups, times=times, failed=failed), [rows[file] for file in sorted(rows)]


@examples(120)
@given(mixed_runs(), st.sampled_from(["block", "columns"]))
def test_figures_of_any_mix_of_kernels_and_failures_are_those_of_each_file(drawn, storage):
    """Each file has the figures that its own kernel has parts for, up to the sweep before it failed."""
    x, rows = mixed_run(drawn, storage)
    expected = {file: expected_of_vcpu(of_file, seconds) for file, (of_file, seconds) in enumerate(rows)}
    check_figures(x.figures(), expected, x.files)


def test_figures_of_nothing_are_not_defined():
    """No sweep, one sweep, no time between sweeps, no exits: NaN, and a table all the same."""
    names = ("exits", "halt_successful_poll", "halt_attempted_poll", "pf_taken", "pf_fixed", *HALT_NS)
    vm = group_of(PAGES, [2], {"pages_4k": np.zeros((3, 1))}, kind="vm")
    x = run_of(group_of(counters(*names), range(2), {"exits": np.arange(6).reshape(3, 2)}), vm, times=[5, 5, 7])
    for part in (x[:0], x[:1]):
        figures = part.figures()
        assert len(figures) == 9
        assert all(np.isnan(figure.values).all() for figure in figures.values())
        assert "nan" not in str(figures)
    standing = x[:2].figures()
    assert np.isnan(standing["exits/s"].values).all()
    whole = x.figures()
    assert whole["exits/s"].values.tolist() == pytest.approx([4 / 2e-9] * 2)
    assert np.isnan(whole["halt_poll_success_ratio"].values).all()
    assert np.isnan(whole["pf_fixed_share"].values).all()
    assert whole["halted_fraction"].values.tolist() == [0, 0]
    assert np.isnan(whole["halted_imbalance"].values).all()


def test_files_without_any_part_have_no_figures():
    """Neither an empty mapping nor its text is an error; files of a VM give no figures of vCPUs."""
    x = run_of(group_of(counters("tlb_flush"), [0], {"tlb_flush": [[1], [2]]}))
    assert dict(x.figures()) == {}
    assert str(x.figures()) == "no figures: these files have the statistics of none"
    vm = run_of(group_of(counters("exits", "pf_taken"), [0], {"exits": [[1], [2]]}, kind="vm"))
    assert dict(vm.figures()) == {}
    gauge = run_of(group_of([replace(GAUGE, name="exit_depth")], [0], {"exit_depth": [[1], [2]]}))
    assert dict(gauge.figures()) == {}


def test_a_figure_whose_parts_no_one_file_has_is_not_there():
    """One kernel has one part and another the other: that is a figure of nobody."""
    x = run_of(
        group_of(counters("halt_successful_poll", "exits"), [0], {"exits": [[1], [2]]}),
        group_of(counters("halt_attempted_poll"), [1], {"halt_attempted_poll": [[1], [2]]}),
    )
    assert set(x.figures()) == {"exits/s", "exits_imbalance"}


PAGES = [replace(GAUGE, name=name) for name in ("pages_4k", "pages_2m", "pages_1g")]


@examples(60)
@given(
    st.lists(st.tuples(*[st.integers(0, 1 << 40)] * 3), min_size=1, max_size=4),
    st.integers(0, 4),
)
def test_large_pages_are_weighed_by_their_size_as_they_were_at_the_end(rows, fails):
    """Of bytes mapped, how many by pages of 2 MiB and 1 GiB; of a file that failed as it was last read."""
    values = {stat.name: np.array([[row[i]] for row in rows]) for i, stat in enumerate(PAGES)}
    end = min(fails, len(rows))
    for column in values.values():
        column[end:] = 77  # means nothing
    failed = [(1, end)] if end < len(rows) else []
    x = run_of(
        group_of(counters("exits"), [0], {"exits": np.zeros((len(rows), 1))}),
        group_of(PAGES, [1], values, kind="vm"),
        failed=failed,
    )
    small, *large = rows[end - 1] if end else (0, 0, 0)
    large = large[0] * 2**21 + large[1] * 2**30
    share = ratio(large, small * 2**12 + large)
    figure = x.figures()["large_page_share"]
    assert figure.values.tolist() == pytest.approx([share], rel=1e-12, nan_ok=True)
    assert figure.files == (x.files[1],)
    assert set(x.figures()) == {"large_page_share", "exits/s", "exits_imbalance"}
    assert "large_page_share" not in x.vcpu.figures()


@pytest.mark.parametrize("name", ["pages_4k", "pages_2m", "pages_1g"])
@pytest.mark.parametrize("below", [1, 2**40, 2**63])
def test_a_count_of_pages_below_0_has_no_share(name, below):
    """KVM's counters are signed inside: one that fell below 0 is no count of 2^64 pages. Other VMs keep their share."""
    values = {stat.name: np.array([[512, 512]], np.uint64) for stat in PAGES}
    values[name][0, 0] = 2**64 - below
    share = run_of(group_of(PAGES, [0, 1], values, kind="vm")).figures()["large_page_share"].values.tolist()
    assert math.isnan(share[0])
    assert share[1] == (2**21 + 2**30) / (2**12 + 2**21 + 2**30)


def test_pages_of_one_size_alone_say_nothing():
    """PowerPC counts large pages, but not the small ones: no share."""
    for arch in ("powerpc-book3s", "arm64", "s390"):
        with SyntheticStats(arch, "vm") as made:
            stats = list(made.stats.values())
        values = {stats[0].name: np.ones((2, 1))}
        assert dict(run_of(group_of(stats, [0], values, kind="vm")).figures()) == {}


def test_kernels_that_scale_the_same_statistic_differently_are_each_taken_at_their_word():
    """Nanoseconds of one kernel and microseconds of another are both seconds in a figure."""
    values = {name: [[0], [1000]] for name in HALT_NS}
    coarse = [replace(stat, exponent=-6) for stat in counters(*HALT_NS)]
    x = run_of(group_of(counters(*HALT_NS), [1], values), group_of(coarse, [0], values))
    assert x.figures()["halted_fraction"].values.tolist() == pytest.approx([3e-3, 3e-6])
    assert x.figures()["halted_imbalance"].values[0] == pytest.approx(3e-3 / (3.003e-3 / 2) - 1)


def test_exponents_that_no_float_reaches_break_no_figures():
    """A file with an absurd scale gives an absurd number, not an exception."""
    stats = [replace(counters("exits")[0], exponent=32767), replace(counters("io_exits")[0], exponent=-32768)]
    x = run_of(group_of(stats, [0], {"exits": [[0], [1]], "io_exits": [[0], [1]]}))
    assert x.figures()["exits/s"].values[0] >= 1e270
    assert 0 <= x.figures()["io_exits/s"].values[0] <= 1e-270


def test_the_table_has_a_line_for_each_figure():
    """Sum, min, mean and max of the known values, units, and whose they are; fractions have no sum."""
    x = run_of(group_of(counters("exits"), range(3), {"exits": [[0, 0, 0], [1, 2, 0], [3, 6, 0]]}), failed=[(2, 1)])
    head, exits, imbalance = (line.split() for line in str(x.figures()).splitlines())
    assert head == ["sum", "min", "mean", "max"]
    assert exits == ["exits/s", "4.5", "1.5", "2.25", "3", "1/s", "of", "3", "files:", "exits"]
    assert imbalance[:8] == ["exits_imbalance", "-", *["0.3333"] * 3, "of", "1", "VM:"]
    assert " ".join(imbalance[8:]) == "max / mean - 1 of exits/s in a VM"


def test_exits_by_kind_and_those_of_no_kind_add_up():
    """No exit is left out; what has two kinds makes the rest smaller, never negative; signals are no kind of exit."""
    names = ("exits", "io_exits", "halt_exits", "signal_exits", "request_irq_exits")
    rows = [(10, 4, 3, 5, 5), (10, 10, 3, 0, 0), (10, 0, 0, 99, 0), (0, 0, 0, 7, 7)]
    x = run_of(
        group_of(
            counters(*names),
            range(4),
            {name: [[0] * 4, one] for name, one in zip(names, np.transpose(rows), strict=True)},
        )
    )
    figures = x.figures()
    other = figures["other_exits/s"]
    assert other.values.tolist() == [3, 0, 10, 0]
    assert other.formula == "max(exits - (io_exits + halt_exits), 0)"
    assert other.sum == 13
    (pvm,) = captured("x86_64-6.18-pvm").figures()["other_exits/s"].values
    assert pvm == 1000  # port I/O, which this kind of KVM counts as nothing
    only = run_of(group_of(counters("exits", "signal_exits"), [0], {"exits": [[1], [2]]}))
    assert "other_exits/s" not in only.figures()


#: Of what each fraction is the sum, by the sum of what; of counters in ns both are.
FRACTIONS = {
    "halt_poll_success_ratio": (["halt_successful_poll"], ["halt_attempted_poll"]),
    "halt_poll_time_ratio": (["halt_poll_success_ns"], HALT_NS[1:]),
    "halted_fraction": (HALT_NS, ["elapsed"]),
    "pf_fixed_share": (["pf_fixed"], ["pf_taken"]),
}


@examples(100)
@given(mixed_runs(), st.sampled_from(["vm", "host"]))
def test_figures_of_a_vm_are_those_of_all_its_files_together(drawn, by):
    """A rate is what all count, by the time that any is read; a fraction that of the sums; a host is all its VMs."""
    x, rows = mixed_run(drawn, "block")
    x.files = tuple(replace(info, vm=f"vm-{i % 2}") for i, info in enumerate(x.files))
    changes = [
        {name: changed(values) if len(values) > 1 else math.nan for name, values in of_file.items()}
        | {"elapsed": time * 10**9 if len(next(iter(of_file.values()))) > 1 and time else math.nan}
        for of_file, time in rows
    ]
    of_files, figures = x.figures(), x.figures(by=by)
    assert set(figures) == {name for name in of_files if by == "vm" or not name.endswith("_imbalance")}
    for name, figure in figures.items():
        each = of_files[name]
        if name.endswith("_imbalance"):
            np.testing.assert_array_equal(figure.values, each.values)
            continue
        members = {}
        for place, info in enumerate(each.files):
            members.setdefault(info.vm if by == "vm" else info.host, []).append(place)
        assert (figure.labels, figure.files, figure.formula) == (tuple(members), (), each.formula)
        assert figure.hosts == ("here",) * len(members)
        expected = []
        for places in members.values():
            if name.endswith("/s"):
                # What each counted, also one that was read twice at one time, which has no rate of its own.
                counted = [expected_of_vcpu(rows[x.files.index(each.files[place])][0], 1)[name] for place in places]
                known = [count for count in counted if not math.isnan(count)]
                whose = each.files[places[0]]
                beside = [
                    of_file["elapsed"] / 1e9
                    for info, of_file in zip(x.files, changes, strict=True)
                    if (by == "host" or info.vm == whose.vm) and not math.isnan(of_file["elapsed"])
                ]
                expected.append(sum(known) / max(beside) if known and beside else math.nan)
                continue
            parts = [changes[x.files.index(each.files[place])] for place in places]
            sums = [[sum(of_file[part] for part in some) for some in FRACTIONS[name]] for of_file in parts]
            sums = [pair for pair in sums if not any(map(math.isnan, pair))]
            expected.append(ratio(*map(sum, zip(*sums, strict=True))) if sums else math.nan)
        np.testing.assert_allclose(figure.values, expected, rtol=1e-9, err_msg=name)


def test_figures_are_plain_python_and_frames_and_html():
    """All have every value and whose it is; what is not defined is None, NaN, or a dash."""
    exits = {"exits": [[0, 0, 0], [10, 1000, 30]], "io_exits": [[0, 0, 0], [1, 2, 3]]}
    pages = {stat.name: [[5], [512]] for stat in PAGES}
    x = run_of(
        group_of(counters("exits", "io_exits"), range(3), exits),
        group_of(PAGES, [3], pages, kind="vm"),
        failed=[(2, 1)],
    )
    x.files = tuple(
        replace(info, vm=vm, vcpu_id=vcpu)
        for info, vm, vcpu in zip(x.files, ("<web>", "db", "db", "db"), (0, 0, 1, None), strict=True)
    )
    figures = x.figures()
    plain = figures.to_dict()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert plain["exits/s"] == {
        "units": "1/s",
        "formula": "exits",
        "sum": 1010.0,
        "of": ["<web>/0", "db/0", "db/1"],
        "values": [10.0, 1000.0, None],
    }
    assert plain["exits_imbalance"]["of"] == ["<web>", "db"]
    assert plain["large_page_share"]["sum"] is None
    frame = figures.to_pandas()
    assert list(frame.columns) == list(figures)
    assert frame.index.names == ["host", "vm", "vcpu"]
    assert frame["exits/s"].dropna().to_dict() == {("here", "<web>", 0): 10, ("here", "db", 0): 1000}
    assert frame["exits_imbalance"].dropna().to_dict() == {("here", "<web>", -1): 0, ("here", "db", -1): 0}
    assert frame.loc[("here", "db", -1), "large_page_share"] == figures["large_page_share"].values[0]
    assert (frame.attrs["units"]["exits/s"], frame.attrs["formulas"]["exits/s"]) == ("1/s", "exits")
    by_vm = x.figures(by="vm").to_pandas()
    assert by_vm.index.names == ["host", "vm"]
    assert by_vm.loc[("here", "db"), "exits/s"] == 1000
    assert x.figures("host").to_pandas()["exits/s"].to_dict() == {"here": 1010}
    html = figures._repr_html_()
    assert html.count("<tr>") == 1 + len(figures)
    assert "exits/s" in html
    x.files = tuple(replace(info, vm="web", vcpu_id=0) for info in x.files)
    assert sorted(x.figures().to_pandas()["exits/s"].dropna()) == [10, 1000]
    none = x[:0].vm.select("pages_4k").figures()
    assert (none.to_dict(), len(none.to_pandas()), "no figures" in none._repr_html_()) == ({}, 0, True)
    with pytest.raises(ValueError, match="by is 'guest'; it must be one of 'host', 'vm', 'vcpu'"):
        x.figures("guest")


def test_imbalance_is_of_each_vm():
    """Over its own vCPUs: a busy VM beside an idle one is not uneven, and the figure says whose each value is."""
    exits = {"exits": [[0, 0, 0, 0, 0], [10, 1000, 30, 1000, 0]]}
    x = run_of(group_of(counters("exits"), range(5), exits), failed=[(4, 0)])
    x.files = tuple(replace(info, vm=vm) for info, vm in zip(x.files, ("web", "db", "web", "db", "gone"), strict=True))
    figures = x.figures()
    assert figures["exits_imbalance"].vms == ("web", "db", "gone")
    np.testing.assert_allclose(figures["exits_imbalance"].values, [0.5, 0, math.nan])
    assert figures["exits/s"].vms == ("web", "db", "web", "db", "gone")
    assert "of 3 VMs: max / mean - 1" in str(figures)


def test_a_run_of_a_sampler_has_figures_too(resources):
    """Files of two kernels and a VM, read by the C core, one of which is closed meanwhile."""
    new, newer = (resources.enter_context(SyntheticStats(vcpu_id=vcpu_id)) for vcpu_id in (0, 1))
    old = resources.enter_context(SyntheticStats(layout="v2", vcpu_id=2))
    vm = resources.enter_context(SyntheticStats(kind="vm"))
    files = [resources.enter_context(made.open()) for made in (old, vm, new, newer)]
    sampler = kf.Sampler(files)
    parts = []
    for _ in range(3):
        parts.append(sampler.run(0, count=1))
        old.add("exits", 10)
        for one in (new, newer):
            one.add("exits", 30)
            one.add("halt_wait_ns", 1000)
        vm.set("pages_4k", 512)
        vm.set("pages_2m", 3)
        files[3].close()
    x = kf.Samples.concatenate(parts)
    figures = x.figures()
    seconds = (int(x.time[-1]) - int(x.time[0])) / 1e9
    exits = figures["exits/s"]
    assert exits.files == (x.files[0], x.files[2], x.files[3])
    np.testing.assert_allclose(exits.values, [20 / seconds, 60 / seconds, math.nan])
    assert figures["exits_imbalance"].values.tolist() == pytest.approx([0.5])
    assert figures["halted_fraction"].files == x.files[2:]
    np.testing.assert_allclose(figures["halted_fraction"].values, [2e-6 / seconds, math.nan])
    assert figures["large_page_share"].values.tolist() == [0.75]


# ---- duty cycle


def polled(columns, failed=()):
    """A run that read these 0s and 1s, (T, n), of a boolean."""
    return run_of(group_of([BOOLEAN], range(np.shape(columns)[1]), {"blocking": columns}), failed=failed)


def chains(n, sweeps, duty, stay, seed):
    """So many chains of 0 and 1 of that duty cycle, whose neighbours have the correlation `stay`: (T, n)."""
    random = np.random.default_rng(seed)
    state = random.random(n) < duty
    rows = []
    for _ in range(sweeps):
        rows.append(state)
        state = np.where(random.random(n) < stay, state, random.random(n) < duty)
    return np.array(rows, np.uint64)


@pytest.mark.parametrize("confidence", [0.8, 0.95])
@pytest.mark.parametrize(("sweeps", "stay"), [(200, 0), (400, 0), (400, 0.5), (1500, 0.9), (6000, 0.98)])
@pytest.mark.parametrize("duty", [0.1, 0.5])
def test_the_interval_contains_the_true_duty_cycle_as_often_as_it_promises(sweeps, stay, duty, confidence):
    """Over many chains, however correlated, that is as often as the confidence says; nor is it much wider."""
    n = 500
    seen = polled(chains(n, sweeps, duty, stay, seed=7)).duty_cycle("blocking", confidence)
    covered = np.mean((seen.low <= duty) & (duty <= seen.high))
    assert abs(covered - confidence) < 0.05, covered
    np.testing.assert_array_less(seen.low - 1e-12, seen.fraction)
    np.testing.assert_array_less(seen.fraction, seen.high + 1e-12)


def test_the_fraction_is_of_the_sweeps_before_a_file_failed():
    """The zeros from then on are not readings; a file without any has NaN."""
    columns = np.array([[1, 1, 0], [1, 0, 0], [0, 1, 0], [0, 1, 0]])
    columns[2:, 1] = 0
    seen = polled(columns, failed=[(1, 2), (2, 0)]).duty_cycle("blocking")
    assert seen.fraction.tolist()[:2] == [0.5, 0.5]
    assert [math.isnan(part[2]) for part in seen] == [True] * 3
    assert [part.shape for part in seen] == [(3,)] * 3
    alone = polled(columns[:2, 1:2]).duty_cycle("blocking")
    assert [part[1] for part in seen] == [part[0] for part in alone]
    nothing = polled(columns)[:0].duty_cycle("blocking")
    assert np.isnan(nothing).all()
    assert np.shape(nothing) == (3, 3)


@pytest.mark.parametrize("value", [0, 1])
def test_what_never_changed_is_certain_only_as_far_as_it_was_seen(value):
    """All 0 or all 1: the bounds are those of that many independent sweeps, and shrink with more."""
    z2 = 1.959963984540054**2
    widths = []
    for sweeps in (1, 10, 1000):
        fraction, low, high = (part[0] for part in polled(np.full((sweeps, 1), value)).duty_cycle("blocking"))
        assert fraction == value
        assert high - low == pytest.approx(z2 / (sweeps + z2))
        assert (low if value == 0 else high) == pytest.approx(value, abs=1e-12)
        assert 0 <= low <= high <= 1
        widths.append(high - low)
    assert sorted(widths, reverse=True) == widths
    for sweeps in range(1, 40):  # no rounding leads out of 0 to 1
        seen = polled(np.full((sweeps, 1), value)).duty_cycle("blocking", 0.5)
        assert 0 <= seen.low[0] <= seen.high[0] <= 1


def test_independent_sweeps_have_wilsons_interval_and_alternating_ones_no_better():
    """10 of 40, and as wide when they alternate; a higher confidence is wider."""
    column = np.array([1, 0, 0, 0] * 10)[:, None]
    seen = polled(column).duty_cycle("blocking")
    assert (seen.low[0], seen.high[0]) == (pytest.approx(0.14187, abs=1e-4), pytest.approx(0.40194, abs=1e-4))
    wider = polled(column).duty_cycle("blocking", 0.99)
    assert wider.low[0] < seen.low[0] < seen.fraction[0] == 0.25 < seen.high[0] < wider.high[0]
    bunched = polled(np.sort(column, axis=0)).duty_cycle("blocking")
    assert bunched.low[0] < seen.low[0] < seen.high[0] < bunched.high[0]


@pytest.mark.parametrize(
    ("stat", "why"),
    [
        (COUNTER, "it is cumulative, not instant"),
        (replace(COUNTER, type=kf.StatType.PEAK), "it is peak, not instant"),
        (replace(COUNTER, type=9), "it is 9, not instant"),
        (replace(GAUGE, unit=kf.StatUnit.BYTES, base=kf.StatBase.POW2, exponent=10), "its unit is KiB"),
        (replace(GAUGE, unit=9), "its unit is unit 9"),
        (replace(GAUGE, exponent=3), r"its unit is 10\^3"),
        (replace(GAUGE, size=2), "it has 2 values"),
        (replace(BOOLEAN, type=kf.StatType.LINEAR_HIST, size=2, bucket_size=1), "it has 2 values"),
        (GAUGE, "2 was read"),
        (BOOLEAN, "2 was read"),
    ],
)
def test_what_is_not_a_boolean_has_no_duty_cycle_and_the_message_says_why(stat, why):
    """A wrong type, unit or shape, or a value that no boolean has, is a ValueError that names the statistic."""
    values = np.array([[1], [2], [0]])
    if stat.shape:
        values = np.zeros((3, 1, 2))
    x = run_of(group_of([replace(stat, name="odd")], [0], {"odd": values}))
    with pytest.raises(ValueError, match=f"^odd is not a boolean: {why}$"):
        x.duty_cycle("odd")


@pytest.mark.parametrize("name", ["blocking", "guest_mode", "of_the_future"])
def test_kernels_before_6_0_have_booleans_without_a_unit(name):
    """An instant value without unit that only read 0 and 1 has the duty cycle of the same values marked as boolean."""
    column = np.array([1, 0, 0, 1, 1, 1])[:, None]
    old = run_of(group_of([replace(GAUGE, name=name)], [0], {name: column})).duty_cycle(name)
    assert old == polled(column).duty_cycle("blocking")
    assert old.fraction.tolist() == [4 / 6]


def test_a_confidence_is_between_0_and_1():
    """Anything else is refused by name, and so is a statistic that was not sampled."""
    x = polled(np.ones((2, 1)))
    for confidence in (0, 1, -0.5, 95, math.nan):
        with pytest.raises(ValueError, match=f"confidence is {confidence}"):
            x.duty_cycle("blocking", confidence)
    for confidence in ("0.9", None, [0.9]):
        with pytest.raises(TypeError, match=r"confidence is a .*; it must be a number from 0 to 1"):
            x.duty_cycle("blocking", confidence)
    with pytest.raises(KeyError, match="did you mean blocking"):
        x.duty_cycle("blockin")


# ---- halt polling

BUCKETS = 32
HISTOGRAMS = ("halt_poll_success_hist", "halt_poll_fail_hist", "halt_wait_hist")
LOG = replace(NS, type=kf.StatType.LOG_HIST, size=BUCKETS)
POLL_STATS = [*(replace(LOG, name=name) for name in HISTOGRAMS), *counters(*HALT_NS)]


def bucket_of(value):
    """fls64(value), the last bucket open."""
    return min(value.bit_length(), BUCKETS - 1)


def halted(vcpus, stats=POLL_STATS):
    """Values of a run before and after these halts, (duration, poll limit) of each vCPU, as KVM counts them."""
    values = {stat.name: np.zeros((2, len(vcpus), *stat.shape), np.uint64) for stat in stats}

    def add(what, vcpu, time):
        if f"{what}_hist" in values:
            values[f"{what}_hist"][1, vcpu, bucket_of(time)] += np.uint64(1)
        if f"{what}_ns" in values:
            values[f"{what}_ns"][1, vcpu] += np.uint64(time)

    for vcpu, halts in enumerate(vcpus):
        for duration, limit in halts:
            if duration < limit:
                add("halt_poll_success", vcpu, duration)
                continue
            if limit:
                add("halt_poll_fail", vcpu, limit)
            add("halt_wait", vcpu, duration - limit)
    return group_of(stats, range(len(vcpus)), values)


_edges = st.builds(lambda power, by: max((1 << power) + by, 0), st.integers(0, 33), st.sampled_from([-1, 0, 1]))
DURATIONS = st.one_of(_edges, st.integers(0, 1000), st.integers(0, 1 << 34))
LIMITS = st.one_of(st.just(0), st.just(10_000), st.sampled_from([1, 20_000, 200_000]), _edges, st.integers(0, 10**6))
SETTINGS = st.one_of(st.just(0), _edges, st.integers(0, 10**6), st.sampled_from([2**32, 2**62, 2**63 - 1]))


@st.composite
def vcpus_with_halts(draw):
    """Draw vCPUs with halts: each with a poll limit of its own, some vCPUs with the same one always."""
    vcpus = []
    for _ in range(draw(st.integers(1, 3))):
        limits = draw(st.one_of(st.just(LIMITS), LIMITS.map(st.just)))
        vcpus.append(draw(st.lists(st.tuples(DURATIONS, limits), max_size=12)))
    return vcpus


ROUNDING = 1e-12


@examples(120)
@given(
    vcpus_with_halts(), st.lists(SETTINGS, min_size=1, max_size=6), st.integers(1, 10**12), st.sampled_from([0, 10**15])
)
def test_advice_contains_what_each_setting_would_have_done(vcpus, settings, elapsed, start):
    """For every candidate the true fractions caught, cost and lost lie between the bounds, whatever the limits were."""
    advice = run_of(halted(vcpus), times=[start, start + elapsed]).halt_poll_advice(settings)
    halts = [halt for of_vcpu in vcpus for halt in of_vcpu]
    durations = [duration for duration, _ in halts]
    time = elapsed * len(vcpus)
    assert advice.halts == len(halts)
    assert advice.rows["halt_poll_ns"].tolist() == settings
    polls = [min(duration, limit) for duration, limit in halts]
    assert advice.poll == pytest.approx(sum(polls) / time)
    if halts:
        assert advice.caught == sum(duration < limit for duration, limit in halts) / len(halts)
    else:
        assert math.isnan(advice.caught)
    for row in advice.rows:
        setting = int(row["halt_poll_ns"])
        caught = sum(duration < setting for duration in durations)
        true = {
            "caught": caught / len(halts) if halts else math.nan,
            "poll": sum(min(duration, setting) for duration in durations) / time,
            "vain": (len(halts) - caught) * setting / time,
        }
        for what, number in true.items():
            low, high = row[f"{what}_low"], row[f"{what}_high"]
            if math.isnan(number):
                assert np.isnan([low, high]).all()
            else:
                assert low * (1 - ROUNDING) <= number <= high * (1 + ROUNDING), (what, setting)
    ordered = np.sort(advice.rows, order="halt_poll_ns")
    for name in ("caught_low", "caught_high", "poll_low", "poll_high"):
        assert (np.diff(ordered[name]) >= -ROUNDING * np.abs(ordered[name][1:])).all() or not halts, name
    assert str(advice).count("\n") == (2 + len(settings) if halts else 0)
    cheap = [row for row in advice.rows if halts and row["vain_high"] <= 0.01]
    assert advice.best == min((-row["caught_low"], int(row["halt_poll_ns"])) for row in cheap)[1] if cheap else True
    assert (advice.best is None) == (not cheap)


def naive_bounds(vcpus, setting):
    """Bounds of caught halts and of cost in ns, from buckets as ints: each halt by the buckets it was counted in."""

    def bucket(value):
        index = bucket_of(value)
        return (1 << index >> 1 if index else 0), (1 << index if index < BUCKETS - 1 else math.inf)

    halts = [halt for of_vcpu in vcpus for halt in of_vcpu]
    waits = [(duration, limit) for duration, limit in halts if duration >= limit]
    polls = [bucket(limit) for _, limit in waits if limit]
    least = min(polls)[0] if polls and len(polls) == len(waits) else 0
    most = max(polls)[1] if polls else 0
    ranges = [bucket(duration) for duration, limit in halts if duration < limit]
    ranges += [(bucket(d - limit)[0] + least, bucket(d - limit)[1] + most) for d, limit in waits]
    caught = sum(high <= setting for _, high in ranges), sum(low < setting for low, _ in ranges)
    return caught, tuple(
        sum(min(edge, setting) for edge in edges) for edges in (*zip(*ranges, strict=True),) or ((), ())
    )


@examples(120)
@given(vcpus_with_halts(), st.one_of(_edges, st.builds(int.__add__, _edges, _edges), st.integers(0, 10**6)))
@example([[(7, 1)]], 3)
@example([[(7, 1)] * 2, [(70_000, 40_000)]], 1024 + 65536)
@example([[(3, 1)]], 6)
def test_advice_is_no_vaguer_than_the_buckets(vcpus, setting):
    """The bounds are the tightest that follow from each bucket's edges and those of all polls together."""
    (row,) = run_of(halted(vcpus), times=[0, 10**9]).halt_poll_advice([setting]).rows
    caught, cost = naive_bounds(vcpus, setting)
    halts = sum(map(len, vcpus))
    if not halts:
        return
    assert [row["caught_low"], row["caught_high"]] == [count / halts for count in caught]
    time = 1e9 * len(vcpus)
    assert [row["poll_low"], row["poll_high"]] == pytest.approx([number / time for number in cost], rel=1e-12)
    vain = [(halts - count) * setting / time for count in reversed(caught)]
    assert [row["vain_low"], row["vain_high"]] == pytest.approx(vain, rel=1e-12)


def test_advice_is_exact_where_buckets_leave_no_doubt():
    """Settings at bucket edges catch exactly what is below; what is longer costs exactly the setting."""
    vcpus = [[(0, 1000)] * 3 + [(600, 1000)] * 5, [(70_000, 0)] * 4 + [(10**6, 0)] * 8]
    x = run_of(halted(vcpus), times=[0, 10**9])
    rows = x.halt_poll_advice([0, 1, 512, 1024, 65536, 131072, 1 << 20]).rows
    assert rows["caught_low"].tolist() == rows["caught_high"].tolist() == [0, *[n / 20 for n in (3, 3, 8, 8, 12, 20)]]
    assert (rows["poll_low"][:3] == rows["poll_high"][:3]).tolist() == [True, False, False]
    assert rows["poll_low"][2] == pytest.approx(17 * 512 / 2e9)
    np.testing.assert_allclose(rows["vain_low"], rows["vain_high"])
    np.testing.assert_allclose(rows["vain_low"][:3], [0, 17 / 2e9, 17 * 512 / 2e9])
    # No polling at all, and every halt longer than any setting.
    long = run_of(halted([[(1 << 30, 0)] * 7]), times=[0, 10**9]).halt_poll_advice([0, 77, 200_000]).rows
    assert long["poll_low"].tolist() == long["poll_high"].tolist() == pytest.approx([0, 7 * 77e-9, 7 * 2e-4])
    assert long["caught_high"].tolist() == [0, 0, 0]
    assert long["vain_low"].tolist() == pytest.approx(long["poll_low"].tolist())


def test_advice_has_default_settings_and_a_table():
    """From 0 to 2 ms; the table has a line a setting, and percentages."""
    advice = run_of(halted([[(600, 1000)] * 3 + [(10**6, 2000)]]), times=[0, 10**9]).halt_poll_advice()
    assert advice.rows["halt_poll_ns"].tolist() == [0, *(n * 1000 for n in (10, 25, 50, 100, 200, 500, 1000, 2000))]
    lines = str(advice).splitlines()
    assert lines[0].startswith("4 halts; as it was set, polling caught 75.0 % of them")
    assert lines[1] == "2000000 catches most of the settings that poll in vain for at most 1 % of the vCPUs' time"
    assert len(lines) == 12
    assert "75.0 to 75.0 %" in lines[4]


def test_advice_without_a_halt_is_one_sentence():
    """As text and in a notebook; a table would have nothing but dashes."""
    advice = run_of(halted([[]]), times=[0, 10**9]).halt_poll_advice()
    text = "no halt was counted, so there is nothing that polling could have caught"
    assert str(advice) == text
    assert str(replace(advice, present=200_000)) == f"{text}; halt_poll_ns is 200000 now"
    assert advice._repr_html_() == f"<p>{text}</p>"


def test_advice_names_the_setting_that_catches_most_for_at_most_so_much_in_vain():
    """The least of equals; a tighter limit takes a smaller one, down to none at all."""
    halts = [(600, 1000)] * 30 + [(40_000, 1000)] * 20 + [(10**9, 0)] * 50
    x = run_of(halted([halts]), times=[0, 10**9])
    assert x.halt_poll_advice().best == 100_000
    assert x.halt_poll_advice(most_vain=0.001).best == 10_000
    assert x.halt_poll_advice(most_vain=0).best == 0
    assert x.halt_poll_advice([500, 10_000], most_vain=1e-9).best is None
    assert x.halt_poll_advice(reversed([2_000_000, 1_000_000]), most_vain=1).best == 1_000_000
    assert run_of(halted([[]]), times=[0, 10**9]).halt_poll_advice().best is None
    for wrong, error in ((1.5, ValueError), ("1 %", TypeError), (math.nan, ValueError)):
        with pytest.raises(error, match="most_vain is"):
            x.halt_poll_advice(most_vain=wrong)


def test_advice_says_what_is_set_on_this_host_now(monkeypatch, tmp_path):
    """As KVM's module parameter says; nothing of another host, or where it cannot be read."""
    parameter = tmp_path / "halt_poll_ns"
    monkeypatch.setattr(halt_poll, "PARAMETER", parameter)
    here = run_of(halted([[(5, 9)]]), host=os.uname().nodename)
    assert here.halt_poll_advice().present is None
    parameter.write_text("123456\n")
    assert here.halt_poll_advice().present == 123_456
    assert "; halt_poll_ns is 123456 now" in str(here.halt_poll_advice())
    assert run_of(halted([[(5, 9)]]), host="there").halt_poll_advice().present is None
    parameter.write_text("many")
    assert here.halt_poll_advice().present is None


def test_advice_is_plain_python_and_a_frame_and_html():
    """With every row, and what is not defined as None."""
    advice = run_of(halted([[(600, 1000)] * 3, []], POLL_STATS[:3]), times=[0, 10**9]).halt_poll_advice([0, 1024])
    plain = advice.to_dict()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert (plain["halts"], plain["caught"], plain["poll"], plain["best"]) == (3, 1.0, None, 1024)
    assert [row["halt_poll_ns"] for row in plain["rows"]] == [0, 1024]
    frame = advice.to_pandas()
    assert frame["caught_low"].to_dict() == {0: 0.0, 1024: 1.0}
    assert (frame.attrs["best"], frame.attrs["halts"]) == (1024, 3)
    assert advice._repr_html_().count("<tr>") == 3
    nothing = run_of(halted([[]])).halt_poll_advice([7])
    assert nothing.to_dict()["rows"][0]["caught_low"] is None


def test_advice_needs_all_three_histograms():
    """None without one of them; without the _ns counters there is advice, but no cost as it was."""
    for missing in HISTOGRAMS:
        stats = [stat for stat in POLL_STATS if stat.name != missing]
        assert run_of(halted([[(5, 9)]], stats)).halt_poll_advice() is None
    alone = run_of(halted([[(5, 9)]], POLL_STATS[:3])).halt_poll_advice()
    assert (alone.halts, alone.caught, math.isnan(alone.poll)) == (1, 1.0, True)
    vm = group_of(POLL_STATS[:3], [0], {"halt_wait_hist": np.zeros((2, 1, BUCKETS))}, kind="vm")
    assert run_of(vm).halt_poll_advice() is None
    with SyntheticStats("arm64") as made:
        stats = list(made.stats.values())
    assert run_of(group_of(stats, [0], {"exits": [[1], [2]]})).halt_poll_advice() is None


def test_advice_of_no_time_and_of_no_halts_is_not_defined():
    """One sweep or none: NaN where there is nothing to divide by, and no warning."""
    x = run_of(halted([[(5, 9), (9, 5)]]), times=[0, 10**9])
    for part in (x[:0], x[:1]):
        advice = part.halt_poll_advice([0, 10])
        assert advice.halts == 0
        assert np.isnan([advice.caught, advice.poll, *advice.rows[0].tolist()[1:]]).all()
    idle = run_of(halted([[]]), times=[0, 10**9]).halt_poll_advice([10])
    assert np.isnan(idle.rows["caught_low"]).all()
    assert idle.rows["poll_high"].tolist() == idle.rows["vain_high"].tolist() == [0]
    assert idle.poll == 0


def test_a_file_that_failed_counts_with_its_time_until_then():
    """Halts and time end where it failed; one that failed at once counts with neither."""
    group = halted([[(5, 9)] * 4, [(5, 9)] * 2, [(5, 9)]])
    values = np.concatenate([group.values, group.values[1:], group.values[1:]])
    values[2:, 1] = 0
    values[:, 2] = 0
    x = run_of(replace(group, values=values), times=[0, 10**9, 2 * 10**9, 4 * 10**9], failed=[(1, 2), (2, 0)])
    advice = x.halt_poll_advice([4])
    assert advice.halts == 6
    assert advice.rows["poll_low"][0] == pytest.approx(6 * 4e-9 / 5)
    assert advice.poll == pytest.approx(6 * 5e-9 / 5)


def test_vcpus_of_a_kernel_without_the_histograms_do_not_thin_the_advice():
    """Neither their time nor their halts are in it; kernels with other numbers of buckets are added up."""
    alone = halted([[(5, 9), (3000, 9)]])
    without = group_of(counters(*HALT_NS, "exits"), [1], {"halt_wait_ns": [[0], [9]]})
    some = group_of(POLL_STATS[:2], [1], {HISTOGRAMS[0]: [[[0] * BUCKETS], [[1] * BUCKETS]]})
    expected = run_of(alone).halt_poll_advice()
    for other in (without, some):
        mixed = run_of(alone, other).halt_poll_advice()
        assert (mixed.halts, mixed.caught, mixed.poll) == (expected.halts, expected.caught, expected.poll)
        assert mixed.rows.tolist() == expected.rows.tolist()
    few = [replace(stat, size=4) for stat in POLL_STATS[:3]]
    short = group_of(few, [1], {name: [[[0] * 4], [[0, 0, 1, 0]]] for name in HISTOGRAMS})
    both = run_of(alone, short).halt_poll_advice([4])
    assert both.halts == 4
    assert both.rows["caught_low"].tolist() == both.rows["caught_high"].tolist() == [0.25]


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ([], ValueError),
        ([-1], ValueError),
        ([5, -3], ValueError),
        ([2**63], ValueError),
        ([0.0002], TypeError),
        ("100", TypeError),
        ([None], TypeError),
    ],
)
def test_settings_are_whole_nanoseconds(settings, error):
    """None at all, negative ones, fractions (seconds, by mistake), text and what no int64 holds are refused by name."""
    x = run_of(halted([[(5, 9)]]))
    with pytest.raises(error, match="settings"):
        x.halt_poll_advice(settings)


def test_settings_may_be_numpys_and_in_any_order():
    """Rows are in the order that was asked for."""
    rows = run_of(halted([[(5, 9)]])).halt_poll_advice(np.array([9, 0, 3])).rows
    assert rows["halt_poll_ns"].tolist() == [9, 0, 3]
    assert Counter(rows["caught_high"].tolist()) == {1.0: 1, 0.0: 2}
