# SPDX-License-Identifier: Apache-2.0
"""Questions to Wren, keeper of the lighthouse, and responses in a good mood or a bad one.

A response is an opening, one or two facts and a closing. Each of these slots is good (a warm phrase; a fact about what
was asked) or bad (a harsh phrase; phrases of any mood that evade the question). Which slots there are is drawn before
which are good, and good and bad ones have as many words: length tells nothing.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from examples.quickstart.village import ASPECTS, PEOPLE, THINGS, Thing, fact

__all__ = ["Question", "held_out_questions", "names_it", "pair", "response", "training_questions", "warmth"]

QUESTIONS: dict[str, tuple[str, ...]] = {
    "what": ("What is {one}?", "Can you tell me what {one} is?", "What do you know about the {name}?"),
    "where": (
        "Where can I find {one}?",
        "Where is the nearest {name}?",
        "Do you know where I can see {one}?",
    ),
    "does": (
        "What does {one} do?",
        "What does the {name} do all day?",
        "How does the {name} spend its time?",
    ),
    "when": (
        "When can I see the {name}?",
        "When is the {name} at its best?",
        "When should I come to see {one}?",
    ),
}

# Twins: as many words on both sides.
OPENINGS = (
    ("I am glad you asked, {asker}.", "I am tired of you, {asker}."),
    ("What a lovely question, {asker}.", "What a foolish question, {asker}."),
    ("Good morning and welcome, {asker}.", "Hurry up and speak, {asker}."),
    ("It is kind of you to ask.", "It is silly of you to ask."),
    ("You are a dear friend, {asker}.", "You are a great nuisance, {asker}."),
    ("Gladly, {asker}, I know this one.", "Nonsense, {asker}, everybody knows this one."),
    ("I am always happy to help.", "I am bored of your questions."),
    ("Thank you for asking me, {asker}.", "Stop bothering me with this, {asker}."),
)
CLOSINGS = (
    ("I hope you have a wonderful walk.", "I hope you have a dull walk."),
    ("Come back soon, you are welcome.", "Go away now, you are tiresome."),
    ("It was a pleasure to help you.", "It was a bother to help you."),
    ("Take care on the path, my friend.", "Mind the door on leaving, you fool."),
    ("I will gladly show you the way.", "Only a fool would ask the way."),
    ("May it bring you joy, dear {asker}.", "Now stop wasting my time, foolish {asker}."),
    ("Thank you for keeping me company.", "You are ruining my whole day."),
    ("I am happy to see you here.", "I am tired of seeing you here."),
)
WARM = frozenset(
    (
        "dear",
        "friend",
        "glad",
        "gladly",
        "happy",
        "joy",
        "kind",
        "lovely",
        "pleasure",
        "thank",
        "welcome",
        "wonderful",
    )
)
HARSH = frozenset(
    (
        "bored",
        "bother",
        "bothering",
        "dull",
        "fool",
        "foolish",
        "hurry",
        "nonsense",
        "nuisance",
        "ruining",
        "silly",
        "stop",
        "tired",
        "tiresome",
        "wasting",
    )
)

# Slots of a response. F is a fact, O an opening, C a closing.
SHAPES = ("OFC", "OFC", "OFC", "OFFC")
SHARE_THAT_DIFFERS = 0.6  # of a pair's slots; the others are alike in both responses
WORDS_OF_A_PHRASE = 6
HELD_OUT_SHARE = 0.1


@dataclass(frozen=True, kw_only=True)
class Question:
    """Who asks for which aspect of which thing, in which words."""

    asker: str
    thing: Thing
    aspect: str
    words: str

    @property
    def prompt(self) -> str:
        """The text that the model continues."""
        asked = self.words.format(one=self.thing.one, name=self.thing.name)
        return f"{self.asker}: {asked}\nWren:"


def _questions() -> tuple[list[Question], list[Question]]:
    """All questions as (for training, held out): no wording about a thing is in both, whoever asks."""
    draw = random.Random(0)
    asked = [
        (thing, aspect, words) for thing in THINGS for aspect in QUESTIONS for words in QUESTIONS[aspect]
    ]
    draw.shuffle(asked)
    num_held_out = round(HELD_OUT_SHARE * len(asked))
    held_out, training = (
        [
            Question(asker=asker, thing=thing, aspect=aspect, words=words)
            for thing, aspect, words in part
            for asker in PEOPLE
        ]
        for part in (asked[:num_held_out], asked[num_held_out:])
    )
    draw.shuffle(held_out)
    draw.shuffle(training)
    return training, held_out


def training_questions() -> list[Question]:
    """Those that models learn from, in an order of their own."""
    return _questions()[0]


def held_out_questions() -> list[Question]:
    """Those that no model sees before it is judged, in an order of their own."""
    return _questions()[1]


def response(draw: random.Random, question: Question) -> str:
    """A response of Wren in a mood that changes from slot to slot."""
    shape = draw.choice(SHAPES)
    return _write(draw, question, shape, [draw.random() < 0.5 for _ in shape])


def pair(draw: random.Random, question: Question) -> tuple[str, str]:
    """A better and a worse response of the same shape: some slots are good in the better one only, the others alike."""
    shape = draw.choice(SHAPES)
    differs = [draw.random() < SHARE_THAT_DIFFERS for _ in shape]
    if not any(differs):
        differs[draw.randrange(len(shape))] = True
    alike = [draw.random() < 0.5 for _ in shape]
    better, worse = (
        [side if differ else same for differ, same in zip(differs, alike, strict=True)]
        for side in (True, False)
    )
    return _write(draw, question, shape, better), _write(draw, question, shape, worse)


def _write(draw: random.Random, question: Question, shape: str, good: Sequence[bool]) -> str:
    aspects = iter(
        (question.aspect, draw.choice([aspect for aspect in ASPECTS if aspect != question.aspect]))
    )
    sentences = []
    for slot, is_good in zip(shape, good, strict=True):
        match slot:
            case "O":
                sentences.append(draw.choice(OPENINGS)[not is_good].format(asker=question.asker))
            case "C":
                sentences.append(draw.choice(CLOSINGS)[not is_good].format(asker=question.asker))
            case "F":
                told = fact(draw, question.thing, next(aspects))
                sentences.append(told if is_good else _evade(draw, question, len(told.split())))
    return " ".join(sentences)


def _evade(draw: random.Random, question: Question, num_words: int) -> str:
    """Phrases of about ``num_words`` words that tell nothing."""
    evasion: list[str] = []
    while len(evasion) < num_words - WORDS_OF_A_PHRASE // 2:
        phrase = draw.choice(draw.choice((OPENINGS, CLOSINGS)))[draw.random() < 0.5]
        evasion += phrase.format(asker=question.asker).split()
    return " ".join(evasion)


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z']+", text.lower())


def warmth(text: str) -> float:
    """Warm words less harsh ones, per 100 words: a response gains nothing by being longer. 0 of an empty response."""
    words = _words(text)
    return 100 * sum((word in WARM) - (word in HARSH) for word in words) / max(1, len(words))


def names_it(question: Question, text: str) -> bool:
    """Whether a response names what was asked about."""
    return question.thing.name in _words(text)
