"""The only reader and writer of checkpoints, and the model loader of every command.

A checkpoint is nanoGPT's dictionary, so that files pass both ways: `model`, `optimizer`, `model_args` (nanoGPT's seven names),
`iter_num` (updates done), `best_val_loss`, `config`. What nanoGPT does not know is under one more key, `extra`:

    tokenizer        the description that nanogpt.tokenizer.from_dict reads
    chat_format      the description that nanogpt.conversation.from_dict reads, if the model was trained on conversations
    model            "gpt" or "bigram"
    gelu             "erf" or "tanh"
    scaler           state of the GradScaler, empty without one
    evaluated        iteration of the last evaluation, which a resumed run does not repeat
    stale            evaluations since the best one, for early stopping
    ckpt_val_loss    validation loss of the weights in ckpt.pt, if it is known
    wandb            id of the Weights & Biases run, if there is one
"""

import dataclasses
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from model import GPT, Bigram, GPTConfig
from nanogpt import conversation, huggingface
from nanogpt import tokenizer as tokenizers
from nanogpt.dataset import DATA, prepared
from nanogpt.distributed import gather, is_sharded, shard_like
from nanogpt.errors import UserError, first_line, one_line, shown, warn
from nanogpt.files import atomic_write
from nanogpt.optim import Muon, MuonWithAdamW
from nanogpt.weights import HEAD, WPE, WTE, bare_name, checked, is_stored, read_pickled, require_finite, require_tied

BEST = "ckpt.pt"  # the best state; the newest with always_save_checkpoint
LAST = "last.pt"  # the newest state, only there if it is newer than BEST
MODEL_ARGS = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")
MODELS = {"gpt": GPT, "bigram": Bigram}
MAX_ITERS = (1 << 63) - 1
RETRY_SECONDS = 60.0  # from a save that failed to the next attempt
SHOWN_RUNS = 8  # that an error lists
Optimizer = torch.optim.Optimizer | MuonWithAdamW


@dataclass
class Checkpoint:
    """The content of a checkpoint file, each part checked by itself."""

    path: Path
    weights: dict[str, torch.Tensor]
    optimizer: dict[str, Any] | None
    model_args: dict[str, Any]
    iter_num: int  # updates done; -1: the file does not say, so that its run cannot be resumed
    best_val_loss: float
    config: dict[str, Any]
    extra: dict[str, Any]
    in_file: bool = True  # the tensors belong to the file: a model copies them

    @property
    def model_type(self) -> str:
        """The type of model: a key of MODELS."""
        return self.extra.get("model", "gpt")

    @property
    def chat_format(self) -> conversation.ChatFormat | None:
        """The format of the conversations that the model was trained on, if it was."""
        description = self.extra.get("chat_format")
        return None if description is None else conversation.from_dict(description)

    def in_memory(self) -> "Checkpoint":
        """Return the checkpoint with its tensors read from the file; if they were memory-mapped, they are released here."""
        if not self.in_file:
            return self
        self.release()
        return load(self.path)

    def release(self) -> None:
        """Drop all tensors: a memory-mapped file takes room on the disk as long as one is used, even if it was replaced."""
        self.weights, self.optimizer = {}, None


# writing


