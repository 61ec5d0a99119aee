# SPDX-License-Identifier: Apache-2.0
"""What a Triton may leave behind, and its end: processes, copies of its endpoints, shared memory, its folder."""

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import psutil

from nemo_aligner.errors import UserError

__all__ = ["Remains", "end_abandoned", "kill", "own_folder"]

OWNER = "owner"  # in the folder: the process of its server
ORPHAN_SECONDS = 2.0  # for the processes of a server that was killed to end by themselves
KILL_SECONDS = 5.0  # for a killed process to be gone
MAX_SOCKET_PATH = 107  # bytes, of Linux


@dataclass(frozen=True, kw_only=True)
class Remains:
    """What is left of a Triton, alive or not."""

    processes: list[psutil.Process]
    endpoints: list[psutil.Process]  # those of them that are one endpoint each
    paths: list[Path]  # beside its folder

    @classmethod
    def of(cls, folder: Path) -> Self:
        """Of the one that was started in ``folder``."""
        processes, endpoints, paths = [], [], []
        for process in psutil.process_iter(["cmdline"]):
            arguments = process.info["cmdline"] or [""]
            if not arguments[0].startswith(f"{folder}/"):
                continue
            processes += [process, *_children(process)]
            if Path(arguments[0]).name == "triton_python_backend_stub":
                endpoints.append(process)
                # Its model's copy and its shared memory, which only an orderly end removes.
                paths += [Path(arguments[1]).parents[1], Path("/dev/shm", arguments[2])]
        return cls(processes=processes, endpoints=endpoints, paths=paths)

    def end(self, *, wait_seconds: float) -> None:
        """Wait for it to end by itself, kill what does not, and remove its files."""
        _, alive = psutil.wait_procs(self.processes, timeout=wait_seconds)
        kill(alive)
        psutil.wait_procs(self.processes, timeout=KILL_SECONDS)
        for path in self.paths:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def kill(processes: Sequence[psutil.Process]) -> None:
    """SIGKILL to those that are still there; Python's resource trackers end after them and remove shared memory."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            if not any("resource_tracker" in argument for argument in process.cmdline()):
                process.kill()


def folder_of(name: str) -> Path:
    """Where the Triton of that name keeps its files."""
    return Path(tempfile.gettempdir()) / f"nemo_aligner-{name}"


def end_abandoned(name: str) -> bool:
    """End what a server that was killed has left under that name; whether there was something.

    What a server that still runs has there is left alone.
    """
    folder = folder_of(name)
    if not folder.exists() or folder.stat().st_uid != os.getuid() or _owner_lives(folder):
        return False
    Remains.of(folder).end(wait_seconds=ORPHAN_SECONDS)
    shutil.rmtree(folder, ignore_errors=True)
    return True


def _owner_lives(folder: Path) -> bool:
    try:
        pid, started = (folder / OWNER).read_text().split()
        return str(psutil.Process(int(pid)).create_time()) == started
    except (OSError, ValueError, psutil.NoSuchProcess):
        return False


@contextmanager
def own_folder(name: str, *, longest_name: int) -> Iterator[Path]:
    """A folder for Triton's files, removed at the end; what a killed server has left in its place goes first.

    Args:
        name: of the folder; of one server at a time, as its address and port are.
        longest_name: letters of the longest endpoint's, which become part of a socket's path.

    Raises:
        UserError: the folder is another user's, or its path too long.
    """
    folder = folder_of(name)
    too_long = len(os.fsencode(folder)) + len("/w/_0_0-server.sock") + longest_name > MAX_SOCKET_PATH
    if too_long or " " in str(folder):
        raise UserError(
            f"TMPDIR={folder.parent} has blanks or is too long for the paths of sockets",
            cure="set a short TMPDIR",
        )
    end_abandoned(name)
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        raise UserError(
            f"{folder} belongs to another server", cure="end it, or choose another port or TMPDIR"
        ) from None
    (folder / OWNER).write_text(f"{os.getpid()} {psutil.Process().create_time()}")
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
