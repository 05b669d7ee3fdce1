"""GPT-2 weights from and to the Hugging Face layout: parity with transformers, and what is refused."""

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

import configurator

import pytest
import safetensors.torch
import torch
from conftest import run_train
from launcher import TIMEOUT_SECONDS

import export
from model import GPT, GPTConfig
from nanogpt import checkpoint, corpus, huggingface
from nanogpt.errors import UserError
from nanogpt.tokenizer import CharTokenizer, JsonTokenizer, TiktokenTokenizer, Tokenizer, from_dict

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
    """Keep this process off the Hub, and transformers quiet."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def randomize(model: torch.nn.Module) -> None:
    """Fill every parameter, biases and norms included, with its own random values of GPT-2's scale."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        mean, std = (1.0, 0.2) if "ln_" in name and name.endswith("weight") else (0.0, 0.1)
        std = 0.02 if parameter.dim() > 1 and "wte" not in name else std
        torch.nn.init.normal_(parameter, mean, std)


def make_theirs(n_embd: int = 32, n_head: int = 2, own: bool = True, **settings: Any) -> torch.nn.Module:
    """A random transformers model: marked as our export with the characters of TABLE, or with GPT-2's vocabulary."""
    from transformers import GPT2Config, GPT2LMHeadModel

    if own:
        settings = {"nanogpt": {"bias": True, "tokenizer": TABLE.to_dict()}, "vocab_size": TABLE.vocab_size} | settings
    config = GPT2Config(**{"n_layer": 2, "n_positions": 16, "n_embd": n_embd, "n_head": n_head} | settings)
    with torch.device("meta"):
        model = GPT2LMHeadModel(config)  # skips their slow initialization
    model.to_empty(device="cpu").tie_weights()
    randomize(model)
    return model.eval()


def make_ours(tokenizer: Tokenizer = TABLE, **shape: Any) -> GPT:
    """A random GPT of ours."""
    args = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 16, "vocab_size": tokenizer.model_vocab_size}
    model = GPT(GPTConfig(**args | shape)).eval()
    randomize(model)
    return model


def save(folder: Path, model: GPT, tokenizer: Tokenizer = TABLE, dtype: torch.dtype = torch.float32) -> None:
    """Export a GPT of ours."""
    args = dict(vars(model.config))
    gelu = args.pop("gelu")
    huggingface.save(folder, model.state_dict(), args, gelu, tokenizer, dtype)


def build(found: huggingface.Pretrained) -> GPT:
    """Build the model that `load` has found."""
    model = GPT(GPTConfig(**found.model_args, gelu=found.gelu))
    model.load_state_dict(found.weights)
    return model.eval()


@torch.no_grad()
def assert_same_logits(ours: GPT, theirs: torch.nn.Module) -> None:
    """Assert that both give the same logits at every position, over their vocabulary."""
    vocab_size = theirs.config.vocab_size
    idx = torch.randint(0, vocab_size, (2, ours.config.block_size), generator=torch.Generator().manual_seed(0))
    logits, _ = ours(idx, idx)
    expected = theirs(idx).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(logits[..., :vocab_size], expected, rtol=0, atol=1e-4)


def write_theirs(folder: Path, form: str, theirs: torch.nn.Module) -> None:
    """Write a transformers model in one of the forms that its versions have used."""
    if form in ("whole", "sharded", "halves"):
        model = theirs.bfloat16() if form == "halves" else theirs
        model.save_pretrained(folder, max_shard_size="20KB" if form == "sharded" else "5GB")
        return
    folder.mkdir()
    (folder / "config.json").write_text(theirs.config.to_json_string(), encoding="utf-8")
    state = dict(theirs.state_dict())  # includes the head
    if form == "original":  # like OpenAI's on the Hub: no prefix, no head, but masks
        state = {name.removeprefix("transformer."): tensor for name, tensor in state.items() if name != huggingface.HEAD}
        state |= {f"h.{i}.attn.bias": torch.ones(1, 1, 16, 16).tril() for i in range(2)}
        state |= {f"h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(2)}
        safetensors.torch.save_file(state, folder / "model.safetensors")
    elif form == "prefixes":
        state = {f"module._orig_mod.{name}": tensor for name, tensor in state.items()}
        torch.save(state, folder / "pytorch_model.bin")
    elif form == "prefixes alone":
        state = {f"_orig_mod.module.{name.removeprefix('transformer.')}": tensor for name, tensor in state.items()}
        torch.save(state, folder / "pytorch_model.bin")
    elif form == "untied":  # and equal all the same
        state[huggingface.HEAD] = state[huggingface.HEAD].clone()
        (folder / "config.json").write_text(
            json.dumps(theirs.config.to_dict() | {"tie_word_embeddings": False}), encoding="utf-8"
        )
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
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index), encoding="utf-8")
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
    """Catches a path taken for a Hub id, and a Hub id taken for a path."""
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
        (["adapter_config.json", "adapter_model.safetensors"], True),
        (["adapter_config.json", "ckpt.pt"], False),
        ([], False),
    ],
)
def test_folders(tmp_path: Path, files: list[str], expected: bool) -> None:
    """Catches a run folder taken for a Hugging Face folder, and the reverse."""
    for name in files:
        (tmp_path / name).touch()
    assert huggingface.is_folder(tmp_path) is expected


# loading


