"""run.py: the lock on a run's folder, and deferred signals; and out-of-memory errors as one line."""

import contextlib
import errno
import itertools
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest

from nanogpt import run
from nanogpt.checkpoint import BEST, LAST
from nanogpt.device import explain_out_of_memory
from nanogpt.distributed import Group
from nanogpt.errors import UserError
from nanogpt.run import METRICS, RUN_FILES, SIGNALS, Signals, lock_folder, set_aside, undo_set_aside

ALONE = Group()


def test_folder_is_locked(tmp_path: Path) -> None:
    """Catches two runs that write the same files."""
    with lock_folder(tmp_path, ALONE), pytest.raises(UserError, match=rf"another run uses {tmp_path}; stop it first"):
        with lock_folder(tmp_path, ALONE):
            pass


@pytest.mark.parametrize("there", [True, False])
def test_run_that_does_not_start_leaves_no_folder(tmp_path: Path, there: bool) -> None:
    """Catches an empty folder for every mistyped key, and a user's own folder that is removed."""
    out_dir = tmp_path / "out"
    if there:
        out_dir.mkdir()
    with pytest.raises(UserError, match="no such dataset"), lock_folder(out_dir, ALONE):
        raise UserError("no such dataset")
    assert out_dir.exists() == there


@pytest.mark.parametrize("refused, words", [(0.0, None), (1.0, "rank 0 cannot use it")])
def test_rank_0_locks_for_all(tmp_path: Path, monkeypatch, refused: float, words: str | None) -> None:
    """Catches ranks that lock each other out, or that go on if rank 0 was refused."""
    monkeypatch.setattr(Group, "sum", lambda group, *numbers: [sum(numbers) + refused])
    with lock_folder(tmp_path, ALONE) if words is None else pytest.raises(UserError, match=words):
        with lock_folder(tmp_path, Group(rank=1, local_rank=1, size=2)):
            assert words is None


@pytest.mark.parametrize("error", [PermissionError(errno.EACCES, "Permission denied"), OSError(errno.EROFS, "Read-only disk")])
def test_unwritable_folder_is_refused_at_once(tmp_path: Path, monkeypatch, error: OSError) -> None:
    """Catches hours of training that cannot be saved."""

    def refuse(**arguments):
        raise error

    monkeypatch.setattr(run.tempfile, "TemporaryFile", refuse)
    with pytest.raises(UserError, match=rf"--out_dir={tmp_path}: cannot write there \({error.strerror}\)"):
        with lock_folder(tmp_path, ALONE):
            pass


class Killed(Exception):
    pass


def set_aside_until(step: int, out_dir: Path) -> bool:
    """Set a run aside, but die before the `step`-th renaming; return whether it was finished."""
    steps = itertools.count()

    def dying(rename):
        def call(*arguments):
            if next(steps) == step:
                raise Killed
            return rename(*arguments)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((os, "replace"), (Path, "rename")):
            patch.setattr(owner, name, dying(getattr(owner, name)))
        with contextlib.suppress(Killed):
            set_aside(out_dir)
            return True
    return False


@pytest.mark.parametrize("newest", [BEST, LAST])
def test_kill_while_a_run_is_set_aside(newest: str, tmp_path: Path) -> None:
    """Catches a run that is torn apart, mixed with another, or resumed from an older state than its newest."""
    names = {*RUN_FILES} - ({LAST} if newest == BEST else set())
    for step in itertools.count():
        folder = tmp_path / str(step)
        folder.mkdir()
        for name in names:
            (folder / name).write_text(name, encoding="utf-8")
        finished = set_aside_until(step, folder)
        left = {path.name for path in folder.iterdir()} & names
        assert newest in left or not left
        if finished:
            break
        copy = shutil.copytree(folder, tmp_path / f"{step} resumed")
        undo_set_aside(copy)
        assert {path.name: path.read_text(encoding="utf-8") for path in copy.iterdir()} == {name: name for name in names}
        undo_set_aside(folder)
        set_aside(folder)
        assert [path.name for path in folder.iterdir()] == ["previous"]
        assert {path.name for path in (folder / "previous").iterdir()} == names
    assert step == len(names) + 1


