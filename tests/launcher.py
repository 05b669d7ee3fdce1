"""Run the repo's commands as forks of one process that imports PyTorch: that import takes seconds, a fork milliseconds.

    run("train.py", "--max_iters=1", cwd=project)
    run("torchrun", "--nproc_per_node=2", "train.py", cwd=project)  # forks the ranks itself, without torchrun's own process

Each fork imports the repo's own modules anew, from `cwd`. Systems without fork start a new Python for each command.
"""

import atexit
import functools
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, BinaryIO

TIMEOUT_SECONDS = 900  # for one command: only ends one that hangs, and must be long enough beside other work on the machine
PRELOADED = ("torch", "torch._dynamo", "torch.distributed.fsdp", "torch.distributed.run", "matplotlib.pyplot")
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
QUICK_PEAK = {"PEAK_SECONDS": 0, "PRODUCT_SIZES": (8, 8)}  # for nanogpt/device.py: three small products, 0.1 s less for a run


def run(*arguments: str | Path, cwd: Path, typed: str = "", setup: str = "", **environment: str) -> subprocess.CompletedProcess:
    """Run a script of the repo, by itself or under torchrun, and return the finished process.

    `typed` is its stdin. `setup` is Python code to run first in each process, for instance to patch a module of the library.
    The ranks of torchrun must all end with the same exit status, else AssertionError is raised.
    """
    command = [str(argument) for argument in arguments]
    request = {
        "command": command,
        "cwd": str(cwd),
        "typed": typed,
        "setup": setup,
        "environment": os.environ | ENVIRONMENT | environment,
    }
    if not hasattr(os, "fork"):
        assert not setup
        return _run_without_fork(request)
    print(json.dumps(request), file=_server().stdin, flush=True)
    reply = json.loads(_server().stdout.readline())
    statuses = reply.pop("statuses")
    assert len(set(statuses)) == 1, f"{' '.join(command)}: the ranks ended with {statuses}\n{reply['stderr']}"
    return subprocess.CompletedProcess(command, statuses[0], **reply)


def run_commands(commands: list[list[str]], cwd: Path, typed: str = "") -> None:
    """Run `commands` one after the other, each with `typed` on stdin. Raises AssertionError at the first that fails."""
    for command in commands:
        finished = run(*command, cwd=cwd, typed=typed)
        assert finished.returncode == 0, f"{' '.join(command)}: status {finished.returncode}\n{finished.stderr}"


def _run_without_fork(request: dict[str, Any]) -> subprocess.CompletedProcess:
    command = request["command"]
    torchrun = ["-m", "torch.distributed.run"]
    return subprocess.run(
        [sys.executable, *(torchrun + command[1:] if command[0] == "torchrun" else command)],
        cwd=request["cwd"],
        env=request["environment"],
        input=request["typed"],
        capture_output=True,
        encoding="utf-8",
        timeout=TIMEOUT_SECONDS,
    )


@functools.cache
def _server() -> subprocess.Popen:
    """Start the process that forks; it ends with this one, when its stdin is closed."""
    server = subprocess.Popen(
        [sys.executable, __file__],
        env=os.environ | ENVIRONMENT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        encoding="utf-8",
    )
    atexit.register(server.communicate)
    return server


# the process that forks


def serve() -> None:
    """Answer requests, one a line on stdin, until stdin is closed."""
    requests, replies = os.fdopen(os.dup(0), encoding="utf-8"), os.fdopen(os.dup(1), "w", encoding="utf-8")
    for name in PRELOADED:
        importlib.import_module(name)
    gc.freeze()  # so that no fork's garbage collector copies those pages
    for line in requests:
        print(json.dumps(answer(json.loads(line))), file=replies, flush=True)


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Run the command of a request, one fork per rank."""
    command, ranks = parse_torchrun(request["command"])
    with tempfile.TemporaryFile() as stdin, tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        stdin.write(request["typed"].encode())
        stdin.seek(0)
        children = []
        for rank in ranks:
            child = os.fork()
            if not child:
                become(command, request["cwd"], request["environment"] | rank, request["setup"], [stdin, stdout, stderr])
            children.append(child)
        statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        for file in (stdout, stderr):
            file.seek(0)
        return {"statuses": statuses, "stdout": stdout.read().decode(), "stderr": stderr.read().decode()}


def parse_torchrun(command: list[str]) -> tuple[list[str], list[dict[str, str]]]:
    """Return the script with its arguments, and what torchrun adds to the environment of each rank."""
    if command[0] != "torchrun":
        return command, [{}]
    options = importlib.import_module("torch.distributed.run").parse_args(command[1:])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        master = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    size = options.nproc_per_node
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": size} | master for rank in range(int(size))]
    return [options.training_script, *options.training_script_args], ranks


def become(command: list[str], cwd: str, environment: dict[str, str], setup: str, files: list[BinaryIO]) -> None:
    """Become the process of `command`, and exit with its status."""
    signal.alarm(TIMEOUT_SECONDS)
    for descriptor, file in enumerate(files):
        os.dup2(file.fileno(), descriptor)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = command
    sys.path[0] = str(Path(command[0]).resolve().parent)
    exec(setup, {})
    if command[0] == "train.py":
        vars(importlib.import_module("nanogpt.device")).update(QUICK_PEAK)
    runpy.run_path(command[0], run_name="__main__")
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # spares the quarter of a second in which Python tears down PyTorch's modules


if __name__ == "__main__":
    serve()
