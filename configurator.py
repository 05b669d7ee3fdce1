"""Merge a command's defaults, config files and --key=value flags into one checked config.

A command describes its keys as a dataclass, one field per line; the trailing comment is the key's help:

    @dataclass(frozen=True)
    class Config(configurator.Config):
        batch_size: PositiveInt = 12  # sequences per micro-batch
        device: Literal["auto", "cpu"] = "auto"  # device to train on

    if __name__ == "__main__":
        configurator.run(main, Config)

`python script.py config/a.py --batch_size=4 config/b.py` applies its arguments from left to right. A config file is plain
Python: it sees the values so far, and the keys that it assigns are set. A script of another kind, whose settings are its
global variables, may run this file as nanoGPT's scripts do: `exec(open("configurator.py").read())`; see `override`.
"""

if __name__ == "__main__":  # run by exec, in a script's globals
    _script = dict(globals())  # the script's own variables

import ast
import atexit
import builtins
import contextlib
import dataclasses
import difflib
import importlib.util
import inspect
import io
import math
import os
import re
import shlex
import signal
import sys
import textwrap
import tokenize
import traceback
import types
import typing
from collections.abc import Callable, Iterable, MutableMapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NoReturn

from nanogpt.errors import UserError, one_line, rank, warn

ROOT = Path(inspect.getfile(UserError)).resolve().parents[1]
# what nanoGPT's config files need not import, since they run inside its train.py
NANOGPT_IMPORTS = {"np": "numpy"} | {name: name for name in ("os", "sys", "time", "math", "pickle", "torch")}
SPIN_TURNS = 2_000  # of a waiting thread before it sleeps; the next operation usually comes within that
SYNONYMS = {  # other people's names for a key, which are never passed over: the run would not be the one that was meant
    "out_dir": "output_dir outdir output_folder",
    "dataset": "dataset_name",
    "gradient_accumulation_steps": "grad_accum grad_accum_steps accum_steps accumulation_steps gradient_accumulation",
    "batch_size": "batch bs bsz micro_batch_size train_batch_size per_device_batch_size",
    "block_size": "context context_len context_length context_size context_window ctx ctx_len ctx_size n_ctx n_positions "
    "seq_len seq_length sequence_length max_length max_seq_len max_seq_length",
    "n_layer": "layers n_layers num_layer num_layers n_blocks num_blocks num_hidden_layers depth",
    "n_head": "heads n_heads num_head num_heads num_attention_heads",
    "n_embd": "d_model dim_model model_dim embed_dim emb_dim embd_dim embedding_dim hidden_dim hidden_size n_embed",
    "dropout": "dropout_p dropout_rate drop_rate",
    "bias": "use_bias",
    "learning_rate": "lr base_lr max_lr peak_lr max_learning_rate",
    "max_iters": "iters n_iters num_iters total_iters train_iters iterations max_iterations num_iterations "
    "steps n_steps num_steps max_steps total_steps train_steps epochs n_epochs num_epochs max_epochs",
    "weight_decay": "wd",
    "beta1": "adam_beta1",
    "beta2": "adam_beta2",
    "grad_clip": "clip clip_grad clip_grad_norm grad_clip_norm gradient_clip gradient_clipping max_grad_norm",
    "warmup_iters": "warmup warmup_steps num_warmup_steps",
    "lr_decay_iters": "decay_iters decay_steps lr_decay_steps",
    "min_lr": "lr_min end_lr final_lr min_learning_rate",
    "eval_interval": "eval_every eval_freq eval_steps val_interval",
    "seed": "random_seed",
    "dtype": "precision mixed_precision",
}


def _not_installed(package: str) -> str:
    return (
        f"{package} is not installed in this Python ({sys.executable}): activate the environment with "
        "'source .venv/bin/activate' ('make' creates it), or run 'pip install -r requirements.txt'"
    )


def wait_briefly(environment: MutableMapping[str, str]) -> None:
    """Let OpenMP's threads sleep soon while they wait for each other, unless `environment` already says how they wait.

    GNU's OpenMP, which PyTorch has on Linux, reads this when torch is imported. Its 300,000 turns keep a core from the thread
    that is waited for, if other programs need the cores, too.
    """
    if "OMP_WAIT_POLICY" not in environment:
        environment.setdefault("GOMP_SPINCOUNT", str(SPIN_TURNS))


wait_briefly(os.environ)
for _package in ("torch", "numpy", "tqdm"):  # imported by the commands right after this module
    if importlib.util.find_spec(_package) is None:
        sys.exit(f"{Path(sys.argv[0]).name}: error: {_not_installed(_package)}")


