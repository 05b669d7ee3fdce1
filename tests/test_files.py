"""Files that are written whole or not at all, and folders that one process writes into."""

import errno
import os
import shutil
import signal
from pathlib import Path

import pytest

from nanogpt import files
from nanogpt.errors import UserError
from nanogpt.files import FolderLock, atomic_write


def test_replaces_the_file_at_the_end_of_the_block(tmp_path: Path) -> None:
    """Catches a file whose new content can be seen before it is complete."""
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with atomic_write(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["file"]


def test_error_in_the_block_keeps_the_old_file(tmp_path: Path) -> None:
    """Catches half a file in place of the old one, and a .tmp file that is left behind."""
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(KeyError), atomic_write(path) as file:
        file.write(b"half")
        raise KeyError
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_leftover_link_is_not_written_into(tmp_path: Path) -> None:
    """Catches a killed process's .tmp file, a hard link to another checkpoint, through which that one is overwritten."""
    other = tmp_path / "other"
    other.write_bytes(b"precious")
    os.link(other, tmp_path / "file.tmp")
    with atomic_write(tmp_path / "file") as file:
        file.write(b"new")
    assert other.read_bytes() == b"precious"


@pytest.mark.parametrize("durable", [True, False])
def test_durable_flushes_before_it_renames(tmp_path: Path, durable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a rename that can outlive a power failure in which the content is lost."""
    calls = []
    for name in ("fsync", "replace"):
        original = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, name=name, original=original: calls.append(name) or original(*a))
    with atomic_write(tmp_path / "file", durable) as file:
        file.write(b"new")
    assert calls[: calls.index("replace")] == ["fsync"] * durable


# locks


def lock(folder: Path) -> FolderLock:
    return FolderLock(folder, "another test uses", "wait")


@pytest.mark.parametrize("made", [True, False])
def test_second_lock_is_refused(tmp_path: Path, made: bool) -> None:
    """Catches two holders, a folder that stays locked after an error, and a lock file or an empty folder left behind."""
    folder = tmp_path / "runs" / "out"
    if made:
        folder.mkdir(parents=True)
    with pytest.raises(KeyError), lock(folder):
        with pytest.raises(UserError, match=rf"^another test uses {folder}; wait$"), lock(folder):
            raise AssertionError("two hold the folder")
        raise KeyError
    assert folder.exists() == made
    with lock(folder):
        (folder / "file").touch()
    assert os.listdir(folder) == ["file"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_killed_process_unlocks(tmp_path: Path) -> None:
    """Catches a folder that has to be unlocked by hand after a crash."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        with lock(tmp_path):
            os.write(writing, b"!")
            signal.pause()
    os.read(reading, 1)
    with pytest.raises(UserError, match="another test"), lock(tmp_path):
        pass
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    with lock(tmp_path):
        pass


@pytest.mark.skipif(os.name == "nt", reason="Windows removes no open file")
def test_file_removed_between_open_and_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches two holders, one of them of a file that the process before it has just removed."""
    original, opened = files.lock_descriptor, []

    def removed_first(descriptor: int, blocking: bool) -> bool:
        opened.append(descriptor)
        if len(opened) == 1:
            (tmp_path / files.LOCK).unlink()
        return original(descriptor, blocking=blocking)

    monkeypatch.setattr(files, "lock_descriptor", removed_first)
    with lock(tmp_path) as held:
        assert held.is_held() and len(opened) == 2
        with pytest.raises(UserError, match="another test"), lock(tmp_path):
            pass


@pytest.mark.skipif(os.name == "nt", reason="Windows removes no open file")
@pytest.mark.parametrize("lose", [shutil.rmtree, lambda folder: folder.rename(folder.with_name("moved"))])
def test_lost_folder_is_locked_again(lose, tmp_path: Path) -> None:
    """Catches a process that believes to hold a folder that another one may take, or that removes the other one's lock."""
    folder = tmp_path / "out"
    with lock(folder) as held:
        assert held.is_held()
        lose(folder)
        assert not held.is_held()
        with lock(folder), pytest.raises(UserError, match="another test"):
            held.acquire()
        assert not held.is_held()
        held.acquire()
        assert held.is_held()
        with pytest.raises(UserError, match="another test"), lock(folder):
            pass
        lose(folder) if not (tmp_path / "moved").exists() else shutil.rmtree(folder)
        other = lock(folder)
        other.__enter__()
    assert other.is_held()
    other.__exit__()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_disk_without_locks_is_a_warning(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Catches a network disk on which nobody can train, or on which a killed run leaves a lock that nobody holds."""

    def refuse(*arguments: object, **keywords: object) -> bool:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files, "lock_descriptor", refuse)
    with lock(tmp_path), lock(tmp_path):
        assert os.listdir(tmp_path) == [files.LOCK]
    assert f"{tmp_path} cannot be locked ({os.strerror(number)})" in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(os.name == "nt", reason="Windows removes no open file")
def test_disk_that_tells_no_files_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Catches an endless loop, and a run that takes its own folder for a new one at each save."""
    monkeypatch.setattr(os.path, "samestat", lambda *stats: False)
    with lock(tmp_path) as held:
        assert held.is_held()
    assert "cannot be locked" in capsys.readouterr().err
