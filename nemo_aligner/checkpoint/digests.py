# SPDX-License-Identifier: Apache-2.0
"""A digest of each file of a checkpoint: written with it, compared before it is read, so that damage has a name."""

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from nemo_aligner.errors import UserError

logger = logging.getLogger(__name__)

DIGESTS = "digests.json"
Digests = Mapping[str, str]  # by a file's name: "<bytes> <blake2b>"

_CHUNK_BYTES = 16 * 1024**2
_THREADS = min(4, os.cpu_count() or 1)  # blake2b takes a GB a second on each


def digests_of(folder: Path, names: Iterable[str]) -> Digests:
    """The digests of these files of ``folder``.

    A file's is that of its chunks' digests: they are made side by side.
    """
    with ThreadPoolExecutor(_THREADS, "digest") as pool:
        return {name: _digest(folder / name, pool) for name in names}


def _digest(path: Path, pool: ThreadPoolExecutor) -> str:
    size, whole = path.stat().st_size, hashlib.blake2b(digest_size=16)
    with path.open("rb") as stream:

        def chunk(offset: int) -> bytes:
            return hashlib.blake2b(os.pread(stream.fileno(), _CHUNK_BYTES, offset), digest_size=16).digest()

        for part in pool.map(chunk, range(0, size, _CHUNK_BYTES)):
            whole.update(part)
    return f"{size} {whole.hexdigest()}"


def _files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def write_digests(folder: Path, known: Digests | None = None) -> None:
    """Write the digests of all files in ``folder`` beside them.

    Args:
        known: those that need not be made here.
    """
    known = known or {}
    names = [name for name in _files(folder) if name != DIGESTS]
    made = digests_of(folder, [name for name in names if name not in known])
    found = {name: known.get(name) or made[name] for name in names}
    with (folder / DIGESTS).open("w") as stream:
        json.dump(found, stream, indent=0)
        stream.flush()
        os.fsync(stream.fileno())


def find_damage(folder: Path, *, share: int = 0, of: int = 1) -> list[str] | None:
    """The damage of ``folder``, by file name; None if it was written without digests.

    Args:
        share: which part of the files is looked at, of ``of`` parts of about the same size.
    """
    try:
        stored = json.loads((folder / DIGESTS).read_bytes())
        wanted = {str(name): str(digest) for name, digest in stored.items()}
        sizes = {name: int(digest.split()[0]) for name, digest in wanted.items()}
    except FileNotFoundError:
        return None
    except (ValueError, AttributeError, IndexError, RecursionError):
        return [f"{DIGESTS} is damaged"]
    mine = sorted(wanted, key=lambda name: (-sizes[name], name))[share::of]
    found, whole = {}, []
    for name in mine:
        path = folder / name
        if not path.is_file():
            found[name] = f"{name} is missing"
        elif path.stat().st_size != sizes[name]:
            found[name] = f"{name} has {path.stat().st_size} bytes, not {sizes[name]}"
        else:
            whole.append(name)
    made = digests_of(folder, whole)
    found |= {name: f"{name} differs from its digest" for name in whole if made[name] != wanted[name]}
    return [found[name] for name in sorted(found)]


def refuse_damage(source: Path, damage: list[str] | None) -> None:
    """Say what :func:`find_damage` has found in ``source``.

    Raises:
        UserError: a file is not what was written.
    """
    if damage is None:
        logger.info("%s was written without digests: its files are not checked", source)
    elif damage:
        raise UserError(
            f"{source} is damaged: {damage_text(damage)}",
            fix=f"get it again from where it came; if you have changed it on purpose, remove its {DIGESTS}",
        )


def damage_text(damage: list[str]) -> str:
    """The first of what is wrong, in one line."""
    more = f", and {len(damage) - 3} more" if len(damage) > 3 else ""
    return ", ".join(damage[:3]) + more
