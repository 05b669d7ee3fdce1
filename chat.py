"""Chat in the terminal with a model trained with train.py, or with GPT-2.

python chat.py --out_dir=out-chat                  your own run
python chat.py --init_from=gpt2-large              GPT-2, which was not trained to chat
echo "What is your name?" | python chat.py ...     one reply per input line
"""

import contextlib
import importlib
import io
import itertools
import operator
import os
import sys
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, ClassVar, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent))  # python -P leaves it out

import configurator
from configurator import NonNegativeFloat, NonNegativeInt, PathStr, PositiveInt, PromptStr, Seed

import torch

from model import GPT, Bigram
from nanogpt import checkpoint, conversation, corpus
from nanogpt.conversation import ChatFormat
from nanogpt.device import (
    Compile,
    GenerationDtype,
    explain_out_of_memory,
    pick_compile,
    pick_device,
    pick_generation_dtype,
    prepare_for_generation,
    set_up,
    text_generators,
)
from nanogpt.errors import UserError, one_line, shown, warn, write
from nanogpt.tokenizer import StreamDecoder, Tokenizer

SETTABLE = ("temperature", "top_k", "top_p", "max_new_tokens")  # keys that /set may change
HELP = f"""\
/help                    show this help
/reset                   forget the conversation
/undo                    take back your last message and its reply
/retry                   get another reply to your last message
/set temperature=0.7     change {", ".join(SETTABLE)}; /set alone shows them
/exit or /quit           leave, as Ctrl-D does
Ctrl-C stops a reply. A backslash at the end of a line continues the message on the next line; pasted lines are one message.
To send a message that starts with a slash, type two slashes."""


@dataclass(frozen=True)
class Config(configurator.Config):
    positional: ClassVar[str] = "init_from"
    init_from: PathStr = "resume"  # resume (the run in out_dir), a run folder, a checkpoint file, gpt2, gpt2-xl, owner/name ...
    out_dir: PathStr = "out"  # run folder to load with init_from=resume
    chat_format: Literal["auto", "plain", "lines", "nanochatgpt", "dialogpt"] = "auto"  # auto: the model's own, plain, or lines
    user_name: str = "User"  # your name in the plain format
    assistant_name: str = "Assistant"  # the model's name in the plain format
    context: PromptStr = ""  # system message: text that opens the conversation, or FILE:context.txt to read it from a file
    max_new_tokens: PositiveInt = 300  # longest reply, in tokens
    temperature: NonNegativeFloat = 0.8  # below 1 is less random, above 1 more random; 0 is greedy decoding
    top_k: NonNegativeInt = 200  # sample from the k most likely tokens; 0: from all
    top_p: Annotated[float, configurator.Range(above=0, at_most=1)] = 1.0  # nucleus sampling: total probability kept; 1: all
    seed: Seed = 1337  # the same seed and messages give the same replies
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: GenerationDtype = "auto"  # of weights. auto: the fastest for the device; int8: a quarter of float32's memory, CPU
    compile: Compile = False  # compile the decoding of a token with torch.compile; on CUDA, replay it as a CUDA graph

    def validate(self) -> None:
        for key in ("user_name", "assistant_name"):
            name = getattr(self, key)
            if not name.strip() or not name.isprintable():
                raise UserError(f"--{key} must be one line of text and not empty, got {shown(name)}")


@explain_out_of_memory("set --dtype=bfloat16, or use a smaller model")
def main(config: Config) -> None:
    # device and model
    device = pick_device(config.device)
    set_up(device, config.seed)
    model, tokenizer, ckpt = checkpoint.load_model(config.init_from, config.out_dir)
    chat_format = choose_format(config, ckpt.chat_format, tokenizer)
    n_params = model.get_num_params()
    dtype = pick_generation_dtype(config.dtype, device, 1, n_params)
    prepare_for_generation(model, device, dtype, compile=pick_compile(config.compile, device))

    # read messages and commands, print replies
    chat = Chat(model, tokenizer, chat_format, config, device)
    if sys.stdout.isatty():
        block_size = model.config.block_size
        model_line = f"{ckpt.path}: {n_params / 1e6:.2f}M parameters, context {block_size:,}, format {chat_format.name}"
        print(one_line(model_line))
        print("/help lists the commands, Ctrl-D leaves")
    for message in messages(config.user_name):
        try:
            if message.startswith("/") and not message.startswith("//"):
                obey(message, chat)
            else:
                show(chat.send(message.removeprefix("/")), config.assistant_name)
        except UserError as error:
            note(one_line(str(error)))
        for text in chat.notes:
            note(text)
        chat.notes.clear()


