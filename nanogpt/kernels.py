"""Fast paths of the model: CPU attention and products, chunked cross-entropy, linear layers with packed or quantized weights.

Each computes what a line of plain PyTorch does, faster or in less memory. To understand a GPT, skip this file.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

UNPACKED_ROW_MAX_WEIGHTS = 1 << 17  # matrices up to this size stay in the cache: a single row is faster unpacked
INT8_MAX_ROWS = 16  # up to here PyTorch's int8 operator is faster than a product with the dequantized weight
INT8_BLOCK = 16  # weights that it reads at a time; it does not check that they divide a row


def explicit_max_tokens() -> dict[torch.dtype, int]:
    """Return the context up to which explicit attention is faster on this CPU, by dtype; its memory grows with T^2."""
    return {torch.bfloat16: 512} | ({} if torch.backends.cpu.get_cpu_capability() == "AVX512" else {torch.float32: 128})


EXPLICIT_MAX_TOKENS = explicit_max_tokens()


def cpu_attention(
    qkv: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
    is_causal: bool,
) -> torch.Tensor:
    """Return `scaled_dot_product_attention(q, k, v)` on a CPU, where PyTorch's own kernel is not always the fastest.

    Shapes: q (B, nh, Tq, hs), k and v (B, nh, Tk, hs). `qkv`, (3, B, nh, T, hs), is the stack from which they came. Short
    causal sequences use plain matrix products, all others scaled_dot_product_attention in float32.
    """
    if is_causal and q.size(2) <= EXPLICIT_MAX_TOKENS.get(q.dtype, 0):
        return explicit_attention(qkv, dropout)
    with torch.autocast("cpu", enabled=False):
        y = F.scaled_dot_product_attention(
            q.float(), k.float(), v.float(), attn_mask=mask, dropout_p=dropout, is_causal=is_causal
        )
    return y.to(q.dtype)


def explicit_attention(qkv: torch.Tensor, dropout: float) -> torch.Tensor:
    """Causal attention with the whole (T, T) score matrix in memory: qkv (3, B, nh, T, hs) -> (B, nh, T, hs)."""
    _, B, nh, T, hs = qkv.shape
    with torch.autocast("cpu", enabled=False):  # autocast would run the softmax in float32
        q, k, v = qkv.reshape(3, B * nh, T, hs)  # one copy of all three
        causal_mask = torch.full((T, T), -math.inf, dtype=q.dtype, device=q.device).triu(1)
        scores = torch.baddbmm(causal_mask, q, k.mT, alpha=1 / math.sqrt(hs))  # (B * nh, T, T)
        weights = F.dropout(F.softmax(scores, dim=-1), dropout)
        return torch.bmm(weights, v).view(B, nh, T, hs)


def cpu_capabilities() -> dict[str, Any]:
    """Return PyTorch's names of this CPU's instruction sets, and "cpu_name"; empty if PyTorch cannot tell."""
    return getattr(torch.cpu, "get_capabilities", dict)()


def mkl_is_slow() -> bool:
    """Whether the CPU is AMD's and has AVX-512: MKL, PyTorch's library for float32 products on x86, uses Intel's only."""
    capabilities = cpu_capabilities()
    has_avx512_of_amd = "AMD" in capabilities.get("cpu_name", "") and capabilities.get("avx512_f", False)
    return has_avx512_of_amd and hasattr(torch.ops.mkldnn, "_linear_pointwise")


PREFER_ONEDNN = mkl_is_slow()  # to MKL, for float32 products


