"""What a run prints and records: the lines that people's scripts parse, and rows that a resumed run has once each."""

import csv
import errno
import io
import json
import math
import re
import struct
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import configurator
import train
from nanogpt import metrics
from nanogpt.errors import UserError
from nanogpt.metrics import Metrics, SilentMetrics

try:
    import resource
except ImportError:  # Windows
    resource = None

OLD_COLUMNS = "iteration,tokens,seconds,train_loss,val_loss,loss,learning_rate,grad_norm,tokens_per_second,mfu"
COLUMNS = OLD_COLUMNS.replace("norm,", "norm,clipped,") + ",peak_memory_mb"
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
            records.evaluation(iteration, {"train": 2.5, "val": 2.5}, 1e-3, -1.0, 2.5)
        records.advance()
        records.step(iteration, 2.5, 1e-3, 1.0, 0.03, 1000.0, -1.0)
    records.close()


def order(out_dir: Path) -> list[tuple[int, bool]]:
    """The iteration of each row, and whether it is an evaluation."""
    return [(int(row["iteration"]), row["val_loss"] != "") for row in rows(out_dir)]


@pytest.mark.parametrize("mfu, shown", [(0.0123, "1.23%"), (-1.0, "-100.00%"), (0.4567, "45.67%")])
def test_printed_lines_are_nanogpts(tmp_path, capsys, mfu, shown):
    """A word or digit more, on which scripts that parse nanoGPT's output stumble; lines on stderr; colours."""
    records = Metrics(tmp_path, 100, 64)
    records.evaluation(250, {"train": 2.42926, "val": 2.44471}, 1e-3, mfu, 2.4)
    records.step(10, 2.12344, 1e-3, 1.0, 0.03012, 1000.0, mfu)
    records.close()
    assert (
        capsys.readouterr().out
        == f"step 250: train loss 2.4293, val loss 2.4447\niter 10: loss 2.1234, time 30.12ms, mfu {shown}\n"
    )


def test_quick_iterations_are_recorded_together_and_wait_for_nothing_else(tmp_path, capsys, clock):
    """A line or row that waits for the next logged iteration, minutes away; one that is lost, or comes after a later one."""

    def printed(seconds: float, act: Callable[[], None]) -> list[str]:
        clock[0] += seconds
        act()
        lines = [line.split(":")[0] for line in capsys.readouterr().out.splitlines()]
        recorded.extend(int(line[5:]) for line in lines if line.startswith("iter "))
        assert order(tmp_path) == [(iteration, False) for iteration in recorded]
        return lines

    def step(iteration: int) -> Callable[[], None]:
        return lambda: records.step(iteration, 2.5, 1e-3, 1.0, 0.03, 1000.0, -1.0)

    recorded: list[int] = []
    records = Metrics(tmp_path, 100, 64)
    assert printed(0.0, step(0)) == ["iter 0"]
    assert printed(0.1, step(1)) == []
    assert printed(0.01, records.advance) == []
    assert printed(0.2, step(2)) == ["iter 1", "iter 2"]
    assert printed(0.1, step(3)) == []
    assert printed(0.15, records.advance) == ["iter 3"]
    assert printed(0.1, step(4)) == []
    assert printed(0.0, lambda: records.say("text")) == ["iter 4", "text"]
    assert printed(0.1, step(5)) == []
    assert printed(0.0, lambda: records.pause("evaluating")) == ["iter 5"]
    assert printed(0.1, step(6)) == []
    assert printed(0.0, records.sync) == ["iter 6"]
    assert printed(0.1, step(7)) == []
    assert printed(0.0, records.close) == ["iter 7"]


def test_rows_of_metrics_csv(tmp_path, clock):
    """A value in the wrong column or unit, tokens of another iteration, a row that waits in a buffer until the end."""
    records = Metrics(tmp_path, 100, 64)
    clock[0] += 2.5
    records.evaluation(10, {"train": 2.42926, "val": 2.44471}, 1e-3, -1.0, 2.4)
    clock[0] += 1
    records.step(10, 2.12344, 6e-4, 1.5, 0.03012, 123456.7, 0.25, 2_048_512_345)
    text = (tmp_path / "metrics.csv").read_bytes().decode("utf-8")
    records.close()
    assert text.splitlines() == [
        COLUMNS,
        "10,640,2.5,2.42926,2.44471,,,,,,,",
        "10,640,3.5,,,2.12344,0.0006,1.5,0,123456.7,0.25,2048.5",
    ]


