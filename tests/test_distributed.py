"""distributed.py: a run on several processes is the run on one; activation checkpointing, clipping, and a clean end.

Several processes are forks of one that has imported PyTorch (launcher.py). One test goes through the real torchrun.
"""

import functools
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from configurator import ROOT

import launcher
import numpy as np
import pytest
import torch
from conftest import counting, read_rows, write_dataset
from torch.nn.utils import clip_grad_norm_

from model import GPT, Block, GPTConfig
from nanogpt import checkpoint, distributed
from nanogpt.distributed import Group, process_group
from nanogpt.errors import UserError, warn
from nanogpt.optim import SHARDED_MUON_VERSION
from nanogpt.run import lock_folder

FLAGS = (
    "--n_layer=2 --n_head=2 --n_embd=16 --block_size=16 --batch_size=2 --gradient_accumulation_steps=4 --dropout=0.2 "
    "--max_iters=12 --eval_interval=3 --eval_iters=0 --warmup_iters=2 --lr_decay_iters=12 --learning_rate=1e-3 "
    "--device=cpu --dtype=float32"
)
COLUMNS = ("iteration", "tokens", "train_loss", "val_loss", "loss", "learning_rate", "grad_norm")
COLUMNS += ("train_bits_per_byte", "val_bits_per_byte")

# what the processes of a run do first, as Python code
NO_PICTURES = """
from nanogpt import curves
curves.draw = lambda *arguments: None
"""
NO_THREADS = """
import atexit, os, pathlib, time

def name_of(task):
    try:
        return (task / "comm").read_text()
    except OSError:  # it has ended since
        return ""

def fail_if_threads_are_left():  # one of them may abort the process at exit
    tasks, started = pathlib.Path("/proc/self/task"), time.monotonic()
    while tasks.exists() and any("gloo" in name_of(task) for task in tasks.iterdir()):
        if time.monotonic() - started > 5:  # a thread that was joined stays in /proc for a moment, longer on a busy machine
            os.write(2, b"the group left threads behind\\n")
            os._exit(70)
        time.sleep(0.01)

atexit.register(fail_if_threads_are_left)
"""
COUNTED = """
import os
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from nanogpt import distributed

def count(state, bucket):
    os.write(1, f"rank {os.environ['RANK']} reduces\\n".encode())  # in one piece, as the other rank writes, too
    return allreduce_hook(state, bucket)

class Counting(distributed.DistributedDataParallel):
    def __init__(self, module):
        super().__init__(module)
        self.register_comm_hook(None, count)

distributed.DistributedDataParallel = Counting
"""
SIGNALLED = """
import os, signal
from nanogpt import evaluation

def estimate_loss(*arguments, uninterrupted=evaluation.estimate_loss, **keywords):
    evaluations.append(1)
    if len(evaluations) == 2 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)
    return uninterrupted(*arguments, **keywords)

evaluations, evaluation.estimate_loss = [], estimate_loss
"""
IN_FLOAT32 = """
from nanogpt import optim
optim.has_bfloat16_instructions = lambda: False  # else Muon rounds to 16 bits, and differences are larger than the tolerance
"""


@dataclass(frozen=True)
class Launch:
    """One process, or a number of ranks, that run train.py."""

    ranks: int  # 0: without torchrun
    flags: str
    setup: str = ""
    status: int = 0  # exit status


