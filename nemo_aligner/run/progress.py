# SPDX-License-Identifier: Apache-2.0
"""The progress of a run: a bar on a terminal, a line every few seconds in a log."""

import contextlib
import logging
import re
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 8.0
WIDE, BAR_COLUMNS = 120, 40  # columns of a terminal that has room for all, and of the bar in it
# What a bar says where there is no terminal, behind the time that the log puts before it.
LINE = "%s %d/%d  %s  ETA %s"
_LINE = re.compile(r"(?:\[[\d:]+\] )?(?P<unit>\w+) (?P<step>\d+)/(?P<total>\d+)  (?P<text>.*)  ETA [\d:]+\s*")


def read_line(line: str) -> tuple[str, int, int, str] | None:
    """(unit, step, total, text) of a line that a bar has logged in another process; None for other lines.

    >>> read_line("[12:00:00] step 3/40  loss 1.5000  90 tokens/s  ETA 0:01:02")
    ('step', 3, 40, 'loss 1.5000  90 tokens/s')
    """
    found = _LINE.fullmatch(line)
    return None if found is None else (found["unit"], int(found["step"]), int(found["total"]), found["text"])


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
            console = Console(stderr=True)
            narrow = console.width < WIDE
            self._bar = Progress(
                TextColumn(name),
                BarColumn(bar_width=None if narrow else BAR_COLUMNS),
                MofNCompleteColumn(table_column=Column(min_width=2 * len(str(total)) + 1)),
                TextColumn("{task.fields[metrics]}", table_column=Column(no_wrap=True, overflow="ellipsis")),
                TextColumn("ETA"),
                TimeRemainingColumn(table_column=Column(min_width=len("0:00:00"))),
                console=console,
                expand=narrow,  # to the terminal's width and no further: a line that wraps leaves copies
            )
            self._task = self._bar.add_task(name, total=total, completed=start, metrics="")
            self._bar.start()
            self._streams = _log_above_bar()

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show that ``step`` steps are done, with ``metrics`` ("loss" and "tokens_per_s" among them, perhaps "acc")."""
        accuracy = f"  accuracy {metrics['acc']:.3f}" if "acc" in metrics else ""
        self.show(step, f"loss {metrics['loss']:.4f}{accuracy}  {metrics['tokens_per_s']:.0f} tokens/s")

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
            logger.info(LINE, self._unit, step, self._total, text, _clock(left))

    def close(self) -> None:
        """Give the terminal back."""
        if self._bar is not None:
            for handler, stream in self._streams:
                handler.setStream(stream)
            self._bar.stop()


def _log_above_bar() -> list[tuple[logging.StreamHandler, TextIO]]:
    """Have the log write to what the bar has put in place of stderr, which moves the bar out of the way.

    Returns:
        Each handler with the stream that it had.
    """
    found = []
    for handler in logging.getLogger().handlers:
        if type(handler) is logging.StreamHandler and handler.stream in (sys.__stderr__, sys.__stdout__):
            found.append((handler, handler.stream))
            handler.setStream(sys.stderr)
    return found


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
