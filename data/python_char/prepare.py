"""Prepare the source code of Python's standard library by character: a real corpus that needs no download.

Takes the .py files of the Python that runs this, without its tests, and every tenth file for validation. The counts depend on
its version: expect about 100 characters and 8 to 11 million tokens.
"""

import platform
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parents[1]))

import configurator

from nanogpt import corpus
from nanogpt.errors import UserError
from nanogpt.tokenizer import CharTokenizer

EXCLUDED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


@dataclass(frozen=True)
class Config(configurator.Config):
    dtype: corpus.Dtype = "auto"  # of a token in the files. auto: the smallest, here uint8; uint16 is what nanoGPT reads


def standard_library() -> list[str]:
    """Return the text of each ASCII source file of the standard library, sorted by path."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = sorted(path for path in root.rglob("*.py") if EXCLUDED.isdisjoint(path.relative_to(root).parts))
    sources = (path.read_bytes() for path in paths)
    return [source.decode("ascii") for source in sources if source and source.isascii()]


def main(config: Config) -> None:
    files = standard_library()
    if len(files) < 10:
        stdlib = sysconfig.get_paths()["stdlib"]
        raise UserError(f"{stdlib} must have at least 10 source files, got {len(files)}; use a Python that comes with them")
    val = files[9::10]
    train = [file for index, file in enumerate(files) if index % 10 != 9]
    tokenizer = CharTokenizer.from_text("".join(files))
    corpus.show_vocabulary(tokenizer)
    source = f"standard library of Python {platform.python_version()}"
    corpus.write_dataset(FOLDER, train, val, tokenizer, source, dtype=config.dtype)


if __name__ == "__main__":
    configurator.run(main, Config)
