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
from nemo_aligner.serving.protocol import RequestVersion
from nemo_aligner.serving.wire import Arrays, InferRequest, TrainRequest


@dataclass(frozen=True, kw_only=True)
class SaveRequest:
    """The model is to be saved."""

    version: RequestVersion | None


Request = InferRequest | TrainRequest | SaveRequest


@dataclass(frozen=True, kw_only=True)
class ServedScores:
    """Rewards and values of B rows; None for what the model does not give."""

    rewards: Tensor | None  # [B] float, or [B, A] of several attributes
    values: Tensor | None  # [B, S] float, of the state before each token


@dataclass(frozen=True, kw_only=True)
class QueuedRequest:
    """A request and where its reply goes."""

    request: Request
    is_gone: Callable[[], bool] = lambda: False  # whether nobody waits for the reply any more
    reply: Future[Arrays] = field(default_factory=Future)

    @property
    def merges(self) -> bool:
        """True if it may be computed with other requests.

        Those of a training are computed as they were composed, so that the results are the same bit for bit however
        the requests arrive.
        """
        return isinstance(self.request, InferRequest) and self.request.version is None

    @property
    def num_rows(self) -> int:
        """B of a request to infer, else 0."""
        return self.request.batch.num_rows if isinstance(self.request, InferRequest) else 0


class RequestQueue:
    """Groups of requests, put in by many threads; one takes them out in order, as many at once as are computed
    together.

    Args:
        max_rows: rows that are computed together; a request that alone has more is computed alone.
    """

    def __init__(self, *, max_rows: int) -> None:
        self._groups: queue.SimpleQueue[Sequence[QueuedRequest]] = queue.SimpleQueue()
        self._next: deque[list[QueuedRequest]] = deque()
        self._failing = threading.Lock()
        self._max_rows = max_rows

    def put(self, group: Sequence[QueuedRequest]) -> None:
        """From any thread."""
        if group:
            self._groups.put(group)

    def take(self, timeout_seconds: float) -> list[QueuedRequest]:
        """One request, or several to infer that may be computed together; [] if none comes in time."""
        if not self._next:
            try:
                self._next.extend(_grouped(self._groups.get(timeout=timeout_seconds), self._max_rows))
            except queue.Empty:
                return []
        return self._next.popleft()

    def fail(self, error: Exception) -> None:
        """Fail all that wait with an error: from any thread, when nobody takes any more."""
        with self._failing:
            while entries := self.take(0.0):
                for entry in entries:
                    entry.reply.set_exception(error)


def _grouped(group: Sequence[QueuedRequest], max_rows: int) -> Iterator[list[QueuedRequest]]:
    """The group in its order, split where the next request must not be, or does not fit, with those before it."""
    entries: list[QueuedRequest] = []
    rows = 0
    for entry in group:
        if entries and not (entries[-1].merges and entry.merges and rows + entry.num_rows <= max_rows):
            yield entries
            entries, rows = [], 0
        entries.append(entry)
        rows += entry.num_rows
    if entries:
        yield entries


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
    return TokenBatch(tokens=tokens, loss_mask=torch.arange(width) < lengths[:, None], lengths=lengths)


def split(scores: ServedScores, batches: Sequence[TokenBatch]) -> list[ServedScores]:
    """Each batch's part of what was said of all of them, values widened with 0 to the batch's width."""
    parts, row = [], 0
    for batch in batches:
        rows = slice(row, row + batch.num_rows)
        rewards = None if scores.rewards is None else scores.rewards[rows]
        values = None
        if scores.values is not None:
            values = torch.zeros(batch.tokens.shape)
            known = scores.values[rows, : batch.seq_length].detach().cpu().float()
            values[:, : known.shape[1]] = known
        parts.append(ServedScores(rewards=rewards, values=values))
        row += batch.num_rows
    return parts
