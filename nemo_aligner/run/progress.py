# SPDX-License-Identifier: Apache-2.0
"""What a person sees of a run: a bar on a terminal, a line every few seconds in a log."""

import contextlib
import logging
import sys
import threading
import time
from collections.abc import Iterator, Mapping

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

__all__ = ["ProgressBar", "heartbeat"]

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 8.0


@contextlib.contextmanager
def heartbeat(what: str, *, enabled: bool = True) -> Iterator[None]:
    """Say ``what`` is going on, and say it again every few seconds while it lasts."""
    if not enabled:
        yield
        return
    done = threading.Event()
    started = time.monotonic()

    def beat() -> None:
        while not done.wait(SECONDS_BETWEEN_LINES):
            logger.info("%s ... %.0f s", what, time.monotonic() - started)

    logger.info("%s", what)
    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


class ProgressBar:
    """Steps done, with what there is to say of the last one and the time left.

    Args:
        enabled: False on every rank but the one that talks to people.
        name: of the work, before the bar.
        unit: what is counted.
    """

    def __init__(
        self, *, total: int, start: int = 0, enabled: bool, name: str = "train", unit: str = "step"
    ) -> None:
        self._total, self._start, self._enabled, self._unit = total, start, enabled, unit
        self._began = time.monotonic()
        self._last_line = 0.0
        self._bar: Progress | None = None
        if enabled and sys.stderr.isatty():
            self._bar = Progress(
                TextColumn(name),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[metrics]}"),
                TextColumn("ETA"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task(name, total=total, completed=start, metrics="")
            self._bar.start()

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show that ``step`` steps are done, with ``metrics`` ("loss" and "tokens_per_s" among them)."""
        self.show(step, f"loss {metrics['loss']:.4f}  {metrics['tokens_per_s']:.0f} tokens/s")

    def show(self, step: int, text: str) -> None:
        """Show that ``step`` of all are done, and ``text``."""
        if not self._enabled:
            return
        if self._bar is not None:
            self._bar.update(self._task, completed=step, metrics=text)
            return
        now = time.monotonic()
        if step in (self._start + 1, self._total) or now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            left = (now - self._began) / max(1, step - self._start) * (self._total - step)
            logger.info("%s %d/%d  %s  ETA %s", self._unit, step, self._total, text, _clock(left))

    def close(self) -> None:
        """Give the terminal back."""
        if self._bar is not None:
            self._bar.stop()


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
