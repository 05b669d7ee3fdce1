"""Document sources: each file format, read from any position, and damaged files."""

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from nanogpt import documents
from nanogpt.errors import UserError

TEXTS = ["one", "", "zwei\n🙂\n", "three <|endoftext|>", "\u2028 four\t", "fünf" * 50, "six\x00", " "]
MISSING = "00000000000000000000000000000000000000aa"


def jsonl(texts: list[str], **others: object) -> bytes:
    return "".join(json.dumps({"text": text, **others}, ensure_ascii=False) + "\n" for text in texts).encode()


def parquet(path: Path, columns: dict[str, list], rows: int = 1 << 20) -> Path:
    """Write a Parquet file with `rows` rows per row group."""
    arrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(arrow.table(columns), path, row_group_size=rows)
    return path


def texts_of(source: documents.Source, position: documents.Position = documents.BEGINNING) -> list[str]:
    return [text for _, _, text in documents.read(source, position)]


def kinds(folder: Path, kind: str) -> str:
    """Write TEXTS as files of one kind, and return the path for --input."""
    folder.mkdir(exist_ok=True)
    if kind == "jsonl":
        (folder / "a.jsonl").write_bytes(jsonl(TEXTS, text2="no", id=3))
    elif kind == "odd jsonl":  # a byte-order mark, empty lines, CRLF, no line end at the end
        lines = jsonl(TEXTS).split(b"\n")
        (folder / "a.JSONL").write_bytes(b"\xef\xbb\xbf" + b"\r\n\n  \n".join(lines[:-1]))
    elif kind == "gzip":
        (folder / "a.jsonl.gz").write_bytes(gzip.compress(jsonl(TEXTS)))
    elif kind == "parquet":
        parquet(folder / "a.parquet", {"id": list(range(8)), "text": TEXTS}, rows=3)
    elif kind == "text":
        for index, text in enumerate(TEXTS):
            (folder / f"{index}.txt").write_bytes(text.encode())
        return str(folder)
    else:
        (folder / "b").mkdir()
        (folder / "a.jsonl").write_bytes(jsonl(TEXTS[:2]))
        (folder / "a1.jsonl").write_bytes(b"\n")
        parquet(folder / "b" / "0.parquet", {"text": TEXTS[2:4]})
        (folder / "b" / "1.txt").write_bytes(TEXTS[4].encode())
        (folder / "b" / "2.jsonl.gz").write_bytes(gzip.compress(jsonl(TEXTS[5:7])))
        (folder / "c.jsonl").write_bytes(jsonl(TEXTS[7:]))
        (folder / ".hidden.jsonl").write_bytes(b"no")
        (folder / "b" / ".cache").mkdir()
        (folder / "b" / ".cache" / "x.txt").write_bytes(b"no")
        (folder / "README.md").write_bytes(b"no")
        return str(folder)
    return str(next(folder.iterdir()))


