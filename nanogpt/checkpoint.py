"""The only reader and writer of checkpoints, and the one loader of models for all scripts.

A checkpoint is nanoGPT's dictionary, so that files pass both ways: `model`, `optimizer`, `model_args` (nanoGPT's seven
names), `iter_num` (updates done), `best_val_loss`, `config`. What nanoGPT does not know lies under one more key, `extra`:

    tokenizer        the description that nanogpt.tokenizer.from_dict reads
    chat_format      the description that nanogpt.conversation.from_dict reads, of a model of conversations
    model            "gpt" or "bigram"
    gelu             "erf" or "tanh"
    scaler           state of the GradScaler, empty without one
    evaluated        the iteration of the last evaluation, which a resumed run does not repeat
    stale            evaluations since the best one, for early stopping
    wandb            the id of the run at Weights & Biases, if it has one
"""

import contextlib
import dataclasses
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from model import GPT, Bigram, GPTConfig
from nanogpt import conversation, errors, huggingface
from nanogpt import distributed as parallel
from nanogpt import tokenizer as tokenizers
from nanogpt.dataset import DATA
from nanogpt.errors import UserError, one_line
from nanogpt.optim import Muon, MuonWithAdamW

BEST = "ckpt.pt"  # the best weights, or the newest with always_save_checkpoint
LAST = "last.pt"  # the newest training state
MODEL_ARGS = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")
MODELS = {"gpt": GPT, "bigram": Bigram}
PREFIXES = ("_orig_mod.", "module.")  # what torch.compile and DistributedDataParallel put before names


@dataclass
class Checkpoint:
    """A checkpoint file's content, checked as far as each part can be by itself."""

    path: Path
    weights: dict[str, torch.Tensor]
    optimizer: dict[str, Any] | None
    model_args: dict[str, Any]
    iter_num: int
    best_val_loss: float
    config: dict[str, Any]
    extra: dict[str, Any]
    in_file: bool = True  # whether the weights may be parts of the file, which are copied to build a model

    @property
    def kind(self) -> str:
        """The kind of model: a key of MODELS."""
        return self.extra.get("model", "gpt")

    @property
    def chat_format(self) -> conversation.ChatFormat | None:
        """The format of the conversations that the model was trained on, if it was."""
        description = self.extra.get("chat_format")
        return None if description is None else conversation.from_dict(description)


class Saver:
    """Writes the checkpoints of one run into its folder, in the main process; the others hand it their shares of the state."""

    def __init__(
        self,
        out_dir: Path,
        model: GPT | Bigram,
        optimizer: torch.optim.Optimizer | MuonWithAdamW,
        scaler: torch.amp.GradScaler,
        description: dict[str, Any],
        config: dict[str, Any],
        saved: tuple[int, int] = (-1, -1),
        is_main: bool = True,
    ):
        """Save `model` (the module itself, not a wrapper) and the others; `description` is that of the dataset.

        The folder has a state already where `saved`, its iteration and that of its last evaluation, are those of one.
        """
        self.failure = ""  # why the newest state that was to be saved is not on the disk
        self._out_dir, self._description, self._config, self._is_main = out_dir, description, config, is_main
        self._model, self._optimizer, self._scaler = model, optimizer, scaler
        self._tried, self._tried_at = saved, time.perf_counter()

    def is_due(self, iteration: int, interval: int, minutes: float) -> bool:
        """Return whether to save now: every `interval` iterations and `minutes` after the last time, 0 being never."""
        if not self._is_main or iteration in (0, self._tried[0]):
            return False
        elapsed = time.perf_counter() - self._tried_at
        return (interval > 0 and iteration % interval == 0) or (0 < 60 * minutes <= elapsed)

    def save(self, iter_num: int, best_val_loss: float, evaluated: int, stale: int, is_best: bool) -> None:
        """Write the state after `iter_num` updates, unless that was done before; a full disk is a warning and a `failure`."""
        if self._tried == (iter_num, evaluated) or not (self._is_main or parallel.is_sharded(self._model)):
            return
        self._tried, self.failure = (iter_num, evaluated), ""
        extra = {**self._description, "scaler": self._scaler.state_dict(), "evaluated": evaluated, "stale": stale}
        state = pack(self._model, self._optimizer, iter_num, best_val_loss, self._config, extra)
        if not self._is_main:
            return
        try:
            if is_best:  # in this order, a run that is killed in between has its newest state in BEST; see `newest`
                save(self._out_dir / BEST, state)
                share(self._out_dir / BEST, self._out_dir / LAST)
            else:
                save(self._out_dir / LAST, state)
        except OSError as error:
            self.failure = f"{error.filename or self._out_dir}: {error.strerror}"
            errors.warn(f"iteration {iter_num} is not saved ({self.failure}); the files before it are whole")
        self._tried_at = time.perf_counter()


