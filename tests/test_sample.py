"""sample.py: prompts, printed texts, seeds, and sampling from nothing but a checkpoint."""

import os
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import configurator

import numpy as np
import pytest
import torch
from conftest import run_train

import chat
import export
import sample
import train
from model import GPT, Bigram, GPTConfig
from nanogpt import checkpoint
from nanogpt.errors import UserError
from nanogpt.tokenizer import CharTokenizer, IdTokenizer, TableTokenizer, TiktokenTokenizer, Tokenizer

TABLE = CharTokenizer(list("abcdefghij\n"))
LINE = "---------------\n"


class Words:
    """An encoding of forty words and an end-of-text token, instead of a vocabulary that needs a download."""

    n_vocab = 41
    eot_token = 40

    def encode(self, text: str, **special: Any) -> list[int]:
        return [int(word) for word in text.split()]

    def decode_single_token_bytes(self, token: int) -> bytes:
        return f"{token} ".encode()


@pytest.fixture
def words(monkeypatch: pytest.MonkeyPatch) -> TiktokenTokenizer:
    monkeypatch.setattr(TiktokenTokenizer, "_encoding", Words())
    return TiktokenTokenizer("gpt2", Words.n_vocab)


def write(out_dir: Path, tokenizer: Tokenizer, kind: type = GPT, **weights: torch.Tensor) -> Path:
    """Write a run folder with the checkpoint of a small random model, with these weights replaced; return the folder."""
    torch.manual_seed(1)
    shape = {"block_size": 8, "n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": tokenizer.model_vocab_size}
    model = kind(GPTConfig(**shape))
    model.load_state_dict(model.state_dict() | weights)
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    state = checkpoint.pack(model, optimizer, 10, 2.5, {"dataset": "gone"}, {"tokenizer": tokenizer.to_dict()})
    out_dir.mkdir()
    checkpoint.save(out_dir / checkpoint.BEST, state)
    return out_dir


@pytest.fixture
def out_dir(tmp_path: Path) -> Path:
    return write(tmp_path / "out", TABLE)


@pytest.fixture
def texts(capsys: pytest.CaptureFixture[str]):
    """A function that runs sample.py with these flags and returns the printed texts."""

    def run(**flags: Any) -> list[str]:
        flags = {"device": "cpu"} | flags
        sample.main(configurator.parse(sample.Config, [f"--{key}={value}" for key, value in flags.items()]))
        *found, rest = capsys.readouterr().out.split("\n" + LINE)
        assert rest == ""
        return found

    return run


@pytest.mark.parametrize(
    "prompt, given, ids",
    [
        ("\n", False, [10]),  # the default
        ("abba", True, [0, 1, 1, 0]),
        ("a\nb", True, [0, 10, 1]),
        ("", True, [10]),  # an empty prompt becomes a line break
    ],
)
def test_character_prompt(prompt, given, ids):
    """Catches a prompt that is changed, and an empty one without ids."""
    assert sample.read_prompt(prompt, given, TABLE) == (prompt, ids)


@pytest.mark.parametrize("prompt, given", [("\n", False), ("", True)])
def test_prompt_without_a_line_break(prompt, given):
    """Catches an error about the default prompt, which nobody asked for."""
    assert sample.read_prompt(prompt, given, CharTokenizer(list("abc"))) == ("", [0])


@pytest.mark.parametrize("prompt, given, ids", [("3 1", True, [3, 1]), ("", True, [40])])
def test_encoded_prompt(words, prompt, given, ids):
    """Catches an empty prompt that is not the end-of-text token, or that prints it."""
    assert sample.read_prompt(prompt, given, words) == (prompt, ids)


@pytest.mark.parametrize(
    "tokenizer, prompt, given, expected",
    [
        (IdTokenizer(50), "12 7", True, ("12 7", [12, 7])),
        (IdTokenizer(50), "\n", False, ("", [0])),
        (IdTokenizer(50), "", True, ("", [0])),
        (TableTokenizer(["to", " be", "\n", "\n\n"]), "to be", True, ("to be", [0, 1])),
        (TableTokenizer(["to", " be", "\n", "\n\n"]), "", True, ("", [2])),
        (TableTokenizer(["to", " be"]), "\n", False, ("", [0])),
    ],
)
def test_prompt_of_other_tables(tokenizer, prompt, given, expected):
    """Catches a default prompt that a table of strings or ids refuses, or a prompt that is printed but not seen."""
    assert sample.read_prompt(prompt, given, tokenizer) == expected