def test_clipped_steps_are_counted_between_logged_rows(tmp_path):
    """A share of all steps so far, or of the logged ones, or one that leaves out the logged step itself."""
    records = Metrics(tmp_path, 100, 64)
    for iteration, clipped in enumerate([True, False, False, True, True, False, False, False]):
        records.advance(clipped)
        if iteration % 3 == 0 or iteration == 7:
            records.step(iteration, 2.5, 1e-3, 1.0, 0.03, 1000.0, -1.0)
    records.close()
    assert [float(row["clipped"]) for row in rows(tmp_path)] == pytest.approx([1, 1 / 3, 1 / 3, 0])


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


def test_rows_of_an_earlier_version_are_kept(tmp_path):
    """A resumed run that throws away what the version before it has written, or moves it into other columns."""
    old = ["0,0,1.5,4.25,4.5,,,,,", "0,0,2.5,,,4.25,0.001,1.5,1000,0.25", "1,64,3.5,,,4,0.002,2.5,2000,-1"]
    (tmp_path / "metrics.csv").write_bytes("".join(f"{line}\r\n" for line in [OLD_COLUMNS, *old]).encode())
    run(tmp_path, 1, 2)
    found = rows(tmp_path)
    assert list(found[0]) == COLUMNS.split(",")
    for row, line in zip(found, old[:2], strict=False):
        assert [row[name] for name in OLD_COLUMNS.split(",")] == line.split(",")
        assert (row["clipped"], row["peak_memory_mb"]) == ("", "")
    assert order(tmp_path) == [(0, True), (0, False), (1, False)]


@pytest.mark.parametrize("header", ["", "a,b,c", '"', COLUMNS.replace("tokens,", ""), COLUMNS + ",more"])
def test_a_file_of_another_kind_has_no_rows(tmp_path, header):
    """A traceback, or made-up numbers, for a file that is no metrics.csv."""
    (tmp_path / "metrics.csv").write_text(f"{header}\n0,0,1.5,4.25,4.5,,,,,,,\n")
    assert metrics.read_rows(tmp_path / "metrics.csv") == []


def test_seconds_go_on_where_a_run_is_resumed(tmp_path, clock):
    """A time axis that jumps back, or that counts the time between the two parts."""
    records = Metrics(tmp_path, 100, 64)
    for iteration in range(3):
        clock[0] += 10
        records.step(iteration, 2.5, 1e-3, 1.0, 0.03, 1000.0, -1.0)
    records.close()
    clock[0] += 5000
    records = Metrics(tmp_path, 100, 64, first_iter=2)
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
def test_rows_wait_for_a_disk_that_is_full(tmp_path, capsys, clock, room, monkeypatch):
    """A run that ends for want of room for a row; rows that are lost or broken when there is room again."""
    monkeypatch.setattr(metrics, "FLUSH_SECONDS", 0.0)
    run(tmp_path, 0, 4)
    before, (soft, hard) = (tmp_path / "metrics.csv").read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        records = Metrics(tmp_path, 100, 64)
        for iteration in range(4):
            if iteration == 3:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            if iteration == 0:
                records.evaluation(iteration, {"train": 2.5, "val": 2.5}, 1e-3, -1.0, 2.5)
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


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_tells_where_the_run_is(tmp_path, monkeypatch):
    """A bar without loss, rate, speed or time left; one that says for good what it stood still for; a model's bell rung."""
    out, err = Terminal(), Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    records = Metrics(tmp_path, 100, 64, first_iter=20)
    records.pause("evaluating")
    assert " 20%|" in err.getvalue() and err.getvalue().rstrip().endswith("left, evaluating")
    records.advance()
    records.step(20, 2.12344, 6e-4, 1.5, 0.03, 123456.7, -1.0)
    records.say("a\abell\x1b[2J")
    records.close()
    last = err.getvalue().rstrip().split("\r")[-1]
    assert " 21/100, " in last and last.endswith(" left, loss 2.1234, lr 6.00e-04, 123k tokens/s")
    assert out.getvalue().split("\n")[:2] == ["iter 20: loss 2.1234, time 30.00ms, mfu -100.00%", "a\ufffdbell\ufffd[2J"]


def test_a_bar_stays_out_of_files(tmp_path, capsys):
    """A log full of bars."""
    run(tmp_path, 0, 4)
    assert capsys.readouterr().err == ""


