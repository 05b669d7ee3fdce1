"""What a run logs: the lines that people's scripts parse, the rows of metrics.csv, Weights & Biases."""

import csv
import errno
import io
import json
import math
import re
import struct
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path

import configurator

import pytest
import torch

import train
from nanogpt.errors import UserError
from nanogpt.metrics import Evaluation, Metrics, SilentMetrics, read_rows, start_wandb

try:
    import resource
except ImportError:  # Windows
    resource = None

OLD_COLUMNS = "iteration,tokens,seconds,train_loss,val_loss,loss,learning_rate,grad_norm,tokens_per_second,mfu"
COLUMNS = OLD_COLUMNS.replace("norm,", "norm,clipped,") + ",peak_memory_mb,train_bits_per_byte,val_bits_per_byte"
EVALUATION = Evaluation({"train": 2.5, "val": 2.75}, {"train": 3.25, "val": 3.5})
WITHOUT_TEXT = Evaluation({"train": 2.42926, "val": 2.44471}, {"train": None, "val": None})
INCOMPLETE = [
    "",
    "2",
    "20,2",
    "20,200,1.0,,,2.5,0.001,1,1",
    "20,200,1.0,,,2.5,0.001,1,100",
    '20,200,1.0,"',
    "\ufffd\n\n",
    "\0\0",
]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that shows clock[0] seconds."""
    now = [1000.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def rows(out_dir: Path) -> list[dict[str, str]]:
    with open(out_dir / "metrics.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def log_run(out_dir: Path, first_iter: int, end: int, last_eval: int = -1) -> None:
    """Log iterations `first_iter` to `end` as train.py does, with an evaluation every ten iterations."""
    log = Metrics(out_dir, 100, 64, first_iter, last_eval)
    for iteration in range(first_iter, end):
        if iteration % 10 == 0 and iteration != last_eval:
            log.evaluation(iteration, EVALUATION, 1e-3, -1.0, 2.5)
        log.advance()
        log.step(iteration, 2.5, 1e-3, 1.0, 0.03, 1000.0, -1.0)
    log.close()


def order(out_dir: Path) -> list[tuple[int, bool]]:
    """Return the iteration of each row, and whether it is an evaluation."""
    return [(int(row["iteration"]), row["val_loss"] != "") for row in rows(out_dir)]


@pytest.mark.parametrize("mfu, shown", [(0.0123, "1.23%"), (-1.0, "-100.00%"), (0.4567, "45.67%")])
def test_printed_lines_are_nanogpts(tmp_path, capsys, mfu, shown):
    """Catches an extra word, digit or color, which breaks scripts that parse nanoGPT's output, and lines on stderr."""
    log = Metrics(tmp_path, 100, 64)
    log.evaluation(250, Evaluation(WITHOUT_TEXT.losses, EVALUATION.bits_per_byte), 1e-3, mfu, 2.4)
    log.step(10, 2.12344, 1e-3, 1.0, 0.03012, 1000.0, mfu)
    log.close()
    assert (
        capsys.readouterr().out
        == f"step 250: train loss 2.4293, val loss 2.4447\niter 10: loss 2.1234, time 30.12ms, mfu {shown}\n"
    )


