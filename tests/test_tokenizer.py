"""Tokenizers: ids and text, streams, and descriptions from untrusted files."""

import functools
import hashlib
import json
import os
import pickle
import random
import re
import socket
import struct
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiktoken
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nanogpt import tokenizer
from nanogpt.errors import UserError
from nanogpt.tokenizer import (
    PATTERNS,
    CharTokenizer,
    IdTokenizer,
    JsonTokenizer,
    StreamDecoder,
    TableTokenizer,
    TiktokenTokenizer,
    longest_tokens,
    train_bpe,
)

MULTI_BYTE = "naïve café — 日本語 한국어 👩‍👩‍👧‍👦 🙂🙃 ﷽ \U0010ffff\x00 e\u0301\r\n\tend"
CL100K_URL = "https://openaipublic.blob.core.windows.net/encodings/cl100k_base.tiktoken"

quick = settings(max_examples=50, deadline=None, database=None)
any_text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=200)


@pytest.fixture(params=["gpt2", "cl100k_base"])
def encoding_name(request: pytest.FixtureRequest, gpt2_vocabulary: None) -> str:
    """The name of each encoding whose vocabulary is available."""
    cached = Path(os.environ["TIKTOKEN_CACHE_DIR"]) / hashlib.sha1(CL100K_URL.encode()).hexdigest()
    if request.param == "cl100k_base" and not cached.is_file():
        pytest.skip("NANOGPT_TEST_DATA has no vocabulary of cl100k_base")
    return request.param


class Bytes:
    """The smallest vocabulary that can split a character: id i is the byte i."""

    def token_bytes(self, token: int) -> bytes:
        return bytes([token])


# characters


def test_shakespeare_ids(shakespeare: str) -> None:
    """Catches a table in another order than nanoGPT's, which breaks shared checkpoints."""
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
def test_unknown_character_is_located(text: str, named: str, line: int, column: int) -> None:
    """Catches an unknown character that is dropped, gets another's id, or is reported at the wrong line or column."""
    with pytest.raises(UserError) as refusal:
        CharTokenizer.from_text("abc\n").encode(text)
    assert f"{named} at line {line}, column {column} " in str(refusal.value)


def test_char_ids_are_indices_in_the_sorted_table() -> None:
    """Catches ids cut to 16 bits, or counted in UTF-16 units or bytes."""
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
    """Catches a character of any script that does not survive encode and decode."""
    tokens = CharTokenizer.from_text(text)
    copy = tokenizer.from_dict(json.loads(json.dumps(tokens.to_dict())))
    assert copy.decode(tokens.encode(text)) == text
    assert copy.characters == tokens.characters


def test_char_decodes_unknown_ids() -> None:
    """Catches an id outside the table that raises, or wraps around to another character."""
    assert CharTokenizer.from_text("ab").decode([0, 2, 1, -1]) == "a\ufffdb\ufffd"


# byte-pair encodings


def test_ids_are_tiktokens(encoding_name: str) -> None:
    """Catches ids that differ from tiktoken's own."""
    import tiktoken

    reference, tokens = tiktoken.get_encoding(encoding_name), TiktokenTokenizer(encoding_name)
    for text in ("Hello world", MULTI_BYTE, " leading", "1234567", "\n\n\n", ""):
        expected = reference.encode(text)
        assert tokens.encode(text) == tokens.encode_array(text).tolist() == expected
        assert tokens.decode(expected) == text
    assert tokens.vocab_size == reference.n_vocab
    assert tokens.end_of_text == reference.eot_token


def test_gpt2_numbers(gpt2_vocabulary: None) -> None:
    """Catches a vocabulary other than GPT-2's, or an embedding not padded to a multiple of 64."""
    tokens = TiktokenTokenizer("gpt2")
    assert tokens.encode("Hello world") == [15496, 995]
    assert (tokens.vocab_size, tokens.model_vocab_size, tokens.end_of_text) == (50257, 50304, 50256)
    assert tokens.encode_array("Hello").dtype == np.int32


@pytest.mark.parametrize(("vocab_size", "rows"), [(1, 64), (64, 64), (65, 128), (50257, 50304), (100277, 100288)])
def test_model_vocabulary_is_padded_to_64(vocab_size: int, rows: int) -> None:
    """Catches rounding down, or padding a multiple of 64."""
    assert TiktokenTokenizer("gpt2", vocab_size).model_vocab_size == rows