def train_on_ids(folder: Path, out_dir: Path, **meta: Any) -> None:
    """Train a tiny model on a dataset of ids below 20 with a fork's meta.pkl, and remove the dataset."""
    folder.mkdir()
    for split in ("train", "val"):
        (np.arange(200) % 20).astype("<u2").tofile(folder / f"{split}.bin")
    (folder / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 20} | meta))
    flags = "--device=cpu --n_layer=1 --n_head=1 --n_embd=8 --block_size=8 --batch_size=2 --max_iters=2 --eval_iters=1"
    run_train(*flags.split(), "--sample_interval=1", f"--dataset={folder}", f"--out_dir={out_dir}")
    shutil.rmtree(folder)


def test_run_on_ids_without_text(tmp_path, texts, capsys):
    """Catches a fork's dataset with vocab_size alone that does not train or sample, or a chat or export of it."""
    run = tmp_path / "run"
    train_on_ids(tmp_path / "ids", run)
    assert "(20 token ids without text)" in capsys.readouterr().out
    (text,) = texts(init_from=run, start="3 4", num_samples=1, max_new_tokens=5)
    assert text.startswith("3 4 ") and len(ids := [int(word) for word in text.split()]) == 7 and max(ids) < 20
    (text,) = texts(init_from=run, num_samples=1, max_new_tokens=5)
    assert len(text.split()) == 5
    with pytest.raises(UserError, match=r"--start: these tokens have no text: write ids below 20.*'ROMEO:'"):
        texts(init_from=run, start="ROMEO:")
    with pytest.raises(UserError, match=r"does not go with this model: these tokens have no text"):
        chat.main(configurator.parse(chat.Config, [f"--init_from={run}", "--device=cpu"]))
    with pytest.raises(UserError, match=r"to be exported, got 20 token ids without text"):
        export.main(configurator.parse(export.Config, [f"--init_from={run}", f"--to={tmp_path / 'exported'}"]))


def test_run_on_a_table_of_strings(tmp_path, texts, capsys):
    """Catches a fork's dataset of words whose table is lost in the checkpoint, or cut into characters."""
    run, itos = tmp_path / "run", [f"w{i} " for i in range(20)]
    train_on_ids(tmp_path / "ids", run, itos=itos)
    assert "(20 strings)" in capsys.readouterr().out
    (text,) = texts(init_from=run, start="w3 w14 ", num_samples=1, max_new_tokens=5)
    assert text.startswith("w3 w14 w") and len(text.split()) == 7 and set(text.split()) <= {word.strip() for word in itos}


@pytest.mark.parametrize("content, ids", [("abba", [0, 1, 1, 0]), ("ab\n", [0, 1, 10]), ("", [10])])
def test_prompt_from_a_file(tmp_path, content, ids):
    """Catches a file name used as the prompt, and a line break added or lost."""
    (tmp_path / "prompt.txt").write_bytes(content.encode())
    assert sample.read_prompt(f"FILE:{tmp_path / 'prompt.txt'}", True, TABLE) == (content, ids)


@pytest.mark.parametrize("content, named", [("abZa", ("'Z'", "column 3")), ("a\n\u00e9", ("'\u00e9'", "line 2"))])
def test_unknown_character_is_named(tmp_path, content, named):
    """Catches a KeyError, and a prompt that silently loses unknown characters."""
    (tmp_path / "prompt.txt").write_text(content, encoding="utf-8")
    for prompt in (content, f"FILE:{tmp_path / 'prompt.txt'}"):
        with pytest.raises(UserError, match="--start") as caught:
            sample.read_prompt(prompt, True, TABLE)
        assert all(part in str(caught.value) for part in named) and "\n" not in str(caught.value)


def test_printed_form(out_dir, capsys):
    """Catches output other than nanoGPT's: prompt and continuation, then a line of dashes, for each sample."""
    flags = [f"--out_dir={out_dir}", "--start=abc", "--num_samples=3", "--max_new_tokens=5", "--device=cpu", "--dtype=float32"]
    sample.main(configurator.parse(sample.Config, flags))
    output = capsys.readouterr().out
    assert output.count(LINE) == 3 and output.endswith("\n" + LINE)
    printed = output.split("\n" + LINE)[:-1]
    assert [(text[:3], len(text)) for text in printed] == [("abc", 8)] * 3


