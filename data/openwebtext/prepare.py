"""Prepare OpenWebText in GPT-2's byte-pair encoding, with nanoGPT's splits, document for document.

Takes 24 GB from the Hugging Face Hub, or local files, and needs 36 GB of room. Expect nanoGPT's own counts: 9,035,582,198
tokens in train.bin and 4,434,897 in val.bin, of 8,013,769 documents. --max_tokens=10000000 takes a small part of them.
"""

import math
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

HUB = "Skylion007/openwebtext", "plain_text"


@dataclass
class Config(configurator.Config):
    input: str = ""  # a .parquet, .jsonl, .jsonl.gz or .txt file, or a folder of them, in place of what is on the Hub
    revision: str = "79d93d786212f7344586290adb811d4ae6a1762c"  # what is on the Hub as it was then; main is the newest
    tokenizer: Literal["gpt2", "cl100k_base", "o200k_base"] = "gpt2"  # encoding
    workers: PositiveInt = os.cpu_count() or 1  # threads that tokenize
    max_tokens: NonNegativeInt = 0  # take so many of the first tokens; 0 takes all
    name: str = "openwebtext"  # the dataset that results: data/<name>, for train.py --dataset=<name>

    def validate(self) -> None:
        corpus.check_name(self.name, FOLDER)


def split(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the documents to train and to validate, in their order in the files.

    They are those of `train_test_split(test_size=0.0005, seed=2357, shuffle=True)` in the datasets library.
    """
    order = np.random.default_rng(2357).permutation(count)
    val = math.ceil(0.0005 * count)
    return order[val:], order[:val]


def main(config: Config) -> None:
    tokenizer = TiktokenTokenizer(config.tokenizer)
    source = documents.local(config.input) if config.input else documents.hub(*HUB, config.revision)
    large_corpus.prepare(FOLDER.parent / config.name, source, tokenizer, split, config.workers, config.max_tokens)
    print(f"next: python train.py config/train_gpt2.py --dataset={config.name}")


if __name__ == "__main__":
    configurator.run(main, Config)