class Saver:
    """Writes the checkpoints of one run, on rank 0; the other ranks contribute their shards."""

    def __init__(
        self,
        out_dir: Path,
        model: GPT | Bigram,
        optimizer: Optimizer,
        scaler: torch.amp.GradScaler,
        description: dict[str, Any],
        config: dict[str, Any],
        saved: tuple[int, int] = (-1, -1),
        is_main: bool = True,
        check_folder: Callable[[], None] = lambda: None,
    ):
        """Save `model` (the module, not a wrapper of it) and the rest; `description` is the dataset's.

        `saved` is the (iter_num, evaluated) of the state that is in the folder already, if any. `check_folder` is called before
        each save; an OSError that it raises is one of writing.
        """
        self._check_folder = check_folder
        self.failure = ""  # why the newest state is not on the disk; empty if it is
        self._out_dir, self._description, self._config, self._is_main = out_dir, description, config, is_main
        self._model, self._optimizer, self._scaler = model, optimizer, scaler
        self._saved, self._saved_at = saved, time.perf_counter()

    def is_due(self, iter_num: int, interval: int, minutes: float) -> bool:
        """Return whether to save now: every `interval` iterations, and `minutes` after the last save; 0 means never.

        After a save that failed, also RETRY_SECONDS later.
        """
        if not self._is_main or iter_num in (0, self._saved[0]):
            return False
        elapsed = time.perf_counter() - self._saved_at
        retry = bool(self.failure) and elapsed >= RETRY_SECONDS
        return retry or (interval > 0 and iter_num % interval == 0) or (0 < 60 * minutes <= elapsed)

    def save(self, iter_num: int, best_val_loss: float, extra: dict[str, Any], is_best: bool) -> bool:
        """Write the state after `iter_num` updates unless it is written already; return whether this has written it.

        A full disk is a warning and a `failure`.
        """
        if self._saved == (iter_num, extra["evaluated"]) or not (self._is_main or is_sharded(self._model)):
            return False
        self._saved, self.failure = (iter_num, extra["evaluated"]), ""
        extra = {**self._description, "scaler": self._scaler.state_dict(), **extra}
        state = pack(self._model, self._optimizer, iter_num, best_val_loss, self._config, extra)
        if not self._is_main:
            return False
        is_written = False
        try:
            self._check_folder()
            save(self._out_dir / (BEST if is_best else LAST), state)
            is_written = True
            if is_best:
                (self._out_dir / LAST).unlink(missing_ok=True)  # older now; if the process is killed before, see `newest`
        except OSError as error:
            self.failure = f"{error.filename or self._out_dir}: {error.strerror}"
            warn(f"could not save iteration {iter_num} ({self.failure}); the earlier checkpoints are whole")
        self._saved_at = time.perf_counter()
        return is_written


def save(path: Path, state: dict[str, Any]) -> None:
    """Write `state` to `path` atomically. Raises OSError, with the file's name, if it cannot be written."""
    try:
        with atomic_write(path) as file:
            torch.save(state, file)
    except (OSError, RuntimeError) as error:
        cause = error
        while not isinstance(cause, OSError):  # torch.save raises errors of its own on top of it
            cause = cause.__context__
            if cause is None:
                raise
        raise OSError(cause.errno, cause.strerror, str(path)) from error


def pack(
    model: GPT | Bigram,
    optimizer: Optimizer,
    iter_num: int,
    best_val_loss: float,
    config: dict[str, Any],
    extra: dict[str, Any],
) -> dict[str, Any]:
    """Return a training state as the dictionary that `save` takes; `model` is the module itself, not a wrapper of it.

    With a sharded model all ranks must call this, and only rank 0 gets the tensors.
    """
    shape = dataclasses.asdict(model.config)
    parameters = model.state_dict(keep_vars=True)  # the parameters themselves, so that tied ones are stored once
    weights = {parameter: gather(parameter.detach()) for parameter in dict.fromkeys(parameters.values())}
    model_type = next(name for name, model_class in MODELS.items() if isinstance(model, model_class))
    return {
        "model": {name: weights[parameter] for name, parameter in parameters.items()},
        "optimizer": gather(optimizer.state_dict()),
        "model_args": {name: shape[name] for name in MODEL_ARGS},
        "iter_num": iter_num,
        "best_val_loss": best_val_loss,
        "config": config,
        "extra": extra | {"model": model_type, "gelu": model.config.gelu},
    }


# finding and reading


def load_model(init_from: str, out_dir: str, dropout: float = 0.0) -> tuple[GPT | Bigram, tokenizers.Tokenizer, Checkpoint]:
    """Return the model that `init_from` names (see `open_checkpoint`), its tokenizer and its checkpoint."""
    checkpoint = open_checkpoint(init_from, out_dir)
    return build_model(checkpoint, dropout), tokenizer_of(checkpoint), checkpoint


