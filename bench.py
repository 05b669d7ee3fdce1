"""Measure this machine: training, generation and the time to a loss, each against the plain way; or work out what a size takes.

python bench.py --size=laptop                            training steps, fast and plain in turn
python bench.py --size=gpt2 --batch_size=4 --block_size=256 --profile=True
python bench.py --what=generation --against=transformers
python bench.py --what=sizing --size=gpt2-xl
python bench.py --what=time_to_loss

The plain way is nanoGPT's on a machine without torch.compile: float32, AdamW without a fused kernel, all logits at once.
"""

import dataclasses
import itertools
import json
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch.nn.utils import clip_grad_norm_

import configurator
from configurator import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Seed
from model import GPT, GPTConfig, sample_next
from nanogpt import device, distributed, metrics
from nanogpt.dataset import Dataset
from nanogpt.device import Compile, Dtype
from nanogpt.errors import UserError
from nanogpt.optim import build_optimizer

ROOT = Path(__file__).resolve().parent
TRACE = "trace.json"

SIZES = {
    "laptop": {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 64, "vocab_size": 65, "bias": False},
    "shakespeare": {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "vocab_size": 65, "bias": False},
    "gpt2": {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024, "vocab_size": 50257, "gelu": "tanh"},
    "gpt2-medium": {"n_layer": 24, "n_head": 16, "n_embd": 1024, "block_size": 1024, "vocab_size": 50257, "gelu": "tanh"},
    "gpt2-large": {"n_layer": 36, "n_head": 20, "n_embd": 1280, "block_size": 1024, "vocab_size": 50257, "gelu": "tanh"},
    "gpt2-xl": {"n_layer": 48, "n_head": 25, "n_embd": 1600, "block_size": 1024, "vocab_size": 50257, "gelu": "tanh"},
}
BATCHES = {"laptop": 12, "shakespeare": 64}  # windows in a batch of the recipe of that size; of the others, nanoGPT's 12
TRAINED = {"vocab_size": 50304, "bias": False, "gelu": "erf"}  # how train.py makes a model of GPT-2's shape from scratch
PLAIN = {"dtype": "float32", "compile": False, "fused": False, "loss_rows": 0, "keep_memory": False}

# What time_to_loss runs: nanoGPT's hyperparameters the plain way, and the same model from the fast recipe, as short as it
# can be for the target, and as long as the plain way takes.
LAPTOP, FAST = "config/train_shakespeare_char_cpu.py", "config/train_shakespeare_char_fast.py"
SOONEST = {"learning_rate": 1.5e-2, "warmup_iters": 0, "max_iters": 240, "lr_decay_iters": 240, "eval_interval": 60}


