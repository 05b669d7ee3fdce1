"""Where a command runs: closed streams, signals, missing packages, safe paths, home folders, sweeps."""

import os
import signal
import subprocess
import sys
import types
from pathlib import Path

import configurator
from configurator import ROOT, parse

import launcher
import pytest
from conftest import run_train

import chat
import export
import plot
import sample
import train
from nanogpt import checkpoint
from nanogpt.device import moved_settings
from nanogpt.errors import UserError
from nanogpt.metrics import start_wandb

MODEL = "--n_layer=1 --n_head=2 --n_embd=16 --block_size=16 --batch_size=2 --gradient_accumulation_steps=1 --device=cpu"
COMMANDS = ["train.py", "sample.py", "chat.py", "bench.py", "plot.py", "export.py", "look.py"]
COMMANDS += sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("data/*/prepare.py"))
posix = pytest.mark.skipif(os.name != "posix", reason="this system has no such signals and descriptors")


# a script that does what it is told, without PyTorch
SCRIPT = """\
import atexit, os, signal, subprocess, sys
from dataclasses import dataclass
import configurator

@dataclass
class Config(configurator.Config):
    what: str = "write"

def main(config):
    if config.what == "write":
        with open("checkpoint", "w") as file:
            for descriptor in (1, 2):
                os.write(descriptor, b"from a library\\n")
            print("printed", flush=True)
            print("printed", file=sys.stderr, flush=True)
            assert sys.stdin.read() == ""
            subprocess.run(["sh", "-c", "echo from a child; echo from a child >&2"], check=True, pass_fds=[0])
            file.write("weights")
    else:
        atexit.register(print, "closed")
        print("saved")
        if config.what == "ctrl_c":
            raise KeyboardInterrupt
        raise SystemExit(int(config.what))

if __name__ == "__main__":
    configurator.run(main, Config)
"""


def run_script(folder: Path, *arguments: str, closed: str = "", **environment: str) -> subprocess.CompletedProcess:
    """Run SCRIPT in a fresh process; `closed` are redirections of the shell."""
    (folder / "script.py").write_text(SCRIPT, encoding="utf-8")
    return subprocess.run(
        ["sh", "-c", f'exec "$0" "$@" {closed}', sys.executable, "script.py", *arguments],
        cwd=folder,
        env={name: value for name, value in os.environ.items() if name != "RANK"} | {"PYTHONPATH": str(ROOT)} | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        timeout=launcher.TIMEOUT_SECONDS,
    )


# streams


@posix
@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_closed_stream_is_the_null_device(tmp_path: Path, closed: str) -> None:
    """Catches a crash, and a checkpoint that takes the descriptor of a closed stream and so gets what is printed."""
    finished = run_script(tmp_path, closed=closed)
    assert finished.returncode == 0, finished.stderr
    assert (tmp_path / "checkpoint").read_text(encoding="utf-8") == "weights"
    written = "from a library\nprinted\nfrom a child\n"
    words = closed.split()
    assert (finished.stdout, finished.stderr) == ("" if ">&-" in words else written, "" if "2>&-" in words else written)


@posix
def test_training_with_closed_streams(command, dataset: Path, tmp_path: Path) -> None:
    """Catches a part of a run that needs a stream: the progress bar, printed lines, a warning."""
    setup = "import os, sys\nfor descriptor in (0, 1, 2): os.close(descriptor)\nsys.stdin = sys.stdout = sys.stderr = None"
    flags = [*MODEL.split(), f"--dataset={dataset}", f"--out_dir={tmp_path / 'out'}", "--max_iters=2", "--eval_iters=1"]
    assert command("train.py", *flags, setup=setup).returncode == 0
    assert checkpoint.load(tmp_path / "out" / "ckpt.pt").iter_num == 2


# signals


@posix
@pytest.mark.parametrize(
    ("what", "number"), [("ctrl_c", signal.SIGINT), ("130", signal.SIGINT), ("143", signal.SIGTERM), ("129", signal.SIGHUP)]
)
def test_stopped_command_ends_by_its_signal(tmp_path: Path, what: str, number: int) -> None:
    """Catches a shell script that goes on after Ctrl-C, and an exit that is not closed and flushed before the signal."""
    finished = run_script(tmp_path, f"--what={what}")
    assert finished.returncode == -number
    assert finished.stdout == "saved\nclosed\n"
    assert finished.stderr == ("\ninterrupted\n" if what == "ctrl_c" else "")