def test_dataset_is_not_needed(tmp_path, dataset, texts, capsys, monkeypatch):
    """Catches a checkpoint that needs its dataset, or the folder in which training was started."""
    flags = {"dataset": dataset, "out_dir": tmp_path / "run", "max_iters": 1, "device": "cpu", "n_layer": 1, "n_head": 1}
    flags |= {"n_embd": 8, "block_size": 8, "batch_size": 2, "gradient_accumulation_steps": 1, "eval_iters": 1}
    train.main(configurator.parse(train.Config, [f"--{key}={value}" for key, value in flags.items()]))
    shutil.rmtree(dataset)
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    (text,) = texts(out_dir="run", start="7 plus", num_samples=1, max_new_tokens=20)
    assert text.startswith("7 plus") and len(text) == 26
    assert set(text) <= set("0123456789 plusi.\n")


@pytest.mark.parametrize("name", ["out", "out/ckpt.pt"])
def test_init_from_folder_or_file(out_dir, texts, monkeypatch, name):
    """Catches a run folder or a checkpoint file that init_from does not accept."""
    monkeypatch.chdir(out_dir.parent)
    flags = {"num_samples": 2, "max_new_tokens": 20}
    assert texts(init_from=name, **flags) == texts(out_dir="out", **flags)


def test_seed(out_dir, texts):
    """Catches samples that a seed does not reproduce, and samples or seeds that all give the same text."""
    first = texts(out_dir=out_dir, seed=3, num_samples=2, max_new_tokens=50)
    torch.rand(3)
    assert texts(out_dir=out_dir, seed=3, num_samples=2, max_new_tokens=50) == first
    assert texts(out_dir=out_dir, seed=4, num_samples=2, max_new_tokens=50) != first
    assert first[0] != first[1]


def test_layers_are_chosen_for_the_number_of_texts(out_dir, texts, monkeypatch):
    """Catches layers for one text where several are sampled at a time, and the other way round."""
    monkeypatch.setattr("nanogpt.device.can_pack", lambda dtype: True)
    counts = []
    monkeypatch.setattr("nanogpt.device.pack_linear_layers", lambda model, texts: counts.append(texts))
    for num_samples in (1, 3):
        texts(out_dir=out_dir, num_samples=num_samples, max_new_tokens=1, device="cpu")
    assert counts == [1, 3]


def test_batch_size_does_not_change_samples(out_dir, texts, monkeypatch):
    """Catches a sample that depends on how many are asked for, or on the batch size."""
    flags = {"out_dir": out_dir, "start": "ab", "max_new_tokens": 40}
    five = texts(num_samples=5, **flags)
    assert len({*five}) == 5
    assert texts(num_samples=1, **flags) == five[:1]
    for cache_bytes in (1, 2 * 2 * 16 * 8 * 8):  # one text, two texts: 2 layers x 16 channels x 8 positions x 8 bytes each
        monkeypatch.setattr(sample, "CACHE_BYTES", cache_bytes)
        assert texts(num_samples=5, **flags) == five


def test_first_text_streams(out_dir, monkeypatch):
    """Catches a screen that stays empty until the last token."""
    shown: list[str] = []
    monkeypatch.setattr(sample, "write", shown.append)
    flags = [f"--out_dir={out_dir}", "--start=abc", "--max_new_tokens=20", "--num_samples=2", "--device=cpu"]
    sample.main(configurator.parse(sample.Config, flags))
    assert shown[0] == "abc" and [len(piece) for piece in shown[1:21]] == [1] * 20
    assert [text.count(LINE) for text in shown[21:]].count(1) == 2


def test_speed_goes_to_stderr(out_dir, capsys):
    """Catches the speed printed on stdout among the texts, and a token count that includes the prompt."""
    flags = [f"--out_dir={out_dir}", "--start=abc", "--max_new_tokens=9", "--num_samples=3", "--device=cpu"]
    sample.main(configurator.parse(sample.Config, flags))
    output = capsys.readouterr()
    assert "tokens/s" not in output.out and output.err.startswith("27 tokens in ") and output.err.endswith(" tokens/s\n")


def test_stop_strings(tmp_path, texts):
    """Catches a stop string that is printed, and one of several that is ignored."""
    cycle = torch.zeros(11, 11)
    for token in range(11):
        cycle[token, (token + 1) % 11] = 100
    out_dir = write(tmp_path / "out", TABLE, Bigram, **{"token_embedding_table.weight": cycle})
    flags = {"out_dir": out_dir, "start": "a", "num_samples": 2, "max_new_tokens": 30}
    assert texts(stop="gh", **flags) == ["abcdef"] * 2
    assert texts(stop="zz|ij|de", **flags) == ["abc"] * 2
    assert texts(stop="zz", **flags) == ["abcdefghij\n" * 2 + "abcdefghi"] * 2


