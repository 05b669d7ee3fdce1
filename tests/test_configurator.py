"""The command line: flags, config files, --help, one-line errors; and output that is safe for a terminal."""

import inspect
import io
import os
import re
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import configurator
from configurator import NonNegativeFloat, PositiveInt, Probability, Range, parse

import pytest
from launcher import TIMEOUT_SECONDS

import plot
import sample
import train
from nanogpt import errors
from nanogpt.errors import UserError

ROOT = Path(configurator.__file__).parent
RECIPES = sorted(path.name for path in (ROOT / "config").glob("*.py"))


@dataclass
class Config(configurator.Config):
    batch_size: PositiveInt = 12  # sequences
    max_iters: int = 100  # updates
    learning_rate: NonNegativeFloat = 6e-4  # maximum
    min_lr: float = 6e-5  # minimum
    dropout: Probability = 0.0  # probability
    seed: Annotated[int, Range(at_least=0, below=2**63)] = 1337  # random seed
    decay_lr: bool = True  # cosine schedule
    start: str = "\n"  # prompt
    dtype: Literal["float32", "bfloat16"] = "float32"  # number format
    compile: bool | Literal["auto"] = "auto"  # torch.compile
    top_k: int | None = 200  # most likely tokens


def config_file(folder: Path, source: str | bytes, name: str = "recipe.py") -> str:
    """Write a config file and return its path, as an argument."""
    path = folder / name
    path.write_bytes(source.encode() if isinstance(source, str) else source)
    return str(path)


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--learning_rate=1", 1.0),
        ("--learning_rate=3e-4", 0.0003),
        ("--min_lr=-0.5", -0.5),
        ("--max_iters=1e4", 10000),
        ("--max_iters=-3", -3),
        ("--decay_lr=False", False),
        ("--decay_lr=false", False),
        ("--decay_lr=0", False),
        ("--decay_lr=True", True),
        ("--decay_lr=true", True),
        ("--decay_lr=1", True),
        ("--start=1", "1"),
        ("--start=True", "True"),
        ("--start=", ""),
        ("--start=a=b=c", "a=b=c"),
        ("--start=--batch_size=4", "--batch_size=4"),
        ("--start=- dash", "- dash"),
        ("--start=two\nlines", "two\nlines"),
        ("--dtype=bfloat16", "bfloat16"),
        ("--compile=auto", "auto"),
        ("--compile=False", False),
        ("--top_k=None", None),
        ("--top_k=7", 7),
        ("--seed=9223372036854775807", 2**63 - 1),
    ],
)
def test_flag_has_the_type_of_its_key(flag: str, value: Any) -> None:
    """Catches a value read by its looks instead of the key's type."""
    key = flag[2:].partition("=")[0]
    found = getattr(parse(Config, [flag]), key)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--batch_size=abc"], ["--batch_size=abc", "whole number"]),
        (["--batch_size=3.5"], ["--batch_size=3.5", "whole number"]),
        (["--batch_size=True"], ["--batch_size=True", "whole number"]),
        (["--batch_size="], ["--batch_size", "whole number"]),
        (["--batch_size=1e400"], ["whole number"]),
        (["--batch_size=0"], ["--batch_size=0", "at least 1"]),
        (["--dropout=2"], ["--dropout=2", "at least 0", "below 1"]),
        (["--dropout=1"], ["--dropout=1", "below 1"]),
        (["--dropout=-0.1"], ["at least 0"]),
        (["--seed=-1"], ["--seed=-1", "at least 0"]),
        (["--seed=9223372036854775808"], ["--seed", "below"]),
        (["--learning_rate=nan"], ["--learning_rate=nan", "number"]),
        (["--learning_rate=inf"], ["--learning_rate=inf", "number"]),
        (["--decay_lr=maybe"], ["--decay_lr=maybe", "True or False"]),
        (["--decay_lr=2"], ["--decay_lr=2", "True or False"]),
        (["--dtype=float8"], ["--dtype=float8", "float32", "bfloat16"]),
        (["--compile=maybe"], ["True", "False", "auto"]),
        (["--batch=4"], ["batch", "did you mean --batch_size"]),
        (["--batch-size=4"], ["batch-size", "did you mean --batch_size"]),
        (["--learning_rat=4"], ["did you mean --learning_rate"]),
        (["--lr=4"], ["unknown key 'lr'", "did you mean --learning_rate"]),
        (["--epochs=4"], ["unknown key 'epochs'", "did you mean --max_iters"]),
        (["--wandb_entity=me"], ["unknown key 'wandb_entity'"]),
        (["--zzzzzz=4"], ["zzzzzz", "--help"]),
        (["--validate=4"], ["unknown key 'validate'"]),
        (["--given=4"], ["unknown key 'given'"]),
        (["--batch_size", "4"], ["--batch_size", "--key=value"]),
        (["--decay_lr"], ["--decay_lr", "--key=value"]),
        (["-batch_size=4"], ["two dashes"]),
        (["batch_size=4"], ["--batch_size=4"]),
        (["config/nowhere.py"], ["config/nowhere.py", "no such config file"]),
        (["config/train_shakespear_char.py"], ["did you mean config/train_shakespeare_char.py"]),
        (["config"], ["config", "no such config file"]),
    ],
)
def test_wrong_argument_is_refused(arguments: list[str], words: list[str]) -> None:
    """Catches a wrong argument that is accepted, or an error without the key, the value and the remedy."""
    with pytest.raises(UserError) as caught:
        parse(Config, arguments)
    assert [word for word in words if word not in str(caught.value)] == []


