"""GPT-2 weights from and to the Hugging Face layout: the logits are those of transformers, and nothing else gets in."""

import functools
import http.server
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from model import GPT, GPTConfig
from nanogpt import huggingface
from nanogpt.errors import UserError
from nanogpt.tokenizer import CharTokenizer, TiktokenTokenizer, Tokenizer

ROOT = Path(__file__).resolve().parents[1]
TEXT = " two  spaces\n\n\ttab\r\n it's 'don't' .,!? [] <unk> <|endoftext|> naïve e\u0301 日本語 🙂 \x00 \u00a0\u2003 12345 end "
TABLE = CharTokenizer.from_text(TEXT)
WIDTHS = {"gpt2": (768, 12), "gpt2-medium": (1024, 16), "gpt2-large": (1280, 20), "gpt2-xl": (1600, 25)}
LOAD = """
import json, sys
from nanogpt.errors import UserError
from nanogpt.huggingface import load
for name in sys.argv[1:]:
    try:
        found = load(name)
        print(json.dumps([str(found.path), found.weights["transformer.wpe.weight"].sum().item()]))
    except UserError as error:
        print(json.dumps(str(error)))
"""


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing in this process asks the Hub, and transformers says nothing."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def randomize(model: torch.nn.Module) -> None:
    """Give each parameter numbers of GPT-2's scale that no other has, biases and norms too."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        mean, std = (1.0, 0.2) if "ln_" in name and name.endswith("weight") else (0.0, 0.1)
        std = 0.02 if parameter.dim() > 1 and "wte" not in name else std
        torch.nn.init.normal_(parameter, mean, std)


def make_theirs(n_embd: int = 32, n_head: int = 2, own: bool = True, **settings: Any) -> torch.nn.Module:
    """A random model of transformers, which says that it is an export with the characters of TABLE, or has GPT-2's tokens."""
    from transformers import GPT2Config, GPT2LMHeadModel

    if own:
        settings = {"nanogpt": {"bias": True, "tokenizer": TABLE.to_dict()}, "vocab_size": TABLE.vocab_size} | settings
    config = GPT2Config(**{"n_layer": 2, "n_positions": 16, "n_embd": n_embd, "n_head": n_head} | settings)
    with torch.device("meta"):
        model = GPT2LMHeadModel(config)  # its own initialisation would take most of the time of these tests
    model.to_empty(device="cpu").tie_weights()
    randomize(model)
    return model.eval()


def make_ours(tokenizer: Tokenizer = TABLE, **shape: Any) -> GPT:
    """A random model of ours."""
    args = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 16, "vocab_size": tokenizer.model_vocab_size}
    model = GPT(GPTConfig(**args | shape)).eval()
    randomize(model)
    return model


def build(found: huggingface.Pretrained) -> GPT:
    """The model of what `load` has found."""
    model = GPT(GPTConfig(**found.model_args, gelu=found.gelu))
    model.load_state_dict(found.weights)
    return model.eval()


@torch.no_grad()
def assert_same_logits(ours: GPT, theirs: torch.nn.Module) -> None:
    """Both give the same logits at every position, for as many tokens as theirs has."""
    vocab_size = theirs.config.vocab_size
    idx = torch.randint(0, vocab_size, (2, ours.config.block_size), generator=torch.Generator().manual_seed(0))
    logits, _ = ours(idx, idx)
    expected = theirs(idx).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(logits[..., :vocab_size], expected, rtol=0, atol=1e-4)


def write_theirs(folder: Path, form: str, theirs: torch.nn.Module) -> None:
    """Write a model of transformers in one of the forms in which its versions have written them."""
    if form in ("whole", "sharded", "halves"):
        model = theirs.bfloat16() if form == "halves" else theirs
        model.save_pretrained(folder, max_shard_size="20KB" if form == "sharded" else "5GB")
        return
    folder.mkdir()
    (folder / "config.json").write_text(theirs.config.to_json_string())
    state = dict(theirs.state_dict())  # with the head
    if form == "original":  # as OpenAI's on the Hub: no prefix, no head, the masks
        state = {name.removeprefix("transformer."): tensor for name, tensor in state.items() if name != huggingface.HEAD}
        state |= {f"h.{i}.attn.bias": torch.ones(1, 1, 16, 16).tril() for i in range(2)}
        state |= {f"h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(2)}
        safetensors.torch.save_file(state, folder / "model.safetensors")
    elif form == "head alone":
        safetensors.torch.save_file(
            {name: tensor for name, tensor in state.items() if name != huggingface.WTE}, folder / "model.safetensors"
        )
    elif form == "pickled pieces":
        pieces = {f"pytorch_model-0000{i}-of-00002.bin": dict(list(state.items())[i - 1 :: 2]) for i in (1, 2)}
        for name, piece in pieces.items():
            torch.save(piece, folder / name)
        index = {"weight_map": {tensor: name for name, piece in pieces.items() for tensor in piece}}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    else:
        torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=form != "old pickle")


# names


