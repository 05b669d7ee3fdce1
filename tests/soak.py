"""Kill a training run at random moments, again and again, and see that it comes to what it would have come to: make soak.

python tests/soak.py [KILLS [SEED]]

Each life of the run is a process of its own, which gets SIGKILL (every fifth SIGTERM) after a random time, beginning with
its first line. It must never lose more than the iterations since its last save, and in the end its weights, moments and rows
must be those of a run that nobody disturbed, bit for bit. Not a part of the tests: 50 kills take some minutes.
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

from nanogpt import checkpoint, corpus
from nanogpt.tokenizer import CharTokenizer

INTERVAL = 5  # iterations between saves
LIFE = 1.5  # longest life in seconds, of which the first few tenths go into loading
FLAGS = (
    "--n_layer=2 --n_head=2 --n_embd=64 --block_size=32 --batch_size=8 --gradient_accumulation_steps=2 --dropout=0.2 "
    "--dtype=bfloat16 --eval_iters=5 --eval_interval=20 --learning_rate=1e-2 --lr_decay_iters=2000 --warmup_iters=20 "
    f"--always_save_checkpoint=False --checkpoint_interval={INTERVAL} --checkpoint_minutes=0 --device=cpu"
).split()


def start(*flags: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "train.py", *flags], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def live(process: subprocess.Popen, seconds: float, number: int) -> list[int]:
    """Send the signal that many seconds after the first line, and return the iterations that the process has printed."""
    first = process.stdout.readline()
    timer = threading.Timer(seconds, process.send_signal, [number])
    timer.start()
    out, err = process.communicate()
    timer.join()
    if process.returncode not in (0, -signal.SIGKILL, 128 + signal.SIGTERM, -signal.SIGTERM):
        sys.exit(f"exit status {process.returncode}\n{first}{out}{err}")
    return [int(iteration) for iteration in re.findall(r"^iter (\d+): .*%$", out, re.MULTILINE)]


def state(out_dir: Path) -> tuple[list[torch.Tensor], list[list[str]]]:
    """The tensors of both checkpoints, and the rows of metrics.csv without what was measured of the machine."""
    tensors = []
    for name in (checkpoint.BEST, checkpoint.LAST):
        found = torch.load(out_dir / name, weights_only=True)
        tensors += [torch.tensor([found["iter_num"], found["best_val_loss"]]), *found["model"].values()]
        tensors += [tensor for moments in found["optimizer"]["state"].values() for tensor in moments.values()]
    with open(out_dir / "metrics.csv", newline="") as file:
        return tensors, [
            [row[name] for name in row if name not in ("seconds", "tokens_per_second", "peak_memory_mb")]
            for row in csv.DictReader(file)
        ]


def main(kills: int, seed: int) -> None:
    chance = random.Random(seed)
    folder = Path(tempfile.mkdtemp())
    text = "".join(f"{i} plus {i} is {2 * i}.\n" for i in range(2000))
    train, val = corpus.split_documents([text], val_fraction=0.1)
    corpus.write_dataset(folder / "data", train, val, CharTokenizer.from_text(text), "counting")
    flags = [*FLAGS, f"--dataset={folder / 'data'}", "--max_iters=1000000"]
    disturbed, on = f"--out_dir={folder / 'disturbed'}", ["--init_from=resume"]
    kept, lost, most_lost = -1, 0, 0
    for kill in range(kills):
        number = signal.SIGTERM if kill % 5 == 4 else signal.SIGKILL
        printed = live(start(*(on if kept >= 0 else flags), disturbed), chance.uniform(0, LIFE), number)
        before = kept
        if any((folder / "disturbed" / name).exists() for name in (checkpoint.LAST, checkpoint.BEST)):
            kept = checkpoint.load(checkpoint.newest(folder / "disturbed")).iter_num
        reached = max([before, 0, *[iteration + 1 for iteration in printed]])
        most_lost, lost = max(most_lost, reached - kept), lost + max(0, reached - kept)
        assert kept >= before and reached - max(kept, 0) <= INTERVAL, f"kill {kill}: {kept} of {reached} iterations are kept"
        print(f"{kill + 1:3} {signal.Signals(number).name}: reached {reached}, kept {max(kept, 0)}", flush=True)
    end = f"--max_iters={kept + 10}"
    for arguments in ([*on, disturbed, end], [*flags, f"--out_dir={folder / 'whole'}", end]):
        out, err = start(*arguments).communicate()
        assert "best val loss" in out, out + err
    tensors, rows = state(folder / "whole")
    found_tensors, found_rows = state(folder / "disturbed")
    assert len(tensors) == len(found_tensors) and all(map(torch.equal, tensors, found_tensors))
    assert rows == found_rows
    print(f"{kills} kills in {kept} iterations: at most {most_lost} lost at once, {lost} in all, and done again;")
    print(f"weights, moments and {len(rows)} rows of the {kept + 10} iterations are those of the undisturbed run, bit for bit")
    shutil.rmtree(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("kills", 50), ("seed", 1)):
        parser.add_argument(name, type=int, nargs="?", default=default)
    main(**vars(parser.parse_args()))