@pytest.mark.parametrize("key", [field.name for field in fields(Config)])
def test_keys_cannot_be_abbreviated(key: str) -> None:
    """Catches a prefix taken for the whole key, as argparse does."""
    with pytest.raises(UserError, match="unknown key"):
        parse(Config, [f"--{key[:-1]}=1"])


def test_arguments_apply_from_left_to_right(tmp_path: Path) -> None:
    """Catches all files read before all flags, or the reverse."""
    file = config_file(tmp_path, "batch_size = 2\nmax_iters = 2\n")
    other = config_file(tmp_path, "max_iters = 4\n", "other.py")
    config = parse(Config, ["--batch_size=1", "--max_iters=1", file, "--batch_size=3", other])
    assert (config.batch_size, config.max_iters) == (3, 4)
    assert parse(Config, ["--batch_size=5", file]).batch_size == 2
    assert parse(Config, ["--batch_size=5", "--batch_size=6"]).batch_size == 6


def test_config_file_sees_the_values_so_far(tmp_path: Path) -> None:
    """Catches a config file that runs on the defaults instead of the values so far."""
    file = config_file(tmp_path, "min_lr = learning_rate / 10\nlearning_rate = learning_rate * 2\nbatch_size += 1\n")
    config = parse(Config, ["--learning_rate=1", file, file])
    assert (config.min_lr, config.learning_rate, config.batch_size) == (0.2, 4.0, 14)


def test_config_file_may_compute(tmp_path: Path) -> None:
    """Catches imports, functions, classes and _names taken for keys."""
    source = """
import math
import os.path as path
from math import sqrt
from os.path import join
from pathlib import Path

class Shape:
    n = 3

def twice(number):
    return 2 * number

larger = lambda number: number + 1
_half = 0.5
batch_size = larger(twice(Shape.n))
learning_rate = _half * sqrt(4)
max_iters = 6e5
start = join("a", "b").replace(path.sep, "/")
for _i in range(3):
    seed = _i
"""
    config = parse(Config, [config_file(tmp_path, source)])
    assert (config.batch_size, config.learning_rate, config.max_iters) == (7, 1.0, 600000)
    assert (config.start, config.seed) == ("a/b", 2)
    assert config.given == {"batch_size", "learning_rate", "max_iters", "start", "seed"}


