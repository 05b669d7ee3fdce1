"""Text to token ids and back, and the descriptions of tokenizers that lie in files which anybody may have written."""

import hashlib
import json
import os
import pickle
import random
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanogpt import tokenizer
from nanogpt.errors import UserError
from nanogpt.tokenizer import CharTokenizer, StreamDecoder, TiktokenTokenizer

MULTI_BYTE = "naïve café — 日本語 한국어 👩‍👩‍👧‍👦 🙂🙃 ﷽ \U0010ffff\x00 e\u0301\r\n\tend"
CL100K_URL = "https://openaipublic.blob.core.windows.net/encodings/cl100k_base.tiktoken"

quick = settings(max_examples=50, deadline=None, database=None)
any_text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=200)


@pytest.fixture(params=["gpt2", "cl100k_base"])
def encoding_name(request: pytest.FixtureRequest, gpt2_vocabulary: None) -> str:
    """The name of each encoding whose vocabulary is at hand."""
    cached = Path(os.environ["TIKTOKEN_CACHE_DIR"]) / hashlib.sha1(CL100K_URL.encode()).hexdigest()
    if request.param == "cl100k_base" and not cached.is_file():
        pytest.skip("NANOGPT_TEST_DATA has no vocabulary of cl100k_base")
    return request.param


class Bytes:
    """The smallest vocabulary that can cut a character in two: id i is the byte i."""

    def token_bytes(self, token: int) -> bytes:
        return bytes([token])


# characters


def test_shakespeare_ids(shakespeare: str) -> None:
    """A table in another order than nanoGPT's, with which no checkpoint can be shared, is caught."""
    tokens = CharTokenizer.from_text(shakespeare)
    assert tokens.vocab_size == tokens.model_vocab_size == 65
    assert "".join(tokens.characters) == "\n !$&',-.3:;?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
    assert tokens.encode("Bee3") == [14, 43, 43, 9]
    assert tokens.decode([14, 43, 43, 9]) == "Bee3"
    with pytest.raises(UserError, match=r"'7' .*line 1, column 4 "):
        tokens.encode("Bee7")


@pytest.mark.parametrize(
    ("text", "named", "line", "column"),
    [
        ("dabc", "'d' (U+0064)", 1, 1),
        ("abd\nd", "'d' (U+0064)", 1, 3),
        ("ab\nc\nabX", "'X' (U+0058)", 3, 3),
        ("ab\n\U0001f642", "'🙂' (U+1F642)", 2, 1),
        ("a\x00", r"'\x00' (U+0000)", 1, 2),
    ],
)
def test_unknown_character_is_named_where_it_stands(text: str, named: str, line: int, column: int) -> None:
    """An unknown character that is dropped, takes another's id, or is told at the wrong place, is caught."""
    with pytest.raises(UserError) as refusal:
        CharTokenizer.from_text("abc\n").encode(text)
    assert f"{named} at line {line}, column {column} " in str(refusal.value)


def test_char_ids_are_places_in_the_sorted_table() -> None:
    """Ids that are cut to 16 bits, or counted in UTF-16 units or bytes, are caught."""
    tokens = CharTokenizer.from_text(MULTI_BYTE)
    table = sorted(set(MULTI_BYTE))
    expected = [table.index(character) for character in MULTI_BYTE]
    assert tokens.encode(MULTI_BYTE) == expected
    assert tokens.encode_array(MULTI_BYTE).tolist() == expected
    assert tokens.decode(expected) == MULTI_BYTE
    assert tokens.encode("") == [] and tokens.decode([]) == ""


@quick
@given(any_text)
def test_char_round_trip(text: str) -> None:
    """A character of any script that does not come back as it went in is caught."""
    tokens = CharTokenizer.from_text(text)
    copy = tokenizer.from_dict(json.loads(json.dumps(tokens.to_dict())))
    assert copy.decode(tokens.encode(text)) == text
    assert copy.characters == tokens.characters


def test_char_decodes_ids_that_it_lacks() -> None:
    """An id beyond the table that ends the program, or that wraps around to another character, is caught."""
    assert CharTokenizer.from_text("ab").decode([0, 2, 1, -1]) == "a\ufffdb\ufffd"


# byte-pair encodings


