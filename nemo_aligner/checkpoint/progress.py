# SPDX-License-Identifier: Apache-2.0
"""Log lines for long work, so that no conversion is silent for long."""

import logging
import time

__all__ = ["Progress"]

_SECONDS_BETWEEN_LINES = 5.0

_log = logging.getLogger(__name__)


class Progress:
    """Logs how far a piece of work has come, at most once every few seconds.

    Args:
        what: what is being done, the start of each line.
        total: the amount of work in ``unit``.
        unit: what is counted, such as "tensors".
    """

    def __init__(self, what: str, *, total: int, unit: str) -> None:
        self._what, self._total, self._unit = what, total, unit
        self._done = 0
        self._next_line = time.monotonic() + _SECONDS_BETWEEN_LINES

    def advance(self, amount: int = 1) -> None:
        """Counts ``amount`` more as done."""
        self._done += amount
        if time.monotonic() < self._next_line:
            return
        self._next_line = time.monotonic() + _SECONDS_BETWEEN_LINES
        share = 100 * self._done // max(self._total, 1)
        _log.info("%s: %d of %d %s (%d %%)", self._what, self._done, self._total, self._unit, share)
