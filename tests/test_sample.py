"""Sampling: prompts, what is printed, and that a checkpoint is all it needs."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import configurator
import sample
import train
from model import GPT, Bigram, GPTConfig
from nanogpt import checkpoint, errors
from nanogpt.errors import UserError
from nanogpt.tokenizer import CharTokenizer, TiktokenTokenizer, Tokenizer

TABLE = CharTokenizer(list("abcdefghij\n"))
LINE = "---------------\n"


class Words:
    """An encoding of forty words and the end of a text, in place of a vocabulary that would have to be downloaded."""

    n_vocab = 41
    eot_token = 40

    def encode(self, text: str, **special: Any) -> list[int]:
        return [int(word) for word in text.split()]

    def decode_single_token_bytes(self, token: int) -> bytes:
        return f"{token} ".encode()


@pytest.fixture
def words(monkeypatch: pytest.MonkeyPatch) -> TiktokenTokenizer:
    monkeypatch.setattr(TiktokenTokenizer, "_encoding", Words())
    return TiktokenTokenizer("gpt2", Words.n_vocab)


def write(out_dir: Path, tokenizer: Tokenizer, kind: type = GPT, **weights: torch.Tensor) -> Path:
    """A run folder with the checkpoint of a small random model, or of one with these weights; returns the folder."""
    torch.manual_seed(1)
    shape = {"block_size": 8, "n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": tokenizer.model_vocab_size}
    model = kind(GPTConfig(**shape))
    model.load_state_dict(model.state_dict() | weights)
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    state = checkpoint.pack(model, optimizer, 10, 2.5, {"dataset": "gone"}, {"tokenizer": tokenizer.to_dict()})
    out_dir.mkdir()
    checkpoint.save(out_dir / checkpoint.BEST, state)
    return out_dir


@pytest.fixture
def out_dir(tmp_path: Path) -> Path:
    return write(tmp_path / "out", TABLE)


@pytest.fixture
def texts(capsys: pytest.CaptureFixture[str]):
    """A function that samples as the command with these flags would, and returns the texts."""

    def run(**flags: Any) -> list[str]:
        flags = {"device": "cpu"} | flags
        sample.main(configurator.parse(sample.Config, [f"--{key}={value}" for key, value in flags.items()]))
        *found, rest = capsys.readouterr().out.split("\n" + LINE)
        assert rest == ""
        return found

    return run


@pytest.mark.parametrize(
    "start, given, ids",
    [
        ("\n", False, [10]),  # the default
        ("abba", True, [0, 1, 1, 0]),
        ("a\nb", True, [0, 10, 1]),
        ("", True, [10]),  # nothing is as after a line break
    ],
)
def test_prompt_of_characters(start, given, ids):
    """A prompt that is changed on its way, or an empty one, of which the model can make nothing."""
    assert sample.read_prompt(start, given, TABLE) == (start, ids)


@pytest.mark.parametrize("start, given", [("\n", False), ("", True)])
def test_no_prompt_where_the_table_has_no_line_break(start, given):
    """A default that cannot be encoded, for which nobody has asked."""
    assert sample.read_prompt(start, given, CharTokenizer(list("abc"))) == ("", [0])


@pytest.mark.parametrize("start, given, ids", [("3 1", True, [3, 1]), ("", True, [40])])
def test_prompt_of_words(words, start, given, ids):
    """An empty prompt that is not the end of a text, after which a new one begins; or whose end is shown."""
    assert sample.read_prompt(start, given, words) == (start, ids)


@pytest.mark.parametrize("content, ids", [("abba", [0, 1, 1, 0]), ("ab\n", [0, 1, 10]), ("", [10])])
def test_prompt_from_a_file(tmp_path, content, ids):
    """The name of the file taken for the prompt, or a line break too many or too few."""
    (tmp_path / "prompt.txt").write_bytes(content.encode())
    assert sample.read_prompt(f"FILE:{tmp_path / 'prompt.txt'}", True, TABLE) == (content, ids)


@pytest.mark.parametrize("start, named", [("abZa", ("'Z'", "column 3")), ("a\n\u00e9", ("'\u00e9'", "line 2"))])
def test_an_unknown_character_is_named(tmp_path, start, named):
    """A KeyError, or a prompt that loses what the model has never seen."""
    (tmp_path / "prompt.txt").write_text(start, encoding="utf-8")
    for prompt in (start, f"FILE:{tmp_path / 'prompt.txt'}"):
        with pytest.raises(UserError, match="--start") as caught:
            sample.read_prompt(prompt, True, TABLE)
        assert all(part in str(caught.value) for part in named) and "\n" not in str(caught.value)


def test_printed_texts_are_nanogpts(out_dir, capsys):
    """Something else than the prompt, its continuation and a line of dashes, for each sample."""
    flags = [f"--out_dir={out_dir}", "--start=abc", "--num_samples=3", "--max_new_tokens=5", "--device=cpu", "--dtype=float32"]
    sample.main(configurator.parse(sample.Config, flags))
    output = capsys.readouterr().out
    assert output.count(LINE) == 3 and output.endswith("\n" + LINE)
    printed = output.split("\n" + LINE)[:-1]
    assert [(text[:3], len(text)) for text in printed] == [("abc", 8)] * 3


def test_a_run_is_sampled_when_its_dataset_is_gone(tmp_path, dataset, texts, capsys, monkeypatch):
    """A checkpoint that needs the folder it was trained on, or the folder in which the command was started."""
    flags = {"dataset": dataset, "out_dir": tmp_path / "run", "max_iters": 1, "device": "cpu", "n_layer": 1, "n_head": 1}
    flags |= {"n_embd": 8, "block_size": 8, "batch_size": 2, "gradient_accumulation_steps": 1, "eval_iters": 1}
    train.main(configurator.parse(train.Config, [f"--{key}={value}" for key, value in flags.items()]))
    shutil.rmtree(dataset)
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    (text,) = texts(out_dir="run", start="7 plus", num_samples=1, max_new_tokens=20)
    assert text.startswith("7 plus") and len(text) == 26
    assert set(text) <= set("0123456789 plusi.\n")


@pytest.mark.parametrize("name", ["out", "out/ckpt.pt"])
def test_init_from_names_a_run_or_a_file(out_dir, texts, monkeypatch, name):
    """A path that works for the folder and not for the file, or the other way round."""
    monkeypatch.chdir(out_dir.parent)
    flags = {"num_samples": 2, "max_new_tokens": 20}
    assert texts(init_from=name, **flags) == texts(out_dir="out", **flags)


def test_the_same_seed_gives_the_same_texts(out_dir, texts):
    """Texts that cannot be had again, or the same text for every sample and seed."""
    first = texts(out_dir=out_dir, seed=3, num_samples=2, max_new_tokens=50)
    torch.rand(3)
    assert texts(out_dir=out_dir, seed=3, num_samples=2, max_new_tokens=50) == first
    assert texts(out_dir=out_dir, seed=4, num_samples=2, max_new_tokens=50) != first
    assert first[0] != first[1]


def test_a_sample_is_the_same_alone_in_a_batch_and_in_several(out_dir, texts, monkeypatch):
    """Texts that depend on how many are asked for, or on what has room in memory."""
    flags = {"out_dir": out_dir, "start": "ab", "max_new_tokens": 40}
    five = texts(num_samples=5, **flags)
    assert len({*five}) == 5
    assert texts(num_samples=1, **flags) == five[:1]
    for room in (1, 2 * 8 * 2 * 16 * 8):  # one text, two texts: layers, channels and positions of float32 keys and values
        monkeypatch.setattr(sample, "CACHE_BYTES", room)
        assert texts(num_samples=5, **flags) == five


def test_the_first_text_is_shown_as_it_grows(out_dir, monkeypatch):
    """A screen that stays empty until the last token is there."""
    shown: list[str] = []
    monkeypatch.setattr(errors, "write", shown.append)
    sample.main(
        configurator.parse(sample.Config, [f"--out_dir={out_dir}", "--start=abc", "--max_new_tokens=20", "--num_samples=2"])
    )
    assert shown[0] == "abc" and [len(piece) for piece in shown[1:21]] == [1] * 20
    assert [text.count(LINE) for text in shown[21:]].count(1) == 2


def test_the_speed_is_told_beside_the_text(out_dir, capsys):
    """Figures among the text that is written to a file, or a count that takes in the prompt."""
    sample.main(
        configurator.parse(sample.Config, [f"--out_dir={out_dir}", "--start=abc", "--max_new_tokens=9", "--num_samples=3"])
    )
    output = capsys.readouterr()
    assert "tokens/s" not in output.out and output.err.startswith("27 tokens in ") and output.err.endswith(" tokens/s\n")


def test_a_text_ends_before_a_stop_string(tmp_path, texts):
    """A stop string that is shown, or one of several that is not heeded."""
    cycle = torch.zeros(11, 11)
    for token in range(11):
        cycle[token, (token + 1) % 11] = 100
    out_dir = write(tmp_path / "out", TABLE, Bigram, **{"token_embedding_table.weight": cycle})
    flags = {"out_dir": out_dir, "start": "a", "num_samples": 2, "max_new_tokens": 30}
    assert texts(stop="gh", **flags) == ["abcdef"] * 2
    assert texts(stop="zz|ij|de", **flags) == ["abc"] * 2
    assert texts(stop="zz", **flags) == ["abcdefghij\n" * 2 + "abcdefghi"] * 2


def test_texts_that_end_are_not_counted_on(tmp_path, capsys):
    """A speed that counts what nobody sees, or a text that ends when another does."""
    table = torch.zeros(11, 11)
    for one, other in ("ab", "aj", "bc", "cd", "de", "j\n", "ee", "\n\n"):
        table[TABLE.encode(one)[0], TABLE.encode(other)[0]] = 100
    out_dir = write(tmp_path / "out", TABLE, Bigram, **{"token_embedding_table.weight": table})
    flags = [f"--out_dir={out_dir}", "--start=a", "--stop=e|\n", "--num_samples=8", "--max_new_tokens=30"]
    sample.main(configurator.parse(sample.Config, flags))
    output = capsys.readouterr()
    found = output.out.split("\n" + LINE)[:-1]
    assert {*found} == {"abcd", "aj"}
    assert output.err.startswith(f"{sum(map(len, found))} tokens in ")  # each less its prompt, and with its stop string


def test_top_p_reaches_the_model(tmp_path, texts):
    """A key that is read and not used."""
    table = torch.zeros(11, 11)
    table[:, 3] = 2.5  # more than half of the probability
    out_dir = write(tmp_path / "out", TABLE, Bigram, **{"token_embedding_table.weight": table})
    assert texts(out_dir=out_dir, start="a", top_p=0.5, temperature=1, num_samples=1, max_new_tokens=20) == ["a" + "d" * 20]


def test_a_prompt_that_the_model_cannot_see_whole_is_told(out_dir, texts, capsys):
    """A beginning that has no effect, without a word."""
    flags = [f"--out_dir={out_dir}", "--start=abcdefghijab", "--num_samples=1", "--max_new_tokens=3"]
    sample.main(configurator.parse(sample.Config, flags))
    output = capsys.readouterr()
    assert output.out.startswith("abcdefghijab") and "the last 8 of the prompt's 12 tokens" in output.err


def test_temperature_0_always_takes_the_likeliest(tmp_path, texts):
    """Division by zero, or a text that still depends on the seed."""
    table = torch.randn(11, 11, generator=torch.Generator().manual_seed(1))
    token, expected = 0, "a"
    for _ in range(30):
        token = max(range(11), key=table[token].tolist().__getitem__)
        expected += TABLE.characters[token]
    out_dir = write(tmp_path / "out", TABLE, Bigram, **{"token_embedding_table.weight": table})
    assert texts(out_dir=out_dir, start="a", temperature=0, num_samples=2, max_new_tokens=30) == [expected] * 2
    assert texts(out_dir=out_dir, start="a", top_k=1, num_samples=2, max_new_tokens=30) == [expected] * 2


def test_top_k_0_draws_from_all(tmp_path, texts):
    """A top_k of 0 that leaves no token, or one."""
    uniform = torch.zeros(11, 11)
    out_dir = write(tmp_path / "out", TABLE, Bigram, **{"token_embedding_table.weight": uniform})
    (text,) = texts(out_dir=out_dir, start="a", top_k=0, num_samples=1, max_new_tokens=300)
    assert set(text) == set(TABLE.characters)
    (text,) = texts(out_dir=out_dir, start="a", top_k=2, num_samples=1, max_new_tokens=300)
    assert len(set(text[1:])) == 2


@pytest.mark.parametrize("flags", [{}, {"temperature": 0}, {"top_k": 0}, {"top_k": 1}])
def test_padding_of_the_vocabulary_is_never_sampled(tmp_path, words, texts, flags):
    """Ids that mean nothing to the tokenizer, printed as replacement characters."""
    table = torch.zeros(64, 64)
    table[:, 41:] = 100
    out_dir = write(tmp_path / "out", words, Bigram, **{"token_embedding_table.weight": table})
    (text,) = texts(out_dir=out_dir, start="3 1 ", num_samples=1, max_new_tokens=50, **flags)
    tokens = [int(word) for word in text.split()]
    assert tokens[:2] == [3, 1] and len(tokens) == 52
    assert max(tokens) <= 40


@pytest.mark.parametrize("flags", [{"temperature": 0}, {"dtype": "bfloat16"}, {"max_new_tokens": 0}, {"start": "abc" * 10}])
def test_flags_that_reach_the_ends_of_their_range(out_dir, texts, flags):
    """A prompt longer than the context, no new tokens, or 16 bits, that end in a traceback."""
    flags = {"start": "ab", "num_samples": 1, "max_new_tokens": 10} | flags
    (text,) = texts(out_dir=out_dir, **flags)
    assert text.startswith(flags["start"]) and len(text) == len(flags["start"]) + flags["max_new_tokens"]


@pytest.mark.parametrize(
    "flags, named",
    [
        ({"out_dir": "gone"}, "gone"),
        ({"out_dir": "empty"}, "empty"),
        ({"init_from": "gone.pt"}, "gone.pt"),
        ({"init_from": "empty"}, "empty"),
        ({"out_dir": "damaged"}, "damaged"),
        ({"out_dir": "out", "start": "xyz"}, "'x'"),
        ({"out_dir": "out", "device": "tpu"}, "tpu"),
    ],
)
def test_mistakes_are_told_in_one_line(out_dir, texts, monkeypatch, flags, named):
    """A traceback for a run that is not there, not yet there, or spoilt."""
    monkeypatch.chdir(out_dir.parent)
    for name in ("empty", "damaged"):
        Path(name).mkdir()
    Path("damaged/ckpt.pt").write_bytes(b"half")
    with pytest.raises(UserError) as caught:
        texts(**flags)
    assert named in str(caught.value) and "\n" not in str(caught.value)


def test_only_what_is_used_is_imported(command, project, out_dir):
    """A module that takes a second to import before the first character, or at the start of a script that never needs it."""
    (project / "check.py").write_text(
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import bench, chat, configurator, export, plot, sample, train\n"
        f"sample.main(configurator.parse(sample.Config, [{f'--out_dir={out_dir}'!r}, '--device=cpu', '--max_new_tokens=2']))\n"
        "heavy = {'requests', 'matplotlib', 'PIL', 'wandb', 'tiktoken', 'transformers', 'datasets', 'pyarrow', 'fsspec',\n"
        "         'safetensors', 'huggingface_hub', 'torch._dynamo', 'torch._inductor'}\n"
        "assert not heavy & (set(sys.modules) - before), heavy & set(sys.modules)\n"
    )
    finished = command("check.py")
    assert finished.returncode == 0, finished.stderr
