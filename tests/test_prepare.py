"""Each data/*/prepare.py as people run it: from any folder, again, offline, and on bad input."""

import dataclasses
import hashlib
import importlib.util
import json
import pickle
import re
import runpy
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import configurator

import numpy as np
import pytest

from nanogpt import corpus
from nanogpt.conversation import FORMATS
from nanogpt.dataset import Dataset
from nanogpt.errors import UserError
from nanogpt.tokenizer import CharTokenizer, train_bpe

Command = Callable[..., subprocess.CompletedProcess]
Prepare = Callable[..., str]
ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(path.parent.name for path in ROOT.glob("data/*/prepare.py"))


@pytest.fixture
def prepare(project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., str]:
    """A function that runs data/NAME/prepare.py of the repo's copy, in this process, and returns what it prints."""

    def run(name: str, *arguments: str, cwd: Path = project) -> str:
        monkeypatch.chdir(cwd)
        monkeypatch.setattr(sys, "argv", ["prepare.py", *arguments])
        monkeypatch.setattr(sys, "path", list(sys.path))
        capsys.readouterr()
        runpy.run_path(str(project / "data" / name / "prepare.py"), run_name="__main__")
        shown = capsys.readouterr()
        assert shown.err == ""
        return shown.out

    return run


def decoded(folder: Path) -> str:
    """Return both splits of a dataset as one text."""
    data = Dataset(str(folder))
    ids = np.concatenate([np.fromfile(folder / f"{split}.bin", data.dtype) for split in ("train", "val")])
    return data.tokenizer.decode(ids.tolist())


