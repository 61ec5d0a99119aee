# SPDX-License-Identifier: Apache-2.0
"""Which rows make up which batch: pure functions of seed and batch index, so a run resumes from a number.

Global batches never depend on the number of data-parallel ranks; ``rank_rows`` deals one out to them.
"""

from collections.abc import Sequence

import numpy as np

__all__ = ["GlobalBatchSampler", "rank_rows"]


class GlobalBatchSampler:
    """The rows of each global batch, over all epochs.

    Args:
        num_samples: rows in the data set.
        global_batch_size: rows in one batch over all ranks.
        shuffle: a new order each epoch; otherwise the file's order.
        seed: with the epoch, the only source of that order.
        drop_last: leave out an epoch's incomplete last batch, unless it is the only one.
    """

    def __init__(
        self, num_samples: int, global_batch_size: int, *, shuffle: bool, seed: int, drop_last: bool
    ) -> None:
        assert num_samples > 0, num_samples
        assert global_batch_size > 0, global_batch_size
        self.num_samples = num_samples
        self.global_batch_size = global_batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.drop_last = drop_last
        whole, rest = divmod(num_samples, global_batch_size)
        self.batches_per_epoch = whole if whole and (drop_last or not rest) else whole + 1
        self._epoch_order: tuple[int, np.ndarray] | None = None

    @property
    def fingerprint(self) -> dict[str, object]:
        """What the batches' composition follows from."""
        names = ("num_samples", "global_batch_size", "shuffle", "seed", "drop_last")
        return {name: vars(self)[name] for name in names}

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
            order = np.random.default_rng([self.seed, epoch]).permutation if self.shuffle else np.arange
            # Bound as one tuple, since threads that tokenise ahead may stand in different epochs.
            known = self._epoch_order = (epoch, order(self.num_samples))
        return known[1]


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
