"""Runs that are killed, stopped by a signal or find the disk full: a resume gives the run that nothing happened to."""

import errno
import json
import math
import os
import shlex
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import counting, read_rows, run_train, write_dataset

import train
from nanogpt import checkpoint, distributed, metrics
from nanogpt.dataset import Dataset
from nanogpt.errors import UserError
from nanogpt.files import LOCK
from nanogpt.run import lock_folder

try:
    import resource
except ImportError:  # Windows
    resource = None

# with dropout, gradient accumulation and bf16; saves after 2, 3, 4, 6, 8 and 9 updates; the best evaluation is the one after 3
FLAGS = (
    "--n_layer=1 --n_head=2 --n_embd=16 --block_size=16 --batch_size=4 --gradient_accumulation_steps=2 --dropout=0.2 "
    "--dtype=bfloat16 --eval_iters=2 --eval_interval=3 --max_iters=9 --warmup_iters=8 --lr_decay_iters=100 --seed=12 "
    "--learning_rate=0.3 --always_save_checkpoint=False --checkpoint_interval=2 --checkpoint_minutes=0 --device=cpu"
).split()
MEASURED = ("seconds", "tokens_per_second", "mfu", "peak_memory_mb")  # columns that differ from run to run

needs_fork = pytest.mark.skipif(
    not hasattr(os, "fork") or torch.cuda.is_available(),
    reason="no fork here, or CUDA, with which PyTorch's backward cannot fork",
)


