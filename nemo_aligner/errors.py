# SPDX-License-Identifier: Apache-2.0
"""The one error type that speaks to users. Scripts print it without a traceback; every other error is a bug."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["UserError"]


class UserError(ValueError):
    """A mistake that the person at the keyboard can mend.

    Args:
        problem: what is wrong, naming the setting, file or line, and its value.
        cure: what to do about it; printed as the last line.

    >>> print(UserError("trainer.devices=3 does not divide by TP=2", cure="set trainer.devices=4"))
    trainer.devices=3 does not divide by TP=2
    Cure: set trainer.devices=4
    """

    def __init__(self, problem: str, *, cure: str) -> None:
        self.problem = problem
        self.cure = cure
        super().__init__(f"{problem}\nCure: {cure}")

    def __reduce__(self) -> tuple[Callable[[str, str], UserError], tuple[str, str]]:
        # Exceptions cross process borders when a rank reports to its starter; keyword-only arguments need this.
        return (_rebuild, (self.problem, self.cure))


def _rebuild(problem: str, cure: str) -> UserError:
    return UserError(problem, cure=cure)