def test_included_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches imports of an included file that are taken for keys, and its settings that are lost."""
    base = config_file(
        tmp_path, "import os, time; from math import sqrt, pi\nbatch_size = int(sqrt(16))\nseed = 3\n", "base.py"
    )
    source = f"exec(open({base!r}).read())\nseed += 1\nglobals().update(max_iters=100)\nlearning_rate = pi\n"
    config = parse(Config, [config_file(tmp_path, source)])
    assert (config.batch_size, config.seed, config.learning_rate) == (4, 4, 3.141592653589793)
    assert config.given == {"batch_size", "seed", "max_iters", "learning_rate"}
    assert (config.ignored, capsys.readouterr().err) == ((), "")


def test_config_file_runs_as_inside_train_py(tmp_path: Path) -> None:
    """Catches a file of nanoGPT's that fails because it relies on what train.py imports, or on being the main script."""
    source = "start = str(math.ceil(time.time() * 0)) + os.sep\nif __name__ == '__main__':\n    seed = int(np.sum([1, 2]))\n"
    source += "def twice():\n    return 2 * math.floor(1.5)\n\nbatch_size = twice()\ndtype = str(torch.float32)[6:]\n"
    config = parse(Config, [config_file(tmp_path, source)])
    assert (config.start, config.seed, config.batch_size, config.dtype) == (f"0{os.sep}", 3, 2, "float32")


@pytest.mark.parametrize(
    ("source", "key", "value"),
    [
        ("from pathlib import Path\nstart = Path('a') / 'b'", "start", os.path.join("a", "b")),
        ("batch_size = np.int64(4)", "batch_size", 4),
        ("batch_size = np.array(4)", "batch_size", 4),
        ("batch_size = torch.tensor(4)", "batch_size", 4),
        ("learning_rate = np.float32(0.5)", "learning_rate", 0.5),
        ("learning_rate = np.float64(0.1)", "learning_rate", 0.1),
        ("learning_rate = np.int32(2)", "learning_rate", 2.0),
        ("decay_lr = np.bool_(False)", "decay_lr", False),
        ("start = np.str_('x')", "start", "x"),
        ("compile = 0", "compile", False),
        ("compile = 1", "compile", True),
        ("decay_lr = np.int64(0)", "decay_lr", False),
        ("start = 'x'\nstart = None", "start", "\n"),
        ("top_k = None", "top_k", None),
    ],
)
def test_value_in_a_file_is_what_it_stands_for(tmp_path: Path, source: str, key: str, value: Any) -> None:
    """Catches a path, a number of NumPy's, 0 for False or None for a default that is refused, or that keeps its type."""
    config = parse(Config, ["--start=y", config_file(tmp_path, source)])
    assert getattr(config, key) == value and type(getattr(config, key)) is type(value)
    assert key in config.given


def test_name_that_is_no_key_is_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a fork's config file that is refused, and a name that is passed over without a word."""
    source = "wandb_entity = 'me'\ndata_dir = 'data'\nuse_flash = True\nseeds = [1, 2]\nbatch_size = 4\n"
    other = config_file(tmp_path, "tensorboard = True\nuse_flash = False\n", "other.py")
    config = parse(FrozenConfig, [config_file(tmp_path, source), other])
    assert config.ignored == ("wandb_entity", "data_dir", "use_flash", "seeds", "batch_size", "tensorboard")
    (line,) = capsys.readouterr().err.splitlines()
    assert "not keys, ignored: wandb_entity, data_dir, use_flash, seeds, batch_size, tensorboard" in line
    changed = config.replace(["seed=3"], size="large")
    assert changed.ignored == (*config.ignored, "seed=3")


NO_KEYS = """beta3 betas compile_mode data_dir dataset2 device_id eval_batch_size exp_name flash label_smoothing log_dir loss
lr_scheduler mode n_experts n_kv_head num_workers patience2 rope_theta run_name seeds tag tensorboard tie_weights tokenizer
top_p type use_flash vocab_size wandb_entity wandb_group wandb_id wandb_name wandb_tags world_size"""
MISTYPED = {
    "learning_rate": "learnig_rate leraning_rate learning_rat learningrate lr LR max_lr",
    "block_size": "blocksize context_length seq_len ctx_len n_ctx contextlength",
    "batch_size": "batchsize batch_sze batch BATCH_SIZE",
    "max_iters": "max_iter maxiters steps max_steps num_steps epochs num_epochs",
    "n_layer": "n_layers num_layers n_layr",
    "n_head": "n_heads num_heads",
    "n_embd": "n_embed n_emb d_model hidden_size embed_dim",
    "weight_decay": "wd weightdecay",
    "warmup_iters": "warmup_steps warm_up_iters",
    "gradient_accumulation_steps": "grad_accum accumulation_steps gradient_acumulation_steps",
    "dtype": "precision dytpe",
    "out_dir": "output_dir outdir",
    "beta1": "beta_1",
}


