"""GPT-2 weights from and to the layout of files that Hugging Face's libraries share.

    pretrained = load("gpt2")           # a name on the Hub, or a local folder
    save(Path("folder"), model, tokenizer, torch.float32)

A folder in that layout holds `config.json` and the weights: `model.safetensors`, or pieces of it that
`model.safetensors.index.json` lists, or the older `pytorch_model.bin`, whole or in pieces. What `save` writes has one more key
in its config.json, `nanogpt`: the tokenizer's description, and whether the model has biases.

Theirs differs from ours in names (the prefix `transformer.` may be missing) and in the matrices of `Conv1D` layers, which are
transposed.
"""

import errno
import hashlib
import itertools
import json
import os
import pickle
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from model import GPT, GPTConfig
from nanogpt import tokenizer as tokenizers
from nanogpt.errors import UserError, one_line
from nanogpt.tokenizer import END_OF_TEXT, GPT2_VOCAB_SIZE, CharTokenizer, TiktokenTokenizer, Tokenizer

NAMES = {
    "gpt2": "openai-community/gpt2",
    "gpt2-medium": "openai-community/gpt2-medium",
    "gpt2-large": "openai-community/gpt2-large",
    "gpt2-xl": "openai-community/gpt2-xl",
    "huggingface": "openai-community/gpt2",
}
DESCRIPTION = ["config.json", "vocab.json", "tokenizer.json"]
SAFETENSORS = ["model.safetensors", "model.safetensors.index.json"]
PICKLED = ["pytorch_model.bin", "pytorch_model.bin.index.json"]
EXPORTED = {  # every file that `save` may write
    *DESCRIPTION,
    "generation_config.json",
    "merges.txt",
    "model.safetensors",
    "tokenizer_config.json",
}
LARGEST_JSON = 64 << 20  # bytes
SIZES = {  # of a config: our name, their two names, and what they take where it has neither
    "n_layer": ("n_layer", "num_hidden_layers", 12),
    "n_head": ("n_head", "num_attention_heads", 12),
    "n_embd": ("n_embd", "hidden_size", 768),
    "block_size": ("n_positions", "max_position_embeddings", 1024),
    "vocab_size": ("vocab_size", "vocab_size", GPT2_VOCAB_SIZE),
}
GELUS = {  # the activations that are one of our two, by whatever formula they are computed
    "gelu_new": "tanh",
    "gelu_fast": "tanh",
    "gelu_pytorch_tanh": "tanh",
    "gelu_python_tanh": "tanh",
    "gelu": "erf",
    "gelu_python": "erf",
}
ONE_WAY = {  # settings that this model has in one way alone, which is also their default
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": True,
    "quantization_config": None,
}
WTE, HEAD = "transformer.wte.weight", "lm_head.weight"
CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
MASK = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")  # constants of the attention, which older files hold
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
AT_ONCE = 64 << 20  # bytes of a file that are mapped before it is opened anew
GPT2_DIGEST = "069daad39dc37a5e524fa56dabd4e3721844e429140b8e9bc13c8049f4759894"  # by `vocabulary_digest`


@dataclass
class Pretrained:
    """Weights in our layout, and all that is needed to build their model."""

    path: Path  # the folder that they lie in
    weights: dict[str, torch.Tensor]  # float32, on the CPU; the head is the token embedding itself
    model_args: dict[str, Any]  # nanoGPT's seven
    gelu: str  # "tanh" or "erf"
    tokenizer: dict[str, Any]  # for nanogpt.tokenizer.from_dict


def is_name(init_from: str) -> bool:
    """Whether `init_from` is a name of GPT-2's, or has the form of a model's id on the Hub, owner/name."""
    if init_from in NAMES:
        return True
    parts = init_from.split("/")
    return (
        len(parts) == 2
        and all(re.fullmatch(r"\w([\w.-]*\w)?", part, re.ASCII) for part in parts)
        and len(init_from) <= 96
        and not re.search(r"--|\.\.|\.git$", init_from)
    )


