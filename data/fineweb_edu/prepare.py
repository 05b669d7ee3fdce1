"""Prepare ten billion tokens of FineWeb-Edu, educational web pages, in GPT-2's byte-pair encoding.

Downloads 28 GB from the Hugging Face Hub, or takes local files, and needs 40 GB of disk space. Every 2,000th of the 9,672,101
documents, starting with the first, is for validation. --max_tokens=10000000 takes a small part.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parents[1]))

import configurator

import numpy as np

from nanogpt.large_corpus import HubConfig, prepare_from_hub


@dataclass(frozen=True)
class Config(HubConfig):
    revision: str = "87f09149ef4734204d70ed1d046ddc9ca3f2b8f9"
    name: str = "fineweb_edu"


def split(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices of the train and the validation documents, in the order of the source."""
    documents = np.arange(count)
    return documents[documents % 2000 != 0], documents[documents % 2000 == 0]


def main(config: Config) -> None:
    prepare_from_hub(config, FOLDER, "HuggingFaceFW/fineweb-edu", "sample-10BT", split)


if __name__ == "__main__":
    configurator.run(main, Config)
