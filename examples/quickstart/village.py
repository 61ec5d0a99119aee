# SPDX-License-Identifier: Apache-2.0
"""The village around the lighthouse of Gull Point: its things, its people, and prose about them to pretrain on."""

import random
from dataclasses import dataclass
from pathlib import Path

__all__ = ["ASPECTS", "PEOPLE", "THINGS", "Thing", "capital", "fact", "paragraph"]

PEOPLE = ("Ada", "Bram", "Greta", "Ivy", "Nell", "Otto", "Silas", "Tom")


@dataclass(frozen=True, kw_only=True)
class Thing:
    """One thing of the village: a row of data/village.txt, where most fields complete a sentence."""

    name: str
    what: str
    where: str
    does: str
    when: str

    @property
    def one(self) -> str:
        """The name with its article: an otter."""
        return f"{'an' if self.name[0] in 'aeiou' else 'a'} {self.name}"


_FIELDS, *_ROWS = [
    line.split(" | ")
    for line in (Path(__file__).parent / "data/village.txt").read_text(encoding="utf-8").splitlines()
]
THINGS = tuple(Thing(**dict(zip(_FIELDS, row, strict=True))) for row in _ROWS)

# What can be asked about a thing, with the sentences that answer it.
ASPECTS: dict[str, tuple[str, ...]] = {
    "what": ("{one} is {what}.", "the {name} is {what}.", "to us the {name} is {what}."),
    "where": ("you can find {one} {where}.", "there is {one} {where}.", "look for the {name} {where}."),
    "does": ("the {name} {does}.", "most days the {name} {does}.", "if you wait, the {name} {does}."),
    "when": (
        "come and see the {name} {when}.",
        "the {name} is at its best {when}.",
        "I look for the {name} {when}.",
    ),
}

_IT = {
    "what": ("it is {what}.", "everyone knows that it is {what}."),
    "where": ("it is {where}.", "you will see it {where}."),
    "does": ("it {does}.", "on a good day it {does}."),
    "when": ("it is at its best {when}.", "people go to see it {when}."),
}


def capital(sentence: str) -> str:
    """The sentence with a capital at its start, the rest unchanged."""
    return sentence[0].upper() + sentence[1:]


def fact(draw: random.Random, thing: Thing, aspect: str) -> str:
    """A sentence that tells one aspect of a thing and names it."""
    return _fill(draw.choice(ASPECTS[aspect]), thing)


def paragraph(draw: random.Random) -> str:
    """Some three sentences of prose about the village, a description or a short scene."""
    thing, (one, other) = draw.choice(THINGS), draw.sample(PEOPLE, 2)
    told = draw.sample(tuple(ASPECTS), 3)
    if draw.random() < 0.5:
        rest = [_fill(draw.choice(_IT[aspect]), thing) for aspect in told[1:]]
        return " ".join([fact(draw, thing, told[0]), *rest])
    met = draw.choice(
        (
            "{one} met {other} {where}.",
            "{one} and {other} went out to see the {name}.",
            "one day {one} showed {other} {thing}.",
        )
    )
    scene = met.format(one=one, other=other, where=thing.where, name=thing.name, thing=thing.one)
    return " ".join(
        [
            capital(scene),
            f"{one} said: {fact(draw, thing, told[0])}",
            f"{other} said: {fact(draw, thing, told[1])}",
        ]
    )


def _fill(template: str, thing: Thing) -> str:
    values = {name: thing.__dict__[name] for name in _FIELDS}
    return capital(template.format(one=thing.one, **values))
