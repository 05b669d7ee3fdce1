"""Loss curves of one or more runs, read from metrics.csv or printed logs and drawn with matplotlib."""

import itertools
import os
import re
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nanogpt import metrics
from nanogpt.corpus import decode_text
from nanogpt.errors import UserError, one_line, warn
from nanogpt.files import atomic_write

# printed lines of train.py and of nanoGPT
LOSS = r"-?\d+(?:\.\d+)?(?![\d.])|nan|inf"
ITER_LINE = re.compile(rf"iter (\d{{1,15}}): loss ({LOSS}),")
STEP_LINE = re.compile(rf"step (\d{{1,15}}): train loss (?:{LOSS}), val loss ({LOSS})")
TOKENS_LINE = re.compile(r"tokens per iteration(?: will be)?: (\d[\d,]{0,20})")
LARGEST_X, LARGEST_LOSS, SMALLEST_LOG_LOSS = 1e18, 1e30, 1e-30  # what is beyond them is damage, and breaks axes
Y_LABELS = {"loss": "loss (nats per token)", "bits_per_byte": "bits per byte"}  # by what `read` takes as y
NOTHING = {  # what is said of a file without them
    "loss": "no losses in it yet; give a metrics.csv, or the printed log of train.py or nanoGPT",
    "bits_per_byte": "no bits per byte in it: logs, runs of older versions and tokens without text have none; use --y=loss",
}
NAME_CHARACTERS = 60  # of a run, in legends
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]  # colorblind-safe (Okabe & Ito 2008)
STYLE = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#999999",
    "axes.labelcolor": "#333333",
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#eeeeee",
    "legend.frameon": False,
    "agg.path.chunksize": 10000,
}
DOTS = {"linestyle": "--", "linewidth": 1, "marker": "o", "markersize": 5}
RING = {"linestyle": "", "marker": "o", "markersize": 8, "markerfacecolor": "white", "markeredgewidth": 1.8, "zorder": 5}


@dataclass
class Run:
    """The losses of one run, in nats per token or bits per byte, and their positions on the x axis."""

    name: str
    train_x: np.ndarray  # (n,)
    train: np.ndarray  # (n,) training loss of each logged batch, or in bits of each evaluation; NaN if it was not finite
    val_x: np.ndarray  # (m,)
    val: np.ndarray  # (m,) validation loss of each evaluation


class NothingToDraw(UserError):
    """The file is missing or has no losses, as when a run has only just started."""


class Curves:
    """Keeps a run's loss.png up to date: redraws it during the run while that is cheap, and at the end of the `with` block."""

    MAX_SHARE = 0.01  # of the run's time so far that drawing may take
    FIRST_DRAW_SECONDS = 1.0  # assumed cost of the first drawing, which imports matplotlib

    def __init__(self, out_dir: Path, is_main: bool = True):
        """Draw the metrics.csv in `out_dir`. Only the main process (rank 0) draws; in the others this does nothing."""
        self._out_dir, self._is_main = out_dir, is_main
        self._started, self._spent, self._has_failed = time.perf_counter(), 0.0, False
        self._expected = self.FIRST_DRAW_SECONDS

    def update(self) -> None:
        """Draw if it keeps within MAX_SHARE of the time."""
        if self._spent + self._expected < self.MAX_SHARE * (time.perf_counter() - self._started):
            self.draw()

    def draw(self) -> None:
        """Draw the losses so far. A failure is a warning, once: no picture is worth a run."""
        started = time.perf_counter()
        try:
            if self._is_main:
                draw([read(self._out_dir)], self._out_dir / "loss.png")
        except NothingToDraw:
            pass
        except Exception as error:
            if not self._has_failed:
                warn(f"{self._out_dir / 'loss.png'} is not drawn: {error or type(error).__name__}")
            self._has_failed = True
        self._expected = time.perf_counter() - started
        self._spent += self._expected

    def __enter__(self) -> "Curves":
        return self

    def __exit__(self, *exception: object) -> None:
        self.draw()


