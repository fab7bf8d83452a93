"""Plots: what is drawn is what was sampled, and the axes say in what unit."""

from dataclasses import replace

import made
import matplotlib as mpl
import numpy as np
import pytest

mpl.use("Agg")
import matplotlib.pyplot as plt

import kvmstats_fast as kf
from kvmstats_fast import plot

VCPU = made.schema_of(None, "vcpu")


@pytest.fixture(autouse=True)
def _closed():
    """No figure outlives its test."""
    yield
    plt.close("all")


def run(sweeps, files, **about):
    """Samples whose exits grow by 10 a millisecond and file, times the file's number plus one."""
    x = made.samples([("vcpu", VCPU, files)], sweeps, **about)
    x.time[:] = 10**9 + np.arange(sweeps) * 10**6
    x.groups[0].values[:] = 0
    x["exits"][:] = 10 * np.arange(sweeps)[:, None] * (1 + np.arange(files))
    x["halt_wait_ns"][:] = 500_000 * np.arange(sweeps)[:, None]
    return x


def drawn(ax):
    """Label, values and edges of each line of steps."""
    return [(patch.get_label(), *patch.get_data()[:2]) for patch in ax.patches]


def test_rates_are_lines_in_base_units():
    """A line for each vCPU, seconds on one axis and the unit per second on the other."""
    ax = plot.rates(run(11, 2), "exits")
    labels = [label for label, _, _ in drawn(ax)]
    assert labels == ["web/0", "web/1"] == [text.get_text() for text in ax.get_legend().get_texts()]
    for i, (_, values, edges) in enumerate(drawn(ax)):
        assert values.tolist() == pytest.approx([10_000 * (i + 1)] * 10)
        assert edges.tolist() == pytest.approx(np.arange(11) / 1000)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("time since start (s)", "exits (1/s)")
    assert ax.get_ylim()[0] <= 0
    ax = plot.rates(run(11, 1), "halt_wait_ns")
    assert ax.get_ylabel() == "halt_wait_ns (s/s)"
    assert drawn(ax)[0][1].tolist() == pytest.approx([0.5] * 10)


def test_many_sweeps_become_fewer_steps_of_the_same_mean():
    """A screen has about a thousand points: each step's rate is that between its own ends."""
    x = run(10_001, 1)
    x["exits"][:, 0] = np.cumsum(np.arange(10_001) % 7)
    _, values, edges = drawn(plot.rates(x, "exits"))[0]
    assert len(values) == 1000
    at = np.searchsorted(x.time, 10**9 + np.round(edges * 1e9).astype(np.int64))
    assert values.tolist() == pytest.approx((np.diff(x["exits"][at, 0].astype(float)) / np.diff(edges)).tolist())


def test_many_files_become_a_median_and_a_band():
    """Nobody can tell forty lines apart."""
    ax = plot.rates(run(5, 40), "exits")
    (label, middle, _), (band, high, _) = drawn(ax)
    assert (label, band) == ("web: median of 40", "web: least to most")
    assert middle.tolist() == pytest.approx([10_000 * 20.5] * 4)
    assert high.tolist() == pytest.approx([10_000 * 40] * 4)
    assert np.asarray(ax.patches[1].get_data().baseline).tolist() == pytest.approx([10_000] * 4)


