# SPDX-License-Identifier: Apache-2.0
"""Samples to batches: the one padding rule."""

from collections.abc import Sequence

from nemo_aligner.batch import TokenBatch
from nemo_aligner.data.sample import Sample

__all__ = ["collate", "empty_sample", "padded_length"]


def padded_length(longest: int, *, multiple: int, maximum: int) -> int:
    """``longest`` rounded up to a multiple, but never above ``maximum``.

    >>> padded_length(17, multiple=16, maximum=512), padded_length(500, multiple=16, maximum=504)
    (32, 504)
    """
    assert longest <= maximum, (longest, maximum)
    return min(-(-longest // multiple) * multiple, maximum)


def empty_sample(pad_id: int) -> Sample:
    """A row that only fills a micro-batch: one token, not learned."""
    return Sample(tokens=[pad_id], mask=[False], truncated=False)


def collate(samples: Sequence[Sample], *, pad_id: int, seq_length: int) -> TokenBatch:
    """[len(samples), seq_length], right padded; every sample fits."""
    return TokenBatch.from_rows(
        [(sample.tokens, sample.mask) for sample in samples], pad_id=pad_id, seq_length=seq_length
    )
