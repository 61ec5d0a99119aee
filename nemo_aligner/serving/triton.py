# SPDX-License-Identifier: Apache-2.0
"""A Triton for this process alone and its endpoints, by PyTriton; the only file that imports it. Knows no models.

It listens at 127.0.0.1 for HTTP alone and asks for a secret that only this process knows.
"""

import functools
import http.client
import json
import logging
import os
import secrets
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray
from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
from pytriton.model_config.generator import ModelConfigGenerator
from pytriton.models import model as pytriton_model
from pytriton.models.model import Model
from pytriton.proxy.data import TensorStore
from pytriton.proxy.types import Request
from pytriton.triton import (
    VALID_TRITON_ENDPOINTS,
    Triton,
    TritonConfig,
    TritonLifecyclePolicy,
    TritonSecurityConfig,
)
from pytriton.utils.workspace import Workspace
from tritonclient.utils import np_to_triton_dtype

from nemo_aligner.serving.checks import TensorSpec
from nemo_aligner.serving.cleanup import OrphanedTriton, remove_environments
from nemo_aligner.serving.endpoint import Call, Endpoint
from nemo_aligner.serving.front import Front
from nemo_aligner.serving.protocol import CALL_HEADER, TOKEN_HEADER, Refusal, Trouble, error_text
from nemo_aligner.serving.wire import Arrays

logger = logging.getLogger(__name__)

LAST_LINES = 20
MAX_BATCH_SIZE = 9_999_999
POLL_SECONDS = 0.1
# in the place of a call's number: the endpoint refuses it, which shows that requests reach it
PROBE = "probe"


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


class _Model(Model):
    """PyTriton's, with a batch of requests of many shapes, each of which may be refused by itself."""

    def clean(self) -> None:
        if self._inference_handlers:
            super().clean()

    def generate_model(self, model_repository: Path) -> None:
        folder = Path(model_repository) / self.model_name
        for name, content in self.get_proxy_model_files().items():
            path = folder / name.removeprefix("file:")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content + (PROXY_ADDITION.encode() if path.name == "model.py" else b""))
        _ModelConfigGenerator(self._get_triton_model_config()).to_file(folder / "config.pbtxt")


class _ModelConfigGenerator(ModelConfigGenerator):
    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        if config["max_batch_size"]:
            for tensor in config["input"]:
                tensor["allow_ragged_batch"] = True
        return config


class PrivateTriton(Triton):
    """PyTriton's, of such models, which it finds in files.

    Args:
        endpoints: what it serves.
        front: asked about each request that arrives.
        folder: for all its files.
        port: of 127.0.0.1.
    """

    def __init__(self, endpoints: Sequence[Endpoint], front: Front, *, folder: Path, port: int) -> None:
        self.secret = secrets.token_urlsafe(32)
        self.port, self.folder = port, folder
        self._endpoints = endpoints
        self._parts: list[psutil.Process] = []
        # What it says besides is meant for those who write servers.
        logging.getLogger("pytriton").setLevel(logging.ERROR)
        super().__init__(
            config=TritonConfig.from_dict(
                {
                    "http_address": "127.0.0.1",
                    "http_port": port,
                    "http_header_forward_pattern": CALL_HEADER,
                    "allow_grpc": False,
                    "allow_metrics": False,
                    "log_file": folder / "triton.log",
                }
            ),
            workspace=folder / "w",
            triton_lifecycle_policy=TritonLifecyclePolicy(
                launch_triton_on_startup=True, local_model_store=True
            ),
            security_config=TritonSecurityConfig(
                access_token=self.secret, restricted_endpoints=sorted(VALID_TRITON_ENDPOINTS)
            ),
        )
        for endpoint in endpoints:
            self._add(endpoint, front)

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
    def shared_memory(self) -> str:
        """How the names of its shared memory begin, in /dev/shm."""
        return str(self._python_backend_config["shm-region-prefix-name"])

    @property
    def log_tail(self) -> str:
        """The end of what Triton has said, to its log or not."""
        log = self._config.log_file
        logged = log.read_text(errors="replace") if log and log.exists() else ""
        said = self._triton_server.logs() if self._triton_server else ""
        return "\n".join(f"{logged}\n{said}".splitlines()[-LAST_LINES:])

    @property
    def is_whole(self) -> bool:
        """True if the process and the process of each endpoint that it was started with live."""
        return self.is_alive() and all(map(_lives, self._parts))

    def start(self, seconds: float) -> None:
        """Start it, and see that a request reaches each endpoint.

        Raises:
            Exception: it does not, within so many seconds, in PyTriton's words or ours.
        """
        until = time.monotonic() + seconds
        # By default an endpoint's process that needs 30 s to begin loses its memory, and dies of it.
        self._triton_server_config["backend_config"] = [
            *self._python_backend_config.to_list_args(),
            f"python,stub-timeout-seconds={int(seconds)}",
        ]
        with remove_environments(), _library_path():
            self._run_server()
            self._wait_until_ready(until)
        _hide(self.secret)
        with _patient_handshake(until):
            self._model_manager.setup_models()
        self._parts = OrphanedTriton.of(self.folder).endpoints
        for endpoint in self._endpoints:
            self._probe(endpoint, until)
        # Those that were there before the probes are those that replied: Triton may replace one that dies.
        if len(self._parts) != len(self._endpoints) or not self.is_whole:
            raise RuntimeError("a process of an endpoint has ended meanwhile")
        with self._cv:
            self._connected = True

    def _wait_until_ready(self, until: float) -> None:
        assert self._triton_server is not None
        parts: list[psutil.Process] = []
        while True:
            with suppress(OSError, http.client.HTTPException):
                if self._ask("GET", "/v2/health/ready", until)[0] == 200:
                    return
            # Triton itself would wait for an endpoint's process that has ended.
            if not (self._triton_server.is_alive() and all(map(_lives, parts))):
                raise RuntimeError("it has ended, or a process of an endpoint has")
            parts = OrphanedTriton.of(self.folder).endpoints
            if time.monotonic() > until:
                raise TimeoutError("it is not ready in time")
            time.sleep(POLL_SECONDS)

    def _probe(self, endpoint: Endpoint, until: float) -> None:
        inputs = []
        for spec in endpoint.inputs:
            if spec.dtype is not np.bytes_:
                shape = [size if isinstance(size, int) else 1 for size in spec.shape]
                values = np.zeros(int(np.prod(shape)), dtype=spec.dtype).tolist()
                datatype = np_to_triton_dtype(np.dtype(spec.dtype))
                inputs.append({"name": spec.name, "datatype": datatype, "shape": shape, "data": values})
        status, payload = self._ask(
            "POST", f"/v2/models/{endpoint.name}/infer", until, json.dumps({"inputs": inputs})
        )
        text = error_text(payload)
        if text != str(_PROBED):
            raise RuntimeError(f"{endpoint.name} does not reply: {status} {text}")

    def _ask(self, method: str, path: str, until: float, body: str | None = None) -> tuple[int, bytes]:
        left = max(1.0, until - time.monotonic())
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=left)
        try:
            connection.request(method, path, body, {TOKEN_HEADER: self.secret, CALL_HEADER: PROBE})
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def _add(self, endpoint: Endpoint, front: Front) -> None:
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
            inference_fn=_inference_function(endpoint, front),
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
        self._model_manager.add_model(model)

    def stop(self) -> bool:
        """End it in order, as far as it still listens."""
        stopped = super().stop()
        # PyTriton keeps its connections by their paths, and the next Triton's may have the same, with other keys.
        for path in [path for path in TensorStore._instances if path.startswith(f"{self.folder}/")]:
            del TensorStore._instances[path]
        return stopped

    def _on_tritonserver_exit(self, *_: object) -> None:
        """Nothing: whoever started it cleans up, and PyTriton would do so in a thread beside that."""

    def _pre_stop_impl(self) -> None:
        super()._pre_stop_impl()
        # PyTriton ends the threads of one model after those of another, a second each.
        with ThreadPoolExecutor() as pool:
            list(pool.map(Model.clean, self._model_manager.models))


