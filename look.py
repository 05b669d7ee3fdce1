"""Write a page that shows a model at work on your text: tokens, probabilities, attention, embeddings, generation.

python look.py --out_dir=out-shakespeare-char --start="ROMEO:"
python look.py --init_from=gpt2 --start="The capital of France is"

The page is one HTML file that needs no network. A model of up to 5 million parameters runs in it: type, and everything follows.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parent))  # python -P leaves it out

import configurator
from configurator import NonNegativeFloat, NonNegativeInt, PathStr, PromptStr, Seed

import torch

from model import GPT, Bigram
from nanogpt import checkpoint, conversation, page
from nanogpt.conversation import read_prompt
from nanogpt.device import explain_out_of_memory, pick_device, set_up, text_generators
from nanogpt.errors import UserError, one_line, shown, warn
from nanogpt.files import atomic_write


@dataclass(frozen=True)
class Config(configurator.Config):
    positional: ClassVar[str] = "init_from"
    init_from: PathStr = "resume"  # resume (the run in out_dir), a run folder, a checkpoint file, gpt2, gpt2-xl, owner/name ...
    out_dir: PathStr = "out"  # run folder to load with init_from=resume
    out: PathStr = ""  # HTML file to write. Empty: look.html in the run's folder; in the current one for other models
    start: PromptStr = "\n"  # the prompt, or FILE:prompt.txt to read it from a file
    chat: bool = False  # the prompt is a message to a chat model: put it in the format of its conversations
    max_new_tokens: NonNegativeInt = 32  # tokens that the model writes after the prompt
    temperature: NonNegativeFloat = 0.8  # below 1 is less random, above 1 more random; 0 is greedy decoding
    top_k: NonNegativeInt = 200  # sample from the k most likely tokens; 0: from all
    top_p: Annotated[float, configurator.Range(above=0, at_most=1)] = 1.0  # nucleus sampling: total probability kept; 1: all
    seed: Seed = 1337  # the same seed writes the same text
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps

    def validate(self) -> None:
        if self.out and not self.out.endswith(".html"):
            raise UserError(f"--out must end in .html, got {shown(self.out)}; try --out=look.html")


@explain_out_of_memory("use a smaller model, or --device=cpu")
def main(config: Config) -> None:
    started = time.perf_counter()
    # device, model and prompt
    device = pick_device(config.device)
    set_up(device, config.seed)
    model, tokenizer, ckpt = checkpoint.load_model(config.init_from, config.out_dir)
    model.eval().requires_grad_(False).to(device)
    prompt, prompt_ids = read_prompt(config.start, "start" in config.given, tokenizer)
    chat_format = ckpt.chat_format or (conversation.FORMATS["plain"] if config.chat else None)
    if config.chat:
        prompt_ids = conversation.encode_opening(chat_format, tokenizer)
        prompt_ids += conversation.encode_prompt_turn(chat_format, prompt, tokenizer)
    prompt_ids = fit(prompt_ids, config.max_new_tokens, model)

    # what the model writes
    stream = model.stream(
        torch.tensor([prompt_ids], device=device),
        config.max_new_tokens,
        config.temperature,
        config.top_k,
        config.top_p,
        vocab_size=tokenizer.vocab_size,
        generators=text_generators(config.seed, range(1), device),
    )
    written_ids: list[int] = []
    for token in stream:
        written_ids.append(token.item())
        if config.chat and chat_format.stop in tokenizer.decode(written_ids):
            break

    # the page
    about = {
        "title": one_line(str(ckpt.path)),
        "tokenizer_name": str(tokenizer),
        "prompt": prompt,
        "empty_ids": conversation.separator(tokenizer) or [0],
        "sampling": {name: getattr(config, name) for name in ("temperature", "top_k", "top_p", "seed")},
        "chat": chat_format and page.chat_data(chat_format, tokenizer, config.chat),
        "trained": {"iter_num": ckpt.iter_num, "best_val_loss": ckpt.best_val_loss if ckpt.best_val_loss < 1e9 else None},
    }
    if isinstance(model, Bigram):
        about["counts"] = page.bigram_counts(tokenizer, str(ckpt.config.get("dataset", "")))
    html = page.build(model, tokenizer, prompt_ids, written_ids, about)
    out = Path(config.out or (Path(config.out_dir) / "look.html" if config.init_from == "resume" else "look.html"))
    try:
        with atomic_write(out) as file:
            file.write(html)
    except OSError as error:
        raise UserError(f"--out={out}: cannot be written ({error.strerror})") from error
    seconds = time.perf_counter() - started
    print(one_line(f"wrote {out} ({len(html) / 1e6:.1f} MB) in {seconds:.1f} s; open it in a browser:"))
    print(out.resolve().as_uri())


def fit(prompt_ids: list[int], max_new_tokens: int, model: GPT | Bigram) -> list[int]:
    """Return the prompt, cut to its last tokens if the page of a model that does not fit into it cannot show all.

    Raises UserError if there is no room for any.
    """
    if page.runs_in_page(model) or isinstance(model, Bigram):
        return prompt_ids
    room = page.recorded_tokens(model) - max_new_tokens
    if room < 1:
        raise UserError(
            f"--max_new_tokens must be below {page.recorded_tokens(model)} for a model of this size, got {max_new_tokens}"
        )
    if len(prompt_ids) > room:
        warn(f"the page shows the model only the last {room} of the prompt's {len(prompt_ids):,} tokens")
    return prompt_ids[-room:]


if __name__ == "__main__":
    configurator.run(main, Config)
