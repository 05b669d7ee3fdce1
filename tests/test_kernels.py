"""The fast paths against the plain PyTorch that they replace: chunked cross-entropy, CPU attention, linear layers."""

import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from model import GPT, GPTConfig
from nanogpt import kernels
from nanogpt.kernels import EXPLICIT_MAX_TOKENS, chunked_cross_entropy, explicit_attention

# chunked cross-entropy


def head_and_targets(n: int = 32, vocab_size: int = 13) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return random x (N, 16), weight (V, 16) and targets (N,)."""
    torch.manual_seed(1)
    x, weight = torch.randn(n, 16, requires_grad=True), torch.randn(vocab_size, 16, requires_grad=True)
    return x, weight, torch.randint(vocab_size, (n,))


@pytest.mark.parametrize("rows", [1, 5, 16, 31, 32, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunked_loss_matches_cross_entropy(rows: int, dtype: torch.dtype) -> None:
    """Catches a chunk left out or counted twice, ignored targets that count, a gradient that is not scaled."""
    x, weight, targets = head_and_targets()
    targets[:5] = targets[16:24] = -1
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        expected = F.cross_entropy((x @ weight.T).float(), targets, ignore_index=-1)
        loss = chunked_cross_entropy(x, weight, targets, rows)
    expected_grads = torch.autograd.grad(3 * expected, (x, weight))
    grads = torch.autograd.grad(3 * loss, (x, weight))
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert (grad - expected_grad).norm() <= tolerance * expected_grad.norm()


def test_chunked_loss_of_ignored_targets_is_zero() -> None:
    """Catches a division by zero in a batch without targets to learn."""
    x, weight, targets = head_and_targets()
    loss = chunked_cross_entropy(x, weight, torch.full_like(targets, -1), rows=4)
    loss.backward()
    assert loss.item() == 0
    assert x.grad.abs().sum() == weight.grad.abs().sum() == 0


def test_chunked_loss_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an evaluation that fails under no_grad, computes the gradients as well, or returns another loss."""
    monkeypatch.setattr(kernels, "PREFER_ONEDNN", False)  # whose products PyTorch does not count
    x, weight, targets = head_and_targets()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        loss = chunked_cross_entropy(x, weight, targets, rows=3)
    assert counter.get_total_flops() == 2 * x.numel() * len(weight)  # the logits, and no gradients
    assert loss.item() == pytest.approx(F.cross_entropy(x @ weight.T, targets).item(), abs=1e-6)
    assert not loss.requires_grad


def test_chunked_loss_keeps_no_logits() -> None:
    """Catches logits that are kept for the backward pass, chunk by chunk."""
    x, weight, targets = head_and_targets(n=512, vocab_size=5000)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()), lambda packed: packed):
        chunked_cross_entropy(x, weight, targets, rows=16)
    assert max(kept) == weight.numel() < 5000 * 64


# attention


@pytest.mark.parametrize("T", [2, 7, 64])
def test_explicit_attention_matches_pytorch(T: int) -> None:
    """Catches scores that are not scaled, a mask that shows later positions, mixed-up heads."""
    torch.manual_seed(1)
    qkv = torch.randn(3, 3, 2, T, 8)
    expected = F.scaled_dot_product_attention(*qkv, is_causal=True)
    torch.testing.assert_close(explicit_attention(qkv, 0.0), expected)
    rounded = explicit_attention(qkv.bfloat16(), 0.0)
    torch.testing.assert_close(rounded.float(), expected, atol=0.04, rtol=0.04)


def test_explicit_attention_drops_weights() -> None:
    """Catches attention without dropout, or dropout that does not keep the mean."""
    torch.manual_seed(1)
    q, k, v = torch.randn(1, 1, 300, 8), torch.randn(1, 1, 300, 8), torch.ones(1, 1, 300, 8)
    y = explicit_attention(torch.stack((q, k, v)), 0.5)
    assert y.mean().item() == pytest.approx(1, abs=0.1)
    assert y.std() > 0.05


@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 512), (torch.float32, 128), (torch.float32, 2)])
@pytest.mark.parametrize("more", [0, 1])
def test_attention_on_a_cpu(dtype: torch.dtype, limit: int, more: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches the scores of a long context in memory at once, and PyTorch's kernel where it is slow: short, or in bfloat16."""
    monkeypatch.setitem(EXPLICIT_MAX_TOKENS, dtype, limit)
    dtypes, T = [], limit + more
    attention = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, *a, **b: dtypes.append(q.dtype) or attention(q, *a, **b))
    model = GPT(GPTConfig(block_size=T, vocab_size=13, n_layer=1, n_head=2, n_embd=16))
    idx = torch.randint(13, (1, T))
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        model(idx, idx)
    assert dtypes == [torch.float32] * more


@pytest.mark.parametrize(("capability", "expected"), [("AVX512", 0), ("AVX2", 128)])
def test_float32_attention_by_cpu(capability: str, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches explicit attention in float32 where PyTorch's kernel is faster: on CPUs with AVX-512."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert kernels.explicit_max_tokens().get(torch.float32, 0) == expected


@pytest.mark.parametrize("T", [8, 129, 513])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cpu_attention_matches_pytorch(dtype: torch.dtype, T: int) -> None:
    """Catches a result in another dtype or of another kernel's arguments, on either side of the limits."""
    torch.manual_seed(1)
    qkv = torch.randn(3, 1, 2, T, 8, dtype=dtype)
    y = kernels.cpu_attention(qkv, *qkv, mask=None, dropout=0.0, is_causal=True)
    expected = F.scaled_dot_product_attention(*qkv.float(), is_causal=True)
    assert y.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 0.04
    torch.testing.assert_close(y.float(), expected, atol=tolerance, rtol=tolerance)


# linear layers by oneDNN

HAS_ONEDNN = kernels.can_pack(torch.float32)


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"cpu_name": "AMD EPYC", "avx512_f": True}, HAS_ONEDNN),
        ({"cpu_name": "AMD EPYC", "avx512_f": False}, False),
        ({"cpu_name": "Intel(R) Xeon(R)", "avx512_f": True}, False),
        ({}, False),
        (None, False),
    ],
)
def test_mkl_is_slow_for_avx512_of_amd(capabilities: dict | None, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches one answer for all CPUs, or an error on a PyTorch that cannot tell (None)."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    if capabilities is None:
        monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert kernels.mkl_is_slow() == expected


@pytest.mark.skipif(not HAS_ONEDNN, reason="this CPU or this PyTorch has no oneDNN")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("outputs", [1, 32, 80])
@pytest.mark.parametrize("shape", [(5, 48), (1, 1, 48), (3, 5, 48)])
def test_training_by_onednn(shape: tuple[int, ...], outputs: int, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a gradient that is transposed or of other rows, a lost bias, and parameters that are not those of the model."""
    monkeypatch.setattr(kernels, "PREFER_ONEDNN", True)
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(48, outputs, bias=bias))
    x = torch.randn(shape, requires_grad=True)
    y = model(x)
    weights = torch.randn_like(y)
    expected = (y, *torch.autograd.grad(y, (x, *model.parameters()), weights))

    names = list(model.state_dict())
    kernels.train_by_onednn(model)

    assert isinstance(model[0], kernels.OneDNNLinear) and list(model.state_dict()) == names
    tied = GPT(GPTConfig(block_size=4, vocab_size=8, n_layer=1, n_head=1, n_embd=8))
    kernels.train_by_onednn(tied)
    assert tied.lm_head.weight is tied.transformer.wte.weight
    y = model(x)
    torch.testing.assert_close((y, *torch.autograd.grad(y, (x, *model.parameters()), weights)), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.skipif(not HAS_ONEDNN, reason="this CPU or this PyTorch has no oneDNN")
def test_chunked_loss_by_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a chunk whose products are transposed, and mixed precision that oneDNN's float32 overrides."""
    monkeypatch.setattr(kernels, "PREFER_ONEDNN", True)
    x, weight, targets = head_and_targets()
    expected = torch.autograd.grad(F.cross_entropy(x @ weight.T, targets), (x, weight))

    loss = chunked_cross_entropy(x, weight, targets, rows=5)

    torch.testing.assert_close(torch.autograd.grad(loss, (x, weight)), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert kernels.matmul(x, weight.T).dtype == torch.bfloat16


# packed linear layers


def test_layers_are_replaced_one_by_one() -> None:
    """Catches a model that is in memory twice while its weights are packed."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4)), nn.Linear(4, 4))
    weights = [weakref.ref(parameter) for name, parameter in model.named_parameters() if name.endswith("weight")]
    alive = []

    def new(linear: nn.Linear) -> nn.Module:
        alive.append(sum(weight() is not None for weight in weights))
        return nn.Identity()

    kernels.replace_linear_layers(model, new)
    assert alive == [3, 2, 1]


@pytest.mark.skipif(not HAS_ONEDNN, reason="this CPU or this PyTorch cannot pack weights")
@pytest.mark.parametrize("pack_min_weights", [0, 1 << 30])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 48), (1, 5, 48), (3, 1, 48)])
def test_packed_linear_is_linear(
    shape: tuple[int, ...], bias: bool, pack_min_weights: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a packed layer that loses its bias or mixes up rows, be its weight small or large."""
    monkeypatch.setattr(kernels, "UNPACKED_ROW_MAX_WEIGHTS", pack_min_weights)
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(48, 32, bias=bias))
    x = torch.randn(shape)
    expected = model(x).detach()
    with torch.no_grad():
        kernels.pack_linear_layers(model, texts=1)
        torch.testing.assert_close(model(x), expected)
    assert isinstance(model[0], kernels.PackedLinear)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 48), (1, 5, 48), (48,)])
