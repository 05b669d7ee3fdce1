"""Where a script computes: device, number format, compilation, seeds and the group of processes."""

import contextlib
import ctypes
import gc
import importlib
import logging
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist

from nanogpt.errors import UserError, warn

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # what glibc's malloc.h calls M_...

try:
    import resource
except ImportError:  # Windows
    resource = None

STATUS = Path("/proc/self/status")  # of Linux

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Compile = bool | Literal["auto"]

# Peaks of dense matrix products in FLOP/s, from the vendor's data sheets, by words of the device's name: (16-bit, float32),
# the latter with TensorFloat-32 where there is that. The first entry whose words all occur is the device's.
PEAK_FLOPS = {
    "H200": (989e12, 495e12),
    "H100 PCIe": (756e12, 378e12),
    "H100 NVL": (835e12, 417e12),
    "H100": (989e12, 495e12),
    "B200": (2250e12, 1100e12),
    "A100": (312e12, 156e12),
    "A10": (125e12, 62.5e12),
    "L40S": (362e12, 183e12),
    "L4": (121e12, 60e12),
    "V100": (125e12, 15.7e12),
    "T4": (65e12, 8.1e12),
    "RTX 3090": (71e12, 35.6e12),
    "RTX 4090": (165e12, 82.6e12),
    "RTX 5090": (209e12, 104.8e12),
}


@dataclass(frozen=True)
class Group:
    """The processes that train together, and this one's place among them."""

    rank: int = 0
    local_rank: int = 0
    size: int = 1
    device: str = "cpu"
    launched: bool = False  # by torchrun, if only for one process

    @property
    def is_main(self) -> bool:
        """Whether this is the one process that prints and writes."""
        return self.rank == 0

    def sum(self, *numbers: float) -> list[float]:
        """Return the sum of each number over all processes, every one of which must call this."""
        if self.size == 1:
            return list(numbers)
        tensor = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return tensor.tolist()


@contextlib.contextmanager
def process_group(device: str, backend: str) -> Iterator[Group]:
    """Yield the group that `torchrun` has started, or that of this process alone; `device` is where all of them compute.

    Whatever uses the group must be gone when the block ends, for instance with the function that it was local to: a group
    that something still refers to keeps its threads, and one of those may abort the process at exit. A block left by an
    exception ends the process without taking the group apart, since the other processes may be waiting in it.
    """
    if "RANK" not in os.environ:
        yield Group(device=resolve_device(device))
        return
    rank, local_rank, size = (int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    if ":" in device:
        raise UserError(f"--device={device}: with torchrun, each process takes a GPU of its own; give --device=cuda")
    device = resolve_device(device)
    if device == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise UserError(f"torchrun started more processes than this machine has GPUs ({torch.cuda.device_count()})")
        device = f"cuda:{local_rank}"
        torch.cuda.set_device(device)
    if backend == "auto":
        backend = "nccl" if device.startswith("cuda") else "gloo"
    # Functions of this module take the group as a default argument, fixed when it is first imported, which building an
    # optimizer does: imported after the group is there, it would hold on to the group for good.
    importlib.import_module("torch.distributed.nn.functional")
    dist.init_process_group(backend, device_id=torch.device(device) if device.startswith("cuda") else None)
    yield Group(rank, local_rank, size, device, launched=True)
    for _ in range(5):  # a sharded model's parts refer to each other and to the group; some only go once others are gone
        if not gc.collect():
            break
    dist.barrier()
    dist.destroy_process_group()


def resolve_device(name: str) -> str:
    """Return the device to use for a `device` key: the best one there is for "auto"; UserError where `name` is not there."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    kind, _, index = name.partition(":")
    if not re.fullmatch("cpu|mps|cuda(:(0|[1-9][0-9]*))?", name):
        raise UserError(f"--device={name}: not one of auto, cpu, cuda, cuda:<number> or mps")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device={name}: PyTorch finds {torch.cuda.device_count()} CUDA devices here; try --device=auto")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise UserError(f"--device={name}: PyTorch finds no Apple GPU here; try --device=auto")
    return name


def resolve_dtype(name: Dtype, device: str) -> torch.dtype:
    """Return the number format of matrix products: for "auto", 16 bits on devices that have instructions for it."""
    if name == "auto":
        if not device.startswith("cuda"):
            return torch.bfloat16 if device == "cpu" and has_bfloat16_instructions() else torch.float32
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def has_bfloat16_instructions() -> bool:
    """Whether this CPU multiplies matrices in bfloat16 itself; where PyTorch cannot tell, it does not."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16"))


def resolve_compile(choice: Compile, device: str) -> bool:
    """Return whether to compile the model: for "auto", on CUDA devices where a C compiler is there."""
    if choice == "auto":
        return device.startswith("cuda") and any(shutil.which(name) for name in ("gcc", "cc", "clang"))
    return choice


def compiled(model: Callable) -> Callable:
    """Return a model, or a function, that compiles itself when it is first called, and where that fails goes on without."""
    torch._dynamo.config.suppress_errors = True
    logging.getLogger("torch._dynamo.convert_frame").addFilter(_failed_compilation)
    return torch.compile(model)


class _FailedCompilation(logging.Filter):
    """One warning in the place of the pages that PyTorch logs for each function that it could not compile."""

    warned = False

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno < logging.WARNING or record.exc_info is None:
            return True
        if not self.warned:
            warn(f"torch.compile failed ({str(record.exc_info[1]).strip().splitlines()[0][:200]}); the run goes on without it")
            self.warned = True
        return False


_failed_compilation = _FailedCompilation()  # one, which a logger takes once


