"""Merge a command's defaults, config files and --key=value flags into one checked config.

A command describes its keys as a dataclass, one field per line; the trailing comment is the key's help:

    @dataclass(frozen=True)
    class Config(configurator.Config):
        batch_size: PositiveInt = 12  # sequences per micro-batch
        device: Literal["auto", "cpu"] = "auto"  # device to train on

    if __name__ == "__main__":
        configurator.run(main, Config)

`python script.py config/a.py --batch_size=4 config/b.py` applies its arguments from left to right. A config file is plain
Python: it sees the values so far, and the names that it assigns must be keys.
"""

import ast
import dataclasses
import difflib
import inspect
import io
import math
import os
import sys
import textwrap
import tokenize
import traceback
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NoReturn

from nanogpt.errors import UserError, one_line

ROOT = Path(__file__).resolve().parent


class Config:
    """Base class of every command's config."""

    given: ClassVar[frozenset[str]] = frozenset()  # the keys that a file or a flag has set, on each instance
    positional: ClassVar[str] = ""  # the key that takes arguments without dashes, joined by commas; "": they are config files

    def validate(self) -> None:
        """Check the keys together. Raises UserError if they do not fit."""

    def replace(self, **values: Any) -> "Config":
        """Return a copy with other values and the same `given`."""
        return _with_given(dataclasses.replace(self, **values), self.given)


@dataclasses.dataclass(frozen=True)
class Range:
    """The numbers that a key accepts, from `at_least` (or just `above`) to `at_most` (or just `below`)."""

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None

    def __contains__(self, number: float) -> bool:
        return (
            (self.at_least is None or number >= self.at_least)
            and (self.above is None or number > self.above)
            and (self.at_most is None or number <= self.at_most)
            and (self.below is None or number < self.below)
        )

    def __str__(self) -> str:
        ends = dataclasses.asdict(self).items()
        return " and ".join(f"{name.replace('_', ' ')} {end:,}" for name, end in ends if end is not None)


PositiveInt = Annotated[int, Range(at_least=1)]
NonNegativeInt = Annotated[int, Range(at_least=0)]
PositiveFloat = Annotated[float, Range(above=0)]
NonNegativeFloat = Annotated[float, Range(at_least=0)]
Seed = Annotated[int, Range(at_least=0, below=1 << 32)]
Probability = Annotated[float, Range(at_least=0, below=1)]
LossRows = Annotated[int | Literal["auto"], Range(at_least=0)]


def parse(config_class: type, arguments: list[str]) -> Any:
    """Return a `config_class` with its defaults overridden by `arguments`, from left to right.

    `config.given` holds the keys that were set. Raises UserError if a key or a value is wrong.
    """
    kinds = typing.get_type_hints(config_class, include_extras=True)
    values = dataclasses.asdict(config_class())
    keys = list(values)
    given: set[str] = set()
    for argument in arguments:
        if argument.startswith("--"):
            key, equals, text = argument[2:].partition("=")
            if not equals:
                raise UserError(f"{argument}: write --key=value, with no spaces around '='{_hint(key, keys, '--{}=...')}")
            if key not in keys:
                raise UserError(f"unknown key '{key}' in {argument}{_hint(key, keys, '--{}')}; --help lists all keys")
            updates = {key: _check(f"--{key}={text}", text, kinds[key], is_text=True)}
        elif config_class.positional and not argument.startswith("-"):
            key = config_class.positional
            updates = {key: ",".join(filter(None, (values[key], argument)))}
        else:
            path = _find_config_file(argument, keys)
            updates = {}
            for key, value in _run_config_file(path, argument, values).items():
                if key not in keys:
                    hint = f"{_hint(key, keys)}; start a name that is not a key with _"
                    raise UserError(f"{argument}: unknown key '{key}'{hint}")
                updates[key] = _check(f"{argument}: {key} = {value!r}", value, kinds[key], is_text=False)
        values.update(updates)
        given.update(updates)
    config = _with_given(config_class(**values), frozenset(given))
    config.validate()
    return config


def _with_given(config: Config, given: frozenset[str]) -> Config:
    object.__setattr__(config, "given", given)  # configs are frozen
    return config


def check_value(config_class: type, key: str, value: Any, source: str) -> Any:
    """Return `value`, read from `source`, as the type of `key`. Raises UserError if it does not fit."""
    kind = typing.get_type_hints(config_class, include_extras=True)[key]
    return _check(f"{source}: {key} = {value!r}", value, kind, is_text=False)


