"""Evaluation during training: estimate_loss against a naive loop, and the samples of a model's text."""

import math
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
from nanogpt.evaluation import SAMPLE_TOKENS, count_token_bytes, estimate_loss, sample_text
from nanogpt.metrics import Evaluation
from nanogpt.run import Signals
from nanogpt.tokenizer import CharTokenizer, IdTokenizer, JsonTokenizer, TableTokenizer, TiktokenTokenizer, Tokenizer, train_bpe


@pytest.fixture
def data(dataset: Path) -> Dataset:
    return Dataset(str(dataset))


def new_model(vocab_size: int, n_embd: int = 16, block_size: int = 16) -> GPT:
    """Return a small model with dropout, in training mode."""
    torch.manual_seed(1)
    return GPT(GPTConfig(block_size, vocab_size, n_layer=1, n_head=2, n_embd=n_embd, dropout=0.5))


def evaluate(
    model: GPT | Bigram, data: Dataset, eval_iters: int, group: Group | None = None, signal: int = 0
) -> Evaluation | None:
    """Call estimate_loss with seed 1, batches of 7 sequences and 16 tokens, and the whole logits at once."""
    signals, byte_counts = Signals(), count_token_bytes(data.tokenizer, Group())
    signals.received = signal
    return estimate_loss(model, data, group or Group(), nullcontext(), signals, 1, eval_iters, 7, 16, 0, byte_counts)


def total_nats(model: GPT, ids: np.ndarray, learned: np.ndarray) -> float:
    """Return the sum of -log p over the learned targets of a split, in a naive loop over windows of 16 tokens."""
    ids, total = torch.from_numpy(ids.astype(np.int64)), 0.0
    with torch.no_grad():
        for i in range(0, len(ids) - 1, 16):
            x, y = ids[i : i + 16], ids[i + 1 : i + 17]
            logits, _ = model(x[None, : len(y)], y[None])
            nats = -torch.log_softmax(logits[0], dim=-1).gather(1, y[:, None])[:, 0]
            total += nats[torch.from_numpy(learned[i + 1 : i + 17]) == 1].sum().item()
    return total


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
    losses = evaluate(model, data, eval_iters=0).losses
    assert model.training
    model.eval()
    for name, ids in splits.items():
        assert losses[name] == pytest.approx(total_nats(model, ids, masks[name]) / masks[name][1:].sum(), abs=1e-5)


def test_sampled_loss_is_the_mean_over_its_batches(data: Dataset) -> None:
    """Catches windows that differ from one evaluation to the next, are training's, or are the same for each batch."""
    model = new_model(data.tokenizer.vocab_size)
    losses = evaluate(model, data, eval_iters=3).losses
    assert evaluate(model, data, eval_iters=3).losses == losses
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

    alone = evaluate(model, data, eval_iters=5).losses
    for rank in range(2):
        evaluate(model, data, eval_iters=5, group=Rank(rank=rank, size=2))
    for split, first, second in zip(("train", "val"), sums[:2], sums[2:], strict=True):
        assert (first[1], second[1]) == (first[2], second[2]) == (3 * 7 * 16, 2 * 7 * 16)  # tokens, and their bytes
        assert (first[0] + second[0]) / (first[1] + second[1]) == pytest.approx(alone[split], abs=1e-5)


# bits per byte

DOCUMENTS = [f"{i} naïve cafés, 日本語 and 👩‍👩‍👧 are {i + 1}.\r\n" for i in range(100, 140)]


def tokenizer_of(kind: str, request: pytest.FixtureRequest) -> Tokenizer:
    """Return a tokenizer that can encode DOCUMENTS."""
    if kind == "gpt2":
        request.getfixturevalue("gpt2_vocabulary")
        return TiktokenTokenizer("gpt2", 50257)
    characters = CharTokenizer.from_text("".join(DOCUMENTS))
    return {
        "characters": characters,
        "strings": TableTokenizer([*characters.strings, "", "are ", "日本語"]),
        "bytes": train_bpe([], 257),
        "bpe": train_bpe(DOCUMENTS, 300),
    }[kind]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", ["characters", "strings", "bytes", "bpe", "gpt2"])
