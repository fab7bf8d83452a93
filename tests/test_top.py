"""kvmstats top without its screen: what was counted, rows and columns, the page of a VM, where samples come from."""

import io
import threading
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from helpers import until
from holder import Holder
from made_vms import S, moved, vm

import kvmstats_fast as kf
from kvmstats_fast import cli
from kvmstats_fast.testing import exit_counter, make_samples
from kvmstats_fast.top.counted import WholeCounted, add, bridge, count
from kvmstats_fast.top.feed import Feed, FilesFeed, HostFeed, Replay, overlapping
from kvmstats_fast.top.model import Model
from kvmstats_fast.top.page import make_page, vcpus_of
from kvmstats_fast.top.table import Who, fits, globs, make_table

CAPTURES = Path(__file__).parent / "data" / "captures" / "x86_64-6.1"


def parts(samples, edges):
    """Samples cut at some sweeps, each with the last of those before."""
    return [samples[start : stop + 1] for start, stop in pairwise(edges)]


def table_of(counted, by="vm", events=()):
    """A table of what was counted."""
    return make_table(counted, by, events)


# ---- what was counted


@pytest.mark.parametrize("by", ["vm", "vcpu"])
def test_what_was_counted_bit_by_bit_is_what_the_whole_run_counted(by):
    """Figures of a run that was added up chunk by chunk are those of the run.

    But for when in it a vCPU was halted: of halts that were under way from chunk to chunk more is known.
    """
    run = moved([*vm("web", 3), *vm("db", 1)], 12)
    counted = ()
    for part in parts(run, [0, 1, 2, 7, 11]):
        counted = add(counted, count(part))
    got = kf_figures(counted, by)
    wanted = run.figures(by)
    assert got.keys() == wanted.keys()
    for name in wanted:
        if name not in ("halted_share", "other_share"):
            np.testing.assert_allclose(got[name].values, wanted[name].values, rtol=1e-9, err_msg=name)


def kf_figures(counted, by):
    """Figures of what was counted."""
    from kvmstats_fast.analysis.formulas import figures_of  # noqa: PLC0415

    return figures_of(WholeCounted(counted, "vcpu"), WholeCounted(counted, "vm"), by)


def test_who_stays_keeps_its_counts_while_others_come_and_go():
    """Of a VM that went nothing is kept, one that comes begins at 0, and one that comes back is another one."""
    web, db, new = vm("web"), vm("db"), vm("new")
    counted = add((), count(moved([*web, *db], 5, 1)))
    before = dict(
        zip(map(str, WholeCounted(counted, "vcpu").files), WholeCounted(counted, "vcpu").change("exits"), strict=True)
    )
    later = moved([*new, *web], 3, 2)
    counted = add(counted, count(later))
    whole = WholeCounted(counted, "vcpu")
    got = dict(zip(map(str, whole.files), whole.change("exits"), strict=True))
    now = dict(zip(map(str, later.columns("exits")), later.total("exits"), strict=True))
    assert set(got) == {"new/0", "new/1", "web/0", "web/1"}
    assert [got[one] for one in ("web/0", "web/1")] == [before[one] + now[one] for one in ("web/0", "web/1")]
    assert [got[one] for one in ("new/0", "new/1")] == [now[one] for one in ("new/0", "new/1")]
    assert dict(zip(map(str, whole.files), whole.seconds, strict=True)) == {
        "new/0": 2,
        "new/1": 2,
        "web/0": 6,
        "web/1": 6,
    }
    counted = add(counted, count(moved([*web, *db], 3, 3)))
    whole = WholeCounted(counted, "vcpu")
    assert dict(zip(map(str, whole.files), whole.seconds, strict=True))["db/0"] == 2


