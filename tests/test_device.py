"""Device, number format and compilation as they are asked for and as the machine has them; seeds; the process group."""

import os
import shutil
import socket
import subprocess
import sys

import pytest
import torch

from configurator import ROOT
from model import GPT, GPTConfig
from nanogpt import device, distributed, kernels
from nanogpt.errors import UserError


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch):
    """A function that makes PyTorch find `gpus` CUDA devices, and an Apple GPU or none."""

    def find(gpus: int = 0, apple: bool = False) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: apple)

    return find


@pytest.mark.parametrize(
    "name, gpus, apple, expected",
    [
        ("auto", 0, False, "cpu"),
        ("auto", 2, False, "cuda"),
        ("auto", 0, True, "mps"),
        ("cpu", 2, False, "cpu"),
        ("cuda", 1, False, "cuda"),
        ("cuda:1", 2, False, "cuda:1"),
        ("mps", 0, True, "mps"),
    ],
)
def test_a_device_that_is_there(machine, name, gpus, apple, expected):
    """A wish that is overruled, or a GPU that "auto" leaves idle."""
    machine(gpus, apple)
    assert device.pick_device(name) == expected


@pytest.mark.parametrize(
    "name, gpus",
    [
        ("cuda", 0),
        ("cuda:2", 2),
        ("mps", 1),
        ("tpu", 1),
        ("", 1),
        ("gpu", 1),
        ("cuda:x", 2),
        ("cuda:-1", 2),
        ("cpu:", 1),
        ("CPU", 1),
    ],
)
def test_a_device_that_is_not_there(machine, name, gpus):
    """PyTorch's traceback, a silent fall back to the CPU, or a name that PyTorch refuses later."""
    machine(gpus)
    with pytest.raises(UserError) as caught:
        device.pick_device(name)
    assert f"--device={name}" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name, where, bfloat16, expected",
    [
        ("auto", "cpu", False, torch.float32),
        ("auto", "cpu", True, torch.bfloat16),
        ("float32", "cpu", True, torch.float32),
        ("auto", "mps", False, torch.float32),
        ("auto", "cuda", True, torch.bfloat16),
        ("auto", "cuda:1", False, torch.float16),
        ("float32", "cuda", True, torch.float32),
        ("bfloat16", "cpu", False, torch.bfloat16),
        ("float16", "cuda", True, torch.float16),
    ],
)
def test_dtype(monkeypatch, name, where, bfloat16, expected):
    """A CPU that works out bfloat16 by detours, a wish that is passed over, or float16 on a GPU that has bfloat16."""
    monkeypatch.setattr(device, "has_bfloat16_instructions", lambda: bfloat16)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: bfloat16)
    assert device.pick_dtype(name, where) is expected


@pytest.mark.parametrize(
    "choice, where, compilers, expected",
    [
        ("auto", "cpu", {"gcc"}, False),
        ("auto", "mps", {"clang"}, False),
        ("auto", "cuda", {"gcc"}, True),
        ("auto", "cuda:1", {"cc"}, True),
        ("auto", "cuda", set(), False),
        (True, "cpu", set(), True),
        (False, "cuda", {"gcc"}, False),
    ],
)
def test_compile(monkeypatch, choice, where, compilers, expected):
    """Compilation that fails for want of a C compiler, or a choice that is overruled."""
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}" if name in compilers else None)
    assert device.pick_compile(choice, where) is expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_computes_products_in_the_dtype(dtype):
    """A dtype that is resolved and not used."""
    with device.autocast("cpu", dtype):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


@pytest.mark.parametrize(
    "name, half, single",
    [
        ("NVIDIA H200", 989e12, 495e12),
        ("NVIDIA H100 80GB HBM3", 989e12, 495e12),
        ("NVIDIA H100 PCIe", 756e12, 378e12),
        ("NVIDIA A100-SXM4-40GB", 312e12, 156e12),
        ("NVIDIA A100 80GB PCIe", 312e12, 156e12),
        ("NVIDIA A10", 125e12, 62.5e12),
        ("NVIDIA L4", 121e12, 60e12),
        ("NVIDIA L40S", 362e12, 183e12),
        ("Tesla V100-SXM2-16GB", 125e12, 15.7e12),
        ("Tesla T4", 65e12, 8.1e12),
        ("NVIDIA GeForce RTX 4090", 165e12, 82.6e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None, None),
        ("NVIDIA GeForce GTX 1080", None, None),
        ("NVIDIA A1000", None, None),
        ("", None, None),
    ],
)
def test_peak_is_the_data_sheets(monkeypatch, name, half, single):
    """A device taken for another whose name its own contains, or a utilisation made up for one that is not known."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda where: name)
    assert device.peak_flops("cuda:0", torch.bfloat16) == device.peak_flops("cuda", torch.float16) == half
    assert device.peak_flops("cuda", torch.float32) == single


@pytest.mark.parametrize("where", ["cpu", "mps"])
def test_a_cpu_has_no_known_peak(where):
    """A utilisation printed for a machine that is in no table."""
    assert device.peak_flops(where, torch.float32) is None


@pytest.mark.skipif(not device.LINUX_STATUS.exists(), reason="only Linux tells a process's own memory")
def test_peak_memory_is_not_that_of_the_process_that_started_this_one():
    """The memory of a notebook that holds a large array, given as that of the training that it starts."""
    own = """