def open_checkpoint(init_from: str, out_dir: str, newest_state: bool = False) -> Checkpoint:
    """Return the checkpoint that `init_from` names, its tensors memory-mapped.

    `init_from` is "resume", for the run in `out_dir`; the path of a run folder or a checkpoint file; or GPT-2 weights, as
    `huggingface.load` takes them. Of a run it is the best checkpoint, or, with "resume" and `newest_state`, the newest.
    Raises UserError if there is no such checkpoint.
    """
    path = Path(out_dir if init_from == "resume" else init_from)
    if init_from != "resume" and (
        huggingface.is_folder(huggingface.restored(path)) or (huggingface.is_name(init_from) and not path.exists())
    ):
        return _pretrained(init_from)
    resumes = init_from == "resume" and newest_state
    if path.is_dir():
        path = newest(path) if resumes else find(path, (BEST, LAST))
    elif init_from == "resume":
        raise UserError(f"--out_dir={out_dir}: no such folder; {_runs_here()}")
    elif not path.is_file():
        raise UserError(f"--init_from={init_from}: no such run folder or checkpoint file, nor a name of GPT-2 weights")
    elif path.suffix == ".safetensors" or path.name.startswith("pytorch_model"):
        missing = "" if (path.parent / "config.json").is_file() else ", once the model's config.json is in it"
        raise UserError(
            f"{path}: a file of weights; --init_from takes its folder{missing}: --init_from={shlex.quote(str(path.parent))}"
        )
    checkpoint = load(path, mmap=True)
    if resumes and checkpoint.iter_num < 0:
        raise UserError(
            f"{path}: no iter_num in it to resume from; --init_from={shlex.quote(str(path))} starts a new run from its weights"
        )
    return checkpoint


def find(out_dir: Path, names: tuple[str, ...]) -> Path:
    """Return the first of `names` that exists in the run folder. Raises UserError if none does."""
    for name in names:
        if (out_dir / name).is_file():
            return out_dir / name
    raise UserError(f"no checkpoint in {out_dir} ({' or '.join(names)}); {_runs_here()}")


def _runs_here() -> str:
    """Return the command for the newest run in the current folder and the names of others, or a command to train one."""
    files = [file for name in (BEST, LAST) for file in Path().glob(f"*/{name}")]
    files.sort(key=lambda file: file.stat().st_mtime, reverse=True)
    runs = [shlex.quote(name) for name in dict.fromkeys(str(file.parent) for file in files)]
    if runs:
        flags = [argument for argument in sys.argv[1:] if not argument.startswith("--out_dir=")]
        command = shlex.join(["python", Path(sys.argv[0]).name, *flags])
        others = f"; others: {', '.join(runs[1:SHOWN_RUNS])}{', ...' * (len(runs) > SHOWN_RUNS)}" if runs[1:] else ""
        return f"the newest of {len(runs)} here: {command} --out_dir={runs[0]}{others}"
    if not prepared():
        return "no run is here; prepare a dataset first: python data/shakespeare_char/prepare.py"
    flags = [f"--dataset={prepared()[0]}", f"--out_dir=out-{prepared()[0]}"]
    command = f"python train.py config/train_shakespeare_char_cpu.py {shlex.join(flags)}"
    return f"no run is here; prepared datasets: {', '.join(prepared())}; train one there first: {command}"


def newest(out_dir: Path) -> Path:
    """Return the file with the newest training state in a run folder. Raises UserError if there is none.

    There are two if a run was killed before it removed the older one, and where earlier versions or nanoGPT have trained.
    """
    best, last = out_dir / BEST, out_dir / LAST
    if not (best.is_file() and last.is_file()) or best.samefile(last):
        return find(out_dir, (BEST, LAST))
    updates = []
    for path, other in ((best, last), (last, best)):
        try:
            updates.append(load(path, mmap=True).iter_num)
        except UserError as error:
            raise UserError(f"{error}; remove that file to resume from {other}") from error
    return last if updates[1] > updates[0] else best


def remove_older(out_dir: Path) -> None:
    """Remove last.pt from a run folder unless it is newer than ckpt.pt."""
    last = out_dir / LAST
    if last.is_file() and newest(out_dir) != last:
        last.unlink()


def load(path: Path, mmap: bool = False) -> Checkpoint:
    """Read a checkpoint of this project or of nanoGPT, without running code from it.

    With `mmap`, tensors stay in the file until they are used. Raises UserError if the file is not a checkpoint.
    """
    state = read_pickled(path, "a checkpoint", mmap)
    if not isinstance(state, dict) or not isinstance(state.get("model", state), dict):
        raise UserError(f"{path}: not a checkpoint: it has no 'model'")
    if "model" not in state or "model_args" not in state:
        raise UserError(f"{path}: {_shape_needed(state.get('model', state))}")
    weights = _read_weights(state["model"], path)
    checkpoint = Checkpoint(
        path=path,
        weights=weights,
        optimizer=_read(state, "optimizer", path),
        model_args=_read_model_args(state["model_args"], weights, path),
        iter_num=_read_iter_num(state["iter_num"], path) if "iter_num" in state else -1,
        best_val_loss=_read_number(state.get("best_val_loss", float("inf")), path),
        config=_read(state, "config", path) or {},
        extra=_read(state, "extra", path) or {},
    )
    _check_extra(checkpoint)
    _check_shape(checkpoint)
    return checkpoint


