"""Conversations as text: the formats that mark whose turn it is, and which of the tokens a model is to learn.

    messages = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello!"}]
    ids, learned = encode(FORMATS["nanochatgpt"], messages, tokenizer)  # <human>Hi.<endOfText><bot>Hello!<endOfText>

A conversation is encoded in pieces (its opening, then for each turn the prompt and the reply), so that a chat that goes on
turn by turn has the very ids that the model was trained on. What people write is text and nothing else: only a format's own
strings can become special tokens.

Learned are the replies and what ends them. Where the string at which generation stops reaches into the header of the next
user's message (plain: "\\nUser:"), that header is a part of the reply's end. So is the separator before the next conversation.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

from nanogpt.errors import UserError, one_line
from nanogpt.tokenizer import CharTokenizer, Tokenizer

ROLES = ("system", "user", "assistant")
Message = dict[str, str]  # {"role": one of ROLES, "content": its text}


@dataclass(frozen=True)
class ChatFormat:
    """The strings around the messages of a conversation."""

    name: str
    user: str  # before a user's message
    user_end: str  # after it, and after a system message, which has no header
    assistant: str  # before a reply
    assistant_end: str  # after it
    stop: str  # what the model writes when its reply is over; generation stops there, and it is never shown
    lead: str = ""  # between header and message: a space is not the header's, since tokens begin with their space
    separated: bool = False  # whether a document's separator stands before each conversation


FORMATS = {
    chat_format.name: chat_format
    for chat_format in (
        ChatFormat("plain", "User:", "\n", "Assistant:", "\n", stop="\nUser:", lead=" ", separated=True),
        ChatFormat("nanochatgpt", "<human>", "<endOfText>", "<bot>", "<endOfText>", stop="<endOfText>"),
        ChatFormat("dialogpt", "", "<|endoftext|>", "", "<|endoftext|>", stop="<|endoftext|>"),
    )
}


def to_dict(chat_format: ChatFormat) -> dict[str, Any]:
    """Return the description that `from_dict` reads."""
    return dataclasses.asdict(chat_format)


def from_dict(description: Any) -> ChatFormat:
    """Return the format that `description`, the `to_dict` of one, describes; UserError where it is malformed."""
    fields = {field.name: field.type for field in dataclasses.fields(ChatFormat)}
    if not isinstance(description, dict) or description.keys() != fields.keys():
        raise UserError("malformed chat format")
    for name, kind in fields.items():
        if type(description[name]) is not kind:
            raise UserError(f"malformed chat format: its {name} is {one_line(repr(description[name]))[:60]}")
    chat_format = ChatFormat(**description)
    if not chat_format.name.isprintable():
        raise UserError("malformed chat format: its name cannot be printed")
    if not chat_format.stop or chat_format.stop not in chat_format.assistant_end + chat_format.user:
        raise UserError(f"malformed chat format: its stop {chat_format.stop[:60]!r} is not what follows a reply")
    return chat_format


def separator(tokenizer: Tokenizer) -> list[int]:
    """Return the ids that stand between documents: the end-of-text token, or a line break where the table has one."""
    if not isinstance(tokenizer, CharTokenizer):
        return [tokenizer.end_of_text]
    return tokenizer.encode("\n") if "\n" in tokenizer.characters else []


def encode_opening(chat_format: ChatFormat, tokenizer: Tokenizer, system: str = "") -> list[int]:
    """Return the ids that a conversation begins with, which may be none: the separator, and the system message."""
    ids = separator(tokenizer) if chat_format.separated else []
    if system:
        ids += tokenizer.encode_array(system).tolist() + tokenizer.encode(chat_format.user_end)
    return ids


def encode_prompt_turn(chat_format: ChatFormat, message: str, tokenizer: Tokenizer) -> list[int]:
    """Return the ids of a user's message, its header and its end, and of the header after which the reply begins."""
    text = tokenizer.encode_array(chat_format.lead + message).tolist()
    return tokenizer.encode(chat_format.user) + text + tokenizer.encode(chat_format.user_end + chat_format.assistant)


def encode_reply(chat_format: ChatFormat, reply: str, tokenizer: Tokenizer) -> list[int]:
    """Return the ids of a reply and its end."""
    return tokenizer.encode_array(chat_format.lead + reply).tolist() + tokenizer.encode(chat_format.assistant_end)


def encode(chat_format: ChatFormat, messages: list[Message], tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    """Return the ids of a conversation that `check` accepts, and which of them are to be learned as targets."""
    system = messages[0]["content"] if messages[0]["role"] == "system" else ""
    turns = messages[1:] if system else messages
    ids = encode_opening(chat_format, tokenizer, system)
    separators = len(separator(tokenizer)) if chat_format.separated else 0
    learned = [True] * separators + [False] * (len(ids) - separators)  # a separator ends the conversation before it
    header = len(tokenizer.encode(chat_format.user)) if chat_format.stop not in chat_format.assistant_end else 0
    for user, assistant in zip(turns[::2], turns[1::2], strict=True):
        prompt = encode_prompt_turn(chat_format, user["content"], tokenizer)
        reply = encode_reply(chat_format, assistant["content"], tokenizer)
        ends_a_reply = 0 if system and user is turns[0] else header
        learned += [True] * ends_a_reply + [False] * (len(prompt) - ends_a_reply) + [True] * len(reply)
        ids += prompt + reply
    return ids, learned


def check(messages: Any, chat_format: ChatFormat) -> None:
    """Raise UserError where `messages` is no conversation: a system message or none, then user and assistant in turn.

    Nor may a reply hold the format's stop string, at which a chat would cut it.
    """
    if not isinstance(messages, list) or not messages:
        raise UserError("it has no list of messages")
    for number, message in enumerate(messages, start=1):
        role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
        if role not in ROLES:
            raise UserError(f"message {number}: its role is {_shown(role)}, not system, user or assistant")
        if not isinstance(content, str):
            raise UserError(f"message {number}: its content is {_shown(content)}, not a text")
        if not content.strip():
            raise UserError(f"message {number}: its content is empty")
        if any("\ud800" <= character <= "\udfff" for character in content):
            raise UserError(f"message {number}: its content has half a character (an unpaired \\u escape)")
        if role == "assistant" and chat_format.stop in content:
            raise UserError(
                f"message {number}: the reply holds {chat_format.stop!r}, which ends replies in the format {chat_format.name}"
            )
    roles = [message["role"] for message in messages]
    first = 1 if roles[0] == "system" else 0
    for number, role in enumerate(roles[first:], start=first):
        expected = "assistant" if (number - first) % 2 else "user"
        if role != expected:
            raise UserError(f"message {number + 1} is of the {role}, where one of the {expected} is due")
    if roles[-1] != "assistant":
        raise UserError(f"it ends with a message of the {roles[-1]}; there is no reply to learn")


def render(chat_format: ChatFormat, messages: list[Message]) -> str:
    """Return a conversation as text: what the ids of `encode` decode to, but for an end-of-text token as the separator."""
    ends = {"system": chat_format.user_end, "user": chat_format.user_end, "assistant": chat_format.assistant_end}
    heads = {
        "system": "",
        "user": chat_format.user + chat_format.lead,
        "assistant": chat_format.assistant + chat_format.lead,
    }
    text = "".join(heads[message["role"]] + message["content"] + ends[message["role"]] for message in messages)
    return "\n" + text if chat_format.separated else text


def _shown(value: Any) -> str:
    return one_line(repr(value))[:60]
