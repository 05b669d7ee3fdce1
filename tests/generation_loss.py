"""Measure how the dtype of the weights in generation changes a run's loss on its whole validation split.

python tests/generation_loss.py out-shakespeare-char-cpu

Prints the loss of each dtype in prefill (the tokens of a window at once) and in decode (one by one, with the KV cache), and the
difference from float32.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import configurator  # noqa: F401, before torch, as in every command

import torch
from torch.nn import functional as F

from nanogpt import checkpoint
from nanogpt.dataset import Dataset
from nanogpt.device import prepare_for_generation

BATCH_SIZE = 8  # windows at a time, few enough for the int8 operator in decode


@torch.inference_mode()
def main(out_dir: str) -> None:
    exact = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int8):
        model, _, found = checkpoint.load_model("resume", out_dir)
        data, block_size, vocab_size = Dataset(found.config["dataset"]), model.config.block_size, model.config.vocab_size
        prepare_for_generation(model, "cpu", dtype)
        totals, count = {"prefill": 0.0, "decode": 0.0}, 0
        for starts, length in data.consecutive("val", block_size, BATCH_SIZE):
            x, y = data.windows("val", starts, length, vocab_size)  # (B, T) each
            cache = model.new_cache(len(x), length)
            steps = [model(x[:, t : t + 1], cache=cache)[0] for t in range(length)]
            for name, logits in (("prefill", model(x, y)[0]), ("decode", torch.cat(steps, dim=1))):
                totals[name] += F.cross_entropy(logits.float().flatten(0, 1), y.flatten(), reduction="sum").item()
            count += y.numel()
        losses = {name: total / count for name, total in totals.items()}
        exact = exact or losses
        line = ", ".join(f"{name} {loss:.5f} ({loss - exact[name]:+.5f})" for name, loss in losses.items())
        print(f"{dtype}: {line}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