def test_mistyped_names(tmp_path: Path) -> None:
    """Catches a typo or another name for a key that is passed over, and a name of a fork's own that is taken for one."""
    for name in NO_KEYS.split():
        config = parse(train.Config, [config_file(tmp_path, f"{name} = 1\n")])
        assert config.ignored == (name,)
    for key, names in MISTYPED.items():
        for name in names.split():
            with pytest.raises(UserError, match=f"unknown key '{name}'; did you mean {key}\\?"):
                parse(train.Config, [config_file(tmp_path, f"{name} = 1\n")])


def test_synonym_as_a_helper_variable(tmp_path: Path) -> None:
    """Catches a file that is refused although it sets the key itself, or holds what no key can be."""
    source = "lr = 1e-3\nlearning_rate = lr\nmin_lr = lr / 10\nbatch_sizes = [1, 2]\nbatch_size = batch_sizes[1]\nsteps = [5]\n"
    config = parse(Config, [config_file(tmp_path, source)])
    assert (config.learning_rate, config.batch_size, config.ignored) == (1e-3, 2, ("lr", "batch_sizes", "steps"))


def test_config_file_may_assign_in_a_function(tmp_path: Path) -> None:
    """Catches a value set through `global` that is silently dropped."""
    source = "def shrink():\n    global batch_size\n    batch_size = 3\n\nshrink()\n"
    assert parse(Config, [config_file(tmp_path, source)]).batch_size == 3


def test_given_holds_the_keys_that_were_set(tmp_path: Path) -> None:
    """Catches a default that counts as set, or a set value that equals the default and does not count."""
    file = config_file(tmp_path, "max_iters = 100\nstart = start\n")
    assert parse(Config, []).given == set()
    assert parse(Config, ["--batch_size=12", file]).given == {"batch_size", "max_iters", "start"}
    assert parse(Config, []).given == set()


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("batchsize = 4\n", ["recipe.py", "unknown key 'batchsize'", "did you mean batch_size"]),
        ("learnig_rate = 4\n", ["recipe.py", "unknown key 'learnig_rate'", "did you mean learning_rate"]),
        ("lr = 1e-3\n", ["recipe.py", "unknown key 'lr'", "did you mean learning_rate"]),
        ("import numpy\nnum_epoch = numpy.int64(5)\n", ["unknown key 'num_epoch'", "did you mean max_iters"]),
        ("BATCH_SIZE = 4\n", ["unknown key 'BATCH_SIZE'", "did you mean batch_size"]),
        ("batch_size = 0\n", ["recipe.py", "batch_size = 0", "at least 1"]),
        ("batch_size = '4'\n", ["recipe.py", "batch_size = '4'", "whole number"]),
        ("batch_size = True\n", ["recipe.py", "batch_size = True", "whole number"]),
        ("learning_rate = True\n", ["recipe.py", "learning_rate = True", "number"]),
        ("batch_size = len\n", ["recipe.py", "batch_size", "whole number"]),
        ("start = 1\n", ["recipe.py", "start = 1", "string"]),
        ("dtype = 'float8'\n", ["recipe.py", "dtype = 'float8'", "float32", "bfloat16"]),
        ("learning_rate = float('nan')\n", ["recipe.py", "learning_rate", "number"]),
        ("learning_rate = 10**400\n", ["recipe.py", "learning_rate", "number"]),
        ("learning_rate = [1e-3]\n", ["recipe.py", "learning_rate = [0.001]", "number"]),
        ("max_iters = None\n", ["recipe.py", "max_iters = None", "whole number"]),
        ("decay_lr = 2\n", ["recipe.py", "decay_lr = 2", "True or False"]),
        ("return\n", ["recipe.py", "line 1", "outside function"]),
        ("batch_size = 4\n\nmax_iters = = 5\n", ["recipe.py", "line 3", "invalid syntax"]),
        ("batch_size = 4\nmax_iters = 1 / 0\n", ["recipe.py", "line 2", "ZeroDivisionError"]),
        ("def f():\n    return nothing\n\nf()\n", ["recipe.py", "line 2", "nothing"]),
        ("import json\njson.loads('{')\n", ["recipe.py", "line 2", "JSONDecodeError"]),
        ("\nimport no_such_module\n", ["recipe.py", "line 2", "no_such_module"]),
        (b"start = 'caf\xe9'\n", ["recipe.py", "line 1"]),
        (b"batch_size = 4\0\n", ["recipe.py"]),
    ],
)
def test_wrong_config_file_is_refused(tmp_path: Path, source: str | bytes, words: list[str]) -> None:
    """Catches a mistake in a file that is ignored, or an error without the file and the line."""
    with pytest.raises(UserError) as caught:
        parse(Config, [config_file(tmp_path, source)])
    assert [word for word in words if word not in str(caught.value)] == []


