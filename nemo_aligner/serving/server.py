# SPDX-License-Identifier: Apache-2.0
"""Serves a critic, a reward model or both. Threads of PyTriton check requests and enqueue them; the main thread alone
runs the model, so that collectives and the device have one user."""

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

from nemo_aligner.errors import UserError
from nemo_aligner.serving import wire
from nemo_aligner.serving.address import listening_host, resolve
from nemo_aligner.serving.checks import refuse
from nemo_aligner.serving.computing import Computing, Handler
from nemo_aligner.serving.endpoint import Call, Endpoint, Handle
from nemo_aligner.serving.front import Front
from nemo_aligner.serving.process import TritonEnded, TritonProcess
from nemo_aligner.serving.protocol import Limits, Refusal, RequestLimits, Trouble
from nemo_aligner.serving.request_queue import QueuedRequest, Request, RequestQueue, SaveRequest
from nemo_aligner.serving.token import find_token

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.2  # between two looks at signals and at Triton
# A Triton that was started again so many times in so many seconds would go on dying.
RESTARTS = 6
RESTART_SECONDS = 600.0
LONGEST_PAUSE_SECONDS = 16.0  # before it is started again; at first none, then twice as long each time
READY_SECONDS = 60.0  # for a handler to begin after the endpoints can be reached


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """The endpoints of a server, and its address."""

    setting: str  # the section of .port and .ip, to name in errors: trainer.ppo, inference
    port: int
    ip: str | None = None  # to listen on; None: 127.0.0.1, or the node's under a Slurm job of several nodes
    infer: str  # endpoint names
    train: str | None = None  # None: it does not learn
    save: str | None = None
    num_rewards: int  # A: numbers per row that a reward model gives; 0: there is none
    has_values: bool  # of a critic
    max_rows: int  # merged from several requests: the micro-batch of all data parallel ranks together
    # cut rows to their longest, rounded up to this; None: keep the padding
    length_multiple: int | None = None
    request_limits: RequestLimits = field(default_factory=RequestLimits)
    linger_seconds: float = 0.002  # that a request waits for others to be merged with


