"""Chat formats: the text and loss mask of each, templates, bad conversations, and a tiny model that learns to answer."""

import dataclasses
import itertools
import json
from pathlib import Path

import configurator

import numpy as np
import pytest
import torch

import chat
import export
import train
from nanogpt import checkpoint, conversation, corpus, huggingface
from nanogpt.conversation import FORMATS, ChatFormat, Message
from nanogpt.dataset import Dataset
from nanogpt.errors import UserError
from nanogpt.tokenizer import CharTokenizer, TiktokenTokenizer, Tokenizer, train_bpe


def talk(*texts: str, system: str = "") -> list[Message]:
    """Return the conversation in which user and assistant say `texts` in turn."""
    first = [{"role": "system", "content": system}] if system else []
    return first + [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def pieces(ids: list[int], learned: list[bool], tokenizer: Tokenizer) -> list[tuple[bool, str]]:
    """Cut a conversation where its loss mask changes; return (learned, text) for each piece."""
    cuts = [0, *(i for i in range(1, len(ids)) if learned[i] != learned[i - 1]), len(ids)]
    return [(learned[a], tokenizer.decode(ids[a:b])) for a, b in itertools.pairwise(cuts)]


TWO_TURNS = talk("Hi.", "Hello!", "Who are you?", "A model.")
WITH_SYSTEM = talk("Hi.", "Hello!", "Bye.", "Bye!", system="Be kind.")
NO, YES = False, True
WRITTEN = [
    (
        "plain",
        TWO_TURNS,
        [
            (YES, "\nUser:"),
            (NO, " Hi.\nAssistant:"),
            (YES, " Hello!\nUser:"),
            (NO, " Who are you?\nAssistant:"),
            (YES, " A model.\n"),
        ],
    ),
    (
        "plain",
        WITH_SYSTEM,
        [
            (YES, "\n"),
            (NO, "Be kind.\nUser: Hi.\nAssistant:"),
            (YES, " Hello!\nUser:"),
            (NO, " Bye.\nAssistant:"),
            (YES, " Bye!\n"),
        ],
    ),
    (
        "nanochatgpt",
        TWO_TURNS,
        [
            (NO, "<human>Hi.<endOfText><bot>"),
            (YES, "Hello!<endOfText>"),
            (NO, "<human>Who are you?<endOfText><bot>"),
            (YES, "A model.<endOfText>"),
        ],
    ),
    (
        "nanochatgpt",
        WITH_SYSTEM,
        [
            (NO, "Be kind.<endOfText><human>Hi.<endOfText><bot>"),
            (YES, "Hello!<endOfText>"),
            (NO, "<human>Bye.<endOfText><bot>"),
            (YES, "Bye!<endOfText>"),
        ],
    ),
    (
        "dialogpt",
        TWO_TURNS,
        [
            (NO, "Hi.<|endoftext|>"),
            (YES, "Hello!<|endoftext|>"),
            (NO, "Who are you?<|endoftext|>"),
            (YES, "A model.<|endoftext|>"),
        ],
    ),
    (
        "dialogpt",
        WITH_SYSTEM,
        [
            (NO, "Be kind.<|endoftext|>Hi.<|endoftext|>"),
            (YES, "Hello!<|endoftext|>"),
            (NO, "Bye.<|endoftext|>"),
            (YES, "Bye!<|endoftext|>"),
        ],
    ),
]


@pytest.mark.parametrize(("name", "messages", "expected"), WRITTEN)
def test_text_and_loss_mask(name: str, messages: list[Message], expected: list, gpt2_vocabulary: None) -> None:
    """Catches text that is not the format's, a shifted loss mask, and user or system messages as targets."""
    ends = "<|endoftext|>" if name == "plain" else ""
    in_bytes = [(flag, ends + text.removeprefix("\n") if i == 0 else text) for i, (flag, text) in enumerate(expected)]
    tokenizer = TiktokenTokenizer("gpt2")
    assert pieces(*conversation.encode(FORMATS[name], messages, tokenizer), tokenizer) == (in_bytes if ends else expected)
    text = "".join(text for _, text in expected)
    assert conversation.render(FORMATS[name], messages) == text
    table = CharTokenizer.from_text(text)
    assert pieces(*conversation.encode(FORMATS[name], messages, table), table) == expected


def test_plain_is_tokenized_as_ordinary_text(gpt2_vocabulary: None) -> None:
    """Catches a space that belongs to the header, which splits words unlike GPT-2's training text."""
    tokenizer = TiktokenTokenizer("gpt2")
    ids, _ = conversation.encode(FORMATS["plain"], TWO_TURNS, tokenizer)
    text = "User: Hi.\nAssistant: Hello!\nUser: Who are you?\nAssistant: A model.\n"
    assert ids == [50256, *tokenizer.encode_array(text)]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("messages", [TWO_TURNS, WITH_SYSTEM, talk(" a\n", "\n\nb ", "<|endoftext|>", "<bot>3'll 🙂")])
def test_chat_turns_have_the_ids_of_training(name: str, messages: list[Message], gpt2_vocabulary: None) -> None:
    """Catches tokens merged across the boundary between a prompt and a reply."""
    tokenizer, chat_format = TiktokenTokenizer("gpt2"), FORMATS[name]
    turns = [message["content"] for message in messages if message["role"] != "system"]
    system = messages[0]["content"] if messages[0]["role"] == "system" else ""
    ids = conversation.encode_opening(chat_format, tokenizer, system)
    for user, assistant in zip(turns[::2], turns[1::2], strict=True):
        ids += conversation.encode_prompt_turn(chat_format, user, tokenizer)
        ids += conversation.encode_reply(chat_format, assistant, tokenizer)
    whole, learned = conversation.encode(chat_format, messages, tokenizer)
    assert whole == ids and len(learned) == len(ids)


@pytest.mark.parametrize("name", FORMATS)
def test_messages_cannot_write_special_tokens(name: str, gpt2_vocabulary: None) -> None:
    """Catches a message that ends the document or a turn by naming the special token."""
    tokenizer, end = TiktokenTokenizer("gpt2"), "<|endoftext|>"
    ids, _ = conversation.encode(FORMATS[name], talk(f"{end} a", f"b {end}", end, end, system=end), tokenizer)
    assert ids.count(50256) == {"plain": 1, "nanochatgpt": 0, "dialogpt": 5}[name]
    assert tokenizer.decode(ids).count(end) == 5 + ids.count(50256)


@pytest.mark.parametrize("name", FORMATS)
def test_each_reply_ends_with_a_learned_stop(name: str, gpt2_vocabulary: None) -> None:
    """Catches a loss mask that never teaches the model to end a reply, inside a conversation or at its end."""
    chat_format, messages = FORMATS[name], talk("a", "one", "b", "two")
    text = conversation.render(chat_format, messages)
    for tokenizer in (CharTokenizer.from_text(text), TiktokenTokenizer("gpt2")):
        ids, learned = conversation.encode(chat_format, messages, tokenizer)
        runs = [text for flag, text in pieces(ids * 2, learned * 2, tokenizer) if flag]
        replies = [run for run in runs if "one" in run or "two" in run]
        assert len(replies) == 4
        ended = replies[:3]  # the last one lacks the separator that would follow
        stops = (chat_format.stop, "<|endoftext|>")  # the end of a document ends a reply, too
        assert all(any(stop in run.replace("\n\n", "\n") for stop in stops) for run in ended), runs


def test_separator(gpt2_vocabulary: None) -> None:
    """Catches documents that run together, and a character table that is refused for lacking a line break."""
    assert conversation.separator(TiktokenTokenizer("gpt2")) == [50256]
    assert conversation.separator(CharTokenizer(["a", "\n"])) == [1]
    assert conversation.separator(CharTokenizer(["a"])) == []


# descriptions


@pytest.mark.parametrize("name", FORMATS)
def test_formats_survive_json(name: str) -> None:
    """Catches a field that is lost in a checkpoint or meta.json."""
    assert conversation.from_dict(json.loads(json.dumps(conversation.to_dict(FORMATS[name])))) == FORMATS[name]


@pytest.mark.parametrize(
    "change",
    [
        {"stop": ""},
        {"stop": "never written"},
        {"stop": None},
        {"user": 3},
        {"lead": ["x"]},
        {"separated": 1},
        {"separated": "yes"},
        {"name": "\x1b[31m"},
        {"more": "x"},
    ],
)
def test_malformed_formats_are_refused(change: dict) -> None:
    """Catches an untrusted format that ends in a traceback, never ends a reply, or controls the terminal."""
    with pytest.raises(UserError, match="malformed chat format") as refusal:
        conversation.from_dict(conversation.to_dict(FORMATS["plain"]) | change)
    assert str(refusal.value).isprintable()


@pytest.mark.parametrize("description", [None, "plain", [], {}, {"name": "plain"}])
def test_other_descriptions_are_refused(description: object) -> None:
    """Catches a description without a format's keys that ends in a traceback."""
    with pytest.raises(UserError, match="malformed chat format"):
        conversation.from_dict(description)


# conversations


@pytest.mark.parametrize("messages", [TWO_TURNS, WITH_SYSTEM, talk("a", "b"), talk("a", "<|endoftext|>")])
def test_good_conversations_pass(messages: list[Message]) -> None:
    """Catches a check that refuses a good conversation."""
    conversation.check(messages, FORMATS["plain"])


@pytest.mark.parametrize(
    ("messages", "told"),
    [
        (None, "no list of messages"),
        ({}, "no list of messages"),
        ([], "no list of messages"),
        (["hi"], "message 1: role must be system, user or assistant, got None"),
        ([{"role": "bot", "content": "x"}], "message 1: role must be system, user or assistant, got 'bot'"),
        ([{"role": ["user"], "content": "x"}], "message 1: role must be system, user or assistant, got ['user']"),
        ([*talk("a"), {"role": "assistant"}], "message 2: content must be a string, got None"),
        (
            [*talk("a"), {"role": "assistant", "content": [{"text": "b"}]}],
            "message 2: content must be a string, got [{'text': 'b'}]",
        ),
        (talk("a", " \n"), "message 2: content is empty"),
        (talk("a", "b\ud83d"), "message 2: content has half a character"),
        (talk("a"), "the last message must be from the assistant, got one from the user"),
        (talk("a", "b", "c"), "the last message must be from the assistant, got one from the user"),
        ([{"role": "system", "content": "x"}], "the last message must be from the assistant, got one from the system"),
        (talk("a", "b")[1:], "message 1: must be from the user, got one from the assistant"),
        (talk("a", "b") + talk("c", "d")[1:], "message 3: must be from the user, got one from the assistant"),
        (talk("a", "b", system="x")[::2], "message 2: must be from the user, got one from the assistant"),
        (talk("a", "b") + talk("c", "d", system="x"), "message 3: must be from the user, got one from the system"),
        (talk("a", "b\nUser: c"), "message 2: a reply must not contain '\\nUser:', which ends replies in the format plain"),
    ],
)
def test_bad_conversations_are_refused(messages: object, told: str) -> None:
    """Catches a mistake that is accepted, or reported for another message."""
    with pytest.raises(UserError) as refusal:
        conversation.check(messages, FORMATS["plain"])
    assert told in str(refusal.value)


# templates

NAMED = dataclasses.replace(FORMATS["plain"], user="JULIET:", assistant='Dr. "}} \\n {% é🙂:', stop="\nJULIET:")
HARD = ["Hi.", "Hello!  ", "  (So?)\n", "it's\n\n", "<a> [b]", "no\tend <", "'s", "7"]  # where encodings may join pieces


@pytest.mark.parametrize("kind", ["char", "gpt2", "bpe:400", "bpe:400:cl100k"])
@pytest.mark.parametrize("chat_format", [*FORMATS.values(), NAMED], ids=[*FORMATS, "names"])
def test_template(tmp_path: Path, chat_format: ChatFormat, kind: str, request: pytest.FixtureRequest) -> None:
    """Catches a template of another text than training's, and a byte-pair encoding that joins a message to its header."""
    from transformers import AutoTokenizer

    last = "7" if kind == "gpt2" and chat_format.lead else "Yes!\n"  # docs/export.md names this exception
    hard = [*HARD, "So?", last]
    text = conversation.render(chat_format, talk(*hard, system="Be kind."))
    if kind == "gpt2":
        request.getfixturevalue("gpt2_vocabulary")
        tokenizer: Tokenizer = TiktokenTokenizer("gpt2")
    elif kind == "char":
        tokenizer = CharTokenizer.from_text(text)
    else:
        tokenizer = train_bpe([text] * 9, 400, "cl100k" if "cl100k" in kind else "gpt2")
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}', encoding="utf-8")
    for name, content in huggingface._tokenizer_files(tokenizer, 1024, chat_format).items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    once = AutoTokenizer.from_pretrained(tmp_path)
    once.save_pretrained(tmp_path / "again")
    for theirs, system in itertools.product((once, AutoTokenizer.from_pretrained(tmp_path / "again")), ("", "Be kind.")):
        messages = talk(*hard, system=system)
        ids, _ = conversation.encode(chat_format, messages, tokenizer)
        assert theirs.apply_chat_template(messages, tokenize=False) == tokenizer.decode(ids)
        assert theirs.apply_chat_template(messages)["input_ids"] == ids

        # what chat.py feeds the model, for which a reply comes next
        prompt = conversation.encode_opening(chat_format, tokenizer, system)
        prompt += conversation.encode_prompt_turn(chat_format, "it's", tokenizer)
        messages = [*talk(system=system), {"role": "user", "content": "it's"}]
        assert theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"] == prompt
        text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert text == tokenizer.decode(prompt)
    with pytest.raises(Exception, match="tool"):
        once.apply_chat_template([{"role": "tool", "content": "7"}])


