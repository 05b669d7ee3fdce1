"""Plot the loss curves of one or more runs, from metrics.csv or from the printed log of train.py or nanoGPT.

python plot.py out-a                                         one run, to out-a/loss.png
python plot.py out-a out-b nanogpt.log --out=curves.svg      several runs in one plot
python plot.py out-a out-b --x=seconds --log=xy              against time, on logarithmic axes
python plot.py out-a out-b --y=bits_per_byte                 runs with different tokenizers
"""

import itertools
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent))  # python -P leaves it out

import configurator
from configurator import PathStr

from nanogpt.curves import best_of, check_out, draw, read_all
from nanogpt.errors import UserError, one_line


@dataclass(frozen=True)
class Config(configurator.Config):
    positional: ClassVar[str] = "runs"
    takes_several: ClassVar[bool] = True
    runs: str = ""  # run folders, metrics.csv files or logs, as plain arguments or separated by commas. Empty: out_dir
    out_dir: PathStr = "out"  # run folder to plot if no runs are given
    out: PathStr = ""  # .png or .svg file to write. Empty: loss.png or bits_per_byte.png in the run's folder, else curves.png
    x: Literal["iterations", "tokens", "seconds"] = "iterations"  # quantity on the x axis
    y: Literal["loss", "bits_per_byte"] = "loss"  # quantity on the y axis; bits per byte compare tokenizers
    log: Literal["none", "x", "y", "xy"] = "none"  # logarithmic axes

    def validate(self) -> None:
        if self.out:
            check_out(self.out)


def main(config: Config) -> None:
    given = [[name] if os.path.exists(name) else name.split(",") for name in config.runs.split("\n")]  # a name may hold commas
    paths = [Path(os.path.expanduser(name)) for name in itertools.chain(*given) if name] or [Path(config.out_dir)]
    runs = read_all(paths, config.x, config.y)
    for axis in set(config.log) & {"x", "y"}:
        curves = [curve for run in runs for curve in ((run.train_x, run.val_x) if axis == "x" else (run.train, run.val))]
        if not any((curve > 0).any() for curve in curves):
            raise UserError(f"--log={config.log}: a logarithmic axis needs a positive {axis}, got none; use --log=none")
    out = Path("curves.png") if len(runs) > 1 or not paths[0].is_dir() else paths[0] / f"{config.y}.png"
    out = Path(config.out) if config.out else out
    try:
        draw(runs, out, config.x, config.log, config.y)
    except OSError as error:
        raise UserError(f"--out={out}: cannot be written ({error.strerror})") from error
    y = config.y.replace("_", " ")
    for run in runs:
        best = best_of(run)
        result = "no evaluation" if best is None else f"best val {y} {run.val[best]:.4f} at {run.val_x[best]:,.0f} {config.x}"
        print(f"{run.name}: {result}")
    print(one_line(f"curves in {out}"))


if __name__ == "__main__":
    configurator.run(main, Config)