def test_row_linear_is_linear(shape: tuple[int, ...], bias: bool) -> None:
    """Catches a lost bias or shape, a weight that is not the model's own, and oneDNN left off afterwards."""
    torch.manual_seed(1)
    linear = nn.Linear(48, 32, bias=bias).bfloat16()
    x = torch.randn(shape).bfloat16()
    expected = nn.functional.linear(*(t.detach().float() for t in (x, *linear.parameters())))
    was_enabled = torch.backends.mkldnn.enabled
    row_linear = kernels.RowLinear(linear)
    with torch.no_grad():
        y = row_linear(x)
    torch.testing.assert_close(y, expected.bfloat16(), rtol=0.01, atol=0.01)
    assert row_linear.weight is linear.weight and torch.backends.mkldnn.enabled == was_enabled


ZEN4 = {"cpu_name": "AMD EPYC", "avx512_bf16": True, "avx_vnni": False}


@pytest.mark.parametrize(
    "capabilities, texts, dtype, expected",
    [
        (ZEN4, 1, torch.bfloat16, True),
        (ZEN4, 2, torch.bfloat16, False),
        (ZEN4, 1, torch.float32, False),
        (ZEN4 | {"avx_vnni": True}, 1, torch.bfloat16, False),  # Zen 5
        (ZEN4 | {"avx512_bf16": False}, 1, torch.bfloat16, False),  # Zen 3
        (ZEN4 | {"cpu_name": "Intel Xeon"}, 1, torch.bfloat16, False),
        ({}, 1, torch.bfloat16, False),
        (None, 1, torch.bfloat16, False),
    ],
)
def test_rows_on_zen4(capabilities: dict | None, texts: int, dtype: torch.dtype, expected: bool, monkeypatch) -> None:
    """Catches unpacked weights on another CPU, for several texts or in float32; None: a PyTorch that cannot tell."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    if capabilities is None:
        monkeypatch.delattr(torch.cpu, "get_capabilities")
    monkeypatch.setattr(kernels, "PackedLinear", nn.Identity)  # needs oneDNN
    model = nn.Sequential(nn.Linear(48, 32).to(dtype))
    kernels.pack_linear_layers(model, texts)
    assert isinstance(model[0], kernels.RowLinear) == expected


# weights in 16 or 8 bits


@pytest.mark.parametrize("products", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", [48, 20])  # 20: not a multiple of INT8_BLOCK
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (2, 5), (3, 40)])
def test_int8_linear(shape: tuple[int, ...], bias: bool, channels: int, products: torch.dtype) -> None:
    """Catches scales of the wrong channel, a bias left out, memory read beyond a row; for one row, some, and many."""
    torch.manual_seed(1)
    linear = nn.Linear(channels, 9, bias=bias).requires_grad_(False)
    linear.weight *= torch.logspace(-3, 3, 9)[:, None]
    linear.weight[4] = 0
    x = torch.randn(*shape, channels)
    y = kernels.WeightOnlyLinear(linear, torch.int8, products)(x)
    expected, steps = linear(x), linear.weight.abs().amax(dim=1) / 127
    assert y.dtype == torch.float32 and y.shape == expected.shape
    # each weight is at most about half a step away from its int8, and x and y may be rounded to bfloat16
    limit = 0.6 * steps * x.abs().sum(-1, keepdim=True) + 2**-7 * (x.abs() @ linear.weight.abs().T + expected.abs())
    assert ((y - expected).abs() <= limit + 1e-9).all()


HAS_FBGEMM = "fbgemm" in torch.backends.quantized.supported_engines


@pytest.mark.skipif(not HAS_FBGEMM, reason="this PyTorch has no FBGEMM")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (2, 5), (3, 40)])
def test_float16_linear(shape: tuple[int, ...], bias: bool) -> None:
    """Catches a bias left out, rows that are mixed up, and inputs or sums that are rounded to float16."""
    torch.manual_seed(1)
    linear = nn.Linear(48, 9, bias=bias).requires_grad_(False)
    x = torch.randn(*shape, 48) * 1e5  # beyond float16
    if bias:
        linear.bias *= 1e5
    expected = F.linear(x, linear.weight.half().float(), linear.bias)
    torch.testing.assert_close(kernels.Float16Linear(linear)(x), expected, atol=1.0, rtol=1e-5)  # of 1e5


@pytest.mark.parametrize("capability", ["DEFAULT", "AVX2", "AVX512"])
def test_fast_float16(capability: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches FBGEMM where it has not been measured, or where it is missing, as on an ARM CPU."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert kernels.has_fast_float16() == (HAS_FBGEMM and capability == "AVX2")


@pytest.mark.parametrize("packs", [pytest.param(True, marks=pytest.mark.skipif(not HAS_FBGEMM, reason="no FBGEMM")), False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int8])
def test_tied_embedding(dtype: torch.dtype, packs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an embedding with other rows than the head's, or scaled by those of another token."""
    monkeypatch.setattr(kernels, "has_fast_float16", lambda: packs)
    torch.manual_seed(1)
    model = nn.ModuleDict({"wte": nn.Embedding(30, 16), "other": nn.Embedding(30, 16), "head": nn.Linear(16, 30, bias=False)})
    model["head"].weight = model["wte"].weight
    idx = torch.tensor([[0, 29, 7]])
    expected, other = model["wte"](idx).detach(), model["other"]
    with torch.no_grad():
        kernels.quantize_linear_layers(model, dtype, torch.float32)
        x = model["wte"](idx)
    assert isinstance(model["head"], kernels.Float16Linear) == (packs and dtype == torch.float16)
    assert model["other"] is other
    assert x.dtype == torch.float32
    torch.testing.assert_close(x, expected, atol=0.02, rtol=0.01)
