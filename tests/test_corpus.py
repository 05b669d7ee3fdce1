"""Downloads, text files, and token files that a killed process cannot leave half written."""

import hashlib
import http.server
import itertools
import json
import os
import pickle
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from nanogpt import corpus
from nanogpt.dataset import Dataset
from nanogpt.errors import UserError
from nanogpt.tokenizer import CharTokenizer, TiktokenTokenizer

BODY = bytes(range(256)) * 1000
SHA256 = hashlib.sha256(BODY).hexdigest()
FILES = ["meta.json", "meta.pkl", "train.bin", "val.bin"]  # of a character dataset


class Server:
    """A local web server; `answers` holds (status, headers, body) per request, the last one for all further requests."""

    def __init__(self) -> None:
        self.answers: list[tuple[int, dict[str, str], bytes]] = []
        self.requests = 0
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                status, headers, body = outer.answers[min(outer.requests, len(outer.answers) - 1)]
                outer.requests += 1
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/input.txt"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def whole(body: bytes = BODY) -> tuple[int, dict[str, str], bytes]:
    return 200, {"Content-Length": str(len(body))}, body


CUT = (200, {"Content-Length": str(len(BODY))}, BODY[: len(BODY) // 2])


@pytest.fixture
def naps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that downloads would have slept; no proxy is used."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    slept: list[float] = []
    monkeypatch.setattr(corpus, "time", SimpleNamespace(sleep=slept.append))
    return slept


@pytest.fixture
def server(naps: list[float]) -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


# downloads


def test_download_is_complete(tmp_path: Path, server: Server, naps: list[float]) -> None:
    """Catches a file that differs from the server's, or a temporary file left beside it."""
    server.answers = [whole()]
    corpus.download(server.url, tmp_path / "input.txt", SHA256)
    assert (tmp_path / "input.txt").read_bytes() == BODY
    assert [path.name for path in tmp_path.iterdir()] == ["input.txt"]
    assert (server.requests, naps) == (1, [])


def test_download_without_a_length(tmp_path: Path, server: Server) -> None:
    """Catches a response without Content-Length taken for a failure."""
    server.answers = [(200, {}, BODY)]
    corpus.download(server.url, tmp_path / "input.txt", SHA256)
    assert (tmp_path / "input.txt").read_bytes() == BODY


def test_other_file_is_refused(tmp_path: Path, server: Server) -> None:
    """Catches a login page saved as the text, or a good file replaced by a wrong one."""
    server.answers = [whole(b"<html>please log in</html>")]
    with pytest.raises(UserError, match=r"input\.txt.*sha256.*" + SHA256):
        corpus.download(server.url, tmp_path / "input.txt", SHA256)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "input.txt").write_bytes(b"good")
    with pytest.raises(UserError):
        corpus.download(server.url, tmp_path / "input.txt", SHA256)
    assert (tmp_path / "input.txt").read_bytes() == b"good"


@pytest.mark.parametrize("failure", [CUT, (503, {}, b""), (429, {}, b"")], ids=["cut", "unavailable", "too many"])
def test_temporary_failure_is_retried(tmp_path: Path, server: Server, naps: list[float], failure: tuple) -> None:
    """Catches a download that gives up at once, or joins the parts of two tries."""
    server.answers = [failure, failure, whole()]
    corpus.download(server.url, tmp_path / "input.txt", SHA256)
    assert (tmp_path / "input.txt").read_bytes() == BODY
    assert [path.name for path in tmp_path.iterdir()] == ["input.txt"]
    assert server.requests == 3
    assert len(naps) == 2 and 0 < naps[0] < naps[1]


@pytest.mark.parametrize("failure", [CUT, (503, {}, b"")], ids=["cut", "unavailable"])
def test_permanent_failure_ends(tmp_path: Path, server: Server, naps: list[float], failure: tuple) -> None:
    """Catches endless retries, and a partial file under the final name or beside it."""
    server.answers = [failure]
    with pytest.raises(UserError, match=r"cannot download http.*input\.txt") as refusal:
        corpus.download(server.url, tmp_path / "input.txt", SHA256)
    assert str(tmp_path / "input.txt") in str(refusal.value)
    assert list(tmp_path.iterdir()) == []
    assert server.requests == 3 and len(naps) == 2


def test_404_is_not_retried(tmp_path: Path, server: Server, naps: list[float]) -> None:
    """Catches a wrong URL that is requested again and again."""
    server.answers = [(404, {}, b"nothing here")]
    with pytest.raises(UserError, match=r"404"):
        corpus.download(server.url, tmp_path / "input.txt", SHA256)
    assert list(tmp_path.iterdir()) == []
    assert (server.requests, naps) == (1, [])


def test_unreachable_server(tmp_path: Path, naps: list[float]) -> None:
    """Catches a traceback on a machine without a network."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/input.txt"
        with pytest.raises(UserError, match=r"cannot download http"):
            corpus.download(url, tmp_path / "input.txt", SHA256)
    assert list(tmp_path.iterdir()) == []
    assert len(naps) == 2


def test_own_input_txt_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Catches a person's own input.txt that is replaced, or used without a notice."""
    (tmp_path / "input.txt").write_bytes(b"mine\r\n")
    assert corpus.tiny_shakespeare("http://127.0.0.1:9/none", tmp_path / "input.txt") == "mine\n"
    assert "not Tiny Shakespeare" in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"", b"\xef\xbb\xbf"])
