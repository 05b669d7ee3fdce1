"""Files that are always whole, and folders that one process uses at a time."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
    import msvcrt


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


def lock(descriptor: int) -> None:
    """Lock an open file until it is closed or the process ends. Raises BlockingIOError or PermissionError if it is taken.

    Raises another OSError on disks without locks, as some network disks are.
    """
    if fcntl is not None:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    else:
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