def test_config_file_is_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a recipe that is only found from the repo's root, or that hides a person's own file."""
    monkeypatch.chdir(tmp_path)
    assert parse(train.Config, ["config/train_shakespeare_char.py"]).dataset == "shakespeare_char"
    (tmp_path / "config").mkdir()
    config_file(tmp_path / "config", "dataset = 'mine'\n", "train_shakespeare_char.py")
    assert parse(train.Config, ["config/train_shakespeare_char.py"]).dataset == "mine"


def test_n_head_must_divide_n_embd() -> None:
    """Catches a shape that fails deep in the model, or advice that does not help."""
    with pytest.raises(UserError, match=r"n_head=5 .*n_embd=64") as caught:
        parse(train.Config, ["--n_head=5", "--n_embd=64"])
    for advised in re.findall(r"n_head=(\d+)", str(caught.value))[1:]:
        assert 64 % int(advised) == 0
    assert parse(train.Config, ["--n_head=5", "--n_embd=64", "--init_from=resume"]).n_head == 5


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_fits_train_py(name: str) -> None:
    """Catches a recipe with a key or a value that train.py refuses."""
    config = parse(train.Config, [f"config/{name}"])
    assert {"batch_size", "init_from", "dataset"} & config.given


def test_nanogpt_recipes_exist() -> None:
    """Catches a removed or renamed recipe that people's commands name."""
    assert set(RECIPES) >= {
        "eval_gpt2.py",
        "eval_gpt2_medium.py",
        "eval_gpt2_large.py",
        "eval_gpt2_xl.py",
        "finetune_shakespeare.py",
        "train_gpt2.py",
        "train_shakespeare_char.py",
    }


def test_nanogpt_laptop_command() -> None:
    """Catches a change that breaks nanoGPT's best-known command."""
    command = (
        "config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 --log_interval=1 --block_size=64 "
        "--batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0"
    )
    config = parse(train.Config, command.split())
    expected = {
        "device": "cpu",
        "compile": False,
        "eval_iters": 20,
        "block_size": 64,
        "n_layer": 4,
        "max_iters": 2000,
        "dropout": 0.0,
        "out_dir": "out-shakespeare-char",
        "dataset": "shakespeare_char",
        "learning_rate": 1e-3,
        "min_lr": 1e-4,
        "beta2": 0.99,
        "warmup_iters": 100,
        "gradient_accumulation_steps": 1,
        "always_save_checkpoint": False,
    }
    assert {key: getattr(config, key) for key in expected} == expected


