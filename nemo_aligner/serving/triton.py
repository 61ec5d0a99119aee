# SPDX-License-Identifier: Apache-2.0
"""A Triton process and its endpoints, by PyTriton. Knows nothing of models; the only file that imports PyTriton.

It listens for HTTP alone, leaves no process, port or file behind, and asks every caller for the token if there is one.
"""

import errno
import functools
import logging
import os
import socket
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import psutil
from numpy.typing import NDArray
from pytriton.client import client as pytriton_client
from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
from pytriton.models.model import Model
from pytriton.proxy.data import TensorStore
from pytriton.proxy.types import Request
from pytriton.triton import VALID_TRITON_ENDPOINTS, Triton, TritonConfig, TritonSecurityConfig
from pytriton.utils.workspace import Workspace

from nemo_aligner.errors import UserError
from nemo_aligner.serving.checks import TensorSpec
from nemo_aligner.serving.leftovers import Remains, end_abandoned, kill, own_folder
from nemo_aligner.serving.protocol import TOKEN_HEADER, Refusal, Trouble
from nemo_aligner.serving.wire import Arrays

__all__ = ["Answer", "Endpoint", "TritonProcess"]

logger = logging.getLogger(__name__)

EXIT_SECONDS = 1.5  # for Triton to unload its endpoints; then its processes are killed
PORT_SECONDS = 15.0  # for the port of a server that was killed to be free again
LAST_LINES = 20
MAX_BATCH_SIZE = 9_999_999

Answer = Callable[[Sequence[Arrays]], Sequence[Arrays | Refusal]]

# PyTriton's half inside Triton can fail a whole batch only, and fails it at an empty tensor. This goes to its end.
PROXY_ADDITION = """

_pytriton_wrap_response = _wrap_response
_pytriton_wrap_request = TritonRequestsServer._wrap_request


def _wrap_response(response, requested_outputs_names, model_outputs_dict):
    if "refusal" not in (response.data or {}):
        return _pytriton_wrap_response(response, requested_outputs_names, model_outputs_dict)
    text = response.data["refusal"].item().decode()
    code = pb_utils.TritonError.INVALID_ARG if text.startswith("refused") else pb_utils.TritonError.INTERNAL
    return pb_utils.InferenceResponse(output_tensors=[], error=pb_utils.TritonError(text, code))


def _wrap_request(self, triton_request, inputs, span=None):
    request = _pytriton_wrap_request(self, triton_request, inputs, span)
    empty = [name for name, array in request.data.items() if array.size == 0]
    for name in empty:
        del request.data[name]
    request.parameters["empty"] = " and ".join(empty)
    return request


TritonRequestsServer._wrap_request = _wrap_request
"""


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """A name under which requests are answered.

    Attributes:
        answer: called in a thread of PyTriton's with one request, or with several if they may linger: a reply or a
            refusal for each, in order.
        linger_seconds: how long a request waits for others, of any shape. If set, the first size of each tensor is
            the batch's, which Triton counts.
    """

    name: str
    inputs: Sequence[TensorSpec]
    outputs: Sequence[TensorSpec]
    answer: Answer
    linger_seconds: float | None = None


class _Model(Model):
    """PyTriton's, with a batch of requests of many shapes, each of which may be refused by itself."""

    def clean(self) -> None:
        if self._inference_handlers:
            super().clean()

    def get_model_config(self) -> dict[str, Any]:
        config = super().get_model_config()
        if self.config.batching:
            for tensor in config["input"]:
                tensor["allow_ragged_batch"] = True
        return config

    def get_proxy_model_files(self) -> dict[str, bytes]:
        files = super().get_proxy_model_files()
        files[f"file:{self.model_version}/model.py"] += PROXY_ADDITION.encode()
        return files


