"""Prepare ten billion tokens of FineWeb-Edu, educational pages of the web, in GPT-2's byte-pair encoding.

Takes 28 GB from the Hugging Face Hub, or local files, and needs 40 GB of room. Every 2,000th of the 9,672,101 documents,
from the first one on, is for validation. --max_tokens=10000000 takes a small part of them.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parents[1]))

import configurator
from configurator import NonNegativeInt, PositiveInt
from nanogpt import corpus, documents, large_corpus
from nanogpt.tokenizer import TiktokenTokenizer

HUB = "HuggingFaceFW/fineweb-edu", "sample-10BT"


@dataclass
class Config(configurator.Config):
    input: str = ""  # a .parquet, .jsonl, .jsonl.gz or .txt file, or a folder of them, in place of what is on the Hub
    revision: str = "87f09149ef4734204d70ed1d046ddc9ca3f2b8f9"  # what is on the Hub as it was then; main is the newest
    tokenizer: Literal["gpt2", "cl100k_base", "o200k_base"] = "gpt2"  # encoding
    workers: PositiveInt = os.cpu_count() or 1  # threads that tokenize
    max_tokens: NonNegativeInt = 0  # take so many of the first tokens; 0 takes all
    name: str = "fineweb_edu"  # the dataset that results: data/<name>, for train.py --dataset=<name>

    def validate(self) -> None:
        corpus.check_name(self.name, FOLDER)


def split(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the documents to train and to validate, in their order in the files: that of the source."""
    documents = np.arange(count)
    return documents[documents % 2000 != 0], documents[documents % 2000 == 0]


def main(config: Config) -> None:
    tokenizer = TiktokenTokenizer(config.tokenizer)
    source = documents.local(config.input) if config.input else documents.hub(*HUB, config.revision)
    large_corpus.prepare(FOLDER.parent / config.name, source, tokenizer, split, config.workers, config.max_tokens)
    print(f"next: python train.py config/train_gpt2.py --dataset={config.name}")


if __name__ == "__main__":
    configurator.run(main, Config)
