# SPDX-License-Identifier: Apache-2.0
"""One row as JSON: what is refused that Python's parser lets pass, or dies of."""

import json
import sys

import pytest

from nemo_aligner.data.row_files import parse_line, shorten
from nemo_aligner.errors import UserError


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"a": ' + "[" * 1000 + "1" + "]" * 1000 + "}", "nested more than 100 deep"),
        ('{"a": ' + "[" * 300_000, "nested more than 100 deep"),
        ('{"a":' * 101 + "1" + "}" * 101, "nested more than 100 deep"),
        ('{"a": ' + "7" * 5000 + "}", "more digits than Python reads"),
        ('{"a": 1, "b": 2, "a": 3}', "key 'a' is there twice"),
        ('{"a": {"b": 2, "b": 3}}', "key 'b' is there twice"),
        ('{"a": 1} {"b": 2}', "not JSON"),
        ("{'a': 1}", "not JSON"),
        ("\x00" * 50, "not JSON"),
        ("null", "not a JSON object but NoneType"),
        ("x" * 10_000, "not JSON"),
    ],
)
def test_bad_lines(line, problem):
    with pytest.raises(UserError, match=problem) as caught:
        parse_line(line.encode())
    assert len(str(caught.value)) < 300


def test_nesting_is_judged_by_the_text_alone():
    deep = '{"a": ' + "[" * 98 + '"[[[{"' + "]" * 98 + "}"
    assert parse_line(deep.encode())

    def below(frames: int) -> object:
        return below(frames - 1) if frames else parse_line(deep.encode())

    assert below(sys.getrecursionlimit() - 250)
    assert parse_line(b'{"a": "%s"}' % (b"[{" * 500))


def test_what_is_shown_can_be_written():
    for value in (chr(0xD83D) * 99, {"a": [chr(0xD83D), float("nan")]}, 10**5000, b"x"):
        assert len(shorten(value).encode()) < 600


def test_what_json_means():
    row = {"a": [1, 2.5, None, True, {"b": "\u2028é"}], "c": 1e300}
    for ascii_only in (False, True):
        assert parse_line(json.dumps(row, ensure_ascii=ascii_only).encode()) == row