class Server:
    """Within it, clients can connect; :meth:`serve` replies to them.

    Args:
        encode: text to token ids; None refuses texts.
        environ: of this process: Slurm's variables and NEMO_ALIGNER_TOKEN.

    Raises:
        UserError: on entering, if the port is taken or the address is not one of this machine.
    """

    def __init__(
        self,
        config: ServerConfig,
        limits: Limits,
        *,
        encode: wire.Encode | None = None,
        environ: Mapping[str, str] = os.environ,
    ) -> None:
        self._config, self._limits, self._encode = config, limits, encode
        host = config.ip or listening_host(environ)
        self.address = resolve(host, setting=f"{config.setting}.ip")
        self._token = find_token(self.address, config.port, environ)
        self._queue = RequestQueue(max_rows=config.max_rows)
        self._computing: Computing | None = None
        self._began = threading.Event()
        self._stop_asked = threading.Event()
        self._heard_at = time.monotonic()
        self._ended = False
        self._restarts: list[float] = []  # when Triton was started again
        endpoints = self._endpoints()
        front = Front(
            self.address,
            config.port,
            setting=config.setting,
            token=self._token.text if self._token else None,
            endpoints=[endpoint.name for endpoint in endpoints],
            unlimited=(wire.HEALTH, wire.STOP),
            limits=config.request_limits,
        )
        self._process = TritonProcess(endpoints, front)

    def __enter__(self) -> Self:
        self._process.__enter__()
        guard = f"; callers show the token of {self._token.origin}" if self._token else ""
        logger.info("serving at %s:%d%s", self.address, self._config.port, guard)
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._refuse_from_now()
        self._process.__exit__(kind, error, trace)
        if self._token and error is None:
            self._token.remove()

    @property
    def silent_seconds(self) -> float:
        """Since a client last asked for anything."""
        return time.monotonic() - self._heard_at

    def serve(self, handler: Handler, *, should_stop: Callable[[], bool] = lambda: False) -> bool:
        """Serve until a client asks to stop, or until ``should_stop``, which is asked five times a second.

        Returns:
            Whether a client asked.

        Raises:
            Exception: what the handler raised, unless it was a UserError; the end of a Triton that was started again
                just before. The clients have been notified.
        """
        config = self._config
        self._computing = Computing(
            handler, learns=bool(config.train), length_multiple=config.length_multiple
        )
        self._began.set()
        last_look = time.monotonic()
        try:
            while not (self._stop_asked.is_set() or should_stop()):
                if entries := _awaited(self._queue.take(POLL_SECONDS)):
                    self._run(entries, self._computing)
                if time.monotonic() - last_look >= POLL_SECONDS and not should_stop():
                    # A signal to the whole job, as Slurm sends it, ends Triton too.
                    self._keep_alive()
                    last_look = time.monotonic()
        finally:
            self._refuse_from_now()
        logger.info("the server at %s:%d stops", self.address, self._config.port)
        return self._stop_asked.is_set()

    def _keep_alive(self) -> None:
        """Start Triton again where it has died: the model has lost nothing, and clients ask again."""
        try:
            self._process.check_alive()
        except TritonEnded as death:
            now = time.monotonic()
            self._restarts = [at for at in self._restarts if now - at < RESTART_SECONDS]
            if len(self._restarts) >= RESTARTS:
                raise
            logger.warning("%s\nIt is started again", death)
            self._refuse_from_now()
            if number := len(self._restarts):
                time.sleep(min(2.0 ** (number - 1), LONGEST_PAUSE_SECONDS))
            self._process.restart()
            self._ended = False
            self._restarts.append(time.monotonic())
            logger.info("serving at %s:%d again", self.address, self._config.port)

    def _refuse_from_now(self) -> None:
        self._ended = True
        self._queue.fail(self._stopping())

    def _stopping(self) -> Refusal:
        return Refusal(Trouble.STOPPING, f"the server at {self.address}:{self._config.port} stops")

    def _run(self, entries: list[QueuedRequest], computing: Computing) -> None:
        try:
            outcome = computing.replies(entries)
        except (UserError, Refusal) as error:
            if len(entries) > 1:
                # Only the one that the model cannot score is refused.
                for entry in entries:
                    self._run([entry], computing)
                return
            outcome = error if isinstance(error, Refusal) else Refusal(Trouble.REFUSED, str(error))
            logger.warning("refused: %s", outcome.message)
        except BaseException as error:
            failed = Refusal(Trouble.FAILED, f"{type(error).__name__}: {error}")
            for entry in entries:
                entry.reply.set_exception(failed if isinstance(error, Exception) else self._stopping())
            raise
        computing.publish()
        for index, entry in enumerate(entries):
            if isinstance(outcome, Refusal):
                entry.reply.set_exception(outcome)
            else:
                entry.reply.set_result(outcome[index])

    def _endpoints(self) -> list[Endpoint]:
        config, limits, encode = self._config, self._limits, self._encode
        outputs = wire.infer_outputs(num_rewards=config.num_rewards, has_values=config.has_values)
        infer = self._ask(config.infer, lambda name, arrays: wire.read_infer(name, arrays, limits, encode))
        infer = Endpoint(config.infer, wire.INFER_INPUTS, outputs, infer, config.linger_seconds)
        endpoints = [infer, Endpoint(wire.STOP, [wire.DUMMY], [wire.STATUS], self._begin_to_stop)]
        if config.train:
            train = self._ask(config.train, lambda name, arrays: wire.read_train(name, arrays, limits))
            endpoints.append(Endpoint(config.train, wire.TRAIN_INPUTS, [wire.LOSS], train))
        if config.save:
            save = self._ask(
                config.save, lambda name, arrays: SaveRequest(version=wire.read_save(name, arrays))
            )
            endpoints.append(Endpoint(config.save, wire.SAVE_INPUTS, [wire.STATUS], save))
        # The last to come up: whoever gets its reply can reach all.
        health = Endpoint(wire.HEALTH, [wire.DUMMY], [wire.HEALTH_TEXT], self._report_health)
        return [*endpoints, health]

    def _ask(self, endpoint: str, read: Callable[[str, wire.Arrays], Request]) -> Handle:
        """Checks requests, hands the good ones to the main thread together, and waits for the replies."""

        def handle(requests: Sequence[Call]) -> list[wire.Arrays | Refusal]:
            self._heard_at = time.monotonic()
            entries = [self._read(endpoint, read, call) for call in requests]
            self._queue.put([entry for entry in entries if isinstance(entry, QueuedRequest)])
            # Read after the put: who sets it empties the queue afterwards, so that one of them finds the entries.
            if self._ended:
                self._queue.fail(self._stopping())
            return [_reply(entry) if isinstance(entry, QueuedRequest) else entry for entry in entries]

        return handle

    def _read(
        self, endpoint: str, read: Callable[[str, wire.Arrays], Request], call: Call
    ) -> QueuedRequest | Refusal:
        try:
            self._check_rows(endpoint, call.arrays)
            return QueuedRequest(request=read(endpoint, call.arrays), is_gone=call.is_gone)
        except UserError as error:
            return Refusal(Trouble.REFUSED, str(error))
        except Exception as error:
            # One request's: those that came with it get replies.
            logger.exception("a request to %s could not be read", endpoint)
            return Refusal(Trouble.FAILED, f"{type(error).__name__}: {error}")

    def _check_rows(self, endpoint: str, arrays: wire.Arrays) -> None:
        rows = max((array.shape[0] for array in arrays.values() if array.ndim), default=0)
        most, key = self._config.request_limits.rows, f"{self._config.setting}.max_request_rows"
        if rows > most:
            raise refuse(
                endpoint,
                f"the request has {rows} rows, and {key}={most}",
                f"send fewer rows in a request, or set {key} higher",
            )

    def _report_health(self, requests: Sequence[Call]) -> list[wire.Arrays | Refusal]:
        self._heard_at = time.monotonic()
        self._began.wait(READY_SECONDS)
        if self._computing is None:
            return [Refusal(Trouble.STOPPING, "the model is not ready yet")] * len(requests)
        return [wire.health_reply(self._computing.state)] * len(requests)

    def _begin_to_stop(self, requests: Sequence[Call]) -> list[wire.Arrays | Refusal]:
        logger.info("a client asks the server to stop")
        self._stop_asked.set()
        return [wire.save_reply()] * len(requests)


def _awaited(entries: list[QueuedRequest]) -> list[QueuedRequest]:
    """Those whose callers still wait; the others are not worth the work."""
    for entry in (gone := [entry for entry in entries if entry.is_gone()]):
        entry.reply.set_exception(Refusal(Trouble.REFUSED, "nobody waits for this reply any more"))
    if gone:
        logger.info("%d requests dropped: their callers are gone", len(gone))
    return [entry for entry in entries if not entry.reply.done()]


def _reply(entry: QueuedRequest) -> wire.Arrays | Refusal:
    try:
        return entry.reply.result()
    except Refusal as refusal:
        return refusal
