"""plot.py and curves.py: what is read, what is drawn, and that drawing never hurts a run."""

import errno
import math
import os
import signal
import struct
import sys
from pathlib import Path

import configurator

import numpy as np
import pytest

import plot
import train
from nanogpt import curves
from nanogpt.errors import UserError
from nanogpt.run import RUN_FILES

TINY = "--n_layer=1 --n_head=1 --n_embd=8 --block_size=8 --batch_size=2 --gradient_accumulation_steps=1 --device=cpu".split()
TINY += ["--eval_iters=1", "--max_iters=3"]
HEADER = "iteration,tokens,seconds,train_loss,val_loss,loss,learning_rate,grad_norm,tokens_per_second,mfu\n"  # no bits per byte
ROWS = """\
0,0,0.5,4.2,4.1,,,,,
0,0,0.6,,,4.0,1e-3,1,100,-1
1,64,0.7,,,,1e-3,1,100,-1
2,128,0.8,,,3.5,1e-3,1,100,-1
3,192,1.5,3.3,3.2,,,,,
3,192,1.6,,,3.4,1e-3,1,100,-1
4,256,2.5,3.1,3.3,,,,,
"""
LOG = """\
tokens per iteration will be: 1,024
number of parameters: 0.80M
step 0: train loss 4.2000, val loss 4.1000
saving checkpoint to out
iter 0: loss 4.0000, time 30.12ms, mfu -100.00%
iter 1: loss nan, time 30.12ms, mfu -100.00%
iter 2: loss 3.9000, time 30.12ms, mfu 1.20%\r 10%|#  | 3/30 [00:00]\rstep 3: train loss 3.3000, val loss 9.9000
iter 3: loss 9.0000, time 30.12ms, mfu 1.20%
tokens per iteration will be: 1,024
step 2: train loss 3.4000, val loss 3.5000
iter 2: loss 3.5000, time 30.12ms, mfu 1.20%
"""
NO_NUMBERS = "step 0: train loss nan, val loss nan\niter 0: loss nan, time 30.12ms, mfu -100.00%\n"


@pytest.fixture(autouse=True)
def no_pictures() -> None:
    """Overrides the fixture of conftest.py: these tests do draw."""


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "out-a"
    folder.mkdir()
    (folder / "metrics.csv").write_text(HEADER + ROWS, encoding="utf-8")
    return folder


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "nanogpt.log"
    path.write_text(LOG, newline="", encoding="utf-8")
    return path


def drawn(*runs: curves.Run, x: str = "iterations", log: str = "none", y: str = "loss"):
    """Draw these runs into an Axes, without a file."""
    from matplotlib.figure import Figure

    axes = Figure(layout="constrained").add_subplot()
    curves.fill(axes, list(runs), x, log, y)
    axes.figure.canvas.draw()
    return axes


def a_run(train: list[float], val: list[float], name: str = "a") -> curves.Run:
    xs = [np.arange(len(values), dtype=float) for values in (train, val)]
    return curves.Run(name, xs[0], np.array(train, dtype=float), xs[1], np.array(val, dtype=float))


def size(path: Path) -> tuple[int, int]:
    """Return the width and height of a complete PNG."""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and data[-8:-4] == b"IEND"
    return struct.unpack(">II", data[16:24])


# what is read


@pytest.mark.parametrize(
    ("x", "at"), [("iterations", [0, 1, 2, 3]), ("tokens", [0, 64, 128, 192]), ("seconds", [0.6, 0.7, 0.8, 1.6])]
)
@pytest.mark.parametrize("name", ["out-a", "out-a/metrics.csv"])
def test_read_metrics_csv(x: str, at: list[float], name: str, run_folder: Path) -> None:
    """Catches an evaluation's training loss taken for a batch's, a gap that shifts later rows, and a wrong column."""
    run = curves.read(run_folder.parent / name, x)
    assert run.name == "out-a"
    np.testing.assert_array_equal(run.train, [4.0, math.nan, 3.5, 3.4])
    assert (run.train_x.tolist(), run.val.tolist()) == (at, [4.1, 3.2, 3.3])
    assert run.val_x.tolist() == {"iterations": [0, 3, 4], "tokens": [0, 192, 256], "seconds": [0.5, 1.5, 2.5]}[x]
    assert run.val[curves.best_of(run)] == 3.2