# datasets


def write(folder: Path, chat_format: ChatFormat, conversations: list[list[Message]], extra: dict | None = None) -> None:
    table = CharTokenizer.from_text("".join(conversation.render(chat_format, messages) for messages in conversations))
    encoded = [conversation.encode(chat_format, messages, table) for messages in conversations]
    ids = np.array([token for ids, _ in encoded for token in ids])
    mask = np.array([flag for _, flags in encoded for flag in flags])
    extra = {"chat_format": conversation.to_dict(chat_format)} if extra is None else extra
    corpus.write_tokens(folder, {"train": ids, "val": ids}, table, "test", "0", {"train": mask, "val": mask}, extra)


def test_dataset_has_its_format(tmp_path: Path, dataset: Path) -> None:
    """Catches a format that is lost between prepare.py and training, and a format for plain text."""
    write(tmp_path / "chat", FORMATS["plain"], [TWO_TURNS])
    assert Dataset(str(tmp_path / "chat")).chat_format == FORMATS["plain"]
    assert Dataset(str(dataset)).chat_format is None


@pytest.mark.parametrize("found", ["plain", {"name": "plain"}, 3])
def test_dataset_with_a_malformed_format_is_refused(tmp_path: Path, found: object) -> None:
    """Catches a traceback for a damaged dataset."""
    write(tmp_path, FORMATS["plain"], [TWO_TURNS], {"chat_format": found})
    with pytest.raises(UserError, match=r"meta\.json is damaged \(malformed chat format"):
        Dataset(str(tmp_path))


