"""Datasets from corpora larger than memory: tokenized in parallel, and resumed after an interruption.

1. Threads tokenize the documents, in order, into tokens.part (encoders release the GIL). progress.part saves the position.
2. The documents are copied from there into train.bin and val.bin, in the order of the splits.

Memory holds a few chunks of text or one block of tokens, plus about 30 bytes per document; the disk holds the tokens twice.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import configurator
from configurator import NonNegativeInt, PathStr, PositiveInt

import numpy as np
from tqdm import tqdm

from nanogpt import corpus, documents
from nanogpt.documents import Position, Source
from nanogpt.errors import UserError, warn
from nanogpt.files import atomic_write
from nanogpt.tokenizer import TiktokenTokenizer, Tokenizer, named_tokenizer

TOKENS, PROGRESS = "tokens.part", "progress.part"
CHUNK_CHARACTERS = 1 << 20  # tokenized by a thread at a time
DOCUMENT_OVERHEAD = 50  # counted as characters: the memory of an empty string
SAVE_INTERVAL_TOKENS = 1 << 24  # between two saves of the progress
BLOCK_TOKENS, BLOCK_DOCUMENTS = 1 << 25, 1 << 17  # at most, copied into a split at a time

Split = Callable[[int], tuple[np.ndarray, np.ndarray]]  # number of documents -> those of train, those of val, in order


@dataclass(frozen=True)
class HubConfig(configurator.Config):
    """The keys of a prepare.py that takes a corpus from the Hub; each sets its own `revision` and `name`."""

    positional: ClassVar[str] = "input"
    input: PathStr = ""  # a .parquet, .jsonl, .jsonl.gz or .txt file, or a folder of them; empty downloads from the Hub
    revision: str = "main"  # version of the dataset on the Hub: a commit, or main for the newest
    tokenizer: PathStr = "gpt2"  # gpt2, cl100k_base, o200k_base, or a dataset (name or folder) whose tokenizer to use
    workers: PositiveInt = os.cpu_count() or 1  # threads that tokenize
    max_tokens: NonNegativeInt = 0  # stop after this many tokens; 0 takes the whole corpus
    name: str = ""  # write the dataset to data/<name>, for train.py --dataset=<name>


def prepare_from_hub(config: HubConfig, folder: Path, path: str, subset: str, split: Split) -> None:
    """What a prepare.py in `folder` does: prepare `subset` of the Hub dataset `path`, or the files of --input."""
    corpus.check_name(config.name, folder)
    tokenizer = named_tokenizer(config.tokenizer, folder.parent)
    source = documents.local(config.input) if config.input else documents.hub(path, subset, config.revision)
    if tokenizer.end_of_text is None:
        raise UserError(f"--tokenizer={config.tokenizer} has no token that ends a document; try --tokenizer=gpt2")
    prepare(folder.parent / config.name, source, tokenizer, split, config.workers, config.max_tokens)
    documents.report(source.left_out)
    print(f"next: python train.py config/train_gpt2.py --dataset={config.name}")


def prepare(folder: Path, source: Source, tokenizer: Tokenizer, split: Split, workers: int, max_tokens: int = 0) -> None:
    """Write the documents of `source` as a dataset, continuing an interrupted call with the same arguments.

    Each document ends with the end-of-text token. `max_tokens` takes only the first tokens; 0 takes all. `workers`, the number
    of threads, does not change the result. The sha256 in meta.json is that of the source's tokens. Raises UserError if a
    document is damaged or the disk is full.
    """
    with corpus.writing_into(folder):
        try:
            with open(folder / TOKENS, "ab") as file:
                _prepare(folder, file, source, tokenizer, split, workers, max_tokens)
        except KeyboardInterrupt:
            print("\nrun the same command again to continue", file=sys.stderr)
            raise
        except OSError as error:
            for name in ("train.bin", "val.bin"):
                (folder / f"{name}{corpus.STAGED}").unlink(missing_ok=True)
            if error.filename is not None:
                raise
            advice = "make room, then run the same command again to continue"
            raise UserError(f"{folder}: {error.strerror}; {advice}") from error
        finally:
            if not (folder / PROGRESS).exists():  # nothing to continue from
                with suppress(OSError):
                    (folder / TOKENS).unlink()
        for name in (PROGRESS, TOKENS):
            (folder / name).unlink()


def _prepare(
    folder: Path,
    file: BinaryIO,
    source: Source,
    tokenizer: Tokenizer,
    split: Split,
    workers: int,
    max_tokens: int,
) -> None:
    dtype = np.dtype(corpus.token_dtype(tokenizer.vocab_size)).newbyteorder("<")

    # 1) tokenize
    recipe = {"files": source.identity, "tokenizer": _identity(tokenizer), "max_tokens": max_tokens}
    state = _load_progress(folder, file, recipe, dtype)
    source.left_out.update(state.get("left_out", {}))
    _tokenize(folder, file, state, source, tokenizer, dtype, workers)

    # 2) split
    bounds, sha256 = _bounds(folder / TOKENS, tokenizer.end_of_text, dtype)
    lengths = np.diff(bounds)
    try:
        if len(lengths) < 2:
            raise UserError(f"at least 2 documents are needed, got {len(lengths)}; data/text/prepare.py splits a single one")
        splits = dict(zip(("train", "val"), split(len(lengths)), strict=True))
        counts = {name: int(lengths[chosen].sum()) for name, chosen in splits.items()}
        corpus.check_counts(counts)
    except UserError:  # continuing would fail again
        (folder / PROGRESS).unlink(missing_ok=True)
        raise

    # 3) copy
    with tqdm(total=int(bounds[-1]), desc="arranging", unit="token", unit_scale=True, disable=None) as bar:
        for name, chosen in splits.items():
            _arrange(folder / TOKENS, folder / f"{name}.bin{corpus.STAGED}", bounds, chosen, dtype, bar)
    extra = {"documents": {name: len(chosen) for name, chosen in splits.items()}}
    corpus.finish(folder, {"train.bin": None, "val.bin": None}, counts, tokenizer, source.name, sha256, extra)


def _identity(tokenizer: Tokenizer) -> str:
    """Return the name of an encoding, or a digest of another tokenizer."""
    if isinstance(tokenizer, TiktokenTokenizer):
        return tokenizer.name
    return hashlib.sha256(json.dumps(tokenizer.to_dict(), sort_keys=True).encode()).hexdigest()


# Tokenizing


def _load_progress(folder: Path, file: BinaryIO, recipe: dict[str, Any], dtype: np.dtype) -> dict[str, Any]:
    """Return the state that an earlier call with the same recipe has saved, or a fresh one; cut `file` to its tokens."""
    state = {"recipe": recipe, "tokens": 0, "position": documents.BEGINNING}
    if (folder / PROGRESS).exists():
        saved = None
        with suppress(ValueError):  # damaged, as by a power failure
            saved = json.loads((folder / PROGRESS).read_bytes())
        size = os.fstat(file.fileno()).st_size
        if saved is not None and saved["recipe"] == recipe and size >= saved["tokens"] * dtype.itemsize:
            state = saved
            print(f"continuing after {state['tokens']:,} tokens")
        else:
            warn(f"the unfinished dataset in {folder} has other settings or files, or is damaged; starting over")
    file.truncate(state["tokens"] * dtype.itemsize)
    return state


def _tokenize(
    folder: Path,
    file: BinaryIO,
    state: dict[str, Any],
    source: Source,
    tokenizer: Tokenizer,
    dtype: np.dtype,
    workers: int,
) -> None:
    """Append the tokens of all documents after `state` to `file`, saving the progress."""
    encode = functools.partial(_encode, tokenizer=tokenizer, dtype=dtype)
    saved, limit = state["tokens"], state["recipe"]["max_tokens"]
    with (
        closing(_ahead(encode, _chunks(source, state["position"]), workers)) as chunks,
        tqdm(initial=saved, desc="tokenizing", unit="token", unit_scale=True, smoothing=0.1, disable=None) as bar,
    ):
        try:
            for (position, read), ids in chunks:
                # append, up to the limit
                ids = ids[: limit - state["tokens"]] if limit else ids
                file.write(ids)
                tokens = state["tokens"] + len(ids)
                state = state | {"tokens": tokens, "position": position, "left_out": source.left_out}

                # progress bar: estimate the total from the bytes read so far
                expected = state["tokens"] * sum(source.sizes) // max(1, read)
                bar.total = min(expected, limit) if limit else expected
                bar.update(len(ids))

                if limit and state["tokens"] == limit:
                    break
                if state["tokens"] - saved >= SAVE_INTERVAL_TOKENS:
                    saved = state["tokens"]
                    _save_progress(folder, file, state)
        finally:  # at the end, but also after Ctrl-C, a damaged document or a lost network
            if state["tokens"] > saved:
                _save_progress(folder, file, state)


def _save_progress(folder: Path, file: BinaryIO, state: dict[str, Any]) -> None:
    """Save `state`, after flushing the tokens that it counts to the disk."""
    file.flush()
    os.fsync(file.fileno())
    with atomic_write(folder / PROGRESS, durable=False) as progress:
        progress.write(json.dumps(state).encode())


def _chunks(source: Source, start: Position) -> Iterator[tuple[tuple[Position, int], list[str]]]:
    """Yield ((position after them, bytes read so far), documents) from `start` on; the last list may be empty."""
    position, read, texts, size = start, 0, [], 0
    for position, read, text in documents.read(source, start):
        texts.append(text)
        size += len(text) + DOCUMENT_OVERHEAD
        if size >= CHUNK_CHARACTERS:
            yield (position, read), texts
            texts, size = [], 0
    yield (position, read), texts


def _encode(texts: list[str], tokenizer: Tokenizer, dtype: np.dtype) -> np.ndarray:
    end = np.array([tokenizer.end_of_text], np.int32)
    parts = [part for text in texts for part in (tokenizer.encode_array(text), end)]
    return np.concatenate([end[:0], *parts]).astype(dtype)


def _ahead(function: Callable, items: Iterator[tuple[Any, Any]], workers: int) -> Iterator[tuple[Any, Any]]:
    """Yield (mark, function(item)) for each (mark, item), in order, while threads compute a few items ahead."""
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
    """Return where each document of a token file begins, followed by the file's length, and the file's sha256.

    No text encodes to the id `end_of_text`, so it occurs only at the end of a document.
    """
    found, count, digest = [np.zeros(1, np.int64)], 0, hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK_TOKENS * dtype.itemsize):
            ids = np.frombuffer(block, dtype)
            found.append(count + 1 + np.flatnonzero(ids == end_of_text))
            count += len(ids)
            digest.update(block)
    bounds = np.concatenate(found)
    if bounds[-1] != count:  # max_tokens has cut the last document
        bounds = np.append(bounds, count)
    return bounds, digest.hexdigest()


def _arrange(source: Path, target: Path, bounds: np.ndarray, chosen: np.ndarray, dtype: np.dtype, bar: tqdm) -> None:
    """Copy the documents `chosen` of the token file `source` to the file `target`, in that order.

    Each block of the target is filled in memory, in a single forward pass over the source, and then written.
    """
    with open(source, "rb", buffering=0) as tokens, atomic_write(target) as file:
        for first, last in _blocks(bounds, chosen):
            starts = bounds[chosen[first:last]]
            lengths = bounds[chosen[first:last] + 1] - starts
            ends = np.cumsum(lengths)  # in the block
            ids = np.empty(int(ends[-1]), dtype)
            for index in np.argsort(starts).tolist():
                row = ids[int(ends[index] - lengths[index]) : int(ends[index])]
                tokens.seek(int(starts[index]) * dtype.itemsize)
                if tokens.readinto(row) != row.nbytes:
                    raise UserError(f"{source} changed while it was being read; run the same command again")
            file.write(ids)
            bar.update(len(ids))


def _blocks(bounds: np.ndarray, chosen: np.ndarray) -> Iterator[tuple[int, int]]:
    """Cut the documents `chosen` into blocks of at most BLOCK_TOKENS; yield (first, one past the last) of each.

    A longer document is a block of its own.
    """
    first = 0
    while first < len(chosen):
        some = chosen[first : first + BLOCK_DOCUMENTS]
        count = int(np.searchsorted(np.cumsum(bounds[some + 1] - bounds[some]), BLOCK_TOKENS, side="right"))
        yield first, first + max(1, count)
        first += max(1, count)