class _Triton(Triton):
    """PyTriton's, of such models."""

    def _prepare_triton_config(self, workspace: Workspace) -> None:
        super()._prepare_triton_config(workspace)
        # Else each endpoint is started twice, at first to be asked what its configuration lacks.
        self._triton_server_config["strict-model-config"] = True

    def _initialize_server(self) -> None:
        super()._initialize_server()
        assert self._triton_server is not None
        # It would print what Triton says beside its log, the complaints of processes that are ended among it.
        self._triton_server._verbose = False

    @property
    def last_words(self) -> str:
        """The end of what Triton has said, to its log or not."""
        log = self._config.log_file
        logged = log.read_text(errors="replace") if log and log.exists() else ""
        said = self._triton_server.logs() if self._triton_server else ""
        return "\n".join(f"{logged}\n{said}".splitlines()[-LAST_LINES:])

    def add(self, endpoint: Endpoint) -> None:
        batches = endpoint.linger_seconds is not None

        def tensor(spec: TensorSpec) -> Tensor:
            shape = tuple(-1 if isinstance(size, str) else size for size in spec.shape)
            dtype = bytes if spec.dtype is np.bytes_ else spec.dtype
            return Tensor(
                name=spec.name, dtype=dtype, shape=shape[1:] if batches else shape, optional=spec.optional
            )

        model = _Model(
            model_name=endpoint.name,
            model_version=1,
            inference_fn=_inference_function(endpoint),
            inputs=[tensor(spec) for spec in endpoint.inputs],
            outputs=[tensor(spec) for spec in endpoint.outputs],
            config=ModelConfig(
                batching=batches,
                max_batch_size=MAX_BATCH_SIZE,
                batcher=DynamicBatcher(
                    max_queue_delay_microseconds=int(1e6 * (endpoint.linger_seconds or 0))
                ),
            ),
            workspace=self._workspace,
            triton_context=self._triton_context,
            strict=False,
        )
        model.on_model_event(self._on_model_event)
        self._model_manager.add_model(model, self.is_connected())

    def _pre_stop_impl(self) -> None:
        super()._pre_stop_impl()
        # PyTriton ends the threads of one model after those of another, a second each.
        with ThreadPoolExecutor() as pool:
            list(pool.map(Model.clean, self._model_manager.models))


def _inference_function(endpoint: Endpoint) -> Callable[[list[Request]], list[dict[str, NDArray[Any]]]]:
    def refuse_empty(request: Request) -> Refusal | None:
        if empty := (request.parameters or {})["empty"]:
            return Refusal(
                Trouble.REFUSED, f"{endpoint.name}: {empty} is empty\nCure: send at least one token"
            )
        return None

    def outputs(reply: Arrays | Refusal) -> dict[str, NDArray[Any]]:
        if isinstance(reply, Refusal):
            return {"refusal": np.array([str(reply).encode()], dtype=np.bytes_)}
        return dict(reply)

    def infer(requests: list[Request]) -> list[dict[str, NDArray[Any]]]:
        refused = [refuse_empty(request) for request in requests]
        asked = [request.data for request, refusal in zip(requests, refused, strict=True) if refusal is None]
        replies = iter(endpoint.answer(asked))
        return [outputs(refusal or next(replies)) for refusal in refused]

    return infer


class TritonProcess:
    """Within it, the endpoints can be reached at ``address:port``.

    Args:
        setting: what to name in errors beside the port, as in trainer.ppo.port.
        token: what callers must show; None asks for nothing, but keeps what could change the server closed.

    Raises:
        UserError: on entering, if the port is taken.
    """

    def __init__(
        self, endpoints: Sequence[Endpoint], *, address: str, port: int, setting: str, token: str | None
    ) -> None:
        self._endpoints = endpoints
        self._address, self._port, self._setting = address, port, setting
        # PyTriton makes up a secret where it gets none.
        self._security = (
            TritonSecurityConfig(access_token=token, restricted_endpoints=sorted(VALID_TRITON_ENDPOINTS))
            if token
            else TritonSecurityConfig()
        )
        self._within = ExitStack()

    def __enter__(self) -> Self:
        name = f"{self._address}-{self._port}"
        # Of a server that was killed, the port takes some seconds to be free.
        patience = PORT_SECONDS if end_abandoned(name) else 0.0
        _wait_for_port(self._address, self._port, f"{self._setting}={self._port}", seconds=patience)
        # What it says besides is meant for those who write servers.
        logging.getLogger("pytriton").setLevel(logging.ERROR)
        longest = max(len(endpoint.name) for endpoint in self._endpoints)
        with ExitStack() as within:
            folder = within.enter_context(own_folder(name, longest_name=longest))
            self._triton = _Triton(
                config=TritonConfig.from_dict(
                    {
                        "http_address": self._address,
                        "http_port": self._port,
                        "allow_grpc": False,
                        "allow_metrics": False,
                        "log_file": folder / "triton.log",
                    }
                ),
                workspace=folder / "w",
                security_config=self._security,
            )
            for endpoint in self._endpoints:
                self._triton.add(endpoint)
            within.enter_context(_stopped(self._triton, folder))
            secret = self._security.access_token
            assert secret is not None
            try:
                with _library_path(), _health_with_token(secret):
                    self._triton.run()
            except Exception:
                logger.error("Triton does not start:\n%s", self._triton.last_words)
                raise
            _hide(secret)
            self._parts = Remains.of(folder).endpoints
            self._within = within.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._within.close()

    def check_alive(self) -> None:
        """Raises RuntimeError, with the end of Triton's log, if the process or one of its endpoints has ended."""
        if not (self._triton.is_alive() and all(map(_lives, self._parts))):
            raise RuntimeError(f"Triton has ended by itself; its last words:\n{self._triton.last_words}")

    def restart(self) -> None:
        """End what is left of Triton and start it anew, with the same endpoints."""
        self.__exit__(None, None, None)
        self.__enter__()


