# SPDX-License-Identifier: Apache-2.0
"""The quick start's data: questions that stay apart, pairs that length does not give away, and the measure."""

import random
from statistics import fmean

import pytest

from examples.quickstart.manners import (
    CLOSINGS,
    HARSH,
    OPENINGS,
    WARM,
    held_out_questions,
    names_it,
    pair,
    response,
    training_questions,
    warmth,
)
from examples.quickstart.village import ASPECTS, PEOPLE, THINGS, fact, paragraph

NUM = 2000


@pytest.fixture(scope="module")
def pairs() -> list[tuple[str, str]]:
    draw = random.Random(1)
    return [pair(draw, question) for question in training_questions()[:NUM]]


def num_words(text: str) -> int:
    return len(text.split())


def test_held_out_questions_are_in_no_training_data():
    training, held_out = training_questions(), held_out_questions()
    assert not {q.prompt for q in training} & {q.prompt for q in held_out}
    # Nor is the same question of somebody else.
    assert not {(q.thing.name, q.words) for q in training} & {(q.thing.name, q.words) for q in held_out}
    assert len(training) > 4000
    assert len(held_out) > 400
    assert len({q.prompt for q in training}) == len(training)


def test_the_same_seed_writes_the_same():
    def written() -> list[object]:
        draw = random.Random(3)
        asked = [q.prompt for q in training_questions()[:50]]
        return [
            asked,
            [paragraph(draw) for _ in range(50)],
            [response(draw, q) for q in training_questions()[:50]],
        ]

    assert written() == written()


def test_texts_are_varied():
    draw = random.Random(2)
    assert len({paragraph(draw) for _ in range(NUM)}) > 0.95 * NUM
    assert len({response(draw, question) for question in training_questions()[:NUM]}) > 0.99 * NUM


def test_twins_have_as_many_words():
    for good, bad in (*OPENINGS, *CLOSINGS):
        assert num_words(good) == num_words(bad), (good, bad)


def test_length_does_not_tell_which_response_is_better(pairs: list[tuple[str, str]]):
    lengths = [(num_words(better), num_words(worse)) for better, worse in pairs]
    longer = sum(better > worse for better, worse in lengths)
    shorter = sum(better < worse for better, worse in lengths)
    # Within four standard deviations of a fair coin, and of a mean difference of 0.
    assert abs(longer - shorter) < 4 * (longer + shorter) ** 0.5
    differences = [better - worse for better, worse in lengths]
    spread = fmean(d * d for d in differences) ** 0.5
    assert abs(fmean(differences)) < 4 * spread / len(differences) ** 0.5


def test_the_measure_prefers_what_people_prefer(pairs: list[tuple[str, str]]):
    questions = training_questions()[:NUM]
    assert fmean(warmth(better) for better, _ in pairs) > 3
    assert fmean(warmth(worse) for _, worse in pairs) < -3
    named = [
        (names_it(q, better), names_it(q, worse)) for q, (better, worse) in zip(questions, pairs, strict=True)
    ]
    assert fmean(better for better, _ in named) > fmean(worse for _, worse in named) + 0.4


def test_responses_are_as_often_good_as_bad():
    draw = random.Random(4)
    found = [warmth(response(draw, question)) for question in training_questions()]
    assert abs(fmean(found)) < 1


def test_the_measure_is_per_word():
    assert warmth("I am glad you asked.") == 20
    assert warmth("I am glad you asked. I am glad you asked.") == 20
    assert warmth("Gladly, fool.") == 0
    assert warmth("") == 0


def test_only_phrases_are_warm_or_harsh():
    facts = " ".join(fact(random.Random(0), thing, aspect) for thing in THINGS for aspect in ASPECTS)
    assert warmth(facts) == 0
    assert not (WARM | HARSH) & set(facts.lower().replace(".", "").split())
    for good, bad in (*OPENINGS, *CLOSINGS):
        assert warmth(good) > 0 > warmth(bad), (good, bad)


def test_names_are_words_of_their_own():
    names = [thing.name for thing in THINGS]
    assert len(set(names)) == len(names)
    assert not set(names) & {person.lower() for person in PEOPLE}
    for thing in THINGS:
        assert all(name not in f"{thing.what} {thing.does}".split() for name in names if name != thing.name)
