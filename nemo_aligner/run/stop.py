# SPDX-License-Identifier: Apache-2.0
"""Why a run may end before its plan does: somebody asks it to, or its time is up. Either way it saves first."""

import re
import signal
import time
from collections import defaultdict
from types import FrameType, TracebackType
from typing import Self

import psutil

from nemo_aligner.errors import UserError

__all__ = ["SAVED_CODE", "STOP_SIGNALS", "StopRequest", "StoppedEarly", "TimeLimit", "seconds_of"]

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
SAVED_CODE = 75  # EX_TEMPFAIL of sysexits.h: not done, and the same command goes on


class StoppedEarly(Exception):
    """The run has ended in order before its plan did.

    Attributes:
        exit_code: of the process.
    """

    def __init__(self, message: str, *, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class StopRequest:
    """Within it, SIGTERM and SIGUSR1 are noted and acted upon between two steps."""

    def __init__(self) -> None:
        self.number = 0  # of the signal that came; 0: none

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002 - Python's signature
        self.number = number


class TimeLimit:
    """``exp_manager.max_time_per_run``, from the start of the process.

    It is up while there is still room for what may come before the end: the longest step, the longest validation and
    twice the longest save so far.
    """

    def __init__(self, seconds: float | None) -> None:
        self._seconds = seconds
        self._started = psutil.Process().create_time()
        self._longest: dict[str, float] = defaultdict(float)

    def note(self, what: str, seconds: float) -> None:
        """Remember how long one of "step", "validation" and "save" took."""
        self._longest[what] = max(self._longest[what], seconds)

    @property
    def is_up(self) -> bool:
        """Whether another step might go beyond the limit."""
        if self._seconds is None:
            return False
        room = self._longest["step"] + self._longest["validation"] + 2 * self._longest["save"]
        return time.time() - self._started + room >= self._seconds


def seconds_of(duration: str | None, key: str) -> float | None:
    """Seconds of days:hours:minutes:seconds.

    Raises:
        UserError: it is written in another way; ``key`` names the setting.

    >>> seconds_of("00:03:45:00", "exp_manager.max_time_per_run"), seconds_of(None, "")
    (13500.0, None)
    """
    if duration is None:
        return None
    if not re.fullmatch(r"\d+:\d+:\d+:\d+", duration):
        raise UserError(
            f"{key}={duration} is no duration",
            cure=f"write days:hours:minutes:seconds, as in {key}=00:03:45:00",
        )
    days, hours, minutes, seconds = map(int, duration.split(":"))
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)
