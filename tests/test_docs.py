"""docs/from_bigram_to_gpt.md: its code blocks run and print what the page shows, and its commands draw the pictures."""

import contextlib
import io
import re
import runpy
from pathlib import Path

import pytest
import torch
from launcher import run_commands

from model import GPT, GPTConfig
from nanogpt.tokenizer import TiktokenTokenizer

DOCS = Path(__file__).resolve().parents[1] / "docs"
WALK = DOCS / "from_bigram_to_gpt.md"
TEXT = WALK.read_text(encoding="utf-8")
BLOCK = re.compile(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```\n)?", re.DOTALL)


def run_blocks(text: str) -> dict[str, object]:
    """Run the code blocks of a page in one namespace, check their outputs against the page, and return the namespace."""
    names: dict[str, object] = {"__name__": "walk"}
    for block in BLOCK.finditer(text):
        line = text.count("\n", 0, block.start(1))
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile("\n" * line + block[1], str(WALK), "exec"), names)  # pads so that errors name the line of the page
        assert printed.getvalue() == (block[2] or ""), f"the block at line {line + 1}"
    return names


def test_blocks_print_what_the_page_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a block that fails, an equation that no longer holds, and an output that differs from the one on the page."""
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng():
        run_blocks(TEXT)
    assert len(BLOCK.findall(TEXT)) == TEXT.count("```python") > 20
    assert sum(1 for block in BLOCK.finditer(TEXT) if block[2]) == TEXT.count("```text")


def test_statements_about_tiny_shakespeare_and_gpt2(shakespeare: str, gpt2_vocabulary: None) -> None:
    """Catches a false statement about Tiny Shakespeare, or about how GPT-2's encoding splits words."""
    names: dict[str, str] = {}
    exec(BLOCK.search(TEXT)[1], names)
    assert names["characters"] == "".join(sorted(set(shakespeare)))
    assert shakespeare.startswith(names["text"])
    assert set(shakespeare) & set("0123456789") == {"3"}
    gpt2 = TiktokenTokenizer("gpt2")
    pieces = {word: [gpt2.decode([i]) for i in gpt2.encode(word)] for word in ("lower", " lower", "slower", "Bee7")}
    assert pieces == {"lower": ["lower"], " lower": [" lower"], "slower": ["sl", "ower"], "Bee7": ["Bee", "7"]}
    assert round(len(shakespeare) / len(gpt2.encode_array(shakespeare)), 1) == 3.3


def test_commands_draw_the_pictures(project: Path, text: str) -> None:
    """Catches commands that do not fit together, and a picture on the page that they do not draw."""
    (project / "data" / "shakespeare_char" / "input.txt").write_text(text, encoding="utf-8")
    commands = [line.split()[1:] for line in re.search(r"```sh\n(.*?)```", TEXT, re.DOTALL)[1].splitlines()]
    for command in commands:
        if command[0] == "train.py":
            command += ["--max_iters=3", "--eval_iters=1", "--eval_interval=2", "--log_interval=1", "--device=cpu"]
        elif command[0] == "docs/pictures.py":
            command += ["--text=1 plus 1\n", "--out_dir=drawn"]
    run_commands(commands, project)
    shown = sorted(re.findall(r"!\[[^\]]+\]\((\S+)\)", TEXT))
    assert len(shown) == 3
    assert sorted(path.name for path in (project / "drawn").iterdir()) == shown
    for name in shown:
        for folder in (project / "drawn", DOCS):
            assert (folder / name).read_bytes().startswith(b"\x89PNG")
        assert (DOCS / name).stat().st_size < 60_000


def test_drawn_attention_is_the_models() -> None:
    """Catches a picture of other weights than those with which attention sums the values."""
    attention_weights = runpy.run_path(str(DOCS / "pictures.py"))["attention_weights"]
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=8, vocab_size=5, n_layer=2, n_head=2, n_embd=6))
    idx = torch.randint(5, (3, 7))
    weights = attention_weights(model, idx)  # (n_layer, B, nh, T, T)
    x = model.transformer.wte(idx) + model.transformer.wpe(torch.arange(7))
    for block, layer in zip(model.transformer.h, weights, strict=True):
        v = block.attn.c_attn(block.ln_1(x))[:, :, 12:].view(3, 7, 2, 3).transpose(1, 2)  # (B, nh, T, hs)
        output = block.attn.c_proj((layer @ v).transpose(1, 2).reshape(3, 7, 6))
        assert torch.allclose(block.attn(block.ln_1(x)), output, atol=1e-6)
        x = block(x)
