# SPDX-License-Identifier: Apache-2.0
"""Why a run may end before its plan does: somebody asks it to, or its time is up. Either way it saves first."""

import os
import re
import signal
import time
from collections import defaultdict
from types import FrameType
from typing import Self

import psutil

from nemo_aligner.errors import UserError

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
SAME_KEY_SECONDS = 1.0
SAVED_CODE = 75  # EX_TEMPFAIL of sysexits.h: not done, and the same command goes on


def saved_code(number: int) -> int:
    """The exit code of a run that has been saved and ends by signal ``number``; 0: by its time limit."""
    if number == signal.SIGINT:
        return 128 + number  # as shells expect of what a person has stopped
    return SAVED_CODE if number else 0


class StoppedEarly(Exception):
    """The run has ended in order before its plan did.

    Attributes:
        reason: a signal's name, or the setting that ended it.
        exit_code: of the process.
    """

    def __init__(self, message: str, *, reason: str, exit_code: int) -> None:
        super().__init__(message)
        self.reason, self.exit_code = reason, exit_code


class Terminated(BaseException):
    """A signal that ends the process, unwound as Ctrl-C is, so that temporary files and child processes go."""

    def __init__(self, number: int) -> None:
        self.signal = signal.Signals(number)
        super().__init__(self.signal.name)


class StopRequest:
    """Within it, SIGTERM, SIGUSR1 and the first Ctrl-C are noted and acted upon at the next occasion.

    A second Ctrl-C ends the process as Ctrl-C does. Where a shell has Ctrl-C ignored, it stays ignored.

    Args:
        interrupts: whether Ctrl-C is noted.
        logs: whether this process logs that it has been.
    """

    def __init__(self, *, interrupts: bool = False, logs: bool = False) -> None:
        self.number = 0  # of the signal that came; 0: none
        self._interrupts, self._logs = interrupts, logs
        self._interrupted_at = float("-inf")

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        if self._interrupts and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            self._before[signal.SIGINT] = signal.signal(signal.SIGINT, self._note_interrupt)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002 - Python's signature
        self.number = number

    def _note_interrupt(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.number == signal.SIGINT:
            # One key reaches a rank twice where its starter hands it on, too.
            if now - self._interrupted_at > SAME_KEY_SECONDS:
                raise KeyboardInterrupt
            return
        self._interrupted_at = now
        self._note(number, frame)
        if self._logs:
            os.write(2, b"Ctrl-C: the run is saved and ends; once more ends it at once\n")


class TimeLimit:
    """``exp_manager.max_time_per_run``, from the start of the process.

    It is up while there is still room for what may come before the end: the longest step, the longest validation and
    twice the longest save so far.
    """

    def __init__(self, seconds: float | None) -> None:
        self._seconds = seconds
        # From here on a clock that nobody can set.
        self._started = time.monotonic() - max(0.0, time.time() - psutil.Process().create_time())
        self._longest: dict[str, float] = defaultdict(float)

    def note(self, what: str, seconds: float) -> None:
        """Remember how long one of "step", "validation" and "save" took."""
        self._longest[what] = max(self._longest[what], seconds)

    @property
    def is_up(self) -> bool:
        """True if another step might go beyond the limit."""
        if self._seconds is None:
            return False
        room = self._longest["step"] + self._longest["validation"] + 2 * self._longest["save"]
        return time.monotonic() - self._started + room >= self._seconds


def seconds_of(duration: str | None, key: str) -> float | None:
    """Seconds of days:hours:minutes:seconds.

    Raises:
        UserError: it is written in another way; ``key`` names the setting.

    >>> seconds_of("00:03:45:00", "exp_manager.max_time_per_run"), seconds_of(None, "")
    (13500.0, None)
    """
    if duration is None:
        return None
    if not re.fullmatch(r"\d{1,9}(:\d{1,9}){3}", duration):
        raise UserError(
            f"{key}={duration} is no duration",
            fix=f"write days:hours:minutes:seconds, as in {key}=00:03:45:00",
        )
    days, hours, minutes, seconds = map(int, duration.split(":"))
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)