def test_tiktoken_agrees_with_tiktoken(encoding_name: str) -> None:
    """Ids other than the library's own are caught."""
    import tiktoken

    reference, tokens = tiktoken.get_encoding(encoding_name), TiktokenTokenizer(encoding_name)
    for text in ("Hello world", MULTI_BYTE, " leading", "1234567", "\n\n\n", ""):
        expected = reference.encode(text)
        assert tokens.encode(text) == tokens.encode_array(text).tolist() == expected
        assert tokens.decode(expected) == text
    assert tokens.vocab_size == reference.n_vocab
    assert tokens.end_of_text == reference.eot_token


def test_gpt2_numbers(gpt2_vocabulary: None) -> None:
    """A vocabulary that is not GPT-2's, or an embedding table not padded to 64 rows, is caught."""
    tokens = TiktokenTokenizer("gpt2")
    assert tokens.encode("Hello world") == [15496, 995]
    assert (tokens.vocab_size, tokens.model_vocab_size, tokens.end_of_text) == (50257, 50304, 50256)
    assert tokens.encode_array("Hello").dtype == np.int32


@pytest.mark.parametrize(("vocab_size", "rows"), [(1, 64), (64, 64), (65, 128), (50257, 50304), (100277, 100288)])
def test_model_vocabulary_is_padded_to_64(vocab_size: int, rows: int) -> None:
    """Rounding down, or adding 64 where nothing is missing, is caught."""
    assert TiktokenTokenizer("gpt2", vocab_size).model_vocab_size == rows


def test_end_of_text_is_special_in_prompts_alone(gpt2_vocabulary: None) -> None:
    """A corpus whose text can end documents, or a prompt that cannot, is caught."""
    tokens = TiktokenTokenizer("gpt2")
    text = "a<|endoftext|>b"
    assert tokens.encode(text) == [64, 50256, 65]
    corpus = tokens.encode_array(text).tolist()
    assert 50256 not in corpus and tokens.decode(corpus) == tokens.decode([64, 50256, 65]) == text


