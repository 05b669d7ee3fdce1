"""Checkpoint files: their content, nanoGPT's own, atomic writes, and damage, which is a UserError."""

import copy
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model import GPT, Bigram, GPTConfig
from nanogpt import checkpoint
from nanogpt.errors import UserError
from nanogpt.tokenizer import CharTokenizer
from nanogpt.weights import read_pickled

MAPS = Path("/proc/self/maps")  # of Linux
TOKENIZER = CharTokenizer.from_text("abcdefghijk")
SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 8, "bias": True, "vocab_size": 11, "dropout": 0.0}
LAYER = ["ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"]
MODULES = ["transformer.ln_f", *[f"transformer.h.{layer}.{name}" for layer in range(2) for name in LAYER]]
NAMES = {"transformer.wte.weight", "transformer.wpe.weight", "lm_head.weight"} | {
    f"{module}.{kind}" for module in MODULES for kind in ("weight", "bias")
}


def new_model(seed: int = 1, model_class: type = GPT, **changes: Any) -> GPT | Bigram:
    torch.manual_seed(seed)
    return model_class(GPTConfig(**SHAPE | changes))


def adamw(model: GPT | Bigram) -> torch.optim.AdamW:
    return model.configure_optimizers(0.1, 1e-2, (0.9, 0.95), "cpu")


