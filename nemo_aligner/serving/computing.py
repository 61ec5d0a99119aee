# SPDX-License-Identifier: Apache-2.0
"""The model behind a server, and what it computes for a request: with the weights that the request is for."""

import dataclasses
import logging
from typing import Protocol, runtime_checkable

from nemo_aligner.batch import TokenBatch
from nemo_aligner.errors import UserError
from nemo_aligner.rollout_batch import ValueBatch
from nemo_aligner.serving import wire
from nemo_aligner.serving.protocol import Health, Refusal, RequestVersion, Trouble
from nemo_aligner.serving.request_queue import QueuedRequest, SaveRequest, ServedScores, merge, split

logger = logging.getLogger(__name__)


class Handler(Protocol):
    """The model behind a server. All its methods are called in the thread that called :meth:`Server.serve`.

    A :class:`UserError` is reported to the client, and the server goes on. Any other error is reported too, and ends
    the server: the ranks may no longer be in step.
    """

    def infer(self, batch: TokenBatch) -> ServedScores:
        """Rewards and values of B rows, of any B."""
        ...

    def health(self) -> Health:
        """Report the server's state; called after each call, so it must be quick."""
        ...


@runtime_checkable
class Learner(Handler, Protocol):
    """A model that learns from what it is sent."""

    def train(self, batch: ValueBatch, version: RequestVersion | None) -> float:
        """Learn from a rollout; the loss. The version is part of :meth:`health` from then on, and of checkpoints."""
        ...

    def save(self, version: RequestVersion | None) -> None:
        """Save a checkpoint that belongs to the actor's of the same step."""
        ...

    def roll_back(self, version: RequestVersion) -> None:
        """Go back to a checkpoint that is trained on at most ``version.sequence`` train requests."""
        ...


class Computing:
    """Replies of a handler. Used by one thread; ``state`` is read by all.

    Args:
        learns: whether the handler is a :class:`Learner`, whose weights are brought to those that a version names.
        length_multiple: rows are cut to their longest, rounded up to this; None keeps the padding.
    """

    def __init__(self, handler: Handler, *, learns: bool, length_multiple: int | None) -> None:
        self._handler, self._learns, self._length_multiple = handler, learns, length_multiple
        self.state = handler.health()

    @property
    def _learner(self) -> Learner:
        assert isinstance(self._handler, Learner)
        return self._handler

    def replies(self, entries: list[QueuedRequest]) -> list[wire.Arrays]:
        """One for each job: of one request, or of several to infer."""
        match entries[0].request:
            case wire.InferRequest():
                return self._infer(entries)
            case wire.TrainRequest(batch=batch, version=version):
                return [wire.loss_reply(self._train(batch, version))]
            case SaveRequest(version=version):
                if version:
                    self._sync_to(version, version.sequence)
                self._note("save")
                self._learner.save(version)
                return [wire.save_reply()]

    def _infer(self, entries: list[QueuedRequest]) -> list[wire.Arrays]:
        requests = [entry.request for entry in entries if isinstance(entry.request, wire.InferRequest)]
        if self._learns and (version := requests[0].version):
            self._sync_to(version, version.sequence)
        self._note("infer")
        batches = [request.batch for request in requests]
        merged = merge(batches, length_multiple=self._length_multiple)
        if len(entries) > 1:
            logger.info("%d requests merged into one batch %s", len(entries), list(merged.tokens.shape))
        parts = split(self._handler.infer(merged), batches)
        return [
            wire.infer_reply(request, part.rewards, part.values)
            for request, part in zip(requests, parts, strict=True)
        ]

    def _train(self, batch: ValueBatch, version: RequestVersion | None) -> float:
        if version:
            state = self._handler.health()
            is_known = (state.run_id, state.sequence) == (version.run_id, version.sequence)
            if is_known and state.last_loss is not None:
                return state.last_loss
            self._sync_to(version, version.sequence - 1)
        self._note("train")
        return self._learner.train(batch, version)

    def _sync_to(self, version: RequestVersion, sequence: int) -> None:
        """Bring the weights to exactly ``sequence`` train requests of the request's run.

        Raises:
            Refusal: they are trained on fewer; the client sends those that are missing.
            UserError: they are trained by another run.
        """
        state = self._handler.health()
        if state.run_id and state.run_id != version.run_id:
            raise UserError(
                f"{state.model} learns from run {state.run_id}, and this request is of run {version.run_id}",
                fix="start the server again for the new run, or let the actor go on from its checkpoint",
            )
        if state.sequence > sequence:
            logger.info("back from train request %d to %d, where the actor goes on", state.sequence, sequence)
            self._learner.roll_back(dataclasses.replace(version, sequence=sequence))
            state = self._handler.health()
            assert state.sequence <= sequence, (state, version)
        if state.sequence < sequence:
            raise Refusal(
                Trouble.STALE, f"the weights are trained on {state.sequence} train requests, not {sequence}"
            )

    def publish(self) -> None:
        """Let clients know how the model is after a call."""
        self.state = self._handler.health()

    def _note(self, busy: str) -> None:
        self.state = dataclasses.replace(self.state, busy=busy)
