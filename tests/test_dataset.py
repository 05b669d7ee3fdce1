"""Token files: checks, random draws, and the windows that training and evaluation see."""

import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nanogpt import corpus, dataset, metrics
from nanogpt.dataset import STREAMS, Dataset
from nanogpt.errors import UserError
from nanogpt.tokenizer import CharTokenizer, TiktokenTokenizer

STATUS = Path("/proc/self/status")


def write(folder: Path, train: list[int], val: list[int], dtype: str = "uint8", meta: dict | None = None) -> Path:
    """Write a dataset by hand, with a table of 100 characters (70,000 for uint32)."""
    folder.mkdir(parents=True, exist_ok=True)
    np.array(train, dtype).tofile(folder / "train.bin")
    np.array(val, dtype).tofile(folder / "val.bin")
    table = [chr(0x10000 + i) for i in range(70_000 if dtype == "uint32" else 100)]
    description = {
        "dtype": dtype,
        "vocab_size": len(table),
        "tokenizer": {"kind": "char", "characters": table},
        "tokens": {"train": len(train), "val": len(val)},
    }
    (folder / "meta.json").write_text(json.dumps(description | (meta or {})), encoding="utf-8")
    return folder


def counting(folder: Path, train: int = 50, val: int = 20) -> Dataset:
    """Return a dataset in which each token is its own position in the file."""
    return Dataset(str(write(folder, list(range(train)), list(range(val)))))


# windows


@pytest.mark.parametrize(("dtype", "scale"), [("uint8", 1), ("uint16", 600), ("uint32", 700)])
def test_windows_are_slices_of_the_file(tmp_path: Path, dtype: str, scale: int) -> None:
    """Catches targets that are not the next tokens, or ids that wrap around in a smaller type."""
    tokens = [(scale * i) % 65521 if dtype != "uint8" else i for i in range(99)]
    data = Dataset(str(write(tmp_path, tokens, tokens, dtype)))
    starts = [0, 91, 5, 5, 40]
    x, y = data.windows("train", np.array(starts), 7, 70_000)
    assert x.tolist() == [tokens[start : start + 7] for start in starts]
    assert y.tolist() == [tokens[start + 1 : start + 8] for start in starts]
    assert x.dtype == y.dtype == torch.int64 and x.is_contiguous() and y.is_contiguous()


def test_large_ids_keep_their_value(tmp_path: Path) -> None:
    """Catches an id above 65,535 that is cut or read as negative."""
    data = Dataset(str(write(tmp_path, [0, 65535, 65536, 69999], [1, 2], "uint32")))
    x, y = data.windows("train", np.array([0]), 3, 70_000)
    assert (x.tolist(), y.tolist()) == ([[0, 65535, 65536]], [[65535, 65536, 69999]])


def test_windows_can_be_written_to(tmp_path: Path) -> None:
    """Catches a batch that is a view of the file."""
    data = counting(tmp_path)
    x, y = data.windows("train", np.array([0]), 4, 100)
    x.fill_(9), y.fill_(9)
    assert (tmp_path / "train.bin").read_bytes() == bytes(range(50))
    assert data.windows("train", np.array([0]), 4, 100)[0].tolist() == [[0, 1, 2, 3]]


def test_splits_are_not_mixed_up(tmp_path: Path) -> None:
    """Catches validation on the training text."""
    data = Dataset(str(write(tmp_path, [1] * 30, [2] * 20)))
    assert data.tokens == {"train": 30, "val": 20}
    assert data.windows("train", np.array([3]), 4, 100)[0].unique().tolist() == [1]
    assert data.windows("val", np.array([3]), 4, 100)[0].unique().tolist() == [2]


