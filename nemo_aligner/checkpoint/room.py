# SPDX-License-Identifier: Apache-2.0
"""Whether what all ranks are about to write has room on the disk that they share."""

from pathlib import Path

from nemo_aligner.parallel import collectives
from nemo_aligner.run.disk import check_room

__all__ = ["check_room_for_all"]

_MORE = 1 << 20  # bytes of small files and of the formats themselves


def check_room_for_all(folder: Path, own: int, what: str, *, spare: int = 0) -> int:
    """Refuse ``what`` on every rank where the disk of ``folder`` has no room for it; else the bytes that it takes.

    Args:
        own: bytes that this rank writes.
        spare: bytes that rank 0 needs beside them for a while.

    Raises:
        UserError: on every rank.
    """
    needed = sum(collectives.of_all_ranks(own)) + spare + _MORE
    collectives.from_rank_0(lambda: check_room(folder, needed, what))
    return needed
