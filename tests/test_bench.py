"""bench.py: its measurements run, its arithmetic is right, and the two ways are what their names say."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import bench
from configurator import parse
from model import GPT
from nanogpt import metrics
from nanogpt.errors import UserError

TINY = "--size=laptop --device=cpu --batch_size=2 --block_size=8".split()


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., dict]:
    """A function that runs bench.py with these flags in `tmp_path`; returns its last line, JSON, and all "lines"."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def call(*flags: str) -> dict:
        bench.main(parse(bench.Config, [*flags]))
        lines = capfd.readouterr().out.splitlines()
        found = next(json.loads(line) for line in reversed(lines) if line.startswith("{"))
        return found | {"lines": lines}

    return call


def test_training(run: Callable[..., dict], dataset: Path, tmp_path: Path) -> None:
    """Catches ways that are not what they are said to be, a ratio the wrong way round, and an unreadable trace."""
    flags = "--rounds=2 --steps=2 --dtype=bfloat16 --loss_rows=5 --optimizer=muon --profile=True --real_data=True".split()
    found = run(*TINY, *flags, f"--dataset={dataset}")
    assert "plain: float32, not compiled, AdamW" in found["lines"]
    fast = "fast: bfloat16, not compiled, Muon and AdamW, loss in chunks of 5"
    assert any(line.startswith(fast) for line in found["lines"])
    assert found["ratio"] == pytest.approx(found["fast_tokens_per_second"] / found["plain_tokens_per_second"], rel=0.5)
    assert found["fast_megabytes"] > 50
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]


def test_real_data(dataset: Path) -> None:
    """Catches a --real_data without effect, and a missing dataset that is not named."""
    flags = [*TINY, "--real_data=True", "--keep_memory=False"]
    x, y = bench.Trainer(parse(bench.Config, [*flags, f"--dataset={dataset}"]), "fast").batch(0)
    assert x.shape == (2, 8) and torch.equal(x[:, 1:], y[:, :-1])
    with pytest.raises(UserError, match="nowhere"):
        bench.main(parse(bench.Config, [*flags, "--dataset=nowhere"]))


def test_generation(run: Callable[..., dict]) -> None:
    """Catches generation that fails in either way."""
    found = run("--what=generation", "--size=laptop", "--new_tokens=5", "--rounds=1", "--device=cpu")
    assert found["against"] == "plain"
    assert found["ratio"] > 0


@pytest.mark.parametrize("size, parameters", [("laptop", 803_072 + 8_192), ("gpt2", 124_373_760), ("gpt2-xl", 1_556_609_600)])
def test_sizing(size: str, parameters: int, run: Callable[..., dict]) -> None:
    """Catches a part that is left out or counted twice, and FLOPs for another context."""
    found = run("--what=sizing", f"--size={size}")
    config = parse(bench.Config, [f"--size={size}"])
    with torch.device("meta"):
        model = GPT(bench.trained_shape(config))
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    assert found["parameters"] == pytest.approx(parameters, rel=0.02)
    assert found["flops_per_token"] == model.flops_per_token()
    assert found["optimal_tokens"] == 20 * found["parameters"]


def test_flops_use_the_sequence_length() -> None:
    """Catches a share of the peak that counts attention over the full context instead of --block_size."""
    long, short = (bench.trained_flops(parse(bench.Config, [f"--block_size={size}"])) for size in (1024, 256))
    assert long - short == 12 * 12 * 768 * (1024 - 256)


def test_time_to_loss_excludes_evaluations(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches evaluations that are timed, an iteration counted twice, and a wrong interpolation."""

    def train(command: list[str], **_: object) -> None:
        folder = Path(next(flag for flag in command if flag.startswith("--out_dir=")).removeprefix("--out_dir="))
        lines = ["iteration,tokens,seconds,val_loss,tokens_per_second"]
        lines += ["0,0,9,3.0,", "0,0,10,,50", "1,100,12,,50", "2,200,90,2.0,", "2,200,91,,25", "3,300,99,1.0,"]
        (folder / "metrics.csv").write_text("\n".join(lines) + "\n")

    monkeypatch.setattr(subprocess, "run", train)
    monkeypatch.setattr(metrics, "COLUMNS", ["iteration", "tokens", "seconds", "val_loss", "tokens_per_second"])
    found = bench.timed_run("any", parse(bench.Config, []), "config/any.py", {})
    assert found == [(0, 0, 3.0), (4, 2, 2.0), (8, 3, 1.0)]
    assert [bench.crossing(found, target) for target in (2.5, 2.0, 1.25, 0.9)] == [2.0, 4.0, 7.0, None]


@pytest.mark.parametrize("flag", ["--against=transformers", "--block_size=4096", "--what=nothing"])
def test_impossible_flags_are_refused(flag: str) -> None:
    """Catches a traceback, or a measurement of something else than asked for."""
    with pytest.raises(UserError, match=flag.partition("=")[0]):
        parse(bench.Config, [flag])