def run(main: Callable[[Any], None], config_class: type) -> None:
    """Parse the command line and call `main` with the config: the `if __name__ == "__main__"` of every command.

    A UserError, or an OSError with a file's name, ends the process with one line on stderr and status 1; Ctrl-C with status
    130. Any other exception is a bug and keeps its traceback.
    """
    try:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")  # characters that the terminal's encoding lacks
        arguments = sys.argv[1:]
        if "--help" in arguments or "-h" in arguments:
            print(help_text(config_class, Path(sys.argv[0]).name), end="")
            return
        main(parse(config_class, arguments))
        sys.stdout.flush()
    except UserError as error:
        _exit(str(error))
    except BrokenPipeError:  # the reader of our output, such as `head`, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        if error.filename is None:
            raise
        _exit(f"{error.filename}: {error.strerror}")
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)


def help_text(config_class: type, script: str) -> str:
    """Return the --help page: each key's type, default and comment, under the headings in the class."""
    kinds = typing.get_type_hints(config_class, include_extras=True)
    defaults = dataclasses.asdict(config_class())
    plain = config_class.positional or "config/file.py"
    lines = [f"usage: python {script} [{plain} ...] [--key=value ...]", ""]
    description = (sys.modules[config_class.__module__].__doc__ or "").strip().split("\n\n")[0]
    lines += [*textwrap.wrap(description, 100), ""]
    lines.append("Later arguments override earlier ones. Keys, with type and default:")
    for key, comment in _comments(config_class):
        if key is None:
            lines += ["", f"{comment}:"]
        elif key in defaults:
            head = f"  --{key}=<{_type_name(kinds[key])}>  [{_show_default(defaults[key])}]"
            lines += [head] if len(head) > 44 else []
            lines += textwrap.wrap(
                comment,
                width=118,
                initial_indent=" " * 46 if len(head) > 44 else head.ljust(46),
                subsequent_indent=" " * 46,
            )
    return "\n".join(lines) + "\n"


def _exit(message: str) -> NoReturn:
    rank = os.environ.get("RANK", "0")
    script = Path(sys.argv[0]).name + ("" if rank == "0" else f" [rank {rank}]")
    print(f"{script}: error: {one_line(message)}", file=sys.stderr)
    sys.exit(1)


class _Namespace(dict):
    """The variables of a config file; records assignments, even of an unchanged value."""

    def __init__(self, values: dict[str, Any]):
        super().__init__(values)
        self.assigned: dict[str, None] = {}

    def __setitem__(self, name: str, value: Any) -> None:
        self.assigned[name] = None
        super().__setitem__(name, value)


def _find_config_file(argument: str, keys: list[str]) -> Path:
    if argument.startswith("-"):
        raise UserError(f"{argument}: flags start with two dashes, as in --key=value")
    for path in (Path(argument), ROOT / argument):
        if path.is_file():
            return path
    key = argument.partition("=")[0]
    if key in keys:
        raise UserError(f"{argument}: a key needs two dashes: --{argument}")
    names = sorted(path.stem for path in (ROOT / "config").glob("*.py"))
    raise UserError(f"{argument}: no such config file{_hint(Path(argument).stem, names, 'config/{}.py')}")


def _run_config_file(path: Path, shown: str, values: dict[str, Any]) -> dict[str, Any]:
    """Execute a config file on top of `values`; return its assignments, without modules, functions, classes and _names."""
    namespace = _Namespace({**values, "__name__": path.stem, "__file__": str(path)})
    try:
        tree = ast.parse(path.read_bytes())
    except SyntaxError as error:
        raise UserError(f"{shown}, line {error.lineno or 1}: {error.msg}") from error
    except (ValueError, RecursionError, MemoryError) as error:  # null bytes, endless brackets
        raise UserError(f"{shown}: not a Python file ({error or type(error).__name__})") from error
    try:
        exec(compile(tree, str(path), "exec"), namespace)
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        line = [frame.lineno for frame in frames if frame.filename == str(path)][-1]
        raise UserError(f"{shown}, line {line}: {type(error).__name__}: {error}") from error
    changed = (name for name in values if name in namespace and namespace[name] is not values[name])  # by `global`
    names = [*namespace.assigned, *(name for name in changed if name not in namespace.assigned)]
    assigned = {name: namespace[name] for name in names if name in namespace and not name.startswith("_")}
    imports = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    imported = {alias.asname or alias.name.partition(".")[0] for node in imports for alias in node.names}
    return {
        name: value
        for name, value in assigned.items()
        if name in values or not (name in imported or isinstance(value, (types.FunctionType, type)))
    }