def test_stopped_texts_are_not_counted(tmp_path, capsys):
    """Catches tokens counted after a text's end, and a text that ends when another one does."""
    table = torch.zeros(11, 11)
    for one, other in ("ab", "aj", "bc", "cd", "de", "j\n", "ee", "\n\n"):
        table[TABLE.encode(one)[0], TABLE.encode(other)[0]] = 100
    out_dir = write(tmp_path / "out", TABLE, Bigram, **{"token_embedding_table.weight": table})
    flags = [f"--out_dir={out_dir}", "--start=a", "--stop=e|\n", "--num_samples=8", "--max_new_tokens=30", "--device=cpu"]
    sample.main(configurator.parse(sample.Config, flags))
    output = capsys.readouterr()
    found = output.out.split("\n" + LINE)[:-1]
    assert {*found} == {"abcd", "aj"}
    tokens = sum(map(len, found))  # each text has its stop string instead of its prompt, both one token
    assert output.err.startswith(f"{tokens} tokens in ")


def test_top_p(tmp_path, texts):
    """Catches a top_p that is parsed but not used."""
    table = torch.zeros(11, 11)
    table[:, 3] = 2.5  # more than half of the probability
    out_dir = write(tmp_path / "out", TABLE, Bigram, **{"token_embedding_table.weight": table})
    assert texts(out_dir=out_dir, start="a", top_p=0.5, temperature=1, num_samples=1, max_new_tokens=20) == ["a" + "d" * 20]


def test_long_prompt_warns(out_dir, texts, capsys):
    """Catches a prompt that is cut to the context without a warning."""
    flags = [f"--out_dir={out_dir}", "--start=abcdefghijab", "--num_samples=1", "--max_new_tokens=3", "--device=cpu"]
    sample.main(configurator.parse(sample.Config, flags))
    output = capsys.readouterr()
    assert output.out.startswith("abcdefghijab") and "the last 8 of the prompt's 12 tokens" in output.err


def test_greedy_decoding(tmp_path, texts):
    """Catches a division by zero, and greedy decoding that still depends on the seed."""
    table = torch.randn(11, 11, generator=torch.Generator().manual_seed(1))
    token, expected = 0, "a"
    for _ in range(30):
        token = max(range(11), key=table[token].tolist().__getitem__)
        expected += TABLE.characters[token]
    out_dir = write(tmp_path / "out", TABLE, Bigram, **{"token_embedding_table.weight": table})
    assert texts(out_dir=out_dir, start="a", temperature=0, num_samples=2, max_new_tokens=30) == [expected] * 2
    assert texts(out_dir=out_dir, start="a", top_k=1, num_samples=2, max_new_tokens=30) == [expected] * 2


def test_top_k_0(tmp_path, texts):
    """Catches a top_k of 0 that leaves no token, or only one."""
    uniform = torch.zeros(11, 11)
    out_dir = write(tmp_path / "out", TABLE, Bigram, **{"token_embedding_table.weight": uniform})
    (text,) = texts(out_dir=out_dir, start="a", top_k=0, num_samples=1, max_new_tokens=300)
    assert set(text) == set(TABLE.characters)
    (text,) = texts(out_dir=out_dir, start="a", top_k=2, num_samples=1, max_new_tokens=300)
    assert len(set(text[1:])) == 2


@pytest.mark.parametrize("flags", [{}, {"temperature": 0}, {"top_k": 0}, {"top_k": 1}])
def test_padding_is_never_sampled(tmp_path, words, texts, flags):
    """Catches sampled padding ids, which decode to replacement characters."""
    table = torch.zeros(64, 64)
    table[:, 41:] = 100
    out_dir = write(tmp_path / "out", words, Bigram, **{"token_embedding_table.weight": table})
    (text,) = texts(out_dir=out_dir, start="3 1 ", num_samples=1, max_new_tokens=50, **flags)
    tokens = [int(word) for word in text.split()]
    assert tokens[:2] == [3, 1] and len(tokens) == 52
    assert max(tokens) <= 40


@pytest.mark.parametrize(
    "flags", [{"temperature": 0}, {"dtype": "bfloat16"}, {"dtype": "int8"}, {"max_new_tokens": 0}, {"start": "abc" * 10}]
)
def test_extreme_flags(out_dir, texts, flags):
    """Catches a traceback for extreme flags: a prompt longer than the context, no new tokens, few bits."""
    flags = {"start": "ab", "num_samples": 1, "max_new_tokens": 10} | flags
    (text,) = texts(out_dir=out_dir, **flags)
    assert text.startswith(flags["start"]) and len(text) == len(flags["start"]) + flags["max_new_tokens"]