@pytest.mark.parametrize("name", WIDTHS)
def test_logits_match_transformers(tmp_path: Path, name: str) -> None:
    """Catches a head, matrix or shard mixed up in one of GPT-2's four widths."""
    theirs = make_theirs(*WIDTHS[name])
    sharded = name in ("gpt2", "gpt2-xl")
    theirs.save_pretrained(tmp_path, max_shard_size="20MB" if sharded else "5GB")
    assert (tmp_path / "model.safetensors.index.json").exists() is sharded
    found = huggingface.load(str(tmp_path))
    assert (found.model_args["n_embd"], found.model_args["n_head"], found.gelu) == (*WIDTHS[name], "tanh")
    assert_same_logits(build(found), theirs)


def test_from_pretrained(tmp_path: Path) -> None:
    """Catches other logits than those of transformers, and an override that is ignored or wrongly allowed."""
    theirs = make_theirs()
    theirs.save_pretrained(tmp_path)
    assert_same_logits(GPT.from_pretrained(str(tmp_path)).eval(), theirs)
    model = GPT.from_pretrained(str(tmp_path), override_args={"dropout": 0.1})
    assert {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)} == {0.1}
    assert_same_logits(model.eval(), theirs)
    for key in ("n_layer", "block_size", "bias"):
        with pytest.raises(AssertionError):
            GPT.from_pretrained(str(tmp_path), override_args={key: 1})


FORMS = ["whole", "sharded", "halves", "original", "head alone", "pickle", "old pickle", "pickled pieces"]
FORMS += ["prefixes", "prefixes alone", "untied"]


@pytest.mark.parametrize("form", FORMS)
def test_file_forms(tmp_path: Path, form: str) -> None:
    """Catches a form of the layout whose weights are missed, changed, or still mapped from the file."""
    theirs = make_theirs()
    write_theirs(tmp_path / "model", form, theirs)
    found = huggingface.load(str(tmp_path / "model"))
    assert {weight.dtype for weight in found.weights.values()} == {torch.float32}
    assert found.weights[huggingface.HEAD] is found.weights[huggingface.WTE]
    assert list(found.weights) == list(make_ours().state_dict())
    for path in (tmp_path / "model").iterdir():
        with open(path, "r+b") as file:  # weights that were still mapped from the files would be zero now
            file.write(bytes(path.stat().st_size))
    assert_same_logits(build(found), theirs.float())


