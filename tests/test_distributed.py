"""Several processes on the CPU, each with the model or with a share of it: the same run as one process, and a clean end."""

import csv
import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from configurator import ROOT
from nanogpt import checkpoint, corpus
from nanogpt.distributed import Group
from nanogpt.run import lock_folder
from nanogpt.tokenizer import CharTokenizer

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


# Runs train.py once for each (name, port, processes, flags, Python to run before, exit status), as torchrun with that many
# processes does, or alone where there are none. All are forks of one process, so that PyTorch is imported once.
LAUNCHER = """
import gc, json, os, pathlib, sys
import configurator, train, torch, torch._dynamo, torch.distributed.fsdp
from nanogpt import distributed, optim
gc.freeze()  # no fork has to look through all that again

def train_in_fork(rank):
    if port:
        places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({key: str(value) for key, value in places.items()})
    sys.argv = ["train.py", *flags]
    exec(before, globals())
    try:
        configurator.run(train.main, train.Config)
    finally:  # a group that is not gone keeps its threads, and one of those may abort the process at exit
        tasks = pathlib.Path("/proc/self/task")
        if tasks.exists() and any("gloo" in (task / "comm").read_text() for task in tasks.iterdir()):
            sys.exit("the group has left threads behind")
    sys.exit()

for name, port, processes, flags, before, expected in json.loads(sys.argv[1]):
    children = []
    for rank in range(max(processes, 1)):
        child = os.fork()
        if not child:
            train_in_fork(rank)
        children.append(child)
    while children:
        child, status = os.wait()
        children.remove(child)
        if os.waitstatus_to_exitcode(status) != expected:
            for other in children:
                os.kill(other, 9)
            sys.exit(f"{name}: a process ended with {os.waitstatus_to_exitcode(status)}")
"""
COUNTED = """
import atexit
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

class Counting(torch.nn.parallel.DistributedDataParallel):
    def __init__(self, module):
        super().__init__(module)
        self.register_comm_hook(None, lambda state, bucket: sums.append(1) or allreduce_hook(state, bucket))

sums, distributed.DistributedDataParallel = [], Counting
atexit.register(lambda: os.write(1, b"sums of gradients: %d\\n" % len(sums)))  # at once, as another process may print too
"""
SIGNALLED = """
import signal

def estimate_loss(*arguments, uninterrupted=train.estimate_loss):
    evaluations.append(1)
    if len(evaluations) == 2 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)
    return uninterrupted(*arguments)

evaluations, train.estimate_loss = [], estimate_loss
"""
IN_FLOAT32 = "optim.has_bfloat16_instructions = lambda: False"  # Muon would round in 16 bits, and differences would show


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of finished runs of 20 iterations, on 0 (no torchrun) to 4 processes, and what they printed."""
    if not hasattr(os, "fork"):
        pytest.skip("this system has no fork")
    folder = tmp_path_factory.mktemp("runs")
    text = "".join(f"{i} plus {i} is {2 * i}.\n" for i in range(40))
    train, val = corpus.split_documents([text], val_fraction=0.1)
    corpus.write_dataset(folder / "dataset", train, val, CharTokenizer.from_text(text), "counting")
    flags = [*FLAGS, f"--dataset={folder / 'dataset'}", "--learning_rate=1e-3", "--max_iters=20", "--lr_decay_iters=20"]
    flags += ["--eval_interval=5", "--eval_iters=0"]
    six, fsdp, resumed = [*flags, "--gradient_accumulation_steps=6"], "--parallel=fsdp", ["--init_from=resume"]
    muon, bigram = [*six, "--optimizer=muon"], [*flags, "--model=bigram", "--learning_rate=0.1"]
    launches = [
        ("one", 0, flags, "", 0),
        ("ddp2", 2, flags, COUNTED, 0),
        ("ddp4", 4, [*flags, "--activation_checkpointing=True"], "", 0),
        ("fsdp2", 2, [*flags, fsdp, "--checkpoint_interval=3"], "", 0),
        ("fsdp4", 4, [*flags, fsdp, "--activation_checkpointing=True"], "", 0),
        ("six", 0, six, "", 0),
        ("chain", 2, [*six, fsdp], SIGNALLED, 128 + signal.SIGTERM),
        ("chain", 0, [*resumed, "--max_iters=10"], "", 0),
        ("chain", 3, [*resumed, "--max_iters=15", "--parallel=ddp"], "", 0),
        ("chain", 2, [*resumed, "--max_iters=20", "--parallel=fsdp"], "", 0),
        ("muon", 0, muon, IN_FLOAT32, 0),
        ("muon_chain", 3, [*muon, "--max_iters=5", fsdp], IN_FLOAT32, 0),
        ("muon_chain", 2, [*resumed, "--max_iters=10"], IN_FLOAT32, 0),
        ("muon_chain", 0, [*resumed, "--max_iters=20"], IN_FLOAT32, 0),
        ("bigram", 0, bigram, "", 0),
        ("bigram2", 2, [*bigram, fsdp], "", 0),
    ]
    plan = []
    for name, processes, flags, before, status in launches:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1] if processes else 0
        plan.append((name, port, processes, [*flags, f"--out_dir={folder / name}"], before, status))
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, json.dumps(plan)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = launcher.communicate(timeout=200)
    except subprocess.TimeoutExpired:
        os.killpg(launcher.pid, signal.SIGKILL)
        raise
    assert launcher.returncode == 0, err
    return folder, out


def parts(optimizer: dict) -> list[dict]:
    """The state dicts in that of an optimizer: one, or Muon's and AdamW's."""
    return [optimizer] if "state" in optimizer else list(optimizer.values())


@pytest.mark.parametrize(
    "name, reference",
    [(name, "one") for name in ("ddp2", "ddp4", "fsdp2", "fsdp4")]
    + [("chain", "six"), ("muon_chain", "muon"), ("bigram2", "bigram")],
)
def test_runs_are_the_same_on_any_processes(runs: tuple[Path, str], name: str, reference: str) -> None:
    """Catches shares of the weights, the gradient, its norm, the optimizer or the evaluation that are wrong, lost or doubled.

    The chains are runs that stop on one number and kind of processes and go on with others, one of them after a signal that
    comes to one process in the midst of an evaluation.
    """
    for row, row_of_one in zip(records(runs[0] / name), records(runs[0] / reference), strict=True):
        assert row == pytest.approx(row_of_one, abs=1e-4)
    state, of_one = (checkpoint.load(runs[0] / each / "last.pt") for each in (name, reference))
    assert list(state.weights) == list(of_one.weights)
    torch.testing.assert_close(state.weights, of_one.weights, rtol=0, atol=1e-4)
    for ours, theirs in zip(parts(state.optimizer), parts(of_one.optimizer), strict=True):
        torch.testing.assert_close(ours["state"], theirs["state"], rtol=0, atol=1e-4)
    first, *_, last = records(runs[0] / reference)
    assert last[0] == 20 and last[3] < first[3] - 0.01  # 20 iterations in which something was learned


def test_evaluation_on_two_processes_is_that_on_one(runs: tuple[Path, str]) -> None:
    """Catches batches that are scored twice or not at all where the processes do not have as many of them."""
    for name in ("ddp2", "fsdp2", "fsdp4"):
        assert records(runs[0] / name)[0] == pytest.approx(records(runs[0] / "one")[0], abs=1e-6)


def test_gradients_are_summed_up_once_an_iteration(runs: tuple[Path, str]) -> None:
    """Catches a sum after each micro-batch, which gives the same run at twice the traffic."""
    assert re.findall(r"sums of gradients: (\d+)", runs[1]) == ["20", "20"]


def test_a_sharded_run_leaves_the_checkpoint_of_one_process(runs: tuple[Path, str]) -> None:
    """Catches tied weights that are stored twice, and shares or names that other programs do not know."""
    state, of_one = (torch.load(runs[0] / name / "last.pt", weights_only=True) for name in ("fsdp2", "one"))
    assert state.keys() == of_one.keys()
    assert state["model"]["lm_head.weight"].data_ptr() == state["model"]["transformer.wte.weight"].data_ptr()
    assert state["optimizer"]["param_groups"] == of_one["optimizer"]["param_groups"]
    for tensors in (state["model"], *state["optimizer"]["state"].values()):
        assert {type(tensor) for tensor in tensors.values()} == {torch.Tensor}


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
    assert "gradient_accumulation_steps must be a multiple of the 2 processes, got 3" in finished.stderr
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
    with lock_folder(tmp_path / "out", Group()):
        finished = torchrun(
            2, project / "train.py", *FLAGS, f"--dataset={dataset}", f"--out_dir={tmp_path / 'out'}", root=project
        )
    assert finished.returncode != 0
    lines = [line for line in finished.stderr.splitlines() if line.startswith("train.py")]
    assert any("another run uses" in line for line in lines)
    assert 'train.py", line' not in finished.stderr
    assert not (tmp_path / "out").exists()  # nothing was written into it, and so it went with the one that held it
