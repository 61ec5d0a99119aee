# SPDX-License-Identifier: Apache-2.0
"""Rewards of texts: 1 where a number is right, or a pattern is there, else 0.

Named as any reward function is: ``trainer.ppo.rewards.NAME.function=nemo_aligner.environments.rules.gsm8k``.
"""

import re
from collections.abc import Mapping
from decimal import Decimal, InvalidOperation
from typing import Any

BOX = "\\boxed{"  # what LaTeX marks a result with
_NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?|-?\$?\.\d+")


def gsm8k(*, response: str, row: Mapping[str, Any], ground_truth: str = "answer", **_: object) -> float:
    """Numbers, as in GSM8K: the one behind ``####``, else the last one of the response; "1,000" is 1000.0.

    Args:
        response: the text.
        row: the prompt's JSON object.
        ground_truth: its key of the right number, or of a text with it behind ``####``.

    Raises:
        KeyError: the row has no such key.
        ValueError: there is no number in it.

    >>> gsm8k(response="They have 1,000 dollars.", row={"sum": "500 + 500 = 1000\\n#### 1000"}, ground_truth="sum")
    1.0
    >>> gsm8k(response="#### 18, I think; not 17", row={"sum": "17"}, ground_truth="sum")
    0.0
    """
    right = _last_number(of_row(row, ground_truth))
    if right is None:
        raise ValueError(f"the row's {ground_truth!r} has no number")
    return float(_last_number(response) == right)


def matches(*, response: str, pattern: str, **_: object) -> float:
    r"""A format: the response holds a match of the regular expression, in which ``.`` is a new line, too.

    >>> matches(response="<think>\n2\n</think> 4", pattern=r"\A<think>.*</think> \d+\Z")
    1.0
    """
    return float(re.search(pattern, response, re.DOTALL) is not None)


def final_result(text: str) -> str:
    r"""Return what a text comes to: the content of its last ``\boxed{}``, else its last number, else its last line.

    >>> final_result(r"so \boxed{\frac{1}{2}}."), final_result("That is $1,000.0"), final_result("It is\nB\n")
    ('\\frac{1}{2}', '1000', 'B')
    """
    if BOX in text:
        return boxed(text)
    number = _last_number(text)
    if number is not None:
        return f"{number.normalize():f}"
    return next(reversed(text.strip().splitlines()), "")


def boxed(text: str) -> str:
    r"""Return the content of the last ``\boxed{}``, else all of the text."""
    start = text.rfind(BOX)
    if start < 0:
        return text.strip()
    depth, begin = 1, start + len(BOX)
    for end in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[begin:end].strip()
    return text[begin:].strip()


def of_row(row: Mapping[str, Any], ground_truth: str) -> str:
    """The ground truth, which the row has under that key.

    Raises:
        KeyError: it has none.
    """
    if ground_truth not in row:
        raise KeyError(
            f"the row has no {ground_truth!r}, but {', '.join(row)}: set arguments.ground_truth of this reward"
        )
    return str(row[ground_truth])


def _last_number(text: str) -> Decimal | None:
    """The first number behind the last ####, if there is one, else the last number."""
    _, mark, behind = text.rpartition("####")
    found = _NUMBER.findall(behind if mark else text)
    if not found:
        return None
    try:
        return Decimal(re.sub("[$,]", "", found[0 if mark else -1]))
    except InvalidOperation:
        return None