def is_folder(path: Path) -> bool:
    """Whether `path` is a folder in the Hugging Face layout, and not of a run, whose config.json is another thing."""
    held = {name for name in ("config.json", "ckpt.pt", "last.pt", *SAFETENSORS, *PICKLED) if (path / name).is_file()}
    return "config.json" in held and len(held) > 1 and not held & {"ckpt.pt", "last.pt"}


def load(name_or_folder: str) -> Pretrained:
    """Return the weights of a name on the Hub, downloaded unless they are in its cache, or those in a folder.

    The peak of memory is about one copy of the weights in float32. UserError where there are none, or where they are of a
    model that GPT is not.
    """
    try:
        if name_or_folder not in NAMES and Path(name_or_folder).is_dir():
            folder = Path(name_or_folder)
        elif is_name(name_or_folder):
            folder = _download(name_or_folder)
        else:
            raise UserError(f"{name_or_folder}: no such folder, and no name of a model on the Hub, which is owner/name")
        return _load_folder(folder)
    except OSError as error:
        raise UserError(f"{error.filename or name_or_folder}: {error.strerror or _first_line(error)}") from error


def save(folder: Path, model: GPT, tokenizer: Tokenizer, dtype: torch.dtype) -> None:
    """Write `folder` so that transformers loads the model, with the same logits, and its tokenizer.

    A model without biases gets zero ones. Rows of the token embedding that stand for no token are left out. The folder
    appears when it is whole; an earlier export in its place is replaced. UserError where anything else is there, or where
    transformers cannot have the like of the tokenizer.
    """
    folder = folder.resolve()
    if not folder.name:
        raise UserError(f"{folder}: name a folder of its own for the export")
    part, old = folder.with_name(folder.name + ".tmp"), folder.with_name(folder.name + ".old")
    for place in (folder, part, old):
        _check_replaceable(place)
    files = _tokenizer_files(tokenizer, model.config.block_size)
    end = tokenizer.end_of_text if isinstance(tokenizer, TiktokenTokenizer) else None
    files["config.json"] = _json(_config(model.config, tokenizer, end, dtype))
    files["generation_config.json"] = _json({"bos_token_id": end, "eos_token_id": end})
    for place in (part, old):
        if place.exists():
            shutil.rmtree(place)
    part.mkdir(parents=True)
    for name in sorted(files):  # config.json comes first: by it a folder that was left half-written is known
        (part / name).write_text(files[name], encoding="utf-8", newline="\n")
    _write_weights(part / "model.safetensors", model, tokenizer.vocab_size, dtype)
    if folder.exists():
        folder.rename(old)
    part.rename(folder)
    if old.exists():
        shutil.rmtree(old)


def vocabulary_digest(vocabulary: dict[str, int]) -> str:
    """Return the sha256 of a vocabulary, whatever the order and the spacing of the file that it was read from."""
    lines = (f"{index} {token}\n" for token, index in sorted(vocabulary.items(), key=lambda item: (item[1], item[0])))
    return hashlib.sha256("".join(lines).encode("utf-8", errors="surrogatepass")).hexdigest()


# from the Hub


def _download(name: str) -> Path:
    """Return the folder of the Hub's cache that holds the model `name`, after downloading what is not there yet."""
    import huggingface_hub

    repository = NAMES.get(name, name)
    try:
        for weights in (SAFETENSORS, PICKLED):
            pieces = weights[0].replace(".", "-*.")  # they have numbers in their names
            folder = Path(huggingface_hub.snapshot_download(repository, allow_patterns=[*DESCRIPTION, *weights, pieces]))
            if any((folder / file).is_file() for file in weights):
                break
    except Exception as error:  # of the network, the Hub or the disk: it can be anything
        raise UserError(f"{name}: {_why_not_downloaded(name, error)}") from error
    return folder


