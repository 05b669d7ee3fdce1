"""What a run prints and records: the lines that people's scripts parse, and rows that a resumed run has once each."""

import csv
import errno
import io
import math
import sys
import types
from pathlib import Path

import pytest

import metrics
from configurator import UserError
from metrics import Metrics

try:
    import resource
except ImportError:  # Windows
    resource = None

COLUMNS = "iteration,tokens,seconds,train_loss,val_loss,loss,learning_rate,grad_norm,tokens_per_second,mfu"
BROKEN_OFF = [
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
    """A clock that stands at clock[0] seconds."""
    now = [1000.0]
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])
    return now


def rows(out_dir: Path) -> list[dict[str, str]]:
    with open(out_dir / "metrics.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def run(out_dir: Path, start: int, end: int, evaluated: int = -1, every: int = 10) -> None:
    """The records of iterations `start` to `end`, as train.py makes them: evaluations every few, and every step."""
    records = Metrics(out_dir, 100, 64, start, evaluated)
    for iteration in range(start, end):
        if iteration % every == 0 and iteration != evaluated:
            records.evaluation(iteration, {"train": 2.5, "val": 2.5}, 1e-3, -1.0)
        records.step(iteration, 2.5, 1e-3, 1.0, 0.03, 1000.0, -1.0)
        records.advance()
    records.close()


def order(out_dir: Path) -> list[tuple[int, bool]]:
    """The iteration of each row, and whether it is an evaluation."""
    return [(int(row["iteration"]), row["val_loss"] != "") for row in rows(out_dir)]


@pytest.mark.parametrize("mfu, shown", [(0.0123, "1.23%"), (-1.0, "-100.00%"), (0.4567, "45.67%")])
def test_printed_lines_are_nanogpts(tmp_path, capsys, mfu, shown):
    """A word or digit more, on which scripts that parse nanoGPT's output stumble; lines on stderr; colours."""
    records = Metrics(tmp_path, 100, 64)
    records.evaluation(250, {"train": 2.42926, "val": 2.44471}, 1e-3, mfu)
    records.step(10, 2.12344, 1e-3, 1.0, 0.03012, 1000.0, mfu)
    records.close()
    assert (
        capsys.readouterr().out
        == f"step 250: train loss 2.4293, val loss 2.4447\niter 10: loss 2.1234, time 30.12ms, mfu {shown}\n"
    )


def test_rows_of_metrics_csv(tmp_path, clock):
    """A value in the wrong column or unit, tokens of another iteration, a row that waits in a buffer until the end."""
    records = Metrics(tmp_path, 100, 64)
    clock[0] += 2.5
    records.evaluation(10, {"train": 2.42926, "val": 2.44471}, 1e-3, -1.0)
    clock[0] += 1
    records.step(10, 2.12344, 6e-4, 1.5, 0.03012, 123456.7, 0.25)
    text = (tmp_path / "metrics.csv").read_bytes().decode("utf-8")
    records.close()
    assert text.splitlines() == [
        COLUMNS,
        "10,640,2.5,2.42926,2.44471,,,,,",
        "10,640,3.5,,,2.12344,0.0006,1.5,123456.7,0.25",
    ]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_left_empty(tmp_path, value):
    """A file that spreadsheets and plots cannot read."""
    records = Metrics(tmp_path, 100, 64)
    records.step(10, value, 6e-4, value, 0.03, 100.0, -1.0)
    records.close()
    assert (rows(tmp_path)[0]["loss"], rows(tmp_path)[0]["grad_norm"]) == ("", "")


def test_a_new_run_starts_a_new_file(tmp_path):
    """Rows of an earlier run in the same folder that are mixed with this one's."""
    run(tmp_path, 0, 30)
    run(tmp_path, 0, 5)
    assert order(tmp_path) == [(0, True), *[(iteration, False) for iteration in range(5)]]


@pytest.mark.parametrize("evaluated", [20, -1])
@pytest.mark.parametrize("broken_off", BROKEN_OFF)
def test_a_resumed_run_has_each_row_once(tmp_path, evaluated, broken_off):
    """Rows twice, rows of iterations that are done again, a gap, or a file spoilt by the line that a kill broke off."""
    run(tmp_path, 0, 28)
    with open(tmp_path / "metrics.csv", "a", newline="", encoding="utf-8") as file:
        file.write(broken_off)
    run(tmp_path, 20, 35, evaluated)
    expected = [(i, is_evaluation) for i in range(35) for is_evaluation in (True, False) if i % 10 == 0 or not is_evaluation]
    assert order(tmp_path) == expected
    assert (tmp_path / "metrics.csv").read_text(encoding="utf-8").splitlines()[0] == COLUMNS
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


def test_seconds_go_on_where_a_run_is_resumed(tmp_path, clock):
    """A time axis that jumps back, or that counts the time between the two parts."""
    records = Metrics(tmp_path, 100, 64)
    for iteration in range(3):
        clock[0] += 10
        records.step(iteration, 2.5, 1e-3, 1.0, 0.03, 1000.0, -1.0)
    records.close()
    clock[0] += 5000
    records = Metrics(tmp_path, 100, 64, start=2)
    clock[0] += 7
    records.step(2, 2.5, 1e-3, 1.0, 0.03, 1000.0, -1.0)
    records.close()
    assert [float(row["seconds"]) for row in rows(tmp_path)] == [10, 20, 27]


def test_whole_rows_are_read_and_a_broken_one_is_not(tmp_path):
    """A number that a killed run has cut short, taken for the whole one."""
    path = tmp_path / "metrics.csv"
    run(tmp_path, 0, 2)
    whole = path.read_bytes()
    rows = metrics.read_rows(path)
    assert [row["mfu"] for row in rows] == ["", "-1", "-1"]
    for missing in range(1, len(whole.splitlines(keepends=True)[-1]) + 1):
        path.write_bytes(whole[:-missing])
        assert metrics.read_rows(path) in (rows, rows[:-1]), f"without the last {missing} bytes"
    assert metrics.read_rows(tmp_path / "gone.csv") == []


@pytest.mark.skipif(resource is None, reason="this system has no limits on files")
@pytest.mark.parametrize("room", [0, 10, 75, 130, 200])
def test_rows_wait_for_a_disk_that_is_full(tmp_path, capsys, clock, room):
    """A run that ends for want of room for a row; rows that are lost or broken when there is room again."""
    run(tmp_path, 0, 4)
    before, (soft, hard) = (tmp_path / "metrics.csv").read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        records = Metrics(tmp_path, 100, 64)
        for iteration in range(4):
            if iteration == 3:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            if iteration == 0:
                records.evaluation(iteration, {"train": 2.5, "val": 2.5}, 1e-3, -1.0)
            records.step(iteration, 2.5, 1e-3, 1.0, 0.03, 1000.0, -1.0)
        records.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "metrics.csv").read_bytes() == before
    assert capsys.readouterr().err.count("its rows wait in memory") == 1


