"""Which device, dtype and compilation a machine gets; random seeds, peak FLOP/s, memory; the process group."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from configurator import ROOT

import pytest
import torch
from conftest import read_rows, run_train
from launcher import TIMEOUT_SECONDS

from model import GPT, GPTConfig
from nanogpt import device
from nanogpt.device import (
    LINUX_STATUS,
    autocast,
    find_peak,
    measured_peak,
    peak_flops,
    pick_compile,
    pick_device,
    pick_dtype,
    pick_generation_dtype,
    pick_loss_rows,
    prepare_for_generation,
    seed_dropout,
    set_up,
    synchronize,
    text_generators,
    to_device,
    uses_onednn,
)
from nanogpt.distributed import process_group
from nanogpt.errors import UserError
from nanogpt.kernels import PackedLinear, can_pack

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A function that makes PyTorch find `gpus` CUDA devices, and an Apple GPU or none."""

    def find(gpus: int = 0, apple: bool = False) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: apple)

    return find


# what "auto" stands for


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
def test_pick_device(machine: Callable[..., None], name: str, gpus: int, apple: bool, expected: str) -> None:
    """Catches a choice that is overruled, or a GPU that "auto" leaves idle."""
    machine(gpus, apple)
    assert pick_device(name) == expected


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
def test_missing_device_is_refused(machine: Callable[..., None], name: str, gpus: int) -> None:
    """Catches PyTorch's traceback, a silent fallback to the CPU, or a name that PyTorch refuses later."""
    machine(gpus)
    with pytest.raises(UserError) as caught:
        pick_device(name)
    assert f"--device={name}" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name, device, bfloat16, expected",
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
def test_pick_dtype(monkeypatch: pytest.MonkeyPatch, name: str, device: str, bfloat16: bool, expected: torch.dtype) -> None:
    """Catches bfloat16 on a CPU that must emulate it, float16 on a GPU that has bfloat16, an ignored choice."""
    monkeypatch.setattr("nanogpt.device.has_bfloat16_instructions", lambda: bfloat16)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or bfloat16)
    assert pick_dtype(name, device) is expected


@pytest.mark.parametrize(
    "name, device, fast, texts, n_params, expected",
    [
        ("auto", "cpu", "bfloat16", 1, 124e6, torch.bfloat16),
        ("auto", "cpu", "", 1, 124e6, torch.float16),
        ("auto", "cpu", "", 2, 124e6, torch.float32),
        ("auto", "cpu", "float16", 2, 124e6, torch.float16),
        ("auto", "cpu", "float16", 1, 0.8e6, torch.float32),
        ("float32", "cpu", "float16", 1, 124e6, torch.float32),
        ("int8", "cpu", "bfloat16", 10, 0.8e6, torch.int8),
        ("auto", "cuda", "", 1, 124e6, torch.float16),
        ("auto", "mps", "", 1, 124e6, torch.float32),
    ],
)
def test_pick_generation_dtype(monkeypatch, name, device, fast, texts, n_params, expected) -> None:
    """Catches 16-bit weights for a batch or a small model where they are slower, or an ignored choice."""
    bfloat16 = fast == "bfloat16"
    monkeypatch.setattr("nanogpt.device.has_bfloat16_instructions", lambda: bfloat16)
    monkeypatch.setattr("nanogpt.device.has_fast_float16", lambda: fast == "float16")
    monkeypatch.setattr("nanogpt.device.has_avx", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or bfloat16)
    assert pick_generation_dtype(name, device, texts, n_params) is expected


def test_int8_is_for_cpus() -> None:
    """Catches a traceback from PyTorch, or weights that are silently of another dtype."""
    with pytest.raises(UserError, match=r"--dtype=int8 needs --device=cpu, got cuda:1; try --dtype=bfloat16"):
        pick_generation_dtype("int8", "cuda:1", 1, 1)


@pytest.mark.parametrize(
    "choice, device, compilers, expected",
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
def test_pick_compile(
    monkeypatch: pytest.MonkeyPatch, choice: bool | str, device: str, compilers: set[str], expected: bool
) -> None:
    """Catches a compilation that must fail without a C compiler, or a choice that is overruled."""
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}" if name in compilers else None)
    assert pick_compile(choice, device) is expected