def _why_not_downloaded(name: str, error: Exception) -> str:
    """Return what went wrong in downloading a model, and what to do."""
    from huggingface_hub import constants, errors

    link = f"{constants.ENDPOINT}/{NAMES.get(name, name)}"
    here = "" if name in NAMES else "no such folder here, and "
    if isinstance(error, errors.GatedRepoError):
        return f"its owner has to let you in: ask for it at {link}, then set HF_TOKEN to a token of yours"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"{here}no such model at {link}, unless it is private: then set HF_TOKEN to a token of yours"
    if isinstance(error, errors.LocalEntryNotFoundError):
        here += f"not all of it is in {constants.HF_HUB_CACHE}, and"
        if constants.HF_HUB_OFFLINE:
            return f"{here} HF_HUB_OFFLINE is set: unset it once to download it"
        cause = f"{type(error.__cause__).__name__}: {_first_line(error.__cause__)}" if error.__cause__ else _first_line(error)
        return f"{here} {link} cannot be reached ({cause}): connect to the internet once, or name a folder that holds it"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT, errno.EPERM):
        return f"cannot be written to {constants.HF_HUB_CACHE} ({error.strerror}): set HF_HOME to a folder that has room"
    return f"cannot be downloaded from {link} ({type(error).__name__}: {_first_line(error)}): try again"


# from a folder


def _load_folder(folder: Path) -> Pretrained:
    path = folder / "config.json"
    settings = _read_json(path)
    args, gelu = _model_args(settings, path)
    bias, tokenizer = True, {"kind": "tiktoken", "name": "gpt2", "vocab_size": GPT2_VOCAB_SIZE}
    if "nanogpt" in settings:
        bias, tokenizer = _own_settings(settings["nanogpt"], args["vocab_size"], path)
    else:
        _check_vocabulary(folder, args["vocab_size"])
    weights = _read_weights(folder, args)
    biases = [name for name in weights if name.endswith(".bias")]
    if not bias and not any(weights[name].any() for name in biases):  # others may have trained it since
        weights = {name: tensor for name, tensor in weights.items() if name not in biases}
        args["bias"] = False
    return Pretrained(folder, weights, args, gelu, tokenizer)


def _model_args(settings: dict[str, Any], path: Path) -> tuple[dict[str, Any], str]:
    """Return nanoGPT's arguments and the GELU of a config; UserError for what this model does not have."""
    if settings.get("model_type") != "gpt2":
        raise UserError(f"{path}: model_type = {_shown(settings.get('model_type'))}: only GPT-2's kind of model can be loaded")
    args: dict[str, Any] = {}
    for name, (key, synonym, default) in SIZES.items():
        key = synonym if key not in settings and synonym in settings else key
        value = settings.get(key, default)
        if type(value) is not int or not 0 < value < 1 << 24:
            raise UserError(f"{path}: {key} = {_shown(value)} is no size of a model")
        args[name] = value
    if args["n_embd"] % args["n_head"]:
        raise UserError(f"{path}: n_head = {args['n_head']} does not divide n_embd = {args['n_embd']}")
    if settings.get("n_inner") not in (None, 4 * args["n_embd"]):
        raise UserError(f"{path}: n_inner = {_shown(settings['n_inner'])}: this model has 4 * n_embd = {4 * args['n_embd']}")
    for key, only in ONE_WAY.items():
        if settings.get(key, only) != only:
            raise UserError(f"{path}: {key} = {_shown(settings[key])}: this model has {only}")
    activation = settings.get("activation_function", "gelu_new")
    if not isinstance(activation, str) or activation not in GELUS:
        known = ", ".join(GELUS)
        raise UserError(f"{path}: activation_function = {_shown(activation)}: this model has {known}")
    return args | {"bias": True, "dropout": 0.0}, GELUS[activation]


def _own_settings(own: Any, vocab_size: int, path: Path) -> tuple[bool, dict[str, Any]]:
    """Return the two things that `save` adds to a config: whether the model has biases, and its tokenizer's description."""
    if not isinstance(own, dict) or type(own.get("bias")) is not bool:
        raise UserError(f"{path}: damaged: nanogpt = {_shown(own)}")
    try:
        tokenizer = tokenizers.from_dict(own.get("tokenizer"))
    except UserError as error:
        raise UserError(f"{path}: damaged: {error}") from error
    if tokenizer.vocab_size != vocab_size:
        raise UserError(f"{path}: its tokenizer ({tokenizer}) does not belong to a model with vocab_size = {vocab_size}")
    return own["bias"], tokenizer.to_dict()


