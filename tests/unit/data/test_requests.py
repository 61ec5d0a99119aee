# SPDX-License-Identifier: Apache-2.0
"""What a row asks for, and its tokens."""

import pytest

from nemo_aligner.data.requests import plain_prompt, read_request
from nemo_aligner.data.row import Row
from nemo_aligner.errors import UserError

CHAT = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"text": "a"}, "a"),
        ({"prompt": "a", "id": 3}, "a"),
        ({"prompt": "a", "weight": 0, "tools": []}, "a"),
        ({"messages": [CHAT[0] | {"name": None}]}, CHAT),
        ({"prompt": CHAT}, CHAT),
        ({"messages": CHAT, "prompt": "hi"}, CHAT),
    ],
)
def test_prompts(row: dict, prompt: object):
    assert read_request(row).prompt == prompt


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"input": "a"}, r"asks for nothing: it has \['input'\]"),
        ({"text": 3}, "key 'text' has the value 3"),
        ({"messages": "hi"}, "key 'messages' holds no list"),
        ({"messages": []}, "key 'messages' holds no list"),
        ({"messages": [{"role": "user"}]}, "key 'content' is missing"),
        ({"text": "a", "system": "Be brief."}, "key .system. has the value Be brief., which changes"),
        ({"prompt": "a", "tools": [{"name": "f"}]}, "key 'tools' has the value"),
    ],
)
def test_bad_rows(row: dict, problem: str):
    with pytest.raises(UserError, match=problem):
        read_request(row)


@pytest.mark.parametrize(
    ("extras", "shown"),
    [
        ({"text": "What is it?"}, "<rendered>"),
        ({"messages": [{"role": "user", "content": "What is it?"}]}, "What is it?"),
        (
            {"conversations": [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "Hi"}]},
            "system: Be brief.\n\nuser: Hi",
        ),
    ],
)
def test_a_prompt_in_plain_words_has_no_marks_of_a_template(extras: dict[str, object], shown: str):
    row = Row(sequences=(), text="<rendered>", extras=extras)
    assert plain_prompt(row) == shown