@pytest.mark.parametrize(
    "init_from, expected",
    [
        *((name, True) for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "huggingface")),
        *((name, True) for name in ("owner/name", "a/b", "Foo-Bar_1.x/name.v2", "o/_name_")),
        *((name, False) for name in ("scratch", "resume", "gpt3", "", "/", "a/", "/a", "a/b/c", "./a", "../a", "a/..", "-a/b")),
        *((name, False) for name in ("a--b/c", "a/b..c", "a/b.git", "a/b.", "é/b", "a/b\n", "a/" + "b" * 96, "C:\\a/b")),
    ],
)
def test_names(init_from: str, expected: bool) -> None:
    """A path or another word that would be looked for on the Hub, or an id of the Hub that would not, is caught."""
    assert huggingface.is_name(init_from) is expected


@pytest.mark.parametrize(
    "files, expected",
    [
        (["config.json", "model.safetensors"], True),
        (["config.json", "model.safetensors.index.json"], True),
        (["config.json", "pytorch_model.bin"], True),
        (["config.json", "pytorch_model.bin.index.json"], True),
        (["config.json"], False),
        (["model.safetensors"], False),
        (["config.json", "ckpt.pt"], False),
        (["config.json", "model.safetensors", "last.pt"], False),
        ([], False),
    ],
)
def test_folders(tmp_path: Path, files: list[str], expected: bool) -> None:
    """A run's folder that is taken for one in the Hugging Face layout, or the other way around, is caught."""
    for name in files:
        (tmp_path / name).touch()
    assert huggingface.is_folder(tmp_path) is expected


# loading


@pytest.mark.parametrize("name", WIDTHS)
def test_logits_of_all_four_shapes(tmp_path: Path, name: str) -> None:
    """A head, a matrix or a piece that is mixed up in one of the widths of GPT-2 is caught, in pieces and whole."""
    theirs = make_theirs(*WIDTHS[name])
    sharded = name in ("gpt2", "gpt2-xl")
    theirs.save_pretrained(tmp_path, max_shard_size="20MB" if sharded else "5GB")
    assert (tmp_path / "model.safetensors.index.json").exists() is sharded
    found = huggingface.load(str(tmp_path))
    assert (found.model_args["n_embd"], found.model_args["n_head"], found.gelu) == (*WIDTHS[name], "tanh")
    assert_same_logits(build(found), theirs)


FORMS = ["whole", "sharded", "halves", "original", "head alone", "pickle", "old pickle", "pickled pieces"]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_the_files(tmp_path: Path, form: str) -> None:
    """A form of the layout in which the weights are not found, or not the same, is caught."""
    theirs = make_theirs()
    write_theirs(tmp_path / "model", form, theirs)
    found = huggingface.load(str(tmp_path / "model"))
    assert {weight.dtype for weight in found.weights.values()} == {torch.float32}
    assert found.weights[huggingface.HEAD] is found.weights[huggingface.WTE]
    assert list(found.weights) == list(make_ours().state_dict())
    for path in (tmp_path / "model").iterdir():
        with open(path, "r+b") as file:  # nothing is left in the files, or mapped from them
            file.write(bytes(path.stat().st_size))
    assert_same_logits(build(found), theirs.float())


