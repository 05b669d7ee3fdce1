"""Runs that are killed, stopped by a signal or left without room on the disk go on as the runs that they would have been."""

import csv
import errno
import math
import os
import shlex
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import configurator
import train
from nanogpt import checkpoint, distributed, metrics
from nanogpt import run as runs
from nanogpt.dataset import Dataset
from nanogpt.errors import UserError

try:
    import resource
except ImportError:  # Windows
    resource = None

# dropout, accumulation and bf16 on; saves after 2, 3, 4, 6, 8 and 9 updates; the best evaluation is the one after 3
FLAGS = (
    "--n_layer=1 --n_head=2 --n_embd=16 --block_size=16 --batch_size=4 --gradient_accumulation_steps=2 --dropout=0.2 "
    "--dtype=bfloat16 --eval_iters=2 --eval_interval=3 --max_iters=9 --warmup_iters=8 --lr_decay_iters=100 --seed=12 "
    "--learning_rate=0.3 --always_save_checkpoint=False --checkpoint_interval=2 --checkpoint_minutes=0 --device=cpu"
).split()
CLOCKS = ("seconds", "tokens_per_second", "mfu", "peak_memory_mb")

needs_fork = pytest.mark.skipif(
    not hasattr(os, "fork") or torch.cuda.is_available(),
    reason="no fork here, or CUDA, with which PyTorch's backward cannot fork",
)


def run(*flags: str | Path) -> None:
    train.main(configurator.parse(train.Config, [str(flag) for flag in flags]))


def go_on(out_dir: Path, *flags: str) -> None:
    """Resume the run in `out_dir`, or start it again where it has no checkpoint yet."""
    if any((out_dir / name).exists() for name in (checkpoint.LAST, checkpoint.BEST)):
        run("--init_from=resume", f"--out_dir={out_dir}")
    else:
        run(*flags, f"--out_dir={out_dir}")


