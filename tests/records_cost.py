"""What the records and the picture of a run cost: a clock around all that the loop calls of metrics.py and curves.py.

python tests/records_cost.py config/train_shakespeare_char_cpu.py [--key=value ...]

Trains as train.py would, and prints the seconds of each part and their share of the whole, imports of PyTorch left out. In a
terminal that includes the progress bar.
"""

import functools
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import configurator
import train
from nanogpt import curves, metrics

TIMED = {
    metrics.Metrics: ("__init__", "say", "evaluation", "step", "advance", "pause", "sync", "close"),
    curves.Curves: ("update", "draw"),
}


class Clock:
    """Adds up the seconds of functions; one that another one calls counts as that one's."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._is_running = False

    def timed(self, function: Callable) -> Callable:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if self._is_running:
                return function(*args, **kwargs)
            self._is_running, began = True, time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[function.__qualname__] += time.perf_counter() - began
                self._is_running = False

        return call


def main(config: train.Config) -> None:
    clock = Clock()
    for owner, names in TIMED.items():
        for name in names:
            setattr(owner, name, clock.timed(getattr(owner, name)))
    began = time.perf_counter()
    train.main(config)
    whole, total = time.perf_counter() - began, sum(clock.seconds.values())
    for name, seconds in clock.seconds.items():
        print(f"{name:20} {seconds:7.3f} s")
    print(f"{'together':20} {total:7.3f} s of {whole:.1f} s: {total / whole:.2%}")


if __name__ == "__main__":
    configurator.run(main, train.Config)
