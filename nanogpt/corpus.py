"""Datasets from text: download, read, split, tokenize and write. The building blocks of every prepare.py."""

import codecs
import hashlib
import json
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from tqdm import tqdm

from nanogpt.errors import UserError, one_line
from nanogpt.files import FolderLock, atomic_write
from nanogpt.tokenizer import (
    DOWNLOAD_TIMEOUT_SECONDS,
    CharTokenizer,
    JsonTokenizer,
    Tokenizer,
    longest_tokens,
    to_pickle,
)

TINY_SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
TINY_SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

DOWNLOAD_TRIES = 3
SHOWN_CHARACTERS = 200  # of a table, at most
SHOWN_TOKENS = 12  # of a byte-pair encoding: the longest
DOWNLOAD_CHUNK_BYTES = 1 << 16

Dtype = Literal["auto", "uint8", "uint16", "uint32"]  # of a token file; auto: the smallest that holds the vocabulary
STAGED = ".part"  # suffix of a complete token file that is not yet renamed into its place
MARKS = {  # byte-order marks of other encodings than UTF-8; the longer ones first, since they begin like the shorter ones
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def download(url: str, path: Path, sha256: str) -> None:
    """Download `url` to `path` with a progress bar, retrying after a temporary failure.

    `path` appears only once the file is complete and has the hexadecimal digest `sha256`. Raises UserError otherwise.
    """
    import requests  # imported here, since it is slow to import and sample.py does not need it

    with writing_into(path.parent), atomic_write(path) as file:
        for attempt in range(DOWNLOAD_TRIES):
            try:
                digest = _fetch(url, file, path.stem)
                break
            except requests.RequestException as error:
                status = error.response.status_code if error.response is not None else None
                permanent = status is not None and 400 <= status < 500 and status != 429
                if permanent or attempt == DOWNLOAD_TRIES - 1:
                    why = f"status {status}" if status else type(error).__name__
                    raise UserError(f"cannot download {url} ({why}); download it yourself and save it as {path}") from error
                time.sleep(2**attempt)
        if digest != sha256:
            raise UserError(f"{url} must have the sha256 {sha256}, got {digest}; save the right file as {path}")


def _fetch(url: str, file: BinaryIO, name: str) -> str:
    """Download `url` into `file`, from its beginning, and return the sha256."""
    import requests

    file.seek(0)
    file.truncate()
    digest, received = hashlib.sha256(), 0
    with requests.get(url, stream=True, timeout=DOWNLOAD_TIMEOUT_SECONDS) as response:
        response.raise_for_status()
        length = int(response.headers.get("Content-Length", 0)) or None
        if "Content-Encoding" in response.headers:  # compressed: the length is not that of the decoded file
            length = None
        with tqdm(total=length, desc=name, unit="B", unit_scale=True, disable=None) as bar:
            for chunk in response.iter_content(DOWNLOAD_CHUNK_BYTES):
                received += file.write(chunk)
                digest.update(chunk)
                bar.update(len(chunk))
    if length is not None and received != length:
        raise requests.ConnectionError(f"received {received:,} of {length:,} bytes")
    return digest.hexdigest()


def tiny_shakespeare(url: str, path: Path) -> str:
    """Return the text of `path`, downloading it from `url` first if it does not exist.

    An existing file may hold any text: people put their own in its place. Raises UserError if it holds none.
    """
    if not path.exists():
        download(url, path, TINY_SHAKESPEARE_SHA256)
    if not (text := read_text(path)):
        raise UserError(f"{path}: no text in it; delete it, then run the same command again to download it")
    if hashlib.sha256(text.encode("utf-8")).hexdigest() != TINY_SHAKESPEARE_SHA256:
        print(f"{shown_path(path)} is not Tiny Shakespeare; using it as it is")
    return text


def read_text(path: Path) -> str:
    """Read a text file as nanoGPT does: line ends become \\n. Raises UserError if it is not UTF-8, or what its mark says."""
    try:
        return fold_line_ends(decode_text(path.read_bytes()))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def decode_text(content: bytes, errors: Literal["strict", "replace"] = "strict") -> str:
    """Decode UTF-8, or UTF-16 and UTF-32 with a byte-order mark, which is dropped.

    Raises UserError if it is neither; UTF-8 with NUL bytes, which no text has, counts as neither. With `errors="replace"`, what
    cannot be decoded becomes U+FFFD instead.
    """
    encoding = next((name for mark, name in MARKS.items() if content.startswith(mark)), "UTF-8")
    if encoding == "UTF-8" and b"\0" in content and errors == "strict":
        raise UserError("not text, or UTF-16 without a byte-order mark (it has NUL bytes); convert it to UTF-8 first")
    try:
        return content.decode(encoding, errors).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise UserError(f"not {encoding} text (byte {error.start}); convert it to UTF-8 first") from error


def fold_line_ends(text: str) -> str:
    """Return `text` with the line ends of Windows (\\r\\n) and of old Macs (\\r) as \\n: Python's universal newlines."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def show_vocabulary(tokenizer: CharTokenizer | JsonTokenizer) -> None:
    """Print the characters of a table, or the longest tokens of a byte-pair encoding, to show what was found in a text."""
    if isinstance(tokenizer, CharTokenizer):
        more = tokenizer.vocab_size - SHOWN_CHARACTERS
        characters = repr("".join(tokenizer.characters[:SHOWN_CHARACTERS])) + (f" and {more:,} more" if more > 0 else "")
        print(one_line(f"characters: {characters}"))
    else:
        print(one_line(f"longest tokens: {', '.join(map(repr, longest_tokens(tokenizer, SHOWN_TOKENS)))}"))


def read_json(line: bytes, place: str) -> Any:
    """Parse one line of a JSONL file. Raises UserError that names `place`, the file and line, if it is damaged."""
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{place}: not UTF-8 text; convert it to UTF-8 first") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: not JSON ({error}); correct or remove this line") from error


def split_documents(documents: list[str], val_fraction: float) -> tuple[list[str], list[str]]:
    """Split into train and validation documents: the last `val_fraction` of all characters is for validation."""
    rest = int(sum(map(len, documents)) * (1 - val_fraction))  # characters left for training
    train, val = [], []
    for document in documents:
        train.append(document[:rest])
        val.append(document[rest:])
        rest = max(0, rest - len(document))
    return [part for part in train if part], [part for part in val if part]


def encode_documents(documents: list[str], tokenizer: Tokenizer, separate: bool) -> np.ndarray:
    """Tokenize `documents` into one int32 array, with a progress bar.

    With `separate`, each document ends with the end-of-text token, if the tokenizer has one.
    """
    end = [tokenizer.end_of_text] if separate and tokenizer.end_of_text is not None else []
    parts = [np.empty(0, dtype=np.int32)]
    with tqdm(total=sum(map(len, documents)), desc="tokenizing", unit="char", unit_scale=True, disable=None) as bar:
        for document in documents:
            parts += [tokenizer.encode_array(document), np.array(end, dtype=np.int32)]
            bar.update(len(document))
    return np.concatenate(parts)


def token_dtype(vocab_size: int, dtype: Dtype = "auto") -> str:
    """Return the smallest numpy dtype that holds all ids below `vocab_size`, or the one that is asked for.

    Raises UserError if that one is too small.
    """
    smallest = "uint8" if vocab_size <= 1 << 8 else "uint16" if vocab_size <= 1 << 16 else "uint32"
    if dtype == "auto":
        return smallest
    if np.iinfo(dtype).max < vocab_size - 1:
        raise UserError(f"--dtype={dtype} is too small for the ids of {vocab_size:,} tokens; try --dtype={smallest}")
    return dtype


def write_dataset(
    folder: Path,
    train: list[str],
    val: list[str],
    tokenizer: Tokenizer,
    source: str,
    separate: bool = False,
    dtype: Dtype = "auto",
) -> None:
    """Tokenize documents, write train.bin, val.bin and meta.json, and print the token counts.

    `source` names the text in meta.json; see `encode_documents` for `separate`. A process killed at any moment leaves the old
    dataset, the new one, or one without train.bin, which training refuses.
    """
    token_dtype(tokenizer.vocab_size, dtype)  # refuse one that is too small before tokenizing
    splits = {name: encode_documents(texts, tokenizer, separate) for name, texts in (("train", train), ("val", val))}
    digest = hashlib.sha256()
    for document in train + val:
        digest.update(document.encode("utf-8"))
    write_tokens(folder, splits, tokenizer, source, digest.hexdigest(), dtype=dtype)


def write_tokens(
    folder: Path,
    splits: dict[str, np.ndarray],
    tokenizer: Tokenizer,
    source: str,
    sha256: str,
    masks: dict[str, np.ndarray] | None = None,
    extra: dict[str, Any] | None = None,
    dtype: Dtype = "auto",
) -> None:
    """Write the token ids of "train" and "val" as a dataset, as safely as `write_dataset`, and print the token counts.

    `masks` holds a loss mask for each split: a flag per id, nonzero if it is to be learned. `sha256` is the hexadecimal digest
    of the source, and `extra` is added to meta.json.
    """
    counts = {split: len(ids) for split, ids in splits.items()}
    check_counts(counts)
    stored = np.dtype(token_dtype(tokenizer.vocab_size, dtype)).newbyteorder("<")
    files = {f"{split}.bin": ids.astype(stored).tobytes() for split, ids in splits.items()}
    for split, mask in (masks or {}).items():
        assert mask.shape == splits[split].shape
        files[f"{split}.mask.bin"] = (mask != 0).astype(np.uint8).tobytes()
    with writing_into(folder):
        finish(folder, files, counts, tokenizer, source, sha256, extra, dtype)


def writing_into(folder: Path) -> FolderLock:
    """Return a lock that keeps other prepare.py's out of a dataset's folder. Entering it raises UserError if one is at work."""
    return FolderLock(folder, "another prepare.py is writing to", "wait for it, or stop it first")


def check_counts(counts: dict[str, int]) -> None:
    """Raise UserError if a split is too short to train on."""
    for split, count in counts.items():
        if count < 2:
            raise UserError(f"the text is too short: {split}.bin must have at least 2 tokens, got {count}; add text")


def finish(
    folder: Path,
    files: dict[str, bytes | None],
    counts: dict[str, int],
    tokenizer: Tokenizer,
    source: str,
    sha256: str,
    extra: dict[str, Any] | None = None,
    dtype: Dtype = "auto",
) -> None:
    """Replace the dataset in `folder` with `files`, by name, and their meta.json; print the token counts.

    The caller holds the lock of `writing_into`. A content of None means that the file is already written, under its name plus
    STAGED. For nanoGPT's scripts, a table of characters goes into meta.pkl, too.
    """
    stored = token_dtype(tokenizer.vocab_size, dtype)
    meta = {
        "dtype": stored,
        "vocab_size": tokenizer.vocab_size,
        "tokenizer": tokenizer.to_dict(),
        "source": one_line(source),  # not every file name can be written as UTF-8
        "sha256": sha256,
        "tokens": counts,
    }
    files = files | {"meta.json": json.dumps(meta | (extra or {}), indent=1, ensure_ascii=False).encode("utf-8")}
    if (table := to_pickle(tokenizer)) is not None:
        files["meta.pkl"] = table
    _replace_files(folder, files)
    print(one_line(f"{source}: {tokenizer}, stored as {stored}"))
    for split, count in counts.items():
        print(f"{split} has {count:,} tokens")
    print(f"wrote {', '.join(sorted(files))} into {shown_path(folder)}")


def _replace_files(folder: Path, files: dict[str, bytes | None]) -> None:
    """Replace the dataset in `folder` with `files` (see `finish`), so that files of two datasets are never taken for one."""
    staged = {name: folder / f"{name}{STAGED}" for name in files}
    try:
        # 1) write all files beside the old ones: a full disk leaves the old dataset
        for name, content in files.items():
            if content is not None:
                with atomic_write(staged[name]) as file:
                    file.write(content)

        # 2) remove what makes the old dataset, train.bin first: training, here and in nanoGPT, refuses a folder without it
        for stale in ("train.bin", "train.mask.bin", "val.mask.bin", "meta.pkl"):
            (folder / stale).unlink(missing_ok=True)

        # 3) rename, train.bin last
        for name in sorted(files, key="train.bin".__eq__):
            os.replace(staged[name], folder / name)
    finally:
        for path in staged.values():
            with suppress(OSError):
                path.unlink(missing_ok=True)


def check_name(name: str, folder: Path) -> None:
    """Raise UserError if the prepare.py in `folder` must not write to data/<name>."""
    if not name.replace("-", "").replace("_", "").replace(".", "").isalnum() or name.startswith("."):
        raise UserError(f"--name={name}: a name must be made of letters, digits, '-', '_' and '.', and not start with '.'")
    if name != folder.name and (folder.parent / name / "prepare.py").exists():
        raise UserError(f"--name={name}: that dataset has its own prepare.py; choose another name")


def shown_path(path: Path) -> str:
    """Return `path` as it is printed: relative to the current folder if it is inside it."""
    return one_line(os.path.relpath(path) if path.resolve().is_relative_to(Path.cwd()) else str(path))