def autocast(device: str, dtype: torch.dtype) -> contextlib.AbstractContextManager:
    """Return the context in which matrix products are computed in `dtype`."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device_type=torch.device(device).type, dtype=dtype)


class PackedLinear(torch.nn.Module):
    """A Linear layer for a CPU, its weight stored in the order in which oneDNN, PyTorch's second library for matrix products,
    reads it: for one row, twice as fast as PyTorch's own choice; for many rows in float32, too."""

    SMALL = 1 << 17  # weights up to here stay in the cache, and single rows are faster without oneDNN

    def __init__(self, linear: torch.nn.Linear):
        super().__init__()
        weight = linear.weight.detach()
        self.bias = linear.bias
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, 64)
        self.small = weight if weight.numel() <= self.SMALL else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.small is not None and x.numel() == x.size(-1):
            return torch.nn.functional.linear(x, self.small, self.bias)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


def ready_to_generate(model: torch.nn.Module, device: str, dtype: torch.dtype, compile: bool = False) -> None:
    """Move a model to `device` and into `dtype`, and arrange it for generation; it cannot be trained or saved after that.

    Where every token needs all the weights once, reading them is what takes the time: half the bytes, half the time.
    """
    model.eval().requires_grad_(False).to(device, dtype)
    if device.startswith("cuda"):
        torch.backends.cuda.enable_cudnn_sdp(False)  # it makes a plan for each length, which takes it 20 times the attention
    if compile:
        model.compile()  # which cannot look into packed weights
    if compile or device != "cpu" or not can_pack(dtype):
        return
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, torch.nn.Linear):
                setattr(parent, name, PackedLinear(child))


def can_pack(dtype: torch.dtype) -> bool:
    """Whether this PyTorch and this CPU have what `PackedLinear` calls, which is not in PyTorch's documented interface."""
    return (
        dtype in (torch.float32, torch.bfloat16)
        and torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability().startswith("AVX")
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        and (dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


def peak_flops(device: str, dtype: torch.dtype) -> float | None:
    """Return the device's peak in FLOP/s from its data sheet; None where it is not in the table."""
    if not device.startswith("cuda"):
        return None
    words = set(torch.cuda.get_device_name(device).replace("-", " ").split())
    for name, (half, single) in PEAK_FLOPS.items():
        if words.issuperset(name.split()) and "Laptop" not in words:
            return single if dtype == torch.float32 else half
    return None


def describe(device: str) -> str:
    """Return the device as a person knows it: the name of a GPU, or the threads that a CPU computes with."""
    if device.startswith("cuda"):
        return f"{device} ({torch.cuda.get_device_name(device)})"
    threads = torch.get_num_threads()
    return device if device == "mps" else f"{device} ({threads} thread{'s' if threads > 1 else ''})"


def peak_memory(device: str) -> int | None:
    """Return the most bytes that tensors have taken of a CUDA device so far; for other devices, that the process has taken.

    On "mps" it is what PyTorch holds of the GPU's memory now. None where the system does not tell.
    """
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    if device == "mps":
        return torch.mps.driver_allocated_memory()
    peak = _most_resident()
    if peak == INHERITED and STATUS.exists():
        return int(re.search(r"VmHWM:\s+(\d+) kB", STATUS.read_text())[1]) << 10
    return peak


def _most_resident() -> int | None:
    """Return the most bytes of memory that this process has had, or the one that started it."""
    if resource is None:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


INHERITED = _most_resident()  # which is no news of this process until it grows


def set_up(device: str, seed: int) -> None:
    """Seed the random numbers, and let float32 matrix products on CUDA devices use TensorFloat-32, as nanoGPT does."""
    torch.manual_seed(seed)
    if device.startswith("cuda"):
        torch.set_float32_matmul_precision("high")


def keep_memory() -> bool:
    """Let this process keep the memory that tensors on the CPU leave, for those of the next iteration.

    glibc, Linux's usual C library, gives large pieces back to the system at once, which clears each page before it hands it
    out again: a third of the time of a training step. Returns whether there is such a library.
    """
    try:
        libc = ctypes.CDLL("libc.so.6") if sys.platform == "linux" else None
    except OSError:
        libc = None
    return libc is not None and bool(libc.mallopt(_MMAP_THRESHOLD, 2**31 - 1) and libc.mallopt(_TRIM_THRESHOLD, -1))


def seed_dropout(seed: int, iteration: int, micro_batch: int) -> None:
    """Make what is random in the next pass through the network a function of these three numbers alone."""
    torch.manual_seed(_mixed(seed, iteration, micro_batch))


def text_generators(seed: int, numbers: Iterable[int], device: str) -> list[torch.Generator]:
    """Return a source of random numbers for each text to sample, which follows from `seed` and the text's number alone."""
    return [torch.Generator(device).manual_seed(_mixed(seed, number, 0)) for number in numbers]


def _mixed(seed: int, number: int, part: int) -> int:
    """Return 64 bits that follow from three numbers, and are others for other numbers."""
    return int(np.random.Philox(key=[seed, number], counter=[0, 0, part, 0]).random_raw())


def to_device(tensors: tuple[torch.Tensor, ...], device: str) -> tuple[torch.Tensor, ...]:
    """Copy tensors to the device; to a CUDA device from pinned memory, while this process goes on."""
    if device.startswith("cuda"):
        return tuple(tensor.pin_memory().to(device, non_blocking=True) for tensor in tensors)
    return tuple(tensor.to(device) for tensor in tensors)


def synchronize(device: str) -> None:
    """Return when the device has finished what it was given, so that a clock can be read."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    elif device == "mps":
        torch.mps.synchronize()
