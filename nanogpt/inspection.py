"""What a model computes on the way to its logits: residual stream, attention weights and logit lens, by forward hooks.

found = activations(model, [20, 43, 50])  # one text of T tokens
found.attention                           # (n_layer, n_head, T, T)
logit_lens(model, found.residual)         # (n_layer + 1, T, V)
"""

import ast
import inspect
import math
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from model import GPT


@dataclass
class Activations:
    """What a GPT computes for one text of T tokens."""

    residual: torch.Tensor  # (n_layer + 1, T, C): the residual stream after the embeddings and after each block
    attention: torch.Tensor  # (n_layer, n_head, T, T): row i holds the weights with which query i attends to each key
    logits: torch.Tensor  # (T, V)


@torch.inference_mode()
def activations(model: GPT, ids: list[int]) -> Activations:
    """Run a GPT on one text of at most block_size tokens; its logits are those of `model(idx)`, for every position."""
    residual: list[torch.Tensor] = []  # (T, C) each
    qkv: list[torch.Tensor] = []  # (T, 3 C) each
    idx = torch.tensor([ids], device=model.lm_head.weight.device)
    hooks = [model.transformer.drop.register_forward_hook(_keep(residual))]
    for block in model.transformer.h:
        hooks += [block.attn.c_attn.register_forward_hook(_keep(qkv)), block.register_forward_hook(_keep(residual))]
    try:
        logits, _ = model(idx, targets=idx)  # without targets, it computes the last position only
    finally:
        for hook in hooks:
            hook.remove()
    attention = torch.stack([_attention_weights(layer, model.config.n_head) for layer in qkv])
    return Activations(torch.stack(residual), attention, logits[0])


def _keep(outputs: list[torch.Tensor]) -> Callable[..., None]:
    """Return a forward hook that appends a module's output for the one text of the batch."""
    return lambda module, arguments, output: outputs.append(output[0])


def _attention_weights(qkv: torch.Tensor, n_head: int) -> torch.Tensor:
    """Return softmax(q k^T / sqrt(hs)) under the causal mask: the output of c_attn, (T, 3 C), -> (nh, T, T)."""
    T, channels = qkv.shape
    q, k, _ = qkv.view(T, 3, n_head, channels // 3 // n_head).permute(1, 2, 0, 3)  # (nh, T, hs) each
    scores = q @ k.mT / math.sqrt(q.size(-1))
    future = torch.ones(T, T, dtype=torch.bool, device=qkv.device).triu(1)
    return scores.masked_fill(future, -math.inf).softmax(-1)


@torch.inference_mode()
def logit_lens(model: GPT, residual: torch.Tensor) -> torch.Tensor:
    """Logit lens (nostalgebraist 2020): the logits that each layer would give if it were the last one.

    residual (..., C) -> (..., V), through the final LayerNorm and the output head.
    """
    return model.lm_head(model.transformer.ln_f(residual))


@torch.inference_mode()
def principal_components(vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the first two principal components of vectors (N, C): coordinates (N, 2), and the shares of variance (2,)."""
    centered = (vectors - vectors.mean(0)).double()
    variances, directions = torch.linalg.eigh(centered.T @ centered)  # ascending
    variances, directions = variances.flip(0), directions.flip(1)[:, :2]
    largest = directions.abs().argmax(0, keepdim=True)
    directions = directions * directions.gather(0, largest).sign()  # the sign of a direction is arbitrary
    return centered @ directions, variances[:2] / variances.sum().clamp(min=1e-12)


def source(function: Any, marks: dict[str, str]) -> dict[str, Any]:
    """Return a function's lines in model.py and, for each of `marks`, the numbers of the statement that holds its text.

    {"line": number of the first, "text": source, "marks": {name: [first, last]}}, without a mark that is not there once: people
    change model.py.
    """
    lines, first = inspect.getsourcelines(function)
    text = textwrap.dedent("".join(lines))
    statements = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.stmt) and not hasattr(node, "body")]
    found = {}
    for name, snippet in marks.items():
        holding = [node for node in statements if snippet in (ast.get_source_segment(text, node) or "")]
        if len(holding) == 1:
            found[name] = [first + line - 1 for line in (holding[0].lineno, holding[0].end_lineno)]
    return {"line": first, "text": text, "marks": found}