from nanogpt import device
used, held = [device.peak_memory("cpu")], []
for size in (100 << 20, 800 << 20):
    held.append(bytearray(b"x") * size)
    used.append(device.peak_memory("cpu"))
print(*used)
"""
    starts = (
        "import subprocess, sys; large = bytearray(b'x') * (900 << 20); subprocess.run([sys.executable, '-c', sys.argv[1]])"
    )
    finished = subprocess.run([sys.executable, "-c", starts, own], cwd=ROOT, capture_output=True, text=True, check=True)
    before, less, more = map(int, finished.stdout.split())
    assert 50 << 20 < before < 750 << 20
    assert less - before == pytest.approx(100 << 20, rel=0.1)
    assert more - less == pytest.approx(800 << 20, rel=0.1)


def test_dropout_is_a_function_of_seed_iteration_and_micro_batch():
    """A resumed run, or another number of processes, that sees other dropout; one pattern for two micro-batches."""

    def drawn(*numbers: int) -> float:
        device.seed_dropout(*numbers)
        return torch.rand(1, dtype=torch.float64).item()

    numbers = [(seed, iteration, micro) for seed in (0, 1, 2**32, 2**63 - 1) for iteration in (0, 1, 2) for micro in (0, 1, 2)]
    first = [drawn(*each) for each in numbers]
    assert [drawn(*each) for each in reversed(numbers)] == first[::-1]
    assert len(set(first)) == len(numbers)


def test_set_up_seeds_the_weights():
    """Two runs of one seed that start from different weights."""
    device.set_up("cpu", 5)
    first = torch.rand(3)
    device.set_up("cpu", 5)
    assert torch.equal(torch.rand(3), first)


def test_to_device_and_synchronize_work_without_an_accelerator():
    """Pinning memory, or waiting for a device, where there is none."""
    x, y = device.to_device((torch.arange(3), torch.arange(4)), "cpu")
    device.synchronize("cpu")
    assert x.tolist() == [0, 1, 2] and y.tolist() == [0, 1, 2, 3]


def test_a_process_of_its_own_is_a_group_of_one(monkeypatch):
    """A script that waits for torchrun's variables, or sums up over processes that are not there."""
    monkeypatch.delenv("RANK", raising=False)
    with distributed.process_group("cpu", "auto") as group:
        assert (group.rank, group.local_rank, group.size, group.device, group.is_main) == (0, 0, 1, "cpu", True)
        assert group.sum(1.5, 2) == [1.5, 2]
        assert not torch.distributed.is_initialized()


def test_one_gpu_for_all_processes_is_refused(monkeypatch):
    """Processes that all compute on the same GPU, which NCCL finds out with a traceback."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "1")
    with (
        pytest.raises(UserError, match=r"each process takes its own GPU, got --device=cuda:1; use --device=cuda$"),
        distributed.process_group("cuda:1", "auto"),
    ):
        pass


PROCESS = """
import torch
from nanogpt import distributed
with distributed.process_group("cpu", "auto") as group:
    total = group.sum(float(group.rank), 2.0**30 + group.rank, 1.0)
    print(group.rank, group.size, group.is_main, torch.distributed.get_backend(), *total)