def read_all(paths: list[Path], x: str = "iterations", y: str = "loss") -> list[Run]:
    """`read` each of `paths`. Runs of the same name are named by as many of the folders above them as tell them apart."""
    runs, places = [read(path, x, y) for path in paths], list(map(_place, paths))
    for run, place in zip(runs, places, strict=True):
        same = {other for other in places if other.name == place.name}  # one run may be given twice
        parts = next(n for n in itertools.count(1) if len({other.parts[-n:] for other in same}) == len(same))
        run.name = _legible(str(Path(*place.parts[-parts:])))
    return runs


def read(path: Path, x: str = "iterations", y: str = "loss") -> Run:
    """Read a run from its folder, its metrics.csv or its printed log, with `x` on the x axis and `y` (Y_LABELS) on the other.

    Raises NothingToDraw, a UserError, if there are no losses.
    """
    file = path / "metrics.csv" if path.is_dir() else path
    if not file.is_file():
        raise NothingToDraw(f"{file}: no such file; name run folders, metrics.csv files or logs")
    rows = metrics.read_rows(file)
    if rows:
        column = {"iterations": "iteration"}.get(x, x)
        try:
            train, val = (
                [(float(row[column]), float(row[name])) for row in rows if row[name]] for name in (f"train_{y}", f"val_{y}")
            )
            if y == "loss":  # also known of each logged batch
                train = [(float(row[column]), float(row["loss"] or "nan")) for row in rows if row["learning_rate"]]
        except ValueError as error:
            raise UserError(f"{file} is damaged: {error}") from error
    else:
        train, val = read_log(file, x) if y == "loss" else ([], [])
    run = Run(_legible(_place(path).name), *_within_limits(train), *_within_limits(val))
    if not (np.isfinite(run.train).any() or np.isfinite(run.val).any()):
        raise NothingToDraw(f"{file}: {NOTHING[y]}")
    return run


def _place(path: Path) -> Path:
    """Return the absolute path of a run: its folder, also for its metrics.csv, or its log."""
    file = path / "metrics.csv" if path.is_dir() else path
    return file.resolve().parent if file.name == "metrics.csv" else Path(os.path.abspath(file))


def _legible(name: str) -> str:
    """Return a run's name for legends: one line, cut to NAME_CHARACTERS."""
    return one_line(name)[:NAME_CHARACTERS]


def _within_limits(points: list[tuple[float, float]]) -> tuple[np.ndarray, np.ndarray]:
    """Return x and losses of (x, loss) points, without those beyond LARGEST_X and with NaN for losses beyond LARGEST_LOSS."""
    x, losses = np.array(points, dtype=float, ndmin=2).reshape(-1, 2).T
    losses = np.where(np.abs(losses) <= LARGEST_LOSS, losses, np.nan)
    kept = (x >= 0) & (x <= LARGEST_X)
    return x[kept], losses[kept]


def read_log(path: Path, x: str) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    """Return (x, loss) of each logged batch and of each evaluation in a printed log.

    A resumed run repeats iterations; only the last time counts. Raises UserError if the log does not contain `x`.
    """
    text = decode_text(path.read_bytes(), errors="replace")
    curves = []
    for pattern in (ITER_LINE, STEP_LINE):
        points: list[tuple[float, float]] = []
        for iteration, loss in pattern.findall(text):
            while points and points[-1][0] >= int(iteration):
                points.pop()
            points.append((int(iteration), float(loss)))
        curves.append(points)
    if x == "iterations" or curves == [[], []]:
        return curves[0], curves[1]
    tokens = TOKENS_LINE.search(text)
    if x == "seconds" or tokens is None:
        raise UserError(f"{path}: this log does not contain the {x}; use --x=iterations")
    tokens_per_iteration = int(tokens[1].replace(",", ""))
    return tuple([(iteration * tokens_per_iteration, loss) for iteration, loss in points] for points in curves)


def best_of(run: Run) -> int | None:
    """Return the index of the evaluation with the lowest validation loss, or None if there is none."""
    return int(np.nanargmin(run.val)) if np.isfinite(run.val).any() else None


