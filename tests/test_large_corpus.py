"""Large corpora: the same files on any number of threads, however often the run is interrupted."""

import errno
import hashlib
import itertools
import json
import math
import os
import runpy
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import configurator

import numpy as np
import pytest

from nanogpt import corpus, documents, large_corpus
from nanogpt.dataset import Dataset
from nanogpt.errors import UserError
from nanogpt.tokenizer import CharTokenizer, TiktokenTokenizer, train_bpe

END = 256
TEXTS = [f"{i} plus {i} is {2 * i}, " * (i % 7) + "é" * (i % 3) for i in range(60)]
TEXTS += ["long " * 300, "", "<|endoftext|>", "\ud83d"]
TOKENS = [[*text.replace("\ud83d", "\ufffd").encode(), END] for text in TEXTS]

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")


def split(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Every fifth document is for validation; the rest train in reverse order."""
    documents = np.arange(count)
    return documents[documents % 5 != 2][::-1], documents[documents % 5 == 2]


def naive(tokens: list[list[int]]) -> tuple[list[int], list[int]]:
    """Return the expected train.bin and val.bin."""
    train = [ids for index, ids in enumerate(tokens) if index % 5 != 2][::-1]
    return joined(train), joined(tokens[2::5])


def joined(rows: list[list[int]]) -> list[int]:
    return [token for row in rows for token in row]


@pytest.fixture
def tokenizer() -> TiktokenTokenizer:
    """A byte-level encoding that needs no vocabulary file."""
    import tiktoken

    tokenizer = TiktokenTokenizer("bytes", 257)
    ranks = {bytes([byte]): byte for byte in range(256)}
    special = {"<|endoftext|>": END}
    tokenizer._encoding = tiktoken.Encoding("bytes", pat_str=r"(?s:.)", mergeable_ranks=ranks, special_tokens=special)
    return tokenizer


@pytest.fixture
def source(tmp_path: Path) -> documents.Source:
    (tmp_path / "in").mkdir()
    for name, texts in (("a", TEXTS[:40]), ("b", TEXTS[40:])):
        (tmp_path / "in" / f"{name}.jsonl").write_text(
            "".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8"
        )
    return documents.local(str(tmp_path / "in"))


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large_corpus, "CHUNK_CHARACTERS", 400)
    monkeypatch.setattr(large_corpus, "SAVE_INTERVAL_TOKENS", 1000)
    monkeypatch.setattr(large_corpus, "BLOCK_TOKENS", 500)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # slow, and no test cuts the power


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def ids(folder: Path, dtype: str = "<u2") -> tuple[list[int], list[int]]:
    return tuple(np.fromfile(folder / f"{name}.bin", dtype).tolist() for name in ("train", "val"))


@pytest.fixture
def whole(tmp_path: Path, source: documents.Source, tokenizer: TiktokenTokenizer) -> dict[str, bytes]:
    """The files that one thread writes without an interruption."""
    large_corpus.prepare(tmp_path / "whole", source, tokenizer, split, workers=1)
    return content(tmp_path / "whole")


# the result


@pytest.mark.parametrize("workers", [1, 2, 3, 16])
def test_files_equal_a_plain_loop(
    workers: int, tmp_path: Path, source: documents.Source, tokenizer: TiktokenTokenizer, capsys: pytest.CaptureFixture
) -> None:
    """Catches documents that threads put out of order, without end-of-text, or in the wrong split."""
    folder = tmp_path / "out" / "new"
    large_corpus.prepare(folder, source, tokenizer, split, workers)
    assert ids(folder) == naive(TOKENS)
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    assert meta == {
        "dtype": "uint16",
        "vocab_size": 257,
        "tokenizer": {"kind": "tiktoken", "name": "bytes", "vocab_size": 257},
        "source": "in",
        "sha256": hashlib.sha256(np.array(joined(TOKENS), "<u2").tobytes()).hexdigest(),
        "tokens": {"train": len(naive(TOKENS)[0]), "val": len(naive(TOKENS)[1])},
        "documents": {"train": 51, "val": 13},
    }
    assert sorted(content(folder)) == ["meta.json", "train.bin", "val.bin"]
    assert f"train has {meta['tokens']['train']:,} tokens" in capsys.readouterr().out
    assert Dataset(str(folder)).tokens == meta["tokens"]


def test_tokenizer_of_a_dataset(project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Catches other ids than the dataset's tokenizer gives, and documents without an end."""
    own = train_bpe(TEXTS[:-1], 300)
    corpus.write_dataset(project / "data" / "mine", ["Ho" * 9], ["Hi"], own, "letters")
    corpus.write_dataset(project / "data" / "letters", ["Ho" * 9], ["Hi"], CharTokenizer(list("Hio")), "letters")
    (project / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS), encoding="utf-8")
    config = large_corpus.HubConfig(input=str(project / "a.jsonl"), tokenizer="mine", name="big")

    large_corpus.prepare_from_hub(config, project / "data" / "fineweb_edu", "", "", split)

    tokens = [[*own.encode_array(text).tolist(), own.end_of_text] for text in TEXTS]
    assert ids(project / "data" / "big") == naive(tokens)
    assert Dataset(str(project / "data" / "big")).tokenizer.to_dict() == own.to_dict()
    for name, told in (("letters", "has no token that ends a document"), ("nowhere", "must be gpt2, .* or a prepared dataset")):
        with pytest.raises(UserError, match=f"--tokenizer={name}:? {told}"):
            large_corpus.prepare_from_hub(config.replace(tokenizer=name), project / "data" / "fineweb_edu", "", "", split)