@dataclass
class Config(configurator.Config):
    what: Literal["training", "generation", "sizing", "time_to_loss"] = "training"  # to measure; sizing only computes
    size: Literal["laptop", "shakespeare", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"] = "gpt2"  # of the model
    against: Literal["plain", "transformers", "nothing"] = "plain"  # plain: what nanoGPT does; transformers: generation only
    batch_size: NonNegativeInt = 0  # windows in a batch, texts in generation. 0: the recipe's, and one text
    block_size: NonNegativeInt = 0  # tokens in a window. 0: the size's context
    rounds: PositiveInt = 3  # in each of which both are timed once
    seed: Seed = 1337  # of weights, batches and texts
    # training
    steps: NonNegativeInt = 0  # training steps in a round. 0: as many as take two seconds
    optimizer: Literal["adamw", "muon"] = "adamw"  # of the fast way
    real_data: bool = False  # windows of the dataset rather than random tokens
    dataset: str = "openwebtext"  # a folder of data/ with train.bin and val.bin
    profile: bool = False  # write trace.json, for ui.perfetto.dev, and the operations that took the most time
    # generation
    prompt_tokens: PositiveInt = 8  # tokens that are there
    new_tokens: PositiveInt = 300  # tokens to generate
    temperature: NonNegativeFloat = 0.8  # as in sample.py
    top_k: NonNegativeInt = 200  # as in sample.py
    # time_to_loss
    target: PositiveFloat = 1.92  # validation loss on all of Tiny Shakespeare's val.bin
    # machine: the fast way, as in train.py
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: Dtype = "auto"  # of matrix products, in generation also of weights. auto: 16 bits where the device is made for it
    compile: Compile = "auto"  # compile the model with torch.compile for training. auto: on CUDA
    fused: bool = True  # AdamW as one kernel, on CUDA and CPUs
    loss_rows: Annotated[int | Literal["auto"], configurator.Range(at_least=0)] = (
        "auto"  # positions whose logits are there at a time; 0: all. auto: 256 on a CPU where all are many
    )
    keep_memory: bool = True  # on a CPU under Linux: keep the memory of tensors for those of the next step

    def validate(self) -> None:
        if self.against == "transformers" and (self.what != "generation" or not self.size.startswith("gpt2")):
            raise UserError(
                "--against=transformers compares generation by models of GPT-2's shape: --what=generation --size=gpt2"
            )
        if self.block_size > SIZES[self.size]["block_size"]:
            raise UserError(f"--block_size={self.block_size}: {self.size} has a context of {SIZES[self.size]['block_size']}")


def main(config: Config) -> None:
    {"training": training, "generation": generation, "sizing": sizing, "time_to_loss": time_to_loss}[config.what](config)


# training


def training(config: Config) -> None:
    """Time training steps of the fast and the plain way in turn, each in a process of its own, whose memory is its own."""
    where = device.pick_device(config.device)
    B, T = batch_shape(config)
    if config.real_data:
        Dataset(config.dataset).check(T, trained_shape(config).vocab_size)
    print(f"{config.size}: batches of {B} x {T} tokens; {device_name(where)}, PyTorch {torch.__version__}", flush=True)
    ways = {"fast": config} | ({"plain": dataclasses.replace(config, **PLAIN)} if config.against == "plain" else {})
    pipes: dict[str, Connection] = {}
    found: dict[str, dict[str, Any]] = {}
    for way, settings in ways.items():
        pipes[way], other = multiprocessing.Pipe()
        process = multiprocessing.get_context("spawn").Process(target=work, args=(other, settings, way), daemon=True)
        process.start()
        other.close()
        found[way] = pipes[way].recv()
        print(f"{way}: {found[way]['made_of']}", flush=True)
    times: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(config.rounds):
        for way, pipe in pipes.items():
            pipe.send(config.steps or max(1, round(2 / found[way]["seconds"])))
            times[way].append(pipe.recv())
        line = ", ".join(f"{way} {1e3 * times[way][-1]:,.1f} ms ({B * T / times[way][-1]:,.0f} tokens/s)" for way in ways)
        ratio = f", ratio {times['plain'][-1] / times['fast'][-1]:.2f}" if "plain" in ways else ""
        print(f"round {number + 1}: {line}{ratio}", flush=True)
    result = {"what": "training", "size": config.size, "device": device_name(where), "batch_size": B, "block_size": T}
    for way, pipe in pipes.items():
        pipe.send(0)
        megabytes, peak = pipe.recv()
        seconds = statistics.median(times[way])
        share = trained_flops(config) * B * T / seconds / peak
        result |= {f"{way}_tokens_per_second": round(B * T / seconds, 1), f"{way}_megabytes": megabytes}
        result |= {f"{way}_share": round(share, 3)}
        print(
            f"{way}: median {B * T / seconds:,.1f} tokens/s, {share:.1%} of {peak / 1e12:.2f} TFLOP/s "
            f"({'data sheet' if where.startswith('cuda') else 'measured products'}), peak memory {megabytes:,} MB"
        )
    if "plain" in ways:
        ratios = [plain / fast for fast, plain in zip(times["fast"], times["plain"], strict=True)]
        result["ratio"] = round(statistics.median(ratios), 2)
        print(f"median ratio: {result['ratio']}")
    print(json.dumps(result))


def work(pipe: Connection, config: Config, way: str) -> None:
    """Do training steps as a process of `training` asks for them; tell it the seconds of one, and at the end the memory."""
    where = device.pick_device(config.device)
    dtype = device.pick_dtype(config.dtype, where)
    device.set_up(where, config.seed)
    kept = config.keep_memory and where == "cpu" and device.keep_memory()
    shape = trained_shape(config)
    B, T = batch_shape(config)
    model = GPT(shape).to(where)
    device_type = torch.device(where).type
    muon = config.optimizer == "muon" and way == "fast"
    optimizer = build_optimizer(model, "muon" if muon else "adamw", 0.1, 1e-4, (0.9, 0.95), device_type, config.fused)
    is_compiled = device.pick_compile(config.compile, where)
    network = device.compile_model(model) if is_compiled else model
    rows = device.pick_loss_rows(config.loss_rows, where, B * T, shape.vocab_size)
    data = Dataset(config.dataset) if config.real_data else None
    generator = torch.Generator().manual_seed(config.seed)
    clip = distributed.clip_gradient if way == "fast" else lambda model, limit: clip_grad_norm_(model.parameters(), limit)

    def step(number: int) -> None:
        if data is None:
            batch = torch.randint(shape.vocab_size, (2, B, T), generator=generator).unbind()
        else:
            batch = data.windows("train", data.draw("train", "train", config.seed, number, B, T), T, shape.vocab_size)
        x, y = device.to_device(tuple(batch), where)
        with device.autocast(where, dtype):
            _, loss = network(x, y, loss_rows=rows)
        loss.backward()
        clip(model, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()

    def steps(count: int) -> float:
        device.synchronize(where)
        began = time.perf_counter()
        for number in range(count):
            step(number)
        device.synchronize(where)
        return (time.perf_counter() - began) / count

    steps(3)
    made_of = [str(dtype).removeprefix("torch."), "compiled" if is_compiled else "not compiled"]
    made_of += ["Muon and AdamW" if muon else "fused AdamW" if config.fused else "AdamW"]
    made_of += [f"loss in chunks of {rows}"] * (rows > 0) + ["memory kept"] * kept
    pipe.send({"made_of": ", ".join(made_of), "seconds": steps(1)})
    while count := pipe.recv():
        pipe.send(steps(count))
    memory = device.peak_memory(where) or 0
    if config.profile and way == "fast":
        activities = [torch.profiler.ProfilerActivity.CPU]
        activities += [torch.profiler.ProfilerActivity.CUDA] * where.startswith("cuda")
        with torch.profiler.profile(activities=activities) as profile:
            steps(3)
        profile.export_chrome_trace(TRACE)
        print(profile.key_averages().table(sort_by=f"self_{device_type}_time_total", row_limit=15, max_name_column_width=45))
        print(f"wrote {TRACE}, to be opened in ui.perfetto.dev or chrome://tracing", flush=True)
    pipe.send((round(memory / 1e6), device.peak_flops(where, dtype) or measured_peak(where, dtype)))  # last: it ends the bench


def batch_shape(config: Config) -> tuple[int, int]:
    """Return the windows in a batch and the tokens in a window."""
    return config.batch_size or BATCHES.get(config.size, 12), config.block_size or SIZES[config.size]["block_size"]


def trained_shape(config: Config) -> GPTConfig:
    """Return the shape of a model of the size, as train.py makes it."""
    changes = TRAINED if config.size.startswith("gpt2") else {}
    return GPTConfig(**SIZES[config.size] | changes)


def trained_flops(config: Config) -> float:
    """Return the FLOPs of training on a token, with the windows' length as the context."""
    with torch.device("meta"):
        model = GPT(dataclasses.replace(trained_shape(config), block_size=batch_shape(config)[1]))
    return model.flops_per_token()


def measured_peak(where: str, dtype: torch.dtype, size: int = 1024) -> float:
    """Return the FLOP/s that products of two square matrices reach."""
    a, b = torch.randn(2, size, size, device=where).to(dtype).unbind()
    seconds = [timed(lambda: a @ b, where) for _ in range(20)]
    return 2 * size**3 / statistics.median(seconds[5:])


def device_name(where: str) -> str:
    """Return what people call the device."""
    if where.startswith("cuda"):
        return torch.cuda.get_device_name(where)
    return f"{where}, {torch.get_num_threads()} threads" if where == "cpu" else where


# what a size takes


def sizing(config: Config) -> None:
    """Print parameters by part, FLOPs, memory, and how many tokens such a model should see."""
    shape = trained_shape(config)
    B, T = batch_shape(config)
    with torch.device("meta"):
        model = GPT(shape)
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
    print(f"  {'all':26} {total:>14,}")
    flops = trained_flops(config)
    print(
        f"training takes {flops / 1e9:,.2f} GFLOP a token (6N + 12LHQT), a batch of {B} x {T} {flops * B * T / 1e12:,.2f} TFLOP"
    )
    activations = 34 * B * T * shape.n_embd * shape.n_layer
    logits = 4 * B * T * shape.vocab_size
    rows = device.pick_loss_rows("auto", "cpu", B * T, shape.vocab_size)
    memory = {"weights, float32": 4 * total, "gradients": 4 * total, "AdamW's two moments": 8 * total}
    memory |= {"activations, 16 bits, about": activations, "logits, float32, all at once": logits}
    for name, size in memory.items():
        print(f"  {name:29} {size / 1e9:>9,.2f} GB")
    if rows:
        print(f"  {f'the same, {rows} at a time':29} {logits * rows / (B * T) / 1e9:>9,.2f} GB")
    print(f"  {'checkpoint':29} {12 * total / 1e9:>9,.2f} GB")
    print(f"compute-optimal training sees about {20 * total / 1e9:,.1f} billion tokens, 20 a parameter (Hoffmann et al. 2022)")
    print(json.dumps({"size": config.size, "parameters": total, "flops_per_token": flops, "optimal_tokens": 20 * total}))


# time to a loss


def time_to_loss(config: Config) -> None:
    """Train the laptop model on Tiny Shakespeare until its loss is the target, and for as long as the plain way takes.

    The clock runs during training only: the evaluations, each of the whole validation split, belong to the measurement.
    """
    plain = timed_run("plain", config, LAPTOP, PLAIN | {"eval_interval": 250})
    fast = timed_run("fast", config, FAST, SOONEST)
    steps = int(plain[-1][0] * fast[-1][1] / fast[-1][0])
    longest = timed_run("as long", config, FAST, {"max_iters": steps, "lr_decay_iters": steps, "eval_interval": steps})
    result: dict[str, Any] = {"what": "time_to_loss", "target": config.target}
    for name, found in (("plain", plain), ("fast", fast)):
        result[f"{name}_seconds"] = crossing(found, config.target)
    result |= {"plain_final_loss": plain[-1][2], "fast_final_loss": longest[-1][2]}
    if result["plain_seconds"] and result["fast_seconds"]:
        result["ratio"] = round(result["plain_seconds"] / result["fast_seconds"], 2)
        print(f"to {config.target}: {result['plain_seconds']} s and {result['fast_seconds']} s, ratio {result['ratio']}")
    print(json.dumps(result))


def timed_run(name: str, config: Config, recipe: str, keys: dict[str, Any]) -> list[tuple[float, int, float]]:
    """Run train.py with a recipe; return the seconds of training, the iteration and the loss of each evaluation."""
    keys = keys | {"eval_iters": 0, "log_interval": 1, "seed": config.seed}
    command = ["train.py", recipe, *(f"--{key}={value}" for key, value in keys.items())]
    print(f"{name}: python {' '.join(command)}", flush=True)
    found, seconds = [], 0.0
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, *command, f"--out_dir={folder}"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        rows = metrics.read_rows(Path(folder) / "metrics.csv")
    tokens = next(int(row["tokens"]) for row in rows if row["iteration"] == "1")  # of an iteration
    for row in rows:
        if row["val_loss"]:
            found.append((seconds, int(row["iteration"]), float(row["val_loss"])))
        else:
            seconds += tokens / float(row["tokens_per_second"])
    seconds, iterations, loss = found[-1]
    print(f"  {loss:.4f} after {iterations} iterations and {seconds:.1f} s", flush=True)
    return found


def crossing(found: list[tuple[float, int, float]], target: float) -> float | None:
    """Return when the loss came to `target`, on the line between two evaluations; None where it never did."""
    for (before, _, above), (after, _, below) in itertools.pairwise(found):
        if below <= target < above:
            return round(before + (after - before) * (above - target) / (above - below), 1)
    return None


# generation


def generation(config: Config) -> None:
    """Time the generation of text in this process, and the other way to do it in turn."""
    where = device.pick_device(config.device)
    dtype = device.pick_dtype(config.dtype, where)
    device.set_up(where, config.seed)
    shape = GPTConfig(**SIZES[config.size])
    idx = torch.randint(shape.vocab_size, (config.batch_size or 1, config.prompt_tokens), device=where)
    other = {"plain": plain, "transformers": transformers, "nothing": None}[config.against]
    run_other = other(shape, idx, config, where, dtype) if other else None
    model = GPT(shape)
    print(f"{config.size}: {model.get_num_params() / 1e6:.2f}M random weights; {where}, {dtype}, PyTorch {torch.__version__}")
    device.prepare_for_generation(model, where, dtype)
    times: list[float] = []  # of each token of a round
    speeds, ratios, slowings = [], [], []
    for number in range(-1, config.rounds):  # the first warms up
        seconds = timed(lambda: generate(model, idx, config, where, times), where)
        other_seconds = timed(run_other, where) if run_other else None
        if number < 0:
            continue
        speeds.append(idx.size(0) * config.new_tokens / seconds)
        line = f"round {number + 1}: {speeds[-1]:,.1f} tokens/s"
        if other_seconds:
            ratios.append(other_seconds / seconds)
            line += f", {config.against} {idx.size(0) * config.new_tokens / other_seconds:,.1f}, ratio {ratios[-1]:.2f}"
        print(line, flush=True)
        if len(times) >= 200:
            slowings.append(statistics.median(times[75:125]) / statistics.median(times[-50:]))
    result = {
        "what": "generation",
        "size": config.size,
        "dtype": str(dtype).removeprefix("torch."),
        "device": where,
        "batch_size": idx.size(0),
    }
    result |= {"new_tokens": config.new_tokens, "tokens_per_second": round(statistics.median(speeds), 1)}
    if slowings:
        result["last_to_hundredth"] = round(statistics.median(slowings), 2)
        print(f"speed of the last 50 tokens to that around the hundredth: {result['last_to_hundredth']}")
    if ratios:
        result |= {"against": config.against, "ratio": round(statistics.median(ratios), 2)}
    print(f"median: {result['tokens_per_second']:,.1f} tokens/s" + (f", ratio {result['ratio']:.2f}" if ratios else ""))
    print(json.dumps(result))


def generate(model: GPT, idx: torch.Tensor, config: Config, where: str, times: list[float]) -> None:
    """Generate as sample.py does; leave the seconds that each token took in `times`."""
    del times[:]
    generators = device.text_generators(config.seed, range(len(idx)), where)
    then = time.perf_counter()
    for token in model.stream(idx, config.new_tokens, config.temperature, config.top_k, generators=generators):
        token.tolist()
        now = time.perf_counter()
        times.append(now - then)
        then = now


def plain(shape: GPTConfig, idx: torch.Tensor, config: Config, where: str, dtype: torch.dtype) -> Callable[[], None]:
    """Return what generates as nanoGPT does: in float32, text by text, the whole context anew for each token."""
    model = GPT(shape).eval().to(where)

    @torch.no_grad()
    def run() -> None:
        for row in idx:
            text = row[None]
            for _ in range(config.new_tokens):
                logits, _ = model(text[:, -shape.block_size :])
                text = torch.cat((text, sample_next(logits[:, -1], config.temperature, config.top_k)), dim=1)

    return run


def transformers(shape: GPTConfig, idx: torch.Tensor, config: Config, where: str, dtype: torch.dtype) -> Callable[[], None]:
    """Return what generates with the cached `generate` of Hugging Face's transformers, a development dependency."""
    from transformers import GPT2Config, GPT2LMHeadModel
    from transformers.utils import logging

    logging.set_verbosity_error()
    sizes = {"n_layer": shape.n_layer, "n_head": shape.n_head, "n_embd": shape.n_embd}
    model = GPT2LMHeadModel(GPT2Config(**sizes)).to(where, dtype).eval()
    options = {"do_sample": True, "temperature": config.temperature, "top_k": config.top_k} if config.temperature else {}
    count = config.new_tokens

    def run() -> None:
        mask = torch.ones_like(idx)
        model.generate(idx, attention_mask=mask, max_new_tokens=count, min_new_tokens=count, pad_token_id=50256, **options)

    return run


def timed(run: Callable[[], None], where: str) -> float:
    """Return the seconds that `run` takes."""
    device.synchronize(where)
    began = time.perf_counter()
    run()
    device.synchronize(where)
    return time.perf_counter() - began


if __name__ == "__main__":
    configurator.run(main, Config)
