"""chat.py: conversations against plain generation, and the program in a terminal."""

import copy
import dataclasses
import io
import itertools
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import configurator

import pytest
import torch
from launcher import TIMEOUT_SECONDS

import chat
from model import GPT, Bigram, GPTConfig
from nanogpt import checkpoint, conversation
from nanogpt.conversation import ChatFormat
from nanogpt.errors import UserError
from nanogpt.tokenizer import CharTokenizer, JsonTokenizer, TiktokenTokenizer, Tokenizer, train_bpe

ROOT = Path(__file__).resolve().parents[1]
TABLE = CharTokenizer(sorted("\n .:/?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"))
SHORT = ChatFormat("short", user="Q", user_end="\n", assistant="A", assistant_end=".", stop=".")


def tiny(tokenizer: Tokenizer = TABLE, block_size: int = 64, seed: int = 1) -> GPT:
    """A small model whose parameters are all random and large enough to matter."""
    torch.manual_seed(seed)
    shape = {"block_size": block_size, "n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": tokenizer.model_vocab_size}
    model = GPT(GPTConfig(**shape))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.eval()


def chain(text: str, block_size: int = 64, tokenizer: Tokenizer = TABLE) -> Bigram:
    """A bigram model that writes `text` after its first character."""
    model = Bigram(GPTConfig(vocab_size=tokenizer.model_vocab_size, block_size=block_size))
    with torch.no_grad():
        model.token_embedding_table.weight.zero_()
        for one, other in itertools.pairwise(tokenizer.encode(text)):
            model.token_embedding_table.weight[one, other] = 100
    return model


def start_chat(model, chat_format: ChatFormat = SHORT, tokenizer: Tokenizer = TABLE, **flags) -> chat.Chat:
    """A new chat with `model`, by default with greedy decoding."""
    flags = {"temperature": 0, "device": "cpu"} | flags
    config = configurator.parse(chat.Config, [f"--{key}={value}" for key, value in flags.items()])
    return chat.Chat(model, tokenizer, chat_format, config, "cpu")


def says(talk: chat.Chat, text: str) -> list[str]:
    """Make the model of `talk` say `text`; return the list of the prompts that it gets."""
    prompts: list[str] = []

    def stream(idx: torch.Tensor, *arguments, **keywords) -> Iterator[torch.Tensor]:
        prompts.append(talk.tokenizer.decode(idx[0].tolist()))
        return (torch.tensor([[token]]) for token in talk.tokenizer.encode(text))

    talk.model.stream = stream
    return prompts


def seen_by(model: GPT) -> list[int]:
    lengths: list[int] = []
    model.transformer.wte.register_forward_pre_hook(lambda module, inputs: lengths.append(inputs[0].size(1)))
    return lengths


def expected_reply(model: GPT, messages: list[dict], length: int) -> str:
    """Reply to `messages` by plain generation from the text of the whole conversation."""
    text = "".join(f"Q{each['content']}\n" if each["role"] == "user" else f"A{each['content']}." for each in messages)
    idx = torch.tensor([TABLE.encode(text + "A")])
    written = TABLE.decode(model.generate(idx, length, temperature=0)[0, idx.size(1) :])
    return written.split(".")[0]


def test_replies_match_plain_generation():
    """Catches a turn encoded differently than in training, and a stale KV cache."""
    model, messages = tiny(block_size=512), []
    talk = start_chat(model, max_new_tokens=20)
    lengths = seen_by(model)
    for message in ("Hi there", "How are you?", "Good"):
        messages.append({"role": "user", "content": message})
        expected = expected_reply(model, messages, 20)
        del lengths[:]
        reply = "".join(talk.send(message))
        assert reply == expected and reply.strip()
        assert lengths[0] <= len(f"Q{message}\nA") + 2 and set(lengths[1:]) == {1}  # and two tokens that end the previous reply
        messages.append({"role": "assistant", "content": reply})


def test_history_is_encoded_as_in_training():
    """Catches replies that stopped, were cut short or held part of the stop string, and leave traces in the history."""
    for text, limit in (("Ahi.", 20), ("Ahi.", 2), ("Ahim", 9)):
        talk = start_chat(chain(text), max_new_tokens=limit)
        said = []
        for message in ("One", "Two"):
            said += [
                {"role": "user", "content": message},
                {"role": "assistant", "content": "".join(talk.send(message))},
            ]
        assert talk._ids() == conversation.encode(SHORT, said, TABLE)[0]


