# SPDX-License-Identifier: Apache-2.0
"""Rewards of code that passes tests: ``trainer.ppo.rewards.NAME.function=nemo_aligner.environments.code.passes``.

Code runs in :mod:`nemo_aligner.environments.sandbox`. What a test expects never goes there, so that code cannot hand it
back; of an assertion that is no comparison with a literal the sandbox says whether it holds.
"""

import ast
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nemo_aligner.environments.sandbox import Limits, run

_BLOCK = re.compile(r"```[^\n`]*\n(.*?)(?:```|\Z)", re.DOTALL)


@dataclass(frozen=True)
class _Assertions:
    """Tests of what code defines."""

    prelude: str  # statements among them, such as imports
    expressions: Sequence[str]
    expected: Sequence[object]


def passes(
    *,
    response: str,
    row: Mapping[str, Any],
    tests: str = "tests",
    seconds: float = 10.0,
    memory_mb: int = 512,
    partial: bool = False,
    **_: object,
) -> float:
    """Return 1 where the code of a response passes all tests of its row, else 0.

    The code is the last block between ``` marks, else the whole text. Tests are assertions, a text or several, which
    are all evaluated in one run, or {"input": TEXT, "output": TEXT} of a program, a run each.

    Args:
        response: the text.
        row: the prompt's JSON object.
        tests: its key of the tests.
        seconds: of a run.
        memory_mb: of a run.
        partial: give the share of tests that are passed.

    Raises:
        KeyError: the row has no such key.
        ValueError: there are no tests, or they are of another form.
        UserError: this machine has no sandbox.
    """
    if not row.get(tests):
        raise KeyError(f"the row has no {tests!r}, but {', '.join(row)}: set arguments.tests of this reward")
    blocks = _BLOCK.findall(response)
    source = blocks[-1] if blocks else response
    limits = Limits(seconds=seconds, memory=memory_mb << 20)
    given = row[tests]
    if isinstance(given, list) and all(isinstance(test, dict) for test in given):
        passed = [_prints(source, test, limits) for test in given]
    else:
        passed = _holds(source, _assertions(given), limits)
    return sum(passed) / len(passed) if partial else float(all(passed))


def _prints(source: str, test: Mapping[str, Any], limits: Limits) -> bool:
    """True if a program ends well and prints what is expected, but for space at the ends of lines and of all."""
    if not {"input", "output"} <= set(test):
        raise ValueError(f"a test has {', '.join(test)}, and not input and output")
    found = run(source, stdin=str(test["input"]), limits=limits)
    return not found.problem and _lines(found.output) == _lines(str(test["output"]))


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip().splitlines()]


def _holds(source: str, tests: _Assertions, limits: Limits) -> list[bool]:
    found = run(f"{source}\n{tests.prelude}", expressions=tests.expressions, limits=limits)
    values = [*found.values, *[None] * len(tests.expressions)]
    return [_equal(value, wanted) for value, wanted in zip(values, tests.expected, strict=False)]


def _equal(value: str | None, wanted: object) -> bool:
    try:
        return value is not None and bool(ast.literal_eval(value) == wanted)
    except (ValueError, SyntaxError, MemoryError, RecursionError):  # no literal
        return False


def _assertions(given: object) -> _Assertions:
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError(
            f"tests are {type(given).__name__}, and not assertions or a list of input and output"
        )
    statements = ast.parse("\n".join(texts)).body
    asserted = [statement.test for statement in statements if isinstance(statement, ast.Assert)]
    others = [ast.unparse(statement) for statement in statements if not isinstance(statement, ast.Assert)]
    if not asserted:
        raise ValueError("tests have no assertion")
    expressions, expected = zip(*map(_question, asserted), strict=True)
    return _Assertions("\n".join(others), expressions, expected)


def _question(test: ast.expr) -> tuple[str, object]:
    """The expression that is evaluated of an assertion, and its right value."""
    if isinstance(test, ast.Compare) and len(test.ops) == 1 and isinstance(test.ops[0], ast.Eq):
        try:
            return ast.unparse(test.left), ast.literal_eval(test.comparators[0])
        except ValueError:
            pass
    return f"bool({ast.unparse(test)})", True
