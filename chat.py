"""Chat in the terminal with a model that train.py has trained, or with GPT-2.

python chat.py --out_dir=out-chat                  a run of one's own
python chat.py --init_from=gpt2-large              GPT-2, which was never taught to chat
echo "What is your name?" | python chat.py ...     one reply to each line
"""

import contextlib
import importlib
import io
import sys
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import torch

import configurator
from configurator import NonNegativeFloat, NonNegativeInt, PositiveInt, Seed
from model import GPT, Bigram
from nanogpt import checkpoint, conversation, corpus, device, errors
from nanogpt.conversation import ChatFormat
from nanogpt.device import Compile, Dtype
from nanogpt.errors import UserError
from nanogpt.tokenizer import END_OF_TEXT, StreamDecoder, Tokenizer

SETTABLE = ("temperature", "top_k", "top_p", "max_new_tokens")
HELP = f"""\
/help                    this page
/reset                   forget the conversation
/undo                    take back your last message and its reply
/retry                   another reply to your last message
/set temperature=0.7     change {", ".join(SETTABLE)}; /set alone shows them
Ctrl-C stops a reply, Ctrl-D leaves. A message that begins with a slash is written with two."""


@dataclass
class Config(configurator.Config):
    init_from: str = "resume"  # resume (the run in out_dir), a run folder, a checkpoint file, gpt2, gpt2-xl, owner/name ...
    out_dir: str = "out"  # folder of the run
    chat_format: Literal["auto", "plain", "nanochatgpt", "dialogpt"] = "auto"  # auto: what it was trained on, else plain
    user_name: str = "User"  # your name in the plain format
    assistant_name: str = "Assistant"  # the model's name in the plain format
    context: str = ""  # text that the conversation opens with, or FILE:context.txt to read it from a file
    max_new_tokens: PositiveInt = 300  # tokens in the longest reply
    temperature: NonNegativeFloat = 0.8  # below 1 is less random, above 1 more; 0 always takes the likeliest token
    top_k: NonNegativeInt = 200  # draw from the k likeliest tokens; 0 draws from all
    top_p: Annotated[float, configurator.Range(above=0, at_most=1)] = 1.0  # of them, the likeliest that make up this share
    seed: Seed = 1337  # the same seed and messages give the same replies
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: Dtype = "auto"  # of weights and products. auto: 16 bits on CUDA and on CPUs made for it, else float32
    compile: Compile = False  # compile the model with torch.compile

    def validate(self) -> None:
        for key in ("user_name", "assistant_name"):
            name = getattr(self, key)
            if not name.strip() or not name.isprintable():
                raise UserError(f"--{key}={name}: a name is one line of text, and not empty")


@device.explain_out_of_memory("give --dtype=bfloat16, or take a smaller model")
def main(config: Config) -> None:
    where = device.pick_device(config.device)
    dtype = device.pick_dtype(config.dtype, where)
    device.set_up(where, config.seed)
    model, tokenizer, start = checkpoint.load_model(config.init_from, config.out_dir)
    chat_format = choose_format(config, start.chat_format)
    size = model.get_num_params() / 1e6
    device.prepare_for_generation(model, where, dtype, device.pick_compile(config.compile, where))
    chat = Chat(model, tokenizer, chat_format, config, where)
    if sys.stdout.isatty():
        print(f"{start.path}: {size:.2f}M parameters, context {model.config.block_size:,}, format {chat_format.name}")
        print("/help lists the commands, Ctrl-D leaves")
    for message in messages(config.user_name):
        try:
            obey(message, chat, config) if is_command(message) else show(chat.send(message.removeprefix("/")), config)
        except UserError as error:
            note(str(error))
        for text in chat.notes:
            note(text)
        chat.notes.clear()


def choose_format(config: Config, trained: ChatFormat | None) -> ChatFormat:
    """Return the chat format that the config asks for; `trained` is that of the model's own conversations, if it had any."""
    if config.chat_format == "auto" and trained is not None:
        return trained
    chat_format = conversation.FORMATS["plain" if config.chat_format == "auto" else config.chat_format]
    if chat_format.name != "plain":
        return chat_format
    user, assistant = f"{config.user_name}:", f"{config.assistant_name}:"
    return replace(chat_format, user=user, assistant=assistant, stop=f"\n{user}")