def test_nanogpt_defaults() -> None:
    """Catches a default that differs from nanoGPT's train.py."""
    expected = {
        "out_dir": "out",
        "eval_interval": 2000,
        "log_interval": 1,
        "eval_iters": 200,
        "eval_only": False,
        "always_save_checkpoint": True,
        "init_from": "scratch",
        "wandb_log": False,
        "wandb_project": "owt",
        "wandb_run_name": "gpt2",
        "dataset": "openwebtext",
        "gradient_accumulation_steps": 40,
        "batch_size": 12,
        "block_size": 1024,
        "n_layer": 12,
        "n_head": 12,
        "n_embd": 768,
        "dropout": 0.0,
        "bias": False,
        "learning_rate": 6e-4,
        "max_iters": 600000,
        "weight_decay": 1e-1,
        "beta1": 0.9,
        "beta2": 0.95,
        "grad_clip": 1.0,
        "decay_lr": True,
        "warmup_iters": 2000,
        "lr_decay_iters": 600000,
        "min_lr": 6e-5,
    }
    config = parse(train.Config, [])
    assert {key: getattr(config, key) for key in expected} == expected


@pytest.mark.parametrize("script", [train, sample, plot], ids=["train", "sample", "plot"])
def test_help_lists_every_key(script: Any) -> None:
    """Catches a key without help, or with the help of another."""
    page = " ".join(configurator.help_text(script.Config, f"{script.__name__}.py").split())
    source = inspect.getsource(script.Config)
    for field in fields(script.Config):
        (comment,) = re.findall(rf"^    {field.name}: .*?  # (.+)$", source, re.MULTILINE)
        assert re.search(rf"--{field.name}=<[^>]+>  ?\[[^]]*\] {re.escape(comment)}( |$)", page), field.name


@dataclass(frozen=True)
class FrozenConfig(configurator.Config):
    # first heading
    size: Literal[
        "small",  # the first
        "large",  # the second
    ] = "small"
    # second heading
    seed: int = 1  # random seed


def test_help_of_a_field_over_several_lines() -> None:
    """Catches a comment inside a field that becomes a heading, or is lost."""
    page = configurator.help_text(FrozenConfig, "script.py")
    headings = [line for line in page.splitlines() if line.endswith(":") and "heading" in line]
    assert headings == ["first heading:", "second heading:"]
    assert "the first the second" in page


def test_replace_keeps_what_was_given() -> None:
    """Catches a copy that takes given keys for defaults, and a config that can be changed in place."""
    config = parse(FrozenConfig, ["--seed=2"])
    changed = config.replace(size="large")
    assert (changed.size, changed.seed, changed.given) == ("large", 2, {"seed"})
    assert (config.size, config.given) == ("small", {"seed"})
    with pytest.raises(AttributeError):
        config.seed = 3


def test_positional_arguments() -> None:
    """Catches a run folder taken for a config file, or one that replaces the one before it."""
    for arguments in (["a", "b/c"], ["--runs=a", "b/c"]):
        config = configurator.parse(plot.Config, [*arguments, "--x=tokens"])
        assert (config.runs, config.x, config.given) == ("a\nb/c", "tokens", {"runs", "x"})
    assert "usage: python plot.py [runs ...]" in configurator.help_text(plot.Config, "plot.py")


def test_positional_argument_beside_a_config_file(tmp_path: Path) -> None:
    """Catches a config file taken for a run, and a run whose name is joined to a default."""
    file = config_file(tmp_path, "num_samples = 2\n")
    for arguments in (["out-x", file], [file, "out-x"], ["out-x", "--num_samples=2"]):
        config = parse(sample.Config, arguments)
        assert (config.init_from, config.num_samples, config.given) == ("out-x", 2, {"init_from", "num_samples"})
    with pytest.raises(UserError, match="two dashes: --num_samples=2"):
        parse(sample.Config, ["num_samples=2"])


def test_positional_argument_named_like_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches the default run folder, out, refused because it is also a key."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="two dashes: --out"):
        parse(plot.Config, ["out"])
    (tmp_path / "out").mkdir()
    (tmp_path / "seed").write_bytes(b"")
    assert parse(plot.Config, ["out", "--x=tokens"]).runs == "out"
    assert parse(sample.Config, ["seed"]).init_from == "seed"
    with pytest.raises(UserError, match=r"two dashes: --out=a\.png"):
        parse(plot.Config, ["out=a.png"])


