"""Text from the network or the disk, tokenized into the token files of a dataset: what each prepare.py stands on."""

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from nanogpt.errors import UserError
from nanogpt.tokenizer import CharTokenizer, Tokenizer

TINY_SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
TINY_SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

TRIES = 3  # for one download
TIMEOUT = 20  # seconds without a byte
BLOCK = 1 << 16  # bytes read at once from the network


def download(url: str, path: Path, sha256: str) -> None:
    """Fetch `url` into `path`, which appears only when it is whole and has the hexadecimal digest `sha256`.

    Shows a progress bar and tries again after a passing failure. UserError where it cannot be had.
    """
    import requests  # takes longer than all of sample.py's other modules, which need none of it

    part = path.with_name(path.name + ".part")
    try:
        for attempt in range(TRIES):
            try:
                _fetch(url, part)
                break
            except requests.RequestException as error:
                status = error.response.status_code if error.response is not None else None
                if attempt == TRIES - 1 or (status is not None and 400 <= status < 500 and status != 429):
                    why = f"status {status}" if status else type(error).__name__
                    raise UserError(f"cannot download {url} ({why}); save that file yourself as {path}") from error
                time.sleep(2**attempt)
        found = hashlib.sha256(part.read_bytes()).hexdigest()
        if found != sha256:
            raise UserError(f"{url} is not the file that was expected (sha256 {found}, not {sha256})")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _fetch(url: str, path: Path) -> None:
    import requests

    with requests.get(url, stream=True, timeout=TIMEOUT) as response:
        response.raise_for_status()
        length = int(response.headers.get("Content-Length", 0)) or None
        encoded = "Content-Encoding" in response.headers  # then the length is not that of what arrives here
        with (
            open(path, "wb") as file,
            tqdm(total=None if encoded else length, desc=path.stem, unit="B", unit_scale=True, disable=None) as bar,
        ):
            received = 0
            for block in response.iter_content(BLOCK):
                received += file.write(block)
                bar.update(len(block))
    if length is not None and not encoded and received != length:
        raise requests.ConnectionError(f"{received} of {length} bytes arrived")


def tiny_shakespeare(url: str, path: Path) -> str:
    """Return the text of `path`, which is downloaded from `url` where it is not there yet.

    A file that is there may be any text: people put their own in its place.
    """
    if not path.exists():
        download(url, path, TINY_SHAKESPEARE_SHA256)
    elif hashlib.sha256(path.read_bytes()).hexdigest() != TINY_SHAKESPEARE_SHA256:
        print(f"{shown_path(path)} is not Tiny Shakespeare; taking it as it is")
    return read_text(path)


def read_text(path: Path) -> str:
    """Return the text of a UTF-8 file, character for character but for a byte-order mark; UserError where it is none."""
    try:
        return path.read_bytes().decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); convert it to UTF-8 first") from error


def read_json(line: bytes, where: str) -> Any:
    """Return the value in a line of a JSONL file; UserError, which says `where` that is, for one that is damaged."""
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 text; convert it to UTF-8 first") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error})") from error


def split_documents(documents: list[str], val_fraction: float) -> tuple[list[str], list[str]]:
    """Cut `documents`, read as one text, where the last `val_fraction` of its characters begins."""
    rest = int(sum(map(len, documents)) * (1 - val_fraction))
    train, val = [], []
    for document in documents:
        train.append(document[:rest])
        val.append(document[rest:])
        rest = max(0, rest - len(document))
    return [part for part in train if part], [part for part in val if part]


def encode_documents(documents: list[str], tokenizer: Tokenizer, separate: bool) -> np.ndarray:
    """Return the ids of `documents` in one int32 array, with a progress bar.

    With `separate`, the end-of-text token follows each document, where the tokenizer has one.
    """
    end = [] if isinstance(tokenizer, CharTokenizer) or not separate else [tokenizer.end_of_text]
    parts = [np.empty(0, dtype=np.int32)]
    with tqdm(total=sum(map(len, documents)), desc="tokenizing", unit="char", unit_scale=True, disable=None) as bar:
        for document in documents:
            parts += [tokenizer.encode_array(document), np.array(end, dtype=np.int32)]
            bar.update(len(document))
    return np.concatenate(parts)


def token_dtype(vocab_size: int) -> str:
    """Return the numpy name of the smallest type that holds the ids below `vocab_size`."""
    return "uint8" if vocab_size <= 1 << 8 else "uint16" if vocab_size <= 1 << 16 else "uint32"


