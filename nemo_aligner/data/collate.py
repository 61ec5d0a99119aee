# SPDX-License-Identifier: Apache-2.0
"""Rows to batches: the one padding rule."""

from collections.abc import Sequence

import torch
from torch import Tensor

from nemo_aligner.batch import AttributeBatch, LabeledPairs, PreferenceBatch, ReferencedPairs, TokenBatch
from nemo_aligner.data.row import Row


def padded_length(longest: int, *, multiple: int, maximum: int) -> int:
    """``longest`` rounded up to a multiple, but never above ``maximum``.

    >>> padded_length(17, multiple=16, maximum=512), padded_length(500, multiple=16, maximum=504)
    (32, 504)
    """
    assert longest <= maximum, (longest, maximum)
    return min(-(-longest // multiple) * multiple, maximum)


def collate(rows: Sequence[Row], *, pad_id: int, seq_length: int) -> TokenBatch:
    """[len(rows) x sequences of a row, seq_length], right padded; every sequence fits.

    Labeled rows make an AttributeBatch, and where they are pairs LabeledPairs. Other pairs make a PreferenceBatch:
    sequence 2i is the chosen one of row i, 2i + 1 the other.
    """
    sequences = [sequence for row in rows for sequence in row.sequences]
    batch = TokenBatch.from_rows(
        [(sequence.tokens, sequence.loss_mask) for sequence in sequences],
        pad_id=pad_id,
        seq_length=seq_length,
    )
    if rows[0].labels:
        attributes = torch.tensor([label for row in rows for label in row.labels], dtype=torch.float32)
        kind = AttributeBatch if len(rows[0].sequences) == 1 else LabeledPairs
        return batch.extended(kind, attributes=attributes)
    if len(rows[0].sequences) == 1:
        return batch
    pairs = batch.extended(PreferenceBatch, **_of_sequences(given_rewards=[row.rewards for row in rows]))
    known = _of_sequences(reference_sums=[row.reference_logprobs for row in rows])
    return pairs.extended(ReferencedPairs, **known) if known else pairs


def _of_sequences(**numbers: Sequence[tuple[float, ...]]) -> dict[str, Tensor]:
    """{name: [N] float} of the numbers of each row, of which all rows have some, or none."""
    return {
        name: torch.tensor([number for row in rows for number in row])
        for name, rows in numbers.items()
        if rows[0]
    }


def uncollated(rows: Sequence[Row], *, pad_id: int, seq_length: int) -> list[Row]:
    """The rows as they are: the sampler pads prompts itself."""
    del pad_id, seq_length
    return list(rows)