@pytest.mark.parametrize("kind", ["jsonl", "odd jsonl", "gzip", "parquet", "text", "mixed"])
def test_reading_resumes_at_every_position(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a document that is lost, repeated or changed, from the start or after resuming."""
    monkeypatch.setattr(documents, "PARQUET_BATCH_ROWS", 2)
    source = documents.local(kinds(tmp_path / "in", kind))
    texts = [text for text in TEXTS if text and "\0" not in text] if kind == "text" else TEXTS  # others are no text files
    found = list(documents.read(source, documents.BEGINNING))
    assert [text for _, _, text in found] == texts
    done = [read for _, read, _ in found]
    assert done == sorted(done) and 0 <= done[0] and done[-1] <= sum(source.sizes)
    assert kind in ("gzip", "odd jsonl", "mixed") or done[-1] == sum(source.sizes)
    for count, (position, _, _) in enumerate(found, start=1):
        assert texts_of(source, json.loads(json.dumps(position))) == texts[count:]


def put(path: Path, content: str = "x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")
    return path


def test_files_of_a_folder(tmp_path: Path) -> None:
    """Catches another order than the documents of existing datasets have, or a hidden file that becomes text."""
    names = ["a/b.txt", "a/b/c.txt", "a-b.txt", "a.txt", "B.TXT", "b.md", "a/.x.txt", ".git/x.txt", "é.txt", "z/y/x/w.txt"]
    for name in names:
        put(tmp_path / name)
    visible = [tmp_path / name for name in names if "." not in (name[0], name[2])]
    assert documents.find_files(tmp_path) == (sorted(visible), {})
    assert documents.find_files(tmp_path / "b.md") == ([tmp_path / "b.md"], {})
    source = documents.local(str(tmp_path))
    assert source.files == [str(path) for path in sorted(visible) if path.name != "b.md"]
    assert source.left_out == {"b.md": "does not end with .parquet, .jsonl, .jsonl.gz, .txt"}


def test_links_in_a_folder(tmp_path: Path) -> None:
    """Catches a linked folder that is dropped or read twice, a changed order, and an endless loop."""
    top = tmp_path / "top"
    for path in (
        top / "z" / "1.txt",
        top / "z" / "deep" / "2.txt",
        tmp_path / "out" / "3.txt",
        tmp_path / "out" / "in" / "4.txt",
    ):
        put(path)
    links = {
        "a": "z",
        "b": "../out/in",
        "c": "../out",
        "f.txt": "z/1.txt",
        "gone": "nowhere",
        "self": "self",
        "z/deep/here": ".",
        "z/deep/up": "../..",
        "z/over": "../..",
    }
    for name, target in links.items():
        (top / name).symlink_to(target)
    found, left_out = documents.find_files(top)
    assert [str(path.relative_to(top)) for path in found] == ["b/4.txt", "c/3.txt", "f.txt", "z/1.txt", "z/deep/2.txt"]
    above = "a link to a folder that it is in"
    assert left_out == {
        "a": "the same folder as z",
        "c/in": "the same folder as b",
        "gone": "a broken link",
        "self": "a broken link",
        "z/deep/here": above,
        "z/deep/up": above,
        "z/over": above,
    }
    (tmp_path / "link").symlink_to("top")
    assert [path.name for path in documents.find_files(tmp_path / "link")[0]] == [path.name for path in found]
    assert documents.local(str(top)).left_out == left_out


def test_unreadable_files_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a folder without permission, or a pipe, that ends the command, blocks it, or is passed over in silence."""
    for name in ("a.txt", "shut/b.txt", "bare.txt"):
        put(tmp_path / name)
    os.mkfifo(tmp_path / "pipe.txt")
    whole = {"iterdir": Path.iterdir, "stat": Path.stat}

    def refusing(call: str, name: str) -> Callable:
        def refuse(path: Path, **keywords: object) -> object:
            if path.name == name:
                raise PermissionError(13, "Permission denied", str(path))
            return whole[call](path, **keywords)

        return refuse

    monkeypatch.setattr(Path, "iterdir", refusing("iterdir", "shut"))  # a test may run as root, whom no mode stops
    monkeypatch.setattr(Path, "stat", refusing("stat", "bare.txt"))
    found, left_out = documents.find_files(tmp_path)
    assert [path.name for path in found] == ["a.txt"]
    denied = "cannot be read (Permission denied)"
    assert left_out == {"shut": denied, "bare.txt": denied, "pipe.txt": "not a regular file"}


def test_report_is_short(capsys: pytest.CaptureFixture) -> None:
    """Catches a table that fills the terminal, is out of order, or moves its cursor."""
    documents.report({})
    assert capsys.readouterr().out == ""
    documents.report({f"{i:04}\x1b[2J": "a broken link" for i in range(1234)[::-1]})
    first, *rows, last = capsys.readouterr().out.splitlines()
    assert (first, last) == ("left out: 1,234", "  ... and 1,214 more")
    assert rows == [f"  {i:04} [2J  a broken link" for i in range(20)]


def test_text_in_an_unknown_encoding_is_left_out(tmp_path: Path) -> None:
    """Catches one file of thousands that ends the run, or that leaves the table of what was not read."""
    (tmp_path / "in").mkdir()
    for name, content in (("a.txt", b"one"), ("in/b.TXT", b"caf\xe9"), ("c.txt", b"two")):
        (tmp_path / name).write_bytes(content)
    source = documents.local(str(tmp_path))
    assert texts_of(source) == ["one", "two"]
    assert source.left_out == {os.path.join("in", "b.TXT"): "not UTF-8 text (byte 3); convert it to UTF-8 first"}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"1\0\n\0", "not text, or UTF-16 without a byte-order mark (it has NUL bytes); convert it to UTF-8 first"),
        (b"", "no text in it"),
        (b"\xef\xbb\xbf", "no text in it"),
    ],
    ids=["wide", "empty", "mark"],
)
def test_file_without_text_is_left_out(content: bytes, reason: str, tmp_path: Path) -> None:
    """Catches a document of NULs, or one that is only an end-of-text token; resuming leaves out the same files."""
    for name, text in (("a.txt", b"one"), ("b.txt", content), ("c.txt", b"two"), ("d.txt", content)):
        (tmp_path / name).write_bytes(text)
    source = documents.local(str(tmp_path))
    found = list(documents.read(source, documents.BEGINNING))
    assert [text for _, _, text in found] == ["one", "two"]
    assert source.left_out == {"b.txt": reason, "d.txt": reason}
    assert [texts_of(source, position) for position, _, _ in found] == [["two"], []]
    with pytest.raises(UserError, match=f"d.txt: {reason[:12]}"):
        texts_of(documents.local(str(tmp_path / "d.txt")))


