"""Datasets: checks token files and draws random batches from them.

The windows of a batch are a pure function of (seed, stream, iteration): there is no state to save, and every world size sees
the same tokens, interrupted or not. Token files are memory-mapped.
"""

import mmap
import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from nanogpt import conversation, tokenizer
from nanogpt.conversation import ChatFormat
from nanogpt.errors import UserError, shown

DATA = Path(__file__).resolve().parents[1] / "data"
DTYPES = ("uint8", "uint16", "uint32")
CHECKED_TOKENS = 1 << 24  # ids checked at each end of a token file; every batch is checked again when it is read
CHECK_CHUNK_TOKENS = 1 << 20  # ids checked at a time, so that a large file needs no more memory than a small one

Split = Literal["train", "val"]
Stream = Literal["train", "eval_train", "eval_val"]
STREAMS = {"train": 0, "eval_train": 1, "eval_val": 2}


class Dataset:
    """A prepared dataset: the token files of its two splits, its tokenizer and its chat format."""

    def __init__(self, name: str):
        """Open data/<name>, or else the folder at the path `name`. Raises UserError if it is missing or damaged."""
        self.name = name
        self.folder = tokenizer.dataset_folder(name, DATA)
        for split in ("train", "val"):
            if not (self.folder / f"{split}.bin").is_file():
                raise UserError(_missing(name, self.folder, split))

        # tokenizer and description
        self.tokenizer = tokenizer.from_folder(self.folder)
        # nanoGPT's folders have no meta.json
        self.dtype = np.dtype("<u2" if self.tokenizer.model_vocab_size <= 1 << 16 else "<u4")
        self.chat_format: ChatFormat | None = None  # set for a dataset of conversations
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

        # token files
        self.tokens: dict[Split, int] = {}
        self._ids: dict[Split, MappedFile] = {}
        for split in ("train", "val"):
            self._ids[split] = MappedFile(self.folder / f"{split}.bin", self.dtype)
            size = self._ids[split].size
            if size % self.dtype.itemsize:
                raise self._damaged(f"{split}.bin", f"its {size:,} bytes are not a whole number of {self.dtype.name} tokens")
            self.tokens[split] = size // self.dtype.itemsize
            expected = counts.get(split, self.tokens[split])
            if expected != self.tokens[split]:
                expected = f"{expected:,}" if isinstance(expected, int) else shown(expected)
                raise UserError(
                    f"{self.folder / split}.bin is damaged or of another dataset (it has {self.tokens[split]:,} tokens, but "
                    f"meta.json says {expected}); prepare it again, or if nanoGPT's prepare.py wrote it, remove meta.json"
                )

        # loss masks
        self._masks: dict[Split, MappedFile] = {}
        for split, count in self.tokens.items():
            path = self.folder / f"{split}.mask.bin"
            if path.is_file():
                mask = self._masks[split] = MappedFile(path, np.dtype(np.uint8))
                if mask.size != count:
                    raise self._damaged(path.name, f"it has {mask.size:,} flags for {count:,} tokens")

    def draw(self, split: Split, stream: Stream, seed: int, iteration: int, count: int, block_size: int) -> np.ndarray:
        """Return the starts of `count` random windows of `block_size` + 1 tokens: (count,) int64.

        Uses the counter-based generator Philox (Salmon et al. 2011): any iteration can be drawn without those before it.
        """
        philox = np.random.Philox(key=[seed, STREAMS[stream]], counter=[0, 0, iteration, 0])
        starts = philox.random_raw(count) % np.uint64(self.tokens[split] - block_size)
        return starts.astype(np.int64)

    def windows(self, split: Split, starts: np.ndarray, length: int, vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return inputs and targets, each (len(starts), length) int64; targets are the inputs shifted by one token.

        Targets that the loss mask leaves out are -1. Raises UserError if an id is not below `vocab_size`.
        """
        rows = self._ids[split].windows(starts, length + 1)  # (B, T + 1)
        self._check_ids(split, rows, vocab_size)
        inputs, targets = rows[:, :-1].astype(np.int64), rows[:, 1:].astype(np.int64)
        if split in self._masks:
            targets[~self._unmasked(split, starts, length)] = -1
        return torch.from_numpy(inputs), torch.from_numpy(targets)

    def consecutive(self, split: Split, block_size: int, batch_size: int) -> Iterator[tuple[np.ndarray, int]]:
        """Yield (starts, length) of batches that cover each target of a split once; only the last window is shorter."""
        targets = self.tokens[split] - 1
        starts = np.arange(0, targets - block_size + 1, block_size)
        for i in range(0, len(starts), batch_size):
            yield starts[i : i + batch_size], block_size
        if targets % block_size:
            yield np.array([targets - targets % block_size]), targets % block_size

    def loss_weights(self, split: Split, starts: np.ndarray, length: int) -> list[float]:
        """Return a weight for the mean loss of each micro-batch of windows: starts (micro-batches, B).

        It is the micro-batch's share of the unmasked targets times the number of micro-batches: 1 without a loss mask. So the
        mean of the weighted losses is the mean over all unmasked targets.
        """
        if split not in self._masks:
            return [1.0] * len(starts)
        unmasked = self._unmasked(split, starts.reshape(-1), length).reshape(len(starts), -1).sum(1)  # (micro-batches,)
        return (unmasked * len(starts) / max(1, unmasked.sum())).tolist()

    def check(self, block_size: int, vocab_size: int) -> None:
        """Raise UserError if a split is too short for `block_size`, or has ids that are not below `vocab_size`.

        Ids in the middle of a large file are left to `windows`, which checks each batch.
        """
        for split, count in self.tokens.items():
            if count <= block_size:
                advice = f"lower it to --block_size={count - 1} or add text" if count > 1 else "add text"
                raise UserError(
                    f"{self.folder.name}/{split}.bin must have more tokens than block_size={block_size}, got {count:,}; "
                    f"{advice}"
                )
            for end in {min(count, CHECKED_TOKENS), count}:
                for start in range(max(0, end - CHECKED_TOKENS), end, CHECK_CHUNK_TOKENS):
                    chunk = self._ids[split].windows(np.array([start]), min(CHECK_CHUNK_TOKENS, end - start))
                    self._check_ids(split, chunk, vocab_size)

    def describe(self) -> dict[str, Any]:
        """Return what a checkpoint stores, so that sampling works without the dataset: tokenizer and chat format."""
        formats = {} if self.chat_format is None else {"chat_format": conversation.to_dict(self.chat_format)}
        return {"tokenizer": self.tokenizer.to_dict(), **formats}

    def _unmasked(self, split: Split, starts: np.ndarray, length: int) -> np.ndarray:
        """Return which targets count in the loss, by the loss mask: (len(starts), length) bool."""
        return self._masks[split].windows(starts, length + 1)[:, 1:] != 0

    def _check_ids(self, split: Split, ids: np.ndarray, vocab_size: int) -> None:
        if ids.max() >= vocab_size:
            raise UserError(
                f"{self.folder.name}/{split}.bin: token ids must be below the model's vocabulary size {vocab_size:,}, got "
                f"{ids.max():,}; prepare the dataset again, or choose the dataset that belongs to the model"
            )

    def _damaged(self, file: str, why: str) -> UserError:
        return UserError(f"{self.folder / file} is damaged ({why}); prepare the dataset again")


class FileLost(UserError):
    """A token file has disappeared or changed since the dataset was opened."""


class MappedFile:
    """A memory-mapped array in a file that must not change while it is open."""

    def __init__(self, path: Path, dtype: np.dtype):
        self._path, self._dtype = path, dtype
        with open(path, "rb") as file:
            self._version = _version(os.fstat(file.fileno()))
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if self.size else b""  # an empty map is an error
        if self.size and hasattr(mmap, "MADV_RANDOM"):  # do not read ahead, which may be megabytes for each window
            self._map.madvise(mmap.MADV_RANDOM)

    @property
    def size(self) -> int:
        """Bytes in the file when it was opened."""
        return self._version[0]

    def windows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Copy windows of `length` items: (len(starts), length).

        Raises FileLost if the file has changed. One that is truncated while this reads it ends the process (SIGBUS).
        """
        self._require_unchanged()
        items = np.frombuffer(self._map, self._dtype)
        rows = np.empty((len(starts), length), self._dtype)
        for row, start in zip(rows, starts.tolist(), strict=True):
            row[:] = items[start : start + length]
        if hasattr(mmap, "MADV_DONTNEED"):  # release the pages, or the process would grow to the size of the file
            self._map.madvise(mmap.MADV_DONTNEED)
        self._require_unchanged()
        return rows

    def _require_unchanged(self) -> None:
        """Raise FileLost unless the file at the path is the mapped one: a map keeps a file that was removed or replaced."""
        try:
            version = _version(os.stat(self._path))
        except OSError as error:
            raise FileLost(f"{self._path} can no longer be read ({error.strerror})") from error
        if version != self._version:
            raise FileLost(f"{self._path} has changed during the run: do not prepare a dataset that a run uses")


def _version(stat: os.stat_result) -> tuple[int, ...]:
    """Return what changes if a file is written or replaced; its size is the first."""
    return stat.st_size, stat.st_ino, stat.st_mtime_ns


def prepared() -> list[str]:
    """Return the names of the datasets in data/ that are prepared."""
    return sorted(path.parent.name for path in DATA.glob("*/train.bin"))


def _missing(name: str, folder: Path, split: str) -> str:
    if (folder / "prepare.py").is_file():
        script = (Path("data", folder.name) if folder.parent == DATA else folder) / "prepare.py"
        return f"dataset '{name}' is not prepared yet (no {split}.bin); run python {shlex.quote(script.as_posix())}"
    if folder.is_dir():
        return f"dataset '{name}': no {split}.bin in {folder}; run the prepare.py that makes it"
    return (
        f"dataset '{name}' not found; prepared datasets: {', '.join(prepared()) or 'none'}; "
        "python data/text/prepare.py --input=FILE --name=NAME prepares your own text"
    )
