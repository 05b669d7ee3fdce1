"""Text to token ids and back: a table of characters, or any tiktoken encoding.

    tokenizer = CharTokenizer.from_text("hello there")
    tokenizer.encode("the")      # [5, 3, 2]
    tokenizer.decode([5, 3, 2])  # "the"

A tokenizer describes itself as a plain dictionary, `to_dict()`, which `meta.json` and checkpoints hold and `from_dict`
turns back into the tokenizer.
"""

import codecs
import functools
import json
import pickle
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nanogpt.errors import UserError

END_OF_TEXT = "<|endoftext|>"
GPT2_VOCAB_SIZE = 50257
LARGEST_META = 64 << 20  # bytes; a table of all Unicode characters takes a tenth of it


class CharTokenizer:
    """One id a character: its place in a sorted table of characters."""

    def __init__(self, characters: list[str]):
        """Take the table: distinct single characters in the order of their ids. UserError where it is none."""
        if not characters or not all(isinstance(c, str) and len(c) == 1 for c in characters):
            raise UserError("a character table is a list of single characters")
        if len(set(characters)) != len(characters):
            raise UserError("a character table holds each character once")
        self.characters = list(characters)
        codes = _code_points("".join(self.characters))
        self._id_of_code = np.full(int(codes.max()) + 2, -1, dtype=np.int32)  # the last entry stands for all codes above
        self._id_of_code[codes] = np.arange(len(codes))

    @classmethod
    def from_text(cls, text: str) -> "CharTokenizer":
        """Return the tokenizer whose table is the sorted set of the characters of `text`."""
        return cls(sorted(set(text)))

    @property
    def vocab_size(self) -> int:
        """The number of ids that decode to text."""
        return len(self.characters)

    @property
    def model_vocab_size(self) -> int:
        """The number of rows of a model's embedding table: the table's size exactly."""
        return len(self.characters)

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`. A character that the table lacks is a UserError that names it and where it stands."""
        return self.encode_array(text).tolist()

    def encode_array(self, text: str) -> np.ndarray:
        """As `encode`, into an int32 array of len(text): for whole corpora."""
        ids = self._id_of_code[np.minimum(_code_points(text), len(self._id_of_code) - 1)]
        if (ids < 0).any():
            index = int(np.argmax(ids < 0))
            line, column = text.count("\n", 0, index) + 1, index - text.rfind("\n", 0, index)
            raise UserError(
                f"character {text[index]!r} (U+{ord(text[index]):04X}) at line {line}, column {column} "
                f"is not among the {self.vocab_size} characters of this tokenizer"
            )
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`; the replacement character for an id that the table lacks."""
        return "".join(self.characters[i] if 0 <= i < len(self.characters) else "\ufffd" for i in ids)

    def token_bytes(self, token: int) -> bytes:
        """Return the UTF-8 bytes of one id."""
        return self.decode([token]).encode("utf-8", errors="replace")

    def to_dict(self) -> dict[str, Any]:
        """Return the description that `from_dict` reads."""
        return {"kind": "char", "characters": list(self.characters)}

    def __str__(self) -> str:
        return f"{self.vocab_size} characters"


class TiktokenTokenizer:
    """A byte-pair encoding of the tiktoken library, by its name there; its vocabulary is loaded when it is first needed."""

    def __init__(self, name: str, vocab_size: int | None = None):
        """Take the encoding's name and, where it is known, its size, so that counting needs no vocabulary."""
        self.name = name
        self.vocab_size = self._encoding.n_vocab if vocab_size is None else vocab_size

    @functools.cached_property
    def _encoding(self) -> "tiktoken.Encoding":  # noqa: F821 (imported where it is used)
        import tiktoken

        if self.name not in tiktoken.list_encoding_names():
            names = ", ".join(tiktoken.list_encoding_names())
            raise UserError(f"unknown encoding {self.name!r}; tiktoken knows {names}")
        try:
            return tiktoken.get_encoding(self.name)
        except (OSError, ValueError) as error:  # requests' errors are OSErrors; a damaged file is a ValueError
            raise UserError(
                f"the vocabulary of encoding '{self.name}' cannot be loaded ({type(error).__name__}): connect to the "
                "internet once, or set TIKTOKEN_CACHE_DIR to a folder that holds it"
            ) from error

    @property
    def model_vocab_size(self) -> int:
        """The rows of a model's embedding table: `vocab_size` rounded up to a multiple of 64, which matrix units like."""
        return -(-self.vocab_size // 64) * 64

    @property
    def end_of_text(self) -> int:
        """The id of the token that stands after each document."""
        return self._encoding.eot_token

    def encode(self, text: str) -> list[int]:
        """Return the ids of a prompt; <|endoftext|> in it is the special token."""
        return self._encoding.encode(text, allowed_special={END_OF_TEXT}, disallowed_special=())

    def encode_array(self, text: str) -> np.ndarray:
        """Return the ids of a corpus as an int32 array; what looks like a special token in it is text like any other."""
        try:  # the quick way, without a list, which other threads would have to wait for
            return self._encoding.encode_to_numpy(text, disallowed_special=()).astype(np.int32)
        except UnicodeEncodeError:  # half a character, as JSON can hold; it becomes a replacement character
            return np.array(self._encoding.encode_ordinary(text), dtype=np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`; the replacement character for bytes that are no UTF-8 and ids beyond the vocabulary."""
        return b"".join(self.token_bytes(i) for i in ids).decode("utf-8", errors="replace")

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes of one id, which may be a part of a UTF-8 character."""
        try:
            return self._encoding.decode_single_token_bytes(token)
        except (KeyError, OverflowError):
            return "\ufffd".encode()

    def to_dict(self) -> dict[str, Any]:
        """Return the description that `from_dict` reads."""
        return {"kind": "tiktoken", "name": self.name, "vocab_size": self.vocab_size}

    def __str__(self) -> str:
        return f"{self.name} encoding, {self.vocab_size:,} tokens"


Tokenizer = CharTokenizer | TiktokenTokenizer


class StreamDecoder:
    """Decodes a growing stream of ids up to a stop string, holding back what may turn out to be a part of it.

    The bytes of a UTF-8 character are held back, too, until the last of them is there.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        """Take the strings before the first of which the text ends; none of them empty."""
        assert all(stop), "an empty string is everywhere"
        self.stopped = False
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._stop = tuple(stop)
        self._held = ""

    def feed(self, token: int) -> str:
        """Return the text that one more id makes certain, which may be empty; after a stop string it is."""
        return self._certain(self._decoder.decode(self._tokenizer.token_bytes(token)))

    def finish(self) -> str:
        """Return what was held back at the end of the stream; a character that stayed incomplete becomes a replacement."""
        text = self._certain(self._decoder.decode(b"", final=True))
        if not self.stopped:
            text, self._held = text + self._held, ""
        return text

    def _certain(self, new: str) -> str:
        if self.stopped:
            return ""
        text = self._held + new
        ends = [at for at in map(text.find, self._stop) if at >= 0]
        if ends:
            self.stopped = True
            return text[: min(ends)]
        lengths = (n for stop in self._stop for n in range(1, len(stop)) if text.endswith(stop[:n]))
        held = max(lengths, default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def from_dict(description: Any) -> Tokenizer:
    """Return the tokenizer that `description`, the `to_dict()` of one, describes; UserError where it is malformed."""
    match description:
        case {"kind": "char", "characters": list(characters)}:
            return CharTokenizer(characters)
        case {"kind": "tiktoken", "name": str(name), "vocab_size": int(vocab_size)} if 1 < vocab_size < 1 << 24:
            return TiktokenTokenizer(name, vocab_size)
    raise UserError("malformed tokenizer description")


def from_folder(folder: Path) -> Tokenizer:
    """Return the tokenizer of a dataset's folder: of its meta.json, its meta.pkl (nanoGPT's), or else GPT-2's."""
    if (folder / "meta.json").is_file():
        try:
            return from_dict(read_meta(folder).get("tokenizer"))
        except UserError as error:
            raise UserError(f"{folder / 'meta.json'}: {error}; run its prepare.py again") from error
    if (folder / "meta.pkl").is_file():
        return _from_pickle(folder / "meta.pkl")
    return TiktokenTokenizer("gpt2", GPT2_VOCAB_SIZE)


def read_meta(folder: Path) -> dict[str, Any]:
    """Return the dictionary in a folder's meta.json, its values not yet checked; UserError where there is none in it."""
    path = folder / "meta.json"
    try:
        if path.stat().st_size > LARGEST_META:
            raise UserError(f"{path}: too large for a dataset's description")
        meta = json.loads(path.read_bytes().decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a dataset's description ({error}); run its prepare.py again") from error
    if not isinstance(meta, dict):
        raise UserError(f"{path}: not a dataset's description; run its prepare.py again")
    return meta


class _PlainUnpickler(pickle.Unpickler):
    """Reads pickles of plain Python values; one that names a function or a class, and so could run code, is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it names {module}.{name}, which could run code")


def _from_pickle(path: Path) -> CharTokenizer:
    """Return the character table of nanoGPT's meta.pkl: {"vocab_size": ..., "itos": {id: character}, "stoi": ...}."""
    try:
        if path.stat().st_size > LARGEST_META:
            raise ValueError("too large")
        with open(path, "rb") as file:
            table = _PlainUnpickler(file).load()["itos"]
        return CharTokenizer([table[i] for i in range(len(table))])
    except OSError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise UserError(f"{path}: not a character table as nanoGPT writes it ({type(error).__name__}: {error})") from error


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), dtype="<u4")
