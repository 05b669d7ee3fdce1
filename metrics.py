"""What a run records and shows: printed lines, a progress bar, metrics.csv and Weights & Biases.

metrics.csv has a row for each evaluation (`train_loss` and `val_loss`) and one for each logged iteration (the others):

    iteration            updates done before this row
    tokens               tokens trained on before this row
    seconds              time spent in this run, evaluations included, in all its parts where it was resumed
    train_loss, val_loss means over the windows of the evaluation, in nats a token
    loss                 mean over this iteration's batch, before its update
    learning_rate        of this iteration
    grad_norm            Euclidean norm of the gradient before clipping
    tokens_per_second    since the last logged iteration
    mfu                  model FLOPs utilisation, running average; -1 where the device's peak is unknown
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

import configurator
from configurator import UserError

COLUMNS = [
    "iteration",
    "tokens",
    "seconds",
    "train_loss",
    "val_loss",
    "loss",
    "learning_rate",
    "grad_norm",
    "tokens_per_second",
    "mfu",
]


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
        Evaluations also go to `wandb_run`, from `start_wandb`, where there is one.
        """
        self.is_main = is_main
        self._tokens_per_iteration = tokens_per_iteration
        self._wandb = wandb_run
        if not is_main:
            return
        self._path = out_dir / "metrics.csv"
        rows = [row for row in read_rows(self._path) if _was_before(row, start, evaluated)] if start else []
        self._file: io.FileIO | None = None  # opened once the rows that are kept are in it
        self._unwritten = "".join(map(_line, [dict(zip(COLUMNS, COLUMNS, strict=True)), *rows])).encode()
        self._is_failing = False
        self._flush()
        self._started = time.perf_counter() - (float(rows[-1]["seconds"]) if rows else 0.0)
        self._bar = tqdm(
            total=total_iterations, initial=start, unit="iter", dynamic_ncols=True, disable=not sys.stderr.isatty()
        )

    def say(self, text: str) -> None:
        """Print a line on stdout, above the progress bar."""
        if not self.is_main:
            return
        try:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()
        except BrokenPipeError:
            raise
        except OSError:  # stdout is a file on a disk that is full: no reason to end a run
            pass

    def evaluation(self, iteration: int, losses: dict[str, float], learning_rate: float, mfu: float) -> None:
        """Record the evaluation after `iteration` updates; `losses` has "train" and "val"."""
        if not self.is_main:
            return
        self.say(f"step {iteration}: train loss {losses['train']:.4f}, val loss {losses['val']:.4f}")
        self._write(iteration, train_loss=losses["train"], val_loss=losses["val"])
        if self._wandb is not None:
            values = {"train/loss": losses["train"], "val/loss": losses["val"], "lr": learning_rate, "mfu": mfu * 100}
            self._wandb.log({"iter": iteration} | values)

    def step(
        self, iteration: int, loss: float, learning_rate: float, grad_norm: float, seconds: float, rate: float, mfu: float
    ) -> None:
        """Record a logged iteration, which took `seconds`; `rate` is in tokens per second."""
        if not self.is_main:
            return
        self.say(f"iter {iteration}: loss {loss:.4f}, time {seconds * 1000:.2f}ms, mfu {mfu * 100:.2f}%")
        self._write(iteration, loss=loss, learning_rate=learning_rate, grad_norm=grad_norm, tokens_per_second=rate, mfu=mfu)
        self._bar.set_postfix_str(f"loss {loss:.4f}, {rate:,.0f} tokens/s", refresh=False)

    def advance(self) -> None:
        """Move the progress bar on by one iteration."""
        if self.is_main:
            self._bar.update()

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the records, also those of a run that fails."""
        if self.is_main:
            self._bar.close()
            if self._file is not None:
                self._file.close()
            if self._wandb is not None:
                self._wandb.finish()

    def sync(self) -> None:
        """Put the rows so far on the disk, for a checkpoint that must not be there without them after a power failure."""
        if self.is_main and self._file is not None:
            with contextlib.suppress(OSError):
                os.fsync(self._file.fileno())

    def _write(self, iteration: int, **values: float) -> None:
        seconds = round(time.perf_counter() - self._started, 3)
        tokens = iteration * self._tokens_per_iteration
        numbers = {name: f"{value:.9g}" for name, value in values.items() if math.isfinite(value)}
        self._unwritten += _line({"iteration": iteration, "tokens": tokens, "seconds": seconds} | numbers).encode()
        self._flush()

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
                configurator.warn(f"{self._path}: {error.strerror}; its rows wait in memory")
        self._is_failing = bool(self._unwritten)


def start_wandb(project: str, name: str, config: dict[str, Any]) -> Any:
    """Return a new run of Weights & Biases; UserError where its package is missing or refuses."""
    try:
        import wandb
    except ImportError as error:
        raise UserError("--wandb_log=True needs the package wandb: pip install wandb") from error
    try:
        return wandb.init(project=project, name=name, config=config)
    except wandb.errors.Error as error:
        raise UserError(f"--wandb_log=True: {str(error).rstrip('.')} (without a network: WANDB_MODE=offline)") from error


def read_rows(path: Path) -> list[dict[str, str]]:
    """Return the whole rows of a metrics.csv, without the one that a killed run broke off; none where there is no file."""
    if not path.is_file():
        return []
    text = path.read_bytes().decode("utf-8", errors="replace").replace("\0", "")
    rows = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1], newline=""))
    return [row for row in rows if list(row) == COLUMNS and None not in row.values() and _is_dated(row)]


def _line(row: dict[str, Any]) -> str:
    text = io.StringIO(newline="")
    csv.DictWriter(text, COLUMNS).writerow(row)
    return text.getvalue()


def _is_dated(row: dict[str, str]) -> bool:
    try:
        return int(row["iteration"]) >= 0 and math.isfinite(float(row["seconds"]))
    except ValueError:
        return False


def _was_before(row: dict[str, str], start: int, evaluated: int) -> bool:
    iteration = int(row["iteration"])
    return iteration < start or (iteration == start == evaluated and row["val_loss"] != "")