def test_help_shows_type_and_default() -> None:
    """Catches a --help page with a wrong type or default."""
    page = " ".join(configurator.help_text(Config, "script.py").split())
    assert "usage: python script.py" in page
    for shown in (
        "--batch_size=<int> [12] sequences",
        "--learning_rate=<float> [0.0006] maximum",
        "--decay_lr=<bool> [True] cosine schedule",
        r"--start=<str> ['\n'] prompt",
        "--dtype=<float32|bfloat16> [float32] number format",
        "--compile=<bool|auto> [auto] torch.compile",
        "--top_k=<int|None> [200] most likely tokens",
    ):
        assert shown in page


SCRIPT = '''\
"""A script that fails on demand.

A second paragraph.
"""
from dataclasses import dataclass
from pathlib import Path
import configurator
from nanogpt.errors import UserError

@dataclass
class Config(configurator.Config):
    fail: str = ""  # how to fail

def main(config):
    print("started", flush=True)
    if config.fail == "user":
        raise UserError("the thing\\nis \\x1b[31m wrong")
    if config.fail == "file":
        Path("nowhere/at-all.txt").read_bytes()
    if config.fail == "system":
        raise OSError("no room")
    if config.fail == "bug":
        [][0]

if __name__ == "__main__":
    configurator.run(main, Config)
'''


NANOGPT_SCRIPT = """\
run = 3
batch_size = 12
learning_rate = 6e-4
compile = True
dataset = "openwebtext"
betas = (0.9, 0.95)
config_keys = [k for k, v in globals().items() if not k.startswith("_") and isinstance(v, (int, float, bool, str))]
exec(open(PATH).read())
config = {k: globals()[k] for k in config_keys}
print(config, betas)
assert "parse" not in globals() and "Config" not in globals()
"""


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        ([], {}),
        (["--batch_size=4", "--compile=False", "--dataset=x=y"], {"batch_size": 4, "compile": False, "dataset": "x=y"}),
        (["--learning_rate=1", "--run=7", "--compile=0"], {"learning_rate": 1.0, "run": 7, "compile": False}),
        (["--batch_size=4", "FILE", "--run=1"], {"batch_size": 8, "run": 1, "dataset": "mine"}),
        (["--betas=(0.8, 0.9)"], {"betas": (0.8, 0.9)}),
        (["--batch_sise=4"], "unknown key 'batch_sise' in --batch_sise=4; did you mean --batch_size?"),
        (["--parse=4"], "unknown key 'parse' in --parse=4"),
        (["--batch_size=four"], "--batch_size=four: not a whole number"),
        (["--betas=3"], "--betas=3: must be a Python tuple"),
        (["--batch_size"], "--batch_size: write --key=value"),
        (["nowhere.py"], "nowhere.py: no such config file"),
    ],
)
def test_script_that_runs_the_configurator(tmp_path: Path, monkeypatch, capsys, arguments: list, found: Any) -> None:
    """Catches a script in nanoGPT's style whose flags are ignored, or whose own variables are overwritten."""
    file = config_file(tmp_path, "batch_size *= 2\ndataset = 'mine'\nentity = 3\n")
    arguments = [file if argument == "FILE" else argument for argument in arguments]
    monkeypatch.setattr(sys, "argv", ["my_train.py", *arguments])
    source = NANOGPT_SCRIPT.replace("PATH", repr(configurator.__file__))
    variables = {"__name__": "__main__", "__file__": "my_train.py"}
    if isinstance(found, str):
        with pytest.raises(SystemExit) as caught:
            exec(source, variables)
        assert caught.value.code == 1 and found in capsys.readouterr().err
        return
    exec(source, variables)
    defaults = {"run": 3, "batch_size": 12, "learning_rate": 6e-4, "compile": True, "dataset": "openwebtext"}
    expected = {"betas": (0.9, 0.95)} | defaults | found
    assert {name: variables[name] for name in expected} == expected
    assert variables["config"] == {name: expected[name] for name in defaults}


def test_configurator_is_no_command() -> None:
    """Catches a configurator that prints nothing if it is run itself."""
    finished = subprocess.run([sys.executable, "configurator.py"], cwd=ROOT, capture_output=True, encoding="utf-8")
    assert finished.returncode == 1 and "configurator.py: error: not a command; python train.py --help" in finished.stderr


