"""GPT-2 weights from and to the folder layout of Hugging Face transformers.

    pretrained = load("gpt2")           # a name on the Hub, or a local folder
    save(Path("folder"), model.state_dict(), model_args, gelu, tokenizer, torch.float32)

Such a folder holds config.json and the weights: model.safetensors, or shards listed in model.safetensors.index.json, or the
older pytorch_model.bin, whole or in shards. `save` adds one key to config.json, `nanogpt`: whether the model has biases,
its tokenizer and its chat format. transformers keeps that key when it loads and saves the model.

Two things differ from our state dicts: the prefix `transformer.` may be missing from names, and the matrices of `Conv1D`
layers are transposed.
"""

import contextlib
import errno
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nanogpt import conversation
from nanogpt.conversation import ChatFormat
from nanogpt.errors import UserError, first_line, shown, warn
from nanogpt.files import sync_folder
from nanogpt.tokenizer import (
    END_OF_TEXT,
    GPT2_VOCAB_SIZE,
    CharTokenizer,
    JsonTokenizer,
    TiktokenTokenizer,
    Tokenizer,
    letters,
)
from nanogpt.tokenizer import from_dict as tokenizer_from_dict
from nanogpt.weights import HEAD, WPE, WTE, bare_name, can_map, checked, read_pickled, require_tied