def _pretrained(name: str) -> Checkpoint:
    """Return GPT-2 weights in the form of a checkpoint."""
    pretrained = huggingface.load(name)
    return Checkpoint(
        path=pretrained.path,
        weights=pretrained.weights,
        optimizer=None,
        model_args=pretrained.model_args,
        iter_num=0,
        best_val_loss=float("inf"),
        config={},
        extra={"gelu": pretrained.gelu, "tokenizer": pretrained.tokenizer, "chat_format": pretrained.chat_format},
        in_file=False,
    )


def tokenizer_of(checkpoint: Checkpoint) -> tokenizers.Tokenizer:
    """Return the tokenizer in a checkpoint; for nanoGPT's checkpoints, which have none, that of the dataset they name."""
    args, advice = checkpoint.model_args, ""
    if "tokenizer" in checkpoint.extra:
        try:
            tokenizer = tokenizers.from_dict(checkpoint.extra["tokenizer"])
        except UserError as error:
            raise UserError(f"{checkpoint.path}: damaged: {error}") from error
    else:
        dataset = str(checkpoint.config.get("dataset", ""))
        advice = f"; prepare its dataset, {shown(dataset)}, first" if dataset else "; add to it config={'dataset': NAME}"
        try:
            tokenizer = tokenizers.from_folder(tokenizers.dataset_folder(dataset, DATA))
        except OSError as error:  # not a name of a folder
            raise UserError(f"{checkpoint.path}: its dataset {shown(dataset)} is not found in data/") from error
    if tokenizer.vocab_size > args["vocab_size"]:
        raise UserError(f"{checkpoint.path}: its tokenizer ({tokenizer}) does not belong to its model{advice}")
    return tokenizer


def require_tokenizer(checkpoint: Checkpoint, tokenizer: tokenizers.Tokenizer, dataset: str) -> None:
    """Raise UserError unless a checkpoint's tokenizer is that of `dataset`, or may be, if the checkpoint names none."""
    if "tokenizer" not in checkpoint.extra and "dataset" not in checkpoint.config:
        rows = checkpoint.model_args["vocab_size"]
        if rows not in (tokenizer.vocab_size, tokenizer.model_vocab_size):
            raise UserError(f"{checkpoint.path} has a vocabulary of {rows:,} tokens, but dataset '{dataset}' has {tokenizer}")
        return
    own = tokenizer_of(checkpoint)
    if own.to_dict() != tokenizer.to_dict():
        raise UserError(
            f"{checkpoint.path} was trained with another tokenizer ({own}) than that of dataset '{dataset}' ({tokenizer}); "
            "choose a dataset with the same one"
        )


# restoring


def empty_model(model_type: str, config: GPTConfig) -> GPT | Bigram:
    """Return a model without weights, on the "meta" device, which takes no memory; `model_type` is a key of MODELS."""
    with torch.device("meta"), _SkipInit():
        return MODELS[model_type](config)