@pytest.mark.parametrize("form", ["whole", "pickle"])
def test_reading_in_groups(tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches weights lost or mixed up when a file is opened several times to save memory."""
    theirs = make_theirs()
    write_theirs(tmp_path / "model", form, theirs)
    opened = []
    tensors = huggingface._tensors
    monkeypatch.setattr(huggingface, "_tensors", lambda file, names: opened.append(names) or tensors(file, names))
    monkeypatch.setattr(huggingface, "MAX_MAPPED_BYTES", 20_000)
    found = huggingface.load(str(tmp_path / "model"))
    assert len(opened) > 4 and sum(map(len, opened)) == len(theirs.state_dict()) - (form == "whole")
    assert_same_logits(build(found), theirs)


@pytest.mark.parametrize("activation", huggingface.GELUS)
def test_activations(tmp_path: Path, activation: str) -> None:
    """Catches an activation mapped to the wrong GELU."""
    theirs = make_theirs(activation_function=activation)
    for layer in theirs.transformer.h:
        layer.mlp.c_fc.weight.data *= 20  # into the range where the two GELUs differ
        layer.mlp.c_proj.weight.data *= 50
    theirs.save_pretrained(tmp_path)
    found = huggingface.load(str(tmp_path))
    idx = torch.arange(16)[None]
    with torch.no_grad():
        expected, other = theirs(idx).logits, {"erf": "tanh", "tanh": "erf"}[found.gelu]
        torch.testing.assert_close(build(found)(idx, idx)[0], expected, rtol=0, atol=2e-5)
        found.gelu = other
        assert (build(found)(idx, idx)[0] - expected).abs().max() > 1e-4


def test_config_defaults(tmp_path: Path) -> None:
    """Catches a wrong default or synonym in config.json."""
    theirs = make_theirs(own=False)
    theirs.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    kept = {name: config[name] for name in ("model_type", "n_positions", "n_embd", "n_head", "n_layer")}
    kept["num_hidden_layers"] = kept.pop("n_layer")
    (tmp_path / "config.json").write_text(json.dumps(kept), encoding="utf-8")
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
def test_parameter_shapes(bias: bool) -> None:
    """Catches a parameter that is in the model but not in the table of shapes, and the reverse."""
    model = make_ours(bias=bias)
    shapes = huggingface._parameter_shapes(vars(model.config))
    expected = {name: tuple(tensor.shape) for name, tensor in make_ours().state_dict().items()}
    assert list(shapes.items()) == list(expected.items())


# vocabularies


@pytest.fixture(scope="module")
def gpt2_sized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model that has GPT-2's vocab_size and no tokenizer files."""
    folder = tmp_path_factory.mktemp("gpt2_sized")
    make_theirs(n_embd=2, n_head=1, own=False, n_layer=1).save_pretrained(folder)
    return folder


@functools.cache
def make_gpt2_files() -> dict[str, str]:
    return huggingface._tokenizer_files(TiktokenTokenizer("gpt2"), 1024)


@pytest.fixture
def gpt2_files(gpt2_vocabulary: None) -> dict[str, str]:
    """GPT-2's tokenizer files."""
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
        ("tokenizer.json", lambda file: add(file, '{"id": 50257, "content": "[PAD]"}'), True),  # beyond the model's vocab_size
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
def test_vocabulary_check(
    tmp_path: Path, gpt2_sized: Path, gpt2_files: dict[str, str], name: str, change: Callable[[str], str], fits: bool
) -> None:
    """Catches a model with another vocabulary of GPT-2's size, such as one for another language."""
    folder = shutil.copytree(gpt2_sized, tmp_path / "model")
    (folder / name).write_text(change(gpt2_files[name]), encoding="utf-8")
    if fits:
        huggingface.load(str(folder))
    else:
        with pytest.raises(UserError, match=name):
            huggingface.load(str(folder))


@pytest.mark.parametrize(
    "vocab_size, change, said",
    [
        (50304, None, "kept GPT-2's 50,257 tokens, left out 47 more (padding)"),
        (50264, None, "kept GPT-2's 50,257 tokens, left out 7 more (padding)"),
        (50258, lambda file: add(file, '{"id": 50257, "content": "[PAD]"}'), "left out 1 more: '[PAD]'"),
        (50304, lambda file: add(file, '{"id": 50257, "content": "[PAD]"}'), "left out 47 more: '[PAD]'"),
    ],
)
@pytest.mark.parametrize("untied", [False, True])
def test_added_tokens_are_left_out(
    tmp_path: Path,
    gpt2_files: dict[str, str],
    capsys: pytest.CaptureFixture[str],
    vocab_size: int,
    change: Callable[[str], str] | None,
    said: str,
    untied: bool,
) -> None:
    """Catches GPT-2's vocabulary, padded or with a pad token behind it, that is refused, or kept without a word."""
    theirs = make_theirs(n_embd=2, n_head=1, own=False, n_layer=1, vocab_size=vocab_size)
    write_theirs(tmp_path / "model", "untied" if untied else "whole", theirs)
    if change is not None:
        (tmp_path / "model/tokenizer.json").write_text(change(gpt2_files["tokenizer.json"]), encoding="utf-8")
    found = huggingface.load(str(tmp_path / "model"))
    assert said in capsys.readouterr().err
    assert found.model_args["vocab_size"] == len(found.weights[huggingface.WTE]) == 50257
    assert found.weights[huggingface.WTE].untyped_storage().nbytes() == 50257 * 2 * 4  # and not that of all rows
    idx = torch.arange(16)[None]
    with torch.no_grad():
        torch.testing.assert_close(build(found)(idx, idx)[0], theirs(idx).logits[..., :50257], rtol=0, atol=1e-4)


def test_tokens_added_to_an_export(tmp_path: Path, gpt2_vocabulary: None, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches an export that is refused once transformers has added a pad token to it."""
    tokenizer = TiktokenTokenizer("gpt2")
    save(tmp_path / "out", make_ours(tokenizer, n_embd=2, n_layer=1), tokenizer)
    theirs = theirs_of(tmp_path / "out")
    theirs.resize_token_embeddings(50258)
    theirs.save_pretrained(tmp_path / "padded")
    found = huggingface.load(str(tmp_path / "padded"))
    assert found.model_args["vocab_size"] == 50257
    assert "kept GPT-2's 50,257 tokens, left out 1 more" in capsys.readouterr().err


def test_vocabulary_check_accepts_transformers_files(
    tmp_path: Path, gpt2_sized: Path, gpt2_files: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a vocabulary check that refuses GPT-2's as transformers writes it, or needs tiktoken."""
    from transformers import GPT2Tokenizer

    folder = shutil.copytree(gpt2_sized, tmp_path / "model")
    merges = [tuple(line.split()) for line in gpt2_files["merges.txt"].splitlines()[1:]]
    GPT2Tokenizer(vocab=json.loads(gpt2_files["vocab.json"]), merges=merges).save_pretrained(folder)
    monkeypatch.delattr(TiktokenTokenizer, "_encoding")
    assert (folder / "tokenizer.json").is_file()
    huggingface.load(str(folder))


# vocabularies of other models

GERMAN = "Der Hund schläft. Die Katze schläft nicht! 12 Äpfel, 日本語 über alles.\n" * 20


def train_theirs(kind: str) -> "tokenizers.Tokenizer":  # noqa: F821 (imported where it is used)
    """A small tokenizer of the tokenizers library, with </s> as its end of text and a token added later."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    special = ["<unk>", "</s>", "<pad>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if kind.startswith("byte level"):
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=kind.endswith("prefix"))
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 1)])
        trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    elif kind == "byte fallback":
        tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        tokenizer.decoder = decoders.Sequence(steps)
        special += [f"<0x{byte:02X}>" for byte in range(256)]
        trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=special, show_progress=False)
    elif kind == "Unigram":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=80, special_tokens=special, unk_token="<unk>", show_progress=False)
    elif kind == "WordPiece":
        tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=100, special_tokens=special, show_progress=False)
    else:
        tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        trainer = trainers.WordLevelTrainer(special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([GERMAN], trainer)
    tokenizer.add_tokens(["[NOTE]"])
    return tokenizer


KINDS = ["byte level", "byte level, prefix", "byte fallback", "Unigram", "WordPiece", "WordLevel"]


def write_german(folder: Path, kind: str = "byte level", padding: int = 0) -> torch.nn.Module:
    """Write a model with its own vocabulary, as transformers saves both; return the model."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=train_theirs(kind), eos_token="</s>", pad_token="<pad>")
    theirs = make_theirs(own=False, vocab_size=len(tokenizer) + padding, bos_token_id=None, eos_token_id=None)
    theirs.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return theirs


@pytest.mark.parametrize("kind", KINDS)
def test_other_vocabularies(tmp_path: Path, kind: str) -> None:
    """Catches other ids, text or logits than the model's own tokenizer and transformers give, before and after an export."""
    from transformers import AutoTokenizer

    theirs = write_german(tmp_path / "model", kind)
    for folder in (tmp_path / "model", tmp_path / "exported"):
        found, library = huggingface.load(str(folder)), AutoTokenizer.from_pretrained(folder)
        tokenizer = from_dict(found.tokenizer)
        assert isinstance(tokenizer, JsonTokenizer)
        assert huggingface.load_tokenizer(str(folder)).to_dict() == found.tokenizer
        assert tokenizer.end_of_text == library.eos_token_id == 1 and library.pad_token_id == 2
        for text in (GERMAN, "  zwei  Leer\n\tso 日本 🙂", "x</s>y", "über [NOTE]", " ", ""):
            ids = tokenizer.encode(text)
            assert ids == library(text, add_special_tokens=False)["input_ids"], repr(text)
            assert tokenizer.decode(ids) == library.backend_tokenizer.decode(ids, skip_special_tokens=False)
        assert (1 in tokenizer.encode_array("x</s>y").tolist()) is (kind == "Unigram")  # whose model has it as a piece
        model = build(found)
        assert_same_logits(model, theirs)
        if folder.name == "model":
            save(tmp_path / "exported", model, tokenizer)


def test_same_greedy_text(tmp_path: Path) -> None:
    """Catches a model with its own vocabulary that goes on in other words than in transformers."""
    from transformers import AutoTokenizer

    theirs, library = write_german(tmp_path, padding=3), AutoTokenizer.from_pretrained(tmp_path)
    theirs.lm_head.weight.data[-3:] = 0  # transformers would sample padding
    found = huggingface.load(str(tmp_path))
    tokenizer = from_dict(found.tokenizer)
    ids = torch.tensor([tokenizer.encode("Der")])
    expected = theirs.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=2)
    ours = build(found).generate(ids, 12, temperature=0)
    assert ours.tolist() == expected.tolist()
    assert tokenizer.decode(ours[0].tolist()) == library.decode(expected[0], clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("padding, said", [(0, ""), (3, "kept its tokenizer's 301 tokens, left out 3 more (padding)")])
def test_resized_embeddings(tmp_path: Path, padding: int, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a resized embedding that is refused, or whose padding is kept without a word."""
    write_german(tmp_path, padding=padding)
    found = huggingface.load(str(tmp_path))
    assert found.model_args["vocab_size"] == len(found.weights[huggingface.WTE]) == 301
    assert said in capsys.readouterr().err


def test_fewer_rows_than_tokens(tmp_path: Path) -> None:
    """Catches a tokenizer that is not the model's."""
    write_german(tmp_path, padding=-1)
    with pytest.raises(UserError, match=r"config.json: vocab_size must be at least .*301 tokens\), got 300"):
        huggingface.load(str(tmp_path))


def test_vocabulary_with_merges(tmp_path: Path) -> None:
    """Catches other ids from the older vocab.json and merges.txt than from tokenizer.json."""
    write_german(tmp_path)
    before = from_dict(huggingface.load(str(tmp_path)).tokenizer)
    model = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    assert huggingface.load_tokenizer(str(tmp_path)).to_dict() == before.to_dict()
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"vocab.json: .*no tokenizer.json or merges.txt"):
        huggingface.load(str(tmp_path))
    merges = "".join(f"{left} {right}\n" for left, right in model["merges"])
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + merges, encoding="utf-8")
    after = huggingface.load_tokenizer(str(tmp_path))
    assert after.encode(GERMAN) == before.encode(GERMAN) and after.decode(after.encode(GERMAN)) == GERMAN
    assert after.end_of_text == 1


def test_finetuning_with_its_own_vocabulary(tmp_path: Path) -> None:
    """Catches a dataset in the model's tokens that train.py refuses, and tokens or weights lost on the way back."""
    from transformers import AutoTokenizer

    folder, data, run, exported = (tmp_path / name for name in ("model", "data", "run", "exported"))
    write_german(folder, padding=3)
    tokenizer = huggingface.load_tokenizer(str(folder))
    corpus.write_dataset(data, *corpus.split_documents([GERMAN], 0.1), tokenizer, "German")
    flags = ["--block_size=16", "--batch_size=2", "--max_iters=2", "--eval_iters=1", "--device=cpu", "--compile=False"]
    run_train(f"--init_from={folder}", f"--dataset={data}", f"--out_dir={run}", "--gradient_accumulation_steps=1", *flags)
    export.main(configurator.parse(export.Config, [f"--out_dir={run}", f"--to={exported}"]))
    found, trained = huggingface.load(str(exported)), checkpoint.open_checkpoint(str(run), "")
    assert found.tokenizer == tokenizer.to_dict()
    assert all(torch.equal(found.weights[name], tensor) for name, tensor in trained.weights.items())
    assert_same_logits(build(found), theirs_of(exported))
    assert AutoTokenizer.from_pretrained(exported)(GERMAN, add_special_tokens=False)["input_ids"] == tokenizer.encode(GERMAN)


def test_two_vocabularies(tmp_path: Path) -> None:
    """Catches a vocab.json and a tokenizer.json that contradict each other."""
    write_german(tmp_path)
    (tmp_path / "vocab.json").write_text('{"Der": 0, "Hund": 1}', encoding="utf-8")
    with pytest.raises(UserError, match=r"vocab.json: not the vocabulary of tokenizer.json"):
        huggingface.load(str(tmp_path))


# refusals


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that loads; the cases below break copies of it."""
    folder = tmp_path_factory.mktemp("original")
    make_theirs().save_pretrained(folder)
    return folder


def settings(**changed: Any) -> Callable[[Path], None]:
    """Change keys of config.json."""

    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        (folder / "config.json").write_text(json.dumps(config | changed), encoding="utf-8")

    return change


def write(name: str, content: str | bytes) -> Callable[[Path], None]:
    """Replace a file's content."""
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def tensors(**changed: Any) -> Callable[[Path], None]:
    """Change tensors: __ in a name stands for a dot; None removes the tensor."""

    def change(folder: Path) -> None:
        state = safetensors.torch.load_file(folder / "model.safetensors")
        state |= {name.replace("__", "."): tensor for name, tensor in changed.items()}
        state = {name: tensor for name, tensor in state.items() if tensor is not None}
        safetensors.torch.save_file(state, folder / "model.safetensors")

    return change


def index(weight_map: Any) -> Callable[[Path], None]:
    """Turn the weights into a shard, with this index."""

    def change(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "piece.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")

    return change


def pickled(make: Callable[[dict[str, torch.Tensor]], Any], **how: Any) -> Callable[[Path], None]:
    """Turn the weights into pytorch_model.bin, changed by `make`."""

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
    """Runs a command when it is unpickled."""

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
    "config of a list": (write("config.json", "[]"), "config.json: must hold a JSON object"),
    "model of llama": (settings(model_type="llama"), "model_type must be 'gpt2', got 'llama'"),
    "model of a list": (settings(model_type=["gpt2"]), "model_type must be 'gpt2', got .'gpt2'"),
    "activation": (settings(activation_function="relu"), "activation_function must be .*gelu_new.*, got 'relu'"),
    "activation of a list": (settings(activation_function=["gelu"]), "activation_function must be .*, got .'gelu'"),
    "quick gelu": (settings(activation_function="quick_gelu"), "activation_function must be .*, got 'quick_gelu'"),
    "n_inner": (settings(n_inner=64), "n_inner must be 4 \\* n_embd = 128, got 64"),
    "scale_attn_weights": (settings(scale_attn_weights=False), "scale_attn_weights must be True, got False"),
    "inverse_layer_idx": (
        settings(scale_attn_by_inverse_layer_idx=True),
        "scale_attn_by_inverse_layer_idx must be False, got True",
    ),
    "cross attention": (settings(add_cross_attention=True), "add_cross_attention must be False, got True"),
    "epsilon": (settings(layer_norm_epsilon=1e-6), "layer_norm_epsilon must be 1e-05, got 1e-06"),
    "untied without a head": (settings(tie_word_embeddings=False), "'lm_head.weight' is missing"),
    "untied perhaps": (settings(tie_word_embeddings="no"), "tie_word_embeddings must be True or False, got 'no'"),
    "quantized": (settings(quantization_config={"bits": 4}), "quantization_config must be None, got {'bits': 4}"),
    "n_layer of text": (settings(n_layer="2"), "n_layer must be a whole number .*, got '2'"),
    "n_layer of zero": (settings(n_layer=0), "n_layer must be a whole number from 1 .*, got 0"),
    "n_layer of truth": (settings(n_layer=True), "n_layer must be a whole number .*, got True"),
    "n_layer without end": (settings(n_layer=10**30), "n_layer must be a whole number .*, got 1000"),
    "n_layer of millions": (settings(n_layer=10_000_000), "weights are missing: .* n_layer = 10000000"),
    "n_layer of three": (settings(n_layer=3), "'h.2.ln_1.weight' is missing"),
    "n_layer of one": (settings(n_layer=1), "'transformer.h.1.*not part of a GPT-2 with 1 layers"),
    "n_embd": (settings(n_embd=64), "must have shape \\(192,\\) by its config.json, got "),
    "n_embd of millions": (settings(n_embd=1 << 23), "must have shape .* by its config.json, got "),
    "n_head": (settings(n_head=5), "n_embd must be a multiple of n_head, got 32 and 5"),
    "n_positions": (settings(n_positions=8), "'transformer.wpe.weight' must have shape \\(8, 32\\) .* got \\(16, 32\\)"),
    "fewer tokens": (
        both(settings(vocab_size=50256), lambda folder: forget(folder)),
        "vocab_size must be GPT-2's 50257 or padded, as 50304 is, got 50256; if the model has another vocabulary, put its",
    ),
    "more tokens without their names": (
        both(settings(vocab_size=50258), lambda folder: forget(folder)),
        "vocab_size must be GPT-2's 50257 or padded, as 50304 is, got 50258; if the model has another vocabulary, put its",
    ),
    "own of text": (settings(nanogpt="yes"), "nanogpt = 'yes'"),
    "own without bias": (settings(nanogpt={"tokenizer": TABLE.to_dict()}), "damaged: nanogpt = "),
    "own tokenizer": (settings(nanogpt={"bias": True, "tokenizer": {"kind": "x"}}), "malformed tokenizer"),
    "own small tokenizer": (settings(**NO_OWN), "vocab_size must be that of its tokenizer .2 characters., got "),
    "weights missing": (tensors(**{LN: None}), "model.safetensors: 'h.1.ln_1.weight' is missing"),
    "weights beyond": (tensors(score__weight=torch.ones(2)), "'score.weight' is not part of a GPT-2"),
    "weights twice": (tensors(h__1__ln_1__weight=torch.ones(32)), "is a duplicate, already found in model.safetensors"),
    "weights turned": (
        tensors(**{MLP: torch.ones(128, 32)}),
        "c_fc.weight' must have shape \\(32, 128\\) .* got \\(128, 32\\)",
    ),
    "weights whole": (
        tensors(**{LN: torch.ones(32, dtype=torch.int64)}),
        "ln_1.weight' must be a dense floating-point tensor.*int64",
    ),
    "an adapter": (
        both(
            lambda folder: (folder / "config.json").rename(folder / "adapter_config.json"),
            lambda folder: (folder / "model.safetensors").rename(folder / "adapter_model.safetensors"),
        ),
        "a LoRA adapter, not a whole model; merge it in Python first: .*merge_and_unload",
    ),
    "weights twice under prefixes": (tensors(_orig_mod__transformer__h__1__ln_1__weight=torch.ones(32)), "is a duplicate"),
    "another head, untied": (
        both(settings(tie_word_embeddings=False), tensors(lm_head__weight=torch.ones(TABLE.vocab_size, 32))),
        "'lm_head.weight' differs from the token embedding",
    ),
    "another head": (tensors(lm_head__weight=torch.ones(TABLE.vocab_size, 32)), "'lm_head.weight' differs"),
    "truncated": (truncated("model.safetensors", 4000), "model.safetensors: not a safetensors file, or damaged"),
    "truncated header": (truncated("model.safetensors", 100), "model.safetensors: not a safetensors file, or damaged"),
    "empty": (truncated("model.safetensors", 0), "model.safetensors: not a safetensors file, or damaged"),
    "random": (write("model.safetensors", random.Random(0).randbytes(5000)), "not a safetensors file, or damaged"),
    "index without files": (index({}), "index.json: not an index of weight files"),
    "index of numbers": (index({"a": 1}), "index.json: not an index of weight files"),
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
    "sparse pickle": (
        pickled(lambda state: state | {MLP: state[MLP].to_sparse()}),
        "c_fc.weight' must be a dense floating-point tensor",
    ),
    "folded pickle": (
        pickled(lambda state: state | {MLP: torch.ones(1).expand(32, 128)}),
        "c_fc.weight' must be a dense floating-point tensor",
    ),
    "truncated pickle": (both(pickled(dict), truncated("pytorch_model.bin", 9000)), "pytorch_model.bin: .*damaged"),
    "random pickle": (
        both(pickled(dict), write("pytorch_model.bin", random.Random(0).randbytes(5000))),
        "pytorch_model.bin: .*not a file of weights",
    ),
}