def test_quick_iterations_are_flushed_together(tmp_path, capsys, clock):
    """Catches a line or a row that waits for the next logged iteration, minutes away, is lost, or is out of order."""

    def printed(seconds: float, act: Callable[[], None]) -> list[str]:
        clock[0] += seconds
        act()
        lines = [line.split(":")[0] for line in capsys.readouterr().out.splitlines()]
        recorded.extend(int(line[5:]) for line in lines if line.startswith("iter "))
        assert order(tmp_path) == [(iteration, False) for iteration in recorded]
        return lines

    def step(iteration: int) -> Callable[[], None]:
        return lambda: log.step(iteration, 2.5, 1e-3, 1.0, 0.03, 1000.0, -1.0)

    recorded: list[int] = []
    log = Metrics(tmp_path, 100, 64)
    assert printed(0.0, step(0)) == ["iter 0"]
    assert printed(0.1, step(1)) == []
    assert printed(0.01, log.advance) == []
    assert printed(0.2, step(2)) == ["iter 1", "iter 2"]
    assert printed(0.1, step(3)) == []
    assert printed(0.15, log.advance) == ["iter 3"]
    assert printed(0.1, step(4)) == []
    assert printed(0.0, lambda: log.say("text")) == ["iter 4", "text"]
    assert printed(0.1, step(5)) == []
    assert printed(0.0, lambda: log.pause("evaluating")) == ["iter 5"]
    assert printed(0.1, step(6)) == []
    assert printed(0.0, log.sync) == ["iter 6"]
    assert printed(0.1, step(7)) == []
    assert printed(0.0, log.close) == ["iter 7"]


def test_rows_of_metrics_csv(tmp_path, clock):
    """Catches a value in the wrong column or unit, tokens of another iteration, a row that stays in a buffer."""
    log = Metrics(tmp_path, 100, 64)
    clock[0] += 2.5
    log.evaluation(10, EVALUATION, 1e-3, -1.0, 2.4)
    log.evaluation(10, WITHOUT_TEXT, 1e-3, -1.0, 2.4)
    clock[0] += 1
    log.step(10, 2.12344, 6e-4, 1.5, 0.03012, 123456.7, 0.25, 2_048_512_345)
    text = (tmp_path / "metrics.csv").read_bytes().decode("utf-8")
    log.close()
    assert text.splitlines() == [
        COLUMNS,
        "10,640,2.5,2.5,2.75,,,,,,,,3.25,3.5",
        "10,640,2.5,2.42926,2.44471,,,,,,,,,",
        "10,640,3.5,,,2.12344,0.0006,1.5,0,123456.7,0.25,2048.5,,",
    ]


@pytest.mark.parametrize(
    ("loss", "bits_per_byte", "line"),
    [
        (math.log(12), 2.5, "loss 2.4849, perplexity 12.00, 2.5000 bits per byte"),
        (math.log(29.41), None, "loss 3.3813, perplexity 29.41"),
        (1000.0, None, "loss 1000.0000, perplexity inf"),
        (math.nan, None, "loss nan, perplexity nan"),
    ],
)
def test_report(loss, bits_per_byte, line):
    """Catches a perplexity that is not e to the loss, an OverflowError, and bits that are not known."""
    evaluation = Evaluation({"train": 0.0, "val": loss}, {"train": 1.0, "val": bits_per_byte})
    assert evaluation.report().splitlines() == ["train: loss 0.0000, perplexity 1.00, 1.0000 bits per byte", f"val: {line}"]


def test_clipped_is_the_share_since_the_last_row(tmp_path):
    """Catches a share of all steps so far, of the logged ones only, or without the logged step itself."""
    log = Metrics(tmp_path, 100, 64)
    for iteration, clipped in enumerate([True, False, False, True, True, False, False, False]):
        log.advance(clipped)
        if iteration % 3 == 0 or iteration == 7:
            log.step(iteration, 2.5, 1e-3, 1.0, 0.03, 1000.0, -1.0)
    log.close()
    assert [float(row["clipped"]) for row in rows(tmp_path)] == pytest.approx([1, 1 / 3, 1 / 3, 0])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_inf_are_left_empty(tmp_path, value):
    """Catches a file that spreadsheets and plots cannot read."""
    log = Metrics(tmp_path, 100, 64)
    log.step(10, value, 6e-4, value, 0.03, 100.0, -1.0)
    log.close()
    assert (rows(tmp_path)[0]["loss"], rows(tmp_path)[0]["grad_norm"]) == ("", "")


def test_new_run_starts_a_new_file(tmp_path):
    """Catches rows of an earlier run in the same folder among those of this one."""
    log_run(tmp_path, 0, 30)
    log_run(tmp_path, 0, 5)
    assert order(tmp_path) == [(0, True), *[(iteration, False) for iteration in range(5)]]


