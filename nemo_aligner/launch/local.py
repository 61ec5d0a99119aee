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
from collections.abc import Sequence
from pathlib import Path

__all__ = ["follow_parent", "start_ranks"]

GRACE_SECONDS = 4.0  # for ranks to end by themselves after one has failed, or after a signal
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

    Returns:
        0 if all ranks ended well, else the exit code of the first that did not.
    """
    folder = Path(tempfile.mkdtemp(prefix="nemo_aligner_ranks_"))
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // count))
    ranks: list[subprocess.Popen] = []
    # Signals end the ranks below, in order; the default would leave them behind.
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        for rank in range(count):
            env = os.environ | {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(count),
                "NEMO_ALIGNER_INIT_METHOD": f"file://{folder}/ranks",
                "NEMO_ALIGNER_STARTER": str(os.getpid()),
                "OMP_NUM_THREADS": threads,
                "TMPDIR": str(folder),
            }
            # A session of its own: Ctrl-C reaches this process alone, which then ends the ranks.
            command = [sys.executable, *sys.orig_argv[1:]]
            ranks.append(subprocess.Popen(command, env=env, start_new_session=True))
        return _wait(ranks)
    except _Interrupted as stop:
        _end(ranks, first=signal.SIGINT)
        return 128 + stop.signal
    finally:
        _end(ranks, first=signal.SIGKILL)
        signal.signal(signal.SIGTERM, before)
        shutil.rmtree(folder, ignore_errors=True)


class _Interrupted(Exception):
    def __init__(self, number: int) -> None:
        self.signal = number


def _interrupt(number: int, _: object) -> None:
    raise _Interrupted(number)


def _wait(ranks: Sequence[subprocess.Popen]) -> int:
    try:
        while True:
            codes = [rank.poll() for rank in ranks]
            failed = next((i for i, code in enumerate(codes) if code not in (None, 0)), None)
            if failed is not None:
                code = ranks[failed].returncode
                if code < 0:
                    name = signal.Signals(-code).name
                    sys.stderr.write(f"rank {failed} was ended by {name}; the other ranks are stopped\n")
                _settle(ranks)
                return code if code > 0 else 128 - code
            if None not in codes:
                return 0
            time.sleep(0.05)
    except KeyboardInterrupt:
        raise _Interrupted(signal.SIGINT) from None


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
