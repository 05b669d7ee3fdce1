"""Decoding with fixed shapes: the same text as by GPT.forward, and the order of steps around a CUDA graph."""

import contextlib
from typing import ClassVar

import pytest
import torch

from model import GPT, GPTConfig, KVCache
from nanogpt.decoding import CudaGraph, decode, decode_by
from nanogpt.device import prepare_for_generation


class FakeGraph:
    """A CUDA graph on a CPU: a replay runs the recorded step again, on the same tensors, into the same output."""

    recorded: ClassVar[list["FakeGraph"]] = []

    def __init__(self) -> None:
        self.runs = 0
        self.recorded.append(self)

    def replay(self) -> None:
        self.runs += 1
        self.output.copy_(self.step(*self.arguments))


class FakeStream:
    def wait_stream(self, other: "FakeStream") -> None:
        pass


def recording(model: GPT, idx: torch.Tensor, layers: list[torch.Tensor], position: torch.Tensor) -> torch.Tensor:
    """`decode`, which also tells the newest FakeGraph what to replay."""
    output = decode(model, idx, layers, position)
    if FakeGraph.recorded:
        graph = FakeGraph.recorded[-1]
        graph.step, graph.arguments, graph.output = decode, (model, idx, layers, position), output
    return output


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeGraph, "recorded", [])
    monkeypatch.setattr(CudaGraph, "stream", None)
    for name, fake in {
        "CUDAGraph": FakeGraph,
        "Stream": FakeStream,
        "current_stream": FakeStream,
        "stream": lambda stream: contextlib.nullcontext(),
        "graph": lambda graph, stream: contextlib.nullcontext(),
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)


def two_models(dtype: torch.dtype = torch.float32, **changes) -> tuple[GPT, GPT]:
    """Two models with the same weights, whose caches hold NaN where nothing was written yet."""
    torch.manual_seed(1)
    config = GPTConfig(**{"block_size": 32, "vocab_size": 50, "n_layer": 2, "n_head": 2, "n_embd": 64} | changes)
    models = GPT(config), GPT(config)
    models[1].load_state_dict(models[0].state_dict())
    for model in models:
        new_cache = model.new_cache
        model.new_cache = lambda *sizes, new_cache=new_cache: KVCache(
            [torch.full_like(past, torch.nan) for past in new_cache(*sizes).layers]
        )
        prepare_for_generation(model, "cpu", dtype)
    return models


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8])
def test_same_text(dtype: torch.dtype, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a key at another position, a mask that hides a token or shows memory, and a window that does not slide."""
    expected, model = two_models(dtype)
    decode_by(model, decode, on_cuda=False)
    for prompt in (torch.randint(50, (3, 5)), torch.randint(50, (1, 1)), torch.randint(50, (2, 40))):
        assert torch.equal(model.generate(prompt, 50, temperature=0), expected.generate(prompt, 50, temperature=0))
    assert not capsys.readouterr().err  # no warning: it was this file's way


@pytest.mark.parametrize("bias", [True, False])
def test_same_logits_by_a_graph(bias: bool, fake_cuda: None) -> None:
    """Catches a graph that reads other tensors than it was given, logits that the next token overwrites, a stale cache."""
    expected, model = two_models(bias=bias)
    decode_by(model, recording, on_cuda=True)
    caches = expected.new_cache(2, 32), model.new_cache(2, 32)
    prompt, tokens = torch.randint(50, (2, 4)), torch.randint(50, (6, 2, 1))
    found = [[network(prompt, cache=cache)[0] for network, cache in zip((expected, model), caches, strict=True)]]
    for token in tokens:
        found.append([network(token, cache=cache)[0] for network, cache in zip((expected, model), caches, strict=True)])
    for cache in caches:  # as in a chat: take back three tokens, and go on with others
        cache.length -= 3
    for token in tokens.flip(0):
        found.append([network(token, cache=cache)[0] for network, cache in zip((expected, model), caches, strict=True)])

    for expected_logits, logits in found:
        torch.testing.assert_close(logits, expected_logits)
    assert caches[0].length == caches[1].length == 4 + 6 - 3 + 6
    assert [graph.runs for graph in FakeGraph.recorded] == [12]  # one graph for a cache

    stream = CudaGraph.stream
    model.generate(prompt, 3, temperature=0)
    assert [graph.runs for graph in FakeGraph.recorded] == [12, 2]  # and another for the next
    assert CudaGraph.stream is stream  # each stream would keep a workspace


def test_writes_into_whole_tensors_of_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a slice of an argument that is written into, for which a compiled step copies the cache in every layer."""
    _, model = two_models()
    cache, write, written = model.new_cache(1, 8), torch.Tensor.index_copy_, []
    monkeypatch.setattr(torch.Tensor, "index_copy_", lambda self, *rest: written.append(id(self)) or write(self, *rest))
    decode(model, torch.zeros(1, 1, dtype=torch.long), cache.layers, torch.zeros(1, dtype=torch.long))
    assert written == [id(past) for past in cache.layers]


def test_changed_model(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches another text than that of the model, after somebody has changed model.py only."""
    expected, model = two_models()
    for network in (expected, model):
        network.transformer.h[1].forward = lambda x, *arguments: x[:, -1:]  # no second block
    decode_by(model, decode, on_cuda=False)
    prompt = torch.randint(50, (2, 4))
    for _ in range(2):
        assert torch.equal(model.generate(prompt, 6, temperature=0), expected.generate(prompt, 6, temperature=0))
    assert capsys.readouterr().err.count("--compile=True is ignored") == 1


def test_compile_is_for_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a --compile=True of sample.py that compiles nothing, or every new length of the cache."""
    compiled = []
    monkeypatch.setattr("nanogpt.device.compile_model", lambda step: compiled.append(step) or step)
    model = GPT(GPTConfig(block_size=8, vocab_size=50, n_layer=1, n_head=1, n_embd=16))
    idx = torch.randint(50, (1, 2))
    expected = model.generate(idx, 4, temperature=0)
    prepare_for_generation(model, "cpu", torch.float32, compile=True)
    assert compiled == [decode]
    assert torch.equal(model.generate(idx, 4, temperature=0), expected)
