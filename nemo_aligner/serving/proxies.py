# SPDX-License-Identifier: Apache-2.0
"""Proxies of servers: rank 0 of the actor talks to a server, and every rank gets its reply or its error."""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import Tensor

from nemo_aligner.batch import TokenBatch
from nemo_aligner.errors import Unwound, UserError
from nemo_aligner.parallel import collectives, world
from nemo_aligner.rollout_batch import ValueBatch

if TYPE_CHECKING:
    from nemo_aligner.serving.client import RemoteCritic, RemoteReward

T = TypeVar("T")
R = TypeVar("R")

ANNOUNCE_SECONDS = 10.0  # between two signs of life to ranks that wait for rank 0's reply


class CriticUnavailable(Unwound):
    """The critic did not do what it was asked; no reply will come."""


class WaitCancelled(Exception):
    """The wait for the critic was given up because this job is to end."""


@dataclass(frozen=True)
class PendingReply(Generic[T]):
    """A reply that is under way to rank 0."""

    future: Future[T] | None  # on rank 0
    _times: list[float] = field(default_factory=list)  # of asking and of the reply

    def __post_init__(self) -> None:
        self._times.append(time.perf_counter())
        if self.future is not None:
            self.future.add_done_callback(lambda _: self._times.append(time.perf_counter()))

    @property
    def seconds(self) -> float:
        """From asking to the reply, once it is there; 0 on other ranks than 0."""
        return self._times[-1] - self._times[0]

    def result(self, *, give_up: Callable[[], bool] = lambda: False) -> T:
        """The reply, on every rank; called by all of them.

        Args:
            give_up: asked on rank 0 while it waits.

        Raises:
            CriticUnavailable: there is none.
            WaitCancelled: it was given up.
        """
        while True:
            with world.phase("waiting for the critic"):
                outcome = collectives.broadcast_object(self._outcome(give_up))
            match outcome:
                case None:
                    continue
                case UserError():
                    raise CriticUnavailable(outcome)
                case WaitCancelled():
                    raise outcome
                case (value,):
                    return value

    def _outcome(self, give_up: Callable[[], bool]) -> Any:  # noqa: ANN401 - a reply in a tuple, an error, or None
        if self.future is None:
            return None
        for _ in range(int(ANNOUNCE_SECONDS / 0.2)):
            if wait([self.future], 0.2).done:
                break
            if give_up():
                return WaitCancelled()
        else:
            return None
        error = self.future.exception()
        if isinstance(error, UserError):
            return error
        return (self.future.result(),)


class CriticProxy:
    """All ranks call every method alike.

    Args:
        critic: on rank 0, elsewhere None.
    """

    def __init__(self, critic: "RemoteCritic | None") -> None:
        assert (critic is not None) == world.is_logging_rank()
        self._critic = critic

    @property
    def run_id(self) -> str:
        """Under which the critic knows the actor's run; on rank 0."""
        return self._critic.run_id if self._critic else ""

    @property
    def sequence(self) -> int:
        """Train requests so far; on rank 0."""
        return self._critic.sequence if self._critic else 0

    def score(self, batch: TokenBatch, *, rows: int) -> PendingReply[tuple[Tensor, Tensor]]:
        """(rewards [B], values [B, S]) of a batch that every rank has, asked for so many rows at a time."""
        if self._critic is None:
            return PendingReply(None)
        return PendingReply(
            _join_futures(
                [self._critic.infer_rm_critic(chunk) for chunk in _chunks(batch, rows)],
                lambda replies: (torch.cat([r for r, _ in replies]), torch.cat([v for _, v in replies])),
            )
        )

    def train(self, batch: ValueBatch, *, step: int) -> PendingReply[float]:
        """The critic's loss on a batch that every rank has."""
        return PendingReply(self._critic.train(batch, step=step) if self._critic else None)

    def last_loss(self) -> PendingReply[float]:
        """The critic's loss on the last batch, which it is sent again where it lacks it."""
        return PendingReply(self._critic.last_loss() if self._critic else None)

    def save(self) -> PendingReply[None]:
        """Have the critic saved."""
        return PendingReply(self._critic.save() if self._critic else None)

    def committed(self, sequence: int) -> None:
        """The pair of checkpoints with ``sequence`` train requests is complete; read on rank 0."""
        if self._critic:
            self._critic.committed(sequence)

    def pending_train_requests(self) -> bytes | None:
        """The train requests that a checkpoint of the actor alone must hold for the critic; on rank 0."""
        return self._critic.pending_train_requests() if self._critic else None


class RewardProxy:
    """A reward model in another job. All ranks call its method alike.

    Args:
        reward: on rank 0, elsewhere None.
    """

    def __init__(self, reward: "RemoteReward | None") -> None:
        assert (reward is not None) == world.is_logging_rank()
        self._reward = reward

    def score(self, batch: TokenBatch, *, rows: int) -> PendingReply[Tensor]:
        """Rewards [B] of a batch that every rank has, asked for so many rows at a time."""
        if self._reward is None:
            return PendingReply(None)
        asked = [self._reward.infer(chunk) for chunk in _chunks(batch, rows)]
        return PendingReply(_join_futures(asked, lambda replies: torch.cat(list(replies))))


def _chunks(batch: TokenBatch, rows: int) -> list[TokenBatch]:
    return [batch.take(slice(i, i + rows)) for i in range(0, batch.num_rows, rows)]


def _join_futures(asked: Sequence[Future[T]], join: Callable[[Sequence[T]], R]) -> Future[R]:
    """One future of several replies, joined in their order; the first error ends it."""
    whole: Future[R] = Future()
    one_at_a_time = threading.Lock()

    def arrived(one: Future[T]) -> None:
        with one_at_a_time:
            if whole.done():
                return
            if error := one.exception():
                whole.set_exception(error)
            elif all(future.done() for future in asked):
                try:
                    joined = join([future.result() for future in asked])
                except RuntimeError as error:  # nobody else would hear of it
                    whole.set_exception(error)
                else:
                    whole.set_result(joined)

    for one in asked:
        one.add_done_callback(arrived)
    return whole