def forget(folder: Path) -> None:
    """Remove the mark of our exports."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    del config["nanogpt"]
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, original: Path, case: str) -> None:
    """Catches an unsupported model, or a damaged or hostile file, that loads or ends in a traceback."""
    change, message = REFUSALS[case]
    folder = shutil.copytree(original, tmp_path / "model")
    change(folder)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message) as refusal:
        huggingface.load(str(folder))
    assert "\n" not in str(refusal.value) and str(folder) in str(refusal.value)
    assert not (tmp_path / "hostile").exists()


def test_not_found(tmp_path: Path) -> None:
    """Catches an error that does not name the missing folder or model."""
    for name in (str(tmp_path / "none"), "no name", "a/b/c"):
        with pytest.raises(UserError, match="no such folder") as refusal:
            huggingface.load(name)
        assert name in str(refusal.value)


# saving


def theirs_of(folder: Path) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.mark.parametrize("name", WIDTHS)
def test_exported_logits_match_transformers(tmp_path: Path, name: str) -> None:
    """Catches a matrix mixed up by save, even if load would mix it back."""
    n_embd, n_head = WIDTHS[name]
    model = make_ours(n_embd=n_embd, n_head=n_head, n_layer=1 if name == "gpt2-xl" else 2, gelu="tanh")
    save(tmp_path / "out", model)
    assert_same_logits(model, theirs_of(tmp_path / "out"))


@pytest.mark.parametrize("gelu", ["erf", "tanh"])
@pytest.mark.parametrize("bias", [True, False])
def test_round_trip_is_exact(tmp_path: Path, bias: bool, gelu: str) -> None:
    """Catches a weight, argument, activation or tokenizer changed by save and load."""
    model = make_ours(bias=bias, gelu=gelu)
    save(tmp_path / "out", model)
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


def test_trained_biases_are_kept(tmp_path: Path) -> None:
    """Catches biases that are dropped although transformers has trained them since the export."""
    save(tmp_path / "out", make_ours(bias=False))
    theirs = theirs_of(tmp_path / "out")
    randomize(theirs)
    theirs.save_pretrained(tmp_path / "trained")
    found = huggingface.load(str(tmp_path / "trained"))
    assert found.model_args["bias"] and found.tokenizer == TABLE.to_dict()
    assert_same_logits(build(found), theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_export_dtypes(tmp_path: Path, dtype: torch.dtype) -> None:
    """Catches weights in another dtype than asked for, and a config.json that does not name it."""
    from transformers import GPT2Config

    model = make_ours()
    save(tmp_path / "out", model, TABLE, dtype)
    assert {tensor.dtype for tensor in safetensors.torch.load_file(tmp_path / "out/model.safetensors").values()} == {dtype}
    assert theirs_of(tmp_path / "out").dtype == dtype
    assert GPT2Config.from_pretrained(tmp_path / "out").dtype == dtype
    found = huggingface.load(str(tmp_path / "out"))
    assert all(torch.equal(found.weights[name], tensor.to(dtype).float()) for name, tensor in model.state_dict().items())


def test_overflow_is_refused(tmp_path: Path) -> None:
    """Catches weights that silently overflow to infinity."""
    model = make_ours()
    model.transformer.ln_f.weight.data[0] = 1e5
    with pytest.raises(UserError, match=r"'transformer\.ln_f\.weight' has values too large for torch\.float16"):
        save(tmp_path / "out", model, TABLE, torch.float16)
    assert not (tmp_path / "out").exists()


def test_exported_character_table(tmp_path: Path) -> None:
    """Catches a character that transformers drops, normalizes, joins to another or maps to another id."""
    from transformers import AutoTokenizer

    save(tmp_path / "out", make_ours())
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    texts = [TEXT, TEXT[::-1], *TABLE.characters, " .", "a , b 's", "  \n\n  ", "e\u0301", ""]
    for text in texts:
        text = "".join(character for character in text if character in TABLE.characters)
        assert theirs(text)["input_ids"] == TABLE.encode(text)
        assert theirs.decode(TABLE.encode(text)) == text
    with pytest.raises(Exception, match="UNK"):
        theirs("Z")


def test_surrogates_are_refused(tmp_path: Path) -> None:
    """Catches a surrogate that ends in a traceback or an unreadable file."""
    tokenizer = CharTokenizer(["a", "\ud800"])
    with pytest.raises(UserError, match=r"'\\ud800', an unpaired surrogate"):
        save(tmp_path / "out", make_ours(tokenizer), tokenizer)


def test_exported_gpt2_tokenizer(tmp_path: Path, gpt2_vocabulary: None) -> None:
    """Catches padding rows that transformers could sample, and a vocabulary or merges other than GPT-2's."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    tokenizer = TiktokenTokenizer("gpt2")
    model = make_ours(tokenizer, gelu="tanh")
    assert model.config.vocab_size == 50304
    save(tmp_path / "out", model, tokenizer)
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


def test_gpt2_files_are_openais(gpt2_files: dict[str, str]) -> None:
    """Catches a vocabulary or merges that differ from OpenAI's published files."""
    published = {path.name: path.read_text(encoding="utf-8") for path in Path(os.environ["TIKTOKEN_CACHE_DIR"]).iterdir()}
    vocabularies = [json.loads(text) for text in published.values() if text.startswith("{")]
    assert json.loads(gpt2_files["vocab.json"]) in vocabularies
    assert gpt2_files["merges.txt"].splitlines() in [text.splitlines() for text in published.values()]
    assert huggingface.vocabulary_digest(json.loads(gpt2_files["vocab.json"])) == huggingface.GPT2_DIGEST


def assert_same_tokens(ours: TiktokenTokenizer, theirs: Any) -> None:
    """Assert the same tokens for real text and for random mixes of all the character classes that the pattern tells apart."""
    letters = " \n\r\t'sSdDlLveEabcÀé12345.,!/_\u00a0\u2003\u0301日\u3000\x0b\x85ǅʰ🙂"
    draw = random.Random(0)
    mixes = ["".join(draw.choice(letters) for _ in range(draw.randrange(1, 40))) for _ in range(300)]
    for text in (TEXT, "a<|endoftext|>\n", "x \n ", (ROOT / "model.py").read_text(encoding="utf-8"), *mixes):
        ids = ours.encode(text)
        assert theirs(text)["input_ids"] == ids, repr(text)
        assert theirs.decode(ids) == text


def test_other_encodings_are_refused(tmp_path: Path) -> None:
    """Catches an export whose tokens transformers would read differently."""
    tokenizer = TiktokenTokenizer("cl100k_base", 100277)
    with pytest.raises(UserError, match=r"must be a character table, gpt2 or a tokenizer.json .*, got cl100k_base"):
        save(tmp_path / "out", make_ours(tokenizer, n_embd=4), tokenizer)
    assert list(tmp_path.iterdir()) == []


def test_merges() -> None:
    """Catches merges that lead to other tokens than tiktoken's."""
    words = ["ab", "bc", "abc", "abcd", "cd", "aab", "aabb"]
    ranks = {bytes([byte]): byte for byte in range(256)} | {word.encode(): 256 + i for i, word in enumerate(words)}
    pairs = [(left.decode(), right.decode()) for left, right in huggingface._merges(ranks)]
    assert pairs == [("a", "b"), ("b", "c"), ("ab", "c"), ("abc", "d"), ("c", "d"), ("a", "ab"), ("aab", "b")]


def test_export_replaces_an_export(tmp_path: Path) -> None:
    """Catches files left over from an earlier export, or from one that was killed."""
    folder = tmp_path / "out"
    for n_embd in (32, 64):
        model = make_ours(n_embd=n_embd)
        save(folder, model)
        (tmp_path / "out.tmp").mkdir()
        shutil.copy(folder / "config.json", tmp_path / "out.tmp")
        (folder / "vocab.json").write_text("{}", encoding="utf-8")  # an export with GPT-2's tokenizer has this file
    save(folder, model)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not (folder / "vocab.json").exists()
    assert huggingface.load(str(folder)).model_args["n_embd"] == 64


def test_interrupted_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an interrupted export that leaves half a folder, or destroys the earlier one."""
    folder = tmp_path / "out"
    save(folder, make_ours())
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def killed(*arguments: Any, **more: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(safetensors.torch, "save_file", killed)
    with pytest.raises(KeyboardInterrupt):
        save(folder, make_ours(n_embd=64))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path / "new", make_ours())
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "files, message",
    [
        ({"ckpt.pt": "", "config.json": "{}"}, "holds 'ckpt.pt', which is not part of an export"),
        ({"README.md": "mine", "config.json": '{"nanogpt": {}}'}, "holds 'README.md', which is not part of an export"),
        ({"config.json": "{}", "model.safetensors": ""}, "export.py did not write"),
        ({"model.safetensors": ""}, "export.py did not write"),
        ({"config.json": "["}, "not a JSON file"),
    ],
)
@pytest.mark.parametrize("place", ["out", "out.tmp", "out.old"])
def test_export_replaces_nothing_else(tmp_path: Path, files: dict[str, str], message: str, place: str) -> None:
    """Catches an export that deletes someone's files."""
    (tmp_path / place).mkdir()
    for name, content in files.items():
        (tmp_path / place / name).write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=message) as refusal:
        save(tmp_path / "out", make_ours())
    assert str(tmp_path / place) in str(refusal.value)
    assert {path.name: path.read_text(encoding="utf-8") for path in (tmp_path / place).iterdir()} == files


