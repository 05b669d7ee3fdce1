"""Prepare conversations, for a model that chats: a .jsonl file, or 600 that are made up here.

python data/chat/prepare.py                                                       the made-up ones, in characters
python data/chat/prepare.py --input=mine.jsonl --tokenizer=gpt2                   yours, for GPT-2
python data/chat/prepare.py --tokenizer=shakespeare_char --chat_format=plain      for a model trained on that dataset

Each line of the file is a conversation, in which user and assistant take turns after a system message or none:
{"messages": [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello!"}]}
"""

import hashlib
import itertools
import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parents[1]))

import configurator
from configurator import Seed
from nanogpt import conversation, corpus
from nanogpt import tokenizer as tokenizers
from nanogpt.conversation import FORMATS, ChatFormat, Message
from nanogpt.errors import UserError, one_line
from nanogpt.tokenizer import END_OF_TEXT, CharTokenizer, TiktokenTokenizer, Tokenizer

ENCODINGS = ("gpt2", "cl100k_base", "o200k_base")
SHOWN = 100  # characters of a piece of the conversation that is shown


@dataclass
class Config(configurator.Config):
    input: str = ""  # a .jsonl file, a conversation a line; empty takes 600 made-up ones
    tokenizer: str = "char"  # char, gpt2, cl100k_base, o200k_base, or a dataset (a name or a folder) whose tokenizer is taken
    chat_format: Literal["plain", "nanochatgpt", "dialogpt"] = "nanochatgpt"  # what stands around the messages
    val_fraction: Annotated[float, configurator.Range(above=0, below=1)] = 0.1  # share of conversations kept for validation
    seed: Seed = 1337  # of the order of the conversations
    name: str = "chat"  # the dataset that results: data/<name>, for train.py --dataset=<name>

    def validate(self) -> None:
        if self.input and not Path(self.input).is_file():
            raise UserError(f"--input={self.input}: no such file")
        corpus.check_name(self.name, FOLDER)


# Conversations that are made up, in the 65 characters of Tiny Shakespeare

TOPICS = [  # (questions about {0}, the answer, {0} and {1})
    (
        ["What is the opposite of {0}?", "Tell me the opposite of {0}.", "Which word is the opposite of {0}?"],
        "The opposite of {0} is {1}.",
        "hot cold, big small, day night, up down, old young, fast slow, happy sad, open closed, "
        "light dark, early late, full empty",
    ),
    (
        ["What is the plural of {0}?", "One {0}, and then two what?", "How do you say more than one {0}?"],
        "One {0}, two {1}.",
        "mouse mice, goose geese, foot feet, tooth teeth, child children, leaf leaves, sheep sheep, cat cats, box boxes, "
        "city cities, wolf wolves, house houses",
    ),
    (
        ["What colour is {0}?", "Tell me the colour of {0}.", "Which colour has {0}?"],
        "{0} is {1}.",
        "grass green, snow white, coal black, blood red, butter yellow, chocolate brown, the_sky blue, the_moon silver, "
        "a_carrot orange, a_plum purple, an_elephant grey, a_flamingo pink",
    ),
    (
        ["What does {0} say?", "Which sound does {0} make?", "How does {0} sound?"],
        "{0} says {1}.",
        "a_cow moo, a_dog woof, a_cat meow, a_duck quack, a_pig oink, a_sheep baa, an_owl hoo, a_bee buzz, a_snake hiss",
    ),
    (
        ["What comes after {0}?", "Which number follows {0}?", "Count on from {0}."],
        "After {0} comes {1}.",
        "one two, two three, three four, four five, five six, six seven, seven eight, eight nine, nine ten, ten eleven",
    ),
    (
        ["How many are {0}?", "What is the sum of {0}?", "Please add {0}."],
        "{0} make {1}.",
        "one_and_one two, one_and_two three, one_and_three four, one_and_four five, two_and_two four, two_and_three five, "
        "two_and_four six, three_and_three six, three_and_four seven, four_and_four eight",
    ),
]
GREETINGS = ["Hello!", "Hi there!", "Good morning!", "Good evening!", "Hey, how are you?"], "Hello! How can I help?"
FAREWELLS = ["Goodbye!", "Bye!", "See you soon.", "Thank you, bye!", "That is all, thanks."], "Goodbye! Come back soon."
NAMES = "Ann Ben Cora Dan Ella Finn Gwen Hugo Ida Jack Kate Leo Mia Ned Olga Paul Rosa Sam Tess Will"
PETS = "cat dog horse parrot rabbit hamster goldfish pony lizard turtle"
MEMORIES = [  # (how it is told, the reply, how it is asked, the answer, what it may be)
    (
        ["My name is {0}.", "I am {0}.", "Call me {0}.", "Hi, I'm {0}!"],
        "Hello, {0}!",
        ["What is my name?", "Who am I?", "Do you know my name?"],
        "Your name is {0}.",
        NAMES,
    ),
    (
        ["I have a {0}.", "My pet is a {0}.", "There is a {0} here."],
        "How nice, a {0}!",
        ["What pet do I have?", "Which animal is mine?", "Do you know my pet?"],
        "You have a {0}.",
        PETS,
    ),
]


