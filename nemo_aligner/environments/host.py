# SPDX-License-Identifier: Apache-2.0
"""A process that imports a person's code once, and then makes copies of itself: the workers that call it.

    python -P -m nemo_aligner.environments.host FILE_DESCRIPTOR

The descriptor is that of a socket. A line of JSON says what to import, a line replies. Then come messages of eight
bytes: 0, with the descriptor of a worker's socket, asks for a worker; the number of a worker asks for its end. Where
the socket closes, all end.
"""

import ctypes
import faulthandler
import importlib
import json
import math
import os
import select
import signal
import socket
import struct
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from nemo_aligner.environments.sandbox_child import limit

MESSAGE = struct.Struct("!q")  # a worker's number, or 0
WORKER = 0
_POLL_SECONDS = 0.2


def main() -> None:
    """Serve who has started this process, until its socket closes."""
    control = socket.socket(fileno=int(sys.argv[1]))
    os.dup2(2, 1)  # what people's code prints is no result of the job
    faulthandler.enable()
    asked = json.loads(_line(control))
    sys.path[:] = asked["path"]
    try:
        target = load(asked["name"])
        if asked["episodes"]:
            target = Episode(target)
    except BaseException as error:
        control.sendall(_encoded({"error": _described(error)}))
        return
    control.sendall(_encoded({}))
    _serve(control, target, asked["memory"])


def load(name: str) -> Callable[..., Any]:
    """The function that ``MODULE.NAME`` names.

    Raises:
        ImportError: there is no such module.
        AttributeError: nor such a name in it.
        TypeError: it is no function.
    """
    module, _, own = name.rpartition(".")
    found = getattr(importlib.import_module(module), own)
    if not callable(found):
        raise TypeError(f"{name} is no function")
    return found


class Episode:
    """Calls of an environment: each turn goes to what the first call of its episode made.

    Raises:
        TypeError: it is no class of environments.
    """

    def __init__(self, environment: Callable[..., Any]) -> None:
        lacks = [name for name in ("reset", "step") if not hasattr(environment, name)]
        if lacks:
            raise TypeError(f"an environment has reset(row, seed) and step(turn), and this has no {lacks[0]}")
        self._environment = environment
        self._own: Any = None

    def __call__(self, *, turn: str, begin: Mapping[str, Any] | None = None) -> tuple[object, float]:
        """Return (reply, reward) of the environment's step; of a first turn, with ``begin``, the episode is new.

        Raises:
            TypeError: a step returns something else.
        """
        if begin is not None:
            self._own = self._environment(**begin["arguments"])
            self._own.reset(begin["row"], begin["seed"])
        found = self._own.step(turn)
        if not (isinstance(found, tuple) and len(found) == 2 and _is_reply(found[0])):
            raise TypeError(f"step returned {found!r}, not (reply, reward)")
        if not math.isfinite(found[1]):  # TypeError where it is no number
            raise ValueError(f"step returned the reward {found[1]}")
        return _readable(found[0]), float(found[1])


def _readable(said: Any) -> Any:  # noqa: ANN401 - of JSON
    """The reply without halves of surrogate pairs, which no tokenizer reads; a policy may have written some."""
    if isinstance(said, str):
        return said.encode("utf-8", "replace").decode("utf-8")
    if isinstance(said, list):
        return [_readable(one) for one in said]
    return {name: _readable(one) for name, one in said.items()} if isinstance(said, dict) else said


def _is_reply(said: object) -> bool:
    """True for a text, for messages of a role and a content, and for None."""
    if isinstance(said, list):
        return all(isinstance(one, dict) and {"role", "content"} <= one.keys() for one in said)
    return said is None or isinstance(said, str)


def _serve(control: socket.socket, target: Callable[..., Any], memory: int | None) -> None:
    workers: set[int] = set()
    while True:
        ready = select.select([control], [], [], _POLL_SECONDS)[0]
        while workers and (ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)):
            _kill(ended.si_pid)  # what it has started is still there
            os.waitpid(ended.si_pid, 0)
            workers.discard(ended.si_pid)
        if not ready:
            continue
        message, descriptors, _, _ = socket.recv_fds(control, MESSAGE.size, 1)
        if not message:
            break
        (number,) = MESSAGE.unpack(message)
        if number == WORKER:
            (descriptor,) = descriptors
            os.set_inheritable(descriptor, False)
            worker = os.fork()
            if worker == 0:
                control.close()
                if memory is not None:
                    limit("RLIMIT_DATA", memory)
                _work(socket.socket(fileno=descriptor), target)
            os.close(descriptor)
            workers.add(worker)
        elif number in workers:  # what has not been waited for keeps its number
            _kill(number)
    for number in workers:
        _kill(number)


def _kill(worker: int) -> None:
    """End a worker and what it has started."""
    try:
        os.killpg(worker, signal.SIGKILL)
    except ProcessLookupError:  # it has no group of its own yet
        os.kill(worker, signal.SIGKILL)


def _work(calls: socket.socket, target: Callable[..., Any]) -> NoReturn:
    """Call ``target`` as often as a line of JSON comes, with its keywords; a line replies."""
    try:
        os.setpgid(0, 0)
        _end_with_parent()
        calls.sendall(_encoded({"worker": os.getpid()}))
        for line in calls.makefile("r", encoding="utf-8"):
            try:
                reply = _encoded({"value": target(**json.loads(line))})
            except BaseException as error:
                reply = _encoded({"error": _described(error)})
            calls.sendall(reply)
    finally:
        os._exit(0)


def _end_with_parent() -> None:
    """Have Linux kill this process when the host is lost, which would have done it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _described(error: BaseException) -> str:
    """The error and the line of the person's code that raised it."""
    theirs = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
    place = f" ({theirs[-1].filename}, line {theirs[-1].lineno})" if theirs else ""
    return f"{type(error).__name__}: {error}{place}"


def _encoded(message: dict[str, Any]) -> bytes:
    return json.dumps(message, default=float).encode() + b"\n"


def _line(control: socket.socket) -> bytes:
    """The bytes up to the end of a line, and none further: what follows carries descriptors."""
    found = bytearray()
    while not found.endswith(b"\n"):
        found += control.recv(1)
    return bytes(found)


if __name__ == "__main__":
    main()
