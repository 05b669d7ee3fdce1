"""Measure what logging and drawing curves cost a run: the seconds that the loop spends in metrics.py and curves.py.

python tests/records_cost.py config/train_shakespeare_char_cpu.py [--key=value ...]

Trains as train.py does, then prints the seconds of each method and their share of the whole run, without the import of PyTorch.
On a terminal that includes the progress bar.
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
from nanogpt.curves import Curves
from nanogpt.metrics import Metrics

TIMED_METHODS = {
    Metrics: ("__init__", "say", "evaluation", "step", "advance", "pause", "sync", "close"),
    Curves: ("update", "draw"),
}


class Clock:
    """Adds up the seconds of each function; a timed function called by another counts as part of that one."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._is_running = False

    def timed(self, function: Callable) -> Callable:
        """Return the function with this clock around it."""

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if self._is_running:
                return function(*args, **kwargs)
            self._is_running, t0 = True, time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[function.__qualname__] += time.perf_counter() - t0
                self._is_running = False

        return call


def main(config: train.Config) -> None:
    clock = Clock()
    for owner, names in TIMED_METHODS.items():
        for name in names:
            setattr(owner, name, clock.timed(getattr(owner, name)))
    t0 = time.perf_counter()
    train.main(config)
    run_seconds, timed_seconds = time.perf_counter() - t0, sum(clock.seconds.values())
    for name, seconds in clock.seconds.items():
        print(f"{name:20} {seconds:7.3f} s")
    print(f"{'total':20} {timed_seconds:7.3f} s of {run_seconds:.1f} s: {timed_seconds / run_seconds:.2%}")


if __name__ == "__main__":
    configurator.run(main, train.Config)