@pytest.mark.parametrize("last_eval", [20, -1])
@pytest.mark.parametrize("incomplete", INCOMPLETE)
def test_resumed_run_has_each_row_once(tmp_path, last_eval, incomplete):
    """Catches duplicate rows, a gap, or a file spoiled by the incomplete line of a killed run."""
    log_run(tmp_path, 0, 28)
    with open(tmp_path / "metrics.csv", "a", newline="", encoding="utf-8") as file:
        file.write(incomplete)
    log_run(tmp_path, 20, 35, last_eval)
    expected = [(i, is_evaluation) for i in range(35) for is_evaluation in (True, False) if i % 10 == 0 or not is_evaluation]
    assert order(tmp_path) == expected
    assert (tmp_path / "metrics.csv").read_text(encoding="utf-8").splitlines()[0] == COLUMNS
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


def test_rows_of_an_older_version_are_kept(tmp_path):
    """Catches a resumed run that drops the rows of an older version, or moves their values to other columns."""
    old = ["0,0,1.5,4.25,4.5,,,,,", "0,0,2.5,,,4.25,0.001,1.5,1000,0.25", "1,64,3.5,,,4,0.002,2.5,2000,-1"]
    (tmp_path / "metrics.csv").write_bytes("".join(f"{line}\r\n" for line in [OLD_COLUMNS, *old]).encode())
    log_run(tmp_path, 1, 2)
    found = rows(tmp_path)
    assert list(found[0]) == COLUMNS.split(",")
    for row, line in zip(found, old[:2], strict=False):
        assert [row[name] for name in OLD_COLUMNS.split(",")] == line.split(",")
        assert (row["clipped"], row["peak_memory_mb"], row["val_bits_per_byte"]) == ("", "", "")
    assert order(tmp_path) == [(0, True), (0, False), (1, False)]


@pytest.mark.parametrize("header", ["", "a,b,c", '"', COLUMNS.replace("tokens,", ""), COLUMNS + ",more"])
def test_other_files_have_no_rows(tmp_path, header):
    """Catches a traceback, or made-up numbers, for a file that is not a metrics.csv."""
    (tmp_path / "metrics.csv").write_text(f"{header}\n0,0,1.5,4.25,4.5,,,,,,,,,\n", encoding="utf-8")
    assert read_rows(tmp_path / "metrics.csv") == []


def test_seconds_continue_after_a_resume(tmp_path, clock):
    """Catches a time axis that jumps back, or that counts the time between the two parts."""
    log = Metrics(tmp_path, 100, 64)
    for iteration in range(3):
        clock[0] += 10
        log.step(iteration, 2.5, 1e-3, 1.0, 0.03, 1000.0, -1.0)
    log.close()
    clock[0] += 5000
    log = Metrics(tmp_path, 100, 64, first_iter=2)
    clock[0] += 7
    log.step(2, 2.5, 1e-3, 1.0, 0.03, 1000.0, -1.0)
    log.close()
    assert [float(row["seconds"]) for row in rows(tmp_path)] == [10, 20, 27]


def test_evaluation_before_the_first_update_is_kept(tmp_path):
    """Catches a row that a run loses if it is stopped and resumed right after its first evaluation."""
    log = Metrics(tmp_path, 100, 64)
    log.evaluation(0, EVALUATION, 1e-3, -1.0, 2.5)
    log.close()
    log_run(tmp_path, 0, 2, last_eval=0)
    assert order(tmp_path) == [(0, True), (0, False), (1, False)]


def test_incomplete_row_is_not_read(tmp_path):
    """Catches a number that a killed run has cut short, read as a whole one."""
    path = tmp_path / "metrics.csv"
    log_run(tmp_path, 0, 2)
    whole = path.read_bytes()
    complete = read_rows(path)
    assert [row["mfu"] for row in complete] == ["", "-1", "-1"]
    for missing in range(1, len(whole.splitlines(keepends=True)[-1]) + 1):
        path.write_bytes(whole[:-missing])
        assert read_rows(path) in (complete, complete[:-1]), f"without the last {missing} bytes"
    assert read_rows(tmp_path / "gone.csv") == []


