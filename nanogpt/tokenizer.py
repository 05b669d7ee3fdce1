"""Tokenizers: text to token ids and back, by character, with a table of strings or with any tiktoken encoding.

    tokenizer = CharTokenizer.from_text("hello there")
    tokenizer.encode("the")      # [5, 3, 2]
    tokenizer.decode([5, 3, 2])  # "the"

`tokenizer.to_dict()` is a plain dictionary, which `meta.json` and checkpoints store; `from_dict` rebuilds the tokenizer.
`vocab_size` counts the tokens, `model_vocab_size` the rows of the model's embedding, and `end_of_text` is the id that ends a
document, or None.
"""

import codecs
import functools
import json
import pickle
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nanogpt import pickles
from nanogpt.errors import UserError, shown, warn

END_OF_TEXT = "<|endoftext|>"
GPT2_VOCAB_SIZE = 50257
META_MAX_BYTES = 64 << 20  # a table of every Unicode character needs a tenth of this
MAX_VOCAB_SIZE = 1 << 24  # far more than any model has
ENCODING_SIZES = {  # tokens of tiktoken's encodings, known here so that training needs no download
    "gpt2": GPT2_VOCAB_SIZE,
    "r50k_base": 50257,
    "p50k_base": 50281,
    "p50k_edit": 50284,
    "cl100k_base": 100277,
    "o200k_base": 200019,
    "o200k_harmony": 201088,
}
ENCODING_KEYS = ("tokenizer", "encoding", "tokenizer_name", "encoding_name")  # where a meta.pkl may name an encoding


