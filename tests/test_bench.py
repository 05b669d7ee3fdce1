"""bench.py: that its commands run, that what it computes is right, and that the two ways are what their names say."""

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


def results(finished: subprocess.CompletedProcess) -> dict:
    """The JSON line that ends what a command has printed."""
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout.splitlines()[-1])


def test_training_steps_are_timed_both_ways(command: Callable, project: Path) -> None:
    """Catches ways that are not what they are said to be, a ratio the wrong way round, and a trace that no viewer opens."""
    flags = "--size=laptop --batch_size=2 --block_size=8 --rounds=2 --steps=2 --dtype=bfloat16 --loss_rows=5".split()
    finished = command("bench.py", *flags, "--optimizer=muon", "--profile=True", "--device=cpu")
    found = results(finished)
    lines = finished.stdout.splitlines()
    assert "plain: float32, not compiled, AdamW" in lines
    assert any(line.startswith("fast: bfloat16, not compiled, Muon and AdamW, loss in chunks of 5") for line in lines)
    assert found["ratio"] == pytest.approx(found["fast_tokens_per_second"] / found["plain_tokens_per_second"], rel=0.5)
    assert found["fast_megabytes"] > 50
    assert json.loads((project / "trace.json").read_text())["traceEvents"]


def test_training_takes_windows_of_a_dataset(command: Callable, dataset: Path) -> None:
    """Catches --real_data that changes nothing, or does not say which dataset is missing."""
    flags = "--size=laptop --batch_size=2 --rounds=1 --steps=1 --against=nothing --real_data=True --device=cpu".split()
    assert results(command("bench.py", *flags, f"--dataset={dataset}"))["fast_tokens_per_second"] > 0
    refused = command("bench.py", *flags, "--dataset=nowhere")
    assert refused.returncode != 0
    assert refused.stderr.count("\n") == 1
    assert "nowhere" in refused.stderr


def test_generation_is_timed_both_ways(command: Callable) -> None:
    """Catches generation that no longer runs."""
    found = results(command("bench.py", "--what=generation", "--size=laptop", "--new_tokens=5", "--rounds=1", "--device=cpu"))
    assert found["against"] == "plain"
    assert found["ratio"] > 0


@pytest.mark.parametrize("size, parameters", [("laptop", 803_072 + 8_192), ("gpt2", 124_373_760), ("gpt2-xl", 1_556_609_600)])
def test_sizing_counts_what_the_model_has(size: str, parameters: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a part that is left out or counted twice, and FLOPs of another context."""
    bench.main(parse(bench.Config, ["--what=sizing", f"--size={size}"]))
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    config = parse(bench.Config, [f"--size={size}"])
    with torch.device("meta"):
        model = GPT(bench.trained_shape(config))
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    assert found["parameters"] == pytest.approx(parameters, rel=0.02)
    assert found["flops_per_token"] == model.flops_per_token()
    assert found["optimal_tokens"] == 20 * found["parameters"]


def test_flops_are_those_of_the_windows_that_are_timed() -> None:
    """Catches a share of the peak that counts attention over a context that no window fills."""
    long, short = (bench.trained_flops(parse(bench.Config, [f"--block_size={size}"])) for size in (1024, 256))
    assert long - short == 12 * 12 * 768 * (1024 - 256)


def test_time_to_loss_counts_training_alone(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches evaluations on the clock, an iteration counted twice, and a crossing read from the wrong row."""

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
def test_what_makes_no_sense_is_refused(flag: str) -> None:
    """Catches a traceback, or a measurement of something else."""
    with pytest.raises(UserError, match=flag.partition("=")[0]):
        parse(bench.Config, [flag])
