"""Everything that there is to measure on a GPU, as commands that run one after the other, within a time limit."""

import json
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from nanogpt import metrics
from nanogpt.errors import first_line

ROOT = Path(__file__).resolve().parents[1]
LIMIT_SECONDS = 570.0  # for all measurements together
TRAINING = "bench.py --size=gpt2 --batch_size=64 --real_data=False"
GENERATION = "bench.py --what=generation --size=gpt2"
RECIPE = "train.py config/train_shakespeare_char.py --max_iters=2500"  # the first half, with the learning rates of the whole
RECIPE_SEEDS = (1, 2, 3, 4, 5)  # trained at the same time, to save time: their speeds say nothing
MUON = "train.py config/train_shakespeare_char.py --optimizer=muon --max_iters=1500 --lr_decay_iters=1500"
MUON_RATES = (3e-3, 1e-2)
MEMORY = "bench.py --against=nothing --batch_size=8 --real_data=False --compile=False --rounds=1 --steps=3"


@dataclass(frozen=True)
class Measurement:
    """A command of bench.py, or one of train.py and the seeds to train with."""

    name: str
    command: str
    seeds: tuple[int, ...] = ()


MEASUREMENTS = (  # the most important ones first, in case that the time does not suffice
    Measurement("training, 124M", TRAINING),
    Measurement("generation, 1 text", f"{GENERATION} --against=transformers"),
    Measurement("generation, 1 text, compiled", f"{GENERATION} --against=plain --compile=True"),
    Measurement("Shakespeare in characters", RECIPE, RECIPE_SEEDS),
    Measurement("training, 124M, Muon", f"{TRAINING} --against=nothing --optimizer=muon"),
    Measurement("training, 124M, loss in chunks", f"{TRAINING} --against=nothing --loss_rows=4096"),
    Measurement("generation, 16 texts, compiled", f"{GENERATION} --batch_size=16 --against=nothing --compile=True"),
    Measurement("generation, 64 texts, compiled", f"{GENERATION} --batch_size=64 --against=nothing --compile=True"),
    *(
        Measurement(f"Shakespeare in characters, Muon at {rate}", f"{MUON} --learning_rate={rate}", (1, 2))
        for rate in MUON_RATES
    ),
    Measurement("training, 124M, not compiled", f"{TRAINING} --against=nothing --compile=False"),
    *(
        Measurement(f"memory, {size}, activation checkpointing {checkpointing}", command)
        for size in ("gpt2-xl", "gpt2-large", "gpt2-medium", "gpt2")
        for checkpointing in (False, True)
        for command in [f"{MEMORY} --size={size} --activation_checkpointing={checkpointing}"]
    ),
)


def measure(
    measurements: Sequence[Measurement], flags: Sequence[str], limit_seconds: float = LIMIT_SECONDS
) -> list[dict[str, Any]]:
    """Run the measurements, printing each result; return them. `flags` are added to the commands of bench.py.

    The result of one that fails, or for which no time is left, has an "error".
    """
    deadline, results = time.monotonic() + limit_seconds, []
    for measurement in measurements:
        command = shlex.split(measurement.command)
        command += flags if command[0] == "bench.py" else []
        print(f"\n{measurement.name}: python {shlex.join(command)}", flush=True)
        started = time.monotonic()
        try:
            if measurement.seeds:
                result = train_seeds(command, measurement.seeds, deadline)
            else:
                result = json.loads(next(line for line in reversed(run(command, deadline)) if line.startswith("{")))
        except subprocess.TimeoutExpired:
            result = {"error": "no time left"}
        except subprocess.CalledProcessError as error:
            result = {"error": first_line(cause(error.stderr))}
        seconds = round(time.monotonic() - started, 1)
        result |= {"name": measurement.name, "command": shlex.join(command), "wall_seconds": seconds}
        print(json.dumps(result), flush=True)
        results.append(result)
    return results


def cause(stderr: str) -> str:
    """Return the line of a script's stderr that says why it failed: the end of its last traceback, else the last line."""
    lines = stderr.strip().splitlines() or ["no message"]
    return next((line for line in reversed(lines) if re.match(r"[\w.]+(Error|Exception): ", line)), lines[-1])


def run(command: Sequence[str], deadline: float) -> list[str]:
    """Run a script of this repo; return its lines. Raises the errors of subprocess.run; at the deadline it is killed."""
    seconds = max(0.0, deadline - time.monotonic())
    options = {"cwd": ROOT, "capture_output": True, "encoding": "utf-8", "timeout": seconds}
    return subprocess.run([sys.executable, *command], check=True, **options).stdout.splitlines()


def train_seeds(command: Sequence[str], seeds: Sequence[int], deadline: float) -> dict[str, Any]:
    """Train with each seed, all at the same time; return the best validation loss of each, where it was, and their mean."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(len(seeds)) as pool:
        flags = [[*command, f"--seed={seed}", f"--out_dir={folder}/{seed}"] for seed in seeds]
        list(pool.map(run, flags, [deadline] * len(seeds)))
        rows = [metrics.read_rows(Path(folder, str(seed), "metrics.csv")) for seed in seeds]
    best = [min((float(row["val_loss"]), int(row["iteration"])) for row in run if row["val_loss"]) for run in rows]
    losses, iterations = zip(*best, strict=True)
    return {"seeds": seeds, "best_val_losses": losses, "at_iterations": iterations, "mean": round(mean(losses), 4)}