def test_end_of_text_is_special_only_in_prompts(gpt2_vocabulary: None) -> None:
    """Catches a corpus whose text can end documents, or a prompt that cannot."""
    tokens = TiktokenTokenizer("gpt2")
    text = "a<|endoftext|>b"
    assert tokens.encode(text) == [64, 50256, 65]
    corpus = tokens.encode_array(text).tolist()
    assert 50256 not in corpus and tokens.decode(corpus) == tokens.decode([64, 50256, 65]) == text


# byte-pair encodings of one's own

CTC = {"type": "CTC", "pad_token": "<pad>", "word_delimiter_token": "|", "cleanup": True}
RHYME = "the cat sat on the mat, and the hat's 123 cats aren't naïve: 日本語。\n"


@functools.cache
def trained(pattern: str = "gpt2") -> JsonTokenizer:
    return train_bpe([RHYME] * 20, 300, pattern)


def library_of(tokens: JsonTokenizer) -> "tokenizers.Tokenizer":  # noqa: F821 (imported where it is used)
    """The tokenizer in the tokenizers library itself."""
    from tokenizers import Tokenizer

    return Tokenizer.from_str(tokens.to_dict()["content"])


def test_bpe_merges_the_most_frequent_pairs() -> None:
    """Catches merges in another order than that of a naive count, or an end of text that is not the last token."""
    texts = ["ab ab ab abc abc", "abcd abcd"]
    assert train_bpe(texts, 259).vocab_size == 259
    tokens = train_bpe(texts, 260)
    assert [tokens.token_bytes(i) for i in range(256, 260)] == [b"ab", b" ab", b" abc", b"<|endoftext|>"]
    assert (tokens.vocab_size, tokens.model_vocab_size, tokens.end_of_text) == (260, 320, 259)
    assert tokens.encode("ab abcab<|endoftext|>") == [256, 258, 256, 259]
    assert sorted(tokens.token_bytes(i) for i in range(256)) == [bytes([byte]) for byte in range(256)]


def test_bpe_of_a_short_text() -> None:
    """Catches tokens learned from a pair that occurs once, and an end of text that is not next to the last token."""
    tokens = train_bpe(["abc"], 1000)
    assert (tokens.vocab_size, tokens.end_of_text) == (257, 256)
    assert train_bpe([], 257).to_dict() == tokens.to_dict()
    assert tokens.decode(tokens.encode("é")) == "é" and len(tokens.encode("é")) == 2


@pytest.mark.parametrize("pattern", PATTERNS)
@quick
@given(st.text(max_size=200))
@example("<|endoftext|>")
def test_bpe_round_trip(pattern: str, text: str) -> None:
    """Catches ids that are not the library's, text that is changed or refused, and characters streamed by halves."""
    tokens, text = trained(pattern), text + RHYME[:3]
    legal = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    ids = tokens.encode(text)
    assert ids == library_of(tokens).encode(legal).ids
    assert tokens.decode(ids) == legal
    copy = tokenizer.from_dict(json.loads(json.dumps(tokens.to_dict())))
    corpus_ids = copy.encode_array(text).tolist()  # where the end-of-text token's name is text
    assert tokens.decode(corpus_ids) == legal and (corpus_ids == ids or "<|endoftext|>" in text)
    assert copy.to_dict() == tokens.to_dict()
    decoder, shown = StreamDecoder(tokens), ""
    for token in ids:
        shown += decoder.feed(token)
        assert legal.startswith(shown)
    assert shown + decoder.finish() == legal
    assert b"".join(map(tokens.token_bytes, ids)) == legal.encode()


