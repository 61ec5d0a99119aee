# SPDX-License-Identifier: Apache-2.0
"""Conversations in the layouts that files have: what is read, what is learned, what is refused."""

import json

import pytest

from nemo_aligner.data.conversations import Turn, read_chat
from nemo_aligner.errors import UserError

NEMO = {
    "system": "Be brief.",
    "conversations": [
        {"from": "User", "value": "Hi"},
        {"from": "Assistant", "value": "Hello", "label": "quality:4"},
    ],
    "mask": "User",
    "type": "VALUE_TO_TEXT",
}


USER = {"role": "user", "content": "Hi"}
REPLY = {"role": "assistant", "content": "Hello"}


def test_conversations():
    chat = read_chat(NEMO)
    assert (chat.system, chat.mask, chat.kind) == ("Be brief.", "User", "VALUE_TO_TEXT")
    assert chat.turns == (
        Turn(speaker="User", text="Hi"),
        Turn(speaker="Assistant", text="Hello", label="quality:4"),
    )
    assert [chat.learned(i) for i in range(2)] == [False, True]


def test_messages_say_the_same():
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
    ]
    plain = {
        **NEMO,
        "type": None,
        "conversations": [{"from": "User", "value": "Hi"}, {"from": "Assistant", "value": "Hello"}],
    }
    chats = [read_chat(row) for row in ({"messages": messages}, plain)]
    assert [chat.messages for chat in chats] == [messages] * 2
    assert [[chat.learned(i) for i in range(2)] for chat in chats] == [[False, True]] * 2


def test_system_mask_and_type_may_be_left_out():
    chat = read_chat({"conversations": NEMO["conversations"]})
    assert (chat.system, chat.mask, chat.kind) == ("", "User", None)


def test_the_first_turn_is_context_except_where_labels_are_predicted():
    row = {**NEMO, "mask": "Assistant", "conversations": NEMO["conversations"][:2]}
    with pytest.raises(UserError, match="no turn is learned"):
        read_chat(row)
    assert read_chat({**row, "type": "TEXT_TO_VALUE"}).learned(0)


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"input": "a", "output": "b"}, "key 'conversations' is missing"),
        ({**NEMO, "conversations": []}, "key 'conversations' has the value \\[\\]"),
        ({**NEMO, "conversations": ["Hi"]}, "list of JSON objects"),
        ({**NEMO, "conversations": [{"from": "User"}]}, "key 'value' is missing"),
        ({**NEMO, "conversations": NEMO["conversations"][:1]}, "no turn is learned"),
        ({**NEMO, "mask": "Human"}, "key 'mask' is 'Human', but the speakers are"),
        ({**NEMO, "type": "TEXT"}, "key 'type' is 'TEXT'"),
        ({"messages": [{"role": "bot", "content": "x"}]}, "role 'bot'"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "key 'content' has the value"),
        ({"messages": [{"role": "system", "content": "x"}]}, "no turn is learned"),
        ({"messages": []}, "key 'messages' holds no list of messages"),
        ({"messages": [USER, {"role": "assistant"}]}, "key 'content' is missing"),
        ({"messages": [USER, {"role": "assistant", "content": [{"type": "image"}]}]}, "only parts of text"),
        ({"messages": [USER, REPLY | {"weight": 0.5}]}, "key 'weight' has the value 0.5"),
        ({"messages": [USER, REPLY | {"train": "no"}]}, "key 'train' has the value no"),
        ({"messages": [USER | {"weight": 1}, REPLY]}, "would have the role 'user' learned"),
        ({"messages": [USER, REPLY], "weight": 2}, "key 'weight' has the value 2"),
        ({"messages": [USER, REPLY], "tools": "search"}, "which is no JSON"),
        ({"messages": [USER, REPLY], "tools": [1]}, "key 'tools' has the value"),
    ],
)
def test_bad_conversations(row, problem):
    with pytest.raises(UserError, match=problem):
        read_chat(row)


@pytest.mark.parametrize(
    ("row", "learned"),
    [
        ({"messages": [USER, REPLY, USER, REPLY]}, [1, 3]),
        ({"messages": [USER, REPLY | {"weight": 0}, USER, REPLY | {"weight": 1}]}, [3]),
        ({"messages": [USER, REPLY, USER | {"weight": 0}, REPLY | {"train": False}]}, [1]),
        ({"messages": [USER, REPLY | {"weight": None}]}, [1]),
        ({"messages": [REPLY, USER, REPLY]}, [2]),
        ({"messages": [{"role": "system", "content": ""}, REPLY, USER, REPLY]}, [0, 2]),
        ({"messages": [USER, REPLY], "weight": 0}, []),
        ({"messages": [USER, REPLY], "train": False}, []),
        ({**NEMO, "conversations": [*NEMO["conversations"], NEMO["conversations"][1] | {"weight": 0}]}, [1]),
    ],
)
def test_weights_say_which_turns_are_learned(row, learned):
    chat = read_chat(row)
    assert [i for i in range(len(chat.turns)) if chat.learned(i)] == learned
    assert chat.masked == (not learned)
    assert not any({"weight", "train"} & message.keys() for message in chat.messages)


def test_messages_keep_what_templates_read():
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    messages = [
        {"role": "system", "content": ""},
        {"role": "user", "content": "Hi", "name": "Ann"},
        {"role": "assistant", "tool_calls": [call], "reasoning_content": "think"},
        {"role": "tool", "content": "2", "tool_call_id": "a"},
        {"role": "assistant", "content": "Hello"},
    ]
    padded = [message | {"refusal": None} for message in messages]
    row = {"messages": padded, "tools": json.dumps([{"type": "function"}])}
    chat = read_chat(row)
    assert chat.messages == messages
    assert chat.tools == [{"type": "function"}]
    assert [chat.learned(i) for i in range(len(chat.turns))] == [False, True, False, True]


def test_parts_of_text_are_joined():
    parts = [{"type": "text", "text": "He"}, {"type": "text", "text": "llo"}]
    assert read_chat({"messages": [USER, REPLY | {"content": parts}]}).messages == [USER, REPLY]
