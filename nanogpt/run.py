"""What surrounds the training loop: the state that it changes, and the run's folder, signals, clock, logging and saving."""

import contextlib
import errno
import itertools
import json
import math
import os
import shlex
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from model import GPT, Bigram
from nanogpt.checkpoint import BEST, LAST, Checkpoint, Optimizer, Saver, load, newest, remove_older
from nanogpt.curves import Curves
from nanogpt.dataset import Dataset, FileLost
from nanogpt.device import describe, find_peak, peak_memory, synchronize
from nanogpt.distributed import Group, how_to_launch, is_sharded
from nanogpt.errors import UserError, rank, warn
from nanogpt.files import FolderLock, atomic_write
from nanogpt.metrics import Evaluation, Metrics, SilentMetrics, in_bits, read_rows, start_wandb

CONFIG, METRICS, CURVES = "config.json", "metrics.csv", "loss.png"
RUN_FILES = (CURVES, "bits_per_byte.png", CONFIG, METRICS, BEST, LAST)  # in the order in which they are set aside
PREVIOUS = "previous"  # folder for the files of an earlier run; previous-2 and so on for those of later ones
SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")  # Ctrl-C, preemption, a closed terminal (not on Windows)
MAX_SKIPPED_STEPS = 40  # in a row; a GradScaler halves its scale each time, from 2^16
SIGNAL_DEBOUNCE_SECONDS = 1.0  # a second signal within this time is the same one, sent by the cluster and by torchrun


def every(interval: int, iteration: int) -> bool:
    """Whether something that happens every `interval` iterations is due; 0 means never."""
    return interval > 0 and iteration % interval == 0


@dataclass
class TrainState:
    """Training state other than weights and optimizer; saved in checkpoints."""

    iter_num: int = 0  # updates done
    best_val_loss: float = math.inf
    last_eval: int = -1  # iteration of the last evaluation
    evals_since_best: int = 0
    ckpt_val_loss: float | None = None  # of the weights in ckpt.pt; None: not known, or no such file
    wandb_id: str | None = None

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint) -> "TrainState":
        """Return the state in a checkpoint, where last_eval is called "evaluated" and evals_since_best "stale"."""
        extra, best = checkpoint.extra, checkpoint.best_val_loss
        last_eval, evals_since_best = extra.get("evaluated", -1), extra.get("stale", 0)
        ckpt_val_loss = extra.get("ckpt_val_loss", best if evals_since_best == 0 else None)  # earlier versions do not store it
        return cls(checkpoint.iter_num, best, last_eval, evals_since_best, ckpt_val_loss, extra.get("wandb"))

    def eval_due(self, eval_interval: int, max_iters: int) -> bool:
        """Whether to evaluate now: every `eval_interval` iterations and at the end, but not twice (after a resume)."""
        return self.last_eval != self.iter_num and (every(eval_interval, self.iter_num) or self.iter_num >= max_iters)

    def record_eval(self, val_loss: float) -> bool:
        """Record an evaluation, and return whether it is the best so far."""
        improved = val_loss < self.best_val_loss
        self.last_eval = self.iter_num
        self.best_val_loss = min(self.best_val_loss, val_loss)
        self.evals_since_best = 0 if improved else self.evals_since_best + 1
        return improved

    def out_of_patience(self, patience: int) -> bool:
        """Whether the last `patience` evaluations brought no improvement; 0 disables this."""
        return 0 < patience <= self.evals_since_best

    def finished(self, max_iters: int, patience: int) -> bool:
        """Whether training is over, by its length or by early stopping."""
        return self.iter_num >= max_iters or self.out_of_patience(patience)


