"""README.md and docs/: the front page is short, links work, the tree lists every file, and every command runs."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import run_train
from launcher import TIMEOUT_SECONDS, run_commands

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {"README.md": README} | {
    f"docs/{path.name}": path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("docs/*.md"))
}
NOT_RUN = "-m venv|gpt2|data/shakespeare/|openwebtext|fineweb"  # creates an environment or downloads
QUICK = ["--eval_iters=1", "--eval_interval=2", "--batch_size=2", "--device=cpu", "--dtype=float32"]


def commands_of(page: str) -> list[str]:
    """Return the python and torchrun commands in the ```sh blocks of a page, without those that no test can run."""
    blocks = re.findall(r"^```sh\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.splitlines() if line.startswith(("python", "torchrun"))]
    return [line for line in lines if not re.search(NOT_RUN, line)]


def prose_of(page: str) -> str:
    """Return a page without its code blocks."""
    return re.sub(r"^```.*?^```", "", page, flags=re.DOTALL | re.MULTILINE)


def links_of(page: str) -> list[str]:
    """Return the relative links and pictures of a page."""
    targets = re.findall(r"\]\(([^)\s]+)\)", prose_of(page)) + re.findall(r'src="([^"]+)"', prose_of(page))
    return [target for target in targets if not target.startswith("https://")]