def made_up_conversations(count: int) -> list[list[Message]]:
    """Return `count` different conversations of one to four turns, the same ones every time."""
    rng = random.Random(1)
    found: dict[str, list[Message]] = {}
    while len(found) < count:
        turns = rng.choice([_facts, _facts, _polite, _memory, _memory, _memories])(rng)
        messages = [
            {"role": role, "content": text} for turn in turns for role, text in zip(("user", "assistant"), turn, strict=True)
        ]
        if len(conversation.render(FORMATS["nanochatgpt"], messages)) < 256:  # the context of config/train_chat.py holds it
            found.setdefault(json.dumps(messages), messages)
    return list(found.values())


def _fact(rng: random.Random) -> list[tuple[str, str]]:
    """Return a question and its answer, and sometimes another one that is understood only after the first."""
    questions, answer, pairs = rng.choice(TOPICS)
    first, second = (pair.replace("_", " ").split(" ") for pair in rng.sample(pairs.split(", "), 2))
    first, second = ((" ".join(words[:-1]), words[-1]) for words in (first, second))
    turns = [(rng.choice(questions).format(*first), _sentence(answer.format(*first)))]
    if rng.random() < 0.2:
        turns.append((f"And {second[0]}?", _sentence(answer.format(*second))))
    return turns


def _facts(rng: random.Random) -> list[tuple[str, str]]:
    return _fact(rng) + (_fact(rng) if rng.random() < 0.5 else [])


def _polite(rng: random.Random) -> list[tuple[str, str]]:
    greeting, farewell = ((rng.choice(said), reply) for said, reply in (GREETINGS, FAREWELLS))
    return [greeting, *_fact(rng)][rng.randrange(2) :] + [farewell] * rng.randrange(2)


def _memory(rng: random.Random) -> list[tuple[str, str]]:
    """Return something that the user tells, perhaps a fact, and the question about what was told."""
    told, asked = _told_and_asked(rng, rng.choice(MEMORIES))
    return [told, *(_fact(rng) if rng.random() < 0.5 else []), asked]


def _memories(rng: random.Random) -> list[tuple[str, str]]:
    """Return two things that the user tells, and the questions about both, in any order."""
    pairs = [_told_and_asked(rng, memory) for memory in MEMORIES]
    return [pair[part] for part in (0, 1) for pair in rng.sample(pairs, 2)]


def _told_and_asked(rng: random.Random, memory: tuple) -> tuple[tuple[str, str], tuple[str, str]]:
    told, reply, asked, answer, things = memory
    thing = rng.choice(things.split())
    return (rng.choice(told).format(thing), reply.format(thing)), (rng.choice(asked), answer.format(thing))


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


# Conversations of a file


def read_conversations(path: Path, chat_format: ChatFormat) -> list[tuple[str, list[Message]]]:
    """Return (where, messages) of each conversation in a .jsonl file; UserError names the line that holds none."""
    found = []
    for number, line in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        value = corpus.read_json(line, where)
        try:
            conversation.check(value.get("messages") if isinstance(value, dict) else None, chat_format)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        found.append((where, value["messages"]))
    return found


