# SPDX-License-Identifier: Apache-2.0
"""Calls of a person's function in processes of their own, each with a limit of time, whatever the function does."""

import contextlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nemo_aligner.environments import host
from nemo_aligner.errors import UserError

Key = tuple[int, int]
"""What calls of one episode have in common."""

START_SECONDS = 300.0  # for imports
_LONGEST_REPLY = 1 << 26  # bytes
_CHUNK = 1 << 16


@dataclass(frozen=True)
class Reply:
    """The result of a call: one of these."""

    value: Any = None
    error: str = ""  # the function raised it
    lost: str = ""  # why the worker was killed, or how it ended


class Worker:
    """A process that makes one call at a time."""

    def __init__(self, connection: socket.socket, seconds: float) -> None:
        self.connection, self.seconds, self.deadline = connection, seconds, float("inf")
        self._received = bytearray()
        self.number = int(self._wait()["worker"])

    def send(self, call: Mapping[str, Any]) -> None:
        """Begin a call; the clock starts.

        Raises:
            OSError: the process is gone.
        """
        self.deadline = time.monotonic() + self.seconds
        self.connection.settimeout(self.seconds)
        self.connection.sendall(json.dumps(call).encode() + b"\n")

    def receive(self) -> Reply | None:
        """The reply, if it is there."""
        try:
            chunk = self.connection.recv(_CHUNK)
        except OSError as error:
            return Reply(lost=f"its process cannot be heard: {error}")
        if not chunk:
            return Reply(lost="its process ended, by a crash or for want of memory")
        self._received += chunk
        if not self._received.endswith(b"\n"):
            return Reply(lost="its reply is too long") if len(self._received) > _LONGEST_REPLY else None
        return Reply(**self._taken())

    def _wait(self) -> dict[str, Any]:
        """The first line, which says that the process is there."""
        self.connection.settimeout(START_SECONDS)
        while not self._received.endswith(b"\n"):
            chunk = self.connection.recv(_CHUNK)
            if not chunk:
                raise ConnectionError("a worker ended before it began")
            self._received += chunk
        return self._taken()

    def _taken(self) -> dict[str, Any]:
        self.deadline = float("inf")
        message = json.loads(self._received)
        self._received.clear()
        return message


