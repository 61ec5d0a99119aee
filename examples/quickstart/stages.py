# SPDX-License-Identifier: Apache-2.0
"""The common part of both quick starts: a folder for each run, a heading for each stage, and plain scripts."""

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path

from rich.console import Console

__all__ = ["ROOT", "Stages", "metric", "new_folder", "run", "terminal"]

ROOT = Path(__file__).resolve().parents[2]
GPT = ROOT / "examples/nlp/gpt"
END_SECONDS = 30.0  # for a script to end by itself once it is asked to
PATIENCE_SECONDS = 900.0  # without a change in what a script writes; a busy machine's longest step takes less
POLL_SECONDS = 0.5
FILE_COLUMNS = 110  # of a table that is not printed to a terminal
STACKS_SECONDS = 3.0  # for a script that is given up to show where it stands


def new_folder(results: Path) -> Path:
    """A folder under ``results`` named by the time; ``results/latest`` points to it."""
    folder = results / datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    folder.mkdir(parents=True)
    latest = results / "latest"
    latest.unlink(missing_ok=True)
    latest.symlink_to(folder.name)
    return folder


def terminal() -> Console:
    """Where tables are printed: as wide as the terminal, and readable in a file."""
    return Console(width=None if sys.stdout.isatty() else FILE_COLUMNS)


class Stages:
    """Counts stages, and the seconds since the first one."""

    def __init__(self, total: int) -> None:
        self._total, self._done, self._started = total, 0, time.monotonic()

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self._started

    def next(self, text: str) -> None:
        """Print the heading of the next stage."""
        self._done += 1
        print(f"\n== {self._done}/{self._total} {text} [{self.seconds:.0f} s]", flush=True)


def run(
    script: str,
    *arguments: str | Path,
    threads: int | None = None,
    folder: Path | None = None,
    patience: float = PATIENCE_SECONDS,
) -> None:
    """Print the command and run it; its failure ends the quick start with its exit code.

    There is no limit to how long it takes, as that depends on the machine and on what else it does.

    Args:
        script: in examples/nlp/gpt.
        arguments: of the script.
        threads: of each of its processes; None: as the environment says.
        folder: where it writes; None: it is waited for whatever happens.
        patience: seconds without a change in ``folder``, after which it is given up, and the quick start ends too.
    """
    words = [str(argument) for argument in arguments]
    print("$ python", shlex.join([os.path.relpath(GPT / script, ROOT), *words]), flush=True)
    env = os.environ if threads is None else os.environ | {"OMP_NUM_THREADS": str(threads)}
    process = subprocess.Popen([sys.executable, str(GPT / script), *words], cwd=ROOT, env=env)
    try:
        code = process.wait() if folder is None else _wait_while_it_writes(process, script, folder, patience)
    finally:
        _end(process)
    if code != 0:
        sys.exit(code)


def _wait_while_it_writes(process: subprocess.Popen, script: str, folder: Path, patience: float) -> int:
    """The exit code; what has written nothing for ``patience`` seconds shows its stacks and ends the quick start."""
    seen, changed = _newest(folder), time.monotonic()
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(POLL_SECONDS)
        if (now := _newest(folder)) != seen:
            seen, changed = now, time.monotonic()
        if time.monotonic() - changed > patience:
            process.send_signal(signal.SIGUSR2)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STACKS_SECONDS)
            sys.exit(
                f"{script} has written nothing into {folder} for {patience:.0f} s and is given up\n"
                f"Fix: read the end of {folder / 'output.log'}, where its jobs say what they wait for; free memory or "
                "processors if other programs hold them, and start again"
            )


def _newest(folder: Path) -> int:
    """When a file below ``folder`` was last written, in ns; 0 where there is none."""
    times = [0]
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # a temporary file may be gone by now
            times.append(path.stat().st_mtime_ns)
    return max(times)


def metric(lines: Sequence[Mapping[str, float]], name: str) -> tuple[list[float], list[float]]:
    """Steps and values of one metric in the lines of a metrics.jsonl."""
    found = [(line["step"], line[name]) for line in lines if name in line]
    return [step for step, _ in found], [value for _, value in found]


def _end(process: subprocess.Popen) -> None:
    """Have a script that still runs save and end. After Ctrl-C it is already about to, and does not mind."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