@pytest.mark.parametrize("split", ["train", "val"])
def test_masked_targets_are_left_out(tmp_path: Path, split: str) -> None:
    """Catches a loss mask that is off by one token, or that masks inputs too."""
    write(tmp_path, list(range(30)), list(range(30)))
    mask = [int(i % 3 == 0 or i > 20) for i in range(30)]
    (tmp_path / f"{split}.mask.bin").write_bytes(bytes(mask))
    data = Dataset(str(tmp_path))
    starts = [0, 1, 14, 21]
    x, y = data.windows(split, np.array(starts), 8, 100)
    assert x.tolist() == [list(range(start, start + 8)) for start in starts]
    assert y.tolist() == [[i if mask[i] else -1 for i in range(start + 1, start + 9)] for start in starts]
    other = "val" if split == "train" else "train"
    assert data.windows(other, np.array([1]), 3, 100)[1].tolist() == [[2, 3, 4]]


# draws


@pytest.mark.parametrize(("tokens", "block_size"), [(2, 1), (9, 8), (10, 8), (11, 1), (40, 33)])
def test_draw_reaches_both_ends_and_never_beyond(tmp_path: Path, tokens: int, block_size: int) -> None:
    """Catches a first or last window that is never drawn, or one that reads past the end."""
    data = counting(tmp_path, train=tokens, val=2)
    starts = data.draw("train", "train", 1337, 0, 500, block_size)
    assert starts.dtype == np.int64 and starts.shape == (500,)
    assert set(starts.tolist()) == set(range(tokens - block_size))
    _, y = data.windows("train", starts, block_size, 100)
    assert y.max() == tokens - 1


def test_draw_is_uniform(tmp_path: Path) -> None:
    """Catches a draw that favors part of the file: counts differ by more than 5 standard deviations."""
    starts = counting(tmp_path).draw("train", "train", 1, 2, 40_000, 10)
    counts = np.bincount(starts, minlength=40)
    assert abs(counts - 1000).max() < 5 * 1000**0.5


def test_draw_is_a_function_of_seed_stream_and_iteration(tmp_path: Path) -> None:
    """Catches a draw that depends on earlier draws, on numpy's global state, or on the object."""
    data, again = counting(tmp_path / "a"), counting(tmp_path / "b")
    first = data.draw("train", "train", 1337, 5, 64, 8).tolist()
    data.draw("train", "train", 1337, 4, 10, 8)
    np.random.seed(0)
    assert data.draw("train", "train", 1337, 5, 64, 8).tolist() == first
    assert again.draw("train", "train", 1337, 5, 64, 8).tolist() == first


def test_draw_differs_in_seed_stream_and_iteration(tmp_path: Path) -> None:
    """Catches seeds, streams or iterations that share windows, even in part or shifted."""
    data = Dataset(str(write(tmp_path, [0] * 60_000, [0] * 60_000)))
    drawn: list[set[int]] = []
    for seed in (0, 1, 2**63 - 1):
        for stream in STREAMS:
            for iteration in (0, 1, 2, 10**9):
                drawn.append(set(data.draw("train", stream, seed, iteration, 40, 8).tolist()))
    assert len(STREAMS) == 3
    for i, one in enumerate(drawn):
        assert all(len(one & other) < 10 for other in drawn[:i])


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8, 63])
def test_smaller_draw_is_a_prefix(tmp_path: Path, count: int) -> None:
    """Catches windows that depend on how many are drawn at once."""
    data = counting(tmp_path)
    assert (data.draw("val", "eval_val", 7, 3, count, 4) == data.draw("val", "eval_val", 7, 3, 64, 4)[:count]).all()


def philox(seed: int, stream: int, iteration: int, block: int) -> list[int]:
    """Return the four numbers of a block of Philox4x64-10, written from Salmon et al. 2011."""
    word = (1 << 64) - 1
    k0, k1, c = seed, stream, [block, 0, iteration, 0]
    for _ in range(10):
        high0, low0 = divmod(0xD2E7470EE14C6C93 * c[0], 1 << 64)
        high1, low1 = divmod(0xCA5A826395121157 * c[2], 1 << 64)
        c = [high1 ^ c[1] ^ k0, low1, high0 ^ c[3] ^ k1, low0]
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & word, (k1 + 0xBB67AE8584CAA73B) & word
    return c