@pytest.mark.parametrize("files", [["web"], ["new", "web"], ["web", "new", "db"]])
def test_what_happens_between_samples_of_other_files_is_counted(files):
    """Whoever is in both counts on over the gap, in which it may have been cleared; whoever comes begins there."""
    whole = moved([one for name in ("web", "new", "db") for one in vm(name)], 20)
    before, after = whole[:8].select(vm=["web", "db"]), whole[11:].select(vm=files)
    counted = bridge(now := count(before), count(after))
    for name in files:
        for kind in ("vm", "vcpu"):
            got = WholeCounted(counted, kind)
            wanted = WholeCounted(count((whole[7:] if name in before.vms else after).select(vm=name)), kind)
            rows = [row for row, info in enumerate(got.files) if info.vm == name]
            for stat in wanted.names:
                assert got.change(stat)[rows].tolist() == wanted.change(stat).tolist(), (name, stat)
            assert got.seconds[rows].tolist() == wanted.seconds.tolist()
            if kind == "vcpu":
                assert (got.halted()[rows] <= got.seconds[rows]).all()
    cleared = bridge(count(after.select(vm="web")), count(moved(vm("web"), 3, start_time=100 * S)))
    assert WholeCounted(cleared, "vcpu").seconds.tolist() == [100 - 19 + 2] * 2
    assert bridge(count(after), now) == now


def test_a_file_that_failed_counts_no_further_and_is_marked():
    """Its rates are over the time that it was read."""
    run = moved(vm("web"), 5)
    failed = make_samples(vm("web"), {"exits": run["exits"]}, errors=[kf.SampleError(1, 3, OSError())])
    whole = WholeCounted(count(failed), "vcpu")
    assert whole.seconds.tolist() == [4, 2]
    assert whole.change("exits").tolist() == [
        (run["exits"][4] - run["exits"][0])[0],
        (run["exits"][2] - run["exits"][0])[1],
    ]
    assert table_of(count(failed), "vcpu").failed == [False, True]
    assert table_of(count(failed)).failed == [False]


# ---- rows and columns


def test_rows_are_in_the_order_of_any_column():
    """The largest first, reversed the smallest; what is not known is last both times, and names are natural."""
    table = table_of(count(moved([*vm("vm10", 3), *vm("vm9"), *vm("vm1"), *vm("x")], 4)))
    assert [table.rows[at].label for at in table.order("name")] == ["vm1", "vm9", "vm10", "x"]
    assert [table.rows[at].label for at in table.order("name", reverse=True)] == ["x", "vm10", "vm9", "vm1"]
    for column in table.columns:
        values = table.column(column.name)
        down, up = table.order(column.name), table.order(column.name, reverse=True)
        assert sorted(values[down], reverse=True) == values[down].tolist()
        assert sorted(values[up]) == values[up].tolist()
        assert sorted(down) == sorted(up) == [0, 1, 2, 3]
    table.values[1] = np.nan
    assert table.order("exits/s")[-1] == table.order("exits/s", reverse=True)[-1] == 1


@pytest.mark.parametrize(
    ("patterns", "rows"),
    [
        ((), ["db", "web-1", "web-2"]),
        (("web-*",), ["web-1", "web-2"]),
        (("WEB-1",), ["web-1"]),
        (("web",), []),
        (globs("WEB"), ["web-1", "web-2"]),
        (globs("2 db"), ["db", "web-2"]),
        (globs("77"), ["db"]),
        (globs("nothing"), []),
    ],
)
def test_guests_are_chosen_by_globs_and_at_the_prompt_by_parts_of_names_and_pids(patterns, rows):
    """Any of several; case does not matter."""
    table = table_of(count(moved([*vm("web-1", pid=1000), *vm("web-2", pid=1001), *vm("db", pid=77)], 2)))
    assert [table.rows[at].label for at in table.order("name", patterns)] == rows


def test_statistics_are_chosen_by_globs_and_at_the_prompt_by_parts_of_names():
    """Counts are rates, times are shares of the time; nothing is there twice; a name is that and no part of others."""
    counted = count(moved(vm("web"), 3))
    names = {
        column.name: column.form
        for column in table_of(counted, "vm", globs("[him]*_exits t_wait")).columns
        if column.is_kind
    }
    assert names == {"io_exits/s": "rate", "halt_exits/s": "rate", "mmio_exits/s": "rate", "halt_wait_ns/s": "share"}
    columns = table_of(counted, "vcpu", globs("exits")).columns
    assert len({column.name for column in columns}) == len(columns)
    assert [one.name for one in table_of(counted, "vcpu", ("io_exits", "exits")).columns if one.is_kind] == [
        "io_exits/s"
    ]
    wait = table_of(counted, "vcpu", globs("wait_ns")).column("halt_wait_ns/s")
    assert (wait * 2 == WholeCounted(counted, "vcpu").change("halt_wait_ns")).all()
    assert not fits("io", "halt_exits")
    assert fits("[hi]*", "io_exits")


