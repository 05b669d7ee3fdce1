"""Pickles of plain values and numpy's scalars; everything that could run code is refused."""

import os
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanogpt import pickles


def load(folder: Path, content: bytes) -> Any:
    (folder / "some.pkl").write_bytes(content)
    return pickles.load(folder / "some.pkl")


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    "value",
    [
        np.int64(-3),
        np.uint16(65535),
        np.int8(-1),
        np.float32(0.5),
        np.float64(1e300),
        np.bool_(True),
        np.str_("é🙂"),
    ],
    ids=repr,
)
def test_numpy_scalars_are_plain_values(tmp_path: Path, value: np.generic, protocol: int) -> None:
    """Catches a numpy scalar that is refused, stays numpy's, or changes its value."""
    found = load(tmp_path, pickle.dumps({"value": [value, b"\x00\xff"]}, protocol))
    assert found == {"value": [value.item(), b"\x00\xff"]}
    assert type(found["value"][0]) is type(value.item())


def test_big_endian_and_numpy_1(tmp_path: Path) -> None:
    """Catches a number whose bytes are read in the wrong order, or numpy 1's name for the function."""
    assert load(tmp_path, pickle.dumps(np.int32(7), 2).replace(b"numpy._core", b"numpy.core")) == 7
    kind = pickles.ScalarType("i4")
    kind.__setstate__((3, ">", None, None, None, -1, -1, 0))
    assert pickles.scalar(kind, struct.pack(">i", 7)) == 7


class Hostile:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple:
        return self.function, self.arguments


@pytest.mark.parametrize("protocol", [0, 2, pickle.HIGHEST_PROTOCOL])
@pytest.mark.parametrize(
    "value",
    [
        np.dtype(object),
        np.dtype([("a", "i4"), ("b", object)]),
        np.array(["a", None], dtype=object)[:1],
        np.arange(3),
        np.datetime64("2024-01-01"),
        np.void(b"abc"),
        np.random.default_rng(0),
        np.load,
        Hostile(np.frompyfunc, os.system, 1, 1),
        Hostile(np.dtype, "O"),
        Hostile(np.dtype, "i8,O"),
        Hostile(os.system, "echo > ran.txt"),
        Hostile(eval, "open('ran.txt', 'w')"),
        Hostile(getattr, "", "format"),
        Hostile(np.fromfile, "/dev/zero"),
        Hostile(pickle.loads, pickle.dumps(Hostile(os.system, "echo > ran.txt"))),
    ],
    ids=lambda value: str(value).partition(" at 0x")[0][:30],
)
def test_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: Any, protocol: int) -> None:
    """Catches numpy's classes with objects or code behind them, which a list of allowed modules would let through."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(pickle.UnpicklingError):
        load(tmp_path, pickle.dumps({"vocab_size": value}, protocol))
    assert not (tmp_path / "ran.txt").exists()


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (pickles.ScalarType, ("O",)),
        (pickles.ScalarType, ("V8",)),
        (pickles.ScalarType, ("U99999",)),
        (pickles.ScalarType, ("i8,O",)),
        (pickles.ScalarType, (["i8"],)),
        (pickles.scalar, (np.dtype("i8"), bytes(8))),
        (pickles.scalar, (pickles.ScalarType("i8"), [os.system])),
        (pickles.latin1, ("abc", "zlib_codec")),
    ],
)
def test_stand_ins_refuse_other_arguments(function: Any, arguments: tuple) -> None:
    """Catches an allowed name that takes objects, structures, huge strings or any codec."""
    with pytest.raises(pickle.UnpicklingError):
        function(*arguments)


def test_large_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a file that fills the memory before it is refused."""
    monkeypatch.setattr(pickles, "MAX_BYTES", 10)
    with pytest.raises(pickle.UnpicklingError, match="larger than 10 bytes"):
        load(tmp_path, pickle.dumps("a" * 20))
