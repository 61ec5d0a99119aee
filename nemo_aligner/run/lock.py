# SPDX-License-Identifier: Apache-2.0
"""One run at a time in a folder: who holds it, and when a lock is one that nobody holds any more.

The lock is a plain file, so that it works on any file system that machines share. Its holder sets its time every few
seconds. Where the process ids of the holder can be seen, they decide; from elsewhere, the time does.
"""

import contextlib
import errno
import json
import logging
import os
import secrets
import socket
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil

from nemo_aligner.errors import UserError

logger = logging.getLogger(__name__)

LOCK = "run.lock"
BEAT_SECONDS = 5.0
STALE_SECONDS = 60.0  # without a beat, after which a holder that cannot be seen is taken for dead
_SETTLE_SECONDS = 0.2  # in which whoever takes over at the same moment has written, too
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)


def _domain() -> str:
    """Equal for processes that see each other under their ids: one boot of one kernel, one namespace."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    if not boot.exists():
        return f"{socket.gethostname()} {psutil.boot_time():.0f}"
    return f"{boot.read_text().strip()} {os.readlink('/proc/self/ns/pid')}"


def _age_at_boot(pid: int) -> float:
    """Seconds from the machine's start to that of the process, whatever has been done to the clock since."""
    booted = psutil.boot_time()
    return psutil.Process(pid).create_time() - booted


@dataclass(frozen=True, kw_only=True)
class Holder:
    """The process that holds a folder."""

    host: str
    pid: int
    domain: str  # see _domain
    started: float  # see _age_at_boot
    since: str  # when it took the folder
    token: str = field(default_factory=lambda: secrets.token_hex(8))  # no two are alike

    @classmethod
    def me(cls) -> "Holder":
        """This process, now."""
        return cls(
            host=socket.gethostname(),
            pid=os.getpid(),
            domain=_domain(),
            started=_age_at_boot(os.getpid()),
            since=time.strftime("%Y-%m-%d %H:%M:%S %z"),
        )

    @property
    def lives(self) -> bool | None:
        """True if its process runs; None: it cannot be seen from here."""
        if self.domain != _domain():
            return None
        try:
            if psutil.Process(self.pid).status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
                return False
            # Another process may have its id by now; psutil's times are whole seconds at worst.
            return abs(_age_at_boot(self.pid) - self.started) < 2.0
        except psutil.NoSuchProcess:
            return False

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"


class FolderLock:
    """The lock of one run's folder, which exists; ``setting`` is the key that names it."""

    def __init__(self, folder: Path, *, setting: str) -> None:
        self.path, self._folder, self._setting = folder / LOCK, folder, setting
        self._me = Holder.me()
        # a lock's content and time, when it was first seen
        self._waits_for: tuple[bytes, float] | None = None
        self._ended = threading.Event()
        self._beat: threading.Thread | None = None
        # who has taken the folder from this process, which it seemed not to have
        self.lost_to: str | None = None

    def refuse_if_held(self) -> None:
        """Look only, and only for a holder that can be seen from here.

        Raises:
            UserError: it runs.
        """
        found = self._read()
        if found and (holder := _holder(found[0])) and holder.lives:
            raise self._refusal(holder)

    def take(self) -> bool:
        """Take the folder. False: its last holder cannot be seen from here, and may be dead; ask again in a second.

        Raises:
            UserError: another run holds it.
        """
        while not self._create():
            found = self._read()
            if found is None:
                continue  # it was given back meanwhile
            content, beat = found
            holder = _holder(content)
            lives = holder.lives if holder else None
            if lives or (lives is None and self._beats(content, beat)):
                raise self._refusal(holder)
            if lives is None and self._now() - beat < STALE_SECONDS:
                if self._waits_for is None:
                    logger.info(
                        "%s is of a run (%s) that may be dead: waiting for a sign of it", self.path, holder
                    )
                    self._waits_for = found
                return False
            if self._take_over(content):
                logger.warning(
                    "%s: taken over from a run that is gone (%s)", self._folder, holder or "unreadable"
                )
                break
        self._beat = threading.Thread(target=self._keep_fresh, name="lock", daemon=True)
        self._beat.start()
        return True

    def give_back(self) -> None:
        """Let others have the folder."""
        self._ended.set()
        if self._beat is not None:
            self._beat.join()
        if self._is_mine():
            self.path.unlink(missing_ok=True)

    def _refusal(self, holder: Holder | None) -> UserError:
        return UserError(
            f"{self._setting}={self._folder} is in use: another run holds it ({holder or 'of unknown name'})",
            fix=f"wait until that run has ended, or stop it; for a run beside it set {self._setting} to another "
            f"folder; if there is no such run, remove {self.path}",
        )

    def _beats(self, content: bytes, beat: float) -> bool:
        """True if the holder has been heard of since it was first waited for."""
        return self._waits_for is not None and self._waits_for[0] == content and self._waits_for[1] != beat

    def _read(self) -> tuple[bytes, float] | None:
        try:
            with self.path.open("rb") as stream:
                return stream.read(), os.fstat(stream.fileno()).st_mtime
        except (FileNotFoundError, NotADirectoryError):
            return None

    def _now(self) -> float:
        """By the clock that gives files their time, which may be another machine's."""
        with self._written() as path:
            return path.stat().st_mtime

    @contextlib.contextmanager
    def _written(self):  # noqa: ANN202
        """My claim, in a file of its own."""
        path = self.path.with_name(f".{LOCK}-{self._me.token}")
        path.write_text(json.dumps(asdict(self._me)))
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)

    def _create(self) -> bool:
        """Make the lock, whole from the first moment on; False: there is one."""
        with self._written() as path:
            try:
                os.link(path, self.path)
            except FileExistsError:
                return False
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                try:
                    with self.path.open("x") as stream:
                        stream.write(json.dumps(asdict(self._me)))
                except FileExistsError:
                    return False
        return True

    def _take_over(self, seen: bytes) -> bool:
        """Put my claim where a dead one is; of several that try it, the last one has it."""
        with self._written() as path:
            found = self._read()
            if found is None or found[0] != seen:
                return False
            path.replace(self.path)
        time.sleep(_SETTLE_SECONDS)
        return self._is_mine()

    def _is_mine(self) -> bool:
        found = self._read()
        holder = _holder(found[0]) if found else None
        return holder is not None and holder.token == self._me.token

    def _keep_fresh(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            try:
                found = self._read()
                if found is None:
                    self._create()
                elif (holder := _holder(found[0])) is None or holder.token != self._me.token:
                    self.lost_to = str(holder)
                    return
                else:
                    os.utime(self.path)
            except OSError as error:
                # A full disk or a server that is away for a moment: the next beat may come through.
                logger.warning("%s cannot be kept fresh: %s", self.path, error)


def _holder(content: bytes) -> Holder | None:
    try:
        return Holder(**json.loads(content))
    except (ValueError, TypeError):
        return None
