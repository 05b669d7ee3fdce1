"""Muon for the matrices of the hidden layers, AdamW for everything else, behind the interface of one optimizer."""

from typing import Any

import torch

import device


class MuonWithAdamW:
    """A Muon and an AdamW as one optimizer, as far as a training loop and its GradScaler use one."""

    def __init__(self, muon: "Muon", adamw: torch.optim.AdamW):
        self.parts: dict[str, torch.optim.Optimizer] = {"muon": muon, "adamw": adamw}

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The settings and parameters of both, which may be set here."""
        return [group for part in self.parts.values() for group in part.param_groups]

    def step(self) -> None:
        """Update all parameters."""
        for part in self.parts.values():
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Take away all gradients, or set them to zero."""
        for part in self.parts.values():
            part.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """Return the state dicts of both, by name."""
        return {name: part.state_dict() for name, part in self.parts.items()}


class Muon(torch.optim.Muon):
    """PyTorch's Muon, which orthogonalises matrix by matrix, with all matrices of one shape in one product.

    The formula, the state and the settings are PyTorch's, but the number format is float32 on CPUs that have no instructions
    for bfloat16. Source: "Muon is Scalable for LLM Training" (Liu et al. 2025), section 2.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update all parameters that have a gradient."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            stacks: dict[tuple[int, ...], list[torch.Tensor]] = {}
            for p in parameters:
                if not self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                buffer = self.state[p]["momentum_buffer"]
                buffer.lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(buffer, group["momentum"]) if group["nesterov"] else buffer
                stacks.setdefault(tuple(sorted(p.shape)), []).append(update if p.size(0) <= p.size(1) else update.T)
            updates = {shape: orthogonalised(stack, group).unbind() for shape, stack in stacks.items()}
            taken = {shape: iter(stack) for shape, stack in updates.items()}
            for p in parameters:
                update = next(taken[tuple(sorted(p.shape))])
                rate = 0.2 * max(p.shape) ** 0.5 * group["lr"]  # updates of the size that AdamW's have
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update if p.size(0) <= p.size(1) else update.T, alpha=-rate)


def orthogonalised(matrices: list[torch.Tensor], group: dict[str, Any]) -> torch.Tensor:
    """Return matrices of one shape, none with more rows than columns, with singular values near 1: (n, rows, columns).

    By the quintic Newton-Schulz iteration with the settings of `group`, one of Muon's.
    """
    a, b, c = group["ns_coefficients"]
    fast = matrices[0].device.type != "cpu" or device.has_bfloat16_instructions()
    x = torch.stack(matrices).to(torch.bfloat16 if fast else torch.float32)
    x /= torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp(min=group["eps"])
    for _ in range(group["ns_steps"]):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x