class Config:
    """Base class of every command's config."""

    given: ClassVar[frozenset[str]] = frozenset()  # the keys that a file or a flag has set, on each instance
    ignored: ClassVar[tuple[str, ...]] = ()  # names in config files that are no keys, and settings that a checkpoint overrides
    positional: ClassVar[str] = ""  # the key of arguments that are neither flags nor .py files; "": none
    takes_several: ClassVar[bool] = False  # of these, joined by line breaks

    def validate(self) -> None:
        """Check the keys together. Raises UserError if they do not fit."""

    def replace(self, ignored: Iterable[str] = (), **values: Any) -> "Config":
        """Return a copy with other values and the same `given`; `ignored` names are added to those of this config."""
        return _with_notes(dataclasses.replace(self, **values), self.given, (*self.ignored, *ignored))


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


def _expand_prompt(text: str) -> str:
    name = text.removeprefix("FILE:")
    return text if name == text else f"FILE:{os.path.expanduser(name)}"


PathStr = Annotated[str, os.path.expanduser]  # a path: a leading ~ becomes the home folder, which shells do not do after =
PromptStr = Annotated[str, _expand_prompt]  # text, or FILE:path


def parse(config_class: type, arguments: list[str]) -> Any:
    """Return a `config_class` with its defaults overridden by `arguments`, from left to right.

    `config.given` holds the keys that were set, `config.ignored` the names in config files that are no keys; a warning
    lists these. Raises UserError if a key or a value is wrong.
    """
    kinds = typing.get_type_hints(config_class, include_extras=True)
    defaults = dataclasses.asdict(config_class())
    values, keys, positional = dict(defaults), list(defaults), config_class.positional
    given: set[str] = set()
    ignored: dict[str, None] = {}
    for argument in arguments:
        name, equals, text = argument.removeprefix("--").partition("=")
        is_plain = not argument.startswith("-") and Path(argument).suffix != ".py"
        if argument.startswith("--"):
            if not equals:
                raise UserError(f"{argument}: write --key=value, with no spaces around '='{_hint(name, keys, '--{}=...')}")
            if name not in keys:
                raise UserError(f"unknown key '{name}' in {argument}; --help lists all keys{_hint(name, keys, '--{}')}")
            updates = {name: _check(argument, text, kinds[name], is_text=True)}
        elif positional and is_plain and (name not in keys or os.path.exists(argument)):  # a run may be called like a key: out
            if positional in given and not config_class.takes_several:
                raise UserError(f"{argument}: only one {positional} is taken, got {values[positional]!r}, too")
            argument = os.path.expanduser(argument)
            updates = {positional: f"{values[positional]}\n{argument}" if positional in given else argument}
        else:
            updates, unknown = {}, {}
            for name, value in _run_config_file(_find_config_file(argument, keys), argument, values).items():
                if name not in keys:
                    unknown[name] = value
                    continue
                value = defaults[name] if value is None and kinds[name] in (str, PathStr, PromptStr) else value
                updates[name] = _check(f"{argument}: {name} = {value!r}", value, kinds[name], is_text=False)
            _refuse_mistyped(argument, unknown, [key for key in keys if key not in updates])
            ignored.update(dict.fromkeys(unknown))
        values.update(updates)
        given.update(updates)
    if ignored:
        warn(f"not keys, ignored: {', '.join(ignored)}; --help lists all keys")
    config = _with_notes(config_class(**values), frozenset(given), tuple(ignored))
    config.validate()
    return config


def _refuse_mistyped(file: str, unknown: dict[str, Any], keys: list[str]) -> None:
    """Raise UserError if a name in a config file means one of `keys`, those that the file does not set."""
    for name, value in unknown.items():
        meant = _meant(name, keys)
        if meant and isinstance(_plain(value), (bool, int, float, str)):  # no key holds a list, say
            raise UserError(f"{file}: unknown key '{name}'; did you mean {meant}? Start a name that is not a key with _")


def _with_notes(config: Config, given: frozenset[str], ignored: tuple[str, ...]) -> Config:
    object.__setattr__(config, "given", given)  # configs are frozen
    object.__setattr__(config, "ignored", ignored)
    return config


def check_value(config_class: type, key: str, value: Any, source: str) -> Any:
    """Return `value`, read from `source`, as the type of `key`. Raises UserError if it does not fit."""
    kind = typing.get_type_hints(config_class, include_extras=True)[key]
    return _check(f"{source}: {key} = {value!r}", value, kind, is_text=False)


