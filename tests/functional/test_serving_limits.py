# SPDX-License-Identifier: Apache-2.0
"""What a server refuses though the caller may ask, and a Triton that dies: on the real one."""

import gzip
import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest
from tritonclient.utils import InferenceServerException

from tests.functional.serving_job import START_SECONDS, STOP_SECONDS, TOKEN_HEADER, Job, running

TOKEN = "secret"
INFER = "/v2/models/critic_infer/infer"
LIMITS = {"rows": 50, "bytes": 200_000, "waiting": 6, "seconds": 20}


@pytest.fixture(scope="module")
def server() -> Iterator[Job]:
    with running(environ={"NEMO_ALIGNER_TOKEN": TOKEN}, limits=LIMITS) as job:
        yield job


def shown(**headers: str) -> dict[str, str]:
    return {TOKEN_HEADER: TOKEN, **headers}


def message(tokens: list[list[int]]) -> bytes:
    flat = [token for row in tokens for token in row]
    shape = [len(tokens), len(tokens[0])]
    return json.dumps(
        {"inputs": [{"name": "tokens", "shape": shape, "datatype": "INT64", "data": flat}]}
    ).encode()


CONTROL = [
    ("POST", "/v2/repository/index"),
    ("POST", "/v2/repository/models/critic_infer/load"),
    ("POST", "/v2/repository/models/critic_infer/unload"),
    ("GET", "/v2/models/stats"),
    ("GET", "/v2/models/critic_infer/stats"),
    ("GET", "/v2/logging"),
    ("POST", "/v2/logging"),
    ("GET", "/v2/trace/setting"),
    ("POST", "/v2/trace/setting"),
    ("POST", "/v2/models/critic_infer/trace/setting"),
    ("GET", "/v2/systemsharedmemory/status"),
    ("POST", "/v2/systemsharedmemory/region/a/register"),
    ("POST", "/v2/systemsharedmemory/unregister"),
    ("GET", "/v2/cudasharedmemory/status"),
    ("POST", "/v2/cudasharedmemory/region/a/register"),
    ("POST", "/v2/models/critic_infer/generate"),
    ("GET", "/metrics"),
    ("POST", "/v2//repository/models/critic_infer/load"),
    ("POST", "/v2/repository/models/critic_infer%2Fload"),
    ("POST", "/v2/models/..%2Frepository/models/critic_infer/unload"),
]


@pytest.mark.parametrize(("method", "path"), CONTROL)
def test_the_token_opens_nothing_that_changes_triton(server: Job, method: str, path: str) -> None:
    load = {"parameters": {"config": "{}", "file:1/model.py": "cHJpbnQoMSk="}}
    status, _, body = server.raw(method, path, json.dumps(load).encode(), shown())
    assert status == 403
    assert "restricted" in json.loads(body)["error"]


@pytest.mark.parametrize(
    "path",
    [
        "/v2",
        "/v2/health/live",
        "/v2/health/ready",
        "/v2/models/critic_infer",
        "/v2/models/critic_infer/ready",
        "/v2/models/critic_infer/versions/1/ready",
        "/v2/models/critic_infer/config",
    ],
)
def test_the_token_opens_health_and_metadata(server: Job, path: str) -> None:
    assert server.raw("GET", path, headers=shown())[0] == 200
    for headers in ({}, {TOKEN_HEADER: "guess"}, {TOKEN_HEADER: "gu\xe9ss"}, {TOKEN_HEADER: "secret "[:-2]}):
        assert server.raw("GET", path, headers=headers)[0] == 403


def test_a_nested_body_is_refused_and_the_job_lives_on(server: Job) -> None:
    triton = [child.pid for child in server.descendants if child.name() == "tritonserver"]
    nested = b"[" * 100_000
    for body in (nested, b'{"inputs": ' + nested, b'{"id": "' + b'\\"' * 20_000 + b'", "inputs": ' + nested):
        status, _, reply = server.raw("POST", INFER, body, shown())
        assert (status, "nested more than 64 deep" in json.loads(reply)["error"]) == (400, True)
    assert server.ask("critic_infer", TOKEN, tokens=np.array([[1, 2]]))["rewards"].tolist() == [[3.125]]
    # Where the JSON ends is told in a way that Triton may read otherwise.
    for size in ("0", "-1", "9" * 5000, "12abc"):
        told = shown(**{"Inference-Header-Content-Length": size})
        assert server.raw("POST", INFER, nested, told)[0] == 400
    assert triton == [child.pid for child in server.descendants if child.name() == "tritonserver"]


def test_limits_are_named(server: Job) -> None:
    with pytest.raises(InferenceServerException, match=r"51 rows, and trainer.ppo.max_request_rows=50"):
        server.ask("critic_infer", TOKEN, tokens=np.ones((51, 2), np.int64))
    per_token = {name: np.zeros((51, 1), np.float32) for name in ("returns", "prev_values", "mask")}
    with pytest.raises(InferenceServerException, match=r"trainer.ppo.max_request_rows=50"):
        server.ask("critic_train", TOKEN, tokens=np.ones((51, 2), np.int64), **per_token)
    for headers, body in (
        ({}, b" " * 200_001),
        # Gigabytes of blanks in some kilobytes.
        ({"Content-Encoding": "gzip"}, gzip.compress(b" " * 200_001)),
    ):
        status, _, reply = server.raw("POST", INFER, body, shown(**headers))
        assert status == 413
        assert "trainer.ppo.max_request_bytes=200000" in json.loads(reply)["error"]
    status, _, reply = server.raw("POST", INFER, b"no gzip", shown(**{"Content-Encoding": "gzip"}))
    assert status == 400


