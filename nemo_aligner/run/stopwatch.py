# SPDX-License-Identifier: Apache-2.0
"""How long the phases of a step take."""

import contextlib
import time
from collections.abc import Iterator


class Stopwatch:
    """Seconds by name, and since it was made; a name that is timed again adds up."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._started = time.perf_counter()

    @property
    def elapsed(self) -> float:
        """Seconds since it was made."""
        return time.perf_counter() - self._started

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time what happens within."""
        started = time.perf_counter()
        yield
        self.note(name, time.perf_counter() - started)

    def note(self, name: str, seconds: float) -> None:
        """Add what was timed elsewhere."""
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds
