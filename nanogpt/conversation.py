"""Chat formats: conversations to token ids, with a loss mask that marks the tokens to learn.

    messages = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello!"}]
    ids, learned = encode(FORMATS["nanochatgpt"], messages, tokenizer)  # <human>Hi.<endOfText><bot>Hello!<endOfText>

A conversation is encoded piece by piece (opening, then a prompt and a reply for each turn), so that a chat that grows turn by
turn gets exactly the ids of training. What people write is encoded as ordinary text: only the format's own strings can become
special tokens.

`template` returns a format as a Jinja template, with which transformers and llama.cpp render a conversation to the same text.

The loss covers the replies and what ends them. If the stop string reaches into the next user header (plain: "\\nUser:"), that
header is learned too, and so is the separator before the next conversation.
"""

import dataclasses
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanogpt.corpus import read_text
from nanogpt.errors import UserError, shown
from nanogpt.tokenizer import END_OF_TEXT, Tokenizer

ROLES = ("system", "user", "assistant")
Message = dict[str, str]  # {"role": one of ROLES, "content": the text}


@dataclass(frozen=True)
class ChatFormat:
    """The strings around the messages of a conversation."""

    name: str
    user: str  # before a user message
    user_end: str  # after a user message, and after the system message, which has no header
    assistant: str  # before a reply
    assistant_end: str  # after a reply
    stop: str  # generation stops here; never shown
    lead: str = ""  # between header and message; apart from the header, since BPE tokens start with their space
    separated: bool = False  # whether a document separator precedes each conversation


FORMATS = {
    chat_format.name: chat_format
    for chat_format in (
        ChatFormat("plain", "User:", "\n", "Assistant:", "\n", stop="\nUser:", lead=" ", separated=True),
        ChatFormat("nanochatgpt", "<human>", "<endOfText>", "<bot>", "<endOfText>", stop="<endOfText>"),
        ChatFormat("dialogpt", "", "<|endoftext|>", "", "<|endoftext|>", stop="<|endoftext|>"),
    )
}
LINES = ChatFormat("lines", "", "\n", "", "\n", stop="\n", separated=True)  # for a base model that cannot write "User:"


def to_dict(chat_format: ChatFormat) -> dict[str, Any]:
    """Return the dictionary that `from_dict` reads."""
    return dataclasses.asdict(chat_format)


def from_dict(description: Any) -> ChatFormat:
    """Rebuild a chat format from its `to_dict`. Raises UserError if `description` is malformed."""
    fields = {field.name: field.type for field in dataclasses.fields(ChatFormat)}
    if not isinstance(description, dict) or description.keys() != fields.keys():
        raise UserError(f"malformed chat format: its keys must be {', '.join(fields)}")
    for name, kind in fields.items():
        if type(description[name]) is not kind:
            raise UserError(f"malformed chat format: {name} must be a {kind.__name__}, got {shown(description[name])}")
    chat_format = ChatFormat(**description)
    if not chat_format.name.isprintable():
        raise UserError("malformed chat format: its name must be printable")
    if not chat_format.stop or chat_format.stop not in chat_format.assistant_end + chat_format.user:
        raise UserError(f"malformed chat format: stop must be part of what follows a reply, got {shown(chat_format.stop)}")
    return chat_format


def separator(tokenizer: Tokenizer) -> list[int]:
    """Return the ids between documents: the end-of-text token, or a line break if the tokenizer has one."""
    if tokenizer.end_of_text is not None:
        return [tokenizer.end_of_text]
    try:
        return tokenizer.encode("\n")
    except UserError:
        return []


def stops(chat_format: ChatFormat | None, tokenizer: Tokenizer) -> list[str]:
    """Return the strings at which generation stops: the chat format's, and the tokenizer's end of text, if there are any."""
    end = tokenizer.decode([tokenizer.end_of_text]) if tokenizer.end_of_text is not None else ""
    return [stop for stop in (chat_format.stop if chat_format else "", end) if stop]


def read_prompt(prompt: str, given: bool, tokenizer: Tokenizer) -> tuple[str, list[int]]:
    """Return the prompt, read from a file if it is FILE:path, and its token ids, at least one.

    The default prompt (not `given`) is skipped if the vocabulary lacks it. An empty prompt becomes <|endoftext|>, else a
    newline, else token 0. Raises UserError if the tokenizer cannot encode the prompt.
    """
    if prompt.startswith("FILE:"):
        prompt = read_text(Path(prompt.removeprefix("FILE:")))
    try:
        ids = tokenizer.encode(prompt)
    except UserError as error:
        if given:
            raise UserError(f"--start: {error}") from error
        ids = []
    return (prompt, ids) if ids else ("", separator(tokenizer) or [0])


def encode_opening(chat_format: ChatFormat, tokenizer: Tokenizer, system: str = "") -> list[int]:
    """Return the ids that open a conversation: the separator and the system message, if any."""
    ids = separator(tokenizer) if chat_format.separated else []
    if system:
        ids += tokenizer.encode_array(system).tolist() + tokenizer.encode(chat_format.user_end)
    return ids


def encode_prompt_turn(chat_format: ChatFormat, message: str, tokenizer: Tokenizer) -> list[int]:
    """Return the ids of a user message up to the header after which the reply begins."""
    text = tokenizer.encode_array(chat_format.lead + message).tolist()
    return tokenizer.encode(chat_format.user) + text + tokenizer.encode(chat_format.user_end + chat_format.assistant)


def encode_reply(chat_format: ChatFormat, reply: str, tokenizer: Tokenizer) -> list[int]:
    """Return the ids of a reply and its end."""
    return tokenizer.encode_array(chat_format.lead + reply).tolist() + tokenizer.encode(chat_format.assistant_end)


def encode(chat_format: ChatFormat, messages: list[Message], tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    """Return a conversation's ids and its loss mask: True for each id to learn. `check` must accept `messages`."""
    system = messages[0]["content"] if messages[0]["role"] == "system" else ""
    turns = messages[1:] if system else messages

    # the opening: a separator is learned, since it ends the conversation before it
    ids = encode_opening(chat_format, tokenizer, system)
    separators = len(separator(tokenizer)) if chat_format.separated else 0
    learned = [True] * separators + [False] * (len(ids) - separators)

    # the turns: replies are learned, and user headers that end a reply
    header = len(tokenizer.encode(chat_format.user)) if chat_format.stop not in chat_format.assistant_end else 0
    for user, assistant in zip(turns[::2], turns[1::2], strict=True):
        prompt = encode_prompt_turn(chat_format, user["content"], tokenizer)
        reply = encode_reply(chat_format, assistant["content"], tokenizer)
        ends_a_reply = 0 if system and user is turns[0] else header
        learned += [True] * ends_a_reply + [False] * (len(prompt) - ends_a_reply) + [True] * len(reply)
        ids += prompt + reply
    return ids, learned


def check(messages: Any, chat_format: ChatFormat) -> None:
    """Raise UserError unless `messages` is an optional system message, then user and assistant in turn, a reply last.

    A reply must not contain the format's stop string, since a chat would cut it off there.
    """
    if not isinstance(messages, list) or not messages:
        raise UserError("no list of messages")
    for number, message in enumerate(messages, start=1):
        role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
        if role not in ROLES:
            raise UserError(f"message {number}: role must be system, user or assistant, got {shown(role)}")
        if not isinstance(content, str):
            raise UserError(f"message {number}: content must be a string, got {shown(content)}")
        if not content.strip():
            raise UserError(f"message {number}: content is empty")
        if any("\ud800" <= character <= "\udfff" for character in content):
            raise UserError(f"message {number}: content has half a character (an unpaired \\u escape)")
        if role == "assistant" and chat_format.stop in content:
            raise UserError(
                f"message {number}: a reply must not contain {chat_format.stop!r}, which ends replies in the format "
                f"{chat_format.name}; remove it, or choose another --chat_format"
            )
    roles = [message["role"] for message in messages]
    first = 1 if roles[0] == "system" else 0
    for number, role in enumerate(roles[first:], start=first):
        expected = "assistant" if (number - first) % 2 else "user"
        if role != expected:
            raise UserError(f"message {number + 1}: must be from the {expected}, got one from the {role}")
    if roles[-1] != "assistant":
        raise UserError(f"the last message must be from the assistant, got one from the {roles[-1]}: no reply to learn")


def render(chat_format: ChatFormat, messages: list[Message]) -> str:
    """Return a conversation as text: what `encode`'s ids decode to, except that the separator is always a line break."""
    around = _around(chat_format)
    text = "".join(message["content"].join(around[message["role"]]) for message in messages)
    return "\n" + text if chat_format.separated else text


def template(chat_format: ChatFormat, tokenizer: Tokenizer) -> str:
    """Return the format as a Jinja chat template, which renders messages to the text of `encode`'s ids.

    With `add_generation_prompt`, it ends with the header after which the reply begins.
    """
    before, after = ({role: strings[i] for role, strings in _around(chat_format).items()} for i in (0, 1))
    opening = tokenizer.decode(separator(tokenizer)) if chat_format.separated else ""
    return (
        f"{{% set before = {_literal(before)} %}}{{% set after = {_literal(after)} %}}{{{{ {_literal(opening)} }}}}"
        "{% for message in messages %}{{ before[message.role] + message.content + after[message.role] }}{% endfor %}"
        f"{{% if add_generation_prompt %}}{{{{ {_literal(chat_format.assistant)} }}}}{{% endif %}}"
    )


def marks(chat_format: ChatFormat) -> str:
    """Return the regex at which a byte-pair encoding must split a rendered conversation to give `encode`'s ids; "" for none.

    It matches the format's own strings, the longest first. If there is a lead, a message starts at a space, and only what ends
    it is matched: before a header, and at the end of the text.
    """
    if chat_format.lead:
        ends = sorted({_escaped(chat_format.user_end), _escaped(chat_format.assistant_end)})
        followers = (_escaped(chat_format.user), _escaped(chat_format.assistant), r"(?![\s\S])")
        return f"(?:{'|'.join(ends)})(?={'|'.join(followers)})"
    strings = (chat_format.user, chat_format.user_end, chat_format.user_end + chat_format.assistant, chat_format.assistant_end)
    parts = {part for string in strings for part in string.split(END_OF_TEXT) if part}
    return "|".join(map(_escaped, sorted(parts, key=lambda part: (-len(part), part))))


def _escaped(text: str) -> str:
    r"""Return the regex that matches `text`. JavaScript, in which others read tokenizer.json, refuses re.escape's `\ `."""
    return re.sub(r"[\\^$.*+?()[\]{}|]", r"\\\g<0>", text)


def _around(chat_format: ChatFormat) -> dict[str, tuple[str, str]]:
    """Return the strings before and after a message of each role."""
    return {
        "system": ("", chat_format.user_end),
        "user": (chat_format.user + chat_format.lead, chat_format.user_end),
        "assistant": (chat_format.assistant + chat_format.lead, chat_format.assistant_end),
    }


def _literal(value: str | dict[str, str]) -> str:
    """Return `value` in Jinja's syntax, which is JSON's, except for the surrogate pairs that ensure_ascii writes."""
    return json.dumps(value, ensure_ascii=False)
