"""Run commands one after the other as forks of one process, which imports PyTorch and the library once for all of them.

    run_commands([["train.py", "--max_iters=1"], ["sample.py"], ["torchrun", "--nproc_per_node=2", "train.py"]], project)

Systems without fork get a process for each command.
"""

import gc
import importlib
import json
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import BinaryIO

TIMEOUT_SECONDS = 200  # for all commands together


def run_commands(commands: list[list[str]], cwd: Path, typed: str = "") -> None:
    """Run `commands` in the folder `cwd`, each with `typed` on stdin. Raises AssertionError at the first that fails."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MPLBACKEND": "agg", "PYTHONDONTWRITEBYTECODE": "1"}
    options = {"cwd": cwd, "env": environment, "input": typed, "capture_output": True, "text": True, "encoding": "utf-8"}
    if hasattr(os, "fork"):
        launches = [[sys.executable, __file__, json.dumps(commands)]]
    else:
        torchrun = ["-m", "torch.distributed.run"]
        launches = [[sys.executable, *(torchrun + c[1:] if c[0] == "torchrun" else c)] for c in commands]
    for launch in launches:
        finished = subprocess.run(launch, timeout=TIMEOUT_SECONDS, **options)
        assert finished.returncode == 0, f"{' '.join(launch[1:])}\n{finished.stderr}"


def main(commands: list[list[str]]) -> None:
    """Run `commands` in the current folder. Exits with an error message at the first that fails."""
    # 1) import what commands import, so that the forks need not
    sys.path[0] = os.getcwd()
    for name in ("torch", "torch._dynamo", "torch.distributed.fsdp", "matplotlib.pyplot", "configurator", "model"):
        importlib.import_module(name)
    for path in Path("nanogpt").glob("*.py"):
        importlib.import_module(f"nanogpt.{path.stem}")
    gc.freeze()  # so that no fork's garbage collector copies those pages

    # 2) fork for each command
    typed = sys.stdin.buffer.read()
    for command in commands:
        with tempfile.TemporaryFile() as stdin, tempfile.TemporaryFile() as output:
            stdin.write(typed)
            stdin.seek(0)
            child = os.fork()
            if not child:
                run_in_child(command, stdin, output)
            _, status = os.waitpid(child, 0)
            if status:
                output.seek(0)
                sys.exit(f"{' '.join(command)}: status {os.waitstatus_to_exitcode(status)}\n{output.read().decode()}")


def run_in_child(command: list[str], stdin: BinaryIO, output: BinaryIO) -> None:
    """Become the process of `command`, and exit with its status."""
    for file, descriptor in ((stdin, 0), (output, 1), (output, 2)):
        os.dup2(file.fileno(), descriptor)
    sys.stdin = open(0, encoding="utf-8", closefd=False)
    sys.argv = command
    if command[0] == "torchrun":
        runpy.run_module("torch.distributed.run", run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(Path(command[0]).resolve().parent)
        runpy.run_path(command[0], run_name="__main__")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # without the quarter of a second in which Python tears down PyTorch's modules


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
