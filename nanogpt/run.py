"""What happens to a run from outside: signals that ask it to stop, a second run in its folder, memory that runs out."""

import contextlib
import os
import re
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from nanogpt import errors
from nanogpt.device import Group
from nanogpt.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
    import msvcrt

LOCK = "lock"  # a file in the run's folder, which the operating system holds locked for as long as the process lives
SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")  # Ctrl-C; the end of a job's time; of a terminal, which Windows has not
SAME = 1.0
NO_MEMORY = re.compile(r"out of memory|not enough memory|can(no|')t allocate memory|ALLOC_FAILED", re.IGNORECASE)


class Signals:
    """Turns SIGNALS into a number to look at, for a run that stops when its state is whole.

    That holds inside its `with` block and in the main thread. A second signal ends the process at once; but not one within
    SAME seconds, since a cluster may send its signal to every process, and `torchrun` passes on the one that it has got itself.
    """

    def __init__(self) -> None:
        self.received = 0  # number of the signal that came; 0 for none
        self._received_at = 0.0
        self._previous = {}

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():
            for name in SIGNALS:
                number = getattr(signal, name, None)
                if number is not None and signal.getsignal(number) is not signal.SIG_IGN:  # ignored with nohup, or with &
                    self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: not one of Python's

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            if time.monotonic() - self._received_at > SAME:
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)
            return
        self.received, self._received_at = number, time.monotonic()
        if os.environ.get("RANK", "0") == "0":
            line = f"\n{signal.Signals(number).name}: finishing this iteration and saving; a second one ends the run at once\n"
            with contextlib.suppress(OSError):
                os.write(2, line.encode())  # print may be at work on stderr this very moment, and refuses to be entered twice


@contextlib.contextmanager
def only_run(out_dir: Path, group: Group) -> Iterator[None]:
    """Make `out_dir`, and hold it for this run alone; UserError in all processes where another run lives in it.

    UserError too where the folder cannot be written. One that is made here and stays empty goes away again.
    """
    refusal = None
    with contextlib.ExitStack() as held:
        if group.is_main:
            try:
                held.enter_context(_held(out_dir))
            except UserError as error:
                refusal = error
        (refused,) = group.sum(float(refusal is not None))
        if refused:
            raise refusal or UserError(f"--out_dir={out_dir}: the main process cannot use it")
        yield


@contextlib.contextmanager
def _held(out_dir: Path) -> Iterator[None]:
    is_new = not out_dir.exists()
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out_dir).close()
        file = open(out_dir / LOCK, "ab")
    except OSError as error:
        raise UserError(f"--out_dir={out_dir}: cannot write there ({error.strerror})") from error
    try:
        with file:
            try:
                _lock(file.fileno())
            except (BlockingIOError, PermissionError) as error:
                raise UserError(f"another run lives in {out_dir}: stop it first, or give this one another --out_dir") from error
            except OSError as error:  # as on some network disks
                errors.warn(f"{out_dir} cannot be locked ({error.strerror}): start no second run in it")
            yield
    finally:
        if is_new and os.listdir(out_dir) == [LOCK]:
            (out_dir / LOCK).unlink()
            out_dir.rmdir()


def _lock(descriptor: int) -> None:
    """Lock a file until it is closed or the process ends, however that ends; OSError where it is locked already."""
    if fcntl is not None:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    else:
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)


@contextlib.contextmanager
def memory(advice: str) -> Iterator[None]:
    """Turn what PyTorch and Python raise where memory runs out into a UserError that ends with `advice`."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # PyTorch has a class of its own for CUDA alone, a RuntimeError
        if not isinstance(error, MemoryError) and not NO_MEMORY.search(str(error)):
            raise
        raise UserError(f"out of memory: {advice}") from error
