"""Benchmark training, generation and the time to a loss, each against a baseline; or estimate a model size's FLOPs and memory.

python bench.py --size=laptop                            training steps, the fast way and the baseline in turn
python bench.py --size=gpt2 --batch_size=4 --block_size=256 --profile=True
python bench.py --what=generation --against=transformers
python bench.py --what=sizing --size=gpt2-xl
python bench.py --what=time_to_loss

The baseline, `plain`, is nanoGPT without torch.compile: float32, AdamW without a fused kernel, all logits at once, and
generation without a KV cache.
"""

import dataclasses
import itertools
import json
import multiprocessing
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import torch
from torch.nn.utils import clip_grad_norm_

import configurator
from configurator import LossRows, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Seed
from model import GPT, GPTConfig, sample_next
from nanogpt import metrics
from nanogpt.dataset import Dataset
from nanogpt.device import (
    Compile,
    Dtype,
    autocast,
    compile_model,
    keep_memory,
    peak_flops,
    peak_memory,
    pick_compile,
    pick_device,
    pick_dtype,
    pick_loss_rows,
    prepare_for_generation,
    set_up,
    synchronize,
    text_generators,
    to_device,
)
from nanogpt.distributed import clip_gradient
from nanogpt.errors import UserError
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
PLAIN = {"dtype": "float32", "compile": False, "fused": False, "loss_rows": 0, "keep_memory": False}

# time_to_loss: nanoGPT's hyperparameters, and the same model with the fast recipe, once as short as the target allows
BASELINE_RECIPE, FAST_RECIPE = "config/train_shakespeare_char_cpu.py", "config/train_shakespeare_char_fast.py"
SHORTEST = {"learning_rate": 1.5e-2, "warmup_iters": 0, "max_iters": 240, "lr_decay_iters": 240, "eval_interval": 60}