def test_empty_input_txt(tmp_path: Path, content: bytes) -> None:
    """Catches an empty file, as after a download that failed, that is blamed on the character table."""
    (tmp_path / "input.txt").write_bytes(content)
    with pytest.raises(UserError, match=r"input\.txt: no text in it; delete it, .* to download it$"):
        corpus.tiny_shakespeare("http://127.0.0.1:9/none", tmp_path / "input.txt")


def test_shakespeare_with_windows_line_ends(tmp_path: Path, capsys: pytest.CaptureFixture, shakespeare: str) -> None:
    """Catches a 66th character, \\r, on a machine whose git or browser changes line ends."""
    (tmp_path / "input.txt").write_bytes(shakespeare.replace("\n", "\r\n").encode())
    assert corpus.tiny_shakespeare("http://127.0.0.1:9/none", tmp_path / "input.txt") == shakespeare
    assert capsys.readouterr().out == ""


# text


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", ""),
        ("é🙂\n".encode(), "é🙂\n"),
        (b"\xef\xbb\xbfbegin", "begin"),
        (b"\x0b\x0c\x1c\xc2\x85\xe2\x80\xa8", "\x0b\x0c\x1c\x85\u2028"),
        (b"one\r\ntwo\rthree\n\r\r\n\n", "one\ntwo\nthree\n\n\n\n"),
        ("\ufeffДж\r\n\U0001f642\r\n".encode("utf-16-le"), "Дж\n\U0001f642\n"),
        ("\ufeff\u0d0a\u0a0d\r\n".encode("utf-16-be"), "\u0d0a\u0a0d\n"),
        ("\ufeffДж\r\n".encode("utf-32-le"), "Дж\n"),
        ("\ufeffДж\r\n".encode("utf-32-be"), "Дж\n"),
    ],
)
def test_reading_text(tmp_path: Path, content: bytes, text: str) -> None:
    """Catches other line ends than nanoGPT reads, or a byte-order mark that becomes a character to learn."""
    (tmp_path / "text.txt").write_bytes(content)
    assert corpus.read_text(tmp_path / "text.txt") == text
    if content.isascii():  # nanoGPT's way
        assert (tmp_path / "text.txt").read_text(encoding="utf-8") == text


