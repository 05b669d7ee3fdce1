"""Several processes with torchrun on the CPU: the same run as one process, and a clean end."""

import csv
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import checkpoint
import device
import guard

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
FLAGS = (
    "--n_layer=2 --n_head=2 --n_embd=16 --block_size=16 --batch_size=2 --gradient_accumulation_steps=4 --dropout=0.2 "
    "--max_iters=6 --eval_interval=3 --warmup_iters=2 --lr_decay_iters=6 --learning_rate=1e-2 --device=cpu --dtype=float32"
).split()


def torchrun(processes: int, script: Path, *flags: str | Path, root: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [*TORCHRUN, f"--nproc_per_node={processes}", script, *flags],
        cwd=root,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=120,
    )


def records(out_dir: Path) -> list[list[float]]:
    with open(out_dir / "metrics.csv", newline="") as file:
        names = ("iteration", "tokens", "train_loss", "val_loss", "loss", "learning_rate", "grad_norm")
        return [[float(row[name] or -1) for name in names] for row in csv.DictReader(file)]


@pytest.mark.parametrize("eval_iters", [0, 3])
def test_two_processes_give_the_run_of_one(eval_iters: int, command, project: Path, dataset: Path, tmp_path: Path) -> None:
    """Catches processes that see the same tokens, average wrongly, drop out differently or evaluate only their part.

    Also those that wait for each other while one of them writes a sample, or write one each.
    """
    flags = [*FLAGS, f"--dataset={dataset}", f"--eval_iters={eval_iters}"]
    one = command("train.py", *flags, f"--out_dir={tmp_path / 'one'}")
    two = torchrun(2, project / "train.py", *flags, f"--out_dir={tmp_path / 'two'}", "--sample_interval=2", root=project)
    assert two.stdout.count("--- sample after") == 3
    assert (one.returncode, two.returncode) == (0, 0), one.stderr + two.stderr
    assert sum(line.startswith("step 6: ") for line in two.stdout.splitlines()) == 1
    for row_of_two, row_of_one in zip(records(tmp_path / "two"), records(tmp_path / "one"), strict=True):
        assert row_of_two == pytest.approx(row_of_one, abs=1e-4)
    weights = [checkpoint.load(tmp_path / name / "last.pt").weights for name in ("one", "two")]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=0, atol=1e-4)


def test_group_leaves_no_thread_behind(project: Path, dataset: Path, tmp_path: Path) -> None:
    """Catches a reference that keeps the group alive: one of its threads may then abort the process at exit."""
    if not Path("/proc/self/task").exists():
        pytest.skip("this system has no /proc to count threads in")
    script = tmp_path / "threads.py"
    script.write_text(
        "import pathlib, sys, configurator, train\n"
        "train.main(configurator.parse(train.Config, sys.argv[1:]))\n"
        "names = [(task / 'comm').read_text() for task in pathlib.Path('/proc/self/task').iterdir()]\n"
        "sys.exit(any('gloo' in name for name in names))\n"
    )
    finished = torchrun(
        2, script, *FLAGS, f"--dataset={dataset}", f"--out_dir={tmp_path / 'out'}", "--eval_iters=1", root=project
    )
    assert finished.returncode == 0, finished.stderr


def test_micro_batches_that_cannot_be_shared_out_are_refused(project: Path, dataset: Path, tmp_path: Path) -> None:
    """Catches a global batch that silently changes with the number of processes."""
    flags = [*FLAGS, f"--dataset={dataset}", f"--out_dir={tmp_path / 'out'}", "--gradient_accumulation_steps=3"]
    finished = torchrun(2, project / "train.py", *flags, root=project)
    assert finished.returncode != 0
    assert "gradient_accumulation_steps=3 micro-batches cannot be shared out evenly between 2 processes" in finished.stderr
    assert not (tmp_path / "out").exists()


def test_a_signal_stops_all_processes_after_one_update(project: Path, dataset: Path, tmp_path: Path) -> None:
    """Catches processes that part at different iterations, wait for each other for good, or lose what they had done."""
    flags = [*FLAGS, f"--dataset={dataset}", "--eval_iters=1", "--eval_interval=1000000", "--lr_decay_iters=1000"]
    running = subprocess.Popen(
        [*TORCHRUN, "--nproc_per_node=2", "train.py", *flags, f"--out_dir={tmp_path / 'out'}", "--max_iters=1000000"],
        cwd=project,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not running.stdout.readline().startswith("iter 5: "):
        assert running.poll() is None
    running.send_signal(signal.SIGTERM)
    out, err = running.communicate(timeout=60)
    assert running.returncode != 0
    *_, stopped, command = out.splitlines()
    done = int(re.search(r"SIGTERM: stopped and saved after ([\d,]+) of ", stopped)[1].replace(",", ""))
    assert checkpoint.load(tmp_path / "out" / "last.pt").iter_num == done == len(records(tmp_path / "out")) - 1
    assert "SIGTERM: finishing" in err and 'train.py", line' not in err  # torchrun has a traceback of its own
    assert f"torchrun --standalone --nproc_per_node=2 train.py --init_from=resume --out_dir={tmp_path / 'out'}" in command
    on = ["--init_from=resume", f"--out_dir={tmp_path / 'out'}"]
    whole = [*flags, f"--out_dir={tmp_path / 'whole'}"]
    for arguments in (on, whole):
        finished = torchrun(2, project / "train.py", *arguments, f"--max_iters={done + 3}", root=project)
        assert finished.returncode == 0, finished.stderr
    weights = [checkpoint.load(tmp_path / name / "last.pt").weights for name in ("out", "whole")]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    assert records(tmp_path / "out") == records(tmp_path / "whole")


def test_a_folder_in_which_a_run_lives_is_refused_by_all_processes(project: Path, dataset: Path, tmp_path: Path) -> None:
    """Catches processes that wait for the refused main one, or tell of it with a traceback."""
    with guard.only_run(tmp_path / "out", device.Group()):
        finished = torchrun(
            2, project / "train.py", *FLAGS, f"--dataset={dataset}", f"--out_dir={tmp_path / 'out'}", root=project
        )
    assert finished.returncode != 0
    lines = [line for line in finished.stderr.splitlines() if line.startswith("train.py")]
    assert any("another run lives in" in line for line in lines)
    assert 'train.py", line' not in finished.stderr
    assert not (tmp_path / "out").exists()  # nothing was written into it, and so it went with the one that held it
