# SPDX-License-Identifier: Apache-2.0
"""Clients that have no server, and the threads that they wait in."""

import threading

import pytest
import torch

from nemo_aligner.batch import TokenBatch
from nemo_aligner.errors import UserError
from nemo_aligner.rollout_batch import ValueBatch
from nemo_aligner.serving.client import RemoteCritic, RemoteReward, ServerAddress
from nemo_aligner.serving.http_client import WorkerPool
from tests.zero_critic import ZeroCritic

NOWHERE = ServerAddress(setting="remote_critic_rm.critic", job="serve_ppo_critic.py", ip="127.0.0.1", port=9)


def batch() -> ValueBatch:
    tokens = torch.ones(2, 5, dtype=torch.int64)
    return ValueBatch(
        tokens=tokens,
        loss_mask=tokens > 0,
        lengths=torch.tensor([5, 5]),
        values=torch.zeros(2, 5),
        returns=torch.zeros(2, 5),
    )


def test_without_a_critic_values_are_zero_and_nothing_is_waited_for() -> None:
    critic = ZeroCritic()
    rewards, values = critic.infer_rm_critic(batch()).result(0)
    assert torch.equal(rewards, torch.zeros(2))
    assert torch.equal(values, torch.zeros(2, 5))
    assert critic.train(batch(), step=0).result(0) == 0.0
    assert critic.save().result(0) is None
    critic.committed(1)
    critic.close()


def test_a_batch_wider_than_pad_to_length_is_reported_with_the_setting() -> None:
    rows: TokenBatch = batch()
    with RemoteReward(NOWHERE, pad_to_length=4, environ={}) as client, pytest.raises(UserError) as told:
        client.infer(rows)
    assert "remote_critic_rm.pad_to_length=4" in told.value.problem
    assert "remote_critic_rm.pad_to_length=5" in told.value.fix


def test_closing_ends_the_wait_for_a_server_that_never_comes() -> None:
    client = RemoteCritic(NOWHERE, run_id="r", environ={})
    future = client.infer_rm_critic(batch())
    assert not future.done()
    client.close()
    with pytest.raises(UserError, match=r"remote_critic_rm\.critic\.port=9"):
        future.result(10)


def test_a_lane_of_one_runs_in_order_and_hands_on_errors() -> None:
    lane = WorkerPool("test")
    gate = threading.Event()
    seen: list[int] = []

    def note(number: int) -> int:
        gate.wait(10)
        seen.append(number)
        return number // (number - 2)

    futures = [lane.submit(lambda number=number: note(number)) for number in range(4)]
    gate.set()
    assert futures[3].result(10) == 3
    assert seen == [0, 1, 2, 3]
    assert isinstance(futures[2].exception(0), ZeroDivisionError)
    lane.close()
