# SPDX-License-Identifier: Apache-2.0
"""Calls to one server: over HTTP, again where a call may succeed later, and with errors that say what to do.

tritonclient writes and reads the messages; they travel by the standard library, whose connections may be opened in any
thread and fail with the same few exceptions however a server dies.
"""

import http.client
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from numpy.typing import NDArray
from tritonclient.http import InferenceServerClient, InferInput
from tritonclient.utils import np_to_triton_dtype

from nemo_aligner.errors import UserError
from nemo_aligner.serving.address import keep_alive, resolve
from nemo_aligner.serving.protocol import TOKEN_HEADER, Refusal, Trouble, error_text
from nemo_aligner.serving.token import TOKEN_VARIABLE, find_token
from nemo_aligner.serving.wire import Arrays

logger = logging.getLogger(__name__)

T = TypeVar("T")

CONNECT_SECONDS = 10.0
FIRST_DELAY_SECONDS = 0.25  # then twice as long each time
LONGEST_DELAY_SECONDS = 5.0
REPORT_SECONDS = 30.0  # between two lines that say what is waited for


@dataclass(frozen=True, kw_only=True)
class ServerAddress:
    """Where a server is, and how long to wait for it."""

    setting: str  # the section of .ip and .port, to name in errors: remote_critic_rm.critic
    job: str  # the script that serves there
    ip: str
    port: int
    start_seconds: float = 6000.0  # for the server to come up
    return_seconds: float = 600.0  # for one that was reached before to come back
    timeout_seconds: float = 3600.0  # for a reply


class _NotNow(Exception):
    """A call that may succeed later."""