@pytest.mark.skipif(resource is None, reason="this system has no file size limits")
@pytest.mark.parametrize("free_bytes", [0, 10, 75, 130, 200])
def test_rows_wait_while_the_disk_is_full(tmp_path, capsys, clock, free_bytes, monkeypatch):
    """Catches a run that ends because its disk is full, or rows that are lost or broken when there is space again."""
    monkeypatch.setattr("nanogpt.metrics.FLUSH_SECONDS", 0.0)
    log_run(tmp_path, 0, 4)
    before, (soft, hard) = (tmp_path / "metrics.csv").read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (free_bytes, hard))
    try:
        log = Metrics(tmp_path, 100, 64)
        for iteration in range(4):
            if iteration == 3:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            if iteration == 0:
                log.evaluation(iteration, EVALUATION, 1e-3, -1.0, 2.5)
            log.step(iteration, 2.5, 1e-3, 1.0, 0.03, 1000.0, -1.0)
        log.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "metrics.csv").read_bytes() == before
    assert capsys.readouterr().err.count("its rows wait in memory") == 1


def test_stdout_on_a_full_disk_ends_no_run(tmp_path, monkeypatch):
    """Catches a run that ends because its output goes to a file on a full disk."""

    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sys, "stdout", Full())
    log_run(tmp_path, 0, 4)
    assert len(rows(tmp_path)) == 5


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_bar(tmp_path, monkeypatch):
    """Catches a bar without loss, speed or time left, a pause that it shows forever, control characters in a sample."""
    out, err = Terminal(), Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    log = Metrics(tmp_path, 100, 64, first_iter=20)
    log.pause("evaluating")
    assert " 20%|" in err.getvalue() and err.getvalue().rstrip().endswith("left, evaluating")
    log.advance()
    log.step(20, 2.12344, 6e-4, 1.5, 0.03, 123456.7, -1.0)
    log.say("a\abell\x1b[2J")
    log.close()
    last = err.getvalue().rstrip().split("\r")[-1]
    assert " 21/100, " in last and last.endswith(" left, loss 2.1234, lr 6.00e-04, 123k tokens/s")
    assert out.getvalue().split("\n")[:2] == ["iter 20: loss 2.1234, time 30.00ms, mfu -100.00%", "a\ufffdbell\ufffd[2J"]


def test_no_progress_bar_in_files(tmp_path, capsys):
    """Catches a log file full of progress bars."""
    log_run(tmp_path, 0, 4)
    assert capsys.readouterr().err == ""


def test_silent_metrics_do_nothing(tmp_path, capsys):
    """Catches eight ranks that print each line eight times and write one file."""
    log = SilentMetrics()
    log.say("hello")
    log.evaluation(0, EVALUATION, 1e-3, -1.0, 2.5)
    log.step(0, 2.5, 1e-3, 1.0, 0.03, 1000.0, -1.0)
    log.advance()
    with log:
        log.pause("evaluating")
        log.sync()
    output = capsys.readouterr()
    assert output.out == output.err == ""
    assert list(tmp_path.iterdir()) == []


