# SPDX-License-Identifier: Apache-2.0
"""A server that asks for a token, and a critic that is killed: on the real Triton."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from tritonclient.http import InferenceServerClient
from tritonclient.utils import InferenceServerException

from nemo_aligner.errors import UserError
from tests.functional.serving_job import (
    START_SECONDS,
    STOP_SECONDS,
    Job,
    expected_values,
    rows,
    running,
    train_batch,
    undisturbed,
)


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


def test_a_critic_that_is_killed_and_started_again_is_taught_what_it_missed(tmp_path: Path) -> None:
    """It is killed under a request. The token is set, though it is on this machine."""
    with running(environ={"NEMO_ALIGNER_TOKEN": "secret"}) as job, job.critic() as client:
        losses = [client.train(train_batch(1), step=1).result(20)]
        client.save().result(20)
        client.committed(1)
        losses.append(client.train(train_batch(2), step=2).result(20))
        asked = client.infer_rm_critic(rows(3))
        job.kill()
        job.start()
        *_, weight = undisturbed(tmp_path)
        second = (weight - 0.25 * 3 * 7) / 1.5
        assert asked.result(START_SECONDS)[0].tolist() == [6 + second / 8]
        assert client.health().sequence == 2
        under_way = client.infer_rm_critic(rows(3))
        losses.append(client.train(train_batch(3), step=3).result(20))
        assert under_way.result(20)[0].tolist() == [6 + second / 8]
        assert client.infer_rm_critic(rows(3)).result(20)[0].tolist() == [6 + weight / 8]
        assert [*losses, weight] == undisturbed(tmp_path)

        # The actor starts again from the pair, and the critic goes back with it.
        with job.critic(sequence=1) as again:
            first = (second - 0.25 * 2 * 7) / 1.5
            assert again.infer_rm_critic(rows(3)).result(20)[0].tolist() == [6 + first / 8]
            assert again.train(train_batch(2), step=2).result(20) == losses[1]

        with job.critic(run_id="r2") as other, pytest.raises(UserError, match="learns from run r1"):
            other.infer_rm_critic(rows(3)).result(20)
        with pytest.raises(UserError, match="failed: RuntimeError: the model broke"):
            client.infer_rm_critic(rows(3, first=13)).result(20)
        assert job.process.wait(STOP_SECONDS) == 1
        assert "RuntimeError: the model broke" in job.log
