"""What a machine can do: device, number format, compilation, random numbers, peak FLOP/s, memory."""

import contextlib
import ctypes
import logging
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from model import GPT
from nanogpt.decoding import decode, decode_by
from nanogpt.errors import UserError, first_line, warn
from nanogpt.kernels import (
    PREFER_ONEDNN,
    can_pack,
    cpu_capabilities,
    has_avx,
    has_fast_float16,
    matmul,
    pack_linear_layers,
    quantize_linear_layers,
)

try:
    import resource
except ImportError:  # Windows
    resource = None

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
GenerationDtype = Literal["auto", "float32", "bfloat16", "float16", "int8"]
Compile = bool | Literal["auto"]

LARGE_MODEL_PARAMS = 1 << 24  # above this, the float32 weights do not stay in a CPU's cache from one token to the next
ISAS_WITHOUT_BFLOAT16 = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX512_CORE", "AVX512_CORE_VNNI")  # oneDNN's names
CHUNKED_LOSS_MIN_BYTES = 1 << 27  # of float32 logits: above this, a CPU computes the loss in chunks
CHUNKED_LOSS_ROWS = 256
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
LINUX_STATUS = Path("/proc/self/status")
PEAK_SECONDS = 0.05  # of measuring the peak of matrix products
PRODUCT_SECONDS = 1e-3  # of one product, so that starting it takes no part of that
PRODUCT_SIZES = (256, 8192)  # rows of the first and of the largest matrices
OUT_OF_MEMORY = re.compile(r"out of memory|not enough memory|can(no|')t allocate memory|ALLOC_FAILED", re.IGNORECASE)

# Peak FLOP/s of dense matrix products, from the vendors' data sheets, by words of the device's name: (16-bit, float32), the
# latter with TensorFloat-32 if the device has it. The first entry whose words all occur in the name counts.
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

# what "auto" stands for


def pick_device(name: str) -> str:
    """Return the device for a `device` key; "auto" is CUDA, else MPS, else the CPU. Raises UserError if it is not there."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    device_type, _, index = name.partition(":")
    if not re.fullmatch("cpu|mps|cuda(:(0|[1-9][0-9]*))?", name):
        raise UserError(f"device must be auto, cpu, cuda, cuda:<number> or mps, got --device={name}")
    if device_type == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device={name}: PyTorch finds {torch.cuda.device_count()} CUDA devices; try --device=auto")
    if device_type == "mps" and not torch.backends.mps.is_available():
        raise UserError(f"--device={name}: PyTorch finds no Apple GPU; try --device=auto")
    return name


def pick_dtype(name: Dtype, device: str) -> torch.dtype:
    """Return the dtype of matrix products; "auto" is 16 bits where the hardware supports it, else float32."""
    if name == "auto":
        if not device.startswith("cuda"):
            return torch.bfloat16 if device == "cpu" and has_bfloat16_instructions() else torch.float32
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def pick_generation_dtype(name: GenerationDtype, device: str, texts: int, n_params: int) -> torch.dtype:
    """Return the dtype of weights for generating `texts` texts at a time; "auto" is the fastest one.

    For one text, reading the weights takes most of the time: with "auto", an x86 CPU without bfloat16 instructions reads those
    of a large model in float16; if it multiplies by them fast, for several texts, too. Raises UserError for int8 on a GPU.
    """
    if name == "int8":
        if device != "cpu":
            raise UserError(f"--dtype=int8 needs --device=cpu, got {device}; try --dtype=bfloat16")
        return torch.int8
    dtype = pick_dtype(name, device)
    is_slow = name == "auto" and device == "cpu" and dtype == torch.float32
    gains = n_params > LARGE_MODEL_PARAMS and has_avx() and (texts == 1 or has_fast_float16())
    return torch.float16 if is_slow and gains else dtype


def has_bfloat16_instructions() -> bool:
    """Whether this CPU has matrix instructions for bfloat16 and oneDNN may use them; False if PyTorch cannot tell."""
    if os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper() in ISAS_WITHOUT_BFLOAT16:
        return False
    capabilities = cpu_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16"))


def pick_compile(choice: Compile, device: str) -> bool:
    """Return whether to compile the model; "auto" does on CUDA if there is a C compiler."""
    if choice == "auto":
        return device.startswith("cuda") and any(shutil.which(name) for name in ("gcc", "cc", "clang"))
    return choice


def pick_loss_rows(choice: int | Literal["auto"], device: str, rows: int, vocab_size: int) -> int:
    """Return the rows per chunk of the cross-entropy loss, 0 for no chunks; "auto" cuts large logits on a CPU.

    `rows` is the number of tokens in a micro-batch.
    """
    if choice != "auto":
        return choice
    return CHUNKED_LOSS_ROWS if device == "cpu" and 4 * rows * vocab_size > CHUNKED_LOSS_MIN_BYTES else 0


def moved_settings(run: dict[str, Any], device: str | None) -> dict[str, str]:
    """Return the settings of a resumed run that do not go with the kind of device it resumes on, each as "auto".

    `run` holds the run's keys. `device` is the key given now; None for the run's own, or "auto" if that is not there.
    Raises UserError if a given `device` is not there.
    """
    began_on, nccl = str(run.get("device", "auto")).partition(":")[0], run.get("backend") == "nccl"
    if began_on == "auto" and nccl:
        began_on = "cuda"
    try:
        resumes_on = pick_device(device or str(run.get("device", "auto"))).partition(":")[0]
    except UserError:
        if device is not None:
            raise
        return dict.fromkeys(("device", "dtype", "compile", "backend"), "auto")
    if began_on not in ("auto", resumes_on):
        return dict.fromkeys(("dtype", "compile", "backend"), "auto")
    return {"backend": "auto"} if nccl and resumes_on != "cuda" else {}  # nanoGPT stores nccl with any device


# computing


def autocast(device: str, dtype: torch.dtype) -> contextlib.AbstractContextManager:
    """Return the mixed-precision context in which matrix products are computed in `dtype`."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device_type=torch.device(device).type, dtype=dtype)