def in_child(action: Callable[[], object]) -> int:
    """Do `action` in a copy of this process, and return how that ended: its exit status, or minus a signal's number."""
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(1, 2)
        status = 70
        try:
            action()
            status = 0
        except UserError:
            status = 1
        except SystemExit as end:
            status = end.code
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def same(one: Any, other: Any) -> bool:
    """Whether two nested states are equal, tensors bit for bit."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def outcome(out_dir: Path) -> dict[str, Any]:
    """All that a run has come to, but for its clocks and the name of its folder."""
    found: dict[str, Any] = {}
    for name in sorted(path.name for path in out_dir.glob("*.pt")):
        found[name] = torch.load(out_dir / name, weights_only=True)
        found[name]["config"] = {k: v for k, v in found[name]["config"].items() if k not in ("out_dir", "init_from")}
    with open(out_dir / "metrics.csv", newline="") as file:
        found["rows"] = [{k: v for k, v in row.items() if k not in CLOCKS} for row in csv.DictReader(file)]
    return found


@pytest.fixture
def flags(dataset: Path) -> list[str]:
    return [*FLAGS, f"--dataset={dataset}"]


@pytest.fixture
def undisturbed(flags: list[str], tmp_path: Path) -> dict[str, Any]:
    """What the run comes to where nothing happens to it."""
    run(*flags, f"--out_dir={tmp_path / 'undisturbed'}")
    found = outcome(tmp_path / "undisturbed")
    assert (found[checkpoint.BEST]["iter_num"], found[checkpoint.LAST]["iter_num"], len(found["rows"])) == (3, 9, 13)
    return found


def before_each(monkeypatch: pytest.MonkeyPatch, functions: list[tuple[Any, str]], act: Callable[..., object]) -> None:
    """Have `act(name, *arguments)` done before each call of some functions, given as (owner, name)."""

    def watched(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            act(name, *arguments)
            return original(*arguments, **keywords)

        return call

    for owner, name in functions:
        monkeypatch.setattr(owner, name, watched(name, getattr(owner, name)))


def steps(monkeypatch: pytest.MonkeyPatch, at: int, act: Callable[..., None]) -> list[str]:
    """Have `act(name, *arguments)` done before the `at`-th step of a run that leaves a trace; the list names them all."""
    seen: list[str] = []

    def note(name: str, *arguments: Any) -> None:
        seen.append(name)
        if len(seen) == at:
            act(name, *arguments)

    files = [(os, "replace"), (os, "link"), (os, "fsync"), (torch, "save"), (metrics.Metrics, "_flush")]
    before_each(monkeypatch, [*files, (train, "clip_gradient")], note)
    return seen


# killed


def kill(name: str, *arguments: Any) -> None:
    if name == "save":  # in the middle of it
        state, file = arguments
        file.write(bytes(1000))
        file.flush()
    os.kill(os.getpid(), signal.SIGKILL)


@needs_fork
@pytest.mark.parametrize("together, flushes", [(0.0, 1 + 13), (math.inf, 1 + 4 + 7)])
def test_a_run_killed_at_any_step_is_not_lost(
    together: float,
    flushes: int,
    flags: list[str],
    undisturbed: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Catches a moment in which a kill leaves half a file, an older state than was saved, or no best one; rows that double.

    Rows are written one by one, or wait for the next evaluation or save.
    """
    monkeypatch.setattr(metrics, "FLUSH_SECONDS", together)
    with monkeypatch.context() as patch:
        names = steps(patch, 0, kill)
        run(*flags, f"--out_dir={tmp_path / 'counted'}")
    assert {name: names.count(name) for name in set(names)} == {
        "replace": 2 + 6 + 1,  # config.json and metrics.csv, each save, the link
        "link": 1,
        "fsync": 3 * 6 + 1 + 1,  # rows, the file and its folder at each save; the link's folder; the rows at the end
        "save": 6,
        "_flush": flushes,
        "clip_gradient": 9,
    }
    for at in range(1, len(names) + 1):
        out_dir, saved = tmp_path / f"killed{at}", tmp_path / f"saved{at}"

        def killed(at: int = at, out_dir: Path = out_dir, saved: Path = saved) -> None:
            steps(monkeypatch, at, kill)
            save = checkpoint.Saver.save

            def recorded(saver: checkpoint.Saver, iteration: int, *rest: Any, **keywords: Any) -> None:
                save(saver, iteration, *rest, **keywords)
                saved.write_text(str(iteration))

            monkeypatch.setattr(checkpoint.Saver, "save", recorded)
            run(*flags, f"--out_dir={out_dir}")

        where = f"killed at step {at}, {names[at - 1]}"
        assert in_child(killed) == -signal.SIGKILL, where
        if saved.exists():
            assert checkpoint.load(checkpoint.newest(out_dir)).iter_num >= int(saved.read_text()), where
        go_on(out_dir, *flags)
        assert same(outcome(out_dir), undisturbed), where
        assert not list(out_dir.glob("*.tmp")), where


# stopped by a signal


def stop(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, at: int, number: int = signal.SIGTERM) -> list[str]:
    """Have this process get a signal within the `at`-th call of a function; the list names what runs after that."""
    calls, after = [], []

    def signalled(each: str, *arguments: Any) -> None:
        calls.append(each)
        if len(calls) == at:
            signal.raise_signal(number)

    before_each(monkeypatch, [(owner, name)], signalled)
    noted = [(metrics.Metrics, "step"), (checkpoint, "save"), (Dataset, "windows")]
    before_each(monkeypatch, noted, lambda each, *arguments: len(calls) < at or after.append(each))
    return after


@pytest.mark.parametrize("at", range(1, 10))
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_after_its_iteration(
    number: int, at: int, flags: list[str], undisturbed: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """Catches an iteration more, two saves, another exit status, a command that does not go on; state that is not saved."""
    out_dir = tmp_path / "a run"
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        after = stop(patch, train, "clip_gradient", at, number)
        with pytest.raises(SystemExit) as end:
            run(*flags, f"--out_dir={out_dir}")
    assert end.value.code == 128 + number
    assert (after.count("step"), after.count("save")) == (1, 1)
    assert handlers == (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))
    assert checkpoint.load(out_dir / checkpoint.LAST).iter_num == at
    *_, stopped, command = capsys.readouterr().out.splitlines()
    assert f"{signal.Signals(number).name}: stopped and saved after {at} of 9 iterations" in stopped
    python, script, *arguments = shlex.split(command)
    assert (python, script) == ("python", "train.py")
    run(*arguments)
    assert same(outcome(out_dir), undisturbed)


