"""Prepare Tiny Shakespeare with a byte-pair encoding trained on it. The text is data/shakespeare_char/input.txt.

Expect 2,048 tokens, 346,862 of them in train.bin and 43,559 in val.bin.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parents[1]))

import configurator

from nanogpt import corpus
from nanogpt.tokenizer import BYTES_VOCAB_SIZE, MAX_VOCAB_SIZE, train_bpe

VocabSize = Annotated[int, configurator.Range(at_least=BYTES_VOCAB_SIZE, at_most=MAX_VOCAB_SIZE)]


@dataclass(frozen=True)
class Config(configurator.Config):
    vocab_size: VocabSize = 2048  # tokens: the 256 bytes, merged pairs, and the end of text
    url: str = corpus.TINY_SHAKESPEARE  # where to download input.txt from if it is not in data/shakespeare_char


def main(config: Config) -> None:
    text = corpus.tiny_shakespeare(config.url, FOLDER.parent / "shakespeare_char" / "input.txt")
    train, val = corpus.split_documents([text], val_fraction=0.1)
    tokenizer = train_bpe(train, config.vocab_size)
    corpus.show_vocabulary(tokenizer)
    corpus.write_dataset(FOLDER, train, val, tokenizer, "Tiny Shakespeare")


if __name__ == "__main__":
    configurator.run(main, Config)
