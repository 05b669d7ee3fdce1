"""Evaluation during training: the loss of both splits, and a short sample of the model's text."""

import itertools
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch

from model import GPT, Bigram
from nanogpt import conversation
from nanogpt.dataset import Dataset, Split
from nanogpt.device import text_generators, to_device
from nanogpt.distributed import Group, is_sharded
from nanogpt.errors import UserError, warn
from nanogpt.metrics import Evaluation
from nanogpt.run import Signals
from nanogpt.tokenizer import StreamDecoder, Tokenizer

SAMPLE_TOKENS = 200  # length of a sample


@torch.no_grad()
def estimate_loss(
    model: torch.nn.Module,
    data: Dataset,
    group: Group,
    autocast: AbstractContextManager,
    signals: Signals,
    seed: int,
    eval_iters: int,
    batch_size: int,
    block_size: int,
    loss_rows: int,
    byte_counts: np.ndarray,
) -> Evaluation | None:
    """Return the mean loss of each split, in nats per token, and its bits per byte.

    They are taken over `eval_iters` random batches, the same ones every time, or over the whole split if that is 0. The ranks
    share the work, and all get the result; None if a signal reached one of them meanwhile. `byte_counts` comes from
    `count_token_bytes`. Raises UserError if the loss mask leaves out every target.
    """
    model.eval()
    losses: dict[Split, float] = {}
    bits_per_byte: dict[Split, float | None] = {}
    sharded = is_sharded(model)  # then all ranks must run the same number of passes
    for split in data.tokens:
        count = text_bytes = interrupted = 0.0
        batch_losses: list[tuple[torch.Tensor, int]] = []  # and their targets; read at the end, so that a GPU need not wait
        for batches in _rounds(_batches(data, split, seed, eval_iters, batch_size, block_size), group.size):
            (interrupted,) = group.sum(signals.received) if sharded else (signals.received,)
            is_mine = group.rank < len(batches)
            if interrupted or not (is_mine or sharded):
                break
            starts, length = batches[group.rank if is_mine else -1]  # one too many is run, but not counted
            x, y = data.windows(split, starts, length, model.config.vocab_size)
            learned = y[y != -1].numpy() if is_mine else np.empty(0, np.int64)  # (n,) token ids
            x, y = to_device((x, y), group.device)
            with autocast:
                _, loss = model(x, y, loss_rows=loss_rows)
            batch_losses.append((loss, len(learned)))
            count += len(learned)
            text = learned[learned < len(byte_counts)]  # without ids that only the model has, for a size that is rounded up
            text_bytes += byte_counts[text].sum().item()
        total = sum(loss.item() * targets for loss, targets in batch_losses)
        total, count, text_bytes, interrupted = group.sum(total, count, text_bytes, signals.received)
        if interrupted:
            break
        if not count:
            raise UserError(
                f"the loss mask leaves no {split} target to learn in {eval_iters or 'all'} batches; raise --eval_iters"
            )
        losses[split] = total / count
        bits_per_byte[split] = total / math.log(2) / text_bytes if text_bytes else None
    model.train()
    return None if interrupted else Evaluation(losses, bits_per_byte)


def count_token_bytes(tokenizer: Tokenizer, group: Group) -> np.ndarray:
    """Return the number of UTF-8 bytes that each token stands for: (vocab_size,); none for special tokens.

    Rank 0 counts them, and all get the result. If its vocabulary cannot be loaded, all are 0, with a warning.
    """
    counts = [0] * tokenizer.vocab_size
    if group.is_main:
        try:
            special = tokenizer.special_tokens
            counts = [0 if i in special else len(tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size)]
        except UserError as error:
            warn(f"evaluations have no bits per byte: {error}")
    return np.array(group.sum(*counts))


def _batches(
    data: Dataset, split: Split, seed: int, eval_iters: int, batch_size: int, block_size: int
) -> Iterator[tuple[np.ndarray, int]]:
    """Yield (starts, length) of each batch of windows in an evaluation of `split`."""
    if eval_iters == 0:
        yield from data.consecutive(split, block_size, batch_size)
    stream = "eval_train" if split == "train" else "eval_val"
    for index in range(eval_iters):
        yield data.draw(split, stream, seed, index, batch_size, block_size), block_size


def _rounds(batches: Iterator[Any], size: int) -> Iterator[list[Any]]:
    """Yield lists of `size` batches; the last may be shorter."""
    while taken := list(itertools.islice(batches, size)):
        yield taken


def sample_text(model: GPT | Bigram, data: Dataset, seed: int, iteration: int, device: str, signals: Signals) -> str:
    """Return a short text by the model: from an empty prompt, or its reply to the first message of the validation split.

    Leaves the random numbers of training alone.
    """
    # prompt
    tokenizer, text = data.tokenizer, ""
    prompt = conversation.separator(tokenizer) or [0]
    if data.chat_format is not None:
        inputs, targets = data.windows("val", np.zeros(1, np.int64), model.config.block_size, model.config.vocab_size)
        not_learned = int((targets[0] == -1).long().cumprod(0).sum())  # the targets before the reply
        prompt = inputs[0, : not_learned + 1].tolist()
        text = tokenizer.decode(prompt)

    # generate
    decoder = StreamDecoder(tokenizer, conversation.stops(data.chat_format, tokenizer))
    model.eval()
    generators = text_generators(seed, [iteration], device)
    options = {"temperature": 0.8, "top_k": 200, "vocab_size": tokenizer.vocab_size, "generators": generators}
    for token in model.stream(torch.tensor([prompt], device=device), SAMPLE_TOKENS, **options):
        text += decoder.feed(token.item())
        if decoder.stopped or signals.received:
            break
    model.train()
    return (text + decoder.finish()).strip()