@pytest.mark.parametrize(("seed", "iteration"), [(0, 0), (1337, 3), (2**63 - 1, 600_000)])
def test_drawn_numbers_are_philox(tmp_path: Path, seed: int, iteration: int) -> None:
    """Catches another generator, or another use of it, which would change every resumed run."""
    data = counting(tmp_path)
    for number, stream in enumerate(("train", "eval_train", "eval_val")):
        expected = [random % 42 for block in (1, 2) for random in philox(seed, number, iteration, block)]
        assert data.draw("train", stream, seed, iteration, 8, 8).tolist() == expected


@pytest.mark.parametrize("tokens", [2, 5, 8, 9, 10, 16, 17, 18, 50])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_consecutive_windows_score_each_target_once(tmp_path: Path, tokens: int, batch_size: int) -> None:
    """Catches a target that whole-split evaluation misses or counts twice."""
    data = counting(tmp_path, train=2, val=tokens)
    scored, lengths = [], []
    for starts, length in data.consecutive("val", 8, batch_size):
        assert 1 <= len(starts) <= batch_size
        x, y = data.windows("val", starts, length, 100)
        assert (y == x + 1).all()
        scored += y.flatten().tolist()
        lengths += [length] * len(starts)
    assert scored == list(range(1, tokens))
    assert all(length == 8 for length in lengths[:-1]) and 1 <= lengths[-1] <= 8


# nanoGPT's folders


def test_nanogpt_folder_with_pickle(tmp_path: Path) -> None:
    """Catches nanoGPT's character dataset read as bytes or with GPT-2's vocabulary."""
    np.array([0, 1, 2, 1, 0], "<u2").tofile(tmp_path / "train.bin")
    np.array([2, 1, 0], "<u2").tofile(tmp_path / "val.bin")
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 3, "itos": {0: "a", 1: "b", 2: "c"}}))
    data = Dataset(str(tmp_path))
    assert isinstance(data.tokenizer, CharTokenizer) and data.tokenizer.characters == ["a", "b", "c"]
    assert data.tokens == {"train": 5, "val": 3}
    assert data.windows("train", np.array([1]), 3, 3)[0].tolist() == [[1, 2, 1]]


def test_nanogpt_folder_without_description(tmp_path: Path) -> None:
    """Catches nanoGPT's GPT-2 dataset that is refused or read in the wrong type."""
    np.array([50256, 0, 300, 65], "<u2").tofile(tmp_path / "train.bin")
    np.array([1, 2], "<u2").tofile(tmp_path / "val.bin")
    data = Dataset(str(tmp_path))
    assert isinstance(data.tokenizer, TiktokenTokenizer) and data.tokenizer.model_vocab_size == 50304
    assert data.windows("train", np.array([0]), 3, 50304)[1].tolist() == [[0, 300, 65]]


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65_536, "<u2"), (65_537, "<u4"), (100_277, "<u4")])
def test_folder_with_vocab_size_alone(tmp_path: Path, vocab_size: int, dtype: str) -> None:
    """Catches a folder of a fork that is refused, or whose ids above 65,535 are read as two."""
    np.array([0, vocab_size - 1, 7, 1, 0], dtype).tofile(tmp_path / "train.bin")
    np.array([2, 1, 0], dtype).tofile(tmp_path / "val.bin")
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": vocab_size}))
    data = Dataset(str(tmp_path))
    assert data.tokens == {"train": 5, "val": 3} and data.tokenizer.model_vocab_size == vocab_size
    assert data.windows("train", np.array([0]), 3, vocab_size)[1].tolist() == [[vocab_size - 1, 7, 1]]


def test_meta_json_wins_over_a_pickle(tmp_path: Path) -> None:
    """Catches tokens read in nanoGPT's type because of a meta.pkl beside meta.json."""
    folder = write(tmp_path, [1, 2, 3, 4], [5, 6])
    (folder / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 9}))
    data = Dataset(str(folder))
    assert (data.dtype.name, data.tokens, data.tokenizer.vocab_size) == ("uint8", {"train": 4, "val": 2}, 100)


