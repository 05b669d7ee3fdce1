"""Export a model and its tokenizer to a folder that Hugging Face transformers can load, with the same logits.

python export.py --out_dir=out-shakespeare-char --to=shakespeare
"""

import dataclasses
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent))  # python -P leaves it out

import configurator
from configurator import PathStr

import torch

from model import GPT
from nanogpt import checkpoint, huggingface
from nanogpt.errors import UserError


@dataclass(frozen=True)
class Config(configurator.Config):
    positional: ClassVar[str] = "init_from"
    init_from: PathStr = "resume"  # resume (the run in out_dir), a run folder, a checkpoint file, gpt2, gpt2-xl, owner/name ...
    out_dir: PathStr = "out"  # run folder to load with init_from=resume
    to: PathStr = ""  # folder to write; an earlier export in it is replaced
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of the exported weights

    def validate(self) -> None:
        if not self.to:
            raise UserError("--to is required: the folder to write, for example --to=exported")


def main(config: Config) -> None:
    model, tokenizer, ckpt = checkpoint.load_model(config.init_from, config.out_dir)
    if not isinstance(model, GPT):
        raise UserError("only a GPT can be exported: transformers has no bigram model")
    model_args = dataclasses.asdict(model.config)
    gelu = model_args.pop("gelu")
    folder = Path(config.to)
    huggingface.save(folder, model.state_dict(), model_args, gelu, tokenizer, getattr(torch, config.dtype), ckpt.chat_format)
    files = sorted(folder.iterdir())
    size = sum(file.stat().st_size for file in files)
    print(f"wrote {folder} ({size / 1e6:,.1f} MB): {', '.join(file.name for file in files)}")
    print("in Python: from transformers import AutoModelForCausalLM, AutoTokenizer")
    print(f"           model = AutoModelForCausalLM.from_pretrained({str(folder)!r})")
    print(f"           tokenizer = AutoTokenizer.from_pretrained({str(folder)!r})")
    print(f"and here:  python {'chat' if ckpt.chat_format else 'sample'}.py --init_from={shlex.quote(str(folder))}")


if __name__ == "__main__":
    configurator.run(main, Config)
