"""Decoding with fixed shapes: one function for every new token, which can be compiled, and recorded as a CUDA graph.

`prepare_for_generation` sets it up for --compile=True. Without it, `GPT.forward` decodes, over a cache that grows.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch.nn import functional as F

from model import GPT, KVCache
from nanogpt.errors import warn

TOLERANCE = 0.05  # of the largest logit, for the rounding of 16-bit weights
WARMUP_RUNS = 3  # before a CUDA graph is recorded: they compile the kernels and allocate their workspaces

Step = Callable[[GPT, torch.Tensor, list[torch.Tensor], torch.Tensor], torch.Tensor]


def decode(model: GPT, idx: torch.Tensor, layers: list[torch.Tensor], position: torch.Tensor) -> torch.Tensor:
    """Return the logits (B, 1, V) for one new token in each row, and add its keys and values to the cache.

    Shapes: idx (B, 1) and position (1,), int64 on the model's device; for each of the layers (2, B, nh, max_tokens, hs), as in
    KVCache. Unlike `GPT.forward`, it attends to all of the cache, and hides what is after `position` by a mask, so that
    neither a shape nor an address changes from token to token.
    """
    visible = torch.arange(layers[0].size(3), device=idx.device) <= position  # (max_tokens,)
    x = model.transformer.wte(idx) + model.transformer.wpe(position)  # (B, 1, C)
    B, _, C = x.shape
    for block, past in zip(model.transformer.h, layers, strict=True):
        qkv = block.attn.c_attn(block.ln_1(x)).view(B, 3, model.config.n_head, 1, -1).transpose(0, 1)  # (3, B, nh, 1, hs)
        past.index_copy_(3, position, qkv[1:])  # of a whole argument: on a slice of one, torch.compile copies the cache
        y = F.scaled_dot_product_attention(qkv[0], past[0], past[1], attn_mask=visible[None])
        x = x + block.attn.c_proj(y.reshape(B, 1, C))
        x = x + block.mlp(block.ln_2(x))
    return model.lm_head(model.transformer.ln_f(x))


class CudaGraph:
    """A step over one cache, recorded once and replayed for every token: one launch in place of hundreds."""

    stream: "torch.cuda.Stream | None" = None  # on which all are recorded: cuBLAS keeps a workspace for each stream

    def __init__(self, step: Step, model: GPT, cache: KVCache, idx: torch.Tensor, position: torch.Tensor):
        """Record `step` for the token idx (B, 1) at `position`, whose entry in the cache it writes."""
        self.idx, self.position = idx.clone(), position.clone()
        arguments = (model, self.idx, cache.layers, self.position)
        CudaGraph.stream = CudaGraph.stream or torch.cuda.Stream()
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):  # PyTorch wants a step to run on a side stream before it is recorded
            for _ in range(WARMUP_RUNS):
                step(*arguments)
        torch.cuda.current_stream().wait_stream(self.stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=self.stream):
            self.logits = step(*arguments)

    def __call__(self, idx: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """Return the logits (B, 1, V) for idx (B, 1) at position (1,)."""
        self.idx.copy_(idx)
        self.position.copy_(position)
        self.graph.replay()
        return self.logits.clone()  # the next replay overwrites them


def decode_by(model: GPT, step: Step, on_cuda: bool) -> None:
    """Let a model decode by `step`: `decode`, perhaps compiled. On CUDA, record it as a graph for each cache.

    Prompts, and windows longer than the context, run as before. So does the first token for each cache; if `step` computes
    other logits for it, since somebody has changed model.py, all the others do, too, with a warning.
    """
    forward_of_model, run, current = model.forward, None, None

    def forward(
        idx: torch.Tensor, targets: torch.Tensor | None = None, cache: KVCache | None = None, loss_rows: int | None = None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        nonlocal run, current
        if cache is None or cache.length == 0 or idx.size(1) > 1:
            return forward_of_model(idx, targets, cache, loss_rows)
        position = torch.full((1,), cache.length, device=idx.device)
        if cache is current:
            cache.length += 1
            return run(idx, position=position), None

        for past in cache.layers:
            past[..., cache.length :, :] = 0  # was not initialized: a NaN behind the mask would show
        run = CudaGraph(step, model, cache, idx, position) if on_cuda else partial(step, model, layers=cache.layers)
        current, logits = cache, run(idx, position=position)
        expected, _ = forward_of_model(idx, cache=cache)
        if not (logits - expected).abs().max() <= TOLERANCE * expected.abs().max():  # NaN is not, either
            warn("--compile=True is ignored: nanogpt/decoding.py computes other logits than model.py; change it likewise")
            model.forward = forward_of_model
        return expected, None

    model.forward = forward
