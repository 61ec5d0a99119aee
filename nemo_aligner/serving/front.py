# SPDX-License-Identifier: Apache-2.0
"""The HTTP server that callers reach. It asks for the token, keeps the limits, and hands requests on to Triton.

Triton has no limit of its own: it reads a body of any size, a nested one ends it, and it does not report that a caller
is gone. So it listens for this process alone, and callers see inference, health and metadata of it and nothing else.
While Triton is started, callers get refusals.
"""

import asyncio
import errno
import hmac
import io
import itertools
import logging
import re
import socket
import threading
import time
from collections.abc import Coroutine, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Self

import aiohttp
from aiohttp import web

from nemo_aligner.errors import UserError
from nemo_aligner.serving.address import keep_alive
from nemo_aligner.serving.body import Refused, read_body
from nemo_aligner.serving.protocol import (
    CALL_HEADER,
    TOKEN_HEADER,
    Refusal,
    RequestLimits,
    Trouble,
    error_text,
)

logger = logging.getLogger(__name__)

STALL_SECONDS = 30  # that Triton may take to hand on a request while the endpoint has no other
CLOSE_SECONDS = 1.0  # for replies that are under way at the end
STALLED = "Stub process"  # in what Triton says when a process of its own has died or gets no time
ENDING = ("unknown model", "not ready", "is not found", "stopping", "unloading", "unavailable")
SENT = ("Content-Type", "Accept-Encoding", "Inference-Header-Content-Length")
RECEIVED = ("Content-Type", "Content-Encoding", "Inference-Header-Content-Length")
OPEN = re.compile(r"/v2/?|/v2/health/(?:live|ready)")
MODEL = re.compile(r"/v2/models/(?!stats$)(?P<name>[^/]+)(?:/versions/1)?(?P<rest>|/ready|/config|/infer)")


@dataclass(frozen=True, kw_only=True)
class Upstream:
    """Where Triton listens for this process alone, and the secret that opens it."""

    port: int  # of 127.0.0.1
    secret: str


@dataclass
class _Call:
    """A request that Triton has and has not replied to."""

    endpoint: str
    arrived: bool = False  # at the endpoint's function
    waited: int = 0  # seconds to arrive there while the endpoint had no other
    gone: bool = False  # nobody waits for the reply