class Run:
    """A training run's folder, signal handling, timing, logging and checkpoints.

    Entering the `with` block locks the folder; `begin` opens the log and starts to catch signals. Rank 0 prints and writes,
    the other ranks only join collective operations.
    """

    def __init__(self, out_dir: Path, group: Group):
        self.out_dir, self.group = out_dir, group
        self.signals = Signals()
        self.save_due = False
        self._stop_agreed = False
        self._skipped_steps = 0  # in a row, by the GradScaler
        self._evaluation: Evaluation | None = None  # the last one of this process
        self._ckpt_bits_per_byte: float | None = None  # of the weights in ckpt.pt; None: not known
        self._saver: Saver | None = None
        self._open_parts = contextlib.ExitStack()  # closed in reverse: curves, signals, log, lock

    def __enter__(self) -> "Run":
        self._lock = self._open_parts.enter_context(lock_folder(self.out_dir, self.group))
        return self

    def begin(
        self,
        state: TrainState,
        model: GPT | Bigram,
        optimizer: Optimizer,
        scaler: torch.amp.GradScaler,
        description: dict[str, Any],
        config: dict[str, Any],
        resumed: bool,
        sequences_per_iter: int,
        dtype: torch.dtype,
    ) -> None:
        """Open the log and get ready to save.

        `description` is the dataset's tokenizer and chat format, stored in checkpoints. `config` holds the keys of train.py;
        it is stored in checkpoints and config.json, and sets the intervals of logging and saving. `dtype` is that of matrix
        products, for the MFU. Raises UserError, on all ranks, if one of them resumes from another state than the newest.
        """
        self.state, self._model, self._scaler, self._config = state, model, scaler, config
        self._sequences_per_iter = sequences_per_iter
        if resumed:
            require_newest(state.iter_num, self.out_dir, self.group)
        self.group.sum(0)  # all ranks measure their peak at once, since they may share cores
        peak, self._peak_source = find_peak(self.group.device, dtype)
        (self._peak_flops,) = self.group.sum(peak)
        tokens_per_iter = sequences_per_iter * model.config.block_size

        # rank 0 writes the folder
        if self.group.is_main:
            wandb_run = None
            if config["wandb_log"]:
                wandb_run = start_wandb(config["wandb_project"], config["wandb_run_name"], config, state.wandb_id)
                state.wandb_id = wandb_run.id
            undo_set_aside(self.out_dir)
            if resumed:
                remove_older(self.out_dir)
            else:
                set_aside(self.out_dir)
            write_config(self.out_dir / CONFIG, config)
            log = Metrics(self.out_dir, config["max_iters"], tokens_per_iter, state.iter_num, state.last_eval, wandb_run)
        else:
            log = SilentMetrics()
        saved = (state.iter_num, state.last_eval) if resumed else (-1, -1)  # the state on the disk; -1: none
        is_main = self.group.is_main
        self._saver = Saver(
            self.out_dir, model, optimizer, scaler, description, config, saved, is_main, self._make_folder_again
        )
        self._log = self._open_parts.enter_context(log)
        self._open_parts.enter_context(self.signals)
        self._curves = self._open_parts.enter_context(Curves(self.out_dir, self.group.is_main))

        # start the clock
        self._mfu, self._first_unlogged, self._t0 = -1.0, state.iter_num, time.perf_counter()

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: Any) -> None:
        try:
            # The token files are gone but the weights are intact: save them. Not if they are sharded: gathering needs all
            # ranks, and only this one failed.
            if isinstance(error, FileLost) and self._saver is not None and not is_sharded(self._model):
                self.save()
        finally:
            self._open_parts.__exit__(kind, error, traceback)

    # signals

    @property
    def stop_requested(self) -> bool:
        """Whether all ranks have agreed to stop, because one of them received a signal; once True, it stays so."""
        if self.group.size == 1 and self.signals.received:  # a single process need not wait for `agree`
            self._stop_agreed = True
        return self._stop_agreed

    def stop(self) -> None:
        """Request a stop; all ranks must call this."""
        self._stop_agreed = True

    def agree(self, loss: float) -> float:
        """Return the sum of `loss` over ranks (all-reduce), and decide for all of them whether to save and to stop."""
        interval, minutes = self._config["checkpoint_interval"], self._config["checkpoint_minutes"]
        due = self._saver.is_due(self.state.iter_num, interval, minutes)
        loss, due, signalled = self.group.sum(loss, due, self.signals.received)
        self._stop_agreed = signalled > 0
        self.save_due = due > 0 and not self._stop_agreed  # a run that stops is saved after its update
        return loss

    # clock and log

    @contextlib.contextmanager
    def paused(self, reason: str) -> Iterator[None]:
        """Exclude this block from the time of an iteration; the progress bar shows `reason`."""
        synchronize(self.group.device)
        paused_at = time.perf_counter()
        self._log.pause(reason)
        yield
        self._t0 += time.perf_counter() - paused_at

    def say(self, text: str) -> None:
        """Print text on rank 0, above the progress bar."""
        self._log.say(text)

    def log_eval(self, evaluation: Evaluation, learning_rate: float) -> None:
        """Log an evaluation, which the state has recorded already."""
        self._evaluation = evaluation
        self._log.evaluation(self.state.iter_num, evaluation, learning_rate, self._mfu, self.state.best_val_loss)

    def summary(self, data: Dataset, choices: str, ignored: tuple[str, ...] = ()) -> str:
        """Return what a run prints at its start: model, data, length, machine, ignored settings; `choices`: how it computes."""
        model, config, tokens, ranks = self._model, self._config, data.tokens["train"], self.group.size
        per_iter = self._sequences_per_iter * model.config.block_size
        keys = ["block_size"] if config["model"] == "bigram" else ["n_layer", "n_head", "n_embd", "block_size"]
        return (
            f"model: {config['model']}, {model.get_num_params():,} parameters, "
            f"{', '.join(f'{key}={getattr(model.config, key)}' for key in keys)}\n"
            f"data: {config['dataset']} ({data.tokenizer})\n"
            f"      {tokens:,} training tokens, {data.tokens['val']:,} validation tokens\n"
            f"tokens per iteration: {per_iter:,} ({tokens / per_iter:,.0f} iterations per epoch)\n"
            f"run: {config['max_iters']:,} iterations, {config['max_iters'] * per_iter / tokens:,.2f} epochs\n"
            f"machine: {describe(self.group.device)}, {ranks} process{'es' if ranks > 1 else ''}\n"
            f"         {choices}\n"
            f"         peak for mfu: {self._peak_flops / 1e12:.3g} TFLOP/s ({self._peak_source})"
        ) + (f"\nignored: {', '.join(ignored)}" if ignored else "")

    def log_step(self, loss: float, learning_rate: float, grad_norm: float) -> None:
        """Count an iteration, and log it every log_interval iterations."""
        iteration = self.state.iter_num
        self._log.advance(clipped=0 < self._config["grad_clip"] < grad_norm)
        if not every(self._config["log_interval"], iteration):
            return
        now = time.perf_counter()
        seconds = (now - self._t0) / (iteration + 1 - self._first_unlogged)
        self._t0, self._first_unlogged = now, iteration + 1
        mfu = self._model.estimate_mfu(self._sequences_per_iter, seconds, self._peak_flops)
        self._mfu = mfu if self._mfu < 0 else 0.9 * self._mfu + 0.1 * mfu
        tokens_per_second = self._sequences_per_iter * self._model.config.block_size / seconds
        memory = peak_memory(self.group.device)
        self._log.step(iteration, loss, learning_rate, grad_norm, seconds, tokens_per_second, self._mfu, memory)

    def require_finite(self, numbers: dict[str, float]) -> None:
        """Raise UserError if a value in `numbers`, by name, is infinite or NaN."""
        bad = [f"the {name} is {number}" for name, number in numbers.items() if not math.isfinite(number)]
        if bad:
            saved = [self.out_dir / name for name in (LAST, BEST) if (self.out_dir / name).exists()]
            kept = f"the last good state is in {saved[0]}" if saved else "no checkpoint was written yet"
            advice = "try a lower --learning_rate, or --grad_clip=1"
            raise UserError(f"iteration {self.state.iter_num}: {bad[0]}, and the run stops; {kept}; {advice}")

    def require_finite_gradient(self, norm: float) -> None:
        """Raise UserError if the norm is infinite or NaN; with a GradScaler, which skips such a step, only if that goes on."""
        self._skipped_steps = 0 if math.isfinite(norm) else self._skipped_steps + 1
        if self._skipped_steps and not self._scaler.is_enabled():
            self.require_finite({"norm of the gradient": norm})
        if self._skipped_steps == MAX_SKIPPED_STEPS:
            self.require_finite({f"norm of the gradient in {MAX_SKIPPED_STEPS} iterations in a row": norm})

    # checkpoints and curves

    def save(self, best: bool = False) -> None:
        """Write ckpt.pt if `best`, else last.pt. Iteration 0 is saved only if a signal stops the run there."""
        state = self.state
        if state.iter_num == 0 and not self._stop_agreed:
            return
        ckpt_val_loss = self._evaluation.losses["val"] if best else state.ckpt_val_loss
        extra = {"evaluated": state.last_eval, "stale": state.evals_since_best}
        extra |= {} if ckpt_val_loss is None else {"ckpt_val_loss": ckpt_val_loss}
        extra |= {} if state.wandb_id is None else {"wandb": state.wandb_id}
        self._log.sync()
        is_written = self._saver.save(state.iter_num, state.best_val_loss, extra, best)
        if best and is_written:
            state.ckpt_val_loss, self._ckpt_bits_per_byte = ckpt_val_loss, self._evaluation.bits_per_byte["val"]

    def _make_folder_again(self) -> None:
        """If the folder was deleted or moved, make and lock it again, with config.json and metrics.csv; on rank 0.

        Raises OSError if that fails or if another run uses it by now; the files of one that has ended are set aside.
        """
        if self._lock.is_held():
            return
        try:
            self._lock.acquire()
        except UserError as error:
            raise OSError(errno.EBUSY, "the folder was deleted or moved, and another run uses it", str(self.out_dir)) from error
        if not self._log.is_lost():  # only the lock file was deleted
            return
        set_aside(self.out_dir)
        write_config(self.out_dir / CONFIG, self._config)
        self._log.write_again()
        self._log.sync()
        warn(f"{self.out_dir} was deleted or moved; made it again, with {CONFIG} and all rows of {METRICS}")

    def update_curves(self) -> None:
        """Redraw loss.png, unless drawing would take too much of the run's time."""
        self._curves.update()

    def ending(self, next_script: str, ignored: tuple[str, ...] = ()) -> SystemExit | UserError | None:
        """Print the result, what was `ignored`, and the next command, of `next_script`. Returns the exception to raise, if any.

        That is UserError if the last save failed, SystemExit after a signal.
        """
        state, config = self.state, self._config
        if self._saver.failure:
            return UserError(f"could not save the newest state ({self._saver.failure}); free some space and resume the run")
        number = self.signals.received or signal.SIGTERM  # another rank's signal is reported as SIGTERM
        out_dir = shlex.quote(config["out_dir"])
        if self.group.is_main:
            if ignored:
                print(f"ignored: {', '.join(ignored)}")
            if (self.out_dir / CURVES).exists():
                print(f"curves in {self.out_dir / CURVES}")
            saved = next((name for name in (BEST, LAST) if (self.out_dir / name).exists()), None)
            if saved:
                loss = state.ckpt_val_loss if saved == BEST else None  # without ckpt.pt, nothing was better than at the start
                result = "" if loss is None else f"val loss {loss:.4f}{in_bits(self._ckpt_bits_per_byte)}; "
                is_best = loss == state.best_val_loss
                best = (
                    "" if is_best or math.isinf(state.best_val_loss) else f" (best val loss so far: {state.best_val_loss:.4f})"
                )
                print(f"{'best ' * is_best}{result}checkpoint in {self.out_dir / saved}{best}")
                print(f"next: python {next_script} --out_dir={out_dir}")
            if state.out_of_patience(config["patience"]):
                print(f"stopped early: {state.evals_since_best} evaluations without a better validation loss;", end=" ")
                print("a larger --patience continues the run")
            if self._stop_agreed:
                done = f"{state.iter_num:,} of {config['max_iters']:,} iterations"
                launch = how_to_launch(f"train.py --init_from=resume --out_dir={out_dir}", self.group.size)
                print(f"{signal.Signals(number).name}: stopped and saved after {done}; to continue{launch}")
        return SystemExit(128 + number) if self._stop_agreed else None


