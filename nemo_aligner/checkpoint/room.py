# SPDX-License-Identifier: Apache-2.0
"""Whether what all ranks are about to write has room on the disk that they share."""

from pathlib import Path

from nemo_aligner.errors import UserError
from nemo_aligner.parallel import collectives, world
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
    refusal: UserError | None = None
    if world.is_logging_rank():
        try:
            check_room(folder, needed, what)
        except UserError as error:
            refusal = error
    refusal = collectives.broadcast_object(refusal)
    if refusal is not None:
        raise refusal
    return needed