def nanogpt_adamw(model: GPT) -> torch.optim.AdamW:
    """Return the optimizer as nanoGPT builds it: two groups, each in the order of named_parameters."""
    parameters = dict(model.named_parameters())
    groups = [
        {"params": [p for p in parameters.values() if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in parameters.values() if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95))


def update(model: GPT | Bigram, optimizer: torch.optim.Optimizer, steps: int = 1, seed: int = 3) -> None:
    """Train on random batches."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        model(*torch.randint(11, (2, 4, 8), generator=generator))[1].backward()
        optimizer.step()


def our_state(seed: int = 1, iter_num: int = 3, n_layer: int = 2, bias: bool = True, **extra: Any) -> dict[str, Any]:
    """Return the content of a checkpoint of ours, after three updates."""
    model = new_model(seed, n_layer=n_layer, bias=bias)
    optimizer = adamw(model)
    update(model, optimizer, 3)
    extra = {"tokenizer": TOKENIZER.to_dict(), "scaler": {}, "evaluated": iter_num} | extra
    return checkpoint.pack(model, optimizer, iter_num, 2.5, {"dataset": "gone", "batch_size": 4}, extra)


def no_scaler() -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", enabled=False)


def equal(weights: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> bool:
    return weights.keys() == others.keys() and all(torch.equal(weights[name], others[name]) for name in weights)


# content


def test_round_trip(tmp_path: Path) -> None:
    """Catches weights, moments or counters that the file loses or changes."""
    model = new_model()
    optimizer = adamw(model)
    update(model, optimizer, 3)
    extra = {"tokenizer": TOKENIZER.to_dict(), "scaler": {}, "evaluated": 3}
    checkpoint.save(tmp_path / "ckpt.pt", checkpoint.pack(model, optimizer, 3, 2.5, {"dataset": "gone"}, extra))
    loaded = checkpoint.load(tmp_path / "ckpt.pt")
    assert (loaded.iter_num, loaded.best_val_loss, loaded.model_type, loaded.config) == (3, 2.5, "gpt", {"dataset": "gone"})
    assert {name: loaded.extra[name] for name in extra} == extra
    again = checkpoint.build_model(loaded)
    assert equal(again.state_dict(), model.state_dict())
    assert again.lm_head.weight is again.transformer.wte.weight
    restored = adamw(again)
    checkpoint.restore_optimizer(loaded, restored, no_scaler())
    for one, other in zip(optimizer.state_dict()["state"].values(), restored.state_dict()["state"].values(), strict=True):
        assert equal(one, other)
    assert checkpoint.tokenizer_of(loaded).characters == list("abcdefghijk")


@pytest.mark.parametrize("changes", [{}, {"bias": False}, {"gelu": "tanh"}, {"model_class": Bigram}])
def test_loaded_model_has_the_same_logits(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Catches a shape, a model type or a GELU that is not saved, or not used by the loader."""
    model = new_model(**changes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    checkpoint.save(tmp_path / "ckpt.pt", checkpoint.pack(model, adamw(model), 3, 2.5, {}, {"tokenizer": TOKENIZER.to_dict()}))
    loaded, tokenizer, _ = checkpoint.load_model("resume", str(tmp_path))
    idx = torch.arange(8)[None]
    assert torch.equal(loaded(idx, idx)[0], model(idx, idx)[0])
    assert type(loaded) is type(model) and tokenizer.vocab_size == 11


def test_keys_are_nanogpts(tmp_path: Path) -> None:
    """Catches a key or a name that fails nanoGPT's GPTConfig(**model_args) or its strict load_state_dict."""
    checkpoint.save(tmp_path / "ckpt.pt", our_state())
    raw = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    assert raw.keys() == {"model", "optimizer", "model_args", "iter_num", "best_val_loss", "config", "extra"}
    assert raw["model_args"] == SHAPE
    assert raw["model"].keys() == NAMES
    assert [len(group["params"]) for group in raw["optimizer"]["param_groups"]] == [2 + 2 * 4, 2 * 8 + 2]


def test_model_is_independent_of_the_file(tmp_path: Path) -> None:
    """Catches weights that stay memory-mapped, and change when the file is written again."""
    path = tmp_path / "ckpt.pt"
    checkpoint.save(path, our_state())
    model = checkpoint.build_model(checkpoint.load(path, mmap=True))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    path.write_bytes(bytes(path.stat().st_size))
    assert equal(model.state_dict(), before)


# nanoGPT's files


def nanogpt_state(model: GPT, optimizer: torch.optim.Optimizer, prefix: str) -> dict[str, Any]:
    weights = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    mask = torch.tril(torch.ones(8, 8)).view(1, 1, 8, 8)
    weights |= {f"{prefix}transformer.h.{layer}.attn.bias": mask for layer in range(2)}  # nanoGPT without flash attention
    return {
        "model": weights,
        "optimizer": optimizer.state_dict(),
        "model_args": dict(SHAPE),
        "iter_num": 3,
        "best_val_loss": torch.tensor(2.25),
        "config": {"dataset": "gone", "out_dir": "out", "device": "cuda"},
    }


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module."])
def test_resuming_a_nanogpt_run(tmp_path: Path, prefix: str) -> None:
    """Catches moments of another parameter, a prefix or a mask left in, a fresh optimizer instead of the saved one."""
    model = new_model()
    optimizer = nanogpt_adamw(model)
    update(model, optimizer, 3)
    torch.save(nanogpt_state(model, optimizer, prefix), tmp_path / "ckpt.pt")
    update(model, optimizer, seed=4)

    ckpt = checkpoint.load(checkpoint.newest(tmp_path))
    assert (ckpt.iter_num, ckpt.best_val_loss, ckpt.model_type) == (3, 2.25, "gpt")
    assert type(ckpt.best_val_loss) is float
    resumed = checkpoint.build_model(ckpt)
    restored = adamw(resumed)
    checkpoint.restore_optimizer(ckpt, restored, no_scaler())
    update(resumed, restored, seed=4)
    for name, tensor in resumed.state_dict().items():
        torch.testing.assert_close(tensor, model.state_dict()[name], rtol=0, atol=1e-6)


def renamed(change: Callable[[str], str]) -> Callable[[dict[str, Any]], None]:
    def edit(state: dict[str, Any]) -> None:
        state["model"] = {change(name): tensor for name, tensor in state["model"].items()}

    return edit


def cast(dtype: torch.dtype) -> Callable[[dict[str, Any]], None]:
    def edit(state: dict[str, Any]) -> None:
        state["model"] = {name: tensor.to(dtype) for name, tensor in state["model"].items()}

    return edit


def without(*keys: str) -> Callable[[dict[str, Any]], None]:
    return lambda state: damage(state, keys, GONE)


def put(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda state: state.update(values)


def numpy_scalars(state: dict[str, Any]) -> None:
    state.update(iter_num=np.int64(3), best_val_loss=np.float32(2.25))
    state["config"] |= {"learning_rate": np.float64(1e-3), "compile": np.bool_(True), "dataset": np.str_("gone")}
    state["model_args"] = {name: np.int32(value) if type(value) is int else value for name, value in SHAPE.items()}
    state["model_args"] |= {"bias": np.bool_(True), "dropout": np.array(0.0, ">f8")[()]}


def only(*keys: str) -> Callable[[dict[str, Any]], None]:
    def edit(state: dict[str, Any]) -> None:
        for key in state.keys() - set(keys):
            del state[key]

    return edit


TAKEN = {  # what was done to nanoGPT's checkpoint of a model that can still be told from it
    "nothing": lambda state: None,
    "two prefixes of a kind": renamed(lambda name: f"module._orig_mod.module.{name}"),
    "layers compiled one by one": renamed(lambda name: name.replace("h.0.", "h.0._orig_mod.")),
    "masks of both kinds": lambda state: state["model"].update({"transformer.h.0.attn.masked_bias": torch.tensor(-1e4)}),
    "no head": without("model", "lm_head.weight"),
    "a head of its own that is equal": lambda state: state["model"].update(
        {"lm_head.weight": state["model"]["lm_head.weight"].clone()}
    ),
    "float16": cast(torch.float16),
    "bfloat16": cast(torch.bfloat16),
    "float64": cast(torch.float64),
    "no dropout": without("model_args", "dropout"),
    "no bias": without("model_args", "bias"),
    "a bias of 1": lambda state: state["model_args"].update(bias=1),
    "numpy scalars": numpy_scalars,
    "a whole float": put(iter_num=3.0),
    "a tensor of one number": put(iter_num=torch.tensor(3)),
    "model and model_args alone": only("model", "model_args"),
    "parameters": lambda state: state.update(model={k: torch.nn.Parameter(v) for k, v in state["model"].items()}),
}


@pytest.mark.parametrize("name", TAKEN)
def test_what_nanogpt_takes(tmp_path: Path, name: str) -> None:
    """Catches a checkpoint of an older nanoGPT, or one edited in Python, that is refused or read as another model."""
    model = new_model()
    update(model, nanogpt_adamw(model), 3)
    state = nanogpt_state(model, nanogpt_adamw(model), "")
    TAKEN[name](state)
    torch.save(state, tmp_path / "ckpt.pt")
    ckpt = checkpoint.load(tmp_path / "ckpt.pt")
    assert ckpt.model_args == SHAPE
    assert [type(value) for value in ckpt.model_args.values()] == [int] * 4 + [bool, int, float]
    assert (ckpt.iter_num, ckpt.best_val_loss) == ((3, 2.25) if "iter_num" in state else (-1, float("inf")))
    assert {type(value) for value in ckpt.config.values()} <= {str, float, bool}
    loaded = checkpoint.build_model(ckpt)
    assert loaded.lm_head.weight is loaded.transformer.wte.weight and loaded.lm_head.weight.dtype == torch.float32
    half = {"float16": torch.float16, "bfloat16": torch.bfloat16}.get(name, torch.float32)
    idx = torch.arange(8)[None]
    assert torch.equal(loaded(idx, idx)[0], model.to(half).float()(idx, idx)[0])


def test_no_bias_follows_from_the_weights(tmp_path: Path) -> None:
    """Catches a model without biases taken for one with, where model_args do not say."""
    model = new_model(bias=False)
    state = nanogpt_state(model, nanogpt_adamw(model), "")
    del state["model_args"]["bias"]
    torch.save(state, tmp_path / "ckpt.pt")
    assert checkpoint.load(tmp_path / "ckpt.pt").model_args["bias"] is False


@pytest.mark.parametrize("module", ["numpy.core.multiarray", "numpy._core.multiarray"])
def test_scalars_of_numpy_1_and_2(tmp_path: Path, module: str) -> None:
    """Catches scalars of numpy 1 that only numpy 1 can read, and the reverse."""
    torch.save({"a": np.int64(3), "b": np.float64(0.5)}, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    content = re.sub(rb"cnumpy\._?core\.multiarray\n", f"c{module}\n".encode(), (tmp_path / "a.pt").read_bytes())
    (tmp_path / "a.pt").write_bytes(content)
    assert module.encode() in content
    state = read_pickled(tmp_path / "a.pt", "a checkpoint", mmap=False)
    assert state == {"a": 3, "b": 0.5} and [type(value) for value in state.values()] == [int, float]


def test_resuming_needs_more(tmp_path: Path) -> None:
    """Catches a run resumed at iteration 0, or with a fresh optimizer, from a file that can only be sampled from."""
    state = our_state()
    torch.save({name: state[name] for name in ("model", "model_args", "extra")}, tmp_path / "ckpt.pt")
    assert checkpoint.load_model("resume", str(tmp_path))[1].vocab_size == 11
    with pytest.raises(
        UserError, match=r"ckpt\.pt: no iter_num in it to resume from; --init_from=.*ckpt\.pt'? starts a new run"
    ):
        checkpoint.open_checkpoint("resume", str(tmp_path), newest_state=True)
    torch.save({name: state[name] for name in state.keys() - {"optimizer"}}, tmp_path / "ckpt.pt")
    ckpt = checkpoint.open_checkpoint("resume", str(tmp_path), newest_state=True)
    with pytest.raises(UserError, match=r"optimizer state does not fit \(there is none\)"):
        checkpoint.restore_optimizer(ckpt, adamw(checkpoint.build_model(ckpt)), no_scaler())


def test_dataset_of_a_checkpoint_that_names_none(tmp_path: Path) -> None:
    """Catches a new run that cannot start from model and model_args, or that starts with a vocabulary of another size."""
    torch.save({name: our_state()[name] for name in ("model", "model_args")}, tmp_path / "ckpt.pt")
    ckpt = checkpoint.load(tmp_path / "ckpt.pt")
    checkpoint.require_tokenizer(ckpt, TOKENIZER, "letters")
    with pytest.raises(UserError, match="vocabulary of 11 tokens, but dataset 'two' has 2 characters"):
        checkpoint.require_tokenizer(ckpt, CharTokenizer(["a", "b"]), "two")
    with pytest.raises(UserError, match=r"its tokenizer \(gpt2.*\) does not belong to its model; add to it config="):
        checkpoint.tokenizer_of(ckpt)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_are_not_finite(tmp_path: Path, value: float, dtype: torch.dtype) -> None:
    """Catches a diverged model that samples noise."""
    state = our_state()
    cast(dtype)(state)
    state["model"]["transformer.ln_f.weight"][3] = value
    torch.save(state, tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match=r"ckpt\.pt: 'transformer.ln_f.weight' has weights that are NaN or infinite"):
        checkpoint.load_model("resume", str(tmp_path))


def test_restoring_keeps_new_settings(tmp_path: Path) -> None:
    """Catches a learning rate or a weight decay, given for the resumed run, that the checkpoint undoes."""
    torch.save(our_state(), tmp_path / "ckpt.pt")
    ckpt = checkpoint.load(tmp_path / "ckpt.pt")
    optimizer = checkpoint.build_model(ckpt).configure_optimizers(0.3, 5e-5, (0.7, 0.8), "cpu")
    checkpoint.restore_optimizer(ckpt, optimizer, no_scaler())
    settings = [(group["weight_decay"], group["lr"], group["betas"]) for group in optimizer.param_groups]
    assert settings == [(0.3, 5e-5, (0.7, 0.8)), (0.0, 5e-5, (0.7, 0.8))]


def test_restoring_the_scaler(tmp_path: Path) -> None:
    """Catches a resumed float16 run that starts with the initial scale, and skips updates until it is low enough."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**7)
    torch.save(our_state(scaler=scaler.state_dict()), tmp_path / "ckpt.pt")
    ckpt = checkpoint.load(tmp_path / "ckpt.pt")
    restored = torch.amp.GradScaler("cpu")
    checkpoint.restore_optimizer(ckpt, adamw(checkpoint.build_model(ckpt)), restored)
    assert restored.get_scale() == 2.0**7


@pytest.mark.parametrize("relative", [True, False])
def test_nanogpt_checkpoint_uses_its_datasets_tokenizer(
    relative: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches the wrong characters for a checkpoint without a tokenizer."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dataset").mkdir()
    meta = {"vocab_size": 11, "itos": dict(enumerate("kjihgfedcba")), "stoi": {}}
    (tmp_path / "dataset" / "meta.pkl").write_bytes(pickle.dumps(meta))
    model = new_model()
    state = nanogpt_state(model, nanogpt_adamw(model), "")
    state["config"]["dataset"] = "dataset" if relative else str(tmp_path / "dataset")
    torch.save(state, tmp_path / "ckpt.pt")
    assert checkpoint.tokenizer_of(checkpoint.load(tmp_path / "ckpt.pt")).decode([0, 1, 10]) == "kja"


# writing


def test_failed_save_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a full disk that destroys the last good checkpoint, or leaves half of one behind."""
    path = tmp_path / "ckpt.pt"
    checkpoint.save(path, our_state())
    old = path.read_bytes()

    def fail(state: Any, file: Any) -> None:
        file.write(b"half of")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(path, our_state(seed=2))
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("saved", ["ckpt.pt", "last.pt"])
def test_save_does_not_write_into_a_leftover_link(tmp_path: Path, saved: str) -> None:
    """Catches a save that overwrites another checkpoint through the hard link of a killed process."""
    checkpoint.save(tmp_path / "other.pt", our_state())
    old = (tmp_path / "other.pt").read_bytes()
    os.link(tmp_path / "other.pt", tmp_path / f"{saved}.tmp")
    checkpoint.save(tmp_path / saved, our_state(seed=2, iter_num=7))
    assert (tmp_path / "other.pt").read_bytes() == old
    assert checkpoint.load(tmp_path / saved).iter_num == 7
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["other.pt", saved])


@pytest.mark.parametrize("is_best, files", [(True, ["ckpt.pt"]), (False, ["ckpt.pt", "last.pt"])])
def test_newest_state_is_in_one_file(tmp_path: Path, is_best: bool, files: list[str]) -> None:
    """Catches ckpt.pt and last.pt as one file, so that `cp other ckpt.pt` damages both, and a last.pt older than ckpt.pt."""
    for name, iter_num in ((checkpoint.BEST, 1), (checkpoint.LAST, 2)):
        checkpoint.save(tmp_path / name, our_state(iter_num=iter_num))
    model = new_model()
    saver = checkpoint.Saver(tmp_path, model, adamw(model), no_scaler(), {"tokenizer": TOKENIZER.to_dict()}, {})
    saver.save(3, 2.5, {"evaluated": 3}, is_best)
    assert sorted(path.name for path in tmp_path.iterdir()) == files
    assert {path.stat().st_nlink for path in tmp_path.iterdir()} == {1}
    assert checkpoint.newest(tmp_path) == tmp_path / files[-1]
    assert checkpoint.load(tmp_path / files[-1]).iter_num == 3


def test_failed_save_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a disk that is full for a moment, and a run that then saves nothing until its next evaluation."""
    now = [0.0]
    monkeypatch.setattr(checkpoint.time, "perf_counter", lambda: now[0])
    saver = checkpoint.Saver(tmp_path / "gone", model := new_model(), adamw(model), no_scaler(), {}, {})
    assert not saver.save(3, 2.5, {"evaluated": 3}, True)
    assert not saver.is_due(4, interval=0, minutes=0)
    now[0] += checkpoint.RETRY_SECONDS
    assert saver.is_due(4, interval=0, minutes=0)
    (tmp_path / "gone").mkdir()
    assert saver.save(4, 2.5, {"evaluated": 3}, False)
    now[0] += checkpoint.RETRY_SECONDS
    assert not saver.is_due(5, interval=0, minutes=0)


# finding


@pytest.mark.parametrize(
    "best, last, expected",
    [(20, 10, "ckpt.pt"), (10, 20, "last.pt"), (10, 10, "ckpt.pt"), (10, None, "ckpt.pt"), (None, 20, "last.pt")],
)
def test_newest_has_the_most_updates(tmp_path: Path, best: int | None, last: int | None, expected: str) -> None:
    """Catches a run resumed from the older of its states, and an older last.pt that stays.

    There are both if nanoGPT has continued a run of ours, or if a kill came between saving the best and removing the last.
    """
    for name, iter_num in ((checkpoint.BEST, best), (checkpoint.LAST, last)):
        if iter_num is not None:
            checkpoint.save(tmp_path / name, our_state(iter_num=iter_num))
    assert checkpoint.newest(tmp_path).name == expected
    checkpoint.remove_older(tmp_path)
    assert (tmp_path / checkpoint.LAST).exists() is (expected == "last.pt")
    assert checkpoint.newest(tmp_path).name == expected


def test_linked_files_of_earlier_versions(tmp_path: Path) -> None:
    """Catches the run of an earlier version, whose ckpt.pt and last.pt are one file, that is not resumed or stays linked."""
    checkpoint.save(tmp_path / checkpoint.BEST, our_state(iter_num=10))
    os.link(tmp_path / checkpoint.BEST, tmp_path / checkpoint.LAST)
    assert checkpoint.newest(tmp_path) == tmp_path / checkpoint.BEST
    checkpoint.remove_older(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt.pt"]


@pytest.mark.parametrize("damaged, whole", [("ckpt.pt", "last.pt"), ("last.pt", "ckpt.pt")])
def test_damage_names_the_other_file(tmp_path: Path, damaged: str, whole: str) -> None:
    """Catches an error that does not say that the run's other state is whole."""
    checkpoint.save(tmp_path / whole, our_state(iter_num=10))
    (tmp_path / damaged).write_bytes(b"half")
    with pytest.raises(UserError, match=rf"{damaged}: .*; remove that file to resume from .*{whole}"):
        checkpoint.newest(tmp_path)


def test_load_model_takes_the_best_weights(tmp_path: Path) -> None:
    """Catches the newest weights instead of the best, or one of the three ways to name a run that fails."""
    run = tmp_path / "run"
    run.mkdir()
    checkpoint.save(run / checkpoint.BEST, our_state(iter_num=10))
    checkpoint.save(run / checkpoint.LAST, our_state(seed=2, iter_num=20))
    for init_from, out_dir in (("resume", run), (run, "out"), (run / checkpoint.BEST, "out")):
        assert checkpoint.load_model(str(init_from), str(out_dir))[2].iter_num == 10
    assert checkpoint.load_model(str(run / checkpoint.LAST), "out")[2].iter_num == 20


@pytest.mark.parametrize("init_from, out_dir", [("resume", "gone"), ("resume", "empty"), ("empty", "out"), ("gone.pt", "out")])
def test_missing_checkpoint_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, init_from: str, out_dir: str) -> None:
    """Catches a traceback, or an error that does not name the folder or the file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError) as caught:
        checkpoint.load_model(init_from, out_dir)
    assert (out_dir if init_from == "resume" else init_from) in str(caught.value) and "\n" not in str(caught.value)


# damaged and hostile files


class Bomb:
    """A hostile object: unpickling it makes a folder."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
        return os.mkdir, (str(self.path),)


def use(path: Path) -> None:
    """Use a checkpoint as sampling and a resumed float16 run do."""
    ckpt = checkpoint.load(path)
    model, tokenizer = checkpoint.build_model(ckpt), checkpoint.tokenizer_of(ckpt)
    idx = torch.zeros(1, 1, dtype=torch.int64)
    tokenizer.decode(model.generate(idx, 1, vocab_size=tokenizer.vocab_size)[0].tolist())
    optimizer, scaler = adamw(model), torch.amp.GradScaler("cpu")
    checkpoint.restore_optimizer(ckpt, optimizer, scaler)
    for parameter, moments in optimizer.state.items():  # with other shapes, a fused update would crash the interpreter
        assert moments["exp_avg"].shape == moments["exp_avg_sq"].shape == parameter.shape
        assert moments["step"].shape == ()
    if ckpt.extra.get("evaluated", -1) != ckpt.iter_num:
        min(ckpt.best_val_loss, 2.0)
    scaler.scale(model(idx, idx)[1]).backward()
    scaler.step(optimizer)
    scaler.update()


def refusal(path: Path) -> str:
    """Return the error for a damaged file; fail if the file is used."""
    with pytest.raises(UserError) as caught:
        use(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_whole_file_is_used(tmp_path: Path) -> None:
    """Catches tests of damage that pass because every file is refused."""
    checkpoint.save(tmp_path / "ckpt.pt", our_state())
    use(tmp_path / "ckpt.pt")


@pytest.mark.parametrize("content", [b"", b"\x00" * 4096, bytes(range(256)) * 64, b"PK\x03\x04", b"a text\nof two lines\n"])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    """Catches a traceback from inside torch.load."""
    (tmp_path / "ckpt.pt").write_bytes(content)
    refusal(tmp_path / "ckpt.pt")


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("share", [0.01, 0.3, 0.6, 0.9, 0.999])
def test_truncated_file_is_refused(tmp_path: Path, share: float, mmap: bool) -> None:
    """Catches half a checkpoint, left by an interrupted copy, that is loaded or ends in a traceback."""
    path = tmp_path / "ckpt.pt"
    checkpoint.save(path, our_state())
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(UserError, match=r"ckpt\.pt: .*damaged"):
        checkpoint.load(path, mmap=mmap)


class Call:
    """Unpickles to what a function returns; `state` goes to its __setstate__."""

    def __init__(self, function: Callable[..., Any], *arguments: Any, state: Any = None):
        self.reduced = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self) -> tuple:
        return self.reduced


SCALAR, F8, RECORD = np.float64(0).__reduce__()[0], np.dtype("f8"), np.dtype([("a", "O")])  # SCALAR builds numpy's scalars
AFAR = {"a": (F8, 1 << 40)}  # a field far outside the memory of its record


def saved_bomb(path: Path) -> str:
    file = str(path.with_name("bomb.npy"))
    np.save(file, np.array([Bomb(path)], dtype=object), allow_pickle=True)
    return file


HOSTILE: dict[str, Callable[[Path], Any]] = {  # make an object that, unpickled, makes `path` or reads memory of others
    "a function": Bomb,
    "an array of objects": lambda path: np.array([Bomb(path)], dtype=object),
    "an array": lambda path: np.zeros(3),
    "an object as a scalar": lambda path: Call(SCALAR, np.dtype("O"), pickle.dumps(Bomb(path))),
    "a record of objects as a scalar": lambda path: Call(SCALAR, RECORD, np.array([(Bomb(path),)], RECORD)),
    "bytes as a record of objects": lambda path: Call(SCALAR, RECORD, pickle.dumps(Bomb(path))),
    "a scalar without a type": lambda path: Call(SCALAR, "f8", bytes(8)),
    "a scalar of too few bytes": lambda path: Call(SCALAR, F8, bytes(3)),
    "a scalar of too many bytes": lambda path: Call(SCALAR, F8, bytes(16)),
    "a scalar of text": lambda path: Call(SCALAR, F8, "12345678"),
    "a type that turns into objects": lambda path: Call(
        SCALAR, Call(np.dtype, "f8", state=(3, "|", None, None, None, 8, 8, 63)), pickle.dumps(Bomb(path))
    ),
    "a type with a field far away": lambda path: Call(
        SCALAR, Call(np.dtype, "V8", state=(3, "|", None, ("a",), AFAR, 8, 1, 0)), bytes(8)
    ),
    "a type that is made by code": lambda path: Call(np.dtype, Bomb(path)),
    "a type of objects in a list": lambda path: Call(np.dtype, "O,O"),
    "a byte order that is code": lambda path: Call(SCALAR, Call(np.dtype, "f8", state=(3, Bomb(path), *[None] * 6)), bytes(8)),
    "a class of a type": lambda path: Call(type(F8)),
    "numpy.load": lambda path: Call(np.load, saved_bomb(path), None, True),
    "numpy.memmap": lambda path: Call(np.memmap, str(path), "u1", "w+", 0, (8,)),
    "numpy's runstring": lambda path: Call(np.testing.runstring, f"import os; os.mkdir({str(path)!r})", {}),
    "numpy's frompyfunc": lambda path: Call(np.frompyfunc, os.mkdir, 1, 1),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_pickle_runs_no_code(tmp_path: Path, name: str) -> None:
    """Catches a downloaded checkpoint that runs commands on this machine, by itself or through numpy's functions."""
    state = our_state()
    for key in ("model", "config", "model_args"):
        hostile = state | {key: state[key] | {"a": HOSTILE[name](tmp_path / "ran")}}
        (tmp_path / "plain.pt").write_bytes(pickle.dumps(hostile, protocol=2))
        torch.save(hostile, tmp_path / "zip.pt")
        torch.save(hostile, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
        for path in (tmp_path / "plain.pt", tmp_path / "zip.pt", tmp_path / "legacy.pt"):
            assert "refused" in refusal(path) or "damaged" in refusal(path)
        assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [[1, 2], {}, {"model": None}, {"model": [torch.zeros(2)]}, {"model": {}}, torch.zeros(2)])
def test_other_torch_files_are_refused(tmp_path: Path, content: Any) -> None:
    """Catches a KeyError or an AttributeError for a torch file of something else."""
    torch.save(content, tmp_path / "ckpt.pt")
    refusal(tmp_path / "ckpt.pt")


C_FC = "transformer.h.0.mlp.c_fc.weight"
GONE = object()
DAMAGE = {
    "a tensor of another shape": ("model", C_FC, torch.zeros(3, 3)),
    "a missing tensor": ("model", C_FC, GONE),
    "a missing layer": ("model", "transformer.h.1.ln_1.weight", GONE),
    "an unexpected tensor": ("model", "transformer.h.2.ln_1.weight", torch.zeros(16)),
    "a number for a tensor": ("model", C_FC, 3.0),
    "None for a tensor": ("model", C_FC, None),
    "a name that is a number": ("model", 7, torch.zeros(3)),
    "a name of two lines": ("model", "two\nlines", torch.zeros(3)),
    "no model": ("model", GONE),
    "no model_args": ("model_args", GONE),
    "model_args that are a list": ("model_args", [2, 2, 16]),
    "a missing argument": ("model_args", "n_embd", GONE),
    "an argument that is a string": ("model_args", "n_layer", "2"),
    "an argument that is a float": ("model_args", "n_embd", 16.0),
    "an argument that is a bool": ("model_args", "n_head", True),
    "an argument that is a matrix": ("model_args", "n_head", torch.zeros(2, 2)),
    "an n_head of 0": ("model_args", "n_head", 0),
    "an n_head that does not divide n_embd": ("model_args", "n_head", 3),
    "a block_size of 0": ("model_args", "block_size", 0),
    "a negative block_size": ("model_args", "block_size", -8),
    "another block_size": ("model_args", "block_size", 16),
    "a huge block_size": ("model_args", "block_size", 1 << 62),
    "another n_layer": ("model_args", "n_layer", 1),
    "a huge n_layer": ("model_args", "n_layer", 1 << 40),
    "a huge n_embd": ("model_args", "n_embd", 1 << 20),
    "a huge vocab_size": ("model_args", "vocab_size", 1 << 23),
    "a bias that is a number": ("model_args", "bias", 2),
    "an unknown argument": ("model_args", "use_rope", True),
    "an unknown argument of two lines": ("model_args", "two\nlines", "two\nlines"),
    "another bias": ("model_args", "bias", False),
    "a dropout above one": ("model_args", "dropout", 1.5),
    "a dropout that is no number": ("model_args", "dropout", "none"),
    "an iter_num of None": ("iter_num", None),
    "an iter_num that is no whole number": ("iter_num", 3.5),
    "an iter_num that is infinite": ("iter_num", float("inf")),
    "an iter_num of 2 ** 63": ("iter_num", 1 << 63),
    "an iter_num of 2 ** 63 as a float": ("iter_num", 2.0**63),
    "a head that differs": ("model", "lm_head.weight", torch.zeros(11, 16)),
    "a weight twice": ("model", f"module.{C_FC}", torch.zeros(64, 16)),
    "a weight that claims terabytes": ("model", C_FC, torch.zeros(1).expand(1 << 20, 1 << 20)),
    "a weight that is expanded": ("model", C_FC, torch.zeros(16).expand(64, 16)),
    "a mean that claims terabytes": ("optimizer", "state", 0, "exp_avg", torch.zeros(1).half().expand(1 << 20, 1 << 20)),
    "a weight of whole numbers": ("model", C_FC, torch.zeros(64, 16, dtype=torch.int64)),
    "weights that are NaN": ("model", C_FC, torch.full((64, 16), torch.nan)),
    "an iter_num that is a string": ("iter_num", "3"),
    "an iter_num that is a tensor": ("iter_num", torch.zeros(40, 40)),
    "a negative iter_num": ("iter_num", -1),
    "a config that is a list": ("config", [1]),
    "a config that is a string": ("config", "two\nlines"),
    "an extra that is a list": ("extra", [1]),
    "an extra that is None": ("extra", None),
    "an unknown model": ("extra", "model", "lstm"),
    "a model that is a list": ("extra", "model", ["gpt"]),
    "another model": ("extra", "model", "bigram"),
    "an unknown GELU": ("extra", "gelu", "elu"),
    "a GELU that is a list": ("extra", "gelu", ["erf"]),
    "a tokenizer that is a string": ("extra", "tokenizer", "gpt2"),
    "a tokenizer of an unknown kind": ("extra", "tokenizer", "kind", "words"),
    "a tokenizer without characters": ("extra", "tokenizer", "characters", []),
    "a tokenizer with a character of two letters": ("extra", "tokenizer", "characters", ["a", "bc"]),
    "a tokenizer with a character twice": ("extra", "tokenizer", "characters", ["a", "a"]),
    "a tokenizer with numbers": ("extra", "tokenizer", "characters", [1, 2]),
    "a tokenizer larger than the model": ("extra", "tokenizer", "characters", list("abcdefghijkl")),
    "a tokenizer with an empty vocabulary": ("extra", "tokenizer", {"kind": "tiktoken", "name": "gpt2", "vocab_size": 0}),
    "a last evaluation that is a tensor": ("extra", "evaluated", torch.zeros(2)),
    "a last evaluation that is a string": ("extra", "evaluated", "three"),
    "a scaler that is a string": ("extra", "scaler", "two\nlines"),
    "a scaler without a scale": ("extra", "scaler", {"growth_factor": 2.0}),
    "a scaler whose growth_interval is a float": (
        "extra",
        "scaler",
        torch.amp.GradScaler("cpu").state_dict() | {"growth_interval": 1.5},
    ),
    "a sparse weight": ("model", "lm_head.weight", torch.zeros(11, 16).to_sparse()),
    "a complex weight": ("model", "lm_head.weight", torch.zeros(11, 16, dtype=torch.complex64)),
    "a scaler whose scale is a string": ("extra", "scaler", torch.amp.GradScaler("cpu").state_dict() | {"scale": "large"}),
    "a loss that is a string": ("best_val_loss", "2.5"),
    "a loss of two numbers": ("best_val_loss", torch.zeros(2)),
    "a loss too large for a float": ("best_val_loss", 10**400),
    "an optimizer that is a list": ("optimizer", [1]),
    "no optimizer": ("optimizer", None),
    "an optimizer without groups": ("optimizer", "param_groups", GONE),
    "an optimizer with one group": ("optimizer", "param_groups", 1, GONE),
    "an optimizer without states": ("optimizer", "state", GONE),
    "a group with a parameter too few": ("optimizer", "param_groups", 0, "params", 0, GONE),
    "a group that is a string": ("optimizer", "param_groups", 0, "two\nlines"),
    "a mean of another shape": ("optimizer", "state", 0, "exp_avg", torch.zeros(3)),
    "a square of another shape": ("optimizer", "state", 0, "exp_avg_sq", torch.zeros(3)),
    "a square that is a number": ("optimizer", "state", 0, "exp_avg_sq", 0.5),
    "a missing square": ("optimizer", "state", 0, "exp_avg_sq", GONE),
    "a step of another shape": ("optimizer", "state", 0, "step", torch.zeros(3)),
    "a step that is a string": ("optimizer", "state", 0, "step", "three"),
    "a state that is a list": ("optimizer", "state", 0, [1]),
    "a state of an unknown parameter": ("optimizer", "state", "two\nlines", {}),
}


def damage(state: Any, keys: tuple, value: Any) -> None:
    """Set the entry of the nested state at `keys` to `value`, or delete it."""
    *outer, key = keys
    for name in outer:
        state = state[name]
    if value is GONE:
        del state[key]
    else:
        state[key] = value


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    """Catches a traceback, now or at the first update, for a file whose content is not what its keys promise."""
    state = our_state()
    *keys, value = DAMAGE[name]
    damage(state, tuple(keys), value)
    torch.save(state, tmp_path / "ckpt.pt")
    assert len(refusal(tmp_path / "ckpt.pt")) < 1000


@pytest.mark.parametrize(
    "keys, value, words",
    [
        (("model_args", "use_rope"), True, r"its model_args have use_rope=True, which this model does not know"),
        (("model", "lm_head.weight"), torch.zeros(11, 16), r"'lm_head.weight' differs from the token embedding"),
        (
            ("model", C_FC),
            torch.zeros(16).expand(64, 16),
            r"c_fc.weight' must be a dense floating-point tensor, stored in full",
        ),
        (("iter_num",), 2.0**63, r"its 'iter_num' is 9.2"),
        (("model_args",), GONE, r"torch.save\(\{'model': weights, 'model_args': \{'n_layer': 2, 'n_head': \?, 'n_embd': 16, "),
    ],
)
def test_damage_is_named(tmp_path: Path, keys: tuple, value: Any, words: str) -> None:
    """Catches a line that does not say what the file has and the model has not."""
    state = our_state()
    damage(state, keys, value)
    torch.save(state, tmp_path / "ckpt.pt")
    assert re.search(words, refusal(tmp_path / "ckpt.pt"))


def test_bare_state_dict_says_all_but_n_head(tmp_path: Path) -> None:
    """Catches a guess of n_head, and a line that leaves what the weights tell to the reader."""
    for bias in (True, False):
        torch.save(new_model(n_layer=1, bias=bias).state_dict(), tmp_path / "ckpt.pt")
        shape = f"'n_layer': 1, 'n_head': ?, 'n_embd': 16, 'block_size': 8, 'bias': {bias}, 'vocab_size': 11"
        assert shape in refusal(tmp_path / "ckpt.pt")


def test_a_million_layers_are_not_built(tmp_path: Path) -> None:
    """Catches memory and minutes spent on a shape for which the file has no weights."""
    state = our_state()
    state["model_args"]["n_layer"] = 1_000_000
    torch.save(state, tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match=r"ckpt\.pt: .*n_layer=1,000,000"):
        checkpoint.load(tmp_path / "ckpt.pt")


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.binary(max_size=3)
    | st.sampled_from([torch.zeros(2), torch.zeros(2, 3), torch.tensor(1.5), torch.tensor(1), torch.tensor(True)]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3) | st.integers(0, 3), inner, max_size=3),
    max_leaves=4,
)


def all_keys(state: Any, prefix: tuple = ()) -> list[tuple]:
    """Return the keys to every entry of a nested state."""
    inner = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list) else ()
    return [keys for key, value in inner for keys in [(*prefix, key), *all_keys(value, (*prefix, key))]]