def test_special_tokens_of_an_encoding_with_several(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt or a corpus that ends the program because it speaks of a special token is caught."""
    import tiktoken

    single_bytes = tiktoken.Encoding(
        "cl100k_base",
        pat_str=r"[\s\S]",
        mergeable_ranks={bytes([byte]): byte for byte in range(256)},
        special_tokens={"<|endoftext|>": 256, "<|fim_prefix|>": 257},
    )
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: single_bytes)
    tokens = TiktokenTokenizer("cl100k_base")
    prompt = tokens.encode("<|fim_prefix|><|endoftext|>é")
    assert prompt == [*b"<|fim_prefix|>", 256, *"é".encode()]
    assert tokens.encode_array("<|fim_prefix|><|endoftext|>").tolist() == [*b"<|fim_prefix|><|endoftext|>"]
    assert tokens.decode(prompt) == "<|fim_prefix|><|endoftext|>é"
    assert (tokens.vocab_size, tokens.model_vocab_size, tokens.end_of_text) == (258, 320, 256)


def test_tiktoken_decodes_ids_that_it_lacks(gpt2_vocabulary: None) -> None:
    """An id of the padded vocabulary that ends the program is caught."""
    assert TiktokenTokenizer("gpt2").decode([64, 50257, 50303, -1, 2**40, 65]) == "a\ufffd\ufffd\ufffd\ufffdb"


def test_unknown_encoding_is_refused() -> None:
    """An encoding's misspelt name that ends in a traceback is caught."""
    with pytest.raises(UserError, match=r"'gpt-two'.*gpt2"):
        TiktokenTokenizer("gpt-two")


@pytest.mark.parametrize("failure", [ConnectionError("no route"), ValueError("hash mismatch")])
def test_vocabulary_that_cannot_be_loaded(failure: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without a network that shows a traceback, or no way out, is caught."""
    import tiktoken

    def unreachable(name: str) -> None:
        raise failure

    monkeypatch.setattr(tiktoken, "get_encoding", unreachable)
    with pytest.raises(UserError, match=r"'gpt2' cannot be loaded.*TIKTOKEN_CACHE_DIR"):
        TiktokenTokenizer("gpt2")
    assert TiktokenTokenizer("gpt2", 50257).model_vocab_size == 50304


# streams


def test_stream_never_shows_half_a_character(encoding_name: str) -> None:
    """A chat that prints replacement characters in the middle of an emoji is caught."""
    tokens = TiktokenTokenizer(encoding_name)
    text = "日本語 👩‍👩‍👧‍👦🙂 naïve"
    stream = StreamDecoder(tokens)
    pieces = [stream.feed(token) for token in tokens.encode(text)]
    assert "" in pieces
    assert "\ufffd" not in "".join(pieces)
    assert "".join(pieces) == text and stream.finish() == ""


@quick
@given(any_text)
def test_stream_is_as_far_as_the_bytes_allow(text: str) -> None:
    """A character that is held back although it is whole, or shown before it is, is caught."""
    stream, shown = StreamDecoder(Bytes()), ""
    for character in text:
        *first, last = character.encode()
        assert [stream.feed(byte) for byte in first] == [""] * len(first)
        shown += stream.feed(last)
        assert shown.endswith(character)
    assert shown + stream.finish() == text


@quick
@given(st.binary(max_size=60))
def test_stream_of_any_bytes_ends_as_decoding_at_once(data: bytes) -> None:
    """Bytes that are no UTF-8, as a young model samples them, lost or shown otherwise than by decode, are caught."""
    stream = StreamDecoder(Bytes())
    shown = "".join(stream.feed(byte) for byte in data)
    assert shown + stream.finish() == data.decode("utf-8", errors="replace")


def test_stream_of_random_tokens_ends_as_decode(gpt2_vocabulary: None) -> None:
    """A stream that differs from decode on what an untrained model samples is caught."""
    tokens, stream = TiktokenTokenizer("gpt2"), StreamDecoder(TiktokenTokenizer("gpt2"))
    ids = random.Random(0).choices(range(50304), k=2000)
    assert "".join(map(stream.feed, ids)) + stream.finish() == tokens.decode(ids)


def test_stream_of_characters() -> None:
    """Character models that the decoder for bytes garbles are caught."""
    tokens = CharTokenizer.from_text(MULTI_BYTE)
    stream = StreamDecoder(tokens)
    assert [stream.feed(token) for token in tokens.encode(MULTI_BYTE)] == list(MULTI_BYTE)
    assert stream.finish() == ""


@quick
@given(st.text("abc\u00e9", max_size=40), st.lists(st.text("abc\u00e9", min_size=1, max_size=4), min_size=1, max_size=3))
def test_stream_ends_before_the_first_stop_string(text: str, stop: list[str]) -> None:
    """Text from behind a stop string, a part of one that is shown or lost, another than the first, are caught."""
    stream, shown = StreamDecoder(Bytes(), stop), ""
    for byte in text.encode():
        shown += stream.feed(byte)
        assert not any(end in shown for end in stop)
    shown += stream.finish()
    assert stream.stopped == any(end in text for end in stop)
    if stream.stopped:  # the one that is complete first
        text = next(text[:n] for n in range(len(text) + 1) if any(end in text[:n] for end in stop))
        text = text[: min(text.find(end) for end in stop if end in text)]
    assert shown == text


def test_stream_shows_what_cannot_be_part_of_a_stop_string() -> None:
    """Text that is held back longer than it could belong to a stop string, as by one that is never found, is caught."""
    stream = StreamDecoder(Bytes(), ["\n\nEnd", "stop"])
    assert [stream.feed(byte) for byte in b"a\nb st\n\nEn"] == ["a", "", "\nb", " ", "", "", "st", "", "", ""]
    assert stream.feed(ord("x")) == "\n\nEnx"
    assert [stream.feed(byte) for byte in b"stop!"] == [""] * 5 and stream.stopped and stream.finish() == ""


# descriptions


def test_tiktoken_description_round_trip() -> None:
    """A description that needs the vocabulary, and so a network, to be read is caught."""
    copy = tokenizer.from_dict(json.loads(json.dumps(TiktokenTokenizer("gpt2", 50257).to_dict())))
    assert isinstance(copy, TiktokenTokenizer)
    assert (copy.name, copy.vocab_size) == ("gpt2", 50257)


@pytest.mark.parametrize(
    "description",
    [
        None,
        [],
        {},
        "char",
        {"kind": "char"},
        {"kind": "char", "characters": []},
        {"kind": "char", "characters": "abc"},
        {"kind": "char", "characters": ["a", "bc"]},
        {"kind": "char", "characters": ["a", ""]},
        {"kind": "char", "characters": ["a", 1]},
        {"kind": "char", "characters": ["a", ["b"]]},
        {"kind": "char", "characters": ["a", "b", "a"]},
        {"kind": "word", "characters": ["a"]},
        {"kind": "tiktoken", "name": "gpt2"},
        {"kind": "tiktoken", "name": 2, "vocab_size": 50257},
        {"kind": "tiktoken", "name": "gpt2", "vocab_size": "50257"},
        {"kind": "tiktoken", "name": "gpt2", "vocab_size": 0},
        {"kind": "tiktoken", "name": "gpt2", "vocab_size": -5},
        {"kind": "tiktoken", "name": "gpt2", "vocab_size": 10**9},
    ],
)
def test_malformed_description_is_refused(description: Any) -> None:
    """A damaged description that yields a tokenizer, or a traceback, is caught."""
    with pytest.raises(UserError):
        tokenizer.from_dict(description)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"{}",
        b"\xff\xfe",
        b'{"tokenizer": null}',
        b'{"tokenizer": {"kind": "char", "characters": ["ab"]}}',
        pytest.param(b"[" * 100_000, id="deep"),
    ],
)
def test_damaged_meta_json_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    """A damaged meta.json that is passed over, or told without its name, is caught."""
    (tmp_path / "meta.json").write_bytes(content)
    with pytest.raises(UserError, match=r"meta\.json"):
        tokenizer.from_folder(tmp_path)


def test_meta_json_comes_before_meta_pkl(tmp_path: Path) -> None:
    """A stale pickle that overrules the description beside it is caught."""
    description = {"tokenizer": {"kind": "char", "characters": ["x", "y"]}}
    (tmp_path / "meta.json").write_text(json.dumps(description), encoding="utf-8")
    (tmp_path / "meta.pkl").write_bytes(b"no pickle")
    assert tokenizer.from_folder(tmp_path).characters == ["x", "y"]


def nanogpt_meta(characters: str) -> dict[str, Any]:
    return {
        "vocab_size": len(characters),
        "itos": dict(enumerate(characters)),
        "stoi": {character: index for index, character in enumerate(characters)},
    }


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_nanogpt_pickle_is_read(tmp_path: Path, protocol: int) -> None:
    """A folder that nanoGPT prepared and whose tokenizer is lost is caught."""
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(nanogpt_meta("\n é🙂"), protocol))
    tokens = tokenizer.from_folder(tmp_path)
    assert isinstance(tokens, CharTokenizer)
    assert tokens.encode("🙂é \n") == [3, 2, 1, 0]


def test_folder_without_description_is_gpt2(tmp_path: Path) -> None:
    """nanoGPT's datasets of GPT-2 tokens, which hold no description, taken for damaged are caught."""
    tokens = tokenizer.from_folder(tmp_path)
    assert isinstance(tokens, TiktokenTokenizer)
    assert (tokens.name, tokens.vocab_size) == ("gpt2", 50257)


class RunsCommand:
    def __reduce__(self) -> tuple:
        return os.system, ("echo > ran.txt",)


class Evaluates:
    def __reduce__(self) -> tuple:
        return eval, ("open('ran.txt', 'w').close()",)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("trap", [RunsCommand, Evaluates])
def test_hostile_pickle_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trap: type, protocol: int) -> None:
    """A downloaded meta.pkl that runs its author's commands is caught."""
    monkeypatch.chdir(tmp_path)
    hostile = pickle.dumps(nanogpt_meta("ab") | {"more": trap()}, protocol)
    (tmp_path / "meta.pkl").write_bytes(hostile)
    with pytest.raises(UserError, match=r"meta\.pkl.*could run code"):
        tokenizer.from_folder(tmp_path)
    assert not (tmp_path / "ran.txt").exists()
    pickle.loads(hostile)
    assert (tmp_path / "ran.txt").exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no pickle at all",
        pickle.dumps(nanogpt_meta("abc"))[:-9],
        pickle.dumps({"vocab_size": 3}),
        pickle.dumps(["a", "b"]),
        pickle.dumps({"itos": {0: "a", 2: "b"}}),
        pickle.dumps({"itos": {0: "a", 1: "a"}}),
        pickle.dumps({"itos": {0: "a", 1: "bc"}}),
        pickle.dumps({"itos": {0: "a", 1: None}}),
        pickle.dumps({"itos": {}}),
        pickle.dumps({"itos": 3}),
        b"\x80\x05\x8e" + struct.pack("<Q", 1 << 60),
    ],
)
def test_damaged_pickle_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    """A damaged meta.pkl that yields some table, or a traceback, is caught."""
    (tmp_path / "meta.pkl").write_bytes(content)
    with pytest.raises(UserError, match=r"meta\.pkl"):
        tokenizer.from_folder(tmp_path)
