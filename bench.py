"""Benchmark training, generation and the time to a loss, each against a baseline; or compute what a model size costs.

python bench.py --size=laptop                            training steps, the fast way and the baseline in turn
python bench.py --batch_size=12 --block_size=1024 --bias=False --compile=True --profile=True       as in nanoGPT
python bench.py --what=generation --against=transformers
python bench.py --what=time_to_loss
python bench.py --what=gpu                               all of this on a GPU, in ten minutes
python bench.py --what=sizing --size=gpt2-xl --tokens=300e9          parameters, FLOPs, memory, days of training
python bench.py --what=scaling --out=scaling.png                     scaling laws: the best size for a budget

The baseline, `plain`, is nanoGPT's defaults on the device. On CUDA: bf16/fp16 mixed precision and, in training, fused AdamW and
torch.compile; elsewhere float32, AdamW without a fused kernel, not compiled. All logits at once, and no KV cache.
"""

import itertools
import json
import multiprocessing
import platform
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent))  # python -P leaves it out

import configurator
from configurator import LossRows, NonNegativeFloat, NonNegativeInt, PathStr, PositiveFloat, PositiveInt, Range, Seed

import torch
from torch.nn.utils import clip_grad_norm_

from model import GPT, GPTConfig, sample_next
from nanogpt import checkpoint, curves, gpu_benchmark, kernels, metrics, scaling, sizing
from nanogpt.dataset import Dataset
from nanogpt.device import (
    Compile,
    GenerationDtype,
    autocast,
    compile_model,
    explain_out_of_memory,
    find_peak,
    keep_memory,
    peak_memory,
    pick_compile,
    pick_device,
    pick_dtype,
    pick_generation_dtype,
    pick_loss_rows,
    prepare_for_generation,
    set_up,
    synchronize,
    text_generators,
    to_device,
    uses_onednn,
)
from nanogpt.distributed import checkpoint_activations, clip_gradient
from nanogpt.errors import UserError, first_line
from nanogpt.optim import build_optimizer

ROOT = Path(__file__).resolve().parent
TRACE = "trace.json"
ROUND_SECONDS = 2.0  # length of a round of training, unless --steps sets it
WARMUP_STEPS = 3
PROFILED_STEPS = 3

SIZES = {
    "laptop": {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 64, "vocab_size": 65, "bias": False},
    "shakespeare": {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "vocab_size": 65, "bias": False},
    "gpt2": {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024, "vocab_size": 50257, "gelu": "tanh"},
    "gpt2-medium": {"n_layer": 24, "n_head": 16, "n_embd": 1024, "block_size": 1024, "vocab_size": 50257, "gelu": "tanh"},
    "gpt2-large": {"n_layer": 36, "n_head": 20, "n_embd": 1280, "block_size": 1024, "vocab_size": 50257, "gelu": "tanh"},
    "gpt2-xl": {"n_layer": 48, "n_head": 25, "n_embd": 1600, "block_size": 1024, "vocab_size": 50257, "gelu": "tanh"},
}
BATCH_SIZES = {"laptop": 12, "shakespeare": 64}  # of the recipes in config/; 12, nanoGPT's default, for other sizes
FROM_SCRATCH = {"vocab_size": 50304, "bias": False, "gelu": "erf"}  # how train.py changes GPT-2's shape
SHAPE_KEYS = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")

# time_to_loss: nanoGPT's hyperparameters, and the same model with the fast recipe, once as short as the target allows
BASELINE_RECIPE, FAST_RECIPE = "config/train_shakespeare_char_cpu.py", "config/train_shakespeare_char_fast.py"
SHORTEST = {"batch_size": 12, "learning_rate": 1.5e-2, "min_lr": 1e-3, "beta1": 0.85, "beta2": 0.98, "warmup_iters": 0}
SHORTEST |= {"max_iters": 330, "lr_decay_iters": 330, "eval_interval": 33}


