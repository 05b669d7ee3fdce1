"""What a run records and shows: printed lines, a progress bar, metrics.csv and Weights & Biases.

metrics.csv has a row for each evaluation (`train_loss` and `val_loss`) and one for each logged iteration (what is below them):

    iteration            updates done before this row
    tokens               tokens trained on before this row
    seconds              time spent in this run, evaluations included, in all its parts where it was resumed
    train_loss, val_loss means over the windows of the evaluation, in nats a token
    loss                 mean over this iteration's batch, before its update
    learning_rate        of this iteration
    grad_norm            Euclidean norm of the gradient before clipping
    clipped              share of the iterations since the last logged one, this one included, whose gradient was clipped
    tokens_per_second    since the last logged iteration
    mfu                  model FLOPs utilisation, running average; -1 where the device's peak is unknown
    peak_memory_mb       10^6 bytes: the most that tensors took of a CUDA device so far; elsewhere, that the process took

A number that is not finite is left empty, and so is what the system does not tell. Weights & Biases gets each row when it is
written, under nanoGPT's names where it has them (`iter`, `train/loss`, `val/loss`, `lr`; `mfu` is in percent), and the best
validation loss so far with each evaluation; its summary is the last row.
"""

import contextlib
import csv
import io
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from nanogpt import errors
from nanogpt.errors import UserError

COLUMNS = [
    "iteration",
    "tokens",
    "seconds",
    "train_loss",
    "val_loss",
    "loss",
    "learning_rate",
    "grad_norm",
    "clipped",
    "tokens_per_second",
    "mfu",
    "peak_memory_mb",
]
WANDB_NAMES = {"iteration": "iter", "train_loss": "train/loss", "val_loss": "val/loss", "learning_rate": "lr"}
TOGETHER = 0.2  # seconds within which quick iterations are recorded at once, for a tenth of the time
BAR = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}, {remaining} left{postfix}"


