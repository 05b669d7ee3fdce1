"""Training on several processes: the process group, data parallelism (DDP), and sharding (FSDP2).

With DDP every process (rank) holds the whole model. With FSDP2 it holds a shard of the weights, gradients and optimizer state,
and gathers a block's weights when it reaches that block; all ranks must then run the same passes in the same order.
"""

import contextlib
import functools
import gc
import importlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.utils.checkpoint import checkpoint

from model import Block
from nanogpt import errors
from nanogpt.device import compile_model, pick_device, uses_onednn
from nanogpt.errors import UserError, first_line, shown
from nanogpt.kernels import train_by_onednn

RENDEZVOUS_PORT = 29500  # torchrun's default, on the first machine


@dataclass(frozen=True)
class Group:
    """The processes that train together, and this one's place among them."""

    rank: int = 0
    local_rank: int = 0
    size: int = 1  # world size
    device: str = "cpu"
    launched: bool = False  # by torchrun, even if it is a single process

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which prints and writes."""
        return self.rank == 0

    def sum(self, *numbers: float) -> list[float]:
        """Return the sum of each number over all ranks, every one of which must call this."""
        if self.size == 1:
            return list(numbers)
        device = "cpu" if self.device == "mps" else self.device  # MPS has no float64
        tensor = torch.tensor(numbers, dtype=torch.float64, device=device)
        dist.all_reduce(tensor)
        return tensor.tolist()


@contextlib.contextmanager
def process_group(device: str, backend: str) -> Iterator[Group]:
    """Yield the group that torchrun started, or a group of this process alone; all ranks use the same kind of device.

    Nothing may refer to the group when the block ends, so keep what uses it local to a function: a group that is still
    referenced keeps its threads, and one of those may abort the process at exit. If the block raises, the process ends
    without destroying the group, since the other ranks may be waiting in it.
    """
    if not errors.rank():
        yield Group(device=pick_device(device))
        return
    if ":" in device:
        raise UserError(f"under torchrun each process takes its own GPU, got --device={device}; use --device=cuda")
    rank, local_rank, size = place_in_group()
    device = pick_device(device)
    if device == "cuda":
        gpus = torch.cuda.device_count()
        if local_rank >= gpus:
            raise UserError(f"torchrun started more processes than this machine has GPUs ({gpus}); use --nproc_per_node={gpus}")
        device = f"cuda:{local_rank}"
        torch.cuda.set_device(device)
    if backend == "auto":
        backend = "nccl" if device.startswith("cuda") else "gloo"
    if backend == "nccl" and not device.startswith("cuda"):
        raise UserError(f"--backend=nccl needs CUDA, got the device {device}; use --backend=gloo")
    # Functions in this module have the default group as a default argument, evaluated at import. Building an optimizer
    # imports it; after init_process_group it would hold on to the group forever.
    importlib.import_module("torch.distributed.nn.functional")
    try:
        dist.init_process_group(backend, device_id=torch.device(device) if device.startswith("cuda") else None)
    except dist.DistError as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise UserError(f"{size} processes cannot meet at {address}, rank 0's address: {first_line(error)}") from error
    yield Group(rank, local_rank, size, device, launched=True)
    for _ in range(5):  # a sharded model has reference cycles, and some are only freed after others
        if not gc.collect():
            break
    dist.barrier()
    dist.destroy_process_group()


def place_in_group() -> tuple[int, int, int]:
    """Return rank, local rank and world size from the environment, where torchrun or a cluster sets them.

    A LOCAL_RANK that is not set is 0, as on machines with one process each. Raises UserError if others are missing or wrong.
    """
    missing = [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise UserError(
            f"the environment sets RANK={shown(errors.rank())} but not {', '.join(missing)}: set them or use torchrun to train "
            "on several processes, or unset RANK to train on this one"
        )
    rank, local_rank, size, port = (os.environ.get(name) or "0" for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT"))
    if not (rank.isdecimal() and size.isdecimal() and int(rank) < int(size)):
        raise UserError(
            f"RANK must be a number from 0 to below WORLD_SIZE, got RANK={shown(rank)} and WORLD_SIZE={shown(size)}"
        )
    if not local_rank.isdecimal():
        raise UserError(
            f"LOCAL_RANK must be a number from 0, got {shown(local_rank)}; leave it out for one process per machine"
        )
    if not port.isdecimal() or int(port) >= 1 << 16:
        raise UserError(f"MASTER_PORT must be a free port of rank 0's machine, got {shown(port)}; try MASTER_PORT=29500")
    return int(rank), int(local_rank), int(size)


def how_to_launch(arguments: str, size: int) -> str:
    """Return the text that says how to start `arguments`, a script and its flags, on `size` processes as this one was."""
    if size == 1:
        return f":\n  python {arguments}"
    machines, per_machine = (os.environ.get(name) for name in ("GROUP_WORLD_SIZE", "LOCAL_WORLD_SIZE"))  # set by torchrun
    if machines is None:
        return f", with the launcher of these {size} processes:\n  python {arguments}"
    if machines == "1":
        return f":\n  torchrun --standalone --nproc_per_node={size} {arguments}"
    meet = f"--rdzv_id=1 --rdzv_backend=c10d --rdzv_endpoint={os.environ['MASTER_ADDR']}:{RENDEZVOUS_PORT}"
    return f", on each machine:\n  torchrun --nnodes={machines} --nproc_per_node={per_machine} {meet} {arguments}"


def blocks(model: nn.Module) -> list[Block]:
    """Return the transformer blocks of a model: the units of sharding, activation checkpointing and compilation."""
    return [module for module in model.modules() if isinstance(module, Block)]


def checkpoint_activations(model: nn.Module) -> None:
    """Turn on activation checkpointing: keep only each block's input, and recompute the rest in the backward pass."""
    for block in blocks(model):
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