def test_missing_wandb_is_named(monkeypatch):
    """Catches a traceback if the optional package is not installed."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb"):
        start_wandb("project", "run", {})


@pytest.fixture
def fake_wandb(monkeypatch):
    """A stand-in for the package and for its run; `calls` lists the arguments of each call."""
    fake = types.SimpleNamespace(calls=[], id="abc", errors=types.SimpleNamespace(Error=ConnectionError))
    fake.init = lambda **arguments: fake.calls.append(arguments) or fake
    fake.log = lambda values: fake.calls.append(values)
    fake.finish = lambda **arguments: fake.calls.append(arguments)
    fake.define_metric = lambda *arguments, **keywords: None
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setitem(sys.modules, "wandb.errors", fake.errors)
    return fake


def test_wandb_gets_nanogpts_keys(tmp_path, fake_wandb, clock):
    """Catches charts that do not match those of nanoGPT's runs: another key, or a fraction instead of a percentage."""
    log = Metrics(tmp_path, 100, 64, wandb_run=start_wandb("owt", "gpt2", {"batch_size": 4}))
    log.evaluation(10, EVALUATION, 1e-3, 0.25, 2.6)
    log.step(10, 2.5, 1e-3, 1.5, 0.03, 1000.0, 0.5, 5e6)
    log.close()
    init, evaluation, step, finish = fake_wandb.calls
    assert {name: init[name] for name in ("project", "name", "config", "id")} == {
        "project": "owt",
        "name": "gpt2",
        "config": {"batch_size": 4},
        "id": None,
    }
    position = {"iter": 10, "tokens": 640, "seconds": 0.0}
    losses = {"train/loss": 2.5, "val/loss": 2.75, "train/bits_per_byte": 3.25, "val/bits_per_byte": 3.5}
    assert evaluation == position | losses | {"lr": 1e-3, "mfu": 25.0, "best_val_loss": 2.6}
    speed = {"tokens_per_second": 1000.0, "mfu": 50.0, "peak_memory_mb": 5.0}
    assert step == position | {"loss": 2.5, "lr": 1e-3, "grad_norm": 1.5, "clipped": 0.0} | speed
    assert finish == {"exit_code": 0}


def test_wandb_gets_each_row_once(tmp_path, fake_wandb):
    """Catches quick iterations, flushed together, of which only the last is sent, or in another order."""
    log = Metrics(tmp_path, 100, 64, wandb_run=start_wandb("owt", "gpt2", {}))
    for iteration in range(5):
        log.step(iteration, 2.5, 1e-3, 1.0, 0.03, 1000.0, -1.0)
    log.evaluation(5, EVALUATION, 1e-3, -1.0, 2.5)
    log.close()
    assert [(row["iter"], "val/loss" in row) for row in fake_wandb.calls[1:-1]] == order(tmp_path)


def test_wandb_resumes_a_run(fake_wandb):
    """Catches a resumed run that becomes a second one on Weights & Biases."""
    start_wandb("owt", "gpt2", {}, "abc")
    assert {name: fake_wandb.calls[0][name] for name in ("id", "resume")} == {"id": "abc", "resume": "allow"}


def test_wandb_failure_ends_no_run(tmp_path, fake_wandb, capsys):
    """Catches a run that ends with the service's connection, as if its own output pipe were closed."""

    def fail(*arguments, **keywords):
        raise BrokenPipeError("the service is gone")

    log = Metrics(tmp_path, 100, 64, wandb_run=start_wandb("owt", "gpt2", {}))
    fake_wandb.finish = fail
    log.close()
    fake_wandb.log = fail
    log_run(tmp_path, 0, 3)
    with Metrics(tmp_path, 100, 64, wandb_run=fake_wandb) as log:
        for iteration in range(3):
            log.step(iteration, 2.5, 1e-3, 1.0, 0.03, 1000.0, -1.0)
    assert len(rows(tmp_path)) == 3
    assert capsys.readouterr().err.count("failed and stops here: the service is gone") == 1


def test_wandb_is_told_of_a_failed_run(tmp_path, fake_wandb):
    """Catches a failed run that is listed as finished."""
    with pytest.raises(UserError), Metrics(tmp_path, 100, 64, wandb_run=fake_wandb):
        raise UserError("the loss is nan")
    assert fake_wandb.calls == [{"exit_code": 1}]