def _check_vocabulary(folder: Path, vocab_size: int) -> None:
    """Raise UserError where a model's tokens are not GPT-2's: there are such of the same number, in other languages.

    A folder without the files of a tokenizer is taken at its number of tokens.
    """
    if vocab_size != GPT2_VOCAB_SIZE:
        raise UserError(
            f"{folder / 'config.json'}: vocab_size = {vocab_size}: another vocabulary than GPT-2's, "
            f"which has {GPT2_VOCAB_SIZE} tokens"
        )
    for name in ("vocab.json", "tokenizer.json"):
        path = folder / name
        if not path.is_file():
            continue
        vocabulary = _read_json(path)
        if name == "tokenizer.json":
            match vocabulary:
                case {"model": {"vocab": dict(tokens)}, **rest}:
                    added = rest.get("added_tokens") or []
                case _:
                    raise UserError(f"{path}: not a tokenizer's description")
            if not isinstance(added, list) or not all(isinstance(token, dict) for token in added):
                raise UserError(f"{path}: not a tokenizer's description")
            vocabulary = tokens | {str(token.get("content")): token.get("id") for token in added}
        if not all(type(index) is int for index in vocabulary.values()):
            raise UserError(f"{path}: not a vocabulary")
        known = {token: index for token, index in vocabulary.items() if index < vocab_size}  # the model has no others
        if vocabulary_digest(known) != GPT2_DIGEST:
            raise UserError(f"{path}: another vocabulary than GPT-2's, the only one that models of others can have here")