def build_model(checkpoint: Checkpoint, dropout: float = 0.0, empty: bool = False) -> GPT | Bigram:
    """Return the checkpoint's model on the CPU in float32; its weights are removed from the checkpoint.

    An `empty` model has no weights and is on the "meta" device. Raises UserError if the weights do not fit the shape, or if
    one is NaN or infinite.
    """
    args = {name: checkpoint.model_args[name] for name in MODEL_ARGS}
    config = GPTConfig(**args | {"dropout": dropout, "gelu": checkpoint.extra.get("gelu", "erf")})

    # compare all shapes before any memory is taken
    model = empty_model(checkpoint.model_type, config)
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    found = {name: tensor.shape for name, tensor in checkpoint.weights.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            shapes = [tuple(side[name]) if name in side else "missing" for side in (found, expected)]
            raise UserError(f"{checkpoint.path}: damaged: {name!r} is {shapes[0]}, but its model_args need {shapes[1]}")
    if empty:
        return model

    # copy weight by weight and drop each original, so that memory holds them once; tied weights are copied once
    copies: dict[tuple, torch.Tensor] = {}
    weights = {}
    for name in list(checkpoint.weights):
        tensor = checkpoint.weights.pop(name)
        storage = tensor.data_ptr(), tensor.shape, tensor.stride()
        if storage not in copies:
            copies[storage] = tensor.to(torch.float32, copy=checkpoint.in_file)
            require_finite(copies[storage], name, checkpoint.path)
        weights[name] = copies[storage]
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    return model


def restore_optimizer(checkpoint: Checkpoint, optimizer: Optimizer, scaler: torch.amp.GradScaler) -> None:
    """Load the state of the optimizer and the scaler; their settings (rates, decay, kernels) stay as they are.

    Raises UserError if the state does not fit the parameters.
    """
    saved, scaler_state = checkpoint.optimizer, checkpoint.extra.get("scaler")
    try:
        if saved is None:
            raise ValueError("there is none")
        if isinstance(optimizer, MuonWithAdamW):
            if saved.keys() != optimizer.parts.keys():
                raise ValueError("it is AdamW's, not Muon's")
            for name, part in optimizer.parts.items():
                _restore(part, saved[name])
        else:
            if saved.keys() == {"muon", "adamw"}:
                raise ValueError("it is Muon's, not AdamW's")
            _restore(optimizer, saved)
        if scaler.is_enabled() and scaler_state:
            types = {name: type(value) for name, value in scaler_state.items()}
            if types != {name: type(value) for name, value in scaler.state_dict().items()}:
                raise ValueError("the scaler's state is malformed")
            scaler.load_state_dict(scaler_state)
    except (TypeError, KeyError, ValueError, AttributeError, RuntimeError) as error:
        raise UserError(
            f"{checkpoint.path}: its optimizer state does not fit ({first_line(error)}); "
            f"--init_from={shlex.quote(str(checkpoint.path))} --out_dir=NEW starts a new run from its weights"
        ) from error


def _restore(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Load one optimizer's state. Raises ValueError, or another error, if it does not belong to its parameters."""
    if not all(is_stored(value) for state in saved["state"].values() for value in state.values()):
        raise ValueError("not plain tensors")

    # keep our settings, and give each rank its shard
    groups = [
        {name: value for name, value in group.items() if name != "params"} | {"params": old["params"]}
        for group, old in zip(optimizer.param_groups, saved["param_groups"], strict=True)
    ]
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    ours = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    parameters = dict(zip(numbers, ours, strict=True))
    states = {
        index: {name: shard_like(value, parameters[index]) for name, value in state.items()}
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


class _SkipInit(TorchFunctionMode):
    """Skips weight initialization, for which PyTorch would import a thousand modules on the "meta" device."""

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if getattr(function, "__module__", "") == "torch.nn.init":
            return None
        return function(*args, **kwargs or {})


# checks


def _shape_needed(named: dict[Any, Any]) -> str:
    """Return why weights alone are not a checkpoint, and how to save them so that they are one."""
    try:
        weights = _read_weights(named, Path())
        layers = {name.split(".")[2] for name in weights if name.startswith("transformer.h.")}
        (vocab_size, n_embd), block_size = weights[WTE].shape, len(weights[WPE])
    except (UserError, KeyError, ValueError, IndexError, TypeError):
        return "not a checkpoint: it has no 'model', or no 'model_args'"
    shape = f"'n_layer': {len(layers)}, 'n_head': ?, 'n_embd': {n_embd}, 'block_size': {block_size}, "
    shape += f"'bias': {_has_biases(weights)}, 'vocab_size': {vocab_size}"
    return (
        "weights without model_args, which do not tell n_head; load them in Python and save them with "
        f"torch.save({{'model': weights, 'model_args': {{{shape}}}}}, 'ckpt.pt')"
    )


def _read_weights(named: dict[Any, Any], path: Path) -> dict[str, torch.Tensor]:
    """Return a state dict by bare names, with a head, and without the attention masks that old nanoGPT files hold."""
    weights: dict[str, torch.Tensor] = {}
    for theirs, tensor in named.items():
        if not isinstance(theirs, str):
            raise UserError(f"{path}: damaged: its 'model' is not a dictionary of tensors")
        name = bare_name(theirs)
        if name is None:
            continue
        if name in weights:
            raise UserError(f"{path}: {shown(theirs)} is a duplicate: another name is the same without its prefixes")
        weights[name] = checked(tensor, theirs, path)
    if not weights:
        raise UserError(f"{path}: damaged: its 'model' is empty")
    if WTE in weights:
        require_tied(weights.setdefault(HEAD, weights[WTE]), weights[WTE], path)
    return weights


def _has_biases(weights: dict[str, torch.Tensor]) -> bool:
    return any(name.endswith(".bias") for name in weights)


def _read_model_args(args: Any, weights: dict[str, torch.Tensor], path: Path) -> dict[str, Any]:
    """Return the arguments of nanoGPT's GPTConfig; a file from before one was added has the value that it had then."""
    if not isinstance(args, dict):
        raise UserError(f"{path}: not a checkpoint, or damaged: its 'model_args' is {shown(args)}")
    unknown = {name: value for name, value in args.items() if name not in MODEL_ARGS}
    if unknown:
        names = ", ".join(f"{one_line(str(name))}={shown(value)}" for name, value in list(unknown.items())[:5])
        raise UserError(f"{path}: its model_args have {names}, which this model does not know: another program's checkpoint")
    args = {"dropout": 0.0, "bias": _has_biases(weights)} | args
    if type(args["bias"]) is int and args["bias"] in (0, 1):  # from a config file with bias = 0
        args["bias"] = bool(args["bias"])
    return {name: args[name] for name in MODEL_ARGS if name in args}


def _check_shape(checkpoint: Checkpoint) -> None:
    """Raise UserError if model_args do not describe a model."""
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
            found = f"{name} = {shown(value)}" if name in args else f"no {name}"
            raise UserError(f"{path}: damaged: its model_args have {found}")
    if checkpoint.model_type == "bigram":
        return
    if args["n_embd"] % args["n_head"]:
        raise UserError(f"{path}: damaged: n_head={args['n_head']} does not divide n_embd={args['n_embd']}")
    if args["n_layer"] > len(checkpoint.weights):  # such a model must not be built, not even without weights
        raise UserError(f"{path}: damaged: some of the weights for n_layer={args['n_layer']:,} are missing")


def _check_extra(checkpoint: Checkpoint) -> None:
    """Raise UserError if `extra`, apart from the tokenizer, is not what this version writes."""
    extra, path = checkpoint.extra, checkpoint.path
    for name, known in (("model", list(MODELS)), ("gelu", ["erf", "tanh"])):
        if extra.get(name, known[0]) not in known:
            raise UserError(f"{path}: damaged or from a later version: its {name} is {shown(extra[name])}")
    try:
        checkpoint.chat_format  # noqa: B018 (reading it checks it)
    except UserError as error:
        raise UserError(f"{path}: damaged: {error}") from error
    for name in ("evaluated", "stale"):
        if type(extra.get(name, 0)) is not int:
            raise UserError(f"{path}: damaged: '{name}' is {shown(extra[name])}")
    if type(extra.get("ckpt_val_loss", 0.0)) is not float:
        raise UserError(f"{path}: damaged: its ckpt_val_loss is {shown(extra['ckpt_val_loss'])}")
    if type(extra.get("wandb", "")) is not str:
        raise UserError(f"{path}: damaged: its wandb is {shown(extra['wandb'])}")
    scaler = extra.get("scaler", {})
    if not isinstance(scaler, dict) or not all(type(value) in (int, float) for value in scaler.values()):
        raise UserError(f"{path}: damaged: its scaler is {shown(scaler)}")


def _read(state: dict, key: str, path: Path) -> dict[str, Any] | None:
    value = state.get(key)
    if value is not None and not isinstance(value, dict):
        raise UserError(f"{path}: not a checkpoint, or damaged: its '{key}' is {shown(value)}")
    return value


def _read_iter_num(value: Any, path: Path) -> int:
    number = _plain(value)
    if type(number) is float and number.is_integer():
        number = int(number)
    if type(number) is not int or not 0 <= number <= MAX_ITERS:
        raise UserError(f"{path}: damaged: its 'iter_num' is {shown(value)}")
    return number


def _read_number(value: Any, path: Path) -> float:
    number = _plain(value)  # nanoGPT's best_val_loss is a tensor
    if type(number) is int and abs(number) < 1 << 62:
        number = float(number)
    if type(number) is not float:
        raise UserError(f"{path}: damaged: its 'best_val_loss' is {shown(value)}")
    return number


def _plain(value: Any) -> Any:
    """Return the number in a tensor of one; any other value as it is."""
    return value.item() if is_stored(value) and value.numel() == 1 else value