@dataclass
class Turn:
    """A message and its reply, as the ids that the model sees, headers and ends among them."""

    prompt: list[int]
    reply: list[int] = field(default_factory=list)
    text: str = ""  # of the reply


class Chat:
    """A conversation with a model. It keeps the model's keys and values, so that a turn costs its own tokens only."""

    def __init__(self, model: GPT | Bigram, tokenizer: Tokenizer, chat_format: ChatFormat, config: Config, where: str):
        """Take a model that is ready to generate; the keys of SETTABLE are read from `config` at each reply.

        UserError where the opening context has no room, or characters that the tokenizer lacks.
        """
        self.model, self.tokenizer, self.chat_format, self.config, self.where = model, tokenizer, chat_format, config, where
        context = config.context
        if context.startswith("FILE:"):
            context = corpus.read_text(Path(context.removeprefix("FILE:"))).strip()
        try:
            self.opening = conversation.encode_opening(chat_format, tokenizer, context)
            smallest = len(self.opening) + len(conversation.encode_prompt_turn(chat_format, "", tokenizer)) + 1
        except UserError as error:
            raise UserError(f"--chat_format={chat_format.name} does not go with this model: {error}") from error
        if smallest >= model.config.block_size:
            raise UserError(
                f"the opening of {smallest} tokens leaves no room in the model's context of {model.config.block_size}"
            )
        self.turns: list[Turn] = []
        self.notes: list[str] = []  # what the person at the terminal should know
        self.generators = device.text_generators(config.seed, [0], where)
        self.cache = model.new_cache(1, model.config.block_size)
        self.cached: list[int] = []  # the ids whose keys and values are in the cache

    def send(self, message: str) -> Generator[str, None, None]:
        """Yield the pieces of the reply to `message` as they come; whoever stops before the end keeps what there is."""
        prompt = conversation.encode_prompt_turn(self.chat_format, message, self.tokenizer)
        room = self.model.config.block_size - len(self.opening) - 1
        if len(prompt) > room:
            raise UserError(f"the message is too long for the model: {len(prompt)} tokens, of which {room} have room")
        self.turns = [turn for turn in self.turns if turn.text]  # one without a reply has had its chance
        self.turns.append(Turn(prompt))
        return self._reply()

    def retry(self) -> Generator[str, None, None]:
        """Yield another reply to the last message."""
        if not self.turns:
            raise UserError("there is nothing to retry yet")
        self.turns[-1] = Turn(self.turns[-1].prompt)
        return self._reply()

    def undo(self) -> None:
        """Take back the last message and its reply."""
        if not self.turns:
            raise UserError("there is nothing to undo")
        self.turns.pop()

    def reset(self) -> None:
        """Forget all turns."""
        self.turns.clear()

    def _reply(self) -> Generator[str, None, None]:
        turn = self.turns[-1]
        decoder = StreamDecoder(self.tokenizer, [self.chat_format.stop, END_OF_TEXT])
        try:
            while len(turn.reply) < self.config.max_new_tokens and not decoder.stopped and self._make_room():
                for token in self._tokens():
                    turn.reply.append(token)
                    turn.text += (piece := decoder.feed(token))
                    yield piece
                    if decoder.stopped:
                        break
            turn.text += (piece := decoder.finish())
            yield piece
        finally:  # also where the reader has heard enough
            self._close(turn)
            if not turn.text.strip():
                turn.text = ""
                self.notes.append("there was no reply; /retry asks again")

    def _tokens(self) -> Iterator[int]:
        """Yield the next tokens of the conversation, as many as still have room in the context and in the reply."""
        config, ids = self.config, self._ids()
        room = min(config.max_new_tokens - len(self.turns[-1].reply), self.model.config.block_size - len(ids))
        if self.cache is not None:
            self.cache.length = _common_prefix(self.cached, ids)
        stream = self.model.stream(
            torch.tensor([ids], device=self.where),
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

    def _make_room(self) -> bool:
        """Forget the oldest turns until a reply that begins has some room, or one that goes on a little; return whether."""
        context, dropped = self.model.config.block_size, 0
        wanted = 1 if self.turns[-1].reply else min(self.config.max_new_tokens, context // 4)
        while len(self._ids()) + wanted > context and len(self.turns) > 1:
            self.turns.pop(0)
            dropped += 1
        if dropped:
            self.notes.append(f"the conversation has outgrown the context: its oldest {_count(dropped, 'turn')} left it")
        if len(self._ids()) < context:
            return True
        self.notes.append("the reply ends here: it has filled the model's context")
        return False

    def _close(self, turn: Turn) -> None:
        """End a reply as in training: of its tokens, keep those that spell its text and the format's end; add what lacks.

        So a stop string that reaches into the next turn goes, while the cache keeps all that came before it.
        """
        end = self.chat_format.assistant_end
        while not (turn.text + end).startswith(self.tokenizer.decode(turn.reply)):
            turn.reply.pop()
        there = len(self.tokenizer.decode(turn.reply))
        turn.reply += self.tokenizer.encode_array(turn.text[there:]).tolist()
        turn.reply += self.tokenizer.encode(end[max(0, there - len(turn.text)) :])

    def _ids(self) -> list[int]:
        return self.opening + [token for turn in self.turns for token in turn.prompt + turn.reply]


def messages(name: str) -> Iterator[str]:
    """Yield what the person at the terminal types, or the lines of the input that is piped in, the empty ones left out."""
    with contextlib.suppress(ImportError):
        importlib.import_module("readline")  # gives input() its line editing and history; Windows has its own
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    typed, shown = sys.stdin.isatty(), sys.stdout.isatty()
    while True:
        if shown:
            errors.write("\n")
        try:
            line = input(f"{name}: " if shown else "") if typed else sys.stdin.readline()
        except EOFError:
            errors.write("\n" if shown else "")
            return
        except KeyboardInterrupt:
            errors.write("\n")
            note("Ctrl-D leaves")
            continue
        if not line and not typed:
            return
        if line.strip():
            if shown and not typed:
                errors.write(f"{name}: {line}")
            yield line.strip()


def is_command(message: str) -> bool:
    """Whether a message is for this program rather than for the model."""
    return message.startswith("/") and not message.startswith("//")


def obey(message: str, chat: Chat, config: Config) -> None:
    """Do what a command says; UserError where it is none."""
    command, _, argument = message.partition(" ")
    if command == "/help":
        note(HELP)
    elif command == "/reset":
        chat.reset()
        note("forgotten")
    elif command == "/undo":
        chat.undo()
        note(f"taken back; {_count(len(chat.turns), 'turn')} left")
    elif command == "/retry":
        show(chat.retry(), config)
    elif command == "/set":
        if argument:
            change(argument.strip(), config)
        note(", ".join(f"{key}={getattr(config, key)}" for key in SETTABLE))
    else:
        raise UserError(f"{command}: no such command; /help lists them, and // begins a message with a slash")


def change(assignment: str, config: Config) -> None:
    """Set a key of `config` as in "temperature=0.7"; UserError where it cannot be set."""
    key, _, _ = assignment.partition("=")
    if key.strip() not in SETTABLE:
        raise UserError(f"/set {assignment}: write /set temperature=0.7, or top_k, top_p or max_new_tokens in its place")
    flag = f"--{assignment}".replace(" ", "")
    setattr(config, key.strip(), getattr(configurator.parse(Config, [flag]), key.strip()))


def show(pieces: Generator[str, None, None], config: Config) -> None:
    """Print a reply as it comes, without the space around it; Ctrl-C ends it."""
    if sys.stdout.isatty():
        errors.write(f"{config.assistant_name}: ")
    begun, held = False, ""
    try:
        for piece in pieces:
            text = held + (piece if begun else piece.lstrip())
            shown = text.rstrip()  # space at the end waits for what follows it
            held = text[len(shown) :]
            begun = begun or bool(shown)
            errors.write(shown)
    except KeyboardInterrupt:
        pieces.close()
        errors.write(" ...")
    errors.write("\n")


def note(text: str) -> None:
    """Tell the person something that is no part of the conversation."""
    print(f"({text})" if "\n" not in text else text, file=sys.stderr, flush=True)


def _common_prefix(one: list[int], other: list[int]) -> int:
    length = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        length += 1
    return length


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


if __name__ == "__main__":
    configurator.run(main, Config)