def compile_model(model: Callable) -> Callable:
    """Return a module or function compiled by torch.compile at its first call; if that fails, warn and run it as it is."""
    torch._dynamo.config.suppress_errors = True
    logging.getLogger("torch._dynamo.convert_frame").addFilter(_failed_compilation)
    try:
        return torch.compile(model)
    except Exception as error:  # from importing its compiler, which in an ASCII locale cannot read its own files
        _failed_compilation.warn_once(error)
        return model


class _FailedCompilation(logging.Filter):
    """Replaces the pages that PyTorch logs for each function that it could not compile by a single warning."""

    warned = False

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno < logging.WARNING or record.exc_info is None:
            return True
        self.warn_once(record.exc_info[1])
        return False

    def warn_once(self, error: BaseException) -> None:
        if not self.warned:
            warn(f"torch.compile failed ({first_line(error)[:200]}); continuing without it")
            self.warned = True


_failed_compilation = _FailedCompilation()  # a single instance, so that a logger takes it once


def uses_onednn(wanted: bool, device: str, dtype: torch.dtype, compile: bool) -> bool:
    """Whether oneDNN trains the Linear layers: if `wanted`, in float32 on a CPU where MKL is slow, unless compiled."""
    return wanted and PREFER_ONEDNN and device == "cpu" and dtype == torch.float32 and not compile


def prepare_for_generation(
    model: torch.nn.Module, device: str, dtype: torch.dtype, texts: int = 1, compile: bool = False
) -> None:
    """Move a model to `device` and `dtype` and optimize it for inference; it cannot be trained or saved after that.

    `texts` is the number of texts to generate at a time.

    Generating a token reads every weight once, so memory bandwidth is the limit: half the bytes, half the time. On a CPU
    without matrix instructions for `dtype`, only the weights have it, and the rest is float32.
    """
    has_bfloat16 = device == "cpu" and has_bfloat16_instructions()
    is_weight_only = device == "cpu" and dtype != torch.float32 and not (dtype == torch.bfloat16 and has_bfloat16)
    model.eval().requires_grad_(False).to(device, torch.float32 if is_weight_only else dtype)
    if device == "cpu":
        keep_memory()
    if device.startswith("cuda"):
        torch.backends.cuda.enable_cudnn_sdp(False)  # makes a plan for each new length, 20 times the attention itself
    if is_weight_only:
        quantize_linear_layers(model, dtype, torch.bfloat16 if has_bfloat16 and dtype == torch.int8 else torch.float32)
    elif device == "cpu" and not compile and can_pack(dtype):  # torch.compile cannot trace packed weights
        pack_linear_layers(model, texts)
    if compile and isinstance(model, GPT):
        decode_by(model, compile_model(decode), device.startswith("cuda"))


def to_device(tensors: tuple[torch.Tensor, ...], device: str, static: bool = False) -> tuple[torch.Tensor, ...]:
    """Copy tensors to the device; to CUDA asynchronously, from pinned memory.

    `static` lets torch.compile make code for these shapes only, though an evaluation of whole splits has others.
    """
    if device.startswith("cuda"):
        tensors = tuple(tensor.pin_memory().to(device, non_blocking=True) for tensor in tensors)
    else:
        tensors = tuple(tensor.to(device) for tensor in tensors)
    if static:
        for tensor in tensors:
            torch._dynamo.mark_static(tensor)
    return tensors


