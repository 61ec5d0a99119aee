# SPDX-License-Identifier: Apache-2.0
"""The real Triton and real clients: NeMo-Aligner's ways of asking, ours, and those that nobody should have."""

import contextlib
import http.client
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from pytriton.client import ModelClient
from tritonclient.http import InferenceServerClient
from tritonclient.utils import InferenceServerException

from nemo_aligner.errors import UserError
from nemo_aligner.launch.job_group import free_ports
from nemo_aligner.serving.client import RemoteCritic, RemoteReward, ServerAddress
from tests.functional.serving_job import (
    CHILD,
    START_SECONDS,
    STOP_SECONDS,
    TOKEN_HEADER,
    Job,
    rows,
    running,
    train_batch,
    undisturbed,
)


@pytest.fixture(scope="module")
def server() -> Iterator[Job]:
    with running() as job:
        yield job


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
def test_a_bad_request_is_reported_and_hurts_no_other(
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


def test_a_number_that_is_none_is_reported(server: Job) -> None:
    per_token = {name: np.zeros((1, 2), np.float32) for name in ("returns", "prev_values", "mask")}
    per_token["returns"][0, 1] = np.nan
    with pytest.raises(InferenceServerException, match=r"critic_train: returns\[0, 1\] is nan"):
        server.ask("critic_train", tokens=np.ones((1, 3), INT), **per_token)


def test_health_is_reported(server: Job) -> None:
    with server.critic() as client:
        told = client.health()
    assert (told.model, told.vocab_size, told.seq_length, told.sequence) == ("toy", 100, 16, 0)
    assert told.settings == {"trainer.ppo.inference_micro_batch_size": 8}


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


def test_a_wrong_endpoint_name_is_reported_at_once(server: Job) -> None:
    client = RemoteReward(server.remote(), name="critic_infr", environ=server.environ)
    with pytest.raises(UserError, match="has no endpoint critic_infr"):
        client.infer(rows(3)).result(20)
    client.close()


def test_no_server_is_reported_with_address_setting_and_fix(server: Job) -> None:
    (port,) = free_ports(1)
    remote = ServerAddress(
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
    assert "serve_ppo_critic.py" in told.value.fix


def test_a_port_that_is_taken_is_reported(server: Job) -> None:
    command = [sys.executable, str(CHILD), server.ip, str(server.port), str(server.folder / "saved")]
    environ = server.environ | {"TMPDIR": str(server.folder)}
    end = subprocess.run(
        command, env=environ, capture_output=True, text=True, timeout=START_SECONDS, check=False
    )
    assert end.returncode == 2
    assert f"trainer.ppo.port={server.port}" in end.stderr
    assert "Fix: " in end.stderr
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


@pytest.mark.parametrize(
    ("victim", "stall_seconds"), [("critic_train_0_0", 0), ("critic_train_0_0", 4), ("tritonserver", 0)]
)
def test_a_triton_that_dies_is_started_again_and_each_lesson_is_learned_once(
    tmp_path: Path, victim: str, stall_seconds: float
) -> None:
    """Killed, or without time for so long that Triton itself takes it for dead."""
    with running() as job, job.critic() as client:
        losses = [client.train(train_batch(1), step=1).result(START_SECONDS)]
        (process,) = (p for p in job.descendants if victim in (p.name(), p.cmdline()[-2]))
        if stall_seconds:
            process.suspend()
        else:
            process.kill()
        learning = [client.train(train_batch(number), step=number) for number in (2, 3)]
        time.sleep(stall_seconds)
        if process.is_running():
            process.resume()
        losses += [future.result(START_SECONDS) for future in learning]
        rewards, _ = client.infer_rm_critic(rows(3)).result(START_SECONDS)
        assert [*losses, (float(rewards) - 6) * 8] == undisturbed(tmp_path)


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