def test_lone_surrogate_is_read(tmp_path: Path) -> None:
    """Catches a lone surrogate, possible in JSON but not in UTF-8, that ends a long run."""
    (tmp_path / "a.jsonl").write_text(r'{"text": "a\ud800b"}', encoding="utf-8")
    assert texts_of(documents.local(str(tmp_path))) == ["a\ud800b"]


def test_identity_follows_the_files(tmp_path: Path) -> None:
    """Catches a changed, new or missing file that keeps the identity; another path to it must keep it."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl(TEXTS))
    before = documents.local(str(path)).identity
    assert documents.local(str(tmp_path / ".." / tmp_path.name)).identity == before
    (tmp_path / "b.txt").write_text("more", encoding="utf-8")
    assert documents.local(str(tmp_path)).identity != before
    path.write_bytes(jsonl(TEXTS[::-1]))
    assert documents.local(str(path)).identity != before


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.jsonl", jsonl(["a", "b"]) + b"{\n", ["a.jsonl, line 3: not JSON"]),
        ("a.jsonl", jsonl(["a", "b"])[:-4], ["a.jsonl, line 2: not JSON"]),
        ("a.jsonl", jsonl(["a"]) + b'\n\n{"text": "caf\xe9"}\n', ["a.jsonl, line 4: not UTF-8"]),
        ("a.jsonl", jsonl(["a"]) + b'{"txt": "b"}\n', ["a.jsonl, line 2", '"text"']),
        ("a.jsonl", jsonl(["a"]) + b'{"text": null}\n', ["a.jsonl, line 2", '"text"']),
        ("a.jsonl", b'["text"]', ["a.jsonl, line 1", '"text"']),
        ("a.jsonl", b"[" * 100_000, ["a.jsonl, line 1: not JSON"]),
        ("a.jsonl", b'{"text": ' + b"9" * 5000 + b"}", ["a.jsonl, line 1"]),
        ("a.jsonl.gz", gzip.compress(jsonl(["a" * 50] * 50), mtime=0)[:-20], ["a.jsonl.gz: cannot be read"]),
        ("a.jsonl.gz", jsonl(["a"]), ["a.jsonl.gz: cannot be read"]),
        ("a.txt", b"caf\xe9", ["a.txt", "not UTF-8", "byte 3"]),
        ("a.parquet", b"PAR1 is not enough", ["a.parquet"]),
        ("a.csv", b"text\na\n", ["--input=", ".parquet, .jsonl, .jsonl.gz, .txt"]),
    ],
)
def test_damaged_files_are_named(name: str, content: bytes, told: list[str], tmp_path: Path) -> None:
    """Catches a traceback, an error without the file or line, or a damaged document that is skipped."""
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as refusal:
        texts_of(documents.local(str(tmp_path / name)))
    assert [part for part in told if part not in str(refusal.value)] == []


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        ({"content": ["a"], "id": [1]}, "a.parquet: no column 'text', only content, id;"),
        ({"text": ["a", "b", None, "d"]}, "a.parquet, row 3: column 'text' must be a string, got None"),
        ({"text": [1, 2]}, "a.parquet, row 1: column 'text' must be a string, got 1"),
    ],
)
def test_parquet_without_texts(columns: dict[str, list], told: str, tmp_path: Path) -> None:
    """Catches a traceback for a wrong column, or a missing text that becomes "None"."""
    parquet(tmp_path / "a.parquet", columns)
    with pytest.raises(UserError, match=told):
        texts_of(documents.local(str(tmp_path)))


def test_parquet_damaged_in_the_middle(tmp_path: Path) -> None:
    """Catches a traceback for damaged pages in a file whose footer is intact."""
    path = parquet(tmp_path / "a.parquet", {"text": [f"text {i}" * 9 for i in range(1000)]}, rows=100)
    content = bytearray(path.read_bytes())
    content[len(content) // 3 : len(content) // 2] = bytes(len(content) // 2 - len(content) // 3)
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"a\.parquet: cannot be read"):
        texts_of(documents.local(str(path)))


@pytest.mark.parametrize("input", ["nowhere", "bare", "bare/none.txt"])
def test_input_without_documents(input: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a path without documents that makes an empty dataset or a traceback."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bare" / "folder.jsonl").mkdir(parents=True)
    with pytest.raises(UserError, match=f"--input={input}: no "):
        documents.local(input)


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an ImportError in place of what to install."""
    (tmp_path / "a.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match="pip install pyarrow"):
        texts_of(documents.local(str(tmp_path)))


# the Hub


def test_hub_layout(tmp_path: Path) -> None:
    """Catches documents in another order than the datasets library's, or of another subset."""
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    whole = datasets.Dataset.from_dict({"id": list(range(50)), "text": [f"text {i}" for i in range(50)]})
    for part in range(3):
        shard = whole.shard(3, part, contiguous=True)
        path = tmp_path / "sample" / "10BT" / f"00{part}_00000.parquet"
        parquet(path, {"id": shard["id"][:], "text": shard["text"][:]}, rows=7)
    parquet(tmp_path / "sample" / "100BT" / "000_00000.parquet", {"id": [1], "text": ["of another subset"]})
    subsets = [f"- config_name: sample-{n}BT\n  data_files:\n  - split: train\n    path: sample/{n}BT/*\n" for n in (10, 100)]
    (tmp_path / "README.md").write_text("---\nconfigs:\n" + "".join(subsets) + "---\n", encoding="utf-8")
    source = documents.hub(str(tmp_path), "sample-10BT", "main")
    assert texts_of(source) == whole["text"][:]
    assert source.sizes == [path.stat().st_size for path in sorted(tmp_path.glob("sample/10BT/*"))]
    assert documents.hub(str(tmp_path), "sample-100BT", "main").identity != source.identity


def test_remote_files(tmp_path: Path) -> None:
    """Catches remote files that cannot be opened, or resumed where they stopped."""
    fsspec = pytest.importorskip("fsspec", reason="datasets is not installed")
    path = parquet(tmp_path / "a.parquet", {"text": TEXTS}, rows=3)
    with fsspec.open("memory://folder/a.parquet", "wb") as file:
        file.write(path.read_bytes())
    source = documents.Source("remote", ["memory://folder/a.parquet", "memory://folder/gone.parquet"], [9, 9], "")
    with pytest.raises(UserError, match=r"gone\.parquet: cannot be read .*run the same command again to continue"):
        texts_of(source)
    source = documents.Source("remote", source.files[:1], [9], "")
    found = list(documents.read(source, documents.BEGINNING))
    assert [text for _, _, text in found] == TEXTS
    for count, (position, _, _) in enumerate(found, start=1):
        assert texts_of(source, position) == TEXTS[count:]


def test_unreachable_hub() -> None:
    """Catches a traceback, or an error without a remedy, on a machine without a network."""
    pytest.importorskip("datasets", reason="datasets is not installed")
    with pytest.raises(UserError, match=r"cannot get nobody/nothing .*try again, or use local files: --input="):
        documents.hub("nobody/nothing", "plain_text", MISSING)


def test_hub_without_the_datasets_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an ImportError in place of what to install."""
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"nobody/nothing .*pip install datasets; or use local files: --input="):
        documents.hub("nobody/nothing", "plain_text", MISSING)


def test_optional_libraries_are_imported_lazily() -> None:
    """Catches an optional library that everybody would have to install."""
    code = "import sys, nanogpt.large_corpus; print({'datasets', 'pyarrow', 'fsspec', 'torch', 'tiktoken'} & set(sys.modules))"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", cwd=Path(__file__).parents[1])
    assert process.stdout == "set()\n", process.stderr
