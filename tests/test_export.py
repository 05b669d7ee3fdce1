"""export.py: from a run to a folder, what it prints, and what it refuses."""

import runpy
import shlex
import sys
from pathlib import Path

import pytest
import torch

import configurator
import export
from model import GPT, Bigram, GPTConfig
from nanogpt import checkpoint, huggingface
from nanogpt.errors import UserError
from nanogpt.tokenizer import CharTokenizer

TABLE = CharTokenizer(list("abcdefghij\n"))


def write(out_dir: Path, kind: type = GPT, bias: bool = False) -> GPT | Bigram:
    """Write a run folder with the checkpoint of a small random model; return the model."""
    torch.manual_seed(1)
    shape = {"block_size": 8, "n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 11, "bias": bias, "gelu": "tanh"}
    model = kind(GPTConfig(**shape))
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    state = checkpoint.pack(model, optimizer, 10, 2.5, {}, {"tokenizer": TABLE.to_dict()})
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
    monkeypatch.setattr(sys, "argv", ["export.py", *flags.replace("TMP", str(tmp_path)).split()])
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