@pytest.mark.parametrize("form", ["whole", "pickle"])
def test_a_file_is_read_piece_by_piece(tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that are lost or mixed up where a file is opened several times to save memory are caught."""
    theirs = make_theirs()
    write_theirs(tmp_path / "model", form, theirs)
    opened = []
    tensors = huggingface._tensors
    monkeypatch.setattr(huggingface, "_tensors", lambda file, names: opened.append(names) or tensors(file, names))
    monkeypatch.setattr(huggingface, "AT_ONCE", 20_000)
    found = huggingface.load(str(tmp_path / "model"))
    assert len(opened) > 4 and sum(map(len, opened)) == len(theirs.state_dict()) - (form == "whole")
    assert_same_logits(build(found), theirs)


@pytest.mark.parametrize("activation", huggingface.GELUS)
def test_every_activation(tmp_path: Path, activation: str) -> None:
    """An activation whose formula is not the one that it is taken for is caught."""
    theirs = make_theirs(activation_function=activation)
    for layer in theirs.transformer.h:
        layer.mlp.c_fc.weight.data *= 20  # where the two forms differ
        layer.mlp.c_proj.weight.data *= 50
    theirs.save_pretrained(tmp_path)
    found = huggingface.load(str(tmp_path))
    idx = torch.arange(16)[None]
    with torch.no_grad():
        expected, other = theirs(idx).logits, {"erf": "tanh", "tanh": "erf"}[found.gelu]
        torch.testing.assert_close(build(found)(idx, idx)[0], expected, rtol=0, atol=2e-5)
        found.gelu = other
        assert (build(found)(idx, idx)[0] - expected).abs().max() > 1e-4


def test_model_with_gpt2_tokens(tmp_path: Path) -> None:
    """GPT-2's number of tokens or its defaults being taken for something else is caught."""
    theirs = make_theirs(own=False)
    theirs.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    kept = {name: config[name] for name in ("model_type", "n_positions", "n_embd", "n_head", "n_layer")}
    kept["num_hidden_layers"] = kept.pop("n_layer")
    (tmp_path / "config.json").write_text(json.dumps(kept))
    found = huggingface.load(str(tmp_path))
    assert found.path == tmp_path
    assert found.model_args == {
        "n_layer": 2,
        "n_head": 2,
        "n_embd": 32,
        "block_size": 16,
        "bias": True,
        "vocab_size": 50257,
        "dropout": 0.0,
    }
    assert found.tokenizer == {"kind": "tiktoken", "name": "gpt2", "vocab_size": 50257}
    assert_same_logits(build(found), theirs)


@pytest.mark.parametrize("bias", [True, False])
def test_shapes_are_those_of_the_model(bias: bool) -> None:
    """A parameter that the model has and the list of shapes has not, or the other way around, is caught."""
    model = make_ours(bias=bias)
    shapes = huggingface._parameter_shapes(vars(model.config))
    expected = {name: tuple(tensor.shape) for name, tensor in make_ours().state_dict().items()}
    assert list(shapes.items()) == list(expected.items())


# vocabularies


@pytest.fixture(scope="module")
def gpt2_sized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model that has as many tokens as GPT-2, and no tokenizer."""
    folder = tmp_path_factory.mktemp("gpt2_sized")
    make_theirs(n_embd=2, n_head=1, own=False, n_layer=1).save_pretrained(folder)
    return folder


@functools.cache
def make_gpt2_files() -> dict[str, str]:
    return huggingface._tokenizer_files(TiktokenTokenizer("gpt2"), 1024)


@pytest.fixture
def gpt2_files(gpt2_vocabulary: None) -> dict[str, str]:
    """The files of GPT-2's tokenizer."""
    return make_gpt2_files()


def add(file: str, token: str) -> str:
    return file.replace('"added_tokens": [', f'"added_tokens": [{token},', 1)


def swap(file: str) -> str:
    return file.replace('"Ġdog"', '"?"').replace('"Ġcat"', '"Ġdog"').replace('"?"', '"Ġcat"')


@pytest.mark.parametrize(
    "name, change, fits",
    [
        ("vocab.json", lambda file: file, True),
        ("tokenizer.json", lambda file: file, True),
        ("tokenizer.json", lambda file: add(file, '{"id": 50257, "content": "[PAD]"}'), True),  # not among the model's
        ("tokenizer.json", lambda file: add(file, '{"id": 50255, "content": "[PAD]"}'), False),
        ("tokenizer.json", lambda file: add(file, "7"), False),
        ("tokenizer.json", lambda file: file.replace('"vocab"', '"words"'), False),
        ("vocab.json", swap, False),
        ("tokenizer.json", swap, False),
        ("vocab.json", lambda file: file.replace(": 262,", ': "262",'), False),
        ("vocab.json", lambda file: file[:-9], False),
        ("vocab.json", lambda file: "[]", False),
        ("vocab.json", lambda file: "{}", False),
    ],
)
def test_vocabularies_beside_the_weights(
    tmp_path: Path, gpt2_sized: Path, gpt2_files: dict[str, str], name: str, change: Callable[[str], str], fits: bool
) -> None:
    """A model of another language, whose tokens are as many as GPT-2's, being loaded as if it spoke English, is caught."""
    folder = shutil.copytree(gpt2_sized, tmp_path / "model")
    (folder / name).write_text(change(gpt2_files[name]), encoding="utf-8")
    if fits:
        huggingface.load(str(folder))
    else:
        with pytest.raises(UserError, match=name):
            huggingface.load(str(folder))


def test_vocabulary_is_the_one_that_transformers_saves(
    tmp_path: Path, gpt2_sized: Path, gpt2_files: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A check of the vocabulary that refuses GPT-2's as transformers writes it, or that needs tiktoken's, is caught."""
    from transformers import GPT2Tokenizer

    folder = shutil.copytree(gpt2_sized, tmp_path / "model")
    merges = [tuple(line.split()) for line in gpt2_files["merges.txt"].splitlines()[1:]]
    GPT2Tokenizer(vocab=json.loads(gpt2_files["vocab.json"]), merges=merges).save_pretrained(folder)
    monkeypatch.delattr(TiktokenTokenizer, "_encoding")
    assert (folder / "tokenizer.json").is_file()
    huggingface.load(str(folder))


# refusals


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny model that can be loaded; the cases below break copies of it."""
    folder = tmp_path_factory.mktemp("original")
    make_theirs().save_pretrained(folder)
    return folder


def settings(**changed: Any) -> Callable[[Path], None]:
    """A change of config.json."""

    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changed))

    return change


def write(name: str, content: str | bytes) -> Callable[[Path], None]:
    """A file with other content."""
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def tensors(**changed: Any) -> Callable[[Path], None]:
    """A change of the weights: __ in a name stands for a dot; None takes a tensor away."""

    def change(folder: Path) -> None:
        state = safetensors.torch.load_file(folder / "model.safetensors")
        state |= {name.replace("__", "."): tensor for name, tensor in changed.items()}
        state = {name: tensor for name, tensor in state.items() if tensor is not None}
        safetensors.torch.save_file(state, folder / "model.safetensors")

    return change


