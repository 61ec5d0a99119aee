# SPDX-License-Identifier: Apache-2.0
"""Starts the ranks of ``trainer.devices=N`` on this machine, and ends all of them when one ends badly."""

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from nemo_aligner.run.stop import STOP_SIGNALS

__all__ = ["follow_parent", "start_ranks"]

GRACE_SECONDS = 4.0  # for ranks to end by themselves after one has failed, or after a signal
END_SIGNALS = (signal.SIGINT, signal.SIGHUP)
_PR_SET_PDEATHSIG = 1


def follow_parent() -> None:
    """End this rank when its starter is gone, however that ended (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != int(os.environ["NEMO_ALIGNER_STARTER"]):
            os._exit(1)


def start_ranks(count: int) -> int:
    """Run the command of this process once per rank, and wait.

    The ranks meet in a file of a temporary folder, so no port is chosen; their own temporary files go there too.

    SIGTERM and SIGUSR1 are handed on: a rank that trains saves first, so their end is waited for. SIGINT and SIGHUP,
    and a SIGTERM after the first, end the ranks within seconds.

    Returns:
        0 if all ranks ended well, else the exit code of the first that did not; 128 + N after signal N.
    """
    folder = Path(tempfile.mkdtemp(prefix="nemo_aligner_ranks_"))
    ranks: list[subprocess.Popen] = []
    # Signals end the ranks below, in order; the defaults would leave them or the folder behind.
    before = {number: signal.signal(number, _interrupt) for number in END_SIGNALS}
    before |= {number: signal.signal(number, _hand_on(ranks)) for number in STOP_SIGNALS}
    try:
        for rank in range(count):
            # A session of its own: Ctrl-C reaches this process alone, which then ends the ranks.
            command = [sys.executable, *sys.orig_argv[1:]]
            env = os.environ | _place(rank, count, folder)
            ranks.append(subprocess.Popen(command, env=env, start_new_session=True))
        return _wait(ranks)
    except _Interrupted as stop:
        sys.stderr.write(f"{stop.signal.name}: the {count} ranks are stopped\n")
        _end(ranks, first=signal.SIGINT)
        return 128 + stop.signal
    finally:
        # Asked first: a killed rank leaves behind what it was writing beside its output.
        _end(ranks, first=signal.SIGTERM)
        shutil.rmtree(folder, ignore_errors=True)
        for number, handler in before.items():
            signal.signal(number, handler)


def _place(rank: int, count: int, folder: Path) -> dict[str, str]:
    """The environment that tells a rank where it stands."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "NEMO_ALIGNER_INIT_METHOD": f"file://{folder}/ranks",
        "NEMO_ALIGNER_STARTER": str(os.getpid()),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // count)),
        "TMPDIR": str(folder),
    }


class _Interrupted(Exception):
    def __init__(self, number: int) -> None:
        self.signal = signal.Signals(number)


def _hand_on(ranks: Sequence[subprocess.Popen]) -> Callable[[int, object], None]:
    asked: list[int] = []

    def handler(number: int, frame: object) -> None:
        if asked and number == signal.SIGTERM:
            _interrupt(number, frame)
        asked.append(number)
        sys.stderr.write(f"{signal.Signals(number).name}: the {len(ranks)} ranks are asked to save and end\n")
        for rank in ranks:
            rank.send_signal(number)

    return handler


def _interrupt(number: int, _: object) -> None:
    # From here on signals are ignored. Ending takes seconds at most, and another one would leave ranks behind.
    for other in (*END_SIGNALS, *STOP_SIGNALS):
        signal.signal(other, signal.SIG_IGN)
    raise _Interrupted(number)


def _wait(ranks: Sequence[subprocess.Popen]) -> int:
    while True:
        codes = [rank.poll() for rank in ranks]
        if failed := [code for code in codes if code]:
            break
        if None not in codes:
            return 0
        time.sleep(0.05)
    _settle(ranks)
    # A rank that was killed is the reason; the others only miss it, and may even be seen to end first.
    for index, rank in enumerate(ranks):
        if rank.returncode is not None and rank.returncode < 0:
            name = signal.Signals(-rank.returncode).name
            sys.stderr.write(f"rank {index} was ended by {name}; the other ranks are stopped\n")
            return 128 - rank.returncode
    return failed[0]


def _settle(ranks: Sequence[subprocess.Popen]) -> None:
    """Wait a while for ranks to end by themselves."""
    deadline = time.monotonic() + GRACE_SECONDS
    while time.monotonic() < deadline and any(rank.poll() is None for rank in ranks):
        time.sleep(0.05)


def _end(ranks: Sequence[subprocess.Popen], *, first: signal.Signals) -> None:
    for number in (first, signal.SIGKILL):
        for rank in ranks:
            if rank.poll() is None:
                rank.send_signal(number)
        _settle(ranks)
    for rank in ranks:
        rank.wait()