@pytest.mark.parametrize("by", ["vm", "vcpu"])
@pytest.mark.parametrize("events", [(), ("*",)])
def test_a_table_fits_any_width(by, events):
    """Titles and rows are no wider than the terminal, and line up; the column that it is sorted by is always there."""
    files = [*vm("a-guest-with-a-name-that-is-much-longer-than-anybody-would-like", 3), *vm("客户机", 1)]
    model = Model()
    model.by, model.events = by, events
    model.take(moved(files, 3))
    model.advance()
    table = model.table()
    for width in (20, 33, 50, 80, 120, 200, 300):
        for sort in ("name", "exits/s", "halt_poll_success_ratio"):
            layout = table.fit(width, sort, model.weights)
            lines = [*layout.head(table, sort, reverse=False)]
            lines += ["".join(text for text, _ in layout.line(table, row)) for row in range(len(table.rows))]
            assert {kf._text.display_width(line) for line in lines} == {kf._text.display_width(lines[1])}
            assert kf._text.display_width(lines[1]) <= width or width < 33
            assert sort == "name" or width < 33 or sort in {table.columns[place].name for place in layout.places}
    shown = {table.columns[place].title for place in table.fit(80, "exits/s", model.weights).places}
    assert shown >= {"exits", "halted"}


def test_a_click_on_a_title_finds_its_column():
    """Every place of a title is that of its column."""
    table = table_of(count(moved(vm("web"), 3)))
    layout = table.fit(80, "exits/s", {"io_exits/s": 1})
    titles = layout.head(table, "exits/s", reverse=False)[1]
    for title, name in (("VM", "name"), ("exits▼", "exits/s"), ("io", "io_exits/s"), ("halted", "halted_share")):
        at = titles.index(title)
        assert {layout.find(table, x) for x in (at, at + len(title) - 1)} == {name}
    assert layout.find(table, len(titles)) is None


def test_kinds_of_exits_that_there_are_most_of_come_first_and_do_not_hop():
    """Where there is room for one, a kind that is more for once does not take its place."""
    files = vm("web", 1)
    model = Model()
    shown = []
    for at, (some, halts) in enumerate([(100, 5), (100, 5), (100, 5), (0, 120), (100, 5), (5, 900), (5, 900)]):
        both = {"exits": [[0], [some + halts]], "io_exits": [[0], [some]], "halt_exits": [[0], [halts]]}
        model.take(make_samples(files, both, start=f"2026-01-01T00:00:{at:02}Z"))
        model.advance()
        table = model.table()
        layout = table.fit(40, "exits/s", model.weights)
        shown.append([column.title for column in (table.columns[p] for p in layout.places) if column.is_kind])
    assert [kinds[:1] for kinds in shown] == [["io"]] * 5 + [["halt"]] * 2


def test_a_frame_shows_what_came_since_the_one_before():
    """However many chunks that is; a reset begins anew, and what was shown of the last interval stays."""
    run = moved(vm("web", 1), 7)
    chunks = parts(run, [0, 1, 2, 4, 6])
    model = Model()
    assert not model.advance()
    for chunk, rates in zip((chunks[:1], chunks[1:3], chunks[3:]), ((0, 1), (1, 4), (4, 6)), strict=True):
        for one in chunk:
            model.take(one)
        assert model.advance()
        first, last = rates
        wanted = (int(run["exits"][last, 0]) - int(run["exits"][first, 0])) / (last - first)
        assert model.table().column("exits/s").tolist() == [wanted]
    model.is_total = True
    assert model.table().column("exits/s").tolist() == [(run["exits"][6, 0] - run["exits"][0, 0]) / 6]
    assert not model.advance()
    model.reset()
    model.take(run[5:])
    model.advance()
    assert model.table().column("exits/s").tolist() == [float(run["exits"][6, 0] - run["exits"][5, 0])]


