"""What the tests share: small datasets, real text if NANOGPT_TEST_DATA names it, and commands run in a copy of the repo."""

import csv
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import configurator

import launcher
import pytest
import torch

import train
from nanogpt import corpus, curves, device
from nanogpt.tokenizer import CharTokenizer

ROOT = Path(__file__).resolve().parents[1]
COPIED = ["*.py", "*.md", "Makefile", "*.txt", "config/*.py", "nanogpt/*.py", "nanogpt/web/*", "data/*/prepare.py", "docs/*.*"]

os.environ["HF_HUB_OFFLINE"] = "1"  # no test goes to the Hub, whose library reads this when it is first imported
torch.set_num_threads(1)  # fastest for tiny models, and the same sums on every machine
# background jobs ignore SIGINT, and nohup ignores SIGHUP; the tests of signals need both
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def run_train(*flags: str | Path) -> None:
    """Run train.py in this process."""
    train.main(configurator.parse(train.Config, [str(flag) for flag in flags]))


def read_rows(out_dir: Path) -> list[dict[str, str]]:
    """Return the rows of a run's metrics.csv."""
    with open(out_dir / "metrics.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def write_dataset(folder: Path, text: str) -> None:
    """Write a character dataset, with the last tenth of `text` to validate."""
    train_texts, val_texts = corpus.split_documents([text], val_fraction=0.1)
    corpus.write_dataset(folder, train_texts, val_texts, CharTokenizer.from_text(text), "counting")


def counting(lines: int) -> str:
    """Return a text that a tiny model learns a little of at once: 20 characters a line."""
    return "".join(f"{i} plus {i} is {2 * i}.\n" for i in range(lines))


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw no loss.png, which takes a tenth of a second for each run; test_plot.py draws them."""
    monkeypatch.setattr(curves, "draw", lambda *arguments: None)


@pytest.fixture(autouse=True)
def quick_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure the peak with three small products, which saves 0.1 s for each run."""
    for name, value in launcher.QUICK_PEAK.items():
        monkeypatch.setattr(device, name, value)


@pytest.fixture
def text() -> str:
    """Some 20,000 characters of counting."""
    return counting(1000)


@pytest.fixture
def dataset(tmp_path: Path, text: str) -> Path:
    """The folder of a small character dataset, for --dataset."""
    write_dataset(tmp_path / "dataset", text)
    return tmp_path / "dataset"


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
    """A function that runs `python ARGUMENTS...` in the copy of the repo, or in `cwd`, and returns the finished process.

    The repo's own scripts are forked from a process that has imported PyTorch (launcher.py). Code of a test gets a fresh
    Python, as does a script with PYTHONHASHSEED, which Python reads when it starts.
    """

    def run(script: str | Path, *arguments: str | Path, cwd: Path = project, **environment: str) -> subprocess.CompletedProcess:
        is_ours = (ROOT / os.path.relpath(project / script, project)).is_file()
        if is_ours and "PYTHONHASHSEED" not in environment:
            return launcher.run(script, *arguments, cwd=cwd, **environment)
        return subprocess.run(
            [sys.executable, script, *map(str, arguments)],
            cwd=cwd,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
            capture_output=True,
            encoding="utf-8",
            timeout=launcher.TIMEOUT_SECONDS,
        )

    return run


def _test_data(name: str) -> Path:
    folder = os.environ.get("NANOGPT_TEST_DATA")
    if not folder or not (Path(folder) / name).is_dir():
        pytest.skip(f"NANOGPT_TEST_DATA names no folder with {name}")
    return (Path(folder) / name).resolve()