def test_stop_string_in_the_next_header():
    """Catches the user's name at the end of a reply, or twice in the history."""
    config = configurator.parse(chat.Config, ["--user_name=Us", "--assistant_name=A"])
    plain = chat.choose_format(config, None, TABLE)
    talk, said = start_chat(chain(": hey\nUs:"), plain, max_new_tokens=30), []
    for message in ("One", "Two"):
        assert "".join(talk.send(message)) == " hey"
        said += [{"role": "user", "content": message}, {"role": "assistant", "content": "hey"}]
        assert talk._ids() == conversation.encode(plain, said, TABLE)[0]


def test_undo_retry_and_reset():
    """Catches a turn half undone, a retry that sees its own earlier reply, and a reset that keeps something."""
    model = tiny(block_size=512)
    talk = start_chat(model, max_new_tokens=12)
    first = "".join(talk.send("Hi"))
    ids = talk._ids()
    second = "".join(talk.send("And"))
    assert "".join(talk.retry()) == second
    talk.undo()
    assert talk._ids() == ids
    assert "".join(talk.send("And")) == second
    talk.reset()
    assert "".join(talk.send("Hi")) == first and talk._ids() == ids
    talk.undo()
    for nothing in (talk.undo, talk.retry):
        with pytest.raises(UserError, match="nothing"):
            nothing()


@pytest.mark.parametrize("started", [True, False])
def test_interrupted_retry_keeps_the_earlier_reply(started, monkeypatch):
    """Catches a reply that is lost to /retry and a Ctrl-C before the first token of the new one."""
    talk = start_chat(tiny(), max_new_tokens=5)
    first = "".join(talk.send("Hi"))
    turns = copy.deepcopy(talk.turns)
    with monkeypatch.context() as patch:

        def interrupted(*arguments, **keywords):
            raise KeyboardInterrupt

        patch.setattr(talk.model, "stream", interrupted)
        retried = talk.retry()
        if started:
            with pytest.raises(KeyboardInterrupt):
                next(retried)
        retried.close()
    assert talk.turns == turns and turns[0].text == first
    assert talk.notes == ["there was no reply; the earlier one stays; /retry asks again"] * started
    assert "".join(talk.retry()) == first  # greedy decoding


def test_retry_and_seed():
    """Catches a retry that repeats the same reply, and a seed that does not reproduce a chat."""
    texts = []
    for _ in range(2):
        talk = start_chat(tiny(block_size=512), temperature=1, max_new_tokens=30)
        texts.append(["".join(talk.send("Hi")), "".join(talk.retry())])
    assert texts[0] == texts[1] and texts[0][0] != texts[0][1]


@pytest.mark.parametrize("tokens", [1, 3, 7])
def test_stopped_reply_is_kept(tokens):
    """Catches a stopped reply that is lost, or that breaks the turns after it."""
    model = tiny(block_size=512)
    talk = start_chat(model, max_new_tokens=12)
    whole = "".join(talk.send("Hi"))
    talk.reset()
    pieces = talk.send("Hi")
    part = "".join(next(pieces) for _ in range(tokens))
    pieces.close()
    assert whole.startswith(part)
    said = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": part}]
    assert talk._ids() == conversation.encode(SHORT, said, TABLE)[0]
    said.append({"role": "user", "content": "More"})
    assert "".join(talk.send("More")) == expected_reply(model, said, 12)


def test_overflow_drops_the_oldest_turns():
    """Catches half a turn in the context, an overflow without a note or with many, and an opening that is dropped, too."""
    model = tiny(block_size=48)
    talk = start_chat(model, max_new_tokens=8, context="Be kind.")
    opening = TABLE.encode("Be kind.\n")
    for message in ("First of all", "The second", "A third one", "Four", "Five is more"):
        reply = "".join(talk.send(message))
        ids = talk._ids()
        assert len(ids) <= 48 + 1 and ids[: len(opening)] == opening
        assert talk.turns[-1].prompt == TABLE.encode(f"Q{message}\nA")
        seen = TABLE.decode(ids[: len(ids) - len(talk.turns[-1].reply)])
        idx = torch.tensor([TABLE.encode(seen)])
        assert reply.startswith(TABLE.decode(model.generate(idx, 3, temperature=0)[0, idx.size(1) :]).split(".")[0])
    assert sum("outgrown" in text for text in talk.notes) == 1 and 1 <= len(talk.turns) < 5
    talk.reset()
    for _ in range(5):
        "".join(talk.send("A new conversation"))
    assert sum("outgrown" in text for text in talk.notes) == 2