def add_bits_per_byte(folder: Path) -> None:
    """Give the last evaluation bits per byte, as if a newer version had resumed the run."""
    *first, last = ROWS.splitlines()
    rows = [f"{row},," for row in first] + [f"{last},2.25,2.5"]
    header = HEADER.rstrip() + ",train_bits_per_byte,val_bits_per_byte"
    (folder / "metrics.csv").write_text("\n".join([header, *rows, ""]), encoding="utf-8")


def test_bits_per_byte_on_the_y_axis(run_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Catches losses in nats under the label of bits, points of rows without them, and a loss.png that is overwritten."""
    add_bits_per_byte(run_folder)
    run = curves.read(run_folder, "tokens", "bits_per_byte")
    assert [list(found) for found in (run.train_x, run.train, run.val_x, run.val)] == [[256], [2.25], [256], [2.5]]
    assert drawn(run, y="bits_per_byte").get_ylabel() == "bits per byte"
    assert drawn(curves.read(run_folder)).get_ylabel() == "loss (nats per token)"
    plot.main(configurator.parse(plot.Config, [str(run_folder), "--y=bits_per_byte"]))
    assert capsys.readouterr().out.splitlines()[0] == "out-a: best val bits per byte 2.5000 at 4 iterations"
    assert sorted(path.name for path in run_folder.iterdir()) == ["bits_per_byte.png", "metrics.csv"]
    assert "bits_per_byte.png" in RUN_FILES  # set aside with the run


def test_run_without_bits_per_byte(run_folder: Path, log: Path) -> None:
    """Catches an empty picture, a traceback, or nats, for a run of an older version or a log."""
    for path in (run_folder, log):
        with pytest.raises(UserError, match=r"(metrics.csv|nanogpt.log): no bits per byte in it: .*; use --y=loss$"):
            plot.main(configurator.parse(plot.Config, [str(path), "--y=bits_per_byte"]))


@pytest.mark.parametrize(("x", "each"), [("iterations", 1), ("tokens", 1024)])
def test_read_nanogpt_log(x: str, each: int, log: Path) -> None:
    """Catches lines missed behind a progress bar, and iterations drawn twice after a resume."""
    run = curves.read(log, x)
    np.testing.assert_array_equal(run.train, [4.0, math.nan, 3.5])
    assert run.train_x.tolist() == [0, each, 2 * each]
    assert (run.val_x.tolist(), run.val.tolist()) == ([0, 2 * each], [4.1, 3.5])
    assert run.name == "nanogpt.log"


@pytest.mark.parametrize("content", [LOG.encode("utf-16"), LOG.encode("utf-16") + b"\n", b"\xff\n" + LOG.encode()])
def test_log_in_another_encoding(content: bytes, log: Path) -> None:
    """Catches a log that Windows PowerShell has written in UTF-16, or one with a damaged byte, that is taken for empty."""
    log.write_bytes(content)
    np.testing.assert_array_equal(curves.read(log).train, [4.0, math.nan, 3.5])


def test_read_our_log(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches printed lines of train.py that read_log no longer understands."""
    config = configurator.parse(train.Config, [*TINY, f"--dataset={dataset}", f"--out_dir={tmp_path / 'out'}"])
    train.main(config)
    (tmp_path / "log").write_text(capsys.readouterr().out, encoding="utf-8")
    for x in ("iterations", "tokens"):
        one, other = curves.read(tmp_path / "out", x), curves.read(tmp_path / "log", x)
        assert (len(one.train), len(one.val)) == (3, 2)
        for field in ("train_x", "train", "val_x", "val"):
            np.testing.assert_allclose(getattr(one, field), getattr(other, field), atol=1e-4)
    assert size(tmp_path / "out" / "loss.png") == (1200, 675)


def test_log_without_the_x_axis(log: Path) -> None:
    """Catches an x axis with invented times or tokens."""
    with pytest.raises(UserError, match="does not contain the seconds"):
        curves.read(log, "seconds")
    log.write_text(LOG.replace("tokens per", "words per"), encoding="utf-8")
    with pytest.raises(UserError, match="does not contain the tokens"):
        curves.read(log, "tokens")


@pytest.mark.parametrize("text", ["", HEADER, HEADER + "0,0,0.5,4.2", '"', '"' * 200_001, "iter 5: lost", NO_NUMBERS])
def test_file_without_losses(text: str, tmp_path: Path) -> None:
    """Catches an empty picture, and a traceback for a run that has just started."""
    (tmp_path / "metrics.csv").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"metrics.csv: no losses in it"):
        curves.read(tmp_path)


