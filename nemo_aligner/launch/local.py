# SPDX-License-Identifier: Apache-2.0
"""Starts the ranks of ``trainer.devices=N`` on this machine, and ends all of them when one ends badly."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import psutil

from nemo_aligner.launch.stacks import STACKS_SIGNAL, forward_stacks_request
from nemo_aligner.launch.subprocesses import STARTER_VARIABLE, end, exit_code, settle, stop_signals_handled
from nemo_aligner.parallel.ranks import Ranks
from nemo_aligner.run.stop import Terminated
from nemo_aligner.serving.cleanup import OWNER, mark_owner, owner_lives

FOLDER_PREFIX = "nemo_aligner_ranks_"
GRACE_SECONDS = 4.0  # for ranks to end by themselves after one has failed, or after a signal


def start_ranks(count: int, *, node: Ranks | None = None) -> int:
    """Run the command of this process once per rank, and wait.

    The ranks meet in a file of a temporary folder, so no port is chosen; their own temporary files go there too.

    Args:
        count: of ranks on this machine.
        node: this process among others, each of which starts as many; their ranks meet where it says. None: it is
            alone.

    SIGTERM, SIGUSR1 and SIGINT are handed on: a rank that trains saves first, so their end is waited for. SIGHUP, and a
    SIGTERM or SIGINT after another signal, end the ranks within seconds. SIGUSR2 has each rank write its stacks.

    Returns:
        0 if all ranks ended well, else the exit code of the first that did not; 128 + N after signal N.
    """
    _remove_abandoned()
    folder = Path(tempfile.mkdtemp(prefix=FOLDER_PREFIX))
    mark_owner(folder)
    ranks: list[subprocess.Popen] = []
    # Signals end the ranks below, in order; the defaults would leave them or the folder behind.
    with stop_signals_handled(partial(_hand_on, ranks)):
        try:
            for rank in range(count):
                # A session of its own: Ctrl-C reaches this process alone, which then hands it on.
                command = [sys.executable, *sys.orig_argv[1:]]
                env = os.environ | _place(rank, count, folder, node)
                ranks.append(subprocess.Popen(command, env=env, start_new_session=True))
            names = [(f"rank {rank}", process) for rank, process in enumerate(ranks)]
            signal.signal(STACKS_SIGNAL, forward_stacks_request(names))
            return _wait(ranks)
        except Terminated as stop:
            sys.stderr.write(f"{stop.signal.name}: the {count} ranks are stopped\n")
            end(ranks, first=signal.SIGINT, seconds=GRACE_SECONDS)
            return 128 + stop.signal
        finally:
            # Asked first: a killed rank leaves behind what it was writing beside its output.
            end(ranks, first=signal.SIGTERM, seconds=GRACE_SECONDS)
            shutil.rmtree(folder, ignore_errors=True)


def _remove_abandoned() -> None:
    """Remove the folders that starters which were killed have left, once their ranks have ended too."""
    folders = [path for path in Path(tempfile.gettempdir()).glob(f"{FOLDER_PREFIX}*") if _is_abandoned(path)]
    if folders:
        in_use = {_temporary_folder(process) for process in psutil.process_iter()}
        for folder in folders:
            if str(folder) not in in_use:
                shutil.rmtree(folder, ignore_errors=True)


def _is_abandoned(folder: Path) -> bool:
    # One without a mark is another user's, or about to get it.
    return os.access(folder / OWNER, os.R_OK | os.W_OK) and not owner_lives(folder)


def _temporary_folder(process: psutil.Process) -> str:
    try:
        return process.environ().get("TMPDIR", "")
    except psutil.Error:
        return ""


def _place(rank: int, count: int, folder: Path, node: Ranks | None) -> dict[str, str]:
    """The environment from which a rank knows its place."""
    before, nodes = (0, 1) if node is None else (node.rank * count, node.world_size)
    return {
        "RANK": str(before + rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(nodes * count),
        "LOCAL_WORLD_SIZE": str(count),
        "NEMO_ALIGNER_INIT_METHOD": f"file://{folder}/ranks" if node is None else node.init_method,
        STARTER_VARIABLE: str(os.getpid()),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // count)),
        "TMPDIR": str(folder),
    }


def _hand_on(ranks: Sequence[subprocess.Popen], number: int) -> None:
    more = "; once more ends them at once" if number == signal.SIGINT else ""
    sys.stderr.write(
        f"{signal.Signals(number).name}: the {len(ranks)} ranks are asked to save and end{more}\n"
    )
    for rank in ranks:
        rank.send_signal(number)


def _wait(ranks: Sequence[subprocess.Popen]) -> int:
    while True:
        codes = [rank.poll() for rank in ranks]
        if failed := [code for code in codes if code]:
            break
        if None not in codes:
            return 0
        time.sleep(0.05)
    settle(ranks, seconds=GRACE_SECONDS)
    # A rank that was killed is the reason; the others only miss it, and may even be seen to end first.
    for index, rank in enumerate(ranks):
        if rank.returncode is not None and rank.returncode < 0:
            name = signal.Signals(-rank.returncode).name
            sys.stderr.write(f"rank {index} was ended by {name}; the other ranks are stopped\n")
            return exit_code(rank)
    return failed[0]