def test_overflow_during_a_reply():
    """Catches a long reply that is cut, or that does not slide the window as sample.py does once no turn can be dropped."""
    model = tiny(block_size=32)
    endless = ChatFormat("endless", "Q", "\n", "A", ".", stop=".")
    with torch.no_grad():
        model.transformer.wte.weight[TABLE.encode(".")[0]] = 0  # never the most likely token
    talk = start_chat(model, endless, max_new_tokens=12)
    "".join(talk.send("Hey"))
    talk.config = dataclasses.replace(talk.config, max_new_tokens=25)
    reply = "".join(talk.send("Hey"))
    assert len(reply) == 25 and len(talk.turns) == 1
    assert any("outgrown" in text for text in talk.notes)
    talk.config = dataclasses.replace(talk.config, max_new_tokens=100)
    for _ in range(2):  # the second time, after a turn that is longer than the context
        idx = torch.tensor([TABLE.encode("QHey\nA")])
        expected = TABLE.decode(model.generate(idx, 100, temperature=0)[0, idx.size(1) :])
        assert "".join(talk.send("Hey")) == expected and len(talk.turns) == 1


def test_context_too_short_for_the_names():
    """Catches a remedy that does not help a model of 16 tokens, for which "User:" and "Assistant:" are too long."""
    with pytest.raises(UserError, match=r"try --chat_format=lines$"):
        start_chat(tiny(block_size=16), conversation.FORMATS["plain"])
    assert "".join(start_chat(tiny(block_size=16), conversation.LINES, max_new_tokens=40).send("Hello there"))


def test_refused_messages_leave_no_turn():
    """Catches a message that is silently cut, and a turn that stays although it was refused."""
    talk = start_chat(tiny(block_size=32), max_new_tokens=5)
    with pytest.raises(UserError, match="too long"):
        talk.send("x" * 40)
    with pytest.raises(UserError, match="'7'"):
        talk.send("Bee7")
    assert talk.turns == [] and "".join(talk.send("Hi"))


def test_empty_reply():
    """Catches an empty reply without a note, or kept in the conversation."""
    talk = start_chat(chain("A."))
    assert "".join(talk.send("Hi")) == ""
    assert any("no reply" in text for text in talk.notes)
    "".join(talk.send("Hello"))
    assert len(talk.turns) == 1


def test_gpt2_turns(gpt2_vocabulary):
    """Catches tokens that merge across turns, special tokens typed by the user, and a wrong end mark."""
    tokenizer = TiktokenTokenizer("gpt2")
    for name in conversation.FORMATS:
        chat_format = conversation.FORMATS[name]
        model = tiny(tokenizer, block_size=256)
        talk, said = start_chat(model, chat_format, tokenizer, max_new_tokens=6), []
        for message in ("Hello <|endoftext|> there", "Naïve café"):
            prompt = conversation.encode_prompt_turn(chat_format, message, tokenizer)
            before = talk._ids()
            reply = "".join(talk.send(message))
            tokens = talk._ids()[len(before + prompt) :]
            idx = torch.tensor([before + prompt])
            drawn = model.generate(idx, 6, temperature=0, vocab_size=50257)[0, idx.size(1) :].tolist()
            assert tokens[:6] == drawn[: len(tokens)]
            assert tokenizer.decode(tokens) == reply + chat_format.assistant_end
            said.append(reply)


def test_choice_of_format():
    """Catches a chat model used with a format it was not trained on."""
    auto = configurator.parse(chat.Config, [])
    assert chat.choose_format(auto, SHORT, TABLE) == SHORT
    assert chat.choose_format(auto, None, TABLE) == conversation.FORMATS["plain"]
    assert chat.choose_format(configurator.parse(chat.Config, ["--chat_format=dialogpt"]), SHORT, TABLE).name == "dialogpt"
    named = configurator.parse(chat.Config, ["--user_name=JULIET", "--assistant_name=ROMEO"])
    changed = chat.choose_format(named, None, TABLE)
    assert (changed.user, changed.assistant, changed.stop) == ("JULIET:", "ROMEO:", "\nJULIET:")


