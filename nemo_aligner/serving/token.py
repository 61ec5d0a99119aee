# SPDX-License-Identifier: Apache-2.0
"""The secret that a client shows to a server: from the environment, or from a file that only its owner can read."""

import contextlib
import os
import re
import secrets
import stat
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from nemo_aligner.errors import UserError
from nemo_aligner.serving.address import LOCAL, job_name

TOKEN_VARIABLE = "NEMO_ALIGNER_TOKEN"
_ALLOWED = re.compile(r"[A-Za-z0-9._~-]+")


@dataclass(frozen=True, kw_only=True)
class Token:
    """A secret and where it is kept."""

    text: str = field(repr=False)
    path: Path | None  # None: the environment

    @property
    def origin(self) -> str:
        """For messages."""
        return TOKEN_VARIABLE if self.path is None else str(self.path)

    def remove(self) -> None:
        """Delete the file, as a server does that ends in order."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def find_token(address: str, port: int, environ: Mapping[str, str]) -> Token | None:
    """The token for a server at ``address``; None where it asks none.

    At 127.0.0.1 a token is asked only if NEMO_ALIGNER_TOKEN is set. Elsewhere, without the variable, server and client
    both come here: the first makes the file, the other reads it.

    Raises:
        UserError: the variable cannot stand in a header, or the file is not its owner's alone.
    """
    if text := environ.get(TOKEN_VARIABLE):
        return Token(text=_valid(text, TOKEN_VARIABLE), path=None)
    if address == LOCAL:
        return None
    home = Path(environ.get("HOME") or Path.home())
    path = home / ".nemo_aligner" / f"{job_name(environ)}-{port}.token"
    path.parent.mkdir(mode=0o700, exist_ok=True)
    if not path.exists():
        _create(path)
    return Token(text=_read(path), path=path)


def _create(path: Path) -> None:
    """Make the file with a new secret, unless the other side has been quicker."""
    # The file appears with its text in it, by a link that fails if the name is taken.
    handle, name = tempfile.mkstemp(dir=path.parent)  # mode 0600
    try:
        with os.fdopen(handle, "w") as file:
            file.write(secrets.token_urlsafe(32))
        with contextlib.suppress(FileExistsError):
            os.link(name, path)
    finally:
        os.unlink(name)


def _read(path: Path) -> str:
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW)) as file:
        found = os.fstat(file.fileno())
        if found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o077:
            raise UserError(
                f"the token file {path} can be read by others (mode {stat.S_IMODE(found.st_mode):04o})",
                fix=f"delete it and start both jobs again, or set {TOKEN_VARIABLE} in both",
            )
        return _valid(file.read().strip(), str(path))


def _valid(text: str, origin: str) -> str:
    if _ALLOWED.fullmatch(text):
        return text
    raise UserError(
        f"the token in {origin} has characters that a header may not carry, or none at all",
        fix="use letters, digits and . _ ~ -",
    )