def _read_weights(folder: Path, args: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return the weights in a folder under our names, in our model's order; UserError where they do not fit `args`."""
    source, files = _weight_files(folder)
    found: dict[str, tuple[Path, str, tuple[int, ...]]] = {}
    for file in files:
        for theirs, shape in _shapes(file).items():
            bare = theirs.removeprefix("transformer.")
            name = bare if bare == HEAD else f"transformer.{bare}"
            if MASK.fullmatch(bare):
                continue
            if name in found:
                raise UserError(f"{file}: {_shown(theirs)} is there a second time, after that in {found[name][0].name}")
            found[name] = (file, theirs, shape)
    if args["n_layer"] > len(found):  # not to be built, even without memory for its weights
        raise UserError(f"{source}: weights for n_layer = {args['n_layer']} are not all there")
    wanted = _parameter_shapes(args)
    for name, (file, theirs, shape) in found.items():
        if name not in wanted:
            raise UserError(f"{file}: {_shown(theirs)} is no part of a GPT-2 of {args['n_layer']} layers")
        want = wanted[name][::-1] if name.endswith(CONV1D) else wanted[name]
        if shape != want:
            raise UserError(f"{file}: {_shown(theirs)} is {shape} where its config.json needs {want}")
    for name in wanted:
        if name not in found and not (name in (WTE, HEAD) and {WTE, HEAD} & found.keys()):
            raise UserError(f"{source}: {name.removeprefix('transformer.')!r} is missing")

    weights: dict[str, torch.Tensor] = {}
    for file, names in _groups(found):
        for name, tensor in zip(names, _tensors(file, [found[name][1] for name in names]), strict=True):
            twin = {WTE: HEAD, HEAD: WTE}.get(name)
            if twin in weights:
                if not torch.equal(weights[twin], tensor.float()):
                    raise UserError(f"{file}: {HEAD!r} differs from the token embedding: in this model they are one")
            else:
                weights[name] = _converted(tensor, name, _is_mapped(file))
            del tensor
    embedding = weights.get(WTE, weights.get(HEAD))
    weights |= {WTE: embedding, HEAD: embedding}
    return {name: weights[name] for name in wanted}


def _converted(tensor: torch.Tensor, name: str, mapped: bool) -> torch.Tensor:
    """Return a tensor of theirs as ours: float32, matrices turned around, in memory of its own."""
    if name.endswith(CONV1D):
        tensor = tensor.t()
    elif not mapped and tensor.dtype == torch.float32 and tensor.untyped_storage().nbytes() == tensor.nbytes:
        return tensor
    return torch.empty(tensor.shape, dtype=torch.float32).copy_(tensor)


def _parameter_shapes(args: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all parameters that our model has with biases, by name, in its order.

    They are written down here since a model of no memory, on the "meta" device, takes a second to import.
    """
    C = args["n_embd"]
    layer = {"ln_1": (C,), "attn.c_attn": (3 * C, C), "attn.c_proj": (C, C)}
    layer |= {"ln_2": (C,), "mlp.c_fc": (4 * C, C), "mlp.c_proj": (C, 4 * C)}
    shapes: dict[str, tuple[int, ...]] = {WTE: (args["vocab_size"], C), "transformer.wpe.weight": (args["block_size"], C)}
    for i in range(args["n_layer"]):
        for part, shape in layer.items():
            shapes[f"transformer.h.{i}.{part}.weight"] = shape
            shapes[f"transformer.h.{i}.{part}.bias"] = shape[:1]
    return shapes | {"transformer.ln_f.weight": (C,), "transformer.ln_f.bias": (C,), HEAD: (args["vocab_size"], C)}


def _weight_files(folder: Path) -> tuple[Path, list[Path]]:
    """Return the file that stands for all weights in a folder, and the files that hold them."""
    for name in (*SAFETENSORS, *PICKLED):
        path = folder / name
        if not path.is_file():
            continue
        if not name.endswith(".index.json"):
            return path, [path]
        pieces = _read_json(path).get("weight_map")
        if not isinstance(pieces, dict) or not pieces or not all(isinstance(piece, str) for piece in pieces.values()):
            raise UserError(f"{path}: not a list of the files of a model")
        for piece in pieces.values():
            if piece in ("", ".", "..") or set(piece) & set("/\\:\0"):
                raise UserError(f"{path}: refused: it names {_shown(piece)}, which is not a file in its folder")
            if not (folder / piece).is_file():
                raise UserError(f"{folder / piece}: missing, although {name} names it; download the model again")
        return path, [folder / piece for piece in sorted(set(pieces.values()))]
    raise UserError(f"{folder}: no weights in it: neither {SAFETENSORS[0]} nor {PICKLED[0]}")


def _groups(found: dict[str, tuple[Path, str, tuple[int, ...]]]) -> Iterator[tuple[Path, list[str]]]:
    """Yield names to be read from one file at once, in the order that keeps the peak of memory low.

    A mapped file's pages stay in memory while it is open, so few are read at a time, the largest first: then they add least
    to the peak, which is at the end. A file that cannot be mapped is all in memory at any rate, and is read once.
    """
    mapped = {file: _is_mapped(file) for file, _, _ in found.values()}
    sizes = {name: 4 * torch.Size(shape).numel() for name, (_, _, shape) in found.items()}
    order = sorted(found, key=lambda name: (mapped[found[name][0]], -sizes[name] * mapped[found[name][0]], found[name][0]))
    group: list[str] = []
    for name in order:
        file = found[name][0]
        if group and (file != found[group[0]][0] or (mapped[file] and sum(sizes[n] for n in group) + sizes[name] > AT_ONCE)):
            yield found[group[0]][0], group
            group = []
        group.append(name)
    yield found[group[0]][0], group


def _shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors in a file, by their names there."""
    if file.suffix != ".safetensors":
        return {name: tuple(tensor.shape) for name, tensor in _unpickled(file).items()}
    import safetensors

    try:
        with safetensors.safe_open(file, framework="pt") as opened:
            return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}
    except safetensors.SafetensorError as error:
        raise UserError(f"{file}: not a safetensors file, or damaged ({_first_line(error)})") from error


def _tensors(file: Path, names: list[str]) -> Iterator[torch.Tensor]:
    """Yield the tensors in a file that have these names there, without holding on to them."""
    if file.suffix != ".safetensors":
        state = _unpickled(file)
        state = {name: state[name] for name in names}
        for name in names:
            yield _floating(state.pop(name), name, file)
        return
    import safetensors

    with safetensors.safe_open(file, framework="pt") as opened:
        for name in names:
            yield _floating(opened.get_tensor(name), name, file)


def read_pickled(file: Path, what: str, mmap: bool) -> Any:
    """Return what `torch.save` has written to a file, without running code from it; UserError where that is not `what`.

    With `mmap`, tensors stay in the file until they are used, if its format, that since PyTorch 1.6, allows it.
    """
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=mmap and _is_mapped(file))
    except FileNotFoundError:
        raise
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        why = f"it names {named[1]}, which could run code" if named else f"not {what}, or damaged"
        raise UserError(f"{file}: refused: {why}") from error
    except Exception as error:  # a damaged file can raise anything
        raise UserError(f"{file}: not {what}, or damaged ({_first_line(error)})") from error