@pytest.mark.parametrize("before", [b"", b"abc", "é🙂".encode(), b"\xef\xbb\xbfabc"], ids=["start", "ascii", "wide", "mark"])
def test_text_that_is_not_utf8(tmp_path: Path, before: bytes) -> None:
    """Catches Latin-1 text that is accepted, or whose first bad byte is misplaced."""
    (tmp_path / "latin.txt").write_bytes(before + b"\xe9t\xe9")
    with pytest.raises(UserError, match=rf"latin\.txt: not UTF-8 text \(byte {len(before)}\)"):
        corpus.read_text(tmp_path / "latin.txt")


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le"])
def test_text_without_a_mark(tmp_path: Path, encoding: str) -> None:
    """Catches UTF-16 or UTF-32 without a byte-order mark that is read as UTF-8 full of NULs."""
    (tmp_path / "wide.txt").write_bytes("abc\n".encode(encoding))
    with pytest.raises(UserError, match=r"wide\.txt: not text, or UTF-16 without a byte-order mark \(it has NUL bytes\); conv"):
        corpus.read_text(tmp_path / "wide.txt")


@pytest.mark.parametrize("rest", [b"a", b"a\x00\x00\xd8", b"\x00\x00a\x00"], ids=["odd", "half a pair", "NUL first"])
def test_text_that_is_not_utf16(tmp_path: Path, rest: bytes) -> None:
    """Catches a traceback, or half a text, if a file only begins like UTF-16."""
    (tmp_path / "wide.txt").write_bytes(b"\xff\xfe" + rest)
    with pytest.raises(UserError, match=r"wide\.txt: not UTF-(16|32) text \(byte \d\); convert it"):
        corpus.read_text(tmp_path / "wide.txt")


@pytest.mark.parametrize(
    ("documents", "val_fraction", "train", "val"),
    [
        (["0123456789"], 0.1, ["012345678"], ["9"]),
        (["0123456789"], 0.5, ["01234"], ["56789"]),
        (["012", "345", "6789"], 0.1, ["012", "345", "678"], ["9"]),
        (["012", "345", "6789"], 0.4, ["012", "345"], ["6789"]),
        (["012", "345", "6789"], 0.5, ["012", "34"], ["5", "6789"]),
        (["0123456789"], 0.01, ["012345678"], ["9"]),
    ],
)
def test_last_part_is_for_validation(documents: list[str], val_fraction: float, train: list[str], val: list[str]) -> None:
    """Catches text that is lost, duplicated or in both splits, and documents that are joined."""
    assert corpus.split_documents(documents, val_fraction) == (train, val)


def test_documents_end_with_end_of_text(gpt2_vocabulary: None) -> None:
    """Catches documents that run together, and a single text that gets an end-of-text token."""
    tokens = TiktokenTokenizer("gpt2")
    assert corpus.encode_documents(["Hello", " world"], tokens, separate=True).tolist() == [15496, 50256, 995, 50256]
    assert corpus.encode_documents(["Hello world"], tokens, separate=False).tolist() == [15496, 995]
    assert corpus.encode_documents(["ab", "c"], CharTokenizer.from_text("abc"), separate=True).tolist() == [0, 1, 2]


# token files


@pytest.mark.parametrize(
    ("vocab_size", "dtype"),
    [(1, "uint8"), (256, "uint8"), (257, "uint16"), (50257, "uint16"), (65536, "uint16"), (65537, "uint32")],
)
def test_token_dtype_holds_the_largest_id(vocab_size: int, dtype: str) -> None:
    """Catches a type that is one id too small, or twice as large as needed."""
    assert corpus.token_dtype(vocab_size) == dtype
    assert np.iinfo(dtype).max >= vocab_size - 1


@pytest.mark.parametrize(
    ("vocab_size", "dtype", "smallest"), [(257, "uint8", "uint16"), (65537, "uint16", "uint32"), (100277, "uint8", "uint32")]
)
def test_token_dtype_too_small(vocab_size: int, dtype: corpus.Dtype, smallest: str) -> None:
    """Catches ids that wrap around in the type that was asked for, or an error without the type that works."""
    with pytest.raises(UserError, match=rf"--dtype={dtype} .* {vocab_size:,} tokens; try --dtype={smallest}"):
        corpus.token_dtype(vocab_size, dtype)
    assert corpus.token_dtype(vocab_size, smallest) == corpus.token_dtype(vocab_size) == smallest