def test_export_replaces_no_file(tmp_path: Path) -> None:
    """Catches an export that deletes a file, or tries to replace the root folder."""
    (tmp_path / "out").write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match="is not a folder; choose another"):
        save(tmp_path / "out", make_ours())
    with pytest.raises(UserError, match="a folder of its own"):
        save(Path("/"), make_ours())


# the Hub


class Hub(http.server.BaseHTTPRequestHandler):
    """The part of the Hub's API that a download needs; each model is a dictionary of files."""

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
    """The address of a local Hub, and the list of requests it has got so far."""
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
    """Run `load` on each name in a new process, since the Hub's library reads its settings on import.

    Returns [folder, sum of a tensor] or the error message of each.
    """
    ours = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_"))}
    ours |= {"NO_PROXY": "*", "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1"} | environment
    done = subprocess.run(
        [sys.executable, "-c", LOAD, *names],
        cwd=ROOT,
        env=ours,
        capture_output=True,
        encoding="utf-8",
        timeout=TIMEOUT_SECONDS,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_downloads(tmp_path: Path, hub: tuple[str, list[str]], original: Path) -> None:
    """Catches a download of the wrong files, a Hub error that ends in a traceback, and a cache that is not used."""
    url, asked = hub
    home = {"HF_HOME": str(tmp_path / "home")}
    names = ["gpt2", "owner/older", "owner/pieces", "owner/missing", "owner/gated", "owner/broken", "owner/empty"]
    found = load_in_a_process(*names, HF_ENDPOINT=url, HF_TOKEN="", **home)
    sums = [huggingface.load(str(original)).weights["transformer.wpe.weight"].sum().item()] * 3
    assert [total for _, total in found[:3]] == sums
    assert all(Path(folder).is_relative_to(tmp_path / "home") for folder, _ in found[:3])
    assert not any("gpt2/resolve" in path and ("bin" in path or "onnx" in path) for path in asked)
    assert f"owner/missing: no such folder here, and no such model at {url}/owner/missing" in found[3]
    assert f"owner/gated: the model is gated: request access at {url}/owner/gated" in found[4]
    assert "owner/broken: " in found[5] and "501" in found[5]
    assert "no weights in it" in found[6]

    asked.clear()
    names = ["huggingface", "owner/older", "owner/pieces", "gpt2-medium", "owner/missing"]
    offline = load_in_a_process(*names, HF_ENDPOINT=url, HF_HUB_OFFLINE="1", **home)
    assert offline[:3] == found[:3] and asked == []
    assert [line.partition(":")[0] for line in offline[3:]] == ["gpt2-medium", "owner/missing"]
    assert all("HF_HUB_OFFLINE is set: unset it once" in line for line in offline[3:])


def test_unreachable_hub(tmp_path: Path) -> None:
    """Catches a traceback, or an error without the cause, when the Hub cannot be reached."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, but not listening
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        (line,) = load_in_a_process("gpt2", HF_ENDPOINT=url, HF_HOME=str(tmp_path / "home"))
    assert "gpt2: not all of it is in " in line and f"{url}/openai-community/gpt2 cannot be reached" in line


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a full disk reported as a network failure, and a local folder that hides a GPT-2 name."""
    import huggingface_hub

    def full(*arguments: Any, **more: Any) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "gpt2").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    with pytest.raises(UserError, match=r"No space left on device\): set HF_HOME"):
        huggingface.load("gpt2")