@pytest.mark.parametrize("pattern", PATTERNS)
def test_long_texts_are_cut_between_words(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a long text whose tokens change where it is cut."""
    tokens, text = trained(pattern), (RHYME + "it's  9.\n\n  end;\r\n\t—x\n") * 40
    expected = library_of(tokens).encode(text).ids
    monkeypatch.setattr(tokenizer, "CHUNK_CHARACTERS", 7)
    cut = list(tokenizer._chunks(text))
    assert len(cut) > 100 and "".join(cut) == text
    assert tokens._can_cut and tokens.encode_array(text).tolist() == expected
    assert train_bpe([RHYME] * 20, 300, pattern).to_dict() == tokens.to_dict()  # as without cuts


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("word", ["a", "\n", "-"])
def test_training_cuts_long_words(pattern: str, word: str) -> None:
    """Catches a genome, or a run of spaces, that takes the trainer quadratic time, and a text encoded with these cuts."""
    tokens = train_bpe([word * 16384], 300, pattern)
    assert len(longest_tokens(tokens, 1)[0]) == tokenizer.TRAINED_WORD_CHARACTERS
    assert tokens._can_cut and len(tokens.encode(word * 4097)) == 2


@pytest.mark.parametrize("pattern", PATTERNS)
def test_training_leaves_other_words_alone(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an encoding that differs from the library's own, though no word is longer than the limit."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    library = Tokenizer(models.BPE())
    library.pre_tokenizer = tokenizer._pre_tokenizer(pattern)
    options = {"min_frequency": 2, "initial_alphabet": pre_tokenizers.ByteLevel.alphabet(), "show_progress": False}
    library.train_from_iterator([RHYME] * 20, trainers.BpeTrainer(vocab_size=299, **options))
    monkeypatch.setattr(tokenizer, "TRAINED_WORD_CHARACTERS", max(map(len, RHYME.split())) + 1)
    content = json.loads(train_bpe([RHYME] * 20, 300, pattern).to_dict()["content"])
    assert content["model"]["merges"] == json.loads(library.to_str())["model"]["merges"]


def test_bpe_end_of_text_is_special_only_in_prompts() -> None:
    """Catches a corpus whose text can end documents, or a prompt that cannot."""
    tokens, text = trained(), "a<|endoftext|>b"
    assert tokens.encode(text)[1] == tokens.end_of_text
    ids = tokens.encode_array(text).tolist()
    assert tokens.end_of_text not in ids and tokens.decode(ids) == text


def test_special_tokens() -> None:
    """Catches a token of a name in tokenizer_config.json or a flag in tokenizer.json that counts as text, or an added word."""
    content = json.loads(trained().to_dict()["content"])
    extra = [("[MASK]", True), ("<|word|>", False)]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    content["added_tokens"] += [flags | {"id": 300 + i, "content": t, "special": s} for i, (t, s) in enumerate(extra)]
    assert JsonTokenizer(json.dumps(content)).special_tokens == {299, 300}
    assert JsonTokenizer(json.dumps(content), {"pad_token": "<|word|>"}).special_tokens == {299, 300, 301}


def test_special_tokens_of_tiktoken(encoding_name: str) -> None:
    """Catches the end of text, or another special token, that counts as text."""
    expected = {"gpt2": {50256}, "cl100k_base": {100257, 100258, 100259, 100260, 100276}}
    assert TiktokenTokenizer(encoding_name).special_tokens == expected[encoding_name]


def test_longest_tokens() -> None:
    """Catches parts of characters, or the end of text, among the tokens that are shown."""
    assert longest_tokens(trained(), 3)[0] == " naïve"
    assert all("\ufffd" not in text and text != "<|endoftext|>" for text in longest_tokens(trained(), 300))


def test_added_token_is_its_text() -> None:
    """Catches an added token whose letters are taken for bytes, as the tokenizers library does."""
    library = library_of(trained())
    library.add_tokens(["ñandú"])
    tokens = JsonTokenizer(library.to_str())
    assert tokens.encode("ñandú") == [300] and tokens.decode([300]) == "ñandú"
    assert (tokens.vocab_size, tokens.end_of_text) == (301, None)


def test_no_token_for_unknown_words() -> None:
    """Catches a traceback for a text that a tokenizer of the Hub cannot encode."""
    from tokenizers import Tokenizer, models

    tokens = JsonTokenizer(Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="<unk>")).to_str())
    for encode in (tokens.encode, tokens.encode_array):
        with pytest.raises(UserError, match=r"cannot encode this text"):
            encode("c")


PREFIXED = {"type": "BPE", "vocab": {"x": 0, "é": 1, "xé": 2}, "merges": [["x", "é"]], "continuing_subword_prefix": "x"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda found: found | {"content": "{"}, "not a tokenizer file"),
        (lambda found: found | {"content": json.dumps(json.loads(found["content"]) | {"model": PREFIXED})}, "subword_prefix"),
        (lambda found: found | {"content": found["content"].replace('"model"', '"modell"')}, "not a tokenizer file"),
        (lambda found: found | {"content": found["content"].replace('"id":299', '"id":298')}, "cannot have the id 298"),
        (lambda found: found | {"special": {"eos_token": "</s>"}}, "eos_token is '</s>', which is not in it"),
        (lambda found: found | {"special": {"eos_token": 7}}, "malformed"),
        (lambda found: found | {"content": json.dumps(json.loads(found["content"]) | {"decoder": CTC})}, "decoder is 'CTC'"),
    ],
)
def test_bad_tokenizer_files(change: Any, message: str) -> None:
    """Catches a damaged tokenizer.json, or one whose tokens cannot be shown one by one, that is taken."""
    with pytest.raises(UserError, match=message):
        tokenizer.from_dict(change(trained().to_dict()))


def test_several_special_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a special token in a prompt or corpus that raises."""
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


def test_tiktoken_decodes_unknown_ids(gpt2_vocabulary: None) -> None:
    """Catches an id of the padded vocabulary that raises."""
    assert TiktokenTokenizer("gpt2").decode([64, 50257, 50303, -1, 2**40, 65]) == "a\ufffd\ufffd\ufffd\ufffdb"


def test_unknown_encoding_is_refused() -> None:
    """Catches a misspelled encoding that ends in a traceback."""
    with pytest.raises(UserError, match=r"'gpt-two'.*gpt2"):
        TiktokenTokenizer("gpt-two")


@pytest.mark.parametrize("failure", [ConnectionError("no route"), ValueError("hash mismatch")])
def test_vocabulary_that_cannot_be_loaded(failure: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a machine without a network that gets a traceback, or no remedy."""
    import tiktoken

    def unreachable(name: str) -> None:
        raise failure

    monkeypatch.setattr(tiktoken, "get_encoding", unreachable)
    with pytest.raises(UserError, match=r"'gpt2' cannot be loaded.*TIKTOKEN_CACHE_DIR"):
        TiktokenTokenizer("gpt2")
    assert TiktokenTokenizer("gpt2", 50257).model_vocab_size == 50304


def test_vocabulary_behind_a_firewall(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a run that waits for minutes at its start, since the server does not answer."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/vocabulary"

        def constructor() -> dict[str, Any]:
            tiktoken.load.read_file_cached(url)
            raise AssertionError("got an answer")

        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
        monkeypatch.setitem(tiktoken.registry.ENCODING_CONSTRUCTORS, "silent", constructor)
        monkeypatch.setattr(tokenizer, "DOWNLOAD_TIMEOUT_SECONDS", 0.1)
        hang_up = threading.Timer(5, silent.close)  # so that this test fails without a time limit, instead of waiting as well
        hang_up.start()
        with pytest.raises(UserError, match=r"'silent' cannot be loaded \(ReadTimeout\)"):
            TiktokenTokenizer("silent")
        hang_up.cancel()


# streams


def test_stream_never_shows_half_a_character(encoding_name: str) -> None:
    """Catches replacement characters in the middle of a streamed emoji."""
    tokens = TiktokenTokenizer(encoding_name)
    text = "日本語 👩‍👩‍👧‍👦🙂 naïve"
    stream = StreamDecoder(tokens)
    pieces = [stream.feed(token) for token in tokens.encode(text)]
    assert "" in pieces
    assert "\ufffd" not in "".join(pieces)
    assert "".join(pieces) == text and stream.finish() == ""


@quick
@given(any_text)
def test_stream_shows_characters_once_complete(text: str) -> None:
    """Catches a complete character that is held back, or an incomplete one that is shown."""
    stream, shown = StreamDecoder(Bytes()), ""
    for character in text:
        *first, last = character.encode()
        assert [stream.feed(byte) for byte in first] == [""] * len(first)
        shown += stream.feed(last)
        assert shown.endswith(character)
    assert shown + stream.finish() == text


@quick
@given(st.binary(max_size=60))
def test_stream_of_any_bytes_equals_decode(data: bytes) -> None:
    """Catches invalid UTF-8, as an untrained model samples it, that is lost or differs from decode."""
    stream = StreamDecoder(Bytes())
    shown = "".join(stream.feed(byte) for byte in data)
    assert shown + stream.finish() == data.decode("utf-8", errors="replace")


def test_stream_of_random_tokens_equals_decode(gpt2_vocabulary: None) -> None:
    """Catches a stream that differs from decode on an untrained model's samples."""
    tokens, stream = TiktokenTokenizer("gpt2"), StreamDecoder(TiktokenTokenizer("gpt2"))
    ids = random.Random(0).choices(range(50304), k=2000)
    assert "".join(map(stream.feed, ids)) + stream.finish() == tokens.decode(ids)


def test_stream_of_characters() -> None:
    """Catches characters garbled by the byte decoder."""
    tokens = CharTokenizer.from_text(MULTI_BYTE)
    stream = StreamDecoder(tokens)
    assert [stream.feed(token) for token in tokens.encode(MULTI_BYTE)] == list(MULTI_BYTE)
    assert stream.finish() == ""


@quick
@given(st.text("abc\u00e9", max_size=40), st.lists(st.text("abc\u00e9", min_size=1, max_size=4), min_size=1, max_size=3))
def test_stream_ends_before_the_first_stop_string(text: str, stop: list[str]) -> None:
    """Catches text after a stop string, part of one shown or lost, or a later stop string taken for the first."""
    stream, shown = StreamDecoder(Bytes(), stop), ""
    for byte in text.encode():
        shown += stream.feed(byte)
        assert not any(end in shown for end in stop)
    shown += stream.finish()
    assert stream.stopped == any(end in text for end in stop)
    if stream.stopped:  # cut at the stop string that is complete first
        text = next(text[:n] for n in range(len(text) + 1) if any(end in text[:n] for end in stop))
        text = text[: min(text.find(end) for end in stop if end in text)]
    assert shown == text


def test_stream_holds_back_no_more_than_a_stop_string() -> None:
    """Catches text held back longer than it can belong to a stop string."""
    stream = StreamDecoder(Bytes(), ["\n\nEnd", "stop"])
    assert [stream.feed(byte) for byte in b"a\nb st\n\nEn"] == ["a", "", "\nb", " ", "", "", "st", "", "", ""]
    assert stream.feed(ord("x")) == "\n\nEnx"
    assert [stream.feed(byte) for byte in b"stop!"] == [""] * 5 and stream.stopped and stream.finish() == ""


# descriptions


def test_tiktoken_description_round_trip() -> None:
    """Catches a description that needs the vocabulary, and so a network, to be read."""
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
        {"kind": "table", "strings": []},
        {"kind": "table", "strings": ["", ""]},
        {"kind": "table", "strings": ["a", 1]},
        {"kind": "table", "strings": "ab"},
        {"kind": "ids"},
        {"kind": "ids", "vocab_size": 0},
        {"kind": "ids", "vocab_size": "9"},
        {"kind": "ids", "vocab_size": 1 << 40},
        {"kind": "tiktoken", "name": "gpt2"},
        {"kind": "tiktoken", "name": 2, "vocab_size": 50257},
        {"kind": "tiktoken", "name": "gpt2", "vocab_size": "50257"},
        {"kind": "tiktoken", "name": "gpt2", "vocab_size": 0},
        {"kind": "tiktoken", "name": "gpt2", "vocab_size": -5},
        {"kind": "tiktoken", "name": "gpt2", "vocab_size": 10**9},
    ],
)
def test_malformed_description_is_refused(description: Any) -> None:
    """Catches a damaged description that yields a tokenizer or a traceback."""
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
    """Catches a damaged meta.json that is ignored, or reported without its path."""
    (tmp_path / "meta.json").write_bytes(content)
    with pytest.raises(UserError, match=r"meta\.json"):
        tokenizer.from_folder(tmp_path)


