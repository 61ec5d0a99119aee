# SPDX-License-Identifier: Apache-2.0
"""Child processes and the signals that end them: first asked, then killed. Knows neither ranks nor jobs."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from nemo_aligner.launch.stacks import STACKS_SIGNAL
from nemo_aligner.run.stop import STOP_SIGNALS, Terminated

END_SIGNALS = (signal.SIGINT, signal.SIGHUP)
STARTER_VARIABLE = "NEMO_ALIGNER_STARTER"  # the process id of who started this process
_PR_SET_PDEATHSIG = 1
_POLL_SECONDS = 0.05

Handler = Callable[[int, object], None] | signal.Handlers  # as signal.signal takes it


def interrupt(number: int, _: object) -> None:
    """A handler that raises :class:`Terminated`: children are to be ended within seconds."""
    # From here on signals are ignored. Ending takes seconds at most, and another one would leave children behind.
    for other in (*END_SIGNALS, *STOP_SIGNALS):
        signal.signal(other, signal.SIG_IGN)
    raise Terminated(number)


@contextmanager
def stop_signals_handled(act: Callable[[int], None]) -> Iterator[list[int]]:
    """Within it, SIGTERM, SIGUSR1 and SIGINT are acted upon, and kept in the list that it gives.

    SIGHUP, and a SIGTERM or SIGINT after another signal, raise :class:`Terminated`.
    """
    asked: list[int] = []

    def note(number: int, frame: object) -> None:
        if asked and number in (signal.SIGTERM, signal.SIGINT):
            interrupt(number, frame)
        asked.append(number)
        act(number)

    handlers: dict[signal.Signals, Handler] = dict.fromkeys(END_SIGNALS, interrupt)
    handlers |= dict.fromkeys((signal.SIGINT, *STOP_SIGNALS), note)
    # Inherited until a child has a handler of its own, before which the signal would end it.
    handlers[STACKS_SIGNAL] = signal.SIG_IGN
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def follow_parent(number: signal.Signals) -> None:
    """Get this signal when the starter is gone, however that ended (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
        if os.getppid() != int(os.environ[STARTER_VARIABLE]):
            os._exit(1)


def settle(children: Sequence[subprocess.Popen], *, seconds: float) -> None:
    """Wait a while for children to end by themselves."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and any(child.poll() is None for child in children):
        time.sleep(_POLL_SECONDS)


def end(children: Sequence[subprocess.Popen], *, first: signal.Signals, seconds: float) -> None:
    """Ask children to end by the signal ``first``, and kill those that have not in some seconds."""
    for number in (first, signal.SIGKILL):
        for child in children:
            if child.poll() is None:
                child.send_signal(number)
        settle(children, seconds=seconds)
    for child in children:
        child.wait()


def exit_code(child: subprocess.Popen) -> int:
    """As shells count: 128 + N after signal N."""
    code = child.wait()
    return code if code >= 0 else 128 - code
