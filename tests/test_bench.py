"""bench.py: its measurements run, its arithmetic is right, and the two ways are what their names say."""

import json
import multiprocessing
import re
import shlex
import signal
import statistics
import subprocess
from collections.abc import Callable
from pathlib import Path

from configurator import parse

import pytest
import torch
from conftest import run_train

import bench
import train
from model import GPTConfig
from nanogpt import gpu_benchmark, metrics
from nanogpt.device import pick_dtype
from nanogpt.errors import UserError

TINY = "--size=laptop --device=cpu --batch_size=2 --block_size=8".split()


@pytest.fixture
def forks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the processes of bench.py forks of one that has imported PyTorch, where the system has that."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    if "forkserver" in multiprocessing.get_all_start_methods():
        server = multiprocessing.get_context("forkserver")
        server.set_forkserver_preload(["torch", "torch._dynamo"])
        monkeypatch.setattr(multiprocessing, "get_context", lambda method: server)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], forks: None) -> Callable[..., dict]:
    """A function that runs bench.py with these flags in `tmp_path`; returns its line of JSON, and all "lines"."""
    monkeypatch.chdir(tmp_path)

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
    rounds = [re.findall(r"([\d,.]+) ms|ratio ([\d.]+)", line) for line in found["lines"] if line.startswith("round ")]
    ratios = [float(plain.replace(",", "")) / float(fast.replace(",", "")) for (fast, _), (plain, _), _ in rounds]
    assert [float(ratio) for *_, (_, ratio) in rounds] == pytest.approx(ratios, rel=0.2)  # times are rounded to 0.1 ms
    assert found["ratio"] == pytest.approx(statistics.median(ratios), rel=0.2)
    assert found["fast_megabytes"] > 50
    assert f"data: {dataset}" in found["lines"]
    assert json.loads((tmp_path / "trace.json").read_text(encoding="utf-8"))["traceEvents"]


@pytest.mark.parametrize("way", ["fast", "plain"])
def test_baseline_has_nanogpts_attention(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a baseline that is faster than nanoGPT, since it shares this repo's attention."""
    monkeypatch.setattr(bench.kernels, "EXPLICIT_MAX_TOKENS", {torch.float32: 128})
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # `work` ignores Ctrl-C
    pipe, other = multiprocessing.Pipe()
    other.send(0)  # no rounds
    bench.work(pipe, bench.Trainer, parse(bench.Config, [*TINY, "--real_data=False", "--keep_memory=False"]), way)
    assert bool(bench.kernels.EXPLICIT_MAX_TOKENS) == (way == "fast")


class Subject:
    """What a Worker times, but idle, except for an accident at the start or in a round."""

    description, device = "idle", "cpu"

    def __init__(self, config: bench.Config, way: str):
        self.config = config
        if not config.steps:
            self.accident()

    def accident(self) -> None:
        signal.raise_signal(signal.SIGINT)

    def warm_up(self) -> float:
        return 1.0

    def seconds_per_step(self, count: int) -> float:
        self.accident()
        return 2.0

    def report(self) -> str:
        return "reported"


class OutOfMemory(Subject):
    def accident(self) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")


class Mistaken(Subject):
    def accident(self) -> None:
        raise UserError("token ids must be below 65, got 66")


class Killed(Subject):
    def accident(self) -> None:
        signal.raise_signal(signal.SIGKILL)


class Buggy(Subject):
    def accident(self) -> None:
        raise ZeroDivisionError("a bug")


needs_kill = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")


@pytest.mark.parametrize("steps", [0, 1], ids=["start", "round"])
@pytest.mark.parametrize(
    ("kind", "told"),
    [
        (OutOfMemory, "fast: out of memory: lower --batch_size or --block_size, or choose a smaller --size"),
        (Mistaken, "fast: token ids must be below 65, got 66"),
        pytest.param(Killed, "fast: the process ended with status -9; if memory ran out, lower --batch_size", marks=needs_kill),
        (Buggy, "fast: the process ended with status 1; see its traceback above"),
    ],
)
def test_worker_that_fails(kind: type[Subject], told: str, steps: int, forks: None) -> None:
    """Catches a traceback in place of one line, or a worker that is waited for in vain."""
    with pytest.raises(UserError, match=f"^{re.escape(told)}$"):
        bench.Worker(kind, parse(bench.Config, [f"--steps={steps}"]), "fast").time_round(1)


def test_bug_in_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a bug without its traceback."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # `work` ignores Ctrl-C
    with pytest.raises(ZeroDivisionError):
        bench.work(multiprocessing.Pipe()[0], Buggy, parse(bench.Config, []), "fast")


def test_worker_without_a_parent(forks: None) -> None:
    """Catches the traceback of an idle worker below the line that says why another one failed."""
    worker = bench.Worker(Subject, parse(bench.Config, []), "fast")
    worker._pipe.close()
    worker._process.join()
    assert worker._process.exitcode == 0


def test_ctrl_c_is_for_the_parent(forks: None) -> None:
    """Catches the traceback of a worker below "interrupted"."""
    worker = bench.Worker(Subject, parse(bench.Config, []), "fast")
    assert worker.time_round(1) == 2.0
    assert worker.finish()[1] == "reported"


def test_ctrl_c_while_a_worker_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches the traceback of a worker that is importing PyTorch, and a parent that keeps ignoring Ctrl-C."""
    inherited, before = [], signal.getsignal(signal.SIGINT)

    class Spawn:
        def Process(self, target: Callable, args: tuple, daemon: bool) -> "Spawn":
            self.pipe = args[0]
            return self

        def start(self) -> None:
            inherited.append(signal.getsignal(signal.SIGINT))
            self.pipe.send(("idle", 1.0))

    monkeypatch.setattr(multiprocessing, "get_context", lambda method: Spawn())
    bench.Worker(Subject, parse(bench.Config, []), "fast")
    assert inherited == [signal.SIG_IGN]
    assert signal.getsignal(signal.SIGINT) == before


def test_fast_way_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches --activation_checkpointing or --compile in generation without effect, or a baseline that has them, too."""
    config = parse(bench.Config, [*TINY, "--activation_checkpointing=True", "--real_data=False", "--compile=True"])
    compiled = []
    monkeypatch.setattr(bench, "prepare_for_generation", lambda model, device, dtype, texts, compile: compiled.append(compile))
    for way in ("fast", "plain"):
        bench.TextGenerator(config, way)
    assert compiled == [True]

    config = config.replace(compile=False)
    saved = {}
    for way, settings in (("fast", {}), ("plain", bench.plain_settings("cpu"))):
        trainer, count = bench.Trainer(config.replace(**settings), way), []
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor, count=count: count.append(tensor) or tensor, lambda x: x):
            trainer.model(*trainer.batch(0))
        saved[way] = len(count)
        assert (trainer.loss_rows is None) == (way == "plain")  # nanoGPT's model also returns the logits
    assert saved["fast"] < saved["plain"] / 2


def test_batches_of_the_run_that_is_as_long() -> None:
    """Catches a run "as long" as the baseline that takes another time: an update of 32 windows takes up to two of 12."""
    recipe = parse(train.Config, [bench.FAST_RECIPE])
    assert (bench.SHORTEST["batch_size"], recipe.batch_size) == (12, 32)


def test_real_data(dataset: Path) -> None:
    """Catches a --real_data without effect, and a missing dataset that is not named."""
    flags = [*TINY, "--real_data=True", "--keep_memory=False"]
    x, y = bench.Trainer(parse(bench.Config, [*flags, f"--dataset={dataset}"]), "fast").batch(0)
    assert x.shape == (2, 8) and torch.equal(x[:, 1:], y[:, :-1])
    with pytest.raises(UserError, match="nowhere"):
        bench.main(parse(bench.Config, [*flags, "--dataset=nowhere"]))


def test_last_line_is_nanogpts(run: Callable[..., dict]) -> None:
    """Catches a last line that scripts for nanoGPT's bench.py cannot parse, or one with another time or MFU than the rest."""
    found = run(*TINY, "--rounds=1", "--steps=2", "--against=nothing", "--real_data=False")
    line = re.fullmatch(r"time per iteration: (\d+\.\d{4})ms, MFU: (\d+\.\d\d)%", found["lines"][-1])
    assert 2 * 8 / (float(line[1]) / 1e3) == pytest.approx(found["fast_tokens_per_second"], rel=1e-3)
    assert float(line[2]) == pytest.approx(100 * found["fast_share"], abs=0.006)
    measured = r"fast: median .* of \d+\.\d\d TFLOP/s \(measured matrix products\), peak memory .*"
    assert any(re.fullmatch(measured, line) for line in found["lines"])


def test_nanogpts_keys() -> None:
    """Catches a key of nanoGPT's bench.py that is unknown here, or without effect."""
    flags = "--batch_size=12 --block_size=512 --bias=True --real_data=False --seed=1 --device=cpu --dtype=bfloat16"
    config = parse(bench.Config, [*flags.split(), "--compile=False", "--profile=False"])
    assert bench.model_shape(config) == GPTConfig(block_size=512, vocab_size=50304, bias=True)
    assert bench.model_shape(parse(bench.Config, [])) == GPTConfig(bias=False)


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
@pytest.mark.parametrize("has_bfloat16", [True, False])
def test_plain_on_cuda_is_nanogpts_default(device: str, has_bfloat16: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a baseline that is slower than nanoGPT: in float32, not compiled, or with AdamW that is not fused."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or has_bfloat16)
    settings = bench.plain_settings(device)
    assert pick_dtype(settings["dtype"], device) == (torch.bfloat16 if has_bfloat16 else torch.float16)
    assert (settings["compile"], settings["fused"]) == (True, True)
    assert (settings["loss_rows"], settings["keep_memory"]) == (0, False)


@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_plain_elsewhere(device: str) -> None:
    """Catches a baseline faster than nanoGPT, which has no autocast, no fused AdamW and no oneDNN there."""
    settings = bench.plain_settings(device)
    assert pick_dtype(settings["dtype"], device) == torch.float32
    assert (settings["compile"], settings["fused"], settings["onednn"]) == (False, False, False)


def test_plain_generation_on_cuda_has_mixed_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a baseline that generates in float32 where nanoGPT's sample.py has autocast."""
    config = parse(bench.Config, ["--size=laptop", "--what=generation", "--new_tokens=1", "--device=cpu"])
    seen = []
    monkeypatch.setattr(bench, "plain_settings", lambda device: {"dtype": "bfloat16"})  # as on CUDA
    monkeypatch.setattr(bench, "sample_next", lambda logits, *_: seen.append(logits.dtype) or logits.argmax(-1, keepdim=True))
    bench.TextGenerator(config, "plain").generate()
    assert seen == [torch.bfloat16]


@pytest.mark.parametrize("flags, said", [(["--vocab_size=65"], "{dataset}"), (["--vocab_size=5"], "random tokens; ")])
def test_real_data_is_used_when_it_fits(flags: list[str], said: str, dataset: Path) -> None:
    """Catches real data that is there but unused, and a measurement that stops for data that nobody asked for."""
    config = parse(bench.Config, [*TINY, f"--dataset={dataset}", *flags])
    is_real, data = bench.pick_data(config, bench.model_shape(config))
    assert data.startswith(said.format(dataset=dataset))
    assert is_real == (data == str(dataset))
    config = parse(bench.Config, [*TINY, "--dataset=nowhere"])
    is_real, data = bench.pick_data(config, bench.model_shape(config))
    assert not is_real and "nowhere" in data
    assert bench.pick_data(config.replace(real_data=False), bench.model_shape(config)) == (False, "random tokens")


def test_generation(run: Callable[..., dict]) -> None:
    """Catches generation that fails in either way, a ratio the wrong way round, and a dtype that is not the one asked for."""
    found = run("--what=generation", "--size=laptop", "--new_tokens=5", "--rounds=1", "--device=cpu", "--dtype=bfloat16")
    assert (found["fast_dtype"], found["plain_dtype"]) == ("bfloat16", "float32")
    ratio = found["fast_tokens_per_second"] / found["plain_tokens_per_second"]
    assert found["ratio"] == pytest.approx(ratio, rel=0.01, abs=0.006)  # it has two decimals
    assert found["fast_megabytes"] > 50


@pytest.mark.parametrize(
    "flags, parameters",
    [
        (["--size=laptop"], 65 * 128 + 64 * 128 + 4 * 12 * 128**2 + 9 * 128),
        (["--size=gpt2"], 124_373_760),
        (["--size=gpt2-xl"], (50304 + 1024 + 2 * 48 + 1) * 1600 + 48 * 12 * 1600**2),
        (["--size=gpt2", "--bias=True", "--vocab_size=50257"], 124_439_808),  # OpenAI's 124M
        ("--size=laptop --n_layer=1 --n_head=2 --n_embd=6 --block_size=8 --vocab_size=5".split(), 5 * 6 + 8 * 6 + 12 * 36 + 18),
    ],
)
def test_sizing(flags: list[str], parameters: int, run: Callable[..., dict]) -> None:
    """Catches a shape that differs from its keys, and keys that the last line does not name."""
    found = run("--what=sizing", *flags)
    assert found["parameters"] == parameters
    assert found["optimal_tokens"] == 20 * found["parameters"]
    assert found["size"].split(", ")[0] == flags[0].removeprefix("--size=")
    assert set(found["size"].split(", ")[1:]) == {flag[2:] for flag in flags[1:]}


def test_sizing_of_a_run(run: Callable[..., dict], dataset: Path, tmp_path: Path) -> None:
    """Catches a run's folder whose shape is not read, keys that no longer override it, and a traceback without a run."""
    shape = "--n_layer=1 --n_head=1 --n_embd=8 --block_size=8 --bias=True --gradient_accumulation_steps=1".split()
    flags = [*shape, "--device=cpu", "--max_iters=1", "--eval_iters=1", "--batch_size=2", f"--dataset={dataset}"]
    run_train(*flags, f"--out_dir={tmp_path / 'out'}")
    weights = torch.load(tmp_path / "out" / "ckpt.pt", weights_only=True)["model"]
    count = sum(tensor.numel() for name, tensor in weights.items() if name != "lm_head.weight")
    assert run("--what=sizing", f"--out_dir={tmp_path / 'out'}")["parameters"] == count
    assert run("--what=sizing", f"--out_dir={tmp_path / 'out'}", "--block_size=10")["parameters"] == count + 2 * 8
    with pytest.raises(UserError, match=r"--out_dir=nowhere: no such folder"):
        bench.main(parse(bench.Config, ["--what=sizing", "--out_dir=nowhere"]))


def test_days_of_training(run: Callable[..., dict]) -> None:
    """Catches keys without effect. nanoGPT's notebook says 3.46 days for GPT-2 on eight A100s."""
    flags = ["--what=sizing", "--vocab_size=50257", "--tokens=300e9"]
    assert run(*flags)["days_by_6ND"] == pytest.approx(3.46, abs=0.005)
    assert run(*flags, "--peak=624e12", "--mfu=0.6", "--gpus=2")["days_by_6ND"] == pytest.approx(3.46, abs=0.005)
    assert run(*flags, "--gpus=1")["days_by_6ND"] == pytest.approx(27.67, abs=0.005)


def test_scaling(run: Callable[..., dict], tmp_path: Path) -> None:
    """Catches a command without its picture, and numbers of another model."""
    found = run("--what=scaling", "--size=gpt2-medium", "--tokens=7e9")
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")
    assert "curves in scaling.png" in found["lines"]
    assert found["parameters"] == run("--what=sizing", "--size=gpt2-medium")["parameters"]
    assert found["tokens"] == 7e9


def test_time_to_loss_excludes_evaluations(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches evaluations that are timed, an iteration counted twice, and a wrong interpolation."""

    def train(command: list[str], **_: object) -> subprocess.CompletedProcess:
        folder = Path(next(flag for flag in command if flag.startswith("--out_dir=")).removeprefix("--out_dir="))
        lines = ["iteration,tokens,seconds,val_loss,tokens_per_second"]
        lines += ["0,0,9,3.0,", "0,0,10,,50", "1,100,12,,50", "2,200,90,2.0,", "2,200,91,,25", "3,300,99,1.0,"]
        (folder / "metrics.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", train)
    monkeypatch.setattr(metrics, "COLUMNS", ["iteration", "tokens", "seconds", "val_loss", "tokens_per_second"])
    found = bench.timed_run("any", parse(bench.Config, []), "config/any.py", {})
    assert found == [(0, 0, 3.0), (4, 2, 2.0), (8, 3, 1.0)]
    assert [bench.crossing(found, target) for target in (2.5, 2.0, 1.25, 0.9)] == [2.0, 4.0, 7.0, None]


def test_time_to_loss_without_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a traceback below the message of train.py, as when the dataset is not prepared."""
    monkeypatch.setattr(bench, "ROOT", Path(__file__).parent)  # has no train.py
    with pytest.raises(UserError, match=r"^train\.py failed with status 2; see its message above$"):
        bench.timed_run("any", parse(bench.Config, []), "config/any.py", {})


@pytest.mark.parametrize("measurement", gpu_benchmark.MEASUREMENTS)
def test_commands_on_a_gpu(measurement: gpu_benchmark.Measurement) -> None:
    """Catches a key that does not exist, found only once a GPU is there."""
    script, *flags = measurement.command.split()
    parse({"bench.py": bench.Config, "train.py": train.Config}[script], [*flags, "--device=cpu"])
    assert (script == "train.py") == bool(measurement.seeds)


def test_measurements_on_a_gpu(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches results that are not read, one failure that ends the rest, and a time limit without effect."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    flags = "--device=cpu --n_layer=1 --n_head=1 --n_embd=16 --block_size=16 --vocab_size=50".split()
    generation = f"{gpu_benchmark.GENERATION} --against=nothing --rounds=1 --new_tokens=4 --batch_size=2"
    commands = [generation, "bench.py --dataset=nowhere --real_data=True"]
    found = gpu_benchmark.measure([gpu_benchmark.Measurement("any", command) for command in commands], flags)
    assert found[0]["batch_size"] == 2 and found[0]["fast_tokens_per_second"] > 0
    assert found[0]["command"] == shlex.join([*generation.split(), *flags])
    assert "nowhere" in found[1]["error"] and "\n" not in found[1]["error"]
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")] == found
    (late,) = gpu_benchmark.measure([gpu_benchmark.MEASUREMENTS[0]], flags, limit_seconds=0)
    assert late["error"] == "no time left"


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["Traceback (most recent call last):", "torch.OutOfMemoryError: CUDA: 2 GiB", "bench.py: error: status 1"], 1),
        (["a warning", "bench.py: error: fast: out of memory"], 1),
    ],
)
def test_cause_of_a_failed_measurement(lines: list[str], expected: int) -> None:
    """Catches minutes of a GPU spent for "the process ended", without the reason."""
    assert gpu_benchmark.cause("\n".join(lines) + "\n") == lines[expected]
    assert gpu_benchmark.cause("") == "no message"


