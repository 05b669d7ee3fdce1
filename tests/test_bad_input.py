"""What a person may do wrong: each gets one line on stderr that says what to do, status 1, and no traceback."""

import importlib.util
import pickle
import sys
from pathlib import Path

import pytest

import chat
import configurator
import export
import sample
import train
from data import corpus
from data.tokenizer import CharTokenizer

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
    ("train", "--dataset=nothing_here", "data/text/prepare.py"),
    ("train", "--dataset=TMP", "holds no train.bin"),
    ("train", f"{RUN} --block_size=100000", "--block_size="),
    ("train", f"{RUN} --dataset=TMP/odd", "no whole number of uint16 tokens"),
    ("train", f"{RUN} --dataset=TMP/beyond", "beyond the model's 2 tokens"),
    ("train", f"{RUN} --dataset=TMP/meta", "meta.json"),
    ("train", f"{RUN} --dataset=TMP/pickled", "could run code"),
    ("train", f"{RUN} --device=tpu", "cuda:<number>"),
    ("train", f"{RUN} --device=cuda:99", "CUDA devices here"),
    ("train", f"{RUN} --init_from=gpt2", "gpt2: not all of it is in"),
    ("train", f"{RUN} --init_from=someone/something", "HF_HUB_OFFLINE is set"),
    ("train", f"{RUN} --init_from=TMP/other_model", "model_type = 'llama'"),
    ("train", f"{RUN} --init_from=TMP", "no checkpoint in TMP"),
    ("train", f"{RUN} --init_from=TMP/binary.py", "not a checkpoint"),
    ("train", "--init_from=resume --out_dir=TMP/none", "no checkpoint in TMP/none"),
    ("train", f"{RUN} --out_dir=TMP/syntax.py", "TMP/syntax.py"),
    ("sample", "--out_dir=TMP/none", "no such folder"),
    ("sample", "--out_dir=TMP", "no checkpoint in TMP"),
    ("sample", "--out_dir=TMP/run --start=Bee7", "'7' (U+0037) at line 1, column 4"),
    ("sample", "--out_dir=TMP/run --start=FILE:TMP/nothing.txt", "TMP/nothing.txt"),
    ("sample", "--out_dir=TMP/run --start=FILE:TMP/binary.py", "not UTF-8"),
    ("sample", "--out_dir=TMP/run --temperature=-1", "at least 0"),
    ("sample", "--init_from=TMP/hostile.pt", "TMP/hostile.pt"),
    ("sample", "--init_from=TMP/empty.pt", "TMP/empty.pt"),
    ("sample", "--init_from=gpt2-medium", "gpt2-medium: not all of it is in"),
    ("sample", "--init_from=gpt5", "nor a name of GPT-2 weights"),
    ("sample", "--out_dir=TMP/run --top_p=0", "above 0 and at most 1"),
    ("sample", "--out_dir=TMP/run --num_samples=0", "at least 1"),
    ("chat", "--out_dir=TMP/none", "no such folder"),
    ("chat", "--out_dir=TMP/run --chat_format=alpaca", "plain, nanochatgpt or dialogpt"),
    ("chat", "--out_dir=TMP/run", "--chat_format=plain does not go with this model"),
    ("chat", "--out_dir=TMP/run --user_name=", "a name is one line of text"),
    ("chat", "--out_dir=TMP/run --context=FILE:TMP/nothing.txt", "TMP/nothing.txt"),
    ("export", "--out_dir=TMP/run", "--to=exported"),
    ("export", "--out_dir=TMP/run --to=TMP/run", "no part of an export"),
    ("export", "--out_dir=TMP/none --to=TMP/new", "no such folder"),
    ("data/chat/prepare", "--input=TMP/nothing", "TMP/nothing"),
    ("data/chat/prepare", "--input=TMP/syntax.py", "line 1"),
    ("data/chat/prepare", "--tokenizer=nothing_here", "nothing_here"),
    ("data/chat/prepare", "--chat_format=dialogpt", "<|endoftext|>"),
    ("data/text/prepare", "", "--input="),
    ("data/text/prepare", "--input=TMP/nothing", "no such file"),
    ("data/text/prepare", "--input=TMP/binary.py", "not UTF-8"),
    ("data/text/prepare", "--input=TMP/empty.pt", "no text in it"),
    ("data/text/prepare", "--input=TMP/syntax.py --name=../up", "--name=../up"),
    ("data/text/prepare", "--input=TMP/syntax.py --name=shakespeare", "another name"),
    ("data/text/prepare", "--input=TMP/syntax.py --tokenizer=word", "char, gpt2"),
    ("data/text/prepare", "--input=TMP/syntax.py --val_fraction=1", "below 1"),
    ("data/shakespeare_char/prepare", "--link=x", "unknown key 'link'"),
]