# the run's folder


@contextlib.contextmanager
def lock_folder(out_dir: Path, group: Group) -> Iterator[FolderLock | None]:
    """Create `out_dir` and hold it for this run alone; an empty folder that was created here is removed again.

    Gives the lock, on rank 0. Raises UserError, on all ranks, if another run holds it or if it cannot be written.
    """
    lock = refusal = None
    with contextlib.ExitStack() as held:
        if group.is_main:
            try:
                lock = held.enter_context(FolderLock(out_dir, "another run uses", "stop it first, or choose another --out_dir"))
                tempfile.TemporaryFile(dir=out_dir).close()
            except UserError as error:
                refusal = error
            except OSError as error:
                refusal = UserError(f"--out_dir={out_dir}: cannot write there ({error.strerror})")
        (refused,) = group.sum(float(refusal is not None))
        if refused:
            raise refusal or UserError(f"--out_dir={out_dir}: rank 0 cannot use it")
        yield lock


def require_newest(iter_num: int, out_dir: Path, group: Group) -> None:
    """Raise UserError, on all ranks, unless each has read the newest state in rank 0's folder, after `iter_num` updates.

    One has not if its machine has an older copy of the folder, or if another run saved between its reading and its lock.
    """
    (newest_iter,) = group.sum(load(newest(out_dir), mmap=True).iter_num if group.is_main else 0)
    (others,) = group.sum(float(iter_num != newest_iter))
    if others:
        raise UserError(
            f"--out_dir={out_dir}: {others:.0f} of {group.size} processes read another state than rank 0's newest, after "
            f"{newest_iter:,.0f} iterations; start again, and on several machines give each the same copy of the folder"
        )