@dataclass(frozen=True)
class Config(configurator.Config):
    what: Literal["training", "generation", "time_to_loss", "gpu", "sizing", "scaling"] = "training"  # gpu: all, in ten minutes
    against: Literal["plain", "transformers", "nothing"] = "plain"  # baseline. plain: nanoGPT's defaults (CUDA: bf16, compiled)
    batch_size: NonNegativeInt = 0  # sequences per batch. 0: the recipe's for training, 1 for generation
    rounds: PositiveInt = 3  # rounds; each times the fast run and the baseline once
    seed: Seed = 1337  # random seed
    # model
    size: Literal["laptop", "shakespeare", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"] = "gpt2"  # model size
    out_dir: PathStr = ""  # folder of a run: its model's shape in place of a size
    n_layer: NonNegativeInt = 0  # layers. 0, here and below: the size's
    n_head: NonNegativeInt = 0  # attention heads per layer
    n_embd: NonNegativeInt = 0  # channels
    block_size: NonNegativeInt = 0  # context, and tokens per training sequence
    vocab_size: NonNegativeInt = 0  # vocabulary
    bias: bool | Literal["auto"] = "auto"  # biases in Linear and LayerNorm layers. auto: False, but GPT-2's in generation
    # training
    steps: NonNegativeInt = 0  # training steps per round. 0: as many as take two seconds
    optimizer: Literal["adamw", "muon"] = "adamw"  # optimizer of the fast run
    real_data: bool | Literal["auto"] = "auto"  # train on the dataset, or on random tokens. auto: if it is prepared and fits
    dataset: PathStr = "openwebtext"  # folder with train.bin and val.bin: a name in data/, or a path
    profile: bool = False  # write trace.json, for ui.perfetto.dev, and list the operations that take the most time
    # generation
    prompt_tokens: PositiveInt = 8  # prompt length
    new_tokens: PositiveInt = 300  # tokens to generate
    temperature: NonNegativeFloat = 0.8  # as in sample.py
    top_k: NonNegativeInt = 200  # as in sample.py
    # time_to_loss
    target: PositiveFloat = 1.92  # validation loss to reach, on all of Tiny Shakespeare's val.bin
    # sizing and scaling
    tokens: NonNegativeFloat = 0.0  # training tokens. 0: 20 per parameter
    peak: PositiveFloat = 312e12  # FLOP/s of a device; 312e12 is an A100 in bf16
    mfu: Annotated[float, Range(above=0, at_most=1)] = 0.3  # model FLOPs utilization: share of the peak
    gpus: PositiveInt = 8  # devices
    out: PathStr = "scaling.png"  # .png or .svg file for the curves of scaling
    # machine (for the fast run, as in train.py and sample.py)
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: GenerationDtype = "auto"  # mixed precision; in generation, of weights (int8 only there). auto: as in those scripts
    compile: Compile = "auto"  # compile with torch.compile. auto: on CUDA, for training only
    fused: bool = True  # fused AdamW, on CUDA and CPUs
    loss_rows: LossRows = "auto"  # tokens per chunk of the cross-entropy; 0: no chunks. auto: 256 on a CPU if they save memory
    keep_memory: bool = True  # on Linux CPUs: reuse freed memory instead of returning it to the system
    onednn: bool = True  # on AMD CPUs with AVX-512: float32 Linear layers by oneDNN, not MKL
    activation_checkpointing: bool = False  # recompute activations in the backward pass: less memory, a third more compute

    def validate(self) -> None:
        if self.against == "transformers" and (self.what != "generation" or not self.size.startswith("gpt2") or self.out_dir):
            raise UserError("--against=transformers needs --what=generation and a --size of GPT-2's, such as --size=gpt2")
        if self.dtype == "int8" and self.what != "generation":
            raise UserError("--dtype=int8 needs --what=generation; training is in float32, bfloat16 or float16")
        curves.check_out(self.out)


def main(config: Config) -> None:
    if config.out_dir:
        config = config.replace(**shape_of_run(config))
    commands = {"training": training, "generation": generation, "time_to_loss": time_to_loss, "gpu": report_gpu}
    (commands | {"sizing": report_size, "scaling": report_scaling})[config.what](config)


def shape_of_run(config: Config) -> dict[str, Any]:
    """Return the shape of the model in `out_dir`, without the keys that are set. Raises UserError if it is no GPT."""
    found = checkpoint.open_checkpoint("resume", config.out_dir)
    if found.model_type != "gpt":
        raise UserError(f"--out_dir={config.out_dir}: must be the run of a GPT, got a {found.model_type} model")
    return {key: found.model_args[key] for key in (*SHAPE_KEYS, "bias") if key not in config.given}


def model_shape(config: Config) -> GPTConfig:
    """Return the model's shape: for generation GPT-2's own, else as train.py changes it for training from scratch.

    Raises UserError if n_head does not divide n_embd.
    """
    shape = SIZES[config.size] | (FROM_SCRATCH if config.size.startswith("gpt2") and config.what != "generation" else {})
    shape |= {key: getattr(config, key) for key in SHAPE_KEYS if getattr(config, key)}
    shape |= {} if config.bias == "auto" else {"bias": config.bias}
    if shape["n_embd"] % shape["n_head"]:
        raise UserError(f"n_head must divide n_embd={shape['n_embd']}, got --n_head={shape['n_head']}")
    return GPTConfig(**shape)


def name_of(config: Config) -> str:
    """Return what the model is called: the run's folder or the size, and the keys that were set."""
    changed = [f"{key}={getattr(config, key)}" for key in (*SHAPE_KEYS, "bias") if key in config.given]
    return ", ".join([config.out_dir or config.size, *changed])


def plain_settings(device: str) -> dict[str, Any]:
    """Return the baseline's settings: nanoGPT's defaults on CUDA; elsewhere what its README sets and what it falls back to.

    nanoGPT picks bfloat16 if the GPU has it, else float16. Off CUDA it has no autocast and no fused AdamW, and its commands
    say --compile=False.
    """
    on_cuda = device.startswith("cuda")
    dtype = "auto" if on_cuda else "float32"
    same = {"loss_rows": 0, "keep_memory": False, "onednn": False, "activation_checkpointing": False}  # on every device
    return same | {"dtype": dtype, "compile": on_cuda, "fused": on_cuda}


# training


def training(config: Config) -> None:
    """Time training steps the fast way and the baseline's, in turn; print tokens/s, peak memory and their ratio.

    Each way has a process of its own, so that its peak memory is its own.
    """
    device = pick_device(config.device)
    shape, B = model_shape(config), batch_size(config)
    T = shape.block_size
    is_real, data = pick_data(config, shape)
    config = config.replace(real_data=is_real)
    print(f"{name_of(config)}: batches of {B} x {T} tokens; {device_name(device)}, PyTorch {torch.__version__}")
    print(f"data: {data}", flush=True)

    # start and warm up the processes, one after the other
    workers = {"fast": Worker(Trainer, config, "fast")}
    if config.against == "plain":
        workers["plain"] = Worker(Trainer, config.replace(**plain_settings(device)), "plain")

    # time both ways in turn
    for number in range(config.rounds):
        times = {way: worker.time_round(config.steps) for way, worker in workers.items()}
        line = ", ".join(f"{way} {1e3 * seconds:,.1f} ms ({B * T / seconds:,.0f} tokens/s)" for way, seconds in times.items())
        ratio = f", ratio {times['plain'] / times['fast']:.2f}" if "plain" in times else ""
        print(f"round {number + 1}: {line}{ratio}", flush=True)

    # report medians
    result = {"what": "training", "size": name_of(config), "device": device_name(device), "batch_size": B, "block_size": T}
    model = sizing.empty_model(shape)
    for way, worker in workers.items():
        megabytes, (peak, source) = worker.finish()
        seconds = statistics.median(worker.times)
        tokens_per_second = B * T / seconds
        share = model.estimate_mfu(B, seconds, flops_promised=peak)
        result |= {f"{way}_tokens_per_second": round(tokens_per_second, 1), f"{way}_megabytes": megabytes}
        result |= {f"{way}_share": round(share, 4)}
        print(
            f"{way}: median {tokens_per_second:,.1f} tokens/s, {share:.1%} of {peak / 1e12:.2f} TFLOP/s ({source}), "
            f"peak memory {megabytes:,} MB"
        )
    if "plain" in workers:
        ratios = [plain / fast for fast, plain in zip(workers["fast"].times, workers["plain"].times, strict=True)]
        result["ratio"] = round(statistics.median(ratios), 2)
        print(f"median ratio: {result['ratio']}")
    print(json.dumps(result))
    seconds, share = statistics.median(workers["fast"].times), result["fast_share"]
    print(f"time per iteration: {1e3 * seconds:.4f}ms, MFU: {100 * share:.2f}%")  # nanoGPT's last line


def pick_data(config: Config, shape: GPTConfig) -> tuple[bool, str]:
    """Return whether to train on the dataset, and in words on what. Raises UserError if the dataset is asked for and unfit."""
    if config.real_data is False:
        return False, "random tokens"
    try:
        Dataset(config.dataset).check(shape.block_size, shape.vocab_size)
    except UserError as error:
        if config.real_data is True:
            raise
        return False, f"random tokens; {first_line(error)}"
    return True, config.dataset


class Worker:
    """A process that trains or generates one way, and times its steps on request."""

    def __init__(self, kind: type["Trainer | TextGenerator"], config: Config, way: str):
        """Start the process, print its description, and return when it has warmed up. Raises UserError if it fails."""
        self._way = way
        self._pipe, other = multiprocessing.Pipe()
        spawn = multiprocessing.get_context("spawn")
        self._process = spawn.Process(target=work, args=(other, kind, config, way), daemon=True)
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process inherits this; at Ctrl-C, the parent ends it
        self._process.start()
        signal.signal(signal.SIGINT, handler)
        other.close()
        description, self._first_seconds = self._ask()
        print(f"{way}: {description}", flush=True)
        self.times: list[float] = []  # seconds per step in each round

    def time_round(self, steps: int) -> float:
        """Do `steps` steps, or as many as take ROUND_SECONDS if that is 0; return the seconds per step."""
        self.times.append(self._ask(steps or max(1, round(ROUND_SECONDS / self._first_seconds))))
        return self.times[-1]

    def finish(self) -> tuple[int, Any]:
        """End the process; return its peak memory in MB, and what its `report` returned."""
        found = self._ask(0)
        self._process.join()
        return found

    def _ask(self, steps: int | None = None) -> Any:
        """Return what the process sends next, after sending it `steps` if given. Raises UserError if it failed or died."""
        try:
            if steps is not None:
                self._pipe.send(steps)
            found = self._pipe.recv()
        except (EOFError, ConnectionError) as error:  # it has ended
            self._process.join()
            status = self._process.exitcode
            remedy = "see its traceback above" if status > 0 else "if memory ran out, lower --batch_size"
            raise UserError(f"{self._way}: the process ended with status {status}; {remedy}") from error
        if isinstance(found, UserError):
            raise UserError(f"{self._way}: {found}") from found
        return found


def work(pipe: Connection, kind: type["Trainer | TextGenerator"], config: Config, way: str) -> None:
    """The process of a Worker: warm up, time as many steps as it asks for, until 0, and report; or send a UserError."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Windows does not inherit it
    if way == "plain":
        kernels.EXPLICIT_MAX_TOKENS.clear()  # scaled_dot_product_attention always, as in nanoGPT
    try:
        with explain_out_of_memory("lower --batch_size or --block_size, or choose a smaller --size"):
            subject = kind(config, way)
            pipe.send((subject.description, subject.warm_up()))
            while steps := pipe.recv():
                pipe.send(subject.seconds_per_step(steps))
            megabytes = round((peak_memory(subject.device) or 0) / 1e6)
            pipe.send((megabytes, subject.report()))
    except UserError as error:
        pipe.send(error)
    except (EOFError, ConnectionError):  # the parent has ended, perhaps since another worker failed
        pass


class Trainer:
    """One way to train: a model, its optimizer and its batches."""

    def __init__(self, config: Config, way: str):
        """Set up the "fast" or the "plain" way with the settings of `config`."""
        self.config, self.way = config, way
        self.device = pick_device(config.device)
        set_up(self.device, config.seed)
        self.dtype = pick_dtype(config.dtype, self.device)
        memory_kept = config.keep_memory and self.device == "cpu" and keep_memory()

        # model and optimizer
        self.shape, self.batch_size = model_shape(config), batch_size(config)
        with torch.device(self.device):  # a CPU takes some 20 s for GPT-2 XL's random weights
            self.model = GPT(self.shape)
        muon = config.optimizer == "muon" and way == "fast"
        device_type = torch.device(self.device).type
        self.optimizer = build_optimizer(
            self.model, "muon" if muon else "adamw", 0.1, 1e-4, (0.9, 0.95), device_type, config.fused
        )
        self.clip = clip_gradient if way == "fast" else plain_clip
        if config.activation_checkpointing:
            checkpoint_activations(self.model)
        is_compiled = pick_compile(config.compile, self.device)
        onednn = uses_onednn(config.onednn, device_type, self.dtype, is_compiled)
        if onednn:
            kernels.train_by_onednn(self.model)
        self.network = compile_model(self.model) if is_compiled else self.model
        self.loss_rows = None  # nanoGPT's model also returns the logits
        if way == "fast":
            rows = self.batch_size * self.shape.block_size
            self.loss_rows = pick_loss_rows(config.loss_rows, self.device, rows, self.shape.vocab_size)

        # batches
        self.data = Dataset(config.dataset) if config.real_data else None
        self.generator = torch.Generator().manual_seed(config.seed)

        parts = [str(self.dtype).removeprefix("torch."), "compiled" if is_compiled else "not compiled"]
        parts += ["Muon and AdamW" if muon else "fused AdamW" if config.fused else "AdamW"]
        parts += [f"loss in chunks of {self.loss_rows}"] * bool(self.loss_rows)
        parts += ["memory kept"] * memory_kept + ["oneDNN"] * onednn
        parts += ["activation checkpointing"] * config.activation_checkpointing
        self.description = ", ".join(parts)

    def batch(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return inputs and targets, (B, T) each, on the CPU."""
        B, T, vocab_size = self.batch_size, self.shape.block_size, self.shape.vocab_size
        if self.data is None:
            return torch.randint(vocab_size, (2, B, T), generator=self.generator).unbind()
        starts = self.data.draw("train", "train", self.config.seed, number, B, T)
        return self.data.windows("train", starts, T, vocab_size)

    def step(self, number: int) -> None:
        """Do one update: forward, backward, clip, optimizer step."""
        x, y = to_device(self.batch(number), self.device)
        with autocast(self.device, self.dtype):
            _, loss = self.network(x, y, loss_rows=self.loss_rows)
        loss.backward()
        self.clip(self.model, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        loss.item()

    def warm_up(self) -> float:
        """Do some steps; return the seconds that the last one took."""
        self.seconds_per_step(WARMUP_STEPS)
        return self.seconds_per_step(1)

    def seconds_per_step(self, count: int) -> float:
        """Do `count` steps; return their mean time."""

        def run() -> None:
            for number in range(count):
                self.step(number)

        return timed(run, self.device) / count

    def report(self) -> tuple[float, str]:
        """Return the device's peak in FLOP/s and the source of that; with --profile=True, profile the fast way."""
        peak = find_peak(self.device, self.dtype)
        if self.config.profile and self.way == "fast":
            self.profile()
        return peak

    def profile(self) -> None:
        """Write a trace of PROFILED_STEPS steps, and print the operations that take the most time."""
        activities = [torch.profiler.ProfilerActivity.CPU]
        activities += [torch.profiler.ProfilerActivity.CUDA] * self.device.startswith("cuda")
        with torch.profiler.profile(activities=activities) as profile:
            self.seconds_per_step(PROFILED_STEPS)
        profile.export_chrome_trace(TRACE)
        sort_by = f"self_{torch.device(self.device).type}_time_total"
        print(profile.key_averages().table(sort_by=sort_by, row_limit=15, max_name_column_width=45))
        print(f"wrote {TRACE}: open it in ui.perfetto.dev or chrome://tracing", flush=True)


def plain_clip(model: GPT, limit: float) -> None:
    """Clip the gradient as nanoGPT does."""
    clip_grad_norm_(model.parameters(), limit)


def batch_size(config: Config) -> int:
    """Return the sequences per batch."""
    return config.batch_size or BATCH_SIZES.get(config.size, 12)


def device_name(device: str) -> str:
    """Return the name of the GPU, or the number of CPU threads."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{device}, {torch.get_num_threads()} threads" if device == "cpu" else device


# sizing and scaling


def report_size(config: Config) -> None:
    """Print what the model costs: parameters, FLOPs, memory and days of training."""
    shape, B = model_shape(config), batch_size(config)
    rows = pick_loss_rows("auto", "cpu", B * shape.block_size, shape.vocab_size)
    found = sizing.report(name_of(config), shape, B, rows, config.tokens, config.peak, config.mfu, config.gpus)
    print(json.dumps({"what": "sizing", "size": name_of(config)} | found))


def report_scaling(config: Config) -> None:
    """Print and draw what the scaling laws say of budgets and of the model."""
    found = scaling.report(name_of(config), model_shape(config), config.tokens, Path(config.out))
    print(json.dumps({"what": "scaling", "size": name_of(config)} | found))


# a GPU


def report_gpu(config: Config) -> None:
    """Print everything that there is to measure on a GPU. Keys that were set hold for each measurement by bench.py.

    Raises UserError without a GPU, unless the device is named.
    """
    device = pick_device(config.device)
    if device == "cpu" and "device" not in config.given:
        raise UserError("--what=gpu needs a GPU, and PyTorch finds none; try --what=training")
    print(f"{device_name(device)}, PyTorch {torch.__version__}, Python {platform.python_version()}, {date.today()}")
    flags = [f"--{key}={getattr(config, key)}" for key in sorted(config.given - {"what"})]
    found = gpu_benchmark.measure(gpu_benchmark.MEASUREMENTS, flags)
    print(json.dumps({"what": "gpu", "device": device_name(device), "measurements": found}))


# time to a loss


def time_to_loss(config: Config) -> None:
    """Train the laptop model on Tiny Shakespeare the plain way and the fast way; print when each reaches the target loss.

    A third run trains the fast way for as long as the plain way takes. Only training is timed, not the evaluations, which
    run on the whole validation split.
    """
    plain = timed_run("plain", config, BASELINE_RECIPE, plain_settings("cpu") | {"eval_interval": 250})
    fast = timed_run("fast", config, FAST_RECIPE, SHORTEST)
    steps = int(plain[-1][0] * fast[-1][1] / fast[-1][0]) // 2  # an update of the recipe takes up to twice as long
    keys = {"max_iters": steps, "lr_decay_iters": steps, "eval_interval": steps}
    longest = timed_run("as long", config, FAST_RECIPE, keys)
    result: dict[str, Any] = {"what": "time_to_loss", "target": config.target}
    for name, evaluations in (("plain", plain), ("fast", fast)):
        result[f"{name}_seconds"] = crossing(evaluations, config.target)
    result |= {"plain_final_loss": plain[-1][2], "fast_final_loss": longest[-1][2]}
    if result["plain_seconds"] and result["fast_seconds"]:
        result["ratio"] = round(result["plain_seconds"] / result["fast_seconds"], 2)
        print(f"to {config.target}: {result['plain_seconds']} s and {result['fast_seconds']} s, ratio {result['ratio']}")
    print(json.dumps(result))


def timed_run(name: str, config: Config, recipe: str, keys: dict[str, Any]) -> list[tuple[float, int, float]]:
    """Run train.py with a recipe; return (seconds of training, iteration, validation loss) of each evaluation.

    Raises UserError if train.py fails; it has printed why.
    """
    keys = keys | {"eval_iters": 0, "log_interval": 1, "seed": config.seed}
    command = ["train.py", recipe, *(f"--{key}={value}" for key, value in keys.items())]
    print(f"{name}: python {shlex.join(command)}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        finished = subprocess.run([sys.executable, *command, f"--out_dir={folder}"], cwd=ROOT, stdout=subprocess.DEVNULL)
        if finished.returncode:
            raise UserError(f"train.py failed with status {finished.returncode}; see its message above")
        rows = metrics.read_rows(Path(folder) / "metrics.csv")
    tokens_per_iteration = next(int(row["tokens"]) for row in rows if row["iteration"] == "1")
    evaluations, seconds = [], 0.0
    for row in rows:
        if row["val_loss"]:
            evaluations.append((seconds, int(row["iteration"]), float(row["val_loss"])))
        else:
            seconds += tokens_per_iteration / float(row["tokens_per_second"])
    seconds, iterations, loss = evaluations[-1]
    print(f"  {loss:.4f} after {iterations} iterations and {seconds:.1f} s", flush=True)
    return evaluations


def crossing(evaluations: list[tuple[float, int, float]], target: float) -> float | None:
    """Return the time at which the loss reached `target`, by linear interpolation; None if it did not."""
    for (before, _, above), (after, _, below) in itertools.pairwise(evaluations):
        if below <= target < above:
            return round(before + (after - before) * (above - target) / (above - below), 1)
    return None


# generation


def generation(config: Config) -> None:
    """Time generation as in sample.py and the baseline's, in turn; print tokens/s and their ratio.

    Each way has a process of its own, so that memory that it keeps is its own.
    """
    device = pick_device(config.device)
    weights = f"{sizing.empty_model(model_shape(config)).get_num_params() / 1e6:.2f}M random weights"
    B, tokens = config.batch_size or 1, (config.batch_size or 1) * config.new_tokens
    print(f"{name_of(config)}: {weights}, {B} x {config.new_tokens} tokens; {device_name(device)}, PyTorch {torch.__version__}")
    ways = ["fast", *([] if config.against == "nothing" else [config.against])]
    workers = {way: Worker(TextGenerator, config, way) for way in ways}

    # time both ways in turn
    for number in range(config.rounds):
        times = {way: worker.time_round(1) for way, worker in workers.items()}
        line = ", ".join(f"{way} {tokens / seconds:,.1f} tokens/s" for way, seconds in times.items())
        ratio = f", ratio {times[config.against] / times['fast']:.2f}" if config.against in times else ""
        print(f"round {number + 1}: {line}{ratio}", flush=True)

    # report medians
    result = {"what": "generation", "size": name_of(config), "device": device_name(device)}
    result |= {"batch_size": B, "new_tokens": config.new_tokens, "against": config.against}
    for way, worker in workers.items():
        megabytes, (dtype, late_speed) = worker.finish()
        speed = round(statistics.median(tokens / seconds for seconds in worker.times), 1)
        result |= {f"{way}_tokens_per_second": speed, f"{way}_megabytes": megabytes, f"{way}_dtype": dtype}
        print(f"{way}: median {speed:,.1f} tokens/s, peak memory {megabytes:,} MB")
        if late_speed:
            result[f"{way}_last_to_hundredth"] = late_speed
            print(f"{way}: speed of the last 50 tokens relative to those around the hundredth: {late_speed}")
    if config.against in workers:
        ratios = [slow / fast for fast, slow in zip(workers["fast"].times, workers[config.against].times, strict=True)]
        result["ratio"] = round(statistics.median(ratios), 2)
        print(f"median ratio: {result['ratio']}")
    print(json.dumps(result))


class TextGenerator:
    """One way to generate: a model with random weights and a random prompt. A step is a batch of whole texts."""

    def __init__(self, config: Config, way: str):
        """Set up sample.py's way ("fast"), nanoGPT's ("plain") or that of Hugging Face ("transformers")."""
        self.config, self.device = config, pick_device(config.device)
        set_up(self.device, config.seed)
        shape = model_shape(config)
        self.prompt = torch.randint(shape.vocab_size, (config.batch_size or 1, config.prompt_tokens), device=self.device)
        self.late_speeds: list[float] = []
        if way == "transformers":
            defaults_to_float32 = self.device == "cpu" and config.dtype in ("auto", "int8")
            self.dtype = pick_dtype("float32" if defaults_to_float32 else config.dtype, self.device)
            self.model, self.generate = hugging_face_model(shape).to(self.device, self.dtype), self.transformers
        elif way == "plain":
            self.dtype = pick_dtype(plain_settings(self.device)["dtype"], self.device)  # of products; weights are float32
            self.model, self.generate = GPT(shape).to(self.device), self.plain
        else:
            self.model, self.generate = GPT(shape), self.fast
            self.dtype = pick_generation_dtype(config.dtype, self.device, len(self.prompt), self.model.get_num_params())
            prepare_for_generation(self.model, self.device, self.dtype, len(self.prompt), config.compile is True)
        self.model.eval()
        self.description = str(self.dtype).removeprefix("torch.")

    def warm_up(self) -> float:
        """Generate once; return the seconds."""
        seconds = self.seconds_per_step(1)
        self.late_speeds.clear()
        return seconds

    def seconds_per_step(self, count: int) -> float:
        """Generate `count` times; return the mean time."""

        def run() -> None:
            for _ in range(count):
                self.generate()

        return timed(run, self.device) / count

    def report(self) -> tuple[str, float | None]:
        """Return the dtype, and the speed of the last 50 tokens relative to the 50 around the hundredth if there are 200."""
        return self.description, round(statistics.median(self.late_speeds), 2) if self.late_speeds else None

    def fast(self) -> None:
        """Generate as sample.py does, and time each token."""
        config, times = self.config, [time.perf_counter()]
        generators = text_generators(config.seed, range(len(self.prompt)), self.device)
        for token in self.model.stream(self.prompt, config.new_tokens, config.temperature, config.top_k, generators=generators):
            token.tolist()  # waits for the device
            times.append(time.perf_counter())
        seconds = [after - before for before, after in itertools.pairwise(times)]
        if len(seconds) >= 200:
            self.late_speeds.append(statistics.median(seconds[75:125]) / statistics.median(seconds[-50:]))

    @torch.no_grad()
    def plain(self) -> None:
        """Generate as nanoGPT's sample.py does: one text after the other, without a KV cache."""
        for row in self.prompt:
            text = row[None]
            for _ in range(self.config.new_tokens):
                with autocast(self.device, self.dtype):
                    logits, _ = self.model(text[:, -self.model.config.block_size :])
                text = torch.cat((text, sample_next(logits[:, -1], self.config.temperature, self.config.top_k)), dim=1)

    def transformers(self) -> None:
        """Generate with transformers and its KV cache."""
        config, count = self.config, self.config.new_tokens
        options = {"do_sample": True, "temperature": config.temperature, "top_k": config.top_k} if config.temperature else {}
        options |= {"max_new_tokens": count, "min_new_tokens": count, "pad_token_id": 0}
        self.model.generate(self.prompt, attention_mask=torch.ones_like(self.prompt), **options)


def hugging_face_model(shape: GPTConfig) -> torch.nn.Module:
    """Return a model of `shape` in Hugging Face transformers (a development dependency), with random weights."""
    from transformers import GPT2Config, GPT2LMHeadModel
    from transformers.utils import logging

    logging.set_verbosity_error()
    sizes = {"n_layer": shape.n_layer, "n_head": shape.n_head, "n_embd": shape.n_embd}
    return GPT2LMHeadModel(GPT2Config(**sizes, n_positions=shape.block_size, vocab_size=shape.vocab_size))


def timed(run: Callable[[], None], device: str) -> float:
    """Return the seconds that `run` takes, including work that it leaves to the device."""
    synchronize(device)
    started = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - started


if __name__ == "__main__":
    configurator.run(main, Config)