@pytest.mark.parametrize("at", [1, 2, 4, 5, 6, 12, 13, 15, 16])  # in and after the evaluations at 0, 3 and 6: 4 windows each
def test_a_signal_ends_an_evaluation_too(
    at: int, flags: list[str], undisturbed: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a stop that waits for a long evaluation, one that is counted although it was not done, and one that is lost."""
    with monkeypatch.context() as patch:
        after = stop(patch, Dataset, "windows", at)
        with pytest.raises(SystemExit) as end:
            run(*flags, f"--out_dir={tmp_path / 'out'}")
    assert end.value.code == 128 + signal.SIGTERM
    evaluating = at <= 4 or 11 <= at <= 14
    assert (after.count("windows"), after.count("step")) == (0, 0) if evaluating else (at % 2, 1)
    assert after.count("save") == 1
    go_on(tmp_path / "out")
    assert same(outcome(tmp_path / "out"), undisturbed)


@pytest.mark.parametrize(("at", "saved"), [(7, 3), (8, 4)])  # numbers are summed up twice in an evaluation, once in a step
def test_a_signal_to_another_process_stops_this_one(
    at: int, saved: int, flags: list[str], undisturbed: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches processes that part, one in a training step or an evaluation in which it waits for the others for good."""
    calls = []

    def sum_up(group: distributed.Group, *given: float) -> list[float]:
        calls.append(len(given))
        return [*given[:-1], given[-1] + signal.SIGTERM * (len(given) > 1 and calls.count(3) == at)]

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(distributed.Group, "sum", sum_up)
        run(*flags, f"--out_dir={tmp_path / 'out'}")
    assert end.value.code == 128 + signal.SIGTERM
    assert checkpoint.load(tmp_path / "out" / checkpoint.LAST).iter_num == saved
    go_on(tmp_path / "out")
    assert same(outcome(tmp_path / "out"), undisturbed)


@needs_fork
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_the_run_at_once_and_leaves_files_whole(
    number: int, flags: list[str], undisturbed: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches an impatient person's second Ctrl-C that is ignored, or that destroys what the first began to save."""

    def twice() -> None:
        monkeypatch.setattr(runs, "SIGNAL_DEBOUNCE_SECONDS", -1.0)
        stop(monkeypatch, train, "clip_gradient", 8, number)
        steps(monkeypatch, 1 + len(names), lambda *call: signal.raise_signal(number))
        run(*flags, f"--out_dir={tmp_path / 'out'}")

    with monkeypatch.context() as patch:
        names = steps(patch, 0, kill)
        stop(patch, train, "clip_gradient", 8)
        with pytest.raises(SystemExit):
            run(*flags, f"--out_dir={tmp_path / 'counted'}")
    names = names[: len(names) - 1 - names[::-1].index("save")]  # up to the last save, which the second signal interrupts
    assert in_child(twice) == -number
    assert checkpoint.load(tmp_path / "out" / checkpoint.LAST).iter_num == 6
    go_on(tmp_path / "out")
    assert same(outcome(tmp_path / "out"), undisturbed)


def test_a_run_in_another_thread_trains(flags: list[str], undisturbed: dict[str, Any], tmp_path: Path) -> None:
    """Catches handlers that are set where Python lets the main thread alone set them."""
    thread = threading.Thread(target=run, args=[*flags, f"--out_dir={tmp_path / 'out'}"])
    thread.start()
    thread.join()
    assert same(outcome(tmp_path / "out"), undisturbed)


# without room on the disk


def test_a_disk_that_is_full_for_a_moment_costs_no_run(
    flags: list[str], undisturbed: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """Catches a run that dies of a failed save, is silent about it, leaves half a file, or claims a final state it has not."""

    def fail(name: str, *arguments: Any) -> None:
        if name == "save":  # in the middle of it
            arguments[1].write(bytes(1000))
        if name in ("replace", "link", "fsync", "save"):
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        names = steps(patch, 0, fail)
        run(*flags, f"--out_dir={tmp_path / 'counted'}")
    failed = 0
    for at in range(1, len(names) + 1):
        out_dir, where = tmp_path / f"full{at}", f"no room at step {at}, {names[at - 1]}"
        capsys.readouterr()
        with monkeypatch.context() as patch:
            steps(patch, at, fail)
            try:
                run(*flags, f"--out_dir={out_dir}")
            except UserError as error:
                failed += 1
                assert "No space left on device" in str(error), where
                assert checkpoint.load(checkpoint.newest(out_dir)).iter_num == 8, where
        if names[at - 1] == "save":
            assert "No space left on device" in capsys.readouterr().err, where
        assert not list(out_dir.glob("*.pt.tmp")), where
        go_on(out_dir)
        found = outcome(out_dir)
        found.setdefault(checkpoint.BEST, undisturbed[checkpoint.BEST])  # there was no room for it when it was the newest
        assert same(found, undisturbed), where
    assert failed == 3  # the save, the flush and the renaming of the last state


@needs_fork
@pytest.mark.skipif(resource is None, reason="this system has no limits on files")
@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.7, 0.99])
def test_a_disk_that_stays_full_leaves_the_last_checkpoint(
    share: float, flags: list[str], undisturbed: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches what the system does rather than what a test makes it do: torch.save raises errors of its own, rows break off."""
    out_dir = tmp_path / "out"
    size = int((tmp_path / "undisturbed" / checkpoint.LAST).stat().st_size * share)

    def fill_up() -> None:
        save = checkpoint.save

        def last_room(*arguments: Any) -> None:
            save(*arguments)
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))  # no file may grow beyond that

        monkeypatch.setattr(checkpoint, "save", last_room)
        run(*flags, f"--out_dir={out_dir}")

    assert in_child(fill_up) == 1
    assert checkpoint.load(checkpoint.newest(out_dir)).iter_num == 2
    assert not list(out_dir.glob("*.tmp"))
    whole = (tmp_path / "undisturbed" / "metrics.csv").stat().st_size
    assert len(metrics.read_rows(out_dir / "metrics.csv")) == 13 or size < whole  # the run did go on to its end
    go_on(out_dir)
    assert same(outcome(out_dir), undisturbed)


def test_a_failed_save_at_a_signal_is_no_clean_stop(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """Catches a promise to go on from a state that is not there."""

    def fail(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    stop(monkeypatch, train, "clip_gradient", 5)
    before_each(monkeypatch, [(torch, "save")], fail)
    with pytest.raises(UserError, match="No space left on device"):
        run(*flags, f"--out_dir={tmp_path / 'out'}")
    assert "init_from=resume" not in capsys.readouterr().out


# without data, or memory


@pytest.mark.parametrize("at", [5, 6, 7, 8, 9, 14, 17])
@pytest.mark.parametrize("name", ["train.bin", "val.bin"])
def test_a_dataset_that_vanishes_costs_no_update(
    at: int,
    name: str,
    flags: list[str],
    undisturbed: dict[str, Any],
    dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Catches a run that ends with a traceback, or without the state that it had come to."""
    before, calls = (dataset / name).read_bytes(), []

    def vanish(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == at:
            (dataset / name).unlink()

    with monkeypatch.context() as patch:
        before_each(patch, [(Dataset, "windows")], vanish)
        reached = []
        before_each(patch, [(train, "clip_gradient")], lambda *arguments: reached.append(1))
        with pytest.raises(UserError, match=rf"{name} can no longer be read"):
            run(*flags, f"--out_dir={tmp_path / 'out'}")
    (dataset / name).write_bytes(before)
    if reached:
        assert checkpoint.load(checkpoint.newest(tmp_path / "out")).iter_num == len(reached)
    go_on(tmp_path / "out", *flags)
    assert same(outcome(tmp_path / "out"), undisturbed)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), MemoryError()])