@pytest.mark.parametrize("lacks", "U:s ")
def test_alphabet_without_the_names(lacks, capsys):
    """Catches a model that cannot be talked to because its table cannot write "User:", and a format changed in silence."""
    table = CharTokenizer([character for character in TABLE.characters if character != lacks])
    chat_format = chat.choose_format(configurator.parse(chat.Config, []), None, table)
    warning = "cannot write 'User:'; each message is a line (--chat_format=lines)\n"
    assert chat_format == conversation.LINES and capsys.readouterr().err.endswith(warning)
    talk = start_chat(tiny(table), chat_format, table)
    asked = says(talk, "\n\nOh\nno")  # blank lines come before a reply, and do not end it
    assert "".join(talk.send("Hi")).strip() == "Oh" and asked == ["\nHi\n"]
    assert "".join(talk.send("And")).strip() == "Oh" and asked[1] == "\nHi\n\n\nOh\nAnd\n"


@pytest.mark.parametrize(
    ("characters", "flags", "advice"),
    [
        ("ab", [], "sample.py"),
        ("ab\n", ["--user_name=User"], "--chat_format=lines"),
        ("ab\n", ["--chat_format=plain"], "--chat_format=lines"),
        ("ab", ["--chat_format=lines", "--context=a"], "sample.py"),
    ],
)
def test_format_that_the_alphabet_cannot_write(characters, flags, advice):
    """Catches a format other than the one that was asked for, and a refusal without a remedy."""
    table = CharTokenizer(sorted(characters))
    chat_format = chat.choose_format(configurator.parse(chat.Config, flags), None, table)
    with pytest.raises(UserError, match=rf"--chat_format={chat_format.name} does not go with .*; try {advice}$"):
        start_chat(tiny(table), chat_format, table)


def test_context_that_the_alphabet_cannot_write(tmp_path):
    """Catches a character of --context that is blamed on the chat format."""
    table = CharTokenizer(sorted("abc\n"))
    (tmp_path / "context.txt").write_text("ab\nxa\n", encoding="utf-8")
    for context, place in (("abx", "line 1, column 3"), (f"FILE:{tmp_path / 'context.txt'}", "line 2, column 1")):
        with pytest.raises(UserError, match=rf"^--context: character 'x' \(U\+0078\) at {place} "):
            start_chat(tiny(table), conversation.LINES, table, context=context)


def test_end_of_text_of_another_vocabulary():
    """Catches a reply that runs on into the next document because its end is not called as in GPT-2."""
    content = train_bpe([], 257).to_dict()["content"].replace("<|endoftext|>", "</s>")
    tokenizer = JsonTokenizer(content, {"eos_token": "</s>"})
    talk = start_chat(chain("Ab</s>c.", tokenizer=tokenizer), SHORT, tokenizer)
    assert "".join(talk.send("Hi")) == "b"


@pytest.mark.parametrize(
    "command, words",
    [
        ("/undo", "nothing to undo"),
        ("/retry", "nothing to retry"),
        ("/set seed=3", "/set temperature=0.7"),
        ("/set temperature 0.5", "/set temperature=0.7"),
        ("/set =3", "/set temperature=0.7"),
        ("/set temperature=", "temperature"),
        ("/set temperature=hot", "not a number"),
        ("/set top_p=2", "at most 1"),
        ("/bye", "/help"),
    ],
)
def test_mistaken_commands_are_one_line(command, words):
    """Catches a traceback for a mistyped command."""
    talk = start_chat(chain("Ahi."))
    with pytest.raises(UserError) as caught:
        chat.obey(command, talk)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_set_changes_replies():
    """Catches a /set that is confirmed but has no effect, or that changes another key."""
    talk = start_chat(chain("Ahello."))
    before = talk.config
    chat.obey("/set max_new_tokens = 3", talk)
    assert "".join(talk.send("Hi")) == "hel"
    assert talk.config == dataclasses.replace(before, max_new_tokens=3) and before.max_new_tokens == 300


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("/set", "(temperature=0.0, top_k=200, top_p=1.0, max_new_tokens=300)\n"),
        ("/set temperature", "(temperature=0.0)\n"),
        ("/set top_k = 7", "(top_k=7)\n"),
    ],
)
def test_set_shows(command, told, capsys):
    """Catches a /set that refuses to show one key, or that does not show what it has set."""
    chat.obey(command, start_chat(chain("Ahi.")))
    assert capsys.readouterr().err == told


