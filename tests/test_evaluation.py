"""Evaluation during training: estimate_loss against a naive loop, and the samples of a model's text."""

import re
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch

from model import GPT, Bigram, GPTConfig
from nanogpt import corpus
from nanogpt.dataset import Dataset
from nanogpt.distributed import Group
from nanogpt.errors import UserError
from nanogpt.evaluation import SAMPLE_TOKENS, estimate_loss, sample_text
from nanogpt.run import Signals
from nanogpt.tokenizer import TiktokenTokenizer


@pytest.fixture
def data(dataset: Path) -> Dataset:
    return Dataset(str(dataset))


def new_model(vocab_size: int, n_embd: int = 16, block_size: int = 16) -> GPT:
    """Return a small model with dropout, in training mode."""
    torch.manual_seed(1)
    return GPT(GPTConfig(block_size, vocab_size, n_layer=1, n_head=2, n_embd=n_embd, dropout=0.5))


def evaluate(model: GPT | Bigram, data: Dataset, eval_iters: int, group: Group | None = None, signal: int = 0) -> dict | None:
    """Call estimate_loss with seed 1, batches of 7 sequences and 16 tokens, and the whole logits at once."""
    signals = Signals()
    signals.received = signal
    return estimate_loss(model, data, group or Group(), nullcontext(), signals, 1, eval_iters, 7, 16, 0)


# the loss


@pytest.mark.parametrize("masked", [False, True])
def test_whole_split_counts_each_learned_token_once(dataset: Path, masked: bool) -> None:
    """Catches windows that overlap or leave out the end, batches not weighted by their learned targets, dropout left on."""
    splits = {name: np.fromfile(dataset / f"{name}.bin", dtype=np.uint8) for name in ("train", "val")}
    masks = {name: np.ones(len(ids), np.uint8) for name, ids in splits.items()}
    if masked:
        for name, mask in masks.items():
            mask[: len(mask) // 2] = np.arange(len(mask) // 2) % 9 == 0  # few are learned in the first half, all in the second
            mask.tofile(dataset / f"{name}.mask.bin")
    data = Dataset(str(dataset))
    model = new_model(data.tokenizer.vocab_size)
    losses = evaluate(model, data, eval_iters=0)
    assert model.training
    model.eval()
    for name, ids in splits.items():
        ids = torch.from_numpy(ids.astype(np.int64))
        total = 0.0
        with torch.no_grad():
            for i in range(0, len(ids) - 1, 16):
                x, y = ids[i : i + 16], ids[i + 1 : i + 17]
                logits, _ = model(x[None, : len(y)], y[None])
                nats = -torch.log_softmax(logits[0], dim=-1).gather(1, y[:, None])[:, 0]
                total += nats[torch.from_numpy(masks[name][i + 1 : i + 17]) == 1].sum().item()
        assert losses[name] == pytest.approx(total / masks[name][1:].sum(), abs=1e-5)


def test_sampled_loss_is_the_mean_over_its_batches(data: Dataset) -> None:
    """Catches windows that differ from one evaluation to the next, are training's, or are the same for each batch."""
    model = new_model(data.tokenizer.vocab_size)
    losses = evaluate(model, data, eval_iters=3)
    assert evaluate(model, data, eval_iters=3) == losses
    model.eval()
    for split in ("train", "val"):
        batches = [data.windows(split, data.draw(split, f"eval_{split}", 1, i, 7, 16), 16, 100) for i in range(3)]
        with torch.no_grad():
            expected = sum(model(x, y)[1].item() for x, y in batches) / 3
        assert losses[split] == pytest.approx(expected, abs=1e-5)


def test_evaluation_without_learned_targets_is_refused(dataset: Path) -> None:
    """Catches a NaN that is blamed on the learning rate."""
    np.zeros((dataset / "val.bin").stat().st_size, np.uint8).tofile(dataset / "val.mask.bin")
    data = Dataset(str(dataset))
    with pytest.raises(UserError, match="leaves no val target to learn in 3 batches; raise --eval_iters"):
        evaluate(new_model(data.tokenizer.vocab_size), data, eval_iters=3)


def test_ranks_share_the_batches(data: Dataset) -> None:
    """Catches a batch that two ranks evaluate, or none."""
    model, sums = new_model(data.tokenizer.vocab_size), []

    class Rank(Group):
        def sum(self, *numbers: float) -> list[float]:
            sums.append(numbers)
            return list(numbers)

    alone = evaluate(model, data, eval_iters=5)
    for rank in range(2):
        evaluate(model, data, eval_iters=5, group=Rank(rank=rank, size=2))
    for split, first, second in zip(("train", "val"), sums[:2], sums[2:], strict=True):
        assert (first[1], second[1]) == (3 * 7 * 16, 2 * 7 * 16)
        assert (first[0] + second[0]) / (first[1] + second[1]) == pytest.approx(alone[split], abs=1e-5)


def test_signal_ends_an_evaluation(data: Dataset) -> None:
    """Catches a stop that waits for a long evaluation, or a half-done one that passes for whole."""
    model = new_model(data.tokenizer.vocab_size)
    passes = []
    model.register_forward_pre_hook(lambda *arguments: passes.append(1))
    assert evaluate(model, data, eval_iters=3, signal=15) is None
    assert passes == [] and model.training


# samples


def test_signal_ends_a_sample(data: Dataset) -> None:
    """Catches a stop that waits for a slow model's text."""
    model, signals = new_model(data.tokenizer.vocab_size), Signals()
    signals.received = 15
    assert len(sample_text(model, data, 1, 1, "cpu", signals)) <= 1
    assert model.training


def test_sample_of_a_chat_is_a_reply(project: Path, command: Callable) -> None:
    """Catches a sample of the user's words, which a chat model does not learn, or one that goes on after its reply."""
    assert command("data/chat/prepare.py").returncode == 0
    data = Dataset(str(project / "data" / "chat"))
    end = data.tokenizer.encode("<endOfText>")
    reply = iter([*data.tokenizer.encode("Moo."), *end, *end])
    prompts = []

    class Parrot(Bigram):
        def stream(self, idx: torch.Tensor, *arguments: object, **keywords: object) -> Iterator[torch.Tensor]:
            prompts.append(data.tokenizer.decode(idx[0].tolist()))
            yield from (torch.tensor([[token]]) for token in reply)

    model = Parrot(GPTConfig(block_size=256, vocab_size=data.tokenizer.vocab_size))
    text = sample_text(model, data, 1, 1, "cpu", Signals())
    assert re.fullmatch(r"<human>[^<>]+<endOfText><bot>", prompts[0])
    assert text == f"{prompts[0]}Moo."


def test_samples_in_gpt2_tokens(tmp_path: Path, gpt2_vocabulary: None) -> None:
    """Catches ids beyond the vocabulary, and a text that goes on with another document."""
    corpus.write_dataset(tmp_path / "words", ["A word. " * 50], ["A word. " * 20], TiktokenTokenizer("gpt2"), "words")
    data = Dataset(str(tmp_path / "words"))
    model = new_model(data.tokenizer.model_vocab_size, n_embd=2, block_size=4)
    texts = [sample_text(model, data, 1, iteration, "cpu", Signals()) for iteration in (1, 2)]
    assert texts[0] != texts[1]
    assert all(len(text) > SAMPLE_TOKENS for text in texts)
    assert not any("<|endoftext|>" in text for text in texts)
