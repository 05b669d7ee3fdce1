"""Reading weights that others have saved: no code from pickles runs, names lose their wrappers, tensors are checked.

checkpoint.py and huggingface.py both read through this file, so that the same weights are taken or refused everywhere.
"""

import pickle
import re
from pathlib import Path
from typing import Any

import torch

from nanogpt.errors import UserError, first_line, shown
from nanogpt.pickles import NUMPY_SCALARS

WTE, WPE, HEAD = "transformer.wte.weight", "transformer.wpe.weight", "lm_head.weight"
WRAPPERS = ("_orig_mod", "module")  # parts of names that torch.compile and DistributedDataParallel add
MASK = re.compile(r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)")  # causal masks, which older files hold as buffers
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


# files


def read_pickled(file: Path, what: str, mmap: bool) -> Any:
    """Load a file of `torch.save` without running code from it. Raises UserError, which says it is not `what`, if it fails.

    NumPy's scalars become Python's numbers and strings. With `mmap`, tensors stay in the file until they are used; the file
    format before PyTorch 1.6 does not allow that, and is read at once.
    """
    try:
        with torch.serialization.safe_globals([(stand_in, name) for name, stand_in in NUMPY_SCALARS.items()]):
            return torch.load(file, map_location="cpu", weights_only=True, mmap=mmap and can_map(file))
    except FileNotFoundError:
        raise
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        why = f"it names {named[1]}, which could run code" if named else f"not {what}, or damaged"
        raise UserError(f"{file}: refused: {why}") from error
    except Exception as error:  # a damaged file can raise anything
        raise UserError(f"{file}: not {what}, or damaged ({first_line(error)})") from error


def can_map(file: Path) -> bool:
    """Return whether a file can be memory-mapped: all but those of `torch.save` before PyTorch 1.6."""
    with open(file, "rb") as opened:
        return file.suffix == ".safetensors" or opened.read(4) == b"PK\x03\x04"


# names and tensors


def bare_name(name: str) -> str | None:
    """Return a parameter's name without the parts that wrappers add; None for a causal mask."""
    bare = ".".join(part for part in name.split(".") if part not in WRAPPERS)
    return None if MASK.fullmatch(bare) else bare


def is_stored(value: Any) -> bool:
    """Whether a value is a dense tensor of real numbers on the CPU, each with its own bytes in the file.

    An expanded tensor, with strides of zero, may claim gigabytes that only a copy would allocate.
    """
    return (
        isinstance(value, torch.Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and not value.is_complex()
        and value.numel() * value.element_size() <= value.untyped_storage().nbytes()
    )


def checked(tensor: Any, name: str, file: Path) -> torch.Tensor:
    """Return `tensor` if a model's weights can be copied from it. Raises UserError if it is anything else."""
    if not is_stored(tensor) or tensor.dtype not in DTYPES:
        found = f"{tensor.dtype} {tuple(tensor.shape)}" if isinstance(tensor, torch.Tensor) else shown(tensor)
        raise UserError(f"{file}: {shown(name)} must be a dense floating-point tensor, stored in full, got {found}")
    return tensor


def require_tied(head: torch.Tensor, embedding: torch.Tensor, file: Path) -> None:
    """Raise UserError unless the output head is the token embedding, which this model ties."""
    one, other = ((tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) for tensor in (head, embedding))
    if one != other and not torch.equal(head.float(), embedding.float()):
        raise UserError(f"{file}: {HEAD!r} differs from the token embedding; this model ties the two")


def require_finite(tensor: torch.Tensor, name: str, file: Path) -> None:
    """Raise UserError if a weight is NaN or infinite: the model would sample noise. Takes 18 ms for GPT-2 124M."""
    if tensor.numel() > 0 and not all(extreme.isfinite() for extreme in torch.aminmax(tensor)):
        raise UserError(f"{file}: {shown(name)} has weights that are NaN or infinite; use an earlier checkpoint")