@pytest.mark.parametrize("files", [2, 9, 12])
def test_plots_tell_vms_apart(files):
    """Each line, band and row is of one VM and says of which; no band is over vCPUs of two."""
    x = run(5, files)
    x.files = tuple(replace(info, vm="web" if i % 2 else "db", vcpu_id=i // 2) for i, info in enumerate(x.files))
    names = [f"{'web' if i % 2 else 'db'}/{i // 2}" for i in range(files)]
    assert [text.get_text() for text in plot.heatmap(x, "exits").get_yticklabels()] == names
    lines = drawn(plot.rates(x, "exits"))
    if files <= 10:
        assert [label for label, _, _ in lines] == names
        return
    (db, middle, _), _, (web, _, _), (band, high, _) = lines
    assert (db, web, band) == ("db: median of 6", "web: median of 6", "web: least to most")
    assert middle.tolist() == pytest.approx([10_000 * 6] * 4)  # of 1, 3, ..., 11
    assert high.tolist() == pytest.approx([10_000 * 12] * 4)


def test_more_vms_than_anybody_can_tell_apart_share_a_band():
    """The legend says how many they are."""
    x = run(5, 12)
    x.files = tuple(replace(info, vm=f"vm {i}") for i, info in enumerate(x.files))
    assert [label for label, _, _ in drawn(plot.rates(x, "exits"))] == [
        "12 VMs: median of 12",
        "12 VMs: least to most",
    ]


def test_where_a_file_had_failed_nothing_is_drawn():
    """A gap in the line and in the heat map."""
    x = run(6, 2, errors=[kf.SampleError(1, 3, OSError(9, "gone"))])
    gone = drawn(plot.rates(x, "exits"))[1][1]
    assert np.isnan(gone).tolist() == [False, False, True, True, True]
    mesh = plot.heatmap(x, "exits").collections[0].get_array()
    assert np.ma.getmaskarray(mesh).reshape(2, 5)[1].tolist() == [False, False, True, True, True]
    many = run(6, 12, errors=[kf.SampleError(i, 3, OSError(9, "gone")) for i in range(12)])
    assert np.isnan(drawn(plot.rates(many, "exits"))[0][1]).tolist() == [False, False, True, True, True]


def test_a_histogram_has_bars_from_the_first_bucket_in_use_to_the_last():
    """Counts as heights, edges with their unit below, the mean above."""
    x = run(2, 2)
    x["halt_wait_hist"][1, 0, 10] = 3
    x["halt_wait_hist"][1, 1, 13] = 5
    x["halt_wait_ns"][1] = 4096 * 4
    ax = plot.histogram(x.histogram("halt_wait_hist"))
    assert [bar.get_height() for bar in ax.patches] == [3, 0, 0, 5]
    assert [text.get_text() for text in ax.get_xticklabels()] == ["512 ns", "1.02 µs", "2.05 µs", "4.1 µs", "8.19 µs"]
    assert (ax.get_xlabel(), ax.get_title()) == ("halt_wait_hist", "8 counted, mean 4.1 µs")
    x["halt_wait_hist"][1, 0, 31] = 1
    assert [t.get_text() for t in plot.histogram(x.histogram("halt_wait_hist")).get_xticklabels()][-1] == "∞"
    assert plot.histogram(run(2, 1).histogram("halt_wait_hist")).get_title() == "0 counted"


def test_labels_of_neighbouring_edges_differ():
    """Numbers without a unit are written out; with one, what rounds to 1000 has the next prefix."""
    stat = kf.Stat("depth", kf.StatType.LINEAR_HIST, kf.StatUnit.NONE, kf.StatBase.POW10, 0, 300, -1, 5)
    counts = np.zeros(300, np.uint64)
    counts[200] = 1
    ax = plot.histogram(kf.Histogram(stat, counts))
    assert [text.get_text() for text in ax.get_xticklabels()] == ["1000", "1005"]
    hist = run(2, 1).stat("halt_wait_hist")
    ax = plot.histogram(kf.Histogram(hist, np.arange(32) == 20, 999_600))
    assert ax.get_title() == "1 counted, mean 1 ms"


def test_a_heat_map_has_a_row_for_each_vcpu():
    """Rates as colours, the first vCPU on top, the unit at the colour bar."""
    ax = plot.heatmap(run(4, 3), "exits")
    mesh = ax.collections[0]
    assert mesh.get_array().reshape(3, 3).tolist() == [pytest.approx([10_000 * (i + 1)] * 3) for i in range(3)]
    assert [text.get_text() for text in ax.get_yticklabels()] == ["web/0", "web/1", "web/2"]
    assert ax.get_ylim()[0] > ax.get_ylim()[1]
    assert ax.figure.axes[1].get_ylabel() == "exits (1/s)"
    assert len(plot.heatmap(run(4, 300), "exits").get_yticklabels()) <= 24


def test_a_heat_map_tells_a_fall_from_no_change():
    """The colours of what goes up and down reach below 0; those of what only grows begin at 0."""
    assert plot.heatmap(run(4, 3), "exits").collections[0].norm.vmin == 0
    x = run(4, 1, errors=[kf.SampleError(0, 3, OSError(9, "gone"))])
    x["blocking"][:, 0] = [1, 0, 0, 0]
    assert plot.heatmap(x, "blocking").collections[0].norm.vmin == -1000


def test_an_axes_that_is_given_is_drawn_into():
    """No figure is made then."""
    _, ax = plt.subplots()
    for draw, what in ((plot.rates, "exits"), (plot.heatmap, "exits")):
        assert draw(run(4, 2), what, ax) is ax
    assert plot.histogram(run(4, 2).histogram("halt_wait_hist"), ax) is ax
    assert len(plt.get_fignums()) == 1


def test_several_statistics_of_one_unit_share_a_plot():
    """Of different units they are refused, and so are histograms, nothing at all, and less than two sweeps."""
    ax = plot.rates(run(4, 1), ["exits", "io_exits"])
    assert [label for label, _, _ in drawn(ax)] == ["exits, web/0", "io_exits, web/0"]
    assert ax.get_ylabel() == "rate (1/s)"
    with pytest.raises(ValueError, match="different units, 1/s, s/s"):
        plot.rates(run(4, 1), ["exits", "halt_wait_ns"])
    with pytest.raises(ValueError, match=r"plot\.histogram"):
        plot.rates(run(4, 1), "halt_wait_hist")
    with pytest.raises(ValueError, match="names is empty"):
        plot.rates(run(4, 1), [])
    with pytest.raises(ValueError, match="two sweeps"):
        plot.heatmap(run(1, 1), "exits")
    with pytest.raises(KeyError, match="did you mean"):
        plot.rates(run(4, 1), "exit")
