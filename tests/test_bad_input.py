"""User mistakes: each gets one line on stderr that says what to do, exit status 1, and no traceback."""

import importlib.util
import json
import pickle
import random
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import configurator

import pytest
import torch
from conftest import run_train

import chat
import export
import plot
import sample
import train
from nanogpt import corpus, errors
from nanogpt.distributed import Group
from nanogpt.run import lock_folder
from nanogpt.tokenizer import CharTokenizer

ROOT = Path(__file__).resolve().parents[1]
MODEL = "--n_layer=1 --n_head=2 --n_embd=16 --block_size=16 --batch_size=2 --gradient_accumulation_steps=1 --device=cpu"
RUN = f"{MODEL} --max_iters=2 --eval_iters=1 --eval_interval=1 --dataset=DATA"

TABLE = [
    ("train", "--batch_size=0", "must be at least 1"),
    ("train", "--batch_size=many", "not a whole number"),
    ("train", "--batch_size=1.5", "not a whole number"),
    ("train", "--batch_size", "--batch_size=..."),
    ("train", "batch_size=4", "--batch_size=4"),
    ("train", "-batch_size=4", "two dashes"),
    ("train", "--batch=4", "did you mean --batch_size"),
    ("train", "--dropout=2", "below 1"),
    ("train", "--learning_rate=nan", "not a number"),
    ("train", "--eval_only=perhaps", "not True or False"),
    ("train", "--dtype=int8", "float32, bfloat16 or float16"),
    ("train", "--compile=maybe", "True, False or auto"),
    ("train", "--seed=-1", "at least 0"),
    ("train", "--n_head=5", "n_head=5 does not divide n_embd=768"),
    ("train", "--out_dir=", "name the folder"),
    ("train", "config/train_gpt3.py", "did you mean config/train_gpt2.py"),
    ("train", "TMP/unknown_key.py", "did you mean learning_rate"),
    ("train", "TMP/wrong_type.py", "not a whole number"),
    ("train", "TMP/syntax.py", "line 2"),
    ("train", "TMP/exception.py", "line 2: ZeroDivisionError"),
    ("train", "TMP/binary.py", "TMP/binary.py"),
    ("train", "TMP/run", "--init_from=resume --out_dir=TMP/run continues a run, --init_from=TMP/run starts from its weights"),
    ("train", "TMP/run/ckpt.pt", "--init_from=TMP/run/ckpt.pt"),
    ("train", "--dataset=nothing_here", "data/text/prepare.py"),
    ("train", "--dataset=TMP", "no train.bin in"),
    ("train", f"{RUN} --block_size=100000", "--block_size="),
    ("train", "--init_from=resume --out_dir=out", "no run is here"),
    ("train", f"{RUN} --dataset=TMP/odd", "not a whole number of uint16 tokens"),
    ("train", f"{RUN} --dataset=TMP/beyond", "below the model's vocabulary size 2"),
    ("train", f"{RUN} --dataset=TMP/meta", "meta.json"),
    ("train", f"{RUN} --dataset=TMP/pickled", "could run code"),
    ("train", f"{RUN} --dataset=TMP/empty", "val.bin is damaged"),
    ("train", f"{RUN} --dataset=TMP/half", "no val.bin in"),
    ("train", f"{RUN} --dataset=TMP/cut", "train.bin is damaged"),
    ("train", f"{RUN} --dataset=TMP/mask", "train.mask.bin is damaged"),
    ("train", f"{RUN} --dataset=TMP/wide", "dtype 'int64'"),
    ("train", f"{RUN} --dataset=TMP/other_size", "vocab_size 3"),
    ("train", f"{RUN} --dataset=TMP/random_meta", "meta.json"),
    ("train", f"{RUN} --dataset=TMP/cut_meta", "meta.json"),
    ("train", f"{RUN} --dataset=TMP/empty_meta", "meta.json"),
    ("train", f"{RUN} --dataset=TMP/deep_meta", "meta.json"),
    ("train", f"{RUN} --dataset=TMP/characters", "meta.json"),
    ("train", f"{RUN} --dataset=TMP/kind", "meta.json"),
    ("train", f"{RUN} --dataset=TMP/cut_pickle", "meta.pkl"),
    ("train", f"{RUN} --dataset=TMP/random_pickle", "meta.pkl"),
    ("train", f"{RUN} --dataset=TMP/empty_pickle", "meta.pkl"),
    ("train", f"{RUN} --dataset=TMP/other_pickle", "meta.pkl"),
    ("train", f"{RUN} --n_embd=4194304 --n_head=1 --block_size=1", "out of memory: lower --batch_size (now 2)"),
    ("train", f"{RUN} --device=tpu", "cuda:<number>"),
    ("train", f"{RUN} --device=cuda:99", "CUDA devices; try --device=auto"),
    ("train", f"{RUN} --init_from=gpt2", "gpt2: not all of it is in"),
    ("train", f"{RUN} --init_from=someone/something", "HF_HUB_OFFLINE is set"),
    ("train", f"{RUN} --init_from=TMP/other_model", "model_type must be 'gpt2', got 'llama'"),
    ("train", f"{RUN} --init_from=TMP", "no checkpoint in TMP"),
    ("train", f"{RUN} --init_from=TMP/binary.py", "not a checkpoint"),
    ("train", f"{RUN} --init_from=TMP/cut.pt", "TMP/cut.pt: not a checkpoint, or damaged"),
    ("train", f"{RUN} --init_from=TMP/random.pt", "TMP/random.pt: refused: not a checkpoint"),
    ("train", f"{RUN} --init_from=TMP/hostile_zip.pt", "TMP/hostile_zip.pt: refused: it names"),
    ("train", f"{RUN} --init_from=TMP/weights.pt", "TMP/weights.pt: weights without model_args, which do not tell n_head"),
    ("train", f"{RUN} --init_from=TMP/shape.pt", "is (3, 3), but its model_args need"),
    ("train", f"{RUN} --init_from=TMP/run --dataset=TMP/three", "another tokenizer"),
    ("train", "--init_from=resume --out_dir=TMP/none", "no such folder"),
    ("train", "--init_from=resume --out_dir=TMP/run --dataset=TMP/three", "another tokenizer"),
    ("train", "--init_from=resume --out_dir=TMP/run --dataset=gone", "dataset 'gone'"),
    ("train", "--init_from=resume --out_dir=TMP/typed_run", "max_iters = 'many': not a whole number"),
    ("train", "--init_from=resume --out_dir=TMP/moments_run", "its optimizer state does not fit"),
    ("train", "--init_from=resume --out_dir=TMP/stale_run", "'stale' is 'two'"),
    ("train", "--init_from=resume --out_dir=TMP/wandb_run", "its wandb is 7"),
    ("train", "--sample_interval=-1", "at least 0"),
    ("train", "--init_from=resume --out_dir=TMP/folder_run", "no checkpoint in TMP/folder_run"),
    ("train", "--init_from=resume --out_dir=TMP/cut_run", "remove that file to resume from TMP/cut_run/ckpt.pt"),
    ("train", "--init_from=resume --out_dir=TMP/lived_in --max_iters=9", "another run uses TMP/lived_in"),
    ("train", f"{RUN} --out_dir=TMP/syntax.py", "TMP/syntax.py: cannot write there"),
    ("train", f"{RUN} --out_dir=TMP/syntax.py/out", "TMP/syntax.py/out: cannot write there"),
    ("train", "--patience=-1", "at least 0"),
    ("train", "--checkpoint_interval=0.5", "not a whole number"),
    ("train", "--checkpoint_minutes=soon", "not a number"),
    ("train", "--init_from", "--init_from=..."),
    ("sample", "--out_dir=TMP/none", "no such folder"),
    ("sample", "--out_dir=TMP", "no checkpoint in TMP"),
    ("sample", "", "no run is here"),
    ("sample", "TMP/none", "--init_from=TMP/none: no such run folder or checkpoint file"),
    ("sample", "num_samples=2", "--num_samples=2"),
    ("sample", "config/train_gpt3.py", "did you mean config/train_gpt2.py"),
    ("data/text/prepare", "TMP/nothing.txt", "--input=TMP/nothing.txt: no such file or folder"),
    ("sample", "--out_dir=TMP/run --start=Bee7", "'7' (U+0037) at line 1, column 4"),
    ("sample", "--out_dir=TMP/run --start=FILE:TMP/nothing.txt", "TMP/nothing.txt"),
    ("sample", "--out_dir=TMP/run --start=FILE:TMP/binary.py", "not UTF-8"),
    ("sample", "--out_dir=TMP/run --temperature=-1", "at least 0"),
    ("sample", "--init_from=TMP/hostile.pt", "TMP/hostile.pt"),
    ("sample", "--init_from=TMP/empty.pt", "TMP/empty.pt"),
    ("sample", "--init_from=gpt2-medium", "gpt2-medium: not all of it is in"),
    ("sample", "--init_from=gpt5", "nor a name of GPT-2 weights"),
    ("sample", "--out_dir=TMP/run --top_p=0", "above 0 and at most 1"),
    ("chat", "--out_dir=TMP/none", "no such folder"),
    ("chat", "--out_dir=TMP/run --chat_format=alpaca", "plain, lines, nanochatgpt or dialogpt"),
    ("chat", "--out_dir=TMP/run", "--chat_format=plain does not go with this model"),
    ("chat", "--out_dir=TMP/run --user_name=", "--user_name must be one line of text"),
    ("chat", "--out_dir=TMP/run --context=FILE:TMP/nothing.txt", "TMP/nothing.txt"),
    ("export", "--out_dir=TMP/run", "--to=exported"),
    ("export", "--out_dir=TMP/run --to=TMP/run", "not part of an export"),
    ("export", "--out_dir=TMP/none --to=TMP/new", "no such folder"),
    ("plot", "", "out: no such file"),
    ("sample", "TMP/run TMP/none", "only one init_from is taken"),
    ("plot", "TMP/run TMP/none", "TMP/none: no such file"),
    ("plot", "--out_dir=TMP/data", "TMP/data/metrics.csv: no such file"),
    ("plot", "--runs=TMP/random.pt", "TMP/random.pt: no losses in it"),
    ("plot", "TMP/cut.pt", "TMP/cut.pt: no losses in it"),
    ("plot", "TMP/run --out=loss.jpg", "--out must end in .png or .svg, got loss.jpg"),
    ("plot", "TMP/run --out=TMP/none/loss.png", "--out=TMP/none/loss.png: no such folder"),
    ("plot", "TMP/run --x=hours", "iterations, tokens or seconds"),
    ("plot", "-x TMP/run", "flags start with two dashes"),
    ("data/chat/prepare", "--input=TMP/nothing", "TMP/nothing"),
    ("data/chat/prepare", "--input=TMP/syntax.py", "line 1"),
    ("data/chat/prepare", "--tokenizer=nothing_here", "nothing_here"),
    ("data/chat/prepare", "--chat_format=dialogpt", "<|endoftext|>"),
    ("sample", "--init_from=TMP/cut.pt", "TMP/cut.pt: not a checkpoint, or damaged"),
    ("sample", "--init_from=TMP/random.pt", "TMP/random.pt: refused: not a checkpoint"),
    ("sample", "--init_from=TMP/hostile_zip.pt", "TMP/hostile_zip.pt: refused: it names"),
    ("sample", "--init_from=TMP/weights.pt", "'n_layer': 1, 'n_head': ?, 'n_embd': 16, 'block_size': 16, 'bias': "),
    ("sample", "--init_from=TMP/other.pt", "TMP/other.pt: not a checkpoint: it has no 'model'"),
    ("sample", "--init_from=TMP/rope.pt", "its model_args have use_rope=True, which this model does not know"),
    ("sample", "--init_from=TMP/head.pt", "'lm_head.weight' differs from the token embedding"),
    ("sample", "--init_from=TMP/nan.pt", "'transformer.ln_f.weight' has weights that are NaN or infinite"),
    ("chat", "--init_from=TMP/nan.pt", "'transformer.ln_f.weight' has weights that are NaN or infinite"),
    ("export", "--init_from=TMP/nan.pt --to=TMP/new", "'transformer.ln_f.weight' has weights that are NaN or infinite"),
    ("train", f"{RUN} --init_from=TMP/nan.pt", "'transformer.ln_f.weight' has weights that are NaN or infinite"),
    ("train", "--init_from=resume --out_dir=TMP/alone_run", "TMP/alone_run/ckpt.pt: no iter_num in it to resume from"),
    ("sample", "--init_from=TMP/lora", "TMP/lora: a LoRA adapter, not a whole model; merge it in Python first"),
    ("train", f"{RUN} --init_from=TMP/lora", "merge_and_unload().save_pretrained('merged'), then --init_from=merged"),
    ("sample", "--init_from=TMP/other_model/model.safetensors", "takes its folder: --init_from=TMP/other_model"),
    ("sample", "--init_from=TMP/alone.safetensors", "once the model's config.json is in it: --init_from=TMP"),
    ("sample", "--init_from=TMP/shape.pt", "is (3, 3), but its model_args need"),
    ("sample", "--init_from=TMP/layers.pt", "n_layer=4,096"),
    ("sample", "--init_from=TMP/tokenizer.pt", "TMP/tokenizer.pt: damaged"),
    ("sample", "--init_from=TMP/nanogpt.pt", "TMP/nanogpt.pt: its tokenizer"),
    ("sample", "--init_from=TMP/run/metrics.csv", "metrics.csv: refused: not a checkpoint"),
    ("sample", "--out_dir=TMP/syntax.py", "no such folder"),
    ("sample", "--out_dir=TMP/run --start=FILE:", "Is a directory"),
    ("sample", "--out_dir=TMP/run --num_samples=0", "at least 1"),
    ("sample", "--out_dir=TMP/run --top_k=-1", "at least 0"),
    ("sample", "--out_dir=TMP/run --device=cuda:99", "CUDA devices; try --device=auto"),
    ("data/text/prepare", "", "--input="),
    ("data/text/prepare", "--input=TMP/nothing", "no such file"),
    ("data/text/prepare", "--input=TMP/binary.py", "not UTF-8"),
    ("data/text/prepare", "--input=TMP/empty.pt", "no text in it"),
    ("data/text/prepare", "--input=TMP/syntax.py --name=../up", "--name=../up"),
    ("data/text/prepare", "--input=TMP/syntax.py --name=shakespeare", "another name"),
    ("data/text/prepare", "--input=TMP/syntax.py --tokenizer=word", "char, bytes, bpe:1024"),
    ("data/text/prepare", "--input=TMP/syntax.py --val_fraction=1", "below 1"),
    ("data/text/prepare", "--input=TMP/hostile.pt", "not text"),
    ("data/text/prepare", "--input=TMP/one.txt", "too short"),
    ("data/shakespeare_char/prepare", "--link=x", "unknown key 'link'"),
    ("data/shakespeare/prepare", "--url", "--url"),
    ("data/python_char/prepare", "--input=x", "unknown key 'input'"),
]


class Hostile:
    def __reduce__(self):
        return Path.touch, (Path("ran"),)


NOISE = random.Random(1).randbytes(3000)
FILES = {  # datasets with one wrong file: its name, and its content or None for no file
    "empty": ("val.bin", b""),
    "half": ("val.bin", None),
    "cut": ("train.bin", b"\0" * 399),
    "mask": ("train.mask.bin", b"\1" * 399),
}
META = {  # datasets with a wrong meta.json: the keys that are changed, or the whole file
    "wide": {"dtype": "int64"},
    "other_size": {"vocab_size": 3},
    "characters": {"tokenizer": {"kind": "char", "characters": ["B", 7]}},
    "kind": {"tokenizer": {"kind": "words"}},
    "random_meta": NOISE,
    "cut_meta": b'{"dtype": "uint8", "voc',
    "empty_meta": b"",
    "deep_meta": b"[" * 100_000,
}
PICKLES = {  # datasets with nanoGPT's meta.pkl in place of meta.json
    "cut_pickle": pickle.dumps({"itos": {0: "B", 1: "e"}})[:-5],
    "random_pickle": NOISE,
    "empty_pickle": b"",
    "other_pickle": pickle.dumps([1, 2, 3]),
}
STATES = {  # checkpoints with one wrong value: the keys that lead to it, and the value
    "shape": ("model", "transformer.h.0.mlp.c_fc.weight", torch.zeros(3, 3)),
    "layers": ("model_args", "n_layer", 4096),
    "tokenizer": ("extra", "tokenizer", {"kind": "char", "characters": ["B", "B"]}),
    "typed_run": ("config", "max_iters", "many"),
    "moments_run": ("optimizer", "state", 0, "exp_avg", torch.zeros(3)),
    "rope": ("model_args", "use_rope", True),
    "head": ("model", "lm_head.weight", torch.zeros(2, 16)),
    "nan": ("model", "transformer.ln_f.weight", torch.full((16,), torch.nan)),
    "stale_run": ("extra", "stale", "two"),
    "wandb_run": ("extra", "wandb", 7),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder of broken files, with one good dataset, in data/, and one good run, in run/."""
    tmp = tmp_path_factory.mktemp("bad")
    (tmp / "unknown_key.py").write_text("learning_rat = 1e-3\n", encoding="utf-8")
    (tmp / "wrong_type.py").write_text("batch_size = 'twelve'\n", encoding="utf-8")
    (tmp / "syntax.py").write_text("batch_size = 1\nif\n", encoding="utf-8")
    (tmp / "exception.py").write_text("batch_size = 1\nmax_iters = 1 / 0\n", encoding="utf-8")
    (tmp / "binary.py").write_bytes(bytes(range(254, 0, -1)))
    (tmp / "hostile.pt").write_bytes(pickle.dumps({"model": Hostile()}, protocol=2))
    (tmp / "empty.pt").write_bytes(b"")
    (tmp / "other_model").mkdir()
    (tmp / "other_model" / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    (tmp / "other_model" / "model.safetensors").write_bytes(b"")
    (tmp / "lora").mkdir()
    (tmp / "lora" / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "base_model_name_or_path": "gpt2"}', encoding="utf-8"
    )
    (tmp / "lora" / "adapter_model.safetensors").write_bytes(b"")
    (tmp / "alone.safetensors").write_bytes(b"")
    (tmp / "one.txt").write_text("e", encoding="utf-8")
    (tmp / "random.pt").write_bytes(NOISE)
    tokenizer = CharTokenizer(["B", "e"])
    for name in ("data", "odd", "beyond", "meta", "pickled", *FILES, *META, *PICKLES):
        corpus.write_dataset(tmp / name, ["Be" * 200], ["eB" * 50], tokenizer, "two letters")
    (tmp / "beyond" / "train.bin").write_bytes(b"\x07" * 400)
    (tmp / "meta" / "meta.json").write_text("[]", encoding="utf-8")
    for name in ("odd", "pickled"):
        (tmp / name / "meta.json").unlink()
        (tmp / name / "meta.pkl").write_bytes(pickle.dumps({"itos": {0: "B", 1: "e"}}))
    (tmp / "odd" / "val.bin").write_bytes(b"\x00" * 99)
    (tmp / "pickled" / "meta.pkl").write_bytes(pickle.dumps(Hostile()))
    for name, (file, content) in FILES.items():
        if content is None:
            (tmp / name / file).unlink()
        else:
            (tmp / name / file).write_bytes(content)
    for name, content in META.items():
        good = json.loads((tmp / name / "meta.json").read_text(encoding="utf-8"))
        text = json.dumps(good | content) if isinstance(content, dict) else content
        (tmp / name / "meta.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    for name, content in PICKLES.items():
        (tmp / name / "meta.json").unlink()
        (tmp / name / "meta.pkl").write_bytes(content)
    corpus.write_dataset(tmp / "three", ["Bea" * 100], ["eBa" * 30], CharTokenizer(["B", "a", "e"]), "three letters")
    run_train(*(flag.replace("DATA", str(tmp / "data")) for flag in RUN.split()), f"--out_dir={tmp / 'run'}")
    whole = (tmp / "run" / "ckpt.pt").read_bytes()
    (tmp / "cut.pt").write_bytes(whole[: len(whole) // 2])
    torch.save({"model": {"a": Hostile()}}, tmp / "hostile_zip.pt")
    state = torch.load(tmp / "run" / "ckpt.pt")
    torch.save(state["model"], tmp / "weights.pt")
    torch.save({"state_dict": state["model"], "epoch": 3}, tmp / "other.pt")
    (tmp / "alone_run").mkdir()
    torch.save({"model": state["model"], "model_args": state["model_args"]}, tmp / "alone_run" / "ckpt.pt")
    for name, (*keys, key, value) in STATES.items():
        state = torch.load(tmp / "run" / "ckpt.pt")
        part = state
        for outer in keys:
            part = part[outer]
        part[key] = value
        path = tmp / name / "last.pt" if name.endswith("_run") else tmp / f"{name}.pt"
        path.parent.mkdir(exist_ok=True)
        torch.save(state, path)
    state = torch.load(tmp / "run" / "ckpt.pt")
    del state["extra"]  # as in nanoGPT's checkpoints, whose tokenizer is the dataset's
    state["config"]["dataset"] = "gone"
    torch.save(state, tmp / "nanogpt.pt")
    (tmp / "folder_run" / "last.pt").mkdir(parents=True)
    (tmp / "cut_run").mkdir()
    (tmp / "cut_run" / "last.pt").write_bytes(whole[:-100])
    (tmp / "cut_run" / "ckpt.pt").write_bytes(whole)
    shutil.copytree(tmp / "run", tmp / "lived_in")
    with lock_folder(tmp / "lived_in", Group()):
        yield tmp


@pytest.mark.parametrize(("script", "arguments", "words"), TABLE)
def test_mistake_is_one_line(
    script: str, arguments: str, words: str, folder: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    """Catches a traceback, a message that does not say what is wrong, and wrong input that is accepted."""
    if "/" in script:
        spec = importlib.util.spec_from_file_location("prepare", ROOT / f"{script}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "prepare", module)
        spec.loader.exec_module(module)
    else:
        module = {"train": train, "sample": sample, "chat": chat, "export": export, "plot": plot}[script]
    given = [word.replace("DATA", "TMP/data").replace("TMP", str(folder)) for word in arguments.split()]
    monkeypatch.setattr("sys.argv", [f"{script}.py", *given])
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        configurator.run(module.main, module.Config)
    error = capsys.readouterr().err
    assert caught.value.code == 1
    assert error.count("\n") == 1 and ": error: " in error, error
    unquoted = words.replace("TMP", str(folder)).replace("'", "")  # printed commands quote a path with spaces
    assert unquoted in error.replace("'", "")
    assert list(tmp_path.iterdir()) == []  # no run started, and no code in a file ran


@pytest.mark.parametrize("script", [sample, chat])
def test_out_of_memory_is_one_line(script, monkeypatch) -> None:
    """Catches a traceback if the model or the number of samples is too large for the machine."""

    def load(*arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8 GiB")

    monkeypatch.setattr("nanogpt.checkpoint.load_model", load)
    for _ in range(2):
        with pytest.raises(errors.UserError, match=r"out of memory: .*--dtype=bfloat16"):
            script.main(configurator.parse(script.Config, ["--device=cpu", "--dtype=float32"]))
