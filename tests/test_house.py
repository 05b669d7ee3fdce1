"""The rules of the house: what may import what, and how long the root, its files and the training loop may get."""

import ast
import io
import re
import shutil
import subprocess
import sys
import tokenize
from collections.abc import Iterable, Iterator
from graphlib import TopologicalSorter

from configurator import ROOT

import launcher
import pytest
from packaging.requirements import Requirement

ROOT_PYTHON_FILES, ROOT_ENTRIES = 9, 22  # at most, tracked by git
FILE_LINES = 400  # of train.py and of model.py, all lines
TRAIN_LINES, LOOP_LINES, TRAIN_LOCALS = 100, 60, 35  # of train() and its loop, without blank lines and comments

Import = ast.Import | ast.ImportFrom
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in [*ROOT.glob("*.py"), *ROOT.glob("nanogpt/*.py")]
}
COMMANDS = {name for name in FILES if "." not in name} - {"model", "configurator"}


def parse(module: str) -> ast.Module:
    return ast.parse(FILES[module].read_text(encoding="utf-8"))


def top_level_imports(node: ast.AST) -> Iterator[Import]:
    """The imports that run when the module itself is imported: all but those in functions."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Import):
            yield child
        elif not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from top_level_imports(child)


def imported(statements: Iterable[Import]) -> set[str]:
    """The full names of the modules that import statements name: `from nanogpt import run` is nanogpt.run."""
    names = set()
    for statement in statements:
        if isinstance(statement, ast.Import):
            names |= {alias.name for alias in statement.names}
        else:
            submodules = {f"{statement.module}.{alias.name}" for alias in statement.names} & FILES.keys()
            names |= submodules or {statement.module}
    return names


IMPORTS = {module: imported(top_level_imports(parse(module))) for module in FILES}
OURS = {module: names & FILES.keys() for module, names in IMPORTS.items()}


def floor(module: str) -> int:
    """Return 3 for commands, 2 for nanogpt/, 1 for what it builds on, 0 for what imports nothing of this repo."""
    if module in COMMANDS:
        return 3
    return {"model": 1, "configurator": 1, "nanogpt.kernels": 0, "nanogpt.errors": 0}.get(module, 2)


@pytest.mark.parametrize("module", sorted(FILES))
def test_imports_go_down_only(module: str) -> None:
    """Catches a library module that imports a command, or a ground floor that imports what stands on it."""
    too_high = {other for other in OURS[module] if floor(other) >= floor(module)}
    if floor(module) == 2:  # modules of nanogpt/ may import each other
        too_high = {other for other in too_high if floor(other) > 2}
    assert too_high == set()


def test_no_import_cycle() -> None:
    """Catches two modules that import each other, directly or through others."""
    TopologicalSorter(OURS).prepare()  # raises CycleError, which names the cycle


def test_nothing_imports_a_command() -> None:
    """Catches code that a command shares with others instead of keeping it in nanogpt/."""
    assert {"train", "sample", "chat", "bench", "plot", "export", "look"} <= COMMANDS
    assert {module: names & COMMANDS for module, names in OURS.items() if names & COMMANDS} == {}


def test_model_needs_torch_and_kernels_only() -> None:
    """Catches a model.py that cannot be dropped into nanoGPT's folder with kernels.py alone."""
    packages = {name.partition(".")[0] for name in IMPORTS["model"] - OURS["model"]}
    assert packages - sys.stdlib_module_names == {"torch"}
    assert OURS["model"] == {"nanogpt.kernels"}
    assert OURS["nanogpt.kernels"] == set()


def test_configurator_needs_errors_only() -> None:
    """Catches a command line whose --help waits for PyTorch, or for anything but the standard library."""
    packages = {name.partition(".")[0] for name in IMPORTS["configurator"] - OURS["configurator"]}
    assert packages - sys.stdlib_module_names == set()
    assert OURS["configurator"] == {"nanogpt.errors"}


def test_huggingface_does_not_import_the_model() -> None:
    """Catches a weight loader that builds models, which is checkpoint.py's task."""
    assert "model" not in OURS["nanogpt.huggingface"]


def test_one_import_inside_a_function() -> None:
    """Catches an import cycle hidden in a function; GPT.from_pretrained, nanoGPT's API, is the one exception."""
    hidden = {}
    for module in FILES:
        for function in ast.walk(parse(module)):
            if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
                names = imported(node for node in ast.walk(function) if isinstance(node, Import)) & FILES.keys()
                hidden |= {(module, function.name): names} if names else {}
    assert hidden == {("model", "from_pretrained"): {"nanogpt.checkpoint"}}


# text files


def test_text_files_name_their_encoding() -> None:
    """Catches a text that is read or written in the locale's encoding: ASCII under LC_ALL=C, cp1252 on Windows."""
    unnamed = []
    for path in [*ROOT.glob("*.py"), *ROOT.glob("*/*.py"), *ROOT.glob("data/*/*.py")]:
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(call, ast.Call):
                name, names = ast.unparse(call.func), {keyword.arg for keyword in call.keywords}
                is_text = name.endswith((".read_text", ".write_text")) and name != "corpus.read_text"
                is_text = is_text or (name.startswith("subprocess.") and names & {"text", "universal_newlines"})
                if is_text and "encoding" not in names:
                    unnamed.append(f"{path.relative_to(ROOT)}:{call.lineno}")
    assert unnamed == []


# packages


def requirements(name: str) -> Iterator[Requirement]:
    """The packages that a file of pip's names, without those of the files that it includes."""
    for line in (ROOT / name).read_text(encoding="utf-8").splitlines():
        if line and not line.startswith(("#", "-r")):
            yield Requirement(line)


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.14"])
def test_every_package_is_pinned_once(python: str) -> None:
    """Catches a package that `make` installs in an untested version, or a pin that pip cannot install."""
    pins = [r for r in requirements("constraints.txt") if r.marker is None or r.marker.evaluate({"python_version": python})]
    wanted = [*requirements("requirements.txt"), *requirements("tests/requirements.txt")]
    assert [pin.name for pin in pins] == [package.name for package in wanted]
    for pin, package in zip(pins, wanted, strict=True):
        (exact,) = pin.specifier
        assert exact.operator == "==" and package.specifier.contains(exact.version), package


def test_packages_of_the_user_are_kept() -> None:
    """Catches a requirement that makes pip replace the PyTorch of a cluster, of Colab or of a GPU box."""
    (torch,) = (package for package in requirements("requirements.txt") if package.name == "torch")
    assert torch.specifier.contains("2.9.0+cu128") and torch.specifier.contains("2.14.1")
    assert all(spec.operator == ">=" for package in requirements("requirements.txt") for spec in package.specifier)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert [line for line in makefile.splitlines() if "pip install" in line and "-c constraints.txt" not in line] == []


# sizes


def test_root_stays_small() -> None:
    """Catches a root folder in which train.py no longer stands out."""
    if not shutil.which("git") or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listing = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, encoding="utf-8", check=True).stdout
    entries = {path.partition("/")[0] for path in listing.splitlines()}
    assert len([name for name in entries if name.endswith(".py")]) <= ROOT_PYTHON_FILES
    assert len(entries) <= ROOT_ENTRIES


@pytest.mark.parametrize("module", ["model", "train"])
def test_file_reads_in_ten_minutes(module: str) -> None:
    """Catches a face of the project that grows past one sitting."""
    assert len(FILES[module].read_text(encoding="utf-8").splitlines()) <= FILE_LINES


def lines_of_code(module: str, node: ast.stmt) -> int:
    """Count the lines of a statement, without blank lines and comments."""
    no_code = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(FILES[module].read_text(encoding="utf-8")).readline):
        if token.type not in no_code:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines & set(range(node.lineno, node.end_lineno + 1)))


def test_training_loop_fits_on_a_screen() -> None:
    """Catches a train() that is no longer read in one go, or that keeps more in its locals than a head can hold."""
    (train,) = [node for node in parse("train").body if isinstance(node, ast.FunctionDef) and node.name == "train"]
    (loop,) = [node for node in ast.walk(train) if isinstance(node, ast.While)]
    assigned = {node.id for node in ast.walk(train) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    assert lines_of_code("train", train) <= TRAIN_LINES
    assert lines_of_code("train", loop) <= LOOP_LINES
    assert len(assigned | {argument.arg for argument in train.args.args}) <= TRAIN_LOCALS


def test_limits_hold_beside_other_work() -> None:
    """Catches a test that fails on a busy machine: every limit on a command's time is the launcher's."""
    limits = [line for path in ROOT.glob("tests/*.py") for line in re.findall(r"timeout=\d+", path.read_text(encoding="utf-8"))]
    assert limits == [] and launcher.TIMEOUT_SECONDS >= 600