def test_meta_json_comes_before_meta_pkl(tmp_path: Path) -> None:
    """Catches a stale pickle that overrules meta.json."""
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
    """Catches a folder prepared by nanoGPT whose tokenizer is lost."""
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(nanogpt_meta("\n é🙂"), protocol))
    tokens = tokenizer.from_folder(tmp_path)
    assert isinstance(tokens, CharTokenizer)
    assert tokens.encode("🙂é \n") == [3, 2, 1, 0]


def test_folder_without_description_is_gpt2(tmp_path: Path) -> None:
    """Catches nanoGPT's GPT-2 datasets, which have no description, being refused."""
    tokens = tokenizer.from_folder(tmp_path)
    assert isinstance(tokens, TiktokenTokenizer)
    assert (tokens.name, tokens.vocab_size) == ("gpt2", 50257)


@pytest.mark.parametrize(
    "meta",
    [
        {"itos": {0: "c", 1: "a", 2: "b"}},
        {"itos": {2: "b", 0: "c", 1: "a"}},
        {"itos": ["c", "a", "b"]},
        {"itos": "cab"},
        {"stoi": {"a": 1, "b": 2, "c": 0}},
        {"itos": ["c", "a", "b"], "stoi": {}},
        {"vocab_size": np.int64(3), "itos": {np.int64(i): np.str_(c) for i, c in enumerate("cab")}},
        {"vocab_size": np.uint16(3), "stoi": {np.str_(c): np.int32(i) for i, c in enumerate("cab")}},
    ],
    ids=["dict", "unsorted", "list", "string", "stoi", "no-stoi", "numpy", "numpy-stoi"],
)
@pytest.mark.parametrize("protocol", [0, 2, pickle.HIGHEST_PROTOCOL])
def test_other_spellings_of_a_character_table(tmp_path: Path, meta: dict[str, Any], protocol: int) -> None:
    """Catches a table of nanoGPT's forks that is refused, put in another order, or keeps numpy's numbers."""
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta, protocol))
    tokens = tokenizer.from_folder(tmp_path)
    assert isinstance(tokens, CharTokenizer) and tokens.encode("abc") == [1, 2, 0]
    assert type(tokens.model_vocab_size) is int and tokens.model_vocab_size == 3
    assert json.loads(json.dumps(tokens.to_dict())) == {"kind": "char", "characters": ["c", "a", "b"]}


