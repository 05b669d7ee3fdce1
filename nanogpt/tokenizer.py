"""Tokenizers: text to token ids and back, by character, with a table of strings, any tiktoken encoding or any tokenizer.json.

    tokenizer = CharTokenizer.from_text("hello there")
    tokenizer.encode("the")      # [5, 3, 2]
    tokenizer.decode([5, 3, 2])  # "the"

`tokenizer.to_dict()` is a plain dictionary, which `meta.json` and checkpoints store; `from_dict` rebuilds the tokenizer.
`vocab_size` counts the tokens, `model_vocab_size` the rows of the model's embedding, `end_of_text` is the id that ends a
document, or None, and `special_tokens` holds the ids that stand for no text, this one among them.
"""

import codecs
import functools
import json
import pickle
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nanogpt import pickles
from nanogpt.errors import UserError, first_line, shown, warn

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
ENCODINGS = ("gpt2", "cl100k_base", "o200k_base")  # those that a prepare.py offers
DOWNLOAD_TIMEOUT_SECONDS = 10  # without a byte received
BYTES_VOCAB_SIZE = 257  # each byte, and the end of text
PATTERNS = {  # what splits a text into words before byte pairs are merged, by name; None is the library's own, GPT-2's
    "gpt2": None,
    "cl100k": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
}
CHUNK_CHARACTERS = 1 << 16  # of a long text, at least, trained on or encoded at a time
TRAINED_WORD_CHARACTERS = 4096  # of a longer word, at a time; the trainer takes quadratic time in the length of a word
CHUNK_END = re.compile(r"[^\W_](?=[ \n])")  # no pattern above has a word that goes on after this
ENCODING_KEYS = ("tokenizer", "encoding", "tokenizer_name", "encoding_name")  # where a meta.pkl may name an encoding


class TableTokenizer:
    """A table of strings of any length: an id is an index. Encodes by the longest match, from left to right."""

    end_of_text = None
    special_tokens = frozenset()

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
        self.special_tokens = range(vocab_size)

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
        import tiktoken.load

        tiktoken.load.read_file = _download  # its own has no time limit: behind some firewalls it waits for minutes
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

    @property
    def special_tokens(self) -> frozenset[int]:
        """The ids of the encoding's special tokens."""
        return frozenset(map(self._encoding.encode_single_token, self._encoding.special_tokens_set))

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


def _download(url: str) -> bytes:
    """Return a file of a vocabulary. Raises requests.RequestException, an OSError, if the server does not answer."""
    import requests  # slow, and only needed until the file is in tiktoken's cache

    response = requests.get(url, timeout=DOWNLOAD_TIMEOUT_SECONDS)
    response.raise_for_status()
    return response.content


