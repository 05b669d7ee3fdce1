"""Kill a training run at random moments, and compare it with an undisturbed run: make soak.

python tests/soak.py [KILLS [SEED]]

Each part of the run is a process of its own, killed by SIGKILL (every fifth time SIGTERM) at a random time after its first
line. A kill may lose at most the iterations since the last save. At the end, weights, moments and metrics.csv must be those of
an undisturbed run, bit for bit. This is not part of the tests, since 50 kills take some minutes.
"""

import argparse
import csv
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from nanogpt import corpus
from nanogpt.checkpoint import BEST, LAST, load, newest
from nanogpt.tokenizer import CharTokenizer

CHECKPOINT_INTERVAL = 5  # iterations between saves
MAX_LIFE_SECONDS = 1.5  # of a process after its first line; loading takes the first few tenths
MEASURED = ("seconds", "tokens_per_second", "mfu", "peak_memory_mb")  # columns of metrics.csv that differ from run to run
FLAGS = (
    "--n_layer=2 --n_head=2 --n_embd=64 --block_size=32 --batch_size=8 --gradient_accumulation_steps=2 --dropout=0.2 "
    "--dtype=bfloat16 --eval_iters=5 --eval_interval=20 --learning_rate=1e-2 --lr_decay_iters=2000 --warmup_iters=20 "
    f"--always_save_checkpoint=False --checkpoint_interval={CHECKPOINT_INTERVAL} --checkpoint_minutes=0 --device=cpu"
).split()


def launch(*flags: str) -> subprocess.Popen:
    """Start train.py with these flags."""
    return subprocess.Popen(
        [sys.executable, "train.py", *flags], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def kill_after(process: subprocess.Popen, seconds: float, number: int) -> list[int]:
    """Send signal `number` that many seconds after the process's first line; return the iterations that it has printed."""
    first_line = process.stdout.readline()
    timer = threading.Timer(seconds, process.send_signal, [number])
    timer.start()
    out, err = process.communicate()
    timer.join()
    if process.returncode not in (0, -signal.SIGKILL, 128 + signal.SIGTERM, -signal.SIGTERM):
        sys.exit(f"exit status {process.returncode}\n{first_line}{out}{err}")
    return [int(iteration) for iteration in re.findall(r"^iter (\d+): .*%$", out, re.MULTILINE)]


def kill_and_resume(flags: list[str], out_dir: Path, kills: int, seed: int) -> int:
    """Run train.py until it has been killed `kills` times; return the iterations in its newest checkpoint."""
    chance = random.Random(seed)
    saved, lost, most_lost = -1, 0, 0
    for kill in range(kills):
        number = signal.SIGTERM if kill % 5 == 4 else signal.SIGKILL
        process = launch(*(flags if saved < 0 else ["--init_from=resume"]), f"--out_dir={out_dir}")
        printed = kill_after(process, chance.uniform(0, MAX_LIFE_SECONDS), number)
        saved_before = saved
        if any((out_dir / name).exists() for name in (LAST, BEST)):
            saved = load(newest(out_dir)).iter_num
        reached = max([saved_before, 0, *[iteration + 1 for iteration in printed]])
        most_lost, lost = max(most_lost, reached - saved), lost + max(0, reached - saved)
        assert saved >= saved_before and reached - max(saved, 0) <= CHECKPOINT_INTERVAL, (
            f"kill {kill}: {saved} of {reached} iterations are saved"
        )
        print(f"{kill + 1:3} {signal.Signals(number).name}: reached {reached}, saved {max(saved, 0)}", flush=True)
    print(f"{kills} kills in {saved} iterations: lost at most {most_lost} iterations at once, {lost} in total, and redid them")
    return saved


def result(out_dir: Path) -> tuple[list[torch.Tensor], list[list[str]]]:
    """Return the tensors of the checkpoints, and the rows of metrics.csv without the MEASURED columns."""
    tensors = []
    for path in sorted(out_dir.glob("*.pt")):
        state = torch.load(path, weights_only=True)
        tensors += [torch.tensor([state["iter_num"], state["best_val_loss"]]), *state["model"].values()]
        tensors += [tensor for moments in state["optimizer"]["state"].values() for tensor in moments.values()]
    with open(out_dir / "metrics.csv", newline="") as file:
        return tensors, [[row[name] for name in row if name not in MEASURED] for row in csv.DictReader(file)]


def main(kills: int, seed: int) -> None:
    # a small dataset
    folder = Path(tempfile.mkdtemp())
    text = "".join(f"{i} plus {i} is {2 * i}.\n" for i in range(2000))
    train, val = corpus.split_documents([text], val_fraction=0.1)
    corpus.write_dataset(folder / "data", train, val, CharTokenizer.from_text(text), "counting")
    flags = [*FLAGS, f"--dataset={folder / 'data'}", "--max_iters=1000000"]

    # run with kills, then both runs to the same end
    killed, undisturbed = folder / "killed", folder / "undisturbed"
    max_iters = kill_and_resume(flags, killed, kills, seed) + 10
    for arguments in (["--init_from=resume", f"--out_dir={killed}"], [*flags, f"--out_dir={undisturbed}"]):
        out, err = launch(*arguments, f"--max_iters={max_iters}").communicate()
        assert "best val loss" in out, out + err

    # compare
    expected_tensors, expected_rows = result(undisturbed)
    tensors, rows = result(killed)
    assert len(tensors) == len(expected_tensors) and all(map(torch.equal, tensors, expected_tensors))
    assert rows == expected_rows
    print(f"weights, moments and {len(rows)} rows of {max_iters} iterations equal those of the undisturbed run, bit for bit")
    shutil.rmtree(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("kills", 50), ("seed", 1)):
        parser.add_argument(name, type=int, nargs="?", default=default)
    main(**vars(parser.parse_args()))