def test_large_vocabulary(tmp_path: Path, source: documents.Source, tokenizer: TiktokenTokenizer) -> None:
    """Catches ids above 65,535 cut to 16 bits, and documents searched for in the wrong type."""
    tokenizer.vocab_size = 100_277
    large_corpus.prepare(tmp_path / "out", source, tokenizer, split, workers=2)
    assert ids(tmp_path / "out", "<u4") == naive(TOKENS)
    assert Dataset(str(tmp_path / "out")).dtype == np.dtype("<u4")


@pytest.mark.parametrize(("tokens", "documents"), [(1, 100), (7, 100), (12, 100), (1 << 20, 3), (1 << 20, 1), (1 << 20, 81)])
def test_arrange_is_indexing(tokens: int, documents: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches wrongly assembled blocks: of one document, of a part of one, of all documents."""
    monkeypatch.setattr(large_corpus, "BLOCK_TOKENS", tokens)
    monkeypatch.setattr(large_corpus, "BLOCK_DOCUMENTS", documents)
    rng = np.random.default_rng(0)
    rows = [[*rng.integers(9, size=rng.integers(12)).tolist(), 9] for _ in range(80)] + [[1, 2]]
    np.array(joined(rows), "<u2").tofile(tmp_path / "tokens")
    bounds, digest = large_corpus._bounds(tmp_path / "tokens", 9, np.dtype("<u2"))
    assert bounds.tolist() == [0, *np.cumsum([len(row) for row in rows]).tolist()]
    assert digest == hashlib.sha256((tmp_path / "tokens").read_bytes()).hexdigest()
    chosen = rng.permutation(81)
    blocks = list(large_corpus._blocks(bounds, chosen))
    lengths = [sum(len(rows[index]) for index in chosen[first:last]) for first, last in blocks]
    assert all(length <= tokens or last - first == 1 for length, (first, last) in zip(lengths, blocks, strict=True))
    assert all(last - first <= documents for first, last in blocks)
    with large_corpus.tqdm(disable=True) as bar:
        large_corpus._arrange(tmp_path / "tokens", tmp_path / "out", bounds, chosen, np.dtype("<u2"), bar)
    assert np.fromfile(tmp_path / "out", "<u2").tolist() == joined([rows[index] for index in chosen])


def last_two(count: int) -> tuple[np.ndarray, np.ndarray]:
    return np.arange(count - 2), np.arange(count - 2, count)


@pytest.mark.parametrize("limit", [*range(90, 110), 400, 401, 1000, 1001, len(joined(TOKENS)), 10**9])
def test_max_tokens_is_exact(limit: int, tmp_path: Path, source: documents.Source, tokenizer: TiktokenTokenizer) -> None:
    """Catches a sample of more or fewer tokens, or of others than the first."""
    large_corpus.prepare(tmp_path / "out", source, tokenizer, last_two, 3, limit)
    train, val = ids(tmp_path / "out")
    assert train + val == joined(TOKENS)[:limit]


def test_small_sample_reads_no_further(tmp_path: Path, tokenizer: TiktokenTokenizer) -> None:
    """Catches a small sample that reads gigabytes."""
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in TEXTS) + "not reached", encoding="utf-8"
    )
    large_corpus.prepare(tmp_path / "out", documents.local(str(tmp_path / "a.jsonl")), tokenizer, last_two, 1, 1500)
    assert joined(ids(tmp_path / "out")) == joined(TOKENS)[:1500]


@pytest.mark.parametrize(
    ("limit", "told"),
    [(1, "at least 2 documents are needed, got 1"), (2, r"too short: train\.bin must have at least 2 tokens, got 1")],
)
def test_text_that_is_too_short(
    limit: int, told: str, tmp_path: Path, source: documents.Source, tokenizer: TiktokenTokenizer
) -> None:
    """Catches a dataset with nothing to learn, or files left behind."""
    with pytest.raises(UserError, match=told):
        large_corpus.prepare(tmp_path / "out", source, tokenizer, lambda count: (np.arange(0, 1), np.arange(1, 2)), 1, limit)
    assert not (tmp_path / "out").exists()


def test_damaged_document_leaves_nothing(tmp_path: Path, source: documents.Source, tokenizer: TiktokenTokenizer) -> None:
    """Catches a folder left half begun, a lost old dataset, or an error without the line."""
    (tmp_path / "in" / "b.jsonl").write_text('{"text": "a"}\n{"text": "a}\n', encoding="utf-8")
    damaged = documents.local(str(tmp_path / "in"))
    with pytest.raises(UserError, match=r"b\.jsonl, line 2: not JSON"):
        large_corpus.prepare(tmp_path / "out", damaged, tokenizer, split, workers=40)
    assert not (tmp_path / "out").exists()
    large_corpus.prepare(
        tmp_path / "out", source := documents.local(str(tmp_path / "in" / "a.jsonl")), tokenizer, split, workers=1
    )
    before = content(tmp_path / "out")
    with pytest.raises(UserError, match="line 2"):
        large_corpus.prepare(tmp_path / "out", damaged, tokenizer, split, workers=40)
    assert content(tmp_path / "out") == before and source.name == "a.jsonl"


def test_threads_read_only_a_little_ahead() -> None:
    """Catches a queue that grows to the whole corpus when reading is faster than tokenizing."""
    taken, given = itertools.count(), itertools.count()
    ahead = []

    def items() -> Iterator[tuple[int, int]]:
        for index in range(100):
            next(taken)
            yield index, index

    for mark, result in large_corpus._ahead(lambda index: index * index, items(), 3):
        next(given)
        ahead.append(int(repr(taken)[6:-1]) - int(repr(given)[6:-1]))
        assert result == mark * mark
    assert len(ahead) == 100 and max(ahead) <= 6


# interruptions


def at_step(step: int, act: Callable[[], Any], *others: tuple[Any, str]) -> pytest.MonkeyPatch:
    """Call `act` at the `step`-th call that changes the disk, and at every later one."""
    patch, count = pytest.MonkeyPatch(), itertools.count(1)

    def watched(call: Callable) -> Callable:
        def wrapper(*arguments: Any, **keywords: Any) -> Any:
            if next(count) >= step:
                act()
            return call(*arguments, **keywords)

        return wrapper

    for owner, name in ((os, "fsync"), (os, "replace"), (large_corpus.tqdm, "update"), *others):
        patch.setattr(owner, name, watched(getattr(owner, name)))
    return patch


def kill(call: Callable[[], None], step: int) -> bool:
    """Run `call` in a forked process that gets SIGKILL at a step; return whether it finished before."""
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        at_step(step, lambda: os.kill(os.getpid(), signal.SIGKILL), (Path, "unlink"))
        call()
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status in (0, -signal.SIGKILL)
    return status == 0


def refuse(call: Callable[[], None], step: int) -> bool:
    """Run `call` on a disk that is full from a step on; return whether it finished before."""

    def full() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    patch = at_step(step, full)
    try:
        call()
    except UserError as error:
        assert "No space left on device; make room, then run the same command again to continue" in str(error)
        return False
    finally:
        patch.undo()
    return True


def interrupt(call: Callable[[], None], step: int) -> bool:
    """Run `call` with Ctrl-C at a step; return whether it finished before."""

    def stop() -> None:
        raise KeyboardInterrupt

    patch = at_step(step, stop, (Path, "unlink"))
    try:
        call()
    except KeyboardInterrupt:
        return False
    finally:
        patch.undo()
    return True


@pytest.mark.parametrize("end", [pytest.param(kill, marks=needs_fork), refuse, interrupt])
def test_interrupted_at_any_step(
    end: Callable[[Callable[[], None], int], bool],
    tmp_path: Path,
    source: documents.Source,
    tokenizer: TiktokenTokenizer,
    whole: dict[str, bytes],
) -> None:
    """Catches tokens that are lost, repeated or mixed with the old dataset, wherever a run has ended."""
    for step in itertools.count(1):
        folder = tmp_path / str(step)
        corpus.write_dataset(folder, ["abab"], ["baba"], CharTokenizer(["a", "b"]), "letters")
        before = content(folder)
        ended = end(lambda folder=folder: large_corpus.prepare(folder, source, tokenizer, split, workers=2), step)
        found = {name: data for name, data in content(folder).items() if name in before}
        assert found in (before, whole) or "train.bin" not in found
        assert end is not refuse or not list(folder.glob("*.bin.*"))
        with open(folder / large_corpus.TOKENS, "ab") as file:
            file.write(b"torn")  # tokens written after the progress was saved
        large_corpus.prepare(folder, source, tokenizer, split, workers=3)
        assert content(folder) == whole
        if ended:
            break
    assert step > 30


def test_tokens_are_flushed_before_the_progress(
    tmp_path: Path, source: documents.Source, tokenizer: TiktokenTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches saved progress whose tokens a power failure can lose."""
    flushed = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: flushed.append(os.fstat(descriptor).st_size))
    replace = os.replace

    def checked(one: Path, other: Path) -> None:
        if other.name == large_corpus.PROGRESS:
            assert flushed[-1] == 2 * json.loads(one.read_text(encoding="utf-8"))["tokens"] > 0
        replace(one, other)

    monkeypatch.setattr(os, "replace", checked)
    large_corpus.prepare(tmp_path / "out", source, tokenizer, split, workers=1)
    assert len(flushed) > 5