class JsonTokenizer:
    """A tokenizer.json of Hugging Face's tokenizers library: an encoding trained on one's own text, or one of the Hub."""

    def __init__(self, content: str, special: dict[str, str] | None = None):
        """`content` of the file, and the `special` tokens of its tokenizer_config.json, such as {"eos_token": "</s>"}.

        Raises UserError if the library cannot read it, or if the text of a token depends on the tokens around it.
        """
        try:
            found = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise UserError(f"not a tokenizer file ({first_line(error)})") from error
        match found:
            case {"model": {"type": "WordPiece"}}:
                pass
            case {"model": {"continuing_subword_prefix": str(prefix)}} if prefix:  # a wrong one makes the library abort
                raise UserError(f"a byte-pair encoding with a continuing_subword_prefix is not supported, got {shown(prefix)}")
        self._tokenizer = _read(content)
        self._content = self._tokenizer.to_str()  # the same for one tokenizer, however its file was written
        self._description = json.loads(self._content)
        self.special = dict(special or {})
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        added = found.get("added_tokens") or []
        for token in added:  # the library gives another id without a word
            if vocabulary.get(token["content"]) != token["id"]:
                raise UserError(f"not a tokenizer file: {shown(token['content'])} cannot have the id {shown(token['id'])}")
        for role, token in self.special.items():
            if token not in vocabulary:
                raise UserError(f"not the special tokens of this tokenizer: {role} is {shown(token)}, which is not in it")
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        if not 1 < self.vocab_size <= MAX_VOCAB_SIZE:
            raise UserError(f"a tokenizer must have 2 to {MAX_VOCAB_SIZE:,} tokens, got {self.vocab_size:,}")
        self.model_vocab_size = -(-self.vocab_size // 64) * 64
        self.end_of_text = vocabulary.get(self.special.get("eos_token"))
        named = (vocabulary[token] for token in self.special.values())
        self.special_tokens = frozenset([*named, *(token["id"] for token in added if token.get("special"))])
        to_bytes, self._drops_space = _decoder(self._description["decoder"], {token["content"] for token in added})
        self._bytes = {i: to_bytes(self._tokenizer.id_to_token(i)) for i in vocabulary.values()}  # as the library decodes it

    @functools.cached_property
    def _ordinary(self) -> "tokenizers.Tokenizer":  # noqa: F821 (imported where it is used)
        """The same tokenizer, but the strings of special tokens are ordinary text to it."""
        tokenizer = _read(self._content)
        tokenizer.encode_special_tokens = True
        return tokenizer

    def encode(self, text: str) -> list[int]:
        """Encode a prompt; the strings of special tokens in it become these tokens. A lone surrogate becomes U+FFFD."""
        return _encode(self._tokenizer, [_paired(text)])[0].ids

    def encode_array(self, text: str) -> np.ndarray:
        """Encode a corpus as an int32 array; special tokens in it are encoded as ordinary text."""
        text = _paired(text)
        chunks = [text]
        if len(text) > CHUNK_CHARACTERS and self._can_cut:
            chunks = list(_chunks(text))
        parts = [np.empty(0, dtype=np.int32)]
        for first in range(0, len(chunks), 64):
            encodings = _encode(self._ordinary, chunks[first : first + 64])
            parts += [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]
        return np.concatenate(parts)

    @property
    def _can_cut(self) -> bool:
        """Whether a long text may be encoded in chunks: its words are split by one of PATTERNS, and nothing else."""
        found = self._description
        if found["normalizer"] or not all(token["special"] for token in found["added_tokens"]):
            return False
        return found["pre_tokenizer"] in [json.loads(_pre_tokenizer(name).__getstate__()) for name in PATTERNS]

    def decode(self, ids: Iterable[int]) -> str:
        """Decode `ids`; invalid UTF-8 and ids outside the vocabulary become U+FFFD."""
        text = b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")
        return text.removeprefix(" ") if self._drops_space else text

    def token_bytes(self, token: int) -> bytes:
        """The bytes of one token, which may be only part of a UTF-8 character."""
        return self._bytes.get(token, "\ufffd".encode())

    def to_dict(self) -> dict[str, Any]:
        """Return the dictionary that `from_dict` reads."""
        return {"kind": "json", "content": self._content, "special": self.special}

    def __str__(self) -> str:
        kind = self._description["model"]["type"]
        return f"{'byte-pair encoding' if kind == 'BPE' else kind + ' tokenizer'}, {self.vocab_size:,} tokens"


def _read(content: str) -> "tokenizers.Tokenizer":  # noqa: F821
    """Read a tokenizer.json. Raises UserError if the tokenizers library cannot."""
    import tokenizers

    try:
        tokenizer = tokenizers.Tokenizer.from_str(content)
    except Exception as error:  # the library raises no other class
        raise UserError(f"not a tokenizer file ({first_line(error)})") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if getattr(tokenizer.model, "dropout", None) is not None:  # merges left out at random, for training
        tokenizer.model.dropout = None
    return tokenizer


def _encode(tokenizer: "tokenizers.Tokenizer", texts: list[str]) -> "list[tokenizers.Encoding]":  # noqa: F821
    """Encode `texts`, several of them in threads. Raises UserError if a token is missing and there is none for that."""
    try:
        if len(texts) == 1:  # without threads, so that the process may fork
            return [tokenizer.encode(texts[0], add_special_tokens=False)]
        return tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    except Exception as error:  # the library raises no other class
        raise UserError(f"the tokenizer cannot encode this text ({first_line(error)})") from error


def _decoder(description: dict[str, Any] | None, added: set[str]) -> tuple[Callable[[str], bytes], bool]:
    """Return the function from a token to its bytes, and whether the first space of a text is dropped.

    `description` is the decoder of a tokenizer.json, which also says which tokens were `added` as they are. Raises UserError
    if a token has no bytes of its own.
    """
    if (description or {}).get("type") == "ByteLevel":
        byte_of = {letter: byte for byte, letter in enumerate(letters())}
        return (
            lambda token: (
                token.encode()
                if token in added or not byte_of.keys() >= set(token)
                else bytes(byte_of[letter] for letter in token)
            ),
            False,
        )
    steps: list[Callable[[str], str]] = []
    drops_space = False
    kinds = [description] if (description or {}).get("type") != "Sequence" else description["decoders"]
    for step in kinds:
        match step:
            case None:
                steps.append(" {}".format)  # the library puts a space between tokens
                drops_space = True
            case {"type": "Fuse" | "ByteFallback"}:
                pass
            case {"type": "Metaspace", "replacement": str(mark)}:
                steps.append(functools.partial(_replaced, old=mark, new=" "))
                drops_space = drops_space or step.get("prepend_scheme", "always") != "never"
            case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)}:
                steps.append(functools.partial(_replaced, old=old, new=new))
            case {"type": "Strip", "content": " ", "start": 1, "stop": 0}:
                drops_space = True
            case {"type": "WordPiece", "prefix": str(prefix), "cleanup": bool(cleanup)}:
                steps.append(functools.partial(_word_piece, prefix=prefix, cleanup=cleanup))
                drops_space = True
            case _:
                name = step.get("type") if isinstance(step, dict) else step
                raise UserError(f"a tokenizer whose decoder is {shown(name)} is not supported: its tokens have no text each")
    has_bytes = any((step or {}).get("type") == "ByteFallback" for step in kinds)

    def to_bytes(token: str) -> bytes:
        if has_bytes and re.fullmatch("<0x[0-9A-Fa-f]{2}>", token):
            return bytes([int(token[3:5], 16)])
        for step in steps:
            token = step(token)
        return token.encode()

    return to_bytes, drops_space


