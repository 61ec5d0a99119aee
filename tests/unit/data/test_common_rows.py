# SPDX-License-Identifier: Apache-2.0
"""Rows of public data sets: each form is recognised, said once, and nothing that carries meaning is dropped."""

import logging

import pytest

from nemo_aligner.data.common_rows import Recognised, alpaca_prompt, as_input_output, messages_row, prompt_of
from nemo_aligner.errors import UserError

KEYS = ("input", "output")
PLAIN = {"input": "1+1", "output": "2"}
# Stanford Alpaca's train.py, PROMPT_DICT.
ALPACA = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nAdd {input} up\n\n### Input:\n1 1\n\n### Response:"
)
ALPACA_ALONE = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nAdd {input} up\n\n### Response:"
)


def read(row, keys=KEYS):
    return as_input_output(row, keys=keys, recognised=Recognised("x"))


@pytest.mark.parametrize(
    "row",
    [
        PLAIN,
        {"prompt": "1+1", "completion": "2", "id": 7, "tools": [], "weight": 1, "train": True},
        {"prompt": "1+1", "response": "2", "score": float("nan"), "system": ""},
        {"question": "1+1", "answer": "2"},
        {"problem": "1+1", "solution": "2"},
        {"problem": "1+1", "generated_solution": "2", "expected_answer": "2", "problem_source": "x"},
        {"instruction": "1+1", "context": "", "response": "2", "category": "x"},
        {"instruction": "", "input": "1+1", "output": "2", "weight": 1.0, "history": []},
        {"instruction": None, "input": "1+1", "output": "2"},
    ],
)
def test_prompt_and_response(row):
    assert {key: read(row)[key] for key in KEYS} == PLAIN


def test_alpaca_keeps_its_instruction():
    row = {"instruction": "Add {input} up", "input": "1 1", "output": "2"}
    assert read(row) == {"input": ALPACA, "output": "2"}
    for nothing in ("", None):
        assert read({**row, "input": nothing}) == {"input": ALPACA_ALONE, "output": "2"}
    assert alpaca_prompt({"instruction": "Add {input} up"}) == ALPACA_ALONE
    assert read(row, ("instruction", "input", "output")) == row


@pytest.mark.parametrize(
    ("extra", "key"),
    [
        ({"tools": [{"name": "f"}]}, "tools"),
        ({"weight": 0}, "weight"),
        ({"weight": 0.5}, "weight"),
        ({"weight": True}, "weight"),
        ({"train": False}, "train"),
        ({"train": 0}, "train"),
        ({"instruction": "Be kind."}, "instruction"),
        ({"reasoning_content": "Let me see."}, "reasoning_content"),
        ({"tool_calls": [{}]}, "tool_calls"),
        ({"system": "Be brief."}, "system"),
        ({"history": [["a", "b"]]}, "history"),
        ({"images": ["a.png"]}, "images"),
    ],
)
@pytest.mark.parametrize("row", [PLAIN, {"prompt": "1+1", "completion": "2"}, {"text": "1+1"}])
def test_keys_that_carry_meaning_are_refused(row, extra, key):
    if key in ("weight", "train") and "text" not in row:
        assert read({**row, **extra})  # the layout leaves such rows out
        return
    if key == "instruction" and row is PLAIN:
        assert "Be kind." in str(read({**row, **extra})["input"])
        return
    with pytest.raises(UserError, match=f"key '{key}' has the value") as caught:
        prompt_of({**row, **extra}, Recognised("x")) if "text" in row else read({**row, **extra})
    assert key in caught.value.fix


def test_a_field_that_the_template_names_is_read():
    row = {**PLAIN, "system": "Be brief.", "weight": None}
    assert read(row, ("system", "input", "output")) == row


def test_a_row_of_two_responses_is_ambiguous():
    with pytest.raises(UserError, match="which of them are the prompt and its response") as caught:
        read({"prompt": "1+1", "completion": "2", "response": "3"})
    assert "prompt_template" in caught.value.fix