NAMES = {  # short names of models on the Hub
    "gpt2": "openai-community/gpt2",
    "gpt2-medium": "openai-community/gpt2-medium",
    "gpt2-large": "openai-community/gpt2-large",
    "gpt2-xl": "openai-community/gpt2-xl",
    "huggingface": "openai-community/gpt2",
}
CONFIG_FILES = ["config.json", "vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json"]
SAFETENSORS = ["model.safetensors", "model.safetensors.index.json"]
ADAPTER = "adapter_config.json"  # of PEFT
PICKLED = ["pytorch_model.bin", "pytorch_model.bin.index.json"]
EXPORTED = {  # every file that `save` may write
    *CONFIG_FILES,
    "generation_config.json",
    "model.safetensors",
}
UNFINISHED = re.compile(r"\.tmp\w+")  # what safetensors leaves of a file if it is killed
MAX_JSON_BYTES = 64 << 20
MAX_SIZE = (1 << 24) - 1  # of any number in SIZES
SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")  # kept of tokenizer_config.json
SIZES = {  # our name: (their name, its synonym, its default)
    "n_layer": ("n_layer", "num_hidden_layers", 12),
    "n_head": ("n_head", "num_attention_heads", 12),
    "n_embd": ("n_embd", "hidden_size", 768),
    "block_size": ("n_positions", "max_position_embeddings", 1024),
    "vocab_size": ("vocab_size", "vocab_size", GPT2_VOCAB_SIZE),
}
GELUS = {  # their activation functions that equal one of our two GELUs
    "gelu_new": "tanh",
    "gelu_fast": "tanh",
    "gelu_pytorch_tanh": "tanh",
    "gelu_python_tanh": "tanh",
    "gelu": "erf",
    "gelu_python": "erf",
}
FIXED_SETTINGS = {  # settings for which our model supports one value only, which is also their default
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "layer_norm_epsilon": 1e-5,
    "quantization_config": None,
}
CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
MAX_MAPPED_BYTES = 64 << 20  # of float32 weights to read before a mapped file is opened anew
GPT2_PADDED_SIZES = {-(-GPT2_VOCAB_SIZE // multiple) * multiple for multiple in (1, 8, 16, 32, 64, 128, 256, 512, 1024)}
GPT2_DIGEST = "069daad39dc37a5e524fa56dabd4e3721844e429140b8e9bc13c8049f4759894"  # GPT-2's vocabulary_digest


@dataclass
class Pretrained:
    """Weights under our names, and everything needed to build their model."""

    path: Path  # their folder
    weights: dict[str, torch.Tensor]  # float32, on the CPU; the head and the token embedding are one tensor
    model_args: dict[str, Any]  # nanoGPT's seven
    gelu: str  # "tanh" or "erf"
    tokenizer: dict[str, Any]  # for nanogpt.tokenizer.from_dict
    chat_format: dict[str, Any] | None = None  # for nanogpt.conversation.from_dict, if `save` has written it


def is_name(init_from: str) -> bool:
    """Return whether `init_from` is a short name of GPT-2 or has the form of a Hub id, owner/name."""
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
    """Return whether `path` is a folder in the Hugging Face layout; a run folder, whose config.json is ours, is not.

    A PEFT adapter's folder is, for `load` to say how to merge it.
    """
    held = {name for name in ("config.json", "ckpt.pt", "last.pt", *SAFETENSORS, *PICKLED) if (path / name).is_file()}
    is_model = "config.json" in held and len(held) > 1
    return (is_model or (path / ADAPTER).is_file()) and not held & {"ckpt.pt", "last.pt"}


def load(name_or_folder: str) -> Pretrained:
    """Load weights from a local folder or from the Hub, which is asked only for what is not in its cache.

    Peak memory is about one float32 copy of the weights. Raises UserError if there are no weights, or if GPT cannot
    reproduce their model.
    """
    try:
        if name_or_folder not in NAMES and restored(Path(name_or_folder)).is_dir():
            folder = Path(name_or_folder)
        elif is_name(name_or_folder):
            folder = _download(name_or_folder, [SAFETENSORS, PICKLED])
        else:
            raise UserError(f"{name_or_folder}: no such folder, and not a Hub id of the form owner/name")
        return _load_folder(folder)
    except OSError as error:
        raise UserError(f"{error.filename or name_or_folder}: {error.strerror or first_line(error)}") from error


def load_tokenizer(name_or_folder: str) -> Tokenizer:
    """Load a tokenizer as `load` does for its model, from a folder or the Hub; it needs no model.

    Raises UserError if there is no tokenizer, or none whose tokens have a text each.
    """
    try:
        folder = Path(name_or_folder)
        if not folder.is_dir():
            if not is_name(name_or_folder):
                raise UserError(f"{name_or_folder}: no such folder, and not a Hub id of the form owner/name")
            folder = _download(name_or_folder, [CONFIG_FILES])
        settings = _read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
        if isinstance(own := settings.get("nanogpt"), dict):
            return tokenizer_from_dict(own.get("tokenizer"))
        tokenizer, _ = _find_tokenizer(folder, settings)
    except OSError as error:
        raise UserError(f"{error.filename or name_or_folder}: {error.strerror or first_line(error)}") from error
    if tokenizer is None:
        raise UserError(f"{folder}: no tokenizer.json in it, nor vocab.json and merges.txt")
    return tokenizer


def save(
    folder: Path,
    weights: Mapping[str, torch.Tensor],
    model_args: Mapping[str, Any],
    gelu: str,
    tokenizer: Tokenizer,
    dtype: torch.dtype,
    chat_format: ChatFormat | None = None,
) -> None:
    """Write a GPT's state dict and tokenizer to `folder`, for transformers to load with the same logits.

    `model_args` are nanoGPT's seven, `gelu` is "erf" or "tanh". A model without biases gets zero biases; padding rows of the
    token embedding are left out. A `chat_format` becomes a chat template, and where no token ends a reply, a stop string.

    The folder appears once it is complete, and replaces an earlier export. It is written as `folder` + ".tmp", and an earlier
    one is called `folder` + ".old" for the moment of the swap: whenever the process is killed, one of both is whole, and
    `restored` puts it back.

    Raises UserError if anything but an earlier export is in its place, or if transformers has no such tokenizer.
    """
    # what may be replaced: an earlier export, and the remains of one that was killed
    folder = Path(os.path.realpath(folder))
    if not folder.name:
        raise UserError(f"{folder}: the export needs a folder of its own; choose another")
    part, old = folder.with_name(folder.name + ".tmp"), folder.with_name(folder.name + ".old")
    for place in (folder, part, old):
        _check_replaceable(place)
    restored(folder)

    # the JSON files, in memory
    files = _tokenizer_files(tokenizer, model_args["block_size"], chat_format)
    end = tokenizer.end_of_text
    files["config.json"] = _json(_config(model_args, gelu, tokenizer, end, dtype, chat_format))
    generation: dict[str, Any] = {"bos_token_id": end, "eos_token_id": end}
    if chat_format and (end is None or tokenizer.encode(chat_format.stop) != [end]):
        generation["stop_strings"] = [chat_format.stop]
    files["generation_config.json"] = _json(generation)

    # write everything beside the folder; config.json first, since it marks the remains of a killed export as ours
    _discard(part, part)
    _discard(old, part)
    part.mkdir(parents=True)
    for name in sorted(files):
        (part / name).write_text(files[name], encoding="utf-8", newline="\n")
    _write_weights(part / "model.safetensors", weights, model_args, tokenizer.vocab_size, dtype)
    (part / "model.safetensors").chmod((part / "config.json").stat().st_mode & 0o777)  # safetensors lets no one else read it
    for path in part.iterdir():
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
    sync_folder(part)

    # swap it in
    if folder.exists():
        folder.rename(old)
    part.rename(folder)
    sync_folder(folder.parent)
    _discard(old, part)


def restored(folder: Path) -> Path:
    """Return `folder`. If an export was killed before it took that name, the earlier export gets the name back first."""
    with contextlib.suppress(ValueError):  # not an export (UserError), or no path
        place = Path(os.path.realpath(folder))
        old = Path(f"{place}.old")
        if not os.path.lexists(place) and os.path.isdir(old):
            _check_replaceable(old)
            old.rename(place)
    return folder


def vocabulary_digest(vocabulary: dict[str, int]) -> str:
    """Return the sha256 of a vocabulary, independent of its file's order and spacing."""
    lines = (f"{index} {token}\n" for token, index in sorted(vocabulary.items(), key=lambda item: (item[1], item[0])))
    return hashlib.sha256("".join(lines).encode("utf-8", errors="surrogatepass")).hexdigest()


# download from the Hub


def _download(name: str, wanted: list[list[str]]) -> Path:
    """Download what the Hub's cache lacks of a repository: the first of the lists `wanted` that it has files of.

    Returns the folder in the cache.
    """
    import huggingface_hub

    repository = NAMES.get(name, name)
    try:
        for names in wanted:
            shards = names[0].replace(".", "-*.")  # model-00001-of-00002.safetensors
            patterns = [*CONFIG_FILES, ADAPTER, *names, shards]
            folder = Path(huggingface_hub.snapshot_download(repository, allow_patterns=patterns))
            if any((folder / file).is_file() for file in names):
                break
    except Exception as error:  # network, Hub and disk errors have no common class
        raise UserError(f"{name}: {_download_failure(name, error)}") from error
    return folder


def _download_failure(name: str, error: Exception) -> str:
    """Return why a download failed, and what to do about it."""
    from huggingface_hub import constants, errors

    link = f"{constants.ENDPOINT}/{NAMES.get(name, name)}"
    here = "" if name in NAMES else "no such folder here, and "
    if isinstance(error, errors.GatedRepoError):
        return f"the model is gated: request access at {link}, then set HF_TOKEN to your access token"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"{here}no such model at {link}; if it is private, set HF_TOKEN to your access token"
    if isinstance(error, errors.LocalEntryNotFoundError):
        here += f"not all of it is in {constants.HF_HUB_CACHE}, and"
        if constants.HF_HUB_OFFLINE:
            return f"{here} HF_HUB_OFFLINE is set: unset it once to download the model"
        cause = f"{type(error.__cause__).__name__}: {first_line(error.__cause__)}" if error.__cause__ else first_line(error)
        return f"{here} {link} cannot be reached ({cause}): connect to the internet once, or give a folder that holds the model"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT, errno.EPERM):
        return f"cannot write to {constants.HF_HUB_CACHE} ({error.strerror}): set HF_HOME to a writable folder with free space"
    return f"cannot download it from {link} ({type(error).__name__}: {first_line(error)}): try again"


# load from a folder


def _load_folder(folder: Path) -> Pretrained:
    path = folder / "config.json"
    if (folder / ADAPTER).is_file() and not path.is_file():
        raise UserError(
            f"{folder}: a LoRA adapter, not a whole model; merge it in Python first: peft.AutoPeftModelForCausalLM"
            f".from_pretrained({str(folder)!r}).merge_and_unload().save_pretrained('merged'), then --init_from=merged"
        )
    settings = _read_json(path)
    args, gelu = _model_args(settings, path)
    bias, chat_format, others = True, None, set()
    if "nanogpt" in settings:
        bias, tokenizer, chat_format = _own_settings(settings["nanogpt"], args["vocab_size"], path)
    else:
        tokenizer, vocabulary = _find_tokenizer(folder, settings)
        tokenizer = _check_vocabulary(folder, tokenizer, args["vocab_size"])
        others = {token for token, index in vocabulary.items() if tokenizer.vocab_size <= index < args["vocab_size"]}
    rows = tokenizer.vocab_size
    weights = _read_weights(folder, args, rows, settings.get("tie_word_embeddings", True))
    if rows < args["vocab_size"]:
        names = f": {shown(', '.join(sorted(others)))}" if others else " (padding)"
        whose = "GPT-2's" if isinstance(tokenizer, TiktokenTokenizer) else "its tokenizer's"
        warn(f"{folder}: kept {whose} {rows:,} tokens, left out {args['vocab_size'] - rows:,} more{names}")
        args["vocab_size"] = rows
    biases = [name for name in weights if name.endswith(".bias")]
    if not bias and not any(weights[name].any() for name in biases):  # unless transformers has trained them since
        weights = {name: tensor for name, tensor in weights.items() if name not in biases}
        args["bias"] = False
    return Pretrained(folder, weights, args, gelu, tokenizer.to_dict(), chat_format)


def _model_args(settings: dict[str, Any], path: Path) -> tuple[dict[str, Any], str]:
    """Return nanoGPT's model arguments and the GELU. Raises UserError for settings that our model does not support."""
    if settings.get("model_type") != "gpt2":
        raise UserError(f"{path}: model_type must be 'gpt2', got {shown(settings.get('model_type'))}")
    args: dict[str, Any] = {}
    for name, (key, synonym, default) in SIZES.items():
        key = synonym if key not in settings and synonym in settings else key
        value = settings.get(key, default)
        if type(value) is not int or not 0 < value <= MAX_SIZE:
            raise UserError(f"{path}: {key} must be a whole number from 1 to {MAX_SIZE:,}, got {shown(value)}")
        args[name] = value
    if args["n_embd"] % args["n_head"]:
        raise UserError(f"{path}: n_embd must be a multiple of n_head, got {args['n_embd']} and {args['n_head']}")
    if settings.get("n_inner") not in (None, 4 * args["n_embd"]):
        raise UserError(f"{path}: n_inner must be 4 * n_embd = {4 * args['n_embd']}, got {shown(settings['n_inner'])}")
    for key, only in FIXED_SETTINGS.items():
        if settings.get(key, only) != only:
            raise UserError(f"{path}: {key} must be {only}, got {shown(settings[key])}")
    tied = settings.get("tie_word_embeddings", True)  # if False, the head must equal the embedding all the same
    if type(tied) is not bool:
        raise UserError(f"{path}: tie_word_embeddings must be True or False, got {shown(tied)}")
    activation = settings.get("activation_function", "gelu_new")
    if not isinstance(activation, str) or activation not in GELUS:
        raise UserError(f"{path}: activation_function must be one of {', '.join(GELUS)}, got {shown(activation)}")
    return args | {"bias": True, "dropout": 0.0}, GELUS[activation]


def _own_settings(own: Any, vocab_size: int, path: Path) -> tuple[bool, Tokenizer, dict[str, Any] | None]:
    """Return what `save` adds to a config: whether the model has biases, its tokenizer, its chat format's description."""
    if not isinstance(own, dict) or type(own.get("bias")) is not bool:
        raise UserError(f"{path}: damaged: nanogpt = {shown(own)}")
    try:
        tokenizer = tokenizer_from_dict(own.get("tokenizer"))
        if own.get("chat_format") is not None:
            conversation.from_dict(own["chat_format"])
    except UserError as error:
        raise UserError(f"{path}: damaged: {error}") from error
    grows = isinstance(tokenizer, (TiktokenTokenizer, JsonTokenizer))  # transformers may have added tokens since the export
    added = grows and tokenizer.vocab_size < vocab_size
    if tokenizer.vocab_size != vocab_size and not added:
        raise UserError(f"{path}: vocab_size must be that of its tokenizer ({tokenizer}), got {vocab_size}")
    return own["bias"], tokenizer, own.get("chat_format")


def _find_tokenizer(folder: Path, settings: dict[str, Any]) -> tuple[Tokenizer | None, dict[str, int]]:
    """Return the tokenizer in a folder's files, and the vocabulary of these files; None if there are none.

    It is GPT-2's encoding if the first tokens are GPT-2's, whatever was added behind them; otherwise that of tokenizer.json,
    or of vocab.json with merges.txt. `settings` is the content of config.json. Raises UserError if the files disagree.
    """
    vocabulary: dict[str, int] = {}
    first: Path | None = None
    is_gpt2 = []
    for path in (folder / name for name in ("tokenizer.json", "vocab.json") if (folder / name).is_file()):
        found = _vocabulary(path)
        is_gpt2.append(vocabulary_digest({token: i for token, i in found.items() if i < GPT2_VOCAB_SIZE}) == GPT2_DIGEST)
        if first and (is_gpt2[0] != is_gpt2[1] or any(vocabulary.get(token) != i for token, i in found.items())):
            raise UserError(f"{path}: not the vocabulary of {first.name} beside it; remove the one that is not the model's")
        first, vocabulary = first or path, vocabulary or found
    if first is None:
        return None, {}
    if is_gpt2[0]:
        return TiktokenTokenizer("gpt2", GPT2_VOCAB_SIZE), vocabulary
    try:
        content = first.read_text(encoding="utf-8") if first.name == "tokenizer.json" else _from_merges(folder)
        return JsonTokenizer(content, _special_tokens(folder, settings, vocabulary)), vocabulary
    except UserError as error:
        raise UserError(f"{first}: {error}") from error


def _vocabulary(path: Path) -> dict[str, int]:
    """Return the id of each token in tokenizer.json or vocab.json."""
    content = _read_json(path)
    if path.name == "vocab.json":
        vocabulary = content
    else:
        match content:
            case {"model": {"vocab": dict(vocabulary)}, **rest}:
                pass
            case {"model": {"vocab": list(pieces)}, **rest} if all(isinstance(piece, list) and piece for piece in pieces):
                vocabulary = {str(piece[0]): index for index, piece in enumerate(pieces)}  # Unigram: [token, score]
            case _:
                raise UserError(f"{path}: not a tokenizer file")
        special = rest.get("added_tokens") or []
        if not isinstance(special, list) or not all(isinstance(token, dict) for token in special):
            raise UserError(f"{path}: not a tokenizer file")
        vocabulary = vocabulary | {str(token.get("content")): token.get("id") for token in special}
    if not vocabulary or not all(type(index) is int for index in vocabulary.values()):
        raise UserError(f"{path}: not a vocabulary")
    return vocabulary


def _from_merges(folder: Path) -> str:
    """Return the tokenizer.json for the older vocab.json and merges.txt of a byte-level encoding."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    if not (folder / "merges.txt").is_file():
        raise UserError("not GPT-2's vocabulary, and no tokenizer.json or merges.txt is beside it; add one of them")
    if (folder / "added_tokens.json").is_file():
        raise UserError("tokens were added to it; save the tokenizer with transformers, as a tokenizer.json")
    try:
        model = models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    except Exception as error:  # the library raises no other class
        raise UserError(f"cannot be read with merges.txt ({first_line(error)})") from error
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    if model.token_to_id(END_OF_TEXT) is not None:
        tokenizer.add_special_tokens([END_OF_TEXT])
    return tokenizer.to_str()


def _special_tokens(folder: Path, settings: dict[str, Any], vocabulary: dict[str, int]) -> dict[str, str]:
    """Return the special tokens that tokenizer_config.json names, such as {"eos_token": "</s>"}.

    Without an eos_token there, it is that of config.json, or <|endoftext|> if the vocabulary has it.
    """
    path = folder / "tokenizer_config.json"
    about = _read_json(path) if path.is_file() else {}
    found = {role: about.get(role) for role in SPECIAL}
    found = {role: token.get("content") if isinstance(token, dict) else token for role, token in found.items()}
    if found["eos_token"] not in vocabulary:
        by_id = {index: token for token, index in vocabulary.items()}
        end = settings.get("eos_token_id")
        found["eos_token"] = by_id.get(end) if isinstance(end, int) else None
        found["eos_token"] = found["eos_token"] or (END_OF_TEXT if END_OF_TEXT in vocabulary else None)
    return {role: token for role, token in found.items() if isinstance(token, str) and token in vocabulary}


def _check_vocabulary(folder: Path, tokenizer: Tokenizer | None, vocab_size: int) -> Tokenizer:
    """Return the tokenizer of a model with `vocab_size` rows. Raises UserError if it has more tokens than the model.

    A model without tokenizer files is judged by the number of its tokens: GPT-2's, as they are or padded to a multiple.
    """
    path = folder / "config.json"
    if isinstance(tokenizer, JsonTokenizer):
        if tokenizer.vocab_size > vocab_size:
            raise UserError(f"{path}: vocab_size must be at least that of its tokenizer ({tokenizer}), got {vocab_size:,}")
        return tokenizer
    if vocab_size < GPT2_VOCAB_SIZE or (tokenizer is None and vocab_size not in GPT2_PADDED_SIZES):
        raise UserError(
            f"{path}: vocab_size must be GPT-2's {GPT2_VOCAB_SIZE} or padded, as 50304 is, got {vocab_size}; "
            "if the model has another vocabulary, put its tokenizer.json beside it"
        )
    return tokenizer or TiktokenTokenizer("gpt2", GPT2_VOCAB_SIZE)


def _read_weights(folder: Path, args: dict[str, Any], rows: int, tied: bool) -> dict[str, torch.Tensor]:
    """Return a folder's weights under our names, in our model's order. Raises UserError if they do not fit `args`.

    Of the token embedding, the first `rows` are kept. Unless the folder says that the head is `tied` to it, the file must
    hold both.
    """
    # 1) list the tensors in all files, without reading them
    source, files = _weight_files(folder)
    found: dict[str, tuple[Path, str, tuple[int, ...]]] = {}  # our name: (file, their name, their shape)
    for file in files:
        for theirs, shape in _shapes(file).items():
            bare = bare_name(theirs)
            if bare is None:
                continue
            name = bare if bare == HEAD else f"transformer.{bare.removeprefix('transformer.')}"
            if name in found:
                raise UserError(f"{file}: {shown(theirs)} is a duplicate, already found in {found[name][0].name}")
            found[name] = (file, theirs, shape)

    # 2) compare names and shapes with the config
    if args["n_layer"] > len(found):  # before a list of so many layers is built
        raise UserError(f"{source}: weights are missing: config.json has n_layer = {args['n_layer']}")
    wanted = _parameter_shapes(args)
    for name, (file, theirs, shape) in found.items():
        if name not in wanted:
            raise UserError(f"{file}: {shown(theirs)} is not part of a GPT-2 with {args['n_layer']} layers")
        want = wanted[name][::-1] if name.endswith(CONV1D) else wanted[name]
        if shape != want:
            raise UserError(f"{file}: {shown(theirs)} must have shape {want} by its config.json, got {shape}")
    for name in wanted:
        if name not in found and not (tied and name in (WTE, HEAD) and {WTE, HEAD} & found.keys()):
            raise UserError(f"{source}: {name.removeprefix('transformer.')!r} is missing")

    # 3) read and convert them; the head and the token embedding become one tensor
    weights: dict[str, torch.Tensor] = {}
    for file, names in _groups(found):
        for name, tensor in zip(names, _tensors(file, [found[name][1] for name in names]), strict=True):
            twin = {WTE: HEAD, HEAD: WTE}.get(name)
            tensor = tensor[:rows] if twin else tensor
            if twin in weights:
                require_tied(weights[twin], tensor, file)
            else:
                weights[name] = _converted(tensor, name, can_map(file))
            del tensor
    embedding = weights.get(WTE, weights.get(HEAD))
    weights |= {WTE: embedding, HEAD: embedding}
    return {name: weights[name] for name in wanted}


def _converted(tensor: torch.Tensor, name: str, mapped: bool) -> torch.Tensor:
    """Return a tensor in our layout: float32, Conv1D matrices transposed, in memory of its own."""
    if name.endswith(CONV1D):
        tensor = tensor.t()
    elif not mapped and tensor.dtype == torch.float32 and tensor.untyped_storage().nbytes() == tensor.nbytes:
        return tensor
    return torch.empty(tensor.shape, dtype=torch.float32).copy_(tensor)


def _parameter_shapes(args: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of every parameter of our model with biases, in its order.

    A table, since building the model, even on the "meta" device, would take a second of imports.
    """
    C = args["n_embd"]
    layer = {"ln_1": (C,), "attn.c_attn": (3 * C, C), "attn.c_proj": (C, C)}
    layer |= {"ln_2": (C,), "mlp.c_fc": (4 * C, C), "mlp.c_proj": (C, 4 * C)}
    shapes: dict[str, tuple[int, ...]] = {WTE: (args["vocab_size"], C), WPE: (args["block_size"], C)}
    for i in range(args["n_layer"]):
        for part, shape in layer.items():
            shapes[f"transformer.h.{i}.{part}.weight"] = shape
            shapes[f"transformer.h.{i}.{part}.bias"] = shape[:1]
    return shapes | {"transformer.ln_f.weight": (C,), "transformer.ln_f.bias": (C,), HEAD: (args["vocab_size"], C)}


def _weight_files(folder: Path) -> tuple[Path, list[Path]]:
    """Return the file to name in errors about a folder's weights (an index, if there is one), and the files that hold them."""
    for name in (*SAFETENSORS, *PICKLED):
        path = folder / name
        if not path.is_file():
            continue
        if not name.endswith(".index.json"):
            return path, [path]
        shards = _read_json(path).get("weight_map")
        if not isinstance(shards, dict) or not shards or not all(isinstance(shard, str) for shard in shards.values()):
            raise UserError(f"{path}: not an index of weight files")
        for shard in shards.values():
            if shard in ("", ".", "..") or set(shard) & set("/\\:\0"):
                raise UserError(f"{path}: refused: it names {shown(shard)}, which is not a file in its folder")
            if not (folder / shard).is_file():
                raise UserError(f"{folder / shard}: missing, but listed in {name}; download the model again")
        return path, [folder / shard for shard in sorted(set(shards.values()))]
    raise UserError(f"{folder}: no weights in it: neither {SAFETENSORS[0]} nor {PICKLED[0]}")


def _groups(found: dict[str, tuple[Path, str, tuple[int, ...]]]) -> Iterator[tuple[Path, list[str]]]:
    """Yield (file, names to read from it at once), in the order that keeps peak memory low.

    The pages of a mapped file stay in memory while it is open, so it is read in small groups. The largest come first: the
    peak is at the end, where the pages of small tensors add little. A file that cannot be mapped is in memory as a whole
    anyway, and is read once.
    """
    mapped = {file: can_map(file) for file, _, _ in found.values()}
    sizes = {name: 4 * torch.Size(shape).numel() for name, (_, _, shape) in found.items()}  # bytes in float32
    order = sorted(found, key=lambda name: (mapped[found[name][0]], -sizes[name] * mapped[found[name][0]], found[name][0]))
    group: list[str] = []
    for name in order:
        file = found[name][0]
        is_full = mapped[file] and sum(sizes[n] for n in group) + sizes[name] > MAX_MAPPED_BYTES
        if group and (file != found[group[0]][0] or is_full):
            yield found[group[0]][0], group
            group = []
        group.append(name)
    yield found[group[0]][0], group


def _shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of each tensor in a file."""
    if file.suffix != ".safetensors":
        return {name: tuple(tensor.shape) for name, tensor in _unpickled(file).items()}
    import safetensors

    try:
        with safetensors.safe_open(file, framework="pt") as opened:
            return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}
    except safetensors.SafetensorError as error:
        raise UserError(f"{file}: not a safetensors file, or damaged ({first_line(error)})") from error


def _tensors(file: Path, names: list[str]) -> Iterator[torch.Tensor]:
    """Yield the tensors of these names in a file, keeping no reference to them."""
    if file.suffix != ".safetensors":
        state = _unpickled(file)
        state = {name: state[name] for name in names}
        for name in names:
            yield checked(state.pop(name), name, file)
        return
    import safetensors

    with safetensors.safe_open(file, framework="pt") as opened:
        for name in names:
            yield checked(opened.get_tensor(name), name, file)


def _unpickled(file: Path) -> dict[str, torch.Tensor]:
    """Return the state dict in a file of `torch.save`, memory-mapped if possible."""
    state = read_pickled(file, "a file of weights", mmap=True)
    if not isinstance(state, dict) or not state:
        raise UserError(f"{file}: not a file of weights")
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise UserError(f"{file}: not a file of weights: it has {shown(name)}")
    return state


def _read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file. Raises UserError if there is none."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ValueError("too large")
        content = json.loads(path.read_bytes().decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a JSON file ({first_line(error)})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: must hold a JSON object, got {shown(content)}")
    return content


# save to a folder


def _check_replaceable(folder: Path) -> None:
    """Raise UserError if `folder` exists and is anything but an earlier export."""
    if not os.path.lexists(folder):
        return
    if folder.is_symlink() or not folder.is_dir():
        what = "a link" if folder.is_symlink() else "not a folder"
        raise UserError(f"{folder}: exists and is {what}; choose another name, or move it away")
    held = sorted(path.name for path in folder.iterdir())
    others = [name for name in held if name not in EXPORTED and not UNFINISHED.fullmatch(name)]
    if others:
        raise UserError(f"{folder}: holds {shown(others[0])}, which is not part of an export; choose another folder")
    if held and ("config.json" not in held or "nanogpt" not in _read_json(folder / "config.json")):
        raise UserError(f"{folder}: holds a model that export.py did not write; choose another folder")


def _discard(folder: Path, part: Path) -> None:
    """Delete an export that `_check_replaceable` has passed, under the name of an unfinished one: never half of it is left."""
    if folder.exists():
        folder.rename(part)
        for path in sorted(part.iterdir(), key=lambda path: path.name == "config.json"):  # last, since it marks them as ours
            path.unlink()
        part.rmdir()


def _config(
    model_args: Mapping[str, Any],
    gelu: str,
    tokenizer: Tokenizer,
    end: int | None,
    dtype: torch.dtype,
    chat_format: ChatFormat | None,
) -> dict[str, Any]:
    """Return the content of config.json."""
    own = {"bias": model_args["bias"], "tokenizer": tokenizer.to_dict()}
    if chat_format:
        own["chat_format"] = conversation.to_dict(chat_format)
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": "gelu_new" if gelu == "tanh" else "gelu",
        "vocab_size": tokenizer.vocab_size,
        "n_positions": model_args["block_size"],
        "n_ctx": model_args["block_size"],
        "n_embd": model_args["n_embd"],
        "n_layer": model_args["n_layer"],
        "n_head": model_args["n_head"],
        "n_inner": None,
        "resid_pdrop": model_args["dropout"],
        "embd_pdrop": model_args["dropout"],
        "attn_pdrop": model_args["dropout"],
        "layer_norm_epsilon": FIXED_SETTINGS["layer_norm_epsilon"],
        "bos_token_id": end,
        "eos_token_id": end,
        "tie_word_embeddings": True,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "nanogpt": own,
    }


def _write_weights(
    path: Path, weights: Mapping[str, torch.Tensor], model_args: Mapping[str, Any], vocab_size: int, dtype: torch.dtype
) -> None:
    """Write weights in their layout: `vocab_size` rows of the token embedding, no head, zeros for missing biases."""
    import safetensors
    import safetensors.torch

    theirs: dict[str, torch.Tensor] = {}
    for name, shape in _parameter_shapes(model_args).items():
        if name == HEAD:
            continue
        tensor = weights[name].detach().cpu() if name in weights else torch.zeros(shape)
        tensor = tensor[:vocab_size] if name == WTE else tensor
        theirs[name] = (tensor.t() if name.endswith(CONV1D) else tensor).to(dtype).contiguous()
        if tensor.isfinite().all() and not theirs[name].isfinite().all():
            raise UserError(f"{name!r} has values too large for {dtype}; use --dtype=bfloat16")
    try:
        safetensors.torch.save_file(theirs, path, metadata={"format": "pt"})
    except safetensors.SafetensorError as error:  # such as a full disk
        raise UserError(f"{path}: cannot be written ({first_line(error)})") from error


def _tokenizer_files(tokenizer: Tokenizer, block_size: int, chat_format: ChatFormat | None = None) -> dict[str, str]:
    """Return a tokenizer's files, content by name. Raises UserError for a table of strings or another tiktoken encoding."""
    if isinstance(tokenizer, CharTokenizer):
        description = _character_table(tokenizer)
        about: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
        files = {}
    elif isinstance(tokenizer, TiktokenTokenizer) and tokenizer.name == "gpt2":
        marks = conversation.marks(chat_format) if chat_format and not chat_format.lead else ""  # a lead suits GPT-2's words
        description, files = _byte_pairs(tokenizer, marks)
        about = {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False}
        if marks:  # this class reads all of tokenizer.json; GPT2Tokenizer reads only the vocabulary and the merges
            about = {"tokenizer_class": "PreTrainedTokenizerFast"}
        about |= {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "unk_token": END_OF_TEXT}
    elif isinstance(tokenizer, JsonTokenizer):
        description, files = json.loads(tokenizer.to_dict()["content"]), {}
        if marks := conversation.marks(chat_format) if chat_format else "":
            steps = [_split(marks), *([description["pre_tokenizer"]] if description["pre_tokenizer"] else [])]
            description["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
        about = {"tokenizer_class": "PreTrainedTokenizerFast"} | tokenizer.special
    else:
        raise UserError(f"the tokenizer must be a character table, gpt2 or a tokenizer.json to be exported, got {tokenizer}")
    about |= {"model_max_length": block_size, "clean_up_tokenization_spaces": False}
    about["model_input_names"] = ["input_ids", "attention_mask"]  # GPT-2 would add embeddings of token_type_ids
    if chat_format:
        about["chat_template"] = conversation.template(chat_format, tokenizer)
    frame = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None}
    frame |= {"pre_tokenizer": None, "post_processor": None, "decoder": None}
    return files | {"tokenizer.json": _json(frame | description), "tokenizer_config.json": _json(about)}


def _character_table(tokenizer: CharTokenizer) -> dict[str, Any]:
    """Return the parts of tokenizer.json that make each character a token; unknown ones raise an error, as they do here."""
    for character in tokenizer.characters:
        if 0xD800 <= ord(character) < 0xE000:
            raise UserError(f"the character table has {character!r}, an unpaired surrogate, which transformers cannot encode")
    return {
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False},
        "decoder": {"type": "Fuse"},
        "model": {
            "type": "WordLevel",
            "vocab": {character: index for index, character in enumerate(tokenizer.characters)},
            "unk_token": "<unk>",  # not in the vocabulary
        },
    }


