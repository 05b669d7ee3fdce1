"""Prepare conversations for a model that chats: your own .jsonl file, or 600 synthetic ones.

python data/chat/prepare.py                                                       synthetic, by character
python data/chat/prepare.py --input=mine.jsonl --tokenizer=gpt2                   yours, for GPT-2
python data/chat/prepare.py --tokenizer=shakespeare_char --chat_format=plain      for a model trained on that dataset

Each line of the file is one conversation: an optional system message, then user and assistant in turn:
{"messages": [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello!"}]}
"""

import hashlib
import itertools
import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parents[1]))

import configurator
from configurator import PathStr, Seed

import numpy as np

from nanogpt import conversation, corpus
from nanogpt.conversation import FORMATS, ChatFormat, Message
from nanogpt.errors import UserError, one_line
from nanogpt.synthetic import made_up_conversations
from nanogpt.tokenizer import ENCODINGS, END_OF_TEXT, CharTokenizer, Tokenizer, named_tokenizer

PREVIEW_CHARACTERS = 100  # of each piece of the conversation that is printed


@dataclass(frozen=True)
class Config(configurator.Config):
    positional: ClassVar[str] = "input"
    input: PathStr = ""  # a .jsonl file, one conversation per line; empty: 600 synthetic conversations
    tokenizer: PathStr = "char"  # char, gpt2, cl100k_base, o200k_base, or a dataset (name or folder) whose tokenizer to use
    chat_format: Literal["plain", "nanochatgpt", "dialogpt"] = "nanochatgpt"  # the strings around the messages
    val_fraction: Annotated[float, configurator.Range(above=0, below=1)] = 0.1  # share of conversations for validation
    seed: Seed = 1337  # shuffles the conversations
    dtype: corpus.Dtype = "auto"  # of a token in the files. auto: the smallest that fits; uint16 is what nanoGPT reads
    name: str = "chat"  # write the dataset to data/<name>, for train.py --dataset=<name>

    def validate(self) -> None:
        if self.input and not Path(self.input).is_file():
            raise UserError(f"--input={self.input}: no such file")
        corpus.check_name(self.name, FOLDER)


def main(config: Config) -> None:
    chat_format = FORMATS[config.chat_format]

    # conversations, each with its place for error messages
    if config.input:
        source, sha256 = Path(config.input).resolve().name, hashlib.sha256(Path(config.input).read_bytes()).hexdigest()
        conversations = read_conversations(Path(config.input), chat_format)
        if len(conversations) < 2:
            raise UserError(f"--input={config.input}: must have at least 2 conversations, got {len(conversations)}")
    else:
        made_up = made_up_conversations(600)
        source, sha256 = "made-up conversations", hashlib.sha256(json.dumps(made_up).encode()).hexdigest()
        conversations = [(source, messages) for messages in made_up]

    # token ids and loss masks
    tokenizer = find_tokenizer(config.tokenizer, chat_format, [messages for _, messages in conversations])
    encoded = [encode(place, messages, chat_format, tokenizer) for place, messages in conversations]

    # shuffle, split and write
    order = random.Random(config.seed).sample(range(len(encoded)), len(encoded))
    val_count = min(max(1, round(len(order) * config.val_fraction)), len(order) - 1)
    ids, masks = {}, {}
    for split, chosen in (("train", order[val_count:]), ("val", order[:val_count])):
        ids[split] = np.concatenate([encoded[index][0] for index in chosen])
        masks[split] = np.concatenate([encoded[index][1] for index in chosen])
    extra = {"chat_format": conversation.to_dict(chat_format)}
    corpus.write_tokens(FOLDER.parent / config.name, ids, tokenizer, source, sha256, masks, extra, config.dtype)

    # what has been written
    learned = sum(mask.sum() for mask in masks.values()) / sum(map(len, ids.values()))
    longest = max(len(each) for each, _ in encoded)
    print(f"{len(order) - val_count:,} conversations to train, {val_count:,} to validate, in the format {chat_format.name}")
    print(f"{learned:.0%} of the tokens are learned; the longest conversation has {longest:,}: choose --block_size to fit it")
    print("the first one:")
    for is_learned, text in pieces(*encoded[order[val_count]], tokenizer):
        print(f"  {'learned' if is_learned else 'given  '}  {text}")
    print(f"next: {next_command(config)}")