def run(main: Callable[[Any], None], config_class: type) -> None:
    """Parse the command line and call `main` with the config: the `if __name__ == "__main__"` of every command.

    A UserError, a missing package, or an OSError with a file's name ends the process with one line on stderr and status 1. Any
    other exception is a bug and keeps its traceback. Ctrl-C, and SystemExit(128 + n) in `main` after signal n, end the process
    by that signal; see `_end_by`.
    """
    _open_closed_streams()
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
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if not package or importlib.util.find_spec(package) is not None:
            raise
        _exit(_not_installed(package))
    except BrokenPipeError:  # the reader of our output, such as `head`, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        if error.filename is None:
            raise
        _exit(f"{error.filename}: {error.strerror}")
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        _end_by(signal.SIGINT)
    except SystemExit as error:
        if isinstance(error.code, int) and error.code - 128 in signal.valid_signals():
            _end_by(error.code - 128)
        raise


def help_text(config_class: type, script: str) -> str:
    """Return the --help page: each key's type, default and comment, under the headings in the class."""
    kinds = typing.get_type_hints(config_class, include_extras=True)
    defaults = dataclasses.asdict(config_class())
    plain = f"[{config_class.positional} ...] " if config_class.positional else ""
    lines = [f"usage: python {script} {plain}[config/file.py ...] [--key=value ...]", ""]
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


def _open_closed_streams() -> None:
    """Open the null device for each standard stream that the caller has closed (`2>&-`), which is None in Python.

    It takes the stream's descriptor, the lowest free one, which else went to the next file to be opened: to a checkpoint that
    then contains what a library prints.
    """
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            stream = open(os.devnull, "r" if name == "stdin" else "w", encoding="utf-8")
            os.set_inheritable(stream.fileno(), True)
            setattr(sys, name, stream)


def _exit(message: str) -> NoReturn:
    script = Path(sys.argv[0]).name + ("" if rank() in ("", "0") else f" [rank {rank()}]")
    print(f"{script}: error: {one_line(message)}", file=sys.stderr)
    sys.exit(1)


def _end_by(number: int) -> NoReturn:
    """End the process by signal `number`, once everything is closed and flushed: what shells and wandb's agent expect.

    Ranks of torchrun or a cluster exit with status 128 + `number` instead, as does PID 1 of a container, which ignores the
    signal, and a process on Windows, which has none.
    """
    if os.name == "posix" and not rank():
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)  # returns in PID 1
    sys.exit(128 + number)


def override(script: dict[str, Any], variables: dict[str, Any]) -> None:
    """Override a script's global variables by the command line, with nanoGPT's rules; a mistake ends it with one line.

    `script` are the globals in which this file was run by exec, of which only `variables` are the script's own. A config
    file is executed in them; the value of a flag is a Python literal or a string, of the variable's type.
    """
    script.clear()
    script.update(variables)
    try:
        if Path(script.get("__file__", "")).name == Path(__file__).name:
            raise UserError("not a command; python train.py --help shows what a command takes")
        for argument in sys.argv[1:]:
            _override(script, argument)
    except UserError as error:
        _exit(str(error))


def _override(script: dict[str, Any], argument: str) -> None:
    keys = [name for name, value in script.items() if isinstance(value, (bool, int, float, str))]
    key, equals, text = argument.removeprefix("--").partition("=")
    if not argument.startswith("--"):
        source = _find_config_file(argument, keys).read_bytes()
        print(f"Overriding config with {argument}:\n{source.decode(errors='replace')}")
        exec(compile(source, argument, "exec"), script)
        return
    if not equals:
        raise UserError(f"{argument}: write --key=value, with no spaces around '='{_hint(key, keys, '--{}=...')}")
    if key not in script:
        raise UserError(f"unknown key '{key}' in {argument}{_hint(key, keys, '--{}')}")
    try:
        value = ast.literal_eval(text)
    except (SyntaxError, ValueError):
        value = text
    kind = type(script[key])
    if type(value) is not kind:
        if kind not in (bool, int, float, str):
            raise UserError(f"{argument}: must be a Python {kind.__name__}")
        value = _check(argument, text, kind, is_text=True)
    print(f"Overriding: {key} = {value}")
    script[key] = value


class _Namespace(dict):
    """The variables of a config file. Records assignments, even of an unchanged value, and what is imported from modules."""

    def __init__(self, values: dict[str, Any]):
        modules = {name: sys.modules[module] for name, module in NANOGPT_IMPORTS.items() if module in sys.modules}
        super().__init__(values, __builtins__={**vars(builtins), **modules, "__import__": self._import})
        self.assigned: dict[str, None] = {}
        self.imported: set[str] = set()

    def __setitem__(self, name: str, value: Any) -> None:
        self.assigned[name] = None
        super().__setitem__(name, value)

    update = MutableMapping.update  # by __setitem__

    def _import(self, name: str, scope: Any = None, local: Any = None, names: tuple | None = (), level: int = 0) -> Any:
        self.imported.update(names or ())
        return __import__(name, scope, local, names, level)