@pytest.mark.parametrize(("vocab_size", "width"), [(256, 1), (257, 2), (65536, 2), (65537, 4)])
def test_token_files_are_raw_and_little_endian(tmp_path: Path, vocab_size: int, width: int) -> None:
    """Catches a header, another byte order, or a largest id that wraps around."""
    table = [chr(0x10000 + i) for i in range(vocab_size)]
    ids = [0, vocab_size - 1, 1, vocab_size - 2]
    train, val = "".join(table[i] for i in ids), "".join(table[i] for i in reversed(ids))
    corpus.write_dataset(tmp_path / "new", [train], [val], CharTokenizer(table), "a table")
    assert (tmp_path / "new" / "train.bin").read_bytes() == b"".join(i.to_bytes(width, "little") for i in ids)
    assert (tmp_path / "new" / "val.bin").read_bytes() == b"".join(i.to_bytes(width, "little") for i in reversed(ids))


def test_meta_json_describes_the_files(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Catches a meta.json that does not fit its files, or counts that are not printed."""
    train, val = ["héllo ", "wörld "], ["hé"]
    corpus.write_dataset(tmp_path, train, val, CharTokenizer.from_text("".join(train)), "greetings")
    assert json.loads((tmp_path / "meta.json").read_text(encoding="utf-8")) == {
        "dtype": "uint8",
        "vocab_size": 9,
        "tokenizer": {"kind": "char", "characters": [" ", "d", "h", "l", "o", "r", "w", "é", "ö"]},
        "source": "greetings",
        "sha256": hashlib.sha256("héllo wörld hé".encode()).hexdigest(),
        "tokens": {"train": 12, "val": 2},
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES
    shown = capsys.readouterr().out.splitlines()
    assert "train has 12 tokens" in shown and "val has 2 tokens" in shown


def test_source_with_a_name_that_is_not_utf8(tmp_path: Path) -> None:
    """Catches a traceback for a folder whose name Linux allows and UTF-8 does not."""
    corpus.write_dataset(tmp_path, ["abc"], ["cab"], CharTokenizer(["a", "b", "c"]), "caf\udce9")
    assert json.loads((tmp_path / "meta.json").read_bytes())["source"] == "caf "


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32"])
def test_dtype_that_was_asked_for(tmp_path: Path, dtype: corpus.Dtype) -> None:
    """Catches a type that is ignored, or files that are read in another type than they were written in."""
    table = CharTokenizer(["a", "b", "c"])
    corpus.write_dataset(tmp_path, ["abcabc"], ["cab"], table, "letters", dtype=dtype)
    assert np.fromfile(tmp_path / "train.bin", dtype).tolist() == [0, 1, 2, 0, 1, 2]
    data = Dataset(str(tmp_path))
    assert (data.dtype.name, data.tokens) == (dtype, {"train": 6, "val": 3})
    assert data.windows("val", np.array([0]), 2, 3)[1].tolist() == [[0, 1]]


def test_uint16_folder_by_nanogpts_rules(tmp_path: Path) -> None:
    """Catches a folder in which nanoGPT's scripts, which read uint16 and meta.pkl, find other tokens, text or vocabulary."""
    train, val = "Grüße 🙂\n" * 9, "🙂 üß\n"
    corpus.write_dataset(tmp_path, [train], [val], CharTokenizer.from_text(train), "greetings", dtype="uint16")
    with open(tmp_path / "meta.pkl", "rb") as file:
        meta = pickle.load(file)
    for split, text in (("train", train), ("val", val)):
        ids = np.memmap(tmp_path / f"{split}.bin", dtype=np.uint16, mode="r").tolist()
        assert "".join(meta["itos"][i] for i in ids) == text
        assert [meta["stoi"][character] for character in text] == ids
    assert meta["vocab_size"] == len(meta["itos"]) == len(set(train))
    (tmp_path / "meta.json").unlink()  # the pickle alone says the same here
    data = Dataset(str(tmp_path))
    assert data.tokenizer.to_dict() == CharTokenizer.from_text(train).to_dict()
    assert data.dtype.name == "uint16" and data.tokens == {"train": len(train), "val": len(val)}


def test_smaller_dtype_stops_in_nanogpt(tmp_path: Path) -> None:
    """Catches bytes that nanoGPT, which reads them as uint16, trains on in silence."""
    text = "to be or not to be\n" * 10
    corpus.write_dataset(tmp_path, [text], [text], CharTokenizer.from_text(text), "a line")
    ids = np.memmap(tmp_path / "train.bin", dtype=np.uint16, mode="r")
    assert ids.max() >= pickle.loads((tmp_path / "meta.pkl").read_bytes())["vocab_size"]  # an index error in its embedding


def test_stale_pickle_goes(tmp_path: Path) -> None:
    """Catches the old table beside the tokens of an encoding, which nanoGPT would take."""
    write(tmp_path, OLD)
    assert (tmp_path / "meta.pkl").is_file()
    splits = {"train": np.array([15496, 995]), "val": np.array([995, 15496])}
    corpus.write_tokens(tmp_path, splits, TiktokenTokenizer("gpt2", 50257), "hello", "0")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["meta.json", "train.bin", "val.bin"]


@pytest.mark.parametrize(("train", "val"), [([], ["ab"]), (["ab"], []), (["a"], ["ab"]), (["ab"], ["a"])])
def test_split_without_a_target_is_refused(tmp_path: Path, train: list[str], val: list[str]) -> None:
    """Catches a dataset with nothing to predict that replaces a good one."""
    folder = tmp_path / "dataset"
    with pytest.raises(UserError, match="too short"):
        corpus.write_dataset(folder, train, val, CharTokenizer(["a", "b"]), "nothing")
    assert not folder.exists()


def test_masks_and_extra_keys_are_written(tmp_path: Path) -> None:
    """Catches masks in another width or order than their tokens, and extra keys that are lost."""
    splits = {"train": np.array([2, 1, 0, 1]), "val": np.array([1, 2, 0])}
    masks = {"train": np.array([True, False, False, True]), "val": np.array([0, 1, 1])}
    corpus.write_tokens(tmp_path, splits, CharTokenizer(["a", "b", "c"]), "letters", "12ab", masks, {"chat_format": None})
    assert (tmp_path / "train.bin").read_bytes() == b"\x02\x01\x00\x01"
    assert (tmp_path / "train.mask.bin").read_bytes() == b"\x01\x00\x00\x01"
    assert (tmp_path / "val.mask.bin").read_bytes() == b"\x00\x01\x01"
    meta = json.loads((tmp_path / "meta.json").read_text(encoding="utf-8"))
    assert (meta["sha256"], meta["source"], meta["tokens"]) == ("12ab", "letters", {"train": 4, "val": 3})
    assert "chat_format" in meta
    _, targets = Dataset(str(tmp_path)).windows("train", np.array([0]), 3, 3)
    assert targets.tolist() == [[-1, -1, 1]]


OLD, NEW = ("abcd", "aabbccdd" * 4, "dcba"), ("wxyz", "wxyzwxyz" * 4, "zzxy")


def write(folder: Path, content: tuple[str, str, str]) -> None:
    table, train, val = content
    corpus.write_dataset(folder, [train], [val], CharTokenizer.from_text(table), "letters")


def read(folder: Path) -> tuple[str, str, str] | None:
    """Return a dataset's table and texts, or None if training would refuse it; meta.pkl must hold the same table."""
    try:
        data = Dataset(str(folder))
    except UserError:
        return None
    table = pickle.loads((folder / "meta.pkl").read_bytes())["itos"]
    assert data.tokenizer.characters == list(table.values())
    texts = [data.tokenizer.decode(np.fromfile(folder / f"{split}.bin", data.dtype).tolist()) for split in ("train", "val")]
    return "".join(data.tokenizer.characters), texts[0], texts[1]


class Killed(BaseException):
    pass


def kill_after(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `steps` disk calls pass; every later one raises Killed, as if the process were dead."""
    count = itertools.count()

    def dying(call: Callable) -> Callable:
        def wrapper(*args: object, **kwargs: object) -> object:
            if next(count) >= steps:
                raise Killed
            return call(*args, **kwargs)

        return wrapper

    for owner, name in ((os, "fsync"), (os, "replace"), (Path, "unlink"), (Path, "mkdir")):
        monkeypatch.setattr(owner, name, dying(getattr(owner, name)))


def test_second_prepare_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches two prepare.py's in one folder that remove each other's files: one says success, and no dataset is left."""
    write(tmp_path, OLD)
    replace, refused = corpus._replace_files, []

    def write_twice(*arguments: object) -> None:
        with pytest.raises(UserError, match=r"another prepare.py is writing to .*; wait for it, or stop it first"):
            write(tmp_path, OLD)
        with pytest.raises(UserError, match=r"another prepare.py"):
            corpus.download("http://localhost:1/input.txt", tmp_path / "input.txt", "0")
        refused.append(1)
        replace(*arguments)

    monkeypatch.setattr(corpus, "_replace_files", write_twice)
    write(tmp_path, NEW)
    assert refused and read(tmp_path) == NEW


@pytest.mark.parametrize("before", [OLD, None], ids=["replacing", "first"])
def test_kill_at_any_moment_leaves_no_mixture(tmp_path: Path, before: tuple | None) -> None:
    """Catches new tokens with an old meta.json or old masks, which training would accept."""
    outcomes = []
    for steps in itertools.count():
        folder = tmp_path / str(steps)
        if before is not None:
            write(folder, before)
            for split, text in (("train", before[1]), ("val", before[2])):
                (folder / f"{split}.mask.bin").write_bytes(bytes(len(text)))
        with pytest.MonkeyPatch.context() as patch:
            kill_after(steps, patch)
            try:
                write(folder, NEW)
                finished = True
            except Killed:
                finished = False
        found = read(folder)
        outcomes.append(found)
        masks = list(folder.glob("*.mask.bin"))
        assert found in (before, NEW, None)
        assert found is None or len(masks) == (2 if found == OLD else 0)
        write(folder, NEW)
        assert read(folder) == NEW
        assert sorted(path.name for path in folder.iterdir()) == FILES
        if finished:
            break
    assert outcomes[0] == before and outcomes[-1] == NEW
    assert len(outcomes) > 7


def test_kill_at_any_moment_keeps_tokens_and_masks_together(tmp_path: Path) -> None:
    """Catches conversations without their masks, of which training would learn the user's words."""
    splits = {"train": np.array([0, 1, 2, 3] * 9), "val": np.array([3, 2, 1] * 3)}
    masks = {split: ids % 2 for split, ids in splits.items()}
    for steps in itertools.count():
        folder = tmp_path / str(steps)
        write(folder, OLD)
        with pytest.MonkeyPatch.context() as patch:
            kill_after(steps, patch)
            try:
                corpus.write_tokens(folder, splits, CharTokenizer(list("wxyz")), "masked", "0", masks)
                finished = True
            except Killed:
                finished = False
        found = read(folder)
        assert found in (OLD, ("wxyz", "wxyz" * 9, "zyx" * 3), None)
        if found is not None:
            flags = {path.name: path.read_bytes() for path in folder.glob("*.mask.bin")}
            whole = {f"{split}.mask.bin": bytes(mask.tolist()) for split, mask in masks.items()}
            assert flags == ({} if found == OLD else whole)
        if finished:
            break
    assert found not in (OLD, None) and steps > 7


def test_full_disk_keeps_the_old_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a full disk that destroys the old dataset, or leaves partial files."""
    write(tmp_path, OLD)

    def full(descriptor: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError):
        write(tmp_path, NEW)
    assert read(tmp_path) == OLD
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES
