"""train.py: schedule, loop, resuming and finetuning, with tiny models and in this process."""

import csv
import itertools
import json
import math
import os
import re
import shutil
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import configurator

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import train
from nanogpt import checkpoint, corpus
from nanogpt.checkpoint import Checkpoint, open_checkpoint
from nanogpt.dataset import Dataset
from nanogpt.device import seed_dropout
from nanogpt.distributed import Group, share_batch
from nanogpt.errors import UserError
from nanogpt.run import MAX_SKIPPED_STEPS
from nanogpt.tokenizer import CharTokenizer

TINY = ["--n_layer=1", "--n_head=2", "--n_embd=16", "--block_size=16", "--batch_size=4", "--gradient_accumulation_steps=2"]
SHORT = [
    "--eval_iters=2",
    "--eval_interval=5",
    "--max_iters=10",
    "--warmup_iters=2",
    "--lr_decay_iters=10",
    "--device=cpu",
    "--dtype=float32",
]
GOLDEN = [2.90378, 2.88907, 2.82238, 2.79254, 2.71224, 2.66864, 2.65597, 2.62479, 2.64610, 2.62531]


def run(*flags: str | Path) -> train.Config:
    """Run train.py with these arguments, and return its config."""
    config = configurator.parse(train.Config, [str(flag) for flag in flags])
    train.main(config)
    return config


