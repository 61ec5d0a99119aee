# SPDX-License-Identifier: Apache-2.0
"""Token batches, padded and packed: the same sequences must count and sum alike."""

import pytest
import torch

from nemo_aligner.batch import AttributeBatch, TokenBatch, Unit, concatenated
from nemo_aligner.rollout_batch import ValueBatch

ROWS = [
    ([5, 6, 7], [False, True, True]),
    ([8], [False]),
    ([1, 2, 3, 4], [True, True, False, True]),
    ([9, 9], [False, False]),
]


def padded(seq_length=6):
    return TokenBatch.from_rows(ROWS, pad_id=0, seq_length=seq_length)


def packed(tail=2):
    lengths = torch.tensor([len(ids) for ids, _ in ROWS])
    ids = [token for ids, _ in ROWS for token in ids] + [0] * tail
    mask = [flag for _, mask in ROWS for flag in mask] + [False] * tail
    ends = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).to(torch.int32)
    return TokenBatch(
        tokens=torch.tensor([ids]), loss_mask=torch.tensor([mask]), lengths=lengths, cu_seqlens=ends
    )


def test_rows_are_right_padded():
    batch = padded()
    assert batch.tokens.tolist() == [
        [5, 6, 7, 0, 0, 0],
        [8, 0, 0, 0, 0, 0],
        [1, 2, 3, 4, 0, 0],
        [9, 9, 0, 0, 0, 0],
    ]
    assert batch.loss_mask.sum(1).tolist() == [2, 0, 3, 0]
    assert batch.lengths.tolist() == [3, 1, 4, 2]
    assert (batch.num_rows, batch.seq_length) == (4, 6)


@pytest.mark.parametrize("make", [padded, packed])
def test_units_are_counted_without_first_tokens(make):
    # The third row's first token is marked, but nothing predicts it.
    assert make().count(Unit.TOKEN) == 4
    assert make().count(Unit.SEQUENCE) == 2


@pytest.mark.parametrize("tail", [0, 3])
def test_per_sequence_sums_are_alike_padded_and_packed(tail):
    wide, long = padded(), packed(tail)
    scores = torch.arange(10, dtype=torch.float64) ** 2
    wide_scores = torch.zeros(4, 6, dtype=torch.float64)
    for row, length, scored in zip(
        wide_scores, wide.lengths, scores.split(wide.lengths.tolist()), strict=True
    ):
        row[: int(length)] = scored
    long_scores = torch.cat([scores, torch.full((tail,), 7.0, dtype=torch.float64)])[None]
    expected = [
        sum(float(s) for s, m in zip(chunk[1:], mask[1:], strict=True) if m)  # nothing predicts a first token
        for chunk, (_, mask) in zip(scores.split(wide.lengths.tolist()), ROWS, strict=True)
    ]
    assert wide.per_sequence(wide_scores).tolist() == expected
    assert long.per_sequence(long_scores).tolist() == expected


def test_positions_and_starts():
    batch = packed()
    assert batch.positions()[0, :10].tolist() == [0, 1, 2, 0, 0, 1, 2, 3, 0, 1]
    assert batch.starts()[0].nonzero().flatten().tolist() == [0, 3, 4, 8]
    assert batch.sequence_ids()[0].tolist() == [0, 0, 0, 1, 2, 2, 2, 2, 3, 3, 3, 3]
    wide = padded()
    assert wide.positions().tolist() == [list(range(6))] * 4
    assert wide.starts().sum() == 4


def test_split_keeps_rows_in_order():
    batch = padded()
    parts = batch.split(2)
    assert len(parts) == 2
    assert torch.equal(torch.cat([part.tokens for part in parts]), batch.tokens)
    assert torch.equal(torch.cat([part.loss_mask for part in parts]), batch.loss_mask)
    assert torch.equal(torch.cat([part.lengths for part in parts]), batch.lengths)
    for unit in (Unit.TOKEN, Unit.SEQUENCE, Unit.PAIR):
        assert sum(int(part.count(unit)) for part in parts) == int(batch.count(unit))


def test_split_refuses_a_remainder_and_packed_rows():
    with pytest.raises(AssertionError):
        padded().split(3)
    with pytest.raises(AssertionError):
        packed().split(1)


