"""Document sources: local files or the Hugging Face Hub, read one document after another, from any position on."""

import gzip
import hashlib
import json
import logging
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from nanogpt import corpus
from nanogpt.errors import UserError, first_line, one_line, shown

FILE_SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz", ".txt")
LEFT_OUT_ROWS = 20  # of the table of files that are left out, at most
LEFT_OUT_NAME_CHARACTERS = 60  # width of its first column, at most
PARQUET_BATCH_ROWS = 1024

Position = list  # [index of the file, place in it], which JSON can hold; each file format has its own kind of place
BEGINNING: Position = [0, None]


@dataclass(frozen=True)
class Source:
    """Files of documents, in order."""

    name: str  # shown to people
    files: list[str]  # paths, or URLs on the Hub
    sizes: list[int]  # bytes
    identity: str  # a digest that changes when the files do
    left_out: dict[str, str] = field(default_factory=dict)  # other files of the folder -> why; `read` adds to it
    folder: str = ""  # to which the names in left_out are relative; empty for a single file and for the Hub


def find_files(top: Path) -> tuple[list[Path], dict[str, str]]:
    """Return the visible files below the folder `top`, sorted by path; `top` may be a file.

    Also returns what cannot be read: the path relative to `top` and the reason. Links are followed, but a folder is read only
    once: at its own place, if that is below `top`.
    """
    if not top.is_dir():
        return [top], {}
    found: list[Path] = []
    left_out: dict[Path, str] = {}
    seen: dict[Path, Path] = {}  # real path of each folder -> the path by which it was read
    folders, links = [top], []  # to be read, links last
    while folders or links:
        folder = folders.pop() if folders else links.pop(0)
        real = folder.resolve()
        if real in seen:
            left_out[folder] = f"the same folder as {seen[real].relative_to(top)}"
            continue
        seen[real] = folder
        try:
            entries = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
        except OSError as error:
            left_out[folder] = f"cannot be read ({error.strerror})"
            continue
        for path in entries:
            is_link = os.path.islink(path)
            try:
                mode = path.stat().st_mode
            except OSError as error:
                left_out[path] = "a broken link" if is_link else f"cannot be read ({error.strerror})"
                continue
            if is_link and stat.S_ISDIR(mode) and real.is_relative_to(path.resolve()):
                left_out[path] = "a link to a folder that it is in"
            elif stat.S_ISDIR(mode):
                (links if is_link else folders).append(path)
            elif stat.S_ISREG(mode):
                found.append(path)
            else:
                left_out[path] = "not a regular file"
    return sorted(found), {str(path.relative_to(top)): reason for path, reason in left_out.items()}


def report(left_out: dict[str, str]) -> None:
    """Print a table of the files that are not read, with the reasons, if there are any."""
    if not left_out:
        return
    print(f"left out: {len(left_out):,}")
    rows = sorted(left_out.items())[:LEFT_OUT_ROWS]
    width = min(max(len(name) for name, _ in rows), LEFT_OUT_NAME_CHARACTERS)
    for name, reason in rows:
        print(one_line(f"  {name:{width}}  {reason}"))
    if len(left_out) > len(rows):
        print(f"  ... and {len(left_out) - len(rows):,} more")


def local(path: str) -> Source:
    """Return the file `path`, or all visible files below the folder `path`, sorted by path.

    Documents are the column "text" of a Parquet file, the field "text" of each line of a JSONL file, and a text file as a
    whole. Raises UserError if there is no such file.
    """
    top = Path(path)
    if not top.exists():
        raise UserError(f"--input={path}: no such file or folder")
    found, left_out = find_files(top)
    files = [file for file in found if file.name.lower().endswith(FILE_SUFFIXES)]
    for file in set(found).difference(files):
        left_out[str(file.relative_to(top))] = f"does not end with {', '.join(FILE_SUFFIXES)}"
    if not files:
        raise UserError(f"--input={path}: no file{' in it' if top.is_dir() else ''} that ends with {', '.join(FILE_SUFFIXES)}")
    states = [file.stat() for file in files]
    identity = [[str(file.resolve()), state.st_size, state.st_mtime_ns] for file, state in zip(files, states, strict=True)]
    sizes = [state.st_size for state in states]
    folder = str(top) if top.is_dir() else ""
    return Source(top.resolve().name, list(map(str, files)), sizes, _digest(identity), left_out, folder)