def test_a_log_file_on_a_full_disk_ends_no_run(tmp_path, monkeypatch):
    """A run that dies because its output, in a file, cannot be written."""

    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sys, "stdout", Full())
    run(tmp_path, 0, 4)
    assert len(rows(tmp_path)) == 5


def test_a_process_that_is_not_the_main_one_does_nothing(tmp_path, capsys):
    """Eight processes that write one file and print each line eight times."""
    records = Metrics(tmp_path, 100, 64, is_main=False)
    records.say("hello")
    records.evaluation(0, {"train": 2.5, "val": 2.5}, 1e-3, -1.0)
    records.step(0, 2.5, 1e-3, 1.0, 0.03, 1000.0, -1.0)
    records.advance()
    records.close()
    output = capsys.readouterr()
    assert output.out == output.err == ""
    assert list(tmp_path.iterdir()) == []


def test_a_missing_wandb_is_named(monkeypatch):
    """A traceback where a package that is needed for one key alone is not installed."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb"):
        metrics.start_wandb("project", "run", {})


def test_wandb_gets_nanogpts_keys(tmp_path, monkeypatch):
    """Charts that do not continue those of nanoGPT's runs: another key, a share where it has a percentage."""
    calls = []
    fake = types.SimpleNamespace(
        init=lambda **arguments: calls.append(arguments) or fake,
        log=lambda values: calls.append(values),
        finish=lambda: calls.append("finished"),
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    records = Metrics(tmp_path, 100, 64, wandb_run=metrics.start_wandb("owt", "gpt2", {"batch_size": 4}))
    records.evaluation(10, {"train": 2.5, "val": 2.75}, 1e-3, 0.25)
    records.close()
    assert calls == [
        {"project": "owt", "name": "gpt2", "config": {"batch_size": 4}},
        {"iter": 10, "train/loss": 2.5, "val/loss": 2.75, "lr": 1e-3, "mfu": 25.0},
        "finished",
    ]


def test_wandb_takes_a_run_offline(tmp_path, monkeypatch):
    """Calls that the real package does not have or refuses."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR", "HOME"):
        monkeypatch.setenv(name, str(tmp_path))
    records = Metrics(tmp_path, 100, 64, wandb_run=metrics.start_wandb("owt", "gpt2", {"batch_size": 4}))
    records.evaluation(10, {"train": 2.5, "val": 2.75}, 1e-3, -1.0)
    records.close()
    assert len(list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))) == 1