def test_memory_that_runs_out_names_the_keys_to_lower(
    error: Exception, flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a traceback where a person must know which keys to change; the checkpoint that was there, spoilt."""

    def fail(*arguments: Any) -> None:
        raise error

    steps(monkeypatch, 30, fail)
    with pytest.raises(UserError, match=r"^out of memory: lower --batch_size \(now 4\) and raise --gradient_accum.* \(now 2\)"):
        run(*flags, f"--out_dir={tmp_path / 'out'}")
    checkpoint.load(tmp_path / "out" / checkpoint.LAST)


# early stopping


def test_early_stopping_counts_evaluations_without_a_better_one(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """Catches a count that is off by one, is reset by a resume, or makes a resumed run another one."""
    patient = [*flags, "--patience=2", "--max_iters=90"]
    run(*patient, f"--out_dir={tmp_path / 'whole'}")
    assert "stopped early: 2 evaluations" in capsys.readouterr().out
    whole = outcome(tmp_path / "whole")
    assert [int(row["iteration"]) for row in whole["rows"] if row["val_loss"]] == [0, 3, 6, 9]  # the best being that after 3
    for at in range(1, 10):
        out_dir = tmp_path / f"stopped{at}"
        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            stop(patch, train, "clip_gradient", at)
            run(*patient, f"--out_dir={out_dir}")
        go_on(out_dir)
        assert same(outcome(out_dir), whole), f"stopped in iteration {at}"
    capsys.readouterr()
    go_on(tmp_path / "whole")
    assert "stopped early: 2 evaluations" in capsys.readouterr().out
    assert same(outcome(tmp_path / "whole"), whole)
    run("--init_from=resume", f"--out_dir={tmp_path / 'whole'}", "--patience=3")
    assert torch.load(tmp_path / "whole" / checkpoint.LAST, weights_only=True)["iter_num"] >= 12


# new runs


def test_a_new_run_sets_an_earlier_one_aside(
    flags: list[str], undisturbed: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """Catches an earlier run that is lost to a forgotten --init_from, and one whose best weights pass for the new run's."""
    out_dir = tmp_path / "undisturbed"
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        stop(patch, train, "clip_gradient", 1)
        run(*flags, f"--out_dir={out_dir}")
    assert str(out_dir / "previous") in capsys.readouterr().err
    assert same(outcome(out_dir / "previous"), undisturbed)
    assert [path.name for path in out_dir.glob("*.pt")] == [checkpoint.LAST]
    run(*flags, f"--out_dir={out_dir}", "--max_iters=0")
    assert [path.name for path in (out_dir / "previous").glob("*.pt")] == [checkpoint.LAST]  # and not the first run's best
    assert torch.load(out_dir / "previous" / checkpoint.LAST, weights_only=True)["iter_num"] == 1
    assert not list(out_dir.glob("*.pt"))
    run(*flags, f"--out_dir={out_dir}", "--max_iters=0")  # there was nothing worth to be set aside
    assert (out_dir / "previous" / checkpoint.LAST).exists()


@pytest.mark.parametrize(("flag", "saved"), [("--checkpoint_minutes=0", 6), ("--checkpoint_minutes=1e-9", 8)])
def test_the_clock_saves_too(flag: str, saved: int, flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a run of slow iterations that has nothing to go on from for hours."""
    quiet = [*flags, "--checkpoint_interval=0", "--always_save_checkpoint=False", flag]

    class Killed(Exception):
        pass

    def die(*arguments: Any) -> None:
        raise Killed

    at = []
    before_each(monkeypatch, [(train, "clip_gradient")], lambda *arguments: at.append(1) or len(at) < 10 or die())
    with pytest.raises(Killed):
        run(*quiet, f"--out_dir={tmp_path / 'out'}", "--max_iters=90", "--eval_interval=6")
    assert checkpoint.load(checkpoint.newest(tmp_path / "out")).iter_num == saved
