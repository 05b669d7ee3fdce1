"""Optimizers: AdamW as the model configures it, and Muon for its hidden matrices beside AdamW for the rest."""

from typing import Any, Literal

import torch

from model import GPT, Bigram
from nanogpt.device import has_bfloat16_instructions
from nanogpt.distributed import is_sharded
from nanogpt.errors import UserError
from nanogpt.kernels import by_onednn, matmul

OptimizerName = Literal["adamw", "muon"]
ONEDNN_MIN_ROWS = 128  # of a Gram matrix: below this, many at once by the other library are faster
SHARDED_MUON_VERSION = "2.10"  # of PyTorch: the first whose DTensor splits a stack of shards (unbind)


def build_optimizer(
    model: GPT | Bigram,
    name: OptimizerName,
    weight_decay: float,
    learning_rate: float,
    betas: tuple[float, float],
    device_type: str,
    fused: bool = True,
) -> "torch.optim.AdamW | MuonWithAdamW":
    """Return the optimizer of a model: "adamw", or "muon" for the matrices of its blocks, at the same rate and momentum.

    Each head's query, key and value are matrices of their own for Muon. Raises UserError if this PyTorch is too old for Muon
    with FSDP.
    """
    adamw = model.configure_optimizers(weight_decay, learning_rate, betas, device_type, fused)
    if name == "adamw":
        return adamw
    if is_sharded(model) and torch.__version__ < SHARDED_MUON_VERSION:  # compares release numbers
        raise UserError(
            f"--optimizer=muon with --parallel=fsdp needs PyTorch {SHARDED_MUON_VERSION} or newer, got {torch.__version__}; "
            "use --parallel=ddp or --optimizer=adamw"
        )
    matrices = [p for p in model.transformer.h.parameters() if p.requires_grad and p.dim() == 2]
    hidden = set(matrices)
    for group in adamw.param_groups:
        group["params"] = [p for p in group["params"] if p not in hidden]
    heads = {block.attn.c_attn.weight: 3 * block.attn.n_head for block in model.transformer.h}
    muon = Muon(matrices, heads, lr=learning_rate, weight_decay=weight_decay, momentum=betas[0], adjust_lr_fn="match_rms_adamw")
    return MuonWithAdamW(muon, adamw)


class MuonWithAdamW:
    """Muon and AdamW behind the part of one optimizer's interface that a training loop and its GradScaler use."""

    def __init__(self, muon: "Muon", adamw: torch.optim.AdamW):
        self.parts: dict[str, torch.optim.Optimizer] = {"muon": muon, "adamw": adamw}

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The parameter groups of both; changing them here changes the optimizers."""
        return [group for part in self.parts.values() for group in part.param_groups]

    def step(self) -> None:
        """Update all parameters."""
        for part in self.parts.values():
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear all gradients."""
        for part in self.parts.values():
            part.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """Return the state dicts of both, by name."""
        return {name: part.state_dict() for name, part in self.parts.items()}


class Muon(torch.optim.Muon):
    """torch.optim.Muon, with all matrices of one shape orthogonalised in one batched product.

    Parameters in `stacked` are several matrices, one on top of the other, each updated as a matrix of its own; the value is
    their number. Otherwise updates, state and settings are PyTorch's, except that CPUs without bfloat16 instructions compute
    in float32. Sources: "Muon is Scalable for LLM Training" (Liu et al. 2025), section 2; for heads, Muon Split in "GLM-5:
    from Vibe Coding to Agentic Engineering" (2026).
    """

    def __init__(self, params: list[torch.nn.Parameter], stacked: dict[torch.nn.Parameter, int] | None = None, **settings: Any):
        super().__init__(params, **settings)
        self.stacked = stacked or {}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update all parameters that have a gradient."""
        for group in self.param_groups:
            by_shape: dict[tuple[torch.Size, int], list[torch.Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault((p.shape, self.stacked.get(p, 1)), []).append(p)
            for ((rows, columns), count), parameters in by_shape.items():
                updates = []
                for p in parameters:
                    if not self.state[p]:
                        self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                    momentum = self.state[p]["momentum_buffer"]
                    momentum.lerp_(p.grad, 1 - group["momentum"])
                    updates.append(p.grad.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum)
                scaled_lr = 0.2 * max(rows // count, columns) ** 0.5 * group["lr"]  # gives updates the RMS of AdamW's
                for p, update in zip(parameters, orthogonalize(updates, count, group), strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(update, alpha=-scaled_lr)


def orthogonalize(updates: list[torch.Tensor], count: int, group: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    """Return updates of one shape, each a stack of `count` matrices, with the singular values of every matrix near 1.

    `group` is one of Muon's parameter groups. Under FSDP, where each rank holds some rows of every update, each rank
    orthogonalizes some whole updates, so that the work is shared.
    """
    in_bfloat16 = updates[0].device.type != "cpu" or has_bfloat16_instructions()
    stack = torch.stack(updates).to(torch.bfloat16 if in_bfloat16 else torch.float32)  # (n, rows, columns)
    if not hasattr(stack, "redistribute"):
        return newton_schulz(stack, count, group).unbind()

    from torch.distributed.tensor import DTensor, Shard  # already imported if there are DTensors

    whole = stack.redistribute(placements=[Shard(0)])
    local = newton_schulz(whole.to_local(), count, group).contiguous()
    result = DTensor.from_local(local, whole.device_mesh, [Shard(0)], shape=whole.shape, stride=whole.stride())
    return result.redistribute(placements=stack.placements).unbind()


def newton_schulz(stack: torch.Tensor, count: int, group: dict[str, Any]) -> torch.Tensor:
    """Quintic Newton-Schulz iteration of the `count` matrices in each update: stack (n, rows, columns) -> the same shape."""
    a, b, c = group["ns_coefficients"]
    x = stack.unflatten(1, (count, -1)).flatten(0, 1)  # (n * count, rows / count, columns)
    is_tall = x.size(1) > x.size(2)
    x = x.mT if is_tall else x  # makes the Gram matrix the smaller of the two
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp(min=group["eps"])
    if x.dtype == torch.float32 and x.size(2) >= 2 * x.size(1):
        one_by_one = by_onednn(x) and x.size(1) >= ONEDNN_MIN_ROWS  # its operator takes one matrix at a time
        for part in x.unbind() if one_by_one else [x]:
            part.copy_(by_gram_matrix(part, group))
    else:
        for _ in range(group["ns_steps"]):
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if is_tall else x).reshape(stack.shape)


def by_gram_matrix(x: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
    """Return x (..., rows, columns) after the iteration, which only multiplies it by polynomials of its Gram matrix.

    For a wide x these products are smaller. They square the condition number, too much for bfloat16.
    """
    a, b, c = group["ns_coefficients"]
    gram = matmul(x, x.mT)
    product = polynomial = None
    for step in range(group["ns_steps"]):
        if step > 0:
            gram = matmul(matmul(polynomial, gram), polynomial)
        polynomial = gram.mul(b).add_(matmul(gram, gram), alpha=c)
        polynomial.diagonal(dim1=-2, dim2=-1).add_(a)
        product = polynomial if product is None else matmul(polynomial, product)
    return matmul(product, x)
