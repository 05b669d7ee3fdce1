"""Sample text from a model that train.py has trained.

python sample.py --out_dir=out-shakespeare-char --start="ROMEO:" --num_samples=3
"""

from dataclasses import dataclass
from pathlib import Path

import torch

import checkpoint
import configurator
import device
from configurator import NonNegativeFloat, NonNegativeInt, PositiveInt, Seed, UserError
from data import corpus
from data.tokenizer import CharTokenizer, Tokenizer
from device import Compile, Dtype


@dataclass
class Config(configurator.Config):
    init_from: str = "resume"  # resume (the run in out_dir), or the path of a run folder or checkpoint file
    out_dir: str = "out"  # folder of the run
    start: str = "\n"  # the prompt, or FILE:prompt.txt to read it from a file
    num_samples: PositiveInt = 10  # texts to sample
    max_new_tokens: NonNegativeInt = 500  # tokens in each
    temperature: NonNegativeFloat = 0.8  # below 1 is less random, above 1 more; 0 always takes the likeliest token
    top_k: NonNegativeInt = 200  # draw from the k likeliest tokens; 0 draws from all
    seed: Seed = 1337  # the same seed gives the same texts
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: Dtype = "auto"  # of matrix products. auto: 16 bits on CUDA, else float32
    compile: Compile = False  # compile the model with torch.compile


def main(config: Config) -> None:
    where = device.resolve_device(config.device)
    dtype = device.resolve_dtype(config.dtype, where)
    device.set_up(where, config.seed)
    model, tokenizer, _ = checkpoint.load_model(config.init_from, config.out_dir)
    prompt = encode_prompt(config.start, "start" in config.given, tokenizer)
    idx = torch.tensor([prompt], device=where)  # (1, T)
    model.eval().to(where)
    if device.resolve_compile(config.compile, where):
        model.compile()
    top_k = config.top_k or None
    for _ in range(config.num_samples):
        with device.autocast(where, dtype):
            text = model.generate(idx, config.max_new_tokens, config.temperature, top_k, tokenizer.vocab_size)
        print(tokenizer.decode(text[0].tolist()))
        print("---------------", flush=True)


def encode_prompt(start: str, given: bool, tokenizer: Tokenizer) -> list[int]:
    """Return the ids of the prompt `start`, at least one.

    Where there is none, the text begins as after a line break, or a document's end. UserError where the prompt has
    characters that a character table lacks.
    """
    if start.startswith("FILE:"):
        start = corpus.read_text(Path(start.removeprefix("FILE:")))
    if start and given:
        try:
            return tokenizer.encode(start)
        except UserError as error:
            raise UserError(f"--start: {error}") from error
    if not isinstance(tokenizer, CharTokenizer):
        return tokenizer.encode(start) or [tokenizer.end_of_text]
    return [tokenizer.characters.index("\n") if "\n" in tokenizer.characters else 0]


if __name__ == "__main__":
    configurator.run(main, Config)