_PROBED = Refusal(Trouble.REFUSED, PROBE)


def _inference_function(
    endpoint: Endpoint, front: Front
) -> Callable[[list[Request]], list[dict[str, NDArray[Any]]]]:
    def refuse_at_once(request: Request, number: str) -> Refusal | None:
        if number == PROBE:
            return _PROBED
        if empty := (request.parameters or {})["empty"]:
            return Refusal(
                Trouble.REFUSED, f"{endpoint.name}: {empty} is empty\nFix: send at least one token"
            )
        return None

    def outputs(reply: Arrays | Refusal) -> dict[str, NDArray[Any]]:
        if isinstance(reply, Refusal):
            return {"refusal": np.array([str(reply).encode()], dtype=np.bytes_)}
        return dict(reply)

    def infer(requests: list[Request]) -> list[dict[str, NDArray[Any]]]:
        numbers = [str((request.parameters or {}).get(CALL_HEADER, "")) for request in requests]
        for number in numbers:
            front.arrived(number)
        refused = [refuse_at_once(*pair) for pair in zip(requests, numbers, strict=True)]
        asked = [
            Call(arrays=request.data, is_gone=functools.partial(front.is_gone, number))
            for request, number, refusal in zip(requests, numbers, refused, strict=True)
            if refusal is None
        ]
        replies = iter(endpoint.handle(asked) if asked else ())
        return [outputs(refusal or next(replies)) for refusal in refused]

    return infer


def _lives(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


@contextmanager
def _patient_handshake(until: float) -> Iterator[None]:
    """PyTriton 0.7.0 gives an endpoint's process one second to say where it listens."""
    before = pytriton_model.get_config_from_handshake_server
    left = max(1.0, until - time.monotonic())
    pytriton_model.get_config_from_handshake_server = functools.partial(before, timeout_s=left)
    try:
        yield
    finally:
        pytriton_model.get_config_from_handshake_server = before


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


def _hide(secret: str) -> None:
    """Overwrite the secret in Triton's argument list, which every user of the machine may read; Triton has read it."""
    for child in psutil.Process().children():
        try:
            if not any(secret in argument for argument in child.cmdline()):
                continue
            fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
            # arg_start and arg_end of proc(5), which counts from pid.
            start, end = int(fields[45]), int(fields[46])
            with Path(f"/proc/{child.pid}/mem").open("r+b", buffering=0) as memory:
                memory.seek(start)
                arguments = memory.read(end - start)
                memory.seek(start)
                memory.write(arguments.replace(secret.encode(), b"x" * len(secret)))
        except (OSError, psutil.Error) as error:
            logger.warning("users of this machine can read the server's token in its process list: %s", error)