def test_a_vm_that_comes_is_shown_at_once_and_the_others_keep_their_rates():
    """The first sweep says only that it is there."""
    model = Model()
    model.take(moved(vm("web"), 3))
    model.advance()
    before = model.table().column("exits/s").tolist()
    model.take(moved([*vm("web"), *vm("new")], 1))
    model.advance()
    table = model.table()
    assert [who.label for who in table.rows] == ["web", "new"]
    assert table.column("exits/s")[0] == before[0]
    assert np.isnan(table.column("exits/s")[1])
    model.forget()
    model.advance()
    assert not model.table().rows
    assert (model.vms, model.vcpus) == (0, 0)


# ---- the page of a VM


def test_the_page_of_a_vm_has_its_statistics_and_histograms():
    """Narrow ones have the bars below, wide ones beside; a vCPU has its own; what did not move is left out."""
    run = moved([*vm("web", 2), *vm("db", 1)], 3, 1)
    counted = count(run)
    who = Who("here", "web", None, 1, "web")
    assert vcpus_of(counted, who) == [0, 1]
    narrow = make_page(counted, counted, who, 80)
    total = run.select(vm="web")
    exits = int(total.total("exits").sum())
    (line,) = [line for line in narrow if line.startswith("exits ")]
    assert line.split() == ["exits", f"{exits:,}", f"{exits / 2:,.1f}/s"]
    assert not [line for line in narrow if "signal" in line]
    hist = total.histogram("halt_wait_hist").sum()
    (title,) = [line for line in narrow if line.startswith("halt_wait_hist")]
    assert f"{int(hist.count):,} values" in title
    described = narrow[narrow.index(title) + 1]
    assert f"50 % < {kf._text.format_si(hist.quantile(0.5)[1], 's')}" in described
    assert f"mean {kf._text.format_si(hist.mean, 's')}" in described
    assert sum("█" in line for line in narrow) == 32
    assert max(map(len, narrow)) <= 80
    wide = make_page(counted, counted, who, 200)
    assert max(map(len, wide)) <= 200
    assert len(wide) < len(narrow) - 10
    one = make_page(counted, counted, who.of(1), 80)
    exits = int(total.select(vcpu=1).total("exits")[0])
    assert [line.split()[1] for line in one if line.startswith("exits ")] == [f"{exits:,}"]
    assert [line for line in make_page(counted, counted, who, 80, globs("signal")) if line.startswith("signal_exits")]
    assert make_page((), (), who, 80)[-2:] == ["nothing changed yet", ""]


def test_a_vm_of_which_one_thread_is_known_has_one_page():
    """Its vCPUs are of two kinds then, and what they counted is added up as if they were of one."""
    run = moved(vm("web", 2), 3, 1)
    counted = count(run)
    (vcpus,) = [part for part in counted if part.kind == "vcpu"]
    parted = (*(part for part in counted if part is not vcpus), vcpus.take([0]), vcpus.take([1]))
    who = Who("here", "web", None, 1, "web")
    whole = make_page(counted, counted, who, 80)
    assert sum(line.startswith("halt_wait_hist") for line in whole) == 1
    # Where time goes is of the kinds apart: only of some is it known.
    assert [line for line in make_page(parted, parted, who, 80) if ": " not in line] == [
        line for line in whole if ": " not in line
    ]


# ---- where samples come from


def collect(feed, seconds=10):
    """All that a feed gives until it is over."""
    got, over = [], threading.Event()
    feed.start(got.append, over.set)
    assert over.wait(seconds)
    feed.stop()
    return got


def test_overlapping_samples_leave_nothing_out():
    """Each begins with the last sweep of the one before, but where files have changed."""
    run, other = moved(vm("web"), 7), moved(vm("db"), 3)
    cut = [run[:1], run[1:4], run[4:4], run[4:]]
    joined = list(overlapping([*cut, other]))
    assert [len(one) for one in joined] == [1, 4, 4, 3]
    assert sum(int(one.total("exits").sum()) for one in joined[:-1]) == int(run.total("exits").sum())


