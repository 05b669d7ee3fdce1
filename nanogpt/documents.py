"""Documents of local files or of the Hugging Face Hub, read one after the other, from any of them on."""

import gzip
import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from nanogpt import corpus
from nanogpt.errors import UserError

ENDINGS = (".parquet", ".jsonl", ".jsonl.gz", ".txt")
BATCH = 1024  # rows of a Parquet file that are turned into strings at once

Position = list  # [index of a file, place in it], as JSON holds it; the place is that of the file's own reader
BEGINNING: Position = [0, None]


@dataclass(frozen=True)
class Source:
    """Files of documents in their order."""

    name: str  # for people
    files: list[str]  # paths, or addresses on the Hub
    sizes: list[int]  # bytes
    identity: str  # other files have another one


def local(path: str) -> Source:
    """Return the file `path`, or the visible files below the folder `path` in the order of their names.

    A Parquet file has its documents in the column "text", a JSONL file in the field "text" of its lines, and a text file is
    one document. UserError where there is none of these.
    """
    top = Path(path)
    if not top.exists():
        raise UserError(f"--input={path}: no such file or folder")
    found = sorted(top.rglob("*")) if top.is_dir() else [top]
    found = [file for file in found if not any(part.startswith(".") for part in file.relative_to(top).parts)]
    files = [file for file in found if file.name.lower().endswith(ENDINGS) and file.is_file()]
    if not files:
        raise UserError(f"--input={path}: {'no file in it' if top.is_dir() else 'no name that'} ends with {', '.join(ENDINGS)}")
    states = [file.stat() for file in files]
    identity = [[str(file.resolve()), state.st_size, state.st_mtime_ns] for file, state in zip(files, states, strict=True)]
    return Source(top.resolve().name, list(map(str, files)), [state.st_size for state in states], _digest(identity))


def hub(path: str, name: str, revision: str) -> Source:
    """Return the Parquet files of the split train of a dataset on the Hub, or of a folder in that layout.

    The datasets library finds them, and runs no code from there. They are read here, since its cache would need all of them
    for a sample, and its streams have lost documents when they went on (its issues 7538, 8145, 8308). UserError where they
    cannot be had.
    """
    advice = "or give local files: --input=FILE_OR_FOLDER (Parquet, JSONL or text)"
    try:
        import datasets
        import fsspec
    except ImportError as error:
        raise UserError(f"{path} comes by the datasets library: pip install datasets; {advice}") from error
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it tells of each of its retries in two lines
    try:
        files = list(datasets.load_dataset_builder(path, name, revision=revision).config.data_files["train"])
        sizes = [system.size(file) for system, file in map(fsspec.core.url_to_fs, files)]
    except Exception as error:  # what a network and four libraries raise has no common class
        raise UserError(f"cannot get {path} from the Hugging Face Hub ({error}); try again, {advice}") from error
    return Source(f"{path}, {name}, {revision}", files, sizes, _digest([files, sizes]))


def read(source: Source, position: Position) -> Iterator[tuple[Position, int, str]]:
    """Yield (position after it, bytes read so far, text) of each document from a position on.

    UserError, with the file and the line or row, for one that is damaged.
    """
    first, start = position
    for index in range(first, len(source.files)):
        file, before = source.files[index], sum(source.sizes[:index])
        reader = {".parquet": _parquet, ".txt": _text}.get(Path(file).suffix.lower(), _jsonl)
        try:
            for place, done, text in reader(file, start if index == first else None, source.sizes[index]):
                yield [index, place], before + done, text
        except UserError:
            raise
        except Exception as error:  # nor have gzip's, pyarrow's and the network's
            advice = "; the same command goes on where this one stops" if "://" in file else ""
            raise UserError(f"{file}: cannot be read ({type(error).__name__}: {error}){advice}") from error


def _parquet(file: str, start: int | None, size: int) -> Iterator[tuple[int, int, str]]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"{file}: reading Parquet needs pyarrow: pip install pyarrow") from error
    with _open(file) as opened, pyarrow.parquet.ParquetFile(opened) as table:
        if "text" not in table.schema_arrow.names:
            raise UserError(f"{file}: no column 'text' among {', '.join(table.schema_arrow.names)}")
        row, total = 0, table.metadata.num_rows
        for group in range(table.num_row_groups):
            rows = table.metadata.row_group(group).num_rows
            if row + rows <= (start or 0):
                row += rows
                continue
            for batch in table.iter_batches(BATCH, [group], ["text"]):
                for text in batch.column(0).to_pylist():
                    row += 1
                    if not isinstance(text, str):
                        raise UserError(f"{file}, row {row}: the column 'text' holds {text!r}")
                    if row > (start or 0):
                        yield row, size * row // total, text


def _jsonl(file: str, start: list[int] | None, size: int) -> Iterator[tuple[list[int], int, str]]:
    offset, number = start or (0, 0)
    with open(file, "rb") as opened, gzip.open(opened) if file.lower().endswith(".gz") else opened as lines:
        lines.seek(offset)
        for line in lines:
            offset, number = offset + len(line), number + 1
            if not line.strip():
                continue
            where = f"{file}, line {number}"
            value = corpus.read_json(line.removeprefix(b"\xef\xbb\xbf"), where)
            if not isinstance(value, dict) or not isinstance(value.get("text"), str):
                raise UserError(f'{where}: no field "text" that holds a string')
            yield [offset, number], opened.tell(), value["text"]


def _text(file: str, start: bool | None, size: int) -> Iterator[tuple[bool, int, str]]:
    if not start:
        yield True, size, corpus.read_text(Path(file))


def _open(file: str) -> BinaryIO:
    if "://" not in file:
        return open(file, "rb")
    import fsspec

    system, path = fsspec.core.url_to_fs(file)
    return system.open(path, "rb")


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