def put(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_names_reach_no_terminal_as_they_are(prepare: Prepare, tmp_path: Path) -> None:
    """Catches a file name with an escape sequence, which moves the cursor or changes colors."""
    put(tmp_path / "a\x1b[2J.txt", "Some text. " * 20)
    shown = prepare("text", f"--input={tmp_path / 'a'}\x1b[2J.txt", "--name=mine")
    assert "\x1b" not in shown and "a [2J.txt: " in shown


# all of them


FIND_LIBRARY = """# each script's own imports, from a folder that is not the repo's
import runpy, sys
for script in sys.argv[1:]:
    path, modules = list(sys.path), set(sys.modules)
    assert callable(runpy.run_path(script, run_name="prepare")["main"])
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if name.partition(".")[0] in ("nanogpt", "configurator"):
            del sys.modules[name]
"""


def test_scripts_find_the_library(command: Command, project: Path, tmp_path: Path) -> None:
    """Catches a script that can only be started in the repo's folder."""
    scripts = [project / "data" / name / "prepare.py" for name in SCRIPTS]
    process = command("-c", FIND_LIBRARY, *scripts, cwd=tmp_path)
    assert (process.returncode, process.stderr) == (0, "")


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_lists_each_key(name: str, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a key without its comment or with another script's default, as inherited keys can be."""
    spec = importlib.util.spec_from_file_location("prepare", project / "data" / name / "prepare.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "prepare", module)
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec.loader.exec_module(module)
    page = configurator.help_text(module.Config, "prepare.py")
    assert module.__doc__.split()[0] in page
    for field in dataclasses.fields(module.Config):
        default = repr(field.default) if field.default == "" else str(field.default)
        assert re.search(rf"^  --{field.name}=<\S+>  \[{re.escape(default)}\]\s+\w", page, re.MULTILINE)
        assert page.count(f"--{field.name}=<") == 1
    if hasattr(module.Config, "name"):
        assert module.Config.name == name


# Tiny Shakespeare


def test_shakespeare_char_from_any_folder(
    command: Command, prepare: Prepare, project: Path, shakespeare: str, tmp_path: Path
) -> None:
    """Catches a script that works from one folder only, cannot run again, or gives other numbers."""
    folder = project / "data" / "shakespeare_char"
    put(folder / "input.txt", shakespeare)
    (tmp_path / "elsewhere").mkdir()
    files: list[dict[str, bytes]] = []
    process = command("prepare.py", cwd=folder)
    assert (process.returncode, process.stderr) == (0, "")
    for cwd in (None, project, project, folder, tmp_path / "elsewhere"):
        page = prepare("shakespeare_char", cwd=cwd) if cwd else process.stdout
        for shown in ("65 characters", "1,003,854", "111,540", "uint8"):
            assert shown in page
        files.append({name: (folder / name).read_bytes() for name in ("train.bin", "val.bin", "meta.json")})
        put(folder / "train.bin", "stale")
    assert files == [files[0]] * 5
    put(folder / "train.bin", files[0]["train.bin"])
    assert not list((tmp_path / "elsewhere").iterdir())
    assert (len(files[0]["train.bin"]), len(files[0]["val.bin"])) == (1_003_854, 111_540)
    meta = json.loads(files[0]["meta.json"])
    assert (meta["vocab_size"], meta["dtype"], meta["sha256"]) == (65, "uint8", corpus.TINY_SHAKESPEARE_SHA256)
    assert decoded(folder) == shakespeare


def test_shakespeare_char_for_nanogpt(prepare: Prepare, project: Path, shakespeare: str) -> None:
    """Catches --dtype=uint16 that writes other files than nanoGPT's prepare.py, or that is not read here."""
    folder = project / "data" / "shakespeare_char"
    put(folder / "input.txt", shakespeare)
    assert "uint16" in prepare("shakespeare_char", "--dtype=uint16")
    table = sorted(set(shakespeare))
    ids = [table.index(character) for character in shakespeare[:1000]]
    assert np.fromfile(folder / "train.bin", "<u2")[:1000].tolist() == ids
    assert (folder / "val.bin").stat().st_size == 2 * 111_540
    meta = pickle.loads((folder / "meta.pkl").read_bytes())
    stoi = {character: i for i, character in enumerate(table)}
    assert meta == {"vocab_size": 65, "itos": dict(enumerate(table)), "stoi": stoi}
    assert decoded(folder) == shakespeare


def test_shakespeare_sha256(shakespeare: str) -> None:
    """Catches a digest that no download can have."""
    assert hashlib.sha256(shakespeare.encode()).hexdigest() == corpus.TINY_SHAKESPEARE_SHA256


def test_shakespeare_in_gpt2_tokens(prepare: Prepare, project: Path, shakespeare: str, gpt2_vocabulary: None) -> None:
    """Catches other token counts than nanoGPT's, or a download of a text that is already in data/shakespeare_char."""
    folder = project / "data" / "shakespeare"
    put(project / "data" / "shakespeare_char" / "input.txt", shakespeare)
    shown = prepare("shakespeare", "--url=http://127.0.0.1:9/none")
    assert "301,966" in shown and "36,059" in shown
    assert Dataset(str(folder)).tokens == {"train": 301_966, "val": 36_059}
    assert (folder / "train.bin").stat().st_size == 2 * 301_966
    assert decoded(folder) == shakespeare


def test_shakespeare_bpe(prepare: Prepare, project: Path) -> None:
    """Catches a recipe whose tokens are learned from the validation text, or whose text differs from that of the characters."""
    text = "to be or not to be " * 500 + "a question " * 100
    put(project / "data" / "shakespeare_char" / "input.txt", text)
    folder = project / "data" / "shakespeare_bpe"
    shown = prepare("shakespeare_bpe", "--vocab_size=300")
    assert "is not Tiny Shakespeare" in shown and "longest tokens: " in shown
    assert decoded(folder) == text
    tokenizer = Dataset(str(folder)).tokenizer
    assert tokenizer.to_dict() == train_bpe([text[: int(len(text) * 0.9)]], 300).to_dict()


@pytest.mark.parametrize("name", ["shakespeare_char", "shakespeare"])
def test_shakespeare_without_a_network(
    name: str, project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Catches a traceback, a false success, or a partial file on a machine without a network."""
    script = project / "data" / name / "prepare.py"
    monkeypatch.setattr(sys, "argv", [str(script), "--url=http://127.0.0.1:9/none"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(corpus.time, "sleep", lambda seconds: None)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(script), run_name="__main__")
    assert end.value.code == 1
    shown = capsys.readouterr()
    assert shown.err.startswith("prepare.py: error: cannot download http://127.0.0.1:9/none ")
    assert shown.err.count("\n") == 1 and shown.out == ""
    assert [path.name for path in script.parent.iterdir()] == ["prepare.py"]


# your own text


def test_text_of_a_file(prepare: Prepare, project: Path, tmp_path: Path) -> None:
    """Catches a path resolved from the wrong folder, or text that changes on the way."""
    text = "Grüße 🙂 aus dem Norden.\n" * 200
    put(tmp_path / "mine" / "letter.txt", text)
    shown = prepare("text", "--input=letter.txt", "--name=my-letters", cwd=tmp_path / "mine")
    assert "--dataset=my-letters" in shown and "Windows" not in shown and "left out" not in shown
    assert "characters: '\\n .GNademnorsußü🙂'\n" in shown
    folder = project / "data" / "my-letters"
    assert Dataset(str(folder)).tokens == {"train": 4320, "val": 480}
    assert decoded(folder) == text
    assert json.loads((folder / "meta.json").read_text(encoding="utf-8"))["source"] == "letter.txt"


def test_text_of_a_folder(prepare: Prepare, project: Path, tmp_path: Path) -> None:
    """Catches files out of order, hidden files, and subfolders or byte-order marks treated wrongly."""
    folder = tmp_path / "notes"
    put(folder / "b.txt", "second\n" * 50)
    put(folder / "a.txt", b"\xef\xbb\xbf" + b"first\n" * 50)
    put(folder / "c" / "d.md", "third\n" * 50)
    put(folder / "empty.txt", "")
    put(folder / ".git" / "config", b"\xff\xfe")
    put(folder / ".hidden", b"\xff\xfe")
    prepare("text", f"--input={folder}", "--val_fraction=0.25")
    text = "first\n" * 50 + "second\n" * 50 + "third\n" * 50
    assert decoded(project / "data" / "text") == text
    assert Dataset(str(project / "data" / "text")).tokens == {"train": 712, "val": 238}


def test_text_of_a_folder_as_it_is_on_a_disk(prepare: Prepare, project: Path, tmp_path: Path) -> None:
    """Catches a picture that stops all, a linked folder that is dropped in silence, and UTF-16 or \\r that becomes text."""
    folder = tmp_path / "notes"
    put(folder / "a.txt", "one\r\ntwo\r\n" * 50)
    put(folder / "b.txt", "три\r\n".encode("utf-16"))
    put(folder / "c.txt", "four\n" * 50)
    put(folder / "photo.jpg", b"\xff\xd8\xff\xe0\x00\x10JFIF")
    put(folder / "latin.txt", b"caf\xe9")
    put(folder / "empty", "")
    put(tmp_path / "elsewhere" / "d.txt", "five\n" * 50)
    (folder / "linked").symlink_to("../elsewhere")
    (folder / "z").symlink_to("nowhere")
    shown = prepare("text", f"--input={folder}", "--val_fraction=0.25")
    assert decoded(project / "data" / "text") == "one\ntwo\n" * 50 + "три\n" + "four\n" * 50 + "five\n" * 50
    table = """line ends of Windows (\\r\\n) became \\n in 2 of 4 files
left out: 4
  empty      no text in it
  latin.txt  not UTF-8 text (byte 3); convert it to UTF-8 first
  photo.jpg  not text, or UTF-16 without a byte-order mark (it has NUL bytes); convert it to UTF-8 first
  z          a broken link
next: """
    assert table in shown


def test_include(prepare: Prepare, project: Path, tmp_path: Path) -> None:
    """Catches a file that --include does not name, or one that it names and that is not read."""
    for name in ("a.txt", "b.TXT", "c.md", "d.py", "e/f.md"):
        put(tmp_path / "notes" / name, f"{name}\n" * 50)
    put(tmp_path / "notes" / "photo.jpg", b"\x00")
    shown = prepare("text", f"--input={tmp_path / 'notes'}", "--include=*.txt, *.md")
    assert decoded(project / "data" / "text") == "".join(f"{name}\n" * 50 for name in ("a.txt", "b.TXT", "c.md", "e/f.md"))
    assert "left out" not in shown


def test_long_character_table(prepare: Prepare, tmp_path: Path) -> None:
    """Catches thousands of characters on the terminal."""
    put(tmp_path / "a.txt", "".join(map(chr, range(0x4E00, 0x4E00 + 1234))))
    assert f"characters: '{''.join(map(chr, range(0x4E00, 0x4E00 + 200)))}' and 1,034 more\n" in prepare(
        "text", f"--input={tmp_path / 'a.txt'}"
    )


def test_text_in_gpt2_tokens(prepare: Prepare, project: Path, tmp_path: Path, gpt2_vocabulary: None) -> None:
    """Catches documents that run together, or a special token that a text can write."""
    put(tmp_path / "notes" / "a.txt", "Hello world")
    put(tmp_path / "notes" / "b.txt", "<|endoftext|> Hello world")
    put(tmp_path / "notes" / "c.txt", "Hello world" * 2)
    prepare("text", f"--input={tmp_path / 'notes'}", "--tokenizer=gpt2", "--val_fraction=0.375")
    folder = project / "data" / "text"
    train, val = (np.fromfile(folder / f"{split}.bin", "<u2").tolist() for split in ("train", "val"))
    assert train[:3] == [15496, 995, 50256] and train[-1] == 50256 and train.count(50256) == 2
    assert val == [15496, 995, 15496, 995, 50256]


@pytest.mark.parametrize(("value", "vocab_size"), [("bpe:300", 300), ("bpe:300:cl100k", 300), ("bytes", 257), ("FOLDER", 280)])
def test_text_in_its_own_tokens(prepare: Prepare, project: Path, tmp_path: Path, value: str, vocab_size: int) -> None:
    """Catches tokens learned from the validation split, documents without an end, and a tokenizer that meta.json lacks."""
    put(tmp_path / "notes" / "a.txt", "to be or not to be\n" * 40)
    put(tmp_path / "notes" / "b.txt", "zyx" * 20)
    put(tmp_path / "mine" / "tokenizer.json", train_bpe(["not to be zyx"] * 9, 280).to_dict()["content"])
    flag = "--tokenizer=" + value.replace("FOLDER", str(tmp_path / "mine"))
    printed = prepare("text", f"--input={tmp_path / 'notes'}", flag, "--val_fraction=0.1")
    folder = project / "data" / "text"
    data = Dataset(str(folder))
    assert data.tokenizer.vocab_size == min(vocab_size, data.tokenizer.vocab_size) and data.dtype.name == "uint16"
    assert decoded(folder).replace("<|endoftext|>", "") == "to be or not to be\n" * 40 + "zyx" * 20
    ids = np.fromfile(folder / "train.bin", "<u2").tolist()
    assert ids.count(data.tokenizer.end_of_text) == 1 and ids[-1] == data.tokenizer.end_of_text
    assert ("longest tokens: ' not', " in printed) is value.startswith("bpe")
    pieces = {data.tokenizer.token_bytes(i) for i in range(data.tokenizer.vocab_size)}
    assert (b"zyx" in pieces) is (value == "FOLDER") and b"<|endoftext|>" in pieces


def test_text_in_its_own_dataset_folder(prepare: Prepare, project: Path) -> None:
    """Catches a second run that takes the token files of the first for text."""
    folder = project / "data" / "poems"
    put(folder / "poems.txt", "roses are red\n" * 50)
    for dtype in ("auto", "uint32"):
        prepare("text", "--input=data/poems", "--name=poems", f"--dtype={dtype}")
        assert decoded(folder) == "roses are red\n" * 50
    assert Dataset(str(folder)).dtype.name == "uint32"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], ["--input"]),
        (["--input=nowhere.txt"], ["nowhere.txt", "no such file"]),
        (["--input=empty.txt"], ["empty.txt", "no text"]),
        (["--input=mark.txt"], ["mark.txt", "no text"]),
        (["--input=bare"], ["bare", "no text"]),
        (["--input=latin.txt"], ["latin.txt", "not UTF-8", "byte 3"]),
        (["--input=wide16.txt"], ["wide16.txt", "not UTF-16", "byte 4"]),
        (["--input=photo.png"], ["photo.png", "not text", "NUL"]),
        (["--input=mixed"], ["mixed: no text in it\n"]),
        (["--input=mixed", "--include=*.md,*.py"], ["mixed: no text in it among the files that match *.md,*.py\n"]),
        (["--input=good.txt", "--include=*.md"], ["good.txt: no text in it among the files that match *.md\n"]),
        (["--input=good.txt", "--include= ,"], ["--include must name files", "--include=*.txt"]),
        (["--input=short.txt"], ["too short"]),
        (["--input=good.txt", "--val_fraction=0"], ["--val_fraction=0", "above 0"]),
        (["--input=good.txt", "--val_fraction=1"], ["--val_fraction=1", "below 1"]),
        (["--input=good.txt", "--val_fraction=0.001"], ["too short", "val.bin"]),
        (["--input=good.txt", "--tokenizer=words"], ["--tokenizer=words", "char", "gpt2"]),
        (["--input=good.txt", "--tokenizer=bpe:256"], ["--tokenizer=bpe:256", "from 257", "bpe:1024"]),
        (["--input=good.txt", "--tokenizer=bpe:x"], ["--tokenizer=bpe:x", "whole number"]),
        (["--input=good.txt", "--tokenizer=bpe:-1"], ["--tokenizer=bpe:-1", "whole number"]),
        (["--input=good.txt", "--tokenizer=bpe:300:gpt9"], ["--tokenizer=bpe:300:gpt9", "gpt2 or cl100k"]),
        (["--input=good.txt", "--tokenizer=bpe:300", "--dtype=uint8"], ["--dtype=uint8 is too small", "--dtype=uint16"]),
        (["--input=good.txt", "--tokenizer=bare"], ["bare", "no tokenizer.json"]),
        (["--input=good.txt", "--tokenizer=owner/none"], ["owner/none", "HF_HUB_OFFLINE"]),
        (["--input=wide.txt", "--dtype=uint8"], ["--dtype=uint8 is too small", "301 tokens", "--dtype=uint16"]),
        (["--input=good.txt", "--dtype=int64"], ["--dtype=int64", "uint16"]),
        (["--input=good.txt", "--name="], ["--name=", "letters"]),
        (["--input=good.txt", "--name=../mine"], ["--name=../mine", "letters"]),
        (["--input=good.txt", "--name=.."], ["--name=..", "letters"]),
        (["--input=good.txt", "--name=a/b"], ["--name=a/b", "letters"]),
        (["--input=good.txt", "--name=.hidden"], ["--name=.hidden", "letters"]),
        (["--input=good.txt", "--name=shakespeare_char"], ["--name=shakespeare_char", "another name"]),
        (["--input=good.txt", "--name=taken.txt"], ["taken.txt"]),
        (["--imput=good.txt"], ["imput", "did you mean --input"]),
    ],
)
def test_bad_text_is_refused_in_one_line(
    arguments: list[str],
    told: list[str],
    project: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """Catches a traceback, an error without a remedy, or files written all the same."""
    texts = tmp_path / "texts"
    put(texts / "empty.txt", "")
    put(texts / "mark.txt", b"\xef\xbb\xbf")
    put(texts / "latin.txt", b"caf\xe9 au lait\n" * 9)
    put(texts / "short.txt", "abc")
    put(texts / "good.txt", "to be or not to be\n" * 9)
    put(texts / "wide.txt", "\n" + "".join(map(chr, range(1000, 1300))))
    put(texts / "mixed" / "latin.txt", b"caf\xe9\n" * 9)
    put(texts / "mixed" / "empty.txt", "")
    put(texts / "wide16.txt", b"\xff\xfea\x00b")
    put(texts / "photo.png", b"PNG\x00")
    (texts / "bare").mkdir()
    put(project / "data" / "taken.txt", "a file where a folder should go")
    before = sorted(project.rglob("*"))
    monkeypatch.chdir(texts)
    monkeypatch.setattr(sys, "argv", ["prepare.py", *arguments])
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(project / "data" / "text" / "prepare.py"), run_name="__main__")
    assert end.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith("prepare.py: error: ") and error.count("\n") == 1
    assert [part for part in told if part not in error] == []
    assert sorted(project.rglob("*")) == before


# conversations


def line(*texts: str, system: str = "") -> str:
    """Return a line of a .jsonl file: a conversation in which user and assistant say `texts` in turn."""
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return json.dumps({"id": 7, "messages": messages}) + "\n"


def test_synthetic_conversations(command: Command, project: Path, shakespeare: str) -> None:
    """Catches conversations that differ between runs or are in both splits, and characters that Shakespeare lacks."""
    folder, files = project / "data" / "chat", []
    for hash_seed in ("1", "2"):
        process = command("data/chat/prepare.py", PYTHONHASHSEED=hash_seed)
        assert (process.returncode, process.stderr) == (0, "")
        files.append([(folder / f"{split}.bin").read_bytes() for split in ("train", "train.mask", "val", "val.mask")])
    assert files[0] == files[1]
    for shown in ("540 conversations to train, 60 to validate", "learned", "config/train_chat.py"):
        assert shown in process.stdout
    data = Dataset(str(folder))
    assert data.chat_format == FORMATS["nanochatgpt"]
    assert set(data.tokenizer.characters) - set("<>") <= set(shakespeare)
    text, tag = decoded(folder), "<endOfText>"
    turns = [turn.split(tag) for turn in text.split("<human>")[1:]]
    assert all(len(turn) == 3 and turn[1].startswith("<bot>") and turn[2] == "" for turn in turns)
    answers: dict[str, set[str]] = {}
    for question, answer, _ in turns:
        answers.setdefault(question, set()).add(answer)
    asked_back = {q for q, a in answers.items() if len(a) > 1}  # answered only by earlier turns
    assert {"What is my name?", "What pet do I have?", "And a sheep?"} & set(answers)
    assert all(q.startswith(("And ", "Do ", "Who ", "What is my ", "What pet ", "Which animal ")) for q in asked_back)


def test_conversations_of_a_file(prepare: Prepare, project: Path, tmp_path: Path, gpt2_vocabulary: None) -> None:
    """Catches conversations that are lost, repeated or cut by the split, or with wrong masks or format."""
    lines = [line(f"Question {i}?", f"Answer {i}.") for i in range(10)]
    put(tmp_path / "mine.jsonl", b"\xef\xbb\xbf" + "\r\n \n".join(lines).encode())
    flags = "--input=mine.jsonl --tokenizer=gpt2 --chat_format=dialogpt --val_fraction=0.25 --name=mine"
    shown = prepare("chat", *flags.split(), cwd=tmp_path)
    assert "8 conversations to train, 2 to validate" in shown
    assert "config/finetune_chat.py --dataset=mine --out_dir=out-mine" in shown
    folder = project / "data" / "mine"
    data = Dataset(str(folder))
    assert data.chat_format == FORMATS["dialogpt"]
    found = decoded(folder).split("<|endoftext|>")
    assert sorted(zip(found[::2], found[1::2], strict=False)) == [(f"Question {i}?", f"Answer {i}.") for i in range(10)]
    for split in ("train", "val"):
        ids, mask = np.fromfile(folder / f"{split}.bin", "<u2"), np.fromfile(folder / f"{split}.mask.bin", "u1")
        learned = data.tokenizer.decode(ids[mask == 1].tolist())
        assert learned.count("Answer") == learned.count("<|endoftext|>") == (8 if split == "train" else 2)
        assert "Question" not in learned
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    assert meta["source"] == "mine.jsonl"
    assert meta["sha256"] == hashlib.sha256((tmp_path / "mine.jsonl").read_bytes()).hexdigest()


@pytest.mark.parametrize("by_path", [False, True])
def test_conversations_with_the_tokenizer_of_a_dataset(
    by_path: bool, prepare: Prepare, project: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Catches a new character table, with which an existing model cannot be finetuned."""
    folder = tmp_path / "own" if by_path else project / "data" / "own"
    table = CharTokenizer.from_text("\n !:.?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz")
    corpus.write_dataset(folder, ["Ab" * 9], ["ab"], table, "letters")
    put(tmp_path / "mine.jsonl", (line("Hi.", "Ho!") + line("Ho.", "Hi?", system="Sing!")) * 2)
    name = str(folder) if by_path else "own"
    flags = [f"--input={tmp_path / 'mine.jsonl'}", f"--tokenizer={name}"]
    prepare("chat", *flags, "--chat_format=plain", "--dtype=uint16")
    with pytest.raises(SystemExit) as end:
        prepare("chat", *flags, "--chat_format=nanochatgpt")
    error = capsys.readouterr().err
    assert end.value.code == 1
    assert "--chat_format=nanochatgpt: character '<'" in error and "try --chat_format=plain" in error
    data = Dataset(str(project / "data" / "chat"))
    assert data.tokenizer.to_dict() == table.to_dict() and data.dtype.name == "uint16"
    assert decoded(project / "data" / "chat").count("\nUser: Hi.\nAssistant: Ho!\n") == 2


def test_conversations_with_windows_line_ends(prepare: Prepare, project: Path, tmp_path: Path) -> None:
    """Catches \\r that a model learns to write."""
    put(tmp_path / "mine.jsonl", line("One?\r\nTwo?", "Three.\rFour.", system="Five.\r\n") * 2)
    prepare("chat", f"--input={tmp_path / 'mine.jsonl'}", "--chat_format=plain")
    assert decoded(project / "data" / "chat") == "\nFive.\n\nUser: One?\nTwo?\nAssistant: Three.\nFour.\n" * 2


GOOD = line("Hi.", "Ho.")


@pytest.mark.parametrize(
    ("content", "arguments", "told"),
    [
        ("", "", ["talk.jsonl", "at least 2 conversations, got 0"]),
        ("\n \n", "", ["talk.jsonl", "at least 2 conversations, got 0"]),
        (GOOD, "", ["talk.jsonl", "at least 2 conversations, got 1"]),
        (GOOD + "\n" + b"caf\xe9\n".decode("latin-1"), "", ["line 3", "not JSON"]),
        (GOOD.encode() + b'"caf\xe9"\n', "", ["line 2", "not UTF-8"]),
        (GOOD * 2 + "{", "", ["line 3", "not JSON"]),
        (GOOD + "[" * 100_000, "", ["line 2", "not JSON"]),
        (GOOD + '["Hi."]\n', "", ["line 2", "no list of messages"]),
        (GOOD + '{"text": "Hi."}\n', "", ["line 2", "no list of messages"]),
        (GOOD + line("Hi."), "", ["line 2", "no reply"]),
        (GOOD + line("Hi.", ""), "", ["line 2", "message 2", "empty"]),
        (GOOD + GOOD.replace("assistant", "gpt"), "", ["line 2", "message 2", "'gpt'"]),
        (GOOD + GOOD.replace('"Ho."', "3"), "", ["line 2", "message 2", "got 3"]),
        (GOOD + line("Hi.", "Ho.<endOfText>"), "", ["line 2", "message 2", "<endOfText>"]),
        (GOOD + line("Hi.", "Ho.\rUser: Hi."), "--chat_format=plain", ["line 2", "message 2", "User:"]),
        (GOOD + line("Hi.", "Hé."), "--tokenizer=OWN", ["line 2", "'é'"]),
        (GOOD * 2, "--chat_format=dialogpt", ["--chat_format=dialogpt", "--tokenizer=gpt2"]),
        (GOOD * 2, "--chat_format=alpaca", ["--chat_format=alpaca", "nanochatgpt"]),
        (GOOD * 2, "--tokenizer=words", ["--tokenizer=words", "char, gpt2", "dataset"]),
        (GOOD * 2, "--name=../mine", ["--name=../mine", "letters"]),
        (GOOD * 2, "--name=text", ["--name=text", "another name"]),
        (GOOD * 2, "--val_fraction=1", ["--val_fraction=1", "below 1"]),
        (GOOD * 2, "--input=nowhere.jsonl", ["nowhere.jsonl", "no such file"]),
    ],
)
def test_bad_conversations_are_refused_in_one_line(
    content: str | bytes,
    arguments: str,
    told: list[str],
    project: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """Catches a traceback, an error without the line number, or files written all the same."""
    corpus.write_dataset(tmp_path / "own", ["Ho" * 9], ["Hi"], CharTokenizer(list("<>.: HTabdefhimnostuxO")), "letters")
    put(tmp_path / "talk.jsonl", content)
    before = sorted(project.rglob("*"))
    monkeypatch.chdir(tmp_path)
    given = [word.replace("OWN", str(tmp_path / "own")) for word in arguments.split()]
    monkeypatch.setattr(sys, "argv", ["prepare.py", "--input=talk.jsonl", *given])
    monkeypatch.setattr(sys, "path", list(sys.path))
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(project / "data" / "chat" / "prepare.py"), run_name="__main__")
    assert end.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith("prepare.py: error: ") and error.count("\n") == 1
    assert [part for part in told if part not in error] == []
    assert sorted(project.rglob("*")) == before


# Python's own library


def test_python_char(prepare: Prepare, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a dataset that needs a network, keeps non-ASCII characters, or prints other counts than it writes."""
    folder = project / "data" / "python_char"
    for proxy in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(proxy, "http://127.0.0.1:9")
    shown = prepare("python_char")
    data = Dataset(str(folder))
    assert f"{data.tokens['train']:,}" in shown and f"{data.tokens['val']:,}" in shown
    assert sum(data.tokens.values()) > 1_000_000
    assert 0.02 < data.tokens["val"] / data.tokens["train"] < 0.5
    assert "".join(data.tokenizer.characters).isascii()
    ids = b"".join((folder / f"{split}.bin").read_bytes() for split in ("train", "val"))
    for text in ("def dataclass(", "class JSONDecoder("):
        assert bytes(data.tokenizer.encode(text)) in ids


def test_python_char_takes_only_the_library(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches installed packages, tests, non-ASCII files, or an order that differs between machines."""
    library = tmp_path / "test" / "lib"
    taken = ["a.py", "b/__init__.py", "b/c.py", "d.py"]
    passed_over = ["a.txt", "test/e.py", "b/tests/f.py", "site-packages/g/h.py", "idlelib/idle_test/i.py"]
    for name in taken[::-1] + passed_over:
        put(library / name, f"# {name}\n")
    put(library / "empty.py", "")
    put(library / "wide.py", "# é\n")
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(library)})
    monkeypatch.setattr(sys, "path", list(sys.path))
    script = runpy.run_path(str(project / "data" / "python_char" / "prepare.py"), run_name="prepare")
    assert script["standard_library"]() == [f"# {name}\n" for name in taken]
    with pytest.raises(UserError, match="lib"):
        script["main"](script["Config"]())