def _lives(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def _wait_for_port(address: str, port: int, setting: str, *, seconds: float) -> None:
    until = time.monotonic() + seconds
    while True:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                return probe.bind((address, port))
            except OSError as error:
                reason = error
        if reason.errno != errno.EADDRINUSE or time.monotonic() > until:
            raise UserError(
                f"{setting}: {address}:{port} cannot be listened on: {reason}",
                cure="end the process that has the port, or choose another port in both jobs",
            )
        time.sleep(0.2)


@contextmanager
def _stopped(triton: Triton, folder: Path) -> Iterator[None]:
    """At the end no process of Triton's is left, nor a file of theirs, however they end."""
    try:
        yield
    finally:
        remains = Remains.of(folder)
        killer = threading.Timer(EXIT_SECONDS, kill, [remains.processes])
        killer.start()
        try:
            if triton._triton_server is not None:
                triton.stop()
        finally:
            killer.cancel()
            remains.end(wait_seconds=1.0)
            # PyTriton keeps its connections by their paths, and the next Triton's may have the same, with other keys.
            for path in [path for path in TensorStore._instances if path.startswith(f"{folder}/")]:
                del TensorStore._instances[path]


@contextmanager
def _library_path() -> Iterator[None]:
    """Triton's Python processes look for libpython, which need not be where the system looks."""
    before = os.environ.get("LD_LIBRARY_PATH")
    folder = sysconfig.get_config_var("LIBDIR") if sysconfig.get_config_var("Py_ENABLE_SHARED") else None
    os.environ["LD_LIBRARY_PATH"] = ":".join(filter(None, [before, folder]))
    try:
        yield
    finally:
        if before is None:
            del os.environ["LD_LIBRARY_PATH"]
        else:
            os.environ["LD_LIBRARY_PATH"] = before


@contextmanager
def _health_with_token(secret: str) -> Iterator[None]:
    """PyTriton 0.7.0 asks Triton for its health without the token, so that a guarded Triton never looks ready to it."""
    server_ready, model_ready = pytriton_client.wait_for_server_ready, pytriton_client.wait_for_model_ready
    headers = {TOKEN_HEADER: secret}
    pytriton_client.wait_for_server_ready = functools.partial(server_ready, headers=headers)
    pytriton_client.wait_for_model_ready = functools.partial(model_ready, headers=headers)
    try:
        yield
    finally:
        pytriton_client.wait_for_server_ready = server_ready
        pytriton_client.wait_for_model_ready = model_ready


def _hide(secret: str) -> None:
    """Overwrite the secret in Triton's argument list, which every user of the machine may read; Triton has read it."""
    for child in psutil.Process().children():
        try:
            if not any(secret in argument for argument in child.cmdline()):
                continue
            fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
            start, end = (
                int(fields[45]),
                int(fields[46]),
            )  # arg_start and arg_end of proc(5), which counts from pid
            with Path(f"/proc/{child.pid}/mem").open("r+b", buffering=0) as memory:
                memory.seek(start)
                arguments = memory.read(end - start)
                memory.seek(start)
                memory.write(arguments.replace(secret.encode(), b"x" * len(secret)))
        except (OSError, psutil.Error) as error:
            logger.warning("users of this machine can read the server's token in its process list: %s", error)
