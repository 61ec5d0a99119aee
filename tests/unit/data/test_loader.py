# SPDX-License-Identifier: Apache-2.0
"""Batches as ranks get them: the same rows for every number of ranks, threads and restarts."""

import random
from dataclasses import replace

import pytest
import torch

from nemo_aligner.batch import Unit
from nemo_aligner.data.collate import collate, uncollated
from nemo_aligner.data.loader import BatchLoader
from nemo_aligner.data.row import Row, TokenSequence
from nemo_aligner.data.sampler import BlendSource, GlobalBatchSampler
from nemo_aligner.errors import UserError


class Rows:
    """Row i: i + 1 tokens of value i (at most 12), the last half of them learned."""

    def __init__(self, num_rows):
        self.num_rows = num_rows

    def __len__(self):
        return self.num_rows

    def __getitem__(self, index):
        length = min(index % 17 + 2, 12)
        mask = [i >= length // 2 for i in range(length)]
        return Row(
            sequences=(TokenSequence(tokens=[index] * length, loss_mask=mask),), truncated=index % 17 + 2 > 12
        )


def row_of(*texts):
    return Row(
        sequences=tuple(
            TokenSequence(tokens=ids, loss_mask=[False] * (len(ids) - 1) + [True]) for ids in texts
        )
    )


def loader(
    num_rows=20, *, dp_rank=0, dp_size=1, num_workers=0, global_batch_size=6, micro_batch_size=2, rows=None
):
    rows = rows or Rows(num_rows)
    sampler = GlobalBatchSampler(len(rows), global_batch_size, shuffle=True, seed=3, drop_last=False)
    return BatchLoader(
        rows,
        sampler,
        collate=collate,
        dp_rank=dp_rank,
        dp_size=dp_size,
        micro_batch_size=micro_batch_size,
        pad_id=999,
        multiple=4,
        max_length=12,
        num_workers=num_workers,
    )


def as_lists(steps):
    return [
        [(b.tokens.tolist(), b.loss_mask.tolist(), b.lengths.tolist()) for b in micro_batches]
        for micro_batches in steps
    ]


def test_micro_batches_of_a_step_share_one_shape():
    for micro_batches in loader().iterate(0, 8):
        assert len({b.tokens.shape for b in micro_batches}) == 1
        length = micro_batches[0].seq_length
        assert length % 4 == 0
        assert length <= 12
        assert length - max(int(b.lengths.max()) for b in micro_batches) < 4


@pytest.mark.parametrize("dp_size", [1, 2, 3, 4])
@pytest.mark.parametrize("micro_batch_size", [1, 2, 4])
def test_every_row_of_a_batch_reaches_one_rank(dp_size, micro_batch_size):
    ranks = [loader(dp_rank=r, dp_size=dp_size, micro_batch_size=micro_batch_size) for r in range(dp_size)]
    for step in range(9):
        batches = [rank.batch(step) for rank in ranks]
        assert len({len(micro_batches) for micro_batches in batches}) == 1
        flat = [b for micro_batches in batches for b in micro_batches]
        assert all(b.num_rows == micro_batch_size for b in flat)
        rows = [int(row[0]) for b in flat for row in b.tokens]
        assert [row for row in rows if row != 999] == ranks[0].sampler.rows(step)
        learned = sum(int(b.count(Unit.TOKEN)) for b in flat)
        expected = [Rows(20)[row] for row in ranks[0].sampler.rows(step)]
        assert learned == sum(sum(sample.sequences[0].loss_mask[1:]) for sample in expected)


@pytest.mark.parametrize("num_rows", [1, 3])
@pytest.mark.parametrize("dp_size", [1, 4])
def test_a_file_shorter_than_a_batch(num_rows, dp_size):
    ranks = [loader(num_rows, dp_rank=r, dp_size=dp_size, global_batch_size=128) for r in range(dp_size)]
    for step in range(3):
        flat = [b for rank in ranks for b in rank.batch(step)]
        assert sorted(int(row[0]) for b in flat for row in b.tokens if row[0] != 999) == list(range(num_rows))


@pytest.mark.parametrize("num_workers", [0, 1, 3])
@pytest.mark.parametrize("start", [0, 1, 4, 7])
def test_a_restart_goes_on_where_it_stopped(num_workers, start):
    straight = as_lists(loader().iterate(0, 9))
    resumed = loader(num_workers=num_workers)
    assert as_lists(resumed.iterate(start, 9)) == straight[start:]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_truncated_rows_are_counted_as_they_are_handed_out(num_workers):
    batches = loader(num_workers=num_workers)
    steps = batches.iterate(0, 4)
    next(steps)
    rows = batches.sampler.rows(0)
    assert batches.num_seen == 6
    assert batches.num_truncated == sum(Rows(20)[row].truncated for row in rows)
    list(steps)
    assert (batches.num_seen, batches.num_truncated) == (
        20,
        sum(Rows(20)[row].truncated for row in range(20)),
    )


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_bad_row_is_reported_from_a_thread_too(num_workers):
    class Bad(Rows):
        def __getitem__(self, index):
            if index == 5:
                raise UserError("rows.jsonl, line 6: bad", fix="mend it")
            return super().__getitem__(index)

    with pytest.raises(UserError, match="line 6"):
        list(loader(num_workers=num_workers, rows=Bad(20)).iterate(0, 4))


def test_neighbours_do_not_change_a_row():
    random.seed(0)
    for step in random.sample(range(40), 5):
        for batch in loader().batch(step):
            for row, mask, length in zip(batch.tokens, batch.loss_mask, batch.lengths, strict=True):
                n = int(length)
                assert torch.equal(row[n:], torch.full_like(row[n:], 999))
                assert not mask[n:].any()
                if row[0] != 999:
                    assert row[:n].tolist() == Rows(20)[int(row[0])].tokens


def test_without_pipeline_stages_each_micro_batch_is_as_long_as_it_must_be():
    samples = [row_of([1] * n) for n in (3, 4, 9, 2)]
    sampler = GlobalBatchSampler(4, 4, shuffle=False, seed=0, drop_last=True)
    options = {
        "collate": collate,
        "dp_rank": 0,
        "dp_size": 1,
        "micro_batch_size": 2,
        "pad_id": 0,
        "multiple": 2,
        "max_length": 16,
    }
    for one_length, expected in ((True, [10, 10]), (False, [4, 10])):
        loader = BatchLoader(samples, sampler, **options, one_length=one_length)
        assert [batch.seq_length for batch in loader.batch(0)] == expected


PAIRS = [row_of([i] * (i % 7 + 2), [i] * (i % 5 + 3)) for i in range(20)]
PROMPTS = [row_of([i] * (i % 7 + 1)) for i in range(20)]


def pair_loader(*, dp_rank=0, dp_size=1, num_workers=0, micro_batch_size=2, blend=()):
    sampler = GlobalBatchSampler(20, 6, shuffle=True, seed=3, drop_last=False, blend=blend)
    return BatchLoader(
        PAIRS,
        sampler,
        collate=collate,
        dp_rank=dp_rank,
        dp_size=dp_size,
        micro_batch_size=micro_batch_size,
        pad_id=999,
        multiple=4,
        max_length=12,
        num_workers=num_workers,
    )


@pytest.mark.parametrize("dp_size", [1, 2, 3])
@pytest.mark.parametrize("micro_batch_size", [1, 2, 4])
def test_a_micro_batch_counts_pairs_and_keeps_them_together(dp_size, micro_batch_size):
    ranks = [
        pair_loader(dp_rank=r, dp_size=dp_size, micro_batch_size=micro_batch_size) for r in range(dp_size)
    ]
    for step in range(5):
        flat = [b for rank in ranks for b in rank.batch(step)]
        assert all(b.num_rows == 2 * micro_batch_size for b in flat)
        pairs = [
            (b.tokens[i, : b.lengths[i]].tolist(), b.tokens[i + 1, : b.lengths[i + 1]].tolist())
            for b in flat
            for i in range(0, b.num_rows, 2)
        ]
        rows = ranks[0].sampler.rows(step)
        assert [pair for pair in pairs if pair != ([999], [999])] == [
            tuple(sequence.tokens for sequence in PAIRS[row].sequences) for row in rows
        ]
        assert sum(int(b.count(Unit.PAIR)) for b in flat) == len(rows)
        for b in flat:
            for length, mask, row in zip(b.lengths, b.loss_mask, b.tokens, strict=True):
                assert mask.nonzero().flatten().tolist() == ([] if row[0] == 999 else [int(length) - 1])


@pytest.mark.parametrize(
    "blend", [(), (BlendSource(num_rows=5, weight=3), BlendSource(num_rows=15, weight=1))]
)
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("start", [1, 6])
def test_pairs_go_on_where_they_stopped(blend, num_workers, start):
    straight = as_lists(pair_loader(blend=blend).iterate(0, 9))
    resumed = pair_loader(blend=blend, num_workers=num_workers)
    assert as_lists(resumed.iterate(start, 9)) == straight[start:]


@pytest.mark.parametrize("dp_size", [1, 3])
def test_prompts_are_dealt_out_without_fillers(dp_size):
    sampler = GlobalBatchSampler(20, 6, shuffle=False, seed=0, drop_last=False)
    ranks = [
        BatchLoader(
            PROMPTS,
            sampler,
            collate=uncollated,
            pads=False,
            dp_rank=rank,
            dp_size=dp_size,
            micro_batch_size=2,
            pad_id=0,
            multiple=1,
            max_length=8,
        )
        for rank in range(dp_size)
    ]
    for step in range(4):
        found = [prompt for rank in ranks for micro in rank.batch(step) for prompt in micro]
        assert found == PROMPTS[6 * step : 6 * step + 6]
    assert sum(rank.num_seen for rank in ranks) == 20


def test_packed_micro_batches_hold_the_same_sequences_without_padding():
    wide = loader(num_rows=20, global_batch_size=6, micro_batch_size=4)
    packed = replace(wide, packing=True, one_length=False)
    for step in range(4):
        for padded, row in zip(wide.batch(step), packed.batch(step), strict=True):
            assert row.tokens.shape == (1, -(-int(padded.lengths.sum()) // 4) * 4)
            assert row.lengths.tolist() == padded.lengths.tolist()
            assert row.count(Unit.TOKEN) == padded.count(Unit.TOKEN)
            real = padded.tokens[padded.real_tokens()]
            assert row.tokens[0].tolist() == [*real.tolist(), *[999] * (row.seq_length - len(real))]
    lengths = {micro.seq_length for micro in replace(wide, packing=True).batch(0)}
    assert len(lengths) == 1, "pipeline stages exchange one shape"
