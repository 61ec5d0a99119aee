# SPDX-License-Identifier: Apache-2.0
"""How deep JSON is nested, against json's own reading of it."""

import json
import random
from typing import Any

import pytest

from nemo_aligner.serving.body import nesting


def made(draw: random.Random, depth: int) -> Any:
    match draw.randrange(4 if depth else 2):
        case 0:
            return draw.choice(['"', "[[[", "\\", '\\"]', "{", "é\n", ""])
        case 1:
            return draw.random()
        case 2:
            return [made(draw, depth - 1) for _ in range(draw.randrange(4))]
        case _:
            return {draw.choice('[]{}"\\a'): made(draw, depth - 1) for _ in range(draw.randrange(3))}


def depth_of(value: Any) -> int:
    match value:
        case list():
            return 1 + max(map(depth_of, value), default=0)
        case dict():
            return 1 + max(map(depth_of, value.values()), default=0)
    return 0


@pytest.mark.parametrize("seed", range(200))
def test_it_is_that_of_the_value(seed: int) -> None:
    value = made(random.Random(seed), 6)
    assert nesting(json.dumps(value, ensure_ascii=bool(seed % 2)).encode()) == depth_of(value)


@pytest.mark.parametrize(
    ("text", "depth"),
    [
        (b"[" * 300_000, 300_000),
        (b'"' + b'\\"' * 300_000 + b"[", 0),
        (b'{"a": "\\', 1),
        (b"", 0),
        (b"]]]", 0),
    ],
)
def test_what_is_no_json_is_looked_at_in_one_pass(text: bytes, depth: int) -> None:
    assert nesting(text) == depth
