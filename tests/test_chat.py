"""The chat: conversations in-process against plain generation, and the program in a terminal of its own."""

import os
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import chat
import configurator
from model import GPT, Bigram, GPTConfig
from nanogpt import checkpoint, conversation
from nanogpt.conversation import ChatFormat
from nanogpt.errors import UserError
from nanogpt.tokenizer import CharTokenizer, TiktokenTokenizer, Tokenizer

ROOT = Path(__file__).resolve().parents[1]
TABLE = CharTokenizer(sorted("\n .:/?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"))
SHORT = ChatFormat("short", user="Q", user_end="\n", assistant="A", assistant_end=".", stop=".")


def tiny(tokenizer: Tokenizer = TABLE, block_size: int = 64, seed: int = 1) -> GPT:
    """A small model whose every parameter is random and large enough to matter."""
    torch.manual_seed(seed)
    shape = {"block_size": block_size, "n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": tokenizer.model_vocab_size}
    model = GPT(GPTConfig(**shape))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.eval()


def chain(text: str, block_size: int = 64) -> Bigram:
    """A model that writes `text` after its first character, each character following from the one before it alone."""
    model = Bigram(GPTConfig(vocab_size=TABLE.vocab_size, block_size=block_size))
    with torch.no_grad():
        model.token_embedding_table.weight.zero_()
        for one, other in zip(TABLE.encode(text), TABLE.encode(text)[1:], strict=False):
            model.token_embedding_table.weight[one, other] = 100
    return model


def talk(model, chat_format: ChatFormat = SHORT, tokenizer: Tokenizer = TABLE, **flags) -> chat.Chat:
    """A conversation with `model` that has not begun."""
    flags = {"temperature": 0, "device": "cpu"} | flags
    config = configurator.parse(chat.Config, [f"--{key}={value}" for key, value in flags.items()])
    return chat.Chat(model, tokenizer, chat_format, config, "cpu")


def seen_by(model: GPT) -> list[int]:
    lengths: list[int] = []
    model.transformer.wte.register_forward_pre_hook(lambda module, inputs: lengths.append(inputs[0].size(1)))
    return lengths


def expected_reply(model: GPT, messages: list[dict], length: int) -> str:
    """The reply after `messages`, the last of them the user's, by plain generation from the text of the conversation."""
    text = "".join(f"Q{each['content']}\n" if each["role"] == "user" else f"A{each['content']}." for each in messages)
    idx = torch.tensor([TABLE.encode(text + "A")])
    written = TABLE.decode(model.generate(idx, length, temperature=0)[0, idx.size(1) :])
    return written.split(".")[0]


def test_replies_are_those_of_plain_generation():
    """A turn that the model sees otherwise than in training, or a cache that keeps what is no longer said."""
    model, messages = tiny(block_size=512), []
    conversation_ = talk(model, max_new_tokens=20)
    lengths = seen_by(model)
    for message in ("Hi there", "How are you?", "Good"):
        messages.append({"role": "user", "content": message})
        expected = expected_reply(model, messages, 20)
        del lengths[:]
        reply = "".join(conversation_.send(message))
        assert reply == expected and reply.strip()
        assert lengths[0] <= len(f"Q{message}\nA") + 2 and set(lengths[1:]) == {1}  # the two that end the reply before it
        messages.append({"role": "assistant", "content": reply})


def test_the_history_is_what_training_would_have_seen():
    """Replies that stopped, were cut short or held a part of the stop string, and leave their marks in the history."""
    for text, limit in (("Ahi.", 20), ("Ahi.", 2), ("Ahim", 9)):
        conversation_ = talk(chain(text), max_new_tokens=limit)
        said = []
        for message in ("One", "Two"):
            said += [
                {"role": "user", "content": message},
                {"role": "assistant", "content": "".join(conversation_.send(message))},
            ]
        assert conversation_._ids() == conversation.encode(SHORT, said, TABLE)[0]