def test_seeds_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches seeds that share a folder, and a final loss in place of the best one."""

    def run(command: list[str], deadline: float) -> None:
        flags = dict(flag.split("=") for flag in command if "=" in flag)
        folder, seed = Path(flags["--out_dir"]), int(flags["--seed"])
        folder.mkdir()
        rows = f"0,0,0,4.0\n1,9,1,\n250,9,2,1.{seed}\n500,9,3,3.0\n"
        (folder / "metrics.csv").write_text("iteration,tokens,seconds,val_loss\n" + rows, encoding="utf-8")

    monkeypatch.setattr(gpu_benchmark, "run", run)
    (found,) = gpu_benchmark.measure([gpu_benchmark.Measurement("any", "train.py --batch_size=1", (2, 3, 4))], ["--size=gpt2"])
    assert found["command"] == "train.py --batch_size=1"
    assert (found["best_val_losses"], found["at_iterations"], found["mean"]) == ((1.2, 1.3, 1.4), (250, 250, 250), 1.3)


def test_gpu_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches ten minutes of measuring a CPU."""
    monkeypatch.setattr(bench, "pick_device", lambda name: "cpu")
    with pytest.raises(UserError, match=r"--what=gpu needs a GPU"):
        bench.main(parse(bench.Config, ["--what=gpu"]))


@pytest.mark.parametrize("flag", ["--against=transformers", "--mfu=2", "--what=nothing", "--out=a.txt", "--dtype=int8"])
def test_impossible_flags_are_refused(flag: str) -> None:
    """Catches a traceback, or a measurement of something else than asked for."""
    with pytest.raises(UserError, match=flag.partition("=")[0]):
        parse(bench.Config, [flag])


def test_heads_must_divide_channels() -> None:
    """Catches an assertion for a shape that cannot be."""
    with pytest.raises(UserError, match=r"n_head must divide n_embd=128, got --n_head=3"):
        bench.main(parse(bench.Config, ["--what=sizing", "--size=laptop", "--n_head=3"]))
