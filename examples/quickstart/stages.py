# SPDX-License-Identifier: Apache-2.0
"""What both quick starts share: a folder for each run, a heading for each stage, and scripts run as anyone would."""

import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path

__all__ = ["ROOT", "Stages", "free_port", "metric", "new_folder", "run", "run_beside"]

ROOT = Path(__file__).resolve().parents[2]
GPT = ROOT / "examples/nlp/gpt"
END_SECONDS = 20.0  # for a server to end by itself once it is asked to


def new_folder(results: Path) -> Path:
    """A folder under ``results`` named by the time; ``results/latest`` points to it."""
    folder = results / datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    folder.mkdir(parents=True)
    latest = results / "latest"
    latest.unlink(missing_ok=True)
    latest.symlink_to(folder.name)
    return folder


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


def run(script: str, *arguments: str | Path, threads: int | None = None) -> None:
    """Print the command and run it; its failure ends the quick start with its exit code.

    Args:
        script: in examples/nlp/gpt.
        arguments: of the script.
        threads: of each of its processes; None: as the environment says.
    """
    code = subprocess.run(_announced(script, arguments), cwd=ROOT, env=_env(threads), check=False).returncode
    if code != 0:
        sys.exit(code)


def run_beside(
    server: Sequence[str | Path], script: Sequence[str | Path], *, server_log: Path, max_seconds: float
) -> None:
    """Run a server and, beside it, a script that asks it; when one ends, the other does too.

    A failure of either, or of both to end within ``max_seconds``, ends the quick start.

    Args:
        server: script and arguments of the job that serves until it is asked to end.
        script: script and arguments of the job that is waited for.
        server_log: where the server's output goes; the terminal is the script's.
        max_seconds: until both are ended.
    """
    commands = [_announced(str(name), arguments) for name, *arguments in (server, script)]
    jobs: list[subprocess.Popen] = []
    with server_log.open("wb") as log:
        try:
            # Sessions of their own: Ctrl-C reaches this process alone, which then ends both.
            for command, output in zip(commands, (log, None), strict=True):
                jobs.append(
                    subprocess.Popen(
                        command,
                        cwd=ROOT,
                        env=_env(1),
                        stdout=output,
                        stderr=output,
                        start_new_session=True,
                    )
                )
            problem = _wait(jobs, max_seconds)
        finally:
            _end(jobs)
    if problem:
        sys.exit(f"{problem}\nThe server's output: {server_log}")


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def metric(lines: Sequence[Mapping[str, float]], name: str) -> tuple[list[float], list[float]]:
    """Steps and values of one metric in the lines of a metrics.jsonl."""
    found = [(line["step"], line[name]) for line in lines if name in line]
    return [step for step, _ in found], [value for _, value in found]


def _announced(script: str, arguments: Sequence[str | Path]) -> list[str]:
    words = [str(argument) for argument in arguments]
    print("$ python", shlex.join([os.path.relpath(GPT / script, ROOT), *words]), flush=True)
    return [sys.executable, str(GPT / script), *words]


def _env(threads: int | None) -> dict[str, str]:
    return {**os.environ} if threads is None else os.environ | {"OMP_NUM_THREADS": str(threads)}


def _wait(jobs: Sequence[subprocess.Popen], max_seconds: float) -> str | None:
    """Until the script has ended; what went wrong, if anything did."""
    server, script = jobs
    deadline = time.monotonic() + max_seconds
    while script.poll() is None:
        # A server that the script has asked to end may be gone before the script is.
        if server.poll():
            return f"the server ended early, with exit code {server.returncode}"
        if time.monotonic() > deadline:
            return f"not done after {max_seconds:.0f} s"
        time.sleep(0.1)
    return f"the script ended with exit code {script.returncode}" if script.returncode else None


def _end(jobs: Sequence[subprocess.Popen]) -> None:
    for job in jobs:
        if job.poll() is None:
            job.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + END_SECONDS
    for job in jobs:
        try:
            job.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            # All of its session: what the job has started must not outlive it.
            os.killpg(job.pid, signal.SIGKILL)
            job.wait()