def by_onednn(x: torch.Tensor) -> bool:
    """Whether oneDNN computes the products of x: in float32 on a CPU where MKL is slow."""
    return (
        PREFER_ONEDNN
        and (x.dtype, x.device.type) == (torch.float32, "cpu")
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


def matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return a @ b, by the faster library if b is one matrix."""
    return torch.ops.mkldnn._linear_pointwise(a, b.T, None, "none", [], "") if b.dim() == 2 and by_onednn(a) else a @ b


class LinearFunction(torch.autograd.Function):
    """x @ weight.T by `matmul`, forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        rows = matmul(x.flatten(0, -2), weight.T)
        return torch.ops.aten._unsafe_view(rows, (*x.shape[:-1], len(weight)))  # FSDP warns of modules that return a view

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, weight = ctx.saved_tensors
        rows, grad_rows = x.flatten(0, -2), grad.flatten(0, -2)
        if len(weight) > weight.size(1):  # oneDNN copies its first argument if that is transposed: take the smaller one
            return matmul(grad, weight), matmul(rows.T, grad_rows).T
        return matmul(grad, weight), matmul(grad_rows.T, rows)


class OneDNNLinear(nn.Module):
    """Linear layer for training in float32 on a CPU, with the parameters of an `nn.Linear`, by oneDNN."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = LinearFunction.apply(x, self.weight)
        return y if self.bias is None else y + self.bias


def train_by_onednn(model: nn.Module) -> None:
    """Replace every Linear layer of a model by a `OneDNNLinear`; the parameters stay."""
    replace_linear_layers(model, OneDNNLinear)


class ChunkedCrossEntropy(torch.autograd.Function):
    """Fused linear + cross-entropy, in chunks of rows, so that the (N, V) logits never exist at once.

    The forward pass also computes the gradients, so that no logits are recomputed.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, rows: int) -> torch.Tensor:
        """Return the sum for x (N, C), weight (V, C) and targets (N,), `rows` rows at a time; targets of -1 are ignored."""
        total = torch.zeros((), device=x.device)
        needs_grad = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        if needs_grad:
            dx, dweight = torch.empty_like(x), torch.zeros_like(weight)
        for i in range(0, len(x), rows):
            x_chunk, target = x[i : i + rows], targets[i : i + rows]
            logits = matmul(x_chunk, weight.T)  # (rows, V)
            dtype = logits.dtype  # autocast's, if it is on
            log_probs = F.log_softmax(logits.float(), dim=-1)
            del logits
            total += F.nll_loss(log_probs, target, ignore_index=-1, reduction="sum")
            if needs_grad:
                dlogits = log_probs.exp_()  # probabilities, minus 1 at the target
                dlogits.scatter_add_(1, target.clamp(min=0)[:, None], torch.full_like(dlogits[:, :1], -1.0))
                dlogits *= (target != -1)[:, None]
                dlogits = dlogits.to(dtype)
                dx[i : i + rows] = matmul(dlogits, weight)
                dweight += matmul(dlogits.T, x_chunk)
                del dlogits
            del log_probs  # before the next chunk allocates as much
        if needs_grad:
            ctx.save_for_backward(dx, dweight)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        dx, dweight = ctx.saved_tensors
        return dx.mul_(grad), dweight.mul_(grad), None, None


def chunked_cross_entropy(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, rows: int) -> torch.Tensor:
    """Return the mean cross-entropy of logits `x @ weight.T` for x (N, C), weight (V, C), targets (N,), in chunks of `rows`."""
    if not torch.is_grad_enabled():  # evaluation: no gradients; inside an autograd.Function the mode is always off
        x, weight = x.detach(), weight.detach()
    total = ChunkedCrossEntropy.apply(x, weight, targets, rows)
    return total / (targets != -1).sum().clamp(min=1)


class PackedLinear(nn.Module):
    """Linear layer for inference on a CPU, its weight stored in oneDNN's blocked layout.

    For one row a large matrix is twice as fast as with `nn.Linear`; in float32 many rows are faster, too.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight = linear.weight.detach()
        self.bias = linear.bias
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, 64)
        self.unpacked = weight if weight.numel() <= UNPACKED_ROW_MAX_WEIGHTS else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.unpacked is not None and x.numel() == x.size(-1):  # a single row
            return F.linear(x, self.unpacked, self.bias)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


class RowLinear(nn.Module):
    """Linear layer for generating one text in bfloat16 on a CPU of Zen 4, where oneDNN reads the weight for one row slowly."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.numel() > x.size(-1):  # prefill
            return F.linear(x, self.weight, self.bias)
        is_enabled = torch._C._get_mkldnn_enabled()
        torch._C._set_mkldnn_enabled(False)  # of oneDNN, once MKL-DNN: PyTorch then multiplies by code of its own
        try:
            y = torch.mv(self.weight, x.flatten())
        finally:
            torch._C._set_mkldnn_enabled(is_enabled)
        return (y if self.bias is None else y + self.bias).view(*x.shape[:-1], -1)


def is_zen4() -> bool:
    """Whether the CPU is AMD's Zen 4, by its instructions: it has those for bfloat16, but not AVX-VNNI as Zen 5 has."""
    capabilities = cpu_capabilities()
    is_amd = "AMD" in capabilities.get("cpu_name", "")
    return is_amd and capabilities.get("avx512_bf16", False) and not capabilities.get("avx_vnni", True)


def has_avx() -> bool:
    """Whether PyTorch uses the AVX2 or AVX-512 instructions of this CPU."""
    return torch.backends.cpu.get_cpu_capability().startswith("AVX")