def test_a_packed_batch_is_one_row():
    with pytest.raises(AssertionError):
        TokenBatch(
            tokens=torch.zeros(2, 3, dtype=torch.int64),
            loss_mask=torch.zeros(2, 3, dtype=torch.bool),
            lengths=torch.tensor([3, 3]),
            cu_seqlens=torch.tensor([0, 3, 6], dtype=torch.int32),
        )


@pytest.mark.parametrize("make", [padded, packed])
def test_moving_moves_every_field(make):
    moved = make().to(torch.device("meta"))
    assert moved.tokens.device.type == moved.loss_mask.device.type == moved.lengths.device.type == "meta"
    assert (moved.cu_seqlens is None) == (make().cu_seqlens is None)


def values(*lengths: int) -> ValueBatch:
    width = max(lengths)
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    counted = torch.arange(1, len(lengths) * width + 1).reshape(len(lengths), width) * mask
    return ValueBatch(
        tokens=counted, loss_mask=mask, lengths=torch.tensor(lengths), values=counted / 2, returns=counted / 4
    )


def test_rows_are_taken_filled_up_and_put_together():
    batch = values(2, 4, 3)
    swapped = batch.take([2, 0])
    assert swapped.lengths.tolist() == [3, 2]
    assert torch.equal(swapped.values, batch.values[[2, 0]])
    whole = batch.pad_rows(5)
    assert whole.lengths.tolist() == [2, 4, 3, 1, 1]
    assert whole.count(Unit.TOKEN) == batch.count(Unit.TOKEN)
    assert torch.equal(whole.take(slice(0, 3)).returns, batch.returns)
    nothing = batch.take([])
    assert torch.equal(concatenated([nothing, batch, nothing]).tokens, batch.tokens)
    joined = concatenated([values(2), batch])
    assert joined.tokens.shape == (4, 4)
    assert joined.tokens[0].tolist() == [1, 2, 0, 0]
    assert joined.lengths.tolist() == [2, 2, 4, 3]


def test_rows_are_widened_and_narrowed_but_never_cut():
    batch = values(2, 3)
    wide = batch.with_length(5, pad_id=9)
    assert wide.tokens[0].tolist() == [1, 2, 0, 9, 9]
    assert wide.values.shape == wide.loss_mask.shape == (2, 5)
    assert not wide.loss_mask[:, 3:].any()
    back = wide.with_length(3)
    assert torch.equal(back.returns, batch.returns)
    with pytest.raises(AssertionError):
        batch.with_length(2)


def test_attributes_are_not_padded_with_the_tokens():
    rows = TokenBatch.from_rows([([1, 2], [False, True]), ([3], [False])], pad_id=0, seq_length=4)
    labels = torch.arange(8.0).view(2, 4)  # as many attributes as positions
    batch = AttributeBatch(
        tokens=rows.tokens, loss_mask=rows.loss_mask, lengths=rows.lengths, attributes=labels
    )
    for length in (2, 6):
        changed = batch.with_length(length, pad_id=9)
        assert changed.tokens.shape == changed.loss_mask.shape == (2, length)
        assert torch.equal(changed.attributes, labels)


@pytest.mark.parametrize("unit", [Unit.TOKEN, Unit.SEQUENCE])
def test_the_tokens_of_a_unit_weigh_one_together(unit):
    rows = [([1, 2, 3], [False, True, True]), ([1, 2], [False, True]), ([1], [False])]
    batch = TokenBatch.from_rows(rows, pad_id=0, seq_length=3)
    weights = batch.token_weights(unit)
    assert weights.sum() == batch.count(unit)
    assert not weights[~batch.loss_tokens()].any()


def test_packing_keeps_every_field_of_a_sequence():
    wide = padded().extended(
        ValueBatch, values=torch.arange(24.0).view(4, 6), returns=-torch.arange(24.0).view(4, 6)
    )
    row = wide.packed(12)
    assert torch.equal(row.tokens, packed().tokens)
    assert torch.equal(row.loss_mask, packed().loss_mask)
    assert torch.equal(row.cu_seqlens, packed().cu_seqlens)
    assert row.values[0].tolist() == [*wide.values[wide.real_tokens()].tolist(), 0, 0]
    assert torch.equal(row.per_sequence(row.values), wide.per_sequence(wide.values))
    labels = padded().extended(AttributeBatch, attributes=torch.arange(24.0).view(4, 6))
    assert torch.equal(labels.packed(10).attributes, labels.attributes), (
        "labels are of sequences, not of tokens"
    )