def _byte_pairs(tokenizer: TiktokenTokenizer, marks: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the parts of tokenizer.json for GPT-2's encoding, and the older vocab.json and merges.txt.

    Text is split at each match of the regex `marks` before it is encoded, unless that is "".
    """
    end = tokenizer.end_of_text  # loads the encoding, with a UserError if that fails
    import tiktoken

    ranks = tiktoken.get_encoding("gpt2")._mergeable_ranks  # tiktoken has no public name for it
    letter_of = letters()
    spelled = {token: "".join(letter_of[byte] for byte in token) for token in ranks}
    vocabulary = {spelled[token]: index for token, index in sorted(ranks.items(), key=lambda item: item[1])}
    vocabulary |= {END_OF_TEXT: end}
    merges = [(spelled[left], spelled[right]) for left, right in _merges(ranks)]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    model = {"type": "BPE", "dropout": None, "unk_token": None, "fuse_unk": False, "byte_fallback": False}
    model |= {"continuing_subword_prefix": "", "end_of_word_suffix": ""}
    description = {
        "added_tokens": [{"id": end, "content": END_OF_TEXT} | flags],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [_split(marks), byte_level]} if marks else byte_level,
        "post_processor": byte_level | {"trim_offsets": False},
        "decoder": byte_level,
        "model": model | {"vocab": vocabulary, "merges": [list(pair) for pair in merges]},
    }
    files = {
        "vocab.json": json.dumps(vocabulary, ensure_ascii=False),
        "merges.txt": "#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in merges),
    }
    return description, files


def _split(marks: str) -> dict[str, Any]:
    """Return the part of tokenizer.json that splits text at each match of the regex `marks`."""
    return {"type": "Split", "pattern": {"Regex": marks}, "behavior": "Isolated", "invert": False}


def _merges(ranks: dict[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """Yield the merges of byte-pair encoding in order: each token's two halves, as lower-ranked merges leave them."""
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
