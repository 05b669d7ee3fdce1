"""Prepare OpenWebText in GPT-2's byte-pair encoding, with exactly the train and validation documents of nanoGPT.

Downloads 24 GB from the Hugging Face Hub, or takes local files, and needs 36 GB of disk space. Expect nanoGPT's own counts:
9,035,582,198 tokens in train.bin and 4,434,897 in val.bin, from 8,013,769 documents. --max_tokens=10000000 takes a small part.
"""

import math
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
    revision: str = "79d93d786212f7344586290adb811d4ae6a1762c"
    name: str = "openwebtext"


def split(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices of the train and the validation documents, in nanoGPT's order.

    Same as `train_test_split(test_size=0.0005, seed=2357, shuffle=True)` of the datasets library.
    """
    order = np.random.default_rng(2357).permutation(count)
    val = math.ceil(0.0005 * count)
    return order[val:], order[:val]


def main(config: Config) -> None:
    prepare_from_hub(config, FOLDER, "Skylion007/openwebtext", "plain_text", split)


if __name__ == "__main__":
    configurator.run(main, Config)