@pytest.mark.parametrize(
    ("meta", "vocab_size", "rows"),
    [
        ({"vocab_size": 64, "itos": "abc"}, 3, 64),
        ({"vocab_size": 64, "itos": ["a", "bc"]}, 2, 64),
        ({"vocab_size": 50_000, "tokenizer": "gpt2"}, 50_000, 50_048),
        ({"vocab_size": 51_200, "tokenizer": "gpt2"}, 50_257, 51_200),
    ],
)
def test_vocab_size_adds_rows(tmp_path: Path, meta: dict[str, Any], vocab_size: int, rows: int) -> None:
    """Catches a padded model that is built too small for its ids, or that samples ids without a string."""
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta))
    tokens = tokenizer.from_folder(tmp_path)
    assert (tokens.vocab_size, tokens.model_vocab_size) == (vocab_size, rows)


def test_longest_match() -> None:
    """Catches a shorter string that is taken first, as nanoGPT's stoi would, or a table that loses its order."""
    tokens = TableTokenizer(["th", "t", "e", "the", " ", "h", "", "🙂", "er"])
    assert tokens.encode("the the th er🙂") == [3, 4, 3, 4, 0, 4, 8, 7]
    assert tokens.encode_array("tthe").tolist() == [1, 3] and tokens.encode_array("").dtype == np.int32
    assert tokens.decode([3, 4, 6, 8, 9, -1]) == "the er\ufffd\ufffd"
    with pytest.raises(UserError, match=r"'r' \(U\+0072\) at line 1, column 4 is not among the 9 strings"):
        tokens.encode("ther")
    copy = tokenizer.from_dict(json.loads(json.dumps(tokens.to_dict())))
    assert type(copy) is TableTokenizer and copy.strings == tokens.strings