def index(weight_map: Any) -> Callable[[Path], None]:
    """The weights in a piece, and an index that names other files."""

    def change(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "piece.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return change


def pickled(make: Callable[[dict[str, torch.Tensor]], Any], **how: Any) -> Callable[[Path], None]:
    """The weights as an older version has them, changed."""

    def change(folder: Path) -> None:
        state = safetensors.torch.load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        torch.save(make(state), folder / "pytorch_model.bin", **how)

    return change


def truncated(name: str, size: int) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / name, size)


def both(*changes: Callable[[Path], None]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for one in changes:
            one(folder)

    return change


class Hostile:
    """Runs a command where it is unpickled."""

    def __reduce__(self) -> tuple:
        return os.system, ("touch hostile",)


LN = "transformer.h.1.ln_1.weight"
MLP = "transformer.h.0.mlp.c_fc.weight"
NO_OWN = {"nanogpt": {"bias": True, "tokenizer": {"kind": "char", "characters": ["a", "b"]}}}
REFUSALS = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "neither model.safetensors nor pytorch_model.bin"),
    "config of bytes": (write("config.json", b"\xff\x00"), "config.json: not a JSON file"),
    "config without end": (write("config.json", "[" * 100_000), "config.json: not a JSON file"),
    "config of a list": (write("config.json", "[]"), "config.json: .*no dictionary"),
    "model of llama": (settings(model_type="llama"), "model_type = 'llama'"),
    "model of a list": (settings(model_type=["gpt2"]), "model_type = "),
    "activation": (settings(activation_function="relu"), "activation_function = 'relu': .*gelu_new"),
    "activation of a list": (settings(activation_function=["gelu"]), "activation_function = "),
    "quick gelu": (settings(activation_function="quick_gelu"), "activation_function = 'quick_gelu'"),
    "n_inner": (settings(n_inner=64), "n_inner = 64: this model has 4 \\* n_embd = 128"),
    "scale_attn_weights": (settings(scale_attn_weights=False), "scale_attn_weights = False"),
    "inverse_layer_idx": (settings(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx = True"),
    "cross attention": (settings(add_cross_attention=True), "add_cross_attention = True"),
    "epsilon": (settings(layer_norm_epsilon=1e-6), "layer_norm_epsilon = 1e-06"),
    "untied": (settings(tie_word_embeddings=False), "tie_word_embeddings = False"),
    "quantized": (settings(quantization_config={"bits": 4}), "quantization_config = {'bits': 4}"),
    "n_layer of text": (settings(n_layer="2"), "n_layer = '2'"),
    "n_layer of zero": (settings(n_layer=0), "n_layer = 0"),
    "n_layer of truth": (settings(n_layer=True), "n_layer = True"),
    "n_layer without end": (settings(n_layer=10**30), "n_layer = 1000"),
    "n_layer of millions": (settings(n_layer=10_000_000), "n_layer = 10000000 are not all there"),
    "n_layer of three": (settings(n_layer=3), "'h.2.ln_1.weight' is missing"),
    "n_layer of one": (settings(n_layer=1), "'transformer.h.1.*no part of a GPT-2 of 1 layers"),
    "n_embd": (settings(n_embd=64), "is .* where its config.json needs \\(192,\\)"),
    "n_embd of millions": (settings(n_embd=1 << 23), "is .* where its config.json needs "),
    "n_head": (settings(n_head=5), "n_head = 5 does not divide n_embd = 32"),
    "n_positions": (settings(n_positions=8), "'transformer.wpe.weight' is \\(16, 32\\) .* \\(8, 32\\)"),
    "vocabulary": (both(settings(vocab_size=50304), lambda folder: forget(folder)), "vocab_size = 50304: another vocabulary"),
    "own of text": (settings(nanogpt="yes"), "nanogpt = 'yes'"),
    "own without bias": (settings(nanogpt={"tokenizer": TABLE.to_dict()}), "damaged: nanogpt = "),
    "own tokenizer": (settings(nanogpt={"bias": True, "tokenizer": {"kind": "x"}}), "malformed tokenizer"),
    "own small tokenizer": (settings(**NO_OWN), "2 characters.* does not belong to a model with vocab_size = "),
    "weights missing": (tensors(**{LN: None}), "model.safetensors: 'h.1.ln_1.weight' is missing"),
    "weights beyond": (tensors(score__weight=torch.ones(2)), "'score.weight' is no part of a GPT-2"),
    "weights twice": (tensors(h__1__ln_1__weight=torch.ones(32)), "a second time"),
    "weights turned": (tensors(**{MLP: torch.ones(128, 32)}), "c_fc.weight' is \\(128, 32\\) .* needs \\(32, 128\\)"),
    "weights whole": (tensors(**{LN: torch.ones(32, dtype=torch.int64)}), "ln_1.weight' is no plain matrix .*int64"),
    "another head": (tensors(lm_head__weight=torch.ones(TABLE.vocab_size, 32)), "'lm_head.weight' differs"),
    "truncated": (truncated("model.safetensors", 4000), "model.safetensors: not a safetensors file, or damaged"),
    "truncated header": (truncated("model.safetensors", 100), "model.safetensors: not a safetensors file, or damaged"),
    "empty": (truncated("model.safetensors", 0), "model.safetensors: not a safetensors file, or damaged"),
    "random": (write("model.safetensors", random.Random(0).randbytes(5000)), "not a safetensors file, or damaged"),
    "index without files": (index({}), "index.json: not a list of the files"),
    "index of numbers": (index({"a": 1}), "index.json: not a list of the files"),
    "index outside": (index({"a": "../model.safetensors"}), "refused: it names '../model.safetensors'"),
    "index of a root": (index({"a": "/etc/passwd"}), "refused: it names '/etc/passwd'"),
    "index of a parent": (index({"a": ".."}), "refused: it names '..'"),
    "index of Windows": (index({"a": "..\\x"}), "refused: it names "),
    "index without a piece": (index({"a": "gone.safetensors"}), "gone.safetensors: missing"),
    "hostile pickle": (pickled(lambda state: state | {"x": Hostile()}), "refused: it names .*system, which could run code"),
    "old hostile pickle": (
        pickled(lambda state: state | {"x": Hostile()}, _use_new_zipfile_serialization=False),
        "refused: it names .*system, which could run code",
    ),
    "pickle of a list": (pickled(lambda state: list(state)), "pytorch_model.bin: not a file of weights"),
    "pickle of text": (pickled(lambda state: state | {"x": "y"}), "pytorch_model.bin: not a file of weights: it has 'x'"),
    "pickle of numbers": (pickled(lambda state: {0: torch.ones(1)}), "pytorch_model.bin: not a file of weights: it has 0"),
    "sparse pickle": (pickled(lambda state: state | {MLP: state[MLP].to_sparse()}), "c_fc.weight' is no plain matrix"),
    "folded pickle": (pickled(lambda state: state | {MLP: torch.ones(1).expand(32, 128)}), "c_fc.weight' is no plain matrix"),
    "truncated pickle": (both(pickled(dict), truncated("pytorch_model.bin", 9000)), "pytorch_model.bin: .*damaged"),
    "random pickle": (
        both(pickled(dict), write("pytorch_model.bin", random.Random(0).randbytes(5000))),
        "pytorch_model.bin: .*not a file of weights",
    ),
}


def forget(folder: Path) -> None:
    """Let a model be one of others."""
    config = json.loads((folder / "config.json").read_text())
    del config["nanogpt"]
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, original: Path, case: str) -> None:
    """A model that this one is not, or a damaged or hostile file, that is loaded or ends in a traceback, is caught."""
    change, message = REFUSALS[case]
    folder = shutil.copytree(original, tmp_path / "model")
    change(folder)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message) as refusal:
        huggingface.load(str(folder))
    assert "\n" not in str(refusal.value) and str(folder) in str(refusal.value)
    assert not (tmp_path / "hostile").exists()


