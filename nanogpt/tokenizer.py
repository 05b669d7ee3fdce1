"""Tokenizers: text to token ids and back, by character or with any tiktoken encoding.

    tokenizer = CharTokenizer.from_text("hello there")
    tokenizer.encode("the")      # [5, 3, 2]
    tokenizer.decode([5, 3, 2])  # "the"

`tokenizer.to_dict()` is a plain dictionary, which `meta.json` and checkpoints store; `from_dict` rebuilds the tokenizer.
"""

import codecs
import functools
import json
import pickle
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nanogpt.errors import UserError, shown

END_OF_TEXT = "<|endoftext|>"
GPT2_VOCAB_SIZE = 50257
META_MAX_BYTES = 64 << 20  # a table of every Unicode character needs a tenth of this


class CharTokenizer:
    """Character-level tokenizer: a character's id is its index in a sorted table."""

    def __init__(self, characters: list[str]):
        """`characters` in the order of their ids. Raises UserError unless they are distinct single characters."""
        if not characters or not all(isinstance(c, str) and len(c) == 1 for c in characters):
            raise UserError("a character table must be a list of single characters")
        if len(set(characters)) != len(characters):
            raise UserError("a character table must hold each character once")
        self.characters = list(characters)
        codes = _code_points("".join(self.characters))
        self._id_of_code = np.full(int(codes.max()) + 2, -1, dtype=np.int32)  # the last entry: all codes above the table
        self._id_of_code[codes] = np.arange(len(codes))

    @classmethod
    def from_text(cls, text: str) -> "CharTokenizer":
        """Build the table from the sorted set of characters in `text`."""
        return cls(sorted(set(text)))

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""
        return len(self.characters)

    @property
    def model_vocab_size(self) -> int:
        """Rows of the model's embedding: exactly `vocab_size`."""
        return len(self.characters)

    def encode(self, text: str) -> list[int]:
        """Encode `text`. Raises UserError with the character, line and column if one is not in the table."""
        return self.encode_array(text).tolist()

    def encode_array(self, text: str) -> np.ndarray:
        """`encode` for a whole corpus: returns an int32 array of shape (len(text),)."""
        ids = self._id_of_code[np.minimum(_code_points(text), len(self._id_of_code) - 1)]
        if (ids < 0).any():
            index = int(np.argmax(ids < 0))
            line, column = text.count("\n", 0, index) + 1, index - text.rfind("\n", 0, index)
            raise UserError(
                f"character {text[index]!r} (U+{ord(text[index]):04X}) at line {line}, column {column} "
                f"is not among the {self.vocab_size:,} characters of this tokenizer"
            )
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Decode `ids`; an id outside the table becomes the replacement character U+FFFD."""
        return "".join(self.characters[i] if 0 <= i < len(self.characters) else "\ufffd" for i in ids)

    def token_bytes(self, token: int) -> bytes:
        """The UTF-8 bytes of one token."""
        return self.decode([token]).encode("utf-8", errors="replace")

    def to_dict(self) -> dict[str, Any]:
        """Return the dictionary that `from_dict` reads."""
        return {"kind": "char", "characters": list(self.characters)}

    def __str__(self) -> str:
        return f"{self.vocab_size:,} characters"


class TiktokenTokenizer:
    """A byte-pair encoding from tiktoken. The vocabulary is loaded on first use."""

    def __init__(self, name: str, vocab_size: int | None = None):
        """`name` is tiktoken's name of the encoding. With `vocab_size` given, nothing is loaded until text is encoded."""
        self.name = name
        self.vocab_size = self._encoding.n_vocab if vocab_size is None else vocab_size

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
    def model_vocab_size(self) -> int:
        """Rows of the model's embedding: `vocab_size` rounded up to a multiple of 64, for fast matrix multiplication."""
        return -(-self.vocab_size // 64) * 64

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


Tokenizer = CharTokenizer | TiktokenTokenizer


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
        case {"kind": "tiktoken", "name": str(name), "vocab_size": int(vocab_size)} if 1 < vocab_size < 1 << 24:
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


class _PlainUnpickler(pickle.Unpickler):
    """Unpickles plain Python values only: refuses pickles that name a function or class, since those can run code."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it names {module}.{name}, which could run code")


def _from_pickle(path: Path) -> CharTokenizer:
    """Read nanoGPT's meta.pkl: {"vocab_size": ..., "itos": {id: character}, "stoi": {character: id}}."""
    try:
        if path.stat().st_size > META_MAX_BYTES:
            raise ValueError(f"larger than {META_MAX_BYTES:,} bytes")
        with open(path, "rb") as file:
            table = _PlainUnpickler(file).load()["itos"]
        return CharTokenizer([table[i] for i in range(len(table))])
    except OSError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise UserError(f"{path}: not a valid meta.pkl of nanoGPT ({type(error).__name__}: {error})") from error


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), dtype="<u4")
