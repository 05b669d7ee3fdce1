"""What the tests share: small datasets, the real text where it is at hand, and whole commands run in a copy of the repo."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nanogpt import corpus, curves
from nanogpt.tokenizer import CharTokenizer

ROOT = Path(__file__).resolve().parents[1]
COPIED = ["*.py", "*.md", "Makefile", "requirements*.txt", "config/*.py", "nanogpt/*.py", "data/*/prepare.py", "docs/*.*"]

os.environ["HF_HUB_OFFLINE"] = "1"  # no test goes to the Hub, whose library reads this when it is first imported
torch.set_num_threads(1)  # quickest for tiny models, and the same sums on every machine


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare the runs of the tests their pictures, a tenth of a second each; test_plot.py draws them."""
    monkeypatch.setattr(curves, "draw", lambda *arguments: None)


@pytest.fixture
def text() -> str:
    """Some 20,000 characters of counting, which a tiny model learns a little of at once."""
    return "".join(f"{i} plus {i} is {2 * i}.\n" for i in range(1000))


@pytest.fixture
def dataset(tmp_path: Path, text: str) -> Path:
    """The folder of a small character dataset, for --dataset."""
    folder = tmp_path / "dataset"
    train, val = corpus.split_documents([text], val_fraction=0.1)
    corpus.write_dataset(folder, train, val, CharTokenizer.from_text(text), "counting")
    return folder


@pytest.fixture
def shakespeare() -> str:
    """The text of Tiny Shakespeare, from the folder that NANOGPT_TEST_DATA names."""
    path = _test_data("tinyshakespeare") / "input.txt"
    return path.read_text(encoding="utf-8")


@pytest.fixture
def gpt2_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    """tiktoken's vocabularies, from the folder that NANOGPT_TEST_DATA names."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(_test_data("tiktoken_cache")))


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of the repo without datasets and runs, in which commands may write."""
    copy = tmp_path / "project"
    for pattern in COPIED:
        for path in ROOT.glob(pattern):
            target = copy / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    return copy


@pytest.fixture
def command(project: Path) -> Callable[..., subprocess.CompletedProcess]:
    """A function that runs `python ARGUMENTS...` in the copy of the repo, or in `cwd`, and returns the finished process."""

    def run(*arguments: str | Path, cwd: Path = project, **environment: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, *map(str, arguments)],
            cwd=cwd,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=120,
        )

    return run


def _test_data(name: str) -> Path:
    folder = os.environ.get("NANOGPT_TEST_DATA")
    if not folder or not (Path(folder) / name).is_dir():
        pytest.skip(f"NANOGPT_TEST_DATA names no folder with {name}")
    return (Path(folder) / name).resolve()
