# SPDX-License-Identifier: Apache-2.0
"""The requests that wait for the main thread, and which of them it computes together. Knows nothing of PyTriton."""

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nemo_aligner.batch import TokenBatch
from nemo_aligner.serving.protocol import Ticket
from nemo_aligner.serving.wire import Arrays, InferRequest, TrainRequest


@dataclass(frozen=True, kw_only=True)
class SaveRequest:
    """The model is to be saved."""

    ticket: Ticket | None


Request = InferRequest | TrainRequest | SaveRequest


@dataclass(frozen=True, kw_only=True)
class Judged:
    """What a model says of B rows; None for what it does not judge."""

    rewards: Tensor | None  # [B] float, or [B, A] of several attributes
    values: Tensor | None  # [B, S] float, of the state before each token


@dataclass(frozen=True, kw_only=True)
class Job:
    """A request and where its reply goes."""

    request: Request
    is_gone: Callable[[], bool] = lambda: False  # whether nobody waits for the reply any more
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
    """Groups of jobs, put in by many threads; one takes them out in order, as many at once as are computed together.

    Args:
        max_rows: rows that are computed together; a request that alone has more is computed alone.
    """

    def __init__(self, *, max_rows: int) -> None:
        self._groups: queue.SimpleQueue[Sequence[Job]] = queue.SimpleQueue()
        self._next: deque[list[Job]] = deque()
        self._failing = threading.Lock()
        self._max_rows = max_rows

    def put(self, group: Sequence[Job]) -> None:
        """From any thread."""
        if group:
            self._groups.put(group)

    def take(self, timeout_seconds: float) -> list[Job]:
        """One job, or several to infer that may be computed together; [] if none comes in time."""
        if not self._next:
            try:
                self._next.extend(_together(self._groups.get(timeout=timeout_seconds), self._max_rows))
            except queue.Empty:
                return []
        return self._next.popleft()

    def fail(self, error: Exception) -> None:
        """Answer all that wait with an error: from any thread, when nobody takes any more."""
        with self._failing:
            while jobs := self.take(0.0):
                for job in jobs:
                    job.reply.set_exception(error)


def _together(group: Sequence[Job], max_rows: int) -> Iterator[list[Job]]:
    """The group in its order, cut where the next job must not be, or does not fit, with those before it."""
    jobs: list[Job] = []
    rows = 0
    for job in group:
        if jobs and not (jobs[-1].merges and job.merges and rows + job.num_rows <= max_rows):
            yield jobs
            jobs, rows = [], 0
        jobs.append(job)
        rows += job.num_rows
    if jobs:
        yield jobs


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
