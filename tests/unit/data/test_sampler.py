# SPDX-License-Identifier: Apache-2.0
"""Which rows a batch has: over epochs, after a resume, and over ranks."""

from itertools import chain

import pytest

from nemo_aligner.data.sampler import GlobalBatchSampler, rank_rows


def sampler(num_samples=10, global_batch_size=4, *, shuffle=True, seed=7, drop_last=True):
    return GlobalBatchSampler(num_samples, global_batch_size, shuffle=shuffle, seed=seed, drop_last=drop_last)


@pytest.mark.parametrize(
    ("num_samples", "drop_last", "sizes"),
    [
        (10, True, [4, 4]),
        (10, False, [4, 4, 2]),
        (8, False, [4, 4]),
        (3, True, [3]),
        (3, False, [3]),
        (1, True, [1]),
    ],
)
def test_batches_of_an_epoch(num_samples, drop_last, sizes):
    batches = sampler(num_samples, drop_last=drop_last)
    assert batches.batches_per_epoch == len(sizes)
    rows = [batches.rows(i) for i in range(len(sizes))]
    assert [len(batch) for batch in rows] == sizes
    seen = list(chain.from_iterable(rows))
    assert len(set(seen)) == len(seen)
    assert set(seen) <= set(range(num_samples))


def test_file_order_without_shuffle():
    plain = sampler(shuffle=False, drop_last=False)
    assert [plain.rows(i) for i in range(4)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9], [0, 1, 2, 3]]


def test_each_epoch_has_its_own_order_and_every_row():
    batches = sampler(num_samples=100, global_batch_size=10)
    epochs = [[row for i in range(10) for row in batches.rows(10 * epoch + i)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(100)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert epochs[0] != list(range(100))


def test_a_batch_is_a_function_of_seed_and_index():
    straight = sampler()
    expected = [straight.rows(i) for i in range(9)]
    for start in range(9):
        assert sampler().rows(start) == expected[start]
    assert [sampler(seed=8).rows(i) for i in range(9)] != expected
    backwards = sampler()
    assert [backwards.rows(i) for i in reversed(range(9))] == expected[::-1]


@pytest.mark.parametrize("num_rows", [1, 3, 5, 8, 16])
@pytest.mark.parametrize("dp_size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("micro_batch_size", [1, 2, 3])
def test_ranks_share_a_batch(num_rows, dp_size, micro_batch_size):
    rows = [100 + i for i in range(num_rows)]
    ranks = [
        rank_rows(rows, dp_rank=rank, dp_size=dp_size, micro_batch_size=micro_batch_size)
        for rank in range(dp_size)
    ]
    assert [row for rank in ranks for micro in rank for row in micro] == rows
    assert len({len(rank) for rank in ranks}) == 1
    alone = rank_rows(rows, dp_rank=0, dp_size=1, micro_batch_size=micro_batch_size)
    assert [micro for rank in ranks for micro in rank if micro] == alone
    assert all(len(micro) <= micro_batch_size for micro in alone)
