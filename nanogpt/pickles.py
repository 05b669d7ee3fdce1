"""Reading pickles of plain values without running code: the only names they may hold are those of numpy's scalars.

    load(Path("meta.pkl"))  # {"vocab_size": 65, "itos": {0: "\\n", ...}}

`NUMPY_SCALARS` lists these names, each with a stand-in that calls no code of numpy's: an `np.int64(3)` is read as the int 3.
"""

import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np

MAX_BYTES = 64 << 20  # a table of every Unicode character needs a tenth of this


class ScalarType:
    """Stand-in for `numpy.dtype`: the name of a boolean, integer, float or string type, and its byte order."""

    def __init__(self, name: str, align: bool = False, copy: bool = False):
        """Take the arguments of a pickled dtype. Raises UnpicklingError for any other type, such as one of objects."""
        if not isinstance(name, str) or not re.fullmatch(r"b1|[iu][1248]|f[248]|U\d{1,4}", name):
            raise pickle.UnpicklingError(f"it holds the numpy type {name!r:.40}; only numbers and strings are read")
        self.name, self.order = name, "|"

    def __setstate__(self, state: tuple) -> None:
        _, self.order, *_ = state  # version, byte order, then what plain types do not have
        if self.order not in ("<", ">", "|"):
            raise pickle.UnpicklingError(f"it holds a numpy type of byte order {self.order!r:.40}")


def scalar(kind: ScalarType, data: bytes) -> bool | int | float | str:
    """Stand-in for numpy's function that makes a scalar of its bytes: returns the plain Python value."""
    if not isinstance(kind, ScalarType) or not isinstance(data, bytes):
        raise pickle.UnpicklingError("it holds a numpy scalar of another type than numbers and strings")
    (value,) = np.frombuffer(data, kind.order + kind.name).tolist()
    return value


def latin1(text: str, encoding: str) -> bytes:
    """Stand-in for `_codecs.encode`, with which protocols 0 to 2 write bytes."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it names the encoding {encoding!r:.40}; bytes are written in latin1")
    return text.encode(encoding)


NUMPY_SCALARS = {
    "numpy.dtype": ScalarType,
    "numpy.core.multiarray.scalar": scalar,  # numpy 1
    "numpy._core.multiarray.scalar": scalar,  # numpy 2
    "_codecs.encode": latin1,
}


class _PlainUnpickler(pickle.Unpickler):
    """Refuses pickles that name any other function or class, since those can run code."""

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in NUMPY_SCALARS:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which could run code")
        return NUMPY_SCALARS[f"{module}.{name}"]


def load(path: Path) -> Any:
    """Return the value of a pickle file. Raises any exception if it is damaged, UnpicklingError if it names other code."""
    if path.stat().st_size > MAX_BYTES:
        raise pickle.UnpicklingError(f"larger than {MAX_BYTES:,} bytes")
    with open(path, "rb") as file:
        return _PlainUnpickler(file).load()