class Front:
    """Within it, callers get replies at ``address:port``: from Triton once it is open, before and after a refusal.

    Args:
        setting: the section of .port and of the limits' keys, as in trainer.ppo.
        token: what callers must show; None asks for nothing.
        endpoints: the names that are served.
        unlimited: those of them whose requests never count as waiting: they need no model.

    Raises:
        UserError: on entering, if the port is taken.
    """

    def __init__(
        self,
        address: str,
        port: int,
        *,
        setting: str,
        token: str | None,
        endpoints: Sequence[str],
        unlimited: Sequence[str],
        limits: RequestLimits,
    ) -> None:
        self._address, self._port, self._setting, self.name = address, port, setting, f"{address}-{port}"
        self._token, self._endpoints, self._unlimited = token, endpoints, unlimited
        self._limits = limits
        self._upstream: Upstream | None = None
        self._reason = "the server starts"
        self._numbers = itertools.count()
        self._calls: dict[str, _Call] = {}
        self._trouble: str | None = None
        self._session: aiohttp.ClientSession | None = None

    def bind(self, *, patience_seconds: float) -> None:
        """Take the port. Of a server that was killed, it may need some seconds to be free."""
        until = time.monotonic() + patience_seconds
        while True:
            self._socket = socket.socket()
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            keep_alive(self._socket)  # what it accepts has the same options
            try:
                self._socket.bind((self._address, self._port))
                return self._socket.listen()
            except OSError as error:
                self._socket.close()
                reason = error
            if reason.errno != errno.EADDRINUSE or time.monotonic() > until:
                raise UserError(
                    f"{self._setting}.port={self._port}: {self._address}:{self._port} cannot be listened on: {reason}",
                    fix="end the process that has the port, or choose another port in both jobs",
                )
            time.sleep(0.2)

    def __enter__(self) -> Self:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name=f"front-{self._port}", daemon=True
        )
        self._thread.start()
        self._run(self._start())
        return self

    def __exit__(self, *_: object) -> None:
        self.close("the server stops")
        self._run(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def open(self, upstream: Upstream) -> None:
        """Hand requests on from now."""
        self._trouble = None
        self._upstream = upstream

    def close(self, reason: str) -> None:
        """Reject requests from now on, with ``reason``; those that Triton has get replies if it still can."""
        self._reason = reason
        self._upstream = None

    def stop_listening(self) -> None:
        """Take no new connections, so that whoever waits for the port to be free need not wait for the rest."""
        self._run(self._site.stop())

    @property
    def trouble(self) -> str | None:
        """The sign that Triton has stopped working since it was opened, in words; None if there is none."""
        return self._trouble

    def arrived(self, number: str) -> None:
        """The request of that number has arrived at its endpoint's function; from any thread."""
        if call := self._calls.get(number):
            call.arrived = True

    def is_gone(self, number: str) -> bool:
        """True if nobody waits for the reply any more; from any thread."""
        call = self._calls.get(number)
        return call is None or call.gone

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        done: Future[None] = asyncio.run_coroutine_threadsafe(work, self._loop)
        done.result()

    async def _start(self) -> None:
        application = web.Application()
        application.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(
            application,
            access_log=None,
            logger=logger.getChild("http"),
            handler_cancellation=True,
            shutdown_timeout=CLOSE_SECONDS,
        )
        await self._runner.setup()
        self._session = aiohttp.ClientSession(
            # A connection for each request: one that Triton has closed meanwhile would fail the next.
            connector=aiohttp.TCPConnector(limit=0, force_close=True),
            timeout=aiohttp.ClientTimeout(total=None),
            auto_decompress=False,
            skip_auto_headers=("Accept-Encoding", "Content-Type", "User-Agent"),
        )
        self._site = web.SockSite(self._runner, self._socket)
        await self._site.start()
        self._watching = asyncio.create_task(self._watch())

    async def _stop(self) -> None:
        self._watching.cancel()
        await self._runner.cleanup()
        if self._session:
            await self._session.close()

    async def _watch(self) -> None:
        """Miss a Triton that takes requests and hands them on no more. Counts seconds in which this process runs."""
        while True:
            await asyncio.sleep(1.0)
            has_one = {call.endpoint for call in self._calls.values() if call.arrived}
            for call in self._calls.values():
                call.waited = 0 if call.endpoint in has_one else call.waited + 1
                if call.waited > STALL_SECONDS and not self._trouble:
                    self._trouble = f"a request to {call.endpoint} did not arrive in {STALL_SECONDS} s"

    async def _handle(self, request: web.Request) -> web.Response:
        try:
            return await self._respond(request)
        except Refused as no:
            return web.json_response({"error": str(no.refusal)}, status=no.status)

    async def _respond(self, request: web.Request) -> web.Response:
        if self._token and not hmac.compare_digest(
            request.headers.get(TOKEN_HEADER, "").encode(errors="surrogateescape"), self._token.encode()
        ):
            text = f"this server is restricted: it expects the header {TOKEN_HEADER} with its token"
            return web.json_response({"error": text}, status=403)
        model = MODEL.fullmatch(request.path)
        if not model and not OPEN.fullmatch(request.path):
            text = f"{request.path} is restricted: this server offers inference, health and metadata alone"
            return web.json_response({"error": text}, status=403)
        infers = model is not None and model["rest"] == "/infer"
        if request.method != ("POST" if infers else "GET"):
            text = f"{request.path} takes {'POST' if infers else 'GET'}, not {request.method}"
            return web.json_response({"error": text}, status=405)
        upstream = self._upstream
        if upstream is None:
            raise Refused(Trouble.STOPPING, self._reason)
        if self._trouble:
            raise Refused(Trouble.STOPPING, f"Triton is about to be started again: {self._trouble}")
        if model and model["name"] not in self._endpoints:
            raise Refused(
                Trouble.REFUSED,
                f"the server has no endpoint {model['name']}\nFix: ask one of {', '.join(self._endpoints)}",
                status=404,
            )
        if model is None or not infers:
            return await self._hand_on(upstream, "GET", request, {}, None)
        try:
            async with asyncio.timeout(self._limits.seconds):
                return await self._infer(upstream, model["name"], request)
        except TimeoutError:
            key = f"{self._setting}.request_timeout"
            raise Refused(
                Trouble.REFUSED,
                f"{model['name']}: no reply within {key}={self._limits.seconds:g} s\n"
                f"Fix: send fewer rows, or set {key} higher",
                status=504,
            ) from None

    async def _infer(self, upstream: Upstream, name: str, request: web.Request) -> web.Response:
        body = await read_body(name, request, limit=self._limits.bytes, setting=self._setting)
        counted = name not in self._unlimited
        waiting = sum(call.endpoint not in self._unlimited for call in self._calls.values())
        if counted and waiting >= self._limits.waiting:
            key = f"{self._setting}.max_waiting_requests"
            raise Refused(Trouble.BUSY, f"{name}: {key}={self._limits.waiting} requests wait already")
        number = str(next(self._numbers))
        call = self._calls[number] = _Call(endpoint=name)
        asked = asyncio.create_task(
            self._hand_on(upstream, "POST", request, {CALL_HEADER: number}, io.BytesIO(body))
        )
        asked.add_done_callback(lambda task: self._done(number, task))
        try:
            # Triton keeps a request whose caller is gone; it is dropped where it arrives.
            return await asyncio.shield(asked)
        except asyncio.CancelledError:
            call.gone = True
            raise

    def _done(self, number: str, task: asyncio.Task[web.Response]) -> None:
        del self._calls[number]
        if not task.cancelled():
            task.exception()  # a caller who is gone does not ask for it

    async def _hand_on(
        self,
        upstream: Upstream,
        method: str,
        request: web.Request,
        extra: dict[str, str],
        body: io.BytesIO | None,
    ) -> web.Response:
        assert self._session is not None
        headers = {name: request.headers[name] for name in SENT if name in request.headers}
        headers |= {TOKEN_HEADER: upstream.secret, **extra}
        url = f"http://127.0.0.1:{upstream.port}{request.path}"
        try:
            async with self._session.request(method, url, headers=headers, data=body) as reply:
                payload = await reply.read()
        except aiohttp.ClientConnectorError as error:
            self._note(upstream, f"it does not listen: {error}")
            raise Refused(Trouble.STOPPING, "Triton does not listen; ask again") from None
        except (aiohttp.ClientError, OSError) as error:
            raise Refused(Trouble.STOPPING, f"Triton ended under the request ({error}); ask again") from None
        if reply.status >= 400:
            self._check_ending(upstream, payload)
        kept = {name: reply.headers[name] for name in RECEIVED if name in reply.headers}
        return web.Response(status=reply.status, body=payload, headers=kept)

    def _check_ending(self, upstream: Upstream, payload: bytes) -> None:
        """Raise a refusal for a call that Triton fails because it ends, whole or in part."""
        text = error_text(payload)
        if Refusal.parse(text):
            return
        if STALLED in text:
            self._note(upstream, text)
        elif self._upstream is upstream and not any(sign in text for sign in ENDING):
            return
        raise Refused(Trouble.STOPPING, f"Triton ends: {text}; ask again")

    def _note(self, upstream: Upstream, trouble: str) -> None:
        if self._upstream is upstream and not self._trouble:
            self._trouble = trouble
