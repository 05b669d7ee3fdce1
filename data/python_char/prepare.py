"""Prepare the source of Python's standard library for a model of characters: real text that every machine has.

Takes the .py files of the interpreter that runs this, without its tests, so that the numbers depend on its version:
expect about 100 characters and some 8 to 11 million tokens, every tenth file of them for validation.
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

NOT_TAKEN = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


@dataclass
class Config(configurator.Config):
    pass


def standard_library() -> list[str]:
    """Return the text of each ASCII source file of the standard library, in the order of their paths."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = sorted(path for path in root.rglob("*.py") if NOT_TAKEN.isdisjoint(path.relative_to(root).parts))
    sources = (path.read_bytes() for path in paths)
    return [source.decode("ascii") for source in sources if source and source.isascii()]


def main(config: Config) -> None:
    files = standard_library()
    if len(files) < 10:
        raise UserError(f"no source files in {sysconfig.get_paths()['stdlib']}: this Python comes without them")
    val = files[9::10]
    train = [file for index, file in enumerate(files) if index % 10 != 9]
    tokenizer = CharTokenizer.from_text("".join(files))
    corpus.write_dataset(FOLDER, train, val, tokenizer, f"standard library of Python {platform.python_version()}")


if __name__ == "__main__":
    configurator.run(main, Config)
