# SPDX-License-Identifier: Apache-2.0
"""The error of a full disk: its folder, what was to be written and the room that is left."""

import contextlib
import errno
import shutil
from collections.abc import Iterator
from pathlib import Path

from nemo_aligner.errors import UserError

_FULL = (errno.ENOSPC, errno.EDQUOT)
# What torch's writer of zip files says where a write did not take all bytes.
_TORCH_SAYS = ("unexpected pos", "PytorchStreamWriter failed writing")


def free_bytes(folder: Path) -> int:
    """Bytes that a user may still write to the disk of ``folder``, which need not exist."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free


def check_room(folder: Path, needed: int, what: str) -> None:
    """Raise UserError if there is no room for ``what``, which takes ``needed`` bytes.

    Raises:
        UserError: the disk has less.
    """
    free = free_bytes(folder)
    if free < needed:
        raise _full(folder, f"{what} needs {_shown(needed)}, and {_shown(free)} are free")


@contextlib.contextmanager
def report_if_full(folder: Path, what: str, *, needed: int | None = None) -> Iterator[None]:
    """Within it, a write that fails for want of room is a user's error.

    Args:
        needed: bytes that ``what`` takes in all, where they are known.

    Raises:
        UserError: the disk of ``folder`` is full.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        is_full = isinstance(error, OSError) and error.errno in _FULL
        if not is_full and not any(words in str(error) for words in _TORCH_SAYS):
            raise
        wanted = "" if needed is None else f" needs {_shown(needed)}, and"
        raise _full(
            folder, f"{what}{wanted} could not be written whole; {_shown(free_bytes(folder))} are free"
        ) from error


def _full(folder: Path, problem: str) -> UserError:
    return UserError(
        f"the disk of {folder} has no room: {problem}",
        fix="make room there and start the same command again; or have fewer checkpoints kept "
        "(exp_manager.checkpoint_callback_params.save_top_k), or set exp_manager.explicit_log_dir to a larger disk",
    )


def _shown(count: int) -> str:
    """A number of bytes, exactly and for people.

    >>> _shown(1_234_567), _shown(12)
    ('1234567 bytes (1.2 MB)', '12 bytes')
    """
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count} bytes ({count / size:.1f} {unit})"
    return f"{count} bytes"
