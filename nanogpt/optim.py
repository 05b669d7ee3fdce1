"""Muon for the matrices of the hidden layers, AdamW for everything else, behind the interface of one optimizer."""

from typing import Any

import torch

from nanogpt import device


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
            stacks: dict[torch.Size, list[torch.Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    stacks.setdefault(p.shape, []).append(p)
            for shape, parameters in stacks.items():
                updates = []
                for p in parameters:
                    if not self.state[p]:
                        self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                    buffer = self.state[p]["momentum_buffer"]
                    buffer.lerp_(p.grad, 1 - group["momentum"])
                    updates.append(p.grad.lerp(buffer, group["momentum"]) if group["nesterov"] else buffer)
                rate = 0.2 * max(shape) ** 0.5 * group["lr"]  # updates of the size that AdamW's have
                for p, update in zip(parameters, orthogonalised(updates, group), strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(update, alpha=-rate)


def orthogonalised(matrices: list[torch.Tensor], group: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    """Return matrices of one shape with singular values near 1.

    By the quintic Newton-Schulz iteration with the settings of `group`, one of Muon's. Of sharded matrices, of which each
    process has some rows, it gets some whole ones to work on, so that the processes share the work.
    """
    fast = matrices[0].device.type != "cpu" or device.has_bfloat16_instructions()
    stack = torch.stack(matrices).to(torch.bfloat16 if fast else torch.float32)  # (n, rows, columns)
    if not hasattr(stack, "redistribute"):
        return newton_schulz(stack, group).unbind()
    from torch.distributed.tensor import DTensor, Shard  # there already, where there are sharded tensors

    whole = stack.redistribute(placements=[Shard(0)])
    done = newton_schulz(whole.to_local(), group).contiguous()
    done = DTensor.from_local(done, whole.device_mesh, [Shard(0)], shape=whole.shape, stride=whole.stride())
    return done.redistribute(placements=stack.placements).unbind()


def newton_schulz(x: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
    """Return (n, rows, columns) matrices with their singular values brought near 1."""
    a, b, c = group["ns_coefficients"]
    is_tall = x.size(1) > x.size(2)
    x = x.mT if is_tall else x  # the product below is the smaller one
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp(min=group["eps"])
    for _ in range(group["ns_steps"]):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x
