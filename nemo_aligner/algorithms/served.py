# SPDX-License-Identifier: Apache-2.0
"""A model of several ranks behind a server: rank 0 is asked, and every rank computes. Knows no algorithm."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from nemo_aligner.batch import TokenBatch, ValueBatch
from nemo_aligner.errors import UserError
from nemo_aligner.parallel import collectives, world
from nemo_aligner.serving.inbox import Judged
from nemo_aligner.serving.protocol import Health, Ticket
from nemo_aligner.serving.server import Server

__all__ = ["Worker", "judge", "serve"]


class Worker(Protocol):
    """What each rank does for clients."""

    def infer(self, batch: TokenBatch) -> Judged:
        """Rewards and values of B rows. Called on all ranks alike, and gives all of them all rows' results."""
        ...

    def health(self) -> Health:
        """What the server tells of itself; called on rank 0 alone."""
        ...


@runtime_checkable
class Student(Worker, Protocol):
    """A worker that learns. Every method but health is called on all ranks alike."""

    def train(self, batch: ValueBatch, ticket: Ticket | None) -> float:
        """Learn; the loss."""
        ...

    def save(self, ticket: Ticket | None) -> None:
        """Save a checkpoint."""
        ...

    def rewind(self, ticket: Ticket) -> None:
        """Go back to a checkpoint that has learned from at most ``ticket.sequence`` train requests."""
        ...


@dataclass(frozen=True)
class _Infer:
    batch: TokenBatch


@dataclass(frozen=True)
class _Train:
    batch: ValueBatch
    ticket: Ticket | None


@dataclass(frozen=True)
class _Save:
    ticket: Ticket | None


@dataclass(frozen=True)
class _Rewind:
    ticket: Ticket


@dataclass(frozen=True)
class _Tick:
    pass


@dataclass(frozen=True)
class _Stop:
    pass


_Command = _Infer | _Train | _Save | _Rewind | _Tick | _Stop


def serve(
    worker: Worker,
    open_server: Callable[[], AbstractContextManager[Server]],
    *,
    should_stop: Callable[[Server], bool],
) -> bool:
    """Answer clients with all ranks until one of them, or ``should_stop`` on rank 0, ends it; whether a client did.

    Every rank calls it and gets the same. What a client got wrong is told to it; any other error ends all ranks.
    """
    if not world.is_logging_rank():
        _follow(worker)
        return collectives.broadcast_object(False)
    leader = _Leader(worker)
    with open_server() as server:
        asked = server.serve(leader, should_stop=lambda: should_stop(server))
        leader.stop()
    return collectives.broadcast_object(asked)


class _Leader:
    """Rank 0's part: it tells the others what it is about to do."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self.health = worker.health

    def infer(self, batch: TokenBatch) -> Judged:
        return self._everywhere(_Infer(batch))

    def train(self, batch: ValueBatch, ticket: Ticket | None) -> float:
        return self._everywhere(_Train(batch, ticket))

    def save(self, ticket: Ticket | None) -> None:
        self._everywhere(_Save(ticket))

    def rewind(self, ticket: Ticket) -> None:
        self._everywhere(_Rewind(ticket))

    def tick(self) -> None:
        self._everywhere(_Tick())

    def stop(self) -> None:
        self._everywhere(_Stop())

    def _everywhere(self, command: _Command) -> Any:  # noqa: ANN401 - what the command gives
        return _do(self._worker, collectives.broadcast_object(command))


def _follow(worker: Worker) -> None:
    command: _Command = _Tick()
    while not isinstance(command, _Stop):
        with world.phase("waiting for rank 0, which serves"):
            command = collectives.broadcast_object(command)
        try:
            _do(worker, command)
        except UserError:
            # Every rank has met it, and rank 0 tells the client.
            continue


def _do(worker: Worker, command: _Command) -> Any:  # noqa: ANN401
    if isinstance(command, _Tick | _Stop):
        return None
    if isinstance(command, _Infer):
        return worker.infer(command.batch)
    assert isinstance(worker, Student), command
    match command:
        case _Train(batch, ticket):
            return worker.train(batch, ticket)
        case _Save(ticket):
            return worker.save(ticket)
        case _Rewind(ticket):
            return worker.rewind(ticket)


def judge(
    batch: TokenBatch,
    ask: Callable[[TokenBatch, int], tuple[Tensor | None, Tensor | None]],
    *,
    rows: int,
    multiple: int,
) -> Judged:
    """What all ranks together say of a batch that each of them has.

    The rows are dealt out in order, so that how many ranks there are changes no result but by rounding.

    Args:
        ask: (rewards [B] or [B, A] or None, values [B, S] or None) of this rank's rows, in micro-batches of so many.
        rows: of a micro-batch, at most.
        multiple: of positions that a row is padded to.

    Raises:
        UserError: a number is infinite or NaN; on every rank.
    """
    ranks = world.dp_size()
    micro = min(rows, -(-batch.num_rows // ranks))
    share = -(-batch.num_rows // (micro * ranks)) * micro
    whole = batch.filled(share * ranks).with_length(-(-batch.seq_length // multiple) * multiple)
    mine = whole.take(slice(world.dp_rank() * share, (world.dp_rank() + 1) * share)).to(world.device())
    parts = collectives.over_data_parallel(tuple(x if x is None else x.cpu() for x in ask(mine, micro)))
    rewards, values = (
        None if column[0] is None else torch.cat([x for x in column if x is not None])[: batch.num_rows]
        for column in zip(*parts, strict=True)
    )
    for name, numbers in (("rewards", rewards), ("values", values)):
        if numbers is not None and not numbers.isfinite().all():
            wrong = int((~numbers.isfinite()).sum())
            raise UserError(
                f"{wrong} of {numbers.numel()} {name} of this request are infinite or NaN, and are not served",
                cure="with trainer.precision=16 serve the model in bf16 or 32; or serve an earlier checkpoint",
            )
    return Judged(rewards=rewards, values=None if values is None else values[:, : batch.seq_length])
