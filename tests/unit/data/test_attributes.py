# SPDX-License-Identifier: Apache-2.0
"""Labels of responses: which texts are rated, what is written, and an annotation that is interrupted."""

import json

import pytest

from nemo_aligner.data.attributes import LabelForm, annotate, texts_to_rate
from nemo_aligner.data.config import ChatPromptTokens
from nemo_aligner.data.conversations import read_chat
from nemo_aligner.data.records import RecordFile
from nemo_aligner.errors import UserError

TOKENS = ChatPromptTokens(system_turn_start="<s0>", turn_start="<s1>", label_start="<s2>")
FORM = {"form": LabelForm(names=("length", "questions"), bounds=(0, 9)), "tokens": TOKENS}


def chat(number):
    return {
        "system": "Be short.",
        "mask": "User",
        "conversations": [
            {"from": "User", "value": "a?"},
            {"from": "Assistant", "value": "b" * number},
            {"from": "User", "value": "c\u2028?"},  # for JSON no end of a line
            {"from": "Assistant", "value": "d"},
        ],
    }


def count(text):
    return [float(len(text.split("Assistant\n")[-1].split("\n")[0])), float(text.count("?"))]


def test_every_response_is_rated_with_all_that_stands_before_it():
    texts = texts_to_rate(read_chat(chat(2)), TOKENS)
    start = "<s0>System\nBe short.\n<s1>User\na?\n<s1>Assistant\nbb\n"
    assert texts == {1: f"{start}<s2>", 3: f"{start}<s1>User\nc\u2028?\n<s1>Assistant\nd\n<s2>"}


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_an_annotation_goes_on_where_it_was_interrupted(jsonl, tmp_path, batch_size):
    chats = RecordFile(jsonl(*map(chat, range(1, 6))), read_chat)
    whole, part = tmp_path / "whole.jsonl", tmp_path / "part.jsonl"
    annotate(chats, whole, lambda texts: list(map(count, texts)), **FORM, batch_size=batch_size)
    rows = list(map(json.loads, whole.open()))
    assert [row["conversations"][1]["label"] for row in rows] == [
        f"length:{n},questions:1" for n in range(1, 6)
    ]
    assert all(read_chat(row).kind == "VALUE_TO_TEXT" for row in rows)

    asked = []

    def fails_later(texts):
        asked.append(len(texts))
        if len(asked) > 1:
            raise UserError("the server is gone", fix="start it")
        return list(map(count, texts))

    if batch_size < 5:
        with pytest.raises(UserError, match="server is gone"):
            annotate(chats, part, fails_later, **FORM, batch_size=batch_size)
    assert asked == ([] if batch_size == 5 else [2 * batch_size] * 2)
    if part.exists():
        part.write_text(part.read_text() + '{"system": "Be sh')
    annotate(chats, part, lambda texts: list(map(count, texts)), **FORM, batch_size=batch_size)
    assert part.read_text() == whole.read_text()


def test_what_is_not_learned_is_not_learned_after_it_is_labeled(jsonl, tmp_path):
    row = chat(3)
    row["conversations"][1]["weight"] = 0
    chats = RecordFile(jsonl(row, chat(2) | {"train": False}), read_chat)
    annotate(chats, tmp_path / "out", lambda texts: list(map(count, texts)), **FORM, batch_size=8)
    labeled = [read_chat(json.loads(line)) for line in (tmp_path / "out").open()]
    learned = [[turns.learned(n) for n in range(4)] for turns in labeled]
    assert learned == [[False, False, False, True], [False] * 4]


@pytest.mark.parametrize(
    ("bounds", "attributes", "problem"),
    [
        ((4, 0), [1.0, 1.0], "--bounds 4 0"),
        ((0, 4), [1.0, float("nan")], "gives nan as questions"),
        ((0, 4), [1.0], "gives 1 attributes"),
    ],
)
def test_labels_that_would_say_nothing_are_refused(bounds, attributes, problem):
    with pytest.raises(UserError, match=problem):
        LabelForm(names=("length", "questions"), bounds=bounds).label(attributes)


def test_a_response_that_is_too_long_has_no_label(jsonl, tmp_path):
    chats = RecordFile(jsonl(chat(3)), read_chat)
    annotate(chats, tmp_path / "out", lambda texts: [None, count(texts[1])], **FORM, batch_size=8)
    turns = json.loads((tmp_path / "out").read_text())["conversations"]
    assert [turn["label"] for turn in turns] == [None, None, None, "length:1,questions:2"]