def test_what_is_nowhere_is_named(tmp_path: Path) -> None:
    """A refusal of a folder or a name that does not say which it is, is caught."""
    for name in (str(tmp_path / "none"), "no name", "a/b/c"):
        with pytest.raises(UserError, match="no such folder") as refusal:
            huggingface.load(name)
        assert name in str(refusal.value)


# saving


def theirs_of(folder: Path) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.mark.parametrize("name", WIDTHS)
def test_logits_of_all_four_shapes_after_export(tmp_path: Path, name: str) -> None:
    """A matrix that is mixed up on the way out, and mixed up back on the way in, is caught."""
    n_embd, n_head = WIDTHS[name]
    model = make_ours(n_embd=n_embd, n_head=n_head, n_layer=1 if name == "gpt2-xl" else 2, gelu="tanh")
    huggingface.save(tmp_path / "out", model, TABLE, torch.float32)
    assert_same_logits(model, theirs_of(tmp_path / "out"))


@pytest.mark.parametrize("gelu", ["erf", "tanh"])
@pytest.mark.parametrize("bias", [True, False])
def test_round_trip_is_exact(tmp_path: Path, bias: bool, gelu: str) -> None:
    """A weight, an argument, the activation or the tokenizer that is not the same after export and load is caught."""
    model = make_ours(bias=bias, gelu=gelu)
    huggingface.save(tmp_path / "out", model, TABLE, torch.float32)
    found = huggingface.load(str(tmp_path / "out"))
    assert found.weights.keys() == model.state_dict().keys()
    assert all(torch.equal(found.weights[name], tensor) for name, tensor in model.state_dict().items())
    assert found.model_args | {"gelu": found.gelu} == vars(model.config)
    assert found.tokenizer == TABLE.to_dict()
    theirs = theirs_of(tmp_path / "out")
    assert_same_logits(model, theirs)
    idx = torch.tensor([[3, 1, 4]])
    expected = theirs.generate(idx, max_new_tokens=10, do_sample=False, pad_token_id=0)
    assert model.generate(idx, 10, temperature=0).tolist() == expected.tolist()