class Hostile:
    def __reduce__(self):
        return Path.touch, (Path("ran"),)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of things that are wrong, with one dataset, in data/, and one run, in run/, that are right."""
    tmp = tmp_path_factory.mktemp("bad")
    (tmp / "unknown_key.py").write_text("learning_rat = 1e-3\n")
    (tmp / "wrong_type.py").write_text("batch_size = 'twelve'\n")
    (tmp / "syntax.py").write_text("batch_size = 1\nif\n")
    (tmp / "exception.py").write_text("batch_size = 1\nmax_iters = 1 / 0\n")
    (tmp / "binary.py").write_bytes(bytes(range(255, 0, -1)))
    (tmp / "hostile.pt").write_bytes(pickle.dumps({"model": Hostile()}, protocol=2))
    (tmp / "empty.pt").write_bytes(b"")
    (tmp / "other_model").mkdir()
    (tmp / "other_model" / "config.json").write_text('{"model_type": "llama"}')
    (tmp / "other_model" / "model.safetensors").write_bytes(b"")
    tokenizer = CharTokenizer(["B", "e"])
    for name in ("data", "odd", "beyond", "meta", "pickled"):
        corpus.write_dataset(tmp / name, ["Be" * 200], ["eB" * 50], tokenizer, "two letters")
    (tmp / "beyond" / "train.bin").write_bytes(b"\x07" * 400)
    (tmp / "meta" / "meta.json").write_text("[]")
    for name in ("odd", "pickled"):
        (tmp / name / "meta.json").unlink()
        (tmp / name / "meta.pkl").write_bytes(pickle.dumps({"itos": {0: "B", 1: "e"}}))
    (tmp / "odd" / "val.bin").write_bytes(b"\x00" * 99)
    (tmp / "pickled" / "meta.pkl").write_bytes(pickle.dumps(Hostile()))
    train.main(
        configurator.parse(
            train.Config, f"{RUN} --out_dir=TMP/run".replace("DATA", "TMP/data").replace("TMP", str(tmp)).split()
        )
    )
    return tmp


@pytest.mark.parametrize(("script", "arguments", "words"), TABLE)
def test_a_mistake_gets_one_line(
    script: str, arguments: str, words: str, folder: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    """Catches a traceback, a message that does not say what is wrong, and a wrong input that is taken."""
    if "/" in script:
        spec = importlib.util.spec_from_file_location("prepare", ROOT / f"{script}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "prepare", module)
        spec.loader.exec_module(module)
    else:
        module = {"train": train, "sample": sample, "chat": chat, "export": export}[script]
    given = arguments.replace("DATA", "TMP/data").replace("TMP", str(folder)).split()
    monkeypatch.setattr("sys.argv", [f"{script}.py", *given])
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        configurator.run(module.main, module.Config)
    error = capsys.readouterr().err
    assert caught.value.code == 1
    assert error.count("\n") == 1 and ": error: " in error, error
    assert words.replace("TMP", str(folder)) in error
    assert list(tmp_path.iterdir()) == []  # no run began, and no code of a file ran
