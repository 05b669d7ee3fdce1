"""What a run logs: printed lines, a progress bar, metrics.csv and Weights & Biases.

metrics.csv has a row for each evaluation (the columns train_... and val_...) and one for each logged iteration (the others):

    iteration            updates done before this row
    tokens               tokens trained on before this row
    seconds              wall-clock time of the run, evaluations included, over all its resumes
    train_loss, val_loss mean losses of the evaluation, in nats per token
    loss                 mean loss of this iteration's batch, before its update
    learning_rate        of this iteration
    grad_norm            L2 norm of the gradient before clipping
    clipped              share of iterations since the last logged one (this one included) whose gradient was clipped
    tokens_per_second    since the last logged iteration
    mfu                  model FLOPs utilization, running average; -1 if not known yet
    peak_memory_mb       10^6 bytes; of tensors on a CUDA device, elsewhere of the process
    train_bits_per_byte, val_bits_per_byte
                         bits of the evaluation's losses for each UTF-8 byte of the tokens that count in them

Numbers that are not finite or not known are left empty. Weights & Biases gets each row as it is written, under nanoGPT's names
where those exist (iter, train/loss, val/loss, lr; mfu in percent), plus the best validation loss with each evaluation.
"""

import contextlib
import csv
import io
import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from nanogpt.errors import CONTROL, UserError, warn
from nanogpt.files import atomic_write, is_at

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
    "train_bits_per_byte",
    "val_bits_per_byte",
]
HEADER = (",".join(COLUMNS) + "\r\n").encode()
WANDB_NAMES = {
    "iteration": "iter",
    "train_loss": "train/loss",
    "val_loss": "val/loss",
    "learning_rate": "lr",
    "train_bits_per_byte": "train/bits_per_byte",
    "val_bits_per_byte": "val/bits_per_byte",
}
LARGEST_EXPONENT = math.log(sys.float_info.max)  # of e, in a float
FLUSH_SECONDS = 0.2  # quick iterations are printed and written together, at a tenth of the cost
BAR_FORMAT = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}, {remaining} left{postfix}"


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation, of the splits "train" and "val"."""

    losses: dict[str, float]  # in nats per token
    bits_per_byte: dict[str, float | None]  # None: the tokens have no text

    def step_line(self, iteration: int) -> str:
        """Return the line that nanoGPT prints."""
        return f"step {iteration}: train loss {self.losses['train']:.4f}, val loss {self.losses['val']:.4f}"

    def report(self) -> str:
        """Return a line for each split: loss, perplexity and bits per byte."""
        lines = []
        for split, loss in self.losses.items():
            perplexity = math.inf if loss > LARGEST_EXPONENT else math.exp(loss)
            lines.append(f"{split}: loss {loss:.4f}, perplexity {perplexity:.2f}{in_bits(self.bits_per_byte[split])}")
        return "\n".join(lines)


def in_bits(bits_per_byte: float | None) -> str:
    """Return what a printed loss says after it."""
    return "" if bits_per_byte is None else f", {bits_per_byte:.4f} bits per byte"


class Metrics:
    """Logs one run: to stdout, a progress bar on stderr, metrics.csv and, if given, a Weights & Biases run."""

    def __init__(
        self,
        out_dir: Path,
        max_iters: int,
        tokens_per_iter: int,
        first_iter: int = 0,
        last_eval: int = -1,
        wandb_run: Any = None,
    ):
        """Open metrics.csv in `out_dir`. A run that resumes at `first_iter` keeps the rows before it.

        It also keeps the evaluation at `first_iter` itself if `last_eval` says that it was done. `wandb_run` comes from
        `start_wandb`.
        """
        self._tokens_per_iter = tokens_per_iter
        self._iterations = self._clipped = 0  # since the last logged iteration
        self._wandb = wandb_run
        self._path = out_dir / "metrics.csv"
        is_resumed = first_iter > 0 or last_eval == 0  # also right after the first evaluation
        rows = [row for row in read_rows(self._path) if _was_before(row, first_iter, last_eval)] if is_resumed else []
        self._file: io.FileIO | None = None  # opened once the rows to keep are in it
        self._unwritten = HEADER + "".join(map(_line, rows)).encode()
        self._is_failing, self._status = False, ""
        self._pending: list[tuple[float, int, float, dict[str, float]]] = []  # logged iterations, not yet printed or written
        self._flushed_at = -math.inf
        self._flush()
        self._started = time.perf_counter() - (float(rows[-1]["seconds"]) if rows else 0.0)
        self._bar = tqdm(
            total=max_iters,
            initial=first_iter,
            bar_format=BAR_FORMAT,
            dynamic_ncols=True,
            mininterval=FLUSH_SECONDS,
            smoothing=0.05,  # estimate the time left from more than the last few iterations
            disable=not sys.stderr.isatty(),
        )

    def say(self, text: str) -> None:
        """Print lines on stdout, above the progress bar; on a terminal without control characters, as a model may emit."""
        self._flush_steps()
        self._print(text)

    def evaluation(self, iteration: int, evaluation: Evaluation, learning_rate: float, mfu: float, best: float) -> None:
        """Log an evaluation; `best` is the best validation loss so far."""
        self.say(evaluation.step_line(iteration))
        values = {f"{split}_loss": loss for split, loss in evaluation.losses.items()}
        values |= {f"{split}_bits_per_byte": bits for split, bits in evaluation.bits_per_byte.items() if bits is not None}
        row = self._add_row(self._seconds(), iteration, values)
        self._flush()
        self._send(row | {"lr": learning_rate, "mfu": mfu, "best_val_loss": best})

    def advance(self, clipped: bool = False) -> None:
        """Count an iteration and advance the progress bar; `clipped` says whether its gradient was clipped."""
        self._iterations += 1
        self._clipped += clipped
        self._flush_steps(FLUSH_SECONDS)
        self._bar.set_postfix_str(self._status, refresh=False)
        self._bar.update()

    def step(
        self,
        iteration: int,
        loss: float,
        learning_rate: float,
        grad_norm: float,
        seconds: float,
        tokens_per_second: float,
        mfu: float,
        peak_memory: float | None = None,
    ) -> None:
        """Log an iteration that took `seconds`; `peak_memory` is in bytes."""
        values = {
            "loss": loss,
            "learning_rate": learning_rate,
            "grad_norm": grad_norm,
            "clipped": self._clipped / max(1, self._iterations),
            "tokens_per_second": tokens_per_second,
            "mfu": mfu,
            "peak_memory_mb": math.nan if peak_memory is None else round(peak_memory / 1e6, 1),
        }
        self._iterations = self._clipped = 0
        self._pending.append((self._seconds(), iteration, seconds, values))
        self._flush_steps(FLUSH_SECONDS)

    def pause(self, reason: str) -> None:
        """Show on the progress bar why it stands still until the next iteration."""
        self._flush_steps()
        self._bar.set_postfix_str(reason)

    def sync(self) -> None:
        """Flush the rows to the disk, so that no checkpoint survives a power failure without its rows."""
        self._flush_steps()
        if self._file is not None:
            with contextlib.suppress(OSError):
                os.fsync(self._file.fileno())

    def is_lost(self) -> bool:
        """Whether metrics.csv was deleted or moved since it was opened."""
        return self._file is not None and not is_at(self._file, self._path)

    def write_again(self) -> None:
        """Write a lost metrics.csv with all its rows, which can still be read from the open file."""
        try:
            self._file.seek(0)
            rows = self._file.read()
        except OSError:  # deleted by another machine, on a network disk
            rows = HEADER
        self._file.close()
        self._file, self._unwritten = None, rows + self._unwritten
        self._flush()

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, kind: type | None, *exception: object) -> None:
        self.close(has_failed=kind is not None)

    def close(self, has_failed: bool = False) -> None:
        """Write what is pending and close everything."""
        self._flush_steps()
        self._bar.set_postfix_str(self._status, refresh=False)
        self._bar.close()
        if self._file is not None:
            self._file.close()
        if self._wandb is not None:
            with contextlib.suppress(Exception):  # the run is over, whatever happens there
                self._wandb.finish(exit_code=int(has_failed))

    def _flush_steps(self, interval: float = 0.0) -> None:
        """Print and write the pending iterations if the last time was at least `interval` seconds ago."""
        if not self._pending or time.perf_counter() - self._flushed_at < interval:
            return
        pending, self._pending, self._flushed_at = self._pending, [], time.perf_counter()
        rows = [self._add_row(elapsed, iteration, values) for elapsed, iteration, _, values in pending]
        self._flush()
        for row in rows:
            self._send(row)
        last = pending[-1][3]
        rate = tqdm.format_sizeof(last["tokens_per_second"])
        self._status = f"loss {last['loss']:.4f}, lr {last['learning_rate']:.2e}, {rate} tokens/s"
        self._bar.set_postfix_str(self._status, refresh=False)
        self._print(
            "\n".join(
                f"iter {iteration}: loss {values['loss']:.4f}, time {seconds * 1000:.2f}ms, mfu {values['mfu'] * 100:.2f}%"
                for _, iteration, seconds, values in pending
            )
        )

    def _print(self, text: str) -> None:
        try:
            text = text.translate(CONTROL) if sys.stdout.isatty() else text
            write = print if self._bar.disable else tqdm.write
            write(text, file=sys.stdout)
            sys.stdout.flush()
        except BrokenPipeError:
            raise
        except OSError:  # stdout is a file on a full disk: no reason to end a run
            pass

    def _seconds(self) -> float:
        return round(time.perf_counter() - self._started, 3)

    def _add_row(self, seconds: float, iteration: int, values: dict[str, float]) -> dict[str, float]:
        """Queue a row for metrics.csv; return its numbers as the file will show them."""
        row = {"iteration": iteration, "tokens": iteration * self._tokens_per_iter, "seconds": seconds}
        row |= {name: float(f"{value:.9g}") for name, value in values.items() if math.isfinite(value)}
        self._unwritten += _line({name: f"{value:.9g}" if name in values else value for name, value in row.items()}).encode()
        return row

    def _send(self, row: dict[str, float]) -> None:
        """Send a row to Weights & Biases; after a first failure, stop sending."""
        if self._wandb is None:
            return
        values = {WANDB_NAMES.get(name, name): value * 100 if name == "mfu" else value for name, value in row.items()}
        try:
            self._wandb.log(values)
        except Exception as error:  # not worth a run
            warn(f"logging to Weights & Biases failed and stops here: {error or type(error).__name__}")
            self._wandb = None

    def _flush(self) -> None:
        """Write the queued rows to metrics.csv; on a full disk they wait, and training continues."""
        try:
            if self._file is None:
                with atomic_write(self._path, durable=False) as file:
                    file.write(self._unwritten)
                self._file, self._unwritten = open(self._path, "a+b", buffering=0), b""
            while self._unwritten:  # a disk that is filling up takes a part
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
        except OSError as error:
            if not self._is_failing:
                warn(f"cannot write {self._path} ({error.strerror}); its rows wait in memory")
        self._is_failing = bool(self._unwritten)


class SilentMetrics:
    """The `Metrics` of every rank but the first: logs nothing."""

    def say(self, *arguments: Any, **keywords: Any) -> None: ...
    def evaluation(self, *arguments: Any, **keywords: Any) -> None: ...
    def advance(self, *arguments: Any, **keywords: Any) -> None: ...
    def step(self, *arguments: Any, **keywords: Any) -> None: ...
    def pause(self, *arguments: Any, **keywords: Any) -> None: ...
    def sync(self, *arguments: Any, **keywords: Any) -> None: ...
    def __enter__(self) -> "SilentMetrics":
        return self

    def __exit__(self, *exception: object) -> None: ...


def start_wandb(project: str, name: str, config: dict[str, Any], run_id: str | None = None) -> Any:
    """Return a Weights & Biases run: a new one, or the one with `run_id`.

    Raises UserError if the package or a login is missing.
    """
    try:
        import wandb.errors  # a folder wandb/, such as its logs, is taken for an empty package if there is no other
    except ImportError as error:
        raise UserError("--wandb_log=True needs the package wandb: pip install wandb") from error
    stdin = sys.stdin
    try:
        sys.stdin = io.StringIO()  # not a terminal: without a login, wandb fails instead of asking
        run = wandb.init(project=project, name=name, config=config, id=run_id, resume="allow", allow_val_change=True)
    except wandb.errors.Error as error:
        raise UserError(f"--wandb_log=True: {str(error).rstrip('.')} (without a network: WANDB_MODE=offline)") from error
    finally:
        sys.stdin = stdin
    run.define_metric("*", step_metric="iter")  # repeated iterations of a resumed run keep their place
    return run


def read_rows(path: Path) -> list[dict[str, str]]:
    """Return the complete rows of a metrics.csv, by column; none if there is no such file.

    A last row that a killed run left incomplete is dropped. Columns that an older version did not write are empty.
    """
    if not path.is_file():
        return []
    text = path.read_bytes().decode("utf-8", errors="replace").replace("\0", "")
    rows = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1], newline=""))
    with contextlib.suppress(csv.Error):  # not a metrics.csv
        if not {"iteration", "tokens", "seconds"} <= set(rows.fieldnames or ()) <= set(COLUMNS):
            return []
        return [dict.fromkeys(COLUMNS, "") | row for row in rows if None not in {*row, *row.values()} and _is_dated(row)]
    return []


def _line(row: dict[str, Any]) -> str:
    return ",".join([str(row.get(name, "")) for name in COLUMNS]) + "\r\n"  # numbers need no quotes


def _is_dated(row: dict[str, str]) -> bool:
    try:
        return int(row["iteration"]) >= 0 and math.isfinite(float(row["seconds"]))
    except ValueError:
        return False


def _was_before(row: dict[str, str], first_iter: int, last_eval: int) -> bool:
    iteration = int(row["iteration"])
    return iteration < first_iter or (iteration == first_iter == last_eval and row["val_loss"] != "")