def test_rows_of_a_run_without_a_checkpoint_are_kept(tmp_path: Path) -> None:
    """Catches the gradient norms of a run that became NaN, overwritten by the next attempt; nothing is kept of no updates."""
    rows = (("0", "2.5", ""), ("0", "", "2.5"))  # iteration, validation loss, loss
    for number, (iteration, val_loss, loss) in enumerate(rows):
        line = f"iteration,tokens,seconds,val_loss,loss\n{iteration},0,1,{val_loss},{loss}\n"
        (tmp_path / METRICS).write_text(line, encoding="utf-8")
        set_aside(tmp_path)
        assert (tmp_path / "previous" / METRICS).exists() == bool(number)


@pytest.mark.parametrize("found, refused", [([5, 5, 5], 0), ([5, 3, 5], 1), ([3, 5, 5], 2)])
def test_all_ranks_resume_from_the_newest_state(monkeypatch, found: list[int], refused: int) -> None:
    """Catches ranks that go on from different iterations, since one has an older copy of the folder or came too early."""
    monkeypatch.setattr(run, "newest", lambda out_dir: out_dir / LAST)
    monkeypatch.setattr(run, "load", lambda path, mmap: SimpleNamespace(iter_num=found[0]))
    for rank, iter_num in enumerate(found):
        sums = iter([[found[0]], [sum(other != found[0] for other in found)]])
        monkeypatch.setattr(Group, "sum", lambda group, number, sums=sums: next(sums))
        words = f"{refused} of 3 processes read another state than rank 0's newest, after {found[0]} iterations"
        with pytest.raises(UserError, match=words) if refused else contextlib.nullcontext():
            run.require_newest(iter_num, Path("out"), Group(rank=rank, size=3))


def test_state_saved_between_reading_and_locking(tmp_path: Path, monkeypatch) -> None:
    """Catches a run that goes on from an older state, and deletes the newer one."""
    monkeypatch.setattr(run, "newest", lambda out_dir: out_dir / LAST)
    monkeypatch.setattr(run, "load", lambda path, mmap: SimpleNamespace(iter_num=40))
    run.require_newest(40, tmp_path, ALONE)
    with pytest.raises(UserError, match="1 of 1 processes read another state"):
        run.require_newest(20, tmp_path, ALONE)


# signals


@pytest.mark.parametrize("name", SIGNALS)
def test_signal_is_noted_and_handlers_are_restored(name: str, capfd) -> None:
    """Catches a run that dies in the middle of an update or stops without a word, and a handler that stays."""
    number = getattr(signal, name)
    before = [signal.getsignal(getattr(signal, each)) for each in SIGNALS]
    with Signals() as signals:
        assert signals.received == 0
        signal.raise_signal(number)
        assert signals.received == number
    assert before == [signal.getsignal(getattr(signal, each)) for each in SIGNALS]
    assert f"{name}: finishing this iteration and saving" in capfd.readouterr().err


def test_same_signal_twice_is_one(capfd) -> None:
    """Catches a run that is killed while it saves because both the cluster and torchrun pass on one signal."""
    with Signals() as signals:
        for name in ("SIGTERM", "SIGTERM", "SIGINT"):
            signal.raise_signal(getattr(signal, name))
        assert signals.received == signal.SIGTERM
    assert capfd.readouterr().err.count("finishing this iteration") == 1


def test_ignored_signal_stays_ignored() -> None:
    """Catches a run under nohup, or in a script's background, that ends with its terminal."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Signals() as signals:
            signal.raise_signal(signal.SIGINT)
            assert signals.received == 0
    finally:
        signal.signal(signal.SIGINT, before)


# memory


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB."),
        RuntimeError("MPS backend out of memory (MPS allocated: 8 GB)."),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
        ),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"),
    ],
)
def test_out_of_memory_is_recognized(error: Exception) -> None:
    """Catches a device whose out-of-memory error gets a traceback."""
    with pytest.raises(UserError, match=r"^out of memory: take less$"), explain_out_of_memory("take less"):
        raise error


def test_other_errors_keep_their_traceback() -> None:
    """Catches a bug that is reported as out of memory."""
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), explain_out_of_memory("take less"):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
