# SPDX-License-Identifier: Apache-2.0
"""Endpoints at an address: a front that callers reach and a Triton behind it, which is started again where it fails.

At the end no process, port or file is left.
"""

import logging
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Self

from nemo_aligner.errors import UserError
from nemo_aligner.serving.cleanup import OrphanedTriton, end_abandoned, kill, own_folder
from nemo_aligner.serving.endpoint import Endpoint
from nemo_aligner.serving.front import Front, Upstream
from nemo_aligner.serving.triton import PrivateTriton

logger = logging.getLogger(__name__)

START_SECONDS = (60.0, 120.0, 240.0)  # for each try: a busy machine is slow
EXIT_SECONDS = 1.5  # for Triton to unload its endpoints; then its processes are killed
PORT_SECONDS = 15.0  # for the port of a server that was killed to be free again


class TritonEnded(Exception):
    """Triton, or a part of it, has ended or stalled by itself."""


class TritonProcess:
    """Within it, the endpoints can be reached where the front listens.

    Raises:
        UserError: on entering, if the port is taken, or Triton does not start.
    """

    def __init__(self, endpoints: Sequence[Endpoint], front: Front) -> None:
        self._endpoints, self._front, self._name = endpoints, front, front.name
        self._within, self._triton_within = ExitStack(), ExitStack()

    def __enter__(self) -> Self:
        # Of a server that was killed, the port takes some seconds to be free.
        self._front.bind(patience_seconds=PORT_SECONDS if end_abandoned(self._name) else 0.0)
        with ExitStack() as within:
            within.enter_context(self._front)
            within.callback(lambda: self._triton_within.close())  # of that time
            self._start_triton()
            self._within = within.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._front.close("the server stops")
        self._front.stop_listening()
        self._within.close()

    def check_alive(self) -> None:
        """Raise TritonEnded, with the end of Triton's log, if it or one of its endpoints has ended or stalled."""
        trouble = None if self._triton.is_whole else "a process of it has ended"
        if trouble := trouble or self._front.trouble:
            raise TritonEnded(
                f"Triton has ended by itself ({trouble}); its last words:\n{self._triton.log_tail}"
            )

    def restart(self) -> None:
        """End what is left of Triton and start it anew, with the same endpoints. Callers get refusals meanwhile.

        Raises:
            UserError: it does not start.
        """
        self._front.close("Triton is started again; ask again")
        self._triton_within.close()
        self._start_triton()

    def _start_triton(self) -> None:
        reasons = []
        for seconds in START_SECONDS:
            with ExitStack() as within:
                longest = max(len(endpoint.name) for endpoint in self._endpoints)
                folder = within.enter_context(own_folder(self._name, longest_name=longest))
                triton = PrivateTriton(self._endpoints, self._front, folder=folder, port=_free_port())
                within.enter_context(_stopped(triton))
                try:
                    triton.start(seconds)
                except Exception as error:  # PyTriton, sh and Triton's own processes fail in many ways
                    reasons.append(f"{type(error).__name__}: {error}\n{triton.log_tail}")
                    logger.warning("Triton did not start (limit %g s): %s", seconds, reasons[-1])
                    continue
                self._triton, self._triton_within = triton, within.pop_all()
            self._front.open(Upstream(port=triton.port, secret=triton.secret))
            return
        raise UserError(
            f"Triton did not start in {len(START_SECONDS)} tries; at last: {reasons[-1]}",
            fix="see what its log says; it needs room in memory, in TMPDIR and in /dev/shm, and some CPU time",
        )


def _free_port() -> int:
    # Another process may take it before Triton does: then the start is tried again.
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def _stopped(triton: PrivateTriton) -> Iterator[None]:
    """At the end no process of Triton's is left, nor a file of theirs, however they end."""
    (triton.folder / OrphanedTriton.SHARED_MEMORY).write_text(triton.shared_memory)
    try:
        yield
    finally:
        orphan = OrphanedTriton.of(triton.folder)
        killer = threading.Timer(EXIT_SECONDS, kill, [orphan.processes])
        killer.start()
        try:
            triton.stop()
        finally:
            killer.cancel()
            orphan.end(wait_seconds=1.0)
            # What had begun to start when the first look was taken.
            OrphanedTriton.of(triton.folder).end(wait_seconds=0.0)
