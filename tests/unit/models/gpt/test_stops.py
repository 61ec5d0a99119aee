# SPDX-License-Identifier: Apache-2.0
"""Where responses end, with a tokenizer whose tokens are parts of words and of characters."""

from collections.abc import Sequence

import pytest

from nemo_aligner.models.gpt.stops import Stops

PIECES = [b"Hello", b" wor", b"ld", b"\n\nUs", b"er", b":", b" er: x", b"\xc3", b"\xa9", b"", b"a"]
EOS, TURN = 20, 21


class Bytes:
    """Decodes as byte-level tokenizers do; two tokens are special, and one of those has a name."""

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(PIECES[i] if i < len(PIECES) else b"" for i in ids).decode(errors="replace")

    def token_id(self, token: str) -> int | None:
        return {"<turn>": TURN}.get(token)


def first_end(tokens: Sequence[int], stops: Stops) -> int | None:
    """How many tokens a response of these has when it ends."""
    return next((i + 1 for i, token in enumerate(tokens) if stops(tokens[:i], token)), None)


@pytest.mark.parametrize(
    ("tokens", "ends", "expected"),
    [
        ([0, 1, EOS, 2], (), 3),
        ([0, 1, 2], (), None),
        ([0, TURN, 2], (), None),
        ([0, TURN, 2], ("<turn>",), 2),
        ([0, 3, 4, 5, 0], ("\n\nUser:",), 4),
        ([0, 3, 6, 0], ("\n\nUs er:",), 3),  # ends within a token
        ([0, 3, 4, 0], ("\n\nUser:",), None),
        ([0, 7, 8, 0], ("é",), 3),  # ends within a character's bytes
        ([0, 1, 2], ("world", "lo w"), 2),
        ([3, 4, 9, 9, 5], ("User:",), 5),  # tokens without a text in between
        ([5], ("User:",), None),  # the prompt is no part of the response
    ],
)
def test_ends(tokens: list[int], ends: tuple[str, ...], expected: int | None):
    assert first_end(tokens, Stops.of((EOS,), ends, Bytes())) == expected


def test_ids_are_those_that_end_alone():
    assert Stops.of((EOS,), ("User:", "<turn>"), Bytes()).ids == (EOS, TURN)
    assert Stops.of((), (), None).ids == ()


def test_few_tails_are_read():
    """Tokens in which no end string can end cost nothing after their first time."""
    read = []

    class Counting(Bytes):
        def decode(self, ids: Sequence[int]) -> str:
            read.append(len(ids))
            return super().decode(ids)

    stops = Stops.of((EOS,), ("User:",), Counting())
    for _ in range(100):
        assert first_end([0, 1, 2, 10], stops) is None
    assert read == [2] * 4