class Metrics:
    """The records of one run; in all processes but the main one, it does nothing."""

    def __init__(
        self,
        out_dir: Path,
        total_iterations: int,
        tokens_per_iteration: int,
        start: int = 0,
        evaluated: int = -1,
        is_main: bool = True,
        wandb_run: Any = None,
    ):
        """Open metrics.csv in `out_dir`. A run that starts again at iteration `start` keeps the rows before it.

        Of iteration `start` itself it keeps the evaluation, where `evaluated` says that this has been done.
        All rows also go to `wandb_run`, from `start_wandb`, where there is one.
        """
        self.is_main = is_main
        self._tokens_per_iteration = tokens_per_iteration
        self._iterations = self._clipped = 0  # since the last logged one
        self._wandb = wandb_run
        if not is_main:
            return
        self._path = out_dir / "metrics.csv"
        rows = [row for row in read_rows(self._path) if _was_before(row, start, evaluated)] if start else []
        self._file: io.FileIO | None = None  # opened once the rows that are kept are in it
        self._unwritten = "".join(map(_line, [dict(zip(COLUMNS, COLUMNS, strict=True)), *rows])).encode()
        self._is_failing, self._status = False, ""
        self._steps: list[tuple[float, int, float, dict[str, float]]] = []  # logged iterations that are not recorded yet
        self._recorded = -math.inf  # when others were
        self._flush()
        self._started = time.perf_counter() - (float(rows[-1]["seconds"]) if rows else 0.0)
        self._bar = tqdm(
            total=total_iterations,
            initial=start,
            bar_format=BAR,
            dynamic_ncols=True,
            mininterval=TOGETHER,
            smoothing=0.05,  # time left is not that of the latest few iterations
            disable=not sys.stderr.isatty(),
        )

    def say(self, text: str) -> None:
        """Print lines on stdout, above the progress bar; a terminal gets no control characters, as a model may write them."""
        if not self.is_main:
            return
        self._record_steps()
        self._print(text)

    def evaluation(self, iteration: int, losses: dict[str, float], learning_rate: float, mfu: float, best: float) -> None:
        """Record the evaluation after `iteration` updates; `losses` has "train" and "val", and `best` is the best so far."""
        if not self.is_main:
            return
        self.say(f"step {iteration}: train loss {losses['train']:.4f}, val loss {losses['val']:.4f}")
        row = self._add_row(self._seconds(), iteration, {"train_loss": losses["train"], "val_loss": losses["val"]})
        self._flush()
        self._send(row | {"lr": learning_rate, "mfu": mfu, "best_val_loss": best})

    def advance(self, clipped: bool = False) -> None:
        """Count an iteration, and move the progress bar on; `clipped` tells whether its gradient was too long."""
        self._iterations += 1
        self._clipped += clipped
        if self.is_main:
            self._record_steps(TOGETHER)
            self._bar.set_postfix_str(self._status, refresh=False)
            self._bar.update()

    def step(
        self,
        iteration: int,
        loss: float,
        learning_rate: float,
        grad_norm: float,
        seconds: float,
        rate: float,
        mfu: float,
        peak_memory: float | None = None,
    ) -> None:
        """Record a logged iteration, which took `seconds`; `rate` is in tokens per second, `peak_memory` in bytes."""
        if not self.is_main:
            return
        values = {
            "loss": loss,
            "learning_rate": learning_rate,
            "grad_norm": grad_norm,
            "clipped": self._clipped / max(1, self._iterations),
            "tokens_per_second": rate,
            "mfu": mfu,
            "peak_memory_mb": math.nan if peak_memory is None else round(peak_memory / 1e6, 1),
        }
        self._iterations = self._clipped = 0
        self._steps.append((self._seconds(), iteration, seconds, values))
        self._record_steps(TOGETHER)

    def pause(self, reason: str) -> None:
        """Show on the progress bar why it stands still until the next iteration."""
        if self.is_main:
            self._record_steps()
            self._bar.set_postfix_str(reason)

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, kind: type | None, *exception: object) -> None:
        self.close(has_failed=kind is not None)

    def close(self, has_failed: bool = False) -> None:
        """End the records, also those of a run that has failed."""
        if self.is_main:
            self._record_steps()
            self._bar.set_postfix_str(self._status, refresh=False)
            self._bar.close()
            if self._file is not None:
                self._file.close()
            if self._wandb is not None:
                with contextlib.suppress(Exception):  # the run is over, whatever happens over there
                    self._wandb.finish(exit_code=int(has_failed))

    def sync(self) -> None:
        """Put the rows so far on the disk, for a checkpoint that must not be there without them after a power failure."""
        if self.is_main:
            self._record_steps()
            if self._file is not None:
                with contextlib.suppress(OSError):
                    os.fsync(self._file.fileno())

    def _record_steps(self, wait: float = 0.0) -> None:
        """Record the logged iterations that are not recorded yet, if `wait` seconds have passed since others were."""
        if not self._steps or time.perf_counter() - self._recorded < wait:
            return
        steps, self._steps, self._recorded = self._steps, [], time.perf_counter()
        rows = [self._add_row(elapsed, iteration, values) for elapsed, iteration, _, values in steps]
        self._flush()
        for row in rows:
            self._send(row)
        last = steps[-1][3]
        rate = tqdm.format_sizeof(last["tokens_per_second"])
        self._status = f"loss {last['loss']:.4f}, lr {last['learning_rate']:.2e}, {rate} tokens/s"
        self._bar.set_postfix_str(self._status, refresh=False)
        self._print(
            "\n".join(
                f"iter {iteration}: loss {values['loss']:.4f}, time {seconds * 1000:.2f}ms, mfu {values['mfu'] * 100:.2f}%"
                for _, iteration, seconds, values in steps
            )
        )

    def _print(self, text: str) -> None:
        try:
            text = text.translate(errors.CONTROL) if sys.stdout.isatty() else text
            write = print if self._bar.disable else tqdm.write
            write(text, file=sys.stdout)
            sys.stdout.flush()
        except BrokenPipeError:
            raise
        except OSError:  # stdout is a file on a disk that is full: no reason to end a run
            pass

    def _seconds(self) -> float:
        return round(time.perf_counter() - self._started, 3)

    def _add_row(self, seconds: float, iteration: int, values: dict[str, float]) -> dict[str, float]:
        """Add a row to what metrics.csv is to get, and return its numbers, which are those that the file says."""
        row = {"iteration": iteration, "tokens": iteration * self._tokens_per_iteration, "seconds": seconds}
        row |= {name: float(f"{value:.9g}") for name, value in values.items() if math.isfinite(value)}
        self._unwritten += _line({name: f"{value:.9g}" if name in values else value for name, value in row.items()}).encode()
        return row

    def _send(self, row: dict[str, float]) -> None:
        if self._wandb is None:
            return
        values = {WANDB_NAMES.get(name, name): value * 100 if name == "mfu" else value for name, value in row.items()}
        try:
            self._wandb.log(values)
        except Exception as error:  # nothing that happens over there is worth a run
            errors.warn(f"Weights & Biases gets no more of this run: {error or type(error).__name__}")
            self._wandb = None

    def _flush(self) -> None:
        """Write what is not in metrics.csv yet; on a full disk it waits, and training goes on."""
        try:
            if self._file is None:
                part = self._path.with_suffix(".csv.tmp")
                part.write_bytes(self._unwritten)
                os.replace(part, self._path)
                self._file, self._unwritten = open(self._path, "ab", buffering=0), b""
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]  # a disk that fills up takes a part
        except OSError as error:
            if not self._is_failing:
                errors.warn(f"{self._path}: {error.strerror}; its rows wait in memory")
        self._is_failing = bool(self._unwritten)


