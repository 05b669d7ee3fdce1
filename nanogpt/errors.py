"""Messages to a person: mistakes, warnings, and output that is safe for a terminal."""

import contextlib
import os
import sys
from pathlib import Path
from typing import Any

CONTROL = {code: "\ufffd" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}
SHOWN_CHARACTERS = 60  # of a value that an error quotes


class UserError(ValueError):
    """A person's mistake: printed as one line that says what to do, without a traceback."""


def rank() -> str:
    """Return RANK, which torchrun and clusters set in the environment; "" if this process was started alone."""
    return os.environ.get("RANK", "")


def warn(message: str) -> None:
    """Print a one-line warning on stderr; of several ranks, only rank 0 does."""
    if rank() in ("", "0"):
        with contextlib.suppress(OSError):  # stderr may be a file on the very disk that is full
            print(f"{Path(sys.argv[0]).name}: warning: {one_line(message)}", file=sys.stderr)


def write(text: str) -> None:
    """Print generated text to stdout at once. On a terminal, control characters are replaced.

    So no text can move the cursor, change colours or type commands; a file or a pipe gets every character.
    """
    print(text.translate(CONTROL) if sys.stdout.isatty() else text, end="", flush=True)


def one_line(message: str) -> str:
    """Return `message` with line breaks and control characters replaced by spaces."""
    return "".join(character if character.isprintable() else " " for character in message)


def shown(value: Any) -> str:
    """Return a value as an error message quotes it: its repr, on one line, cut to SHOWN_CHARACTERS."""
    return one_line(repr(value))[:SHOWN_CHARACTERS]


def first_line(error: object) -> str:
    """Return the first line of an error's message; its type's name if it has none."""
    return (str(error).strip() or type(error).__name__).split("\n")[0]
