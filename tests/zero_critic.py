# SPDX-License-Identifier: Apache-2.0
"""A critic whose values are 0 and that learns nothing, for tests of what asks one."""

from concurrent.futures import Future
from typing import TypeVar

import torch
from torch import Tensor

from nemo_aligner.batch import TokenBatch
from nemo_aligner.rollout_batch import ValueBatch

T = TypeVar("T")


class ZeroCritic:
    """In the place of a RemoteCritic."""

    run_id, sequence = "", 0

    def infer_rm_critic(self, batch: TokenBatch) -> Future[tuple[Tensor, Tensor]]:
        """(zeros [B], zeros [B, S])."""
        return done((torch.zeros(batch.num_rows), torch.zeros(batch.tokens.shape)))

    def train(self, batch: ValueBatch, *, step: int) -> Future[float]:  # noqa: ARG002 - RemoteCritic's signature
        """0."""
        return done(0.0)

    def save(self) -> Future[None]:
        """Nothing."""
        return done(None)

    def committed(self, sequence: int) -> None:
        """Nothing."""

    def pending_train_requests(self) -> bytes:
        """None."""
        return b""

    def close(self) -> None:
        """Nothing."""


def done(result: T) -> Future[T]:
    """A future that has its result."""
    future: Future[T] = Future()
    future.set_result(result)
    return future