def test_a_stop_string_that_ends_in_the_next_header_is_taken_back():
    """The person's name at the end of a reply, or twice in the history."""
    config = configurator.parse(chat.Config, ["--user_name=Us", "--assistant_name=A"])
    plain = chat.choose_format(config, None)
    conversation_, said = talk(chain(": hey\nUs:"), plain, max_new_tokens=30), []
    for message in ("One", "Two"):
        assert "".join(conversation_.send(message)) == " hey"
        said += [{"role": "user", "content": message}, {"role": "assistant", "content": "hey"}]
        assert conversation_._ids() == conversation.encode(plain, said, TABLE)[0]


def test_undo_retry_and_reset():
    """A turn that is half taken back, a reply that is asked for again with itself in view, a conversation that lives on."""
    model = tiny(block_size=512)
    conversation_ = talk(model, max_new_tokens=12)
    first = "".join(conversation_.send("Hi"))
    ids = conversation_._ids()
    second = "".join(conversation_.send("And"))
    assert "".join(conversation_.retry()) == second
    conversation_.undo()
    assert conversation_._ids() == ids
    assert "".join(conversation_.send("And")) == second
    conversation_.reset()
    assert "".join(conversation_.send("Hi")) == first and conversation_._ids() == ids
    conversation_.undo()
    for nothing in (conversation_.undo, conversation_.retry):
        with pytest.raises(UserError, match="nothing"):
            nothing()


def test_retry_gives_another_reply_where_there_is_chance_and_a_seed_gives_the_same_chat():
    """A retry that cannot help, or a chat that cannot be had again."""
    texts = []
    for _ in range(2):
        conversation_ = talk(tiny(block_size=512), temperature=1, max_new_tokens=30)
        texts.append(["".join(conversation_.send("Hi")), "".join(conversation_.retry())])
    assert texts[0] == texts[1] and texts[0][0] != texts[0][1]


@pytest.mark.parametrize("tokens", [1, 3, 7])
def test_a_reply_that_is_stopped_stays_as_far_as_it_came(tokens):
    """A stopped reply that is lost, or that leaves the conversation in a state in which nothing fits."""
    model = tiny(block_size=512)
    conversation_ = talk(model, max_new_tokens=12)
    whole = "".join(conversation_.send("Hi"))
    conversation_.reset()
    pieces = conversation_.send("Hi")
    part = "".join(next(pieces) for _ in range(tokens))
    pieces.close()
    assert whole.startswith(part)
    said = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": part}]
    assert conversation_._ids() == conversation.encode(SHORT, said, TABLE)[0]
    said.append({"role": "user", "content": "More"})
    assert "".join(conversation_.send("More")) == expected_reply(model, said, 12)


def test_the_oldest_turns_leave_a_conversation_that_outgrows_the_context():
    """Half a turn in view, an overflow that nobody is told of, one that ends the chat; the opening that leaves with it."""
    model = tiny(block_size=48)
    conversation_ = talk(model, max_new_tokens=8, context="Be kind.")
    opening = TABLE.encode("Be kind.\n")
    told = 0
    for message in ("First of all", "The second", "A third one", "Four", "Five is more"):
        reply = "".join(conversation_.send(message))
        told += sum("outgrown" in text for text in conversation_.notes)
        conversation_.notes.clear()
        ids = conversation_._ids()
        assert len(ids) <= 48 + 1 and ids[: len(opening)] == opening
        assert conversation_.turns[-1].prompt == TABLE.encode(f"Q{message}\nA")
        seen = TABLE.decode(ids[: len(ids) - len(conversation_.turns[-1].reply)])
        idx = torch.tensor([TABLE.encode(seen)])
        assert reply.startswith(TABLE.decode(model.generate(idx, 3, temperature=0)[0, idx.size(1) :]).split(".")[0])
    assert told >= 2 and 1 <= len(conversation_.turns) < 5


def test_a_reply_that_outgrows_the_context_goes_on_without_the_oldest_turn():
    """A long reply that is cut although older turns could go, or that ends in an error."""
    model = tiny(block_size=32)
    endless = ChatFormat("endless", "Q", "\n", "A", ".", stop=".")
    with torch.no_grad():
        model.transformer.wte.weight[TABLE.encode(".")[0]] = 0  # never the likeliest
    conversation_ = talk(model, endless, max_new_tokens=12)
    "".join(conversation_.send("Hey"))
    conversation_.config.max_new_tokens = 25
    reply = "".join(conversation_.send("Hey"))
    assert len(reply) == 25 and len(conversation_.turns) == 1
    assert any("outgrown" in text for text in conversation_.notes)
    conversation_.config.max_new_tokens = 100
    reply = "".join(conversation_.send("Hey"))
    assert len(reply) == 26 and any("filled" in text for text in conversation_.notes)


def test_a_message_that_has_no_room_is_refused_and_the_chat_goes_on():
    """A prompt that is cut in silence, or a turn that stays although it was refused."""
    conversation_ = talk(tiny(block_size=32), max_new_tokens=5)
    with pytest.raises(UserError, match="too long"):
        conversation_.send("x" * 40)
    with pytest.raises(UserError, match="'7'"):
        conversation_.send("Bee7")
    assert conversation_.turns == [] and "".join(conversation_.send("Hi"))


def test_an_empty_reply_is_told_and_forgotten():
    """A silent model whose silence is then part of the conversation."""
    conversation_ = talk(chain("A."))
    assert "".join(conversation_.send("Hi")) == ""
    assert any("no reply" in text for text in conversation_.notes)
    "".join(conversation_.send("Hello"))
    assert len(conversation_.turns) == 1


def test_bpe_turns(gpt2_vocabulary):
    """Tokens that merge across turns, a special token that a person can type, an end mark that is cut from the reply."""
    tokenizer = TiktokenTokenizer("gpt2")
    for name in conversation.FORMATS:
        chat_format = conversation.FORMATS[name]
        model = tiny(tokenizer, block_size=256)
        conversation_, said = talk(model, chat_format, tokenizer, max_new_tokens=6), []
        for message in ("Hello <|endoftext|> there", "Naïve café"):
            prompt = conversation.encode_prompt_turn(chat_format, message, tokenizer)
            before = conversation_._ids()
            reply = "".join(conversation_.send(message))
            tokens = conversation_._ids()[len(before + prompt) :]
            idx = torch.tensor([before + prompt])
            drawn = model.generate(idx, 6, temperature=0, vocab_size=50257)[0, idx.size(1) :].tolist()
            assert tokens[:6] == drawn[: len(tokens)]
            assert tokenizer.decode(tokens) == reply + chat_format.assistant_end
            said.append(reply)


def test_the_format_is_the_checkpoints_unless_another_is_asked_for():
    """A chat model that is addressed in a format that it has never seen."""
    auto = configurator.parse(chat.Config, [])
    assert chat.choose_format(auto, SHORT) == SHORT
    assert chat.choose_format(auto, None) == conversation.FORMATS["plain"]
    assert chat.choose_format(configurator.parse(chat.Config, ["--chat_format=dialogpt"]), SHORT).name == "dialogpt"
    named = configurator.parse(chat.Config, ["--user_name=JULIET", "--assistant_name=ROMEO"])
    changed = chat.choose_format(named, None)
    assert (changed.user, changed.assistant, changed.stop) == ("JULIET:", "ROMEO:", "\nJULIET:")


@pytest.mark.parametrize(
    "command, words",
    [
        ("/undo", "nothing to undo"),
        ("/retry", "nothing to retry"),
        ("/set seed=3", "/set temperature=0.7"),
        ("/set temperature", "--key=value"),
        ("/set temperature=hot", "not a number"),
        ("/set top_p=2", "at most 1"),
        ("/bye", "/help"),
    ],
)
def test_mistaken_commands_get_one_line(command, words):
    """A traceback that ends the conversation for a slip of the finger."""
    conversation_ = talk(chain("Ahi."))
    with pytest.raises(UserError) as caught:
        chat.obey(command, conversation_, conversation_.config)
    assert words in str(caught.value) and "\n" not in str(caught.value)


# the program