def test_biases_that_others_have_trained_are_kept(tmp_path: Path) -> None:
    """A model whose biases are dropped since it had none before transformers trained it is caught."""
    huggingface.save(tmp_path / "out", make_ours(bias=False), TABLE, torch.float32)
    theirs = theirs_of(tmp_path / "out")
    randomize(theirs)
    theirs.save_pretrained(tmp_path / "trained")
    found = huggingface.load(str(tmp_path / "trained"))
    assert found.model_args["bias"] and found.tokenizer == TABLE.to_dict()
    assert_same_logits(build(found), theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes(tmp_path: Path, dtype: torch.dtype) -> None:
    """A type that is not that of the file, or not told to transformers, is caught."""
    from transformers import GPT2Config

    model = make_ours()
    huggingface.save(tmp_path / "out", model, TABLE, dtype)
    assert {tensor.dtype for tensor in safetensors.torch.load_file(tmp_path / "out/model.safetensors").values()} == {dtype}
    assert theirs_of(tmp_path / "out").dtype == dtype
    assert GPT2Config.from_pretrained(tmp_path / "out").dtype == dtype
    found = huggingface.load(str(tmp_path / "out"))
    assert all(torch.equal(found.weights[name], tensor.to(dtype).float()) for name, tensor in model.state_dict().items())


def test_numbers_that_a_dtype_cannot_hold(tmp_path: Path) -> None:
    """Weights that become infinite without a word are caught."""
    model = make_ours()
    model.transformer.ln_f.weight.data[0] = 1e5
    with pytest.raises(UserError, match=r"'transformer\.ln_f\.weight' has numbers beyond torch\.float16"):
        huggingface.save(tmp_path / "out", model, TABLE, torch.float16)
    assert not (tmp_path / "out").exists()


def test_characters_in_transformers(tmp_path: Path) -> None:
    """A character that is lost, normalised, joined to another or read as another's id by transformers is caught."""
    from transformers import AutoTokenizer

    huggingface.save(tmp_path / "out", make_ours(), TABLE, torch.float32)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    texts = [TEXT, TEXT[::-1], *TABLE.characters, " .", "a , b 's", "  \n\n  ", "e\u0301", ""]
    for text in texts:
        text = "".join(character for character in text if character in TABLE.characters)
        assert theirs(text)["input_ids"] == TABLE.encode(text)
        assert theirs.decode(TABLE.encode(text)) == text
    with pytest.raises(Exception, match="UNK"):
        theirs("Z")


def test_half_a_character_is_refused(tmp_path: Path) -> None:
    """A table that ends in a traceback, or in a file that cannot be read, is caught."""
    tokenizer = CharTokenizer(["a", "\ud800"])
    with pytest.raises(UserError, match=r"'\\ud800'"):
        huggingface.save(tmp_path / "out", make_ours(tokenizer), tokenizer, torch.float32)


def test_gpt2_in_transformers(tmp_path: Path, gpt2_vocabulary: None) -> None:
    """Padded rows that transformers could sample, a vocabulary or merges that are not GPT-2's, are caught."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    tokenizer = TiktokenTokenizer("gpt2")
    model = make_ours(tokenizer, gelu="tanh")
    assert model.config.vocab_size == 50304
    huggingface.save(tmp_path / "out", model, tokenizer, torch.float32)
    theirs = theirs_of(tmp_path / "out")
    assert theirs.config.vocab_size == 50257 and theirs.config.eos_token_id == tokenizer.end_of_text
    assert_same_logits(model, theirs)
    found = huggingface.load(str(tmp_path / "out"))
    assert found.model_args == {k: v for k, v in vars(model.config).items() if k != "gelu"} | {"vocab_size": 50257}
    assert found.tokenizer == tokenizer.to_dict()
    assert_same_tokens(tokenizer, AutoTokenizer.from_pretrained(tmp_path / "out"))
    assert_same_tokens(tokenizer, PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "out/tokenizer.json")))
    (tmp_path / "out/tokenizer.json").unlink()
    assert_same_tokens(tokenizer, AutoTokenizer.from_pretrained(tmp_path / "out"))  # from vocab.json and merges.txt


def test_gpt2_files_are_the_originals(gpt2_files: dict[str, str]) -> None:
    """A vocabulary or a merge that is not, in order and number, the one that OpenAI has published is caught."""
    published = {path.name: path.read_text(encoding="utf-8") for path in Path(os.environ["TIKTOKEN_CACHE_DIR"]).iterdir()}
    vocabularies = [json.loads(text) for text in published.values() if text.startswith("{")]
    assert json.loads(gpt2_files["vocab.json"]) in vocabularies
    assert gpt2_files["merges.txt"].splitlines() in [text.splitlines() for text in published.values()]
    assert huggingface.vocabulary_digest(json.loads(gpt2_files["vocab.json"])) == huggingface.GPT2_DIGEST


def assert_same_tokens(ours: TiktokenTokenizer, theirs: Any) -> None:
    """Both give the same tokens for real text and for heaps of what the patterns tell apart."""
    letters = " \n\r\t'sSdDlLveEabcÀé12345.,!/_\u00a0\u2003\u0301日\u3000\x0b\x85ǅʰ🙂"
    draw = random.Random(0)
    heaps = ["".join(draw.choice(letters) for _ in range(draw.randrange(1, 40))) for _ in range(300)]
    for text in (TEXT, "a<|endoftext|>\n", "x \n ", (ROOT / "model.py").read_text(encoding="utf-8"), *heaps):
        ids = ours.encode(text)
        assert theirs(text)["input_ids"] == ids, repr(text)
        assert theirs.decode(ids) == text


def test_other_encodings_are_refused(tmp_path: Path) -> None:
    """A folder whose tokens transformers would read otherwise is caught."""
    tokenizer = TiktokenTokenizer("cl100k_base", 100277)
    with pytest.raises(UserError, match="cl100k_base cannot be exported"):
        huggingface.save(tmp_path / "out", make_ours(tokenizer, n_embd=4), tokenizer, torch.float32)
    assert list(tmp_path.iterdir()) == []


def test_merges_are_those_of_tiktoken() -> None:
    """Pairs with which a run of byte-pair encoding ends in other tokens than tiktoken's are caught."""
    words = ["ab", "bc", "abc", "abcd", "cd", "aab", "aabb"]
    ranks = {bytes([byte]): byte for byte in range(256)} | {word.encode(): 256 + i for i, word in enumerate(words)}
    pairs = [(left.decode(), right.decode()) for left, right in huggingface._merges(ranks)]
    assert pairs == [("a", "b"), ("b", "c"), ("ab", "c"), ("abc", "d"), ("c", "d"), ("a", "ab"), ("aab", "b")]


def test_an_earlier_export_is_replaced(tmp_path: Path) -> None:
    """Files of an earlier export that stay beside those of a later one, or leavings of a killed one, are caught."""
    folder = tmp_path / "out"
    for n_embd in (32, 64):
        model = make_ours(n_embd=n_embd)
        huggingface.save(folder, model, TABLE, torch.float32)
        (tmp_path / "out.tmp").mkdir()
        shutil.copy(folder / "config.json", tmp_path / "out.tmp")
        (folder / "vocab.json").write_text("{}")  # as one with GPT-2's tokens has
    huggingface.save(folder, model, TABLE, torch.float32)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not (folder / "vocab.json").exists()
    assert huggingface.load(str(folder)).model_args["n_embd"] == 64


def test_an_export_that_fails_leaves_the_earlier_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An export that is cut short and leaves half a folder in the place of a whole one is caught."""
    folder = tmp_path / "out"
    huggingface.save(folder, make_ours(), TABLE, torch.float32)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def killed(*arguments: Any, **more: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(safetensors.torch, "save_file", killed)
    with pytest.raises(KeyboardInterrupt):
        huggingface.save(folder, make_ours(n_embd=64), TABLE, torch.float32)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    with pytest.raises(KeyboardInterrupt):
        huggingface.save(tmp_path / "new", make_ours(), TABLE, torch.float32)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "files, message",
    [
        ({"ckpt.pt": "", "config.json": "{}"}, "holds 'ckpt.pt', which is no part of an export"),
        ({"README.md": "mine", "config.json": '{"nanogpt": {}}'}, "holds 'README.md', which is no part of an export"),
        ({"config.json": "{}", "model.safetensors": ""}, "not exported from here"),
        ({"model.safetensors": ""}, "not exported from here"),
        ({"config.json": "["}, "not a JSON file"),
    ],
)
@pytest.mark.parametrize("place", ["out", "out.tmp", "out.old"])
def test_what_is_not_ours_is_not_replaced(tmp_path: Path, files: dict[str, str], message: str, place: str) -> None:
    """An export that deletes somebody's files is caught."""
    (tmp_path / place).mkdir()
    for name, content in files.items():
        (tmp_path / place / name).write_text(content)
    with pytest.raises(UserError, match=message) as refusal:
        huggingface.save(tmp_path / "out", make_ours(), TABLE, torch.float32)
    assert str(tmp_path / place) in str(refusal.value)
    assert {path.name: path.read_text() for path in (tmp_path / place).iterdir()} == files


def test_a_file_in_the_way(tmp_path: Path) -> None:
    """An export that deletes a file, or the root, is caught."""
    (tmp_path / "out").write_text("mine")
    with pytest.raises(UserError, match="no folder; name another"):
        huggingface.save(tmp_path / "out", make_ours(), TABLE, torch.float32)
    with pytest.raises(UserError, match="a folder of its own"):
        huggingface.save(Path("/"), make_ours(), TABLE, torch.float32)


# the Hub


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the Hub as a download needs; each model is a dictionary of files."""

    sha = "0123456789" * 4

    def __init__(self, *arguments: Any, models: dict[str, dict[str, bytes]], asked: list[str]):
        self.models, self.asked = models, asked
        super().__init__(*arguments)

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.asked.append(f"{self.command} {self.path}")
        path = self.path.partition("?")[0].removeprefix("/api/models").strip("/").split("/")
        name, rest = "/".join(path[:2]), path[2:]
        if name == "owner/broken":
            self.answer(501, b"")
        elif name not in self.models:
            self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif rest[:1] == ["tree"]:
            files = self.models[name].items()
            tree = [{"type": "file", "path": file, "size": len(body), "oid": file.encode().hex()} for file, body in files]
            self.answer(200, json.dumps(tree).encode())
        elif rest[:1] != ["resolve"]:
            self.answer(200, json.dumps({"id": name, "sha": self.sha, "siblings": []}).encode())
        elif name == "owner/gated":
            self.answer(403, b"{}", {"X-Error-Code": "GatedRepo"})
        else:
            self.answer(200, self.models[name][rest[-1]], {"ETag": f'"{rest[-1].encode().hex()}"', "X-Repo-Commit": self.sha})

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in ({"Content-Type": "application/json", "Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@pytest.fixture
def hub(original: Path, tmp_path: Path) -> Iterator[tuple[str, list[str]]]:
    """The address of a Hub on this machine, and what it has been asked so far."""
    files = {path.name: path.read_bytes() for path in original.iterdir()}
    write_theirs(tmp_path / "older", "pickle", make_theirs())
    older = {path.name: path.read_bytes() for path in (tmp_path / "older").iterdir()}
    write_theirs(tmp_path / "pieces", "sharded", make_theirs())
    pieces = {path.name: path.read_bytes() for path in (tmp_path / "pieces").iterdir()}
    models = {
        "openai-community/gpt2": files | {"pytorch_model.bin": b"never wanted", "onnx/model.safetensors": b"never wanted"},
        "owner/older": older,
        "owner/pieces": pieces,
        "owner/gated": files,
        "owner/empty": {"config.json": files["config.json"]},
    }
    asked: list[str] = []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Hub, models=models, asked=asked))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()
    thread.join()


def load_in_a_process(*names: str, **environment: str) -> list[Any]:
    """What `load` says of each name in a process of its own: a folder and a sum, or an error's line."""
    ours = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_"))}
    ours |= {"NO_PROXY": "*", "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1"} | environment
    done = subprocess.run(
        [sys.executable, "-c", LOAD, *names], cwd=ROOT, env=ours, capture_output=True, text=True, encoding="utf-8", timeout=120
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_downloads(tmp_path: Path, hub: tuple[str, list[str]], original: Path) -> None:
    """A download of the wrong files, an error of the Hub as a traceback, or a cache that is not used, is caught."""
    url, asked = hub
    home = {"HF_HOME": str(tmp_path / "home")}
    names = ["gpt2", "owner/older", "owner/pieces", "owner/missing", "owner/gated", "owner/broken", "owner/empty"]
    found = load_in_a_process(*names, HF_ENDPOINT=url, HF_TOKEN="", **home)
    sums = [huggingface.load(str(original)).weights["transformer.wpe.weight"].sum().item()] * 3
    assert [total for _, total in found[:3]] == sums
    assert all(Path(folder).is_relative_to(tmp_path / "home") for folder, _ in found[:3])
    assert not any("gpt2/resolve" in path and ("bin" in path or "onnx" in path) for path in asked)
    assert f"owner/missing: no such folder here, and no such model at {url}/owner/missing" in found[3]
    assert f"owner/gated: its owner has to let you in: ask for it at {url}/owner/gated" in found[4]
    assert "owner/broken: " in found[5] and "501" in found[5]
    assert "no weights in it" in found[6]

    asked.clear()
    names = ["huggingface", "owner/older", "owner/pieces"]
    assert load_in_a_process(*names, HF_ENDPOINT=url, HF_HUB_OFFLINE="1", **home) == found[:3]
    assert asked == []


def test_without_the_hub(tmp_path: Path) -> None:
    """A name that ends in a traceback where there is no network, or does not say that there is none, is caught."""
    home = {"HF_HOME": str(tmp_path / "home")}
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # but it does not listen
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        (line,) = load_in_a_process("gpt2", HF_ENDPOINT=url, **home)
    assert "gpt2: not all of it is in " in line and f"{url}/openai-community/gpt2 cannot be reached" in line
    offline = load_in_a_process("gpt2", "owner/name", HF_HUB_OFFLINE="1", **home)
    assert all("HF_HUB_OFFLINE is set: unset it once" in line for line in offline)
    assert [line.partition(":")[0] for line in offline] == ["gpt2", "owner/name"]


def test_a_disk_without_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk that is told as a failure of the network, or a folder that comes before a name of GPT-2's, is caught."""
    import huggingface_hub

    def full(*arguments: Any, **more: Any) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "gpt2").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    with pytest.raises(UserError, match=r"No space left on device\): set HF_HOME"):
        huggingface.load("gpt2")