def test_a_replay_gives_what_was_recorded_step_by_step(tmp_path):
    """At any speed; steps are as long as asked for, where sweeps are not rarer."""
    run = moved(vm("web"), 21)
    run.save(path := tmp_path / "run.npz")
    for interval, steps in ((None, 20), (5.0, 4), (0.1, 20), (100.0, 1)):
        got = collect(Replay([str(path)], interval, 1e6))
        assert len(got) == steps
        assert sum(int(one.total("exits").sum()) for one in got) == int(run.total("exits").sum())


@pytest.mark.parametrize("form", ["run.npz", "run"])
def test_a_replay_is_of_the_vms_that_are_named(tmp_path, form):
    """Of runs that have them; the others are not there."""
    for number, files in enumerate([[*vm("web"), *vm("db")], vm("other"), vm("web")]):
        moved(files, 5).save(tmp_path / f"{number}{form}")
    got = collect(Replay([str(tmp_path / f"{number}{form}") for number in range(3)], None, 1e6, ["w*"]))
    assert [one.vms for one in got] == [("web",)] * 8


@pytest.mark.parametrize("interval", [None, 5.0])
def test_a_replay_tells_each_missed_tick_once(tmp_path, interval):
    """Steps have a sweep in common, and what was missed before it is said by one of them."""
    run = moved(vm("web"), 21)
    run.tick[:] = np.cumsum(np.arange(21) % 3 + 1) - 1
    run.missed = int(run.tick[-1]) - 20
    run.save(path := tmp_path / "run.npz")
    assert sum(one.missed for one in collect(Replay([str(path)], interval, 1e6))) == run.missed


def test_a_replay_takes_recordings_and_stands_still(tmp_path):
    """Paused it gives nothing, a step gives one more, and it goes on; its speed can be changed; it can be stopped."""
    run = moved(vm("web"), 4000)
    with kf.Recorder(tmp_path / "run") as recorder:
        recorder.write(run)
    feed = Replay([str(tmp_path / "run")], None, 1000.0)
    got = []
    feed.pause(is_paused=True)
    feed.start(got.append, lambda: None)
    assert until(lambda: len(got) == 1)
    for number in (2, 3):
        feed.step()
        assert until(lambda number=number: len(got) == number)
    time.sleep(0.05)
    assert len(got) == 3
    feed.pause(is_paused=False)
    assert until(lambda: len(got) > 10)
    feed.change_speed(1e-9)
    assert feed.speed == 1 / 64
    feed.stop()
    assert not feed._thread.is_alive()
    assert not feed.error
    assert len(got) < 3999


def test_what_is_no_recording_is_refused_before_anything_is_shown(tmp_path):
    """Also one that is found out when it is read."""
    (tmp_path / "x.npz").write_bytes(b"no")
    with pytest.raises(FileNotFoundError):
        Replay([str(tmp_path / "nothing")])
    feed = Replay([str(tmp_path / "x.npz")])
    with pytest.raises(kf.KvmStatsError):
        feed.start(lambda _: None, lambda: None)


def test_an_error_ends_a_feed_and_is_kept():
    """It is told, and stopping it does not wait for ever."""

    class Failing(Feed):
        def _run(self):
            self._has_begun.set()
            raise OSError(5, "Input/output error")

        def _wake(self):
            pass

    feed = Failing(1.0)
    over = threading.Event()
    feed.start(lambda _: None, over.set)
    assert over.wait(10)
    assert feed.is_over
    assert feed.error.errno == 5
    feed.stop()


def test_files_are_sampled_at_another_interval_from_one_moment_to_the_next(resources):
    """Each of what is given begins with the last sweep of that before."""
    made = vm("web")
    files = [resources.enter_context(one.open()) for one in made]
    feed = FilesFeed(files, 3600.0)
    got = []
    feed.start(got.append, lambda: None)
    assert until(lambda: got)
    feed.change(0.001)
    assert until(lambda: len(got) > 3)
    made[1].add("exits", 1000)
    assert until(lambda: sum(int(one.total("exits").sum()) for one in got) == 1000)
    feed.stop()
    assert feed.error is None
    assert not feed._thread.is_alive()