def smooth(values: np.ndarray, half: int) -> np.ndarray:
    """Centered moving average of (n,) values over up to `half` neighbors on each side, ignoring NaN.

    The window grows from the start, so that the steep first part of a loss curve is not flattened, and is cut at the end.
    Where fewer than half of the window's values are finite, the result is NaN.
    """
    n, good = len(values), np.isfinite(values)
    i = np.arange(n)
    left = np.minimum(i // 4, half)
    right = np.minimum(left, n - 1 - i)
    totals = np.concatenate(([0.0], np.cumsum(np.where(good, values, 0.0))))
    counts = np.concatenate(([0], np.cumsum(good)))
    count = counts[i + right + 1] - counts[i - left]
    return np.where(2 * count > left + right, (totals[i + right + 1] - totals[i - left]) / np.maximum(count, 1), np.nan)


def isolated(values: np.ndarray) -> np.ndarray:
    """Return where finite (n,) values have no finite neighbor, and so no line."""
    good = np.pad(np.isfinite(values), 1)
    return good[1:-1] & ~good[:-2] & ~good[2:]


def envelope(x: np.ndarray, y: np.ndarray, count: int = 2000) -> tuple[np.ndarray, np.ndarray]:
    """Thin out a long line to about 2 * `count` points: the lowest and the highest of each group of neighbors."""
    each = -(-len(x) // count)
    if each <= 2:
        return x, y
    whole = len(x) // each * each
    groups = y[:whole].reshape(-1, each)
    ends = np.stack((np.fmin.reduce(groups, axis=1), np.fmax.reduce(groups, axis=1)), axis=1)
    return np.repeat(x[:whole].reshape(-1, each).mean(axis=1), 2), ends.reshape(-1)


def check_out(out: str) -> None:
    """Raise UserError unless a picture can go to the file `out`."""
    if Path(out).suffix.lower() not in (".png", ".svg"):
        raise UserError(f"--out must end in .png or .svg, got {out}")
    if not Path(out).parent.is_dir():
        raise UserError(f"--out={out}: no such folder {Path(out).parent}; create it first")


def draw(runs: list[Run], path: Path, x: str = "iterations", log: str = "none", y: str = "loss") -> None:
    """Draw runs, which `read` has read with the same `x` and `y`, to a PNG or SVG file."""
    write_figure(path, lambda figure: fill(figure.add_subplot(), runs, x, log, y))


def write_figure(path: Path, fill: Callable[[Any], None], inches: tuple[float, float] = (8, 4.5)) -> None:
    """Let `fill` draw into a matplotlib Figure, and write it to a PNG or SVG file atomically."""
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from PIL import Image  # a dependency of matplotlib
    except ImportError as error:
        raise UserError("curves need the package matplotlib: pip install matplotlib") from error
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of characters that the font lacks
        matplotlib.rcdefaults()  # the same picture whatever the user's own settings
        matplotlib.rcParams.update(STYLE)
        figure = Figure(figsize=inches, dpi=150, layout="constrained")
        fill(figure)
        with atomic_write(path, durable=False) as file:
            if path.suffix.lower() == ".png":
                canvas = FigureCanvasAgg(figure)
                canvas.draw()
                pixels = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
                pixels.quantize(128).save(file, "PNG")  # 128 colors: a third of the size, with no visible difference
            else:
                figure.savefig(file, format=path.suffix[1:].lower())


def fill(axes: Any, runs: list[Run], x: str, log: str, y: str) -> None:
    """Draw runs into a matplotlib Axes."""
    from matplotlib import ticker
    from matplotlib.lines import Line2D

    alone = len(runs) == 1
    unit, label = (1, x) if "x" in log else _unit(runs, x)  # a log axis shows powers of ten, and needs no other unit
    losses: list[np.ndarray] = []  # what the y axis must show; outliers among single batches may lie outside
    entries: list[tuple[Any, str]] = []  # of the legend
    smoothed_label = "training"
    for number, run in enumerate(runs):
        # colors, smoothing and y range
        color = COLORS[number % len(COLORS)]
        val_color = COLORS[1] if alone else color
        half = len(run.train) // 50
        smoothed, best = smooth(run.train, half), best_of(run)
        smoothed_label = "training, smoothed" if half else smoothed_label
        losses += [smoothed, run.val, np.nanpercentile(run.train, [1, 99]) if np.isfinite(run.train).any() else run.val]

        # curves: single batches (faint), smoothed training loss, validation loss
        raw_x, raw = (run.train_x, run.train) if "x" in log else envelope(run.train_x, run.train)
        axes.plot(raw_x / unit, raw, color=color, alpha=0.25 if half else 1.0, linewidth=0.7)
        (train,) = axes.plot(run.train_x / unit, smoothed, color=color, linewidth=1.8 if alone else 1.0)
        lonely = isolated(smoothed)
        axes.plot(run.train_x[lonely] / unit, smoothed[lonely], color=color, linestyle="", marker="o", markersize=3)
        (val,) = axes.plot(run.val_x / unit, run.val, color=val_color, **DOTS if len(run.val) <= 50 else {"linewidth": 2})

        # legend, and a ring around the best evaluation
        if not alone:
            entries.append((val, run.name if best is None else f"{run.name}, best {run.val[best]:.3f}"))
        else:
            entries += [(train, smoothed_label)] * (len(run.train) > 0) + [(val, "validation")] * (len(run.val) > 0)
        if best is not None:
            (ring,) = axes.plot(run.val_x[best] / unit, run.val[best], color=val_color, **RING)
            entries += [(ring, f"best: {run.val[best]:.3f}")] * alone
    if not alone:
        entries.append((Line2D([], [], color="#777777", linewidth=1), smoothed_label))
        entries.append((Line2D([], [], color="#777777", **DOTS), "validation"))

    # axes, title and legend
    _scale(axes, np.concatenate(losses), log)
    axes.set_xlabel(label)
    axes.set_ylabel(Y_LABELS[y])
    if "x" not in log:
        axes.xaxis.set_major_locator(ticker.MaxNLocator(9, integer=unit == 1, min_n_ticks=1))
        axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:,.10g}"))
    if alone:
        axes.set_title(runs[0].name, loc="left", parse_math=False)
    handles, labels = zip(*entries, strict=True)
    for text in axes.legend(handles, labels, loc="lower left" if "x" in log else "upper right").get_texts():
        text.set_parse_math(False)  # a name may contain dollar signs


def _scale(axes: Any, losses: np.ndarray, log: str) -> None:
    """Set linear or logarithmic scales, and the y limits to the range of `losses` plus a margin."""
    from matplotlib import ticker

    losses = losses[np.isfinite(losses) & ((losses > SMALLEST_LOG_LOSS) | ("y" not in log))]
    if "x" in log:
        axes.set_xscale("log", nonpositive="mask")
    if "y" in log:
        axes.set_yscale("log", nonpositive="mask")
        wide = losses.size > 0 and losses.max() > 10 * losses.min()
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)) if wide else ticker.MaxNLocator(6))
        axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_locator(ticker.NullLocator())
    if losses.size:
        low, high = losses.min(), losses.max()
        if "y" in log:
            axes.set_ylim(low * (low / high) ** 0.05 * 0.99, high * (high / low) ** 0.05 * 1.01)
        else:
            margin = 0.05 * (high - low) or 0.1
            axes.set_ylim(low - margin, high + margin)


def _unit(runs: list[Run], x: str) -> tuple[float, str]:
    """Return the unit of the x axis, as a divisor, and its label: hours instead of thousands of seconds."""
    last = max(value for run in runs for value in (*run.train_x[-1:], *run.val_x[-1:]))
    units = {"seconds": [(3600, "hours"), (60, "minutes")], "tokens": [(1e9, "billion tokens"), (1e6, "million tokens")]}
    return next(((unit, label) for unit, label in units.get(x, []) if last >= unit), (1, x))
