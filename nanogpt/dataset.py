"""Datasets: checks token files and draws random batches from them.

The windows of a batch are a pure function of (seed, stream, iteration): there is no state to save, and every world size sees
the same tokens, interrupted or not. Windows are read with plain file reads instead of a memory map: reads are faster for
pieces this small, and a file that shrinks during the run raises an error instead of killing the process (SIGBUS).
"""

import os
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


class FileLost(UserError):
    """A token file has disappeared or changed since the dataset was opened."""


class Dataset:
    """A prepared dataset: the token files of its two splits, its tokenizer and its chat format."""

    def __init__(self, name: str):
        """Open data/<name>, or the folder `name` if it is a path. Raises UserError if it is missing or damaged."""
        self.name = name
        self.folder = DATA / name
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
        for split in ("train", "val"):
            size = (self.folder / f"{split}.bin").stat().st_size
            if size % self.dtype.itemsize:
                raise self._damaged(f"{split}.bin", f"its {size:,} bytes are not a whole number of {self.dtype.name} tokens")
            self.tokens[split] = size // self.dtype.itemsize
            expected = counts.get(split, self.tokens[split])
            if expected != self.tokens[split]:
                expected = f"{expected:,}" if isinstance(expected, int) else shown(expected)
                raise self._damaged(f"{split}.bin", f"it has {self.tokens[split]:,} tokens, but meta.json says {expected}")

        # loss masks
        self.masks = [split for split in self.tokens if (self.folder / f"{split}.mask.bin").is_file()]
        for split in self.masks:
            flags = (self.folder / f"{split}.mask.bin").stat().st_size
            if flags != self.tokens[split]:
                raise self._damaged(f"{split}.mask.bin", f"it has {flags:,} flags for {self.tokens[split]:,} tokens")

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
                    chunk = self._read(split, "", self.dtype, np.array([start]), min(CHECK_CHUNK_TOKENS, end - start))
                    self._check_ids(split, chunk, vocab_size)

    def describe(self) -> dict[str, Any]:
        """Return what a checkpoint stores, so that sampling works without the dataset: tokenizer and chat format."""
        formats = {} if self.chat_format is None else {"chat_format": conversation.to_dict(self.chat_format)}
        return {"tokenizer": self.tokenizer.to_dict(), **formats}

    def draw(self, split: Split, stream: Stream, seed: int, iteration: int, count: int, block_size: int) -> np.ndarray:
        """Return the starts of `count` random windows of `block_size` + 1 tokens: (count,) int64.

        Uses the counter-based generator Philox (Salmon et al. 2011): any iteration can be drawn without those before it.
        """
        philox = np.random.Philox(key=[seed, STREAMS[stream]], counter=[0, 0, iteration, 0])
        starts = philox.random_raw(count) % np.uint64(self.tokens[split] - block_size)
        return starts.astype(np.int64)

    def consecutive(self, split: Split, block_size: int, batch_size: int) -> Iterator[tuple[np.ndarray, int]]:
        """Yield (starts, length) of batches that cover each target of a split once; only the last window is shorter."""
        targets = self.tokens[split] - 1
        starts = np.arange(0, targets - block_size + 1, block_size)
        for i in range(0, len(starts), batch_size):
            yield starts[i : i + batch_size], block_size
        if targets % block_size:
            yield np.array([targets - targets % block_size]), targets % block_size

    def windows(self, split: Split, starts: np.ndarray, length: int, vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return inputs and targets, each (len(starts), length) int64; targets are the inputs shifted by one token.

        Targets that the loss mask leaves out are -1. Raises UserError if an id is not below `vocab_size`.
        """
        rows = self._read(split, "", self.dtype, starts, length + 1)  # (B, T + 1)
        self._check_ids(split, rows, vocab_size)
        inputs, targets = rows[:, :-1].astype(np.int64), rows[:, 1:].astype(np.int64)
        if split in self.masks:
            learned = self._read(split, ".mask", np.dtype(np.uint8), starts, length + 1)
            targets[learned[:, 1:] == 0] = -1
        return torch.from_numpy(inputs), torch.from_numpy(targets)

    def _read(self, split: Split, suffix: str, dtype: np.dtype, starts: np.ndarray, length: int) -> np.ndarray:
        """Read windows from a file of the split: (len(starts), length). Raises FileLost if the file has changed."""
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
            raise FileLost(f"{path} can no longer be read ({error.strerror})") from error
        if not whole:
            raise FileLost(f"{path} has changed during the run: it no longer has {expected:,} bytes")
        return rows

    def _check_ids(self, split: Split, ids: np.ndarray, vocab_size: int) -> None:
        if ids.max() >= vocab_size:
            raise UserError(
                f"{self.folder.name}/{split}.bin: token ids must be below the model's vocabulary size {vocab_size:,}, got "
                f"{ids.max():,}; prepare the dataset again, or choose the dataset that belongs to the model"
            )

    def _damaged(self, file: str, why: str) -> UserError:
        return UserError(f"{self.folder / file} is damaged ({why}); prepare the dataset again")


def _missing(name: str, folder: Path, split: str) -> str:
    if (folder / "prepare.py").is_file():
        return f"dataset '{name}' is not prepared yet (no {split}.bin); run python data/{name}/prepare.py"
    if folder.is_dir():
        return f"dataset '{name}': no {split}.bin in {folder}; run the prepare.py that makes it"
    prepared = sorted(path.parent.name for path in DATA.glob("*/train.bin"))
    return (
        f"dataset '{name}' not found; prepared datasets: {', '.join(prepared) or 'none'}; "
        "python data/text/prepare.py --input=FILE --name=NAME prepares your own text"
    )