def _unpickled(file: Path) -> dict[str, torch.Tensor]:
    """Return the dictionary of tensors in a file of `torch.save`, memory-mapped where it can be."""
    state = read_pickled(file, "a file of weights", mmap=True)
    if not isinstance(state, dict) or not state:
        raise UserError(f"{file}: not a file of weights")
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise UserError(f"{file}: not a file of weights: it has {_shown(name)}")
    return state


def _floating(tensor: torch.Tensor, name: str, file: Path) -> torch.Tensor:
    """Return `tensor`, checked to be of floating-point numbers that are all in its file."""
    plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and tensor.dtype in DTYPES
    if not plain or tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
        raise UserError(f"{file}: {_shown(name)} is no plain matrix of floating-point numbers ({tensor.dtype})")
    return tensor


def _is_mapped(file: Path) -> bool:
    """Whether a file can be memory-mapped: all but those of `torch.save` before PyTorch 1.6."""
    with open(file, "rb") as opened:
        return file.suffix == ".safetensors" or opened.read(4) == b"PK\x03\x04"


def _read_json(path: Path) -> dict[str, Any]:
    """Return the dictionary in a JSON file; UserError where there is none in it."""
    try:
        if path.stat().st_size > LARGEST_JSON:
            raise ValueError("too large")
        content = json.loads(path.read_bytes().decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a JSON file ({_first_line(error)})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: not what its name says: it holds no dictionary")
    return content


# to a folder


def _check_replaceable(folder: Path) -> None:
    """Raise UserError where a folder holds anything but an earlier export."""
    if not os.path.lexists(folder):
        return
    if not folder.is_dir():
        raise UserError(f"{folder}: is there already, and no folder; name another")
    held = sorted(path.name for path in folder.iterdir())
    others = [name for name in held if name not in EXPORTED]
    if others:
        raise UserError(f"{folder}: holds {_shown(others[0])}, which is no part of an export; name another folder")
    if held and ("config.json" not in held or "nanogpt" not in _read_json(folder / "config.json")):
        raise UserError(f"{folder}: holds a model that was not exported from here; name another folder")


def _config(config: GPTConfig, tokenizer: Tokenizer, end: int | None, dtype: torch.dtype) -> dict[str, Any]:
    """Return what config.json says of a model."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": "gelu_new" if config.gelu == "tanh" else "gelu",
        "vocab_size": tokenizer.vocab_size,
        "n_positions": config.block_size,
        "n_ctx": config.block_size,
        "n_embd": config.n_embd,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_inner": None,
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
        "layer_norm_epsilon": ONE_WAY["layer_norm_epsilon"],
        "bos_token_id": end,
        "eos_token_id": end,
        "tie_word_embeddings": True,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "nanogpt": {"bias": config.bias, "tokenizer": tokenizer.to_dict()},
    }


def _write_weights(path: Path, model: GPT, rows: int, dtype: torch.dtype) -> None:
    """Write a model's weights in their layout, with `rows` rows of its token embedding, and zeros for biases it has not."""
    import safetensors
    import safetensors.torch

    weights = model.state_dict()
    weights[WTE] = weights[WTE][:rows]
    theirs: dict[str, torch.Tensor] = {}
    for name, size in _parameter_shapes(vars(model.config)).items():
        if name == HEAD:
            continue
        tensor = weights[name].detach().cpu() if name in weights else torch.zeros(size)
        theirs[name] = (tensor.t() if name.endswith(CONV1D) else tensor).to(dtype).contiguous()
        if tensor.isfinite().all() and not theirs[name].isfinite().all():
            raise UserError(f"{name!r} has numbers beyond {dtype}; --dtype=bfloat16 can hold them")
    try:
        safetensors.torch.save_file(theirs, path, metadata={"format": "pt"})
    except safetensors.SafetensorError as error:  # of the system: a full disk
        raise UserError(f"{path}: cannot be written ({_first_line(error)})") from error


def _tokenizer_files(tokenizer: Tokenizer, block_size: int) -> dict[str, str]:
    """Return the content of a tokenizer's files by their names; UserError for an encoding other than GPT-2's."""
    if isinstance(tokenizer, CharTokenizer):
        description = _character_table(tokenizer)
        about: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
        files = {}
    elif tokenizer.name == "gpt2":
        description, files = _byte_pairs(tokenizer)
        about = {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False}
        about |= {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "unk_token": END_OF_TEXT}
    else:
        raise UserError(f"the encoding {tokenizer.name} cannot be exported: characters and gpt2 can")
    about |= {"model_max_length": block_size, "clean_up_tokenization_spaces": False}
    frame = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None}
    frame |= {"pre_tokenizer": None, "post_processor": None, "decoder": None}
    return files | {"tokenizer.json": _json(frame | description), "tokenizer_config.json": _json(about)}


