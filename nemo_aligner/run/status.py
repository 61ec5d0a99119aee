# SPDX-License-Identifier: Apache-2.0
"""status.json: what a run is doing, how far it is and how it ended, for people and for programs that watch it."""

import json
import logging
import os
import socket
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from nemo_aligner.run.stop import StoppedEarly, Terminated

logger = logging.getLogger(__name__)

STATUS = "status.json"
_SECONDS_BETWEEN_WRITES = 1.0


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


@dataclass(kw_only=True)
class RunStatus:
    """A run's state, kept in ``path``. What cannot be written is logged: no run ends for it."""

    path: Path
    state: Literal["starting", "running", "done", "stopped", "failed"] = "starting"
    step: int | None = None  # optimizer steps done
    max_steps: int | None = None  # of the run; null: not known
    last_step_at: str | None = None  # when the last step of this process was done
    started_at: str = field(default_factory=_now)
    ended_at: str | None = None
    ended_by: str | None = None  # "its last step", a setting, a signal or "an error"
    error: str | None = None
    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)

    def __post_init__(self) -> None:
        self._written = float("-inf")

    def begin(self, step: int, max_steps: int | None) -> None:
        """The run trains, after ``step`` steps."""
        self.state, self.step, self.max_steps = "running", step, max_steps
        self.write()

    def advance(self, step: int) -> None:
        """``step`` steps are done. Written at most once a second."""
        self.step, self.last_step_at = step, _now()
        if time.monotonic() - self._written >= _SECONDS_BETWEEN_WRITES:
            self.write()

    def end(self, error: BaseException | None) -> None:
        """The run has ended, by ``error`` if it was not by its last step."""
        self.ended_at = _now()
        match error:
            case None:
                self.state, self.ended_by = "done", "its last step"
            case StoppedEarly():
                self.state, self.ended_by = "stopped", error.reason
            case Terminated():
                self.state, self.ended_by = "stopped", error.signal.name
            case KeyboardInterrupt():
                self.state, self.ended_by = "stopped", "SIGINT"
            case _:
                self.state, self.ended_by = "failed", "an error"
                self.error = str(error) or type(error).__name__
        self.write()

    def write(self) -> None:
        """Put it into the file, whole."""
        values = {name: value for name, value in asdict(self).items() if name != "path"}
        fresh = self.path.with_suffix(".tmp")
        try:
            fresh.write_text(json.dumps(values, indent=2) + "\n")
            fresh.replace(self.path)
        except OSError as error:
            logger.warning("%s cannot be written: %s", self.path, error)
        self._written = time.monotonic()
