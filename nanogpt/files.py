"""Files that are always whole, and folders that one process uses at a time."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from filelock import lock_descriptor

from nanogpt.errors import UserError, warn

LOCK = "lock"  # name of the file that a process locks while it writes into a folder
LOCK_TRIES = 100  # to lock a file that other processes create and remove


@contextlib.contextmanager
def atomic_write(path: Path, durable: bool = True) -> Iterator[BinaryIO]:
    """Open a binary file that replaces `path` once the block has ended without an error.

    The data goes to `path` + ".tmp" and is renamed, so that `path` holds the old content or the new, whenever the process
    is killed. `durable` also flushes it to the disk first (fsync), so that the same holds for a power failure.
    """
    part = path.with_name(path.name + ".tmp")
    try:
        part.unlink(missing_ok=True)  # a leftover may be a hard link to another file: not to be written into
        with open(part, "wb") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(part, path)
        if durable:
            sync_folder(path.parent)
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Flush a folder's names to the disk; Windows has no such call, and some network disks refuse it."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
        os.close(descriptor)


class FolderLock:
    """Keeps other processes out of a folder, which is created if need be, for as long as a `with` block runs.

    The operating system locks a file in the folder (flock, LockFileEx), and releases it if the process is killed. The file is
    removed at the end, as is the folder if it was created here and is empty. A disk without locks is a warning.
    """

    def __init__(self, folder: Path, holder: str, advice: str):
        """`holder` and `advice` are the error's if the lock is taken: "another run uses" out, "stop it first"."""
        self._folder, self._path = folder, folder / LOCK
        self._holder, self._advice = holder, advice
        self._file: BinaryIO | None = None
        self._can_compare = True  # whether the disk tells one file from another

    def __enter__(self) -> "FolderLock":
        self._is_new_folder = not self._folder.exists()
        self.acquire()
        return self

    def acquire(self) -> None:
        """Create the folder and lock it. Raises UserError if another process holds the lock, OSError if it has no file."""
        for _ in range(LOCK_TRIES):
            self._folder.mkdir(parents=True, exist_ok=True)
            file = open(self._path, "ab")
            try:
                is_locked = lock_descriptor(file.fileno(), blocking=False)
            except OSError as error:  # some network disks have no locks
                warn(f"{self._folder} cannot be locked ({error.strerror}): let no second process write there")
                break
            if not is_locked:
                file.close()
                raise UserError(f"{self._holder} {self._folder}; {self._advice}")
            if is_at(file, self._path):  # else another process has just removed this file
                break
            file.close()
        else:
            file, self._can_compare = open(self._path, "ab"), False
            warn(f"{self._folder} cannot be locked (its files are never the same): let no second process write there")
        if self._file is not None:
            self._file.close()
        self._file = file

    def is_held(self) -> bool:
        """Whether the locked file is still in its place, and not deleted or moved together with the folder."""
        return not self._can_compare or is_at(self._file, self._path)

    def __exit__(self, *exception: object) -> None:
        with self._file, contextlib.suppress(OSError):
            if os.name == "nt":
                self._file.close()  # Windows removes no open file; elsewhere, a closed one may be another process's
            if self.is_held():
                self._path.unlink()
            if self._is_new_folder:
                self._folder.rmdir()  # if it is empty


def is_at(file: BinaryIO, path: Path) -> bool:
    """Whether an open file is still the one at `path`: not deleted, moved or replaced, which Windows does not allow."""
    if os.name == "nt":
        return True
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except OSError:
        return False
