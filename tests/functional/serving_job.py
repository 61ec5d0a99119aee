# SPDX-License-Identifier: Apache-2.0
"""A server's process, and what is sent to it."""

import contextlib
import http.client
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from tritonclient.http import InferenceServerClient, InferInput
from tritonclient.utils import np_to_triton_dtype

from nemo_aligner.batch import TokenBatch
from nemo_aligner.launch.job_group import free_ports
from nemo_aligner.rollout_batch import ValueBatch
from nemo_aligner.serving.client import RemoteCritic, ServerAddress
from tests.functional.serving_child import Critic

CHILD = Path(__file__).with_name("serving_child.py")
START_SECONDS = 240.0  # a busy machine needs several tries
STOP_SECONDS = 30.0
TOKEN_HEADER = "triton-access-token"


@dataclass
class Job:
    """A server's process, everything it may leave behind in one folder."""

    folder: Path  # short: the paths of sockets are
    ip: str = "127.0.0.1"
    port: int = 0
    environ: dict[str, str] = field(default_factory=dict)
    limits: dict[str, float] = field(default_factory=dict)  # of requests

    def __post_init__(self) -> None:
        for name in ("tmp", "home", "saved"):
            (self.folder / name).mkdir()
        (self.port,) = free_ports(1, self.ip)
        self.environ = {
            **{
                name: value
                for name, value in os.environ.items()
                if not name.startswith(("SLURM", "NEMO_ALIGNER"))
            },
            "TMPDIR": str(self.folder / "tmp"),
            "HOME": str(self.folder / "home"),
            "OMP_NUM_THREADS": "1",
        } | self.environ

    def start(self) -> None:
        before = self.log.count("serving at")
        self.begin()
        self.wait_for(f"serving at {self.ip}:{self.port}", times=before + 1)

    def begin(self) -> None:
        """Start it without waiting."""
        limits = [f"{name}={value}" for name, value in self.limits.items()]
        with (self.folder / "log").open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(CHILD), self.ip, str(self.port), str(self.folder / "saved"), *limits],
                stdout=log,
                stderr=log,
                env=self.environ,
            )

    def wait_for(self, text: str, *, times: int = 1) -> None:
        until = time.monotonic() + START_SECONDS
        while self.log.count(text) < times:
            assert self.process.poll() is None, self.log
            assert time.monotonic() < until, self.log
            time.sleep(0.1)

    @property
    def log(self) -> str:
        path = self.folder / "log"
        return path.read_text() if path.exists() else ""

    @property
    def descendants(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def remote(self, **settings: float) -> ServerAddress:
        fast = {"start_seconds": START_SECONDS, "return_seconds": START_SECONDS, "timeout_seconds": 20.0}
        return ServerAddress(
            setting="remote_critic_rm.critic",
            job="serve_ppo_critic.py",
            ip=self.ip,
            port=self.port,
            **(fast | settings),
        )

    def critic(self, **settings: Any) -> RemoteCritic:
        return RemoteCritic(self.remote(), **({"run_id": "r1", "environ": self.environ} | settings))

    def ask(self, endpoint: str, token: str | None = None, **arrays: np.ndarray) -> dict[str, np.ndarray]:
        """By tritonclient alone, as somebody who has never heard of us."""
        inputs = []
        for name, array in arrays.items():
            tensor = InferInput(name, array.shape, np_to_triton_dtype(array.dtype))
            tensor.set_data_from_numpy(array)
            inputs.append(tensor)
        with InferenceServerClient(f"{self.ip}:{self.port}", network_timeout=20.0) as client:
            result = client.infer(endpoint, inputs, headers={TOKEN_HEADER: token} if token else None)
        return {
            output["name"]: result.as_numpy(output["name"]) for output in result.get_response()["outputs"]
        }

    def raw(
        self, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        """By the standard library alone: (status, headers in lower case, body)."""
        connection = http.client.HTTPConnection(self.ip, self.port, timeout=60)
        try:
            connection.request(method, path, body, headers or {})
            reply = connection.getresponse()
            return reply.status, {k.lower(): v for k, v in reply.getheaders()}, reply.read()
        finally:
            connection.close()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(STOP_SECONDS)

    def end(self) -> None:
        """Whatever a test has left."""
        left = self.descendants if self.process.poll() is None else []
        self.process.terminate()
        try:
            self.process.wait(STOP_SECONDS)
        finally:
            self.kill()
            for process in psutil.wait_procs(left, timeout=STOP_SECONDS)[1]:
                process.kill()


@contextlib.contextmanager
def running(*, starts: bool = True, **settings: Any) -> Iterator[Job]:
    with tempfile.TemporaryDirectory(prefix="na-") as folder:
        job = Job(Path(folder), **settings)
        try:
            if starts:
                job.start()
            yield job
        finally:
            job.end()


def rows(*lengths: int, width: int = 0, first: int = 1) -> TokenBatch:
    width = width or max(lengths)
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    tokens = torch.arange(first, first + width).expand(len(lengths), -1) * mask
    return TokenBatch(tokens=tokens, loss_mask=mask, lengths=torch.tensor(lengths))


def train_batch(number: int) -> ValueBatch:
    batch = rows(5, 8)
    responses = batch.loss_mask & (torch.arange(8) >= 3)
    return ValueBatch(
        tokens=batch.tokens,
        loss_mask=responses,
        lengths=batch.lengths,
        values=torch.full((2, 8), 0.5),
        returns=torch.full((2, 8), 0.25 * number),
    )


def expected_values(batch: TokenBatch, weight: float = 1.0) -> torch.Tensor:
    values = batch.tokens * batch.loss_mask * weight
    values[:, 0] = 0
    return values


def undisturbed(folder: Path) -> list[float]:
    """The losses of three lessons, and the weight after them, computed here."""
    critic = Critic(folder)
    return [critic.train(train_batch(number), None) for number in (1, 2, 3)] + [critic.weight]