SIX, MUON = "--gradient_accumulation_steps=6", "--gradient_accumulation_steps=6 --optimizer=muon"
BIGRAM = "--model=bigram --learning_rate=0.1"
SAMPLED = "--eval_iters=3 --max_iters=6"
MASKED = "--dataset={folder}/masked"  # few of its targets are learned, and in some micro-batches none
RUNS = {  # by name: launches that one after the other train 12 iterations, if no other number is given
    "one": [Launch(0, "")],
    "ddp2": [Launch(2, "--sample_interval=4", COUNTED)],
    "ddp4": [Launch(4, "--activation_checkpointing=True")],
    "fsdp2": [Launch(2, "--parallel=fsdp --checkpoint_interval=2")],
    "fsdp4": [Launch(4, "--parallel=fsdp --activation_checkpointing=True")],
    "sampled": [Launch(0, SAMPLED)],
    "sampled2": [Launch(2, SAMPLED)],
    "six": [Launch(0, SIX)],
    "chain": [  # changes the number and kind of processes; the first signal comes to one rank in the midst of an evaluation
        Launch(2, f"{SIX} --parallel=fsdp", SIGNALLED, 128 + signal.SIGTERM),
        Launch(0, "--init_from=resume --max_iters=6"),
        Launch(3, "--init_from=resume --max_iters=9 --parallel=ddp"),
        Launch(2, "--init_from=resume --max_iters=12 --parallel=fsdp"),
    ],
    "muon": [Launch(0, MUON, IN_FLOAT32)],
    "muon_chain": [
        Launch(3, f"{MUON} --max_iters=3 --parallel=fsdp", IN_FLOAT32),
        Launch(2, "--init_from=resume --max_iters=6", IN_FLOAT32),
        Launch(0, "--init_from=resume --max_iters=12", IN_FLOAT32),
    ],
    "masked": [Launch(0, MASKED)],
    "masked2": [Launch(2, MASKED)],
    "masked4": [Launch(4, MASKED)],
    "masked_fsdp2": [Launch(2, f"{MASKED} --parallel=fsdp")],
    "masked_one": [Launch(0, f"{MASKED} --gradient_accumulation_steps=1 --batch_size=8 --dropout=0 --max_iters=1")],
    "masked_eight": [Launch(2, f"{MASKED} --gradient_accumulation_steps=8 --batch_size=1 --dropout=0 --max_iters=1")],
    "bigram": [Launch(0, BIGRAM)],
    "bigram2": [Launch(2, f"{BIGRAM} --parallel=fsdp")],
}
Runs = Callable[[str], tuple[Path, str]]
needs_muon_with_fsdp = pytest.mark.skipif(torch.__version__ < SHARDED_MUON_VERSION, reason="needs a newer PyTorch")
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")


def train(ranks: int, *flags: str | Path, setup: str = "") -> subprocess.CompletedProcess:
    """Run train.py on `ranks` processes, as torchrun does, or alone if that is 0."""
    torchrun = ["torchrun", "--standalone", f"--nproc_per_node={ranks}"] if ranks else []
    return launcher.run(*torchrun, "train.py", *flags, cwd=ROOT, setup=NO_PICTURES + setup)


