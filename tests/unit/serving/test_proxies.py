# SPDX-License-Identifier: Apache-2.0
"""What rank 0 hears of the critic reaches whoever waits: a reply, an error, or the end of the wait."""

import threading
from collections.abc import Iterator
from concurrent.futures import Future

import pytest
import torch

from nemo_aligner.batch import TokenBatch
from nemo_aligner.errors import UserError
from nemo_aligner.parallel import world
from nemo_aligner.serving.proxies import CriticProxy, CriticUnavailable, PendingReply, WaitCancelled
from tests.zero_critic import ZeroCritic


@pytest.fixture(scope="module", autouse=True)
def _one_rank() -> Iterator[None]:
    with world.ensure_single_process():
        yield


def test_a_reply_that_comes_later_is_given():
    future: Future[float] = Future()
    timer = threading.Timer(0.3, future.set_result, [2.5])
    timer.start()
    pending = PendingReply(future)
    assert pending.result() == 2.5
    assert 0.25 < pending.seconds < 5


def test_an_error_of_the_critic_is_the_callers():
    future: Future[float] = Future()
    future.set_exception(UserError("the critic failed", fix="see its log"))
    with pytest.raises(CriticUnavailable) as lost:
        PendingReply(future).result()
    assert lost.value.error.fix == "see its log"


def test_a_bug_is_not_taken_for_a_lost_critic():
    future: Future[float] = Future()
    future.set_exception(ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        PendingReply(future).result()


def test_a_wait_may_be_given_up():
    with pytest.raises(WaitCancelled):
        PendingReply(Future()).result(give_up=lambda: True)


def test_rows_come_back_in_order_from_several_requests():
    batch = TokenBatch(
        tokens=torch.arange(10).reshape(5, 2),
        loss_mask=torch.ones(5, 2, dtype=torch.bool),
        lengths=torch.full((5,), 2),
    )
    rewards, values = CriticProxy(ZeroCritic()).score(batch, rows=2).result()
    assert rewards.shape == (5,)
    assert values.shape == (5, 2)
