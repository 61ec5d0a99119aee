# SPDX-License-Identifier: Apache-2.0
"""Meetings of three ranks, all cases side by side: ``python meeting_worker.py OUT_FOLDER``.

Each rank that lives to tell writes OUT_FOLDER/<case>/rank<n>.
"""

import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from nemo_aligner.parallel import meeting

RANKS = 3
CASES = ("busy", "late", "nested", "fails", "dies", "store-dies")
TIMEOUT = timedelta(seconds=4)
BUSY_SECONDS = 10.0  # longer than the time-out


def join(rank: int, out: Path) -> None:
    """Over TCP, as the ranks of a job: the store lives in rank 0 and ends with it."""
    port = out / "port"
    if rank == 0:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        (out / "port.part").write_text(str(store.port))
        (out / "port.part").rename(port)
    else:
        while not port.exists():
            time.sleep(0.01)
        store = dist.TCPStore("127.0.0.1", int(port.read_text()), is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=TIMEOUT)


def act(case: str, rank: int) -> None:
    if case == "busy" and rank in (0, 2):
        time.sleep(BUSY_SECONDS / (rank + 1))
    if case == "fails" and rank == 1:
        raise ValueError("no room on the disk")
    if case == "dies" and rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if case == "store-dies" and rank == 0:
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGKILL)
    if case == "late" and rank == 1:
        time.sleep(0.5)


def run_rank(case: str, rank: int, out: Path) -> None:
    join(rank, out)
    told = "met"
    try:
        for _ in range(3 if case == "late" else 1):
            with meeting.at_own_pace(timeout=TIMEOUT):
                if case == "nested":
                    with meeting.at_own_pace(timeout=TIMEOUT):
                        act("late", rank)
                    act("busy", rank)
                act(case, rank)
        dist.barrier()  # a collective after it is in time
    except (meeting.RankLost, ValueError) as error:
        told = str(error)
    (out / f"rank{rank}").write_text(told)
    # The store's rank is the last to go, as the launcher has it.
    others = [n for n in range(1, RANKS) if (case, n) != ("dies", 1)]
    while rank == 0 and not all((out / f"rank{n}").exists() for n in others):
        time.sleep(0.05)


def main(out: Path) -> None:
    children = []
    for case in CASES:
        (out / case).mkdir()
        for rank in range(RANKS):
            if (pid := os.fork()) == 0:
                try:
                    run_rank(case, rank, out / case)
                except BaseException:
                    sys.excepthook(*sys.exc_info())
                finally:
                    sys.stderr.flush()
                    os._exit(0)
            children.append(pid)
    for pid in children:
        os.waitpid(pid, 0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
