"""Checkpoint files: what is in them, that nanoGPT's are read, that a crash loses none, and that damage is a UserError."""

import copy
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model import GPT, Bigram, GPTConfig
from nanogpt import checkpoint
from nanogpt.errors import UserError
from nanogpt.tokenizer import CharTokenizer

TABLE = CharTokenizer.from_text("abcdefghijk")
SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 8, "bias": True, "vocab_size": 11, "dropout": 0.0}
LAYER = ["ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"]
MODULES = ["transformer.ln_f", *[f"transformer.h.{layer}.{name}" for layer in range(2) for name in LAYER]]
NAMES = {"transformer.wte.weight", "transformer.wpe.weight", "lm_head.weight"} | {
    f"{module}.{kind}" for module in MODULES for kind in ("weight", "bias")
}


def new_model(seed: int = 1, kind: type = GPT, **changes: Any) -> GPT | Bigram:
    torch.manual_seed(seed)
    return kind(GPTConfig(**SHAPE | changes))


def adamw(model: GPT | Bigram) -> torch.optim.AdamW:
    return model.configure_optimizers(0.1, 1e-2, (0.9, 0.95), "cpu")


def nanogpt_adamw(model: GPT) -> torch.optim.AdamW:
    """The optimizer as nanoGPT makes it: two groups, each in the order of named_parameters."""
    parameters = dict(model.named_parameters())
    groups = [
        {"params": [p for p in parameters.values() if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in parameters.values() if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95))


def update(model: GPT | Bigram, optimizer: torch.optim.Optimizer, steps: int = 1, seed: int = 3) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        model(*torch.randint(11, (2, 4, 8), generator=generator))[1].backward()
        optimizer.step()


def our_state(seed: int = 1, iter_num: int = 3, **extra: Any) -> dict[str, Any]:
    model = new_model(seed)
    optimizer = adamw(model)
    update(model, optimizer, 3)
    extra = {"tokenizer": TABLE.to_dict(), "scaler": {}, "evaluated": iter_num} | extra
    return checkpoint.pack(model, optimizer, iter_num, 2.5, {"dataset": "gone", "batch_size": 4}, extra)


def no_scaler() -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", enabled=False)


def same(weights: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> bool:
    return weights.keys() == others.keys() and all(torch.equal(weights[name], others[name]) for name in weights)


# what is in a checkpoint


def test_a_state_comes_back_as_it_was_saved(tmp_path: Path):
    """Weights, moments or counters that are lost or changed on their way through the file."""
    model = new_model()
    optimizer = adamw(model)
    update(model, optimizer, 3)
    extra = {"tokenizer": TABLE.to_dict(), "scaler": {}, "evaluated": 3}
    checkpoint.save(tmp_path / "ckpt.pt", checkpoint.pack(model, optimizer, 3, 2.5, {"dataset": "gone"}, extra))
    loaded = checkpoint.load(tmp_path / "ckpt.pt")
    assert (loaded.iter_num, loaded.best_val_loss, loaded.model_type, loaded.config) == (3, 2.5, "gpt", {"dataset": "gone"})
    assert {name: loaded.extra[name] for name in extra} == extra
    again = checkpoint.build_model(loaded)
    assert same(again.state_dict(), model.state_dict())
    assert again.lm_head.weight is again.transformer.wte.weight
    restored = adamw(again)
    checkpoint.restore_optimizer(loaded, restored, no_scaler())
    for one, other in zip(optimizer.state_dict()["state"].values(), restored.state_dict()["state"].values(), strict=True):
        assert same(one, other)
    assert checkpoint.tokenizer_of(loaded).characters == list("abcdefghijk")


@pytest.mark.parametrize("changes", [{}, {"bias": False}, {"gelu": "tanh"}, {"kind": Bigram}])
def test_a_loaded_model_computes_what_the_saved_one_did(tmp_path: Path, changes: dict[str, Any]):
    """A part of the shape, the kind of model or of GELU that the file does not hold or the loader does not use."""
    model = new_model(**changes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    checkpoint.save(tmp_path / "ckpt.pt", checkpoint.pack(model, adamw(model), 3, 2.5, {}, {"tokenizer": TABLE.to_dict()}))
    loaded, tokenizer, _ = checkpoint.load_model("resume", str(tmp_path))
    idx = torch.arange(8)[None]
    assert torch.equal(loaded(idx, idx)[0], model(idx, idx)[0])
    assert type(loaded) is type(model) and tokenizer.vocab_size == 11


def test_a_checkpoint_is_nanogpts_dictionary(tmp_path: Path):
    """A key or a name with which nanoGPT's GPTConfig(**model_args) or its strict load_state_dict would fail."""
    checkpoint.save(tmp_path / "ckpt.pt", our_state())
    raw = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    assert raw.keys() == {"model", "optimizer", "model_args", "iter_num", "best_val_loss", "config", "extra"}
    assert raw["model_args"] == SHAPE
    assert raw["model"].keys() == NAMES
    assert [len(group["params"]) for group in raw["optimizer"]["param_groups"]] == [2 + 2 * 4, 2 * 8 + 2]


def test_the_built_model_does_not_hang_on_the_file(tmp_path: Path):
    """Weights that stay mapped, and change or crash when the next checkpoint replaces the file."""
    path = tmp_path / "ckpt.pt"
    checkpoint.save(path, our_state())
    model = checkpoint.build_model(checkpoint.load(path, mmap=True))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    path.write_bytes(bytes(path.stat().st_size))
    assert same(model.state_dict(), before)


# nanoGPT's files


def nanogpt_state(model: GPT, optimizer: torch.optim.Optimizer, prefix: str) -> dict[str, Any]:
    weights = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    mask = torch.tril(torch.ones(8, 8)).view(1, 1, 8, 8)
    weights |= {f"{prefix}transformer.h.{layer}.attn.bias": mask for layer in range(2)}  # where it has no flash attention
    return {
        "model": weights,
        "optimizer": optimizer.state_dict(),
        "model_args": dict(SHAPE),
        "iter_num": 3,
        "best_val_loss": torch.tensor(2.25),
        "config": {"dataset": "gone", "out_dir": "out", "device": "cuda"},
    }


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module."])
def test_resuming_nanogpts_run_makes_its_next_update(tmp_path: Path, prefix: str):
    """A moment that lands at another parameter, a forgotten prefix or mask, a fresh optimizer where there was a state."""
    model = new_model()
    optimizer = nanogpt_adamw(model)
    update(model, optimizer, 3)
    torch.save(nanogpt_state(model, optimizer, prefix), tmp_path / "ckpt.pt")
    update(model, optimizer, seed=4)

    start = checkpoint.load(checkpoint.newest(tmp_path))
    assert (start.iter_num, start.best_val_loss, start.model_type) == (3, 2.25, "gpt")
    assert type(start.best_val_loss) is float
    resumed = checkpoint.build_model(start)
    restored = adamw(resumed)
    checkpoint.restore_optimizer(start, restored, no_scaler())
    update(resumed, restored, seed=4)
    for name, tensor in resumed.state_dict().items():
        torch.testing.assert_close(tensor, model.state_dict()[name], rtol=0, atol=1e-6)


def test_restoring_keeps_the_settings_of_this_run(tmp_path: Path):
    """A learning rate or a decay given for the resumed run, undone by what the old one had."""
    torch.save(our_state(), tmp_path / "ckpt.pt")
    start = checkpoint.load(tmp_path / "ckpt.pt")
    optimizer = checkpoint.build_model(start).configure_optimizers(0.3, 5e-5, (0.7, 0.8), "cpu")
    checkpoint.restore_optimizer(start, optimizer, no_scaler())
    settings = [(group["weight_decay"], group["lr"], group["betas"]) for group in optimizer.param_groups]
    assert settings == [(0.3, 5e-5, (0.7, 0.8)), (0.0, 5e-5, (0.7, 0.8))]


def test_restoring_sets_the_scaler(tmp_path: Path):
    """A float16 run that starts again with the first scale, and skips updates until it has come down."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**7)
    torch.save(our_state(scaler=scaler.state_dict()), tmp_path / "ckpt.pt")
    start = checkpoint.load(tmp_path / "ckpt.pt")
    restored = torch.amp.GradScaler("cpu")
    checkpoint.restore_optimizer(start, adamw(checkpoint.build_model(start)), restored)
    assert restored.get_scale() == 2.0**7


def test_nanogpts_checkpoint_takes_the_tokenizer_of_its_dataset(tmp_path: Path):
    """The wrong characters for a checkpoint that has no tokenizer of its own."""
    (tmp_path / "dataset").mkdir()
    table = {"vocab_size": 11, "itos": dict(enumerate("kjihgfedcba")), "stoi": {}}
    (tmp_path / "dataset" / "meta.pkl").write_bytes(pickle.dumps(table))
    model = new_model()
    state = nanogpt_state(model, nanogpt_adamw(model), "")
    state["config"]["dataset"] = str(tmp_path / "dataset")
    torch.save(state, tmp_path / "ckpt.pt")
    assert checkpoint.tokenizer_of(checkpoint.load(tmp_path / "ckpt.pt")).decode([0, 1, 10]) == "kja"


# writing


def test_a_save_that_fails_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A full disk, or a killed process, that destroys the last good checkpoint or leaves half of one lying about."""
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
def test_a_leftover_link_is_not_written_into(tmp_path: Path, saved: str):
    """The newest state overwritten through the second name that a killed process has left behind."""
    checkpoint.save(tmp_path / "other.pt", our_state())
    old = (tmp_path / "other.pt").read_bytes()
    os.link(tmp_path / "other.pt", tmp_path / f"{saved}.tmp")
    checkpoint.save(tmp_path / saved, our_state(seed=2, iter_num=7))
    assert (tmp_path / "other.pt").read_bytes() == old
    assert checkpoint.load(tmp_path / saved).iter_num == 7
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["other.pt", saved])


@pytest.mark.parametrize("links", [True, False])
def test_share_keeps_its_state_when_the_first_file_moves_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool):
    """A best checkpoint that changes with the newest one, or a disk without hard links on which there is none."""

    def refuse(*paths: Path) -> None:
        raise OSError(1, "Operation not permitted")

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    last, best = tmp_path / checkpoint.LAST, tmp_path / checkpoint.BEST
    (tmp_path / "ckpt.pt.tmp").write_bytes(b"left by a killed process")
    checkpoint.save(last, our_state())
    checkpoint.link(last, best)
    assert best.samefile(last) == links
    checkpoint.link(last, best)  # once more is as good
    checkpoint.save(last, our_state(seed=2, iter_num=7))
    assert (checkpoint.load(last).iter_num, checkpoint.load(best).iter_num) == (7, 3)
    assert same(checkpoint.load(best).weights, our_state()["model"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt.pt", "last.pt"]


# finding


@pytest.mark.parametrize("best, last, expected", [(20, 10, 20), (10, 20, 20), (10, None, 10), (None, 20, 20)])
def test_newest_is_the_state_with_more_updates(tmp_path: Path, best: int | None, last: int | None, expected: int):
    """A run that goes on from an older state than it has, as after nanoGPT has continued one of ours."""
    for name, iter_num in ((checkpoint.BEST, best), (checkpoint.LAST, last)):
        if iter_num is not None:
            checkpoint.save(tmp_path / name, our_state(iter_num=iter_num))
    assert checkpoint.load(checkpoint.newest(tmp_path)).iter_num == expected


def test_load_model_takes_the_best_weights_from_wherever_they_are_named(tmp_path: Path):
    """The newest weights where the best are asked for, or one of the three ways to name a run that does not work."""
    run = tmp_path / "run"
    run.mkdir()
    checkpoint.save(run / checkpoint.BEST, our_state(iter_num=10))
    checkpoint.save(run / checkpoint.LAST, our_state(seed=2, iter_num=20))
    for init_from, out_dir in (("resume", run), (run, "out"), (run / checkpoint.BEST, "out")):
        assert checkpoint.load_model(str(init_from), str(out_dir))[2].iter_num == 10
    assert checkpoint.load_model(str(run / checkpoint.LAST), "out")[2].iter_num == 20


@pytest.mark.parametrize("init_from, out_dir", [("resume", "gone"), ("resume", "empty"), ("empty", "out"), ("gone.pt", "out")])
def test_a_missing_checkpoint_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, init_from: str, out_dir: str):
    """A traceback, or a message that does not say which folder or file was looked for."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError) as caught:
        checkpoint.load_model(init_from, out_dir)
    assert (out_dir if init_from == "resume" else init_from) in str(caught.value) and "\n" not in str(caught.value)


# damage


class Bomb:
    """What a hostile pickle is made of: opening it makes a folder."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
        return os.mkdir, (str(self.path),)


def use(path: Path) -> None:
    """Do with a checkpoint all that sampling, and going on with a float16 run, do."""
    start = checkpoint.load(path)
    model, tokenizer = checkpoint.build_model(start), checkpoint.tokenizer_of(start)
    idx = torch.zeros(1, 1, dtype=torch.int64)
    tokenizer.decode(model.generate(idx, 1, vocab_size=tokenizer.vocab_size)[0].tolist())
    optimizer, scaler = adamw(model), torch.amp.GradScaler("cpu")
    checkpoint.restore_optimizer(start, optimizer, scaler)
    for parameter, moments in optimizer.state.items():  # a fused update with others would crash the interpreter
        assert moments["exp_avg"].shape == moments["exp_avg_sq"].shape == parameter.shape
        assert moments["step"].shape == ()
    if start.extra.get("evaluated", -1) != start.iter_num:
        min(start.best_val_loss, 2.0)
    scaler.scale(model(idx, idx)[1]).backward()
    scaler.step(optimizer)
    scaler.update()


def refused(path: Path) -> str:
    """The message with which a damaged file is refused."""
    with pytest.raises(UserError) as caught:
        use(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_an_undamaged_file_is_used(tmp_path: Path):
    """The tests of damage passing because everything is refused."""
    checkpoint.save(tmp_path / "ckpt.pt", our_state())
    use(tmp_path / "ckpt.pt")


@pytest.mark.parametrize("content", [b"", b"\x00" * 4096, bytes(range(256)) * 64, b"PK\x03\x04", b"a text\nof two lines\n"])
def test_files_that_are_no_checkpoints(tmp_path: Path, content: bytes):
    """The traceback of whatever torch.load trips over."""
    (tmp_path / "ckpt.pt").write_bytes(content)
    refused(tmp_path / "ckpt.pt")


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("share", [0.01, 0.3, 0.6, 0.9, 0.999])
def test_a_truncated_file(tmp_path: Path, share: float, mmap: bool):
    """Half a checkpoint, as a broken copy leaves it, that is taken or ends in a traceback."""
    path = tmp_path / "ckpt.pt"
    checkpoint.save(path, our_state())
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(UserError, match=r"ckpt\.pt: .*damaged"):
        checkpoint.load(path, mmap=mmap)


def test_a_pickle_runs_no_code(tmp_path: Path):
    """Someone else's checkpoint that runs commands on this machine."""
    (tmp_path / "plain.pt").write_bytes(pickle.dumps({"model": Bomb(tmp_path / "ran")}, protocol=2))
    torch.save({"model": {"a": Bomb(tmp_path / "ran")}}, tmp_path / "zip.pt")
    refused(tmp_path / "plain.pt")
    refused(tmp_path / "zip.pt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [[1, 2], {}, {"model": None}, {"model": [torch.zeros(2)]}, {"model": {}}, torch.zeros(2)])
def test_torch_files_of_something_else(tmp_path: Path, content: Any):
    """A KeyError or AttributeError for a file that has nothing of a checkpoint."""
    torch.save(content, tmp_path / "ckpt.pt")
    refused(tmp_path / "ckpt.pt")


C_FC = "transformer.h.0.mlp.c_fc.weight"
GONE = object()
DAMAGE = {
    "a tensor of another shape": ("model", C_FC, torch.zeros(3, 3)),
    "a missing tensor": ("model", C_FC, GONE),
    "a missing layer": ("model", "transformer.h.1.ln_1.weight", GONE),
    "a tensor too many": ("model", "transformer.h.2.ln_1.weight", torch.zeros(16)),
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
    "no heads": ("model_args", "n_head", 0),
    "heads that do not divide": ("model_args", "n_head", 3),
    "no context": ("model_args", "block_size", 0),
    "a negative context": ("model_args", "block_size", -8),
    "another context": ("model_args", "block_size", 16),
    "a huge context": ("model_args", "block_size", 1 << 62),
    "another number of layers": ("model_args", "n_layer", 1),
    "a huge number of layers": ("model_args", "n_layer", 1 << 40),
    "a huge width": ("model_args", "n_embd", 1 << 20),
    "a huge vocabulary": ("model_args", "vocab_size", 1 << 23),
    "a bias that is a number": ("model_args", "bias", 1),
    "another bias": ("model_args", "bias", False),
    "a dropout above one": ("model_args", "dropout", 1.5),
    "a dropout that is no number": ("model_args", "dropout", "none"),
    "no iter_num": ("iter_num", GONE),
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
    "a tokenizer with a word": ("extra", "tokenizer", "characters", ["a", "bc"]),
    "a tokenizer with a character twice": ("extra", "tokenizer", "characters", ["a", "a"]),
    "a tokenizer with numbers": ("extra", "tokenizer", "characters", [1, 2]),
    "a tokenizer larger than the model": ("extra", "tokenizer", "characters", list("abcdefghijkl")),
    "a tokenizer of no tokens": ("extra", "tokenizer", {"kind": "tiktoken", "name": "gpt2", "vocab_size": 0}),
    "an evaluation of two numbers": ("extra", "evaluated", torch.zeros(2)),
    "an evaluation at a word": ("extra", "evaluated", "three"),
    "a scaler that is a string": ("extra", "scaler", "two\nlines"),
    "a scaler without a scale": ("extra", "scaler", {"growth_factor": 2.0}),
    "a scaler whose interval is a fraction": (
        "extra",
        "scaler",
        torch.amp.GradScaler("cpu").state_dict() | {"growth_interval": 1.5},
    ),
    "a sparse weight": ("model", "lm_head.weight", torch.zeros(11, 16).to_sparse()),
    "a complex weight": ("model", "lm_head.weight", torch.zeros(11, 16, dtype=torch.complex64)),
    "a scaler whose scale is a word": ("extra", "scaler", torch.amp.GradScaler("cpu").state_dict() | {"scale": "large"}),
    "a loss that is a string": ("best_val_loss", "2.5"),
    "a loss of many numbers": ("best_val_loss", torch.zeros(2)),
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
    "a state for a word": ("optimizer", "state", "two\nlines", {}),
}


def damage(state: Any, where: tuple, value: Any) -> None:
    """Put `value` in the nested state at the keys `where`, or take away what is there."""
    *path, key = where
    for step in path:
        state = state[step]
    if value is GONE:
        del state[key]
    else:
        state[key] = value


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_part_is_refused_in_one_line(tmp_path: Path, name: str):
    """A traceback, now or at the first update, for a file whose content is not what its keys promise."""
    state = our_state()
    *where, value = DAMAGE[name]
    damage(state, tuple(where), value)
    torch.save(state, tmp_path / "ckpt.pt")
    assert len(refused(tmp_path / "ckpt.pt")) < 1000


def test_many_layers_are_refused_before_they_are_built(tmp_path: Path):
    """Memory and minutes spent on a shape for which the file has no weights."""
    state = our_state()
    state["model_args"]["n_layer"] = 1_000_000
    torch.save(state, tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match=r"ckpt\.pt: .*n_layer=1,000,000"):
        checkpoint.load(tmp_path / "ckpt.pt")


PLAIN = st.recursive(
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


def places(state: Any, prefix: tuple = ()) -> list[tuple]:
    """The keys of every value in a nested state."""
    inner = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list) else ()
    return [place for key, value in inner for place in [(*prefix, key), *places(value, (*prefix, key))]]


GOOD = our_state(scaler=torch.amp.GradScaler("cpu").state_dict())
PLACES = [st.sampled_from([(part,), *places(content, (part,))]) for part, content in GOOD.items()]  # all parts as often


@settings(max_examples=150, deadline=None, derandomize=True, report_multiple_bugs=False)
@given(where=st.one_of(PLACES), value=st.just(GONE) | PLAIN)
def test_any_damage_is_a_user_error_or_harmless(where: tuple, value: Any, tmp_path_factory: pytest.TempPathFactory):
    """Another exception than UserError for a part that nobody thought of."""
    state = copy.deepcopy(GOOD)
    damage(state, where, value)
    path = tmp_path_factory.getbasetemp() / "fuzzed.pt"
    torch.save(state, path)
    try:
        use(path)
    except UserError as error:
        assert "\n" not in str(error)