@pytest.mark.parametrize(
    "capabilities, expected",
    [({"avx2": True}, False), ({"avx512_bf16": True}, True), ({"avx512_bf16": False, "amx_bf16": True}, True), (None, False)],
)
def test_bfloat16_instructions(monkeypatch: pytest.MonkeyPatch, capabilities: dict | None, expected: bool) -> None:
    """Catches one answer for all CPUs, an error on a PyTorch that cannot tell (None), a limit of oneDNN that is not seen."""
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    if capabilities is None:
        monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert device.has_bfloat16_instructions() is expected
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_AMX")
    assert device.has_bfloat16_instructions() is expected
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE")
    assert not device.has_bfloat16_instructions()


def test_compiler_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a traceback where PyTorch's compiler cannot read its own files, as in an ASCII locale; one warning in all."""

    def fail(model: torch.nn.Module) -> None:
        raise UnicodeDecodeError("ascii", b"\xe2", 0, 1, "ordinal not in range(128)")

    monkeypatch.setattr(torch, "compile", fail)
    monkeypatch.setattr(device._failed_compilation, "warned", False)
    model = torch.nn.Linear(1, 1)
    assert device.compile_model(model) is device.compile_model(model) is model
    assert capsys.readouterr().err.count("torch.compile failed ('ascii' codec") == 1


@pytest.mark.parametrize(
    "choice, device, vocab_size, expected", [("auto", "cpu", 50304, 256), ("auto", "cuda", 50304, 0), ("auto", "cpu", 65, 0)]
)
def test_pick_loss_rows(choice: str, device: str, vocab_size: int, expected: int) -> None:
    """Catches logits of GPT-2's vocabulary that set the peak memory, or small ones cut into chunks for nothing."""
    assert pick_loss_rows(choice, device, 4 * 256, vocab_size) == expected
    assert pick_loss_rows(7, device, 4 * 256, vocab_size) == 7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(dtype: torch.dtype) -> None:
    """Catches a dtype that is chosen and then not used."""
    with autocast("cpu", dtype):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


def test_to_device_and_synchronize_on_a_cpu() -> None:
    """Catches pinned memory, or waiting for a device, on a machine that has none."""
    x, y = to_device((torch.arange(3), torch.arange(4)), "cpu")
    synchronize("cpu")
    assert x.tolist() == [0, 1, 2] and y.tolist() == [0, 1, 2, 3]


# peak FLOP/s


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
def test_peak_flops(monkeypatch: pytest.MonkeyPatch, name: str, half: float | None, single: float | None) -> None:
    """Catches a GPU taken for one whose name is part of its own, or an MFU made up for an unknown GPU."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops("cuda:0", torch.bfloat16) == peak_flops("cuda", torch.float16) == half
    assert peak_flops("cuda", torch.float32) == single


@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_peak_flops_without_a_gpu(device: str) -> None:
    """Catches an MFU for a machine that is not in the table."""
    assert peak_flops(device, torch.float32) is None


def test_peak_names_its_source(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a GPU that no data sheet here lists, but whose measured peak is said to be from one."""
    monkeypatch.setattr("nanogpt.device.measured_peak", lambda device, dtype: 1e12)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-40GB")
    assert find_peak("cuda", torch.bfloat16) == (312e12, "data sheet")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA of tomorrow")
    assert find_peak("cuda", torch.bfloat16) == (1e12, "measured matrix products")


def test_measured_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches wrong units, products too small to measure, or random numbers drawn, which would change the run.

    On a clock that advances by 2^-11 s at each look, each product takes that long: too little to stop at the first size.
    """
    ticks = iter(range(1000))
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks) * 2.0**-11)
    monkeypatch.setattr("nanogpt.device.PEAK_SECONDS", 0.05)
    monkeypatch.setattr("nanogpt.device.PRODUCT_SIZES", (4, 16))
    before = torch.get_rng_state()
    assert measured_peak("cpu", torch.float32) == 2 * 16**3 * 2**11
    assert torch.equal(torch.get_rng_state(), before)


def test_mfu_of_a_cpu(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Catches an MFU of -100% on a device without a data sheet, or one that is not said to be measured."""
    monkeypatch.setattr("nanogpt.device.measured_peak", lambda device, dtype: 5e9)
    shape = ["--n_layer=1", "--n_head=1", "--n_embd=8", "--block_size=8", "--batch_size=2", "--gradient_accumulation_steps=1"]
    run_train(
        f"--dataset={dataset}", f"--out_dir={tmp_path / 'out'}", "--device=cpu", "--max_iters=2", "--eval_iters=1", *shape
    )
    printed = capsys.readouterr().out
    assert "peak for mfu: 0.005 TFLOP/s (measured matrix products)\n" in printed
    first = next(row for row in read_rows(tmp_path / "out") if row["loss"])
    (model,) = re.findall(r"model: gpt, ([\d,]+) parameters", printed)
    flops = 6 * int(model.replace(",", "")) + 12 * 1 * 8 * 8  # PaLM's count, a token: 6 N + 12 L H Q T
    assert float(first["mfu"]) == pytest.approx(flops * float(first["tokens_per_second"]) / 5e9, rel=1e-3)
    assert "-100.00%" not in printed