def test_damaged_metrics_csv(run_folder: Path) -> None:
    """Catches a traceback for a damaged file."""
    (run_folder / "metrics.csv").write_text(HEADER + ROWS.replace("3.5", "three"), encoding="utf-8")
    with pytest.raises(UserError, match=r"metrics.csv is damaged: .*three"):
        curves.read(run_folder)


HOSTILE = {
    "numbers": "iter 1: loss 1.2.3, time\niter 2: loss ..., time\nstep 3: train loss 1.2.3, val loss 4.5.6\n",
    "digits": f"iter {'9' * 5000}: loss 4.0, time\niter 1: loss {'9' * 5000}, time\ntokens per iteration: {'9' * 5000}\n",
    "commas": "tokens per iteration: ,,,\niter 1: loss 4.0, time\n",
    "iteration": f"iter {'9' * 15}: loss 4.0, time\nstep {'9' * 15}: train loss 4.0, val loss 3.5\n",
    "negative": "iter 0: loss -4.0, time\niter 1: loss -3.0, time\nstep 1: train loss -1.0, val loss -2.0\n",
    "binary": "\0\ufffd" * 1000 + LOG,
    "point": "iter 0: loss 4.0, time\n",
    "huge row": HEADER + f"0,0,0.5,{'9' * 5000},1e308,,,,,\n0,0,0.6,,,1e308,1e-3,1,100,-1\n1,9,0.7,,,4.0,1e-3,1,100,-1\n",
    "no numbers": HEADER + "0,0,0.5,nan,inf,,,,,\n0,0,0.6,,,-inf,1e-3,1,100,-1\n1,9,0.7,,,4.0,1e-3,1,100,-1\n",
    "all huge": HEADER + "0,0,0.5,1e308,1e308,,,,,\n0,0,0.6,,,1e308,1e-3,1,100,-1\n",
    "huge x": HEADER
    + f"{'9' * 400},1e308,1e300,4.0,4.0,,,,,\n1,inf,0.6,,,4.0,1e-3,1,100,-1\n{'9' * 5000},nan,1,4.0,4.0,,,,,\n",
    "far x": HEADER + "999999999999999999,0,1e18,4.0,4.0,,,,,\n",
    "small": HEADER + "0,0,0.5,1e-300,1e-300,,,,,\n1,9,0.6,,,4.0,1e-3,1,100,-1\n",
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize(("x", "log"), [("iterations", "none"), ("iterations", "xy"), ("tokens", "y"), ("seconds", "x")])
@pytest.mark.filterwarnings("error")
def test_hostile_file(name: str, x: str, log: str, tmp_path: Path) -> None:
    """Catches a traceback or a NumPy warning for numbers that nothing can draw."""
    path = tmp_path / ("metrics.csv" if HOSTILE[name].startswith(HEADER) else "log")
    path.write_text(HOSTILE[name], encoding="utf-8")
    try:
        plot.main(configurator.parse(plot.Config, [str(path), f"--x={x}", f"--log={log}", f"--out={tmp_path / 'a.svg'}"]))
    except UserError as error:
        assert "no losses in it" in str(error) or "does not contain" in str(error) or "needs a positive" in str(error)
    else:
        assert (tmp_path / "a.svg").stat().st_size > 1000


def test_damaged_numbers_are_gaps(tmp_path: Path) -> None:
    """Catches a point in the wrong place, or a good one that is lost to a damaged one beside it."""
    (tmp_path / "log").write_text(
        "iter 1: loss 1.2.3, t\niter 2: loss 4.5, t\niter 3: loss nan, t\niter 4: loss -0.5, t\n", encoding="utf-8"
    )
    run = curves.read(tmp_path / "log")
    np.testing.assert_array_equal((run.train_x, run.train), ([2, 3, 4], [4.5, math.nan, -0.5]))


@pytest.mark.parametrize("log", ["x", "y", "xy"])
def test_log_axis_without_positive_values(log: str, tmp_path: Path) -> None:
    """Catches an empty picture."""
    (tmp_path / "log").write_text("iter 0: loss -1.0, t\n", encoding="utf-8")
    with pytest.raises(UserError, match=rf"--log={log}: .* needs a positive [xy], got none"):
        plot.main(configurator.parse(plot.Config, [str(tmp_path / "log"), f"--log={log}"]))


def test_runs_of_one_name(log: Path) -> None:
    """Catches two curves that nobody can tell apart, and a longer name for a run that needs none."""
    names = ["a/1/run", "b/1/run", "b/2/run/metrics.csv", "b/other", "a/x.log", "b/x.log"]
    for name in names:
        path = log.parent / name
        if not path.suffix:
            path.mkdir(parents=True, exist_ok=True)
            path /= "metrics.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(HEADER + ROWS if path.suffix == ".csv" else LOG, encoding="utf-8")

    def named(*names: str) -> list[str]:
        return [Path(run.name).as_posix() for run in curves.read_all([log.parent / name for name in names])]

    assert named(*names) == ["a/1/run", "b/1/run", "b/2/run", "other", "a/x.log", "b/x.log"]
    assert named("a/1/run", "b/2/run") == ["1/run", "2/run"]
    assert named("a/1/run", "a/1/run/metrics.csv", "a/x.log") == ["run", "run", "x.log"]


@pytest.mark.parametrize("name", ["a, b", "it's", "\x1b[31mred", "tab\tname", "x" * 200])
def test_odd_names(name: str, log: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Catches a name that is split at its comma, or that sends an escape sequence to the terminal."""
    monkeypatch.chdir(log.parent)
    log.rename(log.parent / name)
    (log.parent / "b").write_text(LOG, encoding="utf-8")
    for arguments, count in (([name], 1), ([name, "b"], 2), ([f"--runs={name}"], 1), (["--runs=b,b", name], 3)):
        plot.main(configurator.parse(plot.Config, arguments))
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == count + 1 and all(line.isprintable() for line in lines)


# what is drawn


@pytest.mark.parametrize("half", [0, 1, 3, 100])
def test_smooth_is_a_moving_average(half: int) -> None:
    """Catches a curve shifted sideways, and a NaN that spoils everything after it."""
    values = np.random.default_rng(1).normal(3, 1, 60)
    values[[5, 6, 40]] = math.nan
    values[20:40] = math.nan
    for i, found in enumerate(curves.smooth(values, half)):
        left = min(half, i // 4)
        near = values[i - left : i + min(left, len(values) - 1 - i) + 1]
        good = near[np.isfinite(near)]
        assert found == pytest.approx(good.mean() if 2 * len(good) >= len(near) else math.nan, nan_ok=True), i


def test_envelope_keeps_extremes() -> None:
    """Catches spikes that thinning a long line loses."""
    y = np.random.default_rng(1).normal(3, 0.1, 99_999)
    y[[17, 50_000]] = 9, math.nan
    x, short = curves.envelope(np.arange(len(y)), y)
    assert len(x) == len(short) <= 4000
    assert (np.nanmax(short), np.nanmin(short)) == (9, np.nanmin(y))
    assert x[np.nanargmax(short)] == pytest.approx(17, abs=25)
    assert curves.envelope(np.arange(10), y[:10])[1] is not None and len(curves.envelope(np.arange(10), y[:10])[1]) == 10


def test_best_evaluation_is_marked() -> None:
    """Catches a mark on the wrong evaluation, or on another run's curve."""
    axes = drawn(a_run([4, 3, 2], [4, 2.25, 3]), a_run([4, 3, 2], [5, 4, 1.5], "b"))
    marked = [line.get_xydata().tolist() for line in axes.get_lines() if line.get_markersize() == 8]
    assert marked == [[[1, 2.25]], [[2, 1.5]]]
    texts = [text.get_text() for text in axes.get_legend().get_texts()]
    assert texts == ["a, best 2.250", "b, best 1.500", "training", "validation"]
    axes = drawn(a_run([4, 3, 2] * 50, [4, 2.25, 3]))
    texts = [text.get_text() for text in axes.get_legend().get_texts()]
    assert texts == ["training, smoothed", "validation", "best: 2.250"]
    assert axes.get_title(loc="left") == "a"


@pytest.mark.parametrize(
    ("train", "dots"), [([4], [0]), ([4, math.nan, 3], [0, 2]), ([4, 3, math.nan, 2, math.nan], [3]), ([4, 3, 2], [])]
)
def test_single_points_are_seen(train: list[float], dots: list[int]) -> None:
    """Catches the training loss of a run that has logged one batch, or the one between two NaNs, in a line of no length."""
    dotted = [line for line in drawn(a_run(train, [])).get_lines() if line.get_markersize() == 3]
    assert [line.get_xdata().tolist() for line in dotted] == [dots]


def test_outliers_do_not_set_the_scale() -> None:
    """Catches one outlier batch that sets the scale of the y axis."""
    low, high = drawn(a_run([20 if i == 500 else 2 + i % 2 / 10 for i in range(1000)], [2.5, 2.0])).get_ylim()
    assert 1.9 < low < 2 and 2.5 < high < 3


@pytest.mark.filterwarnings("ignore:Data has no positive values")
@pytest.mark.parametrize("log", ["none", "x", "y", "xy"])
@pytest.mark.parametrize("x", ["iterations", "tokens"])
@pytest.mark.parametrize(
    ("train", "val"),
    [
        ([3.0], []),
        ([], [3.0]),
        ([math.nan] * 3, [4, 3]),
        ([4, 3, 2], [math.nan, 2]),
        ([0, 0, 0], [0, 0]),
        ([1e-9, 1e9], [0.5]),
        ([4, 3] * 60, [4, 3] * 40),
    ],
)
def test_odd_runs(train: list[float], val: list[float], x: str, log: str, tmp_path: Path) -> None:
    """Catches an exception for a run that is very short, has NaNs or reaches zero loss."""
    drawn(a_run(train, val), x=x, log=log)
    drawn(a_run([4, 3, 2], [3]), a_run(train, val), x=x, log=log)


@pytest.mark.parametrize("x", ["seconds", "tokens"])
def test_units_of_the_x_axis(x: str) -> None:
    """Catches an x axis with unreadably many zeros."""
    run = a_run([4, 3], [4, 3])
    run.train_x, run.val_x = run.train_x * 7e9, run.val_x * 7e9
    axes = drawn(run, x=x)
    unit, label = {"seconds": (3600, "hours"), "tokens": (1e9, "billion tokens")}[x]
    assert axes.get_xlabel() == label
    assert axes.get_lines()[0].get_xdata()[-1] == pytest.approx(7e9 / unit)
    assert drawn(run, x=x, log="x").get_xlabel() == x  # a log axis keeps the unit, and starts at 1


@pytest.mark.parametrize("name", ["_hidden", "$\\frac$", "$", "名前"])
def test_run_names_are_plain_text(name: str, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    """Catches a run name that matplotlib takes for a formula or hides."""
    curves.draw([a_run([4, 3], [4, 3], name), a_run([4, 3], [4, 3])], tmp_path / "a.png")
    curves.draw([a_run([4, 3], [4, 3], name)], tmp_path / "a.svg")
    assert size(tmp_path / "a.png") == (1200, 675)
    assert "</svg>" in (tmp_path / "a.svg").read_text(encoding="utf-8")
    assert not recwarn.list


def test_drawing_leaves_matplotlib_alone(run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches drawing that imports pyplot, changes the user's rcParams, or depends on them."""
    import matplotlib

    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it is an error now
    runs = [curves.read(run_folder)]
    with matplotlib.rc_context({"axes.facecolor": "red"}):
        curves.draw(runs, tmp_path / "one.png")
        assert matplotlib.rcParams["axes.facecolor"] == "red"
    curves.draw(runs, tmp_path / "two.png")
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()


# the command


@pytest.mark.parametrize(
    ("arguments", "picture"),
    [
        (["--out_dir=out-a"], "out-a/loss.png"),
        (["out-a"], "out-a/loss.png"),
        (["out-a", "nanogpt.log"], "curves.png"),
        (["--runs=out-a,nanogpt.log", "out-a/metrics.csv", "--x=tokens", "--log=y", "--out=two.svg"], "two.svg"),
        (["nanogpt.log", "--out=ours.PNG"], "ours.PNG"),
    ],
)
def test_command(
    arguments: list[str], picture: str, run_folder: Path, log: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """Catches a picture in another place than printed, and a run that is left out."""
    monkeypatch.chdir(run_folder.parent)
    before = {path for path in run_folder.parent.rglob("*")}
    plot.main(configurator.parse(plot.Config, arguments))
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"curves in {picture}"
    names = [name for name in ("out-a", "nanogpt.log") if any(name in argument for argument in arguments)]
    assert all(any(line.startswith(f"{name}: best val loss 3.") for line in lines) for name in names)
    assert {path for path in run_folder.parent.rglob("*")} - before == {run_folder.parent / picture}


def test_failed_write_keeps_the_old_picture(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a failed write that damages the old picture or leaves a temporary file."""
    curves.draw([curves.read(run_folder)], run_folder / "loss.png")
    before = (run_folder / "loss.png").read_bytes()

    def fail(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="No space"):
        curves.draw([curves.read(run_folder)], run_folder / "loss.png")
    assert sorted(path.name for path in run_folder.iterdir()) == ["loss.png", "metrics.csv"]
    assert (run_folder / "loss.png").read_bytes() == before


def test_failed_write_is_one_line(run_folder: Path) -> None:
    """Catches an error that does not name the file of --out."""
    out = run_folder / "curves.png"
    out.mkdir()
    with pytest.raises(UserError, match=r"--out=.+curves.png: cannot be written"):
        plot.main(configurator.parse(plot.Config, [str(run_folder), f"--out={out}"]))


def test_iterations_have_whole_ticks() -> None:
    """Catches fractional ticks, such as -0.015, for a run with one evaluation."""
    ticks = drawn(a_run([], [3.0])).get_xticks()
    assert list(ticks) == [round(tick) for tick in ticks]


# beside a run


class Clock:
    """A fake clock on which each drawing takes `cost` seconds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cost: float):
        self.now, self.drawn = 100.0, []
        self.cost = cost
        monkeypatch.setattr(curves.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(curves, "draw", self.draw)

    def draw(self, runs: list[curves.Run], path: Path) -> None:
        self.drawn.append(self.now)
        self.now += self.cost


@pytest.mark.parametrize("cost", [0.1, 3.0])
def test_drawing_takes_under_one_percent(cost: float, run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches drawing that slows a run down, and a long run without pictures."""
    clock = Clock(monkeypatch, cost)
    with curves.Curves(run_folder) as drawing:
        for _ in range(2000):
            clock.now += 1
            drawing.update()
            assert len(clock.drawn) <= 1 or len(clock.drawn) * cost <= 0.01 * (clock.now - 100)
        assert clock.drawn[0] == pytest.approx(201, abs=1)  # earlier, importing matplotlib would cost too much
        assert len(clock.drawn) == pytest.approx(0.01 * 2000 / cost, rel=0.2)
        so_far = len(clock.drawn)
    assert len(clock.drawn) == so_far + 1


def test_only_rank_0_draws(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches ranks that all write the same picture."""
    clock = Clock(monkeypatch, 0.1)
    with curves.Curves(run_folder, is_main=False) as drawing:
        clock.now += 1000
        drawing.update()
    assert clock.drawn == []


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), MemoryError(), ValueError("a\nb")])
def test_failed_drawing_is_one_warning(error: Exception, run_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Catches a failed drawing that ends the run, or that warns at every evaluation."""

    def fail(*arguments: object) -> None:
        raise error

    monkeypatch.setattr(curves, "draw", fail)
    with curves.Curves(run_folder) as drawing:
        drawing.draw()
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1 and "loss.png is not drawn: " in warning


def test_nothing_to_draw_is_no_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a warning before there is anything to draw."""
    for text in (None, HEADER):
        if text:
            (tmp_path / "metrics.csv").write_text(text, encoding="utf-8")
        curves.Curves(tmp_path).draw()
    assert capsys.readouterr().err == ""
    assert not (tmp_path / "loss.png").exists()


def test_missing_matplotlib(run_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Catches a traceback, or a failed run, when matplotlib is not installed."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match="pip install matplotlib"):
        curves.draw([curves.read(run_folder)], run_folder / "loss.png")
    curves.Curves(run_folder).draw()
    assert "pip install matplotlib" in capsys.readouterr().err


@pytest.mark.parametrize("ending", ["done", "stopped", "failed", "resumed"])
def test_every_ending_draws(ending: str, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an ending without a picture, and a picture older than the last row."""
    flags = [*TINY, f"--dataset={dataset}", f"--out_dir={tmp_path / 'out'}"]
    drawings = []
    monkeypatch.setattr(curves, "draw", lambda runs, path: drawings.append((len(runs[0].train), len(runs[0].val), path)))

    def run(*more: str) -> None:
        train.main(configurator.parse(train.Config, [*flags, *more]))

    if ending == "done":
        run()
    elif ending == "resumed":
        run("--max_iters=1")
        run("--init_from=resume", "--max_iters=3")
    elif ending == "stopped":
        clip = train.clip_gradient
        monkeypatch.setattr(train, "clip_gradient", lambda *a: signal.raise_signal(signal.SIGTERM) or clip(*a))
        with pytest.raises(SystemExit):
            run()
    else:
        with pytest.raises(UserError, match=r"is (nan|inf)"):
            run("--learning_rate=1e30", "--decay_lr=False")
    rows = {"done": (3, 2), "resumed": (3, 3), "stopped": (1, 1), "failed": (1, 1)}[ending]  # of batches, of evaluations
    assert drawings[-1] == (*rows, tmp_path / "out" / "loss.png")
