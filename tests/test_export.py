"""export.py: from a run to a folder, what it prints, and what it refuses."""

import itertools
import json
import os
import runpy
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import configurator

import pytest
import safetensors.torch
import torch

import export
from model import GPT, Bigram, GPTConfig
from nanogpt import checkpoint, conversation, huggingface
from nanogpt.conversation import FORMATS, ChatFormat
from nanogpt.errors import UserError
from nanogpt.tokenizer import PATTERNS, CharTokenizer, TiktokenTokenizer, Tokenizer, train_bpe

TABLE = CharTokenizer(list("abcdefghij\n"))


def write(out_dir: Path, kind: type = GPT, bias: bool = False, **extra: Any) -> GPT | Bigram:
    """Write a run folder with the checkpoint of a small random model; return the model."""
    torch.manual_seed(1)
    shape = {"block_size": 8, "n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 11, "bias": bias, "gelu": "tanh"}
    model = kind(GPTConfig(**shape))
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    state = checkpoint.pack(model, optimizer, 10, 2.5, {}, {"tokenizer": TABLE.to_dict()} | extra)
    out_dir.mkdir()
    checkpoint.save(out_dir / checkpoint.BEST, state)
    return model


def run(*flags: str | Path) -> None:
    export.main(configurator.parse(export.Config, [*map(str, flags)]))


@pytest.mark.parametrize("init_from", ["resume", "OUT", "OUT/ckpt.pt"])
def test_export(tmp_path: Path, init_from: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches an export with wrong weights, activation or characters, or in another folder than printed."""
    model, to = write(tmp_path / "out"), tmp_path / "far off" / "there"
    source = init_from.replace("OUT", str(tmp_path / "out"))
    run(f"--out_dir={tmp_path / 'out'}", f"--init_from={source}", f"--to={to}")
    found = huggingface.load(str(to))
    assert all(torch.equal(found.weights[name], tensor) for name, tensor in model.state_dict().items())
    assert found.model_args | {"gelu": found.gelu} == vars(model.config)
    assert found.tokenizer == TABLE.to_dict()
    printed = capsys.readouterr().out
    assert f"AutoModelForCausalLM.from_pretrained({str(to)!r})" in printed
    assert f"python sample.py --init_from={shlex.quote(str(to))}\n" in printed
    assert all(path.name in printed for path in to.iterdir())


def test_printed_lines_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches printed Python lines that do not run."""
    write(tmp_path / "out")
    run(f"--out_dir={tmp_path / 'out'}", f"--to={tmp_path / 'it is'}", "--dtype=bfloat16")
    printed = capsys.readouterr().out.split("in Python:")[1].split("and here:")[0]
    names: dict = {}
    exec("\n".join(line.strip() for line in printed.splitlines()), names)
    assert names["model"].dtype == torch.bfloat16
    assert names["tokenizer"]("bad")["input_ids"] == TABLE.encode("bad")


def save(folder: Path, n_embd: int = 2, tokenizer: Tokenizer = TABLE, chat_format: ChatFormat | None = None) -> None:
    """Export a small random model without a checkpoint."""
    shape = {"block_size": 8, "n_layer": 1, "n_head": 1, "n_embd": n_embd, "vocab_size": tokenizer.vocab_size}
    model = GPT(GPTConfig(**shape))
    args = {name: value for name, value in vars(model.config).items() if name != "gelu"}
    huggingface.save(folder, model.state_dict(), args, "tanh", tokenizer, torch.float32, chat_format)


def width(folder: Path) -> int:
    """Load an export with all its weights, as a command does; return its n_embd."""
    _, _, found = checkpoint.load_model(str(folder), "none")
    return found.model_args["n_embd"]


# chats


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("kind", ["char", "gpt2", "bpe"])
def test_chat_format_is_kept(tmp_path: Path, name: str, kind: str, request: pytest.FixtureRequest) -> None:
    """Catches a chat format that is lost in the export or in transformers' copy of it, and a reply without an end."""
    from transformers import AutoModelForCausalLM

    if kind == "gpt2":
        request.getfixturevalue("gpt2_vocabulary")
    table = CharTokenizer.from_text("".join(map(str, conversation.to_dict(FORMATS[name]).values())) + "\n")
    tokenizer = {"char": table, "gpt2": TiktokenTokenizer("gpt2", 50257), "bpe": train_bpe(["a cow\n"], 257)}[kind]
    save(tmp_path / "to", tokenizer=tokenizer, chat_format=FORMATS[name])
    generation = json.loads((tmp_path / "to" / "generation_config.json").read_text(encoding="utf-8"))
    is_token = name == "dialogpt" and kind != "char"
    assert generation.get("stop_strings") == (None if is_token else [FORMATS[name].stop])
    assert generation["eos_token_id"] == {"char": None, "gpt2": 50256, "bpe": 256}[kind]
    AutoModelForCausalLM.from_pretrained(tmp_path / "to").save_pretrained(tmp_path / "theirs")
    for folder in ("to", "theirs"):
        assert checkpoint.open_checkpoint(str(tmp_path / folder), "none").chat_format == FORMATS[name]


def test_printed_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a printed command that a shell cannot run, or that does not chat with a chat model."""
    write(tmp_path / "out", chat_format=conversation.to_dict(FORMATS["nanochatgpt"]))
    run(f"--out_dir={tmp_path / 'out'}", f"--to={tmp_path / 'a chat'}")
    assert shlex.split(capsys.readouterr().out)[-3:] == ["python", "chat.py", f"--init_from={tmp_path / 'a chat'}"]


@pytest.mark.parametrize("kind", ["char", "gpt2"])
@pytest.mark.parametrize("chat_format", [None, FORMATS["nanochatgpt"]])
def test_no_token_types(kind: str, chat_format: ChatFormat | None, request: pytest.FixtureRequest) -> None:
    """Catches token_type_ids, which transformers 4 adds to an input by default, and whose embeddings GPT-2 adds."""
    if kind == "gpt2":
        request.getfixturevalue("gpt2_vocabulary")
    tokenizer = TABLE if kind == "char" else TiktokenTokenizer("gpt2")
    about = json.loads(huggingface._tokenizer_files(tokenizer, 8, chat_format)["tokenizer_config.json"])
    assert about["model_input_names"] == ["input_ids", "attention_mask"]


def test_damaged_chat_format_is_refused(tmp_path: Path) -> None:
    """Catches a traceback, or a chat in another format, for a damaged config.json."""
    save(tmp_path / "to")
    path = tmp_path / "to" / "config.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["nanogpt"]["chat_format"] = {"name": "plain"}
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UserError, match=r"config\.json: damaged: malformed chat format"):
        huggingface.load(str(tmp_path / "to"))


# the folder


def test_kill_at_any_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a moment without a whole export, and one after which the next command fails."""
    folder = tmp_path / "to"

    def killed_at(step: int, n_embd: int) -> bool:
        """Export, but be killed before a step that changes the disk; return whether it was."""
        steps = itertools.count()

        def wrap(function: Callable) -> Callable:
            def until_killed(*arguments: Any, **options: Any) -> Any:
                if next(steps) >= step:
                    raise KeyboardInterrupt
                return function(*arguments, **options)

            return until_killed

        with monkeypatch.context() as patched:
            for name in ("mkdir", "write_text", "rename", "unlink", "rmdir", "chmod"):
                patched.setattr(Path, name, wrap(getattr(Path, name)))
            patched.setattr(safetensors.torch, "save_file", wrap(safetensors.torch.save_file))
            try:
                save(folder, n_embd)
            except KeyboardInterrupt:
                return True
        return False

    for step in itertools.count():
        for next_command in ("load", "export"):
            save(folder, n_embd=2)
            was_killed = killed_at(step, n_embd=4)
            assert next_command == "export" or width(folder) in (2, 4)
            assert not (tmp_path / "to.old").exists() or width(tmp_path / "to.old") == 2
            for again in range(12):  # the next exports are killed, too
                killed_at(again, n_embd=6)
            assert width(folder) in (2, 4, 6)
            save(folder, n_embd=8)
            assert width(folder) == 8 and [path.name for path in tmp_path.iterdir()] == ["to"]
        if not was_killed:
            break
    assert step > 10


def test_half_a_file_is_no_obstacle(tmp_path: Path) -> None:
    """Catches an export that stops at what safetensors leaves of a file when it is killed."""
    save(tmp_path / "to.tmp")
    (tmp_path / "to.tmp" / "model.safetensors").rename(tmp_path / "to.tmp" / ".tmpK2J1wO")
    save(tmp_path / "to")
    assert [path.name for path in tmp_path.iterdir()] == ["to"]


@pytest.mark.parametrize("place", ["to.tmp", "to.old"])
@pytest.mark.parametrize("kind", ["link", "broken link", "file"])
def test_links_and_files_in_the_way(tmp_path: Path, place: str, kind: str) -> None:
    """Catches a traceback for a link in the way, and one whose target is emptied."""
    save(tmp_path / "mine")
    if kind == "file":
        (tmp_path / place).write_text("mine", encoding="utf-8")
    else:
        (tmp_path / place).symlink_to(tmp_path / ("mine" if kind == "link" else "none"))
    with pytest.raises(UserError, match=f"{place}: exists and is {'not a folder' if kind == 'file' else 'a link'}; choose"):
        save(tmp_path / "to")
    assert os.path.lexists(tmp_path / place) and width(tmp_path / "mine") == 2


def test_links_are_kept(tmp_path: Path) -> None:
    """Catches a link to an export that is replaced, or a file that an export links to and that is deleted with it."""
    save(tmp_path / "far" / "export")
    (tmp_path / "to").symlink_to(tmp_path / "far" / "export")
    weights = tmp_path / "far" / "export" / "model.safetensors"
    shutil.move(weights, tmp_path / "mine")
    weights.symlink_to(tmp_path / "mine")
    save(tmp_path / "to", n_embd=4)
    assert (tmp_path / "to").is_symlink() and (tmp_path / "mine").is_file() and not weights.is_symlink()
    assert width(tmp_path / "to") == width(tmp_path / "far" / "export") == 4


@pytest.mark.skipif(os.name != "posix", reason="Windows has no such permissions")
def test_permissions(tmp_path: Path) -> None:
    """Catches weights that only their owner can read, or files that others can."""
    umask = os.umask(0o027)
    try:
        save(tmp_path / "to")
    finally:
        os.umask(umask)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "to").iterdir()} == {0o640}


