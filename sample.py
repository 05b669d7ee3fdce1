"""Sample text from a model that train.py has trained, or from GPT-2.

python sample.py --out_dir=out-shakespeare-char --start="ROMEO:" --num_samples=3
python sample.py --init_from=gpt2 --start="What is the answer to life?" --num_samples=1
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch

import configurator
from configurator import NonNegativeFloat, NonNegativeInt, PositiveInt, Seed
from model import GPT, Bigram
from nanogpt import checkpoint, corpus, device, errors
from nanogpt.device import Compile, Dtype
from nanogpt.errors import UserError
from nanogpt.tokenizer import CharTokenizer, StreamDecoder, Tokenizer

CACHE_BYTES = 2 << 30  # what the keys and values of a batch may take; more samples than that are several batches


@dataclass
class Config(configurator.Config):
    init_from: str = "resume"  # resume (the run in out_dir), a run folder, a checkpoint file, gpt2, gpt2-xl, owner/name ...
    out_dir: str = "out"  # folder of the run
    start: str = "\n"  # the prompt, or FILE:prompt.txt to read it from a file
    num_samples: PositiveInt = 10  # texts to sample, as one batch; the first is shown as it grows
    max_new_tokens: NonNegativeInt = 500  # tokens in each
    temperature: NonNegativeFloat = 0.8  # below 1 is less random, above 1 more; 0 always takes the likeliest token
    top_k: NonNegativeInt = 200  # draw from the k likeliest tokens; 0 draws from all
    top_p: Annotated[float, configurator.Range(above=0, at_most=1)] = 1.0  # of them, the likeliest that make up this share
    stop: str = ""  # end a text before this string; several are separated by |
    seed: Seed = 1337  # the same seed gives the same texts
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: Dtype = "auto"  # of weights and products. auto: 16 bits on CUDA and on CPUs made for it, else float32
    compile: Compile = False  # compile the model with torch.compile


@device.explain_out_of_memory("lower --num_samples or --max_new_tokens, give --dtype=bfloat16, or take a smaller model")
def main(config: Config) -> None:
    where = device.pick_device(config.device)
    dtype = device.pick_dtype(config.dtype, where)
    device.set_up(where, config.seed)
    model, tokenizer, _ = checkpoint.load_model(config.init_from, config.out_dir)
    start, prompt = read_prompt(config.start, "start" in config.given, tokenizer)
    if len(prompt) > model.config.block_size:
        errors.warn(f"the model sees the last {model.config.block_size:,} of the prompt's {len(prompt):,} tokens")
    device.prepare_for_generation(model, where, dtype, device.pick_compile(config.compile, where))

    began, count = time.perf_counter(), 0
    batch_size = rows_in_memory(model, len(prompt) + config.max_new_tokens)
    for first in range(0, config.num_samples, batch_size):
        numbers = range(first, min(first + batch_size, config.num_samples))
        errors.write(start)
        texts, drawn = sample(model, tokenizer, prompt, config, numbers, where, errors.write)
        errors.write("\n---------------\n")
        for text in texts[1:]:
            errors.write(f"{start}{text}\n---------------\n")
        count += drawn
    seconds = time.perf_counter() - began
    print(f"{count:,} tokens in {seconds:.2f} s: {count / seconds:,.1f} tokens/s", file=sys.stderr)


def read_prompt(start: str, given: bool, tokenizer: Tokenizer) -> tuple[str, list[int]]:
    """Return the text of the prompt that `start` is or names, and its ids, at least one.

    Where there is none, the model goes on as after a line break, or after a document's end. UserError where the prompt has
    characters that a character table lacks.
    """
    if start.startswith("FILE:"):
        start = corpus.read_text(Path(start.removeprefix("FILE:")))
    if not isinstance(tokenizer, CharTokenizer):
        return start, tokenizer.encode(start) or [tokenizer.end_of_text]
    if start and (given or start in tokenizer.characters):
        try:
            return start, tokenizer.encode(start)
        except UserError as error:
            raise UserError(f"--start: {error}") from error
    return "", [tokenizer.characters.index("\n") if "\n" in tokenizer.characters else 0]


def sample(
    model: GPT | Bigram,
    tokenizer: Tokenizer,
    prompt: list[int],
    config: Config,
    numbers: range,
    where: str,
    show: Callable[[str], None],
) -> tuple[list[str], int]:
    """Return the texts of these `numbers` that follow the `prompt`, sampled as one batch, and how many tokens they took.

    The first is also given to `show`, piece by piece.
    """
    idx = torch.tensor([prompt] * len(numbers), device=where)  # (B, T)
    stop = [string for string in config.stop.split("|") if string]
    decoders = [StreamDecoder(tokenizer, stop) for _ in numbers]
    texts, drawn = [""] * len(numbers), 0
    stream = model.stream(
        idx,
        config.max_new_tokens,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        vocab_size=tokenizer.vocab_size,
        generators=device.text_generators(config.seed, numbers, where),
    )
    for tokens in stream:
        for row, token in enumerate(tokens[:, 0].tolist()):
            if not decoders[row].stopped:
                drawn += 1
                text = decoders[row].feed(token)
                texts[row] += text
                if row == 0:
                    show(text)
        if all(decoder.stopped for decoder in decoders):
            break
    rests = [decoder.finish() for decoder in decoders]
    show(rests[0])
    return [text + rest for text, rest in zip(texts, rests, strict=True)], drawn


def rows_in_memory(model: GPT | Bigram, length: int) -> int:
    """Return how many texts of `length` tokens may be sampled at once, at least 1."""
    config = model.config
    room = min(length, config.block_size)
    return max(1, CACHE_BYTES // (8 * config.n_layer * config.n_embd * room))  # two float32 numbers a channel


if __name__ == "__main__":
    configurator.run(main, Config)