def run_script(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    (folder / "script.py").write_text(SCRIPT, encoding="utf-8")
    return subprocess.run(
        [sys.executable, "script.py", *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        encoding="utf-8",
        timeout=TIMEOUT_SECONDS,
    )


@pytest.mark.parametrize(
    ("argument", "line"),
    [
        ("--fail=user", "script.py: error: the thing is  [31m wrong\n"),
        ("--fail=file", "script.py: error: nowhere/at-all.txt: No such file or directory\n"),
        ("--fial=user", "script.py: error: unknown key 'fial' in --fial=user; --help lists all keys; did you mean --fail?\n"),
        ("a\nb.py", "script.py: error: a b.py: no such config file\n"),
    ],
)
def test_user_error_is_one_line(tmp_path: Path, argument: str, line: str) -> None:
    """Catches a traceback, a second line, or exit status 0 for a person's mistake."""
    process = run_script(tmp_path, argument)
    assert (process.returncode, process.stderr) == (1, line)


@pytest.mark.parametrize("argument", ["--fail=bug", "--fail=system"])
def test_bug_keeps_its_traceback(tmp_path: Path, argument: str) -> None:
    """Catches a bug reported as a person's mistake."""
    process = run_script(tmp_path, argument)
    assert process.returncode == 1
    assert process.stderr.startswith("Traceback") and "in main" in process.stderr


def test_command_runs_and_helps(tmp_path: Path) -> None:
    """Catches a --help that starts the work, or fails."""
    process = run_script(tmp_path)
    assert (process.returncode, process.stdout, process.stderr) == (0, "started\n", "")
    process = run_script(tmp_path, "--fail=bug", "--help")
    assert (process.returncode, process.stderr) == (0, "")
    assert "started" not in process.stdout and "how to fail" in process.stdout


def test_check_value() -> None:
    """Catches a value from a checkpoint with a wrong type or range."""
    assert configurator.check_value(Config, "learning_rate", 1, "ckpt.pt") == 1.0
    with pytest.raises(UserError, match=r"ckpt.pt: batch_size = 0: must be at least 1"):
        configurator.check_value(Config, "batch_size", 0, "ckpt.pt")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    "stream, expected", [(Terminal, "a\n\t\ufffd[2Jb\ufffd\ufffd\ufffdé"), (io.StringIO, "a\n\t\x1b[2Jb\x07\x9b\ré")]
)
def test_terminal_gets_no_control_characters(stream: type, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a sample that clears the screen, and a file without the characters that the model wrote."""
    monkeypatch.setattr("sys.stdout", stream())
    errors.write("a\n\t\x1b[2Jb\x07\x9b\ré")
    assert sys.stdout.getvalue() == expected


def test_unencodable_characters_are_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a UnicodeEncodeError on a terminal that is not UTF-8."""
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", out)
    monkeypatch.setattr("sys.argv", ["train.py"])
    configurator.run(lambda config: print("na\u00efve"), Config)
    out.flush()
    assert out.buffer.getvalue().split() == [b"na?ve"]


@pytest.mark.parametrize(
    ("environment", "spin"),
    [({}, "2000"), ({"GOMP_SPINCOUNT": "5"}, "5"), ({"OMP_WAIT_POLICY": "active"}, None)],
)
def test_waiting_threads_sleep_soon(environment: dict[str, str], spin: str | None) -> None:
    """Catches threads that keep the cores of a busy machine while they wait, and a user's own choice that is overridden."""
    configurator.wait_briefly(environment)

    assert environment.get("GOMP_SPINCOUNT") == spin


@pytest.mark.parametrize("path", sorted(ROOT.glob("*.py")), ids=lambda path: path.name)
def test_configurator_is_imported_before_torch(path: Path) -> None:
    """Catches a command whose import of torch comes first: OpenMP then never reads what `wait_briefly` has set."""
    source = path.read_text(encoding="utf-8")

    imports = re.findall(r"^(?:import|from) (configurator|torch|model|nanogpt\.(?!errors)\w+)\b", source, re.MULTILINE)

    assert "configurator" not in imports or imports[0] == "configurator"
