"""Token files, checked, and the batches that are drawn from them.

The windows of a batch are a pure function of (seed, stream, iteration): there is no state to save, and one process or
eight, interrupted or not, see the same tokens. They are read rather than memory-mapped: that is quicker for so small parts,
and where a file gets shorter in the meantime it is an error message rather than the end of the process.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from nanogpt import conversation, tokenizer
from nanogpt.conversation import ChatFormat
from nanogpt.errors import UserError

DATA = Path(__file__).resolve().parents[1] / "data"
DTYPES = ("uint8", "uint16", "uint32")
CHECKED_TOKENS = 1 << 24  # at either end of a token file; further in, each batch is checked as it is read
CHECKED_AT_ONCE = 1 << 20  # so that a large file takes no more memory than a small one

Split = Literal["train", "val"]
Stream = Literal["train", "eval_train", "eval_val"]
STREAMS = {"train": 0, "eval_train": 1, "eval_val": 2}


class FileLost(UserError):
    """A token file that is gone, or another one, since the dataset was opened."""


class Dataset:
    """One dataset's folder: its tokenizer, its chat format and the token files of its two splits."""

    def __init__(self, name: str):
        """Open data/<name>, or the folder `name` where that is a path; UserError where it is missing or damaged."""
        self.name = name
        self.folder = DATA / name
        for split in ("train", "val"):
            if not (self.folder / f"{split}.bin").is_file():
                raise UserError(_missing(name, self.folder, split))
        self.tokenizer = tokenizer.from_folder(self.folder)
        self.dtype = np.dtype("<u2")  # nanoGPT's, whose folders have no meta.json
        self.chat_format: ChatFormat | None = None  # that of a dataset of conversations
        counts = {}
        if (self.folder / "meta.json").is_file():
            meta = tokenizer.read_meta(self.folder)
            if meta.get("dtype") not in DTYPES or meta.get("vocab_size") != self.tokenizer.vocab_size:
                raise self._damaged("meta.json", f"dtype {meta.get('dtype')!r}, vocab_size {meta.get('vocab_size')!r}")
            self.dtype = np.dtype(meta["dtype"]).newbyteorder("<")
            counts = meta.get("tokens") if isinstance(meta.get("tokens"), dict) else {}
            if meta.get("chat_format") is not None:
                try:
                    self.chat_format = conversation.from_dict(meta["chat_format"])
                except UserError as error:
                    raise self._damaged("meta.json", str(error)) from error
        self.tokens: dict[Split, int] = {}
        for split in ("train", "val"):
            size = (self.folder / f"{split}.bin").stat().st_size
            if size % self.dtype.itemsize:
                raise self._damaged(f"{split}.bin", f"its {size} bytes are no whole number of {self.dtype.name} tokens")
            self.tokens[split] = size // self.dtype.itemsize
            if counts.get(split, self.tokens[split]) != self.tokens[split]:
                raise self._damaged(f"{split}.bin", f"{self.tokens[split]:,} tokens where meta.json counts {counts[split]}")
        self.masks = [split for split in self.tokens if (self.folder / f"{split}.mask.bin").is_file()]
        for split in self.masks:
            flags = (self.folder / f"{split}.mask.bin").stat().st_size
            if flags != self.tokens[split]:
                raise self._damaged(f"{split}.mask.bin", f"{flags} flags for {self.tokens[split]} tokens")

    def check(self, block_size: int, vocab_size: int) -> None:
        """Raise UserError where the splits are too short for `block_size` or hold ids that are not below `vocab_size`."""
        for split, count in self.tokens.items():
            if count <= block_size:
                advice = f"give --block_size={count - 1} or less, or more text" if count > 1 else "give more text"
                raise UserError(
                    f"{self.folder.name}/{split}.bin has {count:,} tokens, too few for block_size={block_size}: {advice}"
                )
            for end in {min(count, CHECKED_TOKENS), count}:
                for start in range(max(0, end - CHECKED_TOKENS), end, CHECKED_AT_ONCE):
                    part = self._read(split, "", self.dtype, np.array([start]), min(CHECKED_AT_ONCE, end - start))
                    self._check_ids(split, part, vocab_size)

    def describe(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of the dataset, so that its text can be generated without it."""
        formats = {} if self.chat_format is None else {"chat_format": conversation.to_dict(self.chat_format)}
        return {"tokenizer": self.tokenizer.to_dict(), **formats}

    def draw(self, split: Split, stream: Stream, seed: int, iteration: int, count: int, block_size: int) -> np.ndarray:
        """Return where `count` random windows of `block_size` + 1 tokens start: (count,) int64.

        The numbers are those of Philox (Salmon et al. 2011), a generator whose n-th output needs none before it.
        """
        philox = np.random.Philox(key=[seed, STREAMS[stream]], counter=[0, 0, iteration, 0])
        starts = philox.random_raw(count) % np.uint64(self.tokens[split] - block_size)
        return starts.astype(np.int64)

    def consecutive(self, split: Split, block_size: int, batch_size: int) -> Iterator[tuple[np.ndarray, int]]:
        """Yield (starts, length) of batches that cover a split with each target once; only the last window is shorter."""
        targets = self.tokens[split] - 1
        starts = np.arange(0, targets - block_size + 1, block_size)
        for i in range(0, len(starts), batch_size):
            yield starts[i : i + batch_size], block_size
        if targets % block_size:
            yield np.array([targets - targets % block_size]), targets % block_size

    def windows(self, split: Split, starts: np.ndarray, length: int, vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return inputs and targets, each (len(starts), length) int64: the windows at `starts`, and the same one further on.

        Targets that a mask file leaves out are -1. UserError where an id is not below `vocab_size`.
        """
        rows = self._read(split, "", self.dtype, starts, length + 1)  # (B, T + 1)
        self._check_ids(split, rows, vocab_size)
        inputs, targets = rows[:, :-1].astype(np.int64), rows[:, 1:].astype(np.int64)
        if split in self.masks:
            learned = self._read(split, ".mask", np.dtype(np.uint8), starts, length + 1)
            targets[learned[:, 1:] == 0] = -1
        return torch.from_numpy(inputs), torch.from_numpy(targets)

    def _read(self, split: Split, suffix: str, dtype: np.dtype, starts: np.ndarray, length: int) -> np.ndarray:
        """Return what a file of the split holds at `starts`: (len(starts), length); FileLost where it has changed."""
        path = self.folder / f"{split}{suffix}.bin"
        rows = np.empty((len(starts), length), dtype)
        expected = self.tokens[split] * dtype.itemsize
        try:
            with open(path, "rb", buffering=0) as file:
                whole = os.fstat(file.fileno()).st_size == expected
                for row, start in zip(rows, starts.tolist(), strict=True):
                    file.seek(start * dtype.itemsize)
                    whole = whole and file.readinto(row) == row.nbytes
        except OSError as error:
            raise FileLost(f"{path}: cannot be read any more ({error.strerror})") from error
        if not whole:
            raise FileLost(f"{path} has changed during the run: it no longer has its {expected:,} bytes")
        return rows

    def _check_ids(self, split: Split, ids: np.ndarray, vocab_size: int) -> None:
        if ids.max() >= vocab_size:
            raise UserError(
                f"{self.folder.name}/{split}.bin holds the token id {ids.max()}, beyond the model's {vocab_size} tokens: "
                "the dataset and the model do not belong together, or the file is damaged"
            )

    def _damaged(self, file: str, what: str) -> UserError:
        return UserError(f"{self.folder / file} is damaged ({what}); prepare the dataset again")


def _missing(name: str, folder: Path, split: str) -> str:
    if (folder / "prepare.py").is_file():
        return f"dataset '{name}' is not prepared yet (no {split}.bin): run python data/{name}/prepare.py"
    if folder.is_dir():
        return f"dataset '{name}': {folder} holds no {split}.bin"
    ready = sorted(path.parent.name for path in DATA.glob("*/train.bin"))
    return (
        f"dataset '{name}': no such folder in data/; prepared are: {', '.join(ready) or 'none'}; "
        "python data/text/prepare.py --input=FILE --name=NAME makes one of your own text"
    )
