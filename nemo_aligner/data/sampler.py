# SPDX-License-Identifier: Apache-2.0
"""Which rows make up which batch: pure functions of seed and batch index, so a run resumes from a number.

Global batches never depend on the number of data-parallel ranks; ``rank_rows`` deals one out to them.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nemo_aligner.errors import UserError

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class BlendSource:
    """One source of a blend: the next ``num_rows`` rows of the data set."""

    num_rows: int
    weight: float  # of an epoch's rows, as a share of all weights


class GlobalBatchSampler:
    """The rows of each global batch, over all epochs.

    Args:
        num_samples: rows in the data set.
        global_batch_size: rows in one batch over all ranks.
        shuffle: a new order each epoch; otherwise the file's order.
        seed: with the epoch, the only source of that order.
        drop_last: leave out an epoch's incomplete last batch, unless it is the only one.
        blend: draw rows from sources by weight: an epoch has as many rows as the data set, each source's part of
            them is the same in every epoch, and a source goes on where it stood until all its rows have been
            drawn, then anew. Unshuffled epochs are alike: each has the first rows of every source. Empty: every
            row once an epoch.

    Raises:
        UserError: a weight is too small for a single row an epoch.
    """

    def __init__(
        self,
        num_samples: int,
        global_batch_size: int,
        *,
        shuffle: bool,
        seed: int,
        drop_last: bool,
        blend: Sequence[BlendSource] = (),
    ) -> None:
        assert num_samples > 0, num_samples
        assert global_batch_size > 0, global_batch_size
        if num_samples < global_batch_size:
            _LOG.info(
                "global_batch_size=%d, and there are %d rows: a batch is all of them",
                global_batch_size,
                num_samples,
            )
        elif drop_last and (rest := num_samples % global_batch_size):
            _LOG.info(
                "global_batch_size=%d leaves %d of %d rows, other ones if they are shuffled, out of an epoch",
                *(global_batch_size, rest, num_samples),
            )
        self.num_samples = num_samples
        self.global_batch_size = global_batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.drop_last = drop_last
        assert not blend or sum(share.num_rows for share in blend) == num_samples, (blend, num_samples)
        self._blend = tuple(blend)
        self._quotas = _quotas(blend, num_samples)
        whole, rest = divmod(num_samples, global_batch_size)
        self.batches_per_epoch = whole if whole and (drop_last or not rest) else whole + 1
        self._epoch_order: tuple[int, np.ndarray] | None = None

    @property
    def fingerprint(self) -> dict[str, object]:
        """A digest of the order of rows."""
        names = ("num_samples", "global_batch_size", "shuffle", "seed", "drop_last")
        found: dict[str, object] = {name: vars(self)[name] for name in names}
        if self._blend:
            found["blend"] = [[share.num_rows, share.weight] for share in self._blend]
        return found

    def rows(self, batch_index: int) -> list[int]:
        """The row ids of one global batch; ``batch_index`` counts on from epoch to epoch."""
        epoch, batch = divmod(batch_index, self.batches_per_epoch)
        start = batch * self.global_batch_size
        return self._order(epoch)[start : start + self.global_batch_size].tolist()

    def _order(self, epoch: int) -> np.ndarray:
        if not self.shuffle:
            epoch = 0
        known = self._epoch_order
        if known is None or known[0] != epoch:
            # Bound as one tuple, since threads that tokenise ahead may stand in different epochs.
            known = self._epoch_order = (epoch, self._make_order(epoch))
        return known[1]

    def _make_order(self, epoch: int) -> np.ndarray:
        rows = self._drawn(epoch) if self._blend else np.arange(self.num_samples)
        return np.random.default_rng([self.seed, epoch]).permutation(rows) if self.shuffle else rows

    def _drawn(self, epoch: int) -> np.ndarray:
        """[num_samples]: the rows of one epoch of a blend, source by source."""
        parts, offset = [], 0
        for number, (share, quota) in enumerate(zip(self._blend, self._quotas, strict=True), start=1):
            first = epoch * quota
            parts.append(offset + self._source_rows(number, share.num_rows, first, first + quota))
            offset += share.num_rows
        return np.concatenate(parts)

    def _source_rows(self, number: int, num_rows: int, start: int, stop: int) -> np.ndarray:
        """Draws ``start`` to ``stop - 1`` of a source's endless sequence: pass after pass over its rows."""
        first, last = start // num_rows, (stop - 1) // num_rows
        passes = [
            # Three words, the last above 0, so that no pass shares its random numbers with an epoch.
            np.random.default_rng([self.seed, index, number]).permutation(num_rows)
            if self.shuffle
            else np.arange(num_rows)
            for index in range(first, last + 1)
        ]
        return np.concatenate(passes)[start - first * num_rows : stop - first * num_rows]


def _quotas(blend: Sequence[BlendSource], num_samples: int) -> list[int]:
    """Rows of each source in an epoch: whole numbers with the sum ``num_samples``, by largest remainder."""
    total = sum(share.weight for share in blend)
    exact = [num_samples * share.weight / total for share in blend]
    quotas = [int(number) for number in exact]
    by_remainder = sorted(range(len(blend)), key=lambda i: (quotas[i] - exact[i], i))
    for i in by_remainder[: num_samples - sum(quotas)] if blend else []:
        quotas[i] += 1
    for number, (share, quota) in enumerate(zip(blend, quotas, strict=True), start=1):
        if quota == 0:
            raise UserError(
                f"weight {share.weight / total:g} of file {number} of a blend gives no row in an "
                f"epoch of {num_samples}",
                fix="give the file a greater weight, or leave it out",
            )
    return quotas


def rank_rows(rows: Sequence[int], *, dp_rank: int, dp_size: int, micro_batch_size: int) -> list[list[int]]:
    """One rank's micro-batches of a global batch.

    The batch is cut into micro-batches first and these are dealt out in runs, so their composition is the
    same for every ``dp_size``. All ranks get equally many; short or empty ones are for the caller to pad.

    >>> [rank_rows(range(5), dp_rank=rank, dp_size=2, micro_batch_size=2) for rank in (0, 1)]
    [[[0, 1], [2, 3]], [[4], []]]
    """
    num_micro_batches = -(-len(rows) // micro_batch_size)
    per_rank = -(-num_micro_batches // dp_size)
    first = dp_rank * per_rank
    return [
        list(rows[index * micro_batch_size : (index + 1) * micro_batch_size])
        for index in range(first, first + per_rank)
    ]
