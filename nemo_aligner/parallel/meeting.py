# SPDX-License-Identifier: Apache-2.0
"""Work that some ranks have more of than others, after which all meet.

A collective fails when a rank is later than the collective time-out, and cannot distinguish a rank that is busy from
one that is dead. Here busy ranks give signs of life through the store that the ranks met by, and the others wait as
long as they do. Nothing is sent but a few bytes for each rank every few seconds.
"""

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

SIGN_SECONDS = 5.0  # between two signs of life
POLL_SECONDS = 0.5  # at most, between two looks of a rank that waits
REPORT_SECONDS = 2.0  # for the rank that failed to say why, before the others end


class RankLost(RuntimeError):
    """A rank failed, or gave no sign of life for as long as the collective time-out."""


@dataclass
class _Meetings:
    """The meetings of one thread of each rank, numbered as they begin; ranks hold them in the same order."""

    name: str
    count: int = 0
    signs: int = 0
    ended: int | None = None  # the number of the one that ended last
    seen: tuple[str, float] = ("", 0.0)  # the next rank's last sign, and when it was new

    def key(self, what: str) -> str:
        return f"nemo_aligner/meeting/{self.name}/{what}"


_meetings: dict[str, _Meetings] = {}


def leave() -> None:
    """Forget the world's meetings: the next world has a store of its own, and perhaps other ranks."""
    _meetings.clear()


@contextlib.contextmanager
def at_own_pace(*, name: str = "main", timeout: timedelta) -> Iterator[None]:
    """Around work that each rank does, or has none of; left when all ranks have done theirs. Called by every rank.

    Collectives within are as anywhere, and so are meetings.

    Args:
        name: of the thread; each that holds meetings beside training has a name of its own.
        timeout: without a sign of life from a rank, after which it counts as dead.

    Raises:
        RankLost: a rank failed or died meanwhile.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        yield
        return
    meetings = _meetings.setdefault(name, _Meetings(name))
    number = meetings.count = meetings.count + 1
    store = dist.distributed_c10d._get_default_store()
    done = threading.Event()
    period = min(SIGN_SECONDS, timeout.total_seconds() / 4)
    signs = threading.Thread(target=_give_signs, args=(meetings, number, store, done, period), daemon=True)
    signs.start()
    try:
        yield
    except BaseException:
        with contextlib.suppress(dist.DistError):  # the store may be gone, as its rank is
            store.set(meetings.key(f"{number}/lost"), f"rank {dist.get_rank()} failed")
        raise
    finally:
        done.set()
        signs.join()
    try:
        _meet(meetings, number, store, timeout.total_seconds())
    except dist.DistError as error:
        raise RankLost("the rank that holds the store of all is gone") from error


def _give_signs(
    meetings: _Meetings, number: int, store: dist.Store, done: threading.Event, period: float
) -> None:
    while True:
        meetings.signs += 1
        try:
            store.set(meetings.key(f"rank{dist.get_rank()}"), f"{number} {meetings.signs}")
        except dist.DistError:
            return  # the store's rank is gone; whoever waits next reports
        if done.wait(period):
            return


def _meet(meetings: _Meetings, number: int, store: dist.Store, timeout: float) -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    store.set(meetings.key(f"rank{rank}"), f"{number} done")
    all_there, lost = meetings.key(f"{number}/all"), meetings.key(f"{number}/lost")
    if store.add(meetings.key(f"{number}/count"), 1) == size:
        store.set(all_there, "")
    meetings.seen = "", time.monotonic()
    pause = 0.001
    while not store.check([all_there]):
        if store.check([lost]):
            time.sleep(REPORT_SECONDS)
            raise RankLost(store.get(lost).decode())
        if problem := _next_rank_is_lost(meetings, number, store, timeout):
            store.set(lost, problem)
        time.sleep(pause)
        pause = min(2 * pause, POLL_SECONDS)
    if rank == 0 and meetings.ended is not None:
        # All have left the one that ended before.
        for what in ("count", "all"):
            store.delete_key(meetings.key(f"{meetings.ended}/{what}"))
    meetings.ended = number


def _next_rank_is_lost(meetings: _Meetings, number: int, store: dist.Store, timeout: float) -> str | None:
    """Each rank that waits looks at the next one: of several that are missing, the first is reported."""
    neighbour = (dist.get_rank() + 1) % dist.get_world_size()
    key = meetings.key(f"rank{neighbour}")
    sign = store.get(key).decode() if store.check([key]) else ""
    last, since = meetings.seen
    if sign != last:
        meetings.seen = sign, time.monotonic()
    elif sign != f"{number} done" and time.monotonic() - since > timeout:
        return f"rank {neighbour} gave no sign of life for {timeout:.0f} s"
    return None