class TableTokenizer:
    """A table of strings of any length: an id is an index. Encodes by the longest match, from left to right."""

    end_of_text = None

    def __init__(self, strings: list[str]):
        """`strings` in the order of their ids; an empty one is an id without text. Raises UserError unless they are strings."""
        if not any(strings) or not all(isinstance(string, str) for string in strings):
            raise UserError("a table must be a list of strings")
        self.strings = list(strings)
        self.model_vocab_size = len(self.strings)  # exactly; nanoGPT's meta.pkl may ask for more rows
        self._id_of_string = {string: i for i, string in enumerate(self.strings) if string}
        self._lengths = sorted(set(map(len, self._id_of_string)), reverse=True)

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""
        return len(self.strings)

    def encode(self, text: str) -> list[int]:
        """Encode `text`. Raises UserError with the character, line and column if no string of the table matches there."""
        ids, index = [], 0
        while index < len(text):
            found = (text[index : index + length] for length in self._lengths)
            match = next((string for string in found if string in self._id_of_string), None)
            if match is None:
                raise self._unknown(text, index)
            ids.append(self._id_of_string[match])
            index += len(match)
        return ids

    def encode_array(self, text: str) -> np.ndarray:
        """`encode` for a whole corpus, as an int32 array."""
        return np.array(self.encode(text), dtype=np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        """Decode `ids`; an id outside the table becomes the replacement character U+FFFD."""
        return "".join(self.strings[i] if 0 <= i < len(self.strings) else "\ufffd" for i in ids)

    def token_bytes(self, token: int) -> bytes:
        """The UTF-8 bytes of one token."""
        return self.decode([token]).encode("utf-8", errors="replace")

    def to_dict(self) -> dict[str, Any]:
        """Return the dictionary that `from_dict` reads."""
        return {"kind": "table", "strings": list(self.strings)}

    def _unknown(self, text: str, index: int) -> UserError:
        line, column = text.count("\n", 0, index) + 1, index - text.rfind("\n", 0, index)
        return UserError(
            f"character {text[index]!r} (U+{ord(text[index]):04X}) at line {line}, column {column} "
            f"is not among the {self} of this tokenizer"
        )

    def __str__(self) -> str:
        return f"{self.vocab_size:,} strings"


class CharTokenizer(TableTokenizer):
    """Character-level tokenizer: a character's id is its index in a sorted table."""

    def __init__(self, characters: list[str]):
        """`characters` in the order of their ids. Raises UserError unless they are distinct single characters."""
        if not characters or not all(isinstance(c, str) and len(c) == 1 for c in characters):
            raise UserError("a character table must be a list of single characters")
        if len(set(characters)) != len(characters):
            raise UserError("a character table must hold each character once")
        super().__init__(characters)
        codes = _code_points("".join(self.strings))
        self._id_of_code = np.full(int(codes.max()) + 2, -1, dtype=np.int32)  # the last entry: all codes above the table
        self._id_of_code[codes] = np.arange(len(codes))

    @classmethod
    def from_text(cls, text: str) -> "CharTokenizer":
        """Build the table from the sorted set of characters in `text`."""
        return cls(sorted(set(text)))

    @property
    def characters(self) -> list[str]:
        """The characters in the order of their ids."""
        return self.strings

    def encode(self, text: str) -> list[int]:
        """Encode `text`. Raises UserError with the character, line and column if one is not in the table."""
        return self.encode_array(text).tolist()

    def encode_array(self, text: str) -> np.ndarray:
        """`encode` for a whole corpus: returns an int32 array of shape (len(text),)."""
        ids = self._id_of_code[np.minimum(_code_points(text), len(self._id_of_code) - 1)]
        if (ids < 0).any():
            raise self._unknown(text, int(np.argmax(ids < 0)))
        return ids

    def to_dict(self) -> dict[str, Any]:
        """Return the dictionary that `from_dict` reads."""
        return {"kind": "char", "characters": list(self.strings)}

    def __str__(self) -> str:
        return f"{self.vocab_size:,} characters"


class IdTokenizer:
    """Token ids without a text, as for music or proteins: "12 7 99" is the text of the ids 12, 7 and 99."""

    end_of_text = None

    def __init__(self, vocab_size: int):
        self.vocab_size = self.model_vocab_size = vocab_size

    def encode(self, text: str) -> list[int]:
        """Return the ids in `text`, separated by whitespace. Raises UserError for anything else."""
        for word in text.split():
            if not (word.isascii() and word.isdigit() and len(word) <= 9 and int(word) < self.vocab_size):
                raise UserError(
                    f"these tokens have no text: write ids below {self.vocab_size:,}, such as '0 1 1', got {shown(word)}"
                )
        return [int(word) for word in text.split()]

    def encode_array(self, text: str) -> np.ndarray:
        """`encode` as an int32 array."""
        return np.array(self.encode(text), dtype=np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        """Return `ids` as text, each after a space, so that texts can be joined."""
        return "".join(f" {i}" for i in ids)

    def token_bytes(self, token: int) -> bytes:
        """The text of one token, as `decode` returns it."""
        return self.decode([token]).encode()

    def to_dict(self) -> dict[str, Any]:
        """Return the dictionary that `from_dict` reads."""
        return {"kind": "ids", "vocab_size": self.vocab_size}

    def __str__(self) -> str:
        return f"{self.vocab_size:,} token ids without text"


class TiktokenTokenizer:
    """A byte-pair encoding from tiktoken. The vocabulary is loaded on first use."""

    def __init__(self, name: str, vocab_size: int | None = None):
        """`name` is tiktoken's name of the encoding. With `vocab_size` given, nothing is loaded until text is encoded."""
        self.name = name
        self.vocab_size = self._encoding.n_vocab if vocab_size is None else vocab_size
        # rounded up to a multiple of 64, for fast matrix multiplication
        self.model_vocab_size = -(-self.vocab_size // 64) * 64

    @functools.cached_property
    def _encoding(self) -> "tiktoken.Encoding":  # noqa: F821 (imported where it is used)
        import tiktoken

        if self.name not in tiktoken.list_encoding_names():
            names = ", ".join(tiktoken.list_encoding_names())
            raise UserError(f"unknown encoding {shown(self.name)}; tiktoken has {names}")
        try:
            return tiktoken.get_encoding(self.name)
        except (OSError, ValueError) as error:  # network errors are OSErrors; a damaged file is a ValueError
            raise UserError(
                f"the vocabulary of encoding '{self.name}' cannot be loaded ({type(error).__name__}): connect to the "
                "internet once to download it, or set TIKTOKEN_CACHE_DIR to a folder that has it"
            ) from error

    @property
    def end_of_text(self) -> int:
        """The id of <|endoftext|>, which ends each document."""
        return self._encoding.eot_token

    def encode(self, text: str) -> list[int]:
        """Encode a prompt; <|endoftext|> in it becomes the special token."""
        return self._encoding.encode(text, allowed_special={END_OF_TEXT}, disallowed_special=())

    def encode_array(self, text: str) -> np.ndarray:
        """Encode a corpus as an int32 array; special tokens in it are encoded as ordinary text."""
        try:  # the fast path: no Python list, so other threads can run
            return self._encoding.encode_to_numpy(text, disallowed_special=()).astype(np.int32)
        except UnicodeEncodeError:  # a lone surrogate, which JSON allows: becomes U+FFFD
            return np.array(self._encoding.encode_ordinary(text), dtype=np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        """Decode `ids`; invalid UTF-8 and ids outside the vocabulary become U+FFFD."""
        return b"".join(self.token_bytes(i) for i in ids).decode("utf-8", errors="replace")

    def token_bytes(self, token: int) -> bytes:
        """The bytes of one token, which may be only part of a UTF-8 character."""
        try:
            return self._encoding.decode_single_token_bytes(token)
        except (KeyError, OverflowError):
            return "\ufffd".encode()

    def to_dict(self) -> dict[str, Any]:
        """Return the dictionary that `from_dict` reads."""
        return {"kind": "tiktoken", "name": self.name, "vocab_size": self.vocab_size}

    def __str__(self) -> str:
        return f"{self.name} encoding, {self.vocab_size:,} tokens"


Tokenizer = TableTokenizer | IdTokenizer | TiktokenTokenizer


class StreamDecoder:
    """Streaming decoder: takes one token at a time and returns the text that is certain so far, up to a stop string.

    It holds back incomplete UTF-8 characters and text that may be the beginning of a stop string.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        """The text ends before the first occurrence of any string in `stop`."""
        assert all(stop), "stop strings must not be empty"
        self.stopped = False
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._stop = tuple(stop)
        self._held = ""

    def feed(self, token: int) -> str:
        """Add a token and return the new text, which may be empty; always empty after a stop string."""
        return self._certain(self._decoder.decode(self._tokenizer.token_bytes(token)))

    def finish(self) -> str:
        """End the stream and return the text held back; an incomplete character becomes U+FFFD."""
        text = self._certain(self._decoder.decode(b"", final=True))
        if not self.stopped:
            text, self._held = text + self._held, ""
        return text

    def _certain(self, new: str) -> str:
        """Return the held-back text plus `new`, less a suffix that may begin a stop string."""
        if self.stopped:
            return ""
        text = self._held + new
        ends = [index for index in map(text.find, self._stop) if index >= 0]
        if ends:
            self.stopped = True
            return text[: min(ends)]
        lengths = (n for stop in self._stop for n in range(1, len(stop)) if text.endswith(stop[:n]))
        held = max(lengths, default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def from_dict(description: Any) -> Tokenizer:
    """Rebuild a tokenizer from its `to_dict()`. Raises UserError if `description` is malformed."""
    match description:
        case {"kind": "char", "characters": list(characters)}:
            return CharTokenizer(characters)
        case {"kind": "table", "strings": list(strings)}:
            return TableTokenizer(strings)
        case {"kind": "ids", "vocab_size": int(vocab_size)} if 1 < vocab_size <= MAX_VOCAB_SIZE:
            return IdTokenizer(vocab_size)
        case {"kind": "tiktoken", "name": str(name), "vocab_size": int(vocab_size)} if 1 < vocab_size <= MAX_VOCAB_SIZE:
            return TiktokenTokenizer(name, vocab_size)
    raise UserError("malformed tokenizer description")


def from_folder(folder: Path) -> Tokenizer:
    """Load a dataset's tokenizer from meta.json or nanoGPT's meta.pkl; GPT-2's encoding if it has neither."""
    if (folder / "meta.json").is_file():
        description = read_meta(folder).get("tokenizer")
        try:
            return from_dict(description)
        except UserError as error:
            raise UserError(f"{folder / 'meta.json'}: {error}; run the dataset's prepare.py again") from error
    if (folder / "meta.pkl").is_file():
        return _from_pickle(folder / "meta.pkl")
    return TiktokenTokenizer("gpt2", GPT2_VOCAB_SIZE)


def read_meta(folder: Path) -> dict[str, Any]:
    """Read meta.json without checking its values. Raises UserError unless it holds a dictionary."""
    path = folder / "meta.json"
    try:
        if path.stat().st_size > META_MAX_BYTES:
            raise ValueError(f"larger than {META_MAX_BYTES:,} bytes")
        meta = json.loads(path.read_bytes().decode("utf-8"))
        if not isinstance(meta, dict):
            raise ValueError(f"not a dictionary, but {shown(meta)}")
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a valid meta.json ({error}); run the dataset's prepare.py again") from error
    return meta


def to_pickle(tokenizer: Tokenizer) -> bytes | None:
    """Return the content of nanoGPT's meta.pkl for a table of strings; None for other tokenizers, which it has no form for."""
    if not isinstance(tokenizer, TableTokenizer):
        return None
    itos = dict(enumerate(tokenizer.strings))
    return pickle.dumps(
        {"vocab_size": tokenizer.model_vocab_size, "itos": itos, "stoi": {string: i for i, string in itos.items()}}, protocol=4
    )


def _from_pickle(path: Path) -> Tokenizer:
    """Read the meta.pkl of nanoGPT and its forks, of which each part may be missing.

        {"vocab_size": 65, "itos": {id: string}, "stoi": {string: id}, "tokenizer": name of an encoding}

    `itos` may also be a list. Without strings and encoding, the tokens are ids without text.
    """
    try:
        meta = pickles.load(path)
        if not isinstance(meta, dict):
            raise ValueError(f"not a dictionary, but {shown(meta)}")
        size = meta.get("vocab_size")
        if size is not None and (type(size) is not int or not 1 <= size <= MAX_VOCAB_SIZE):
            raise ValueError(f"vocab_size must be a whole number from 1 to {MAX_VOCAB_SIZE:,}, got {shown(size)}")
        names = [meta[key] for key in ENCODING_KEYS if isinstance(meta.get(key), str)]
        encoding = next((name for name in names if name in ENCODING_SIZES), None)
        if strings := _strings(meta.get("itos"), meta.get("stoi"), size):
            is_char = all(len(string) == 1 for string in strings)
            tokenizer = CharTokenizer(strings) if is_char else TableTokenizer(strings)
            if size is not None and size < tokenizer.vocab_size:
                raise ValueError(f"vocab_size must be at least the {tokenizer} of its table, got {size}")
        elif encoding is not None:
            tokens = ENCODING_SIZES[encoding]
            tokenizer = TiktokenTokenizer(encoding, min(size or tokens, tokens))
        elif size is not None:
            tokenizer = IdTokenizer(size)
            if names:
                warn(f"{path}: {shown(names[0])} is not an encoding of tiktoken's; texts are token ids")
        else:
            raise ValueError("it needs vocab_size, itos, stoi or the name of an encoding")
        tokenizer.model_vocab_size = max(tokenizer.model_vocab_size, size or 0)
        return tokenizer
    except OSError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        why = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise UserError(f"{path}: not a valid meta.pkl of nanoGPT ({why}); prepare the dataset again") from error


def _strings(itos: Any, stoi: Any, size: int | None) -> list[str]:
    """Return the strings of nanoGPT's tables in the order of their ids; none if both tables are missing.

    An id below `size` may lack a string. Raises ValueError if the tables contradict each other or are no tables.
    """
    if not isinstance(itos, dict | list | tuple | str | None) or not isinstance(stoi, dict | None):
        raise ValueError(f"itos must be a dict or a list, and stoi a dict, got {shown(itos)} and {shown(stoi)}")
    if itos is None:
        itos = {i: string for string, i in (stoi or {}).items()}
        if len(itos) != len(stoi or {}):
            raise ValueError("stoi gives two strings the same id")
    table = itos if isinstance(itos, dict) else dict(enumerate(itos))
    for i, string in table.items():
        if type(i) is not int or not 0 <= i < MAX_VOCAB_SIZE or not isinstance(string, str):
            raise ValueError(f"itos must give a string for each id, got {shown(string)} for {shown(i)}")
    for string, i in (stoi or {}).items():
        if table.get(i) != string:
            raise ValueError(f"stoi and itos contradict each other: {shown(string)} has the id {shown(i)}")
    count = max(table, default=-1) + 1
    if len(table) < count and (size is None or size < count):
        missing = next(i for i in range(count) if i not in table)
        raise ValueError(f"itos has no string for id {missing}")
    return [table.get(i, "") for i in range(count)]


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), dtype="<u4")