print(torch.distributed.is_initialized())
"""


def test_two_processes_are_a_group():
    """Sums over one process alone or in too few digits, two main processes, a group that outlives its block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS],
            cwd=ROOT,
            env=common | {"RANK": rank, "LOCAL_RANK": rank, "PYTHONDONTWRITEBYTECODE": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    outputs = [process.communicate(timeout=60)[0].splitlines() for process in processes]
    sums = "1.0 2147483649.0 2.0"
    assert outputs == [[f"0 2 True gloo {sums}", "False"], [f"1 2 False gloo {sums}", "False"]]
    assert [process.returncode for process in processes] == [0, 0]


def shape(**changes) -> GPTConfig:
    return GPTConfig(**{"block_size": 32, "vocab_size": 50, "n_layer": 2, "n_head": 2, "n_embd": 64} | changes)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("bias", [True, False])
def test_a_model_that_is_ready_to_generate_writes_the_same_text(rows, bias, monkeypatch):
    """Packed weights that lose the bias, the tied head or the order of the rows; small and large ones, single rows and more."""
    torch.manual_seed(1)
    model = GPT(shape(bias=bias))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    idx = torch.randint(50, (rows, 5))
    expected = model.generate(idx, 60, temperature=0)
    for small in (0, 1 << 30):
        monkeypatch.setattr(kernels, "PACK_MIN_WEIGHTS", small)
        ready = GPT(shape(bias=bias))
        ready.load_state_dict(model.state_dict())
        device.prepare_for_generation(ready, "cpu", torch.float32)
        assert not ready.training
        assert any(isinstance(module, kernels.PackedLinear) for module in ready.modules()) == kernels.can_pack(torch.float32)
        assert torch.equal(ready.generate(idx, 60, temperature=0), expected)


def test_where_weights_cannot_be_packed_the_model_is_left_as_it_is(monkeypatch):
    """An error on a machine whose PyTorch has no oneDNN, where all is well without it."""
    monkeypatch.setattr(device, "can_pack", lambda dtype: False)
    model = GPT(shape())
    device.prepare_for_generation(model, "cpu", torch.float32)
    assert isinstance(model.lm_head, torch.nn.Linear)


def test_generation_in_16_bits_stays_near_float32():
    """A cache or a layer in the wrong format, which ends in an error or in other logits."""
    torch.manual_seed(1)
    model = GPT(shape())
    idx = torch.randint(50, (2, 32))
    exact, _ = model.eval()(idx)
    device.prepare_for_generation(model, "cpu", torch.bfloat16)
    cache = model.new_cache(2, 32)
    with torch.inference_mode():
        for part in (idx[:, :20], idx[:, 20:25], idx[:, 25:26], idx[:, 26:]):
            logits, _ = model(part, cache=cache)
        alone, _ = model(idx)
    assert logits.dtype == alone.dtype == torch.bfloat16
    assert (logits.float() - exact).abs().max() < 0.02 and (alone.float() - exact).abs().max() < 0.02


def test_a_texts_random_numbers_follow_from_its_own_number():
    """Samples that change with the size of the batch, or are all the same."""

    def draw(*numbers: int, seed: int = 7) -> list[float]:
        return [torch.rand(1, generator=g).item() for g in device.text_generators(seed, numbers, "cpu")]

    assert draw(0, 1, 2)[1:] == draw(1, 2)
    assert len({*draw(*range(100)), *draw(*range(100), seed=8)}) == 200


def test_a_cpu_keeps_its_memory_where_the_c_library_can_do_so(command):
    """Catches pages that go back to the system with each tensor, which cost a third of a training step."""
    code = """
import resource, sys, torch
from nanogpt import device
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def used():
    for _ in range(3):
        torch.ones(1 << 24).add(1)
    before = faults()
    for _ in range(10):
        torch.ones(1 << 24).add(1)
    return faults() - before
before = used()
print("libc" if device.keep_memory() else "none", before, used())
"""
    if sys.platform != "linux":
        pytest.skip("glibc is Linux's")
    library, before, after = command("-c", code).stdout.split()
    if library == "none":
        pytest.skip("no glibc here")
    assert int(before) > 1000
    assert int(after) < int(before) / 4  # once, where the pieces find their places


def test_a_failed_compilation_is_one_warning_and_the_model_works(command, tmp_path):
    """Catches a run that ends, or pages of tracebacks, where the compiler is missing or does not work."""
    code = """
import torch
from nanogpt import device
network = device.compile_model(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU()))
x = torch.ones(2, 4)
for _ in range(3):
    network(x).sum().backward()
print(network(x).shape)
"""
    done = command("-c", code, CXX="/nowhere/c++", TORCHINDUCTOR_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout == "torch.Size([2, 4])\n"
    assert done.stderr.count("\n") == 1
    assert "warning: torch.compile failed (" in done.stderr