def _check(shown: str, value: Any, kind: Any, is_text: bool) -> Any:
    """Return `value` converted to `kind`; `shown` is how an error quotes it."""
    limits = None
    if typing.get_origin(kind) is Annotated:
        kind, limits = typing.get_args(kind)
    try:
        value = _from_text(value, kind) if is_text else _from_python(value, kind)
    except ValueError:
        raise UserError(f"{shown}: not {_expected(kind)}") from None
    if limits is not None and isinstance(value, (int, float)) and value not in limits:
        raise UserError(f"{shown}: must be {limits}")
    return value


def _members(kind: Any) -> tuple:
    return typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)


def _from_text(text: str, kind: Any) -> Any:
    """Parse `text` as the first type in the union `kind` that it fits. Raises ValueError if it fits none."""
    for member in _members(kind):
        if member is bool and text.lower() in ("true", "1", "false", "0"):
            return text.lower() in ("true", "1")
        if member is type(None) and text.lower() == "none":
            return None
        if typing.get_origin(member) is Literal and text in typing.get_args(member):
            return text
        if member is str:
            return text
        if member in (int, float):
            try:
                return _from_python(int(text), member)
            except ValueError:
                pass
            try:
                return _from_python(float(text), member)
            except ValueError:
                pass
    raise ValueError(text)


def _from_python(value: Any, kind: Any) -> Any:
    """Convert a value to the first type in the union `kind` that it fits. Raises ValueError if it fits none."""
    for member in _members(kind):
        if typing.get_origin(member) is Literal:
            if isinstance(value, str) and value in typing.get_args(member):
                return value
        elif member is int and isinstance(value, float) and value.is_integer():
            return int(value)  # 6e5
        elif member is float and isinstance(value, (int, float)) and not isinstance(value, bool):
            try:
                number = float(value)
            except OverflowError:
                raise ValueError(value) from None
            if math.isfinite(number):
                return number
        elif type(value) is member:
            return value
    raise ValueError(value)


def _expected(kind: Any) -> str:
    names = {bool: ["True", "False"], int: ["a whole number"], float: ["a number"], str: ["a string"], type(None): ["None"]}
    parts = []
    for member in _members(kind):
        parts += typing.get_args(member) if typing.get_origin(member) is Literal else names[member]
    return ("one of " if len(parts) > 2 else "") + " or ".join([", ".join(parts[:-1])] * (len(parts) > 1) + parts[-1:])


def _type_name(kind: Any) -> str:
    if typing.get_origin(kind) is Annotated:
        kind = typing.get_args(kind)[0]
    parts = []
    for member in _members(kind):
        if typing.get_origin(member) is Literal:
            parts += typing.get_args(member)
        else:
            parts.append("None" if member is type(None) else member.__name__)
    return "|".join(parts)


def _show_default(value: Any) -> str:
    return repr(value) if isinstance(value, str) and (not value or not value.isprintable()) else str(value)


def _hint(name: str, known: list[str], form: str = "{}") -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean {form.format(close[0])}?" if close else ""


def _comments(config_class: type) -> list[tuple[str | None, str]]:
    """Return (key, comment) of each field and (None, text) of each heading, in order, base classes first.

    A comment-only line is a heading; a comment inside or behind a field that takes several lines belongs to the field.
    """
    found: list[tuple[str | None, str]] = []
    for base in filter(dataclasses.is_dataclass, reversed(config_class.__mro__)):
        source = textwrap.dedent(inspect.getsource(base))
        fields = [node for node in ast.parse(source).body[0].body if isinstance(node, ast.AnnAssign)]
        key_of_line = {line: node.target.id for node in fields for line in range(node.lineno, node.end_lineno + 1)}
        last_line = max((node.end_lineno for node in fields), default=0)
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type == tokenize.COMMENT and token.start[0] <= last_line:
                key, text = key_of_line.get(token.start[0]), token.string.lstrip("# ")
                if key is not None and found and found[-1][0] == key:
                    found[-1] = key, f"{found[-1][1]} {text}"
                else:
                    found.append((key, text))
    return found
