"""Muon against PyTorch's and a naive loop; which parameters it gets; saving and resuming."""

import contextlib
from pathlib import Path

from configurator import parse

import pytest
import torch
from torch.torch_version import TorchVersion

import train
from model import GPT, GPTConfig
from nanogpt import checkpoint
from nanogpt.errors import UserError
from nanogpt.optim import Muon, MuonWithAdamW, build_optimizer

SETTINGS = {"lr": 0.02, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}
SHAPE = GPTConfig(block_size=8, vocab_size=11, n_layer=2, n_head=2, n_embd=16, bias=True)


def muon_with_adamw(model: GPT) -> MuonWithAdamW:
    return build_optimizer(model, "muon", 0.1, 1e-2, (0.9, 0.95), "cpu")


def update(model: GPT, optimizer: MuonWithAdamW, steps: int, seed: int = 3) -> None:
    """Train on random batches."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        model(*torch.randint(11, (2, 4, 8), generator=generator))[1].backward()
        optimizer.step()


def naive_muon_step(p: torch.Tensor, momentum: torch.Tensor) -> torch.Tensor:
    """Return a matrix after one Muon update in float64: Nesterov momentum, Newton-Schulz, decoupled weight decay.

    Source: "Muon is Scalable for LLM Training" (Liu et al. 2025), equations 1 to 4.
    """
    momentum.lerp_(p.grad.double(), 0.05)
    x = p.grad.double().lerp(momentum, 0.95)
    x = x / x.norm()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return p * (1 - 0.02 * 0.1) - 0.02 * 0.2 * max(p.shape) ** 0.5 * x


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_muon_matches_a_reference(monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    """Catches matrices mixed up in a stack, a tall one that is not transposed, a wrong step size, a lost momentum.

    In bfloat16 the reference is PyTorch's Muon, in float32 a naive loop in float64, so that rounding does not matter.
    """
    monkeypatch.setattr("nanogpt.optim.has_bfloat16_instructions", lambda: dtype == "bfloat16")
    torch.manual_seed(1)
    shapes = [(8, 24), (24, 8), (8, 8), (8, 24), (5, 8), (8, 8), (24, 8)]
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    momenta = [torch.zeros(shape, dtype=torch.float64) for shape in shapes]
    muon, pytorchs = Muon(ours, **SETTINGS), torch.optim.Muon(theirs, **SETTINGS)
    largest_update = 0.02 * 0.2 * 24**0.5  # learning rate x scale, for a singular value of 1
    tolerance = largest_update * (0.02 if dtype == "bfloat16" else 1e-4)
    for step in range(5):
        for index, (p, q) in enumerate(zip(ours, theirs, strict=True)):
            gradient = torch.randn(p.shape)
            p.grad, q.grad = (None, None) if index == step else (gradient, gradient.clone())
        muon.step()
        if dtype == "bfloat16":
            pytorchs.step()
        else:
            for q, momentum in zip(theirs, momenta, strict=True):
                if q.grad is not None:
                    q.data = naive_muon_step(q, momentum).detach().float()
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=tolerance)


@pytest.mark.parametrize("in_bfloat16", [True, False])
@pytest.mark.parametrize("rows", [4, 24])
def test_stacked_matrices_are_updated_one_by_one(monkeypatch: pytest.MonkeyPatch, in_bfloat16: bool, rows: int) -> None:
    """Catches heads that share one orthogonalization or step size, and rows that end up in another head."""
    monkeypatch.setattr("nanogpt.optim.has_bfloat16_instructions", lambda: in_bfloat16)
    torch.manual_seed(1)
    stack = torch.nn.Parameter(torch.randn(3 * rows, 16))
    alone = [torch.nn.Parameter(p.detach().clone()) for p in stack.chunk(3)]
    muon, reference = Muon([stack], {stack: 3}, **SETTINGS), torch.optim.Muon(alone, **SETTINGS)
    for _ in range(3):
        stack.grad = torch.randn(stack.shape) * torch.tensor([1.0, 10.0, 100.0]).repeat_interleave(rows)[:, None]
        for p, gradient in zip(alone, stack.grad.chunk(3), strict=True):
            p.grad = gradient.clone()
        muon.step()
        reference.step()
    largest_update = 0.02 * 0.2 * max(rows, 16) ** 0.5
    torch.testing.assert_close(stack, torch.cat(alone), rtol=0, atol=largest_update * 0.05)


def test_heads_are_stacked_matrices() -> None:
    """Catches a query, key or value matrix that is orthogonalized with those of other heads, in any layer."""
    model = GPT(SHAPE)
    muon = muon_with_adamw(model).parts["muon"]
    assert muon.stacked == {model.transformer.h[layer].attn.c_attn.weight: 6 for layer in range(2)}


def test_muon_has_adamws_momentum() -> None:
    """Catches a beta1 that changes one part of the optimizer only."""
    optimizer = build_optimizer(GPT(SHAPE), "muon", 0.1, 1e-2, (0.8, 0.95), "cpu")
    muon, adamw = (optimizer.parts[name].param_groups[0] for name in ("muon", "adamw"))
    assert (muon["momentum"], adamw["betas"]) == (0.8, (0.8, 0.95))


@pytest.mark.parametrize("has_instructions", [True, False])
def test_update_is_nearly_orthogonal(monkeypatch: pytest.MonkeyPatch, has_instructions: bool) -> None:
    """Catches a Newton-Schulz iteration that does not converge, in bfloat16 or float32."""
    monkeypatch.setattr("nanogpt.optim.has_bfloat16_instructions", lambda: has_instructions)
    p = torch.nn.Parameter(torch.zeros(16, 64))
    muon = Muon([p], lr=1.0, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    muon.step()
    values = torch.linalg.svdvals(p.detach() / (0.2 * 8))
    assert values.min() > 0.5
    assert values.max() < 1.3


def test_each_parameter_has_one_optimizer() -> None:
    """Catches Muon on embeddings, the output head or vectors, and parameters that no optimizer updates."""
    model = GPT(SHAPE)
    optimizer = muon_with_adamw(model)
    names = {id(p): name for name, p in model.named_parameters()}
    muon, *adamw = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
    matrices = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
    assert muon == [f"transformer.h.{layer}.{name}.weight" for layer in range(2) for name in matrices]
    assert adamw[0] == ["transformer.wte.weight", "transformer.wpe.weight"]
    assert sorted(muon + adamw[0] + adamw[1]) == sorted(names.values())
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.1, 0.0]


def test_bigram_refuses_muon() -> None:
    """Catches Muon without matrices, which PyTorch refuses with a traceback."""
    with pytest.raises(UserError, match="bigram"):
        parse(train.Config, ["--optimizer=muon", "--model=bigram"])


@pytest.mark.parametrize("version, works", [("2.9.1+cu128", False), ("2.10.0", True), ("2.14.1", True)])
def test_muon_with_fsdp_needs_a_newer_pytorch(monkeypatch: pytest.MonkeyPatch, version: str, works: bool) -> None:
    """Catches the traceback of PyTorch 2.9, or versions compared as text, for which 2.10 comes before 2.9."""
    monkeypatch.setattr(torch, "__version__", TorchVersion(version))
    model = GPT(SHAPE)
    muon_with_adamw(model)  # not sharded
    model.reshard = None  # what FSDP adds
    with contextlib.nullcontext() if works else pytest.raises(UserError, match=r"needs PyTorch 2\.10 or newer, got 2\.9\.1"):
        muon_with_adamw(model)


def test_muon_state_in_a_checkpoint(tmp_path: Path) -> None:
    """Catches momenta or moments that are lost, or restored to other parameters."""
    torch.manual_seed(1)
    model = GPT(SHAPE)
    optimizer = muon_with_adamw(model)
    update(model, optimizer, 3)
    checkpoint.save(tmp_path / "ckpt.pt", checkpoint.pack(model, optimizer, 3, 2.5, {}, {}))
    update(model, optimizer, 2, seed=4)
    ckpt = checkpoint.load(tmp_path / "ckpt.pt")
    again = checkpoint.build_model(ckpt)
    restored = muon_with_adamw(again)
    checkpoint.restore_optimizer(ckpt, restored, torch.amp.GradScaler("cpu", enabled=False))
    update(again, restored, 2, seed=4)
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("saved_with_muon", [True, False])
def test_state_of_the_other_optimizer_is_refused(tmp_path: Path, saved_with_muon: bool) -> None:
    """Catches a traceback, or a resumed run without its momenta."""
    model = GPT(SHAPE)
    optimizers = [build_optimizer(model, name, 0.1, 1e-2, (0.9, 0.95), "cpu") for name in ("adamw", "muon")]
    update(model, optimizers[saved_with_muon], 1)
    checkpoint.save(tmp_path / "ckpt.pt", checkpoint.pack(model, optimizers[saved_with_muon], 1, 2.5, {}, {}))
    with pytest.raises(UserError, match=r"Muon.s.*--init_from="):
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        checkpoint.restore_optimizer(checkpoint.load(tmp_path / "ckpt.pt"), optimizers[not saved_with_muon], scaler)


def test_resume_with_muon_is_bit_exact(dataset: Path, tmp_path: Path) -> None:
    """Catches a resumed run with AdamW, or with momenta of zero."""
    shape = ["--n_layer=2", "--n_head=2", "--n_embd=16", "--block_size=8", "--batch_size=4", "--device=cpu", "--dtype=float32"]
    flags = [*shape, f"--dataset={dataset}", "--optimizer=muon", "--eval_iters=1", "--eval_interval=5", "--warmup_iters=2"]
    flags += ["--gradient_accumulation_steps=1", "--lr_decay_iters=10"]
    train.main(parse(train.Config, [*flags, "--max_iters=10", f"--out_dir={tmp_path / 'whole'}"]))
    parts = f"--out_dir={tmp_path / 'parts'}"
    train.main(parse(train.Config, [*flags, "--max_iters=5", parts]))
    train.main(parse(train.Config, ["--init_from=resume", parts, "--max_iters=10"]))
    whole, again = (torch.load(tmp_path / name / "ckpt.pt", weights_only=True) for name in ("whole", "parts"))
    assert again["optimizer"].keys() == {"muon", "adamw"}
    assert all(torch.equal(tensor, again["model"][name]) for name, tensor in whole["model"].items())