def anchors_of(page: str) -> list[str]:
    """Return the names under which GitHub links to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", prose_of(page), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


def test_readme_is_short() -> None:
    """Catches a front page that grows until nobody reads it; what does not fit belongs in docs/."""
    assert len(README.splitlines()) <= 200
    assert len(prose_of(README).split()) <= 1500


@pytest.mark.parametrize("name", PAGES)
def test_links(name: str) -> None:
    """Catches a link to a file or a heading that does not exist."""
    for link in links_of(PAGES[name]):
        path, _, anchor = link.partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.exists(), link
        assert not anchor or anchor in anchors_of(target.read_text(encoding="utf-8")), link


def test_readme_links_to_every_page() -> None:
    """Catches a page in docs/ that nobody finds."""
    assert set(PAGES) - {"README.md"} <= {link.partition("#")[0] for link in links_of(README)}


def test_pictures_are_small() -> None:
    """Catches a picture that makes a clone of the repo slow."""
    pictures = [link for link in links_of(README) if link.endswith(".png")]
    assert pictures
    assert all((ROOT / picture).stat().st_size < 60_000 for picture in pictures)


def test_tree_lists_every_file() -> None:
    """Catches a file that the tree in README.md does not list, and one that it lists but that is gone.

    A folder stands for all that is in it, unless lines below it list its files.
    """
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, encoding="utf-8")
    if listed.returncode:
        pytest.skip("not a git checkout")
    entries: list[str] = []
    unlisted: set[str] = set()  # folders whose files have lines of their own
    folder = ""
    for line in re.search(r"```text\n(model\.py .*?)```", README, re.DOTALL)[1].splitlines():
        indent, names = re.fullmatch(r"( *)(\S+(?: \S+)*) {2,}\S.*", line).groups()
        if indent:
            unlisted.add(folder)
            entries += [folder + name for name in names.split()]
        else:
            entries += names.split()
            folder = names
    whole = tuple(entry for entry in entries if entry.endswith("/") and entry not in unlisted)
    files = [name for name in listed.stdout.split() if name not in (".gitignore", "nanogpt/__init__.py")]
    assert [name for name in files if name not in entries and not name.startswith(whole)] == []
    assert [entry for entry in entries if not (ROOT / entry).exists()] == []


def test_named_config_files_exist() -> None:
    """Catches a recipe that a page, a docstring or another recipe names but that does not exist."""
    scripts = [*ROOT.glob("*.py"), *ROOT.glob("config/*.py")]
    texts = [*PAGES.values(), *(path.read_text(encoding="utf-8") for path in scripts)]
    placeholders = {"config/file.py", "config/a.py", "config/b.py"}
    named = {name for text in texts for name in re.findall(r"config/\w+\.py", text)} - placeholders
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []


@pytest.fixture
def ready(project: Path, text: str) -> Path:
    """The copy of the repo, with a small text in place of Tiny Shakespeare, and one in my_texts/."""
    text += "ROMEO: JULIET: Hello."  # characters that the prompt and the chat need
    (project / "data" / "shakespeare_char" / "input.txt").write_text(text, encoding="utf-8")
    (project / "my_texts").mkdir()
    (project / "my_texts" / "one.txt").write_text(text, encoding="utf-8")
    return project


def test_commands_run(ready: Path) -> None:
    """Catches a command in README.md or docs/ that fails when a new user copies it. test_docs.py runs those of the walk."""
    pages = [page for name, page in PAGES.items() if name != "docs/from_bigram_to_gpt.md"]
    lines = [tuple(shlex.split(line, comments=True)) for page in pages for line in commands_of(page)]
    commands = []
    for program, *arguments in dict.fromkeys(lines):  # each once
        if arguments[-1] == "--help":
            pass
        elif "train.py" in arguments:
            arguments += [*QUICK, f"--max_iters={len(commands) + 1}"]  # more than before, so that resuming has something to do
            arguments += ["--n_layer=1"] * ("config/train_shakespeare_char.py" in arguments)  # of 10 million parameters
        elif arguments[0] in ("sample.py", "chat.py"):
            arguments += ["--max_new_tokens=5", "--device=cpu", "--dtype=float32"]
        commands.append(["torchrun", *arguments] if program == "torchrun" else arguments)
    assert len(commands) >= 20
    run_commands(commands, ready, typed="Hello.\n")
    assert (ready / "out-mine" / "ckpt.pt").is_file()


def test_use_from_python(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches an example in the guide that fails when a user copies it."""
    shape = "--n_layer=1 --n_head=1 --n_embd=8 --block_size=8 --batch_size=2 --gradient_accumulation_steps=1 --device=cpu"
    run_train(*shape.split(), f"--dataset={dataset}", f"--out_dir={tmp_path / 'out-shakespeare-char-cpu'}", "--max_iters=1")
    (block,) = re.findall(r"^```python\n(.*?)^```", PAGES["docs/guide.md"], re.DOTALL | re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    exec(block.replace("ROMEO:", "1 plus"), {})
    assert len(capsys.readouterr().out.removeprefix("1 plus")) == 100 + len("\n")


def make(project: Path, python: str, **environment: str) -> subprocess.CompletedProcess:
    """Run `make` in the project, with the shell script `python` as the Python of an environment that is already installed."""
    stub = project / ".venv" / "bin" / "python"
    stub.parent.mkdir(parents=True)
    stub.write_text(f"#!/bin/sh\n{python}\n", encoding="utf-8")
    stub.chmod(0o755)
    (project / ".venv" / "installed").touch()
    inherited = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "VENV", "PYTHON")}
    environment = inherited | {"OMP_NUM_THREADS": "1"} | environment  # not what `make test VENV=...` gives to its children
    return subprocess.run(
        ["make"], cwd=project, env=environment, capture_output=True, encoding="utf-8", timeout=TIMEOUT_SECONDS
    )


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_quick_start_trains_on_tiny_shakespeare(ready: Path) -> None:
    """Catches a quick start with another dataset, or one that samples from another folder than it trained in."""
    finished = make(ready, f'case "$1" in train.py|sample.py) echo "$@" ;; *) exec "{sys.executable}" "$@" ;; esac')
    assert finished.returncode == 0, finished.stderr
    train, sample = (line for line in finished.stdout.splitlines() if line.startswith(("train.py", "sample.py")))
    assert {"--dataset=shakespeare_char", "--out_dir=out-quickstart"} <= set(train.split())
    assert "--out_dir=out-quickstart" in sample.split()
    assert train.split()[1] == "config/train_shakespeare_char_fast.py" and "log_interval" not in train
    assert (ready / "data" / "shakespeare_char" / "train.bin").is_file()


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_quick_start_without_a_network(ready: Path, text: str) -> None:
    """Catches a quick start whose parts do not fit together, or that stops if Tiny Shakespeare cannot be downloaded."""
    (ready / "data" / "shakespeare_char" / "input.txt").unlink()
    for name, old, new in (
        ("config/train_shakespeare_char_fast.py", "max_iters = 800", "max_iters = 3"),
        ("Makefile", "--max_new_tokens=300", "--max_new_tokens=30"),
    ):
        content = (ready / name).read_text(encoding="utf-8")
        assert old in content
        (ready / name).write_text(content.replace(old, new), encoding="utf-8")
    library = ready / "library"  # a small one in place of Python's standard library
    library.mkdir()
    for i in range(20):
        (library / f"module_{i}.py").write_text(text[i * 500 : (i + 1) * 500], encoding="utf-8")
    (ready / "sitecustomize.py").write_text(
        "import sysconfig, time\n"
        f"paths = sysconfig.get_paths() | {{'stdlib': {str(library)!r}}}\n"
        "sysconfig.get_paths = lambda *arguments, **options: paths\n"
        "sleep = time.sleep\n"
        "time.sleep = lambda seconds: sleep(min(seconds, 0.01))\n",  # between downloads
        encoding="utf-8",
    )
    unreachable = {"https_proxy": "http://127.0.0.1:9"}  # nothing listens there
    finished = make(ready, f'exec "{sys.executable}" "$@"', PYTHONPATH=str(ready), **unreachable)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count("---------------") == 3
    assert "python_char" in finished.stdout and "Next:" in finished.stdout
    download, speed = finished.stderr.splitlines()
    assert "cannot download" in download and "tokens/s" in speed
