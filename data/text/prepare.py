"""Prepare your own text: a file in UTF-8 (or UTF-16 with a byte-order mark), or a folder of them.

python data/text/prepare.py --input=my_book.txt --name=my_book
python train.py config/train_shakespeare_char_cpu.py --dataset=my_book --out_dir=out-my-book
"""

import sys
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, ClassVar

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parents[1]))

import configurator
from configurator import PathStr

from nanogpt import corpus
from nanogpt.documents import find_files, report
from nanogpt.errors import UserError
from nanogpt.tokenizer import (
    BYTES_VOCAB_SIZE,
    ENCODINGS,
    MAX_VOCAB_SIZE,
    PATTERNS,
    CharTokenizer,
    TiktokenTokenizer,
    Tokenizer,
    train_bpe,
)

OUTPUTS = ("train.bin", "val.bin", "meta.json", "meta.pkl")  # not text, if the input is the dataset's own folder


@dataclass(frozen=True)
class Config(configurator.Config):
    positional: ClassVar[str] = "input"
    input: PathStr = ""  # a text file, or a folder: all its files, sorted by path, except hidden ones; links are followed
    include: str = "*"  # which files of a folder: patterns of names, separated by commas, such as *.txt,*.md
    tokenizer: PathStr = "char"  # char, bytes, bpe:1024 (trained on it), gpt2, cl100k_base, o200k_base, a folder, owner/name
    val_fraction: Annotated[float, configurator.Range(above=0, below=1)] = 0.1  # share of the text, at its end, for validation
    dtype: corpus.Dtype = "auto"  # of a token in the files. auto: the smallest that fits; uint16 is what nanoGPT reads
    name: str = "text"  # write the dataset to data/<name>, for train.py --dataset=<name>

    def validate(self) -> None:
        if not self.input:
            raise UserError("--input must name a text file or a folder, got nothing; for example --input=my_book.txt")
        if not Path(self.input).exists():
            raise UserError(f"--input={self.input}: no such file or folder")
        if not self.include.strip(", "):
            raise UserError("--include must name files, got nothing; for example --include=*.txt")
        corpus.check_name(self.name, FOLDER)
        read_bpe(self.tokenizer)
        known = self.tokenizer in ("char", "bytes", *ENCODINGS) or self.tokenizer.startswith("bpe:")
        if not known and not Path(self.tokenizer).is_dir() and "/" not in self.tokenizer:
            raise UserError(
                f"--tokenizer={self.tokenizer} must be char, bytes, bpe:1024 (or another number), {', '.join(ENCODINGS)}, "
                "a folder with a tokenizer.json, or owner/name on the Hugging Face Hub"
            )


def read_bpe(value: str) -> tuple[int, str] | None:
    """Read bpe:SIZE or bpe:SIZE:PATTERN; None for anything else. Raises UserError if the size or the pattern is not one."""
    name, _, rest = value.partition(":")
    if name != "bpe":
        return None
    size, _, pattern = rest.partition(":")
    count = int(size) if size.isascii() and size.isdigit() and len(size) < 10 else 0
    if not BYTES_VOCAB_SIZE <= count <= MAX_VOCAB_SIZE:
        raise UserError(
            f"--tokenizer={value}: the size must be a whole number from {BYTES_VOCAB_SIZE} (bytes and the end of text) "
            f"to {MAX_VOCAB_SIZE:,}; try bpe:1024"
        )
    if (pattern or "gpt2") not in PATTERNS:
        raise UserError(f"--tokenizer={value}: the splitting pattern must be {' or '.join(PATTERNS)}; try bpe:{count}:cl100k")
    return count, pattern or "gpt2"


def make_tokenizer(value: str, documents: list[str], train: list[str]) -> Tokenizer:
    """Return the tokenizer that --tokenizer names: characters are those of all documents, byte pairs those of `train`."""
    if value == "char":
        return CharTokenizer.from_text("".join(documents))
    if value == "bytes":
        return train_bpe([], BYTES_VOCAB_SIZE)
    if bpe := read_bpe(value):
        return train_bpe(train, *bpe)
    if value in ENCODINGS:
        return TiktokenTokenizer(value)
    from nanogpt import huggingface  # imported here, since it imports PyTorch

    return huggingface.load_tokenizer(value)


def read_document(path: Path) -> str:
    """Return the text of a file, with its line ends. Raises UserError with the reason if it has none."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror})") from error
    if not (text := corpus.decode_text(content)):
        raise UserError("no text in it")
    return text


def read_documents(top: Path, include: str) -> tuple[list[str], int, dict[str, str]]:
    """Return the texts in the file or folder `top`, how many had line ends of Windows, and why other files are left out.

    Raises UserError if there is no text.
    """
    files, left_out = find_files(top)
    patterns = [pattern.strip().lower() for pattern in include.split(",")]
    documents, folded = [], 0
    for path in files:
        if not any(fnmatchcase(path.name.lower(), pattern) for pattern in patterns):
            continue
        try:
            if path.name in OUTPUTS and path != top:
                raise UserError("written by prepare.py")
            text = read_document(path)
        except UserError as error:
            if path == top:
                raise UserError(f"--input={top}: {error}") from error
            left_out[str(path.relative_to(top))] = str(error)
            continue
        folded += "\r" in text
        documents.append(corpus.fold_line_ends(text))
    if not documents:
        report(left_out)
        matching = f" among the files that match {include}" if include != "*" else ""
        raise UserError(f"--input={top}: no text in it{matching}")
    return documents, folded, left_out


def main(config: Config) -> None:
    documents, folded, left_out = read_documents(Path(config.input), config.include)
    train, val = corpus.split_documents(documents, config.val_fraction)
    tokenizer = make_tokenizer(config.tokenizer, documents, train)
    if config.tokenizer == "char" or read_bpe(config.tokenizer):
        corpus.show_vocabulary(tokenizer)
    source = Path(config.input).resolve().name
    folder, separate = FOLDER.parent / config.name, len(documents) > 1
    corpus.write_dataset(folder, train, val, tokenizer, source, separate, config.dtype)
    if folded:
        print(f"line ends of Windows (\\r\\n) became \\n in {folded:,} of {len(documents):,} files")
    report(left_out)
    print(f"next: python train.py config/train_shakespeare_char_cpu.py --dataset={config.name} --out_dir=out-{config.name}")


if __name__ == "__main__":
    configurator.run(main, Config)