def set_aside(out_dir: Path) -> None:
    """Move an earlier run's files into `out_dir`/previous, or previous-2, previous-3 ... if there are such folders already.

    The folder gets its name once it is complete; see `undo_set_aside` for a move that is interrupted.
    """
    has_state = any((out_dir / name).exists() for name in (BEST, LAST))
    has_rows = any(row["loss"] for row in read_rows(out_dir / METRICS))  # of a run that failed before it saved
    if not (has_state or has_rows):
        return
    part = out_dir / f"{PREVIOUS}.part"
    part.mkdir(exist_ok=True)
    for name in RUN_FILES:
        _move(name, out_dir, part)
    names = {path.name for path in out_dir.iterdir()}
    previous = out_dir / next(name for name in _previous_names() if name not in names)
    part.rename(previous)
    warn(f"{out_dir} held an earlier run; moved its files to {previous}")


def undo_set_aside(out_dir: Path) -> None:
    """Move the files back that a `set_aside` had moved when its process was killed.

    At any moment last.pt, or ckpt.pt if that is the newest, stays in `out_dir` until all other files are moved away, and comes
    back before them. So a run that is resumed in between continues from its newest state.
    """
    part = out_dir / f"{PREVIOUS}.part"
    if part.is_dir():
        for name in reversed(RUN_FILES):
            _move(name, part, out_dir)
        part.rmdir()


