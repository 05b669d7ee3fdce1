"""docs/from_bigram_to_gpt.md: its blocks print what the page shows, and its commands draw the pictures; its notebook."""

import ast
import contextlib
import io
import itertools
import json
import re
import runpy
import sys
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
    """Run the code blocks of a page as a notebook does, check their outputs against the page, and return the namespace.

    Like a notebook, it also prints the value of an expression at the end of a block, unless that is None.
    """
    names: dict[str, object] = {"__name__": "walk"}
    for block in BLOCK.finditer(text):
        line = text.count("\n", 0, block.start(1))
        tree = ast.parse("\n" * line + block[1], str(WALK))  # padded, so that errors name the line of the page
        last = [tree.body.pop()] if isinstance(tree.body[-1], ast.Expr) else []
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(tree, str(WALK), "exec"), names)
            exec(compile(ast.Interactive(last), str(WALK), "single"), names)
        assert printed.getvalue() == (block[2] or ""), f"the block at line {line + 1}"
    return names


def test_blocks_print_what_the_page_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a block that fails, an equation that no longer holds, and an output that differs from the one on the page."""
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng():
        run_blocks(TEXT)
    assert len(BLOCK.findall(TEXT)) == TEXT.count("```python") > 20
    assert sum(1 for block in BLOCK.finditer(TEXT) if block[2]) == TEXT.count("```text")


def test_notebook_is_the_page() -> None:
    """Catches a notebook that was not made again after the page has changed."""
    notebook = json.loads(WALK.with_suffix(".ipynb").read_text(encoding="utf-8"))
    assert notebook == runpy.run_path(str(DOCS / "make_notebook.py"))["notebook"](TEXT), "run python docs/make_notebook.py"
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    outputs = ["".join("".join(output["text"]) for output in cell["outputs"]) for cell in cells]
    assert [("".join(cell["source"]) + "\n", output) for cell, output in zip(cells, outputs, strict=True)][1:] == [
        (code.strip() + "\n", output) for code, output in BLOCK.findall(TEXT)
    ]


def test_notebook_finds_the_repo(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a notebook whose imports fail, since Jupyter runs it in docs/."""
    notebook = json.loads(WALK.with_suffix(".ipynb").read_text(encoding="utf-8"))
    setup = next("".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code")
    monkeypatch.chdir(DOCS)
    monkeypatch.setattr(sys, "path", [])
    exec(setup, {})
    assert [Path(folder).resolve() for folder in sys.path] == [DOCS.parent]


def test_each_question_has_an_answer() -> None:
    """Catches a question that does not link to a section of the walk; test_readme.py checks that these sections exist."""
    questions = re.findall(r"^- (.*)", (DOCS / "questions.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(questions) > 30
    assert [line for line in questions if not re.fullmatch(r"\[.+\?\]\(from_bigram_to_gpt\.md#\S+\)", line)] == []


def test_statements_about_tiny_shakespeare_and_gpt2(shakespeare: str, gpt2_vocabulary: None) -> None:
    """Catches a false statement about Tiny Shakespeare, or about how GPT-2's encoding splits words."""
    names: dict[str, str] = {}
    with contextlib.redirect_stdout(io.StringIO()):
        exec(BLOCK.search(TEXT)[1], names)
    assert names["chars"] == "".join(sorted(set(shakespeare)))
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
    assert len(shown) == 5
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


def test_case_arithmetic(capsys: pytest.CaptureFixture) -> None:
    """Catches another share than that of the pairs for which a loop finds "B" closest to "A" - "a" + "b"."""
    torch.manual_seed(0)
    characters, small = "ABCDEabcde", torch.randn(5, 6)
    rows = torch.cat((small + torch.randn(6) + 0.5 * torch.randn(5, 6), small))
    row = dict(zip(characters, rows, strict=True))
    closest, left_out = [], []
    for a, b in itertools.permutations("abcde", 2):
        point = row[a.upper()] - row[a] + row[b]
        ranked = sorted(characters, key=lambda c: -torch.cosine_similarity(point, row[c], dim=0).item())
        closest.append({b.upper(): "right", b: "start"}.get(ranked[0]))
        left_out.append(next(c for c in ranked if c not in (a.upper(), a, b)) == b.upper())
    runpy.run_path(str(DOCS / "pictures.py"))["compare_cases"](rows, characters)
    shares = [closest.count("right") / 20, closest.count("start") / 20, sum(left_out) / 20]
    assert re.findall(r"\d+%", capsys.readouterr().out) == [f"{share:.0%}" for share in shares]
    assert 0 < shares[0] < shares[2] < 1 and shares[1] > 0
