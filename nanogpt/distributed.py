"""How several processes hold one model: a copy each (DDP), or a share of every weight each (FSDP2).

Sharded, a process keeps its share of the weights, of their gradients and of the optimizer's state, and gathers a block's
weights when it comes to that block. All processes must then do the same passes in the same order, or they wait for each other.
"""

import functools
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.utils.checkpoint import checkpoint

from model import Block
from nanogpt import device
from nanogpt.device import Group


def blocks(model: nn.Module) -> list[Block]:
    """Return the layers of a model, one by one what is gathered, computed anew or compiled."""
    return [module for module in model.modules() if isinstance(module, Block)]


def recompute_activations(model: nn.Module) -> None:
    """Let the backward pass compute the inside of each block anew, so that only what goes into a block is kept for it."""
    for block in blocks(model):
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


def shard(model: nn.Module, group: Group, dtype: torch.dtype) -> None:
    """Give each process of `group` its share of the main one's weights; those of the others are not looked at.

    No device ever holds more than its share and one weight. On CUDA devices, the blocks' weights are gathered in `dtype`;
    gradients are summed up in float32.
    """
    from torch.distributed.device_mesh import init_device_mesh  # some thousand modules, which sample.py and others do without
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor import distribute_tensor

    kind = torch.device(group.device).type
    mesh = init_device_mesh(kind, (group.size,))
    weights = dict(model.named_parameters(remove_duplicate=False))
    model.to("meta")
    model.tie_weights()
    # The root's weights, embeddings and the last norm, are gathered in float32, and inputs are left as they are, so that the
    # stream through the blocks is float32 as it is without sharding. A CPU's LayerNorm wants its weights in that format too.
    precision = None if kind == "cpu" or dtype == torch.float32 else dtype
    policy = MixedPrecisionPolicy(param_dtype=precision, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in blocks(model):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh)
    shares: dict[nn.Parameter, nn.Parameter] = {}
    filled = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        weight = weights.pop(name).detach()
        if parameter not in shares:  # tied ones are one
            if not group.is_main:
                weight = torch.empty(parameter.shape)
            share = distribute_tensor(weight.to(group.device), mesh, parameter.placements)
            shares[parameter] = nn.Parameter(share)
        filled[name] = shares[parameter]
    model.load_state_dict(filled, assign=True)
    # PyTorch's caches keep the mesh, and it would keep the group, which must not outlive its block; see device.process_group.
    getattr(mesh, "_pg_registry", {}).clear()


def is_sharded(model: nn.Module) -> bool:
    """Whether a model has gone through `shard`; its parameters do not tell, since they are whole while they are in use."""
    return hasattr(model, "reshard")


def compiled(model: nn.Module) -> nn.Module:
    """Return a compiled model; of a sharded one, each block by itself, since between them their weights are gathered."""
    if not is_sharded(model):
        return device.compiled(model)
    for block in blocks(model):
        block.forward = device.compiled(block.forward)
    return model


def whole(state: Any) -> Any:
    """Return `state`, dictionaries and lists of tensors, with each sharded tensor whole, on the main process's CPU.

    All processes must call it, and the others get None in the places of those. Tensors that are not sharded stay as they are.
    """
    if isinstance(state, dict):
        return {name: whole(value) for name, value in state.items()}
    if isinstance(state, list):
        return [whole(value) for value in state]
    if not hasattr(state, "full_tensor"):
        return state
    tensor = state.full_tensor()
    return tensor.cpu() if dist.get_rank() == 0 else None


def sharded_as(value: Any, parameter: nn.Parameter) -> Any:
    """Return the main process's `value` in shares like those of `parameter`, where that is sharded and of the same shape."""
    if not hasattr(parameter, "full_tensor") or not torch.is_tensor(value) or value.shape != parameter.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, parameter.device_mesh, parameter.placements)


def clip_gradient(model: nn.Module, limit: float) -> float:
    """Return the Euclidean norm of the whole gradient; scale it down to `limit` where it is above that, and that is not 0."""
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    norm = get_total_norm([parameter.grad for parameter in parameters])
    if hasattr(norm, "full_tensor"):
        norm = norm.full_tensor()
    length = norm.item()
    if limit > 0 and not length + 1e-6 <= limit:  # else all would be multiplied by 1
        clip_grads_with_norm_(parameters, limit, norm)
    return length