def shard(model: nn.Module, group: Group, dtype: torch.dtype) -> None:
    """Shard a model over the ranks of `group` (FSDP2), with the weights of rank 0; those of the others are not used.

    No device ever holds more than its shard and one weight. On CUDA, blocks are gathered in `dtype`; gradients are reduced
    in float32.
    """
    # these import a thousand modules, which sample.py and others do without
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor import distribute_tensor

    # 1) shard an empty model
    device_type = torch.device(group.device).type
    mesh = init_device_mesh(device_type, (group.size,))
    weights = dict(model.named_parameters(remove_duplicate=False))
    model.to("meta")
    model.tie_weights()
    # The root's weights (embeddings, last norm) are gathered in float32 and inputs are not cast, so that the residual
    # stream is float32 as without sharding. LayerNorm on a CPU needs float32 weights, too.
    param_dtype = None if device_type == "cpu" or dtype == torch.float32 else dtype
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in blocks(model):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh)

    # 2) give every rank its shard of rank 0's weights, one weight at a time
    shards: dict[nn.Parameter, nn.Parameter] = {}  # by parameter, so that tied weights are sent once
    filled = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        weight = weights.pop(name).detach()
        if parameter not in shards:
            if not group.is_main:
                weight = torch.empty(parameter.shape)
            shards[parameter] = nn.Parameter(distribute_tensor(weight.to(group.device), mesh, parameter.placements))
        filled[name] = shards[parameter]
    model.load_state_dict(filled, assign=True)

    # PyTorch caches the mesh, which would keep the group alive after its block; see process_group
    getattr(mesh, "_pg_registry", {}).clear()


def parallelize(
    model: nn.Module,
    group: Group,
    dtype: torch.dtype,
    sharded: bool,
    compile: bool,
    activation_checkpointing: bool = False,
    onednn: bool = True,
) -> tuple[nn.Module, nn.Module]:
    """Move a model to the ranks' devices: whole (DDP) or sharded (FSDP2).

    Returns it for evaluation, compiled if wanted, and for training, where DDP wraps it.
    """
    if activation_checkpointing:
        checkpoint_activations(model)
    if uses_onednn(onednn, group.device, dtype, compile):
        train_by_onednn(model)
    if sharded:
        shard(model, group, dtype)
    else:
        model.to(group.device)
    compiled = compile_for_training(model) if compile else model
    return compiled, DistributedDataParallel(compiled) if group.size > 1 and not sharded else compiled


def share_batch(gradient_accumulation_steps: int, batch_tokens: int, batch_size: int, block_size: int, world_size: int) -> int:
    """Return the number of micro-batches per iteration, from `batch_tokens` if that is not 0.

    Raises UserError if the ranks cannot share them evenly.
    """
    ranks = f"{world_size} process{'es' if world_size > 1 else ''}"
    if batch_tokens:
        unit = batch_size * block_size * world_size
        below = batch_tokens // unit * unit
        if below != batch_tokens:
            raise UserError(
                f"batch_tokens must be a multiple of batch_size={batch_size} x {block_size} tokens x {ranks} = {unit:,}, "
                f"got {batch_tokens:,}; try --batch_tokens={f'{below} or ' if below else ''}{below + unit}, "
                "or another --batch_size"
            )
        return batch_tokens // (batch_size * block_size)
    if gradient_accumulation_steps % world_size:
        above = -(-gradient_accumulation_steps // world_size) * world_size
        raise UserError(
            f"gradient_accumulation_steps must be a multiple of the {ranks}, got {gradient_accumulation_steps}; "
            f"try --gradient_accumulation_steps={above}"
        )
    return gradient_accumulation_steps


def is_sharded(model: nn.Module) -> bool:
    """Whether a model went through `shard`; its parameters do not tell, since they are whole while in use."""
    return hasattr(model, "reshard")


def compile_for_training(model: nn.Module) -> nn.Module:
    """Return a compiled model; of a sharded one, compile each block, since weights are gathered between blocks."""
    if not is_sharded(model):
        return compile_model(model)
    for block in blocks(model):
        block.forward = compile_model(block.forward)
    return model


def gather(state: Any) -> Any:
    """Return nested dicts and lists of tensors with every sharded tensor gathered on rank 0's CPU; None on other ranks.

    All ranks must call this. Tensors that are not sharded stay as they are.
    """
    if isinstance(state, dict):
        return {name: gather(value) for name, value in state.items()}
    if isinstance(state, list):
        return [gather(value) for value in state]
    if not hasattr(state, "full_tensor"):
        return state
    tensor = state.full_tensor()
    return tensor.cpu() if dist.get_rank() == 0 else None


def shard_like(value: Any, parameter: nn.Parameter) -> Any:
    """Return rank 0's `value` sharded like `parameter`, if that is sharded and of the same shape; else `value` itself."""
    if not hasattr(parameter, "full_tensor") or not torch.is_tensor(value) or value.shape != parameter.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, parameter.device_mesh, parameter.placements)


def clip_gradient(model: nn.Module, max_norm: float) -> float:
    """Clip the gradient to a global L2 norm of `max_norm`, 0 for no clipping; return its norm before clipping."""
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    total_norm = get_total_norm([parameter.grad for parameter in parameters])
    if hasattr(total_norm, "full_tensor"):
        total_norm = total_norm.full_tensor()
    norm = total_norm.item()
    if max_norm > 0 and not norm + 1e-6 <= max_norm:  # else every gradient would be multiplied by 1
        clip_grads_with_norm_(parameters, max_norm, total_norm)
    return norm