# batches


def test_training_batches_keep_their_shape() -> None:
    """Catches a training step that is compiled for any shape, and so is slower, after an evaluation of a whole split."""
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        graphs.append(any(isinstance(value, torch.SymInt) for value in inputs))
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(torch.nn.Linear(5, 1), backend=backend)
    with torch.no_grad():  # an evaluation, of which the last batch is smaller
        for rows in (4, 3):
            compiled(*to_device((torch.zeros(rows, 5),), "cpu"))
    compiled(*to_device((torch.zeros(4, 5),), "cpu", static=True))
    assert graphs == [False, True, False]
    torch._dynamo.reset()


# random numbers


def test_set_up_seeds_the_weights() -> None:
    """Catches two runs with one seed that start from different weights."""
    set_up("cpu", 5)
    first = torch.rand(3)
    set_up("cpu", 5)
    assert torch.equal(torch.rand(3), first)


@pytest.mark.parametrize("device, chosen", [("cuda:1", ["cuda:1"]), ("cuda", []), ("cpu", [])])
def test_set_up_makes_a_gpu_the_current_one(monkeypatch: pytest.MonkeyPatch, device: str, chosen: list[str]) -> None:
    """Catches a CUDA graph that is recorded on the first GPU, and so is empty, for a model on the second."""
    made_current: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_device", made_current.append)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda precision: None)
    set_up(device, 5)
    assert made_current == chosen


def test_dropout_seeds() -> None:
    """Catches dropout that depends on what was drawn before, or repeats in another micro-batch."""

    def draw(*numbers: int) -> float:
        seed_dropout(*numbers)
        return torch.rand(1, dtype=torch.float64).item()

    numbers = [(seed, iteration, micro) for seed in (0, 1, 2**32, 2**63 - 1) for iteration in (0, 1, 2) for micro in (0, 1, 2)]
    first = [draw(*each) for each in numbers]
    assert [draw(*each) for each in reversed(numbers)] == first[::-1]
    assert len(set(first)) == len(numbers)


def test_text_generators() -> None:
    """Catches samples that change with the size of the batch, or are all the same."""

    def draw(*numbers: int, seed: int = 7) -> list[float]:
        return [torch.rand(1, generator=g).item() for g in text_generators(seed, numbers, "cpu")]

    assert draw(0, 1, 2)[1:] == draw(1, 2)
    assert len({*draw(*range(100)), *draw(*range(100), seed=8)}) == 200


# training