def write_dataset(
    folder: Path, train: list[str], val: list[str], tokenizer: Tokenizer, source: str, separate: bool = False
) -> None:
    """Tokenize the documents in `train` and `val`, write train.bin, val.bin and meta.json, and print their counts.

    A process that is killed at any moment leaves the dataset that was there before, the new one, or one without a
    train.bin, which training does not take. `source` names the text; for `separate` see `encode_documents`.
    """
    splits = {name: encode_documents(texts, tokenizer, separate) for name, texts in (("train", train), ("val", val))}
    digest = hashlib.sha256()
    for document in train + val:
        digest.update(document.encode("utf-8"))
    write_tokens(folder, splits, tokenizer, source, digest.hexdigest())


def write_tokens(
    folder: Path,
    splits: dict[str, np.ndarray],
    tokenizer: Tokenizer,
    source: str,
    sha256: str,
    masks: dict[str, np.ndarray] | None = None,
    extra: dict[str, Any] | None = None,
) -> None:
    """Write the ids of the splits train and val as a dataset, as safely as `write_dataset`, and print their counts.

    `masks` holds for each split a flag an id, whether it is to be learned; `extra` goes into meta.json. `sha256` is the
    source's hexadecimal digest.
    """
    counts = {split: len(ids) for split, ids in splits.items()}
    check_counts(counts)
    dtype = np.dtype(token_dtype(tokenizer.vocab_size)).newbyteorder("<")
    files = {f"{split}.bin": ids.astype(dtype).tobytes() for split, ids in splits.items()}
    for split, mask in (masks or {}).items():
        assert mask.shape == splits[split].shape
        files[f"{split}.mask.bin"] = (mask != 0).astype(np.uint8).tobytes()
    finish(folder, files, counts, tokenizer, source, sha256, extra)


def check_counts(counts: dict[str, int]) -> None:
    """Raise UserError where a split has too few tokens to learn from."""
    for split, count in counts.items():
        if count < 2:
            raise UserError(f"the text is too short: it leaves {count} tokens for {split}.bin, which needs at least 2")


def finish(
    folder: Path,
    files: dict[str, bytes | None],
    counts: dict[str, int],
    tokenizer: Tokenizer,
    source: str,
    sha256: str,
    extra: dict[str, Any] | None = None,
) -> None:
    """Put token files, by name, and their meta.json in the place of the dataset in `folder`, and print `counts`, of tokens.

    None stands for the content of a file that is written already, beside its place, with ".tmp" after its name.
    """
    dtype = token_dtype(tokenizer.vocab_size)
    meta = {
        "dtype": dtype,
        "vocab_size": tokenizer.vocab_size,
        "tokenizer": tokenizer.to_dict(),
        "source": source,
        "sha256": sha256,
        "tokens": counts,
    }
    files = files | {"meta.json": json.dumps(meta | (extra or {}), indent=1, ensure_ascii=False).encode("utf-8")}
    _replace_files(folder, files)
    print(f"{source}: {tokenizer}, stored as {dtype}")
    for split, count in counts.items():
        print(f"{split} has {count:,} tokens")
    print(f"wrote {', '.join(sorted(files))} into {shown_path(folder)}")


def _replace_files(folder: Path, files: dict[str, bytes | None]) -> None:
    """Put `files`, the whole content of a dataset by name (see `finish`), in the place of the dataset in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        for name, content in files.items():
            if content is None:
                continue
            with open(folder / f"{name}.tmp", "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for stale in ("train.bin", "train.mask.bin", "val.mask.bin"):
            (folder / stale).unlink(missing_ok=True)
        for name in sorted(files, key="train.bin".__eq__):  # train.bin last: without it there is no dataset
            os.replace(folder / f"{name}.tmp", folder / name)
    finally:
        for name in files:
            (folder / f"{name}.tmp").unlink(missing_ok=True)


def check_name(name: str, folder: Path) -> None:
    """Raise UserError where data/<name> is no place for what the prepare.py in `folder` writes."""
    if not name.replace("-", "").replace("_", "").replace(".", "").isalnum() or name.startswith("."):
        raise UserError(f"--name={name}: a name is made of letters, digits, '-', '_' and '.'")
    if name != folder.name and (folder.parent / name / "prepare.py").exists():
        raise UserError(f"--name={name}: that is a dataset with a prepare.py of its own; choose another name")


def shown_path(path: Path) -> str:
    """Return `path` as people read it best: from the current folder where it lies below that."""
    return os.path.relpath(path) if path.resolve().is_relative_to(Path.cwd()) else str(path)