# the program


def write(out_dir: Path, model: GPT | Bigram, table: CharTokenizer = TABLE) -> Path:
    """Write a run folder with a checkpoint of `model`, chat format included; return the folder."""
    extra = {"tokenizer": table.to_dict(), "chat_format": conversation.to_dict(SHORT)}
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    out_dir.mkdir()
    checkpoint.save(out_dir / checkpoint.BEST, checkpoint.pack(model, optimizer, 10, 2.5, {}, extra))
    return out_dir


class Terminal:
    """chat.py in a pseudo-terminal, to read what a user would see."""

    def __init__(self, *arguments: str, term: str = "dumb"):
        pty, fcntl, termios = (pytest.importorskip(name) for name in ("pty", "fcntl", "termios"))

        def prepare() -> None:
            """In the child: take the terminal, and let Ctrl-C through even if the parent process ignores it."""
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)
            signal.signal(signal.SIGINT, signal.SIG_DFL)

        self.master, slave = pty.openpty()
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TERM": term}
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "chat.py"), "--device=cpu", "--dtype=float32", *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=environment,
            start_new_session=True,
            preexec_fn=prepare,
        )
        os.close(slave)
        self.text = ""

    def type(self, text: str) -> None:
        self.text = ""
        os.write(self.master, text.encode())

    def interrupt(self, pattern: str) -> None:
        """Press Ctrl-C until `pattern` appears: Python misses one that comes just before it starts to wait for input."""
        self.text = ""
        for _ in range(60):
            os.write(self.master, b"\x03")
            if select.select([self.master], [], [], 1)[0]:
                break
        self.read_until(pattern)

    def read_until(self, pattern: str) -> str:
        """Return the output up to the regular expression `pattern`; fail if it does not come."""
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while not re.search(pattern, self.text):
            ready, _, _ = select.select([self.master], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"no {pattern!r} in {self.text!r}"
            try:
                self.text += os.read(self.master, 4096).decode(errors="replace").replace("\r\n", "\n")
            except OSError:  # the program has left
                break
        assert re.search(pattern, self.text), f"no {pattern!r} in {self.text!r}"
        return self.text

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.master)


@pytest.fixture
def terminal() -> Iterator:
    opened: list[Terminal] = []

    def start(*arguments: str, **keywords: str) -> Terminal:
        opened.append(Terminal(*arguments, **keywords))
        return opened[-1]

    yield start
    for each in opened:
        each.close()


def test_terminal(tmp_path, terminal):
    """Catches a missing prompt, a visible end mark, a command without effect, and a Ctrl-D that does not leave."""
    out_dir = write(tmp_path / "out", chain("Aoh yes."))
    seen = terminal(f"--out_dir={out_dir}", "--temperature=0")
    assert "short" in seen.read_until("User: $")
    seen.type("Hello\n")
    assert seen.read_until("User: $").replace("Hello\n", "", 1) == "Assistant: oh yes\n\nUser: "
    for command, answer in (
        ("/help", "/retry"),
        ("/set temperature=0.5", "temperature=0.5"),
        ("/undo", "taken back; 0 turns left"),
        ("/undo", "nothing to undo"),
        ("/nonsense", "no such command"),
        ("//slash", "Assistant: oh yes"),
        ("Bee7", "'7'"),
    ):
        seen.type(command + "\n")
        seen.read_until("User: $")
        assert answer in seen.text, seen.text
    seen.type("never sent")
    seen.read_until("never sent$")
    seen.interrupt("Ctrl-D leaves")
    seen.read_until("User: $")
    seen.type("\x04")
    assert seen.process.wait(timeout=TIMEOUT_SECONDS) == 0


