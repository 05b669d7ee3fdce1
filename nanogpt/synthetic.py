"""Synthetic data for a model that chats: short conversations made up from templates.

They use only the characters of Tiny Shakespeare. Some questions can be answered only from earlier turns ("What is my name?"),
so that a model has to learn to look back.
"""

import json
import random

from nanogpt import conversation
from nanogpt.conversation import FORMATS, Message

MAX_CHARACTERS = 256  # conversations are shorter than this, the block_size of config/train_chat.py

TOPICS = [  # (questions about {0}, answer, pairs of {0} and {1}; _ is a space)
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
MEMORIES = [  # (what the user tells, reply, what the user asks later, answer, values of {0})
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
    """Return `count` different conversations of one to four turns; the same ones on every call."""
    rng = random.Random(1)
    found: dict[str, list[Message]] = {}
    while len(found) < count:
        turns = rng.choice([_facts, _facts, _polite, _memory, _memory, _memories])(rng)
        messages = [
            {"role": role, "content": text} for turn in turns for role, text in zip(("user", "assistant"), turn, strict=True)
        ]
        if len(conversation.render(FORMATS["nanochatgpt"], messages)) < MAX_CHARACTERS:
            found.setdefault(json.dumps(messages), messages)
    return list(found.values())


def _fact(rng: random.Random) -> list[tuple[str, str]]:
    """A question and its answer, sometimes with a follow-up that makes sense only after the first ("And a sheep?")."""
    questions, answer, pairs = rng.choice(TOPICS)
    first, second = (pair.replace("_", " ").split(" ") for pair in rng.sample(pairs.split(", "), 2))
    first, second = ((" ".join(words[:-1]), words[-1]) for words in (first, second))
    turns = [(rng.choice(questions).format(*first), _sentence(answer.format(*first)))]
    if rng.random() < 0.2:
        turns.append((f"And {second[0]}?", _sentence(answer.format(*second))))
    return turns


def _facts(rng: random.Random) -> list[tuple[str, str]]:
    """One or two facts."""
    return _fact(rng) + (_fact(rng) if rng.random() < 0.5 else [])


def _polite(rng: random.Random) -> list[tuple[str, str]]:
    """A fact, perhaps with a greeting before it and a farewell after it."""
    greeting, farewell = ((rng.choice(said), reply) for said, reply in (GREETINGS, FAREWELLS))
    return [greeting, *_fact(rng)][rng.randrange(2) :] + [farewell] * rng.randrange(2)


def _memory(rng: random.Random) -> list[tuple[str, str]]:
    """The user tells something, perhaps asks for a fact, and then asks about what they told."""
    told, asked = _told_and_asked(rng, rng.choice(MEMORIES))
    return [told, *(_fact(rng) if rng.random() < 0.5 else []), asked]


def _memories(rng: random.Random) -> list[tuple[str, str]]:
    """The user tells two things, and then asks about both, in any order."""
    pairs = [_told_and_asked(rng, memory) for memory in MEMORIES]
    return [pair[part] for part in (0, 1) for pair in rng.sample(pairs, 2)]


def _told_and_asked(rng: random.Random, memory: tuple) -> tuple[tuple[str, str], tuple[str, str]]:
    told, reply, asked, answer, things = memory
    thing = rng.choice(things.split())
    return (rng.choice(told).format(thing), reply.format(thing)), (rng.choice(asked), answer.format(thing))


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]
