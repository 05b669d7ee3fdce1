"""A run's folder for itself, signals that wait for a good moment, and memory that runs out in one line."""

import errno
import os
import signal
import types
from pathlib import Path

import pytest

from nanogpt import files, run
from nanogpt.device import explain_out_of_memory
from nanogpt.distributed import Group
from nanogpt.errors import UserError
from nanogpt.run import SIGNALS, Signals, lock_folder

ALONE = Group()


@pytest.mark.parametrize("made", [True, False])
def test_a_folder_is_for_one_run_at_a_time(tmp_path: Path, made: bool):
    """Two runs that write the same files, or a folder that stays locked when its run is over, also by a mistake."""
    out_dir = tmp_path / "runs" / "out"
    if made:
        out_dir.mkdir(parents=True)
    with pytest.raises(KeyError), lock_folder(out_dir, ALONE):
        with pytest.raises(UserError, match=rf"another run uses {out_dir}"), lock_folder(out_dir, ALONE):
            raise AssertionError("both runs live")
        (out_dir / "config.json").touch()
        raise KeyError
    with lock_folder(out_dir, ALONE):
        pass


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_killed_run_frees_its_folder(tmp_path: Path):
    """A folder that a person must unlock by hand after a crash."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        with lock_folder(tmp_path, ALONE):
            os.write(writing, b"!")
            signal.pause()
    os.read(reading, 1)
    with pytest.raises(UserError, match="another run uses"), lock_folder(tmp_path, ALONE):
        pass
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    with lock_folder(tmp_path, ALONE):
        pass


@pytest.mark.parametrize("there", [True, False])
def test_a_run_that_does_not_begin_leaves_no_folder(tmp_path: Path, there: bool):
    """Empty folders all over the place for every mistyped key, and a person's own one that is taken away."""
    out_dir = tmp_path / "out"
    if there:
        out_dir.mkdir()
    with pytest.raises(UserError, match="no such dataset"), lock_folder(out_dir, ALONE):
        raise UserError("no such dataset")
    assert out_dir.exists() == there


@pytest.mark.parametrize("refused, words", [(0.0, None), (1.0, "rank 0 cannot use it")])
def test_of_several_processes_the_main_one_locks_for_all(tmp_path: Path, monkeypatch, refused: float, words: str | None):
    """Processes that shut each other out, or go on without the main one."""
    monkeypatch.setattr(Group, "sum", lambda group, *numbers: [sum(numbers) + refused])
    with lock_folder(tmp_path, ALONE) if words is None else pytest.raises(UserError, match=words):
        with lock_folder(tmp_path, Group(rank=1, local_rank=1, size=2)):
            assert words is None


@pytest.mark.parametrize("error", [PermissionError(errno.EACCES, "Permission denied"), OSError(errno.EROFS, "Read-only disk")])
def test_a_folder_that_cannot_be_written_is_found_at_once(tmp_path: Path, monkeypatch, error: OSError):
    """Hours of training of which nothing can be saved."""

    def refuse(**arguments):
        raise error

    monkeypatch.setattr(run.tempfile, "TemporaryFile", refuse)
    with pytest.raises(UserError, match=rf"--out_dir={tmp_path}: cannot write there \({error.strerror}\)"):
        with lock_folder(tmp_path, ALONE):
            pass


def test_a_disk_without_locks_is_a_warning(tmp_path: Path, monkeypatch, capsys):
    """A cluster's network disk on which nobody can train."""

    def refuse(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(run, "lock", refuse)
    with lock_folder(tmp_path, ALONE):
        pass
    assert "cannot be locked (No locks available)" in capsys.readouterr().err


def test_windows_locks_with_its_own_call(tmp_path: Path, monkeypatch):
    """A missing module, or an error that is not understood, on Windows, where there is no flock."""
    locked = []

    def locking(descriptor: int, mode: int, count: int) -> None:
        if locked:
            raise PermissionError(errno.EACCES, "Permission denied")
        locked.append((mode, count))

    monkeypatch.setattr(files, "fcntl", None)
    monkeypatch.setattr(files, "msvcrt", types.SimpleNamespace(locking=locking, LK_NBLCK=2), raising=False)
    with lock_folder(tmp_path, ALONE):
        assert locked == [(2, 1)]
        with pytest.raises(UserError, match="another run uses"), lock_folder(tmp_path, ALONE):
            pass


# signals


@pytest.mark.parametrize("name", SIGNALS)
def test_a_signal_is_noted_and_the_handlers_come_back(name: str, capfd):
    """A run that dies in the middle of an update; a handler that stays; a person who is not told that the run still works."""
    number = getattr(signal, name)
    before = [signal.getsignal(getattr(signal, each)) for each in SIGNALS]
    with Signals() as signals:
        assert signals.received == 0
        signal.raise_signal(number)
        assert signals.received == number
    assert before == [signal.getsignal(getattr(signal, each)) for each in SIGNALS]
    assert f"{name}: finishing this iteration and saving" in capfd.readouterr().err


def test_a_signal_that_comes_in_two_ways_is_one(capfd):
    """A run that is killed in its save, since both the cluster and torchrun have passed on the same signal."""
    with Signals() as signals:
        for name in ("SIGTERM", "SIGTERM", "SIGINT"):
            signal.raise_signal(getattr(signal, name))
        assert signals.received == signal.SIGTERM
    assert capfd.readouterr().err.count("finishing this iteration") == 1


def test_an_ignored_signal_stays_ignored():
    """A run under nohup, or in a script's background, that ends with its terminal after all."""
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
def test_memory_that_runs_out_is_told_from_other_errors(error: Exception):
    """A device's way to say it that is not known, and with it a traceback."""
    with pytest.raises(UserError, match=r"^out of memory: take less$"), explain_out_of_memory("take less"):
        raise error


def test_other_errors_keep_their_traceback():
    """A mistake in the program that is told as want of memory."""
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), explain_out_of_memory("take less"):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
