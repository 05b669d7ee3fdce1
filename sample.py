"""Sample from a model trained with train.py, or from GPT-2.

python sample.py --out_dir=out-shakespeare-char --start="ROMEO:" --num_samples=3
python sample.py --init_from=gpt2 --start="What is the answer to life?" --num_samples=1
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parent))  # python -P leaves it out

import configurator
from configurator import NonNegativeFloat, NonNegativeInt, PathStr, PositiveInt, PromptStr, Seed

import torch

from model import GPT, Bigram
from nanogpt import checkpoint
from nanogpt.conversation import read_prompt
from nanogpt.device import (
    Compile,
    GenerationDtype,
    explain_out_of_memory,
    pick_compile,
    pick_device,
    pick_generation_dtype,
    prepare_for_generation,
    set_up,
    text_generators,
)
from nanogpt.errors import warn, write
from nanogpt.tokenizer import StreamDecoder, Tokenizer

CACHE_BYTES = 2 << 30  # limit of a batch's KV cache; samples that do not fit go into another batch


@dataclass(frozen=True)
class Config(configurator.Config):
    positional: ClassVar[str] = "init_from"
    init_from: PathStr = "resume"  # resume (the run in out_dir), a run folder, a checkpoint file, gpt2, gpt2-xl, owner/name ...
    out_dir: PathStr = "out"  # run folder to load with init_from=resume
    start: PromptStr = "\n"  # the prompt, or FILE:prompt.txt to read it from a file
    num_samples: PositiveInt = 10  # number of samples, generated in batches; the first is printed as it grows
    max_new_tokens: NonNegativeInt = 500  # tokens to generate in each sample
    temperature: NonNegativeFloat = 0.8  # below 1 is less random, above 1 more random; 0 is greedy decoding
    top_k: NonNegativeInt = 200  # sample from the k most likely tokens; 0: from all
    top_p: Annotated[float, configurator.Range(above=0, at_most=1)] = 1.0  # nucleus sampling: total probability kept; 1: all
    stop: str = ""  # end a sample before this string; separate several strings with |
    seed: Seed = 1337  # the same seed gives the same samples
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: GenerationDtype = "auto"  # of weights. auto: the fastest for the device; int8: a quarter of float32's memory, CPU
    compile: Compile = False  # compile the decoding of a token with torch.compile; on CUDA, replay it as a CUDA graph


@explain_out_of_memory("lower --num_samples or --max_new_tokens, set --dtype=bfloat16, or use a smaller model")
def main(config: Config) -> None:
    # device, model and prompt
    device = pick_device(config.device)
    set_up(device, config.seed)
    model, tokenizer, _ = checkpoint.load_model(config.init_from, config.out_dir)
    dtype = pick_generation_dtype(config.dtype, device, config.num_samples, model.get_num_params())
    prompt, prompt_ids = read_prompt(config.start, "start" in config.given, tokenizer)
    if len(prompt_ids) > model.config.block_size:
        warn(f"the model sees only the last {model.config.block_size:,} of the prompt's {len(prompt_ids):,} tokens")
    prepare_for_generation(model, device, dtype, config.num_samples, pick_compile(config.compile, device))

    # sample batch by batch
    started, total_tokens = time.perf_counter(), 0
    batch_size = max_batch_size(model, len(prompt_ids) + config.max_new_tokens)
    for first in range(0, config.num_samples, batch_size):
        numbers = range(first, min(first + batch_size, config.num_samples))
        write(prompt)
        texts, tokens = sample(model, tokenizer, prompt_ids, config, numbers, device, write)
        write("\n---------------\n")
        for text in texts[1:]:
            write(f"{prompt}{text}\n---------------\n")
        total_tokens += tokens

    seconds = time.perf_counter() - started
    print(f"{total_tokens:,} tokens in {seconds:.2f} s: {total_tokens / seconds:,.1f} tokens/s", file=sys.stderr)


def sample(
    model: GPT | Bigram,
    tokenizer: Tokenizer,
    prompt_ids: list[int],
    config: Config,
    numbers: range,
    device: str,
    show: Callable[[str], None],
) -> tuple[list[str], int]:
    """Sample one batch, a text for each of `numbers`; return the texts, without the prompt, and the number of tokens generated.

    Each text depends on the seed and its number only. Calls `show` with each new piece of the first text.
    """
    stop = [string for string in config.stop.split("|") if string]
    decoders = [StreamDecoder(tokenizer, stop) for _ in numbers]
    texts, total_tokens = [""] * len(numbers), 0
    stream = model.stream(
        torch.tensor([prompt_ids] * len(numbers), device=device),  # (B, T)
        config.max_new_tokens,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        vocab_size=tokenizer.vocab_size,
        generators=text_generators(config.seed, numbers, device),
    )
    for tokens in stream:  # (B, 1)
        for row, token in enumerate(tokens[:, 0].tolist()):
            if not decoders[row].stopped:
                total_tokens += 1
                piece = decoders[row].feed(token)
                texts[row] += piece
                if row == 0:
                    show(piece)
        if all(decoder.stopped for decoder in decoders):
            break
    rests = [decoder.finish() for decoder in decoders]
    show(rests[0])
    return [text + rest for text, rest in zip(texts, rests, strict=True)], total_tokens


def max_batch_size(model: GPT | Bigram, length: int) -> int:
    """Return how many texts of `length` tokens fit into a KV cache of CACHE_BYTES, at least 1."""
    config = model.config
    bytes_per_token = 8 * config.n_layer * config.n_embd  # key and value, 4 bytes each
    return max(1, CACHE_BYTES // (bytes_per_token * min(length, config.block_size)))


if __name__ == "__main__":
    configurator.run(main, Config)
