# SPDX-License-Identifier: Apache-2.0
"""The real Triton and real clients: NeMo-Aligner's ways of asking, ours, and those that nobody should have."""

import contextlib
import http.client
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from pytriton.client import ModelClient
from tritonclient.http import InferenceServerClient, InferInput
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from nemo_aligner.batch import TokenBatch, ValueBatch
from nemo_aligner.errors import UserError
from nemo_aligner.serving.client import Remote, RemoteCritic, RemoteReward
from tests.functional.serving_child import Critic

CHILD = Path(__file__).with_name("serving_child.py")
START_SECONDS = 90.0
STOP_SECONDS = 30.0
TOKEN_HEADER = "triton-access-token"


@dataclass
class Job:
    """A server's process, everything it may leave behind in one folder."""

    folder: Path  # short: the paths of sockets are
    ip: str = "127.0.0.1"
    port: int = 0
    environ: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("tmp", "home", "saved"):
            (self.folder / name).mkdir()
        with socket.socket() as free:
            free.bind((self.ip, 0))
            self.port = free.getsockname()[1]
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
        with (self.folder / "log").open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(CHILD), self.ip, str(self.port), str(self.folder / "saved")],
                stdout=log,
                stderr=log,
                env=self.environ,
            )
        self.wait_for(f"serving at {self.ip}:{self.port}", times=self.log.count("serving at") + 1)

    def wait_for(self, text: str, *, times: int = 1) -> None:
        until = time.monotonic() + START_SECONDS
        while self.log.count(text) < times:
            assert self.process.poll() is None, self.log
            assert time.monotonic() < until, self.log
            time.sleep(0.1)

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()

    @property
    def descendants(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def remote(self, **settings: float) -> Remote:
        fast = {"start_seconds": START_SECONDS, "return_seconds": START_SECONDS, "timeout_seconds": 20.0}
        return Remote(
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
def running(**settings: Any) -> Iterator[Job]:
    with tempfile.TemporaryDirectory(prefix="na-") as folder:
        job = Job(Path(folder), **settings)
        try:
            job.start()
            yield job
        finally:
            job.end()


@pytest.fixture(scope="module")
def server() -> Iterator[Job]:
    with running() as job:
        yield job


def rows(*lengths: int, width: int = 0, first: int = 1) -> TokenBatch:
    width = width or max(lengths)
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    tokens = torch.arange(first, first + width).expand(len(lengths), -1) * mask
    return TokenBatch(tokens=tokens, mask=mask, lengths=torch.tensor(lengths))


def lesson(number: int) -> ValueBatch:
    batch = rows(5, 8)
    answers = batch.mask & (torch.arange(8) >= 3)
    return ValueBatch(
        tokens=batch.tokens,
        mask=answers,
        lengths=batch.lengths,
        values=torch.full((2, 8), 0.5),
        returns=torch.full((2, 8), 0.25 * number),
    )


def expected_values(batch: TokenBatch, weight: float = 1.0) -> torch.Tensor:
    values = batch.tokens * batch.mask * weight
    values[:, 0] = 0
    return values


def test_eight_clients_are_merged_and_each_gets_its_own_reply(server: Job) -> None:
    """Half are plain tritonclient, half ours; all rows have other tokens, and lengths differ."""
    wrong: list[Any] = []

    def plain(index: int) -> None:
        for turn in range(6):
            tokens = np.full((1 + turn % 3, 2 + index + turn), 20 + index, dtype=np.int64)
            reply = server.ask("critic_infer", tokens=tokens)
            sent = np.zeros(tokens.shape)  # column t speaks of token t + 1
            sent[:, :-1] = tokens[:, 1:]
            if not np.array_equal(reply["values"], sent) or not np.allclose(
                reply["rewards"][:, 0], tokens.sum(1) + 0.125
            ):
                wrong.append((index, turn, reply))

    def ours(index: int) -> None:
        with RemoteReward(server.remote(), name="critic_infer", environ=server.environ) as client:
            for turn in range(6):
                batch = rows(2 + turn, 3 + index, first=30 + index)
                rewards = client.infer(batch).result(START_SECONDS)
                if not torch.allclose(rewards, batch.tokens.sum(1) + 0.125):
                    wrong.append((index, turn, rewards))

    with ThreadPoolExecutor(8) as pool:
        for future in [pool.submit(plain if index < 4 else ours, index) for index in range(8)]:
            future.result(START_SECONDS)
    assert not wrong
    merged = [line for line in server.log.splitlines() if "requests merged into one batch" in line]
    assert len(merged) >= 4
    assert max(int(line.split(" requests merged")[0].split()[-1]) for line in merged) >= 2


INT = np.int64
BAD_REQUESTS = [
    ({"tokens": np.array([[1, 100]])}, "tokens[0, 1] is 100, outside the vocabulary of 100 tokens"),
    ({"tokens": np.array([[1, 2], [-1, 2]])}, "tokens[1, 0] is -1"),
    ({"tokens": np.array([[1.0, 2.0]])}, "'tokens' data-type is 'FP64'"),
    ({"tokens": np.array([1, 2])}, "unexpected shape for input 'tokens'"),
    ({"tokens": np.ones((1, 17), INT)}, "row 0 is over-long: 17 tokens, and the served model takes 16"),
    ({"tokens": np.ones((1, 3), INT), "sequence_lengths": np.array([[-2]])}, "is -2, a negative length"),
    ({"tokens": np.ones((1, 3), INT), "sequence_lengths": np.array([[4]])}, "is 4, but tokens has 3 columns"),
    ({"tokens": np.ones((1, 3), INT), "sequence_lengths": np.array([[0]])}, "row 0 is empty"),
    ({"tokens": np.ones((2, 0), INT)}, "tokens is empty"),
    ({"sentences": np.array([[b""]], dtype=object)}, "row 0 is empty"),
    ({"sentences": np.array([[b"\xff"]], dtype=object)}, "sentences[0] is not UTF-8"),
    ({"sequence_lengths": np.array([[1]])}, "of sentences and tokens none came"),
    ({"tokens": np.array([[14]])}, "nothing is known of token 14"),
]


@pytest.mark.parametrize(("arrays", "named"), BAD_REQUESTS, ids=[named for _, named in BAD_REQUESTS])
def test_a_bad_request_is_told_and_hurts_no_other(
    server: Job, arrays: dict[str, np.ndarray], named: str
) -> None:
    good = np.array([[1, 2, 3]])
    with ThreadPoolExecutor(4) as pool:
        others = [pool.submit(server.ask, "critic_infer", tokens=good) for _ in range(3)]
        with pytest.raises(InferenceServerException) as told:
            server.ask("critic_infer", **arrays)
        assert named in str(told.value)
        assert "Traceback" not in str(told.value)
        for other in others:
            assert other.result(20)["rewards"].tolist() == [[6.125]]


def test_a_number_that_is_none_is_told(server: Job) -> None:
    per_token = {name: np.zeros((1, 2), np.float32) for name in ("returns", "prev_values", "mask")}
    per_token["returns"][0, 1] = np.nan
    with pytest.raises(InferenceServerException, match=r"critic_train: returns\[0, 1\] is nan"):
        server.ask("critic_train", tokens=np.ones((1, 3), INT), **per_token)


def test_health_is_told_and_the_idle_are_ticked(server: Job) -> None:
    with server.critic() as client:
        told = client.health()
    assert (told.model, told.vocab_size, told.seq_length, told.sequence) == ("toy", 100, 16, 0)
    assert told.settings == {"trainer.ppo.inference_micro_batch_size": 8}
    server.wait_for("tick", times=server.log.count("tick") + 1)


def test_garbage_does_not_end_it(server: Job) -> None:
    """100 MB that are no HTTP, 100 MB that are no message, and a message that ends before it is whole."""
    chunk = os.urandom(1 << 20)
    with socket.create_connection((server.ip, server.port), timeout=20) as raw, contextlib.suppress(OSError):
        for _ in range(100):
            raw.sendall(chunk)
    body = http.client.HTTPConnection(server.ip, server.port, timeout=60)
    body.request("POST", "/v2/models/critic_infer/infer", chunk * 100)
    assert body.getresponse().status in (400, 500)
    body.close()
    with socket.create_connection((server.ip, server.port), timeout=20) as half:
        half.sendall(b"POST /v2/models/critic_infer/infer HTTP/1.1\r\nContent-Length: 1000\r\n\r\nabc")
    assert server.ask("critic_infer", tokens=np.array([[1, 2]]))["rewards"].tolist() == [[3.125]]


def test_slow_clients_do_not_hold_up_others(server: Job) -> None:
    with contextlib.ExitStack() as held:
        for _ in range(32):
            slow = held.enter_context(socket.create_connection((server.ip, server.port), timeout=20))
            slow.sendall(b"POST /v2/models/critic_infer/infer HTTP/1.1\r\nContent-Length: 1000\r\n\r\n{")
        began = time.monotonic()
        assert server.ask("critic_infer", tokens=np.array([[1, 2]]))["rewards"].tolist() == [[3.125]]
        assert time.monotonic() - began < 5


def test_what_could_change_triton_is_closed(server: Job) -> None:
    with InferenceServerClient(f"{server.ip}:{server.port}") as client:
        assert client.is_server_live()
        with pytest.raises(InferenceServerException, match="restricted"):
            client.unload_model("critic_infer")
    (triton,) = (child for child in server.descendants if child.name() == "tritonserver")
    secrets = [part for part in triton.cmdline() if TOKEN_HEADER in part]
    assert secrets
    assert all(set(part.rpartition("=")[2]) == {"x"} for part in secrets)


def test_a_wrong_endpoint_name_is_told_at_once(server: Job) -> None:
    client = RemoteReward(server.remote(), name="critic_infr", environ=server.environ)
    with pytest.raises(UserError, match="has no endpoint critic_infr"):
        client.infer(rows(3)).result(20)
    client.close()


def test_no_server_is_told_with_address_setting_and_cure(server: Job) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    remote = Remote(
        setting="remote_critic_rm.critic",
        job="serve_ppo_critic.py",
        ip="localhost",
        port=port,
        start_seconds=1.0,
    )
    with RemoteCritic(remote, run_id="r", environ=server.environ) as client, pytest.raises(UserError) as told:
        client.health()
    assert f"remote_critic_rm.critic.port={port}" in told.value.problem
    assert "remote_critic_rm.critic.ip=localhost" in told.value.problem
    assert "Connection refused" in told.value.problem
    assert "serve_ppo_critic.py" in told.value.cure


def test_a_port_that_is_taken_is_told(server: Job) -> None:
    command = [sys.executable, str(CHILD), server.ip, str(server.port), str(server.folder / "saved")]
    environ = server.environ | {"TMPDIR": str(server.folder)}
    end = subprocess.run(
        command, env=environ, capture_output=True, text=True, timeout=START_SECONDS, check=False
    )
    assert end.returncode == 2
    assert f"trainer.ppo.port={server.port}" in end.stderr
    assert "Cure: " in end.stderr
    assert server.ask("critic_infer", tokens=np.array([[1, 2]]))["rewards"].tolist() == [[3.125]]


def test_pytriton_asks_as_nemo_aligner_does(server: Job) -> None:
    """After this test the weights are others."""
    url = f"http://{server.ip}:{server.port}"
    tokens = np.array([[5, 6, 7, 0], [8, 9, 0, 0]])
    with ModelClient(url, "critic_infer", inference_timeout_s=20) as client:
        reply = client.infer_batch(tokens=tokens, sequence_lengths=np.array([[3], [2]]))
        assert reply["values"].tolist() == [[6, 7, 0, 0], [9, 0, 0, 0]]
        assert reply["rewards"].tolist() == [[18.125], [17.125]]
        assert reply["values"].dtype == reply["rewards"].dtype == np.float32
        text = client.infer_batch(sentences=np.array([[b"ab"]]))
        assert text["rewards"].tolist() == [[97 + 98 + 0.125]]
    with ModelClient(url, "critic_train", inference_timeout_s=20) as client:
        settings = (("returns", 2.0), ("prev_values", 0.5), ("mask", 1.0))
        per_token = {name: np.full((2, 3), value, dtype=np.float32) for name, value in settings}
        reply = client.infer_sample(tokens=tokens, **per_token)
        assert reply["loss_mean"].tolist() == [6 * 1.5**2 + 1.0]
        assert reply["loss_mean"].dtype == np.float32
    with ModelClient(url, "critic_save", inference_timeout_s=20) as client:
        assert client.infer_sample(dummy_var=np.array([0]))["status"].tolist() == [0]


def test_sigterm_leaves_nothing_behind(server: Job) -> None:
    """The last test with this server."""
    descendants = server.descendants
    assert len(descendants) > 5
    models = [
        Path(p.cmdline()[1]).parents[1] for p in descendants if p.name() == "triton_python_backend_stub"
    ]
    assert all(path.is_dir() for path in models)
    began = time.monotonic()
    server.process.terminate()
    assert server.process.wait(STOP_SECONDS) == 0
    assert time.monotonic() - began < 10
    assert not psutil.wait_procs(descendants, timeout=5)[1]
    assert not list((server.folder / "tmp").iterdir())
    assert not [path for path in models if path.exists()]
    assert not list(Path("/dev/shm").glob(f"pytrtion{server.process.pid}-*"))
    with pytest.raises(ConnectionRefusedError), socket.create_connection((server.ip, server.port), timeout=5):
        pass


@pytest.fixture(scope="module")
def guarded() -> Iterator[Job]:
    """127.0.0.2 stands for an address that other machines reach."""
    with running(ip="127.0.0.2") as job:
        yield job


def token_file(job: Job) -> Path:
    return job.folder / f"home/.nemo_aligner/local-{job.port}.token"


def test_elsewhere_every_endpoint_asks_for_the_token(guarded: Job) -> None:
    path = token_file(guarded)
    assert path.stat().st_mode & 0o777 == 0o600
    number = np.array([0])
    requests: dict[str, dict[str, np.ndarray]] = {
        "critic_infer": {"tokens": np.array([[1, 2]])},
        "critic_train": {"tokens": np.array([[1, 2]])},
        "critic_save": {"dummy_var": number},
        "health": {"dummy_var": number},
        "stop": {"dummy_var": number},
    }
    for endpoint, arrays in requests.items():
        for token in (None, "guess"):
            with pytest.raises(InferenceServerException, match="restricted") as refused:
                guarded.ask(endpoint, token, **arrays)
            assert refused.value.status() == "403"
    with InferenceServerClient(f"{guarded.ip}:{guarded.port}") as client:
        assert not client.is_server_live()
        for question in (client.get_server_metadata, client.get_model_repository_index):
            with pytest.raises(InferenceServerException, match="restricted"):
                question()
    reply = guarded.ask("critic_infer", path.read_text(), tokens=np.array([[1, 2]]))
    assert reply["rewards"].tolist() == [[3.125]]


def test_clients_of_the_same_user_know_the_token(guarded: Job) -> None:
    with guarded.critic() as client:
        rewards, values = client.infer_rm_critic(rows(2, 4)).result(20)
    assert rewards.tolist() == [3.125, 10.125]
    assert torch.equal(values, expected_values(rows(2, 4)))
    other = guarded.environ | {"NEMO_ALIGNER_TOKEN": "another"}
    with guarded.critic(environ=other) as client, pytest.raises(UserError, match="NEMO_ALIGNER_TOKEN"):
        client.infer_rm_critic(rows(2)).result(20)


def test_a_client_may_end_it(guarded: Job) -> None:
    """The last test with this server; then its token is gone."""
    descendants = guarded.descendants
    with guarded.critic() as client:
        assert client.stop()
    assert guarded.process.wait(STOP_SECONDS) == 0
    assert not token_file(guarded).exists()
    assert not psutil.wait_procs(descendants, timeout=5)[1]
    assert not list((guarded.folder / "tmp").iterdir())


def undisturbed(folder: Path) -> list[float]:
    """The losses of three lessons, and the weight after them, computed here."""
    critic = Critic(folder)
    return [critic.train(lesson(number), None) for number in (1, 2, 3)] + [critic.weight]


def test_a_critic_that_is_killed_and_started_again_is_taught_what_it_missed(tmp_path: Path) -> None:
    """It is killed under a request. The token is set, though it is on this machine."""
    with running(environ={"NEMO_ALIGNER_TOKEN": "secret"}) as job, job.critic() as client:
        losses = [client.train(lesson(1), step=1).result(20)]
        client.save().result(20)
        client.committed(1)
        losses.append(client.train(lesson(2), step=2).result(20))
        asked = client.infer_rm_critic(rows(3))
        job.kill()
        job.start()
        *_, weight = undisturbed(tmp_path)
        second = (weight - 0.25 * 3 * 7) / 1.5
        assert asked.result(START_SECONDS)[0].tolist() == [6 + second / 8]
        assert client.health().sequence == 2
        under_way = client.infer_rm_critic(rows(3))
        losses.append(client.train(lesson(3), step=3).result(20))
        assert under_way.result(20)[0].tolist() == [6 + second / 8]
        assert client.infer_rm_critic(rows(3)).result(20)[0].tolist() == [6 + weight / 8]
        assert [*losses, weight] == undisturbed(tmp_path)

        # The actor starts again from the pair, and the critic goes back with it.
        with job.critic(sequence=1) as again:
            first = (second - 0.25 * 2 * 7) / 1.5
            assert again.infer_rm_critic(rows(3)).result(20)[0].tolist() == [6 + first / 8]
            assert again.train(lesson(2), step=2).result(20) == losses[1]

        with job.critic(run_id="r2") as other, pytest.raises(UserError, match="learns from run r1"):
            other.infer_rm_critic(rows(3)).result(20)
        with pytest.raises(UserError, match="failed: RuntimeError: the model broke"):
            client.infer_rm_critic(rows(3, first=13)).result(20)
        assert job.process.wait(STOP_SECONDS) == 1
        assert "RuntimeError: the model broke" in job.log
