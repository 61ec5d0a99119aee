# SPDX-License-Identifier: Apache-2.0
"""The one error type that speaks to users, and others' errors over damaged files as that one.

Scripts print it without a traceback; every other error is a bug.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator

_LONGEST_PROBLEM = 3000  # characters
_LONGEST_SHOWN = 200  # characters of a library's message


class UserError(ValueError):
    """A mistake that the person at the keyboard can mend.

    Args:
        problem: what is wrong, naming the setting, file or line, and its value.
        fix: what to do about it; printed as the last line.

    >>> print(UserError("trainer.devices=3 does not divide by TP=2", fix="set trainer.devices=4"))
    trainer.devices=3 does not divide by TP=2
    Fix: set trainer.devices=4
    """

    def __init__(self, problem: str, *, fix: str) -> None:
        self.problem = problem = _writable(problem)
        self.fix = fix = fix.encode("utf-8", "backslashreplace").decode()
        super().__init__(f"{problem}\nFix: {fix}")

    def __reduce__(self) -> tuple[Callable[[str, str], UserError], tuple[str, str]]:
        # Exceptions cross process borders when a rank reports to its starter; keyword-only arguments need this.
        return (_rebuild, (self.problem, self.fix))


class Unwound(Exception):
    """Carries a :class:`UserError` past whoever would report it too early.

    Attributes:
        error: for people.
    """

    def __init__(self, error: UserError) -> None:
        self.error = error
        super().__init__(str(error))


def _writable(text: str) -> str:
    """Text that any terminal and log can hold, though it may quote what a damaged file says."""
    text = text.encode("utf-8", "backslashreplace").decode()
    if len(text) <= _LONGEST_PROBLEM:
        return text
    end = f" ... ({len(text)} characters)"
    return text[: _LONGEST_PROBLEM - len(end)] + end


def _rebuild(problem: str, fix: str) -> UserError:
    return UserError(problem, fix=fix)


@contextlib.contextmanager
def located(where: Callable[[], str]) -> Generator[None]:
    """Within it, the problem of a UserError begins with what ``where`` says, as in "FILE, line 3: "."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where()}{error.problem}", fix=error.fix) from error


@contextlib.contextmanager
def report_damage(what: str, *, fix: str) -> Generator[None]:
    """Raise whatever a reader of foreign bytes raises as a UserError that begins with ``what``.

    Unpicklers and parsers fail over damaged bytes in every way there is, Rust's panics among them. What the machine
    lacks (memory, a file that cannot be opened) is not the bytes' fault and passes.
    """
    try:
        yield
    except (UserError, MemoryError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        is_panic = type(error).__name__ == "PanicException"  # pyo3's, which is no Exception
        if not (is_panic or isinstance(error, Exception)):
            raise
        if isinstance(error, OSError) and error.filename is not None:
            raise
        line = next(iter(str(error).strip().split("\n")), "")[:_LONGEST_SHOWN] or type(error).__name__
        raise UserError(f"{what}: {line}", fix=fix) from error
