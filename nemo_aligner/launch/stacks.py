# SPDX-License-Identifier: Apache-2.0
"""Where a process is: Python stacks of all its threads on SIGUSR2 and at a crash, on stderr. Knows no job."""

import faulthandler
import signal
import sys
import time
from collections.abc import Callable, Sequence
from subprocess import Popen

STACKS_SIGNAL = signal.SIGUSR2
_STDERR = 2  # the process's own, whatever a library has put into sys.stderr
_WRITING_SECONDS = 0.2  # for one process to write its stacks before the next one begins


def show_stacks_on_signal() -> None:
    """From here on SIGUSR2 writes the stacks of all threads to stderr, and the process goes on; so does a crash."""
    faulthandler.enable(_STDERR)
    faulthandler.register(STACKS_SIGNAL, _STDERR, all_threads=True)


def forward_stacks_request(children: Sequence[tuple[str, Popen]]) -> Callable[[int, object], None]:
    """A handler of SIGUSR2 that has each of the named children write its stacks, one after the other.

    Args:
        children: (name, process); those of them that have ended are left out. The list may grow.
    """

    def handler(number: int, _: object) -> None:
        for name, child in children:
            if child.poll() is None:
                sys.stderr.write(
                    f"{signal.Signals(number).name}: the stacks of {name} (process {child.pid}) follow on its stderr\n"
                )
                sys.stderr.flush()
                child.send_signal(number)
                time.sleep(_WRITING_SECONDS)

    return handler