def choose_format(config: Config, trained: ChatFormat | None, tokenizer: Tokenizer) -> ChatFormat:
    """Return the chat format to use; `trained` is the format of the model's training data, if it was chats.

    A model whose characters cannot write "User:" gets the format "lines", with a warning.
    """
    if config.chat_format == "auto" and trained is not None:
        return trained
    if config.chat_format not in ("auto", "plain"):
        return (conversation.FORMATS | {"lines": conversation.LINES})[config.chat_format]
    user, assistant = f"{config.user_name}:", f"{config.assistant_name}:"
    plain = replace(conversation.FORMATS["plain"], user=user, assistant=assistant, stop=f"\n{user}")
    if config.chat_format == "auto" and not {"user_name", "assistant_name"} & config.given:
        try:
            conversation.encode_prompt_turn(plain, "", tokenizer)
        except UserError:
            if conversation.separator(tokenizer):  # it can write a line break
                warn(f"the model's {tokenizer} cannot write {user!r}; each message is a line (--chat_format=lines)")
                return conversation.LINES
    return plain


@dataclass
class Turn:
    """A message and its reply as token ids, including the headers and end marks of the chat format."""

    prompt: list[int]
    reply: list[int] = field(default_factory=list)
    text: str = ""  # the reply as text, without its end mark