GOOD = our_state(n_layer=1, bias=False, scaler=torch.amp.GradScaler("cpu").state_dict())
KEYS = [st.sampled_from([(part,), *all_keys(content, (part,))]) for part, content in GOOD.items()]  # each part equally often


@settings(max_examples=150, deadline=None, derandomize=True, report_multiple_bugs=False)
@given(keys=st.one_of(KEYS), value=st.just(GONE) | VALUES)
def test_any_damage_is_a_user_error_or_harmless(keys: tuple, value: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Catches another exception than UserError for damage that nobody thought of."""
    state = copy.deepcopy(GOOD)
    damage(state, keys, value)
    path = tmp_path_factory.getbasetemp() / "fuzzed.pt"
    torch.save(state, path)
    try:
        use(path)
    except UserError as error:
        assert "\n" not in str(error)


def test_release_unmaps_the_file(tmp_path: Path) -> None:
    """Catches a map that keeps the blocks of a replaced checkpoint on the disk, and tensors lost with it."""
    checkpoint.save(tmp_path / "ckpt.pt", our_state())
    mapped = checkpoint.open_checkpoint(str(tmp_path), "")
    assert maps_of(tmp_path / "ckpt.pt") > 0 or not MAPS.exists()
    read = mapped.in_memory()
    assert maps_of(tmp_path / "ckpt.pt") == 0
    assert (mapped.weights, mapped.optimizer) == ({}, None)
    assert equal(read.weights, checkpoint.load(tmp_path / "ckpt.pt").weights)


def maps_of(path: Path) -> int:
    """Return how often this process has mapped a file; 0 on systems that do not tell."""
    return MAPS.read_text(encoding="utf-8").count(str(path)) if MAPS.exists() else 0