# damaged and missing datasets


def test_files_of_nanogpt_in_a_folder_of_ours(tmp_path: Path) -> None:
    """Catches nanoGPT's token files beside our meta.json that are only called damaged, and a remedy that does not work."""
    folder = write(tmp_path, [1] * 30, [1] * 20)
    for split in ("train", "val"):
        (folder / f"{split}.bin").write_bytes(np.arange(9, dtype="<u2").tobytes())
    (folder / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 9}))
    with pytest.raises(UserError, match=r"train\.bin .* 18 tokens, but meta\.json says 30.* remove meta\.json$"):
        Dataset(str(folder))
    (folder / "meta.json").unlink()
    assert Dataset(str(folder)).tokens == {"train": 9, "val": 9}


@pytest.mark.parametrize(("split", "train", "val"), [("train", 8, 50), ("val", 50, 8)])
def test_split_shorter_than_block_size(tmp_path: Path, split: str, train: int, val: int) -> None:
    """Catches a split without a single window that fails in mid-run, or a remedy that does not work."""
    data = counting(tmp_path, train, val)
    with pytest.raises(UserError, match=rf"{split}\.bin must have more tokens than block_size=8, got 8; .*--block_size=7 "):
        data.check(8, 100)
    data.check(7, 100)


@pytest.mark.parametrize("tokens", [0, 1])
def test_split_without_a_target(tmp_path: Path, tokens: int) -> None:
    """Catches advice to take a block_size below 1."""
    data = counting(tmp_path, val=tokens)
    with pytest.raises(UserError, match=r"val\.bin") as refusal:
        data.check(8, 100)
    assert "--block_size=0" not in str(refusal.value) and "--block_size=-" not in str(refusal.value)


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("place", [0, 7, 8, 19, 30, 49])
def test_id_outside_the_vocabulary_at_either_end(
    tmp_path: Path, split: str, place: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches an id outside the embedding that would fail in mid-run."""
    monkeypatch.setattr(dataset, "CHECKED_TOKENS", 20)
    monkeypatch.setattr(dataset, "CHECK_CHUNK_TOKENS", 8)
    tokens = {"train": [1] * 50, "val": [1] * 50}
    tokens[split][place] = 65
    data = Dataset(str(write(tmp_path, **tokens)))
    with pytest.raises(UserError, match=rf"{split}\.bin: token ids must be below .* 65, got 65;"):
        data.check(8, 65)
    data.check(8, 66)


def test_id_outside_the_vocabulary_in_the_middle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an id outside the first check that is taken as an input or target."""
    monkeypatch.setattr(dataset, "CHECKED_TOKENS", 10)
    data = Dataset(str(write(tmp_path, [1] * 25 + [65] + [1] * 24, [1] * 20)))
    data.check(8, 65)
    data.windows("train", np.array([16, 26]), 8, 65)
    for start in (17, 20, 25):
        with pytest.raises(UserError, match=r"train\.bin: token ids must be below .* 65, got 65;"):
            data.windows("train", np.array([0, start]), 8, 65)


@pytest.mark.parametrize(("dtype", "split"), [("uint16", "train"), ("uint16", "val"), ("uint32", "train")])
def test_partial_token(tmp_path: Path, dtype: str, split: str) -> None:
    """Catches a file that lost its last byte."""
    folder = write(tmp_path, [1] * 30, [1] * 30, dtype, {"tokens": None})
    path = folder / f"{split}.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=rf"{split}\.bin"):
        Dataset(str(folder))


@pytest.mark.parametrize(
    ("named", "meta"),
    [
        (r"meta\.json", {"dtype": "int64"}),
        (r"meta\.json", {"dtype": None}),
        (r"meta\.json", {"dtype": ["uint8"]}),
        (r"meta\.json", {"vocab_size": 99}),
        (r"meta\.json", {"vocab_size": "100"}),
        (r"meta\.json", {"vocab_size": None}),
        (r"meta\.json", {"tokenizer": None}),
        (r"(train\.bin|meta\.json)", {"dtype": "uint16"}),
        (r"train\.bin", {"tokens": {"train": 29, "val": 20}}),
        (r"val\.bin", {"tokens": {"train": 30, "val": 21}}),
        (r"(train\.bin|meta\.json)", {"tokens": {"train": "30", "val": 20}}),
        (r"(val\.bin|meta\.json)", {"tokens": {"train": 30, "val": None}}),
    ],
)
def test_meta_json_of_other_files(tmp_path: Path, named: str, meta: dict[str, Any]) -> None:
    """Catches tokens read in the wrong type, and files of two different datasets."""
    write(tmp_path, [1] * 30, [1] * 20, meta=meta)
    with pytest.raises(UserError, match=named):
        Dataset(str(tmp_path))


@pytest.mark.parametrize("flags", [0, 29, 31])
def test_mask_of_another_length(tmp_path: Path, flags: int) -> None:
    """Catches a loss mask of other tokens."""
    write(tmp_path, [1] * 30, [1] * 20)
    (tmp_path / "train.mask.bin").write_bytes(bytes(flags))
    with pytest.raises(UserError, match=r"train\.mask\.bin"):
        Dataset(str(tmp_path))


@pytest.mark.parametrize("size", [0, 1, 10, 21, 58, 62])
def test_file_that_changes_during_the_run(tmp_path: Path, size: int) -> None:
    """Catches tokens of a dataset prepared again in mid-run, or a traceback if the file is now shorter."""
    data = Dataset(str(write(tmp_path, [1] * 30, [1] * 20, "uint16")))
    data.windows("train", np.array([0]), 8, 100)
    (tmp_path / "train.bin").write_bytes(bytes(size))
    with pytest.raises(UserError, match=r"train\.bin"):
        data.windows("train", np.array([0]), 8, 100)


@pytest.mark.parametrize("size", [0, 5, 29, 31])
def test_mask_that_changes_during_the_run(tmp_path: Path, size: int) -> None:
    """Catches a loss mask replaced in mid-run that is used, or ends in a traceback."""
    write(tmp_path, [1] * 30, [1] * 20)
    (tmp_path / "train.mask.bin").write_bytes(bytes(30))
    data = Dataset(str(tmp_path))
    (tmp_path / "train.mask.bin").write_bytes(bytes(size))
    with pytest.raises(UserError, match=r"train\.mask\.bin"):
        data.windows("train", np.array([0]), 8, 100)


@pytest.mark.parametrize("name", ["train.bin", "train.mask.bin"])
def test_file_deleted_during_the_run(tmp_path: Path, name: str) -> None:
    """Catches a traceback, or a run that goes on without its loss mask."""
    write(tmp_path, [1] * 30, [1] * 20)
    (tmp_path / "train.mask.bin").write_bytes(bytes(30))
    data = Dataset(str(tmp_path))
    (tmp_path / name).unlink()
    with pytest.raises(dataset.FileLost, match=rf"{re.escape(name)} can no longer be read"):
        data.windows("train", np.array([0]), 8, 100)


@pytest.mark.parametrize("replace", [False, True])
def test_file_prepared_anew_during_the_run(tmp_path: Path, replace: bool) -> None:
    """Catches a map that keeps a replaced file, and windows that mix the tokens of two datasets of the same length."""
    data = Dataset(str(write(tmp_path, [1] * 30, [1] * 20)))
    assert data.windows("train", np.array([0, 16]), 8, 100)[0].tolist() == [[1] * 8] * 2
    path, old = tmp_path / "train.bin", os.stat(tmp_path / "train.bin")
    if replace:
        (tmp_path / "new.bin").write_bytes(b"\2" * 30)
        os.utime(tmp_path / "new.bin", ns=(old.st_atime_ns, old.st_mtime_ns))
        os.replace(tmp_path / "new.bin", path)
    else:
        path.write_bytes(b"\2" * 30)
        os.utime(path, ns=(old.st_atime_ns, old.st_mtime_ns + 10**9))
    with pytest.raises(dataset.FileLost, match=r"train\.bin has changed"):
        data.windows("train", np.array([0, 16]), 8, 100)


def test_file_changed_during_a_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a batch that was half read from a file of the same run, half from its successor."""
    data = Dataset(str(write(tmp_path, [1] * 30, [1] * 20)))
    stat, calls = os.stat, []

    def stat_and_rewrite(path: Path) -> os.stat_result:
        result = stat(path)
        if not calls:
            calls.append(path)
            path.write_bytes(b"\2" * 31)  # after the look before the batch
        return result

    monkeypatch.setattr(os, "stat", stat_and_rewrite)
    with pytest.raises(dataset.FileLost, match=r"train\.bin has changed"):
        data.windows("train", np.array([0, 16]), 8, 100)


def test_missing_dataset_says_what_to_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a missing dataset whose error does not say which command makes it."""
    monkeypatch.setattr(dataset, "DATA", tmp_path)
    (tmp_path / "poems").mkdir()
    (tmp_path / "poems" / "prepare.py").touch()
    with pytest.raises(UserError, match=r"'poems' .*python data/poems/prepare\.py"):
        Dataset("poems")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"'empty'.*no train\.bin"):
        Dataset("empty")
    write(tmp_path / "ready", [1] * 30, [1] * 20)
    with pytest.raises(
        UserError,
        match=r"'nowhere'.*not found; prepared datasets: ready;.*python data/text/prepare\.py --input=FILE --name=NAME",
    ):
        Dataset("nowhere")
    assert Dataset("ready").tokens == {"train": 30, "val": 20}