class Chat:
    """A conversation with a model. Keeps the KV cache between turns, so that only new tokens are computed."""

    def __init__(self, model: GPT | Bigram, tokenizer: Tokenizer, chat_format: ChatFormat, config: Config, device: str):
        """Take a model that is ready to generate. `self.config` may be replaced between replies to change SETTABLE keys.

        Raises UserError if the context leaves no room for a conversation, or the tokenizer lacks one of its characters.
        """
        self.model, self.tokenizer, self.chat_format, self.config, self.device = model, tokenizer, chat_format, config, device
        system = config.context
        if system.startswith("FILE:"):
            system = corpus.read_text(Path(system.removeprefix("FILE:"))).strip()
        try:
            tokenizer.encode_array(system)
        except UserError as error:
            raise UserError(f"--context: {error}") from error
        try:
            self.opening = conversation.encode_opening(chat_format, tokenizer, system)
            smallest = len(self.opening) + len(conversation.encode_prompt_turn(chat_format, "", tokenizer)) + 1
        except UserError as error:
            other = "--chat_format=lines" if conversation.separator(tokenizer) and chat_format.name != "lines" else "sample.py"
            raise UserError(f"--chat_format={chat_format.name} does not go with this model: {error}; try {other}") from error
        if smallest >= model.config.block_size:
            raise UserError(
                f"the opening must be shorter than the model's context of {model.config.block_size} tokens, "
                f"got {smallest}; shorten --context, or try --chat_format=lines"
            )
        self.turns: list[Turn] = []
        self.notes: list[str] = []  # messages for the user, to show after the reply
        self.outgrown = False  # whether turns have left the context
        self.generators = text_generators(config.seed, [0], device)
        self.cache = model.new_cache(1, model.config.block_size)
        self.cached: list[int] = []  # the ids whose keys and values are in the cache

    def send(self, message: str) -> Generator[str, None, None]:
        """Yield the reply to `message` piece by piece. Closing the generator early keeps what was generated so far."""
        prompt = conversation.encode_prompt_turn(self.chat_format, message, self.tokenizer)
        room = self.model.config.block_size - len(self.opening) - 1
        if len(prompt) > room:
            raise UserError(f"the message is too long: it must have at most {room} tokens, got {len(prompt)}; shorten it")
        self.turns = [turn for turn in self.turns if turn.text]  # drop turns that got no reply
        self.turns.append(Turn(prompt))
        return self._reply()

    def retry(self) -> Generator[str, None, None]:
        """Yield another reply to the last message; the earlier one stays until there is text."""
        if not self.turns:
            raise UserError("there is nothing to retry yet")
        return self._reply(earlier=self.turns[-1])

    def undo(self) -> None:
        """Remove the last message and its reply."""
        if not self.turns:
            raise UserError("there is nothing to undo")
        self.turns.pop()

    def reset(self) -> None:
        """Remove all turns."""
        self.turns.clear()
        self.outgrown = False

    def _reply(self, earlier: Turn | None = None) -> Generator[str, None, None]:
        """Generate the reply of the last turn, or a new one in place of the `earlier` turn."""
        if earlier is not None:
            self.turns[-1] = Turn(earlier.prompt)
        turn = self.turns[-1]
        decoder = StreamDecoder(self.tokenizer, conversation.stops(self.chat_format, self.tokenizer))
        try:
            while len(turn.reply) < self.config.max_new_tokens and not decoder.stopped:
                self._make_room()
                for token in self._tokens():
                    turn.reply.append(token)
                    text = self.tokenizer.decode([token])
                    is_blank = self.chat_format.stop.isspace() and not (turn.text + text).strip()
                    turn.text += (piece := text if is_blank else decoder.feed(token))  # a blank line is no reply yet
                    yield piece
                    if decoder.stopped:
                        break
            turn.text += (piece := decoder.finish())
            yield piece
        finally:  # also when the generator is closed early
            self._close(turn)
            if not turn.text.strip():
                turn.text = ""
                kept = ""
                if earlier is not None and earlier.text:
                    self.turns[-1], kept = earlier, "; the earlier one stays"
                self.notes.append(f"there was no reply{kept}; /retry asks again")

    def _tokens(self) -> Iterator[int]:
        """Yield the next tokens of the reply, until it is full, or the context is and there is an older turn to drop."""
        config, ids = self.config, self._ids()
        room = config.max_new_tokens - len(self.turns[-1].reply)
        if len(self.turns) > 1:
            room = min(room, self.model.config.block_size - len(ids))
        if self.cache is not None:
            self.cache.length = sum(itertools.takewhile(bool, map(operator.eq, self.cached, ids)))  # their common prefix
        stream = self.model.stream(
            torch.tensor([ids], device=self.device),
            room,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            vocab_size=self.tokenizer.vocab_size,
            generators=self.generators,
            cache=self.cache,
        )
        try:
            for token in stream:
                ids.append(token.item())
                yield ids[-1]
        finally:
            if self.cache is not None:
                self.cached = ids[: self.cache.length]

    def _make_room(self) -> None:
        """Drop the oldest turns until the reply has room. Without older turns, it slides the window, as in sample.py.

        A new reply gets room for `max_new_tokens` or a quarter of the context, whichever is smaller; a reply that has
        filled the context gets room for at least one more token.
        """
        block_size, turns = self.model.config.block_size, len(self.turns)
        wanted = 1 if self.turns[-1].reply else min(self.config.max_new_tokens, block_size // 4)
        while len(self._ids()) + wanted > block_size and len(self.turns) > 1:
            self.turns.pop(0)
        if len(self.turns) < turns and not self.outgrown:
            self.outgrown = True
            self.notes.append("the conversation has outgrown the context: its oldest turns are dropped from here on")

    def _close(self, turn: Turn) -> None:
        """Make a reply's ids those of its text and the format's end mark, as in training.

        1) Drops tokens from the end that belong to neither, such as a stop string that reaches into the next turn.
        2) Appends what is missing of the text and the end mark. The tokens before that stay, so the KV cache stays valid.
        """
        end = self.chat_format.assistant_end
        while not (turn.text + end).startswith(self.tokenizer.decode(turn.reply)):
            turn.reply.pop()
        length = len(self.tokenizer.decode(turn.reply))
        turn.reply += self.tokenizer.encode_array(turn.text[length:]).tolist()
        turn.reply += self.tokenizer.encode(end[max(0, length - len(turn.text)) :])

    def _ids(self) -> list[int]:
        return self.opening + [token for turn in self.turns for token in turn.prompt + turn.reply]


def messages(name: str) -> Iterator[str]:
    """Yield the messages typed at a prompt of `name`, or piped in, until /exit, /quit or the end of the input.

    A message is a line that is not empty; a backslash at its end continues it, and pasted lines are one message.
    """
    with contextlib.suppress(ImportError):  # readline gives input() line editing and history; Windows has its own
        readline = importlib.import_module("readline")
        if os.environ.get("TERM", "dumb") != "dumb":
            readline.parse_and_bind("set enable-bracketed-paste on")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    typed, on_terminal = sys.stdin.isatty(), sys.stdout.isatty()

    def read(prompt: str) -> str:
        """Read a line. Raises EOFError at the end of the input."""
        if typed:
            return input(prompt if on_terminal else "")
        if line := sys.stdin.readline():
            return line.removesuffix("\n")
        raise EOFError

    while True:
        if on_terminal:
            write("\n")
        try:
            message = read(f"{name}: ")
            with contextlib.suppress(EOFError):  # the end of the input also ends the message
                while message.endswith("\\"):
                    message = message[:-1] + "\n"
                    message += read("... ")
        except EOFError:
            write("\n" if on_terminal else "")
            return
        except KeyboardInterrupt:
            write("\n")
            note("Ctrl-D leaves")
            continue
        message = message.strip()
        if message in ("/exit", "/quit"):
            return
        if message:
            if on_terminal and not typed:
                write(f"{name}: {message}\n")
            yield message


def obey(message: str, chat: Chat) -> None:
    """Run a command. Raises UserError if there is no such command."""
    command, _, argument = message.partition(" ")
    if command == "/help":
        note(HELP)
    elif command == "/reset":
        chat.reset()
        note("forgotten")
    elif command == "/undo":
        chat.undo()
        count = len(chat.turns)
        note(f"taken back; {count} turn{'s' * (count != 1)} left")
    elif command == "/retry":
        show(chat.retry(), chat.config.assistant_name)
    elif command == "/set":
        set_key(argument.strip(), chat)
    else:
        raise UserError(f"{command}: no such command; /help lists them, and // begins a message with a slash")


def set_key(assignment: str, chat: Chat) -> None:
    """Change a key, as in "temperature=0.7", and show it, or all for "". Raises UserError if the key cannot be set."""
    key, equals, _ = assignment.replace(" ", "").partition("=")
    if key not in SETTABLE and assignment:
        raise UserError(f"/set {assignment}: write /set temperature=0.7; the keys are {', '.join(SETTABLE)}")
    if equals:
        parsed = configurator.parse(Config, [f"--{assignment}".replace(" ", "")])
        chat.config = chat.config.replace(**{key: getattr(parsed, key)})
    note(", ".join(f"{each}={getattr(chat.config, each)}" for each in SETTABLE if key in ("", each)))


def show(pieces: Generator[str, None, None], name: str) -> None:
    """Print a reply as it is generated, without surrounding whitespace; Ctrl-C stops it."""
    if sys.stdout.isatty():
        write(f"{name}: ")
    begun, held = False, ""
    try:
        for piece in pieces:
            text = held + (piece if begun else piece.lstrip())
            visible = text.rstrip()  # hold back trailing whitespace until more text follows
            held = text[len(visible) :]
            begun = begun or bool(visible)
            write(visible)
    except KeyboardInterrupt:
        pieces.close()
        write(" ...")
    write("\n")


def note(text: str) -> None:
    """Print a message about the chat on stderr, apart from the conversation."""
    print(f"({text})" if "\n" not in text else text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    configurator.run(main, Config)
