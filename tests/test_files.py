"""Files that are written whole or not at all, and a lock that one process holds."""

import os
from pathlib import Path

import pytest

from nanogpt.files import atomic_write, lock


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


def test_lock_is_held_until_the_file_is_closed(tmp_path: Path) -> None:
    """Catches a lock that a second opener gets too, and one that outlives its file."""
    with open(tmp_path / "lock", "ab") as first, open(tmp_path / "lock", "ab") as second:
        lock(first.fileno())
        with pytest.raises((BlockingIOError, PermissionError)):
            lock(second.fileno())
    with open(tmp_path / "lock", "ab") as third:
        lock(third.fileno())