def save(path: Path, state: dict[str, Any]) -> None:
    """Write `state` to `path` so that the file there is always whole: the old one until the new one is on the disk.

    OSError, with the name of the file, where it cannot be written.
    """
    part = path.with_name(path.name + ".tmp")
    try:
        part.unlink(missing_ok=True)  # one left by a killed `share` is another name of a checkpoint: not to be written into
        with open(part, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        cause = error
        while not isinstance(cause, OSError):  # torch.save raises errors of its own on top of it
            cause = cause.__context__
            if cause is None:
                raise
        raise OSError(cause.errno, cause.strerror, str(path)) from error
    finally:
        part.unlink(missing_ok=True)


def share(path: Path, other: Path) -> None:
    """Make `other` a second name of the checkpoint at `path`, which costs no time; a copy where the disk has no links."""
    part = other.with_name(other.name + ".tmp")
    part.unlink(missing_ok=True)
    try:
        os.link(path, part)
    except OSError:
        save(other, torch.load(path, map_location="cpu", weights_only=True))
    else:
        os.replace(part, other)
        part.unlink(missing_ok=True)  # it is still there where both were names of one file already
        _sync_folder(other.parent)


def pack(
    model: GPT | Bigram,
    optimizer: torch.optim.Optimizer | MuonWithAdamW,
    iter_num: int,
    best_val_loss: float,
    config: dict[str, Any],
    extra: dict[str, Any],
) -> dict[str, Any]:
    """Return a training state as the dictionary that `save` takes; `model` is the module itself, not a wrapper of it.

    Of a sharded model it is that in the main process alone, and all of them must call this.
    """
    shape = dataclasses.asdict(model.config)
    parameters = model.state_dict(keep_vars=True)  # themselves, so that tied ones are known and stored once
    weights = {parameter: parallel.whole(parameter.detach()) for parameter in dict.fromkeys(parameters.values())}
    return {
        "model": {name: weights[parameter] for name, parameter in parameters.items()},
        "optimizer": parallel.whole(optimizer.state_dict()),
        "model_args": {name: shape[name] for name in MODEL_ARGS},
        "iter_num": iter_num,
        "best_val_loss": best_val_loss,
        "config": config,
        "extra": extra | {"model": _kind(model), "gelu": model.config.gelu},
    }


def load(path: Path, mmap: bool = False) -> Checkpoint:
    """Read a checkpoint of this project or of nanoGPT, without running code from it; UserError where it is none.

    With `mmap`, tensors stay in the file until they are used: for those who need few of them, and do not keep them.
    """
    state = huggingface.read_pickled(path, "a checkpoint", mmap)
    if not isinstance(state, dict) or not isinstance(state.get("model"), dict):
        raise UserError(f"{path}: not a checkpoint: it has no 'model'")
    checkpoint = Checkpoint(
        path=path,
        weights=_weights(state["model"], path),
        optimizer=_typed(state, "optimizer", dict, path, optional=True),
        model_args=_typed(state, "model_args", dict, path),
        iter_num=_typed(state, "iter_num", int, path),
        best_val_loss=_number(state.get("best_val_loss", float("inf")), path),
        config=_typed(state, "config", dict, path, optional=True) or {},
        extra=_typed(state, "extra", dict, path, optional=True) or {},
    )
    _check_extra(checkpoint)
    _check_shape(checkpoint)
    return checkpoint


def find(out_dir: Path, names: tuple[str, ...]) -> Path:
    """Return the first of `names` that is in the run folder `out_dir`; UserError where none is."""
    for name in names:
        if (out_dir / name).is_file():
            return out_dir / name
    raise UserError(
        f"no checkpoint in {out_dir} ({' or '.join(names)}); train one there first: python train.py --out_dir={out_dir}"
    )


def newest(out_dir: Path) -> Path:
    """Return the file with the newest training state in a run folder, for resuming it; UserError where there is none."""
    path, best = find(out_dir, (LAST, BEST)), out_dir / BEST
    if not best.is_file() or best.samefile(path):
        return path
    try:
        last = load(path, mmap=True)
    except UserError as error:
        raise UserError(f"{error}; without that file, the run goes on from {best}") from error
    return best if load(best, mmap=True).iter_num > last.iter_num else path


def skeleton(kind: str, config: GPTConfig) -> GPT | Bigram:
    """Return a model of a `kind` in MODELS without weights, which takes no memory: on the device "meta"."""
    with torch.device("meta"), _Unfilled():
        return MODELS[kind](config)


def build_model(checkpoint: Checkpoint, dropout: float = 0.0, weightless: bool = False) -> GPT | Bigram:
    """Return the checkpoint's model, on the CPU in float32, with its weights, which leave the checkpoint.

    A `weightless` one is on the device "meta". UserError where the weights do not fit its shape.
    """
    args = {name: checkpoint.model_args[name] for name in MODEL_ARGS}
    config = GPTConfig(**args | {"dropout": dropout, "gelu": checkpoint.extra.get("gelu", "erf")})
    model = skeleton(checkpoint.kind, config)  # the shapes are compared before any memory is taken
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    found = {name: tensor.shape for name, tensor in checkpoint.weights.items()}
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            shapes = [tuple(side[name]) if name in side else "nothing" for side in (found, wanted)]
            raise UserError(f"{checkpoint.path}: damaged: {name!r} is {shapes[0]} where its shape needs {shapes[1]}")
    if weightless:
        return model
    # Copied one by one, each original going at once, so that memory holds the weights once; tied ones are one.
    copies: dict[tuple, torch.Tensor] = {}
    weights = {}
    for name in list(checkpoint.weights):
        tensor = checkpoint.weights.pop(name)
        place = tensor.data_ptr(), tensor.shape, tensor.stride()
        if place not in copies:
            copies[place] = tensor.to(torch.float32, copy=checkpoint.in_file)
        weights[name] = copies[place]
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    return model


def restore_optimizer(
    checkpoint: Checkpoint, optimizer: torch.optim.Optimizer | MuonWithAdamW, scaler: torch.amp.GradScaler
) -> None:
    """Load the optimizer's and the scaler's state; what they are set to (rates, decay, kernels) stays as it is.

    UserError where the state does not fit the parameters.
    """
    saved, scale = checkpoint.optimizer, checkpoint.extra.get("scaler")
    try:
        if isinstance(optimizer, MuonWithAdamW):
            if saved is None or saved.keys() != optimizer.parts.keys():
                raise ValueError("it is AdamW's alone, and not Muon's")
            for name, part in optimizer.parts.items():
                _restore(part, saved[name])
        else:
            if saved is not None and saved.keys() == {"muon", "adamw"}:
                raise ValueError("it is Muon's, and not AdamW's alone")
            _restore(optimizer, saved)
        if scaler.is_enabled() and scale:
            types = {name: type(value) for name, value in scale.items()}
            if types != {name: type(value) for name, value in scaler.state_dict().items()}:
                raise ValueError("that of its scaler")
            scaler.load_state_dict(scale)
    except (TypeError, KeyError, ValueError, AttributeError, RuntimeError) as error:
        raise UserError(
            f"{checkpoint.path}: the state of its optimizer does not fit ({_first_line(error)}); "
            f"--init_from={checkpoint.path} --out_dir=NEW starts a new run from its weights"
        ) from error


def _restore(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Load one optimizer's state; ValueError, or another error, where it is not that of its parameters."""
    if not all(_is_plain(value) for state in saved["state"].values() for value in state.values()):
        raise ValueError("not of plain tensors")
    groups = [
        {name: value for name, value in group.items() if name != "params"} | {"params": old["params"]}
        for group, old in zip(optimizer.param_groups, saved["param_groups"], strict=True)
    ]
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    ours = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    parameters = dict(zip(numbers, ours, strict=True))
    states = {
        index: {name: parallel.sharded_as(value, parameters[index]) for name, value in state.items()}
        for index, state in saved["state"].items()
    }
    optimizer.load_state_dict({"state": states, "param_groups": groups})
    for parameter, state in optimizer.state.items():
        shapes = {name: value.shape for name, value in state.items()}
        if isinstance(optimizer, Muon):
            expected = {"momentum_buffer": parameter.shape}
        else:
            expected = {"step": (), "exp_avg": parameter.shape, "exp_avg_sq": parameter.shape}
        if shapes != expected:
            raise ValueError("of another shape")


def load_model(
    init_from: str, out_dir: str, dropout: float = 0.0, to_train: bool = False, weightless: bool = False
) -> tuple[GPT | Bigram, "tokenizers.Tokenizer", Checkpoint]:
    """Return the model that `init_from` names, its tokenizer and the checkpoint that it comes from.

    `init_from` is "resume", for the run in `out_dir`; the path of a run folder or a checkpoint file; or GPT-2 weights, as
    `huggingface.load` takes them. Of a run it takes the best weights; to go on training it with "resume", the newest.
    The weights of a `weightless` model stay in the file. UserError where there is no such thing.
    """
    path = Path(out_dir if init_from == "resume" else init_from)
    if init_from != "resume" and (huggingface.is_folder(path) or (huggingface.is_name(init_from) and not path.exists())):
        checkpoint = _pretrained(init_from)
        return build_model(checkpoint, dropout, weightless), tokenizer_of(checkpoint), checkpoint
    if path.is_dir():
        path = newest(path) if to_train and init_from == "resume" else find(path, (BEST, LAST))
    elif init_from == "resume":
        raise UserError(f"--out_dir={out_dir}: no such folder; train a model there first, or name another")
    elif not path.is_file():
        raise UserError(f"--init_from={init_from}: no such run folder or checkpoint file, nor a name of GPT-2 weights")
    checkpoint = load(path, mmap=weightless or not to_train)
    return build_model(checkpoint, dropout, weightless), tokenizer_of(checkpoint), checkpoint


def _pretrained(name: str) -> Checkpoint:
    """Return GPT-2 weights in the form of a checkpoint that was never trained here."""
    pretrained = huggingface.load(name)
    return Checkpoint(
        path=pretrained.path,
        weights=pretrained.weights,
        optimizer=None,
        model_args=pretrained.model_args,
        iter_num=0,
        best_val_loss=float("inf"),
        config={},
        extra={"gelu": pretrained.gelu, "tokenizer": pretrained.tokenizer},
        in_file=False,
    )


def tokenizer_of(checkpoint: Checkpoint) -> "tokenizers.Tokenizer":
    """Return the tokenizer in a checkpoint; for nanoGPT's, which have none, that of the dataset which they name."""
    if "tokenizer" in checkpoint.extra:
        try:
            tokenizer = tokenizers.from_dict(checkpoint.extra["tokenizer"])
        except UserError as error:
            raise UserError(f"{checkpoint.path}: damaged: {error}") from error
    else:
        dataset = str(checkpoint.config.get("dataset", ""))
        try:
            tokenizer = tokenizers.from_folder(DATA / dataset)
        except OSError as error:  # no name of a folder
            raise UserError(f"{checkpoint.path}: no dataset is there of its name {_shown(dataset)}") from error
    if tokenizer.vocab_size > checkpoint.model_args["vocab_size"]:
        raise UserError(f"{checkpoint.path}: its tokenizer ({tokenizer}) does not belong to its model")
    return tokenizer


class _Unfilled(TorchFunctionMode):
    """Leaves out the drawing of initial weights, for which PyTorch would import a thousand modules on the "meta" device."""

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if getattr(function, "__module__", "") == "torch.nn.init":
            return None
        return function(*args, **kwargs or {})


def _weights(named: dict[Any, Any], path: Path) -> dict[str, torch.Tensor]:
    """Return the weights in a state dict by their bare names, without the masks that nanoGPT's old files have."""
    if not named or not all(isinstance(name, str) and _is_plain(value) for name, value in named.items()):
        raise UserError(f"{path}: damaged: its 'model' is not a dictionary of tensors")
    weights = {_bare(name): tensor for name, tensor in named.items()}
    return {name: tensor for name, tensor in weights.items() if not name.endswith(".attn.bias")}


def _check_shape(checkpoint: Checkpoint) -> None:
    """Raise UserError where the model's arguments are not those of a model."""
    args, path = checkpoint.model_args, checkpoint.path
    for name in MODEL_ARGS:
        value = args.get(name)
        if name == "bias":
            fits = type(value) is bool
        elif name == "dropout":
            fits = type(value) in (int, float) and 0 <= value < 1
        else:
            fits = type(value) is int and 0 < value < 1 << 24
        if not fits:
            raise UserError(f"{path}: damaged: its model_args have {name} = {_shown(value)}")
    if checkpoint.kind == "bigram":
        return
    if args["n_embd"] % args["n_head"]:
        raise UserError(f"{path}: damaged: n_head={args['n_head']} does not divide n_embd={args['n_embd']}")
    if args["n_layer"] > len(checkpoint.weights):  # not to be built, even without memory for its weights
        raise UserError(f"{path}: damaged: weights for n_layer={args['n_layer']} are not all there")


def _check_extra(checkpoint: Checkpoint) -> None:
    """Raise UserError where what is beyond nanoGPT's keys, the tokenizer apart, is not what this version writes."""
    extra, path = checkpoint.extra, checkpoint.path
    for name, known in (("model", list(MODELS)), ("gelu", ["erf", "tanh"])):
        if extra.get(name, known[0]) not in known:
            raise UserError(f"{path}: its {name} is {_shown(extra[name])}: damaged, or of a later version")
    try:
        checkpoint.chat_format  # noqa: B018 (reading it checks it)
    except UserError as error:
        raise UserError(f"{path}: damaged: {error}") from error
    for name in ("evaluated", "stale"):
        if type(extra.get(name, 0)) is not int:
            raise UserError(f"{path}: damaged: '{name}' is {_shown(extra[name])}")
    if type(extra.get("wandb", "")) is not str:
        raise UserError(f"{path}: damaged: its wandb is {_shown(extra['wandb'])}")
    scaler = extra.get("scaler", {})
    if not isinstance(scaler, dict) or not all(type(value) in (int, float) for value in scaler.values()):
        raise UserError(f"{path}: damaged: its scaler is {_shown(scaler)}")


def _typed(state: dict, key: str, kind: type, path: Path, optional: bool = False) -> Any:
    value = state.get(key)
    if optional and value is None:
        return None
    if type(value) is not kind or (kind is int and value < 0):
        raise UserError(f"{path}: not a checkpoint, or damaged: its '{key}' is {_shown(value)}")
    return value


def _number(value: Any, path: Path) -> float:
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()  # nanoGPT's is a tensor
    if type(value) is int and abs(value) < 1 << 62:
        value = float(value)
    if type(value) is not float:
        raise UserError(f"{path}: damaged: its 'best_val_loss' is {_shown(value)}")
    return value


def _sync_folder(folder: Path) -> None:
    """Make the names in a folder outlast a power failure; Windows has no such call, and some network disks refuse it."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
        os.close(descriptor)


def _kind(model: GPT | Bigram) -> str:
    return next(kind for kind, cls in MODELS.items() if isinstance(model, cls))


def _bare(name: str) -> str:
    for prefix in PREFIXES * 2:
        name = name.removeprefix(prefix)
    return name


def _is_plain(value: Any) -> bool:
    """Whether a value is a tensor of real numbers that are all there."""
    return (
        isinstance(value, torch.Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and not value.is_complex()
    )


def _first_line(error: object) -> str:
    return str(error).strip().split("\n")[0]


def _shown(value: Any) -> str:
    return one_line(repr(value))[:60]