def test_a_form_is_said_once(caplog):
    recognised = Recognised("x.jsonl")
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            as_input_output({"prompt": "a", "completion": "b"}, keys=KEYS, recognised=recognised)
            as_input_output(PLAIN, keys=KEYS, recognised=recognised)
    assert [record.getMessage() for record in caplog.records] == [
        "x.jsonl holds rows of {prompt, completion}: read as {input, output}"
    ]


USER, ASSISTANT = {"role": "user", "content": "1+1"}, {"role": "assistant", "content": "2"}


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER, ASSISTANT]},
        {"conversations": [{"from": "human", "value": "1+1"}, {"from": "gpt", "value": "2"}]},
        {"conversations": [{"from": "user", "value": "1+1"}, {"from": "assistant", "value": "2"}]},
        {"conversations": [USER, ASSISTANT]},
        {"conversation": [USER, ASSISTANT]},
        {"prompt": "1+1", "completion": "2"},
        PLAIN,
        {"instruction": "1+1", "input": "", "output": "2"},
        {"instruction": "1+1", "context": "", "response": "2"},
    ],
)
def test_conversations(row):
    assert messages_row(row, Recognised("x"))["messages"] == [USER, ASSISTANT]


def test_sharegpt_keeps_system_tools_and_weights():
    row = {
        "system": "Be brief.",
        "tools": [{"name": "f"}],
        "conversations": [
            {"from": "human", "value": "1+1"},
            {"from": "gpt", "value": "?", "weight": 0},
            {"from": "tool", "value": "2"},
        ],
    }
    assert messages_row(row, Recognised("x")) == {
        "tools": [{"name": "f"}],
        "messages": [
            {"role": "system", "content": "Be brief."},
            USER,
            {"role": "assistant", "content": "?", "weight": 0},
            {"role": "tool", "content": "2"},
        ],
    }


def test_nemos_own_conversations_stay():
    row = {
        "system": "",
        "mask": "User",
        "conversations": [{"from": "User", "value": "a"}, {"from": "Assistant", "value": "b"}],
    }
    assert messages_row(row, Recognised("x")) is row


def test_of_a_prompt_and_its_completion_only_that_is_learned():
    row = {"prompt": [USER, ASSISTANT, USER], "completion": [ASSISTANT]}
    flags = [entry.get("train", True) for entry in messages_row(row, Recognised("x"))["messages"]]
    assert flags == [False, False, False, True]


@pytest.mark.parametrize(
    "row",
    [
        {"text": "1+1"},
        {"prompt": "1+1"},
        {"question": "1+1", "answer": "2"},
        {"prompt": [USER]},
        {"messages": [USER]},
        {"conversations": [{"from": "human", "value": "1+1"}]},
    ],
)
def test_prompts(row):
    assert prompt_of(row, Recognised("x")) in ("1+1", [USER])


SQUAD = {
    "id": "7",
    "title": "Cats",
    "context": "Ann has two cats. ",
    "question": "How many?",
    "answers": {"text": ["two", "2"], "answer_start": [8, 8]},
}
SQUAD_PROMPT = "Context: Ann has two cats. Question: How many? Answer:"


def test_squad_asks_with_its_context():
    recognised = Recognised("x")
    assert read(SQUAD) == {"input": SQUAD_PROMPT, "output": "two"}
    assert prompt_of(SQUAD, recognised) == SQUAD_PROMPT
    turns = messages_row(SQUAD, recognised)["messages"]
    assert [turn["content"] for turn in turns] == [SQUAD_PROMPT, "two"]
    assert read(SQUAD, ("context", "question", "answers")) == SQUAD


@pytest.mark.parametrize("answers", [{"text": []}, {}, None, ["two"], {"text": "two"}])
def test_squad_without_an_answer_is_refused(answers: object):
    with pytest.raises(UserError, match="key 'answers' has the value"):
        read(SQUAD | {"answers": answers})