LEARNED = [
    talk("I am Eve.", "Hi Eve.", "Who am I?", "Eve."),
    talk("I am Bob.", "Hi Bob.", "Who am I?", "Bob."),
    talk("What is hot?", "Fire.", "What is cold?", "Ice."),
    talk("Bye for now!", "See you."),
]


@pytest.mark.parametrize("name", ["plain", "nanochatgpt"])
def test_tiny_model_answers_what_it_learned(name: str, tmp_path: Path) -> None:
    """Catches a shifted loss mask, prompts that differ from training, endless replies, and a checkpoint without its format.

    The same for the exported model, here and in transformers.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    chat_format = FORMATS[name]
    write(tmp_path / "chat", chat_format, LEARNED * 4)
    flags = (
        "--n_layer=2 --n_head=4 --n_embd=48 --block_size=112 --batch_size=12 --gradient_accumulation_steps=1 --device=cpu "
        "--optimizer=muon --learning_rate=2e-2 --beta2=0.99 --max_iters=150 --warmup_iters=10 --lr_decay_iters=150 "
        "--eval_interval=150 --eval_iters=1 --log_interval=50"
    )
    paths = [f"--dataset={tmp_path / 'chat'}", f"--out_dir={tmp_path / 'out'}"]
    train.main(configurator.parse(train.Config, [*flags.split(), *paths]))
    model, tokenizer, ckpt = checkpoint.load_model("resume", str(tmp_path / "out"))
    model.eval()
    assert ckpt.chat_format == chat_format
    for messages in LEARNED:
        # as a chat
        config = configurator.parse(chat.Config, ["--temperature=0", "--max_new_tokens=24"])
        talk = chat.Chat(model, tokenizer, ckpt.chat_format, config, "cpu")
        for user, assistant in zip(messages[::2], messages[1::2], strict=True):
            assert "".join(talk.send(user["content"])).strip() == assistant["content"]

        # by plain generation
        ids = conversation.encode_opening(chat_format, tokenizer)
        for user, assistant in zip(messages[::2], messages[1::2], strict=True):
            ids += conversation.encode_prompt_turn(chat_format, user["content"], tokenizer)
            limit = len(conversation.encode_reply(chat_format, assistant["content"], tokenizer)) + len(chat_format.stop) + 1
            new = model.generate(torch.tensor([ids]), limit, temperature=0.0)[0, len(ids) :].tolist()
            reply, stop, _ = tokenizer.decode(new).partition(chat_format.stop)
            assert stop and reply.removeprefix(chat_format.lead).rstrip("\n") == assistant["content"]
            ids += conversation.encode_reply(chat_format, assistant["content"], tokenizer)

    # exported: as a chat, and by transformers
    export.main(configurator.parse(export.Config, [f"--out_dir={tmp_path / 'out'}", f"--to={tmp_path / 'exported'}"]))
    model, tokenizer, ckpt = checkpoint.load_model(str(tmp_path / "exported"), "none")
    assert ckpt.chat_format == chat_format
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    their_tokenizer = AutoTokenizer.from_pretrained(tmp_path / "exported")
    for messages in LEARNED:
        talk = chat.Chat(model.eval(), tokenizer, ckpt.chat_format, config, "cpu")
        for i in range(0, len(messages), 2):
            assert "".join(talk.send(messages[i]["content"])).strip() == messages[i + 1]["content"]
            ids = their_tokenizer.apply_chat_template(messages[: i + 1], add_generation_prompt=True, return_tensors="pt")
            new = theirs.generate(**ids, tokenizer=their_tokenizer, max_new_tokens=48, do_sample=False)
            reply, stop, rest = their_tokenizer.decode(new[0, ids["input_ids"].shape[1] :]).partition(chat_format.stop)
            assert (reply.strip(), stop, rest) == (messages[i + 1]["content"], chat_format.stop, "")