def test_finished_work_is_not_repeated(
    tmp_path: Path,
    source: documents.Source,
    tokenizer: TiktokenTokenizer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """Catches a run that starts over each time, and so may never end."""
    encoded: list[str] = []

    class Counting(TiktokenTokenizer):
        def encode_array(self, text: str) -> np.ndarray:
            encoded.append(text)
            return super().encode_array(text)

    counting = Counting("bytes", 257)
    counting._encoding = tokenizer._encoding
    call = lambda: large_corpus.prepare(tmp_path / "out", source, counting, split, workers=1)  # noqa: E731
    for interval, step in ((1000, 20), (10**9, 5)):  # Ctrl-C loses no finished work, already saved or not
        monkeypatch.setattr(large_corpus, "SAVE_INTERVAL_TOKENS", interval)
        assert not interrupt(call, step)
        done = json.loads((tmp_path / "out" / large_corpus.PROGRESS).read_text(encoding="utf-8"))["tokens"]
        assert done > 0
    encoded.clear()
    call()
    assert f"continuing after {done:,} tokens" in capsys.readouterr().out
    assert encoded == TEXTS[-len(encoded) :]
    assert len(joined(TOKENS[-len(encoded) :])) == len(joined(TOKENS)) - done


def test_continued_run_knows_what_was_left_out(
    tmp_path: Path, tokenizer: TiktokenTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a table at the end that lacks the files from before the interruption."""
    folder, texts = tmp_path / "in", ["one " * 500, "two " * 500, "three " * 500]
    folder.mkdir()
    (folder / "0.txt").write_bytes(b"caf\xe9")
    for number, text in enumerate(texts, 1):
        (folder / f"{number}.txt").write_text(text, encoding="utf-8")

    def call() -> dict[str, str]:
        found = documents.local(str(folder))
        large_corpus.prepare(tmp_path / "out", found, tokenizer, lambda count: (np.arange(2), np.arange(2, count)), workers=1)
        return found.left_out

    def encode_but_the_last(self: TiktokenTokenizer, text: str) -> np.ndarray:
        if text == texts[-1]:
            raise KeyboardInterrupt
        return encode(self, text)

    encode = TiktokenTokenizer.encode_array
    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        context.setattr(TiktokenTokenizer, "encode_array", encode_but_the_last)
        call()
    assert json.loads((tmp_path / "out" / large_corpus.PROGRESS).read_text(encoding="utf-8"))["tokens"] > 0
    assert call() == {"0.txt": "not UTF-8 text (byte 3); convert it to UTF-8 first"}


@pytest.mark.parametrize("change", ["max_tokens", "tokenizer", "file", "progress", "tokens"])
def test_other_settings_start_over(
    change: str, tmp_path: Path, source: documents.Source, tokenizer: TiktokenTokenizer, capsys: pytest.CaptureFixture
) -> None:
    """Catches tokens of another text, encoding or length that a run continues from."""
    folder, limit, tokens = tmp_path / "out", 0, TOKENS
    assert not interrupt(lambda: large_corpus.prepare(folder, source, tokenizer, split, workers=1), 30)
    assert json.loads((folder / large_corpus.PROGRESS).read_text(encoding="utf-8"))["tokens"] > 1000
    if change == "max_tokens":
        limit = 3000
    elif change == "tokenizer":
        tokenizer.name = "other bytes"
    elif change == "file":
        (tmp_path / "in" / "a.jsonl").write_text('{"text": "new"}\n', encoding="utf-8")
        source = documents.local(str(tmp_path / "in"))
        tokens = [[*b"new", END], *TOKENS[40:]]
    elif change == "progress":
        (folder / large_corpus.PROGRESS).write_bytes(b"")
    else:
        (folder / large_corpus.TOKENS).write_bytes(b"")
    large_corpus.prepare(folder, source, tokenizer, split, 1, limit)
    assert "starting over" in capsys.readouterr().err
    if limit:
        assert sum(map(len, ids(folder))) == limit
    else:
        assert ids(folder) == naive(tokens)


def test_file_that_cannot_be_opened_is_named(tmp_path: Path, source: documents.Source, tokenizer: TiktokenTokenizer) -> None:
    """Catches advice to make room for an error that is not a full disk."""
    (tmp_path / "out" / large_corpus.TOKENS).mkdir(parents=True)
    with pytest.raises(OSError, match=large_corpus.TOKENS):
        large_corpus.prepare(tmp_path / "out", source, tokenizer, split, workers=1)


def test_second_run_is_refused(tmp_path: Path, source: documents.Source, tokenizer: TiktokenTokenizer) -> None:
    """Catches two processes that write to the same file."""
    (tmp_path / "out").mkdir()
    with corpus.writing_into(tmp_path / "out"):
        (tmp_path / "out" / large_corpus.TOKENS).write_bytes(b"of the first")
        with pytest.raises(UserError, match="another prepare"):
            large_corpus.prepare(tmp_path / "out", source, tokenizer, split, workers=1)
        assert (tmp_path / "out" / large_corpus.TOKENS).read_bytes() == b"of the first"
    large_corpus.prepare(tmp_path / "out", source, tokenizer, split, workers=1)
    assert ids(tmp_path / "out") == naive(TOKENS)


# OpenWebText and FineWeb-Edu


def script(project: Path, name: str) -> dict[str, Any]:
    path = list(sys.path)
    found = runpy.run_path(str(project / "data" / name / "prepare.py"), run_name="prepare")
    sys.path[:] = path
    return found


@pytest.mark.parametrize("count", [2, 3, 1999, 2000, 2001, 12_345])
def test_openwebtext_splits_are_nanogpts(count: int, project: Path) -> None:
    """Catches another document in val.bin, which makes losses incomparable with nanoGPT's."""
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    train, val = script(project, "openwebtext")["split"](count)
    expected = datasets.Dataset.from_dict({"i": range(count)}).train_test_split(test_size=0.0005, seed=2357, shuffle=True)
    assert train.tolist() == expected["train"]["i"][:] and val.tolist() == expected["test"]["i"][:]


def test_openwebtext_files_are_nanogpts(project: Path, tmp_path: Path, tokenizer: TiktokenTokenizer) -> None:
    """Catches documents in another order than nanoGPT writes them."""
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    texts = [f"{i} " * (i % 9) for i in range(2500)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    source = documents.local(str(tmp_path / "a.jsonl"))
    large_corpus.prepare(tmp_path / "out", source, tokenizer, script(project, "openwebtext")["split"], workers=2)
    whole = datasets.Dataset.from_dict({"text": texts})
    expected = []
    for shuffled in whole.train_test_split(test_size=0.0005, seed=2357, shuffle=True).values():
        shards = [shuffled.shard(num_shards=2, index=index, contiguous=True) for index in range(2)]
        expected.append([token for shard in shards for text in shard["text"] for token in [*text.encode(), END]])
    assert list(ids(tmp_path / "out")) == expected


def test_openwebtext_full_split_is_nanogpts(project: Path) -> None:
    """Catches a numpy that shuffles differently from the one behind nanoGPT's files."""
    train, val = script(project, "openwebtext")["split"](8_013_769)
    assert (len(train), len(val)) == (8_009_762, 4_007)  # as nanoGPT's prepare.py notes them
    assert val[:4].tolist() == [4327249, 4286500, 2184614, 4793011] and train[:2].tolist() == [4269689, 2140761]


@pytest.mark.parametrize("count", [1, 2, 2000, 2001, 20_001])
def test_fineweb_edu_validates_on_every_2000th(count: int, project: Path) -> None:
    """Catches a document in both splits or in none, and a small sample without validation."""
    train, val = script(project, "fineweb_edu")["split"](count)
    assert len(val) == math.ceil(count / 2000) and val[0] == 0 and (val % 2000 == 0).all()
    assert len(train) == count - len(val) and (train % 2000 != 0).all() and (np.diff(train) > 0).all()


@pytest.mark.parametrize("name", ["openwebtext", "fineweb_edu"])
def test_command(name: str, project: Path, tmp_path: Path, gpt2_vocabulary: None, capsys: pytest.CaptureFixture) -> None:
    """Catches a command that does not print or write what it promises, or a dataset that GPT-2 cannot use."""
    texts = [f"Document {i} says <|endoftext|> {i}." for i in range(30)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    prepare = script(project, name)
    flags = [f"--input={tmp_path / 'a.jsonl'}", "--name=mine", "--max_tokens=200"]
    prepare["main"](configurator.parse(prepare["Config"], flags))
    shown = capsys.readouterr()
    assert "next: python train.py config/train_gpt2.py --dataset=mine" in shown.out and shown.err == ""
    data = Dataset(str(project / "data" / "mine"))
    assert sum(data.tokens.values()) == 200 and data.tokenizer.name == "gpt2"
    train, val = ids(project / "data" / "mine")
    assert data.tokenizer.decode(val[: val.index(50256)]) in texts
    assert data.tokenizer.decode(train[: train.index(50256)]) in texts


@pytest.mark.parametrize("name", ["openwebtext", "fineweb_edu"])
def test_command_without_the_datasets_library(name: str, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a traceback, or files left behind, on the first try without the library."""
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setattr(TiktokenTokenizer, "__init__", lambda self, name: None)
    prepare = script(project, name)
    with pytest.raises(UserError, match=r"pip install datasets.*--input=FILE_OR_FOLDER"):
        prepare["main"](prepare["Config"]())
    assert [path.name for path in (project / "data" / name).iterdir()] == ["prepare.py"]