def test_folder_by_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a relative path that is looked for in data/ only, or a folder here that hides the one in data/."""
    monkeypatch.setattr(dataset, "DATA", tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "data" / "both", [1] * 30, [1] * 20)
    write(tmp_path / "both", [1] * 40, [1] * 20)
    write(tmp_path / "mine", [1] * 50, [1] * 20)
    for name, count in (("both", 30), ("./data/both", 30), ("mine", 50), ("./mine", 50), (str(tmp_path / "both"), 40)):
        assert Dataset(name).tokens["train"] == count
    (tmp_path / "data" / "poems").mkdir()
    (tmp_path / "data" / "poems" / "prepare.py").touch()
    for name in ("poems", "data/poems"):
        with pytest.raises(UserError, match=rf"'{name}' .*; run python data/poems/prepare\.py$"):
            Dataset(name)


@pytest.mark.parametrize("split", ["train", "val"])
def test_half_a_dataset_is_refused(tmp_path: Path, split: str) -> None:
    """Catches a folder with only one of the two splits."""
    folder = write(tmp_path, [1] * 30, [1] * 20)
    (folder / f"{split}.bin").unlink()
    with pytest.raises(UserError, match=rf"no {split}\.bin"):
        Dataset(str(folder))


def test_written_dataset_is_read_back(tmp_path: Path) -> None:
    """Catches a writer and a reader that disagree."""
    train, val = "to be or not to be", "or not"
    corpus.write_dataset(tmp_path, [train], [val], CharTokenizer.from_text(train), "Hamlet")
    data = Dataset(str(tmp_path))
    x, y = data.windows("train", np.array([0, 3]), 13, data.tokenizer.vocab_size)
    assert [data.tokenizer.decode(row.tolist()) for row in x] == [train[0:13], train[3:16]]
    assert [data.tokenizer.decode(row.tolist()) for row in y] == [train[1:14], train[4:17]]


def resident() -> int:
    (line,) = [line for line in STATUS.read_text(encoding="utf-8").splitlines() if line.startswith("VmRSS:")]
    return int(line.split()[1]) << 10


@pytest.mark.skipif(not STATUS.exists(), reason="no /proc/self/status")
def test_resident_memory_does_not_grow(tmp_path: Path) -> None:
    """Catches pages of the token file, or a copy of it, that stay in memory."""
    for split in ("train", "val"):
        with open(tmp_path / f"{split}.bin", "wb") as file:
            file.truncate(2 << 30)
    data = Dataset(str(tmp_path))
    data.windows("train", data.draw("train", "train", 0, 0, 16, 256), 256, 50257)
    before = resident()
    for iteration in range(30):
        starts = data.draw("train", "train", 0, iteration, 16, 256)
        data.windows("train", starts, 256, 50257)
    assert resident() - before < 4 << 20


def sparse(folder: Path, size: int) -> Path:
    """Write a dataset of 100 characters with a train.bin of `size` zero bytes, which take no disk space."""
    write(folder, [0], [0] * 100_000, meta={"tokens": None})
    os.truncate(folder / "train.bin", size)
    return folder


@pytest.fixture
def large(tmp_path: Path) -> Iterator[Path]:
    """A dataset with a train.bin of 20 GB."""
    folder = sparse(tmp_path / "large", 20 * 10**9)
    if (folder / "train.bin").stat().st_blocks * 512 > 1 << 20:
        pytest.skip("this file system has no sparse files")
    yield folder
    (folder / "train.bin").unlink()


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="no /proc/self/io")
def test_window_reads_nothing_ahead(tmp_path: Path) -> None:
    """Catches the system's read-ahead, megabytes on some disks, for each small window of a file that is not in memory."""

    def bytes_read() -> int:
        return int(re.search(r"^read_bytes: (\d+)", Path("/proc/self/io").read_text(encoding="utf-8"), re.MULTILINE)[1])

    data = Dataset(str(write(tmp_path, [1] * (8 << 20), [1] * 20)))
    with open(tmp_path / "train.bin", "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # as if it had not been read yet
    before = bytes_read()
    data.windows("train", np.array([4 << 20]), 64, 100)
    assert bytes_read() - before < 1 << 20


def test_first_batch_of_a_large_file_comes_at_once(large: Path) -> None:
    """Catches a first batch that reads the whole file."""

    resource = pytest.importorskip("resource")  # not on Windows

    def page_faults() -> int:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return usage.ru_minflt + usage.ru_majflt

    before = page_faults()
    data = Dataset(str(large))
    data.check(256, 100)
    x, _ = data.windows("train", data.draw("train", "train", 0, 0, 16, 256), 256, 100)
    assert data.tokens["train"] == 20 * 10**9 and x.shape == (16, 256)
    assert page_faults() - before < 20_000  # of 4 KiB; the whole file would take 300,000, even if 16 pages are mapped at once


TRAIN_EACH = """# one process per dataset, so that each has its own peak; forked, so that PyTorch is imported once
import os, sys, configurator, train
*flags, small, large = sys.argv[1:]
for folder in (small, large):
    if os.fork() == 0:
        train.main(configurator.parse(train.Config, [*flags, f"--dataset={folder}", f"--out_dir={folder}-out"]))
        os._exit(0)
    assert os.wait()[1] == 0
"""


@pytest.mark.skipif(not STATUS.exists(), reason="no /proc/self/status")
def test_training_takes_no_more_memory_on_a_large_file(large: Path, tmp_path: Path) -> None:
    """Catches memory that grows with the dataset, from opening it to the last iteration."""
    shape = "--n_layer=1 --n_head=1 --n_embd=16 --block_size=64 --batch_size=8 --gradient_accumulation_steps=1"
    length = "--max_iters=200 --eval_interval=200 --eval_iters=1 --log_interval=199 --device=cpu --dtype=float32"
    small = sparse(tmp_path / "small", 1 << 20)
    subprocess.run(
        [sys.executable, "-c", TRAIN_EACH, *shape.split(), *length.split(), small, large],
        cwd=Path(__file__).parents[1],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        check=True,
    )
    peaks = []
    for folder in (small, large):
        (last,) = [row for row in metrics.read_rows(Path(f"{folder}-out/metrics.csv")) if row["iteration"] == "199"]
        peaks.append(float(last["peak_memory_mb"]))
    assert 0.9 < peaks[1] / peaks[0] < 1.1, peaks