def test_bits_per_byte_of_the_whole_split(kind: str, masked: bool, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Catches characters or tokens counted as bytes, masked targets or the end of text among them, and nats for bits."""
    splits = {"train": DOCUMENTS[:30], "val": DOCUMENTS[30:]}
    tokenizer = tokenizer_of(kind, request)
    corpus.write_dataset(tmp_path / "dataset", splits["train"], splits["val"], tokenizer, "documents", separate=True)
    end = [] if tokenizer.end_of_text is None else [tokenizer.end_of_text]
    learned = {}
    for name, documents in splits.items():  # if masked, every third document is learned, but not the first one
        lengths = [len(tokenizer.encode(document) + end) for document in documents]
        flags = [np.full(length, not masked or i % 3 == 1, np.uint8) for i, length in enumerate(lengths)]
        learned[name] = np.concatenate(flags)
        if masked:
            learned[name].tofile(tmp_path / "dataset" / f"{name}.mask.bin")

    data = Dataset(str(tmp_path / "dataset"))
    model = new_model(tokenizer.model_vocab_size, n_embd=4)
    bits_per_byte = evaluate(model, data, eval_iters=0).bits_per_byte
    model.eval()
    for name, documents in splits.items():
        ids = np.fromfile(tmp_path / "dataset" / f"{name}.bin", data.dtype)
        assert len(ids) == len(learned[name])
        first = 0 if masked else len(tokenizer.decode(ids[:1]).encode())  # no target
        text_bytes = len("".join(documents[1::3] if masked else documents).encode()) - first
        expected = total_nats(model, ids, learned[name]) / (math.log(2) * text_bytes)
        assert bits_per_byte[name] == pytest.approx(expected, rel=1e-5)


def test_ids_beyond_the_tokenizer_have_no_bytes(tmp_path: Path) -> None:
    """Catches an IndexError, or the replacement character counted, for the padding of a vocabulary."""
    tokenizer = train_bpe([], 257)
    corpus.write_dataset(tmp_path / "dataset", ["abc" * 20], ["abc" * 20], tokenizer, "abc")
    np.array([97, 300, 98] * 20, np.uint16).tofile(tmp_path / "dataset" / "val.bin")
    evaluation = evaluate(new_model(320), Dataset(str(tmp_path / "dataset")), eval_iters=0)
    for split, share in (("train", 1), ("val", 39 / 59)):  # of the targets
        assert evaluation.bits_per_byte[split] == pytest.approx(evaluation.losses[split] / math.log(2) / share)


def test_no_bits_per_byte_without_text(tmp_path: Path) -> None:
    """Catches bits per byte of digits and spaces, or of ends of text alone."""
    for tokenizer, ids in ((IdTokenizer(300), range(300)), (train_bpe([], 257), [256] * 60)):
        splits = {"train": np.array(ids), "val": np.array(ids)}
        corpus.write_tokens(tmp_path / "dataset", splits, tokenizer, "ids", "")
        evaluation = evaluate(new_model(320), Dataset(str(tmp_path / "dataset")), eval_iters=0)
        assert evaluation.losses["val"] > 0 and evaluation.bits_per_byte == {"train": None, "val": None}


def test_missing_vocabulary_is_a_warning(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches an evaluation that needs a network, and one that fails on some ranks only."""

    def fail(name: str) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr("tiktoken.get_encoding", fail)
    counts = count_token_bytes(TiktokenTokenizer("gpt2", 50257), Group())
    assert counts.shape == (50257,) and not counts.any()
    assert capsys.readouterr().err.count("evaluations have no bits per byte: the vocabulary of encoding 'gpt2' cannot") == 1


def test_rank_0_counts_the_bytes_for_all() -> None:
    """Catches ranks that count on their own, of which one may fail or wait for the network, or sizes that add up."""

    class Rank(Group):
        def sum(self, *numbers: float) -> list[float]:
            return list(numbers)

    tokenizer = CharTokenizer(["a", "é", "語"])
    assert [count_token_bytes(tokenizer, Rank(rank=rank, size=2)).tolist() for rank in (0, 1)] == [[1, 2, 3], [0, 0, 0]]


def test_signal_ends_an_evaluation(data: Dataset) -> None:
    """Catches a stop that waits for a long evaluation, or a half-done one that passes for whole."""
    model = new_model(data.tokenizer.vocab_size)
    passes = []
    model.register_forward_pre_hook(lambda *arguments: passes.append(1))
    assert evaluate(model, data, eval_iters=3, signal=15) is None
    assert passes == [] and model.training


# samples


class Parrot(Bigram):
    """A model that generates `reply`, whatever its prompt, and keeps that."""

    def __init__(self, reply: list[int], vocab_size: int):
        super().__init__(GPTConfig(block_size=256, vocab_size=vocab_size))
        self.reply = iter(reply)

    def stream(self, idx: torch.Tensor, *arguments: object, **keywords: object) -> Iterator[torch.Tensor]:
        self.prompt = idx[0].tolist()
        yield from (torch.tensor([[token]]) for token in self.reply)


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
    model = Parrot([*data.tokenizer.encode("Moo."), *end, *end], data.tokenizer.vocab_size)
    text = sample_text(model, data, 1, 1, "cpu", Signals())
    prompt = data.tokenizer.decode(model.prompt)
    assert re.fullmatch(r"<human>[^<>]+<endOfText><bot>", prompt)
    assert text == f"{prompt}Moo."


def test_sample_ends_with_its_document(tmp_path: Path) -> None:
    """Catches a text that goes on after an end of text that is not called <|endoftext|>."""
    content = train_bpe([], 257).to_dict()["content"].replace("<|endoftext|>", "</s>")
    tokenizer = JsonTokenizer(content, {"eos_token": "</s>"})
    corpus.write_dataset(tmp_path / "s", ["Moo. " * 9], ["Moo. " * 9], tokenizer, "moos")
    model = Parrot(tokenizer.encode("Moo.</s>Quack."), 257)
    assert sample_text(model, Dataset(str(tmp_path / "s")), 1, 1, "cpu", Signals()) == "Moo."


def test_samples_in_gpt2_tokens(tmp_path: Path, gpt2_vocabulary: None) -> None:
    """Catches ids beyond the vocabulary, and a text that goes on with another document."""
    corpus.write_dataset(tmp_path / "words", ["A word. " * 50], ["A word. " * 20], TiktokenTokenizer("gpt2"), "words")
    data = Dataset(str(tmp_path / "words"))
    model = new_model(data.tokenizer.model_vocab_size, n_embd=2, block_size=4)
    texts = [sample_text(model, data, 1, iteration, "cpu", Signals()) for iteration in (1, 2)]
    assert texts[0] != texts[1]
    assert all(len(text) > SAMPLE_TOKENS for text in texts)
    assert not any("<|endoftext|>" in text for text in texts)
