"""Prepare Tiny Shakespeare by character, from the input.txt in this folder, which is downloaded if it is missing.

Expect 65 characters, 1,003,854 tokens in train.bin and 111,540 in val.bin.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parents[1]))

import configurator

from nanogpt import corpus
from nanogpt.tokenizer import CharTokenizer


@dataclass(frozen=True)
class Config(configurator.Config):
    url: str = corpus.TINY_SHAKESPEARE  # where to download input.txt from if it is not here yet
    dtype: corpus.Dtype = "auto"  # of a token in the files. auto: the smallest, here uint8; uint16 is what nanoGPT reads


def main(config: Config) -> None:
    text = corpus.tiny_shakespeare(config.url, FOLDER / "input.txt")
    tokenizer = CharTokenizer.from_text(text)
    corpus.show_vocabulary(tokenizer)
    train, val = corpus.split_documents([text], val_fraction=0.1)
    corpus.write_dataset(FOLDER, train, val, tokenizer, "Tiny Shakespeare", dtype=config.dtype)


if __name__ == "__main__":
    configurator.run(main, Config)
