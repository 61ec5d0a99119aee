# SPDX-License-Identifier: Apache-2.0
"""One rank's share of each global batch, tokenised ahead of training where threads are given."""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass, field
from itertools import islice
from typing import Generic, Protocol, TypeVar

from nemo_aligner.batch import TokenBatch
from nemo_aligner.data.collate import common_lengths
from nemo_aligner.data.row import Row
from nemo_aligner.data.sampler import BlendSource, GlobalBatchSampler, rank_rows

B = TypeVar("B")
B_co = TypeVar("B_co", covariant=True)


class Rows(Protocol):
    """A map-style data set."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Row: ...

    @property
    def fingerprint(self) -> dict[str, object]:
        """A digest of the rows."""
        ...


class BlendedRows(Rows, Protocol):
    """A data set that says how often each part of it is drawn."""

    blend: tuple[BlendSource, ...]  # () for every row once an epoch


class Collate(Protocol[B_co]):
    """Makes a micro-batch of rows."""

    def __call__(self, rows: Sequence[Row], /, *, pad_id: int, seq_length: int) -> B_co:
        """The micro-batch, padded to ``seq_length`` tokens; every row fits."""
        ...


@dataclass(frozen=True, slots=True)
class _Step(Generic[B]):
    micro_batches: list[B]
    num_rows: int
    num_truncated: int


@dataclass
class BatchLoader(Generic[B]):
    """Micro-batches of global batch ``index``, for one data-parallel rank.

    All micro-batches of a step have ``micro_batch_size`` rows; padding rows stand for the missing ones. Every
    rank gets equally many micro-batches. A row may be a pair: then all sizes count pairs.
    """

    dataset: Rows
    sampler: GlobalBatchSampler
    _: KW_ONLY
    collate: Collate[B]
    pads: bool = True  # False: a micro-batch may have fewer rows, or none
    dp_rank: int
    dp_size: int
    micro_batch_size: int  # rows
    pad_id: int
    multiple: int  # lengths are rounded up to a multiple of this many tokens
    max_length: int  # tokens; no sample is longer
    # pad all micro-batches of a step alike, as pipeline stages need; else each to its own
    one_length: bool = True
    packing: bool = False  # a micro-batch is one row: all its sequences end to end
    num_workers: int = 0  # threads that tokenise ahead; 0: none
    num_seen: int = field(default=0, init=False)  # rows handed out so far on this rank
    num_truncated: int = field(default=0, init=False)  # those of them that were cut to fit

    def __post_init__(self) -> None:
        assert 0 <= self.dp_rank < self.dp_size, (self.dp_rank, self.dp_size)
        assert len(self.dataset) == self.sampler.num_samples, (len(self.dataset), self.sampler.num_samples)

    @property
    def fingerprint(self) -> dict[str, object]:
        """The content of the batches: equal fingerprints, equal batches."""
        return self.dataset.fingerprint | self.sampler.fingerprint

    @property
    def rows_per_batch(self) -> int:
        """Rows of a global batch."""
        return self.sampler.global_batch_size

    @property
    def batches_per_epoch(self) -> int:
        """Global batches in one pass over the data."""
        return self.sampler.batches_per_epoch

    def batch(self, index: int) -> list[B]:
        """The micro-batches of global batch ``index``, which counts on from epoch to epoch."""
        return self._count(self._step(index))

    def iterate(self, start: int, stop: int) -> Iterator[list[B]]:
        """The micro-batches of global batches ``start`` to ``stop - 1``, in order."""
        indices = iter(range(start, stop))
        if self.num_workers == 0:
            yield from map(self.batch, indices)
            return
        pool = ThreadPoolExecutor(self.num_workers, thread_name_prefix="tokenise")
        try:
            # One batch more than there are threads, so that none of them idles while a batch is trained on.
            ahead: deque[Future[_Step[B]]] = deque(
                pool.submit(self._step, index) for index in islice(indices, self.num_workers + 1)
            )
            while ahead:
                step = ahead.popleft().result()
                ahead.extend(pool.submit(self._step, index) for index in islice(indices, 1))
                yield self._count(step)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _step(self, index: int) -> _Step[B]:
        rows = rank_rows(
            self.sampler.rows(index),
            dp_rank=self.dp_rank,
            dp_size=self.dp_size,
            micro_batch_size=self.micro_batch_size,
        )
        samples = [[self.dataset[row] for row in micro] for micro in rows]
        present = [sample for micro in samples for sample in micro]
        return _Step(
            micro_batches=self.collated(samples),
            num_rows=len(present),
            num_truncated=sum(sample.truncated for sample in present),
        )

    def collated(self, micro_batches: Sequence[Sequence[Row]]) -> list[B]:
        """Micro-batches of a step, which may be of other rows than the data's, padded as the data's are."""
        padded = [self._padded(rows) for rows in micro_batches]
        lengths = common_lengths(
            padded,
            one_length=self.one_length,
            multiple=self.multiple,
            maximum=self.max_length,
            packing=self.packing,
        )
        return [self._collated(rows, length) for rows, length in zip(padded, lengths, strict=True)]

    def _collated(self, rows: Sequence[Row], seq_length: int) -> B:
        if not self.packing:
            return self.collate(rows, pad_id=self.pad_id, seq_length=seq_length)
        batch = self.collate(rows, pad_id=self.pad_id, seq_length=max(row.num_tokens for row in rows))
        assert isinstance(batch, TokenBatch), "prompts are not packed"
        return batch.packed(seq_length, pad_id=self.pad_id)

    def _padded(self, samples: Sequence[Row]) -> Sequence[Row]:
        missing = self.micro_batch_size - len(samples)
        if not (self.pads and missing):
            return samples
        like = samples[0] if samples else self.dataset[0]
        return [*samples, *[like.padding(self.pad_id)] * missing]

    def _count(self, step: _Step[B]) -> list[B]:
        self.num_seen += step.num_rows
        self.num_truncated += step.num_truncated
        return step.micro_batches