@quick
@given(st.lists(st.text("abc", min_size=1, max_size=4), max_size=6), st.text("abc", max_size=30))
def test_longest_match_of_any_table(strings: list[str], text: str) -> None:
    """Catches text that encode and decode change, or a match that is not the longest one: compared with a regex."""
    table = [*strings, "a", "b", "c"]
    tokens = TableTokenizer(table)
    longest_first = "|".join(sorted(table, key=len, reverse=True))
    assert [table[i] for i in tokens.encode(text)] == re.findall(longest_first, text)
    assert tokens.decode(tokens.encode(text)) == text


@pytest.mark.parametrize("itos", [{0: "to", 1: " be", 2: "\n"}, ["to", " be", "\n"]])
def test_longer_strings_in_a_pickle(tmp_path: Path, itos: Any) -> None:
    """Catches a fork's table of words or syllables that is refused, or encoded by character."""
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 3, "itos": itos}))
    tokens = tokenizer.from_folder(tmp_path)
    assert tokens.encode("to be\nto") == [0, 1, 2, 0] and tokens.decode([0, 1, 1, 2]) == "to be be\n"
    stream = StreamDecoder(tokens, ["be\n"])
    assert [stream.feed(i) for i in (0, 1, 0, 1, 2)] == ["to", " ", "beto", " ", ""] and stream.stopped


