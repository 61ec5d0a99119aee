# SPDX-License-Identifier: Apache-2.0
"""The model behind a server, and what it computes for a request: with the weights that the request is for."""

import dataclasses
import logging
from typing import Protocol, runtime_checkable

from nemo_aligner.batch import TokenBatch, ValueBatch
from nemo_aligner.errors import UserError
from nemo_aligner.serving import wire
from nemo_aligner.serving.inbox import Job, Judged, SaveRequest, merge, share
from nemo_aligner.serving.protocol import Health, Refusal, Ticket, Trouble

logger = logging.getLogger(__name__)


class Handler(Protocol):
    """The model behind a server. All its methods are called in the thread that called :meth:`Server.serve`.

    A :class:`UserError` is told to the client, and the server goes on. Any other error is told too, and then ends
    the server: the ranks may no longer be in step.
    """

    def infer(self, batch: TokenBatch) -> Judged:
        """Rewards and values of B rows, of any B."""
        ...

    def health(self) -> Health:
        """What the server tells of itself: asked after each call, answered without any work."""
        ...


@runtime_checkable
class Learner(Handler, Protocol):
    """A model that learns from what it is sent."""

    def train(self, batch: ValueBatch, ticket: Ticket | None) -> float:
        """Learn from a rollout; the loss. The ticket is part of :meth:`health` from then on, and of checkpoints."""
        ...

    def save(self, ticket: Ticket | None) -> None:
        """Save a checkpoint that belongs to the actor's of the same step."""
        ...

    def rewind(self, ticket: Ticket) -> None:
        """Go back to a checkpoint that has learned from at most ``ticket.sequence`` train requests."""
        ...


class Computing:
    """Replies of a handler. Used by one thread; ``told`` is read by all.

    Args:
        learns: whether the handler is a :class:`Learner`, whose weights are brought to those that a ticket names.
        length_multiple: rows are cut to their longest, rounded up to this; None keeps the padding.
    """

    def __init__(self, handler: Handler, *, learns: bool, length_multiple: int | None) -> None:
        self._handler, self._learns, self._length_multiple = handler, learns, length_multiple
        self.told = handler.health()

    @property
    def _learner(self) -> Learner:
        assert isinstance(self._handler, Learner)
        return self._handler

    def replies(self, jobs: list[Job]) -> list[wire.Arrays]:
        """One for each job: of one request, or of several to infer."""
        match jobs[0].request:
            case wire.InferRequest():
                return self._infer(jobs)
            case wire.TrainRequest(batch=batch, ticket=ticket):
                return [wire.loss_reply(self._train(batch, ticket))]
            case SaveRequest(ticket=ticket):
                if ticket:
                    self._bring_to(ticket, ticket.sequence)
                self._note("save")
                self._learner.save(ticket)
                return [wire.save_reply()]

    def _infer(self, jobs: list[Job]) -> list[wire.Arrays]:
        requests = [job.request for job in jobs if isinstance(job.request, wire.InferRequest)]
        if self._learns and (ticket := requests[0].ticket):
            self._bring_to(ticket, ticket.sequence)
        self._note("infer")
        batches = [request.batch for request in requests]
        merged = merge(batches, length_multiple=self._length_multiple)
        if len(jobs) > 1:
            logger.info("%d requests merged into one batch %s", len(jobs), list(merged.tokens.shape))
        parts = share(self._handler.infer(merged), batches)
        return [
            wire.infer_reply(request, part.rewards, part.values)
            for request, part in zip(requests, parts, strict=True)
        ]

    def _train(self, batch: ValueBatch, ticket: Ticket | None) -> float:
        if ticket:
            told = self._handler.health()
            is_known = (told.run_id, told.sequence) == (ticket.run_id, ticket.sequence)
            if is_known and told.last_loss is not None:
                return told.last_loss
            self._bring_to(ticket, ticket.sequence - 1)
        self._note("train")
        return self._learner.train(batch, ticket)

    def _bring_to(self, ticket: Ticket, sequence: int) -> None:
        """See to it that the weights have learned from ``sequence`` requests of the ticket's run, no more, no fewer.

        Raises:
            Refusal: they have learned from fewer; the client sends those that are missing.
            UserError: they learn from another run.
        """
        told = self._handler.health()
        if told.run_id and told.run_id != ticket.run_id:
            raise UserError(
                f"{told.model} learns from run {told.run_id}, and this request is of run {ticket.run_id}",
                cure="start the server again for the new run, or let the actor go on from its checkpoint",
            )
        if told.sequence > sequence:
            logger.info("back from train request %d to %d, where the actor goes on", told.sequence, sequence)
            self._learner.rewind(dataclasses.replace(ticket, sequence=sequence))
            told = self._handler.health()
            assert told.sequence <= sequence, (told, ticket)
        if told.sequence < sequence:
            raise Refusal(
                Trouble.BEHIND,
                f"the weights have learned from {told.sequence} train requests, not {sequence}",
            )

    def publish(self) -> None:
        """Let clients know how the model is after a call."""
        self.told = self._handler.health()

    def _note(self, busy: str) -> None:
        self.told = dataclasses.replace(self.told, busy=busy)