def test_a_process_that_is_not_the_main_one_does_nothing(tmp_path, capsys):
    """Eight processes that write one file and print each line eight times."""
    records = SilentMetrics()
    records.say("hello")
    records.evaluation(0, {"train": 2.5, "val": 2.5}, 1e-3, -1.0, 2.5)
    records.step(0, 2.5, 1e-3, 1.0, 0.03, 1000.0, -1.0)
    records.advance()
    with records:
        records.pause("evaluating")
        records.sync()
    output = capsys.readouterr()
    assert output.out == output.err == ""
    assert list(tmp_path.iterdir()) == []


def test_a_missing_wandb_is_named(monkeypatch):
    """A traceback where a package that is needed for one key alone is not installed."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb"):
        metrics.start_wandb("project", "run", {})


@pytest.fixture
def fake_wandb(monkeypatch):
    """Stands in for the package, and is its own run: `calls` are what was asked of it."""
    fake = types.SimpleNamespace(calls=[], id="abc", errors=types.SimpleNamespace(Error=ConnectionError))
    fake.init = lambda **arguments: fake.calls.append(arguments) or fake
    fake.log = lambda values: fake.calls.append(values)
    fake.finish = lambda **arguments: fake.calls.append(arguments)
    fake.define_metric = lambda *arguments, **keywords: None
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_wandb_gets_nanogpts_keys(tmp_path, fake_wandb, clock):
    """Charts that do not continue those of nanoGPT's runs: another key, a share where it has a percentage."""
    records = Metrics(tmp_path, 100, 64, wandb_run=metrics.start_wandb("owt", "gpt2", {"batch_size": 4}))
    records.evaluation(10, {"train": 2.5, "val": 2.75}, 1e-3, 0.25, 2.6)
    records.step(10, 2.5, 1e-3, 1.5, 0.03, 1000.0, 0.5, 5e6)
    records.close()
    start, evaluation, step, end = fake_wandb.calls
    assert {name: start[name] for name in ("project", "name", "config", "id")} == {
        "project": "owt",
        "name": "gpt2",
        "config": {"batch_size": 4},
        "id": None,
    }
    place = {"iter": 10, "tokens": 640, "seconds": 0.0}
    assert evaluation == place | {"train/loss": 2.5, "val/loss": 2.75, "lr": 1e-3, "mfu": 25.0, "best_val_loss": 2.6}
    speed = {"tokens_per_second": 1000.0, "mfu": 50.0, "peak_memory_mb": 5.0}
    assert step == place | {"loss": 2.5, "lr": 1e-3, "grad_norm": 1.5, "clipped": 0.0} | speed
    assert end == {"exit_code": 0}


def test_wandb_gets_each_row_once_and_in_order(tmp_path, fake_wandb):
    """Rows of quick iterations, which are recorded together, of which only the last one is sent."""
    records = Metrics(tmp_path, 100, 64, wandb_run=metrics.start_wandb("owt", "gpt2", {}))
    for iteration in range(5):
        records.step(iteration, 2.5, 1e-3, 1.0, 0.03, 1000.0, -1.0)
    records.evaluation(5, {"train": 2.5, "val": 2.5}, 1e-3, -1.0, 2.5)
    records.close()
    assert [(row["iter"], "val/loss" in row) for row in fake_wandb.calls[1:-1]] == order(tmp_path)


def test_wandb_goes_on_with_a_run(fake_wandb):
    """A resumed run that becomes a second one over there."""
    metrics.start_wandb("owt", "gpt2", {}, "abc")
    assert {name: fake_wandb.calls[0][name] for name in ("id", "resume")} == {"id": "abc", "resume": "allow"}


def test_a_failure_of_wandb_ends_no_run(tmp_path, fake_wandb, capsys):
    """A run that dies, or passes for one whose reader has left, since a service elsewhere has."""

    def fail(*arguments, **keywords):
        raise BrokenPipeError("the service is gone")

    records = Metrics(tmp_path, 100, 64, wandb_run=metrics.start_wandb("owt", "gpt2", {}))
    fake_wandb.finish = fail
    records.close()
    fake_wandb.log = fail
    run(tmp_path, 0, 3)
    with Metrics(tmp_path, 100, 64, wandb_run=fake_wandb) as records:
        for iteration in range(3):
            records.step(iteration, 2.5, 1e-3, 1.0, 0.03, 1000.0, -1.0)
    assert len(rows(tmp_path)) == 3
    assert capsys.readouterr().err.count("failed and stops here: the service is gone") == 1