def numbers(out_dir: Path) -> list[list[float]]:
    """The rows of metrics.csv without what depends on the machine's speed."""
    return [[float(row[name] or -1) for name in COLUMNS] for row in read_rows(out_dir)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """A function that returns the folder of one of RUNS, and what it printed; each is run once, when it is first needed."""
    folder = tmp_path_factory.mktemp("runs")
    write_dataset(folder / "dataset", counting(40))
    write_dataset(folder / "masked", counting(40))
    mask = np.zeros((folder / "masked" / "train.bin").stat().st_size, np.uint8)
    mask[: len(mask) // 3] = 1
    mask[len(mask) // 3 : len(mask) // 2 : 7] = 1
    mask.tofile(folder / "masked" / "train.mask.bin")

    @functools.cache
    def run(name: str) -> tuple[Path, str]:
        printed, out_dir = "", f"--out_dir={folder / name}"
        for launch in RUNS[name]:
            flags = [flag.format(folder=folder) for flag in launch.flags.split()]
            if "--init_from=resume" not in flags:
                flags = [*FLAGS.split(), f"--dataset={folder / 'dataset'}", *flags]
            finished = train(launch.ranks, *flags, out_dir, setup=NO_THREADS + launch.setup)
            assert finished.returncode == launch.status, finished.stderr
            printed += finished.stdout
        return folder / name, printed

    return run


def parts(optimizer: dict) -> list[dict]:
    """The state dicts in that of an optimizer: one, or Muon's and AdamW's."""
    return [optimizer] if "state" in optimizer else list(optimizer.values())


@needs_fork
@pytest.mark.parametrize(
    "name, reference",
    [(name, "one") for name in ("ddp2", "ddp4", "fsdp2", "fsdp4")]
    + [("masked2", "masked"), ("masked4", "masked"), ("masked_fsdp2", "masked")]
    + [("sampled2", "sampled"), ("chain", "six"), ("bigram2", "bigram")]
    + [pytest.param("muon_chain", "muon", marks=needs_muon_with_fsdp)],
)
def test_any_number_of_processes_gives_the_same_run(runs: Runs, name: str, reference: str) -> None:
    """Catches shards, gradients, norms, dropout, optimizer states and evaluations that are wrong, lost, doubled or not shared.

    Also catches a group that keeps threads, since every launch checks for them when it ends.
    """
    (ours, _), (expected, _) = runs(name), runs(reference)
    for row, expected_row in zip(numbers(ours), numbers(expected), strict=True):
        assert row == pytest.approx(expected_row, abs=1e-4)
    state, expected_state = (checkpoint.load(checkpoint.newest(folder)) for folder in (ours, expected))
    assert list(state.weights) == list(expected_state.weights)
    torch.testing.assert_close(state.weights, expected_state.weights, rtol=0, atol=1e-4)
    for part, expected_part in zip(parts(state.optimizer), parts(expected_state.optimizer), strict=True):
        torch.testing.assert_close(part["state"], expected_part["state"], rtol=0, atol=1e-4)
    first, *_, last = numbers(expected)
    assert last[0] == (6 if reference == "sampled" else 12) and last[3] < first[3] - 0.01  # something was learned


@needs_fork
def test_masked_loss_does_not_depend_on_the_split(runs: Runs) -> None:
    """Catches a loss or a gradient in which micro-batches with few learned targets count as much as others."""
    one, eight = (numbers(runs(name)[0])[1] for name in ("masked_one", "masked_eight"))
    assert eight == pytest.approx(one, rel=1e-6)


@needs_fork
def test_evaluation_covers_each_batch_once(runs: Runs) -> None:
    """Catches batches that are scored twice or never if the ranks do not have the same number of them."""
    for name in ("ddp2", "fsdp2", "fsdp4"):
        assert numbers(runs(name)[0])[0] == pytest.approx(numbers(runs("one")[0])[0], abs=1e-6)


@needs_fork
def test_ranks_print_and_sample_once(runs: Runs) -> None:
    """Catches ranks that each print or sample, or that wait for each other while rank 0 samples."""
    printed = runs("ddp2")[1]
    assert printed.count("--- sample after") == 3
    assert len(re.findall(r"^step 12: ", printed, re.MULTILINE)) == 1


@needs_fork
def test_gradients_are_reduced_once_an_iteration(runs: Runs) -> None:
    """Catches an all-reduce after each micro-batch, which gives the same run at twice the traffic."""
    printed = runs("ddp2")[1]
    assert [printed.count(f"rank {rank} reduces\n") for rank in (0, 1)] == [12, 12]


@needs_fork
def test_sharded_run_writes_an_ordinary_checkpoint(runs: Runs) -> None:
    """Catches tied weights that are stored twice, and shards or names that other programs do not know."""
    state, expected = (torch.load(checkpoint.newest(runs(name)[0]), weights_only=True) for name in ("fsdp2", "one"))
    assert state.keys() == expected.keys()
    assert state["model"]["lm_head.weight"].data_ptr() == state["model"]["transformer.wte.weight"].data_ptr()
    assert state["optimizer"]["param_groups"] == expected["optimizer"]["param_groups"]
    for tensors in (state["model"], *state["optimizer"]["state"].values()):
        assert {type(tensor) for tensor in tensors.values()} == {torch.Tensor}


@needs_fork
def test_indivisible_micro_batches_are_refused(dataset: Path, tmp_path: Path) -> None:
    """Catches a global batch that silently changes with the number of processes."""
    flags = [*FLAGS.split(), f"--dataset={dataset}", f"--out_dir={tmp_path / 'out'}", "--gradient_accumulation_steps=3"]
    finished = train(2, *flags)
    assert finished.returncode == 1
    assert "gradient_accumulation_steps must be a multiple of the 2 processes, got 3" in finished.stderr
    assert not (tmp_path / "out").exists()


@needs_fork
def test_evaluation_has_no_micro_batches(dataset: Path, tmp_path: Path) -> None:
    """Catches an evaluation that is refused for the size of a training batch."""
    flags = [*FLAGS.split(), f"--dataset={dataset}", f"--out_dir={tmp_path}", "--gradient_accumulation_steps=3"]
    finished = train(2, *flags, "--eval_only=True")
    assert finished.returncode == 0, finished.stderr
    assert "step 0: train loss" in finished.stdout


@needs_fork
def test_folder_in_use_is_refused_by_all_ranks(dataset: Path, tmp_path: Path) -> None:
    """Catches ranks that wait for rank 0 although it was refused, or that end with a traceback."""
    with lock_folder(tmp_path / "out", Group()):
        finished = train(2, *FLAGS.split(), f"--dataset={dataset}", f"--out_dir={tmp_path / 'out'}")
    assert finished.returncode == 1
    lines = [line for line in finished.stderr.splitlines() if line.startswith("train.py")]
    assert any("another run uses" in line for line in lines)
    assert 'train.py", line' not in finished.stderr
    assert not (tmp_path / "out").exists()  # the refused run wrote nothing into it, so it went with the lock


@needs_fork
def test_signal_to_torchrun_stops_all_ranks_after_one_update(dataset: Path, tmp_path: Path) -> None:
    """Catches ranks that stop at different iterations, wait for each other forever, or lose finished updates.

    Also catches a group that keeps threads because of what is imported while it exists.
    """
    flags = [*FLAGS.split(), f"--dataset={dataset}", "--eval_iters=1", "--eval_interval=1000000", "--lr_decay_iters=1000"]
    script = tmp_path / "train.py"  # which looks for threads at exit in a Python that has not imported PyTorch beforehand
    script.write_text(
        f"{NO_THREADS}\nimport runpy\nrunpy.run_path({str(ROOT / 'train.py')!r}, run_name='__main__')\n", encoding="utf-8"
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    running = subprocess.Popen(
        [*torchrun, script, *flags, f"--out_dir={tmp_path / 'out'}", "--max_iters=1000000"],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )
    while not running.stdout.readline().startswith("iter 5: "):
        assert running.poll() is None
    running.send_signal(signal.SIGTERM)
    out, err = running.communicate(timeout=launcher.TIMEOUT_SECONDS)
    assert running.returncode != 0
    *_, stopped, command = out.splitlines()
    done = int(re.search(r"SIGTERM: stopped and saved after ([\d,]+) of ", stopped)[1].replace(",", ""))
    assert checkpoint.load(checkpoint.newest(tmp_path / "out")).iter_num == done == len(numbers(tmp_path / "out")) - 1
    assert "SIGTERM: finishing" in err and 'train.py", line' not in err  # torchrun prints a traceback of its own
    assert "left threads behind" not in err
    out_dir = shlex.quote(str(tmp_path / "out"))
    assert f"torchrun --standalone --nproc_per_node=2 train.py --init_from=resume --out_dir={out_dir}" in command

    resumed = train(2, "--init_from=resume", f"--out_dir={tmp_path / 'out'}", f"--max_iters={done + 3}")
    whole = train(2, *flags, f"--out_dir={tmp_path / 'whole'}", f"--max_iters={done + 3}")
    assert (resumed.returncode, whole.returncode) == (0, 0), resumed.stderr + whole.stderr
    weights = [checkpoint.load(checkpoint.newest(tmp_path / name)).weights for name in ("out", "whole")]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    assert numbers(tmp_path / "out") == numbers(tmp_path / "whole")


@needs_fork
def test_two_machines(dataset: Path, tmp_path: Path) -> None:
    """Catches a run on several machines that does not start, stop or resume, or whose last line resumes it on one machine.

    Two agents of torchrun on the loopback stand for the machines, with a process each; the signal goes to the first.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    flags = [*FLAGS.split(), f"--dataset={dataset}", "--eval_iters=1", "--eval_interval=1000000", "--lr_decay_iters=1000"]

    def start(command: list[str]) -> list[subprocess.Popen]:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--local_addr=127.0.0.1", *command[1:]]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo" if sys.platform == "linux" else "lo0"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return [subprocess.Popen(torchrun, cwd=ROOT, env=environment, **pipes) for _ in range(2)]

    # a run, until a signal stops it
    nodes = ["--nnodes=2", "--nproc_per_node=1", "--rdzv_id=1", "--rdzv_backend=c10d", f"--rdzv_endpoint={endpoint}"]
    agents = start(["torchrun", *nodes, "train.py", *flags, f"--out_dir={tmp_path / 'out'}", "--max_iters=1000000"])
    wait_for(lambda: len(read_rows(tmp_path / "out")) > 5, tmp_path / "out" / "metrics.csv", agents)
    agents[0].send_signal(signal.SIGTERM)
    printed = "".join(agent.communicate(timeout=launcher.TIMEOUT_SECONDS)[0] for agent in agents)
    done = checkpoint.load(checkpoint.newest(tmp_path / "out")).iter_num
    (command,) = re.findall(r"to continue, on each machine:\n +(torchrun .*)\n", printed)
    assert "--rdzv_endpoint=127.0.0.1:29500" in command.split()

    # its resume, with the command that it has printed
    command = command.replace("127.0.0.1:29500", endpoint)
    agents = start([*shlex.split(command), f"--max_iters={done + 3}"])
    outputs = [agent.communicate(timeout=launcher.TIMEOUT_SECONDS)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], outputs
    assert f"resuming after {done:,} of {done + 3:,} iterations" in "".join(outputs)

    # both are the run on two processes of one machine
    assert train(2, *flags, f"--out_dir={tmp_path / 'whole'}", f"--max_iters={done + 3}").returncode == 0
    weights = [checkpoint.load(checkpoint.newest(tmp_path / name)).weights for name in ("out", "whole")]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


def wait_for(condition: Callable[[], bool], path: Path, processes: list[subprocess.Popen]) -> None:
    """Wait until `path` exists and `condition` holds; fail if a process ends before."""
    while not (path.is_file() and condition()):
        assert all(process.poll() is None for process in processes), [process.communicate()[0] for process in processes]
        time.sleep(0.05)


# in one process


def test_sum_on_mps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches float64 on MPS, which does not have it."""
    monkeypatch.setattr(distributed.dist, "all_reduce", lambda tensor: tensor.mul_(2))
    assert Group(size=2, device="mps").sum(0.1, 2.0**53 - 1) == [0.2, 2.0**54 - 2]


@pytest.mark.parametrize(
    ("environment", "command"),
    [
        ({}, ", with the launcher of these 4 processes:\n  python train.py"),
        ({"GROUP_WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "4"}, ":\n  torchrun --standalone --nproc_per_node=4 train.py"),
        (
            {"GROUP_WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "node1"},
            ", on each machine:\n  torchrun --nnodes=2 --nproc_per_node=2 --rdzv_id=1 --rdzv_backend=c10d "
            "--rdzv_endpoint=node1:29500 train.py",
        ),
    ],
)
def test_command_to_resume(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], command: str) -> None:
    """Catches a command that resumes a run on one machine if it was on several, or with torchrun if it was SLURM's."""
    for name in ("GROUP_WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert distributed.how_to_launch("train.py", 4) == command
    assert distributed.how_to_launch("train.py", 1) == ":\n  python train.py"


COMPLETE = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "0"}, "sets RANK='0' but not WORLD_SIZE, MASTER_ADDR, MASTER_PORT: .* or unset RANK"),
        ({"RANK": "first"}, "sets RANK='first' but not WORLD_SIZE"),
        (COMPLETE | {"MASTER_ADDR": ""}, "sets RANK='0' but not MASTER_ADDR: "),
        (COMPLETE | {"RANK": "first"}, "RANK must be a number from 0 to below WORLD_SIZE, got RANK='first' and WORLD_SIZE='1'"),
        (COMPLETE | {"RANK": "1"}, "RANK must be a number from 0 to below WORLD_SIZE, got RANK='1' and WORLD_SIZE='1'"),
        (COMPLETE | {"WORLD_SIZE": "two"}, "got RANK='0' and WORLD_SIZE='two'"),
        (COMPLETE | {"LOCAL_RANK": "-1"}, "LOCAL_RANK must be a number from 0, got '-1'"),
        (COMPLETE | {"MASTER_PORT": "99999"}, "MASTER_PORT must be a free port of rank 0's machine, got '99999'"),
    ],
)
def test_incomplete_environment_is_one_line(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], message: str) -> None:
    """Catches a traceback for the variables of a cluster that sets only some of them."""
    set_environment(monkeypatch, environment)
    with pytest.raises(UserError, match=message), process_group("cpu", "auto"):
        pass


def test_empty_rank_is_none(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a traceback, or warnings that nobody prints, if a cluster sets RANK to nothing."""
    set_environment(monkeypatch, {"RANK": ""})
    with process_group("cpu", "auto") as group:
        assert (group.rank, group.size, group.launched) == (0, 1, False)
    warn("something")
    assert "warning: something" in capsys.readouterr().err


def test_local_rank_may_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a traceback on a cluster that starts one process on each machine and so sets no LOCAL_RANK."""
    set_environment(monkeypatch, COMPLETE | {"RANK": "2", "WORLD_SIZE": "3"})
    assert distributed.place_in_group() == (2, 0, 3)


def test_address_in_use_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a traceback if the processes cannot meet, here since another program has the port."""
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        set_environment(monkeypatch, COMPLETE | {"MASTER_PORT": port})
        with pytest.raises(UserError, match=f"1 processes cannot meet at 127.0.0.1:{port}"), process_group("cpu", "auto"):
            pass


def test_nccl_without_cuda_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches NCCL's traceback on a machine without a GPU."""
    set_environment(monkeypatch, COMPLETE)
    with pytest.raises(UserError, match="--backend=nccl needs CUDA, got the device cpu; use --backend=gloo"):
        with process_group("cpu", "nccl"):
            pass


def set_environment(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> None:
    """Set these of the variables of a launcher, and no others."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


def model_and_batch() -> tuple[GPT, torch.Tensor]:
    torch.manual_seed(1)
    model = GPT(GPTConfig(block_size=8, vocab_size=11, n_layer=3, n_head=2, n_embd=16, dropout=0.3))
    return model, torch.randint(11, (2, 4, 8))


def run_forward_and_backward(model: GPT, batch: torch.Tensor) -> tuple[int, list[torch.Tensor]]:
    """Return the bytes that the forward pass keeps for the backward pass, without the weights, and the gradients."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    torch.manual_seed(2)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        _, loss = model(*batch)
    loss.backward()
    return sum(kept.values()), [parameter.grad for parameter in model.parameters()]


def test_activation_checkpointing_keeps_less_and_gives_the_same_gradient() -> None:
    """Catches a block that is left out, or that draws other dropout when it is recomputed."""
    (model, batch), (checkpointed, _) = model_and_batch(), model_and_batch()
    distributed.checkpoint_activations(checkpointed)
    bytes_kept, gradients = run_forward_and_backward(model, batch)
    fewer_bytes, same_gradients = run_forward_and_backward(checkpointed, batch)
    assert fewer_bytes < bytes_kept / 4
    assert all(torch.equal(a, b) for a, b in zip(gradients, same_gradients, strict=True))
    assert list(checkpointed.state_dict()) == list(model.state_dict())


def test_nothing_is_recomputed_without_a_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches evaluation and generation that pay for a gradient they do not need."""
    model, batch = model_and_batch()
    calls = []
    forward = Block.forward
    monkeypatch.setattr(Block, "forward", lambda self, *arguments: calls.append(self) or forward(self, *arguments))
    distributed.checkpoint_activations(model)
    with torch.no_grad():
        model(*batch)
    assert len(calls) == 3
    model(*batch)[1].backward()
    assert len(calls) == 9


@pytest.mark.parametrize("max_norm", [0.0, 0.1, 100.0])
def test_clipping_is_pytorchs(max_norm: float) -> None:
    """Catches the norm after clipping in place of the one before, a gradient that is scaled up, and 0 that clips."""
    (model, batch), (expected, _) = model_and_batch(), model_and_batch()
    for each in (model, expected):
        each.eval()(*batch)[1].backward()
    norm = clip_grad_norm_(expected.parameters(), max_norm or torch.inf).item()
    assert distributed.clip_gradient(model, max_norm) == pytest.approx(norm)
    for parameter, expected_parameter in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected_parameter.grad)
