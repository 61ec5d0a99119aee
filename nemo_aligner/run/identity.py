# SPDX-License-Identifier: Apache-2.0
"""The identity of a run: command, settings and initial model. It lies in its folder and its checkpoints."""

import os
import re
import shlex
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from nemo_aligner.errors import UserError

COMMAND = "command.txt"
CONFIG = "config.yaml"
_ASKED = re.compile(r"[+~]*([A-Za-z_][\w.]*)=")


def command_line() -> str:
    """The command of this process as it was typed, quoted for a shell."""
    return shlex.join(sys.orig_argv)


def asked_keys() -> frozenset[str]:
    """The settings that the command line gives."""
    return frozenset(found[1] for word in sys.argv[1:] if (found := _ASKED.match(word)))


@dataclass(frozen=True, kw_only=True)
class RunIdentity:
    """The command, settings and initial model of a run."""

    settings: Mapping[str, Any]  # all of them, resolved, as plain values
    base_model: str  # equal for equal models; "": not known
    command: str = field(default_factory=command_line)
    started: str = field(default_factory=lambda: time.strftime("%Y-%m-%d %H:%M:%S %z"))

    def write(self, folder: Path) -> None:
        """Put its files, the command and the settings, into ``folder``."""
        where = f"on {socket.gethostname()}, in {shlex.quote(os.getcwd())}"
        settings = yaml.safe_dump(dict(self.settings), sort_keys=False, allow_unicode=True)
        command = f"# {self.started} {where}\n{self.command}\n"
        settings = f"# every setting of the run, resolved; written {self.started}\n{settings}"
        (folder / COMMAND).write_bytes(command.encode(errors="surrogateescape"))
        (folder / CONFIG).write_bytes(settings.encode())


def read_settings(folder: Path) -> dict[str, Any] | None:
    """The settings of the run that wrote ``folder``; None: it was written without them.

    Raises:
        UserError: they cannot be read.
    """
    path = folder / CONFIG
    try:
        settings = yaml.safe_load(path.read_bytes())
    except FileNotFoundError:
        return None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(
            f"{path} cannot be read: {error}",
            fix="put it back as the run wrote it; without it, settings are not compared",
        ) from error
    if not isinstance(settings, dict):
        raise UserError(f"{path} holds no settings", fix="put it back as the run wrote it, or remove it")
    return settings
