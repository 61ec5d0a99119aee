# SPDX-License-Identifier: Apache-2.0
"""Evaluations of responses in words: the question to a judge, and the score in its reply."""

import re
from collections.abc import Sequence
from pathlib import Path

from nemo_aligner.errors import UserError

PATTERN = r"[Ss]core: *([0-9]+(?:\.[0-9]+)?)"  # whose group is the score

USUAL = """Judge how well the response below answers the question.

Question:
{prompt}

Response:
{response}

Give one point each if the response
- is about the question,
- covers a good part of what is asked,
- answers the main point in a way that helps,
- is clear, well ordered and complete,
- is what an expert would have written, with nothing beside the point.

Write one or two sentences of reasons. Then end with "Score: " and the sum of the points, from 0 to 5.
"""


def fill(template: str, *, prompt: str, response: str) -> str:
    """The template with both texts in it, whatever braces these have.

    >>> fill("Q: {prompt} A: {response}", prompt="{response}?", response="{x}")
    'Q: {response}? A: {x}'
    """
    texts = {"{prompt}": prompt, "{response}": response}
    return re.sub(r"\{prompt\}|\{response\}", lambda match: texts[match[0]], template)


def read_template(path: str | None, *, setting: str) -> str:
    """The text of the file, or the usual one.

    Raises:
        UserError: the file cannot be read, or lacks {prompt} or {response}.
    """
    if path is None:
        return USUAL
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{setting}={path} cannot be read: {error}", fix="give a text file in UTF-8"
        ) from error
    missing = [name for name in ("{prompt}", "{response}") if name not in text]
    if missing:
        raise UserError(
            f"{setting}={path} has no {missing[0]}", fix=f"write {missing[0]} where that text belongs"
        )
    return text


def read_score(text: str, pattern: str) -> float | None:
    """The last score in a text, which is the pattern's group, in range or not; None if there is none."""
    found = re.findall(pattern, text)
    try:
        return float(found[-1])
    except (IndexError, ValueError):
        return None


def mean_score(scores: Sequence[float | None], *, low: float, high: float) -> float:
    """The mean of those from ``low`` to ``high``; ``low`` if there are none."""
    known = [score for score in scores if score is not None and low <= score <= high]
    return sum(known) / len(known) if known else low