class HttpClient:
    """Calls to one server, from any thread.

    Raises:
        UserError: the address is not known.
    """

    def __init__(self, remote: ServerAddress, *, environ: Mapping[str, str] = os.environ) -> None:
        self.remote = remote
        self._environ = environ
        self._address = resolve(remote.ip, setting=f"{remote.setting}.ip")
        self._token = find_token(self._address, remote.port, environ)
        self._reached = False
        self._reported_at = -REPORT_SECONDS  # several threads may wait, and one logs
        self._closed = threading.Event()

    @property
    def name(self) -> str:
        """The server, for messages."""
        remote = self.remote
        return f"{remote.job} at {remote.setting}.ip={remote.ip}, {remote.setting}.port={remote.port}"

    def call(self, endpoint: str, arrays: Arrays) -> dict[str, NDArray[Any]]:
        """Ask and wait for the reply, through a server that is not up yet, busy, or started again meanwhile.

        Raises:
            UserError: the request is refused, the model failed at it, or the server did not come (back) in time.
            Refusal: the server's weights are behind the request; the caller knows what they miss.
        """
        message = _encode(arrays)
        delay, lost_at = FIRST_DELAY_SECONDS, None
        while True:
            try:
                return self._ask(endpoint, message)
            except _NotNow as error:
                reason = str(error)
            now = time.monotonic()
            lost_at = lost_at or now
            patience = self.remote.return_seconds if self._reached else self.remote.start_seconds
            if now - lost_at + delay > patience:
                raise UserError(
                    f"{self.name} did not reply for {patience:g} s: {reason}",
                    fix=f"start {self.remote.job}, or set {self.remote.setting}.ip and .port to where it runs",
                )
            if now - self._reported_at >= REPORT_SECONDS:
                self._reported_at = now
                logger.info("waiting for %s (%.0f s of %g s): %s", self.name, now - lost_at, patience, reason)
            if self._closed.wait(delay):
                raise UserError(f"the wait for {self.name} was ended", fix="none is needed if this job ends")
            delay = min(2 * delay, LONGEST_DELAY_SECONDS)

    def call_once(self, endpoint: str, arrays: Arrays) -> bool:
        """Ask once, without retries; True if there was a reply."""
        try:
            self._ask(endpoint, _encode(arrays))
        except _NotNow:
            return False
        return True

    def wait(self, seconds: float) -> bool:
        """Sleep; True if the line was closed meanwhile."""
        return self._closed.wait(seconds)

    def close(self) -> None:
        """End all waits."""
        self._closed.set()

    def _ask(self, endpoint: str, message: tuple[bytes, int]) -> dict[str, NDArray[Any]]:
        began, patience = time.monotonic(), self.remote.timeout_seconds
        try:
            response, payload = self._post(f"/v2/models/{endpoint}/infer", *message)
        except TimeoutError as error:
            if time.monotonic() - began < patience:
                raise _NotNow(str(error)) from error
            raise UserError(
                f"{self.name} took {endpoint} and did not reply within {patience:g} s",
                fix="see that job's log; if it only needs longer, set remote_critic_rm.reply_timeout higher",
            ) from error
        except (OSError, http.client.HTTPException) as error:
            raise _NotNow(str(error) or type(error).__name__) from error
        if response.status != 200:
            raise self._error(endpoint, response.status, payload)
        self._reached = True
        return _decode(payload, response.getheader("Inference-Header-Content-Length"))

    def _post(self, path: str, body: bytes, json_size: int) -> tuple[http.client.HTTPResponse, bytes]:
        connection = http.client.HTTPConnection(self._address, self.remote.port, timeout=CONNECT_SECONDS)
        try:
            connection.connect()
            keep_alive(connection.sock)
            connection.sock.settimeout(self.remote.timeout_seconds)
            headers = {"Inference-Header-Content-Length": str(json_size)}
            if self._token:
                headers[TOKEN_HEADER] = self._token.text
            connection.request("POST", path, body, headers)
            response = connection.getresponse()
            return response, response.read()
        finally:
            connection.close()

    def _error(self, endpoint: str, status: int, payload: bytes) -> Exception:
        """The exception for an error that the server reports."""
        text = error_text(payload)
        if status == 403:
            return self._token_error(text)
        if refusal := Refusal.parse(text):
            return self._refusal_error(refusal)
        return UserError(f"{self.name}: {endpoint}: {text}", fix="send what the endpoint takes")

    def _refusal_error(self, refusal: Refusal) -> Exception:
        match refusal.trouble:
            case Trouble.REFUSED:
                problem, _, fix = refusal.message.partition("\nFix: ")
                return UserError(f"{self.name} refused: {problem}", fix=fix)
            case Trouble.FAILED:
                return UserError(
                    f"{self.name} failed: {refusal.message}", fix="see the end of that job's log"
                )
            case Trouble.STOPPING | Trouble.BUSY:
                return _NotNow(refusal.message)
            case Trouble.STALE:
                return refusal

    def _token_error(self, text: str) -> Exception:
        before = self._token
        self._token = find_token(self._address, self.remote.port, self._environ)
        if self._token != before:
            return _NotNow(f"{text}; the token has changed")
        shown = f"the token of {before.origin}" if before else "no token"
        return UserError(
            f"{self.name} does not accept {shown}: {text}",
            fix=f"set {TOKEN_VARIABLE} to the same text in both jobs",
        )


def _encode(arrays: Arrays) -> tuple[bytes, int]:
    inputs = []
    for name, array in arrays.items():
        tensor = InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
        tensor.set_data_from_numpy(array)
        inputs.append(tensor)
    body, json_size = InferenceServerClient.generate_request_body(inputs)
    return body, json_size or len(body)


def _decode(payload: bytes, json_size: str | None) -> dict[str, NDArray[Any]]:
    result = InferenceServerClient.parse_response_body(
        payload, header_length=int(json_size) if json_size else None
    )
    arrays: dict[str, NDArray[Any]] = {}
    for output in result.get_response()["outputs"]:
        array = result.as_numpy(output["name"])
        assert array is not None
        arrays[output["name"]] = array
    return arrays


class WorkerPool:
    """Runs calls in threads of its own, in order where there is one, and gives futures.

    The threads do not hold up the end of the process, as those of concurrent.futures would.
    """

    def __init__(self, name: str, *, workers: int = 1) -> None:
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._work, name=f"{name}-{index}", daemon=True)
            for index in range(workers)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, call: Callable[[], T]) -> Future[T]:
        """The call's result, or what it raises."""
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(call())
            except Exception as error:
                future.set_exception(error)

        self._calls.put(run)
        return future

    def close(self) -> None:
        """End the threads when they have done what was submitted."""
        for _ in self._threads:
            self._calls.put(None)

    def _work(self) -> None:
        while (run := self._calls.get()) is not None:
            run()