def test_those_beyond_the_queue_are_reported_and_a_caller_who_is_gone_costs_nothing(server: Job) -> None:
    before = server.log.count("their callers are gone")
    gone = socket.create_connection((server.ip, server.port), timeout=20)
    with ThreadPoolExecutor(30) as pool:
        asked = [
            pool.submit(server.raw, "POST", INFER, message([[1, 2, 3]] * 40), shown()) for _ in range(30)
        ]
        body = message([[4, 5, 6]] * 40)
        head = f"POST {INFER} HTTP/1.1\r\nHost: a\r\n{TOKEN_HEADER}: {TOKEN}\r\nContent-Length: {len(body)}\r\n\r\n"
        gone.sendall(head.encode() + body)
        gone.close()
        replies = [future.result() for future in asked]
    assert {status for status, _, _ in replies} == {200, 503}
    for status, _, reply in replies:
        if status == 503:
            assert "trainer.ppo.max_waiting_requests=6" in json.loads(reply)["error"]
        else:
            assert json.loads(reply)["outputs"][0]["shape"] == [40, 3]
    assert server.log.count("their callers are gone") >= before


def test_a_run_id_that_is_no_text_is_reported_and_hurts_no_other(server: Job) -> None:
    version = {
        "run_id": np.array([[b"\xff\xfe"]], dtype=object),
        "step": np.array([[0]]),
        "sequence": np.array([[0]]),
    }
    good = np.array([[1, 2, 3]])
    with ThreadPoolExecutor(4) as pool:
        others = [pool.submit(server.ask, "critic_infer", TOKEN, tokens=good) for _ in range(3)]
        with pytest.raises(InferenceServerException, match="run_id is not UTF-8") as told:
            server.ask("critic_infer", TOKEN, tokens=good, **version)
        assert told.value.status() == "400"
        assert "Traceback" not in str(told.value)
        assert [other.result()["rewards"].tolist() for other in others] == [[[6.125]]] * 3


def test_each_of_many_threads_gets_its_own_reply(server: Job) -> None:
    """Bad requests are among the good ones; each reply is that of its row alone."""
    wrong: list[object] = []

    def ask(index: int) -> None:
        draw = np.random.default_rng(index)
        for _ in range(6):
            tokens = draw.integers(20, 100, size=(1, draw.integers(2, 17)))
            bad = draw.random() < 0.3
            if bad:
                tokens[0, -1] = draw.choice([-1, 100, 14 + 10**6])
            while True:
                status, _, body = server.raw("POST", INFER, message(tokens.tolist()), shown())
                if status != 503:
                    break
                time.sleep(0.02)
            reply = json.loads(body)
            if bad:
                if status != 400 or "outside the vocabulary" not in reply["error"]:
                    wrong.append(reply)
                continue
            found = {output["name"]: output["data"] for output in reply["outputs"]}
            expected = [*tokens[0, 1:].tolist(), 0]
            if found["values"] != expected or found["rewards"] != [tokens.sum() + 0.125]:
                wrong.append((tokens, found))

    with ThreadPoolExecutor(16) as pool:
        for future in [pool.submit(ask, index) for index in range(16)]:
            future.result()
    assert not wrong


def test_a_triton_that_keeps_dying_is_started_again_each_time(server: Job) -> None:
    for number in range(2):
        (triton,) = (child for child in server.descendants if child.name() == "tritonserver")
        triton.kill()
        until = time.monotonic() + START_SECONDS
        while True:
            try:
                status, _, body = server.raw("POST", INFER, message([[1, 2]]), shown())
            except OSError as error:
                pytest.fail(f"the server itself is gone: {error}\n{server.log[-6000:]}")
            if status == 200:
                break
            # Refused by name, never left without a reply.
            assert (status, json.loads(body)["error"].split(":")[0]) == (503, "stopping")
            assert time.monotonic() < until
            time.sleep(0.1)
        assert server.log.count("It is started again") == number + 1


def test_an_endpoint_that_dies_while_triton_starts_is_missed() -> None:
    """Its process is killed as soon as it is there; the start is tried again, and then every endpoint responses."""
    with running(starts=False) as job:
        job.begin()
        until = time.monotonic() + START_SECONDS
        killed = 0
        while not killed:
            assert time.monotonic() < until, job.log
            for child in psutil.Process(job.process.pid).children(recursive=True):
                try:
                    if child.name() == "triton_python_backend_stub" and "critic_train" in str(
                        child.cmdline()
                    ):
                        child.kill()
                        killed += 1
                except psutil.NoSuchProcess:
                    continue
            time.sleep(0.01)
        job.wait_for("serving at")
        assert job.ask("critic_infer", tokens=np.array([[1, 2]]))["rewards"].tolist() == [[3.125]]
        per_token = {name: np.ones((1, 1), np.float32) for name in ("returns", "prev_values", "mask")}
        assert "loss_mean" in job.ask("critic_train", None, tokens=np.ones((1, 2), np.int64), **per_token)
        job.process.terminate()
        assert job.process.wait(STOP_SECONDS) == 0
        # Neither of the try that failed nor of the one that served.
        assert not list(Path("/dev/shm").glob(f"pytrtion{job.process.pid}-*"))
        assert not list((job.folder / "tmp").iterdir())
