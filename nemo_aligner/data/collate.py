# SPDX-License-Identifier: Apache-2.0
"""Rows to batches: the one padding rule."""

import sys
from collections.abc import Sequence

import torch

from nemo_aligner.batch import (
    AttributeBatch,
    LabeledPairs,
    MismatchedResponses,
    PreferenceBatch,
    ReferencedPairs,
    TeacherBatch,
    TokenBatch,
)
from nemo_aligner.data.records import USUAL_REWARDS
from nemo_aligner.data.row import Row


def padded_length(longest: int, *, multiple: int, maximum: int) -> int:
    """``longest`` rounded up to a multiple, but never above ``maximum``.

    >>> padded_length(17, multiple=16, maximum=512), padded_length(500, multiple=16, maximum=504)
    (32, 504)
    """
    assert longest <= maximum, (longest, maximum)
    return min(-(-longest // multiple) * multiple, maximum)


def common_lengths(
    micro_batches: Sequence[Sequence[Row]],
    *,
    one_length: bool,
    multiple: int,
    maximum: int,
    packing: bool = False,
) -> list[int]:
    """The length that each micro-batch of a step is padded to: its longest row's, or with ``one_length`` the step's.

    With ``packing`` a micro-batch is one row of all its sequences, and ``maximum`` is of a sequence alone.
    """
    if packing:
        longest = [sum(len(one.tokens) for row in rows for one in row.sequences) for rows in micro_batches]
        maximum = padded_length(max(longest), multiple=multiple, maximum=sys.maxsize)
    else:
        longest = [max((row.num_tokens for row in rows), default=1) for rows in micro_batches]
    if one_length:
        longest = [max(longest, default=1)] * len(longest)
    return [padded_length(length, multiple=multiple, maximum=maximum) for length in longest]


def collate(rows: Sequence[Row], *, pad_id: int, seq_length: int) -> TokenBatch:
    """[len(rows) x sequences of a row, seq_length], right padded; every sequence fits.

    Rows that carry a teacher's tokens make a TeacherBatch, labeled rows an AttributeBatch, and where they are pairs
    LabeledPairs. Other pairs make a PreferenceBatch: sequence 2i is the chosen one of row i, 2i + 1 the other.
    """
    batch = _tokens(rows, pad_id=pad_id, seq_length=seq_length)
    if rows[0].labels:
        attributes = torch.tensor([label for row in rows for label in row.labels], dtype=torch.float32)
        kind = AttributeBatch if len(rows[0].sequences) == 1 else LabeledPairs
        return batch.extended(kind, attributes=attributes)
    if rows[0].teacher is not None:
        return _with_teacher(rows, batch)
    if len(rows[0].sequences) == 1:
        return batch
    rewards = [reward for row in rows for reward in row.rewards or USUAL_REWARDS]
    pairs = batch.extended(PreferenceBatch, given_rewards=torch.tensor(rewards))
    if not rows[0].reference_logprobs:
        return pairs
    known = [number for row in rows for number in row.reference_logprobs]
    return pairs.extended(ReferencedPairs, reference_sums=torch.tensor(known))


def _with_teacher(rows: Sequence[Row], batch: TokenBatch) -> TeacherBatch:
    """A TeacherBatch of rows that carry the teacher's tokens."""
    known = [row.teacher for row in rows if row.teacher is not None]
    shape = (*batch.tokens.shape, known[0][0].shape[-1])
    logprobs, ids = torch.zeros(shape), torch.zeros(shape, dtype=torch.int64)
    learned = batch.loss_tokens()
    logprobs[learned] = torch.cat([part for part, _ in known])
    ids[learned] = torch.cat([part for _, part in known]).long()
    return batch.extended(TeacherBatch, teacher_logprobs=logprobs, teacher_ids=ids)


def collate_mismatched(rows: Sequence[Row], *, pad_id: int, seq_length: int) -> MismatchedResponses:
    """[2 len(rows), seq_length], right padded: of MismatchedRows, a response being good if its reward is above 0."""
    good = [row.rewards[0] > 0 for row in rows for _ in row.sequences]
    batch = _tokens(rows, pad_id=pad_id, seq_length=seq_length)
    return batch.extended(MismatchedResponses, good=torch.tensor(good))


def _tokens(rows: Sequence[Row], *, pad_id: int, seq_length: int) -> TokenBatch:
    sequences = [(sequence.tokens, sequence.loss_mask) for row in rows for sequence in row.sequences]
    return TokenBatch.from_rows(sequences, pad_id=pad_id, seq_length=seq_length)


def uncollated(rows: Sequence[Row], *, pad_id: int, seq_length: int) -> list[Row]:
    """The rows as they are: the sampler pads prompts itself."""
    del pad_id, seq_length
    return list(rows)
