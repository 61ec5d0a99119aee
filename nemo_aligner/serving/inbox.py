# SPDX-License-Identifier: Apache-2.0
"""The requests that wait for the main thread, and which of them it computes together. Knows nothing of PyTriton."""

import queue
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nemo_aligner.batch import TokenBatch
from nemo_aligner.serving.protocol import Ticket
from nemo_aligner.serving.wire import Arrays, InferRequest, TrainRequest

__all__ = ["Inbox", "Job", "Judged", "SaveRequest", "merge", "share"]


@dataclass(frozen=True, kw_only=True)
class SaveRequest:
    """The model is to be saved."""

    ticket: Ticket | None


@dataclass(frozen=True, kw_only=True)
class Judged:
    """What a model says of B rows; None for what it does not judge."""

    rewards: Tensor | None  # [B] float, or [B, A] of several attributes
    values: Tensor | None  # [B, S] float, of the state before each token


@dataclass(frozen=True, kw_only=True)
class Job:
    """A request and where its reply goes."""

    request: InferRequest | TrainRequest | SaveRequest
    reply: Future[Arrays] = field(default_factory=Future)

    @property
    def merges(self) -> bool:
        """Whether it may be computed with other requests.

        Those of a training are computed as they were composed, so that the results are the same bit for bit however
        the requests arrive.
        """
        return isinstance(self.request, InferRequest) and self.request.ticket is None

    @property
    def num_rows(self) -> int:
        """B of a request to infer, else 0."""
        return self.request.batch.num_rows if isinstance(self.request, InferRequest) else 0


class Inbox:
    """Filled by many threads, emptied by one, in order.

    Args:
        max_rows: rows that are computed together; a request that alone has more is computed alone.
        linger_seconds: how long to wait for a request to be joined by others.
    """

    def __init__(self, *, max_rows: int, linger_seconds: float) -> None:
        # SimpleQueue: its put may interrupt its get in the same thread, as a signal handler's does.
        self._queue: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self._next: Job | None = None
        self._max_rows = max_rows
        self._linger_seconds = linger_seconds

    def __len__(self) -> int:
        return self._queue.qsize() + (self._next is not None)

    def put(self, job: Job) -> None:
        """From any thread."""
        self._queue.put(job)

    def take(self, timeout_seconds: float) -> list[Job]:
        """The next job, or several in a row that may be computed together; [] if none comes in time."""
        first = self._pop(timeout_seconds)
        if first is None:
            return []
        jobs, rows = [first], first.num_rows
        until = time.monotonic() + self._linger_seconds
        while first.merges and rows < self._max_rows:
            job = self._pop(max(0.0, until - time.monotonic()))
            if job is None:
                break
            if not job.merges or rows + job.num_rows > self._max_rows:
                self._next = job
                break
            jobs.append(job)
            rows += job.num_rows
        return jobs

    def _pop(self, timeout_seconds: float) -> Job | None:
        job, self._next = self._next, None
        if job is not None:
            return job
        try:
            return self._queue.get(timeout=timeout_seconds)
        except queue.Empty:
            return None

    def fail(self, error: Exception) -> None:
        """Answer all that wait with an error."""
        while (job := self._pop(0.0)) is not None:
            job.reply.set_exception(error)


def merge(batches: Sequence[TokenBatch], *, length_multiple: int | None = None) -> TokenBatch:
    """The rows of several batches in one, padded with 0 to the widest.

    Args:
        length_multiple: cut to the longest row first, rounded up to it; None keeps the widest batch's width.
    """
    width = max(batch.seq_length for batch in batches)
    if length_multiple:
        longest = max(int(batch.lengths.max()) for batch in batches)
        width = min(width, -(-longest // length_multiple) * length_multiple)
    lengths = torch.cat([batch.lengths for batch in batches])
    tokens = torch.zeros(len(lengths), width, dtype=torch.int64)
    row = 0
    for batch in batches:
        kept = batch.tokens[:, :width]
        tokens[row : row + batch.num_rows, : kept.shape[1]] = kept
        row += batch.num_rows
    return TokenBatch(tokens=tokens, mask=torch.arange(width) < lengths[:, None], lengths=lengths)


def share(judged: Judged, batches: Sequence[TokenBatch]) -> list[Judged]:
    """Each batch's part of what was said of all of them, values widened with 0 to the batch's width."""
    parts, row = [], 0
    for batch in batches:
        rows = slice(row, row + batch.num_rows)
        rewards = None if judged.rewards is None else judged.rewards[rows]
        values = None
        if judged.values is not None:
            values = torch.zeros(batch.tokens.shape)
            known = judged.values[rows, : batch.seq_length].detach().cpu().float()
            values[:, : known.shape[1]] = known
        parts.append(Judged(rewards=rewards, values=values))
        row += batch.num_rows
    return parts