@pytest.mark.parametrize(
    "flags, named",
    [
        ({"out_dir": "gone"}, "gone"),
        ({"out_dir": "empty"}, "empty"),
        ({"init_from": "gone.pt"}, "gone.pt"),
        ({"init_from": "empty"}, "empty"),
        ({"out_dir": "damaged"}, "damaged"),
        ({"out_dir": "out", "start": "xyz"}, "'x'"),
        ({"out_dir": "out", "device": "tpu"}, "tpu"),
    ],
)
def test_mistakes_are_one_line(out_dir, texts, monkeypatch, flags, named):
    """Catches a traceback for a run that is missing, empty or damaged."""
    monkeypatch.chdir(out_dir.parent)
    for name in ("empty", "damaged"):
        Path(name).mkdir()
    Path("damaged/ckpt.pt").write_bytes(b"half")
    with pytest.raises(UserError) as caught:
        texts(**flags)
    assert named in str(caught.value) and "\n" not in str(caught.value)


def test_runs_here_are_listed(out_dir, texts, monkeypatch):
    """Catches an error about out/ that does not name the runs that are there, or not the newest first."""
    monkeypatch.chdir(out_dir.parent)
    monkeypatch.setattr("sys.argv", ["sample.py"])
    shutil.move("out", "out-a")
    for name, file, age in (("out b", "last.pt", 3), ("out-c", "ckpt.pt", 2)):
        Path(name).mkdir()
        shutil.copy("out-a/ckpt.pt", f"{name}/{file}")
        os.utime(f"{name}/{file}", (10**9 - age, 10**9 - age))
    os.utime("out-a/ckpt.pt", (1, 1))
    runs = "; the newest of 3 here: python {} --out_dir=out-c; others: 'out b', out-a"
    with pytest.raises(UserError, match=re.escape("--out_dir=out: no such folder" + runs.format("sample.py"))):
        texts()
    monkeypatch.setattr("sys.argv", ["train.py", "--init_from=resume"])
    with pytest.raises(UserError, match=re.escape(runs.format("train.py --init_from=resume"))):
        train.main(configurator.parse(train.Config, ["--init_from=resume"]))


@pytest.mark.parametrize("prepared", [True, False])
def test_no_run_is_here(tmp_path, texts, monkeypatch, prepared):
    """Catches advice to train on OpenWebText, for which nobody asked, where another dataset is prepared."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("nanogpt.dataset.DATA", tmp_path / "data")
    if prepared:
        for name in ("mine", "poems"):
            (tmp_path / "data" / name).mkdir(parents=True)
            (tmp_path / "data" / name / "train.bin").touch()
    with pytest.raises(UserError) as caught:
        train.main(configurator.parse(train.Config, ["--init_from=resume"]))
    found = str(caught.value)
    assert "openwebtext" not in found and "no run is here" in found
    assert ("prepared datasets: mine, poems" in found and "--dataset=mine --out_dir=out-mine" in found) == prepared
    assert ("python data/shakespeare_char/prepare.py" in found) != prepared


@pytest.mark.parametrize("name", ["out", "out/ckpt.pt"])
def test_plain_argument(out_dir, capsys, monkeypatch, name):
    """Catches a run that needs its flag although nothing else can be meant, in any command that loads one."""
    monkeypatch.chdir(out_dir.parent)
    sample.main(configurator.parse(sample.Config, [name, "--num_samples=1", "--max_new_tokens=3", "--device=cpu"]))
    assert LINE in capsys.readouterr().out
    for script, flags in ((chat, []), (export, ["--to=exported"])):
        assert configurator.parse(script.Config, [name, *flags]).init_from == name


def test_lazy_imports(command, project, out_dir):
    """Catches slow imports before the first character, and in commands that never need them."""
    (project / "check.py").write_text(
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import bench, chat, configurator, export, plot, sample, train\n"
        f"sample.main(configurator.parse(sample.Config, [{f'--out_dir={out_dir}'!r}, '--device=cpu', '--max_new_tokens=2']))\n"
        "heavy = {'requests', 'matplotlib', 'PIL', 'wandb', 'tiktoken', 'transformers', 'datasets', 'pyarrow', 'fsspec',\n"
        "         'safetensors', 'huggingface_hub', 'torch._dynamo', 'torch._inductor'}\n"
        "assert not heavy & (set(sys.modules) - before), heavy & set(sys.modules)\n",
        encoding="utf-8",
    )
    finished = command("check.py")
    assert finished.returncode == 0, finished.stderr