@pytest.fixture
def real_wandb(tmp_path, monkeypatch):
    """The real package, offline, with its files in tmp_path."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR", "HOME"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    yield wandb
    wandb.teardown()


def read_wandb(path):
    """Return id, name, config and summary from a .wandb file: protocol buffers in the records of a LevelDB log.

    The log is made of blocks of 32 KiB; each piece of a record has a header of 7 bytes: checksum, length, kind.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    data, offset, record_bytes, config, summary = path.read_bytes(), 7, b"", {}, {}
    while offset < len(data):
        left = 32768 - offset % 32768  # of this block
        if left < 7:  # too little for a header
            offset += left
        _, length, kind = struct.unpack_from("<IHB", data, offset)
        record_bytes += data[offset + 7 : offset + 7 + length]
        offset += 7 + length
        if kind in (1, 4):  # a whole record, or the last piece of one
            record, record_bytes = Record.FromString(record_bytes), b""
            if record.HasField("run"):
                run_id, name = record.run.run_id, record.run.display_name
                config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            for item in record.summary.update:
                summary[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
    return run_id, name, config, summary


def test_wandb_summary_is_the_last_row(dataset, tmp_path, real_wandb):
    """Catches calls that the real package refuses, other numbers than in metrics.csv, a second run after a resume."""
    flags = "--n_layer=1 --n_head=1 --n_embd=8 --block_size=8 --batch_size=2 --gradient_accumulation_steps=1 --device=cpu"
    flags += " --eval_iters=1 --eval_interval=2 --wandb_log=True --wandb_project=project --wandb_run_name=name --log_interval=2"
    paths = [f"--dataset={dataset}", f"--out_dir={tmp_path / 'out'}"]
    for more in ("--max_iters=3", "--init_from=resume --max_iters=6"):
        train.main(configurator.parse(train.Config, [*f"{flags} {more}".split(), *paths]))
        real_wandb.teardown()  # as at the end of a process: wait until its service has written everything
        last, best = rows(tmp_path / "out")[-1], min(float(row["val_loss"] or "inf") for row in rows(tmp_path / "out"))
        newest = max(tmp_path.glob("wandb/offline-run-*/run-*.wandb"), key=lambda path: path.stat().st_mtime_ns)
        run_id, name, config, summary = read_wandb(newest)
        assert last["val_loss"] and int(last["iteration"]) == config["max_iters"]
        for column, value in last.items():
            if value:
                key = {"iteration": "iter"}.get(column, re.sub("^(train|val)_", r"\1/", column))
                assert summary[key] == float(value), column
        assert (summary["best_val_loss"], name, config["n_embd"]) == (pytest.approx(best), "name", 8)
        assert torch.load(tmp_path / "out" / "ckpt.pt", weights_only=True)["extra"]["wandb"] == run_id
    runs = list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    assert {path.name for path in runs} == {f"run-{run_id}.wandb"}


def test_missing_login_is_one_line_before_training(dataset, tmp_path, real_wandb, monkeypatch, capfd):
    """Catches a traceback, or a run that finds out after its training."""
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_API_KEY", "")
    monkeypatch.delenv("WANDB_SILENT")
    flags = ["--wandb_log=True", "--n_layer=1", "--n_head=1", "--n_embd=8", "--block_size=8", "--max_iters=1", "--device=cpu"]
    monkeypatch.setattr(sys, "argv", ["train.py", *flags, f"--dataset={dataset}", f"--out_dir={tmp_path / 'out'}"])
    with pytest.raises(SystemExit) as caught:
        configurator.run(train.main, train.Config)
    out, err = capfd.readouterr()
    assert (caught.value.code, out) == (1, "")
    assert re.fullmatch(r"(wandb: .*\n)*train.py: error: .*(?i:api.key).*wandb.login.*WANDB_MODE=offline\)\n", err)
    assert not (tmp_path / "out").exists()


def test_wandb_cannot_ask(fake_wandb, monkeypatch):
    """Catches a login prompt in an unattended job, which would wait forever."""
    asked = []
    fake_wandb.init = lambda **arguments: asked.append(sys.stdin.isatty()) or fake_wandb
    terminal = types.SimpleNamespace(isatty=lambda: True)
    monkeypatch.setattr(sys, "stdin", terminal)
    start_wandb("owt", "gpt2", {})
    assert asked == [False] and sys.stdin is terminal
