"""Corpora that do not fit into memory, tokenized into the token files of a dataset; what is interrupted goes on.

First all documents are tokenized, in their order, into tokens.part, by threads: tiktoken works outside of Python's lock.
progress.part notes how far that has come. Then the documents are put in the order of the splits. Memory holds some chunks of
text or a block of tokens, and at the end some 30 bytes a document; the disk holds the tokens twice.
"""

import functools
import hashlib
import json
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tqdm import tqdm

from nanogpt import corpus, documents, errors
from nanogpt.documents import Position, Source
from nanogpt.errors import UserError
from nanogpt.tokenizer import TiktokenTokenizer

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

TOKENS, PROGRESS = "tokens.part", "progress.part"
CHUNK = 1 << 20  # characters that a thread tokenizes at a time
NOTE = 1 << 24  # tokens between two notes of the progress
BLOCK, BLOCK_DOCUMENTS = 1 << 25, 1 << 17  # tokens, and documents, that are put in order at a time


def prepare(
    folder: Path,
    source: Source,
    tokenizer: TiktokenTokenizer,
    split: Callable[[int], tuple[np.ndarray, np.ndarray]],
    workers: int,
    max_tokens: int = 0,
) -> None:
    """Write the documents of `source` as a dataset, or go on where the same call has ended before, however it did.

    The end-of-text token follows each document. `split` takes their count and returns which to train and to validate on, in
    order. With `max_tokens`, so many of the first tokens are taken. The number of `workers`, threads, changes nothing of the
    result. The sha256 in meta.json is that of the source's tokens. UserError where a document is damaged or the disk full.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with open(folder / TOKENS, "ab") as file:
            _lock(file, folder)
            try:
                _prepare(folder, file, source, tokenizer, split, workers, max_tokens)
            finally:
                if not (folder / PROGRESS).exists():  # nothing to go on from
                    with suppress(OSError):
                        (folder / TOKENS).unlink()
                        folder.rmdir()
    except KeyboardInterrupt:
        print("\nthe same command goes on where this one stops", file=sys.stderr)
        raise
    except OSError as error:
        for name in ("train.bin.tmp", "val.bin.tmp"):
            (folder / name).unlink(missing_ok=True)
        if error.filename is not None:
            raise
        raise UserError(f"{folder}: {error.strerror}; make room, and the same command goes on where this one stops") from error
    for name in (PROGRESS, TOKENS):
        (folder / name).unlink()


def _prepare(
    folder: Path,
    file: BinaryIO,
    source: Source,
    tokenizer: TiktokenTokenizer,
    split: Callable[[int], tuple[np.ndarray, np.ndarray]],
    workers: int,
    max_tokens: int,
) -> None:
    dtype = np.dtype(corpus.token_dtype(tokenizer.vocab_size)).newbyteorder("<")
    recipe = {"files": source.identity, "tokenizer": tokenizer.name, "max_tokens": max_tokens}
    state = _begin(folder, file, recipe, dtype)
    _tokenize(folder, file, state, source, tokenizer, dtype, workers)
    bounds, sha256 = _bounds(folder / TOKENS, tokenizer.end_of_text, dtype)
    lengths = np.diff(bounds)
    try:
        if len(lengths) < 2:
            raise UserError(f"at least 2 documents are needed, and there are {len(lengths)}; data/text splits a single one")
        splits = dict(zip(("train", "val"), split(len(lengths)), strict=True))
        counts = {name: int(lengths[chosen].sum()) for name, chosen in splits.items()}
        corpus.check_counts(counts)
    except UserError:  # no use in going on from here
        (folder / PROGRESS).unlink(missing_ok=True)
        raise
    with tqdm(total=int(bounds[-1]), desc="arranging", unit="token", unit_scale=True, disable=None) as bar:
        for name, chosen in splits.items():
            _arrange(folder / TOKENS, folder / f"{name}.bin.tmp", bounds, chosen, dtype, bar)
    extra = {"documents": {name: len(chosen) for name, chosen in splits.items()}}
    corpus.finish(folder, {"train.bin": None, "val.bin": None}, counts, tokenizer, source.name, sha256, extra)


def _lock(file: BinaryIO, folder: Path) -> None:
    """Keep other processes out of the folder for as long as `file` is open, where the system can."""
    if fcntl is not None:
        with suppress(OSError):  # of some network disks, which cannot
            try:
                fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(f"another prepare.py is at work in {folder}: wait for it, or stop it first") from error


# Tokenizing


def _begin(folder: Path, file: BinaryIO, recipe: dict[str, Any], dtype: np.dtype) -> dict[str, Any]:
    """Return the state that the same recipe has reached before, or the first one; cut `file` to what belongs to it."""
    state = {"recipe": recipe, "tokens": 0, "position": documents.BEGINNING}
    if (folder / PROGRESS).exists():
        noted = None
        with suppress(ValueError):  # a disk that lost power
            noted = json.loads((folder / PROGRESS).read_bytes())
        size = os.fstat(file.fileno()).st_size
        if noted is not None and noted["recipe"] == recipe and size >= noted["tokens"] * dtype.itemsize:
            state = noted
            print(f"going on after {state['tokens']:,} tokens")
        else:
            errors.warn(f"what was begun in {folder} had other keys or files, or is damaged; beginning anew")
    file.truncate(state["tokens"] * dtype.itemsize)
    return state


def _tokenize(
    folder: Path,
    file: BinaryIO,
    state: dict[str, Any],
    source: Source,
    tokenizer: TiktokenTokenizer,
    dtype: np.dtype,
    workers: int,
) -> None:
    """Append the tokens of the documents from `state` on to `file`, and note the progress."""
    encode = functools.partial(_encode, tokenizer=tokenizer, dtype=dtype)
    noted, limit = state["tokens"], state["recipe"]["max_tokens"]
    with (
        closing(_ahead(encode, _chunks(source, state["position"]), workers)) as chunks,
        tqdm(initial=noted, desc="tokenizing", unit="token", unit_scale=True, smoothing=0.1, disable=None) as bar,
    ):
        try:
            for (position, read), ids in chunks:
                ids = ids[: limit - state["tokens"]] if limit else ids
                file.write(ids)
                state = state | {"tokens": state["tokens"] + len(ids), "position": position}
                expected = state["tokens"] * sum(source.sizes) // max(1, read)
                bar.total = min(expected, limit) if limit else expected
                bar.update(len(ids))
                if limit and state["tokens"] == limit:
                    break
                if state["tokens"] - noted >= NOTE:
                    noted = state["tokens"]
                    _note(folder, file, state)
        finally:  # at the end, and where a document is damaged, the network is lost or Ctrl-C was pressed
            if state["tokens"] > noted:
                _note(folder, file, state)


def _note(folder: Path, file: BinaryIO, state: dict[str, Any]) -> None:
    """Write down the state of `file`, with what is in it safe on the disk."""
    file.flush()
    os.fsync(file.fileno())
    (folder / f"{PROGRESS}.tmp").write_text(json.dumps(state))
    os.replace(folder / f"{PROGRESS}.tmp", folder / PROGRESS)


def _chunks(source: Source, start: Position) -> Iterator[tuple[tuple[Position, int], list[str]]]:
    """Yield ((position after them, bytes read so far), documents) from a position on; the last may be none."""
    position, read, texts, size = start, 0, [], 0
    for position, read, text in documents.read(source, start):
        texts.append(text)
        size += len(text) + 50  # what a string takes at least
        if size >= CHUNK:
            yield (position, read), texts
            texts, size = [], 0
    yield (position, read), texts


def _encode(texts: list[str], tokenizer: TiktokenTokenizer, dtype: np.dtype) -> np.ndarray:
    end = np.array([tokenizer.end_of_text], np.int32)
    parts = [part for text in texts for part in (tokenizer.encode_array(text), end)]
    return np.concatenate([end[:0], *parts]).astype(dtype)


def _ahead(function: Callable, items: Iterator[tuple[Any, Any]], workers: int) -> Iterator[tuple[Any, Any]]:
    """Yield (mark, function(item)) for each (mark, item), in order, from threads that are a little ahead."""
    pool, pending = ThreadPoolExecutor(workers), deque()
    try:
        for mark, item in items:
            pending.append((mark, pool.submit(function, item)))
            if len(pending) > 2 * workers:
                mark, future = pending.popleft()
                yield mark, future.result()
        while pending:
            mark, future = pending.popleft()
            yield mark, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


# Arranging


def _bounds(path: Path, end_of_text: int, dtype: np.dtype) -> tuple[np.ndarray, str]:
    """Return where each document of a file of tokens begins, and last where the file ends; and the file's digest.

    The id `end_of_text` comes from no text, and so stands at the end of a document alone.
    """
    found, count, digest = [np.zeros(1, np.int64)], 0, hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK * dtype.itemsize):
            ids = np.frombuffer(block, dtype)
            found.append(count + 1 + np.flatnonzero(ids == end_of_text))
            count += len(ids)
            digest.update(block)
    bounds = np.concatenate(found)
    return bounds if bounds[-1] == count else np.append(bounds, count), digest.hexdigest()  # max_tokens may cut the last one


def _arrange(source: Path, target: Path, bounds: np.ndarray, chosen: np.ndarray, dtype: np.dtype, bar: tqdm) -> None:
    """Copy the documents `chosen` of a file of tokens, with these bounds, into the file `target`, in their order.

    The target is put together block by block, each in one sweep through the source.
    """
    with open(source, "rb", buffering=0) as tokens, open(target, "wb") as file:
        for first, last in _blocks(bounds, chosen):
            starts = bounds[chosen[first:last]]
            lengths = bounds[chosen[first:last] + 1] - starts
            ends = np.cumsum(lengths)  # in the block
            ids = np.empty(int(ends[-1]), dtype)
            for index in np.argsort(starts).tolist():
                row = ids[int(ends[index] - lengths[index]) : int(ends[index])]
                tokens.seek(int(starts[index]) * dtype.itemsize)
                if tokens.readinto(row) != row.nbytes:
                    raise UserError(f"{source} has changed while it was read; run the same command again")
            file.write(ids)
            bar.update(len(ids))
        file.flush()
        os.fsync(file.fileno())


def _blocks(bounds: np.ndarray, chosen: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yield the first and the one after the last of the documents `chosen` that make up each block: BLOCK tokens or fewer.

    A document that is longer is a block of its own.
    """
    first = 0
    while first < len(chosen):
        some = chosen[first : first + BLOCK_DOCUMENTS]
        count = int(np.searchsorted(np.cumsum(bounds[some + 1] - bounds[some]), BLOCK, side="right"))
        yield first, first + max(1, count)
        first += max(1, count)