def can_pack(dtype: torch.dtype) -> bool:
    """Whether this PyTorch and this CPU have the operators of `PackedLinear`, which PyTorch does not document."""
    return (
        dtype in (torch.float32, torch.bfloat16)
        and torch.backends.mkldnn.is_available()
        and has_avx()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        and (dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


def pack_linear_layers(model: nn.Module, texts: int) -> None:
    """Replace every Linear layer of a model by a `PackedLinear`, or by a `RowLinear` if that generates `texts` texts faster.

    The model cannot be trained or saved after that.
    """
    by_row = texts == 1 and is_zen4()
    replace_linear_layers(
        model, lambda linear: (RowLinear if by_row and linear.weight.dtype == torch.bfloat16 else PackedLinear)(linear)
    )


def replace_linear_layers(model: nn.Module, new: Callable[[nn.Linear], nn.Module]) -> None:
    """Replace every Linear layer of a model by new(layer), one after the other: memory holds one of them twice, not all."""
    layers = children(model, nn.Linear)
    while layers:
        parent, name, linear = layers.pop(0)  # the previous layer is freed here
        setattr(parent, name, new(linear))


def children(model: nn.Module, kind: type[nn.Module]) -> list[tuple[nn.Module, str, nn.Module]]:
    """Return (parent, name, module) of each module of this kind in a model."""
    return [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, kind)
    ]


class WeightOnlyLinear(nn.Module):
    """Linear layer for inference on a CPU with a float16, bfloat16 or int8 weight; inputs and outputs are float32.

    int8 is symmetric, with a scale for each output channel. A single row, whose time is that of reading the weight, reads it as
    it is. Many rows (prefill) are multiplied by the dequantized weight, in `products`, the dtype that is fastest for that.
    """

    def __init__(self, linear: nn.Linear, dtype: torch.dtype, products: torch.dtype):
        super().__init__()
        weight = linear.weight.detach()  # (out, in)
        self.bias, self.products = linear.bias, products
        self.scale, self.max_rows = None, 1
        if dtype == torch.int8:
            # the operator takes bfloat16 scales, so they are rounded before the weights are
            self.scale = (weight.abs().amax(dim=1) / 127).clamp(min=1e-30).bfloat16()  # (out,)
            weight = (weight / self.scale[:, None]).round_().clamp_(-127, 127)
            self.max_rows = INT8_MAX_ROWS if has_avx() and weight.size(1) % INT8_BLOCK == 0 else 0
        self.weight = weight.to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.size(-1))
        if len(rows) > self.max_rows:
            rows, weight = rows.to(self.products), self.weight.to(self.products)
            y = matmul(rows, weight.T).float()
            if self.scale is not None:
                y *= self.scale
        elif self.scale is None:
            y = F.linear(rows.to(self.weight.dtype), self.weight).float()
        else:
            y = torch._weight_int8pack_mm(rows.bfloat16(), self.weight, self.scale).float()
        if self.bias is not None:
            y += self.bias
        return y.view(*x.shape[:-1], -1)


class Float16Linear(nn.Module):
    """Linear layer for inference on a CPU, its weight packed in float16 by FBGEMM; products are in float32."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.packed = torch.ops.quantized.linear_prepack_fp16(linear.weight.detach(), linear.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.quantized.linear_dynamic_fp16(x, self.packed)


def has_fast_float16() -> bool:
    """Whether `Float16Linear` is the fastest layer for any number of rows: on CPUs with AVX2, but without AVX-512."""
    return (
        torch.backends.cpu.get_cpu_capability() == "AVX2"
        and "fbgemm" in torch.backends.quantized.supported_engines
        and hasattr(torch.ops.quantized, "linear_prepack_fp16")
        and hasattr(torch.ops.quantized, "linear_dynamic_fp16")
    )


class TiedEmbedding(nn.Module):
    """Embedding that looks up rows of the output head's weight (V, C) in few bits: ids (B, T) -> float32 (B, T, C)."""

    def __init__(self, weight: torch.Tensor, scale: torch.Tensor | None):
        super().__init__()
        self.weight, self.scale = weight, scale

    def forward(self, idx: torch.Tensor) -> torch.Tensor:
        x = F.embedding(idx, self.weight).float()
        return x if self.scale is None else x * self.scale[idx][..., None]


def quantize_linear_layers(model: nn.Module, dtype: torch.dtype, products: torch.dtype) -> None:
    """Replace every Linear layer of a float32 model by one with a weight in `dtype`, and an embedding tied to it, too.

    `products` is the dtype of a `WeightOnlyLinear`'s products.
    """
    embeddings = children(model, nn.Embedding)
    packs = dtype == torch.float16 and has_fast_float16()

    def quantized(linear: nn.Linear) -> nn.Module:
        layer = Float16Linear(linear) if packs else WeightOnlyLinear(linear, dtype, products)
        for owner, tied, embedding in embeddings:
            if embedding.weight is linear.weight:
                weight, scale = (linear.weight.detach().half(), None) if packs else (layer.weight, layer.scale)
                setattr(owner, tied, TiedEmbedding(weight, scale))
        return layer

    replace_linear_layers(model, quantized)
