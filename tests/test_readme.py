"""README.md keeps its word: the tree of files is the repo's, and its commands run, on a small text."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line
    for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if line.startswith(("python", "torchrun")) and not re.search("-m venv|gpt2|data/shakespeare/", line)  # no test downloads
]
QUICK = ["--eval_iters=1", "--eval_interval=2"]


def test_file_tree_is_that_of_the_repo() -> None:
    """Catches a file that README.md does not explain, and one that it explains and that is gone."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    tree = re.findall(r"^(\S+) {2,}\S", re.search(r"```text\n(README.md.*?)```", README, re.DOTALL)[1], re.MULTILINE)
    files = [name for name in listed.stdout.split() if name != ".gitignore"]
    assert [
        name for name in files if not any(name == entry or name.startswith(entry.rstrip("/") + "/") for entry in tree)
    ] == []
    assert [entry for entry in tree if not (ROOT / entry).exists()] == []


def test_config_files_are_named_where_they_exist() -> None:
    """Catches a recipe that README.md, a docstring or another recipe names and that is not there."""
    texts = [README, *(path.read_text(encoding="utf-8") for path in [*ROOT.glob("*.py"), *ROOT.glob("config/*.py")])]
    named = {name for text in texts for name in re.findall(r"config/\w+\.py", text)} - {
        "config/file.py",
        "config/a.py",
        "config/b.py",
    }
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []


@pytest.fixture
def ready(project: Path, text: str) -> Path:
    """The copy of the repo, with a small text in the place of Tiny Shakespeare and one in my_texts/."""
    text += "ROMEO: JULIET: Hello."  # what README.md and the chat below need
    (project / "data" / "shakespeare_char" / "input.txt").write_text(text, encoding="utf-8")
    (project / "my_texts").mkdir()
    (project / "my_texts" / "one.txt").write_text(text, encoding="utf-8")
    return project


def test_commands_run_one_after_the_other(ready: Path) -> None:
    """Catches a command of README.md that a new user copies in vain."""
    assert len(COMMANDS) >= 15
    iterations = 2
    for command in COMMANDS:
        program, *arguments = command.replace('"', "").split()
        if "train.py" in command:
            iterations += 1  # so that the one that resumes has something to do
            arguments += [*QUICK, f"--max_iters={iterations}", "--batch_size=2", "--device=cpu", "--dtype=float32"]
        elif "sample.py" in command or "chat.py" in command:
            arguments += ["--max_new_tokens=5", "--device=cpu", "--dtype=float32"]
        launcher = [sys.executable] if program == "python" else [sys.executable, "-m", "torch.distributed.run"]
        finished = subprocess.run(
            [*launcher, *arguments],
            cwd=ready,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            input="Hello.\n",  # to chat.py
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert finished.returncode == 0, f"{command}\n{finished.stderr}"
    assert (ready / "out-mine" / "ckpt.pt").is_file()


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("offline", [False, True])
def test_quick_start_runs_with_and_without_tiny_shakespeare(ready: Path, offline: bool) -> None:
    """Catches a quick start whose parts do not fit together, or that ends where there is no network."""
    environment = ready / ".venv" / "bin"
    environment.mkdir(parents=True)
    python = environment / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    (ready / ".venv" / "installed").touch()
    recipe = ready / "config" / "train_shakespeare_char_cpu.py"
    recipe.write_text(recipe.read_text().replace("max_iters = 2000", "max_iters = 3"))
    if offline:
        (ready / "data" / "shakespeare_char" / "input.txt").unlink()
    finished = subprocess.run(
        ["make"],
        cwd=ready,
        env=os.environ | {"OMP_NUM_THREADS": "1", "https_proxy": "http://127.0.0.1:9"},  # nothing listens there
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count("---------------") == 3
    assert "Next:" in finished.stdout
    if offline:
        download, speed = finished.stderr.splitlines()
        assert "cannot download" in download and "tokens/s" in speed
        assert "python_char" in finished.stdout