def read_conversations(path: Path, chat_format: ChatFormat) -> list[tuple[str, list[Message]]]:
    """Return (file and line, messages) for each conversation in a .jsonl file. Raises UserError for a malformed line.

    Line ends in messages become \\n, as those of a text file.
    """
    found = []
    for number, line in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        value = corpus.read_json(line, place)
        messages = value.get("messages") if isinstance(value, dict) else None
        try:
            conversation.check(messages, chat_format)
            for message in messages:
                message["content"] = corpus.fold_line_ends(message["content"])
            conversation.check(messages, chat_format)  # again: "\rUser:" has become "\nUser:", which ends a reply
        except UserError as error:
            raise UserError(f"{place}: {error}") from error
        found.append((place, messages))
    return found


def find_tokenizer(name: str, chat_format: ChatFormat, conversations: list[list[Message]]) -> Tokenizer:
    """Return the tokenizer that --tokenizer names. Raises UserError if there is none, or it cannot encode the format."""
    if name == "char":
        tokenizer = CharTokenizer.from_text("".join(conversation.render(chat_format, each) for each in conversations))
    else:
        tokenizer = named_tokenizer(name, FOLDER.parent, ["char", *ENCODINGS])
    strings = chat_format.user + chat_format.user_end + chat_format.assistant + chat_format.assistant_end + chat_format.lead
    if tokenizer.end_of_text is None and END_OF_TEXT in strings:
        raise UserError(
            f"--chat_format={chat_format.name} needs the special token {END_OF_TEXT}, which a character table lacks; try "
            "--tokenizer=gpt2 or another format"
        )
    try:
        tokenizer.encode(strings)
    except UserError as error:
        raise UserError(f"--chat_format={chat_format.name}: {error}; try --chat_format=plain") from error
    return tokenizer


def encode(place: str, messages: list[Message], chat_format: ChatFormat, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Return a conversation's token ids and loss mask. Raises UserError with its place if a character is unknown."""
    try:
        ids, learned = conversation.encode(chat_format, messages, tokenizer)
    except UserError as error:
        raise UserError(f"{place}: {error}") from error
    return np.array(ids, dtype=np.int32), np.array(learned)


def pieces(ids: np.ndarray, learned: np.ndarray, tokenizer: Tokenizer) -> list[tuple[bool, str]]:
    """Cut a conversation where its loss mask changes; return (learned, text on one line) for each piece."""
    cuts = [0, *(np.flatnonzero(np.diff(learned)) + 1).tolist(), len(ids)]
    found = []
    for begin, end in itertools.pairwise(cuts):
        text = one_line(tokenizer.decode(ids[begin:end].tolist()).replace("\n", "\\n"))
        text = text if len(text) <= PREVIEW_CHARACTERS else text[:PREVIEW_CHARACTERS] + "..."
        found.append((bool(learned[begin]), text))
    return found


def next_command(config: Config) -> str:
    """Return the command that trains on the dataset."""
    from_scratch = config.tokenizer == "char" or config.tokenizer in ENCODINGS[1:]
    command = f"python train.py config/{'train' if from_scratch else 'finetune'}_chat.py"
    if config.name != FOLDER.name:
        command += f" --dataset={config.name} --out_dir=out-{config.name}"
    if not from_scratch and config.tokenizer != "gpt2":
        command += " --init_from=<out_dir of a model trained on that dataset>"
    return command


if __name__ == "__main__":
    configurator.run(main, Config)
