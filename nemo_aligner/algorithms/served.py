# SPDX-License-Identifier: Apache-2.0
"""A model of several ranks behind a server: rank 0 is asked, and every rank computes. Knows no algorithm."""

import contextlib
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from nemo_aligner.batch import TokenBatch
from nemo_aligner.errors import UserError
from nemo_aligner.parallel import collectives, world
from nemo_aligner.rollout_batch import ValueBatch
from nemo_aligner.serving.computing import Handler
from nemo_aligner.serving.protocol import RequestVersion
from nemo_aligner.serving.request_queue import ServedScores
from nemo_aligner.serving.server import Server

TICK_SECONDS = 10.0  # without a request, after which the other ranks hear that rank 0 lives
TICK, STOP = "tick", "stop"  # in the place of a handler's method: nothing, and the end


def serve(
    handler: Handler,
    open_server: Callable[[], AbstractContextManager[Server]],
    *,
    should_stop: Callable[[Server], bool],
) -> bool:
    """Serve clients with all ranks until one of them, or ``should_stop`` on rank 0, ends it; whether a client did.

    Every rank calls it and gets the same. Every method of ``handler`` but health is called on all ranks alike, and
    gives all of them the same. A client's mistake is reported to the client; any other error ends all ranks.
    """
    if not world.is_logging_rank():
        _follow(handler)
        return collectives.broadcast_object(False)
    leader = _Leader(handler)

    def ends() -> bool:
        leader.keep_waiting()
        return should_stop(server)

    with open_server() as server:
        asked = server.serve(leader, should_stop=ends)
        leader.everywhere(STOP)
    return collectives.broadcast_object(asked)


class _Leader:
    """Rank 0's handler, which has the others do what it is about to do."""

    def __init__(self, handler: Handler) -> None:
        self._handler, self.health, self._called_at = handler, handler.health, time.monotonic()

    def infer(self, batch: TokenBatch) -> ServedScores:
        return self.everywhere("infer", batch)

    def train(self, batch: ValueBatch, version: RequestVersion | None) -> float:
        return self.everywhere("train", batch, version)

    def save(self, version: RequestVersion | None) -> None:
        self.everywhere("save", version)

    def roll_back(self, version: RequestVersion) -> None:
        self.everywhere("roll_back", version)

    def keep_waiting(self) -> None:
        """Keep the other ranks from giving up where nothing has been asked for a while."""
        if time.monotonic() - self._called_at >= TICK_SECONDS:
            self.everywhere(TICK)

    def everywhere(self, *command: Any) -> Any:  # noqa: ANN401 - what the method takes and gives
        collectives.broadcast_object(command)
        try:
            return _do(self._handler, *command)
        finally:
            self._called_at = time.monotonic()


def _follow(handler: Handler) -> None:
    command: tuple[Any, ...] = ()
    while command != (STOP,):
        with world.phase("waiting for rank 0, which serves"):
            command = collectives.broadcast_object(command)
        # Every rank has met it, and rank 0 reports it to the client.
        with contextlib.suppress(UserError):
            _do(handler, *command)


def _do(handler: Handler, name: str, *arguments: Any) -> Any:  # noqa: ANN401
    return None if name in (TICK, STOP) else getattr(handler, name)(*arguments)


def score(
    batch: TokenBatch,
    ask: Callable[[TokenBatch, int], tuple[Tensor | None, Tensor | None]],
    *,
    rows: int,
    multiple: int,
) -> ServedScores:
    """Score a batch that each rank has, with the work split over all ranks.

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
    whole = batch.pad_rows(share * ranks).with_length(-(-batch.seq_length // multiple) * multiple)
    mine = whole.take(slice(world.dp_rank() * share, (world.dp_rank() + 1) * share)).to(world.device())
    parts = collectives.all_gather_objects_dp(tuple(x if x is None else x.cpu() for x in ask(mine, micro)))
    rewards, values = (
        None if column[0] is None else torch.cat([x for x in column if x is not None])[: batch.num_rows]
        for column in zip(*parts, strict=True)
    )
    for name, numbers in (("rewards", rewards), ("values", values)):
        if numbers is not None and not numbers.isfinite().all():
            wrong = int((~numbers.isfinite()).sum())
            raise UserError(
                f"{wrong} of {numbers.numel()} {name} of this request are infinite or NaN, and are not served",
                fix="with trainer.precision=16 serve the model in bf16 or 32; or serve an earlier checkpoint",
            )
    return ServedScores(rewards=rewards, values=None if values is None else values[:, : batch.seq_length])
