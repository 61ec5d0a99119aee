# SPDX-License-Identifier: Apache-2.0
"""Cleanup after a Triton: its processes, shared memory, its folder and an empty one in /tmp."""

import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

import psutil

from nemo_aligner.errors import UserError

OWNER = "owner"  # in a folder: the process that it belongs to
ORPHAN_SECONDS = 2.0  # for the processes of a server that was killed to end by themselves
KILL_SECONDS = 5.0  # for a killed process to be gone
MAX_SOCKET_PATH = 107  # bytes, of Linux


@dataclass(frozen=True, kw_only=True)
class OrphanedTriton:
    """The processes and files of a Triton without an owner, alive or not."""

    SHARED_MEMORY: ClassVar[str] = "shm"  # in the folder: how the names of its shared memory begin

    processes: list[psutil.Process]
    endpoints: list[psutil.Process]  # those of them that are one endpoint each
    shared_memory: str  # how names in /dev/shm begin; "": there is none

    @classmethod
    def of(cls, folder: Path) -> Self:
        """Of the one that was started in ``folder``."""
        processes, endpoints = [], []
        for process in psutil.process_iter(["cmdline"]):
            arguments = process.info["cmdline"] or [""]
            if not arguments[0].startswith(f"{folder}/"):
                continue
            processes += [process, *_children(process)]
            if Path(arguments[0]).name == "triton_python_backend_stub":
                endpoints.append(process)
        named = folder / cls.SHARED_MEMORY
        shared_memory = named.read_text() if named.exists() else ""
        return cls(processes=processes, endpoints=endpoints, shared_memory=shared_memory)

    def end(self, *, wait_seconds: float) -> None:
        """Wait for it to end by itself, kill what does not, and remove its files."""
        _, alive = psutil.wait_procs(self.processes, timeout=wait_seconds)
        kill(alive)
        psutil.wait_procs(self.processes, timeout=KILL_SECONDS)
        if self.shared_memory:
            # Only an orderly end removes it.
            for path in Path("/dev/shm").glob(f"{self.shared_memory}*"):
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
    if not folder.exists() or folder.stat().st_uid != os.getuid() or owner_lives(folder):
        return False
    OrphanedTriton.of(folder).end(wait_seconds=ORPHAN_SECONDS)
    shutil.rmtree(folder, ignore_errors=True)
    return True


def mark_owner(folder: Path) -> None:
    """Note that the folder is this process's."""
    (folder / OWNER).write_text(f"{os.getpid()} {psutil.Process().create_time()}")


def owner_lives(folder: Path) -> bool:
    """True if the process that marked the folder as its own is still there."""
    try:
        pid, started = (folder / OWNER).read_text().split()
        return str(psutil.Process(int(pid)).create_time()) == started
    except (OSError, ValueError, psutil.NoSuchProcess):
        return False


@contextmanager
def remove_environments() -> Iterator[None]:
    """Remove the folder that a Triton which starts within it makes for Python environments: none is ever unpacked.

    Its name is not known, so it goes by time, owner and being empty.
    """
    before, began = set(_environments()), time.time()
    try:
        yield
    finally:
        for path in set(_environments()) - before:
            with suppress(OSError):
                found = path.stat()
                if found.st_uid == os.getuid() and found.st_ctime >= began - 1.0:
                    path.rmdir()


def _environments() -> Iterator[Path]:
    return Path("/tmp").glob("python_env_*")


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
            fix="set a short TMPDIR",
        )
    end_abandoned(name)
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        raise UserError(
            f"{folder} belongs to another server", fix="end it, or choose another port or TMPDIR"
        ) from None
    mark_owner(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