class WorkerPool:
    """Processes that call one function, each for one key at a time.

    Args:
        setting: that names the function, for messages.
        name: ``MODULE.NAME`` of it, also in the folder that the script was started in.
        workers: calls at once.
        seconds: of a call, from when a worker begins it.
        memory: bytes of a worker, beyond which it gets no more; None: as many as there are.
        episodes: whether it is a class, whose calls are the turns of episodes, as :class:`host.Episode` takes them.

    Raises:
        UserError: there is no such function.
    """

    def __init__(
        self,
        setting: str,
        name: str,
        *,
        workers: int,
        seconds: float,
        memory: int | None = None,
        episodes: bool = False,
    ) -> None:
        here = os.getcwd()
        fix = f"set {setting}=MODULE.NAME, of a module in {here} or one that is installed"
        if "." not in name:
            raise UserError(f"{setting}={name} names no module", fix=fix)
        self._name, self._size, self._seconds = f"{setting}={name}", workers, seconds
        self._idle: list[Worker] = []
        self._kept: dict[Key, Worker] = {}
        self._busy: dict[Worker, Key] = {}
        self._waiting: deque[tuple[Key, Mapping[str, Any]]] = deque()
        self._selector = selectors.DefaultSelector()
        self._control, theirs = socket.socketpair()
        command = [sys.executable, "-P", "-m", host.__name__, str(theirs.fileno())]
        with theirs:
            # A session of its own: a terminal's Ctrl-C is for the job, which ends the host.
            self._host = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()], start_new_session=True
            )
        path = [*sys.path, *([] if here in sys.path else [here])]
        try:
            problem = self._imported({"path": path, "name": name, "memory": memory, "episodes": episodes})
        except BaseException:
            self.close()
            raise
        if problem:
            self.close()
            raise UserError(f"{setting}={name} cannot be imported: {problem}", fix=fix)

    def _imported(self, asked: Mapping[str, Any]) -> str:
        """Have the host import the function; what went wrong."""
        try:
            self._control.sendall(json.dumps(asked).encode() + b"\n")
            self._control.settimeout(START_SECONDS)
            line = self._control.makefile("r", encoding="utf-8").readline()
        except OSError as error:
            return f"{error} in {START_SECONDS:g} s"
        return json.loads(line).get("error", "") if line else "its process ended meanwhile"

    def __enter__(self) -> "WorkerPool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def is_busy(self) -> bool:
        """True while a call has begun whose reply has not been heard."""
        return bool(self._busy)

    def call_all(self, calls: Sequence[Mapping[str, Any]]) -> list[Reply]:
        """Call the function with each of the keywords, as many at once as there are workers; the replies in order."""
        for index, call in enumerate(calls):
            self.send((index, 0), call)
        replies: dict[Key, Reply] = {}
        while len(replies) < len(calls):
            heard = self.heard()
            replies |= heard
            for key in heard:
                self.release(key)
        return [replies[index, 0] for index in range(len(calls))]

    def send(self, key: Key, call: Mapping[str, Any]) -> None:
        """Begin a call by the worker that ``key`` keeps from its first call on; it waits for one where all are kept."""
        if (worker := self._kept.get(key)) is not None:
            self._begin(worker, key, call)
        else:
            self._waiting.append((key, call))
            self._begin_waiting()

    def heard(self, *, seconds: float = float("inf")) -> dict[Key, Reply]:
        """Wait until workers reply or are out of time, ``seconds`` at most: the replies. A lost worker is ended.

        Raises:
            UserError: the process that starts workers is lost, so that replies mean nothing.
        """
        found: dict[Key, Reply] = {}
        for worker, reply in self._heard(seconds):
            found[key := self._busy.pop(worker)] = reply
            self._selector.unregister(worker.connection)
            if reply.lost:
                self._end(worker)
                del self._kept[key]
                if self._host.poll() is not None:
                    raise self._without_host(f"it ended with {self._host.returncode}")
        self._begin_waiting()
        return found

    def release(self, key: Key) -> None:
        """Let the worker of a key without a call take another one's."""
        if (worker := self._kept.pop(key, None)) is not None:
            self._idle.append(worker)
            self._begin_waiting()

    def _begin_waiting(self) -> None:
        while self._waiting and (self._idle or len(self._kept) < self._size):
            key, call = self._waiting.popleft()
            self._kept[key] = worker = self._idle.pop() if self._idle else self._started()
            self._begin(worker, key, call)

    def _begin(self, worker: Worker, key: Key, call: Mapping[str, Any]) -> None:
        self._busy[worker] = key
        self._selector.register(worker.connection, selectors.EVENT_READ, worker)
        with contextlib.suppress(OSError):  # then there is an end to read
            worker.send(call)

    def _heard(self, seconds: float) -> list[tuple[Worker, Reply]]:
        """Wait until a worker replies or is out of time; what has come."""
        if not self._busy:
            return []
        nearest = min(worker.deadline for worker in self._busy)
        events = self._selector.select(min(seconds, max(0.0, nearest - time.monotonic())))
        received = [(key.data, key.data.receive()) for key, _ in events]
        found = [(worker, reply) for worker, reply in received if reply is not None]
        now, heard = time.monotonic(), {worker for worker, _ in found}
        late = [worker for worker in self._busy if worker.deadline <= now and worker not in heard]
        return found + [(worker, Reply(lost=f"it took longer than {self._seconds:g} s")) for worker in late]

    def _started(self) -> Worker:
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                socket.send_fds(self._control, [host.MESSAGE.pack(host.WORKER)], [theirs.fileno()])
            return Worker(ours, self._seconds)
        except OSError as error:
            raise self._without_host(str(error)) from error

    def _without_host(self, why: str) -> UserError:
        return UserError(
            f"{self._name}: the process that starts its workers is lost: {why}",
            fix="see whether the machine has run out of memory or processes",
        )

    def _end(self, worker: Worker) -> None:
        with contextlib.suppress(OSError):  # of a host that is lost, as starting one will say
            self._control.sendall(host.MESSAGE.pack(worker.number))
        worker.connection.close()

    def close(self) -> None:
        """End all processes, and wait until they have ended."""
        self._control.close()
        for worker in [*self._idle, *self._kept.values()]:
            worker.connection.close()
        self._selector.close()
        try:
            self._host.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._host.send_signal(signal.SIGKILL)
            self._host.wait()