@pytest.mark.real_vm
@pytest.mark.filterwarnings("ignore:no sched_")
def test_a_host_is_watched_while_vms_come_and_go():
    """The thread gives what the file of a real vCPU counts, to the last exit, at one interval and then another."""
    with Holder(2, name="first") as first, kf.attach(first.pid) as machine:
        counter, file = exit_counter(), machine.vcpus[1]
        feed = HostFeed([first.pid], 0.02)
        model = Model()
        feed.start(model.take, lambda: None)
        assert until(lambda: model.advance() and model.vcpus == 2)
        assert feed.vms == 1
        model.reset()
        before = file.snapshot()[counter]

        def has_them_all():
            model.advance()
            who = Who(model.last[0].files[0].host, "first", 1, None, "")
            page = make_page(model.last, model.total, who, 80, (counter,))
            shown = [line.split()[1] for line in page if line.split()[:1] == [counter]]
            return shown == [f"{file.snapshot()[counter] - before:,}"]

        first.do("guest.run(1234, 1)")
        assert file.snapshot()[counter] - before >= 1234
        assert until(has_them_all)
        feed.change(0.01)
        first.do("guest.run(66, 1)")
        assert until(has_them_all)
    assert until(lambda: feed.is_over)
    assert feed.vms == 0
    feed.stop()
    assert feed.error is None


# ---- the verb


@pytest.mark.parametrize(
    ("words", "end"),
    [
        (["x.npz", "-g", "webb"], (2, "no VM 'webb' in these files; did you mean web?")),
        (["x.npz", "-e", "exitz"], (2, "no statistic 'exitz' in these files; did you mean exits")),
        ([str(CAPTURES)], (2, "a capture is one reading, which has no rate: top does not go with it")),
        (["nothing"], (1, "nothing: No such file or directory")),
    ],
)
def test_what_a_recording_has_not_is_said_before_anything_is_shown(words, end, tmp_path, monkeypatch, capsys):
    """As the other verbs say it, with their exit status."""
    monkeypatch.chdir(tmp_path)
    status, said = end
    moved(vm("web"), 5).save("x.npz")
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(getattr(__import__("sys"), name), "isatty", lambda: True, raising=False)
    assert cli.main(["top", *words]) == status
    assert said in capsys.readouterr().err


def test_where_there_is_no_terminal_it_says_what_prints_the_same(capsys, monkeypatch):
    """One line, and nothing else happens."""
    monkeypatch.setattr("sys.stdin", io.StringIO())
    assert cli.main(["top"]) == 1
    out, err = capsys.readouterr()
    assert not out
    assert err.count("\n") == 1
    assert "kvmstats stat -I 1s" in err


def test_without_textual_it_says_what_to_install(capsys, monkeypatch):
    """In the form that works from a clone, too."""
    monkeypatch.setitem(__import__("sys").modules, "textual", None)
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(getattr(__import__("sys"), name), "isatty", lambda: True, raising=False)
    assert cli.main(["top"]) == 1
    assert "pip install 'kvmstats-fast[tui]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--speed", "2"], "--speed is for replaying a recording"),
        (["-p", "1", "x.npz"], "give one or the other"),
        (["-n", "0"], "not a number above 0"),
        (["x.npz", "--speed", "-1"], "is not a factor above 0"),
        (["-I", "x"], "is not a time"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments, said, capsys):
    """With exit status 2."""
    try:
        status = cli.main(["top", *arguments])
    except SystemExit as end:
        status = end.code
    assert status == 2
    assert said in capsys.readouterr().err


def test_the_rooms_without_a_screen_import_no_textual():
    """What is shown can be asked for without it."""
    for path in (Path(kf.__file__).parent / "top").glob("*.py"):
        if path.stem not in ("app", "lines", "view", "table_screen", "page_screen"):
            assert "textual" not in path.read_text().replace("textual:", "").replace("import textual.", ""), path