@pytest.fixture(autouse=True)
def flushes_at_fixed_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let rows wait for the next evaluation or save, so that the steps of a run do not depend on its speed."""
    monkeypatch.setattr(metrics, "FLUSH_SECONDS", math.inf)


def go_on(out_dir: Path, *flags: str) -> None:
    """Resume the run in `out_dir`, or start it again if it has no checkpoint yet."""
    if any((out_dir / name).exists() for name in (checkpoint.LAST, checkpoint.BEST)):
        run_train("--init_from=resume", f"--out_dir={out_dir}")
    else:
        run_train(*flags, f"--out_dir={out_dir}")


def in_child(action: Callable[[], object]) -> int:
    """Do `action` in a fork of this process and return its exit status, or minus the number of the signal that ended it."""
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
    """Return a run's checkpoints and rows without what is measured and the name of its folder."""
    found: dict[str, Any] = {}
    for name in sorted(path.name for path in out_dir.glob("*.pt")):
        found[name] = torch.load(out_dir / name, weights_only=True)
        found[name]["config"] = {k: v for k, v in found[name]["config"].items() if k not in ("out_dir", "init_from")}
    found["rows"] = [{k: v for k, v in row.items() if k not in MEASURED} for row in read_rows(out_dir)]
    return found


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dataset of all runs here."""
    folder = tmp_path_factory.mktemp("dataset")
    write_dataset(folder, counting(1000))
    return folder


@pytest.fixture(scope="module")
def flags(dataset: Path) -> list[str]:
    return [*FLAGS, f"--dataset={dataset}"]


@pytest.fixture(scope="module")
def undisturbed_folder(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the run that nothing happened to; not to be written into."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run_train(*flags, f"--out_dir={folder}")
    return folder


@pytest.fixture(scope="module")
def undisturbed(undisturbed_folder: Path) -> dict[str, Any]:
    """The outcome of the run that nothing happened to."""
    found = outcome(undisturbed_folder)
    assert (found[checkpoint.BEST]["iter_num"], found[checkpoint.LAST]["iter_num"], len(found["rows"])) == (3, 9, 13)
    return found


def before_each(monkeypatch: pytest.MonkeyPatch, functions: list[tuple[Any, str]], act: Callable[..., object]) -> None:
    """Call `act(name, *arguments)` before each call of `functions`, given as (owner, name)."""

    def watched(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            act(name, *arguments)
            return original(*arguments, **keywords)

        return call

    for owner, name in functions:
        monkeypatch.setattr(owner, name, watched(name, getattr(owner, name)))


def before_step(monkeypatch: pytest.MonkeyPatch, at: int | None, act: Callable[..., None]) -> list[str]:
    """Call `act(name, *arguments)` before the `at`-th step of a run, or before each if that is None.

    A step is a call that changes files or weights. Returns a list to which the steps' names are added.
    """
    seen: list[str] = []

    def note(name: str, *arguments: Any) -> None:
        if name == "unlink" and arguments[0].name != checkpoint.LAST:
            return  # a temporary file
        seen.append(name)
        if at in (None, len(seen)):
            act(name, *arguments)

    files = [(os, "replace"), (Path, "unlink"), (os, "fsync"), (torch, "save"), (metrics.Metrics, "_flush")]
    before_each(monkeypatch, [*files, (train, "clip_gradient")], note)
    return seen


def steps_of_a_run(flags: list[str], out_dir: Path) -> list[str]:
    """Return the names of the steps of the run that nothing happens to."""
    with pytest.MonkeyPatch.context() as patch:
        names = before_step(patch, 0, lambda *call: None)
        run_train(*flags, f"--out_dir={out_dir}")
    return names


# killed


@pytest.mark.parametrize("flush_seconds, flushes", [(0.0, 1 + 13), (math.inf, 1 + 4 + 7)])
def test_kill_at_any_step_loses_nothing_saved(
    flush_seconds: float,
    flushes: int,
    flags: list[str],
    undisturbed: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Catches a moment in which a kill leaves half a file, an older state than was saved, no best one, or doubled rows.

    What SIGKILL leaves is what is in the folder at that moment, so one run gives the folders of all kills: copies made before
    each of its steps. Rows are written one by one, or wait for the next evaluation or save.
    """
    monkeypatch.setattr(metrics, "FLUSH_SECONDS", flush_seconds)
    out_dir, saved, saved_before = tmp_path / "out", [0], []
    save = checkpoint.Saver.save

    def note_save(saver: checkpoint.Saver, iteration: int, *rest: Any, **keywords: Any) -> bool:
        is_written = save(saver, iteration, *rest, **keywords)
        saved.append(iteration)
        return is_written

    def copy_out_dir(name: str, *arguments: Any) -> None:
        saved_before.append(saved[-1])
        copy = tmp_path / f"killed{len(saved_before)}"
        if name == "save":  # in the middle of it
            _, file = arguments
            file.write(bytes(1000))
            file.flush()
            shutil.copytree(out_dir, copy)
            file.seek(0)
            file.truncate()
        else:
            shutil.copytree(out_dir, copy)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Saver, "save", note_save)
        names = before_step(patch, None, copy_out_dir)
        run_train(*flags, f"--out_dir={out_dir}")
    assert same(outcome(out_dir), undisturbed)
    assert {name: names.count(name) for name in set(names)} == {
        "replace": 2 + 6,  # config.json and metrics.csv, each save
        "unlink": 1,  # last.pt, when the best state is saved
        "fsync": 3 * 6 + 1,  # rows, the file and its folder at each save; the rows at the end
        "save": 6,
        "_flush": flushes,
        "clip_gradient": 9,
    }

    previous = None
    for at, (name, iteration) in enumerate(zip(names, saved_before, strict=True), 1):
        killed, moment = tmp_path / f"killed{at}", f"killed at step {at}, {name}"
        files = {path.name: path.read_bytes() for path in killed.iterdir()}
        if (files, iteration) == previous:
            continue  # the last step changed no file, so it would be the same test
        previous = files, iteration
        if iteration:
            assert checkpoint.load(checkpoint.newest(killed)).iter_num >= iteration, moment
        go_on(killed, *flags)
        assert same(outcome(killed), undisturbed), moment
        assert not list(killed.glob("*.tmp")), moment