# mistakes


def test_bigram_is_refused(tmp_path: Path) -> None:
    """Catches a traceback for a model that transformers does not have."""
    write(tmp_path / "out", Bigram)
    with pytest.raises(UserError, match="bigram"):
        run(f"--out_dir={tmp_path / 'out'}", f"--to={tmp_path / 'to'}")
    assert not (tmp_path / "to").exists()


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--out_dir=TMP/out", "--to=exported"),
        ("--out_dir=TMP/out --to=TMP/out", "holds 'ckpt.pt', which is not part of an export"),
        ("--out_dir=TMP/out --to=TMP/out/ckpt.pt", "TMP/out/ckpt.pt: exists and is not a folder; choose another"),
        ("--out_dir=TMP/out --to=TMP/out/ckpt.pt/folder", "TMP/out/ckpt.pt/folder"),
        ("--out_dir=TMP/out --to=TMP/to --dtype=int8", "float32, bfloat16 or float16"),
        ("--out_dir=TMP/none --to=TMP/to", "TMP/none"),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path, flags: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a traceback for a wrong flag, or for a folder that is in use or cannot be written."""
    write(tmp_path / "out")
    monkeypatch.setattr(sys, "argv", ["export.py", *(flag.replace("TMP", str(tmp_path)) for flag in flags.split())])
    with pytest.raises(SystemExit) as ended:
        configurator.run(export.main, export.Config)
    out, err = capsys.readouterr()
    assert ended.value.code == 1 and out == ""
    assert err.startswith("export.py: error: ") and err.count("\n") == 1
    assert message.replace("TMP", str(tmp_path)) in err


def test_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a script that does nothing, or fails, when it is run."""
    write(tmp_path / "out")
    monkeypatch.setattr(sys, "argv", ["export.py", f"--out_dir={tmp_path / 'out'}", f"--to={tmp_path / 'to'}"])
    runpy.run_path(export.__file__, run_name="__main__")
    assert huggingface.is_folder(tmp_path / "to")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", FORMATS)
def test_chat_template_in_its_own_tokens(tmp_path: Path, name: str, pattern: str) -> None:
    """Catches a chat template whose ids are not those of training, and a split for it that the loaded tokenizer keeps."""
    from transformers import AutoTokenizer

    chat_format = FORMATS[name]
    messages = [{"role": "user", "content": "What is 12 and it's, naïve?"}, {"role": "assistant", "content": "It is 日本."}]
    tokenizer = train_bpe([conversation.render(chat_format, messages)] * 9, 400, pattern)
    save(tmp_path / "to", tokenizer=tokenizer, chat_format=chat_format)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "to")
    assert theirs.apply_chat_template(messages)["input_ids"] == conversation.encode(chat_format, messages, tokenizer)[0]
    assert huggingface.load(str(tmp_path / "to")).tokenizer == tokenizer.to_dict()
