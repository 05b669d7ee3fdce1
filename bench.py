"""Measure how fast models of known sizes generate text on this machine, against the plain way or Hugging Face's.

python bench.py --size=gpt2 --dtype=bfloat16                         this repo against what nanoGPT does
python bench.py --size=gpt2 --dtype=bfloat16 --against=transformers  this repo against a cached generate
"""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

import configurator
import device
from configurator import NonNegativeFloat, NonNegativeInt, PositiveInt, Seed, UserError
from device import Dtype
from model import GPT, GPTConfig, sample_next

SIZES = {
    "laptop": {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 64, "vocab_size": 65, "bias": False},
    "shakespeare": {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "vocab_size": 65, "bias": False},
    "gpt2": {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024, "vocab_size": 50257, "gelu": "tanh"},
    "gpt2-medium": {"n_layer": 24, "n_head": 16, "n_embd": 1024, "block_size": 1024, "vocab_size": 50257, "gelu": "tanh"},
    "gpt2-large": {"n_layer": 36, "n_head": 20, "n_embd": 1280, "block_size": 1024, "vocab_size": 50257, "gelu": "tanh"},
    "gpt2-xl": {"n_layer": 48, "n_head": 25, "n_embd": 1600, "block_size": 1024, "vocab_size": 50257, "gelu": "tanh"},
}


@dataclass
class Config(configurator.Config):
    size: Literal["laptop", "shakespeare", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"] = "gpt2"  # of the model
    against: Literal["plain", "transformers", "nothing"] = "plain"  # plain: float32, one text after the other, no cache
    batch_size: PositiveInt = 1  # texts
    prompt_tokens: PositiveInt = 8  # tokens that are there
    new_tokens: PositiveInt = 300  # tokens to generate
    rounds: PositiveInt = 3  # in each of which both are timed once
    temperature: NonNegativeFloat = 0.8  # as in sample.py
    top_k: NonNegativeInt = 200  # as in sample.py
    seed: Seed = 1337  # of the weights, the prompt and the texts
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: Dtype = "auto"  # of weights and products. auto: 16 bits on CUDA and on CPUs made for it, else float32

    def validate(self) -> None:
        if self.against == "transformers" and not self.size.startswith("gpt2"):
            raise UserError(f"--against=transformers compares models of GPT-2's shape, such as gpt2, not {self.size}")


def main(config: Config) -> None:
    where = device.resolve_device(config.device)
    dtype = device.resolve_dtype(config.dtype, where)
    device.set_up(where, config.seed)
    shape = GPTConfig(**SIZES[config.size])
    idx = torch.randint(shape.vocab_size, (config.batch_size, config.prompt_tokens), device=where)
    other = {"plain": plain, "transformers": transformers, "nothing": None}[config.against]
    run_other = other(shape, idx, config, where, dtype) if other else None
    model = GPT(shape)
    print(f"{config.size}: {model.get_num_params() / 1e6:.2f}M random weights; {where}, {dtype}, PyTorch {torch.__version__}")
    device.ready_to_generate(model, where, dtype)
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
    result = {"size": config.size, "dtype": str(dtype).removeprefix("torch."), "device": where, "batch_size": idx.size(0)}
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