def write(out_dir: Path, model: GPT | Bigram, table: CharTokenizer = TABLE) -> Path:
    """A run folder with the checkpoint of `model`, which knows its chat format; returns the folder."""
    extra = {"tokenizer": table.to_dict(), "chat_format": conversation.to_dict(SHORT)}
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    out_dir.mkdir()
    checkpoint.save(out_dir / checkpoint.BEST, checkpoint.pack(model, optimizer, 10, 2.5, {}, extra))
    return out_dir


class Terminal:
    """chat.py in a pseudo-terminal, of which tests read what a person would see."""

    def __init__(self, *arguments: str):
        pty = pytest.importorskip("pty")
        self.master, slave = pty.openpty()
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TERM": "dumb"}
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "chat.py"), "--device=cpu", "--dtype=float32", *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=environment,
            start_new_session=True,
            preexec_fn=lambda: __import__("fcntl").ioctl(0, __import__("termios").TIOCSCTTY, 0),
        )
        os.close(slave)
        self.text = ""

    def type(self, text: str) -> None:
        self.text = ""
        os.write(self.master, text.encode())

    def interrupt(self, pattern: str) -> None:
        """Press Ctrl-C until `pattern` appears: Python misses one that comes just before it begins to wait for a key."""
        self.text = ""
        for _ in range(60):
            os.write(self.master, b"\x03")
            if select.select([self.master], [], [], 1)[0]:
                break
        self.read_until(pattern)

    def read_until(self, pattern: str) -> str:
        """Return what appears up to `pattern`, a regular expression; fail if it does not."""
        deadline = time.monotonic() + 60
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

    def start(*arguments: str) -> Terminal:
        opened.append(Terminal(*arguments))
        return opened[-1]

    yield start
    for each in opened:
        each.close()


def test_a_conversation_in_a_terminal(tmp_path, terminal):
    """A prompt that does not come, a reply that shows its end mark, a command that does nothing, a Ctrl-D that stays."""
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
    assert seen.process.wait(timeout=60) == 0


def test_replies_stream_and_ctrl_c_stops_them(tmp_path, terminal):
    """A reply that comes all at once, or cannot be stopped, or whose stopping ends the chat."""
    out_dir = write(tmp_path / "out", chain("Axyzx", block_size=1 << 20))  # it never ends
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


def test_overflow_in_a_terminal(tmp_path, terminal):
    """A context that runs full without a word."""
    seen = terminal(f"--out_dir={write(tmp_path / 'out', tiny(block_size=40))}", "--max_new_tokens=8")
    for _ in range(3):
        seen.read_until("User: $")
        seen.type("Tell me more\n")
    seen.read_until("outgrown the context: its oldest")


def test_piped_input_gives_clean_text(tmp_path):
    """Prompts, names and notes among the replies of a program that feeds another."""
    out_dir = write(tmp_path / "out", chain("Aoh yes."))
    finished = subprocess.run(
        [sys.executable, str(ROOT / "chat.py"), f"--out_dir={out_dir}", "--device=cpu", "--dtype=float32", "--temperature=0"],
        input=b"Hello\n\n/set top_k=3\nAgain\nBee7\n\xff\nlast",
        capture_output=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=120,
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout == b"oh yes\noh yes\noh yes\n"
    errors = finished.stderr.decode()
    assert "'7'" in errors and "Traceback" not in errors


def test_control_characters_cannot_drive_the_terminal(tmp_path, terminal):
    """A model that clears the screen, renames the window or types commands for the person who runs it."""
    table = CharTokenizer(sorted("\x07\x1b\x9b\rAQ\n.Hi"))
    model = Bigram(GPTConfig(vocab_size=table.vocab_size, block_size=64))
    with torch.no_grad():
        model.token_embedding_table.weight.zero_()
        model.token_embedding_table.weight[:, table.encode("AQ\n.")] = -100
    write(tmp_path / "out", model, table)
    seen = terminal(f"--out_dir={tmp_path / 'out'}", "--max_new_tokens=50")
    seen.read_until("User: $")
    seen.type("Hi\n")
    text = seen.read_until("\n\nUser: $")
    assert "\ufffd" in text and not set(text) & set("\x07\x1b\x9b\r")
