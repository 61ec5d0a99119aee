# SPDX-License-Identifier: Apache-2.0
"""Samples to batches: the one padding rule."""

import math
from collections.abc import Sequence

import torch

from nemo_aligner.batch import PreferenceBatch, ScoredBatch, TokenBatch
from nemo_aligner.data.sample import ComparisonSample, PromptSample, Sample, ScoredPairSample, ScoredSample


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


def empty_comparison(pad_id: int) -> ComparisonSample:
    """A pair that only fills a micro-batch: one token each, nothing learned."""
    return ComparisonSample(chosen=[pad_id], rejected=[pad_id])


def empty_scored(pad_id: int, num_attributes: int) -> ScoredSample:
    """A row that only fills a micro-batch: one token, no attribute judged."""
    return ScoredSample(tokens=[pad_id], attributes=(math.nan,) * num_attributes)


def empty_scored_pair(pad_id: int, num_attributes: int) -> ScoredPairSample:
    """Two rows that only fill a micro-batch."""
    empty = empty_scored(pad_id, num_attributes)
    return ScoredPairSample(first=empty, second=empty)


def collate_comparisons(
    pairs: Sequence[ComparisonSample], *, pad_id: int, seq_length: int
) -> PreferenceBatch:
    """[2 x len(pairs), seq_length]; rows 2i chosen, 2i + 1 rejected; the mask is that of last tokens."""
    sequences = [tokens for pair in pairs for tokens in (pair.chosen, pair.rejected)]
    rows = _last_tokens(sequences, pad_id=pad_id, seq_length=seq_length)
    return PreferenceBatch(tokens=rows.tokens, mask=rows.mask, lengths=rows.lengths)


def collate_scored(samples: Sequence[ScoredSample], *, pad_id: int, seq_length: int) -> ScoredBatch:
    """[len(samples), seq_length]; the mask is that of last tokens."""
    rows = _last_tokens([sample.tokens for sample in samples], pad_id=pad_id, seq_length=seq_length)
    attributes = torch.tensor([sample.attributes for sample in samples], dtype=torch.float32)
    return ScoredBatch(tokens=rows.tokens, mask=rows.mask, lengths=rows.lengths, attributes=attributes)


def collate_scored_pairs(pairs: Sequence[ScoredPairSample], *, pad_id: int, seq_length: int) -> ScoredBatch:
    """[2 x len(pairs), seq_length]; rows 2i and 2i + 1 are the answers to one prompt."""
    samples = [sample for pair in pairs for sample in (pair.first, pair.second)]
    return collate_scored(samples, pad_id=pad_id, seq_length=seq_length)


def collate_prompts(prompts: Sequence[PromptSample], *, pad_id: int, seq_length: int) -> list[PromptSample]:
    """The prompts as they are: whoever answers them lays them out."""
    del pad_id, seq_length
    return list(prompts)


def _last_tokens(sequences: Sequence[list[int]], *, pad_id: int, seq_length: int) -> TokenBatch:
    """Rows whose mask is True where a reward is read: at position length - 1, but not in a filler's one token."""
    rows = [(ids, [*[False] * (len(ids) - 1), len(ids) > 1]) for ids in sequences]
    return TokenBatch.from_rows(rows, pad_id=pad_id, seq_length=seq_length)