def hub(path: str, name: str, revision: str) -> Source:
    """Return the Parquet files of the train split of a Hub dataset, or of a local folder with the Hub's layout.

    `name` is the subset. The datasets library only lists the files, and runs no code of the dataset. They are read here,
    since its cache would download everything for a small sample, and its streams can lose documents when they are resumed
    (its issues 7538, 8145, 8308). Raises UserError if the files are out of reach.
    """
    advice = "or use local files: --input=FILE_OR_FOLDER (Parquet, JSONL or text)"
    try:
        import datasets
        import fsspec
    except ImportError as error:
        raise UserError(f"downloading {path} needs the datasets library: pip install datasets; {advice}") from error
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it logs two lines for each retry
    try:
        files = list(datasets.load_dataset_builder(path, name, revision=revision).config.data_files["train"])
        sizes = [system.size(file) for system, file in map(fsspec.core.url_to_fs, files)]
    except Exception as error:  # a network and four libraries: their errors share no base class
        raise UserError(f"cannot get {path} from the Hugging Face Hub ({first_line(error)}); try again, {advice}") from error
    return Source(f"{path}, {name}, {revision}", files, sizes, _digest([files, sizes]))


def read(source: Source, position: Position) -> Iterator[tuple[Position, int, str]]:
    """Yield (position after it, bytes read so far, text) for each document from `position` on.

    A text file of a folder that is empty or in an unknown encoding is added to `source.left_out`. Raises UserError with the
    file and the line or row if another document is damaged.
    """
    first, start = position
    for index in range(first, len(source.files)):
        file, before = source.files[index], sum(source.sizes[:index])
        reader = {".parquet": _parquet, ".txt": _text}.get(Path(file).suffix.lower(), _jsonl)
        try:
            for place, done, text in reader(file, start if index == first else None, source.sizes[index]):
                yield [index, place], before + done, text
        except UserError as error:
            if reader is not _text or not source.folder:
                raise
            source.left_out[os.path.relpath(file, source.folder)] = str(error).removeprefix(f"{file}: ")
        except Exception as error:  # nor do the errors of gzip, pyarrow and the network share a base class
            advice = "; run the same command again to continue" if "://" in file else ""
            raise UserError(f"{file}: cannot be read ({type(error).__name__}: {first_line(error)}){advice}") from error


def _parquet(file: str, start: int | None, size: int) -> Iterator[tuple[int, int, str]]:
    """Read a Parquet file; a place is the number of rows read."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"{file}: reading Parquet needs pyarrow: pip install pyarrow") from error
    with _open(file) as opened, pyarrow.parquet.ParquetFile(opened) as table:
        if "text" not in table.schema_arrow.names:
            raise UserError(f"{file}: no column 'text', only {', '.join(table.schema_arrow.names)}; rename the column of texts")
        row, total = 0, table.metadata.num_rows
        for group in range(table.num_row_groups):
            rows = table.metadata.row_group(group).num_rows
            if row + rows <= (start or 0):
                row += rows
                continue
            for batch in table.iter_batches(PARQUET_BATCH_ROWS, [group], ["text"]):
                for text in batch.column(0).to_pylist():
                    row += 1
                    if not isinstance(text, str):
                        raise UserError(f"{file}, row {row}: column 'text' must be a string, got {shown(text)}")
                    if row > (start or 0):
                        yield row, size * row // total, text


def _jsonl(file: str, start: list[int] | None, size: int) -> Iterator[tuple[list[int], int, str]]:
    """Read a JSONL file, compressed or not; a place is [bytes, lines] read, before compression."""
    offset, number = start or (0, 0)
    with open(file, "rb") as opened, gzip.open(opened) if file.lower().endswith(".gz") else opened as lines:
        lines.seek(offset)
        for line in lines:
            offset, number = offset + len(line), number + 1
            if not line.strip():
                continue
            place = f"{file}, line {number}"
            value = corpus.read_json(line.removeprefix(b"\xef\xbb\xbf"), place)
            if not isinstance(value, dict) or not isinstance(value.get("text"), str):
                raise UserError(f'{place}: must be an object with a string in the field "text", got {shown(value)}')
            yield [offset, number], opened.tell(), value["text"]


def _text(file: str, start: bool | None, size: int) -> Iterator[tuple[bool, int, str]]:
    """Read a text file as one document; a place is whether it has been read."""
    if not start:
        if not (text := corpus.read_text(Path(file))):
            raise UserError(f"{file}: no text in it")
        yield True, size, text


def _open(file: str) -> BinaryIO:
    if "://" not in file:
        return open(file, "rb")
    import fsspec

    system, path = fsspec.core.url_to_fs(file)
    return system.open(path, "rb")


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