def _find_config_file(argument: str, keys: list[str]) -> Path:
    if argument.startswith("-"):
        raise UserError(f"{argument}: flags start with two dashes, as in --key=value")
    for path in (Path(argument), ROOT / argument):
        if path.is_file() and path.suffix != ".pt":
            return path
    key = argument.partition("=")[0]
    if key in keys:
        raise UserError(f"{argument}: a key needs two dashes: --{argument}")
    if Path(argument).exists() and "init_from" in keys:
        run = shlex.quote(argument)
        resumes = f"--init_from=resume --out_dir={run} continues a run, " if Path(argument).is_dir() else ""
        raise UserError(f"{argument}: not a config file; {resumes}--init_from={run} starts from its weights")
    names = sorted(path.stem for path in (ROOT / "config").glob("*.py"))
    raise UserError(f"{argument}: no such config file{_hint(Path(argument).stem, names, 'config/{}.py')}")


def _run_config_file(path: Path, shown: str, values: dict[str, Any]) -> dict[str, Any]:
    """Execute a config file on top of `values`; return its assignments, without imports, functions, classes and _names.

    As in nanoGPT, it may exec other files, and finds in its namespace what train.py imports.
    """
    try:
        code = compile(path.read_bytes(), str(path), "exec")
    except SyntaxError as error:
        raise UserError(f"{shown}, line {error.lineno or 1}: {error.msg}") from error
    except (ValueError, RecursionError, MemoryError) as error:  # null bytes, endless brackets
        raise UserError(f"{shown}: not a Python file ({error or type(error).__name__})") from error
    namespace = _Namespace({**values, "__name__": "__main__", "__file__": str(path)})
    try:
        exec(code, namespace)
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        line = [frame.lineno for frame in frames if frame.filename == str(path)][-1]
        raise UserError(f"{shown}, line {line}: {type(error).__name__}: {error}") from error
    changed = (name for name in values if name in namespace and namespace[name] is not values[name])  # by `global`
    names = dict.fromkeys([*namespace.assigned, *changed])
    assigned = {name: namespace[name] for name in names if name in namespace and not name.startswith("_")}
    return {
        name: value
        for name, value in assigned.items()
        if name in values or not (name in namespace.imported or isinstance(value, types.ModuleType) or callable(value))
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
    return limits(value) if callable(limits) else value


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
    value = _plain(value)
    for member in _members(kind):
        if typing.get_origin(member) is Literal:
            if isinstance(value, str) and value in typing.get_args(member):
                return value
        elif member is int and isinstance(value, float) and value.is_integer():
            return int(value)  # 6e5
        elif member is bool and isinstance(value, int) and value in (0, 1):
            return bool(value)
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


def _plain(value: Any) -> Any:
    """Return a path as a string, and a number of NumPy's or a tensor without dimensions as Python's; others as they are."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value.item() if getattr(value, "ndim", None) == 0 else value


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


def _hint(name: str, known: list[str], form: str) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    meant = _meant(name, known) or (close[0] if close else None)
    return f"; did you mean {form.format(meant)}?" if meant else ""


def _meant(name: str, keys: list[str]) -> str | None:
    """Return the key that `name` means: it is within two edits of the key or of a synonym; one below 8 letters, none below 5.

    Names that differ in their digits are different names: beta3, dataset2.
    """
    name = name.lower()
    known = {other: key for key in keys for other in (key, *SYNONYMS.get(key, "").split())}
    for edits in range(3):
        for other, key in known.items():
            shorter = min(len(name), len(other))
            same_digits = re.findall(r"\d", name) == re.findall(r"\d", other)
            if edits <= (shorter >= 5) + (shorter >= 8) and same_digits and _within(edits, name, other):
                return key
    return None


def _within(edits: int, a: str, b: str) -> bool:
    """Whether `a` becomes `b` by at most `edits` characters added, removed, replaced or swapped with their neighbour."""
    if edits == 0:
        return a == b
    if not a or not b:
        return len(a + b) <= edits
    if a[0] == b[0]:
        return _within(edits, a[1:], b[1:])
    rests = [(a[1:], b), (a, b[1:]), (a[1:], b[1:])]
    if a[:2] == b[1::-1]:
        rests.append((a[2:], b[2:]))
    return any(_within(edits - 1, *rest) for rest in rests)


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


if __name__ == "__main__":
    importlib.import_module("configurator").override(globals(), _script)  # the module's functions do not use these globals