def test_wandb_hears_that_a_run_has_failed(tmp_path, fake_wandb):
    """A failed run that is listed as a finished one."""
    with pytest.raises(UserError), Metrics(tmp_path, 100, 64, wandb_run=fake_wandb):
        raise UserError("the loss is nan")
    assert fake_wandb.calls == [{"exit_code": 1}]


@pytest.fixture
def wandb_offline(tmp_path, monkeypatch):
    """The real package, which keeps its files in tmp_path."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR", "HOME"):
        monkeypatch.setenv(name, str(tmp_path))
    yield wandb
    wandb.teardown()


def read_wandb(path):
    """The id, config and summary in a .wandb file: protocol buffers in records, in blocks of 32 KiB, as LevelDB has its log."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, part, config, summary = path.read_bytes(), 7, b"", {}, {}
    while at < len(data):
        if 32768 - at % 32768 < 7:  # no room for a header
            at += 32768 - at % 32768
        _, length, kind = struct.unpack_from("<IHB", data, at)
        part, at = part + data[at + 7 : at + 7 + length], at + 7 + length
        if kind in (1, 4):  # whole, or its last part
            record, part = Record.FromString(part), b""
            if record.HasField("run"):
                run_id, name = record.run.run_id, record.run.display_name
                config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            for item in record.summary.update:
                summary[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
    return run_id, name, config, summary


def test_wandb_takes_a_run_offline_and_its_summary_is_the_last_row(dataset, tmp_path, wandb_offline):
    """Calls that the real package does not have or refuses; other numbers there than here; two runs of one that was resumed."""
    flags = "--n_layer=1 --n_head=1 --n_embd=8 --block_size=8 --batch_size=2 --gradient_accumulation_steps=1 --device=cpu"
    flags += f" --eval_iters=1 --eval_interval=2 --dataset={dataset} --out_dir={tmp_path / 'out'}"
    flags += " --wandb_log=True --wandb_project=project --wandb_run_name=name --log_interval=2"
    for more in ("--max_iters=3", "--init_from=resume --max_iters=6"):
        train.main(configurator.parse(train.Config, f"{flags} {more}".split()))
        wandb_offline.teardown()  # as at the end of a process: its service has written all
        last, best = rows(tmp_path / "out")[-1], min(float(row["val_loss"] or "inf") for row in rows(tmp_path / "out"))
        newest = max(tmp_path.glob("wandb/offline-run-*/run-*.wandb"), key=lambda path: path.stat().st_mtime_ns)
        run_id, name, config, summary = read_wandb(newest)
        assert last["val_loss"] and int(last["iteration"]) == config["max_iters"]
        for column, value in last.items():
            if value:
                key = {"iteration": "iter", "train_loss": "train/loss", "val_loss": "val/loss"}.get(column, column)
                assert summary[key] == float(value), column
        assert (summary["best_val_loss"], name, config["n_embd"]) == (pytest.approx(best), "name", 8)
        assert torch.load(tmp_path / "out" / "last.pt", weights_only=True)["extra"]["wandb"] == run_id
    runs = list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    assert {path.name for path in runs} == {f"run-{run_id}.wandb"}


def test_a_missing_login_is_one_line_before_training(command, dataset, tmp_path):
    """A traceback, or a run that finds out when it has trained."""
    pytest.importorskip("wandb")
    flags = ["--wandb_log=True", "--n_layer=1", "--n_head=1", "--n_embd=8", "--block_size=8", "--max_iters=1", "--device=cpu"]
    places = dict.fromkeys(("HOME", "NETRC", "WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"), str(tmp_path / "home"))
    settings = {"WANDB_MODE": "online", "WANDB_API_KEY": ""} | places
    finished = command("train.py", *flags, f"--dataset={dataset}", f"--out_dir={tmp_path / 'out'}", **settings)
    assert (finished.returncode, finished.stdout) == (1, "")
    assert re.fullmatch(r"train.py: error: --wandb_log=True: .*API key.*wandb login.*WANDB_MODE=offline\)\n", finished.stderr)
    assert not (tmp_path / "out").exists()


def test_wandb_cannot_ask(fake_wandb, monkeypatch):
    """A question in a job that nobody watches, which it waits on for good."""
    asked = []
    fake_wandb.init = lambda **arguments: asked.append(sys.stdin.isatty()) or fake_wandb
    terminal = types.SimpleNamespace(isatty=lambda: True)
    monkeypatch.setattr(sys, "stdin", terminal)
    metrics.start_wandb("owt", "gpt2", {})
    assert asked == [False] and sys.stdin is terminal