def test_id_without_a_string(tmp_path: Path) -> None:
    """Catches a table that starts at 1, with 0 for padding, being refused or shifted."""
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 4, "itos": {1: "a", 3: "b"}}))
    tokens = tokenizer.from_folder(tmp_path)
    assert tokens.encode("ab") == [1, 3] and tokens.decode([0, 1, 2, 3]) == "ab"


def test_ids_without_text(tmp_path: Path) -> None:
    """Catches a folder with vocab_size alone that is refused, or taken for GPT-2's encoding."""
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": np.int64(300)}))
    tokens = tokenizer.from_folder(tmp_path)
    assert isinstance(tokens, IdTokenizer) and tokens.vocab_size == tokens.model_vocab_size == 300
    assert tokens.encode(" 12 7\n299") == tokens.encode_array("12 7 299").tolist() == [12, 7, 299]
    assert tokens.encode(tokens.decode([12, 7, 299])) == [12, 7, 299] and tokens.encode("") == []
    stream = StreamDecoder(tokens)
    assert "12" + stream.feed(7) + stream.feed(299) + stream.finish() == "12 7 299"
    copy = tokenizer.from_dict(json.loads(json.dumps(tokens.to_dict())))
    assert isinstance(copy, IdTokenizer) and copy.vocab_size == 300


@pytest.mark.parametrize("text", ["User:", "12 x", "300", "-1", "1.5", "٣", "²", "9" * 5000])
def test_text_where_ids_are_expected(text: str) -> None:
    """Catches words or ids outside the vocabulary that are accepted, or a traceback."""
    with pytest.raises(UserError, match=r"no text: write ids below 300") as refusal:
        IdTokenizer(300).encode(text)
    assert len(str(refusal.value)) < 200


@pytest.mark.parametrize(
    ("meta", "name", "vocab_size"),
    [
        ({"vocab_size": 50257, "tokenizer": "gpt2"}, "gpt2", 50257),
        ({"vocab_size": np.int64(50304), "tokenizer": "gpt2", "num_train_tokens": 7}, "gpt2", 50257),
        ({"vocab_size": 100277, "encoding": "cl100k_base"}, "cl100k_base", 100277),
        ({"tokenizer": "tiktoken", "encoding_name": "o200k_base"}, "o200k_base", 200019),
        ({"tokenizer_name": "r50k_base"}, "r50k_base", 50257),
    ],
)
def test_named_encoding(tmp_path: Path, meta: dict[str, Any], name: str, vocab_size: int) -> None:
    """Catches the name of an encoding that is passed over, or that needs a network to be taken."""
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta))
    tokens = tokenizer.from_folder(tmp_path)
    assert tokens.to_dict() == {"kind": "tiktoken", "name": name, "vocab_size": vocab_size}


def test_encoding_sizes(encoding_name: str) -> None:
    """Catches a vocabulary size other than tiktoken's."""
    assert tokenizer.ENCODING_SIZES[encoding_name] == TiktokenTokenizer(encoding_name).vocab_size


def test_unknown_encoding_is_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Catches a folder that trains in nanoGPT being refused for its tokenizer, or taken without a word."""
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 32000, "tokenizer": "llama\n2"}))
    tokens = tokenizer.from_folder(tmp_path)
    assert isinstance(tokens, IdTokenizer) and tokens.vocab_size == 32000
    warning = capsys.readouterr().err
    assert "warning" in warning and "llama" in warning and warning.count("\n") == 1


def test_table_wins_over_an_encoding(tmp_path: Path) -> None:
    """Catches a character dataset taken for GPT-2's encoding, though nanoGPT decodes it with its table."""
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(nanogpt_meta("ab") | {"tokenizer": "gpt2"}))
    assert isinstance(tokenizer.from_folder(tmp_path), CharTokenizer)