@posix
@pytest.mark.parametrize(
    ("what", "rank", "status"), [("143", "0", 143), ("143", "", -signal.SIGTERM), ("3", "", 3), ("300", "", 44)]
)
def test_other_exits_keep_their_status(tmp_path: Path, what: str, rank: str, status: int) -> None:
    """Catches a rank that torchrun sees die by a signal, an empty RANK that counts as one, and other numbers as signals."""
    assert run_script(tmp_path, f"--what={what}", RANK=rank).returncode == status


@posix
def test_first_process_of_a_container(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a status 0 of PID 1, which ignores the signal that it raises."""
    raised = []
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(sys, "argv", ["script.py"])
    monkeypatch.setattr(configurator.atexit, "_run_exitfuncs", lambda: None)
    monkeypatch.setattr(configurator.signal, "signal", lambda *arguments: None)
    monkeypatch.setattr(configurator.signal, "raise_signal", raised.append)

    def stopped(config: plot.Config) -> None:
        raise SystemExit(143)

    with pytest.raises(SystemExit) as caught:
        configurator.run(stopped, plot.Config)
    assert (raised, caught.value.code) == ([signal.SIGTERM], 143)


# packages and paths


def run_without_site(script: str, *options: str, **environment: str) -> subprocess.CompletedProcess:
    """Run a script of the repo without the installed packages: as if no environment were active."""
    return subprocess.run(
        [sys.executable, "-S", *options, ROOT / script, "--help"],
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | environment,
        capture_output=True,
        encoding="utf-8",
        timeout=launcher.TIMEOUT_SECONDS,
    )


@pytest.mark.parametrize("script", COMMANDS)
def test_missing_packages_are_one_line(script: str) -> None:
    """Catches a command that imports a package before it checks that there is one, and so ends in a traceback.

    PYTHONSAFEPATH and -I also take the script's folder from sys.path.
    """
    options = () if sys.version_info >= (3, 11) else ("-I",)
    finished = run_without_site(script, *options, PYTHONSAFEPATH="1")
    assert finished.returncode == 1
    (line,) = finished.stderr.splitlines()
    assert line.startswith(f"{Path(script).name}: error: torch is not installed in this Python ({sys.executable})")
    assert "source .venv/bin/activate" in line and "pip install -r requirements.txt" in line


def test_package_that_is_missing_later(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a traceback for a package that only some commands import."""
    monkeypatch.setattr(sys, "argv", ["script.py"])

    def draws(config: plot.Config) -> None:
        import no_such_package.figure  # noqa: F401

    with pytest.raises(SystemExit) as caught:
        configurator.run(draws, plot.Config)
    assert caught.value.code == 1
    assert capsys.readouterr().err.startswith("script.py: error: no_such_package is not installed in this Python (")


def test_missing_module_of_a_package_is_a_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a mistyped import that is reported as a package to install."""
    monkeypatch.setattr(sys, "argv", ["script.py"])

    def mistyped(config: plot.Config) -> None:
        import nanogpt.metricks  # noqa: F401

    with pytest.raises(ModuleNotFoundError):
        configurator.run(mistyped, plot.Config)


def test_folder_named_wandb_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches wandb's own log folder in the repo, taken for the package that is not installed."""
    namespace = types.ModuleType("wandb")  # what Python makes of a folder without __init__.py
    namespace.__path__ = [str(tmp_path)]
    monkeypatch.setitem(sys.modules, "wandb", namespace)
    monkeypatch.delitem(sys.modules, "wandb.errors", raising=False)
    with pytest.raises(UserError, match="pip install wandb"):
        start_wandb("project", "run", {})


@pytest.mark.parametrize(
    ("command", "argument", "key"),
    [(train, f"--{key}=~/x", key) for key in ("out_dir", "init_from", "dataset")]
    + [(sample, "--init_from=~/x", "init_from"), (sample, "~/x", "init_from"), (chat, "--out_dir=~/x", "out_dir")]
    + [(export, "--to=~/x", "to"), (plot, "--out_dir=~/x", "out_dir"), (plot, "~/x", "runs")],
)
def test_home_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command, argument: str, key: str) -> None:
    """Catches a folder named ~, which somebody then removes with rm -r ~."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert Path(getattr(parse(command.Config, [argument]), key)) == tmp_path / "x"


def test_home_folder_in_files_and_prompts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Catches a config file whose ~ stays, a prompt file in ~ that is not found, and a prompt that loses its ~."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / "config.py").write_text("out_dir = '~/x'", encoding="utf-8")
    assert Path(parse(train.Config, [str(tmp_path / "config.py")]).out_dir) == tmp_path / "x"
    assert parse(sample.Config, ["--start=FILE:~/x"]).start == f"FILE:{tmp_path}/x"
    assert parse(chat.Config, ["--context=FILE:~/x"]).context == f"FILE:{tmp_path}/x"
    assert parse(sample.Config, ["--start=~/x"]).start == "~/x"


# machines


@pytest.mark.parametrize(
    ("run", "device", "changed"),
    [
        ({"device": "cuda", "backend": "nccl"}, "cpu", "dtype compile backend"),
        ({"device": "cuda:1"}, "cpu", "dtype compile backend"),
        ({"device": "cuda:99"}, None, "device dtype compile backend"),
        ({"device": "auto", "backend": "nccl"}, "cpu", "dtype compile backend"),
        ({"device": "cpu", "backend": "nccl"}, "cpu", "backend"),
        ({"device": "cpu", "backend": "nccl"}, None, "backend"),
        ({"device": "cpu", "backend": "gloo"}, "cpu", ""),
        ({"device": "cpu"}, None, ""),
        ({"device": "auto"}, "cpu", ""),
        ({}, "cpu", ""),
    ],
)
def test_settings_follow_the_kind_of_device(run: dict[str, str], device: str | None, changed: str) -> None:
    """Catches float16, compilation or NCCL of a GPU on a CPU, and a CPU run that does not keep what it was given."""
    assert moved_settings(run, device) == dict.fromkeys(changed.split(), "auto")


def test_run_of_a_gpu_resumes_on_a_cpu(dataset: Path, tmp_path: Path) -> None:
    """Catches a run that can only be resumed on the kind of machine that it began on."""
    import torch

    out_dir = f"--out_dir={tmp_path / 'out'}"
    run_train(*MODEL.split(), f"--dataset={dataset}", out_dir, "--max_iters=2", "--eval_iters=1")
    for path in (tmp_path / "out").glob("*.pt"):
        state = torch.load(path, weights_only=True)
        state["config"] |= {"device": "cuda", "dtype": "float16", "compile": True, "backend": "nccl"}
        torch.save(state, path)
    ckpt = checkpoint.open_checkpoint("resume", str(tmp_path / "out"), newest_state=True)
    config = train.resolve_config(parse(train.Config, ["--init_from=resume", out_dir, "--device=cpu"]), ckpt)
    assert (config.device, config.dtype, config.compile, config.backend) == ("cpu", "auto", "auto", "auto")
    given = ["--init_from=resume", out_dir, "--device=cpu", "--dtype=float16", "--compile=True", "--backend=gloo"]
    config = train.resolve_config(parse(train.Config, given), ckpt)
    assert (config.dtype, config.compile, config.backend) == ("float16", True, "gloo")


# Weights & Biases


@posix
def test_sweep_gives_each_trial_a_folder(tmp_path: Path) -> None:
    """Catches a sweep whose flags train.py refuses, or whose trials write into one folder."""
    sweeps = pytest.importorskip("wandb.sdk.launch.sweeps.utils")
    sweep = sweeps.load_sweep_config(ROOT / "config" / "sweep.yaml")
    python = tmp_path / "python"  # prints its arguments
    python.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n', encoding="utf-8")
    python.chmod(0o755)
    first = {name: parameter.get("min") or parameter["values"][0] for name, parameter in sweep["parameters"].items()}
    trial = {name: {"value": value} for name, value in first.items()}
    filled = {"${program}": [sweep["program"]], "${args}": sweeps.create_sweep_command_args({"args": trial})["args"]}
    folders = []
    for run_id in ("abc", "def"):
        line = [part for chunk in sweeps.create_sweep_command(list(sweep["command"])) for part in filled.get(chunk, [chunk])]
        environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "WANDB_RUN_ID": run_id}
        printed = subprocess.run(line, env=environment, capture_output=True, encoding="utf-8", check=True, cwd=ROOT).stdout
        script, *arguments = printed.splitlines()
        config = parse(train.Config, arguments)
        folders.append(config.out_dir)
        assert script == "train.py" and config.wandb_log
        assert {name: getattr(config, name) for name in first} == first
    assert folders == ["out-sweep/abc", "out-sweep/def"]
