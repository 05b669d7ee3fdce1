"""Draw the losses of one or several runs, from their metrics.csv or from the lines that they (or nanoGPT's) printed.

python plot.py out-a                                         one run, to out-a/loss.png
python plot.py out-a out-b nanogpt.log --out=curves.svg      several over each other
python plot.py out-a out-b --x=seconds --log=xy              against time, both axes logarithmic
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import configurator
from nanogpt.curves import best_of, draw, read
from nanogpt.errors import UserError


@dataclass
class Config(configurator.Config):
    positional: ClassVar[str] = "runs"
    runs: str = ""  # run folders, metrics.csv files or logs, separated by commas; as plain arguments, by spaces. Empty: out_dir
    out_dir: str = "out"  # folder of the run to draw where no runs are named
    out: str = ""  # the picture, .png or .svg. Empty: loss.png in the folder of one run, curves.png here for several
    x: Literal["iterations", "tokens", "seconds"] = "iterations"  # what the losses are drawn against
    log: Literal["none", "x", "y", "xy"] = "none"  # the axes that are logarithmic

    def validate(self) -> None:
        if self.out and Path(self.out).suffix.lower() not in (".png", ".svg"):
            raise UserError(f"--out={self.out}: end the name in .png or .svg")


def main(config: Config) -> None:
    paths = [Path(name) for name in config.runs.split(",") if name] or [Path(config.out_dir)]
    runs = [read(path, config.x) for path in paths]
    out = Path("curves.png") if len(runs) > 1 or not paths[0].is_dir() else paths[0] / "loss.png"
    out = Path(config.out) if config.out else out
    if not out.parent.is_dir():
        raise UserError(f"--out={out}: there is no folder {out.parent}")
    try:
        draw(runs, out, config.x, config.log)
    except OSError as error:
        raise UserError(f"--out={out}: cannot be written ({error.strerror})") from error
    for run in runs:
        best = best_of(run)
        where = "no evaluation" if best is None else f"best val loss {run.val[best]:.4f} at {run.val_x[best]:,.0f} {config.x}"
        print(f"{run.name}: {where}")
    print(f"curves in {out}")


if __name__ == "__main__":
    configurator.run(main, Config)
