"""Prepare your own text: a UTF-8 file, or a folder of them.

python data/text/prepare.py --input=my_book.txt --name=my_book
python train.py config/train_shakespeare_char_cpu.py --dataset=my_book --out_dir=out-my-book
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parents[1]))

import configurator
from configurator import PathStr

from nanogpt import corpus
from nanogpt.errors import UserError
from nanogpt.tokenizer import CharTokenizer, TiktokenTokenizer

OUTPUTS = ("train.bin", "val.bin", "meta.json", "meta.pkl")  # not text, if the input is the dataset's own folder


@dataclass(frozen=True)
class Config(configurator.Config):
    positional: ClassVar[str] = "input"
    input: PathStr = ""  # a text file, or a folder: all its files, sorted by path, except hidden ones
    tokenizer: Literal["char", "gpt2", "cl100k_base", "o200k_base"] = "char"  # char: by character; or a byte-pair encoding
    val_fraction: Annotated[float, configurator.Range(above=0, below=1)] = 0.1  # share of the text, at its end, for validation
    dtype: corpus.Dtype = "auto"  # of a token in the files. auto: the smallest that fits; uint16 is what nanoGPT reads
    name: str = "text"  # write the dataset to data/<name>, for train.py --dataset=<name>

    def validate(self) -> None:
        if not self.input:
            raise UserError("--input must name a text file or a folder, got nothing; for example --input=my_book.txt")
        if not Path(self.input).exists():
            raise UserError(f"--input={self.input}: no such file or folder")
        corpus.check_name(self.name, FOLDER)


def read_documents(path: Path) -> list[str]:
    """Return the text of the file `path`, or of all visible files below the folder `path`, without the empty ones."""
    paths = [path]
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file() and file.name not in OUTPUTS)
        paths = [file for file in files if not any(part.startswith(".") for part in file.relative_to(path).parts)]
    return [text for text in map(corpus.read_text, paths) if text]


def main(config: Config) -> None:
    documents = read_documents(Path(config.input))
    if not documents:
        raise UserError(f"--input={config.input}: no text in it")
    if config.tokenizer == "char":
        tokenizer = CharTokenizer.from_text("".join(documents))
    else:
        tokenizer = TiktokenTokenizer(config.tokenizer)
    train, val = corpus.split_documents(documents, config.val_fraction)
    source = Path(config.input).resolve().name
    folder, separate = FOLDER.parent / config.name, len(documents) > 1
    corpus.write_dataset(folder, train, val, tokenizer, source, separate, config.dtype)
    print(f"next: python train.py config/train_shakespeare_char_cpu.py --dataset={config.name} --out_dir=out-{config.name}")


if __name__ == "__main__":
    configurator.run(main, Config)