def synchronize(device: str) -> None:
    """Wait until the device has finished its queued work, so that a clock can be read."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    elif device == "mps":
        torch.mps.synchronize()


# random numbers


def set_up(device: str, seed: int) -> None:
    """Seed PyTorch, make a CUDA device the current one, and allow TensorFloat-32 for its float32 products, as nanoGPT does."""
    torch.manual_seed(seed)
    if device.startswith("cuda"):
        if ":" in device:
            torch.cuda.set_device(device)  # CUDA graphs, streams and queries of capabilities go to the current one
        torch.set_float32_matmul_precision("high")


def seed_dropout(seed: int, iteration: int, micro_batch: int) -> None:
    """Seed PyTorch with these three numbers, so that dropout is the same on any number of processes and after a resume."""
    torch.manual_seed(_mix(seed, iteration, micro_batch))


def text_generators(seed: int, numbers: Iterable[int], device: str) -> list[torch.Generator]:
    """Return a random generator for each text to sample, seeded by `seed` and the text's number only."""
    return [torch.Generator(device).manual_seed(_mix(seed, number, 0)) for number in numbers]


def _mix(seed: int, number: int, part: int) -> int:
    """Hash three numbers to 64 bits."""
    return int(np.random.Philox(key=[seed, number], counter=[0, 0, part, 0]).random_raw())


# what the hardware is


def describe(device: str) -> str:
    """Return a device's name for people: a GPU's model, or the number of CPU threads."""
    if device.startswith("cuda"):
        return f"{device} ({torch.cuda.get_device_name(device)})"
    threads = torch.get_num_threads()
    return device if device == "mps" else f"{device} ({threads} thread{'s' if threads > 1 else ''})"


def peak_flops(device: str, dtype: torch.dtype) -> float | None:
    """Return the device's peak FLOP/s from its data sheet; None if it is not in PEAK_FLOPS."""
    if not device.startswith("cuda"):
        return None
    words = set(torch.cuda.get_device_name(device).replace("-", " ").split())
    for name, (half, single) in PEAK_FLOPS.items():
        if words.issuperset(name.split()) and "Laptop" not in words:
            return single if dtype == torch.float32 else half
    return None


def find_peak(device: str, dtype: torch.dtype) -> tuple[float, str]:
    """Return the device's peak FLOP/s in matrix products, and the source of that."""
    peak = peak_flops(device, dtype)
    return (peak, "data sheet") if peak else (measured_peak(device, dtype), "measured matrix products")


def measured_peak(device: str, dtype: torch.dtype) -> float:
    """Measure the device's peak FLOP/s: the fastest product of two square matrices, which grow until one takes long enough.

    Draws no random numbers, so that a run stays the same.
    """
    size, largest = PRODUCT_SIZES
    matmul(*_matrices(size, device, dtype))  # starts the libraries
    rates, started = [], time.perf_counter()
    while not rates or time.perf_counter() - started < PEAK_SECONDS:
        a, b = _matrices(size, device, dtype)
        for _ in range(3):
            synchronize(device)
            before = time.perf_counter()
            matmul(a, b)
            synchronize(device)
            seconds = time.perf_counter() - before
            rates.append(2 * size**3 / seconds)
        if seconds < PRODUCT_SECONDS and size < largest:
            size *= 2
    return max(rates)


def _matrices(size: int, device: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.linspace(-1, 1, 2 * size * size, device=device).to(dtype).view(2, size, size).unbind()


# memory


def peak_memory(device: str) -> int | None:
    """Return the peak memory so far in bytes: of tensors on a CUDA device, elsewhere of this process.

    On MPS it is what PyTorch holds of the GPU's memory now. None if the system does not tell.
    """
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    if device == "mps":
        return torch.mps.driver_allocated_memory()
    peak = _max_resident_bytes()
    if peak == INHERITED_PEAK_BYTES and LINUX_STATUS.exists():
        return int(re.search(r"VmHWM:\s+(\d+) kB", LINUX_STATUS.read_text(encoding="utf-8"))[1]) << 10
    return peak


def _max_resident_bytes() -> int | None:
    """Return the peak resident memory of this process, or of the one that started it if that was larger."""
    if resource is None:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


INHERITED_PEAK_BYTES = _max_resident_bytes()  # says nothing about this process until it grows


def keep_memory() -> bool:
    """Let freed CPU memory stay with this process, for the next iteration's tensors; return whether that is possible.

    glibc, the usual C library of Linux, returns large blocks to the system, which clears each page before it hands it out
    again: a third of a training step, or of ten texts at once past the context.
    """
    try:
        libc = ctypes.CDLL("libc.so.6") if sys.platform == "linux" else None
    except OSError:
        libc = None
    return libc is not None and bool(libc.mallopt(M_MMAP_THRESHOLD, 2**31 - 1) and libc.mallopt(M_TRIM_THRESHOLD, -1))


@contextlib.contextmanager
def explain_out_of_memory(advice: str) -> Iterator[None]:
    """Turn the errors of PyTorch and Python for memory that ran out into a UserError that ends with `advice`."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # only CUDA's has a class of its own, a RuntimeError
        if not isinstance(error, MemoryError) and not OUT_OF_MEMORY.search(str(error)):
            raise
        raise UserError(f"out of memory: {advice}") from error