def start_wandb(project: str, name: str, config: dict[str, Any], run_id: str | None = None) -> Any:
    """Return a run of Weights & Biases: a new one, or that of `run_id` again.

    UserError where its package is missing, or refuses for want of a login.
    """
    try:
        import wandb
    except ImportError as error:
        raise UserError("--wandb_log=True needs the package wandb: pip install wandb") from error
    stdin = sys.stdin
    try:
        sys.stdin = io.StringIO()  # which is no terminal: without a login it refuses, and does not ask
        run = wandb.init(project=project, name=name, config=config, id=run_id, resume="allow", allow_val_change=True)
    except wandb.errors.Error as error:
        raise UserError(f"--wandb_log=True: {str(error).rstrip('.')} (without a network: WANDB_MODE=offline)") from error
    finally:
        sys.stdin = stdin
    run.define_metric("*", step_metric="iter")  # what a resumed run does again stands where it stood
    return run


def read_rows(path: Path) -> list[dict[str, str]]:
    """Return the whole rows of a metrics.csv, without the one that a killed run broke off; none where there is no file.

    What an earlier version did not write is empty.
    """
    if not path.is_file():
        return []
    text = path.read_bytes().decode("utf-8", errors="replace").replace("\0", "")
    rows = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1], newline=""))
    with contextlib.suppress(csv.Error):  # another kind of file
        if not {"iteration", "tokens", "seconds"} <= set(rows.fieldnames or ()) <= set(COLUMNS):
            return []
        return [dict.fromkeys(COLUMNS, "") | row for row in rows if None not in {*row, *row.values()} and _is_dated(row)]
    return []


def _line(row: dict[str, Any]) -> str:
    return ",".join([str(row.get(name, "")) for name in COLUMNS]) + "\r\n"  # numbers, which need no quotes


def _is_dated(row: dict[str, str]) -> bool:
    try:
        return int(row["iteration"]) >= 0 and math.isfinite(float(row["seconds"]))
    except ValueError:
        return False


def _was_before(row: dict[str, str], start: int, evaluated: int) -> bool:
    iteration = int(row["iteration"])
    return iteration < start or (iteration == start == evaluated and row["val_loss"] != "")