@pytest.mark.parametrize("tokens", [CharTokenizer(["b", "a", "\ud800"]), TableTokenizer(["", "to", " be"])], ids=str)
def test_pickle_round_trip(tmp_path: Path, tokens: TableTokenizer) -> None:
    """Catches a pickle that our own reader refuses, or that nanoGPT cannot use."""
    tokens.model_vocab_size = 64
    (tmp_path / "meta.pkl").write_bytes(tokenizer.to_pickle(tokens))
    copy = tokenizer.from_folder(tmp_path)
    assert type(copy) is type(tokens) and (copy.strings, copy.model_vocab_size) == (tokens.strings, 64)
    meta = pickle.loads((tmp_path / "meta.pkl").read_bytes())
    assert all(meta["itos"][i] == string and meta["stoi"][string] == i for i, string in enumerate(tokens.strings))


def test_other_tokenizers_have_no_pickle() -> None:
    """Catches a meta.pkl for which nanoGPT's sample.py has no text."""
    assert tokenizer.to_pickle(IdTokenizer(3)) is tokenizer.to_pickle(TiktokenTokenizer("gpt2", 50257)) is None


class RunsCommand:
    def __reduce__(self) -> tuple:
        return os.system, ("echo > ran.txt",)


class Evaluates:
    def __reduce__(self) -> tuple:
        return eval, ("open('ran.txt', 'w').close()",)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("trap", [RunsCommand, Evaluates])
def test_hostile_pickle_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trap: type, protocol: int) -> None:
    """Catches a downloaded meta.pkl that runs its author's code."""
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
        pickle.dumps({}),
        pickle.dumps({"vocab_size": 0}),
        pickle.dumps({"vocab_size": 65.0}),
        pickle.dumps({"vocab_size": "65"}),
        pickle.dumps({"vocab_size": True}),
        pickle.dumps({"vocab_size": 1 << 40}),
        pickle.dumps(["a", "b"]),
        pickle.dumps({"itos": {0: "a", 2: "b"}}),
        pickle.dumps({"itos": {0: "a", 2: "b"}, "vocab_size": 2}),
        pickle.dumps({"itos": {0: "a", -1: "b"}}),
        pickle.dumps({"itos": {0: "a", "1": "b"}}),
        pickle.dumps({"itos": {0: "a", 1: "a"}}),
        pickle.dumps({"itos": {0: "a", 1: b"b"}}),
        pickle.dumps({"itos": {0: "a", 1: "b"}, "stoi": {"a": 1, "b": 0}}),
        pickle.dumps({"itos": {0: "a", 1: "b"}, "stoi": {"a": 0, "b": 1, "c": 2}}),
        pickle.dumps({"itos": ["a", "b"], "stoi": ["a", "b"]}),
        pickle.dumps({"stoi": {"a": 0, "b": 0}}),
        pickle.dumps({"itos": {0: "a", 1: "b"}, "vocab_size": 1}),
        pickle.dumps({"itos": {0: "a", 1: None}}),
        pickle.dumps({"itos": {}}),
        pickle.dumps({"itos": 3}),
        b"\x80\x05\x8e" + struct.pack("<Q", 1 << 60),
    ],
)
def test_damaged_pickle_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    """Catches a damaged meta.pkl that yields a table or a traceback."""
    (tmp_path / "meta.pkl").write_bytes(content)
    with pytest.raises(UserError, match=r"meta\.pkl"):
        tokenizer.from_folder(tmp_path)


def test_tokenizer_of_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a relative path of a dataset that is refused."""
    monkeypatch.chdir(tmp_path)
    for folder, characters in (("data/own", "abc"), ("other", "xyz")):
        Path(folder).mkdir(parents=True)
        Path(folder, "meta.pkl").write_bytes(tokenizer.to_pickle(CharTokenizer(list(characters))))
    names = ("own", "data/own", "./other", "other", str(tmp_path / "other"))
    found = ["".join(tokenizer.named_tokenizer(name, tmp_path / "data").characters) for name in names]
    assert found == ["abc", "abc", "xyz", "xyz", "xyz"]
    with pytest.raises(UserError, match=r"^--tokenizer=\./none: must be gpt2, .* or a prepared dataset$"):
        tokenizer.named_tokenizer("./none", tmp_path / "data")