def _replaced(token: str, old: str, new: str) -> str:
    return token.replace(old, new)


def _word_piece(token: str, prefix: str, cleanup: bool) -> str:
    """Return a WordPiece token as text: a space before it, unless it continues a word; with `cleanup`, before a word only."""
    token = token.removeprefix(prefix) if token.startswith(prefix) else f" {token}"
    if cleanup:  # the library's table
        for end in (".", "?", "!", ",", "n't", "'m", "'s", "'ve", "'re"):
            token = token.replace(f" {end}", end)
    return token


def letters() -> list[str]:
    """Return the letter that GPT-2 writes for each byte: its own if that is printable, else the next from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    rest = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(0x100 + rest.index(byte)) for byte in range(256)]


def _paired(text: str) -> str:
    """Return `text` with each lone surrogate, which JSON allows, as U+FFFD."""
    return text if text.isascii() else text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _chunks(text: str) -> Iterator[str]:
    """Cut a long text where a word ends before a space or a line break."""
    start = 0
    while end := CHUNK_END.search(text, start + CHUNK_CHARACTERS):
        yield text[start : end.end()]
        start = end.end()
    yield text[start:]


def _without_long_words(text: str) -> Iterator[str]:
    """Cut a text within runs of TRAINED_WORD_CHARACTERS letters or spaces, such as a genome."""
    start = 0
    for run in re.finditer(rf"\S{{{TRAINED_WORD_CHARACTERS}}}|\s{{{TRAINED_WORD_CHARACTERS}}}", text):
        yield text[start : run.end()]
        start = run.end()
    yield text[start:]


def _pre_tokenizer(pattern: str) -> "tokenizers.pre_tokenizers.PreTokenizer":  # noqa: F821
    """Return what splits a text into words, as letters for bytes."""
    from tokenizers import Regex, pre_tokenizers

    if PATTERNS[pattern] is None:
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    split = pre_tokenizers.Split(Regex(PATTERNS[pattern]), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def train_bpe(texts: Iterable[str], vocab_size: int, pattern: str = "gpt2") -> JsonTokenizer:
    """Train a byte-level byte-pair encoding of `vocab_size` tokens: 256 bytes, the merges, and <|endoftext|>, the last one.

    It has fewer tokens if no pair is left that occurs twice. `pattern`, a name in PATTERNS, splits texts into words, which
    pairs do not cross. Memory holds the distinct words of `texts` and their counts. Draws a progress bar on a terminal.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = _pre_tokenizer(pattern)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    count = sum(len(text) // CHUNK_CHARACTERS + 1 for text in texts) if isinstance(texts, Sequence) else None
    chunks = (_paired(piece) for text in texts for chunk in _chunks(text) for piece in _without_long_words(chunk))
    tokenizer.train_from_iterator(chunks, trainer, length=count)
    tokenizer.add_special_tokens([END_OF_TEXT])
    return JsonTokenizer(tokenizer.to_str(), {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT})


def longest_tokens(tokenizer: JsonTokenizer, count: int) -> list[str]:
    """Return the longest tokens that are text, apart from special ones, for a person to see what was learned."""
    special = {token.encode() for token in tokenizer.special.values()}
    pieces = (tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size))
    texts = [piece.decode("utf-8", errors="replace") for piece in pieces if piece not in special]
    return sorted((text for text in texts if "\ufffd" not in text), key=len, reverse=True)[:count]


Tokenizer = TableTokenizer | IdTokenizer | TiktokenTokenizer | JsonTokenizer


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
        case {"kind": "json", "content": str(content), "special": dict(special)} if all(
            isinstance(text, str) for item in special.items() for text in item
        ):
            return JsonTokenizer(content, special)
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


def dataset_folder(name: str, datasets: Path) -> Path:
    """Return the folder of the dataset `name`: the one in `datasets`, else the path `name` if that is a folder."""
    folder = datasets / name
    return Path(name) if not folder.is_dir() and Path(name).is_dir() else folder


def named_tokenizer(name: str, datasets: Path, names: Sequence[str] = ENCODINGS) -> Tokenizer:
    """Return the encoding `name`, or the tokenizer of the prepared dataset `name`, a folder in `datasets` or anywhere.

    Raises UserError, which offers `names`, if it is neither.
    """
    if name in ENCODINGS:
        return TiktokenTokenizer(name)
    folder = dataset_folder(name, datasets)
    if not any((folder / file).is_file() for file in ("meta.json", "meta.pkl", "train.bin")):
        raise UserError(f"--tokenizer={name}: must be {', '.join(names)} or a prepared dataset")
    return from_folder(folder)


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