@dataclass(frozen=True)
class Config(configurator.Config):
    what: Literal["training", "generation", "sizing", "time_to_loss"] = "training"  # sizing estimates FLOPs and memory
    size: Literal["laptop", "shakespeare", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"] = "gpt2"  # model size
    against: Literal["plain", "transformers", "nothing"] = "plain"  # baseline: nanoGPT's settings, or transformers (generation)
    batch_size: NonNegativeInt = 0  # sequences per batch. 0: the recipe's for training, 1 for generation
    block_size: NonNegativeInt = 0  # tokens per training sequence. 0: the model's context
    rounds: PositiveInt = 3  # rounds; each times the fast run and the baseline once
    seed: Seed = 1337  # random seed
    # training
    steps: NonNegativeInt = 0  # training steps per round. 0: as many as take two seconds
    optimizer: Literal["adamw", "muon"] = "adamw"  # optimizer of the fast run
    real_data: bool = False  # train on the dataset instead of synthetic data (random tokens)
    dataset: str = "openwebtext"  # folder in data/ with train.bin and val.bin, for real_data
    profile: bool = False  # write trace.json, for ui.perfetto.dev, and list the operations that take the most time
    # generation
    prompt_tokens: PositiveInt = 8  # prompt length
    new_tokens: PositiveInt = 300  # tokens to generate
    temperature: NonNegativeFloat = 0.8  # as in sample.py
    top_k: NonNegativeInt = 200  # as in sample.py
    # time_to_loss
    target: PositiveFloat = 1.92  # validation loss to reach, on all of Tiny Shakespeare's val.bin
    # machine (for the fast run, as in train.py)
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: Dtype = "auto"  # mixed precision; in generation, also of weights. auto: bf16/fp16 where the device supports it
    compile: Compile = "auto"  # compile the model with torch.compile for training. auto: on CUDA
    fused: bool = True  # fused AdamW, on CUDA and CPUs
    loss_rows: LossRows = "auto"  # tokens per chunk of the cross-entropy; 0: no chunks. auto: 256 on a CPU if they save memory
    keep_memory: bool = True  # on Linux CPUs: reuse freed memory instead of returning it to the system

    def validate(self) -> None:
        if self.against == "transformers" and (self.what != "generation" or not self.size.startswith("gpt2")):
            raise UserError("--against=transformers needs --what=generation and a --size of GPT-2's, such as --size=gpt2")
        context = SIZES[self.size]["block_size"]
        if self.block_size > context:
            raise UserError(f"--block_size must be at most {context}, the context of {self.size}, got {self.block_size}")


def main(config: Config) -> None:
    {"training": training, "generation": generation, "sizing": sizing, "time_to_loss": time_to_loss}[config.what](config)


# training


def training(config: Config) -> None:
    """Time training steps the fast way and the baseline's, in turn; print tokens/s, peak memory and their ratio.

    Each way has a process of its own, so that its peak memory is its own.
    """
    device = pick_device(config.device)
    B, T = batch_shape(config)
    if config.real_data:
        Dataset(config.dataset).check(T, trained_shape(config).vocab_size)
    print(f"{config.size}: batches of {B} x {T} tokens; {device_name(device)}, PyTorch {torch.__version__}", flush=True)

    # start and warm up the processes, one after the other
    workers = {"fast": Worker(config, "fast")}
    print(f"fast: {workers['fast'].description}", flush=True)
    if config.against == "plain":
        workers["plain"] = Worker(config.replace(**PLAIN), "plain")
        print(f"plain: {workers['plain'].description}", flush=True)

    # time both ways in turn
    for number in range(config.rounds):
        times = {way: worker.time_round(config.steps) for way, worker in workers.items()}
        line = ", ".join(f"{way} {1e3 * seconds:,.1f} ms ({B * T / seconds:,.0f} tokens/s)" for way, seconds in times.items())
        ratio = f", ratio {times['plain'] / times['fast']:.2f}" if "plain" in times else ""
        print(f"round {number + 1}: {line}{ratio}", flush=True)

    # report medians
    result = {"what": "training", "size": config.size, "device": device_name(device), "batch_size": B, "block_size": T}
    for way, worker in workers.items():
        megabytes, peak = worker.finish()
        tokens_per_second = B * T / statistics.median(worker.times)
        share = trained_flops(config) * tokens_per_second / peak
        result |= {f"{way}_tokens_per_second": round(tokens_per_second, 1), f"{way}_megabytes": megabytes}
        result |= {f"{way}_share": round(share, 3)}
        source = "data sheet" if device.startswith("cuda") else "measured matrix products"
        print(
            f"{way}: median {tokens_per_second:,.1f} tokens/s, {share:.1%} of {peak / 1e12:.2f} TFLOP/s ({source}), "
            f"peak memory {megabytes:,} MB"
        )
    if "plain" in workers:
        ratios = [plain / fast for fast, plain in zip(workers["fast"].times, workers["plain"].times, strict=True)]
        result["ratio"] = round(statistics.median(ratios), 2)
        print(f"median ratio: {result['ratio']}")
    print(json.dumps(result))


class Worker:
    """A process that trains one way and times its steps on request."""

    def __init__(self, config: Config, way: str):
        """Start the process, and return when it has warmed up."""
        self._pipe, other = multiprocessing.Pipe()
        spawn = multiprocessing.get_context("spawn")
        self._process = spawn.Process(target=work, args=(other, config, way), daemon=True)
        self._process.start()
        other.close()
        self.description, self._first_seconds = self._pipe.recv()
        self.times: list[float] = []  # seconds per step in each round

    def time_round(self, steps: int) -> float:
        """Train for `steps` steps, or ROUND_SECONDS if that is 0; return the seconds per step."""
        self._pipe.send(steps or max(1, round(ROUND_SECONDS / self._first_seconds)))
        self.times.append(self._pipe.recv())
        return self.times[-1]

    def finish(self) -> tuple[int, float]:
        """End the process; return its peak memory in MB and its device's peak in FLOP/s."""
        self._pipe.send(0)
        found = self._pipe.recv()
        self._process.join()
        return found


def work(pipe: Connection, config: Config, way: str) -> None:
    """The process of a Worker: warm up, time as many steps as it asks for, until 0, and report memory and peak."""
    trainer = Trainer(config, way)
    trainer.seconds_per_step(WARMUP_STEPS)
    pipe.send((trainer.description, trainer.seconds_per_step(1)))
    while steps := pipe.recv():
        pipe.send(trainer.seconds_per_step(steps))
    megabytes = round((peak_memory(trainer.device) or 0) / 1e6)
    peak = peak_flops(trainer.device, trainer.dtype) or measured_peak(trainer.device, trainer.dtype)
    if config.profile and way == "fast":
        trainer.profile()
    pipe.send((megabytes, peak))


class Trainer:
    """One way to train: a model, its optimizer and its batches."""

    def __init__(self, config: Config, way: str):
        """Set up the "fast" or the "plain" way with the settings of `config`."""
        self.config = config
        self.device = pick_device(config.device)
        self.dtype = pick_dtype(config.dtype, self.device)
        set_up(self.device, config.seed)
        memory_kept = config.keep_memory and self.device == "cpu" and keep_memory()

        # model and optimizer
        self.shape, (B, T) = trained_shape(config), batch_shape(config)
        self.model = GPT(self.shape).to(self.device)
        muon = config.optimizer == "muon" and way == "fast"
        device_type = torch.device(self.device).type
        self.optimizer = build_optimizer(
            self.model, "muon" if muon else "adamw", 0.1, 1e-4, (0.9, 0.95), device_type, config.fused
        )
        self.clip = clip_gradient if way == "fast" else plain_clip
        is_compiled = pick_compile(config.compile, self.device)
        self.network = compile_model(self.model) if is_compiled else self.model
        self.loss_rows = pick_loss_rows(config.loss_rows, self.device, B * T, self.shape.vocab_size)

        # batches
        self.data = Dataset(config.dataset) if config.real_data else None
        self.generator = torch.Generator().manual_seed(config.seed)

        parts = [str(self.dtype).removeprefix("torch."), "compiled" if is_compiled else "not compiled"]
        parts += ["Muon and AdamW" if muon else "fused AdamW" if config.fused else "AdamW"]
        parts += [f"loss in chunks of {self.loss_rows}"] * (self.loss_rows > 0) + ["memory kept"] * memory_kept
        self.description = ", ".join(parts)

    def batch(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return inputs and targets, (B, T) each, on the CPU."""
        (B, T), vocab_size = batch_shape(self.config), self.shape.vocab_size
        if self.data is None:
            return torch.randint(vocab_size, (2, B, T), generator=self.generator).unbind()
        positions = self.data.draw("train", "train", self.config.seed, number, B, T)
        return self.data.windows("train", positions, T, vocab_size)

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

    def seconds_per_step(self, count: int) -> float:
        """Do `count` steps; return their mean time."""

        def run() -> None:
            for number in range(count):
                self.step(number)

        return timed(run, self.device) / count

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


def batch_shape(config: Config) -> tuple[int, int]:
    """Return the sequences per batch and the tokens per sequence."""
    return config.batch_size or BATCH_SIZES.get(config.size, 12), config.block_size or SIZES[config.size]["block_size"]


def trained_shape(config: Config) -> GPTConfig:
    """Return the model's shape as train.py makes it from scratch."""
    changes = FROM_SCRATCH if config.size.startswith("gpt2") else {}
    return GPTConfig(**SIZES[config.size] | changes)


def trained_flops(config: Config) -> float:
    """Return the training FLOPs per token, for attention over sequences of the batch's length."""
    with torch.device("meta"):
        model = GPT(dataclasses.replace(trained_shape(config), block_size=batch_shape(config)[1]))
    return model.flops_per_token()


def measured_peak(device: str, dtype: torch.dtype, size: int = 1024) -> float:
    """Measure the FLOP/s of a product of two square matrices."""
    a, b = torch.randn(2, size, size, device=device).to(dtype).unbind()
    seconds = [timed(lambda: a @ b, device) for _ in range(20)]
    return 2 * size**3 / statistics.median(seconds[5:])


def device_name(device: str) -> str:
    """Return the name of the GPU, or the number of CPU threads."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{device}, {torch.get_num_threads()} threads" if device == "cpu" else device


# sizing


def sizing(config: Config) -> None:
    """Print a size's parameters by part, training FLOPs, training memory, and compute-optimal number of tokens."""
    shape = trained_shape(config)
    B, T = batch_shape(config)
    with torch.device("meta"):
        model = GPT(shape)

    # parameters
    parts = {"token embedding, and head": model.transformer.wte, "positions": model.transformer.wpe}
    block = model.transformer.h[0]
    parts |= {"attention": block.attn, "MLP": block.mlp}
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    counts["LayerNorms"] = sum(p.numel() for name, p in model.named_parameters() if "ln_" in name)
    for name in ("attention", "MLP"):
        counts[name] *= shape.n_layer
    total = model.get_num_params(non_embedding=False)
    assert sum(counts.values()) == total
    print(f"{config.size}: {shape.n_layer} layers, {shape.n_head} heads, {shape.n_embd} channels, context {shape.block_size}")
    for name, count in counts.items():
        print(f"  {name:26} {count:>14,} parameters  {count / total:6.1%}")
    print(f"  {'total':26} {total:>14,}")

    # FLOPs
    flops = trained_flops(config)
    batch_flops = flops * B * T
    print(f"training: {flops / 1e9:,.2f} GFLOP per token (6N + 12LHQT), {batch_flops / 1e12:,.2f} TFLOP per batch of {B} x {T}")

    # memory
    logits = 4 * B * T * shape.vocab_size
    rows = pick_loss_rows("auto", "cpu", B * T, shape.vocab_size)
    memory = {"weights, float32": 4 * total, "gradients": 4 * total, "AdamW's two moments": 8 * total}
    memory["activations, 16 bits, about"] = 34 * B * T * shape.n_embd * shape.n_layer
    memory["logits, float32, all at once"] = logits
    if rows:
        memory[f"logits, {rows} rows at a time"] = logits * rows / (B * T)
    memory["checkpoint"] = 12 * total
    for name, size in memory.items():
        print(f"  {name:29} {size / 1e9:>9,.2f} GB")

    # tokens
    print(f"compute-optimal: about {20 * total / 1e9:,.1f} billion tokens, 20 per parameter (Hoffmann et al. 2022)")
    print(json.dumps({"size": config.size, "parameters": total, "flops_per_token": flops, "optimal_tokens": 20 * total}))


# time to a loss


def time_to_loss(config: Config) -> None:
    """Train the laptop model on Tiny Shakespeare the plain way and the fast way; print when each reaches the target loss.

    A third run trains the fast way for as long as the plain way takes. Only training is timed, not the evaluations, which
    run on the whole validation split.
    """
    plain = timed_run("plain", config, BASELINE_RECIPE, PLAIN | {"eval_interval": 250})
    fast = timed_run("fast", config, FAST_RECIPE, SHORTEST)
    steps = int(plain[-1][0] * fast[-1][1] / fast[-1][0])
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
    """Run train.py with a recipe; return (seconds of training, iteration, validation loss) of each evaluation."""
    keys = keys | {"eval_iters": 0, "log_interval": 1, "seed": config.seed}
    command = ["train.py", recipe, *(f"--{key}={value}" for key, value in keys.items())]
    print(f"{name}: python {shlex.join(command)}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, *command, f"--out_dir={folder}"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
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
    """Time generation as in sample.py and the baseline's, in turn, in this process; print tokens/s and their ratio."""
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    set_up(device, config.seed)

    # prompt, baseline and model
    shape = GPTConfig(**SIZES[config.size])
    idx = torch.randint(shape.vocab_size, (config.batch_size or 1, config.prompt_tokens), device=device)
    baseline = {"plain": plain, "transformers": transformers, "nothing": None}[config.against]
    run_baseline = baseline(shape, idx, config, device, dtype) if baseline else None
    model = GPT(shape)
    print(f"{config.size}: {model.get_num_params() / 1e6:.2f}M random weights; {device}, {dtype}, PyTorch {torch.__version__}")
    prepare_for_generation(model, device, dtype)

    # time both in turn; the first round is a warmup
    tokens = idx.size(0) * config.new_tokens
    token_times: list[float] = []  # of one round
    speeds, ratios, late_speeds = [], [], []
    for number in range(-1, config.rounds):
        seconds = timed(lambda: generate(model, idx, config, device, token_times), device)
        baseline_seconds = timed(run_baseline, device) if run_baseline else None
        if number < 0:
            continue
        speeds.append(tokens / seconds)
        line = f"round {number + 1}: {speeds[-1]:,.1f} tokens/s"
        if baseline_seconds:
            ratios.append(baseline_seconds / seconds)
            line += f", {config.against} {tokens / baseline_seconds:,.1f}, ratio {ratios[-1]:.2f}"
        print(line, flush=True)
        if len(token_times) >= 200:
            late_speeds.append(statistics.median(token_times[75:125]) / statistics.median(token_times[-50:]))

    # report medians
    result = {"what": "generation", "size": config.size, "dtype": str(dtype).removeprefix("torch."), "device": device}
    result |= {"batch_size": idx.size(0), "new_tokens": config.new_tokens}
    result["tokens_per_second"] = round(statistics.median(speeds), 1)
    if late_speeds:
        result["last_to_hundredth"] = round(statistics.median(late_speeds), 2)
        print(f"speed of the last 50 tokens relative to those around the hundredth: {result['last_to_hundredth']}")
    if ratios:
        result |= {"against": config.against, "ratio": round(statistics.median(ratios), 2)}
    print(f"median: {result['tokens_per_second']:,.1f} tokens/s" + (f", ratio {result['ratio']:.2f}" if ratios else ""))
    print(json.dumps(result))


def generate(model: GPT, idx: torch.Tensor, config: Config, device: str, token_times: list[float]) -> None:
    """Generate as sample.py does; fill `token_times` with the seconds of each token."""
    token_times.clear()
    generators = text_generators(config.seed, range(len(idx)), device)
    before = time.perf_counter()
    for token in model.stream(idx, config.new_tokens, config.temperature, config.top_k, generators=generators):
        token.tolist()  # waits for the device
        now = time.perf_counter()
        token_times.append(now - before)
        before = now


def plain(shape: GPTConfig, idx: torch.Tensor, config: Config, device: str, dtype: torch.dtype) -> Callable[[], None]:
    """Return a function that generates as nanoGPT does: in float32, one text after the other, without a KV cache."""
    model = GPT(shape).eval().to(device)

    @torch.no_grad()
    def run() -> None:
        for row in idx:
            text = row[None]
            for _ in range(config.new_tokens):
                logits, _ = model(text[:, -shape.block_size :])
                text = torch.cat((text, sample_next(logits[:, -1], config.temperature, config.top_k)), dim=1)

    return run


def transformers(shape: GPTConfig, idx: torch.Tensor, config: Config, device: str, dtype: torch.dtype) -> Callable[[], None]:
    """Return a function that generates with Hugging Face transformers (a development dependency) and its KV cache."""
    from transformers import GPT2Config, GPT2LMHeadModel
    from transformers.utils import logging

    logging.set_verbosity_error()
    sizes = {"n_layer": shape.n_layer, "n_head": shape.n_head, "n_embd": shape.n_embd}
    model = GPT2LMHeadModel(GPT2Config(**sizes)).to(device, dtype).eval()
    options = {"do_sample": True, "temperature": config.temperature, "top_k": config.top_k} if config.temperature else {}
    count = config.new_tokens

    def run() -> None:
        mask = torch.ones_like(idx)
        model.generate(idx, attention_mask=mask, max_new_tokens=count, min_new_tokens=count, pad_token_id=50256, **options)

    return run


def timed(run: Callable[[], None], device: str) -> float:
    """Return the seconds that `run` takes, including work that it leaves to the device."""
    synchronize(device)
    started = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - started


if __name__ == "__main__":
    configurator.run(main, Config)
