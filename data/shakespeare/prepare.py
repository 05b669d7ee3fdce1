"""Prepare Tiny Shakespeare in GPT-2's byte-pair encoding, for finetuning GPT-2.

Takes the input.txt in this folder or in data/shakespeare_char, or downloads it. Expect 301,966 tokens in train.bin and 36,059
in val.bin.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parents[1]))

import configurator

from nanogpt import corpus
from nanogpt.tokenizer import TiktokenTokenizer


@dataclass(frozen=True)
class Config(configurator.Config):
    url: str = corpus.TINY_SHAKESPEARE  # where to download input.txt from if it is not here yet


def main(config: Config) -> None:
    path, sibling = FOLDER / "input.txt", FOLDER.parent / "shakespeare_char" / "input.txt"
    text = corpus.tiny_shakespeare(config.url, path if path.exists() or not sibling.exists() else sibling)
    train, val = corpus.split_documents([text], val_fraction=0.1)
    corpus.write_dataset(FOLDER, train, val, TiktokenTokenizer("gpt2"), "Tiny Shakespeare")


if __name__ == "__main__":
    configurator.run(main, Config)