def test_ctrl_c_stops_a_reply(tmp_path, terminal):
    """Catches a reply that does not stream, cannot be stopped, or ends the chat when stopped."""
    out_dir = write(tmp_path / "out", chain("Axyzx", block_size=1 << 20))  # never ends
    seen = terminal(f"--out_dir={out_dir}", "--temperature=0", "--max_new_tokens=100000000")
    seen.read_until("User: $")
    seen.type("Go\n")
    seen.read_until("Assistant: xyzxyz")
    os.write(seen.master, b"\x03")
    seen.read_until(r"\.\.\.\n\nUser: $")
    seen.type("/undo\n")
    seen.read_until("taken back; 0 turns left")
    seen.read_until("User: $")
    seen.type("/set max_new_tokens=4\n")
    seen.read_until("max_new_tokens=4")
    seen.read_until("User: $")
    seen.type("Go\n")
    assert "Assistant: xyzx\n" in seen.read_until("xyzx\n\nUser: $")


def test_pasted_lines(tmp_path, terminal):
    """Catches a pasted text that is sent line by line, and an /exit that does not leave."""
    readline = pytest.importorskip("readline")
    if "libedit" in (readline.__doc__ or ""):
        pytest.skip("libedit has no bracketed paste")
    out_dir = write(tmp_path / "out", chain("Aoh yes."))
    seen = terminal(f"--out_dir={out_dir}", "--temperature=0", term="xterm")
    seen.read_until("User: $")
    seen.type("\x1b[200~one\ntwo\x1b[201~\n")
    seen.read_until("Assistant: oh yes")
    seen.read_until("User: $")
    seen.type("/undo\n")
    seen.read_until("taken back; 0 turns left")
    seen.read_until("User: $")
    seen.type("/exit\n")
    assert seen.process.wait(timeout=TIMEOUT_SECONDS) == 0


@pytest.fixture
def piped(monkeypatch, capsys) -> Callable[..., tuple[str, str]]:
    """A function that runs chat.py with these flags and this input on a pipe, and returns its stdout and stderr."""

    def run(text: bytes, *flags: str) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", ["chat.py", "--device=cpu", "--dtype=float32", *flags])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text), encoding="utf-8"))
        configurator.run(chat.main, chat.Config)
        return capsys.readouterr()

    return run


def test_overflow_is_told(tmp_path, piped):
    """Catches a context that overflows without a note."""
    out_dir = write(tmp_path / "out", tiny(block_size=40))
    _, notes = piped(b"Tell me more\n" * 3, f"--out_dir={out_dir}", "--max_new_tokens=8")
    assert "outgrown the context: its oldest" in notes


def test_piped_input(tmp_path, piped):
    """Catches prompts, names or notes on stdout among the replies, and an input line that ends the program."""
    out_dir = write(tmp_path / "out", chain("Aoh yes."))
    typed = b"Hello\n\n/set top_k=3\nAgain\nBee7\n\xff\n/\x1b[2J\\\nb\nlast"
    replies, notes = piped(typed, f"--out_dir={out_dir}", "--temperature=0")
    assert replies == "oh yes\noh yes\noh yes\n"
    assert "'7'" in notes and "top_k=3" in notes and "(/ [2J b: no such command" in notes


@pytest.mark.parametrize(
    ("text", "sent"),
    [
        ("one\\\n two\\\n\nthree\n", ["one\n two", "three"]),
        ("one\\\n\\\nthree \n", ["one\n\nthree"]),
        ("one\\ \ntwo\\", ["one\\", "two"]),
        ("\\\n\n \\\n/exit\nnever", []),
        ("one\n /quit \nnever", ["one"]),
        ("one /exit\n/exit now\n//exit\n\n\n", ["one /exit", "/exit now", "//exit"]),
    ],
)
def test_messages(text, sent, monkeypatch, capsys):
    """Catches a continued line that is sent alone or lost, and a message after /exit or /quit."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    assert list(chat.messages("User")) == sent
    assert capsys.readouterr() == ("", "")


def test_control_characters_are_replaced(tmp_path, piped, monkeypatch, capsys):
    """Catches a model that can send control characters to the user's terminal."""
    table = CharTokenizer(sorted("\x07\x1b\x9b\rAQ\n.Hi"))
    model = Bigram(GPTConfig(vocab_size=table.vocab_size, block_size=64))
    with torch.no_grad():
        model.token_embedding_table.weight.zero_()
        model.token_embedding_table.weight[:, table.encode("AQ\n.")] = -100
    out_dir = write(tmp_path / "out", model, table)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    text, _ = piped(b"Hi\n", f"--out_dir={out_dir}", "--max_new_tokens=50")
    assert "Assistant: " in text and "\ufffd" in text and not set(text) & set("\x07\x1b\x9b\r")