@needs_fork
@pytest.mark.parametrize("name", ["replace", "unlink", "fsync", "save", "_flush", "clip_gradient"])
def test_killed_process_resumes(
    name: str, flags: list[str], undisturbed: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches what a copy of the folder does not show: a lock that outlives its process, or rows that it never wrote."""

    def kill(name: str, *arguments: Any) -> None:
        if name == "save":  # in the middle of it
            _, file = arguments
            file.write(bytes(1000))
            file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    def killed() -> None:
        before_step(monkeypatch, at, kill)
        run_train(*flags, f"--out_dir={tmp_path / 'out'}")

    names = steps_of_a_run(flags, tmp_path / "counted")
    at = [number for number, each in enumerate(names, 1) if each == name][names.count(name) // 2]
    assert in_child(killed) == -signal.SIGKILL
    go_on(tmp_path / "out", *flags)
    assert same(outcome(tmp_path / "out"), undisturbed)


# stopped by a signal


def stop(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, at: int, number: int = signal.SIGTERM) -> list[str]:
    """Send this process a signal before the `at`-th call of a function; the returned list names what runs after that."""
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
def test_signal_stops_after_the_iteration(
    number: int, at: int, flags: list[str], undisturbed: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """Catches one more iteration, two saves, another exit status, unsaved state, and a printed command that does not resume."""
    out_dir = tmp_path / "a run"
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        after = stop(patch, train, "clip_gradient", at, number)
        with pytest.raises(SystemExit) as end:
            run_train(*flags, f"--out_dir={out_dir}")
    assert end.value.code == 128 + number
    assert (after.count("step"), after.count("save")) == (1, 1)
    assert handlers == (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))
    assert checkpoint.load(checkpoint.newest(out_dir)).iter_num == at
    *_, stopped, command = capsys.readouterr().out.splitlines()
    assert f"{signal.Signals(number).name}: stopped and saved after {at} of 9 iterations" in stopped
    python, script, *arguments = shlex.split(command)
    assert (python, script) == ("python", "train.py")
    run_train(*arguments)
    assert same(outcome(out_dir), undisturbed)


@pytest.mark.parametrize("at", [1, 2, 4, 5, 6, 7, 12, 13, 15, 16, 17])  # batches 2-5 and 12-15 are for evaluation
def test_signal_interrupts_an_evaluation(
    at: int, flags: list[str], undisturbed: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a stop that waits for a long evaluation, and an interrupted evaluation that counts as done or is skipped."""
    with monkeypatch.context() as patch:
        after = stop(patch, Dataset, "windows", at)
        with pytest.raises(SystemExit) as end:
            run_train(*flags, f"--out_dir={tmp_path / 'out'}")
    assert end.value.code == 128 + signal.SIGTERM
    evaluating = at <= 5 or 12 <= at <= 15
    batches_left = 1 - at % 2  # of the iteration's two
    assert (after.count("windows"), after.count("step")) == ((0, 0) if evaluating else (batches_left, 1))
    assert after.count("save") == 1
    go_on(tmp_path / "out")
    assert same(outcome(tmp_path / "out"), undisturbed)


@pytest.mark.parametrize(("at", "saved"), [(7, 3), (8, 4)])  # an evaluation has two sums of four numbers, a step one of three
def test_signal_to_another_rank_stops_this_one(
    at: int, saved: int, flags: list[str], undisturbed: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches ranks that disagree about stopping, so that one waits forever in a training step or an evaluation."""
    calls = []

    def sum_up(group: distributed.Group, *given: float) -> list[float]:
        calls.append(len(given))
        return [*given[:-1], given[-1] + signal.SIGTERM * (len(given) in (3, 4) and calls.count(3) + calls.count(4) == at)]

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(distributed.Group, "sum", sum_up)
        run_train(*flags, f"--out_dir={tmp_path / 'out'}")
    assert end.value.code == 128 + signal.SIGTERM
    assert checkpoint.load(checkpoint.newest(tmp_path / "out")).iter_num == saved
    go_on(tmp_path / "out")
    assert same(outcome(tmp_path / "out"), undisturbed)


@needs_fork
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_second_signal_kills_but_leaves_files_whole(
    number: int, flags: list[str], undisturbed: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a second Ctrl-C that is ignored, or that destroys what the first began to save."""

    def twice() -> None:
        monkeypatch.setattr("nanogpt.run.SIGNAL_DEBOUNCE_SECONDS", -1.0)
        stop(monkeypatch, train, "clip_gradient", 8, number)
        before_step(monkeypatch, 1 + len(names), lambda *call: signal.raise_signal(number))
        run_train(*flags, f"--out_dir={tmp_path / 'out'}")

    with monkeypatch.context() as patch:
        names = before_step(patch, 0, lambda *call: None)
        stop(patch, train, "clip_gradient", 8)
        with pytest.raises(SystemExit):
            run_train(*flags, f"--out_dir={tmp_path / 'counted'}")
    names = names[: len(names) - 1 - names[::-1].index("save")]  # up to the last save, which the second signal interrupts
    assert in_child(twice) == -number
    assert checkpoint.load(checkpoint.newest(tmp_path / "out")).iter_num == 6
    go_on(tmp_path / "out")
    assert same(outcome(tmp_path / "out"), undisturbed)


def test_train_outside_the_main_thread(flags: list[str], undisturbed: dict[str, Any], tmp_path: Path) -> None:
    """Catches signal handlers that are set although Python allows that in the main thread only."""
    thread = threading.Thread(target=run_train, args=[*flags, f"--out_dir={tmp_path / 'out'}"])
    thread.start()
    thread.join()
    assert same(outcome(tmp_path / "out"), undisturbed)


# full disk


def test_disk_full_for_a_moment(
    flags: list[str], undisturbed: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """Catches a run that dies of a failed save, hides it, leaves half a file, or claims a final state that is not there."""

    def fail(name: str, *arguments: Any) -> None:
        if name == "save":  # in the middle of it
            arguments[1].write(bytes(1000))
        raise OSError(errno.ENOSPC, "No space left on device")

    names = steps_of_a_run(flags, tmp_path / "counted")
    failed = 0
    for at, name in enumerate(names, 1):
        if name in ("_flush", "clip_gradient"):
            continue  # writes no file that must be whole
        out_dir, moment = tmp_path / f"full{at}", f"disk full at step {at}, {name}"
        capsys.readouterr()
        with monkeypatch.context() as patch:
            before_step(patch, at, fail)
            try:
                run_train(*flags, f"--out_dir={out_dir}")
            except UserError as error:
                failed += 1
                assert "No space left on device" in str(error), moment
                assert checkpoint.load(checkpoint.newest(out_dir)).iter_num == 8, moment
        if name == "save":
            assert "No space left on device" in capsys.readouterr().err, moment
        assert not list(out_dir.glob("*.pt.tmp")), moment
        go_on(out_dir)
        found = outcome(out_dir)
        if checkpoint.BEST not in found:  # the disk was full when it was the newest
            found[checkpoint.BEST] = undisturbed[checkpoint.BEST]
            assert "ckpt_val_loss" not in found[checkpoint.LAST]["extra"], moment
            found[checkpoint.LAST]["extra"]["ckpt_val_loss"] = undisturbed[checkpoint.LAST]["extra"]["ckpt_val_loss"]
        assert same(found, undisturbed), moment
    assert failed == 3  # the save, the flush and the renaming of the last state


@needs_fork
@pytest.mark.skipif(resource is None, reason="this system has no limits on files")
@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.7, 0.99])
def test_disk_that_stays_full(
    share: float,
    flags: list[str],
    undisturbed: dict[str, Any],
    undisturbed_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Catches what only the system itself does: errors from within torch.save, rows that break off."""
    out_dir = tmp_path / "out"
    size = int((undisturbed_folder / checkpoint.LAST).stat().st_size * share)

    def fill_up() -> None:
        save = checkpoint.save

        def last_room(*arguments: Any) -> None:
            save(*arguments)
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))  # no file may grow beyond that

        monkeypatch.setattr(checkpoint, "save", last_room)
        run_train(*flags, f"--out_dir={out_dir}")

    assert in_child(fill_up) == 1
    assert checkpoint.load(checkpoint.newest(out_dir)).iter_num == 2
    assert not list(out_dir.glob("*.tmp"))
    whole = (undisturbed_folder / "metrics.csv").stat().st_size
    assert len(metrics.read_rows(out_dir / "metrics.csv")) == 13 or size < whole  # the run went on to its end
    go_on(out_dir)
    assert same(outcome(out_dir), undisturbed)


def test_failed_save_at_a_signal(flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Catches a printed command that resumes from a state that is not there."""

    def fail(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    stop(monkeypatch, train, "clip_gradient", 5)
    before_each(monkeypatch, [(torch, "save")], fail)
    with pytest.raises(UserError, match="No space left on device"):
        run_train(*flags, f"--out_dir={tmp_path / 'out'}")
    assert "init_from=resume" not in capsys.readouterr().out


# folder deleted


LOSSES = {"deleted": shutil.rmtree, "moved": lambda folder: folder.rename(folder.with_name("moved"))}


@pytest.mark.skipif(os.name == "nt", reason="Windows removes no open file")
@pytest.mark.parametrize("lose", LOSSES)
@pytest.mark.parametrize("at", [1, 2, 5, 9])
def test_folder_that_vanishes(
    lose: str, at: int, flags: list[str], undisturbed: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """Catches a run that cannot be saved any more, or only without its settings, its log or its lock."""
    out_dir, calls = tmp_path / "out", []

    def vanish(*arguments: Any) -> None:
        calls.append(1)
        if len(calls) == at:
            LOSSES[lose](out_dir)
        if len(calls) == at + 3:  # something was saved in between
            with pytest.raises(UserError, match="another run uses"), lock_folder(out_dir, distributed.Group()):
                pass

    with monkeypatch.context() as patch:
        before_each(patch, [(train, "clip_gradient")], vanish)
        run_train(*flags, f"--out_dir={out_dir}")
    assert capsys.readouterr().err.count("was deleted or moved; made it again") == 1
    assert json.loads((out_dir / "config.json").read_text(encoding="utf-8"))["out_dir"] == str(out_dir)
    found = outcome(out_dir)
    found.setdefault(checkpoint.BEST, undisturbed[checkpoint.BEST])  # lost if it was there before
    assert same(found, undisturbed)
    run_train("--init_from=resume", f"--out_dir={out_dir}", "--max_iters=12")
    assert [int(row["iteration"]) for row in read_rows(out_dir) if row["loss"]] == list(range(12))


@pytest.mark.skipif(os.name == "nt", reason="Windows removes no open file")
@pytest.mark.parametrize("until", [8, 100])
def test_folder_that_another_run_takes(
    until: int, flags: list[str], undisturbed: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a run that writes into the folder of another one, or over its files."""
    out_dir, calls = tmp_path / "out", []
    other = lock_folder(out_dir, distributed.Group())

    def take(*arguments: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            shutil.rmtree(out_dir)
            other.__enter__()
            (out_dir / checkpoint.BEST).write_bytes(b"of the other")
        if len(calls) == until:
            other.__exit__(None, None, None)

    before_each(monkeypatch, [(train, "clip_gradient")], take)
    if until == 8:
        run_train(*flags, f"--out_dir={out_dir}")
        assert (out_dir / "previous" / checkpoint.BEST).read_bytes() == b"of the other"
        last = undisturbed[checkpoint.LAST]
        extra = {name: value for name, value in last["extra"].items() if name != "ckpt_val_loss"}  # there is no ckpt.pt
        assert same(outcome(out_dir), {checkpoint.LAST: last | {"extra": extra}, "rows": undisturbed["rows"]})
    else:
        with pytest.raises(UserError, match="another run uses it"):
            run_train(*flags, f"--out_dir={out_dir}")
        assert sorted(os.listdir(out_dir)) == [checkpoint.BEST, LOCK]
        other.__exit__(None, None, None)


# no data, no memory


@pytest.mark.parametrize("at", [5, 6, 7, 8, 9, 14, 17])
@pytest.mark.parametrize("name", ["train.bin", "val.bin"])
def test_dataset_that_vanishes(
    at: int,
    name: str,
    flags: list[str],
    undisturbed: dict[str, Any],
    dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Catches a run that ends with a traceback, or without a checkpoint of its last update."""
    before, calls = (dataset / name).read_bytes(), []

    def vanish(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == at:
            (dataset / name).unlink()

    try:
        with monkeypatch.context() as patch:
            before_each(patch, [(Dataset, "windows")], vanish)
            reached = []
            before_each(patch, [(train, "clip_gradient")], lambda *arguments: reached.append(1))
            with pytest.raises(UserError, match=rf"{name} can no longer be read"):
                run_train(*flags, f"--out_dir={tmp_path / 'out'}")
    finally:
        (dataset / name).write_bytes(before)
    if reached:
        assert checkpoint.load(checkpoint.newest(tmp_path / "out")).iter_num == len(reached)
    go_on(tmp_path / "out", *flags)
    assert same(outcome(tmp_path / "out"), undisturbed)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), MemoryError()])
def test_out_of_memory_names_the_keys_to_lower(
    error: Exception, flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a traceback that does not say which keys to change, and a damaged checkpoint."""

    def fail(*arguments: Any) -> None:
        raise error

    before_step(monkeypatch, 30, fail)
    with pytest.raises(UserError, match=r"^out of memory: lower --batch_size \(now 4\) and raise --gradient_accum.* \(now 2\)"):
        run_train(*flags, f"--out_dir={tmp_path / 'out'}")
    checkpoint.load(checkpoint.newest(tmp_path / "out"))


# early stopping


def test_early_stopping(flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Catches a count that is off by one, or is reset by a resume."""
    patient = [*flags, "--patience=2", "--max_iters=90"]
    run_train(*patient, f"--out_dir={tmp_path / 'whole'}")
    assert "stopped early: 2 evaluations" in capsys.readouterr().out
    whole = outcome(tmp_path / "whole")
    assert [int(row["iteration"]) for row in whole["rows"] if row["val_loss"]] == [0, 3, 6, 9]  # the best is the one after 3
    for at in range(1, 10):
        out_dir = tmp_path / f"stopped{at}"
        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            stop(patch, train, "clip_gradient", at)
            run_train(*patient, f"--out_dir={out_dir}")
        go_on(out_dir)
        assert same(outcome(out_dir), whole), f"stopped in iteration {at}"
    capsys.readouterr()
    go_on(tmp_path / "whole")
    assert "stopped early: 2 evaluations" in capsys.readouterr().out
    assert same(outcome(tmp_path / "whole"), whole)
    run_train("--init_from=resume", f"--out_dir={tmp_path / 'whole'}", "--patience=3")
    assert checkpoint.load(checkpoint.newest(tmp_path / "whole")).iter_num >= 12


# new runs


def test_new_run_keeps_the_earlier_one(
    flags: list[str],
    undisturbed: dict[str, Any],
    undisturbed_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Catches an earlier run that is lost to a forgotten --init_from, and its best weights in place of the new run's."""
    out_dir = tmp_path / "out"
    shutil.copytree(undisturbed_folder, out_dir)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        stop(patch, train, "clip_gradient", 1)
        run_train(*flags, f"--out_dir={out_dir}")
    assert str(out_dir / "previous") in capsys.readouterr().err
    assert [path.name for path in out_dir.glob("*.pt")] == [checkpoint.LAST]
    run_train(*flags, f"--out_dir={out_dir}", "--max_iters=0")
    assert same(outcome(out_dir / "previous"), undisturbed)
    assert [path.name for path in (out_dir / "previous-2").glob("*.pt")] == [checkpoint.LAST]  # and not the first run's best
    assert torch.load(out_dir / "previous-2" / checkpoint.LAST, weights_only=True)["iter_num"] == 1
    assert not list(out_dir.glob("*.pt"))
    run_train(*flags, f"--out_dir={out_dir}", "--max_iters=0")  # there was nothing to keep
    assert not (out_dir / "previous-3").exists()


@pytest.mark.parametrize(("flag", "saved"), [("--checkpoint_minutes=0", 6), ("--checkpoint_minutes=1e-9", 8)])
def test_saves_by_the_clock(flag: str, saved: int, flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a run with slow iterations that does not save for hours."""
    quiet = [*flags, "--checkpoint_interval=0", "--always_save_checkpoint=False", flag]

    class Killed(Exception):
        pass

    def die(*arguments: Any) -> None:
        raise Killed

    at = []
    before_each(monkeypatch, [(train, "clip_gradient")], lambda *arguments: at.append(1) or len(at) < 10 or die())
    with pytest.raises(Killed):
        run_train(*quiet, f"--out_dir={tmp_path / 'out'}", "--max_iters=90", "--eval_interval=6")
    assert checkpoint.load(checkpoint.newest(tmp_path / "out")).iter_num == saved