def _move(name: str, source: Path, target: Path) -> None:
    if (source / name).exists():
        os.replace(source / name, target / name)


def _previous_names() -> Iterator[str]:
    yield PREVIOUS
    for number in itertools.count(2):
        yield f"{PREVIOUS}-{number}"


def write_config(path: Path, config: dict[str, Any]) -> None:
    """Write the config as JSON, for people to read; a full disk is only a warning."""
    try:
        with atomic_write(path, durable=False) as file:
            file.write((json.dumps(config, indent=1) + "\n").encode())
    except OSError as error:
        warn(f"could not write {path} ({error.strerror})")


class Signals:
    """Records SIGNALS instead of letting them end the process, so that the loop can stop between updates.

    Works inside its `with` block and in the main thread. A second signal ends the process at once, unless it comes within
    SIGNAL_DEBOUNCE_SECONDS.
    """

    def __init__(self) -> None:
        self.received = 0  # the signal's number; 0 for none
        self._received_at = 0.0
        self._previous = {}

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():
            for name in SIGNALS:
                number = getattr(signal, name, None)
                if number is not None and signal.getsignal(number) is not signal.SIG_IGN:  # ignored under nohup, or with &
                    self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: not set by Python

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            if time.monotonic() - self._received_at > SIGNAL_DEBOUNCE_SECONDS:
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)
            return
        self.received, self._received_at = number, time.monotonic()
        if rank() in ("", "0"):
            line = f"\n{signal.Signals(number).name}: finishing this iteration and saving; a second one ends the run at once\n"
            with contextlib.suppress(OSError):
                os.write(2, line.encode())  # print is not reentrant