def find_tokenizer(name: str, chat_format: ChatFormat, conversations: list[list[Message]]) -> Tokenizer:
    """Return the tokenizer that --tokenizer names; UserError where there is none, or the format does not go with it."""
    if name == "char":
        tokenizer = CharTokenizer.from_text("".join(conversation.render(chat_format, each) for each in conversations))
    elif name in ENCODINGS:
        tokenizer = TiktokenTokenizer(name)
    else:
        folder = FOLDER.parent / name
        if not any((folder / file).is_file() for file in ("meta.json", "meta.pkl", "train.bin")):
            raise UserError(f"--tokenizer={name}: not char, {', '.join(ENCODINGS)}, nor a prepared dataset")
        tokenizer = tokenizers.from_folder(folder)
    strings = chat_format.user + chat_format.user_end + chat_format.assistant + chat_format.assistant_end + chat_format.lead
    if isinstance(tokenizer, CharTokenizer) and END_OF_TEXT in strings:
        raise UserError(
            f"--chat_format={chat_format.name} needs an encoding, which has {END_OF_TEXT}: give --tokenizer=gpt2, "
            "or another format"
        )
    try:
        tokenizer.encode(strings)
    except UserError as error:
        raise UserError(f"--chat_format={chat_format.name}: {error}; try --chat_format=plain") from error
    return tokenizer


# Token files


def main(config: Config) -> None:
    chat_format = FORMATS[config.chat_format]
    if config.input:
        source, sha256 = Path(config.input).resolve().name, hashlib.sha256(Path(config.input).read_bytes()).hexdigest()
        conversations = read_conversations(Path(config.input), chat_format)
        if len(conversations) < 2:
            raise UserError(f"--input={config.input}: at least 2 conversations are needed, and it has {len(conversations)}")
    else:
        made_up = made_up_conversations(600)
        source, sha256 = "made-up conversations", hashlib.sha256(json.dumps(made_up).encode()).hexdigest()
        conversations = [(source, messages) for messages in made_up]
    tokenizer = find_tokenizer(config.tokenizer, chat_format, [messages for _, messages in conversations])

    encoded = [encode(where, messages, chat_format, tokenizer) for where, messages in conversations]
    order = random.Random(config.seed).sample(range(len(encoded)), len(encoded))
    val_count = min(max(1, round(len(order) * config.val_fraction)), len(order) - 1)
    ids, masks = {}, {}
    for split, chosen in (("train", order[val_count:]), ("val", order[:val_count])):
        ids[split] = np.concatenate([encoded[index][0] for index in chosen])
        masks[split] = np.concatenate([encoded[index][1] for index in chosen])
    extra = {"chat_format": conversation.to_dict(chat_format)}
    corpus.write_tokens(FOLDER.parent / config.name, ids, tokenizer, source, sha256, masks, extra)

    learned = sum(mask.sum() for mask in masks.values()) / sum(map(len, ids.values()))
    longest = max(len(each) for each, _ in encoded)
    print(f"{len(order) - val_count:,} conversations to train, {val_count:,} to validate, in the format {chat_format.name}")
    print(f"{learned:.0%} of the tokens are learned; the longest conversation has {longest:,}, which --block_size should hold")
    print("the first one:")
    for is_learned, text in pieces(*encoded[order[val_count]], tokenizer):
        print(f"  {'learned' if is_learned else 'given  '}  {text}")
    print(f"next: {next_command(config)}")


def encode(where: str, messages: list[Message], chat_format: ChatFormat, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Return the ids of a conversation and which are learned; UserError says `where` the tokenizer lacks a character."""
    try:
        ids, learned = conversation.encode(chat_format, messages, tokenizer)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    return np.array(ids, dtype=np.int32), np.array(learned)


def pieces(ids: np.ndarray, learned: np.ndarray, tokenizer: Tokenizer) -> list[tuple[bool, str]]:
    """Return (whether it is learned, its text on one line) of each piece of a conversation, long texts cut."""
    cuts = [0, *(np.flatnonzero(np.diff(learned)) + 1).tolist(), len(ids)]
    found = []
    for start, end in itertools.pairwise(cuts):
        text = one_line(tokenizer.decode(ids[start:end].tolist()).replace("\n", "\\n"))
        found.append((bool(learned[start]), text if len(text) <= SHOWN else text[:SHOWN] + "..."))
    return found


def next_command(config: Config) -> str:
    """Return the command that trains on what was written."""
    from_scratch = config.tokenizer == "char" or config.tokenizer in ENCODINGS[1:]
    command = f"python train.py config/{'train' if from_scratch else 'finetune'}_chat.py"
    if config.name != FOLDER.name:
        command += f" --dataset={config.name} --out_dir=out-{config.name}"
    if not from_scratch and config.tokenizer != "gpt2":
        command += " --init_from=<the run folder of a model of that dataset>"
    return command


if __name__ == "__main__":
    configurator.run(main, Config)