def _character_table(tokenizer: CharTokenizer) -> dict[str, Any]:
    """Return the parts of a tokenizer.json that make each character a word; others are an error there, as they are here."""
    for character in tokenizer.characters:
        if 0xD800 <= ord(character) < 0xE000:
            raise UserError(f"the character table has {character!r}, a half of a character, which transformers cannot have")
    return {
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False},
        "decoder": {"type": "Fuse"},
        "model": {
            "type": "WordLevel",
            "vocab": {character: index for index, character in enumerate(tokenizer.characters)},
            "unk_token": "<unk>",  # not in the vocabulary
        },
    }


def _byte_pairs(tokenizer: TiktokenTokenizer) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the parts of a tokenizer.json that stand for GPT-2's encoding, and the files that came before it."""
    end = tokenizer.end_of_text  # loads the encoding, or says why it cannot be
    import tiktoken

    ranks = tiktoken.get_encoding("gpt2")._mergeable_ranks  # which tiktoken has under no public name
    letters = _letters()
    shown = {token: "".join(letters[byte] for byte in token) for token in ranks}
    vocabulary = {shown[token]: index for token, index in sorted(ranks.items(), key=lambda item: item[1])} | {END_OF_TEXT: end}
    merges = [(shown[left], shown[right]) for left, right in _merges(ranks)]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    model = {"type": "BPE", "dropout": None, "unk_token": None, "fuse_unk": False, "byte_fallback": False}
    model |= {"continuing_subword_prefix": "", "end_of_word_suffix": ""}
    description = {
        "added_tokens": [{"id": end, "content": END_OF_TEXT} | flags],
        "pre_tokenizer": byte_level,
        "post_processor": byte_level | {"trim_offsets": False},
        "decoder": byte_level,
        "model": model | {"vocab": vocabulary, "merges": [list(pair) for pair in merges]},
    }
    files = {
        "vocab.json": json.dumps(vocabulary, ensure_ascii=False),
        "merges.txt": "#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in merges),
    }
    return description, files


def _letters() -> list[str]:
    """Return GPT-2's letter for each byte: itself where it can be seen, else the next of those from U+0100 on."""
    seen = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    unseen = [byte for byte in range(256) if byte not in seen]
    return [chr(byte) if byte in seen else chr(0x100 + unseen.index(byte)) for byte in range(256)]


def _merges(ranks: dict[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """Yield the pairs that byte-pair encoding joins, in order: for each token the two that tokens of lower ranks leave."""
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) == 1:
            continue
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            pairs = [ranks.get(left + right, rank) for left, right in itertools.pairwise(parts)]
            at = pairs.index(min(pairs))
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        yield parts[0], parts[1]


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def _first_line(error: object) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0]


def _shown(value: Any) -> str:
    return one_line(repr(value))[:60]