def rows(out_dir: Path) -> list[dict[str, str]]:
    """Return the rows of metrics.csv."""
    with open(out_dir / "metrics.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def losses(out_dir: Path) -> dict[int, float]:
    """Return the training loss of each iteration."""
    return {int(row["iteration"]): float(row["loss"]) for row in rows(out_dir) if row["loss"]}


def without(columns: set[str], rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Return the rows without some of their columns."""
    return [{name: value for name, value in row.items() if name not in columns} for row in rows]


def samples(out: str) -> list[str]:
    """Return the samples in what a run has printed."""
    return re.findall(r"^--- sample after [\d,]+ iterations\n(.*?)\n---$", out, re.MULTILINE | re.DOTALL)


def weights(path: Path) -> dict[str, torch.Tensor]:
    """Return the weights in a checkpoint."""
    return torch.load(path, weights_only=True)["model"]


@pytest.fixture
def flags(dataset: Path, tmp_path: Path) -> list[str]:
    return [*TINY, *SHORT, f"--dataset={dataset}", f"--out_dir={tmp_path / 'out'}"]


@pytest.fixture
def out_dir(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.mark.parametrize(
    ("iteration", "expected"),
    [(0, 0.25), (1, 0.5), (2, 0.75), (3, 1.0), (7, 0.1 + 0.9 * 0.5), (11, 0.1), (100, 0.1)],
)
def test_learning_rate_schedule(iteration: int, expected: float) -> None:
    """Catches a schedule that misses its peak, the middle of its cosine or its end."""
    assert train.get_lr(iteration, 1.0, 0.1, warmup_iters=3, lr_decay_iters=11) == pytest.approx(expected)


@pytest.mark.parametrize("lr_decay_iters", [0, 3, 5])
def test_decay_shorter_than_warmup(lr_decay_iters: int) -> None:
    """Catches a division by zero if the decay ends before the warmup, or with it."""
    rates = [train.get_lr(i, 1.0, 0.1, warmup_iters=5, lr_decay_iters=lr_decay_iters) for i in range(8)]
    assert rates[:5] == pytest.approx([i / 6 for i in range(1, 6)])
    assert rates[5:] == [0.1] * 3


def test_max_iters_is_the_number_of_updates(flags: list[str], out_dir: Path) -> None:
    """Catches one update too many (nanoGPT makes it) and a run that ends without its last checkpoint."""
    run(*flags, "--max_iters=7")
    assert sorted(losses(out_dir)) == list(range(7))
    assert [int(row["iteration"]) for row in rows(out_dir) if row["val_loss"]] == [0, 5, 7]
    state = torch.load(out_dir / "ckpt.pt", weights_only=True)
    assert state["iter_num"] == 7
    assert {float(slot["step"]) for slot in state["optimizer"]["state"].values()} == {7.0}


def test_printed_lines_are_nanogpts(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Catches lines that people's scripts can no longer parse."""
    run(*flags, "--max_iters=1")
    lines = capsys.readouterr().out.splitlines()
    assert any(re.fullmatch(r"iter 0: loss \d\.\d{4}, time \d+\.\d\dms, mfu \d+\.\d\d%", line) for line in lines)
    assert any(line.startswith("step 1: train loss ") and ", val loss " in line for line in lines)


def test_golden_losses(flags: list[str], out_dir: Path) -> None:
    """Catches a refactoring of model, batches or optimizer that changes the numbers."""
    run(*flags, "--learning_rate=1e-2")
    by_iteration = losses(out_dir)
    assert [by_iteration[i] for i in range(10)] == pytest.approx(GOLDEN, abs=2e-3)


def test_first_update_matches_a_plain_loop(flags: list[str], dataset: Path, out_dir: Path) -> None:
    """Catches gradient accumulation, clipping or weight decay that differs from one step on the whole batch."""
    config = run(*flags, "--max_iters=1", "--grad_clip=0.5", "--learning_rate=1e-2")

    # the same batch in one piece
    torch.manual_seed(config.seed)
    data = Dataset(str(dataset))
    model, _ = train.load_or_init(config, data, None)
    x, y = data.windows("train", data.draw("train", "train", config.seed, 0, 8, 16), 16, 100)
    _, loss = model(x, y)
    loss.backward()
    assert losses(out_dir)[0] == pytest.approx(loss.item(), abs=1e-5)
    norm = math.sqrt(sum(p.grad.square().sum().item() for p in model.parameters()))
    assert float(next(row["grad_norm"] for row in rows(out_dir) if row["grad_norm"])) == pytest.approx(norm, rel=1e-4)

    # one step of PyTorch's AdamW on the clipped gradient
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": 0.1},
            {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
        ],
        lr=1e-2 / 3,
        betas=(0.9, 0.95),
    )
    for parameter in model.parameters():
        parameter.grad *= 0.5 / norm
    optimizer.step()
    for name, tensor in weights(out_dir / "ckpt.pt").items():
        torch.testing.assert_close(tensor, model.state_dict()[name], rtol=1e-4, atol=1e-6)


def test_micro_batches_change_no_loss(flags: list[str], out_dir: Path) -> None:
    """Catches micro-batches that are drawn one by one instead of cut from one batch."""
    run(*flags)
    first = losses(out_dir)
    run(*flags, "--batch_size=8", "--gradient_accumulation_steps=1")
    assert losses(out_dir) == pytest.approx(first, abs=1e-4)


@pytest.mark.parametrize("micro_batches", [1, 2, 8])
def test_masked_loss_is_the_mean_over_learned_targets(
    flags: list[str], dataset: Path, out_dir: Path, micro_batches: int
) -> None:
    """Catches micro-batches that count equally although they have few learned targets, or none."""
    mask = np.zeros((dataset / "train.bin").stat().st_size, np.uint8)
    mask[: len(mask) // 3] = 1  # the rest of the windows have none
    mask.tofile(dataset / "train.mask.bin")
    split = [f"--gradient_accumulation_steps={micro_batches}", f"--batch_size={8 // micro_batches}"]
    config = run(*flags, *split, "--max_iters=1", "--eval_iters=0")
    torch.manual_seed(config.seed)
    data = Dataset(str(dataset))
    model, _ = train.load_or_init(config, data, None)
    x, y = data.windows("train", data.draw("train", "train", config.seed, 0, 8, 16), 16, 100)
    assert 0 < (y != -1).any(1).sum() < 8
    F.cross_entropy(model(x, y)[0].flatten(0, 1), y.flatten(), ignore_index=-1).backward()
    with torch.no_grad():
        loss = F.cross_entropy(model(x, y)[0].flatten(0, 1), y.flatten(), ignore_index=-1).item()
    assert losses(out_dir)[0] == pytest.approx(loss, abs=1e-6)
    norm = math.sqrt(sum(p.grad.square().sum().item() for p in model.parameters()))
    assert float(next(row["grad_norm"] for row in rows(out_dir) if row["grad_norm"])) == pytest.approx(norm, rel=1e-5)


def test_batch_without_learned_targets(flags: list[str], dataset: Path, out_dir: Path) -> None:
    """Catches a division by zero."""
    mask = np.zeros((dataset / "train.bin").stat().st_size, np.uint8)
    mask[-1] = 1  # the first batch does not reach it
    mask.tofile(dataset / "train.mask.bin")
    run(*flags, "--max_iters=1", "--eval_iters=0")
    assert losses(out_dir) == {0: 0.0}


def test_each_micro_batch_has_its_own_dropout(flags: list[str], dataset: Path, out_dir: Path) -> None:
    """Catches micro-batches that drop the same units."""
    config = run(*flags, "--max_iters=1", "--dropout=0.5")
    torch.manual_seed(config.seed)
    data = Dataset(str(dataset))
    model, _ = train.load_or_init(config, data, None)
    x, y = data.windows("train", data.draw("train", "train", config.seed, 0, 8, 16), 16, 100)
    expected = 0.0
    for micro_batch, (micro_x, micro_y) in enumerate(zip(x.split(4), y.split(4), strict=True)):
        seed_dropout(config.seed, 0, micro_batch)
        expected += model(micro_x, micro_y)[1].item() / 2
    assert losses(out_dir)[0] == pytest.approx(expected, abs=1e-5)


def test_whole_split_evaluation(flags: list[str], dataset: Path, out_dir: Path) -> None:
    """Catches a reported loss that is not the saved model's mean over all tokens of the split, without dropout."""
    config = run(*flags, "--max_iters=1", "--eval_iters=0", "--batch_size=7", "--dropout=0.5")
    model = checkpoint.build_model(checkpoint.load(out_dir / "ckpt.pt")).eval()
    ids = torch.from_numpy(np.fromfile(dataset / "val.bin", dtype=np.uint8).astype(np.int64))
    total = 0.0
    with torch.no_grad():
        for i in range(0, len(ids) - 1, config.block_size):
            x, y = ids[i : i + config.block_size], ids[i + 1 : i + config.block_size + 1]
            logits, _ = model(x[None, : len(y)], y[None])
            total -= torch.log_softmax(logits[0], dim=-1).gather(1, y[:, None]).sum().item()
    assert float(rows(out_dir)[-1]["val_loss"]) == pytest.approx(total / (len(ids) - 1), abs=1e-5)


def test_evaluation_is_repeatable_and_leaves_training_alone(flags: list[str], out_dir: Path) -> None:
    """Catches evaluations on different windows, and training that depends on how often it is evaluated."""
    run(*flags, "--learning_rate=1e-9", "--min_lr=1e-9", "--weight_decay=0")
    val_losses = [float(row["val_loss"]) for row in rows(out_dir) if row["val_loss"]]
    assert len(val_losses) == 3
    assert val_losses == pytest.approx([val_losses[0]] * 3, abs=1e-5)
    first = losses(out_dir)
    run(*flags, "--learning_rate=1e-9", "--min_lr=1e-9", "--weight_decay=0", "--eval_interval=3", "--dropout=0.0")
    assert losses(out_dir) == first


def test_resume_is_bit_exact(flags: list[str], tmp_path: Path, out_dir: Path) -> None:
    """Catches state that a checkpoint lacks: moments, place in the data, dropout seeds, rows of metrics.csv."""
    run(*flags, "--dropout=0.2")
    parts = f"--out_dir={tmp_path / 'parts'}"
    run(*flags, "--dropout=0.2", parts, "--max_iters=5")
    run("--init_from=resume", parts, "--max_iters=10")
    whole, whole_rows = weights(out_dir / "ckpt.pt"), rows(out_dir)
    assert all(torch.equal(tensor, whole[name]) for name, tensor in weights(tmp_path / "parts" / "ckpt.pt").items())
    measured = {"seconds", "tokens_per_second", "mfu", "peak_memory_mb"}
    assert without(measured, rows(tmp_path / "parts")) == without(measured, whole_rows)


def test_resume_finds_a_dataset_by_its_relative_path(
    flags: list[str], dataset: Path, out_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a relative --dataset that the run finds, but not the run that resumes it."""
    monkeypatch.chdir(dataset.parent)
    run(*flags, f"--dataset=./{dataset.name}", "--max_iters=1")
    assert run("--init_from=resume", f"--out_dir={out_dir}", "--max_iters=2").dataset == "openwebtext"  # not given again
    assert sorted(losses(out_dir)) == [0, 1]


def test_resume_takes_its_keys_from_the_checkpoint(flags: list[str], out_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a resumed run with default keys, or one that ignores a key given for it."""
    run(*flags, "--learning_rate=0.0123", "--max_iters=5", "--seed=7")
    run("--init_from=resume", f"--out_dir={out_dir}", "--n_embd=64", "--beta2=0.9", "--max_iters=6")
    output = capsys.readouterr()
    assert "n_embd=16, used instead of n_embd=64" in output.err
    assert output.out.splitlines().count("ignored: n_embd=64 (the checkpoint has 16)") == 2  # in the summary, and at the end
    config = json.loads((out_dir / "config.json").read_text(encoding="utf-8"))
    keys = ("learning_rate", "seed", "beta2", "max_iters", "n_embd", "block_size")
    assert [config[key] for key in keys] == [0.0123, 7, 0.9, 6, 16, 16]
    groups = torch.load(out_dir / "ckpt.pt", weights_only=True)["optimizer"]["param_groups"]
    assert [group["betas"][1] for group in groups] == [0.9, 0.9]


def test_resuming_a_finished_run(flags: list[str], out_dir: Path) -> None:
    """Catches a finished run that is evaluated, saved or trained again."""
    run(*flags)
    before = (out_dir / "metrics.csv").read_bytes(), os.stat(out_dir / "ckpt.pt").st_mtime_ns
    run("--init_from=resume", f"--out_dir={out_dir}")
    assert before == ((out_dir / "metrics.csv").read_bytes(), os.stat(out_dir / "ckpt.pt").st_mtime_ns)


def test_best_checkpoint_survives_a_worse_loss(flags: list[str], out_dir: Path) -> None:
    """Catches a worse loss that is recorded as the best."""
    run(*flags, "--learning_rate=1e-2", "--always_save_checkpoint=False")
    best = float(torch.load(out_dir / "ckpt.pt", weights_only=True)["best_val_loss"])
    run("--init_from=resume", f"--out_dir={out_dir}", "--max_iters=20", "--learning_rate=3", "--decay_lr=False")
    evaluations = [float(row["val_loss"]) for row in rows(out_dir) if row["val_loss"]]
    assert min(evaluations[-2:]) > best
    assert torch.load(out_dir / "ckpt.pt", weights_only=True)["iter_num"] == 10
    last = torch.load(out_dir / "last.pt", weights_only=True)
    assert (last["iter_num"], float(last["best_val_loss"])) == (20, pytest.approx(best))


def test_ending_names_the_loss_of_the_saved_weights(
    flags: list[str], out_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches the best loss beside a file whose weights are worse."""
    run(*flags, "--learning_rate=1e-2")
    bits = math.log2(math.e) * float(rows(out_dir)[-1]["val_loss"])  # of the loss: a character is a byte
    ending = rf"^best val loss \d\.\d{{4}}, {bits:.4f} bits per byte; checkpoint in {out_dir / 'ckpt.pt'}$"
    assert re.search(ending, capsys.readouterr().out, re.M)
    resume = ["--init_from=resume", f"--out_dir={out_dir}"]
    run(*resume, "--max_iters=20", "--learning_rate=3", "--decay_lr=False")
    *_, best, last = [float(row["val_loss"]) for row in rows(out_dir) if row["val_loss"]]
    best = min(float(row["val_loss"]) for row in rows(out_dir) if row["val_loss"])
    ending = f"checkpoint in {out_dir / 'ckpt.pt'} (best val loss so far: {best:.4f})\n"
    assert f"\nval loss {last:.4f}, {last / math.log(2):.4f} bits per byte; {ending}" in capsys.readouterr().out
    run(*resume)  # no iterations left; the bits per byte are not known to this process
    assert f"\nval loss {last:.4f}; {ending}" in capsys.readouterr().out
    run(*resume, "--max_iters=25", "--always_save_checkpoint=False", "--decay_lr=False")  # keeps ckpt.pt as it is
    assert f"\nval loss {last:.4f}; {ending}" in capsys.readouterr().out


def test_ending_of_a_run_that_never_improves(
    flags: list[str], out_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches finetuning that only makes a model worse, and does not say where its weights are and how good it was."""
    run(*flags, "--learning_rate=1e-2")
    capsys.readouterr()
    worse = tmp_path / "worse"
    flags = [*flags, f"--init_from={out_dir}", f"--out_dir={worse}", "--learning_rate=3", "--decay_lr=False"]
    run(*flags, "--always_save_checkpoint=False")
    assert sorted(path.name for path in worse.glob("*.pt")) == ["last.pt"]
    ending = f"\ncheckpoint in {worse / 'last.pt'} (best val loss so far: {float(rows(worse)[0]['val_loss']):.4f})\nnext: "
    assert ending in capsys.readouterr().out


def test_resume_when_another_run_has_just_saved(
    flags: list[str], out_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a run that goes on from the state before the newest, and then deletes that one."""
    run(*flags, "--max_iters=5")
    shutil.copytree(out_dir, tmp_path / "further")
    run("--init_from=resume", f"--out_dir={tmp_path / 'further'}", "--max_iters=8")

    def open_early(*arguments: Any, **options: Any) -> Checkpoint:
        opened = open_checkpoint(*arguments, **options)
        shutil.copy(tmp_path / "further" / "ckpt.pt", out_dir / "last.pt")
        return opened

    monkeypatch.setattr(train, "open_checkpoint", open_early)
    with pytest.raises(UserError, match="1 of 1 processes read another state than rank 0's newest, after 8 iterations"):
        run("--init_from=resume", f"--out_dir={out_dir}", "--max_iters=9")
    assert torch.load(out_dir / "last.pt", weights_only=True)["iter_num"] == 8


@pytest.mark.parametrize("compiled", [True, False])
def test_batches_of_a_compiled_model_are_static(flags: list[str], compiled: bool) -> None:
    """Catches a training step that is compiled for any shape after an evaluation of whole splits."""
    config = configurator.parse(train.Config, [*flags, f"--compile={compiled}"])
    data = Dataset(config.dataset)
    machine = train.resolve_machine(config, Group(), None, data)
    x, y, _ = next(train.training_batches(data, config, machine, Group(), 0, 100))
    assert [hasattr(tensor, "_dynamo_static_indices") for tensor in (x, y)] == [compiled, compiled]


def test_finetuning_starts_from_the_weights(flags: list[str], out_dir: Path, tmp_path: Path) -> None:
    """Catches finetuning from random weights, with the old optimizer, or at the old iteration."""
    run(*flags, "--learning_rate=1e-2")
    for index, source in enumerate([out_dir, out_dir / "ckpt.pt"]):
        tuned = tmp_path / f"tuned{index}"
        run(*flags, f"--init_from={source}", f"--out_dir={tuned}", "--max_iters=1", "--block_size=8", "--eval_iters=0")
        first = float(rows(tuned)[0]["val_loss"])
        assert first < 2.75  # the trained weights give 2.6, new ones ln(18) = 2.89
        state = torch.load(tuned / "ckpt.pt", weights_only=True)
        assert (state["iter_num"], state["model_args"]["block_size"]) == (1, 8)


def test_ending_of_a_resumed_run_that_kept_its_best(
    flags: list[str], out_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches the bits per byte of another evaluation beside the loss of the saved weights."""
    run(*flags, "--learning_rate=1e-2", "--always_save_checkpoint=False")
    best = float(rows(out_dir)[-1]["val_loss"])
    run("--init_from=resume", f"--out_dir={out_dir}", "--max_iters=15", "--learning_rate=3", "--decay_lr=False")
    assert f"\nbest val loss {best:.4f}; checkpoint in {out_dir / 'ckpt.pt'}\n" in capsys.readouterr().out


def test_eval_only_reports_perplexity_and_bits_per_byte(
    flags: list[str], out_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches figures of another split, of a few batches, or of an evaluation without text that has bits per byte."""
    run(*flags, "--eval_iters=0", "--max_iters=1")
    evaluation = rows(out_dir)[-1]
    capsys.readouterr()
    run("--init_from=resume", f"--out_dir={out_dir}", "--eval_only=True", "--batch_size=3")
    first, *report = capsys.readouterr().out.splitlines()
    train_loss, val_loss = float(evaluation["train_loss"]), float(evaluation["val_loss"])
    assert first == f"step 1: train loss {train_loss:.4f}, val loss {val_loss:.4f}"
    for line, split, loss in zip(report, ("train", "val"), (train_loss, val_loss), strict=True):
        found = re.fullmatch(rf"{split}: loss ([\d.]+), perplexity ([\d.]+), ([\d.]+) bits per byte", line)
        assert [float(number) for number in found.groups()] == pytest.approx(
            [loss, math.exp(loss), loss / math.log(2)], abs=0.006
        )


def test_eval_only_writes_nothing(flags: list[str], out_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches an evaluation that creates or overwrites a run."""
    run(*flags, "--eval_only=True")
    assert "step 0: train loss " in capsys.readouterr().out
    assert not out_dir.exists()
    run(*flags)
    before = {path.name: path.read_bytes() for path in out_dir.iterdir()}
    capsys.readouterr()
    run("--init_from=resume", f"--out_dir={out_dir}", "--eval_only=True")
    assert capsys.readouterr().out.startswith("step 10: train loss ")
    assert before == {path.name: path.read_bytes() for path in out_dir.iterdir()}


def test_eval_only_takes_the_checkpoint_of_sample(flags: list[str], out_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches an evaluation of other weights than those that sample.py, and nanoGPT's --eval_only, load."""
    run(*flags, "--max_iters=3", "--always_save_checkpoint=False")
    run("--init_from=resume", f"--out_dir={out_dir}", "--max_iters=6", "--learning_rate=3", "--decay_lr=False")
    assert (out_dir / "last.pt").exists()
    capsys.readouterr()
    run("--init_from=resume", f"--out_dir={out_dir}", "--eval_only=True")
    assert capsys.readouterr().out.startswith("step 3: train loss ")


def test_nan_loss_stops_the_run_before_the_update(flags: list[str], out_dir: Path) -> None:
    """Catches a run that goes on with NaN weights, or saves them."""
    run(*flags, "--max_iters=5")
    before = (out_dir / "ckpt.pt").read_bytes()
    for eval_interval, name in ((1, "train loss"), (5, "loss")):  # found by the evaluation, and by the loop
        with pytest.raises(UserError, match=f"iteration 6: the {name} is (nan|inf)"):
            run(*flags, "--init_from=resume", "--learning_rate=1e30", "--decay_lr=False", f"--eval_interval={eval_interval}")
        assert (out_dir / "ckpt.pt").read_bytes() == before


@pytest.mark.parametrize("finite_again", [False, True])
def test_gradient_that_stays_infinite_stops_a_float16_run(
    flags: list[str], monkeypatch: pytest.MonkeyPatch, finite_again: bool
) -> None:
    """Catches a GradScaler that skips every step for ever; it may skip some."""
    norms = itertools.cycle([math.inf] * (MAX_SKIPPED_STEPS - 1) + [1.0 if finite_again else math.inf])
    monkeypatch.setattr(train, "clip_gradient", lambda *arguments: next(norms))
    flags = [*flags, "--max_iters=90", "--eval_interval=90", "--dtype=float16"]
    with nullcontext() if finite_again else pytest.raises(UserError, match=r"iteration 39: .* 40 iterations in a row is inf"):
        run(*flags)


def test_bigram_reaches_the_entropy_of_pairs(dataset: Path, out_dir: Path) -> None:
    """Catches a bigram model that learns anything but the frequencies of pairs."""
    config = Path(train.__file__).parent / "config" / "train_bigram_char.py"
    schedule = ["--learning_rate=0.05", "--max_iters=1000", "--lr_decay_iters=1000"]
    run(config, f"--dataset={dataset}", f"--out_dir={out_dir}", "--device=cpu", "--dtype=float32", *schedule)
    ids = np.fromfile(dataset / "train.bin", dtype=np.uint8)
    pairs = np.zeros((ids.max() + 1, ids.max() + 1))
    np.add.at(pairs, (ids[:-1], ids[1:]), 1)
    probs = pairs / np.maximum(pairs.sum(axis=1, keepdims=True), 1)
    entropy = -(pairs * np.log(np.where(probs > 0, probs, 1))).sum() / pairs.sum()
    assert float(rows(out_dir)[-1]["train_loss"]) == pytest.approx(entropy, abs=0.02)


def test_bigram_recipe_on_tiny_shakespeare(shakespeare: str, tmp_path: Path, out_dir: Path) -> None:
    """Catches a recipe that falls short of the best possible bigram model: 2.484 on the validation split."""
    cut = int(len(shakespeare) * 0.9)
    tokenizer = CharTokenizer.from_text(shakespeare)
    corpus.write_dataset(tmp_path / "shakespeare", [shakespeare[:cut]], [shakespeare[cut:]], tokenizer, "Tiny Shakespeare")
    train_ids, val_ids = (np.array(tokenizer.encode(part)) for part in (shakespeare[:cut], shakespeare[cut:]))
    pairs = np.ones((65, 65))  # add-one smoothing, so that no pair is impossible
    np.add.at(pairs, (train_ids[:-1], train_ids[1:]), 1)
    nats = -np.log(pairs / pairs.sum(axis=1, keepdims=True))
    assert nats[train_ids[:-1], train_ids[1:]].mean() == pytest.approx(2.452, abs=0.005)
    assert nats[val_ids[:-1], val_ids[1:]].mean() == pytest.approx(2.484, abs=0.005)

    config = Path(train.__file__).parent / "config" / "train_bigram_char.py"
    flags = ["--eval_interval=2000", "--device=cpu", "--dtype=float32"]
    run(config, f"--dataset={tmp_path / 'shakespeare'}", f"--out_dir={out_dir}", *flags)
    assert float(rows(out_dir)[-1]["val_loss"]) == pytest.approx(2.484, abs=0.02)


@pytest.mark.parametrize("model", ["gpt", "bigram"])
def test_samples_leave_training_alone(model: str, flags: list[str], out_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a sample that takes training's random numbers, leaves dropout off, or is always the same."""
    flags += [f"--model={model}", "--dropout=0.2", "--learning_rate=1e-2", "--max_iters=8"]
    run(*flags)
    assert samples(capsys.readouterr().out) == []
    expected, expected_weights = losses(out_dir), weights(out_dir / "ckpt.pt")
    run(*flags, "--sample_interval=3")
    texts = samples(capsys.readouterr().out)
    assert losses(out_dir) == expected
    assert all(torch.equal(tensor, expected_weights[name]) for name, tensor in weights(out_dir / "ckpt.pt").items())
    assert len(texts) == 2 and texts[0] != texts[1]  # after 3 and 6 iterations
    assert all(150 < len(text) <= 200 for text in texts)


def test_time_of_samples_is_not_counted(
    flags: list[str], out_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches an iteration that seems slow because a sample was generated before it."""
    now = [1000.0]

    def clock() -> float:
        now[0] += 0.001
        return now[0]

    monkeypatch.setattr(time, "perf_counter", clock)

    def sample(*arguments: object) -> str:
        now[0] += 60
        return "text"

    monkeypatch.setattr(train, "sample_text", sample)
    run(*flags, "--sample_interval=2", "--max_iters=6")
    out = capsys.readouterr().out
    assert len(samples(out)) == 3
    assert max(float(time) for time in re.findall(r"time ([\d.]+)ms", out)) < 100


def test_clipping_and_memory_are_logged(flags: list[str], out_dir: Path) -> None:
    """Catches clipped steps that are not counted, and memory in another unit."""
    run(*flags, "--grad_clip=0")
    logged = [row for row in rows(out_dir) if row["loss"]]
    assert {row["clipped"] for row in logged} == {"0"}
    middle = sorted(float(row["grad_norm"]) for row in logged)[5]
    run(*flags, f"--grad_clip={middle}", "--learning_rate=1e-6", "--min_lr=1e-6")
    logged = [row for row in rows(out_dir) if row["loss"]]
    assert {row["clipped"] for row in logged} == {"0", "1"}
    assert all((float(row["grad_norm"]) > middle) == (row["clipped"] == "1") for row in logged)
    used = [float(row["peak_memory_mb"] or "nan") for row in logged]
    assert (used == sorted(used) and 100 < used[-1] < 100_000) or sys.platform == "win32"


def test_mixed_precision_is_near_float32(flags: list[str], out_dir: Path) -> None:
    """Catches a run without autocast, or one whose weights are bfloat16."""
    run(*flags, "--learning_rate=1e-2")
    exact = losses(out_dir)
    run(*flags, "--learning_rate=1e-2", "--dtype=bfloat16")
    assert losses(out_dir) != exact
    assert losses(out_dir) == pytest.approx(exact, abs=0.05)
    assert all(tensor.dtype == torch.float32 for tensor in weights(out_dir / "ckpt.pt").values())


def test_another_tokenizer_is_refused(flags: list[str], out_dir: Path, tmp_path: Path) -> None:
    """Catches a resumed run on token ids with another meaning."""
    run(*flags, "--max_iters=5")
    other = tmp_path / "other"
    corpus.write_dataset(other, ["abc" * 100], ["abc" * 100], CharTokenizer.from_text("abc"), "abc")
    with pytest.raises(UserError, match="another tokenizer"):
        run("--init_from=resume", f"--out_dir={out_dir}", f"--dataset={other}")


def test_loss_rows_change_no_loss(flags: list[str], out_dir: Path) -> None:
    """Catches a chunked loss that differs, in training or in evaluation."""
    run(*flags)
    whole = losses(out_dir), [row["val_loss"] for row in rows(out_dir)]
    run(*flags, "--loss_rows=5")
    assert losses(out_dir) == pytest.approx(whole[0], abs=1e-5)
    pairs = zip([row["val_loss"] for row in rows(out_dir)], whole[1], strict=True)
    assert all(float(a or 0) == pytest.approx(float(b or 0), abs=1e-5) for a, b in pairs)


@pytest.mark.parametrize(
    ("batch_tokens", "processes", "expected"),
    [(0, 1, 40), (0, 8, 40), (96, 1, 3), (96, 3, 3), (64, 2, 2), (491520, 8, 15360)],
)
def test_batch_tokens_set_the_micro_batches(batch_tokens: int, processes: int, expected: int) -> None:
    """Catches tokens that are counted per rank, or sequences that are not counted in tokens."""
    assert share_batch(40, batch_tokens, 4, 8, processes) == expected


@pytest.mark.parametrize(
    ("batch_tokens", "processes", "advice"),
    [
        (100, 1, " = 32, got 100; try --batch_tokens=96 or 128, or another --batch_size"),
        (96, 2, "x 2 processes = 64, got 96; try --batch_tokens=64 or 128"),
        (31, 1, "x 1 process = 32, got 31; try --batch_tokens=32, or"),
    ],
)
def test_batch_tokens_must_divide(batch_tokens: int, processes: int, advice: str) -> None:
    """Catches a batch that is silently rounded, and advice that does not help."""
    with pytest.raises(UserError, match=re.escape(advice)) as caught:
        share_batch(40, batch_tokens, 4, 8, processes)
    assert "batch_tokens must be a multiple of batch_size=4 x 8 tokens x " in str(caught.value)


def test_batch_tokens_after_a_resume(flags: list[str], out_dir: Path) -> None:
    """Catches a resumed run with other batches, or one that ignores a new --gradient_accumulation_steps."""
    run(*flags, "--batch_tokens=192", "--max_iters=1")
    assert int(rows(out_dir)[-1]["tokens"]) == 192
    saved = torch.load(out_dir / "ckpt.pt", weights_only=True)["config"]  # the keys as given, for another machine to resolve
    assert (saved["gradient_accumulation_steps"], saved["batch_tokens"], saved["compile"]) == (2, 192, "auto")
    resume = [f"--out_dir={out_dir}", "--init_from=resume"]
    run(*resume, "--batch_size=2", "--max_iters=2")
    assert int(rows(out_dir)[-1]["tokens"]) == 2 * 192
    run(*resume, "--gradient_accumulation_steps=2", "--max_iters=3")
    assert int(rows(out_dir)[-1]["tokens"]) == 3 * 2 * 2 * 16
    config = json.loads((out_dir / "config.json").read_text(encoding="utf-8"))
    assert (config["gradient_accumulation_steps"], config["batch_tokens"]) == (2, 0)


def test_sharded_float16_is_refused(dataset: Path) -> None:
    """Catches FSDP in float16, which has no loss scaling here."""
    config = configurator.parse(train.Config, ["--parallel=fsdp", "--dtype=float16"])
    with pytest.raises(UserError, match=r"--parallel=fsdp .* --dtype=bfloat16 or --dtype=float32"):
        train.resolve_machine(config, Group(launched=True), None, Dataset(str(dataset)))


def test_activation_checkpointing_changes_nothing(flags: list[str], out_dir: Path, tmp_path: Path) -> None:
    """Catches recomputed activations with other dropout, and with it another result."""
    run(*flags, "--dropout=0.2", "--n_layer=2")
    expected = losses(out_dir), weights(out_dir / "ckpt.pt")
    run(*flags, "--dropout=0.2", "--n_layer=2", "--activation_checkpointing=True", f"--out_dir={tmp_path / 'other'}")
    assert losses(tmp_path / "other") == expected[0]
    assert all(torch.equal(tensor, expected[1][name]) for name, tensor in weights(tmp_path / "other" / "ckpt.pt").items())