@pytest.mark.parametrize(
    ("slow_mkl", "dtype", "compile", "onednn", "expected"),
    [
        (True, torch.float32, False, True, True),
        (True, torch.float32, False, False, False),
        (False, torch.float32, False, True, False),
        (True, torch.bfloat16, False, True, False),
        (True, torch.float32, True, True, False),
    ],
)
def test_library_of_products(
    slow_mkl: bool, dtype: torch.dtype, compile: bool, onednn: bool, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches oneDNN where it is not wanted: beside a fast MKL, in mixed precision, under the compiler, or turned off."""
    monkeypatch.setattr("nanogpt.device.PREFER_ONEDNN", slow_mkl)
    assert uses_onednn(onednn, "cpu", dtype, compile) == expected


def gpt(**changes) -> GPT:
    return GPT(GPTConfig(**{"block_size": 32, "vocab_size": 50, "n_layer": 2, "n_head": 2, "n_embd": 64} | changes))


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("bias", [True, False])
def test_prepared_model_writes_the_same_text(rows: int, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches packed weights that lose the bias, the tied head or the order of rows, be they small or large."""
    torch.manual_seed(1)
    model = gpt(bias=bias)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    idx = torch.randint(50, (rows, 5))
    expected = model.generate(idx, 60, temperature=0)
    for pack_min_weights in (0, 1 << 30):
        monkeypatch.setattr("nanogpt.kernels.UNPACKED_ROW_MAX_WEIGHTS", pack_min_weights)
        prepared = gpt(bias=bias)
        prepared.load_state_dict(model.state_dict())
        prepare_for_generation(prepared, "cpu", torch.float32)
        is_packed = any(isinstance(module, PackedLinear) for module in prepared.modules())
        assert not prepared.training
        assert is_packed == can_pack(torch.float32)
        assert torch.equal(prepared.generate(idx, 60, temperature=0), expected)


def test_model_that_cannot_be_packed_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an error on a machine whose PyTorch has no oneDNN."""
    monkeypatch.setattr("nanogpt.device.can_pack", lambda dtype: False)
    model = gpt()
    prepare_for_generation(model, "cpu", torch.float32)
    assert isinstance(model.lm_head, torch.nn.Linear)


@pytest.mark.parametrize("has_bfloat16", [True, False])
@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.02), (torch.float16, 0.002), (torch.int8, 0.02)])
def test_generation_is_near_float32(dtype: torch.dtype, tolerance: float, has_bfloat16: bool, monkeypatch) -> None:
    """Catches a KV cache or a layer in another dtype, which fails or gives other logits, in prefill or decode."""
    monkeypatch.setattr("nanogpt.device.has_bfloat16_instructions", lambda: has_bfloat16)
    torch.manual_seed(1)
    model = gpt()
    idx = torch.randint(50, (2, 32))
    exact, _ = model.eval()(idx)
    prepare_for_generation(model, "cpu", dtype)
    cache = model.new_cache(2, 32)
    with torch.inference_mode():
        for part in (idx[:, :20], idx[:, 20:25], idx[:, 25:26], idx[:, 26:]):
            logits, _ = model(part, cache=cache)
        alone, _ = model(idx)
        single, _ = model(idx[:1])
    assert logits.dtype == alone.dtype == (torch.bfloat16 if dtype == torch.bfloat16 and has_bfloat16 else torch.float32)
    for found, expected in ((logits, exact), (alone, exact), (single, exact[:1])):
        assert (found.float() - expected).abs().max() < tolerance


@pytest.mark.parametrize("dtype", [torch.int8, torch.float16])
def test_fewer_bits_keep_no_other_weights(dtype: torch.dtype) -> None:
    """Catches an embedding or a head that stays in float32 beside its copy in fewer bits."""
    model = gpt(vocab_size=512)
    embedding_size = model.transformer.wte.weight.numel()
    prepare_for_generation(model, "cpu", dtype)
    tensors = {id(tensor): tensor for module in model.modules() for tensor in vars(module).values() if torch.is_tensor(tensor)}
    tensors |= {id(tensor): tensor for tensor in model.parameters()}
    assert sum(tensor.numel() for tensor in tensors.values() if tensor.dtype == torch.float32) < embedding_size


# the process group


def test_single_process_is_a_group_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a script that waits for torchrun's variables, or sums over ranks that do not exist."""
    monkeypatch.delenv("RANK", raising=False)
    with process_group("cpu", "auto") as group:
        assert (group.rank, group.local_rank, group.size, group.device, group.is_main) == (0, 0, 1, "cpu", True)
        assert group.sum(1.5, 2) == [1.5, 2]
        assert not torch.distributed.is_initialized()


def test_one_gpu_for_all_ranks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches ranks that all compute on one GPU, which NCCL reports with a traceback."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "1")
    with (
        pytest.raises(UserError, match=r"each process takes its own GPU, got --device=cuda:1; use --device=cuda$"),
        process_group("cuda:1", "auto"),
    ):
        pass


# what a process can only do once, in forks of one process that has imported PyTorch

FORKED = """
import os, resource, socket, sys, warnings
import numpy, torch, torch.distributed, torch._dynamo
from nanogpt import device, distributed

warnings.filterwarnings("ignore", "This process .* is multi-threaded")  # no thread of PyTorch holds a lock yet

def in_fork(function, *arguments):
    child = os.fork()
    if not child:
        function(*arguments)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
    return child

def wait_for(*children):
    for child in children:
        assert os.waitpid(child, 0)[1] == 0
"""


def run_forked(code: str, **environment: str) -> subprocess.CompletedProcess:
    """Run FORKED and `code` in a fresh process."""
    return subprocess.run(
        [sys.executable, "-c", FORKED + code],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"} | environment,
        capture_output=True,
        encoding="utf-8",
        timeout=TIMEOUT_SECONDS,
    )


FORKS = r"""
def group_of_two(rank, port):
    os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"})
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
    with distributed.process_group("cpu", "auto") as group:
        sums = group.sum(float(group.rank), 2.0**30 + group.rank, 1.0)
        line = ["group", group.rank, group.size, group.is_main, torch.distributed.get_backend(), *sums]
    line.append(torch.distributed.is_initialized())
    sys.stdout.write(" ".join(map(str, line)) + "\n")  # in one piece

def page_faults():
    for _ in range(3):
        torch.ones(1 << 24).add(1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(1 << 24).add(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def keep_memory(start, name):
    before = page_faults()
    start()
    after = page_faults()
    sys.stdout.write(f"keep {name} {device.keep_memory()} {before} {after}\n")  # in one piece

def prepare():
    device.prepare_for_generation(torch.nn.ReLU(), "cpu", torch.float32)

def failed_compilation():
    network = device.compile_model(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU()))
    x = torch.ones(2, 4)
    for _ in range(3):
        network(x).sum().backward()
    print("compiled", network(x).shape)

with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
wait_for(*(in_fork(group_of_two, rank, port) for rank in (0, 1)))
wait_for(in_fork(keep_memory, device.keep_memory, "training"), in_fork(keep_memory, prepare, "generation"))
wait_for(in_fork(failed_compilation))
"""


@pytest.fixture(scope="module")
def forks(request: pytest.FixtureRequest) -> subprocess.CompletedProcess:
    """What the forks of FORKS have printed; without a working C++ compiler."""
    with tempfile.TemporaryDirectory() as cache:
        return run_forked(FORKS, CXX="/nowhere/c++", TORCHINDUCTOR_CACHE_DIR=cache)


def printed(forks: subprocess.CompletedProcess, word: str) -> list[str]:
    assert forks.returncode == 0, forks.stderr
    return sorted(line for line in forks.stdout.splitlines() if line.startswith(word))


@needs_fork
def test_two_processes_are_a_group(forks: subprocess.CompletedProcess) -> None:
    """Catches sums over one rank or in float32, two main ranks, a group that outlives its block."""
    sums = "1.0 2147483649.0 2.0"
    assert printed(forks, "group") == [f"group 0 2 True gloo {sums} False", f"group 1 2 False gloo {sums} False"]


@pytest.mark.skipif(sys.platform != "linux", reason="glibc is Linux's")
@pytest.mark.parametrize("name", ["training", "generation"])
def test_keep_memory(name: str, forks: subprocess.CompletedProcess) -> None:
    """Catches pages that go back to the system with each tensor: a third of a training step or of ten texts at once."""
    ((*_, is_kept, before, after),) = (line.split() for line in printed(forks, f"keep {name}"))
    if is_kept == "False":
        pytest.skip("no glibc here")
    assert int(before) > 1000
    assert int(after) < int(before) / 4  # once, until the blocks have found their places


@needs_fork
def test_failed_compilation_is_one_warning(forks: subprocess.CompletedProcess) -> None:
    """Catches a run that ends, or pages of tracebacks, if the compiler is missing or broken."""
    assert printed(forks, "compiled") == ["compiled torch.Size([2, 4])"]
    assert forks.stderr.count("\n") == 1
    assert "warning: torch.compile failed (" in forks.stderr


@pytest.mark.skipif(not LINUX_STATUS.exists(), reason="only Linux tells a process's own peak memory")
def test_peak_memory_is_this_process_own() -> None:
    """Catches the memory of a notebook with a large array, counted as that of the training that it starts."""
    own = """
from nanogpt import device
used, held = [device.peak_memory("cpu")], []
for size in (100 << 20, 800 << 20):
    held.append(bytearray(b"x") * size)
    used.append(device.peak_memory("cpu"))
print(*used)
"""
    starter = (
        "import subprocess, sys; large = bytearray(b'x') * (900 << 20); subprocess.run([sys.executable, '-c', sys.argv[1]])"
    )
    finished = subprocess.run([sys.executable, "-c", starter, own], cwd=ROOT, capture_output=True, encoding="utf-8", check=True)
    before, less, more = map(int, finished.stdout.split())
    assert 50 << 20 < before < 750 << 20
    assert less - before == pytest.approx(100 << 20, rel=0.1)
    assert more - less == pytest.approx(800 << 20, rel=0.1)
