# SPDX-License-Identifier: Apache-2.0
"""Tools: what a turn calls, what comes back, and how an episode ends."""

import json

import pytest

from nemo_aligner.environments.tools import Tools, python

FUNCTIONS = {"loads": "json.loads", "python": "nemo_aligner.environments.tools.python"}


def call(text: str) -> str:
    return f"I ask.\n<tool_call>\n{text}\n</tool_call>"


def results(turn: str, **given: object) -> list[str]:
    tools = Tools(FUNCTIONS, **given)
    tools.reset({}, seed=0)
    messages, reward = tools.step(turn)
    assert reward == 0
    assert all(message["role"] == "tool" for message in messages)
    return [message["content"] for message in messages]


def test_each_call_of_a_turn_has_its_result():
    first = json.dumps({"name": "loads", "arguments": {"s": "[1, 2]"}})
    second = json.dumps({"name": "loads", "parameters": {"s": '"text"'}})
    assert results(call(first) + call(second)) == ["[1, 2]", "text"]


@pytest.mark.parametrize(
    ("text", "result"),
    [
        ("{", 'error: a call is a JSON object, {"name": ..., "arguments": {...}}'),
        ("[1]", 'error: a call is a JSON object, {"name": ..., "arguments": {...}}'),
        ('{"arguments": {}}', 'error: a call is a JSON object, {"name": ..., "arguments": {...}}'),
        ('{"name": "rm", "arguments": {}}', "error: there is no rm, but loads, python"),
        ('{"name": "loads", "arguments": {"s": "{"}}', "error: JSONDecodeError: Expecting property name"),
        ('{"name": "loads", "arguments": {"t": 1}}', "error: TypeError: loads() missing 1 required"),
        ('{"name": "loads", "arguments": 3}', "error: TypeError: "),
        ("[" * 100000, 'error: a call is a JSON object, {"name": ..., "arguments": {...}}'),
        ('{"name": ["loads"], "arguments": {}}', "error: there is no ['loads'], but loads, python"),
    ],
)
def test_a_call_that_cannot_be_made_is_reported_to_the_policy(text: str, result: str):
    (found,) = results(call(text))
    assert found.startswith(result)


def test_a_long_result_is_cut():
    text = json.dumps({"name": "loads", "arguments": {"s": json.dumps("x" * 99)}})
    assert results(call(text), longest=10) == ["x" * 10]


def test_another_mark_of_calls():
    text = '[CALL]{"name": "loads", "arguments": {"s": "3"}}[/CALL]'
    assert results(text, pattern=r"\[CALL\](.*?)\[/CALL\]") == ["3"]


def test_the_last_turn_is_rewarded():
    tools = Tools(
        FUNCTIONS, reward="nemo_aligner.environments.rules.gsm8k", reward_arguments={"ground_truth": "sum"}
    )
    for answer, reward in (("It is 4.", 1.0), ("It is 5.", 0.0)):
        tools.reset({"sum": "#### 4"}, seed=0)
        assert tools.step(answer) == (None, reward)


def test_python_says_what_it_prints_and_why_it_failed():
    assert python("print(6 * 7)") == "42"
    assert python("print(1)\n1 / 0") == "1\nZeroDivisionError: division by zero"
    with pytest.raises(TypeError):
        python("print(1)", seconds=100000)  # the policy sets no limits
    assert "PermissionError" in python("open('/tmp/x', 'w')")
