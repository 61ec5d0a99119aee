# SPDX-License-Identifier: Apache-2.0
"""What users are told: text that can be written, whatever a damaged file says and however its reader fails."""

import json
import pickle

import pytest

from nemo_aligner.errors import UserError, report_damage


class PanicException(BaseException):
    """As Rust's panics are raised."""


def told(error: BaseException) -> UserError:
    with pytest.raises(UserError) as caught, report_damage("a.bin is damaged", fix="get it again"):
        raise error
    return caught.value


@pytest.mark.parametrize(
    "error",
    [
        ValueError("first\nsecond"),
        RecursionError("first"),
        KeyError("first"),
        pickle.UnpicklingError("first"),
        OSError(22, "first"),
        PanicException("first"),
    ],
)
def test_whatever_a_reader_raises_is_reported_of_the_file(error):
    error = told(error)
    assert error.problem.startswith("a.bin is damaged: ")
    assert "first" in error.problem
    assert "\n" not in error.problem


@pytest.mark.parametrize(
    "error",
    [
        UserError("a", fix="b"),
        MemoryError(),
        KeyboardInterrupt(),
        SystemExit(3),
        OSError(13, "denied", "a.bin"),
    ],
)
def test_what_is_not_the_bytes_fault_passes(error):
    with pytest.raises(type(error)) as caught, report_damage("a.bin is damaged", fix="get it again"):
        raise error
    assert caught.value is error


def test_an_error_without_words_has_its_name():
    assert told(EOFError()).problem == "a.bin is damaged: EOFError"


def test_a_message_can_be_written_and_read():
    text = json.loads('"\\ud83d"')
    error = UserError(f"key {text} " + "x" * 100_000, fix=f"remove {text}")
    assert len(str(error).encode()) < 4000
    assert "\\ud83d" in error.problem
    assert "\\ud83d" in error.fix
    again = pickle.loads(pickle.dumps(error))
    assert (again.problem, again.fix) == (error.problem, error.fix)
